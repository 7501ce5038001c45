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
