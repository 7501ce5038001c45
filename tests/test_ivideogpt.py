"""iVideoGPT's numbers: those of the original on small random checkpoints, and what an encoder of it does from end to end.

The original's checkpoints and outputs are in `shared/fixtures`, which is not part of the project; without it (beside the checkout, or under
$VPENC_SHARED) their tests are skipped.
"""
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from vpenc.models.ivideogpt import load_ivideogpt

FIXTURES = Path(os.environ.get("VPENC_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "fixtures"
NAMES = ["ivideogpt_tiny", "ivideogpt_tiny_context2"]
SURE = 1e-3  # a code is compared where its vector is nearer than the second by more than this

pytestmark = pytest.mark.usefixtures("one_thread")


def close(a, b, tolerance=2e-5): torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


# ---- the original's outputs
@pytest.fixture(scope="module", params=NAMES)
def original(request):
    "(model, its stored outputs, clips (B,T,3,64,64) in [0, 1], ids)"
    if not (FIXTURES / request.param).is_dir(): pytest.skip("no fixtures of the original at hand")
    wanted = {name: torch.from_numpy(value) if value.ndim else value.item() for name, value in np.load(FIXTURES / f"{request.param}.npz").items()}
    return load_ivideogpt(FIXTURES / request.param), wanted, wanted["frames"].permute(0, 1, 4, 2, 3).float() / 255, wanted["ids"].long()


def test_configuration_comes_from_the_files(original):
    model, wanted, _, _ = original
    kinds, llama = model.config.tokenizer, model.config.transformer
    assert (kinds.resolution, kinds.context_length, kinds.block_out_channels, kinds.layers_per_block) == (64, wanted["context_length"], (32, 32, 64), 1)
    assert (kinds.latent_channels, kinds.vq_embed_dim, kinds.num_vq_embeddings, kinds.num_dyn_embeddings, kinds.side, kinds.patches) == (8, 8, 64, 32, 16, 4)
    assert (llama.hidden_size, llama.num_hidden_layers, llama.num_attention_heads, llama.head_dim, llama.vocab_size) == (48, 2, 4, 12, 98)
    assert not model.training and not any(p.requires_grad for p in model.parameters()) and model.config.action_dim == 0


def test_encoder(original):
    "Features on the way, the latents before rounding, and the two maps of the second autoencoder."
    model, wanted, clip, _ = original
    context, future = clip.tensor_split([model.context_length], 1)
    with torch.no_grad():
        latents, features = model.tokenizer.latents(context.flatten(0, 1))
        dynamics, _ = model.tokenizer.cond_encoder(future.flatten(0, 1), features)
        changes = model.tokenizer.changes(future, features)
    sums = torch.stack([torch.stack([f.double().sum(), f.double().abs().sum()]) for f in features])
    torch.testing.assert_close(sums, wanted["feature_sums"], rtol=1e-5, atol=1e-3)
    close(features[0][0, :4], wanted["feature0_head"])
    close(features[2][:1], wanted["feature2"])
    close(features[4][:1], wanted["feature_mid"])
    close(latents, wanted["latents"])
    close(dynamics[:2], wanted["dynamics_map"])
    close(changes.flatten(0, 1).flatten(1, 2), wanted["dynamics_latents"])


def test_tokens(original):
    model, wanted, clip, ids = original
    found, sure = model.tokenize(clip), torch.ones(ids.shape, dtype=torch.bool)
    kinds = model.config.tokenizer
    for place, margin, per_frame in ((model.grids(torch.arange(ids.shape[1])[None])[0], wanted["latent_margin"], kinds.side**2),
                                     (model.grids(torch.arange(ids.shape[1])[None])[1], wanted["dynamics_margin"], kinds.patches**2)):
        sure[:, place.flatten()] = (margin > SURE).view(len(ids), -1, per_frame).flatten(1)
    assert sure.float().mean() > .95 and torch.equal(found[sure], ids[sure]) and found.shape == ids.shape


def test_reconstruction(original):
    model, wanted, _, ids = original
    with torch.no_grad():
        codes, changes = model.grids(ids)
        shown = model.tokenizer.decode(codes, changes - model.config.tokenizer.num_vq_embeddings)
    close(shown[0, :2], wanted["reconstruction_first"], 1e-5)
    torch.testing.assert_close(shown, wanted["reconstruction"].float(), atol=1e-4, rtol=1e-3)  # kept in half precision
    close(model.detokenize(ids)[0, :2], wanted["reconstruction_first"].clamp(0, 1), 1e-5)


def test_states_logits_and_loss(original):
    model, wanted, _, ids = original
    states = model.hidden(ids)
    close(states[0][:, -64:], wanted["hidden1_last64"])
    close(states[-1][:, -64:], wanted["hidden_last_last64"])
    close(model.logits(ids)[:, -64:], wanted["logits_last64"])
    assert abs(float(model.loss(ids)) - wanted["loss"]) < 1e-5
    counted = wanted["labels"] != -100  # what the original's loss counts
    assert torch.equal(torch.arange(ids.shape[1]) > model.context_tokens, counted[0]) and torch.equal(ids[counted], wanted["labels"][counted].long())


def test_greedy_future(original):
    model, wanted, clip, _ = original
    assert wanted["greedy_margin"].min() > SURE
    drawn = model.sample(clip[:, :model.context_length], steps=2, top_k=1)
    assert torch.equal(drawn[:, :wanted["greedy"].shape[1]], wanted["greedy"].long())
