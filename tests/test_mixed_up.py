"""Things that are easily mixed up: results of two models, labels of two files, clips made anew under an old name. Each is told apart, or refused in one line."""
import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vpenc.data.masks import LabelledFrames
from vpenc.encoders.taps import FeatureMap
from vpenc.files import write_json


def labelled(n=4, size=16, seed=0, **extras):
    random = np.random.default_rng(seed)
    frames = random.integers(0, 255, (n, size, size, 3), dtype=np.uint8)
    return LabelledFrames(frames, frames[..., 0] > 128, np.arange(n), extras=extras)


def features(frames, name="t", fingerprint="x"): return FeatureMap(torch.from_numpy(frames).permute(0, 3, 1, 2)[:, None].float(), (1, 1, 1), name, fingerprint)


# tables of targets

def task(name, value, floor, encoder="videogpt:resnet", train=40, weights="videogpt-sim", epochs=None):
    "A result of depth, less is better, on ten test frames of ten trajectories."
    spread = np.linspace(-.01, .01, 10)
    return dict(
        format="vpenc-task-1", key="", name=name, target="depth", main="abs_rel", higher=False, head_parameters=1, seeds=[0], trajectory=list(range(10)),
        experiment=dict(encoder=encoder, head="linear1x1", weights=weights, epochs=epochs), scores=dict(abs_rel=[(value + spread).tolist()]),
        floors={"mean depth": [floor] * 10}, data=dict(dataset="d", fingerprint="f", simulated=True, train=train, scored=10), versions={})


def frame_of(folder, *results):
    from vpenc.experiments.tasks import task_frame
    folder.mkdir()
    for result in results: write_json(folder / f"{result['name']}.json", result)
    return task_frame(folder)


def test_gains_are_against_floors_of_as_many_labels(tmp_path):
    alone = frame_of(tmp_path / "a", task("m", .3, floor=.5))
    both = frame_of(tmp_path / "b", task("m", .3, floor=.5), task("a_labels=1", .4, floor=.9, train=1))
    gains = {row.labels: (row.floor_value, row.gain) for row in both.itertuples() if row.seeds}
    assert alone[alone.seeds > 0].gain.tolist() == pytest.approx([.2])
    assert gains[40] == pytest.approx((.5, .2)) and gains[1] == pytest.approx((.9, .5))


def test_an_untrained_twin_of_another_model_is_no_floor(tmp_path):
    twin = task("twin", .35, floor=.5, encoder="random/videogpt:resnet", weights="other")
    df = frame_of(tmp_path / "a", task("m", .3, floor=.5), twin, twin | dict(name="own", experiment=twin["experiment"] | dict(weights="videogpt-sim"), scores=dict(abs_rel=[[.4] * 10])))
    assert df[df.encoder == "videogpt:resnet"].gain.tolist() == pytest.approx([.1])  # against .4, its own twin


@pytest.mark.parametrize("change", [dict(weights="mine"), dict(epochs=3)])
def test_rows_that_differ_in_model_or_epochs_keep_their_lines(tmp_path, change):
    from vpenc.experiments.tasks import task_figure, task_table
    df = frame_of(tmp_path / "a", task("m", .3, floor=.5), task("n", .2, floor=.5, **change))
    text = task_table(df)
    (name, value), = change.items()
    assert f"{name}={value} | 0.200" in text and "| 0.300" in text
    assert len(task_figure(df).axes[0].get_yticklabels()) == 3  # two rows, and the floors


def test_two_tasks_of_one_name_are_refused(tmp_path):
    from vpenc.experiments.tasks import Task, run_tasks
    one = Task("depth", "pixels", data=str(tmp_path / "a/labels.h5"))
    with pytest.raises(ValueError, match="two different tasks have this name"): run_tasks(tmp_path / "out", [one, replace(one, data=str(tmp_path / "b/labels.h5"))])


