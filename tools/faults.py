"""Faults tried for real: kill -9 at random moments and go on, full disk, read-only folder, clock jumps, two runners, no memory, NaN,
a GPU that goes away.

    python tools/faults.py [--kills N] [--seed S] [--only NAME ...]

Prints a table in Markdown. Needs Linux; full disk and read-only folder need root (they mount a small tmpfs) and say so otherwise.
"""
import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START = """
import os, sys, json, time, numpy as np, torch
torch.set_num_threads(1)
from pathlib import Path
out, given = Path(sys.argv[1]), Path(sys.argv[2])
import vpenc.data.sim, vpenc.data.ingest, vpenc.encoders.features, vpenc.training.pretrain, vpenc.experiments.runner, vpenc.views.label_session
print("ready", flush=True)
"""
SMALL = dict(hidden_dim=24, heads=2, layers=1, dropout=0., attn_dropout=0., resnet_widths=(8, 16, 16, 24), resnet_blocks=(1, 1, 1, 1), n_hiddens=8,
             n_res_layers=1, embedding_dim=8, n_codes=32, downsample=(4, 4, 4), sequence_length=4, resolution=32, batch_size=4, warmup=3, validation_clips=4,
             futures=0, tensorboard=False, codebook_restarts=(3, 6), learning_rate=1e-3, steps=(20, 10, 20), every=5)
WORK = dict(
    generate="""
from vpenc.data.sim import SimConfig, generate_labels
generate_labels(out/"labels.h5", SimConfig(size=32, frames=4), dict(train=60, val=25, test=25), processes=1)
""",
    ingest="""
from vpenc.data.ingest import convert_videos
convert_videos(given/"videos", out/"clips.h5", size=32, jobs=1)
""",
    cache="""
from vpenc.encoders.features import extract
from vpenc.encoders.taps import load_encoder
features = extract(load_encoder("vqvae:pre", device="cpu"), np.load(given/"frames.npy"), cache=out)
""",
    train=f"""
from vpenc.training.pretrain import pretrain
pretrain(given/"clips.h5", out/"run", device="cpu", **{SMALL!r})
""",
    batch="""
from vpenc.experiments.runner import run_grid, report
rows = [dict(encoder=e, head=h, data=str(given/"labels.h5"), labels=20, epochs=3) for e, h in (("position", "prior"), ("pixels", "linear1x1"), ("pixels", "unet"))]
sys.exit(report(run_grid(rows, out/"batch", workers=1, cache=out/"cache")))
""",
    label="""
from vpenc.views.label_session import LabelSession
frames = np.load(given/"frames.npy")
session = LabelSession(out/"session", frames, ["robot"])
for i in range(len(frames)):
    if session.states[i] is None: session.draw(i, frames[i, ..., 0] > 128)
""")
WHAT = dict(generate="all arrays and attributes of the file", ingest="all arrays and attributes of the store", cache="all features, bit by bit",
            train="weights (bytes) and log, without its minutes", batch="results, without times, memory and versions", label="masks of all frames")


def prepare(given):
    "The inputs of all kinds of work."
    import numpy as np
    from vpenc.data.masks import LabelledFrames
    from vpenc.data.video import write_clips
    rng = np.random.default_rng(0)
    (given/"videos").mkdir()
    for i in range(60): np.save(given/"videos"/f"{i:02d}.npy", rng.integers(0, 256, (12, 64, 64, 3), np.uint8))
    np.save(given/"frames.npy", rng.integers(0, 256, (320, 64, 64, 3), np.uint8))
    write_clips(given/"clips.h5", dict(train=[dict(video=rng.integers(0, 256, (4, 32, 32, 3), np.uint8)) for _ in range(18)],
                                       test=[dict(video=rng.integers(0, 256, (4, 32, 32, 3), np.uint8)) for _ in range(4)]))
    frames = rng.integers(0, 256, (60, 32, 32, 3), np.uint8)
    LabelledFrames(frames, frames[..., 0] > 128, None, np.repeat(["train", "val", "test"], 20), "noise").save(given/"labels.h5")


