"""The house plan holds: data flow one way, imports are light, and what is shipped is whole."""
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import house  # noqa: E402

MODULES = house.modules()


def test_folders_are_those_of_the_plan():
    assert [path.name for path in sorted((ROOT / "nbs").glob("[0-9]_*"))] == [f"{i}_{name}" for i, name in enumerate(house.MAY_IMPORT, 1)]
    for name in MODULES: assert (ROOT / "vpenc" / f"{name.replace('.', '/')}.py").exists(), name


def test_data_flow_one_way(): assert house.faults() == []


def test_the_check_finds_what_goes_against_the_plan(tmp_path, monkeypatch):
    "An import from a later folder, one from a folder that is not allowed, and a module without a notebook are each named."
    package = shutil.copytree(ROOT / "vpenc", tmp_path / "vpenc", ignore=shutil.ignore_patterns("weights", "notebooks"))
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    monkeypatch.setattr(house, "ROOT", tmp_path)
    with open(package / "data" / "video.py", "a") as file: file.write("\ndef later():\n    from vpenc.views import viz\n")
    with open(package / "encoders" / "taps.py", "a") as file: file.write("\nfrom ..training import loop\n")
    (package / "data" / "stray.py").write_text("")
    assert house.faults() == ["vpenc/data.stray: no notebook exports it", "data.video imports views.viz, which comes after it",
                              "encoders.taps imports training.loop: encoders may import only data, models"]


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
    for path in sorted((ROOT / "nbs").glob("**/[0-9]*.ipynb")):
        first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        lines = [line for line in first.splitlines() if line.strip()]
        assert lines[0].startswith("# ") and lines[1].startswith("> "), f"{path.name} opens with {lines[:2]}"


def test_wheel_is_whole_and_small(tmp_path):
    "The wheel carries the library, the shipped model and the notebooks it runs, in at most 20 MB."
    left_out = lambda folder, names: {name for name in names if Path(folder) == ROOT and name in ("outputs", "data", "build")
                                      or name.startswith(".") or name.endswith(".egg-info")}
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=left_out)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, source],
                   check=True)
    (wheel,) = tmp_path.glob("vpenc-*.whl")
    assert wheel.stat().st_size < 25e6
    names = set(zipfile.ZipFile(wheel).namelist())
    needed = {f"vpenc/{name.replace('.', '/')}.py" for name in MODULES} | {"vpenc/py.typed"}
    needed |= {f"vpenc/weights/videogpt-sim/{name}" for name in ("config.json", "model.safetensors", "README.md")}
    needed |= {f"vpenc/notebooks/{name}.ipynb" for name in ("ablation", "results", "futures", "latents")}
    assert needed <= names, f"missing from the wheel: {needed - names}"


def test_package_notebooks_are_the_analysis_notebooks():
    for copy in (ROOT / "vpenc" / "notebooks").glob("*.ipynb"):
        assert copy.read_bytes() == (ROOT / "nbs" / "analysis" / copy.name).read_bytes(), f"{copy.name} differs: run `make check`"