def test_a_probe_belongs_to_its_result(tmp_path):
    "Fitted to A, then to B and killed before the result is written: back at A, both are made again."
    from vpenc.experiments.experiment import Predictor
    from vpenc.experiments.tasks import Task, run_task
    frames = labelled(8)
    a = LabelledFrames(frames.frames, frames.masks, frames.trajectory, np.array(["train"] * 4 + ["val"] * 2 + ["test"] * 2), "a")
    b = replace(a, masks=~a.masks, name="b")
    row, file, probes = Task("mask", "pixels", labels=4, test=2, seeds=(0,), epochs=3), tmp_path / "t.json", tmp_path / "probes"
    write_json(file, run_task(row, a, tmp_path / "cache", file, probes))
    first = Predictor(probes)(a.frames)
    run_task(row, b, tmp_path / "cache", None, probes)
    run_task(row, a, tmp_path / "cache", file, probes)
    assert np.array_equal(Predictor(probes)(a.frames), first)


def test_a_probe_takes_the_place_of_another_kind(tmp_path):
    from vpenc.encoders.taps import load_encoder
    from vpenc.experiments.experiment import Experiment, Predictor, save_with_row
    from vpenc.probing.probe import fit_probe
    from vpenc.probing.targets import fit_target
    some, encoder = labelled(6, depth=np.full((6, 16, 16), 2., np.float32)), load_encoder("pixels")
    maps, row = encoder(some.frames), Experiment("pixels", "linear1x1")
    save_with_row(fit_target(maps, some, "depth", val=(maps, some), epochs=1), row, encoder, some.size, tmp_path / "p")
    assert Predictor(tmp_path / "p").target.name == "depth"
    save_with_row(fit_probe(maps, some.masks, "linear1x1", val=(maps, some.masks), epochs=1), row, encoder, some.size, tmp_path / "p")
    assert Predictor(tmp_path / "p").target is None


# tables of rows

def result(name, iou, seed=0, digest="aaaa", **settings):
    from vpenc.experiments.results import ROW
    from vpenc.experiments.experiment import Experiment
    experiment = {n: getattr(Experiment("pixels", "linear1x1"), n) for n in (*ROW, "seeds")} | settings
    score = {n: iou for n in ("iou", "iou_pooled", "dice", "boundary_f", "ap", "ece", "iou_at_threshold", "threshold")}
    return dict(
        format="vpenc-result-1", name=name, experiment=experiment, seeds=[seed], scores=[score], per_image=[[iou] * 4], images=[[0, 1, 2, 3]], trajectory=[[0, 1, 2, 3]], degenerate=False,
        data=dict(dataset="d", fingerprint="f", simulated=True, train=settings.get("labels", 150), scored=4, size=[64, 64], scored_on="test"), head_parameters=1, encoder_ms=1., probe_seconds=1.,
        peak_memory_mb=1., frozen=dict(before=digest, after=digest), versions=dict(vpenc="0"))


def folder_of(folder, *results):
    folder.mkdir()
    for each in results: write_json(folder / f"{each['name']}.json", each)
    return folder


def test_a_curve_of_labels_has_one_loss_and_one_optimizer(tmp_path):
    from vpenc.experiments.report import few_labels
    from vpenc.experiments.results import collect
    runs = [result("a", .1, loss="dice"), result("b", .2, optimizer="sgd"), result("c", .9), result("d", .7, labels=25), result("e", .05, labels=25, optimizer="sgd")]
    found = {line.get_label(): line.get_ydata().tolist() for line in few_labels(collect(folder_of(tmp_path / "a", *runs))).axes[0].lines}
    assert found == {"pixels, linear1x1": [.7, .9], "pixels, linear1x1 (optimizer=sgd)": [.05, .2]}


def test_seeds_of_two_models_are_not_averaged(tmp_path):
    from vpenc.experiments.results import collect
    with pytest.raises(ValueError, match="one.json and two.json are seeds of one row, but of models with other weights"):
        collect(folder_of(tmp_path / "a", result("one", .9), result("two", .1, seed=1, digest="bbbb")))
    assert collect(folder_of(tmp_path / "b", result("one", .9), result("two", .1, seed=1))).iou.tolist() == pytest.approx([.5])


