"""`import vpenc` is light, offers its names, and type checkers see them."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vpenc

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"load_encoder", "load_videogpt", "load_vqvae", "load_magvit", "fit_probe", "Experiment", "simulate", "LabelledFrames",
         "ClipStore", "explore", "label"}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()


def test_importing_vpenc_loads_nothing_else():
    code = "import sys; before = set(sys.modules); import vpenc; print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    assert set(eval(run(code))) <= {"vpenc", "importlib", "typing", "warnings", "_weakrefset", "collections", "contextlib", "functools", "re", "enum",
                                    "operator", "keyword", "reprlib", "types", "copyreg", "sre_compile", "sre_parse", "sre_constants", "_collections",
                                    "_functools", "_operator", "_sre", "_typing", "itertools"}


def test_names_are_offered_and_belong_to_their_modules():
    assert set(vpenc.__all__) == NAMES and NAMES <= set(dir(vpenc))
    for name in NAMES:
        thing = getattr(vpenc, name)
        assert thing.__name__ == name and thing.__doc__, name
    with pytest.raises(AttributeError, match="no attribute .load_encodr."): _ = vpenc.load_encodr


def test_help_shows_the_names():
    shown = run("import vpenc; help(vpenc)")
    assert all(name in shown for name in NAMES)


def test_a_type_checker_sees_the_names(tmp_path):
    "The first three lines are right and their types known; the mistyped name of the fourth is found."
    pytest.importorskip("mypy")
    script = tmp_path / "script.py"
    script.write_text("import vpenc\nencoder = vpenc.load_encoder('videogpt:resnet')\nreveal_type(vpenc.ClipStore('clips.h5'))\n"
                      "vpenc.load_encodr('videogpt:resnet')\n")
    done = subprocess.run([sys.executable, "-m", "mypy", "--ignore-missing-imports", "--follow-imports=silent", "--no-incremental", script],
                          capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(ROOT)})
    told = [line for line in done.stdout.splitlines() if line.startswith("script.py")]
    assert 'script.py:3: note: Revealed type is "vpenc.data.video.ClipStore"' in told, done.stdout + done.stderr
    assert [line[:12] for line in told if "error" in line] == ["script.py:4:"] and "load_encodr" in done.stdout, done.stdout
