"""No silent wrong result: identity of code, caches, intervals, edges of fitting, empty masks, numbers at the edge."""

import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from vpenc.data.masks import LabelledFrames
from vpenc.encoders.features import extract
from vpenc.encoders.taps import FeatureMap, load_encoder, tap_names
from vpenc.experiments.experiment import Experiment, Predictor, fit_experiment, save_probe
from vpenc.experiments.runner import make_jobs
from vpenc.models.checkpoints import from_pretrained, save_pretrained
from vpenc.probing.heads import HEADS, LocalLinearHead
from vpenc.probing.losses import LOSSES, bce
from vpenc.probing.metrics import boundary_f, scores
from vpenc.probing.probe import Probe, fine_tune, fit_probe


def toy(count=36, size=16, trajectories=None):
    "Bright squares on a dark ground, a third of the frames in each part."
    rng = np.random.default_rng(0)
    masks = np.zeros((count, size, size), bool)
    for mask in masks:
        y, x = rng.integers(0, size // 2, 2)
        mask[y:y + size // 3, x:x + size // 3] = True
    frames = (rng.integers(60, 90, (count, size, size, 3)) + 100 * masks[..., None]).astype(np.uint8)
    return LabelledFrames(frames, masks, trajectories, np.repeat(["train", "val", "test"], count // 3), "toy")


def maps(values): return FeatureMap(torch.as_tensor(values, dtype=torch.float32), (1, 1, 1), "made up", "x")


@pytest.fixture
def registered():
    "Heads and losses that a test registers are forgotten afterwards."
    heads, losses = dict(HEADS), dict(LOSSES)
    yield
    for known, before in ((HEADS, heads), (LOSSES, losses)):
        known.clear()
        known.update(before)


# ---- identity
def jobs(folder, **row): return make_jobs([dict(encoder="pixels", data=str(folder/"labels.h5"), **row)], folder/"out")


def finish(job):
    "The files of a job that is done."
    job.folder.mkdir(exist_ok=True)
    job.result.write_text("{}")
    job.notebook.write_text(json.dumps(dict(cells=[], metadata=dict(papermill=dict(exception=None), vpenc=dict(digest=job.digest)))))


def test_a_job_is_not_done_when_the_code_of_its_head_changed(tmp_path, registered):
    toy().save(tmp_path/"labels.h5")
    def define(shift):
        class Mine(LocalLinearHead):
            def read(self, maps): return super().read(maps) + shift
        HEADS["mine"] = Mine
    define(0)
    finish(jobs(tmp_path, head="mine")[0])
    define(0)  # the same cell, run again
    assert jobs(tmp_path, head="mine")[0].done()
    define(1)
    assert not jobs(tmp_path, head="mine")[0].done()


def test_a_job_is_not_done_when_the_code_of_its_loss_changed(tmp_path, registered):
    toy().save(tmp_path/"labels.h5")
    def define(factor):
        def mine(logits, masks): return factor * bce(logits, masks)
        LOSSES["mine"] = mine
    row = dict(head="linear1x1", loss="0.5*mine+dice")
    define(1)
    finish(jobs(tmp_path, **row)[0])
    define(1)
    assert jobs(tmp_path, **row)[0].done()
    define(2)
    assert not jobs(tmp_path, **row)[0].done()


def test_what_cannot_be_told_apart_is_never_done(tmp_path, registered):
    toy().save(tmp_path/"labels.h5")
    LOSSES["mine"] = lambda logits, masks: bce(logits, masks)
    finish(jobs(tmp_path, head="linear1x1", loss="mine")[0])
    assert not jobs(tmp_path, head="linear1x1", loss="mine")[0].done()


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_the_librarys_own_code_can_be_told_apart(optimizer):
    from vpenc.experiments.experiment import code_of
    for loss in LOSSES:
        for head in HEADS: assert code_of(Experiment(head=head, optimizer=optimizer, loss=loss))[1] == ""


def test_a_redefined_head_is_fitted_again(tmp_path, registered):
    class Mine(LocalLinearHead):
        def read(self, maps): return 0 * super().read(maps) - 5  # always background
    HEADS["mine"] = Mine
    row = Experiment(encoder="pixels", head="mine", labels=12, lr=.1, epochs=40)
    before = fit_experiment(row, toy(), cache=tmp_path).result["iou"]
    class Mine(LocalLinearHead): pass
    HEADS["mine"] = Mine
    after = fit_experiment(row, toy(), cache=tmp_path).result["iou"]
    assert before == 0 and after > .8


def test_a_probe_says_when_the_code_of_its_head_is_another(tmp_path, registered):
    class Mine(LocalLinearHead): pass
    HEADS["mine"] = Mine
    data = toy(9)
    pixels = extract(load_encoder("pixels"), data.frames, cache=False)
    fit_probe(pixels, data.masks, "mine", epochs=1).save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Probe.load(tmp_path)
    class Mine(LocalLinearHead):
        def read(self, maps): return -super().read(maps)
    HEADS["mine"] = Mine
    with pytest.warns(UserWarning, match="the code of head 'mine' is not that"): Probe.load(tmp_path)


def test_a_probe_refuses_a_replaced_model(tmp_path, capsys):
    model = from_pretrained("videogpt-sim")
    save_pretrained(model.vqvae, tmp_path/"model")
    frames = toy(6, 64)
    row = Experiment(encoder="vqvae:pre", head="linear1x1", labels=2, epochs=1, weights=str(tmp_path/"model"))
    save_probe(fit_experiment(row, frames, cache=tmp_path/"cache"), tmp_path/"probe")
    assert Predictor(tmp_path/"probe")(frames.frames).shape == (6, 64, 64)
    with torch.no_grad(): next(model.vqvae.pre_vq_conv.parameters()).add_(.1)
    save_pretrained(model.vqvae, tmp_path/"model")
    with pytest.raises(ValueError, match="other weights") as error: Predictor(tmp_path/"probe")
    assert "\n" not in str(error.value)


# ---- the cache
TAPS = [tap for tap in dict.fromkeys(tap_names()) if tap.startswith(("videogpt:", "vqvae:")) and tap != "videogpt:codes"]


@pytest.mark.parametrize("tap", TAPS)
def test_cached_features_score_like_fresh_ones(tmp_path, tap):
    "Every tap of the shipped model but the sampled one, whose features are whole numbers; first computed, then read."
    data = toy(6, 64)
    encoder = load_encoder(tap, device="cpu")
    fresh = extract(encoder, data.frames, cache=False)
    extract(encoder, data.frames, cache=tmp_path)
    cached = extract(encoder, data.frames, cache=tmp_path)
    for new, old in zip((fresh.values, *fresh.levels), (cached.values, *cached.levels)): assert torch.equal(new, old)
    probes = [fit_probe(f.take(slice(4)), data.masks[:4], "linear1x1", val=(f.take(slice(4, 6)), data.masks[4:]), epochs=1) for f in (fresh, cached)]
    one, two = (probe.scores(f, data.masks) for probe, f in zip(probes, (fresh, cached)))
    for name in one: assert one[name] == pytest.approx(two[name], abs=1e-4)


def test_a_small_signal_on_a_large_offset_survives_the_cache(tmp_path):
    class Offset(nn.Module):
        def forward(self, x): return 4096 + x[:, :1]
    data = toy(6)
    encoder = load_encoder(Offset(), device="cpu")
    extract(encoder, data.frames, cache=tmp_path)
    assert torch.equal(extract(encoder, data.frames, cache=tmp_path).values, extract(encoder, data.frames, cache=False).values)


# ---- edges of fitting
@pytest.mark.parametrize("head", [name for name in HEADS])
@pytest.mark.parametrize("labels, batch", [(3, 1), (2, 50), (1, 3)])
def test_few_labels_and_batches_of_one(head, labels, batch):
    data = toy(9, 32)
    pixels = extract(load_encoder("pixels"), data.frames, cache=False)
    settings = dict(val=(pixels.take(slice(6, 9)), data.masks[6:]), epochs=1, batch=batch)
    probe = fit_probe(pixels.take(slice(labels)), data.masks[:labels], head, **settings)
    assert np.isfinite(probe.predict(pixels)).all()


@pytest.mark.parametrize("head", ["unet", "heavy"])
def test_a_batch_of_one_with_a_bottleneck_of_one_cell(head):
    "BatchNorm cannot normalise a single number: one clear line."
    data = toy(6, 16)
    pixels = extract(load_encoder("pixels"), data.frames, cache=False)
    fit = lambda batch: fit_probe(pixels.take(slice(2)), data.masks[:2], head, val=(pixels.take(slice(4, 6)), data.masks[4:]), epochs=1, batch=batch)
    with pytest.raises(ValueError, match="cannot be trained with one frame a step") as error: fit(1)
    assert "\n" not in str(error.value) and np.isfinite(fit(2).predict(pixels)).all()


@pytest.mark.parametrize("head", ["linear", "linear1x1", "light", "attention"])
@pytest.mark.parametrize("full", [False, True])
def test_labels_of_one_class(head, full):
    data = toy(9, 16)
    pixels, masks = extract(load_encoder("pixels"), data.frames, cache=False), np.full_like(data.masks, full)
    probe = fit_probe(pixels.take(slice(6)), masks[:6], head, val=(pixels.take(slice(6, 9)), masks[6:]))
    assert scores(probe.predict(pixels), masks)["iou"] == 1


def test_a_class_absent_from_validation():
    data = toy(12)
    pixels, empty = extract(load_encoder("pixels"), data.frames, cache=False), np.zeros_like(data.masks[9:])
    with pytest.warns(UserWarning, match="no validation mask holds any foreground"):
        probe = fit_probe(pixels.take(slice(9)), data.masks[:9], "linear1x1", val=(pixels.take(slice(9, 12)), empty), lr=.1)
    assert probe.threshold == .5


def test_fine_tuning_keeps_the_threshold_without_foreground_in_validation():
    data = toy(12)
    encoder = load_encoder(nn.Conv2d(3, 4, 3, padding=1), device="cpu")
    with pytest.warns(UserWarning, match="no validation mask"):
        probe = fine_tune(encoder, data.frames[:9], data.masks[:9], "linear1x1", val=(data.frames[9:], np.zeros_like(data.masks[9:])))
    assert probe.threshold == .5


def test_features_without_numbers_are_refused():
    data = toy(9)
    values = torch.zeros(9, 1, 2, 16, 16)
    values[3, 0, 1, 2, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite") as error: fit_probe(maps(values), data.masks)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("head", ["linear", "linear1x1", "attention"])
def test_constant_features_give_a_constant_finite_prediction(head):
    data = toy(9)
    features = maps(torch.full((9, 1, 2, 16, 16), 1e6))
    probe = fit_probe(features.take(slice(6)), data.masks[:6], head, val=(features.take(slice(6, 9)), data.masks[6:]), epochs=1)
    result = probe.scores(features, data.masks)
    assert result["constant"] and np.isfinite(result["iou"])


def test_a_head_wider_than_memory_is_refused_before_it_is_built(registered):
    class Wide(LocalLinearHead):
        def __init__(self, shapes, size=(64, 64)):
            super().__init__(shapes, size)
            self.wide = nn.Linear(10**6, 10**8)  # 1.6 PB with gradient and moments
    HEADS["wide"] = Wide
    data = toy(9)
    pixels = extract(load_encoder("pixels"), data.frames, cache=False)
    with pytest.raises(MemoryError, match="training takes 1600001.6 GB") as error: fit_probe(pixels, data.masks, "wide")
    assert "\n" not in str(error.value) and "has 100,000,100,000,004 weights" in str(error.value)


# ---- empty masks
EMPTY, FULL = np.zeros((1, 6, 6), bool), np.ones((1, 6, 6), bool)
PART = EMPTY.copy()
PART[0, 2:4, 2:4] = True


@pytest.mark.parametrize("found, true, wanted", [(EMPTY, EMPTY, 1), (FULL, FULL, 1), (PART, PART, 1), (EMPTY, PART, 0), (PART, EMPTY, 0),
                                                 (EMPTY, FULL, 0), (FULL, EMPTY, 0)])
def test_one_policy_for_empty_masks(found, true, wanted):
    result = scores(found.astype(float), true)
    assert [result[name] for name in ("iou", "iou_pooled", "dice", "boundary_f")] == [wanted] * 4
    assert boundary_f(found, true)[0] == wanted


# ---- numbers at the edge
@pytest.mark.parametrize("temperature", [0, 1e-39, 1e-30, 1e-7])
def test_cold_sampling_is_the_largest_logit(temperature):
    from vpenc.models.decoding import draw
    logits = torch.tensor([[-3., 4., 2.], [1., 0., -80.]])
    assert draw(logits, temperature, uniform=torch.tensor([.999, .999])).tolist() == [1, 0]
    assert draw(logits, temperature).tolist() == [1, 0]


def test_more_likeliest_codes_than_there_are_means_all():
    from vpenc.models.decoding import draw
    logits, uniform = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)), torch.linspace(0, .99, 50)
    assert torch.equal(draw(logits, top_k=8, uniform=uniform), draw(logits, uniform=uniform))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["videogpt:resnet", "pixels", "position"])
def test_half_encoders_give_float32_features(dtype, name):
    frames = toy(3, 64).frames
    encoder = load_encoder(name, device="cpu")
    whole, half = encoder(frames).values, encoder.to(dtype)(frames).values
    assert half.dtype == torch.float32
    assert (half - whole).abs().max() <= .05 * whole.abs().max()


def test_negative_strides_are_read():
    from vpenc.data.video import as_clip, as_frames
    clip = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    assert torch.equal(as_clip(clip[::-1, :, ::-1, ::-1]), as_clip(clip[::-1, :, ::-1, ::-1].copy()))
    assert torch.equal(as_frames(clip[..., ::-1]), as_frames(clip[..., ::-1].copy()))
    encoder = load_encoder("pixels")
    assert torch.equal(encoder(clip[:, ::-1]).values, encoder(clip[:, ::-1].copy()).values)


# ---- intervals
@pytest.mark.parametrize("units, said", [(1, "no interval"), (2, "‡"), (9, "‡"), (10, "to")])
def test_intervals_name_their_units(tmp_path, units, said):
    "One trajectory gives no interval, fewer than ten a marked one; the table holds their number."
    from vpenc.experiments.results import collect, table, words
    from vpenc.files import write_json
    data = toy(36)
    data.trajectory = np.arange(36) + 100
    data.trajectory[24:] = np.minimum(np.arange(12), units - 1)  # of the test frames
    for head in ("linear1x1", "prior"):
        encoder = "pixels" if head == "linear1x1" else "position"
        result = fit_experiment(Experiment(encoder=encoder, head=head, labels=12, epochs=1), data, cache=tmp_path/"cache").result
        assert result["units"] == units and (result["interval"] is None) == (units < 2)
        write_json(tmp_path/"out"/f"{head}.json", result)
    text = words(table(collect(tmp_path/"out")))
    assert set(text.units) == {str(units)}
    for cell in text["95 % interval"]:
        assert said in cell and ("‡" in cell) == (2 <= units < 10)
    if units < 2: assert all("no interval" in cell for cell in text.gain if cell)
