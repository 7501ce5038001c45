"Inputs as people have them, made so that the right answer is known: readers, identity, tables, scores."
import json
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vpenc.probing.targets import MaskTarget


def picture(path, value=0, size=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value,) * 3).save(path)


def film(path, value=0):
    from vpenc.data.pictures import save_mp4
    path.parent.mkdir(parents=True, exist_ok=True)
    save_mp4(path, np.full((4, 16, 16, 3), value, np.uint8))


def parts_of(folder):
    from vpenc.data.ingest import find_videos, split_videos
    return split_videos(find_videos(folder), None, folder)


@pytest.mark.parametrize("names, line", [
    ([f"v{i}.mp4" for i in range(6)], "/data/k400/{0} 0"),  # absolute paths and a class, with a space
    ([f"v{i}.mp4" for i in range(6)], '"{0}",0'),
    ([f"my clip {i}.mp4" for i in range(6)], "{0}"),
    ([f"yt{i}AAAAAAAA_000059_000069.mp4" for i in range(6)], "abseiling,{1},59,69,x"),  # Kinetics
    ([f"{i}.mp4" for i in range(6)], "{2},{0},push"),  # pandas writes its index first; it counts from 0 in either file
    ([f"{i}.mp4" for i in range(6)], "1,{0}"),  # a numeric class first
])
def test_lists_of_parts_are_read_as_they_are_written(tmp_path, names, line):
    order = [3, 5, 0, 2, 4, 1]
    for i, name in enumerate(names): film(tmp_path / name, 30 * i)
    for part, some in (("train", order[:3]), ("test", order[3:])):
        (tmp_path / f"{part}.csv").write_text("".join(line.format(names[i], names[i][:11], row) + "\n" for row, i in enumerate(some)))
    assert {name for name, part in parts_of(tmp_path).items() if part == "train"} == {names[i] for i in order[:3]}


def test_a_stray_film_does_not_undo_the_parts_and_a_list_of_others_is_named(tmp_path):
    for i in range(6): film(tmp_path / ("train" if i < 4 else "test") / f"v{i}.mp4", 30 * i)
    film(tmp_path / "demo.mp4", 250)
    given = parts_of(tmp_path)
    assert "demo.mp4" not in given and {name for name, part in given.items() if part == "test"} == {"test/v4.mp4", "test/v5.mp4"}
    lone = tmp_path / "lone"
    for i in range(3): film(lone / f"{i}.mp4", 40 * i)
    (lone / "train.csv").write_text("a.mp4\nb.mp4\n")
    with pytest.warns(UserWarning, match="names none of the 3"): parts_of(lone)
    (lone / "train.csv").write_bytes("0.mp4\n1.mp4\n".encode("utf-16"))
    (lone / "test.csv").write_bytes("2.mp4\n".encode("utf-16"))
    assert parts_of(lone) == {"0.mp4": "train", "1.mp4": "train", "2.mp4": "test"}
    (lone / "test.csv").write_bytes(b"\xff2.mp4")
    with pytest.raises(ValueError, match="test.csv: is neither UTF-8 nor UTF-16"): parts_of(lone)


def test_thumbnails_previews_and_deleted_files_are_no_videos(tmp_path):
    from vpenc.data.ingest import find_videos
    for i in range(3):
        film(tmp_path / f"a/v{i}/v{i}.mp4", 50 * i), picture(tmp_path / f"a/v{i}/v{i}.jpg")
        film(tmp_path / f"b/v{i}.mp4", 50 * i), picture(tmp_path / f"b/@eaDir/v{i}.mp4/SYNOVIDEO_VIDEO_SCREENSHOT.jpg")
        film(tmp_path / f"c/v{i}/all.mp4", 50 * i), [picture(tmp_path / f"c/v{i}/{k}.png", 9 * k) for k in range(3)]
    film(tmp_path / "b/#recycle/old.mp4")
    assert list(find_videos(tmp_path / "a")) == [f"v{i}/v{i}.mp4" for i in range(3)] and list(find_videos(tmp_path / "b")) == [f"v{i}.mp4" for i in range(3)]
    assert list(find_videos(tmp_path / "c")) == ["v0", "v1", "v2"]  # the frames; the film of them is a preview


def test_pictures_beside_an_array_or_several_films_are_no_video(tmp_path):
    from vpenc.data.ingest import find_videos
    picture(tmp_path / "a/ep/thumb.png")
    np.save(tmp_path / "a/ep/video.npy", np.zeros((4, 16, 16, 3), np.uint8))
    for name in "xy": film(tmp_path / f"b/ep/{name}.mp4")
    for i in range(5): picture(tmp_path / f"b/ep/shot{i}.png")
    film(tmp_path / "c/ep/long.mp4"), picture(tmp_path / "c/ep/thumb.png")
    assert [list(find_videos(tmp_path / name)) for name in "abc"] == [["ep/video.npy"], ["ep/x.mp4", "ep/y.mp4"], ["ep/long.mp4"]]


