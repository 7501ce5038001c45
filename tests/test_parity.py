"""Numbers of the original VideoGPT, reproduced.

Twice over: against the fixtures in `shared/fixtures`, which are the original's own outputs on random weights, and against
`reference_videogpt.py`, a slow second implementation, for many more configurations. The fixtures are not part of the project; without
them (beside the checkout, or under $VPENC_SHARED) their tests are skipped.
"""
import importlib.util
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import reference_videogpt as plain
from reference_videogpt import Case
from vpenc.models.checkpoints import load_videogpt, load_vqvae
from vpenc.models.attention import block_layout, sparse_mask
from vpenc.models.decoding import Decoder, draw
from vpenc.models.videogpt import VideoGPT, VideoGPTConfig
from vpenc.models.vqvae import VQVAE, VQVAEConfig

FIXTURES = Path(os.environ.get("VPENC_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "fixtures"
needs_fixtures = pytest.mark.skipif(not (FIXTURES / "vqvae_tiny.ckpt").exists(), reason="no fixtures of the original at hand")


pytestmark = pytest.mark.usefixtures("one_thread")


def stored(name):
    "A fixture file as a dict of tensors."
    arrays = np.load(FIXTURES / f"{name}.npz")
    return {k: torch.as_tensor(arrays[k].astype(np.int64) if arrays[k].dtype == np.int16 else arrays[k]) for k in arrays}


def recipe():
    "The fixtures' own script, which completes the reduced GPT checkpoints."
    spec = importlib.util.spec_from_file_location("assemble", FIXTURES / "assemble.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def original_weights(name): return recipe().load(FIXTURES / f"{name}.ckpt")["state_dict"]


def assembled(attn_type): return recipe().assemble(FIXTURES / f"gpt_tiny_{attn_type}.ckpt", FIXTURES / "vqvae_tiny.ckpt")


def gpt_weights(attn_type): return assembled(attn_type)["state_dict"]


def centered(uint8): return uint8.float() / 255 - 0.5


def close(a, b, tolerance): torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


# ---- the VQ-VAE
@pytest.fixture(scope="module")
def vqvae(): return load_vqvae(FIXTURES / "vqvae_tiny.ckpt"), stored("vqvae_tiny")


@needs_fixtures
def test_vqvae_config_from_file(vqvae):
    assert vqvae[0].config == VQVAEConfig(n_hiddens=32, n_res_layers=2, embedding_dim=16, n_codes=64, downsample=(4, 2, 2))
    assert not vqvae[0].training and not any(p.requires_grad for p in vqvae[0].parameters())


@needs_fixtures
def test_vqvae_encoder_and_codes(vqvae):
    model, wanted = vqvae
    clip = centered(wanted["video_uint8"])
    with torch.no_grad():
        first = torch.relu(model.encoder.convs[0](clip))[:1, :4]
        close(first, wanted["enc_conv0"], 2e-5)
        close(model.encoder(clip)[:1], wanted["encoder_out_s0"], 2e-5)
        z = model.encode_continuous(clip)
        close(z, wanted["z"], 2e-5)
        sure = wanted["code_margin"] >= 1e-3
        assert torch.equal(model.encode(clip)[sure], wanted["encodings"][sure]) and sure.float().mean() > 0.99


@needs_fixtures
def test_vqvae_reconstruction_and_losses(vqvae):
    model, wanted = vqvae
    clip = centered(wanted["video_uint8"])
    with torch.no_grad():
        out = model(clip)
        close(out.recon[:1], wanted["recon_s0"], 5e-6)
        close(model.decode(wanted["encodings"])[:1], wanted["recon_s0"], 5e-6)
        close(model.codebook(model.encode_continuous(clip))[1][:1], wanted["embeddings_s0"], 1e-6)
    for name in ("recon_loss", "commitment_loss", "perplexity"): close(getattr(out, name), wanted[name], 1e-5)


@needs_fixtures
def test_loaded_codebook_survives_train_mode():
    model = load_vqvae(FIXTURES / "vqvae_tiny.ckpt")
    before = model.codebook.z_avg.clone()
    model.train()(centered(stored("vqvae_tiny")["video_uint8"]))
    assert (model.codebook.z_avg - 0.99 * before).abs().max() < 0.01 * 8192  # one running-mean step, no new start
    assert (model.codebook.N != 1).any()


# ---- the GPT
@pytest.fixture(scope="module", params=["full", "sparse"])
def gpt(request, tmp_path_factory):
    "(model from a complete Lightning checkpoint, its outputs, conditioning data)"
    path = tmp_path_factory.mktemp("checkpoint") / f"{request.param}.ckpt"
    content = assembled(request.param)
    plain.write_checkpoint(path, content["state_dict"], content["hyper_parameters"]["args"], optimizer=False)
    assert b"pytorch_lightning.callbacks.model_checkpoint" in path.read_bytes()
    model = load_videogpt(path)
    path.unlink()
    return model, stored(f"gpt_tiny_{request.param}"), stored("gpt_tiny_cond")


@needs_fixtures
def test_gpt_config_from_file(gpt):
    model, wanted, _ = gpt
    kind = "sparse" if "block_layout" in wanted else "full"
    tokens = VQVAEConfig(n_hiddens=32, n_res_layers=2, embedding_dim=16, n_codes=64, downsample=(4, 2, 2))
    assert model.config == VideoGPTConfig(hidden_dim=48, heads=4, layers=2, attn_type=kind, vqvae=tokens)


@needs_fixtures
def test_conditioning(gpt):
    model, _, cond = gpt
    with torch.no_grad(): features = model.resnet(centered(cond["frames_uint8"]))  # (2,240,16,16)
    close(features.movedim(1, -1)[:, None], cond["resnet_out"], 3e-5)
    close(model.condition(features).view(2, 1, 16, 16, 240), cond["cond_after_pos"], 3e-5)


@needs_fixtures
def test_teacher_forced(gpt):
    model, wanted, cond = gpt
    frames, codes = centered(cond["frames_uint8"]), cond["codes"]
    with torch.no_grad(): states, logits = model.hidden(codes, frames), model.logits(codes, frames)
    states, flat = [s.flatten(1, 3)[0] for s in states], logits.flatten(1, 3)
    for state, name in zip(states, ("block0", "block1", "norm")): close(state[wanted["pos8"]], wanted[f"{name}_s0_pos8"], 3e-5)
    close(flat[0, wanted["logits0_pos"]], wanted["logits0"], 2e-6)
    close(flat[1, ::8], wanted["logits1_every8"], 2e-6)
    loss = torch.nn.functional.cross_entropy(flat.flatten(0, 1), codes.flatten())
    close(loss, wanted["loss"], 2e-6)


@needs_fixtures
def test_self_and_cross_attention(gpt):
    "Outputs of both attentions of block 0 and 1, before they are added to the stream."
    model, wanted, cond = gpt
    seen, positions = {}, wanted["pos16"]
    for i, block in enumerate(model.attn_stack.attn_nets):
        for name in ("attn", "enc_attn"):
            key = f"{'self' if name == 'attn' else 'enc'}attn{i}"
            getattr(block, name).register_forward_hook(lambda m, inputs, out, key=key: seen.update({key: out}))
    with torch.no_grad(): model.hidden(cond["codes"], centered(cond["frames_uint8"]))
    for block in model.attn_stack.attn_nets:
        for name in ("attn", "enc_attn"): getattr(block, name)._forward_hooks.clear()
    assert len(seen) == 4
    for key, value in seen.items(): close(value[0, positions], wanted[f"{key}_s0_pos16"], 3e-5)


@needs_fixtures
def test_autoregressive_codes(gpt):
    "256 codes drawn one by one with the given noise are those of the original; so are the logits on the way."
    model, wanted, cond = gpt
    noise, decoder, codes, drawn, logits = cond["gumbel_noise_scaled"], None, None, [], []
    decoder = Decoder(model, 2, centered(cond["frames_uint8"]))
    for step in range(256):
        logits.append(decoder.step(codes))
        drawn.append(codes := draw(logits[-1], noise=noise[step]))
    assert torch.equal(torch.stack(drawn, 1), wanted["noisy_codes"])
    close(torch.stack(logits[-32:], 1), wanted["noisy_logits_last32"], 2e-6)


@needs_fixtures
def test_greedy_logits(gpt):
    model, wanted, cond = gpt
    decoder, codes = Decoder(model, 2, centered(cond["frames_uint8"])), None
    for step in range(64):
        logits = decoder.step(codes)
        close(logits, wanted["greedy_logits"][:, step], 2e-6)
        codes = wanted["greedy_codes"][:, step]


@needs_fixtures
def test_stepping_equals_teacher_forcing(gpt):
    model, _, cond = gpt
    frames, codes = centered(cond["frames_uint8"]), cond["codes"].flatten(1)
    with torch.no_grad(): forced = model.logits(cond["codes"], frames).flatten(1, 3)
    decoder = Decoder(model, 2, frames)
    for i in range(700): close(decoder.step(codes[:, i - 1]), forced[:, i], 2e-6)


@needs_fixtures
def test_sparse_mask():
    wanted = stored("gpt_tiny_sparse")
    unpack = lambda bits, n: torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1)[..., :n]).bool()
    assert torch.equal(block_layout((4, 32, 32)).flatten(), unpack(wanted["block_layout"], 128 * 128))
    assert torch.equal(sparse_mask((4, 32, 32))[wanted["mask_rows"]], unpack(wanted["mask_row_bits"], 4096))


# ---- sizes of the public models (no fixtures needed)
def count(module): return sum(p.numel() for p in module.parameters())


def test_parameters_of_bair_vqvae():
    model = VQVAE(VQVAEConfig())
    assert len(model.state_dict()) == 283 and count(model) == 21_141_619
    parts = dict(encoder=11_286_960, decoder=9_731_283, pre_vq_conv=61_696, post_vq_conv=61_680)
    assert {name: count(getattr(model, name)) for name in parts} == parts


@pytest.mark.parametrize("layers, trainable, keys", [(8, 72_471_920, 565), (16, 109_709_168, 725)])
def test_parameters_of_bair_gpt(layers, trainable, keys):
    "The original's counts. Its 3x3x3 ResNet kernels are stored here as their middle 3x3: 22.6 of 33.9 million weights less."
    with torch.device("meta"): model = VideoGPT(VideoGPTConfig(layers=layers, attn_type="sparse"))
    assert len(model.state_dict()) == keys and len(model.resnet.state_dict()) == 111
    as_3d = sum(p.numel() * (3 if p.ndim == 4 and p.shape[-1] == 3 else 1) for p in model.resnet.parameters())
    assert as_3d == 33_890_144
    assert count(model) - count(model.vqvae) - count(model.resnet) + as_3d == trainable
    assert count(model.attn_stack.attn_nets[0]) == 4_654_656 and count(model.cond_pos_embd) == 2_640


# ---- the plain reference is the original, too
@needs_fixtures
def test_reference_vqvae():
    wanted, w = stored("vqvae_tiny"), original_weights("vqvae_tiny")
    clip = centered(wanted["video_uint8"])[:1]
    z, codes, margin = plain.vqvae_encode(w, clip, (4, 2, 2))
    close(plain.encoder(w, clip, (4, 2, 2)), wanted["encoder_out_s0"], 2e-5)
    close(z, wanted["z"][:1], 2e-5)
    close(margin, wanted["code_margin"][:1], 1e-3)
    sure = wanted["code_margin"][:1] >= 1e-3
    assert torch.equal(codes[sure], wanted["encodings"][:1][sure])
    close(plain.vqvae_decode(w, wanted["encodings"][:1], (4, 2, 2)), wanted["recon_s0"], 5e-6)


@needs_fixtures
def test_reference_gpt(gpt):
    model, wanted, cond = gpt
    w = gpt_weights(model.config.attn_type)
    case = Case(heads=4, layers=2, attn_type=model.config.attn_type, downsample=(4, 2, 2), resolution=64, codes=64)
    frames, codes = centered(cond["frames_uint8"])[:1], cond["codes"][:1]
    close(plain.resnet(w, frames), cond["resnet_out"][:1], 3e-5)
    states = plain.gpt_hidden(w, case, codes, frames)
    for state, name in zip(states, ("block0", "block1", "norm")): close(state[0, wanted["pos8"]], wanted[f"{name}_s0_pos8"], 3e-5)
    close((states[-1] @ w["fc_out.weight"].T)[0, wanted["logits0_pos"]], wanted["logits0"], 2e-6)


# ---- many configurations against the reference (no fixtures needed)
# The same tolerances; for reconstructions, 5e-6 of the fixtures' standard deviation of 0.032 is 1.5e-4 of whatever it is here.
def load(tmp_path, case, seed=0, **options):
    "(VideoGPT loaded from a file as the original writes it, the weights that were put in)"
    weights = plain.random_weights(plain.gpt_shapes(case), seed)
    path = plain.write_checkpoint(tmp_path / "gpt.ckpt", weights, plain.arguments(case), optimizer=False, **options)
    return load_videogpt(path), weights


def random_clip(case, seed=1, batch=2):
    "Patches of colour and a little noise, (B,3,T,H,W) in [-0.5, 0.5]."
    generator = torch.Generator().manual_seed(seed)
    shape = case.length, case.resolution, case.resolution
    patches = torch.nn.functional.interpolate(torch.rand(batch, 3, 4, 4, 4, generator=generator), shape)
    return 0.9 * patches + 0.1 * torch.rand(batch, 3, *shape, generator=generator) - 0.5


def load_tokens(tmp_path, case, seed=0):
    "(VQVAE from a file, the weights that were put in); the codes lie among the latents of some clip."
    weights = plain.random_weights(plain.vqvae_shapes(case), seed)
    weights["pre_vq_conv.conv.weight"] *= 2
    z = plain.vqvae_encode(weights, random_clip(case, seed=7, batch=4), case.downsample)[0].movedim(1, -1).flatten(0, -2)
    at = torch.linspace(0, len(z) - 1, case.codes).long()
    weights["codebook.embeddings"] = z[at] + 0.1 * weights["codebook.embeddings"]
    weights["codebook.z_avg"] = weights["codebook.embeddings"] * weights["codebook.N"][:, None]
    path = plain.write_checkpoint(tmp_path / "vqvae.ckpt", weights, plain.vqvae_arguments(case), optimizer=False)
    return load_vqvae(path), weights


def inputs(case, batch=2, seed=1):
    "(codes, keyword arguments of the model, of the reference)"
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(case.codes, (batch, *case.latent), generator=generator)
    given = {}
    if case.cond_frames:
        given["frames"] = torch.rand(batch, 3, case.cond_frames, case.resolution, case.resolution, generator=generator) - 0.5
    if case.classes: given["labels"] = torch.randint(case.classes, (batch,), generator=generator)
    return codes, given


VQVAES = {
    "stride 4x4x4": Case(),
    "stride 4x2x2, BAIR's shape": Case(downsample=(4, 2, 2), res_layers=2),
    "stride 2x4x4, 128 pixels": Case(downsample=(2, 4, 4), length=8, resolution=128, res_layers=1),
    "stride 8x8x8": Case(downsample=(8, 8, 8), hiddens=20, codes=7),
    "stride 1x4x4": Case(downsample=(1, 4, 4), length=4),
    "stride 2x1x4": Case(downsample=(2, 1, 4), length=8, resolution=16),
    "no residual blocks": Case(res_layers=0, dim=5),
}


@pytest.mark.parametrize("name", VQVAES)
def test_vqvae_equals_reference(tmp_path, name):
    case = VQVAES[name]
    model, w = load_tokens(tmp_path, case)
    assert model.config.latent_shape == case.latent and model.config.downsample == case.downsample
    clip = random_clip(case)
    z, codes, margin = plain.vqvae_encode(w, clip, case.downsample)
    recon, losses, _, _ = plain.vqvae_forward(w, clip, case.downsample)
    sure = margin >= 1e-3
    assert sure.float().mean() > 0.9 and len(codes.unique()) >= min(case.codes, 20) // 2
    with torch.no_grad():
        close(model.encoder(clip), plain.encoder(w, clip, case.downsample), 2e-5)
        close(model.encode_continuous(clip), z, 2e-5)
        assert torch.equal(model.encode(clip)[sure], codes[sure])
        close(model.decode(codes), plain.vqvae_decode(w, codes, case.downsample), 1.5e-4 * recon.std().item())
        out = model(clip)
    assert torch.equal(out.codes, model.encode(clip))
    if torch.equal(out.codes, codes): close(out.recon, recon, 1.5e-4 * recon.std().item())
    for loss, value in losses.items(): torch.testing.assert_close(getattr(out, loss), value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("first", [False, True], ids=["loaded", "data init"])
@pytest.mark.parametrize("codes", [9, 300], ids=["more latents than codes", "fewer"])
def test_codebook_learns_like_reference(codes, first):
    "Three steps in train mode: data init, running means, restarts; the random numbers are drawn in the original's order."
    generator = torch.Generator().manual_seed(0)
    w = plain.random_weights({name: shape for name, shape in plain.vqvae_shapes(Case(codes=codes)).items() if "codebook" in name})
    book = VQVAE(VQVAEConfig(n_hiddens=4, n_res_layers=1, embedding_dim=12, n_codes=codes)).codebook.train()
    book.load_state_dict({name.removeprefix("codebook."): value for name, value in w.items()})
    book.needs_init = first
    restarted = 0
    for step in range(3):
        z = torch.randn(2, 12, 2, 4, 5, generator=generator)
        torch.manual_seed(step)
        quantised, ids, commitment, perplexity, new = plain.codebook_forward(w, z, train=True, first=first and step == 0)
        torch.manual_seed(step)
        got_ids, got, got_commitment, got_perplexity = book(z)
        assert torch.equal(got_ids, ids) and not book.needs_init
        close(got, quantised, 1e-6)
        close(got_commitment, commitment, 1e-6)
        torch.testing.assert_close(got_perplexity, perplexity)
        for name, value in new.items(): close(book.get_buffer(name.removeprefix("codebook.")), value, 1e-5)
        restarted += int((new["codebook.N"] < 1).sum())
        w |= new
    assert restarted > 0


def test_vqvae_learns_like_reference(tmp_path):
    "Three steps in train mode: batch statistics, running statistics, codebook, losses, gradients."
    case = Case(codes=9, resolution=16)
    model, w = load_tokens(tmp_path, case)
    model.train().requires_grad_(True)
    first_kernel = "encoder.convs.0.conv.weight"
    for step in range(3):
        clip = random_clip(case, seed=step)
        w = {name: value.detach() for name, value in w.items()}
        w[first_kernel].requires_grad_(True)
        torch.manual_seed(step)
        recon, losses, ids, stats = plain.vqvae_forward(w, clip, case.downsample, train=True)
        (losses["recon_loss"] + losses["commitment_loss"]).backward()
        torch.manual_seed(step)
        model.zero_grad()
        out = model(clip)
        (out.recon_loss + out.commitment_loss).backward()
        assert torch.equal(out.codes, ids)
        close(out.recon, recon, 1.5e-4 * recon.std().item())
        for loss, value in losses.items(): torch.testing.assert_close(getattr(out, loss), value, atol=1e-5, rtol=1e-5)
        state = model.state_dict()
        for name, value in stats.items(): torch.testing.assert_close(state[name], value, atol=2e-5, rtol=1e-5, msg=f"{name}, step {step}")
        wanted = w[first_kernel].grad
        torch.testing.assert_close(model.get_parameter(first_kernel).grad, wanted, atol=1e-4 * wanted.abs().max().item(), rtol=1e-3)
        w |= stats


GPTS = {
    "full, frame": Case(),
    "full, unconditional": Case(cond_frames=0),
    "full, class": Case(cond_frames=0, classes=5),
    "full, class and frame": Case(classes=3),
    "full, two frames": Case(cond_frames=2),
    "full, class and three frames": Case(classes=2, cond_frames=3, layers=1),
    "sparse, frame": Case(attn_type="sparse"),
    "sparse, frame, BAIR's latent grid": Case(attn_type="sparse", downsample=(4, 2, 2), resolution=64, layers=1),
    "sparse, unconditional": Case(attn_type="sparse", cond_frames=0, layers=3),
    "sparse, class, 2x16x16": Case(attn_type="sparse", cond_frames=0, classes=4, downsample=(8, 4, 4), resolution=64),
    "sparse, class and frame, 8x16x16": Case(attn_type="sparse", classes=3, downsample=(2, 4, 4), resolution=64, layers=1),
    "sparse, two frames": Case(attn_type="sparse", cond_frames=2),
    "sparse, rows longer than a block": Case(attn_type="sparse", downsample=(8, 8, 1), resolution=64, cond_frames=0),
    "sparse, planes smaller than a block": Case(attn_type="sparse", downsample=(1, 8, 8), resolution=32, cond_frames=0),
    "sparse, one block": Case(attn_type="sparse", downsample=(8, 8, 8), cond_frames=0),
    "full, one head, odd sizes": Case(heads=1, hidden=33, dim=5, codes=11, layers=1, widths=(6, 4, 8, 9)),
    "full, 128 pixels": Case(downsample=(4, 8, 8), resolution=128, layers=1),
    "full, the original's ResNet-34": Case(widths=(64, 128, 256, 240), blocks=(3, 4, 6, 3), resolution=32, layers=1),
    "sparse, the original's ResNet-34 on two frames": Case(widths=(64, 128, 256, 240), blocks=(3, 4, 6, 3), cond_frames=2, layers=1,
                                                          attn_type="sparse", hidden=48),
}


@pytest.mark.parametrize("name", GPTS)
def test_gpt_equals_reference(tmp_path, name):
    "ResNet, hidden states, logits, loss, and codes drawn one by one with given noise."
    case = GPTS[name]
    model, w = load(tmp_path, case)
    config = model.config
    assert (config.n_cond_frames, config.n_classes, config.attn_type) == (case.cond_frames, case.classes, case.attn_type)
    assert model.latent_shape == case.latent
    codes, given = inputs(case)
    states = plain.gpt_hidden(w, case, codes, **given)
    logits = states[-1] @ w["fc_out.weight"].T
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten())
    with torch.no_grad():
        if case.cond_frames:
            features = model.resnet(given["frames"])
            wanted = plain.resnet(w, given["frames"]).movedim(-1, 1)
            close(features if features.ndim == 5 else features[:, :, None], wanted, 3e-5)
        for state, wanted in zip(model.hidden(codes, **given), states, strict=True): close(state.flatten(1, 3), wanted, 3e-5)
        close(model.logits(codes, **given).flatten(1, 3), logits, 2e-6)
        close(model(codes, **given), loss, 2e-6)
    # drawn codes: each is the largest of the reference's logits, given those before it, plus the noise
    size = min(math.prod(case.latent), 300)
    noise = -torch.empty(size, 2, case.codes).exponential_(generator=torch.Generator().manual_seed(2)).log() * 0.1
    decoder, drawn, last = Decoder(model, 2, **given), [], None
    for step in range(size): drawn.append(last := draw(decoder.step(last), noise=noise[step]))
    drawn = torch.stack(drawn, 1)  # (2, size)
    whole = torch.cat([drawn, codes.flatten(1)[:, size:]], 1).view_as(codes)
    scores = plain.gpt_logits(w, case, whole, **given)[:, :size] + noise.transpose(0, 1)
    best = scores.topk(2).values
    sure = best[..., 0] - best[..., 1] > 1e-5
    assert torch.equal(drawn[sure], scores.argmax(-1)[sure]) and sure.float().mean() > 0.99
    assert len(drawn.unique()) > min(case.codes, 20) // 2


@pytest.mark.parametrize("attn_type", ["full", "sparse"])
def test_sample_equals_reference_loop(tmp_path, attn_type):
    "The whole `sample`, against a loop that runs the reference on everything drawn so far, position after position."
    case = Case(attn_type=attn_type, classes=3, downsample=(8, 8, 8), length=16, resolution=32, layers=1)
    model, w = load(tmp_path, case)
    _, given = inputs(case)
    size = math.prod(case.latent)
    noise = -torch.empty(size, 2, case.codes).exponential_(generator=torch.Generator().manual_seed(2)).log() * 0.1
    codes = torch.zeros(2, size, dtype=torch.int64)
    for i in range(size): codes[:, i] = (plain.gpt_logits(w, case, codes.view(2, *case.latent), **given)[:, i] + noise[i]).argmax(-1)
    assert torch.equal(model.sample(**given, noise=noise).flatten(1), codes) and len(codes.unique()) > 10


def test_gpt_trains_like_reference(tmp_path):
    "Without dropout, train mode computes the same loss and gradients; the VQ-VAE inside stays in eval mode."
    case = Case(classes=3, cond_frames=2, attn_type="sparse")
    model, w = load(tmp_path, case)
    codes, given = inputs(case)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout): module.p = 0.0
    buffers = {name: value.clone() for name, value in model.vqvae.state_dict().items()}
    model.requires_grad_(True)
    model.vqvae.requires_grad_(False)
    model.train()
    assert model.training and not any(module.training for module in model.vqvae.modules())
    model(codes, **given).backward()
    w = {name: value.requires_grad_(value.is_floating_point() and not name.startswith("vqvae.")) for name, value in w.items()}
    torch.nn.functional.cross_entropy(plain.gpt_logits(w, case, codes, **given).flatten(0, 1), codes.flatten()).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("vqvae."): continue
        wanted = w[name].grad
        torch.testing.assert_close(parameter.grad, wanted, atol=1e-4 * wanted.abs().max().item() + 1e-9, rtol=1e-3, msg=name)
    for name, value in model.vqvae.state_dict().items(): assert torch.equal(value, buffers[name]), name


