"""One command from BAIR's archive and a label export to a table, on a miniature of both."""
import tarfile

import numpy as np
import pytest

from test_bair import example, features_of, record
from vpenc.cli import main
from vpenc.data.coco import save_coco
from vpenc.data.masks import LabelledFrames
from vpenc.data.video import ClipStore
from vpenc.files import read_json, write_json

TINY = ["steps=2", "steps_gpt=2", "validation_clips=2", "futures=0", "hidden_dim=24", "heads=2", "layers=1", "resnet_widths=(8, 16, 16, 24)",
        "resnet_blocks=(1, 1, 1, 1)", "n_hiddens=8", "n_res_layers=1", "embedding_dim=8", "n_codes=32", "sequence_length=4", "batch_size=2"]


def film(seed, frames=4):
    "A dark arm that moves over a grey bin, uint8 (T,64,64,3), and its masks."
    rng = np.random.default_rng(seed)
    masks, x = np.zeros((frames, 64, 64), bool), rng.integers(5, 35)
    for t in range(frames): masks[t, :rng.integers(30, 50), x + 3 * t:x + 3 * t + 12] = True
    return np.where(masks[..., None], 40, rng.integers(120, 220, (frames, 64, 64, 3))).astype(np.uint8), masks


def trajectory(seed):
    video, _ = film(seed)
    return dict(data=video, main=video, actions=np.zeros((4, 4), "f4"), tip=np.zeros((4, 3), "f4"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    "The archive, and the labels as Roboflow exports them."
    home = tmp_path_factory.mktemp("mini")
    with tarfile.open(home / "bair.tar", "w") as tar:
        for name, seeds in {"train/traj_0_to_3": range(4), "test/traj_0_to_1": (100, 101)}.items():
            path = home / f"{name}.tfrecords"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"".join(record(example(features_of(trajectory(seed)))) for seed in seeds))
            tar.add(path, f"softmotion30_44k/{name}.tfrecords")
    films = [film(seed) for seed in range(200, 215)]
    labels = LabelledFrames(np.stack([video[0] for video, _ in films]), np.stack([masks[0] for _, masks in films]))
    save_coco(labels, home / "export")
    return home


def test_archive_and_labels_become_a_table(source, tmp_path, capfd):
    out, grid = tmp_path / "run", tmp_path / "one.json"
    write_json(grid, [dict(encoder="videogpt:resnet", head="linear1x1", epochs=2)])
    words = ["bair", "--archive", str(source / "bair.tar"), "--labels", str(source / "export"), "--out", str(out), "--preset", "tiny",
             "--grid", str(grid), "--jobs", "1", "--device", "cpu", *(word for text in TINY for word in ("--set", text))]
    assert main(words) == 0
    printed = capfd.readouterr().out
    store, labelled = ClipStore(out / "clips.h5"), LabelledFrames.load(out / "labels.h5")
    assert (store.count("train"), store.count("test")) == (4, 2) and np.array_equal(store.clip("train", 2), film(2)[0])
    assert labelled.counts == dict(train=9, val=3, test=3)
    model = out / "pretrain" / "model"
    assert read_json(model / "config.json")["config"]["hidden_dim"] == 24 and (model / "model.safetensors").exists()
    (encoded,) = map(read_json, (out / "table").glob("*.json"))
    assert "1 run, 0 already done, 0 failed" in printed
    assert encoded["experiment"]["weights"] == str(model) and encoded["data"]["fingerprint"] == labelled.fingerprint
    assert encoded["data"]["simulated"] is False and encoded["shape"][1] == 24 and "| videogpt:resnet linear1x1 (epochs=2)" in (out / "table" / "table.md").read_text()

    before = (model / "model.safetensors").stat().st_mtime_ns
    assert main(words) == 0
    again = capfd.readouterr().out
    assert again.count("there already") == 2 and "0 run, 1 already done" in again and (model / "model.safetensors").stat().st_mtime_ns == before


def test_missing_pieces_are_named_before_anything_is_made(source, tmp_path, capsys):
    words = ["bair", "--labels", str(source / "export"), "--out", str(tmp_path / "x")]
    for more, line in (([], "give the --archive"), (["--weights", "videogpt-sim", "--set", "steps=3"], "which --weights skips"),
                       (["--archive", str(tmp_path / "no.tar")], "no.tar: no such file")):
        assert main([*words, *more]) == 2
        assert line in capsys.readouterr().err
        assert not (tmp_path / "x").exists()