def test_animated_webp(tmp_path):
    from vpenc.data.ingest import find_videos
    from vpenc.data.pictures import read_video
    frames = [Image.new("RGB", (16, 16), (20 * i,) * 3) for i in range(3)]
    options = dict(save_all=True, append_images=frames[1:], duration=100, lossless=True)
    for i in range(3): picture(tmp_path / f"a/{i}.png", 20 * i)
    frames[0].save(tmp_path / "a/preview.webp", **options)
    assert read_video(tmp_path / "a", 16)[:, 0, 0, 0].tolist() == [0, 20, 40]
    (tmp_path / "b").mkdir()
    for i in range(3): frames[0].save(tmp_path / f"b/clip{i}.webp", **options)
    assert list(find_videos(tmp_path / "b")) == [f"clip{i}.webp" for i in range(3)]


def test_order_links_and_doubles_of_frames(tmp_path):
    from vpenc.data.ingest import convert_videos
    from vpenc.data.pictures import read_video
    from vpenc.data.video import ClipStore
    for i, second in enumerate((0., .25, .5, .75)): picture(tmp_path / f"a/{second}.png", 20 * i)
    assert read_video(tmp_path / "a", 16)[:, 0, 0, 0].tolist() == [0, 20, 40, 60]
    (tmp_path / "a/0.5.png").unlink()
    (tmp_path / "a/0.5.png").symlink_to("/annex/not-fetched")
    with pytest.raises(ValueError, match="0.5.png is a link to a file that is not there"): read_video(tmp_path / "a", 16)
    for i in range(3): picture(tmp_path / f"b/{i}.png", 20 * i), picture(tmp_path / f"b/{i}.jpg", 20 * i)
    with pytest.raises(ValueError, match="0.jpg and 0.png may be the same frame"): read_video(tmp_path / "b", 16)
    for i in range(3): picture(tmp_path / f"c/{i}.png", 20 * i)  # one folder of frames is one video
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ClipStore(convert_videos(tmp_path / "c", tmp_path / "c.h5", size=16, jobs=1)).count("train") == 1


def test_equal_videos_in_one_array_stay_in_one_part(tmp_path):
    from vpenc.data.ingest import convert_videos
    from vpenc.data.video import ClipStore
    clips = np.random.default_rng(0).integers(0, 255, (5, 4, 16, 16, 3)).astype(np.uint8)
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a/a.npy", np.concatenate([clips, clips]))
    store = ClipStore(convert_videos(tmp_path / "a", tmp_path / "a.h5", size=16, test_share=.5, jobs=1))
    seen = [{store.field(split, "data", i)[...].tobytes() for i in range(store.count(split))} for split in ("train", "test") if split in store.splits]
    assert sum(map(len, seen)) == len(set().union(*seen)) == 5


def test_tiffs(tmp_path):
    from vpenc.data.pictures import read_pictures
    values = np.zeros((8, 16), np.uint8)
    values[:4, :8], values[:4, 8:], values[4:, :8], values[4:, 8:] = 40, 100, 160, 220
    Image.fromarray(values).save(tmp_path / "turned.tif", tiffinfo={274: 6})  # to be shown a quarter turn to the right
    assert np.array_equal(read_pictures(tmp_path / "turned.tif")[0][0, :, :, 0], np.rot90(values, -1))
    tags = [(256, 3, 8), (257, 3, 8), (258, 3, 16), (259, 3, 1), (262, 3, 0), (273, 4, 8), (277, 3, 1), (278, 3, 8), (279, 4, 128)]  # 262: 0 is white
    entries = b"".join(struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", value) for tag, kind, value in tags)
    (tmp_path / "white.tif").write_bytes(b"II*\0" + struct.pack("<I", 136) + np.full((8, 8), 60000, np.uint16).tobytes() + struct.pack("<H", 9) + entries + bytes(4))
    assert read_pictures(tmp_path / "white.tif")[0][0, 0, 0, 0] == 22  # (65535 - 60000) / 257 = 21.5


def test_a_mirrored_film_is_mirrored(tmp_path):
    from vpenc.data.pictures import read_pictures, save_mp4
    values = np.zeros((32, 64, 3), np.uint8)
    values[:16, :32], values[:16, 32:], values[16:, :32], values[16:, 32:] = 40, 100, 160, 220
    save_mp4(tmp_path / "a.mp4", values[None].repeat(3, 0))
    data = (tmp_path / "a.mp4").read_bytes()
    at = data.index(b"tkhd") + 44  # the display matrix
    for matrix, picked in (((-1, 0, 0, 1), values[:, ::-1]), ((1, 0, 0, -1), values[::-1]), ((0, 1, 1, 0), values.swapaxes(0, 1))):
        a, b, c, d = (65536 * n for n in matrix)
        (tmp_path / "m.mp4").write_bytes(data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36:])
        shown = read_pictures(tmp_path / "m.mp4")[0][0].astype(int)
        assert shown.shape == picked.shape and np.abs(shown[::8, ::8] - picked[::8, ::8]).mean() < 4, matrix


