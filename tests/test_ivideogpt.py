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
        maps, _ = model.tokenizer.cond_encoder(future.flatten(0, 1), features)
        dynamics = model.tokenizer.dynamics(future, features)
    sums = torch.stack([torch.stack([f.double().sum(), f.double().abs().sum()]) for f in features])
    torch.testing.assert_close(sums, wanted["feature_sums"], rtol=1e-5, atol=1e-3)
    close(features[0][0, :4], wanted["feature0_head"])
    close(features[2][:1], wanted["feature2"])
    close(features[4][:1], wanted["feature_mid"])
    close(latents, wanted["latents"])
    close(maps[:2], wanted["dynamics_map"])
    close(dynamics.flatten(0, 1).flatten(1, 2), wanted["dynamics_latents"])


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
        codes, dynamics = model.grids(ids)
        shown = model.tokenizer.decode(codes, dynamics - model.config.tokenizer.num_vq_embeddings)
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


# ---- from a folder to a score, a film and the explorer: no fixtures needed
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A small model of 64x64 frames and two context frames with random weights, in a folder of the original's layout."
    from vpenc.models.ivideogpt import IVideoGPT, IVideoGPTConfig
    torch.manual_seed(0)
    kinds = dict(context_length=2, block_out_channels=(32, 32, 32, 64), layers_per_block=1, latent_channels=8, num_vq_embeddings=40, num_dyn_embeddings=24,
                 patch_size=4, max_att_resolution=8, norm_num_groups=16)
    llama = dict(vocab_size=66, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    place = IVideoGPT(IVideoGPTConfig(kinds, llama)).save_pretrained(tmp_path_factory.mktemp("model"))
    (place / "config.json").unlink()  # the original has none
    return place


def test_public_name(folder):
    import vpenc
    frames = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    shapes = {tap: tuple(vpenc.load_encoder(folder, tap=tap)(frames).values.shape) for tap in ("levels", "pre", "codes", "embed", "hidden[1]", "next", "entropy")}
    assert shapes == {"levels": (3, 1, 64, 8, 8), "pre": (3, 1, 8, 8, 8), "codes": (3, 1, 1, 8, 8), "embed": (3, 1, 8, 8, 8),
                      "hidden[1]": (3, 2, 32, 8, 8), "next": (3, 1, 32, 2, 2), "entropy": (3, 1, 1, 2, 2)}
    assert vpenc.load_encoder(f"random/{folder}").tap == "random/ivideogpt:levels"


def test_without_a_network_a_hub_name_gets_one_line(monkeypatch):
    import huggingface_hub
    from vpenc.encoders.taps import load_encoder
    def unreachable(*_, **__): raise OSError("Name or service not known\n(second line)")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    for call in (load_ivideogpt, load_encoder):
        with pytest.raises((FileNotFoundError, ValueError), match="thuml/ivideogpt-bair-64-act-free.*Name or service not known") as raised:
            call("thuml/ivideogpt-bair-64-act-free")
        assert "\n" not in str(raised.value)


def test_a_row_of_the_table(folder, tmp_path):
    from vpenc.data.sim import SimConfig, generate_labels
    from vpenc.experiments.experiment import Experiment, fit_experiment
    data = generate_labels(tmp_path / "small-labels.h5", SimConfig(), dict(train=12, val=4, spare=4, test=8), processes=1)
    given = dict(head="linear1x1", weights=str(folder), data=str(data), epochs=2)
    for tap in ("ivideogpt:levels", "ivideogpt:next[2]", "random/ivideogpt:pre", "noise:ivideogpt:pre"):
        row = Experiment(encoder=tap, **given)
        first, again = (fit_experiment(row, cache=tmp_path / "features").result for _ in range(2))
        assert first["tap"] == tap and first["iou"] == again["iou"] and 0 <= first["interval"][0] <= first["interval"][1] <= 1
    paper = Experiment(encoder="ivideogpt:levels", protocol="paper", **given)
    assert fit_experiment(paper, cache=tmp_path / "features").encoder.value_range == "unit"
    assert {path.name for path in row.inputs()} == {"small-labels.h5", "config.json", "diffusion_pytorch_model.safetensors", "model.safetensors"}
    with pytest.raises(ValueError, match="ivideogpt:levels"): Experiment(encoder="ivideogpt:level")
    with pytest.raises(ValueError, match="IVideoGPT expected.*got VideoGPT"): fit_experiment(Experiment(encoder="ivideogpt:levels", data=str(data)), cache=False)


def test_the_explorer(folder):
    from vpenc.data.sim import simulate
    from vpenc.views.explorer import Explorer, ExploreState, draw_futures, finish
    clips = [simulate(i, split="test") for i in range(2)]
    explorer = Explorer({"sim": clips}, str(folder), device="cpu")
    state = ExploreState(frame=2)
    for _ in explorer.preparing(state): pass
    assert explorer.fix(state).tap == "levels" and explorer.limits(explorer.fix(state))["taps"] == ["levels", "pre", "embed", "hidden", "next"]
    assert explorer.can_sample(state) and {"pca", "codes", "usage", "entropy"} <= explorer.views(state).keys()
    at_next = explorer.fix(ExploreState(tap="next", layer=2, frame=2))
    made = {"sim": clips}
    exec(explorer.code(at_next), made)
    for name, panel in explorer.panels(at_next).items(): assert np.array_equal(panel.image, made["panels"][name]), name
    encoder, frame = explorer.encoder(state), clips[0].video[2]
    futures = draw_futures(encoder, frame, count=2, seed=3)
    ids = encoder.model.sample(torch.tensor(np.stack([frame] * 2)).permute(0, 3, 1, 2) / 255, steps=14, top_k=None, generator=torch.Generator().manual_seed(3))
    shown = encoder.model.detokenize(ids)[:, 1:].mul(255).round().byte().movedim(2, -1).numpy()  # the second of the two given frames comes first
    assert futures.shape == (2, 15, 64, 64, 3) and np.abs(futures.astype(int) - shown).max() <= 1
    assert finish(iter(())) is None


def test_a_film_of_futures(folder):
    from vpenc.encoders import futures
    windows = futures.load_windows(length=4, clips=2)
    asked = futures.futures_of(load_ivideogpt(folder), length=4)
    codes = futures.sample_codes(asked, windows.video[:, :2], n=2)
    entropy, cost = futures.next_code_bits(asked, windows.video[:, :2], codes)
    assert futures.decode(asked, codes).shape == (2, 2, 4, 64, 64, 3) and futures.reconstruct(asked, windows.video).shape == windows.video.shape
    assert entropy.shape == cost.shape == (2, 2, 2, 2, 2) and 0 <= entropy.min() and entropy.max() <= np.log2(66) + 1e-4
