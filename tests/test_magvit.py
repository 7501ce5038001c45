"""MAGVIT equals an independent, slow implementation: tokenizer, discriminator, transformer, COMMIT; and weights in the released layout load."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import reference_magvit as plain
from reference_magvit import Case
from vpenc.models.magvit import Magvit, MagvitConfig, MagvitTransformer, MagvitTransformerConfig, commit_loss, decode_steps, jax_names, load_jax
from vpenc.models.magvit_vq import (MagvitDiscriminator, MagvitDiscriminatorConfig, MagvitVQ, MagvitVQConfig, discriminator_loss, generator_loss,
                                    inflate, r1_penalty)

pytestmark = pytest.mark.usefixtures("one_thread")


def close(got, wanted, tolerance):
    "Everywhere within `tolerance` of the wanted numbers' standard deviation."
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(got.detach().numpy(), wanted, atol=tolerance * max(wanted.std(), 1e-3), rtol=0)


def ours(x): return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1))).float()  # (B,T,H,W,C) -> (B,C,T,H,W)
def theirs(x): return x.detach().movedim(1, -1)


def clip(case, batch=2, seed=1):
    rng = np.random.default_rng(seed)
    return rng.random((batch, case.length, case.size, case.size, 3)).astype(np.float32).astype(np.float64)


def tokenizer(case, seed=0):
    weights = plain.random_weights(plain.vq_shapes(case), seed)
    model = MagvitVQ(MagvitVQConfig(case.filters, case.multipliers, case.n_res, case.time, case.kernel or 1, case.dim, case.codes, "paper",
                                    sequence_length=case.length, resolution=case.size))
    return load_jax(model, plain.nested(weights)).eval(), weights


def transformer(case, seed=0):
    weights = plain.random_weights(plain.bert_shapes(case), seed)
    config = MagvitTransformerConfig(case.layers, case.hidden, case.heads, case.mlp, 0., 0., case.codes, case.grid, case.classes, case.multi_task)
    return load_jax(MagvitTransformer(config), plain.nested(weights)).eval(), weights


CASES = {
    "three levels": Case(),
    "two blocks, time halved once": Case(n_res=2, time=(True, False)),
    "the 128-pixel layout": Case(multipliers=(1, 2, 2, 4), time=(True, True, False), size=16),
    "32 groups": Case(filters=64, multipliers=(1, 2), time=(True,), length=4, size=8),
    "wide enough for the short cut": Case(filters=100, multipliers=(1,), time=(), length=2, size=6),
    "images": Case(kernel=0, time=(False, False), length=1),
}


@pytest.mark.parametrize("name", CASES)
def test_tokenizer_equals_reference(name):
    case = CASES[name]
    model, w = tokenizer(case)
    assert sum(p.numel() for p in model.parameters()) == sum(x.size for x in w.values())
    x = clip(case)
    z, levels = plain.encoder(w, case, x)
    d = plain.distances(w, z)
    codes, margin = d.argmin(-1), np.diff(np.sort(d, -1)[..., :2])[..., 0]
    sure = margin > 1e-3
    assert sure.mean() > .9 and len(np.unique(codes)) > 2
    for frozen in (False, True):  # with and without the ways that only inference takes
        model.requires_grad_(not frozen)
        *stages, last = model.stages(ours(x))
        for got, wanted in zip(stages, levels, strict=True): close(theirs(got), wanted, 2e-5)
        close(theirs(last), z, 3e-5)
        close(theirs(model.encode_continuous(ours(x[:1]))), z[:1], 3e-5)  # a batch of one
        assert (model.encode(ours(x)).numpy() == codes)[sure].all()
        wanted = plain.decoder(w, case, w["quantizer/codebook"][codes])
        close(theirs(model.decode(torch.from_numpy(codes))), wanted, 5e-5)
    losses = model.quantizer(ours(z))[2]
    for key, value in plain.quantiser_losses(w, z).items(): np.testing.assert_allclose(losses[key].item(), value, rtol=1e-4)


@pytest.mark.parametrize("sides", [(5, 7, 9), (1, 6, 11), (3, 5, 2)])
def test_odd_sides(sides):
    "Pooling keeps what is left over at the end of an odd side."
    case = Case()
    model, w = tokenizer(case)
    x = np.random.default_rng(3).random((2, *sides, 3))
    z, _ = plain.encoder(w, case, x)
    assert z.shape[1:4] == tuple(-(-n // 4) for n in sides)
    close(theirs(model.encoder(ours(x))), z, 3e-5)


def test_tokenizer_learns_like_reference():
    "The straight-through gradient of the whole loss, along a random direction of encoder, decoder and codebook, is that of finite differences."
    case = Case(multipliers=(1, 2), time=(True,), length=2, size=4)
    model, w = tokenizer(case)
    model.train()
    x = clip(case)
    out = model(ours(x))
    (out.recon_loss + sum(out.losses.values())).backward()
    names, z0 = jax_names(model), plain.encoder(w, case, x)[0]
    codes = plain.distances(w, z0).argmin(-1)
    q0 = w["quantizer/codebook"][codes]
    def loss(part, moved):  # each gradient stops where the straight-through estimator stops it
        z, q = plain.encoder(moved, case, x)[0], moved["quantizer/codebook"][codes]
        recon = ((plain.decoder(moved, case, q0 + z - z0) - x) ** 2).mean()
        entropy = plain.quantiser_losses(moved, z)["entropy"]
        return recon + entropy + 0.25 * ((q0 - z) ** 2).mean() + ((q - z0) ** 2).mean() * (part == "quantizer")
    for part in ("encoder", "decoder", "quantizer"):
        rng = np.random.default_rng(5)
        direction = {path: rng.normal(size=w[path].shape) * np.abs(w[path]).mean() for path in names.values() if path.startswith(part)}
        step = 1e-5
        up, down = ({p: v + sign * step * direction.get(p, 0) for p, v in w.items()} for sign in (1, -1))
        wanted = (loss(part, up) - loss(part, down)) / (2 * step)
        along = load_jax(MagvitVQ(model.config), plain.nested({p: direction.get(p, np.zeros_like(v)) for p, v in w.items()}))
        got = sum((p.grad * d).sum().item() for p, d in zip(model.parameters(), along.parameters()) if p.grad is not None)
        assert abs(got - wanted) < 2e-3 * abs(wanted) + 1e-6, part


@pytest.mark.parametrize("case", [Case(), Case(length=5, size=12), Case(filters=6, judge=(2, 3), size=6, length=3), Case(kernel=0, length=1)],
                         ids=["even", "odd", "two blocks", "images"])
def test_discriminator_equals_reference(case):
    w = plain.random_weights(plain.judge_shapes(case))
    config = MagvitDiscriminatorConfig(case.filters, case.judge, case.kernel or 1, case.length, case.size)
    model = load_jax(MagvitDiscriminator(config), plain.nested(w))
    assert sum(p.numel() for p in model.parameters()) == sum(x.size for x in w.values())
    x = clip(case)
    real, fake = plain.judge(w, case, x), plain.judge(w, case, x[:, :, ::-1])
    got = model(ours(x)), model(ours(x[:, :, ::-1]))
    close(got[0], real, 1e-4)
    np.testing.assert_allclose(discriminator_loss(*got).item(), np.log1p(np.exp(-real)).mean() + np.log1p(np.exp(fake)).mean(), rtol=1e-4)
    np.testing.assert_allclose(generator_loss(got[1]).item(), np.log1p(np.exp(-fake)).mean(), rtol=1e-4)
    if case.size == 6: np.testing.assert_allclose(r1_penalty(model, ours(x))[1].item(), plain.r1(w, case, x), rtol=1e-3)


BERTS = {
    "one task": Case(),
    "classes": Case(classes=3, layers=1),
    "many tasks": Case(multi_task=True, classes=2),
    "one head, a line of codes": Case(heads=1, grid=(1, 1, 7), layers=3),
}


@pytest.mark.parametrize("name", BERTS)
def test_transformer_equals_reference(name):
    case = BERTS[name]
    model, w = transformer(case)
    assert sum(p.numel() for p in model.parameters()) == sum(x.size for x in w.values())
    rng = np.random.default_rng(1)
    tokens = rng.integers(case.codes, size=(2, *case.grid))
    tokens[:, -1:, :, 1::2] = plain.MASK
    labels = rng.integers(case.classes, size=2) if case.classes else None
    inputs, given = torch.from_numpy(np.where(tokens < 0, model.config.mask, tokens)), None if labels is None else torch.from_numpy(labels)
    logits, states = plain.bert(w, case, plain.sequence(case, tokens, labels))
    front = 1 + case.multi_task
    for got, wanted in zip(model.hidden(inputs, given), states, strict=True): close(got.flatten(1, 3), wanted[:, front:], 2e-5)
    close(model(inputs, given).flatten(1, 3), logits[:, front:, :case.codes], 2e-5)
    close(model(inputs), plain.grid_logits(w, case, tokens), 2e-5)  # no class


@pytest.mark.parametrize("rate", [1., .6, .3, 1e-6])
def test_commit_step_equals_reference(rate):
    case = Case()
    model, w = transformer(case)
    rng = np.random.default_rng(2)
    codes, still, scores = rng.integers(case.codes, size=(3, *case.grid)), rng.integers(case.codes, size=(3, *case.grid)), rng.random((3, *case.grid))
    wanted = plain.commit_loss(w, case, codes, still, rate, scores)
    got = commit_loss(model, torch.from_numpy(codes), torch.from_numpy(still), rate, torch.from_numpy(scores))
    np.testing.assert_allclose(got["loss"].item(), wanted, rtol=1e-5)
    tokens, lost = plain.masked(case, codes, still, scores, max(int(32 * rate), 1))
    right = plain.grid_logits(w, case, tokens).argmax(-1) == codes
    np.testing.assert_allclose(got["accuracy"].item(), right.mean(), atol=1e-6)
    hidden = tokens == plain.MASK
    np.testing.assert_allclose(got["masked"].item(), right[hidden].mean() if hidden.any() else 0, atol=1e-6)


@pytest.mark.parametrize("method, choice, steps", [("cosine", 4.5, 12), ("exp", 400., 12), ("cosine", 0., 3), ("exp", 4.5, 1)])
def test_decoding_equals_reference(method, choice, steps):
    "The same Gumbel noise, the same codes."
    case = Case(grid=(3, 4, 4))
    model, w = transformer(case)
    still = torch.randint(case.codes, (2, *case.grid), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(7)
    def noises():
        while True:
            for shape in ((2, *case.grid, case.codes), (2, *case.grid)):
                u = np.clip(torch.rand(shape, generator=generator).double().numpy(), 1e-20, 1 - 1e-7)
                yield -np.log(-np.log(u))
    wanted = plain.decode(w, case, still.numpy(), noises(), steps, method, choice)
    *_, (codes, unknown) = decode_steps(model, still, steps, method, choice, generator=torch.Generator().manual_seed(7))
    assert (codes.numpy() == wanted).all() and len(np.unique(wanted)) > 5 and unknown.sum() == 2


def test_inflation_equals_reference():
    "On a still clip a centrally inflated tokenizer gives what the image net gives; averaged kernels sum to the image net's."
    flat = Case(kernel=0, time=(False, False), length=1)
    images, w = tokenizer(flat)
    video = inflate(images.state_dict(), MagvitVQ(MagvitVQConfig(flat.filters, flat.multipliers, flat.n_res, (True, True), 3, flat.dim, flat.codes,
                                                                 "paper", sequence_length=8, resolution=flat.size))).eval()
    x = clip(flat)
    z, _ = plain.encoder(w, flat, x)
    close(theirs(video.encode_continuous(ours(x.repeat(8, 1)))), z.repeat(2, 1), 5e-5)
    spread = inflate(images.state_dict(), MagvitVQ(video.config), "average").state_dict()
    for name, kernel in images.state_dict().items():
        if kernel.ndim == 5: close(spread[name].sum(2), kernel[:, :, 0], 1e-6)
    with pytest.raises(ValueError, match="not the same models"): inflate({"x": torch.zeros(1)}, video)


def test_released_layout_is_checked():
    case = Case()
    w = plain.random_weights(plain.vq_shapes(case))
    config = MagvitVQConfig(case.filters, case.multipliers, case.n_res, case.time, 3, case.dim, case.codes, "paper", sequence_length=8, resolution=16)
    missing = {k: v for k, v in w.items() if k != "encoder/Conv_1/bias"}
    for wrong, words in ((missing, "missing encoder/Conv_1/bias"), (w | {"encoder/Conv_9/kernel": np.zeros(1)}, "unknown encoder/Conv_9/kernel"),
                         (w | {"quantizer/codebook": np.zeros((3, 6))}, r"quantizer/codebook is \(3, 6\), which does not fit \(10, 6\)")):
        with pytest.raises(ValueError, match=words) as error: load_jax(MagvitVQ(config), plain.nested(wrong))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="quantizer 'paper'"): load_jax(MagvitVQ.preset("tiny"), plain.nested(w))


def test_expected_latents_and_one_pass():
    "`expected` is the mean codebook vector under the softmax of one pass over the still clip's codes and masks."
    case = Case(codes=10, grid=(2, 4, 4))
    vq, w = tokenizer(case)
    net, v = transformer(case)
    model = Magvit(MagvitConfig(vq.config, net.config)).eval()
    model.vq, model.transformer = vq, net
    frame = clip(case)[:, 0]
    still = plain.distances(w, plain.encoder(w, case, frame[:, None].repeat(case.length, 1))[0]).argmin(-1)
    codes = model.still_codes(ours(frame[:, None])[:, :, 0])
    assert (codes.numpy() == still).mean() > .95
    still = codes.numpy()
    tokens, _ = plain.masked(case, np.zeros_like(still), still, np.zeros(still.shape), still[0].size)
    logits = plain.grid_logits(v, case, tokens)
    assert (model.inputs(codes).numpy() == np.where(tokens < 0, net.config.mask, tokens)).all()
    got = model.transformer(model.inputs(codes))
    close(got, logits, 2e-5)
    close(theirs(model.expected(got)), np.exp(plain.log_softmax(logits)) @ w["quantizer/codebook"], 2e-5)


def test_the_shipped_model_reconstructs_and_samples():
    "magvit-sim: reconstructions far above one colour, sampled futures that keep the first frame, the taps of its name."
    import vpenc
    from vpenc.data.video import as_clip
    from vpenc.training.magvit import psnr
    model, seen = vpenc.load_magvit("magvit-sim"), vpenc.simulate(3).video[:8]
    clip = as_clip(seen, "unit")
    again = model.vq.decode(model.vq.encode(clip))
    assert psnr(again, clip) > psnr(clip.mean((2, 3, 4), keepdim=True).expand_as(clip), clip) + 6
    codes = model.sample(clip[:, :, 0], generator=torch.Generator().manual_seed(0))
    first = model.vq.decode(codes)[:, :, 0]
    assert codes.shape == (1, 2, 16, 16) and psnr(first, clip[:, :, 0]) > psnr(clip[:, :, 0].mean((2, 3), keepdim=True).expand_as(first), clip[:, :, 0])
    assert vpenc.load_encoder("magvit:pre", weights="magvit-sim", device="cpu")(seen[:2]).values.shape[0] == 2


def test_one_clip_is_learned_by_heart(tmp_path):
    "The analysis notebook `overfit`, short: eight frames of 32x32 pixels."
    papermill = pytest.importorskip("papermill")
    notebook = Path(__file__).resolve().parent.parent / "nbs" / "analysis" / "overfit.ipynb"
    papermill.execute_notebook(notebook, tmp_path / "out.ipynb", progress_bar=False, parameters=dict(
        folder=str(tmp_path / "overfit"), size=32, frames=8, steps=200, their_steps=25, commit_steps=60))
    found = json.loads((tmp_path / "overfit" / "overfit.json").read_text())
    picture = found["baselines"]["single picture"]
    assert found["psnr"]["ours"] > picture + 6 and found["passed"] and found["codes_used"] > 64
    assert found["recovered"] > .95
    assert max(value for name, value in found["psnr"].items() if name != "ours") < picture
    assert {path.name for path in (tmp_path / "overfit").glob("*.png")} == {"psnr.png", "recovered.png", "frames.png"}