@pytest.mark.parametrize("kind", ("gif", "npz"))
def test_cut_off_files_are_named(tmp_path, kind):
    from vpenc.data.pictures import read_pictures
    values = np.random.default_rng(0).integers(0, 255, (6, 12, 12, 3)).astype(np.uint8)
    first, *rest = map(Image.fromarray, values)
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=100)
    np.savez(tmp_path / "a.npz", values)
    data = (tmp_path / f"a.{kind}").read_bytes()
    for share in (.3, .5, .7):
        (tmp_path / f"cut.{kind}").write_bytes(data[:int(len(data) * share)])
        try: read_pictures(tmp_path / f"cut.{kind}")
        except ValueError as error: assert f"cut.{kind}" in str(error) and "\n" not in str(error)


def labelme(path, image, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(imageWidth=64, imageHeight=64, imagePath=image, shapes=[dict(label="r", shape_type="polygon", points=[[0, 0], [32, 0], [32, 32]])]) | more))


def test_pictures_of_exports_are_found_by_their_path(tmp_path):
    from vpenc.data.coco import import_labels
    for folder, value in (("a", 10), ("b", 200)):
        picture(tmp_path / f"images/{folder}/0.png", value, 64)
        labelme(tmp_path / f"ann/{folder}/0.json", f"../../images/{folder}/0.png")
    labels = import_labels(tmp_path)
    assert sorted(zip(labels.extras["file"].tolist(), labels.frames[:, 0, 0, 0].tolist())) == [(b"images/a/0.png", 10), (b"images/b/0.png", 200)]
    (tmp_path / "images/b/0.png").unlink()
    (tmp_path / "ann/a/0.json").unlink()
    with pytest.warns(UserWarning, match="images/a/0.png, which has its name, is taken"): import_labels(tmp_path)


def test_darwin_ellipse_and_unread_kinds(tmp_path):
    from vpenc.data.coco import import_labels
    picture(tmp_path / "1.png", 20, 64)
    def write(*annotations): (tmp_path / "1.json").write_text(json.dumps(dict(version="2.0", item=dict(name="1.png", path="/", slots=[dict(width=64, height=64)]), annotations=annotations)))
    write(dict(name="r", ellipse=dict(center=dict(x=32, y=32), radius=dict(x=10, y=10), angle=0), bounding_box=dict(x=22, y=22, w=20, h=20)))
    assert abs(import_labels(tmp_path, category=["r"]).masks.sum() - np.pi * 100) < 12
    write(dict(name="r", mask={}))
    with pytest.raises(ValueError, match="kind 'mask' is not read"): import_labels(tmp_path, category=["r"])


