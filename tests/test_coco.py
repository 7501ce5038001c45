"""Labels of other tools: agreement with pycocotools, and malformed inputs."""
import copy
import json

import numpy as np
import pytest
from PIL import Image

from vpenc.data.coco import (COCO_JSON, annotation_points, coco_files, decode_rle, encode_rle, fill_polygon, import_labels,
                        read_coco, save_coco, unpack_counts)
from vpenc.data.masks import LabelledFrames, cover, fit_mask

STAR = [[60, 10, 90, 110, 15, 50, 110, 55, 25, 105]]  # a pentagram: its outline crosses itself


def export(folder, images, annotations, categories=("things", "block", "robot"), size=(128, 128)):
    "A Roboflow-like export; (file name) each and (image, category, segmentation) each."
    folder.mkdir(parents=True, exist_ok=True)
    for name in images: Image.fromarray(np.full((*size, 3), 99, np.uint8)).save(folder / name)
    records = [dict(id=i, file_name=name, height=size[0], width=size[1]) for i, name in enumerate(images)]
    content = dict(images=records, categories=[dict(id=i, name=name) for i, name in enumerate(categories)],
                   annotations=[dict(id=i, image_id=image, category_id=category, segmentation=outline, iscrowd=0)
                                for i, (image, category, outline) in enumerate(annotations)])
    (folder / COCO_JSON).write_text(json.dumps(content))
    return content


@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (37, 53), (480, 640)])
def test_run_lengths_are_those_of_pycocotools(shape):
    coco_mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(shape)
    for density in (0, .001, .2, .9, 1):
        mask = rng.random(shape) < density
        packed = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        assert np.array_equal(decode_rle(packed, *shape), mask)
        ours = coco_mask.frPyObjects(encode_rle(mask), *shape)
        assert ours["counts"] == packed["counts"] and unpack_counts(ours["counts"].decode()) == encode_rle(mask)["counts"]


def test_polygons_agree_with_pycocotools_where_it_does_not_round():
    "Corners on pixel corners: no rounding, so both must find the same pixels, also for outlines that cross themselves."
    coco_mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(50):  # rectilinear walks
        x, y = rng.integers(0, 41, (2, 6))
        corners = np.stack([np.repeat(x, 2), np.roll(np.repeat(y, 2), 1)], 1).astype(float)
        theirs = coco_mask.decode(coco_mask.frPyObjects([corners.ravel().tolist()], 40, 40))[..., 0] > 0
        assert np.array_equal(fill_polygon(corners, 40, 40), theirs)


@pytest.mark.parametrize("height,width,size", [(128, 128, 64), (480, 640, 64), (101, 64, 32), (48, 48, 64)])
def test_outline_follows_its_frame(height, width, size):
    "An outline that is painted into the picture is imported where the resized picture shows it."
    corners = np.array([.3, .2, .8, .35, .7, .8, .35, .7]).reshape(-1, 2) * (width, height)
    points, skipped = annotation_points(dict(segmentation=[corners.ravel().tolist()]), height, width, size)
    painted = fit_mask(fill_polygon(corners, height, width), size)
    mask = cover(points)
    assert skipped == 0 and (mask & painted).sum() / (mask | painted).sum() > .95
    assert abs(np.argwhere(mask).mean(0) - np.argwhere(painted).mean(0)).max() < .1


def test_union(tmp_path):
    "Two halves of a pixel fill it; crowds and run lengths count; other categories do not; a crossing outline is even-odd."
    left, right = [[8, 8, 17, 8, 17, 40, 8, 40]], [[17, 8, 40, 8, 40, 40, 17, 40]]  # they meet within column 8 of 64
    far = np.zeros((128, 128), bool)
    far[100:120, 100:120] = True
    export(tmp_path, ["a.png"], [(0, 2, left), (0, 2, right), (0, 1, STAR), (0, 2, encode_rle(far))])
    mask = read_coco(tmp_path, "robot").masks[0]
    wanted = np.zeros((64, 64), bool)
    wanted[4:20, 4:20] = wanted[50:60, 50:60] = True
    assert np.array_equal(mask, wanted)
    assert not read_coco(tmp_path, "block").masks[0, 30, 29]  # the middle of the pentagram


