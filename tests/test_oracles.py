"""Each number against another program that computes it, or against a value worked out by hand."""

import numpy as np
import pytest
import torch

from vpenc.probing.metrics import bootstrap_interval, iou_per_image, paired_bootstrap, scores


@pytest.fixture
def predictions():
    "Probabilities and masks of 6 images; the first mask is empty, the last is full."
    rng = np.random.default_rng(0)
    masks = rng.random((6, 12, 10)) < .3
    masks[0], masks[-1] = False, True
    return np.clip(.5 * masks + .6 * rng.random(masks.shape), 0, 1).astype(np.float32), masks


def test_overlap_is_that_of_torchmetrics(predictions):
    from torchmetrics.functional.classification import binary_f1_score, binary_jaccard_index
    probability, masks = predictions
    found, true = torch.from_numpy(probability >= .5), torch.from_numpy(masks).long()
    got = scores(probability, masks)
    assert got["iou_pooled"] == pytest.approx(float(binary_jaccard_index(found, true)), abs=1e-6)
    each = [float(binary_jaccard_index(f, t)) for f, t in zip(found, true)]
    np.testing.assert_allclose(iou_per_image(found.numpy(), masks), each, atol=1e-6)
    assert got["iou"] == pytest.approx(np.mean(each), abs=1e-6)
    assert got["dice"] == pytest.approx(np.mean([float(binary_f1_score(f, t)) for f, t in zip(found, true)]), abs=1e-6)


def test_interval_is_that_of_scipy():
    from scipy.stats import bootstrap
    values = np.random.default_rng(1).normal(.6, .1, 25)
    theirs = bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=2).confidence_interval
    np.testing.assert_allclose(bootstrap_interval(values, n=20000), [theirs.low, theirs.high], atol=2e-3)
    groups = np.repeat(np.arange(25), 4)  # four equal frames of each trajectory say no more than one
    np.testing.assert_allclose(bootstrap_interval(np.repeat(values, 4), groups, n=20000), [theirs.low, theirs.high], atol=2e-3)


def test_paired_interval_is_that_of_scipy():
    from scipy.stats import bootstrap
    a, b = np.random.default_rng(3).normal([[.6], [.5]], .1, (2, 30))
    theirs = bootstrap((a, b), lambda a, b, axis: np.mean(a - b, axis), paired=True, n_resamples=20000, method="percentile", rng=4)
    np.testing.assert_allclose(paired_bootstrap(a, b, n=20000), theirs.confidence_interval, atol=2e-3)


def test_one_policy_for_empty_masks():
    empty, full = np.zeros((1, 4, 4)), np.ones((1, 4, 4))
    right, wrong = scores(empty, empty.astype(bool)), scores(full, empty.astype(bool))
    assert [right[name] for name in ("iou", "iou_pooled", "dice", "boundary_f")] == [1, 1, 1, 1]
    assert [wrong[name] for name in ("iou", "iou_pooled", "dice")] == [0, 0, 0]
    missed = scores(empty, full.astype(bool))
    assert [missed[name] for name in ("iou", "iou_pooled", "dice")] == [0, 0, 0]


# ---- pictures
@pytest.mark.parametrize("height, width, size", [(24, 24, 64), (40, 30, 64), (128, 128, 48), (90, 120, 32)])
def test_resize_is_that_of_pillow(height, width, size):
    "Bilinear between pixel centres without a low-pass filter, the shorter side to `size`, then the centre: Pillow's affine transform."
    from PIL import Image
    from vpenc.data.video import resize_crop
    picture = np.random.default_rng(5).random((height, width), dtype=np.float32)
    ours = resize_crop(torch.from_numpy(picture).expand(3, -1, -1), size)[0].numpy()
    scale = size / min(height, width)
    tall, wide = (max(size, int(np.ceil(n * scale - 1e-6))) for n in (height, width))
    matrix = (width / wide, 0, 0, 0, height / tall, 0)
    padded = np.pad(picture, 1, mode="edge")  # Pillow leaves out what needs pixels beyond the border
    matrix = (matrix[0], 0, 1, 0, matrix[4], 1)
    theirs = np.asarray(Image.fromarray(padded).transform((wide, tall), Image.AFFINE, matrix, Image.BILINEAR))
    top, left = (tall - size) // 2, (wide - size) // 2
    np.testing.assert_allclose(ours, theirs[top:top + size, left:left + size], atol=1e-4)