def test_label_studio_with_labels_apart(tmp_path):
    from vpenc.data.coco import import_labels
    picture(tmp_path / "0.png", 10, 64), picture(tmp_path / "a/0.png", 200, 64)
    region = dict(id="x", original_width=64, original_height=64)
    results = [dict(region, type="polygon", value=dict(points=[[0, 0], [50, 0], [50, 50], [0, 50]])), dict(region, type="labels", value=dict(labels=["r"]))]
    (tmp_path / "p.json").write_text(json.dumps([dict(id=1, data=dict(image="/data/local-files/?d=a/0.png"), annotations=[dict(result=results)])]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        labels = import_labels(tmp_path, category=["r"])
    assert labels.extras["file"].tolist() == [b"a/0.png"] and labels.masks.sum() == 32 * 32


def test_lists_of_davis(tmp_path):
    from vpenc.data.coco import import_labels
    for i, video in enumerate(("bear", "camel", "dog")):
        picture(tmp_path / f"JPEGImages/480p/{video}/00000.jpg", 20 * i, 32)
        values = np.zeros((32, 32), np.uint8)
        values[:8, :8] = 255
        (tmp_path / f"Annotations/480p/{video}").mkdir(parents=True)
        Image.fromarray(values).save(tmp_path / f"Annotations/480p/{video}/00000.png")
    lists = tmp_path / "ImageSets/480p"
    lists.mkdir(parents=True)
    for part, video in (("train", "bear"), ("val", "camel")):
        (lists / f"{part}.txt").write_text(f"/JPEGImages/480p/{video}/00000.jpg /Annotations/480p/{video}/00000.png\n")
    with pytest.warns(UserWarning, match="1 of 3 videos are in none of the lists"): labels = import_labels(tmp_path)
    assert [name.decode().split("/")[-2] for name in labels.extras["file"]] == ["bear", "camel"] and labels.split.tolist() == ["train", "val"]
    for part in ("train", "val"): (lists / f"{part}.txt").write_text("zebra\n" if part == "train" else "lion\n")
    with pytest.raises(ValueError, match="name none of the videos"): import_labels(tmp_path)


def test_masks_with_transparency_are_refused(tmp_path):
    from vpenc.data.masks import read_mask
    half = np.zeros((8, 8), np.uint8)
    half[:, 4:] = 1
    image = Image.fromarray(half, "P")
    image.putpalette([255, 255, 255, 0, 0, 0])
    image.save(tmp_path / "m.png", transparency=bytes([0, 255]))
    with pytest.raises(ValueError, match="transparent"): read_mask(tmp_path / "m.png")


def test_masks_of_one_folder_have_one_object(tmp_path):
    from vpenc.data.masks import read_label_folder
    def mask(name, value):
        picture(tmp_path / f"frames/{name}.png", 9, 16)
        values = np.zeros((16, 16), np.uint8)
        values[4:9, 4:9] = value
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(values).save(tmp_path / f"masks/{name}.png")
    mask("a", 1), mask("b", 0)
    assert read_label_folder(tmp_path).masks.sum((1, 2)).tolist() == [25, 0]
    mask("b", 255)  # 255 is often "void" where 1 is the object
    with pytest.raises(ValueError, match="the object is 1 in a.png and 255 in b.png"): read_label_folder(tmp_path)
    assert read_label_folder(tmp_path, values=[1]).masks.sum((1, 2)).tolist() == [25, 0]


def test_overlays_overwrite_nothing_of_others(tmp_path):
    from vpenc.cli import main
    for i in range(3):
        picture(tmp_path / f"set/frames/{i}.png", 20 * i, 64)
        mask = Image.new("L", (64, 64))
        mask.paste(255, (8, 8, 24, 24 + i))
        (tmp_path / "set/masks").mkdir(exist_ok=True)
        mask.save(tmp_path / f"set/masks/{i}.png")
    picture(tmp_path / "scene.png", 7)
    before = (tmp_path / "scene.png").read_bytes()
    assert main(["data", "masks", str(tmp_path / "set"), "--out", str(tmp_path / "scene.h5")]) == 2 and (tmp_path / "scene.png").read_bytes() == before
    assert main(["data", "masks", str(tmp_path / "set"), "--out", str(tmp_path / "other.h5")]) == 0 == main(["data", "masks", str(tmp_path / "set"), "--out", str(tmp_path / "other.h5")])


class Twelve(nn.Module):
    def forward(self, x): return [x[:, :1] * 0 + i for i in range(12)]


def test_more_than_ten_levels_keep_their_order_in_the_cache(tmp_path):
    from vpenc.encoders.features import extract
    from vpenc.encoders.taps import load_encoder
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    for cache in (False, tmp_path): assert [int(level.mean()) for level in extract(load_encoder(Twelve()), frames, cache).levels] == list(range(11))


def test_a_tap_of_ones_own_is_told_by_its_code(tmp_path):
    from vpenc.encoders.taps import VIDEOGPT_TAPS, VQVAE_TAPS, VQVAEEncoder
    from vpenc.models.vqvae import VQVAE, VQVAEConfig
    torch.manual_seed(0)
    vqvae = VQVAE(VQVAEConfig(n_hiddens=8, n_res_layers=1, embedding_dim=8, n_codes=16, downsample=(4, 4, 4), sequence_length=4, resolution=16)).eval()
    def single(run): return run.pre.transpose(1, 2)
    def double(run): return 2 * run.pre.transpose(1, 2)
    found = []
    for function in (single, double):
        VQVAE_TAPS["vqvae:mine"] = VIDEOGPT_TAPS["vqvae:mine"] = function
        try: found.append(VQVAEEncoder("mine", vqvae).fingerprint)
        finally: del VQVAE_TAPS["vqvae:mine"], VIDEOGPT_TAPS["vqvae:mine"]
    assert found[0] != found[1] and VQVAEEncoder("pre", vqvae).own_code("vqvae:pre") == ""


def test_a_probe_refuses_features_of_an_encoder_changed_in_place():
    from vpenc.encoders.taps import load_encoder
    from vpenc.probing.probe import fit_probe
    frames, masks = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), dtype=np.uint8), np.zeros((2, 16, 16), bool)
    masks[:, 2:9, 2:9] = True
    encoder = load_encoder(nn.Conv2d(3, 2, 1))
    probe = fit_probe(encoder(frames), masks, "linear1x1", val=(encoder(frames), masks), epochs=1)
    encoder.model.weight.data.mul_(-3)
    assert encoder(frames).fingerprint == encoder.fingerprint
    with pytest.raises(ValueError, match="another encoder"): probe.predict(encoder(frames))


