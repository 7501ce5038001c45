"""Build the documentation in _docs/site from the README and the notebooks, offline, and check every link in it.

Usage: python tools/docs.py          notebooks as they are committed or published
       python tools/docs.py --run    library notebooks run first, to show what they draw (kept in _docs/executed)
"""
import ast
import hashlib
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NBS, REFERENCE, HOME = ROOT / "nbs", ROOT / "outputs" / "reference", ROOT / "_docs"
PAGES, SITE = HOME / "pages", HOME / "site"
TITLES = {"1_data": "Data", "2_models": "Models", "3_training": "Training", "4_encoders": "Encoders", "5_probing": "Probing",
          "6_experiments": "Experiments", "7_views": "Views"}
TEXTS = ("CHANGELOG.md", "CONTRIBUTING.md")
PUBLISHED = {"ablation": "videogpt-resnet_attention_corrected"}  # analysis notebook -> executed one in outputs/reference
NOTEBOOK = re.compile(r"`((?:[1-7]_[a-z]+|analysis)/\w+)`|`((?:00|8\d)_\w+)`")  # a notebook named in prose


def notebooks() -> dict[str, list[Path]]:
    "Section of the navigation -> its notebooks, in the order in which data flow; all of nbs/ but the index and the how-to."
    top = sorted(NBS.glob("[0-9]*.ipynb"))
    sections = {"Files": top[:1]} | {title: sorted((NBS / folder).glob("*.ipynb")) for folder, title in TITLES.items()}
    return sections | {"Command line": top[1:], "Analysis": sorted((NBS / "analysis").glob("*.ipynb"))}


def title(path: Path) -> str:
    "The heading that a notebook opens with."
    return next(cell.source.splitlines()[0].lstrip("# ") for cell in nbformat.read(path, 4).cells if cell.source.startswith("# "))


def navigation() -> list:
    "The pages as MkDocs wants them: titles and paths below _docs/pages."
    page = lambda path: {title(path): path.relative_to(NBS).as_posix()}
    sections = {name: [page(path) for path in paths] for name, paths in notebooks().items()}
    analysis = sections.pop("Analysis")
    return [{"Start": "index.md"}, {"How do I ...": "how_do_i.ipynb"}, {"Library": [{name: pages} for name, pages in sections.items()]},
            {"Analysis": analysis}, {"API": "api.md"}, {"Project": [{"Changes": "CHANGELOG.md"}, {"Contributing": "CONTRIBUTING.md"}]}]


def source_of(path: Path) -> Path:
    "The notebook to show: for an analysis, the executed one where it is published."
    executed = [REFERENCE / path.stem / path.name, REFERENCE / f"{PUBLISHED.get(path.stem, path.stem)}.ipynb"]
    return next((each for each in executed if path.parent.name == "analysis" and each.exists()), path)


def executed(path: Path):
    "The notebook with outputs, run in its folder; kept until it or the library changes. Cells that tests leave out are left out."
    code = b"".join(each.read_bytes() for each in sorted((ROOT / "vpenc").rglob("*.py")))
    kept = HOME / "executed" / f"{path.stem}-{hashlib.sha256(path.read_bytes() + code).hexdigest()[:16]}.ipynb"
    if kept.exists(): return nbformat.read(kept, 4)
    print(f"running {path.relative_to(ROOT)}", flush=True)
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code" and re.search(r"^#\|\s*(eval: *false|notest|slow)", cell.source, re.M): cell.cell_type = "raw"
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == "raw": cell.update(cell_type="code", outputs=[], execution_count=None)
    kept.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, kept)
    return notebook


def linked(text: str, page: str) -> str:
    "Notebooks named in prose become links from `page`."
    def link(found):
        name = found[1] or found[2]
        if not (NBS / f"{name}.ipynb").exists(): return found[0]
        end = ".md" if page.endswith(".md") else ".html"
        target = f"{name}.ipynb" if end == ".md" else f"{name}.html"
        return f"[`{name}`]({os.path.relpath(target, Path(page).parent)})"
    return NOTEBOOK.sub(link, text)