# ---- the simulator
@pytest.fixture(scope="module")
def seen():
    "A picture of a simulated world, the poses of its geoms there and one frame later, the flow between, and the next picture."
    from vpenc.data.render import View
    from vpenc.data.scene import SimConfig, World
    config = SimConfig(supersample=1, shadows=0)
    world = World(config, 3)
    view = View(world, config, 3)
    for _ in range(4): world.step()
    pose = lambda: (world.data.geom_xpos.copy(), world.data.geom_xmat.reshape(-1, 3, 3).copy())
    picture, before, start = view.render(), pose(), view.locate(view.render())
    world.step()
    return dict(view=view, picture=picture, before=before, after=pose(), flow=view.locate(picture) - start, following=view.render(), model=world.model)


def ray(camera, x, y):
    "Direction through a picture point, from the pinhole camera's definition."
    middle = (camera.size - 1) / 2
    right, down, forward = camera.axes
    direction = (x - middle) * right + (y - middle) * down + camera.focal * forward
    return direction / np.linalg.norm(direction)


def test_depth_of_the_floor_is_that_of_a_plane(seen):
    "The floor's upper side is z = 0: a ray meets it after camera height / downward part of the direction."
    camera, size, found = seen["view"].camera, seen["view"].size, 0
    for y, x in np.ndindex(size, size):
        if seen["picture"].geom.reshape(size, size)[y, x]: continue
        direction = ray(camera, x, y)
        assert seen["picture"].depth[y, x] == pytest.approx(-camera.position[2] / direction[2], abs=1e-4)
        found += 1
    assert found > 500


def test_depth_of_balls_is_that_of_spheres(seen):
    "|camera + d ray - centre| = radius, at every pixel of a sphere."
    camera, size, (centres, _) = seen["view"].camera, seen["view"].size, seen["before"]
    spheres = [g for g in np.unique(seen["picture"].geom) if seen["model"].geom_type[g] == 2]  # mjGEOM_SPHERE
    found = 0
    for g in spheres:
        for y, x in np.argwhere(seen["picture"].geom.reshape(size, size) == g):
            point = camera.position + seen["picture"].depth[y, x] * ray(camera, x, y)
            assert np.linalg.norm(point - centres[g]) == pytest.approx(seen["model"].geom_size[g, 0], abs=1e-4)
            found += 1
    assert found > 5


def test_flow_is_the_finite_difference_of_the_geometry(seen):
    "A seen point is carried along by its geom from one pose to the next, and projected: where it was minus where it is."
    camera, size = seen["view"].camera, seen["view"].size
    (p0, r0), (p1, r1) = seen["before"], seen["after"]
    flow, moved = seen["flow"].reshape(size, size, 2), 0
    for y, x in np.ndindex(size, size):
        g = seen["picture"].geom.reshape(size, size)[y, x]
        if g < 0: continue
        point = camera.position + seen["picture"].depth[y, x] * ray(camera, x, y)
        later = r1[g] @ (r0[g].T @ (point - p0[g])) + p1[g]
        across, down, ahead = camera.axes @ (later - camera.position)
        wanted = camera.focal * np.array([across, down]) / ahead + (size - 1) / 2 - (x, y)
        np.testing.assert_allclose(flow[y, x], wanted, atol=5e-3)
        moved += np.abs(wanted).max() > .05
    assert moved > 50


# ---- rasters
def small_masks():
    from hypothesis import strategies as st
    from hypothesis.extra.numpy import arrays
    return arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.booleans())