def result_file(folder, name, values, **settings):
    from vpenc.experiments.experiment import Experiment, record
    settings = dict(encoder="videogpt:resnet", head="linear1x1") | settings
    row, mean = Experiment(**settings), float(np.mean(values))
    scores = dict.fromkeys("iou iou_pooled dice boundary_f ap ece iou_at_threshold threshold".split(), mean)
    data = dict(dataset="d", fingerprint="f", simulated=False, train=9, scored=len(values), size=[64, 64], scored_on="test")
    (folder / f"{name}.json").write_text(json.dumps(dict(
        format="vpenc-result-1", name=row.name, experiment=record(row), paper=None, data=data, seeds=[0], scores=[scores], per_image=[list(values)],
        images=[list(range(len(values)))], trajectory=[[i // 2 for i in range(len(values))]], degenerate=False, head_parameters=1, encoder_ms=1., probe_seconds=1., seconds=1.,
        peak_memory_mb=1., history=[], versions={})))


def test_every_row_has_its_line(tmp_path):
    from vpenc.experiments.results import collect, table
    given = [dict(finetune=True), dict(finetune=True, freeze="norm"), dict(finetune=True, encoder_lr=1e-3), dict(test=40), dict(test=10), dict(weights="/x/one/model"), dict(weights="/y/two/model")]
    for i, settings in enumerate(given): result_file(tmp_path, i, [(i + 1) / 10] * settings.get("test", 40), **settings)
    assert sorted(round(float(iou), 3) for iou in table(collect(tmp_path)).iou) == [.1, .2, .3, .4, .5, .6, .7]


def test_a_floor_is_judged_on_the_row_s_own_frames(tmp_path):
    from vpenc.experiments.results import collect, table
    result_file(tmp_path, "mine", [.8] * 10, test=10)
    result_file(tmp_path, "pixels", [.9] * 10 + [.3] * 30, encoder="pixels")  # .45 in the mean of its 40, .9 on the first 10
    result_file(tmp_path, "prior", [.6] * 10, encoder="position", head="prior", test=10)
    (line,) = [line for _, line in table(collect(tmp_path)).iterrows() if line.encoder == "videogpt:resnet"]
    assert (line.floor_name, round(line.floor, 3), round(line.gain, 3)) == ("raw pixels, linear 1x1", .9, -.1)


def test_settings_that_no_training_can_use(tmp_path):
    from vpenc.encoders.taps import load_encoder
    from vpenc.experiments.experiment import Experiment
    from vpenc.probing.probe import fit_probe
    frames, masks = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), dtype=np.uint8), np.zeros((8, 16, 16), bool)
    masks[:, 3:9, 3:9] = True
    maps = load_encoder("pixels")(frames)
    for wrong in (dict(weight_decay=-20.), dict(weight_decay=float("nan")), dict(lr=[-.1, -.2]), dict(lr=[]), dict(epochs=2.5), dict(epochs=-3), dict(batch=-1), dict(batch=0)):
        with pytest.raises(ValueError, match=next(iter(wrong))): fit_probe(maps, masks, "linear1x1", val=(maps, masks), **wrong)
    assert Experiment(seeds="10").seeds == (10,) and Experiment(seeds="3,4").seeds == (3, 4)
    for wrong, part in ((dict(seeds=(1.9,)), "seeds"), (dict(seeds=(0, 0)), "different"), (dict(weight_decay=float("nan")), "weight_decay"), (dict(finetune=True, layer_decay=3.), "layer_decay")):
        with pytest.raises(ValueError, match=part): Experiment(**wrong)


def test_a_loss_that_is_no_number_stops_the_training():
    from vpenc.encoders.taps import load_encoder
    from vpenc.probing.probe import fine_tune
    frames, masks = np.random.default_rng(0).integers(0, 90, (24, 16, 16, 3), dtype=np.uint8), np.zeros((24, 16, 16), bool)
    frames[:, 4:10, 4:10, 0], masks[:, 4:10, 4:10] = 250, True
    torch.manual_seed(0)
    encoder = load_encoder(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()))
    with pytest.raises(ValueError, match="the loss became nan in epoch 1: lower the learning rate"):
        fine_tune(encoder.to(torch.float16), frames[:16], masks[:16], "linear1x1", val=(frames[16:], masks[16:]), epochs=3, lr=.1, encoder_lr=1e-2)


