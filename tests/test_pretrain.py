"""Training on several processes equals training on one; killed at any moment, it resumes to the same result."""
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vpenc.training.config import configure
from vpenc.training.pretrain import pretrain
from vpenc.training.loop import Log, Stopped, read_log
from vpenc.data.video import write_clips

ROOT = Path(__file__).resolve().parent.parent
SIZE = dict(hidden_dim=24, heads=2, layers=1, dropout=0.0, attn_dropout=0.0, resnet_widths=(8, 16, 16, 24), resnet_blocks=(1, 1, 1, 1),
            n_hiddens=8, n_res_layers=1, embedding_dim=8, n_codes=32, downsample=(4, 4, 4), sequence_length=4, resolution=32)
SHORT = dict(SIZE, batch_size=4, warmup=3, validation_clips=4, futures=0, tensorboard=False, codebook_restarts=(3, 6), learning_rate=1e-3)
PROGRAM = """
import os, sys, torch
import vpenc.training.loop as training
from vpenc.training.pretrain import pretrain
torch.set_num_threads(1)
clips, out, die_at, changes = sys.argv[1], sys.argv[2], int(sys.argv[3]), eval(sys.argv[4])
taken, whole = 0, training.take_step
def fatal(*arguments):
    global taken
    taken += 1
    if taken == die_at: os.kill(os.getpid(), 9)
    return whole(*arguments)
training.take_step = fatal
pretrain(clips, out, device="cpu", **changes)
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    "Bright squares that move over coloured noise."
    rng = np.random.default_rng(0)

    def one():
        video = np.repeat(rng.integers(0, 120, (1, 32, 32, 3), dtype=np.uint8), 4, 0)
        y, x = rng.integers(0, 14, 2)
        for t in range(4): video[t, y + 2 * t:y + 2 * t + 10, x + 2 * t:x + 2 * t + 10] = rng.integers(150, 250, 3)
        return dict(video=video)
    splits = dict(train=[one() for _ in range(18)], test=[one() for _ in range(4)])
    return write_clips(tmp_path_factory.mktemp("clips") / "clips.h5", splits)


def run(clips, out, processes=1, die_at=0, **changes):
    "Train in processes of their own; the exit code."
    script = out.parent / "program.py"
    script.write_text(PROGRAM)
    start = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    child = subprocess.run([*start, str(script), str(clips), str(out), str(die_at), repr(SHORT | changes)], capture_output=True, text=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1", "VPENC_PROGRESS": "0", "PYTHONPATH": str(ROOT)})
    if not die_at: assert child.returncode == 0, child.stderr[-3000:]
    return child


def log_of(out):
    return [{k: v for k, v in row.items() if k != "minutes"} for row in read_log(out / "log.jsonl")]


def weights_of(out, stage="gpt"):
    return torch.load(out / f"{stage}.pt", weights_only=True)["modules"]


@pytest.mark.parametrize("lives", [0.0, 0.05])
def test_two_processes_train_the_vqvae_of_one(tmp_path, clips, lives):
    """Every loss agrees to 1e-5 over 20 steps: batch norm, codebook, revival and gradients see the whole batch.

    Where a vector lies as near to one code as to another, rounding decides, and the runs part by more than that; which seed meets
    such a tie depends on the processor. So one of three seeds must agree; what is wrong for any reason but rounding is wrong in all.
    """
    pytest.importorskip("accelerate")

    def apart(seed):
        folder = tmp_path / f"seed{seed}"
        folder.mkdir()
        for processes in (1, 2): run(clips, folder / str(processes), processes, steps=20, every=1, stage="vqvae", codebook_lives=lives, seed=seed)
        one, two = (log_of(folder / str(processes)) for processes in (1, 2))
        assert len(one) == len(two) == 20
        for a, b in zip(one, two):
            assert a.keys() == b.keys() and a["learning_rate"] == b["learning_rate"]
            assert abs(a["loss"] - b["loss"]) < 1e-2, (a, b)
            if abs(a["loss"] - b["loss"]) > 1e-5 or abs(a["perplexity"] - b["perplexity"]) > 1e-4: return f"step {a['step']}: {a['loss']} and {b['loss']}"
        assert sum(row["revived"] for row in one[1:]) == sum(row["revived"] for row in two[1:])
        return None

    found = {}
    for seed in range(3):
        found[seed] = apart(seed)
        if found[seed] is None: break
    else: pytest.fail(f"apart in all seeds: {found}")
    tmp_path = tmp_path / f"seed{seed}"
    first, second = (weights_of(tmp_path / str(processes), "vqvae") for processes in (1, 2))
    for name in first:  # biases before a batch norm have no gradient but rounding, which Adam makes large
        if name.endswith("weight") or "codebook" in name: assert torch.allclose(first[name], second[name], atol=1e-3), name


def test_two_processes_train_the_gpt_of_one(tmp_path, clips):
    "The same, over 20 steps of the parallel prediction and 20 of the GPT, from one VQ-VAE and with averaged weights."
    pytest.importorskip("accelerate")
    tokens = pretrain(clips, tmp_path / "tokens", stage="vqvae", **(SHORT | dict(steps=6)))
    for processes in (1, 2):
        run(clips, tmp_path / str(processes), processes, steps=20, every=1, stage="gpt", init=str(tokens), average=0.9)
    one, two = (log_of(tmp_path / str(processes)) for processes in (1, 2))
    assert [row["stage"] for row in one] == [row["stage"] for row in two] == ["parallel"] * 20 + ["gpt"] * 20
    for a, b in zip(one, two):
        assert abs(a["loss"] - b["loss"]) < 1e-5 and a["learning_rate"] == b["learning_rate"], (a, b)
        assert np.allclose(a["parallel"], b["parallel"], atol=2e-4)
    first, second = (weights_of(tmp_path / str(processes)) for processes in (1, 2))
    for name in first: assert torch.allclose(first[name].float(), second[name].float(), atol=2e-4), name


def test_two_processes_killed_in_the_middle_end_like_two_left_alone(tmp_path, clips):
    "With micro-batches and averaged weights; killed at a step without a checkpoint, in the VQ-VAE and again in the GPT."
    pytest.importorskip("accelerate")
    changes = dict(steps=(8, 6, 8), every=3, accumulate=(2, 1, 2), average=0.9)
    run(clips, tmp_path / "alone", 2, **changes)
    assert run(clips, tmp_path / "killed", 2, die_at=5, **changes).returncode != 0
    assert [(r["stage"], r["step"]) for r in log_of(tmp_path / "killed")] == [("vqvae", 3)]
    assert run(clips, tmp_path / "killed", 2, die_at=5 + 6 + 5, **changes).returncode != 0  # from step 3 of the VQ-VAE to step 4 of the GPT
    assert log_of(tmp_path / "killed")[-1]["stage"] == "gpt" and not (tmp_path / "killed" / "finished.json").exists()
    run(clips, tmp_path / "killed", 2, **changes)
    assert log_of(tmp_path / "alone") == log_of(tmp_path / "killed")
    alone, killed = weights_of(tmp_path / "alone"), weights_of(tmp_path / "killed")
    assert all(torch.equal(alone[name], killed[name]) for name in alone)
    models = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("alone", "killed")]
    assert models[0] == models[1]


def test_micro_batches_of_the_gpt_are_one_batch(tmp_path, clips):
    base = dict(SHORT, steps=(3, 3, 6), every=1)
    for name, accumulate in (("whole", 1), ("cut", (1, 2, 4))): pretrain(clips, tmp_path / name, accumulate=accumulate, **base)
    for a, b in zip(log_of(tmp_path / "whole"), log_of(tmp_path / "cut")): assert abs(a["loss"] - b["loss"]) < 1e-5, (a, b)


def test_stopped_by_the_clock_and_by_a_signal(tmp_path, clips):
    "Both leave a checkpoint in the middle; going on gives the log and the weights of an undisturbed run."
    base = dict(SHORT, steps=(6, 4, 6), every=4)
    pretrain(clips, tmp_path / "alone", **base)
    with pytest.raises(Stopped): pretrain(clips, tmp_path / "clock", stop_after=1e-9, **base)
    assert torch.load(tmp_path / "clock" / "vqvae.pt", weights_only=True)["step"] == 0
    pretrain(clips, tmp_path / "clock", **base)

    import vpenc.training.loop as training
    whole, taken = training.take_step, []

    def asked(*arguments):
        taken.append(1)
        if len(taken) == 3: os.kill(os.getpid(), signal.SIGTERM)
        return whole(*arguments)
    training.take_step = asked
    try:
        with pytest.raises(Stopped): pretrain(clips, tmp_path / "signal", **base)
    finally: training.take_step = whole
    assert torch.load(tmp_path / "signal" / "vqvae.pt", weights_only=True)["step"] == 3
    pretrain(clips, tmp_path / "signal", **base)
    for name in ("clock", "signal"):
        assert log_of(tmp_path / "alone") == log_of(tmp_path / name)
        assert (tmp_path / "alone/model/model.safetensors").read_bytes() == (tmp_path / name / "model/model.safetensors").read_bytes()


def test_pictures_and_tensorboard_appear(tmp_path, clips):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    pretrain(clips, tmp_path / "run", **(SHORT | dict(steps=4, every=2, futures=1, tensorboard=True)))
    for name in ("curves", "reconstructions", "futures"): assert (tmp_path / "run" / f"{name}.png").stat().st_size > 2000
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "gpt")).Reload()
    rows = [row for row in log_of(tmp_path / "run") if row["stage"] == "gpt"]
    assert [e.step for e in events.Scalars("loss")] == [2, 4]
    assert np.allclose([e.value for e in events.Scalars("loss")], [row["loss"] for row in rows])
    assert "reconstructions" in EventAccumulator(str(tmp_path / "run" / "tensorboard" / "vqvae")).Reload().Tags()["images"]


def test_missing_loggers_are_named(tmp_path, clips, monkeypatch, capsys):
    "Without TensorBoard one line is printed and training goes on; W&B, which was asked for, is an error."
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    pretrain(clips, tmp_path / "run", **(SHORT | dict(steps=2, every=1, tensorboard=True)))
    assert capsys.readouterr().out.count("tensorboard is not installed") == 1 and len(log_of(tmp_path / "run")) == 6
    with pytest.raises(ImportError, match="wandb is not installed"): Log(tmp_path, tensorboard=False, wandb="vpenc")


def test_wandb_gets_what_the_log_gets(tmp_path, monkeypatch):
    class Fake:
        sent = []
        def init(self, **options): self.options = options; return self
        def log(self, values): self.sent.append(values)
        def finish(self): pass
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = Log(tmp_path / "run", tensorboard=False, wandb="project")
    log.add(dict(stage="gpt", step=5, loss=1.5, gpt=[1.0, 2.0]))
    assert fake.sent == [{"gpt/loss": 1.5, "gpt/gpt/0": 1.0, "gpt/gpt/1": 2.0, "gpt/step": 5}] and fake.options["project"] == "project"


def test_frozen_vqvae_is_recorded(tmp_path, clips):
    from vpenc.files import digest, read_json
    from vpenc.models.checkpoints import load_vqvae
    pretrain(clips, tmp_path / "run", **(SHORT | dict(steps=(4, 2, 5), every=2)))
    after_stage_1 = load_vqvae(tmp_path / "run" / "vqvae").state_dict().values()
    assert read_json(tmp_path / "run" / "finished.json")["vqvae"] == digest(*after_stage_1)


def test_bfloat16_trains_and_losses_are_float32(tmp_path, clips):
    for precision in ("float32", "bfloat16"): pretrain(clips, tmp_path / precision, **(SHORT | dict(steps=8, every=4, precision=precision)))
    exact, half = (log_of(tmp_path / p) for p in ("float32", "bfloat16"))
    for a, b in zip(exact, half): assert abs(a["loss"] / b["loss"] - 1) < 0.1 and a["loss"] != b["loss"]
    assert all(v.dtype in (torch.float32, torch.int64) for v in weights_of(tmp_path / "bfloat16").values())


def test_a_damaged_checkpoint_is_one_clear_line(tmp_path, clips):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "vqvae.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"vqvae\.pt: not a readable checkpoint"): pretrain(clips, tmp_path / "run", **SHORT)


def test_command_line_reaches_every_setting(tmp_path, clips, capsys):
    from vpenc.cli import main
    settings = [f"{k}={v}" for k, v in SHORT.items() if k != "tensorboard"] + ["steps=2", "every=2", "parallel=False"]
    words = ["pretrain", str(clips), "--out", str(tmp_path / "run"), "--device", "cpu", "--no-tensorboard"]
    assert main([*words, *(w for s in settings for w in ("--set", s))]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["vqvae"]["n_codes"] == 32
    assert [r["stage"] for r in log_of(tmp_path / "run")] == ["vqvae", "gpt"]
    for wrong, said in (("n_code=3", "n_codes"), ("steps=x", "steps"), ("precision=bf16", "precision"), ("accumulate=3", "multiple")):
        assert main([*words, "--set", wrong]) == 2
        assert re.search(said, capsys.readouterr().err)
    assert main(["pretrain", str(tmp_path / "none.h5"), "--out", str(tmp_path / "x")]) == 2
    assert main([*words, "--stage", "gtp"]) == 2 and "gpt" in capsys.readouterr().err


def test_sim_as_clips_simulates_them_first(tmp_path, monkeypatch):
    from vpenc.cli import main
    monkeypatch.setenv("VPENC_DATA", str(tmp_path / "data"))
    settings = [f"{k}={v}" for k, v in SHORT.items() if k not in ("tensorboard", "resolution")] + ["steps=2", "every=2", "parallel=False"]
    words = ["pretrain", "sim", "--clips", "4", "--stage", "vqvae", "--out", str(tmp_path / "run"), "--device", "cpu", "--no-tensorboard"]
    assert main([*words, *(w for s in settings for w in ("--set", s))]) == 0
    assert (tmp_path / "data/sim-bair-clips.h5").exists() and [r["stage"] for r in log_of(tmp_path / "run")] == ["vqvae"]


def test_presets_are_whole():
    for name in ("tiny", "sim", "small", "bair"):
        config = configure(name)
        assert config.parallel and config.aligned and config.color_jitter and config.codebook_restarts
        for stage in ("vqvae", "parallel", "gpt"): assert config.plan(stage).steps > 0


def test_gpu_script_stops_in_time_packs_and_goes_on_elsewhere(tmp_path, clips):
    "The first call runs out of time; the second, on a machine that has only what the first packed, ends with a model that loads."
    from vpenc.models.checkpoints import load_videogpt
    settings = [f"{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in SHORT.items() if k != "tensorboard"]

    def call(number, minutes, **more):
        where = dict(OUT=str(tmp_path / f"out{number}"), WORK=str(tmp_path / f"work{number}"), DATA=str(clips), PRESET="tiny", DEVICE="cpu",
                     PYTHON=sys.executable, SAVE="1", TOTAL="0.2", VPENC_PROGRESS="0")
        subprocess.run([str(ROOT / "tools" / "gpu.sh"), str(minutes), *settings], env={**os.environ, **where, **more}, check=True, capture_output=True)
        return tmp_path / f"out{number}"
    first = call(1, 0.02)
    assert (first / "checkpoints.tar.000").exists() and not list(first.glob("model.*"))
    second = call(2, 5, RESUME=str(first))
    assert not list(second.glob("checkpoints.*")) and max(f.stat().st_size for f in second.iterdir()) < 16e6
    model = tmp_path / "model"
    model.mkdir()
    subprocess.run(f"tar xzf {second}/run.tar.gz -C {model} --strip-components 2 ./model && "
                   f"cat {second}/model.safetensors.??? > {model}/model.safetensors", shell=True, check=True)
    assert load_videogpt(model).config.vqvae.n_codes == 32