def test_run_lengths_are_those_of_pycocotools():
    coco = pytest.importorskip("pycocotools.mask")
    from hypothesis import given, settings
    from vpenc.data.coco import decode_rle, encode_rle

    @settings(max_examples=100, deadline=None, database=None, derandomize=True)
    @given(small_masks())
    def check(mask):
        theirs = coco.encode(np.asfortranarray(mask, np.uint8))
        assert np.array_equal(decode_rle(theirs, *mask.shape), mask)
        assert coco.frPyObjects(encode_rle(mask), *mask.shape)["counts"] == theirs["counts"]
    check()


def test_run_lengths_that_are_cut_off():
    "Why pycocotools does not read them: it makes a mask of what is left."
    coco = pytest.importorskip("pycocotools.mask")
    from vpenc.data.coco import decode_rle
    mask = np.zeros((5, 7), np.uint8, order="F")
    mask[1:3, 2:5] = 1
    cut = coco.encode(mask)
    cut["counts"] = cut["counts"][:-1]
    assert coco.decode(cut).shape == (5, 7)
    with pytest.raises(ValueError, match="counts add up to"): decode_rle(cut, 5, 7)


# ---- properties
def test_permuting_images_permutes_scores():
    from hypothesis import given, settings, strategies as st
    from vpenc.probing.metrics import boundary_f

    @settings(max_examples=40, deadline=None, database=None, derandomize=True)
    @given(st.permutations(range(5)), st.integers(0, 1000))
    def check(order, seed):
        rng = np.random.default_rng(seed)
        probability, masks = rng.random((5, 6, 7), dtype=np.float32), rng.random((5, 6, 7)) < rng.random()
        for score in (iou_per_image, boundary_f):
            np.testing.assert_array_equal(score(probability[order] >= .5, masks[order]), score(probability >= .5, masks)[order])
        whole, moved = scores(probability, masks), scores(probability[order], masks[order])
        for name in whole: assert moved[name] == pytest.approx(whole[name], abs=1e-5, nan_ok=True)
    check()


def test_splits_do_not_depend_on_the_order_of_files():
    from hypothesis import given, settings, strategies as st
    from vpenc.data.masks import split_by_trajectory

    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @given(st.lists(st.integers(0, 30), min_size=12, max_size=40).filter(lambda ids: len(set(ids)) > 6), st.randoms(use_true_random=False))
    def check(ids, random):
        order = list(range(len(ids)))
        random.shuffle(order)
        ids, parts = np.array(ids), split_by_trajectory(ids, dict(train=.6, val=.2, test=.2), seed=3)
        np.testing.assert_array_equal(split_by_trajectory(ids[order], dict(train=.6, val=.2, test=.2), seed=3), parts[order])
    check()


@pytest.mark.parametrize("head", ["linear1x1", "linear7x7", "linear"])
def test_mirrored_data_give_mirrored_masks(head):
    "These heads treat left and right alike and start from zero: the fit to mirrored frames and masks is the mirrored fit."
    from vpenc.encoders.features import extract
    from vpenc.encoders.taps import load_encoder
    from vpenc.probing.probe import fit_probe
    rng = np.random.default_rng(0)
    masks = np.zeros((12, 16, 16), bool)
    for mask in masks:
        y, x = rng.integers(0, 10, 2)
        mask[y:y + 5, x:x + 3] = True
    frames = (rng.integers(60, 90, (12, 16, 16, 3)) + 100 * masks[..., None]).astype(np.uint8)

    def predicted(frames, masks):
        pixels = extract(load_encoder("pixels", device="cpu"), frames, cache=False)
        return fit_probe(pixels.take(slice(8)), masks[:8], head, val=(pixels.take(slice(8, 12)), masks[8:]), epochs=2, weight_decay=.1).predict(pixels)
    np.testing.assert_allclose(predicted(frames[:, :, ::-1], masks[:, :, ::-1]), predicted(frames, masks)[:, :, ::-1], atol=1e-3)