def test_truths_that_are_no_numbers():
    from vpenc.data.masks import LabelledFrames
    from vpenc.probing.targets import find_target
    frames = np.zeros((3, 16, 16, 3), np.uint8)
    def labels(**extras): return LabelledFrames(frames, np.zeros((3, 16, 16), bool), extras=extras)
    flow, depth, ids = np.zeros((3, 16, 16, 2), np.float32), np.ones((3, 16, 16), np.float32), np.zeros((3, 16, 16), np.int64)
    flow[1, 0, 0, 0], depth[2, 5, 5], ids[1, 2, 2] = np.nan, np.inf, -1
    for target, given, part in (("motion", dict(flow=flow), "flow of frame 1 holds nan"), ("depth", dict(depth=depth), "depth of frame 2 holds inf"), ("semantic", dict(instances=ids), "frame 1 holds -1"),
                                ("instances", dict(instances=np.where(ids < 0, 2**24, 0)), "holds 16777216")):
        with pytest.raises(ValueError, match=part): find_target(target).truth(labels(**given))


def test_scores_at_their_edges():
    from vpenc.probing.metrics import boundary_f, iou_per_image, paired_bootstrap
    square = np.zeros((1, 20, 20), bool)
    square[:, 5:15, 5:15] = True
    # 36 pixels of either edge; shifted by one column they share 9 pixels of the upper and 9 of the lower side: 18 of 36
    assert boundary_f(square, np.roll(square, 1, 2), 0).tolist() == [.5] and boundary_f(square, np.roll(square, 1, 2), 1).tolist() == [1.]
    for function, arguments, part in ((boundary_f, (square, square, -1), "tolerance"), (iou_per_image, (square * .2, square), "probabilities"), (paired_bootstrap, ([.5, .6, .7], [.1], [0, 1, 2]), "paired")):
        with pytest.raises(ValueError, match=part): function(*arguments)


def test_sampling_at_its_edges():
    from vpenc.models.decoding import draw
    assert len(draw(torch.zeros(200, 8), top_k=1).unique()) == 1  # one code stays, though all are as likely
    assert set(draw(torch.zeros(500, 8), top_k=3, generator=torch.Generator().manual_seed(0)).tolist()) == set(torch.zeros(1, 8).topk(3).indices[0].tolist())
    torch.manual_seed(0)
    from vpenc.models.videogpt import VideoGPT, VideoGPTConfig
    from vpenc.models.vqvae import VQVAEConfig
    tiny = VideoGPT(VideoGPTConfig(hidden_dim=24, heads=2, layers=1, dropout=0., attn_dropout=0., resnet_widths=(8, 8, 16, 24), resnet_blocks=(1, 1, 1, 1),
                                   vqvae=VQVAEConfig(n_hiddens=8, n_res_layers=1, embedding_dim=8, n_codes=16, downsample=(4, 8, 8), sequence_length=8, resolution=16))).eval()
    frame = torch.zeros(1, 3, 16, 16)
    for wrong, part in ((dict(n=0), "n:"), (dict(n=-1), "n:"), (dict(top_k=1.5), "top_k"), (dict(top_k=True), "top_k"), (dict(temperature="1"), "temperature"),
                        (dict(uniform=torch.ones(3, 1)), "uniform"), (dict(uniform=torch.full((3, 1), float("nan"))), "uniform")):
        with pytest.raises(ValueError, match=part): tiny.sample(frame, **wrong)


def test_a_changed_network_of_transformers_is_refused():
    transformers = pytest.importorskip("transformers")
    import copy
    from vpenc.encoders.taps import load_encoder
    torch.manual_seed(0)
    net = transformers.ViTModel(transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8)).eval()
    load_encoder(net)
    def tripled(module, inputs, output): return output * 3
    hooked, loose, other = copy.deepcopy(net), copy.deepcopy(net), copy.deepcopy(net)
    hooked.layernorm.register_forward_hook(tripled)
    loose.layernorm.eps = .5
    other.layernorm = nn.Identity()
    for changed, part in ((hooked, "layernorm has a hook"), (loose, "layernorm.eps is 0.5"), (other, "layernorm is Identity")):
        with pytest.raises(ValueError, match=part): load_encoder(changed)


def test_a_target_that_was_redefined_is_asked_again(tmp_path):
    from vpenc.data.masks import LabelledFrames
    from vpenc.experiments.tasks import Task, run_task
    from vpenc.probing import targets
    random, count = np.random.default_rng(0), 30
    masks = np.zeros((count, 16, 16), bool)
    masks[:, 3:9, 3:9] = True
    labels = LabelledFrames(random.integers(0, 90, (count, 16, 16, 3), dtype=np.uint8), masks, np.arange(count), np.array(["train"] * 14 + ["val"] * 6 + ["test"] * 10), "toy",
                            dict(depth=np.where(masks, 1., 3.)))
    task = dict(target="near", encoder="pixels", head="linear1x1", labels=14, seeds=(0,), epochs=2)
    def fit(limit):
        targets.TARGETS["near"] = Near(limit)
        try: result = run_task(Task(**task), labels, cache=tmp_path, file=tmp_path / "r.json")
        finally: del targets.TARGETS["near"]
        (tmp_path / "r.json").write_text(json.dumps(result))
        return float(np.mean(result["floors"]["mean mask"]))
    assert fit(2.) == fit(2.) < 1 and fit(10.) == 1.  # a square, then everything
    assert json.loads((tmp_path / "r.json").read_text())["scores"]["iou"][0] == [1.] * 10


