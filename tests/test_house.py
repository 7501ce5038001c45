"""The house plan holds: data flow one way, imports are light, and what is shipped is whole."""
import ast
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLAN = ["files", "video", "loader", "sim", "shards", "ingest", "bair", "masks", "coco", "conv", "vqvae", "linear_start", "videogpt", "magvit",
        "checkpoints", "training", "pretrain", "objectives", "scale", "encoders", "features", "futures", "latents", "heads", "losses", "metrics",
        "probe", "experiment", "kernels", "runner", "results", "viz", "latent_plots", "explore", "label", "bench", "cli"]
MODULES = [name for name in PLAN if (ROOT / "vpenc" / f"{name}.py").exists()]


def imported_parts(path: Path) -> set[str]:
    "The vpenc modules that a source file imports, at the top or inside functions."
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):  # `from .files import x`, `from . import files` or `from vpenc.files import x`
            parts = (("vpenc." if node.level else "") + (node.module or "")).strip(".").split(".")
            if parts[0] == "vpenc": names |= set(parts[1:2]) or {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("vpenc.")}
    return names & set(PLAN)


def test_every_module_has_its_place():
    found = {path.stem for path in (ROOT / "vpenc").glob("*.py")} - {"__init__", "_modidx"}
    assert found <= set(PLAN), f"modules without a place in the house plan: {found - set(PLAN)}"


@pytest.mark.parametrize("name", MODULES)
def test_nothing_imports_from_below_itself(name):
    below = {other for other in imported_parts(ROOT / "vpenc" / f"{name}.py") if PLAN.index(other) >= PLAN.index(name)}
    assert not below, f"{name} imports {below}"


def test_imports_are_light():
    "Importing any library module loads nothing heavy beyond torch, numpy and h5py."
    heavy = ["matplotlib", "pandas", "scipy", "torchmetrics", "mujoco", "IPython", "papermill", "nbformat", "nbdev",
             "fastcore", "PIL", "tqdm", "sklearn"]
    code = ("import sys, torch, h5py, safetensors.torch; base = set(sys.modules)\n"
            + "".join(f"import vpenc.{name}\n" for name in MODULES)
            + f"print([m for m in {heavy!r} if m in sys.modules and m not in base])")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def test_runtime_does_not_need_notebook_tools():
    "A pip-installed vpenc needs neither nbdev nor Jupyter: blocking them leaves every module importable."
    code = ("import sys\nfor name in ('nbdev', 'fastcore', 'execnb', 'IPython', 'ipykernel', 'papermill', 'nbformat', 'jupyterlab',"
            " 'ipywidgets', 'nbconvert'): sys.modules[name] = None\n" + "".join(f"import vpenc.{name}\n" for name in MODULES))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_library_notebooks_open_with_title_and_summary():
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        lines = [line for line in first.splitlines() if line.strip()]
        assert lines[0].startswith("# ") and lines[1].startswith("> "), f"{path.name} opens with {lines[:2]}"


def test_wheel_is_whole_and_small(tmp_path):
    "The wheel carries the library, the shipped model and the notebooks it runs, in at most 20 MB."
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".*", "outputs", "data", "build", "*.egg-info"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, source],
                   check=True)
    (wheel,) = tmp_path.glob("vpenc-*.whl")
    assert wheel.stat().st_size < 20e6
    names = set(zipfile.ZipFile(wheel).namelist())
    needed = {f"vpenc/{name}.py" for name in MODULES}
    needed |= {f"vpenc/models/videogpt-sim/{name}" for name in ("config.json", "model.safetensors", "README.md")}
    needed |= {f"vpenc/notebooks/{name}.ipynb" for name in ("ablation", "results", "futures", "latents")}
    assert needed <= names, f"missing from the wheel: {needed - names}"


def test_package_notebooks_are_the_analysis_notebooks():
    for copy in (ROOT / "vpenc" / "notebooks").glob("*.ipynb"):
        assert copy.read_bytes() == (ROOT / "nbs" / "analysis" / copy.name).read_bytes(), f"{copy.name} differs: run `make check`"