def test_two_label_files_of_one_name_have_two_tables(tmp_path):
    from vpenc.experiments.results import collect, table
    one, two = result("one", .9), result("two", .2)
    two["data"] = two["data"] | dict(fingerprint="g")
    for each, iou in ((one, .9), (two, .2)): each.update(iou=iou, history=[[dict(epoch=1, loss=.1)]])
    lines = table(collect(folder_of(tmp_path / "a", one, two)))
    assert dict(zip(lines.dataset, lines.iou)) == pytest.approx({"d (f)": .9, "d (g)": .2})
    from vpenc.experiments.report import write_report
    from vpenc.experiments.results import write_all
    (tmp_path / "a" / ".one.x1.json").write_text("")  # of a command that was killed
    write_all(tmp_path / "a")
    sheets = [(tmp_path / "a" / name).read_text() for name in ("table.csv", "table-d-g.csv")]
    assert [",0.9" in sheet for sheet in sheets] == [True, False] and [",0.2" in sheet for sheet in sheets] == [False, True]
    page = Path(write_report(tmp_path / "a")).read_text()
    assert "Robot masks: d (f)" in page and "Robot masks: d (g)" in page


def test_a_model_named_by_its_path_is_told_from_another(tmp_path, monkeypatch):
    from vpenc.experiments.experiment import Experiment
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("enc", "dino"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "model.safetensors"): (tmp_path / name / file).write_text("{}")
    for encoder in (str(tmp_path / "enc"), f"random/{tmp_path / 'enc'}"):
        assert tmp_path / "enc" / "model.safetensors" in Experiment(encoder=encoder, head="linear1x1").inputs()
    assert tmp_path / "dino" / "model.safetensors" in Experiment(encoder="hf:~/dino:layer[1]", head="linear1x1").inputs()


def test_names_stay_with_labels_and_numbers_are_no_letters(tmp_path):
    from PIL import Image
    from vpenc.data.coco import import_labels
    named = labelled(file=np.array(["a.png", "ä.png", "c.png", "d.png"]))
    named.save(tmp_path / "named.h5")
    assert [each.decode() for each in LabelledFrames.load(tmp_path / "named.h5").extras["file"]] == ["a.png", "ä.png", "c.png", "d.png"]
    for part in ("frames", "masks"): (tmp_path / "png" / part).mkdir(parents=True)
    numbers = np.repeat(np.array([[0, 1, 2, 12]], np.uint8), 4, 0).repeat(4, 0).repeat(4, 1)
    Image.fromarray(named.frames[0]).save(tmp_path / "png/frames/0.png")
    Image.fromarray(numbers).save(tmp_path / "png/masks/0.png")
    for category in ("12", 12, ["12"]): assert (import_labels(tmp_path / "png", category=category, size=16).masks[0] == (numbers == 12)).all()


def test_rows_that_zero_shot_is_not_for_are_refused():
    from vpenc.experiments.experiment import Experiment
    from vpenc.experiments.real import zero_shot
    for wrong in (dict(finetune=True), dict(protocol="paper")):
        with pytest.raises(ValueError, match="frozen encoders under protocol 'corrected'"): zero_shot(Experiment(**wrong), labelled(), labelled())


def test_a_missing_model_is_named_whatever_its_path_is():
    from vpenc.models.checkpoints import find_model
    for path in ("models/mine-x.ckpt", Path("models/mine-x.ckpt")):
        with pytest.raises(FileNotFoundError, match="mine-x"): find_model(path)


def test_a_table_shows_rows_beside_targets(tmp_path, capsys):
    from vpenc.cli import main
    folder = folder_of(tmp_path / "a", task("m", .3, floor=.5), result("one", .9))
    for _ in range(2): assert main(["table", str(folder)]) == 0  # the second time tasks.csv is there
    assert "depth" in (said := capsys.readouterr().out) and (folder / "table.md").exists() and (folder / "tasks.md").exists(), said


# probes

def test_no_real_labels_is_zero_shot():
    from vpenc.experiments.real import draw_labels
    for k in (0, -1, 1.5):
        with pytest.raises(ValueError, match="real labels; expected a whole number from 1"): draw_labels([0, 0, 1, 1], 0, k)
    assert set(draw_labels([0, 0, 1, 1], 0, 2)) == {2, 3}