class Near(MaskTarget):
    name, needs = "near", "depth"
    def __init__(self, limit): self.limit = limit
    def truth(self, labelled): return torch.from_numpy((self.array(labelled) < self.limit).astype(np.float32))[:, None]


def clips_file(path, value, size=16, count=2, frames=8):
    from vpenc.data.video import write_clips
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [dict(video=np.full((frames, size, size, 3), value, np.uint8))] * count
    return write_clips(path, dict(train=records, test=records))


def test_a_path_with_brackets_is_a_path(tmp_path):
    from vpenc.data.shards import open_clips
    one = clips_file(tmp_path / "clips[1].h5", 1)
    clips_file(tmp_path / "clips1.h5", 2)
    assert open_clips(one).clip("train", 0).max() == 1 and open_clips(str(one)).clip("train", 0).max() == 1


def test_clips_stay_the_same_when_the_folder_is_changed(tmp_path, monkeypatch):
    from vpenc.data.shards import open_clips
    for name, value in (("a", 1), ("b", 2)): clips_file(tmp_path / name / "x.h5", value)
    monkeypatch.chdir(tmp_path / "a")
    alone, shards = open_clips("x.h5"), open_clips(["x.h5"])
    monkeypatch.chdir(tmp_path / "b")
    for store in (alone, shards): assert store.clip("train", 0).max() == 1


def test_whole_numbers_of_clips_are_not_cut(tmp_path):
    from vpenc.data.video import write_clips
    frames = np.zeros((4, 16, 16, 3), np.uint8)
    trajectories = [dict(video=frames, instances=np.full((4, 16, 16), value, dtype)) for value, dtype in ((1, np.uint8), (300, np.int64))]
    with pytest.raises(ValueError, match="train_instances: trajectory 1 has int64 values that do not fit the uint8"): write_clips(tmp_path / "x.h5", dict(train=trajectories))
    assert not (tmp_path / "x.h5").exists()
    write_clips(tmp_path / "x.h5", dict(train=[trajectories[0], dict(video=frames, instances=np.ones((4, 16, 16), np.int64))]))


def test_two_sessions_of_one_folder_see_each_others_masks(tmp_path):
    from vpenc.views.label_session import LabelSession
    frames = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    one, two = LabelSession(tmp_path / "s", frames), LabelSession(tmp_path / "s", torch.from_numpy(frames))
    two.draw(2, np.ones((16, 16), bool))
    assert one.done == 1 and one.mask(2).all() and len(one.labels()) == 1
    one.draw(2, np.zeros((16, 16), bool))
    assert not two.mask(2).any() and one.undo(2) and two.mask(2).all()
    with pytest.warns(UserWarning, match="1 masks are of frames that array does not have"): LabelSession(tmp_path / "s", frames[:2] + 1)


def test_probabilities_are_no_masks_and_pixels_have_one_scale():
    from vpenc.encoders.futures import motion, psnr
    from vpenc.encoders.latents import pixel_classes
    from vpenc.probing.metrics import boundary_f
    from vpenc.views.viz import overlay
    mask = np.zeros((1, 8, 8), bool)
    mask[:, 2:5, 2:6] = True
    with pytest.raises(ValueError, match="probabilities"): boundary_f(np.where(mask, .9, .1), mask)
    with pytest.raises(ValueError, match="probabilities"): overlay(np.zeros((8, 8, 3), np.uint8), np.where(mask[0], .9, .1))
    with pytest.raises(ValueError, match="floats up to 200"): overlay(np.full((8, 8, 3), 200.), mask[0])
    video = np.zeros((2, 3, 8, 8, 3), np.float32)
    for wrong in (lambda: psnr(video, video), lambda: motion(video)):
        with pytest.raises(ValueError, match="float32: expected uint8"): wrong()
    assert (pixel_classes(mask * np.uint8(255)) == mask).all()


@pytest.mark.parametrize("target, array, right", [("depth", (2, 16, 16, 1), "(2, 16, 16)"), ("motion", (2, 16, 16, 3), "(2, 16, 16, 2)"), ("instances", (2, 16, 16, 3), "(2, 16, 16)")])
def test_arrays_of_targets_have_the_axes_of_their_target(target, array, right):
    from vpenc.data.masks import LabelledFrames
    from vpenc.probing.targets import TARGETS, find_target
    own = find_target(target)
    labels = LabelledFrames(np.zeros((2, 16, 16, 3), np.uint8), np.ones((2, 16, 16), bool), extras={own.needs: np.ones(array, np.float32 if target != "instances" else np.uint8)})
    with pytest.raises(ValueError, match=right.replace("(", r"\(").replace(")", r"\)")): own.truth(labels)
    assert target in TARGETS