def test_original_layer_norm(tmp_path):
    "eps after the reciprocal root: rows of small spread differ by percents from the usual formula; a constant row has no value."
    model, w = load(tmp_path, Case(cond_frames=0, layers=1))
    for spread, tolerance in ((0.02, 2e-6), (0.1, 2e-6), (1, 2e-6), (30, 2e-5)):
        x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0)) * spread
        close(model.norm(x), plain.layer_norm(w, "norm", x, None), tolerance)
    assert model.norm(torch.full((1, 1, 24), 0.25)).isnan().all()


def test_first_input_and_last_code_do_not_matter(tmp_path):
    model, _ = load(tmp_path, Case())
    codes, given = inputs(Case())
    other = codes.clone()
    other[:, -1, -1, -1] = (other[:, -1, -1, -1] + 1) % 40
    assert torch.equal(model.logits(codes, **given), model.logits(other, **given))
    decoders = [Decoder(model, 2, **given) for _ in range(2)]
    assert torch.equal(decoders[0].step(codes[:, 0, 0, 0]), decoders[1].step(other[:, 0, 0, 1]))


@pytest.mark.parametrize("shape", [(4, 32, 32), (2, 16, 16), (8, 16, 16), (4, 16, 16), (2, 64, 64), (2, 8, 64), (16, 4, 4), (2, 4, 4), (5, 8, 8)])
def test_sparse_layout_equals_reference(shape):
    assert torch.equal(block_layout(shape), plain.sparse_layout(shape))
