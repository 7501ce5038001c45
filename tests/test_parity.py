"""Numbers of the original VideoGPT, reproduced: the fixtures in `shared/fixtures` are its own outputs on random weights.

The fixtures are not part of the project; without them (beside the checkout, or under $VPENC_SHARED) these tests are skipped.
"""
import hashlib
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from vpenc.checkpoints import load_videogpt, load_vqvae
from vpenc.videogpt import Decoder, VideoGPT, VideoGPTConfig, block_layout, draw, sparse_mask
from vpenc.vqvae import VQVAE, VQVAEConfig

FIXTURES = Path(os.environ.get("VPENC_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "fixtures"
needs_fixtures = pytest.mark.skipif(not (FIXTURES / "vqvae_tiny.ckpt").exists(), reason="no fixtures of the original at hand")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stored(name):
    "A fixture file as a dict of tensors."
    arrays = np.load(FIXTURES / f"{name}.npz")
    return {k: torch.as_tensor(arrays[k].astype(np.int64) if arrays[k].dtype == np.int16 else arrays[k]) for k in arrays}


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
    spec = importlib.util.spec_from_file_location("assemble", FIXTURES / "assemble.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    path = tmp_path_factory.mktemp("checkpoint") / f"{request.param}.ckpt"
    content = recipe.assemble(FIXTURES / f"gpt_tiny_{request.param}.ckpt", FIXTURES / "vqvae_tiny.ckpt")
    torch.save({**content, "callbacks": {}}, path)  # its Lightning class cannot be written without Lightning
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


# ---- hostile files (no fixtures needed)
def test_hostile_checkpoint_creates_nothing(tmp_path):
    class Trap:
        def __reduce__(self): return os.system, (f"touch {tmp_path / 'trap'}",)

    torch.save({"state_dict": {"fc_in.weight": torch.ones(3, 3)}, "hyper_parameters": {"args": Trap()}, "callbacks": [Trap()]},
               tmp_path / "bad.ckpt")
    before = hashlib.sha256((tmp_path / "bad.ckpt").read_bytes()).hexdigest()
    for load in (load_videogpt, load_vqvae):
        with pytest.raises(ValueError, match="bad.ckpt"): load(tmp_path / "bad.ckpt")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.ckpt"]
    assert hashlib.sha256((tmp_path / "bad.ckpt").read_bytes()).hexdigest() == before


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.99])
def test_cut_off_checkpoint_is_one_clear_line(tmp_path, keep):
    path = tmp_path / "cut.ckpt"
    torch.save({"state_dict": {"a": torch.ones(10_000)}}, path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(ValueError, match="cut.ckpt: not a readable checkpoint") as error: load_videogpt(path)
    assert "\n" not in str(error.value)
