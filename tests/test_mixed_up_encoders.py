"""The same for encoders, their saved features, files of clips and labels: what differs gets another identity, what is ambiguous one line."""
import random
import threading
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vpenc.data.masks import LabelledFrames
from vpenc.encoders.taps import load_encoder
from vpenc.files import write_json

FRAMES = np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), dtype=np.uint8)


# identity

class Mode(str): pass


class Rate(float): pass


class Ring(deque): pass


class Private:
    __slots__ = ("__value",)

    def __init__(self, value): self.__value = value


class Holder(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x): return x * 1 if self.value else x


class Hooky(nn.Module):
    def __init__(self, on):
        super().__init__()
        self.use_hooks = on

    def forward(self, x): return x * (2 if self.use_hooks else 1)


class Named(nn.Module):
    "Gains that are written under one kind of name and read under another."

    def __init__(self, **gains):
        super().__init__()
        self.set(**gains)

    def set(self, red, blue): self.gain_red, self.gain_blue = red, blue

    def forward(self, x): return sum(getattr(self, f"gain_{colour}") * x for colour in ("red", "blue"))


def fingerprint(network): return load_encoder(network, device="cpu").fingerprint


@pytest.mark.parametrize("one, other", [
    (Holder(Mode("a")), Holder(Mode("b"))), (Holder(Rate(1)), Holder(Rate(2))), (Holder(Private(1)), Holder(Private(2))), (Hooky(True), Hooky(False)),
    (Named(red=1., blue=1.), Named(red=5., blue=1.))])
def test_what_differs_has_another_identity(one, other):
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize("value", [Ring([1]), random.Random(0)])
def test_state_that_lies_in_c_is_not_cached(value): assert fingerprint(Holder(value)).startswith("unknown-")


# encoders

class InPlace(nn.Module):
    def forward(self, x): return x.sub_(.5).mul_(2)


class OneBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.zeros(2, 3, 16, 16))

    def forward(self, x): return torch.mul(x, 2, out=self.kept[:len(x)])


def test_frames_and_maps_share_no_memory():
    frames = torch.rand(4, 3, 16, 16)
    before, encoder = frames.clone(), load_encoder(InPlace(), value_range="unit", device="cpu")
    assert torch.equal(encoder(frames).values, encoder(frames).values) and torch.equal(frames, before)
    pixels = load_encoder("pixels", value_range="unit", device="cpu")(frames)
    frames.zero_()
    assert torch.equal(pixels.values[:, 0], before)
    reused = load_encoder(OneBuffer(), value_range="unit", device="cpu")
    maps = [reused(before[i:i + 2]).values for i in (0, 2)]
    assert torch.equal(torch.cat(maps)[:, 0], 2 * before)


class ChannelsLast(nn.Module):
    def forward(self, x): return nn.functional.avg_pool2d(x, 4).repeat(1, 4, 1, 1).movedim(1, -1)  # (B,4,4,12)


def test_channels_last_and_frames_that_are_mixed_are_told():
    with pytest.warns(UserWarning, match="channels last"): load_encoder(ChannelsLast(), device="cpu")(FRAMES)
    with pytest.warns(UserWarning, match="mixes the frames of a batch"): load_encoder(nn.BatchNorm2d(3, track_running_stats=False), device="cpu")


def test_a_saved_encoder_is_the_same_by_every_name(tmp_path):
    from vpenc.models.checkpoints import convert
    saved = load_encoder("random/vqvae:pre", value_range="unit", seed=3, device="cpu")
    saved.save_pretrained(tmp_path / "e")
    frames = np.random.default_rng(1).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    convert(tmp_path / "e", tmp_path / "c")
    for again in (load_encoder(tmp_path / "e"), load_encoder(tmp_path / "e", tap="vqvae:pre"), load_encoder("vqvae:pre", weights=str(tmp_path / "e")), load_encoder(tmp_path / "c")):
        assert again.tap == "random/vqvae:pre" and again.value_range == "unit" and torch.equal(again(frames).values, saved(frames).values)


def test_half_precision_loses_nothing_that_shows():
    from vpenc.encoders.latents import halved
    x = torch.rand(4, 1, 2, 16, 16)
    assert halved(x).dtype == torch.float16 and halved(torch.arange(2048.).view(1, 1, 2, 32, 32)).dtype == torch.float16
    assert halved(x * 1e-7).dtype == halved(x + 1500).dtype == halved(x * 1e6).dtype == torch.float32
    dead = torch.stack([x[:, :, 0], torch.full_like(x[:, :, 0], .1)], 2)  # a channel that never changes
    assert halved(dead).dtype == torch.float16