def test_validation_features_of_another_encoder_are_refused():
    from vpenc.probing.probe import fit_probe
    from vpenc.probing.targets import fit_target
    some = labelled()
    mine, other = features(some.frames), features(some.frames, fingerprint="y")
    with pytest.raises(ValueError, match="validation features are of another encoder"): fit_probe(mine, some.masks, "linear1x1", val=(other, some.masks))
    with pytest.raises(ValueError, match="validation features are of another encoder"): fit_target(mine, some, "mask", val=(other, some))
    with pytest.raises(ValueError, match="views: 0; expected"): fit_probe(mine, some.masks, "linear1x1", val=(mine, some.masks), views=0)


def test_a_tuned_probe_reads_the_features_of_its_own_encoder():
    from vpenc.encoders.taps import load_encoder
    from vpenc.probing.probe import fine_tune
    torch.manual_seed(0)
    some, encoder = labelled(12), load_encoder(torch.nn.Conv2d(3, 4, 3, 1, 1))
    tuned = fine_tune(copy.deepcopy(encoder), some.frames, some.masks, "linear1x1", val=(some.frames, some.masks), encoder_lr=1e-2, epochs=2, lr=.1, weight_decay=0.)
    assert np.allclose(tuned.predict(tuned.encoder(some.frames)), tuned.predict(some.frames), atol=1e-6)
    with pytest.raises(ValueError, match="features of another encoder"): tuned.predict(encoder(some.frames))


def test_motion_is_learned_where_no_validation_frame_moves():
    from vpenc.probing.targets import fit_target
    random = np.random.default_rng(0)

    def make(n, share):
        flow = (share * random.normal(0, 2, (n, 16, 16, 2))).astype(np.float32)
        return FeatureMap(torch.from_numpy(flow).permute(0, 3, 1, 2)[:, None].contiguous(), (1, 1, 1), "t", "x"), replace(labelled(n), extras=dict(flow=flow))
    train, test = make(40, 1.), make(10, 1.)
    with pytest.warns(UserWarning, match="no validation frame can be scored"): probe = fit_target(*train, "motion", val=make(10, .05), epochs=10)  # .1 pixels: still
    assert probe.epoch > 0 and probe.measure(*test)["epe"].mean() < 1.3  # an untrained one is off by the motion itself, 2.6 pixels


def test_none_is_no_name_of_a_class():
    from vpenc.probing.targets import find_target
    with pytest.raises(ValueError, match="none is kept for no class"): find_target("classes:none,robot")


