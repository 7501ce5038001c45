"""The README's starts run as they stand, and its numbers are those of the published results."""
import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "outputs" / "reference"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "What the starts name: a file of clips and an original checkpoint."
    from test_checkpoints import gpt_file
    from vpenc.data.sim import generate_clips
    path = tmp_path_factory.mktemp("start")
    (path / "data").mkdir()
    generate_clips(path / "data" / "bair.h5", n_train=3, n_test=2, processes=1)
    gpt_file(path / "my.ckpt")
    return path


def starts(folder, code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize("number", range(3))
def test_starts_run(folder, number):
    before = "import torch; net = torch.nn.Conv2d(3, 4, 3, stride=2)\n" if "net" in PYTHON[number] else ""
    done = starts(folder, before + PYTHON[number])
    assert done.returncode == 0, done.stderr[-2000:]


def test_there_are_three_starts(): assert len(PYTHON) == 3 and all(block.startswith("import vpenc") for block in PYTHON)


def test_commands_of_the_starts_exist():
    "Every `vpenc ...` line of the README parses: its command and its options are known."
    for line in re.findall(r"^vpenc [^\n#]+", README, re.M):
        words = line.split()[1:]
        depth = 2 if words[0] == "data" else 1
        shown = subprocess.run([sys.executable, "-c", "from vpenc.cli import main; main()", *words[:depth], "--help"], capture_output=True, text=True, cwd=ROOT)
        assert shown.returncode == 0, line
        for option in re.findall(r"--[a-z-]+", line): assert option in shown.stdout, f"{line}: no {option}"


def test_first_screen():
    "One sentence, one picture, two commands, the result; the table comes after the starts."
    first = README.split("A model that predicts")[0]
    assert first.count("![") == 1 and "make table1" in first and "IoU" in first and len(first.splitlines()) < 20
    assert README.index("## Start") < README.index("| **Table 1 of the paper** |")


def rows():
    "Row of the README's table -> its cells."
    for line in README.splitlines():
        if line.startswith("| ") and line.count("|") == 9 and "**" not in line: yield [cell.strip() for cell in line.strip("|").split("|")]


def results():
    for path in REFERENCE.glob("*.json"):
        yield json.loads(path.read_text())


def test_scores_of_the_table_come_from_the_runs():
    "Each IoU is the mean over seeds and test images that stands in the run's own file, and the units are its trajectories."
    known = {(f"{np.mean(run['per_image']):.3f}", str(len({t for seed in run["trajectory"] for t in seed})))
             for run in results() if run["experiment"]["protocol"] == "corrected"}
    shown = [(cells[3], cells[5]) for cells in rows() if re.fullmatch(r"\d\.\d{3}", cells[3])]
    assert len(shown) == 28
    assert not [each for each in shown if each not in known]


def test_numbers_in_the_prose_stand_in_the_results():
    text = " ".join(README.split())
    with open(REFERENCE / "finetune" / "pairs.csv") as file: pairs = {row["against"]: row for row in csv.DictReader(file) if row["row"] == "fine-tuned"}
    for against in ("frozen", "from random weights", "U-Net"):
        low, high = pairs[against]["95 % interval"].split(" to ")
        assert re.search(rf"{re.escape(pairs[against]['difference'].lstrip('+'))} \({re.escape(low)} to {re.escape(high)}\)", text), against
    with open(REFERENCE / "objectives" / "objectives.csv") as file: table = list(csv.DictReader(file))
    for domain in ("bair", "camouflage"):
        ahead = [float(re.match(r"[+-]?[\d.]+", row["future - still"])[0]) for row in table if row["domain"] == domain]
        assert f"by {min(ahead):.3f} to {max(ahead):.3f}" in text, domain
    seen = json.loads((REFERENCE / "futures" / "futures.json").read_text())
    assert f"{seen['inside']['samples']:.0%} of the pixels that change" in text and f"(chance {seen['inside']['chance']:.0%})" in text


def test_pictures_and_pages_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"): assert (ROOT / target).exists(), target


def test_every_notebook_has_its_page(monkeypatch):
    "The documentation's navigation leads to every notebook."
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    pytest.importorskip("nbclient")
    import docs

    def pages(part): return [page for each in part for page in (pages(each) if isinstance(each, (list, dict)) else [each])] \
        if isinstance(part, list) else pages(list(part.values()))
    reached = {page for page in pages(docs.navigation())}
    written = {path.relative_to(ROOT / "nbs").as_posix() for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts}
    assert {page for page in written if not page.startswith("index")} <= reached


def test_numbers_of_real_frames_come_from_the_run():
    rows = {(row["encoder"], row["head"], str(row["augment"]), row["kind"], str(row["k"])): row for row in json.loads((REFERENCE / "real/real.json").read_text())["rows"]}
    span = lambda row: f"{float(row['iou']):.3f} ({float(row['low']):.3f} to {float(row['high']):.3f})"
    said = " ".join(README.split("**Does it hold on real frames?**")[1].split("**Does the prediction")[0].split())
    stages, random = "videogpt:resnet:stages", "random/videogpt:resnet:stages"
    named = (stages, "linear1x1"), (random, "linear1x1"), ("pixels", "linear7x7"), (stages, "heavy"), (random, "heavy"), ("pixels", "unet")
    zero = [span(rows[encoder, head, "1", "simulated", "0"]) for encoder, head in named]
    alone = [span(rows[encoder, head, "1", "real", "1"]) for encoder, head in ((stages, "linear1x1"), ("pixels", "unet"))]
    assert re.findall(r"\d\.\d{3} \(\d\.\d{3} to \d\.\d{3}\)", said) == zero + alone
    run = json.loads((REFERENCE / "real/real.json").read_text())
    assert (run["labels"], run["data"]["frames"], run["data"]["units"]) == (600, 28, 7) and "600 such simulated labels" in said and "28 real BAIR frames of 7 trajectories" in said


def test_numbers_of_common_fate_come_from_the_run():
    "Every score of the paragraph is a cell of the published tables, in its order."
    folder = REFERENCE / "common_fate"
    rows = [row for row in csv.DictReader(open(folder / "common-fate.csv"))]
    motion = {(row["encoder"], row["head"]): row for row in rows if row["fitted_to"] == "motion"}
    both = {row["k"]: row for row in rows if row["fitted_to"] == "motion + labels" and row["encoder"] == "videogpt:resnet:stages"}
    alone = {row["way"]: row for row in csv.DictReader(open(folder / "predictor-alone.csv"))}
    span = lambda row, names=("iou", "low", "high"), form=".3f": "{} ({} to {})".format(*(f"{float(row[name]):{form}}" for name in names))
    wanted = [span(motion[each]) for each in (("videogpt:resnet:stages", "linear1x1"), ("random/videogpt:resnet:stages", "linear1x1"), ("pixels", "linear7x7"))]
    wanted += [span(both[k], ("motion_adds", "adds_low", "adds_high"), "+.3f") for k in ("1", "25")]
    wanted += [span(alone[way]) for way in ("change over sampled futures", "floor: mean mask of the labels", "floor: difference from the median frame")]
    said = " ".join(README.split("**Is motion enough?**")[1].split("**Does it hold")[0].split())
    assert re.findall(r"[+-]?\d\.\d{3} \([+-]?\d\.\d{3} to [+-]?\d\.\d{3}\)", said) == wanted
    run = json.loads((folder / "common-fate.json").read_text())
    assert f"at {run['agreement']:.3f} only" in said and (run["clips"], run["test"], run["frames"], run["futures"], len(run["seeds"])) == (150, 200, 24, 4, 2)


def test_numbers_of_magvit_come_from_the_run():
    folder = REFERENCE / "magvit"
    table = [row for row in csv.DictReader(open(REFERENCE / "table.csv")) if "magvit" in row["encoder"]]
    rows = {row["encoder"]: f"{float(row['iou']):.3f} ({float(row['low']):.3f} to {float(row['high']):.3f})" for row in table}
    said = " ".join(README.split("**And MAGVIT?**")[1].split("**Does fine-tuning")[0].split())
    assert re.findall(r"\d\.\d{3} \(\d\.\d{3} to \d\.\d{3}\)", said) == [
        *(rows[prefix + tap] for tap in ("magvit:hidden[1]", "magvit:pre") for prefix in ("", "random/")), "0.038 (0.028 to 0.048)"]
    equal = {(row["a"], row["b"]): [round(-float(row[name]), 3) for name in ("difference", "high", "low")] for row in csv.DictReader(open(folder / "equal-pairs.csv"))}
    assert equal["magvit:hidden[1]", "videogpt:hidden[1]"] == [.038, .028, .048] and "24 minutes of a CPU thread" in said
    pairs = {(row["a"], row["b"]): row for row in csv.DictReader(open(folder / "pairs.csv"))}
    assert float(pairs["magvit:pre", "random/magvit:pre"]["low"]) < 0  # "no easier to read"
    assert float(pairs["magvit:hidden[1]", "random/magvit:hidden[1]"]["low"]) > .3
    objectives = {(row["domain"], row["labels"]): row for row in csv.DictReader(open(folder / "objectives.csv"))}
    for labels in ("10", "150"):  # predicting is better: the interval excludes zero
        better = objectives["bair", labels]["future - still"]
        assert f"{better} with {labels}" in said and float(re.findall(r"[+-]\d\.\d+", better)[1]) > 0