def content(kind, out) -> str:
    "A digest of what the work has made; times and random ids do not enter."
    import h5py
    import numpy as np
    state = hashlib.sha256()
    def add(*parts): state.update(repr(parts).encode())
    if kind in ("generate", "ingest"):
        with h5py.File(next(out.glob("*.h5"))) as file:
            add(sorted((k, str(v)) for k, v in file.attrs.items()))
            for name in sorted(file): add(name, file[name].shape, file[name].dtype.str), state.update(np.ascontiguousarray(file[name][:]).tobytes())
    elif kind == "cache":
        from safetensors import safe_open
        for path in sorted(p for p in out.rglob("*.safetensors") if not p.name.startswith(".")):  # a killed writer leaves its temporary file
            with safe_open(path, "np") as file:  # safetensors writes the entries of its header in any order
                add(path.relative_to(out), sorted((file.metadata() or {}).items()))
                for name in sorted(file.keys()): add(name), state.update(np.ascontiguousarray(file.get_tensor(name)).tobytes())
    elif kind == "train":
        state.update((out/"run"/"model"/"model.safetensors").read_bytes())
        add([{k: v for k, v in json.loads(line).items() if k != "minutes"} for line in (out/"run"/"log.jsonl").read_text().splitlines()])
    elif kind == "batch":
        for path in sorted((out/"batch").glob("*.json")):
            result = json.loads(path.read_text())
            add(path.name, {k: result[k] for k in ("scores", "per_image", "images", "interval", "units", "history", "frozen", "iou")})
    else:
        from PIL import Image
        for path in sorted((out/"session"/"masks").glob("[!.]*.png")): add(path.name), state.update(np.asarray(Image.open(path)).tobytes())
    return state.hexdigest()[:12]