def test_propagation_wants_masks_of_zero_and_one_and_finite_features():
    from vpenc.probing.propagate import position_vectors, propagate
    video = features(labelled(3).frames)
    vectors, mask = position_vectors(video, 8), labelled(1).masks[0]
    with pytest.raises(ValueError, match="mask holds values up to 255"): propagate(vectors, mask.astype(np.uint8) * 255)
    assert np.array_equal(propagate(vectors, mask), propagate(vectors, mask.astype(np.uint8)))
    video.values[0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"): position_vectors(video, 8)


def test_where_nothing_moves_nothing_is_marked():
    from vpenc.experiments.common_fate import map_masks, moving_pixels
    assert not map_masks(np.zeros((1, 16, 16))).any() and not map_masks(np.full((1, 16, 16), 3.)).any()
    with pytest.raises(ValueError, match="video is float64; expected uint8"): moving_pixels(labelled(4).frames / 255)


def test_a_threshold_is_a_probability(tmp_path, capsys):
    from vpenc.cli import main
    np.save(tmp_path / "f.npy", labelled().frames)
    assert main(["predict", str(tmp_path), str(tmp_path / "f.npy"), "--out", str(tmp_path / "o"), "--threshold", "95"]) != 0
    assert "--threshold: 95 is no probability" in capsys.readouterr().err


def test_extreme_rectangles_of_via(tmp_path):
    from PIL import Image

    from vpenc.data.coco import import_labels
    for i in range(2): Image.fromarray(labelled(2, 64).frames[i]).save(tmp_path / f"{i}.png")

    def area(shape):
        views = {str(i): dict(fid_list=[str(i)]) for i in range(2)}
        regions = dict(a=dict(vid="0", xy=[2, 10, 10, 30, 30], av={}), b=dict(vid="1", xy=shape, av={}))
        project = dict(project={}, config={}, attribute={}, file={str(i): dict(fid=str(i), fname=f"{i}.png") for i in range(2)}, view=views, metadata=regions)
        (tmp_path / "p.json").write_text(json.dumps(project))
        return int(import_labels(tmp_path / "p.json").masks[1].sum())
    assert area([8, 5, 15, 15, 5, 25, 15, 15, 25]) == area([2, 5, 5, 20, 20]) == 400  # extreme points: left, top, right, bottom
    with pytest.raises(ValueError, match="VIA shape 9 is not read"): area([9, 5, 5, 20, 20, 5, 20])


# training

SMALL = dict(steps=1, batch_size=1, hidden_dim=48, layers=1, n_hiddens=16, n_res_layers=1, embedding_dim=8, n_codes=16, resnet_widths=(8, 8, 8, 24), resnet_blocks=(1, 1, 1, 1),
             validation_clips=1, futures=0, tensorboard=False)


def clips_at(path, seed, low=0, high=255):
    from vpenc.data.video import ClipStore, write_clips
    random = np.random.default_rng(seed)
    write_clips(path, {split: [dict(video=random.integers(low, high, (8, 64, 64, 3), dtype=np.uint8)) for _ in range(n)] for split, n in (("train", 2), ("test", 1))})
    return ClipStore(path)


@pytest.fixture(scope="module")
def tokenizer():
    from vpenc.models.vqvae import VQVAE, VQVAEConfig
    torch.manual_seed(0)
    vqvae = VQVAE(VQVAEConfig(n_hiddens=16, n_res_layers=1, embedding_dim=8, n_codes=64, sequence_length=8, resolution=64)).eval()
    vqvae.codebook.needs_init = False
    with torch.no_grad(): vqvae.codebook.embeddings.normal_(0, .05)
    return vqvae


def test_a_run_keeps_to_its_clips(tmp_path):
    from vpenc.training.config import configure
    from vpenc.training.pretrain import claim_folder, clips_key
    config, a, b = configure("tiny"), clips_at(tmp_path / "a.h5", 0), clips_at(tmp_path / "b.h5", 1)
    (tmp_path / "run").mkdir()
    for _ in range(2): claim_folder(tmp_path / "run", config, None, clips_key(a))
    with pytest.raises(ValueError, match="holds a run with clips="): claim_folder(tmp_path / "run", config, None, clips_key(b))
    assert clips_key(a) == clips_key(clips_at(tmp_path / "moved.h5", 0))  # the same clips elsewhere


def test_codes_are_of_the_clips_that_are_there(tmp_path, tokenizer):
    from vpenc.training.clips import Clips, CodeData
    from vpenc.training.loop import Team
    from vpenc.training.objectives import StillClips
    for seed in (0, 1):
        for kind in (Clips, StillClips):
            clips = kind(clips_at(tmp_path / "clips.h5", seed), "train", 8)
            assert torch.equal(CodeData(tokenizer, clips, tmp_path / "codes", Team("cpu")).codes[[0, 1]], tokenizer.encode(clips.batch([0, 1])))


def test_a_checkpoint_keeps_to_its_objective_data_and_plan(tmp_path, tokenizer):
    from vpenc.models.videogpt import VideoGPTConfig
    from vpenc.training.loop import Plan
    from vpenc.training.objectives import train_resnet
    config = VideoGPTConfig(hidden_dim=48, heads=4, layers=1, resnet_widths=(8, 8, 8, 24), resnet_blocks=(1, 1, 1, 1), vqvae=tokenizer.config)
    plan, some = Plan(0, 2, 2, 1e-3), labelled(4, 64)
    train = lambda plan=plan, masks=some.masks: train_resnet("labels", config, plan, tmp_path / "run", frames=some.frames, masks=masks)
    assert all(map(torch.equal, train().state_dict().values(), train().state_dict().values()))
    with pytest.raises(ValueError, match="a checkpoint of other data or another objective"): train(masks=~some.masks)
    with pytest.raises(ValueError, match="a checkpoint of another plan, Plan.*steps=2"): train(replace(plan, steps=20))
    store = clips_at(tmp_path / "clips.h5", 0)
    train_resnet("future", config, plan, tmp_path / "codes", store, tokenizer)
    with pytest.raises(ValueError, match="a checkpoint of other data or another objective"): train_resnet("still", config, plan, tmp_path / "codes", store, tokenizer)