def test_layers_are_sorted_by_number():
    from vpenc.encoders.latents import by_depth
    layers = [f"videogpt:hidden[{i}]" for i in range(13)]
    assert by_depth(sorted(layers)) == layers


def test_noise_keeps_to_the_set_it_is_fitted_to():
    from vpenc.views.explorer import Explorer, ExploreState
    random = np.random.default_rng(0)
    dark, bright = ([random.integers(low, low + 60, (3, 16, 16, 3), dtype=np.uint8) for _ in range(2)] for low in (0, 190))
    explorer = Explorer({"dark": dark, "bright": bright}, {"noise": "noise:pixels"}, device="cpu")
    for state in (ExploreState(data="dark"), ExploreState(data="bright"), ExploreState(data="dark", trajectory=1)): explorer.panels(state)
    mean = {key[::2]: float(next(iter(maps.values())).mean()) for key, maps in explorer.maps.items()}  # (set, trajectory)
    assert mean["dark", 1] == pytest.approx(mean["dark", 0], abs=.05) and mean["bright", 0] > .2 > 0 > mean["dark", 0]


# scores

def test_the_best_threshold_is_in_the_middle_of_the_best():
    from vpenc.probing.metrics import best_threshold, scores
    masks = np.zeros((1, 4, 4), bool)
    masks[0, :2] = True
    assert best_threshold(np.where(masks, .97, .03), masks) == .5  # .05 to .95 are all as good
    assert best_threshold(np.where(masks, .97, .41), masks) == pytest.approx(.7)  # .45 to .95
    with pytest.raises(ValueError, match="masks hold values from -5 to 5; expected 0 and 1"): scores(np.where(masks, .9, .1), np.where(masks, 5., -5.))


def test_a_probe_refuses_frames_of_another_size(tmp_path, capsys):
    from vpenc.cli import main
    from vpenc.experiments.experiment import Experiment, Predictor, save_with_row
    from vpenc.probing.targets import fit_target
    frames = np.random.default_rng(0).integers(0, 255, (6, 16, 32, 3), dtype=np.uint8)
    some = LabelledFrames(frames, frames[..., 0] > 128, extras=dict(depth=np.full((6, 16, 32), 2., np.float32)))
    encoder = load_encoder("pixels", device="cpu")
    maps = encoder(frames)
    save_with_row(fit_target(maps, some, "depth", val=(maps, some), epochs=1), Experiment("pixels", "linear1x1"), encoder, some.size, tmp_path / "p")
    assert Predictor(tmp_path / "p")(frames).shape == (6, 16, 32)
    with pytest.raises(ValueError, match=r"this probe takes \(N,16,32,3\)"): Predictor(tmp_path / "p")(FRAMES)
    np.save(tmp_path / "wide.npy", frames)
    assert main(["predict", str(tmp_path / "p"), str(tmp_path / "wide.npy"), "--out", str(tmp_path / "o")]) == 0  # not cropped to a square
    np.save(tmp_path / "square.npy", FRAMES)
    assert main(["predict", str(tmp_path / "p"), str(tmp_path / "square.npy"), "--out", str(tmp_path / "q")]) != 0
    assert "this probe takes (N,16,32,3)" in capsys.readouterr().err


# rows

def test_a_killed_row_leaves_no_signature_of_another(tmp_path, monkeypatch):
    import nbformat

    from vpenc.experiments import runner

    class Killed(BaseException): pass

    def labels(name, masks):
        (tmp_path / name).mkdir()
        LabelledFrames(FRAMES, masks, None, ["train", "val", "test"] * 2).save(tmp_path / name / "labels.h5")
    labels("a", FRAMES[..., 0] > 128), labels("b", FRAMES[..., 0] <= 128)
    job = lambda name: runner.make_jobs([dict(encoder="pixels", head="linear1x1", data=str(tmp_path / name / "labels.h5"))], tmp_path / "out")[0]

    def run(kill):
        def notebook(path, running, parameters, forks):  # writes what the notebook writes, and is killed after it
            made = nbformat.v4.new_notebook()
            made.metadata["papermill"] = dict(exception=None)
            nbformat.write(made, str(running))
            write_json(parameters["out"], dict(data=parameters["data"]))
            if kill: raise Killed
        monkeypatch.setattr(runner, "run_notebook", notebook)
    run(False)
    runner.execute(job("a"), None, threading.Event())
    assert job("a").done()
    run(True)
    with pytest.raises(Killed): runner.execute(job("b"), None, threading.Event())
    assert not job("a").done() and not job("b").done()


def test_an_empty_list_in_a_grid_is_refused():
    from vpenc.experiments.runner import read_grid
    with pytest.raises(ValueError, match="labels: an empty list"): read_grid([dict(encoder="pixels", labels=[])])