def start(code, out, given, **options):
    out.mkdir(exist_ok=True, parents=True)
    own = dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", VPENC_PROGRESS="0", PYTHONWARNINGS="ignore")
    return subprocess.Popen([sys.executable, "-c", START + code, str(out), str(given)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | own, start_new_session=True, **options)


def finish(child, seconds=300):
    "Exit code and the last line of stderr."
    try: out, err = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return "no end", ""
    return child.returncode, (err.strip().splitlines() or [""])[-1]


def killed(kind, home, given, kills, rng):
    "(number of moments that hit, verdict): each time from nothing, killed at a random moment, then the same call to its end."
    child, begun = start(WORK[kind], home/"alone", given), None
    child.stdout.readline()
    begun = time.monotonic()
    code, line = finish(child)
    if code: return 0, f"FAILED undisturbed: {line[:120]}"
    wanted, lasts, hit, wrong = content(kind, home/"alone"), time.monotonic() - begun, 0, []
    for i in range(kills):
        out = home/f"kill{i}"
        child = start(WORK[kind], out, given)
        child.stdout.readline()
        time.sleep(rng.uniform(0, lasts))
        hit += child.poll() is None
        try: os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        child.communicate()
        code, line = finish(start(WORK[kind], out, given))
        if code: wrong.append(f"exit {code}: {line[:120]}")
        elif content(kind, out) != wanted: wrong.append("another result")
    return hit, "equal bits" if not wrong else f"{len(wrong)} of {kills} WRONG: {wrong[0]}"


def mounted(home, size):
    folder = home/"disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    return folder if done.returncode == 0 else None


def remount(folder, option): subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def full_disk(kind, home, given):
    "A tmpfs of 300 kB, then of 200 MB."
    wanted = content(kind, alone(kind, home, given))
    if not (folder := mounted(home, "300k")): return "not tried: no right to mount"
    try:
        code, line = finish(start(WORK[kind], folder, given))
        remount(folder, "size=200m")
        again, _ = finish(start(WORK[kind], folder, given))
        same = again == 0 and content(kind, folder) == wanted
    finally: subprocess.run(["umount", "-l", str(folder)], check=True)
    return verdict(code, line, same)


def read_only(kind, home, given):
    wanted = content(kind, alone(kind, home, given))
    if not (folder := mounted(home, "200m")): return "not tried: no right to mount"
    try:
        remount(folder, "ro")
        code, line = finish(start(WORK[kind], folder, given))
        remount(folder, "rw")
        again, _ = finish(start(WORK[kind], folder, given))
        same = again == 0 and content(kind, folder) == wanted
    finally: subprocess.run(["umount", "-l", str(folder)], check=True)
    return verdict(code, line, same)


def verdict(code, line, same):
    return f"{'refused' if code else 'NOT refused'} (`{line[:150]}`); afterwards {'equal bits' if same else 'ANOTHER result'}"


def alone(kind, home, given):
    code, line = finish(start(WORK[kind], home/"alone", given))
    if code: raise SystemExit(f"{kind} failed undisturbed: {line}")
    return home/"alone"


def clock_jumps(kind, home, given):
    "time.time jumps by up to ten years, back and forth, at every call."
    jump = "import random as _r; _true, _j = time.time, _r.Random(0)\ntime.time = lambda: _true() + _j.uniform(-3e8, 3e8)\n"
    wanted = content(kind, alone(kind, home, given))
    code, line = finish(start(jump + WORK[kind], home/"jump", given))
    if code: return f"FAILED: `{line[:150]}`"
    return "equal bits" if content(kind, home/"jump") == wanted else "ANOTHER result"


def two_at_once(kind, home, given):
    wanted = content(kind, alone(kind, home, given))
    both = [start(WORK[kind], home/"shared", given) for _ in range(2)]
    codes = [finish(child)[0] for child in both]
    return f"exit {codes[0]} and {codes[1]}; {'equal bits' if content(kind, home/'shared') == wanted else 'ANOTHER result'}"


def no_memory(kind, home, given):
    "`ulimit -v` leaves 150 MB beyond what the imports took."
    limit = ("import resource; used = int(Path('/proc/self/statm').read_text().split()[0]) * 4096; resource.setrlimit(resource.RLIMIT_AS, (used + 150 * 2**20,) * 2)\n")
    work = """
from vpenc.encoders.taps import load_encoder
from vpenc.encoders.features import extract
from vpenc.probing.heads import HEADS, LocalLinearHead
from vpenc.probing.probe import fit_probe
class Wide(LocalLinearHead):
    def __init__(self, shapes, size=(64, 64)):
        super().__init__(shapes, size)
        self.wide = torch.nn.Linear(10000, 10000)
HEADS["wide"] = Wide
frames = np.load(given/"frames.npy")[:9]
pixels = extract(load_encoder("pixels", device="cpu"), frames, cache=False)
"""
    code, line = finish(start(work + limit + 'fit_probe(pixels, frames[..., 0] > 128, "wide")', home/"a", given))
    after, _ = finish(start(work + 'fit_probe(pixels, frames[..., 0] > 128, "linear1x1", epochs=1)', home/"a", given))
    return f"{'refused' if code else 'NOT refused'} (`{line[:260]}`); the next run: exit {after}"


def nan_loss(kind, home, given):
    bad = f"from vpenc.training.pretrain import pretrain\npretrain(given/'clips.h5', out/'run', device='cpu', **({SMALL!r} | dict(learning_rate=1e30, clip_norm=1e30)))"
    code, line = finish(start(bad, home/"a", given))
    return f"{'refused' if code else 'NOT refused'} (`{line[:150]}`)"


def gpu_lost(kind, home, given):
    "A GPU that goes away, simulated: the 25th step of the training ends in CUDA's error; then the same call again."
    wanted = content(kind, alone(kind, home, given))
    lost = f"""
import vpenc.cli, vpenc.training.loop as loop, vpenc.training.pretrain as trainer
true, calls = loop.take_step, [0]
def failing(*arguments):
    calls[0] += 1
    if calls[0] == 25: raise RuntimeError("CUDA error: unspecified launch failure\\nCUDA kernel errors might be asynchronously reported at some other API call")
    return true(*arguments)
loop.take_step = failing
vpenc.cli.pretrain = lambda args: trainer.pretrain(given/"clips.h5", out/"run", device="cpu", **{SMALL!r}) and 0
sys.exit(vpenc.cli.main(["pretrain", "clips.h5", "--out", "run"]))
"""
    code, line = finish(start(lost, home/"lost", given))
    again, _ = finish(start(WORK[kind], home/"lost", given))
    same = "equal bits" if again == 0 and content(kind, home/"lost") == wanted else "ANOTHER result"
    return f"{'refused' if code == 2 else 'NOT refused'} (`{line[:160]}`); afterwards {same}"


OTHERS = dict(full_disk=("full disk", full_disk, ("generate", "cache", "label")), read_only=("read-only folder", read_only, ("ingest", "cache")),
              clock=("clock jumps", clock_jumps, ("train", "batch")), two=("two at once", two_at_once, ("generate", "cache", "batch")),
              memory=("no memory", no_memory, ("fit",)), nan=("NaN loss", nan_loss, ("train",)), gpu=("a GPU that goes away (simulated)", gpu_lost, ("train",)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[*WORK, *OTHERS])
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory(prefix="vpenc-faults-") as home:
        home = Path(home)
        (home/"given").mkdir()
        prepare(home/"given")
        print("| fault | work | tried | compared | outcome |\n|---|---|---|---|---|", flush=True)
        for kind in [kind for kind in WORK if kind in args.only]:
            hit, said = killed(kind, home/kind, home/"given", args.kills, random.Random(f"{kind} {args.seed}"))
            print(f"| kill -9 | {kind} | {args.kills} moments, seed {args.seed}, {hit} before its end | {WHAT[kind]} | {said} |", flush=True)
        for name in [name for name in OTHERS if name in args.only]:
            title, attempt, kinds = OTHERS[name]
            for kind in kinds:
                folder = home/f"{name}-{kind}"
                folder.mkdir()
                print(f"| {title} | {kind} | 1 | {WHAT.get(kind, 'exit code and last line')} | {attempt(kind, folder, home/'given')} |", flush=True)


if __name__ == "__main__": main()