def test_copies_stay_together(tmp_path):
    names = [f"shot_{i}_png.rf.{code}.jpg" for i in range(4) for code in ("aa", "bb", "cc")]
    export(tmp_path / "train", names[:9], [(i, 2, STAR) for i in range(9)])
    export(tmp_path / "valid", names[9:], [(0, 2, STAR)])
    labels = read_coco(tmp_path, "robot")
    assert labels.trajectory.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 and labels.counts == dict(train=9, val=3)
    assert read_coco(tmp_path, "robot", unlabelled=False).counts == dict(train=9, val=1)


def test_same_name_in_two_parts_is_not_the_same_picture(tmp_path):
    for part in ("train", "test"): export(tmp_path / part, ["0.png", "1.png"], [(0, 2, STAR)])
    assert read_coco(tmp_path, "robot").trajectory.tolist() == [0, 1, 2, 3]


def test_turned_photo(tmp_path):
    "A photo that its EXIF note turns: the JSON's width and height say which way the outline was drawn."
    content = export(tmp_path, ["a.jpg"], [(0, 2, [[0, 0, 10, 0, 10, 10, 0, 10]])], size=(60, 80))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    picture = np.zeros((60, 80, 3), np.uint8)
    picture[:, :40] = 255  # left half white: on top once it is turned
    Image.fromarray(picture).save(tmp_path / "a.jpg", exif=exif)
    assert read_coco(tmp_path, "robot", size=60).frames[0][30, :20].mean() > 240  # as stored
    content["images"][0].update(width=60, height=80)
    (tmp_path / COCO_JSON).write_text(json.dumps(content))
    assert read_coco(tmp_path, "robot", size=60).frames[0][:20, 30].mean() > 240


def test_odd_json_is_told_in_one_line(tmp_path):
    "Any value of the JSON replaced by any nonsense: read as before, or refused in one line by the right kind of error."
    empty = dict(size=[128, 128], counts=[128 * 128])
    content = export(tmp_path, ["a.png", "b.png"], [(0, 2, STAR), (1, 2, empty), (1, 1, STAR)])
    rng, refused = np.random.default_rng(0), 0
    nonsense = [None, "", "x", -1, 0, 1.5, 10**30, True, [], {}, [[]], [[1, 2]], [["a", "b"] * 3], [[1e300] * 6], "\0",
                "ä/../b.png"]

    def positions(value, path=()):
        yield path
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items: yield from positions(inner, (*path, key))

    every = [path for path in positions(content) if path]
    for path in every:
        changed = copy.deepcopy(content)
        inner = changed
        for key in path[:-1]: inner = inner[key]
        inner[path[-1]] = nonsense[rng.integers(len(nonsense))]
        (tmp_path / COCO_JSON).write_text(json.dumps(changed))
        try: read_coco(tmp_path, "robot", size=16)
        except (ValueError, OSError) as error:
            refused += 1
            assert "\n" not in str(error) and str(tmp_path) in str(error), (path, error)
    assert refused > len(every) / 2


def test_files_that_are_something_else(tmp_path):
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "text.zip").write_text("no archive")
    (tmp_path / "two").mkdir()
    for name in ("a", "b"): (tmp_path / "two" / f"{name}.json").write_text("{}")
    for name in ("list.json", "deep.json", "binary.json", "text.zip", "two", "absent"):
        with pytest.raises((ValueError, FileNotFoundError)) as caught: coco_files(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_export_and_back(tmp_path):
    "Parts of any name, empty masks, holes and single pixels survive; trajectories are those of the file."
    rng = np.random.default_rng(0)
    masks = rng.random((12, 64, 64)) < np.linspace(0, 1, 12)[:, None, None]
    labels = LabelledFrames(rng.integers(0, 256, (12, 64, 64, 3), dtype=np.uint8), masks, np.repeat([7, 3, 1_000_000, 5], 3),
                            np.repeat(["train", "val", "test", "spare"], 3))
    for rle in (False, True):
        save_coco(labels, tmp_path / str(rle), rle=rle)
        assert import_labels(tmp_path / str(rle)).fingerprint == labels.fingerprint
    assert {path.name for path in (tmp_path / "True").iterdir()} == {"train", "valid", "test", "spare"}
