"""Make README.md from nbs/index.ipynb: run the notebook, keep its outputs, drop cells marked `#| hide`.

Usage: python tools/readme.py        (run by `make check`; nbdev's own README maker needs Quarto)
"""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import ExecutePreprocessor

ROOT = Path(__file__).resolve().parent.parent


def execute(path: Path):
    "Run the notebook in its folder and return it with fresh outputs, free of volatile metadata."
    notebook = nbformat.read(path, as_version=4)
    ExecutePreprocessor(timeout=300, kernel_name="python3").preprocess(notebook, {"metadata": {"path": str(path.parent)}})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code": continue
        cell.execution_count = None
        for output in cell.outputs:
            if "execution_count" in output: output.execution_count = None
            output.get("data", {}).pop("text/plain", None) if "text/markdown" in output.get("data", {}) else None
    return notebook


def to_markdown(notebook) -> str:
    "The notebook as GitHub Markdown; links that climb out of nbs/ are made relative to the project's top."
    shown = notebook.copy()
    shown.cells = []
    for cell in notebook.cells:
        lines = cell.source.splitlines()
        directives = {line.strip() for line in lines if line.startswith("#|")}
        if directives & {"#| hide", "#|hide"}: continue
        cell = cell.copy()
        if directives & {"#| echo: false"}: cell.source = ""
        else: cell.source = "\n".join(line for line in lines if not line.startswith("#|"))
        shown.cells.append(cell)
    body, _ = MarkdownExporter().from_notebook_node(shown)
    body = re.sub(r"```python\s*```\n*", "", body)  # cells whose code is hidden
    body = re.sub(r"((?:\]\(|src=\"))\.\./", r"\1", body)
    return re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


def main() -> int:
    path = ROOT / "nbs" / "index.ipynb"
    notebook = execute(path)
    nbformat.write(notebook, path)
    (ROOT / "README.md").write_text(to_markdown(notebook), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
