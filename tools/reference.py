"""Publish a batch: copy its table, figures and results to outputs/reference/ and draw test masks for the README.
Or publish a study: its executed notebook (without progress bars and paths of this machine), figures and tables, in a folder there.

Usage: python tools/reference.py [outputs/table1]        (run by `make reference`)
       python tools/reference.py EXECUTED.ipynb outputs/finetune
"""
import json
import shutil
import sys
from pathlib import Path

import numpy as np

from vpenc.experiments.experiment import Predictor, labels_path
from vpenc.data.masks import LabelledFrames
from vpenc.probing.metrics import iou_per_image
from vpenc.views.viz import show_masks

ROOT = Path(__file__).resolve().parent.parent
FILM = ROOT / "outputs" / "browser" / "explorer.gif"  # of the browser tests, when they have run
SHOWN = "videogpt-resnet_attention_corrected"  # the row whose notebook and masks are published


def draw_masks(probe: Path, path: Path, count: int = 5):
    "Predicted | label | frame for test frames evenly spaced in rank among those that show the robot, worst first."
    test = LabelledFrames.load(labels_path()).part("test")
    probability = Predictor(probe)(test.frames)
    iou = iou_per_image(probability >= .5, test.masks)
    seen = np.flatnonzero(test.masks.any((1, 2)))
    chosen = seen[np.argsort(iou[seen], kind="stable")][np.linspace(.1 * len(seen), len(seen) - 1, count).astype(int)]
    figure = show_masks(test.frames[chosen], probability[chosen], test.masks[chosen], titles=[f"IoU {v:.2f}" for v in iou[chosen]])
    figure.savefig(path, dpi=100, bbox_inches="tight")


def publish_study(executed: Path, results: Path, target: Path):
    "Copy a study's notebook, pictures and tables."
    notebook = json.loads(executed.read_text(encoding="utf-8"))
    notebook["metadata"] = {k: v for k, v in notebook["metadata"].items() if k == "kernelspec"}
    for cell in notebook["cells"]:
        cell["metadata"] = {k: v for k, v in cell["metadata"].items() if k == "tags" and v}
        cell["outputs"] = [o for o in cell.get("outputs", []) if o.get("name") != "stderr" and not any("widget" in kind for kind in o.get("data", {}))]
        if cell["cell_type"] != "code": del cell["outputs"]
    target.mkdir(parents=True, exist_ok=True)
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    (target / f"{results.name}.ipynb").write_text(text.replace(f"{ROOT}/", ""), encoding="utf-8")
    for path in [*results.glob("*.png"), *results.glob("*.csv")]: shutil.copy(path, target)


def main() -> int:
    reference = ROOT / "outputs" / "reference"
    if len(sys.argv) == 3:
        publish_study(Path(sys.argv[1]), Path(sys.argv[2]), reference / Path(sys.argv[2]).name)
        return 0
    batch = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "outputs" / "table1")
    reference.mkdir(parents=True, exist_ok=True)
    for old in reference.iterdir():
        if old.is_file() and old.name != FILM.name: old.unlink()  # studies lie in folders of their own
    films = [FILM] if FILM.exists() else []
    for path in [*batch.glob("table*"), *batch.glob("*.json"), *films]: shutil.copy(path, reference)
    text = (batch / f"{SHOWN}.ipynb").read_text(encoding="utf-8")
    (reference / f"{SHOWN}.ipynb").write_text(text.replace(f"{ROOT}/", ""), encoding="utf-8")  # no path of this machine
    draw_masks(batch / "probes" / SHOWN, reference / "masks.png")
    print(f"{len(list(reference.iterdir()))} files in {reference}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
