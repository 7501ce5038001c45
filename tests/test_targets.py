"Many targets, few labels and the report, as a user runs them: command line and notebooks, on a few simulated frames."
import json
from pathlib import Path

import numpy as np
import papermill
import pytest
import torch

from vpenc.cli import main
from vpenc.data.masks import LabelledFrames
from vpenc.data.sim import SimConfig, generate_labels
from vpenc.encoders.taps import load_encoder
from vpenc.probing.targets import TargetProbe, fit_target

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    return generate_labels(tmp_path_factory.mktemp("labels") / "few.h5", SimConfig(frames=3), dict(train=12, val=4, test=12), processes=1)


def run(name, folder, **parameters):
    papermill.execute_notebook(ROOT / f"nbs/analysis/{name}.ipynb", folder / f"{name}.ipynb", parameters, cwd=str(folder), progress_bar=False)


def test_tasks_and_report(labels, tmp_path, capsys):
    "The notebook's results are those of the command line, which finds all done; the report shows them."
    few = dict(labels=12, test=12, epochs=1, data=str(labels))
    run("tasks", tmp_path, targets="depth,mask", encoders="pixels", cache=str(tmp_path / "cache"), out=str(tmp_path / "tasks"), seeds="0", **few)
    files = {path.name: path.read_bytes() for path in (tmp_path / "tasks").glob("*.json")}
    assert len(files) == 2 and (tmp_path / "tasks/answers.png").stat().st_size > 5000
    settings = [word for key, value in few.items() for word in ("--set", f"{key}={value}")]
    assert main(["run", "tasks", "--dry-run", "--out", str(tmp_path / "tasks"), "--seeds", "0", *settings]) == 0
    assert "to do" in capsys.readouterr().out  # the taps that the notebook was not asked for
    assert main(["table", str(tmp_path / "tasks")]) == 0
    table = capsys.readouterr().out
    for result in map(json.loads, files.values()):
        (values,) = result["scores"][result["main"]]
        assert f"{sum(values) / len(values):.3f}" in table
    assert main(["report", str(tmp_path)]) == 0
    page = Path(capsys.readouterr().out.strip()).read_text()
    assert "Many targets" in page and "12 trajectories" in page and 'src="data:image/png;base64,' in page
    assert {path.name: path.read_bytes() for path in (tmp_path / "tasks").glob("*.json")} == files