# files

def test_shards_keep_to_their_clips(tmp_path):
    from vpenc.data.shards import write_shards
    from vpenc.data.video import ClipStore, write_clips

    def store(name, seed):
        frames = np.random.default_rng(seed).integers(0, 255, (20, 2, 16, 16, 3), dtype=np.uint8)
        write_clips(tmp_path / name, dict(train=[dict(video=video) for video in frames]))
        return ClipStore(tmp_path / name)
    a, b = store("a.h5", 0), store("b.h5", 1)
    for _ in range(2): assert write_shards(a, tmp_path / "s", 5).count("train") == 20
    with pytest.raises(ValueError, match="shard 1 of 4 of other clips"): write_shards(b, tmp_path / "s", 5)
    with pytest.raises(ValueError, match="another number of shards"): write_shards(a, tmp_path / "s", 10)


def test_frames_of_a_labelled_folder_are_in_the_order_of_their_numbers(tmp_path):
    from PIL import Image

    from vpenc.views.label_session import read_footage
    from vpenc.views.sets import from_labels
    for folder in ("frames", "masks"): (tmp_path / folder).mkdir()
    for i in range(1, 13):
        Image.fromarray(np.full((64, 64, 3), i, np.uint8)).save(tmp_path / "frames" / f"clip_{i}.png")
        Image.fromarray(np.full((64, 64), 255, np.uint8)).save(tmp_path / "masks" / f"clip_{i}.png")
    footage = read_footage(tmp_path, trajectory="(clip)_")
    seen = footage.frames[np.argsort(footage.position), 0, 0, 0]
    assert seen.tolist() == list(range(1, 13)) and sorted(footage.position) == list(range(12))
    video, _ = from_labels(footage.labels, "labels").read(0)
    assert video[:, 0, 0, 0].tolist() == list(range(1, 13))


def test_masks_that_are_painted_hold_classes(tmp_path):
    from vpenc.views.label_session import LabelSession
    session = LabelSession(tmp_path / "s", FRAMES, ("robot", "toy"))
    session.draw(0, np.ones((16, 16), bool), "robot")
    for wrong in (np.full((16, 16), .9), np.full((16, 16), 256), np.full((16, 16), -1)):
        with pytest.raises(ValueError, match="expected class numbers|expected .* up to 2"): session.paint(0, wrong)
    with pytest.raises(ValueError, match="expected 0 and 1"): session.draw(0, np.full((16, 16), .01), "toy")
    assert (session.ids(0) == 1).all()


def test_videos_have_whole_numbers_or_names():
    masks = FRAMES[..., 0] > 128
    assert LabelledFrames(FRAMES, masks, ["b", "a", "b", "c", "a", "a"]).trajectory.tolist() == [1, 0, 1, 2, 0, 0]
    assert LabelledFrames(FRAMES, masks, np.array([3., 3, 1, 1, 2, 2])).trajectory.tolist() == [3, 3, 1, 1, 2, 2]
    for wrong in ([.2, .7, 1, 1, 2, 2], [1, np.nan, 2, 2, 3, 3]):
        with pytest.raises(ValueError, match="labels: trajectory holds .*; expected whole numbers or names"): LabelledFrames(FRAMES, masks, wrong)


def test_parts_that_share_a_folder_are_refused(tmp_path):
    from vpenc.data.coco import save_coco
    labels = LabelledFrames(FRAMES, FRAMES[..., 0] > 128, None, ["train", "train", "val", "val", "valid", "valid"])
    with pytest.raises(ValueError, match="which would share a folder"): save_coco(labels, tmp_path / "coco")
    assert not (tmp_path / "coco").exists()


def test_an_array_that_was_written_anew_is_read_anew(tmp_path):
    from vpenc.data.ingest import convert_videos
    from vpenc.data.video import ClipStore
    source = Path(tmp_path / "x.npz")
    for grey in (10, 200):
        np.savez(source, video=np.full((4, 16, 16, 3), grey, np.uint8))
        convert_videos(source, tmp_path / f"{grey}.h5", size=16, jobs=1)
        store = ClipStore(tmp_path / f"{grey}.h5")
        assert store.clip(store.splits[0], 0).mean() == grey


@pytest.mark.parametrize("times, end, shown", [([0, 100], 500, [0, 1, 1, 1, 1]), ([0, 200], 300, [0, 0, 1]), ([0, 300], 400, [0, 0, 0, 1]), ([0, 100, 200], 300, [0, 1, 2])])
def test_no_frame_of_an_uneven_film_is_lost(times, end, shown):
    from vpenc.data.pictures import even_steps
    assert even_steps(times, end).tolist() == shown
