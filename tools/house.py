"""Check the house plan: data flow one way. Each folder imports from the folders before it, and inside a folder from the modules before.

Usage: python tools/house.py        (run by `make check`)
"""
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {  # folder -> the folders whose modules it may import, beside `files` and its own
    "data": (), "models": ("data",), "training": ("data", "models"), "encoders": ("data", "models"),
    "probing": ("data", "models", "encoders"), "experiments": ("data", "models", "encoders", "probing"),
    "views": ("data", "models", "encoders", "probing", "experiments"),
}


def modules() -> list[str]:
    "All modules in the order of their notebooks, such as `files`, `data.video`, ..., `cli`."
    found = []
    for notebook in sorted((ROOT / "nbs").glob("**/[0-9]*.ipynb"), key=lambda path: path.relative_to(ROOT).as_posix()):
        exported = re.search(r"#\| default_exp ([\w.]+)", notebook.read_text(encoding="utf-8"))
        if exported: found.append(exported[1])
    return found


def imported(path: Path) -> set[str]:
    "The vpenc modules that a source file imports, at its top or inside functions, without the leading `vpenc.`."
    package, names = ["vpenc", *path.relative_to(ROOT / "vpenc").parts[:-1]], set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*(package[:len(package) - node.level + 1] if node.level else []), *([node.module] if node.module else [])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("vpenc.") for name in names if name.startswith("vpenc.")}


def faults() -> list[str]:
    "One line for each import that goes against the plan, and for each module that no notebook makes."
    order, lines = modules(), []
    for path in sorted((ROOT / "vpenc").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "vpenc").with_suffix("").parts)
        if path.stem in ("__init__", "_modidx"): continue
        if name not in order:
            lines.append(f"vpenc/{name}: no notebook exports it")
            continue
        folder = name.partition(".")[0]
        for other in sorted(imported(path) & {*order}):
            home = other.partition(".")[0]
            if order.index(other) >= order.index(name): lines.append(f"{name} imports {other}, which comes after it")
            elif folder in MAY_IMPORT and home not in (folder, "files", "identity", *MAY_IMPORT[folder]):
                lines.append(f"{name} imports {other}: {folder} may import only {', '.join(MAY_IMPORT[folder]) or 'files'}")
    return lines


if __name__ == "__main__":
    for line in faults(): print(line, file=sys.stderr)
    sys.exit(bool(faults()))