def test_grid_with_targets(labels, tmp_path, capsys):
    "Rows of a grid that name a target become tasks; the other rows run as always; the table and the report show both."
    grid = tmp_path / "grid.toml"
    grid.write_text('[[row]]\nencoder = "position"\nhead = "all"\n\n[[row]]\ntarget = ["depth", "motion"]\nencoder = "pixels"\nhead = "linear7x7"\nepochs = 1\n')
    words = ["run", str(grid), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--jobs", "1", "--seeds", "0", "--set", f"data={labels}", "--set", "labels=8", "--set", "test=12"]
    assert main([*words, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert planned.count("to do") == 3 and "depth_pixels_linear7x7" in planned and "position_all" in planned and not (tmp_path / "out").exists()
    assert main(words) == 0 and main(["table", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert "end-point error" in table and "all foreground" in table
    assert len(list((tmp_path / "out/tasks").glob("*_pixels_*.json"))) == 2 and len(list((tmp_path / "out").glob("position_all*.json"))) == 1
    assert main(["report", str(tmp_path / "out")]) == 0
    page = Path(capsys.readouterr().out.strip()).read_text()
    assert "Many targets" in page and "all foreground" in page
    grid.write_text('[[row]]\ntarget = "depth"\nfinetune = true\n')
    assert main(["run", str(grid), "--out", str(tmp_path / "wrong")]) == 2
    assert f"{grid}, row 1: a row with a target has no 'finetune'" in capsys.readouterr().err and not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("head, target", [("heavy", "depth"), ("unet", "semantic")])
def test_targets_through_heads_with_batch_norm(labels, tmp_path, head, target):
    "What such a probe says of a frame depends neither on the frames beside it nor on having been saved; training helps."
    labelled = LabelledFrames.load(labels)
    train, val = labelled.part("train"), labelled.part("val")
    encoder = load_encoder("pixels")
    maps, val_maps = encoder(train.frames), encoder(val.frames)
    probe = fit_target(maps, train, target, head, val=(val_maps, val), lr=3e-3, epochs=6, batch=4)
    assert any(isinstance(part, torch.nn.BatchNorm2d) for part in probe.head.modules()) and probe.epoch > 0
    together, alone = probe.predict(val_maps), np.concatenate([probe.predict(encoder(frame[None])) for frame in val.frames])
    assert np.allclose(together, alone, atol=1e-4) and together.std() > 0
    probe.save(tmp_path)
    assert np.array_equal(TargetProbe.load(tmp_path).predict(val_maps), together)


def test_label_efficiency(labels, tmp_path):
    "The table's IoU are those of the runs; more labels cost no fewer bits than none could."
    run("label_efficiency", tmp_path, encoders="pixels", labels="3,6,12", seeds="0", test=12, epochs=2, data=str(labels), cache=str(tmp_path / "cache"), out=str(tmp_path / "out"))
    import csv
    rows = {row["encoder"]: row for row in csv.DictReader(open(tmp_path / "out/label_efficiency.csv"))}
    assert list(rows) == ["pixels", "mean mask"]
    runs = {(r["experiment"]["encoder"], r["experiment"]["labels"]): r["iou"] for r in map(json.loads, (p.read_text() for p in (tmp_path / "out").glob("*.json")))}
    for count in (3, 6, 12):
        assert rows["pixels"][str(count)] == f"{runs['pixels', count]:.3f}" and rows["mean mask"][str(count)] == f"{runs['position', count]:.3f}"
    assert all(3 / 12 <= float(row["code length, bits/pixel"]) < 1 for row in rows.values())  # the first block costs one bit a pixel


def test_wrong_settings_are_one_line(tmp_path, capsys):
    for words, said in ((["run", "tasks", "--set", "lables=3"], "did you mean 'labels'"), (["run", "tasks", "--set", "weights=nowhere"], "nowhere"),
                        (["run", "tasks", "--seeds", "a"], "seeds"), (["report", str(tmp_path / "none")], "no such file or folder"), (["report", str(tmp_path)], "no results in it")):
        assert main([*words, *(["--out", str(tmp_path / "out")] if words[0] == "run" else [])]) == 2
        error = capsys.readouterr().err.strip()
        assert said in error and "Traceback" not in error, error


def test_common_fate(labels, tmp_path):
    "Every way is in the tables, with the number of frames that it was asked for."
    run("common_fate", tmp_path, rows="pixels linear7x7", clips=6, test=8, counts="1,4", few="1", frames=2, futures=1, seeds="0", data=str(labels),
        cache=str(tmp_path / "cache"), out=str(tmp_path / "fate"))
    import pandas as pd
    table, alone = pd.read_csv(tmp_path / "fate/common-fate.csv"), pd.read_csv(tmp_path / "fate/predictor-alone.csv")
    assert table.fitted_to.tolist() == ["labels", "labels", "motion", "motion + labels"] and table.k.tolist() == [1, 4, 0, 1]
    assert ((table.low <= table.iou) & (table.iou <= table.high)).all() and table.worth[2:].notna().all()
    assert len(alone) == 6 and (alone.frames == 2).all() and alone.iou.between(0, 1).all()
    everything = alone.set_index("way").iou["floor: everything"]
    from vpenc.data.masks import LabelledFrames
    assert everything == pytest.approx(LabelledFrames.load(labels).part("test").masks[:2].mean(), abs=1e-4)  # IoU of all pixels is the mask's share
    result = json.loads((tmp_path / "fate/common-fate.json").read_text())
    assert result["test"] == 8 and result["futures"] == 1 and 0 <= result["agreement"] <= 1


def test_propagation_and_forecasts(tmp_path):
    "The sections of `analysis/tasks` that need clips, on two of them."
    import pandas as pd
    labels = generate_labels(tmp_path / "sim-few.h5", SimConfig(), dict(train=8, val=3, test=3), processes=1)
    run("tasks", tmp_path, targets="mask", encoders="pixels", head="linear7x7", labels=8, test=3, epochs=1, seeds="0", clips=2, futures=1, toys=0,
        data=str(labels), cache=str(tmp_path / "cache"), out=str(tmp_path / "tasks"))
    carried, ahead = pd.read_csv(tmp_path / "tasks/propagation.csv"), pd.read_csv(tmp_path / "tasks/forecast.csv")
    assert carried.encoder.tolist() == ["first mask, copied", "pixels"] and carried.j.between(0, 1).all() and carried.gain.isna().all()
    assert ahead.step.tolist() == [*range(1, len(ahead) + 1)] and (ahead["mean"] == ahead.best).all()  # one future is the best one
