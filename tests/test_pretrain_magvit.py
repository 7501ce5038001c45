"""`pretrain --model magvit`: killed and started again it ends where an undisturbed run does; a failed run stops and keeps its last good checkpoint."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import vpenc.training.magvit as magvit
from vpenc.cli import main
from vpenc.data.video import write_clips
from vpenc.models.checkpoints import load_magvit
from vpenc.training.loop import read_log
from vpenc.training.pretrain import pretrain

ROOT = Path(__file__).resolve().parent.parent
SIZE = dict(filters=8, embedding_dim=8, n_codes=32, sequence_length=8, resolution=16, layers=1, hidden_dim=24, heads=2, mlp_dim=32)
SHORT = SIZE | dict(family="magvit", steps=(8, 0, 6), batch_size=4, warmup=2, every=2, restarts=(3,), validation_clips=4, futures=1, tensorboard=False,
                    learning_rate=1e-3)
PROGRAM = """
import os, sys, torch
import vpenc.training.loop as training
from vpenc.training.pretrain import pretrain
torch.set_num_threads(1)
taken, whole = 0, training.take_step
def fatal(*arguments):
    global taken
    taken += 1
    if taken == 8 + 4: os.kill(os.getpid(), 9)
    return whole(*arguments)
training.take_step = fatal
pretrain(sys.argv[1], sys.argv[2], device="cpu", **eval(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    "Bright squares that move over coloured noise."
    rng = np.random.default_rng(0)

    def one():
        video = np.repeat(rng.integers(0, 120, (1, 16, 16, 3), dtype=np.uint8), 8, 0)
        y, x = rng.integers(0, 4, 2)
        for t in range(8): video[t, y + t:y + t + 5, x + t:x + t + 5] = rng.integers(150, 250, 3)
        return dict(video=video)
    splits = dict(train=[one() for _ in range(10)], test=[one() for _ in range(4)])
    return write_clips(tmp_path_factory.mktemp("clips") / "clips.h5", splits)


def logged(out): return [{k: v for k, v in row.items() if k != "minutes"} for row in read_log(out / "log.jsonl")]


def test_killed_and_resumed(tmp_path, clips, monkeypatch):
    "The same weights and log as a run that nobody touched; the model loads by its name."
    child = subprocess.run([sys.executable, "-c", PROGRAM, str(clips), str(tmp_path / "killed"), repr(SHORT)], capture_output=True, text=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1", "VPENC_PROGRESS": "0", "PYTHONPATH": str(ROOT)})
    assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]
    assert [(row["stage"], row["step"]) for row in logged(tmp_path / "killed")][-1] == ("commit", 2)  # within the fourth step of the transformer
    killed, alone = (pretrain(clips, tmp_path / name, device="cpu", **SHORT) for name in ("killed", "alone"))
    assert (killed / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    assert logged(tmp_path / "killed") == logged(tmp_path / "alone")
    assert {"README.md", "config.json", "curves.png", "futures.png", "reconstructions.png", "log.jsonl"} <= {path.name for path in killed.iterdir()}
    card = (killed / "README.md").read_text()
    assert "vpenc pretrain --model magvit --preset tiny" in card and "| vq | 10 | 8 | 4 |" in card and "| commit | 10 | 6 | 4 |" in card
    monkeypatch.setenv("VPENC_MODELS", str(tmp_path / "killed"))
    model = load_magvit("model")
    assert model.latent_shape == (2, 4, 4) and model.sample(torch.rand(1, 3, 16, 16)).shape == (1, 2, 4, 4)
    with pytest.raises(ValueError, match="holds a run with seed=0, not 1"): pretrain(clips, tmp_path / "killed", device="cpu", **SHORT, seed=1)


def test_linear_start(tmp_path, clips):
    "A tokenizer that starts as mean colours is ahead at the first validation; trained on from a tokenizer, the setting changes nothing."
    first = {}
    for linear in (False, True):
        pretrain(clips, tmp_path / str(linear), device="cpu", stage="vq", **SHORT, linear=linear)
        first[linear] = logged(tmp_path / str(linear))[0]["psnr"]
    assert first[True] > first[False] + .3, first
    on = [pretrain(clips, tmp_path / f"on-{linear}", device="cpu", stage="vq", init=tmp_path / "False/vq", **SHORT, linear=linear) for linear in (False, True)]
    assert (on[0] / "model.safetensors").read_bytes() == (on[1] / "model.safetensors").read_bytes()


def test_in_parts(tmp_path, clips):
    "The tokenizer alone, then the transformer on it, give what one call gives; and with a discriminator the third stage runs."
    quick = SHORT | dict(steps=(4, 0, 2), futures=0)
    whole = pretrain(clips, tmp_path / "whole", device="cpu", **quick)
    tokens = pretrain(clips, tmp_path / "parts", device="cpu", stage="vq", **quick)
    assert not (tmp_path / "parts" / "model").exists()
    parts = pretrain(clips, tmp_path / "parts", device="cpu", stage="commit", **quick)
    elsewhere = pretrain(clips, tmp_path / "elsewhere", device="cpu", stage="commit", init=tokens, **quick)
    assert len({(folder / "model.safetensors").read_bytes() for folder in (whole, parts, elsewhere)}) == 1
    pretrain(clips, tmp_path / "gan", device="cpu", stage="vq", **(quick | dict(steps=(2, 2, 2))))
    assert [row["stage"] for row in logged(tmp_path / "gan")] == ["vq", "gan"]
    with pytest.raises(ValueError, match="stage commit needs a tokenizer"): pretrain(clips, tmp_path / "none", device="cpu", stage="commit", **quick)
    with pytest.raises(ValueError, match="unknown 'gpt'"): pretrain(clips, tmp_path / "none", device="cpu", stage="gpt", **quick)


def spoil(vq, how, values):
    if how == "nan": return values | dict(loss=values["loss"] * float("nan"))
    with torch.no_grad():
        if how == "codes": vq.quantizer.codebook.copy_(vq.quantizer.codebook[:1].expand_as(vq.quantizer.codebook))
        if how == "constant":
            for value in vq.decoder.parameters(): value.data.zero_()  # unseen by autograd, which is at work
    return values


@pytest.mark.parametrize("how, words", [("nan", "vq: the loss became nan by step 6"), ("codes", "vq: the codebook has collapsed at step 6: 1 of 32 codes"),
                                        ("constant", "vq: one solid colour would be as good at step 6")])
def test_a_failed_run_keeps_its_last_good_checkpoint(tmp_path, clips, monkeypatch, how, words):
    whole, calls = magvit.vq_losses, []

    def failing(vq, *arguments):
        out, values = whole(vq, *arguments)
        calls.append(1)
        return out, spoil(vq, how, values) if len(calls) > 5 else values
    monkeypatch.setattr(magvit, "vq_losses", failing)
    seen = magvit.validate_vq
    if how != "constant":  # five steps do not beat one colour
        monkeypatch.setattr(magvit, "validate_vq", lambda *arguments: seen(*arguments) | dict(flat_psnr=0.))
    with pytest.raises(ValueError, match=words) as error:
        pretrain(clips, tmp_path / "run", device="cpu", **(SHORT | dict(grace=6, restarts=())))
    assert "\n" not in str(error.value)
    kept = torch.load(tmp_path / "run" / "vq.pt", weights_only=True)
    assert kept["step"] == 4 and all(value.isfinite().all() for value in kept["modules"].values() if value.is_floating_point())


def test_the_command(tmp_path, clips, capsys):
    settings = [f"--set={key}={value}" for key, value in (SIZE | dict(steps=2, steps_gan=0, warmup=1, batch_size=2, restarts="()", validation_clips=2, futures=0)).items()]
    assert main(["pretrain", str(clips), "--model", "magvit", "--out", str(tmp_path / "run"), "--device", "cpu", "--no-tensorboard", *settings]) == 0
    assert load_magvit(capsys.readouterr().out.splitlines()[-1]).config.vq.n_codes == 32
    assert main(["pretrain", str(clips), "--model", "magvitt", "--out", str(tmp_path / "run")]) == 2
    assert "magvit" in capsys.readouterr().err