def shown(notebook, page: str):
    "What a reader needs of a notebook: no directives, no hidden cells, no progress bars, no paths of this machine."
    cells = []
    for cell in notebook.cells:
        directives = " ".join(re.findall(r"^#\|.*", cell.source, re.M))
        cell.metadata = {}
        if cell.cell_type == "code":
            if re.search(r"#\|\s*(hide|default_exp)\b", directives): continue
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"
                            and not any("widget" in kind for kind in each.get("data", {}))]
            if not cell.source.strip() and not cell.outputs: continue
        else: cell.source = re.sub(r"^#+ .*", lambda line: line[0].replace("`", ""), linked(cell.source, page), flags=re.M)  # for the contents
        cells.append(cell)
    notebook.cells = cells
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return nbformat.from_dict(json.loads(nbformat.writes(notebook).replace(f"{ROOT}/", "")))


def signature(thing) -> str:
    "The head of a function as it stands in its source, comments of the parameters included."
    text = textwrap.dedent(inspect.getsource(thing))
    body = ast.parse(text).body[0].body[0]
    lines = text.splitlines()[:body.lineno - 1] or [text.splitlines()[0]]
    return "\n".join(line for line in lines if not line.startswith("@")).removesuffix(":")


def described(name: str, thing, level: int) -> list[str]:
    "Heading, head and docstring of a function; of a class also those of its documented methods."
    lines = [f"{'#' * level} `{name}`", ""]
    if not inspect.isclass(thing): lines += ["```python", signature(thing), "```", ""]
    elif "__dataclass_fields__" in vars(thing):
        text = textwrap.dedent(inspect.getsource(thing)).splitlines()
        ends = max((node.end_lineno for node in ast.parse("\n".join(text)).body[0].body if isinstance(node, ast.AnnAssign)), default=1)
        lines += ["```python", *text[:ends], "```", ""]
    lines += [inspect.getdoc(thing) or "", ""]
    if inspect.isclass(thing):
        for method, function in vars(thing).items():
            function = getattr(function, "__func__", function)
            written = inspect.isfunction(function) and function.__code__.co_filename != "<string>"  # not by @dataclass
            if written and inspect.getdoc(function) and (method == "__init__" or not method.startswith("_")):
                lines += described(f"{name}.{method}", function, level + 1)
    return lines


def api() -> str:
    "One section for each public name, with the notebook that defines it."
    import vpenc
    lines = ["# The public names", "", "What `import vpenc` offers; each name is imported when it is first used. Everything else is",
             "reached through its module, and explained in the notebook that makes the module.", ""]
    homes = {match[1]: path for paths in notebooks().values() for path in paths
             if (match := re.search(r"#\| default_exp ([\w.]+)", path.read_text(encoding="utf-8")))}
    for name, home in vpenc._HOME.items():
        thing = getattr(importlib.import_module(f"vpenc.{home}"), name)
        made = homes[thing.__module__.removeprefix("vpenc.")].relative_to(NBS).with_suffix("").as_posix()
        head, *rest = described(name, thing, 2)
        lines += [head, "", f"`vpenc.{name}`, defined in `{made}`.", *rest]
    return linked("\n".join(lines) + "\n", "api.md")


def write_pages(run: bool):
    "All pages below _docs/pages, with the pictures they show."
    shutil.rmtree(PAGES, ignore_errors=True)
    PAGES.mkdir(parents=True)
    for path in REFERENCE.rglob("*"):
        if path.suffix in (".png", ".gif", ".svg"):
            target = PAGES / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    (PAGES / "index.md").write_text(linked((ROOT / "README.md").read_text(encoding="utf-8"), "index.md"), encoding="utf-8")
    for name in TEXTS: shutil.copy(ROOT / name, PAGES / name)
    (PAGES / "api.md").write_text(api(), encoding="utf-8")
    (PAGES / "style.css").write_text(STYLE, encoding="utf-8")
    (PAGES / "iframe-worker.js").write_text(WORKER, encoding="utf-8")
    for path in (NBS / "how_do_i.ipynb", *(each for paths in notebooks().values() for each in paths)):
        source, page = source_of(path), path.relative_to(NBS).as_posix()
        library = path.parent.name != "analysis"
        notebook = executed(path) if path.stem == "how_do_i" or (run and library) else nbformat.read(source, 4)
        (PAGES / page).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(shown(notebook, page), PAGES / page)


STYLE = """.md-grid { max-width: 68rem; }
.md-typeset table:not([class]) { font-size: .62rem; }
.md-typeset table:not([class]) td, .md-typeset table:not([class]) th { padding: .35em .7em; min-width: 0; }
.jupyter-wrapper .jp-InputArea-prompt, .jupyter-wrapper .jp-OutputArea-prompt { display: none !important; }
.jupyter-wrapper .jp-OutputArea-output img { max-width: 100%; height: auto; }
.jupyter-wrapper .jp-OutputArea-output pre { white-space: pre-wrap; }
"""