@pytest.mark.parametrize("words, line", [
    (["--device", "gpu"], "device: unknown 'gpu'"), (["--set", "steps=1e3"], "steps: a value such as"), (["--set", "accumulate=0"], "accumulate: 0; expected"),
    (["--set", "validation_clips=0"], "validation_clips: 0; expected at least 1"), ([], "pictures of 16x16, the model takes 64x64; convert them with --size 64"),
    (["--init", "videogpt-sim", "--set", "layers=8"], "layers: 8 given, but the model of init has 4"), (["--model", "magvit", "--set", "precision=bf16"], "precision: unknown 'bf16'"),
])
def test_settings_of_a_training_are_refused_before_it(tmp_path, capsys, words, line):
    from vpenc.cli import main
    assert main(["pretrain", str(clips_file(tmp_path / "c.h5", 1)), "--out", str(tmp_path / "run"), *words]) == 2
    assert line in (said := capsys.readouterr().err) and len(said.splitlines()) == 1
    assert not (tmp_path / "run" / "vqvae.pt").exists()


def test_a_gpu_that_is_not_there_is_named():
    from vpenc.models.checkpoints import find_device
    with pytest.raises(ValueError, match="there is no cuda:99"): find_device("cuda:99")
    assert find_device("cpu").type == "cpu"


def test_clips_of_an_array_stay_apart(tmp_path):
    from vpenc.encoders.futures import load_windows
    clips = np.stack([np.full((4, 16, 16, 3), value, np.uint8) for value in range(3)])
    np.save(tmp_path / "n.npy", clips)
    assert [np.unique(video).tolist() for video in load_windows(tmp_path / "n.npy", 4, 16).video] == [[0], [1], [2]]
    (tmp_path / "cut.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="cut.npz"): load_windows(tmp_path / "cut.npz", 4, 16)


def test_pages_of_a_tiff_that_are_not_read_are_told(tmp_path):
    from vpenc.data.pictures import read_pictures
    pages = [Image.new("RGB", (16, 16), (value,) * 3) for value in (0, 100)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    with pytest.warns(UserWarning, match="only the first of its 2 pages"): assert len(read_pictures(tmp_path / "stack.tif", 16)[0]) == 1


def test_seeds_of_numpy_are_seeds(tmp_path):
    from vpenc.data.sim import SimConfig, generate_clips
    from vpenc.data.video import ClipStore
    quick = dict(frames=2, supersample=1, shadows=0)
    a, b = (ClipStore(generate_clips(tmp_path / f"{i}.h5", 1, 0, SimConfig(seed=seed, **quick), processes=1)) for i, seed in enumerate((np.int64(3), 3)))
    assert (a.clip("train", 0) == b.clip("train", 0)).all() and a.attrs["seed"] == 3


def test_long_names_make_files():
    from vpenc.cli import file_names
    names = file_names(["機" * 40 + ".png", "機" * 40 + "器.png", "take 1.png"])
    assert all(len(name.encode()) < 240 for name in names) and len(set(names)) == 3 and names[2] == "take 1"


def test_an_array_of_clips_is_hashed_once(tmp_path, monkeypatch):
    from vpenc.data import ingest
    read, whole = [], ingest.file_sha256
    monkeypatch.setattr(ingest, "file_sha256", lambda path: read.append(path) or whole(path))
    np.save(tmp_path / "n.npy", np.random.default_rng(0).integers(0, 255, (10, 4, 16, 16, 3), dtype=np.uint8))
    ingest.convert_videos(tmp_path / "n.npy", tmp_path / "c.h5", size=16, jobs=1)
    assert len(read) <= 2


@pytest.mark.parametrize("attrs, simulated", [(dict(domain="bair"), True), ({}, False)])
def test_a_card_says_that_clips_are_simulated_by_what_they_are(tmp_path, attrs, simulated):
    from vpenc.data.video import ClipStore, write_clips
    from vpenc.training.config import configure
    from vpenc.training.pretrain import model_card
    record = [dict(video=np.zeros((8, 64, 64, 3), np.uint8))]
    store = ClipStore(write_clips(tmp_path / "simple_kitchen.h5", dict(train=record, test=record), attrs))
    assert ("no real video" in model_card(configure("tiny"), [], "tiny", store, True)) == simulated


def test_a_network_that_gives_a_dict_is_told():
    from vpenc.encoders.taps import load_encoder

    class Net(nn.Module):
        def forward(self, frames): return dict(layer1=frames)
    with pytest.raises(ValueError, match="gave a dict with layer1"): load_encoder(Net())(np.zeros((1, 16, 16, 3), np.uint8))