WORKER = """// A page opened as a file may not start a web worker. Here it runs in a hidden frame, so that the search works without a server.
if (location.protocol === "file:") window.Worker = class extends EventTarget {
    constructor(address) {
        super();
        this.waiting = [];
        const base = new URL(address, location.href);
        this.frame = document.createElement("iframe");
        this.frame.hidden = true;
        document.documentElement.append(this.frame);
        const inside = this.frame.contentWindow, page = this.frame.contentDocument;
        const load = (url) => new Promise((resolve, reject) => {
            const script = page.createElement("script");
            Object.assign(script, {src: new URL(url, base).href, onload: resolve, onerror: reject});
            page.head.append(script);
        });
        inside.importScripts = (...urls) => urls.reduce((done, url) => done.then(() => load(url)), Promise.resolve());
        inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", {data}));
        load(base).then(() => { const sent = this.waiting; this.waiting = null; sent.forEach((data) => this.postMessage(data)); });
    }
    postMessage(data) {
        if (this.waiting) this.waiting.push(data);
        else this.frame.contentWindow.dispatchEvent(new MessageEvent("message", {data}));
    }
    terminate() { this.frame.remove(); }
};
"""


def settings() -> dict:
    "What MkDocs is told; nothing is fetched, by the build or by a reader's browser."
    checks = {"not_found": "warn", "anchors": "warn", "absolute_links": "warn", "unrecognized_links": "warn"}
    theme = {"name": "material", "font": False, "features": ["navigation.tabs", "navigation.top", "toc.follow", "search.highlight",
                                                             "search.suggest", "content.code.copy"],
             "palette": [{"media": "(prefers-color-scheme: light)", "scheme": "default", "primary": "indigo"},
                         {"media": "(prefers-color-scheme: dark)", "scheme": "slate", "primary": "indigo"}]}
    return {"site_name": "vpenc", "site_description": "A video prediction model as a visual encoder", "docs_dir": str(PAGES),
            "site_dir": str(SITE), "use_directory_urls": False, "theme": theme, "nav": navigation(), "extra_css": ["style.css"], "extra": {"polyfills": ["iframe-worker.js"]},
            "plugins": ["search", "offline", {"mkdocs-jupyter": {"execute": False, "include_source": False, "no_input": False}}],
            "markdown_extensions": ["tables", "toc", "pymdownx.superfences", "pymdownx.highlight", "attr_list", "md_in_html"],
            "validation": {"links": checks, "nav": {"omitted_files": "warn", "not_found": "warn"}}}


class Links(HTMLParser):
    "What a page points at, what it loads, and the anchors it has."
    def __init__(self, text: str):
        super().__init__()
        self.to, self.loaded, self.anchors = [], [], {""}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and found.get("href"): self.to.append(found["href"])
        if tag in ("img", "script", "iframe", "source") and found.get("src"): self.loaded.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon") and found.get("href"): self.loaded.append(found["href"])


def broken(site: Path) -> list[str]:
    "One line for each link of a built site that leads nowhere, anchors included, and for each thing loaded from elsewhere."
    pages = {path.resolve(): Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}
    lines = []
    for path, page in sorted(pages.items()):
        name = path.relative_to(site.resolve())
        for link in dict.fromkeys(page.to + page.loaded):
            parts = urlsplit(link)
            if parts.scheme in ("http", "https") or parts.netloc:
                if link in page.loaded: lines.append(f"{name}: loads {link}")
                continue
            if parts.scheme or link.startswith("data:"): continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir(): target = target / "index.html"
            if not target.exists(): lines.append(f"{name}: no file {link}")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors: lines.append(f"{name}: no anchor {link}")
    return lines


def main() -> int:
    write_pages("--run" in sys.argv[1:])
    config = HOME / "mkdocs.yml"
    config.write_text(json.dumps(settings(), indent=1), encoding="utf-8")
    if code := subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--clean", "-f", config],
                              env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}).returncode: return code
    lines = broken(SITE)
    for line in lines: print(line, file=sys.stderr)
    if not lines: print(f"{SITE.relative_to(ROOT)}/index.html: {len(list(SITE.rglob('*.html')))} pages, every link leads somewhere")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
