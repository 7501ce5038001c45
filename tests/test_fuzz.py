"""Damaged, cut off and hostile files: every reader ends in one clear line, in bounded time and memory, and writes nowhere.

`make fuzz` runs more of the same: VPENC_FUZZ=20 means twenty times as many inputs and other seeds.
"""
import json
import os
import random
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from vpenc.data import bair
from vpenc.data.coco import COCO_JSON, decode_rle, read_coco, unpack_counts
from vpenc.data.masks import LabelledFrames
from vpenc.data.video import write_clips
from vpenc.encoders.features import extract, read_part
from vpenc.encoders.taps import load_encoder
from vpenc.experiments.experiment import Experiment
from vpenc.experiments.results import collect
from vpenc.experiments.runner import Job, read_grid
from vpenc.models.checkpoints import from_pretrained, read_original, save_pretrained
from vpenc.models.vqvae import VQVAE, VQVAEConfig
from vpenc.probing.probe import Probe, fit_probe
from vpenc.training.config import configure

MORE = int(os.environ.get("VPENC_FUZZ", 1))  # how many times the short run
ROOT = Path(__file__).resolve().parent.parent
profile = settings(max_examples=60 * MORE, deadline=None, database=None, derandomize=MORE == 1, suppress_health_check=list(HealthCheck))


def refusal(read, *arguments):
    "The message of a refusal, '' when the input was taken; any other error, or more than one line, fails."
    try: read(*arguments)
    except (ValueError, FileNotFoundError) as error:
        assert not isinstance(error, UnicodeError) and str(error).strip() and "\n" not in str(error), repr(error)[:300]
        return str(error)
    return ""


def damaged(whole: bytes, count: int, seed: int = 0):
    "`count` versions of a file: cut off, one to eight bits flipped, bytes overwritten, a piece left out or doubled."
    rng = random.Random(f"{seed} {MORE}")
    for i in range(count):
        data = bytearray(whole)
        at, kind = rng.randrange(len(data)), i % 5
        if kind == 0: del data[at:]
        if kind == 1:
            for _ in range(rng.randint(1, 8)): data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        if kind == 2: data[at:at + 8] = rng.choice([b"\0" * 8, b"\xff" * 8, struct.pack("<Q", 2**62), rng.randbytes(8)])
        if kind == 3: del data[at:at + rng.randint(1, 64)]
        if kind == 4: data[at:at] = data[at:at + rng.randint(1, 64)]
        yield bytes(data)


def snapshot(folder): return sorted(str(p) for p in Path(folder).rglob("*"))


def fuzzed(path, read, count, head=None):
    "Read damaged versions of the file at `path`; afterwards it is whole again, and no file has come or gone. Returns the number refused."
    whole, before = path.read_bytes(), snapshot(path.parent)
    refused = 0
    for i, data in enumerate(damaged(whole[:head] if head else whole, count * MORE)):
        path.write_bytes(data + whole[head:] if head else data)
        refused += bool(refusal(read))
    path.write_bytes(whole)
    assert snapshot(path.parent) == before
    return refused


# ---- TFRecords
def tfrecord(payload):
    length = struct.pack("<Q", len(payload))
    return length + struct.pack("<I", bair.masked_crc(length)) + payload + struct.pack("<I", bair.masked_crc(payload))


def field(number, content): return bytes([number << 3 | 2]) + (lambda n: bytes([n]) if n < 128 else bytes([n & 127 | 128, n >> 7]))(len(content)) + content


EXAMPLE = field(1, field(1, field(1, b"0/action") + field(2, field(2, field(1, struct.pack("<4f", 1, 2, 3, 4))))))


def test_records():
    import io
    whole = b"".join(tfrecord(EXAMPLE) for _ in range(3))
    read = lambda data: [bair.parse_example(payload) for payload in bair.read_records(io.BytesIO(data), "some.tfrecords", len(data))]
    assert len(read(whole)) == 3
    taken = [data for data in damaged(whole, 200 * MORE) if not refusal(read, data)]
    assert all(data == tfrecord(EXAMPLE) * (len(data) // len(tfrecord(EXAMPLE))) for data in taken)  # cut or doubled between two records


def test_examples_behind_a_right_checksum():
    for data in damaged(EXAMPLE, 300 * MORE): refusal(bair.read_trajectory, data)

    @profile
    @given(st.binary(max_size=200))
    def check(data): refusal(bair.read_trajectory, data)
    check()


def test_an_archive_writes_nothing_but_its_store(tmp_path):
    "Names with .., absolute names and links: refused or read, never unpacked."
    (tmp_path/"out").mkdir()
    for i, name in enumerate(["../../evil/train/traj_0_to_0.tfrecords", "/tmp/vpenc-evil/train/traj_0_to_0.tfrecords", "train/traj_0_to_0.tfrecords"]):
        archive = tmp_path/f"a{i}.tar"
        with tarfile.open(archive, "w") as tar:
            entry = tarfile.TarInfo(name)
            if i == 2: entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else: (tmp_path/"x").write_bytes(tfrecord(EXAMPLE)); entry.size = (tmp_path/"x").stat().st_size
            with open(tmp_path/"x", "ab+") as content:
                content.seek(0)
                tar.addfile(entry, None if i == 2 else content)
        assert refusal(bair.convert_bair, archive, tmp_path/"out"/"x.h5", "aux1", 1)
    assert not Path("/tmp/vpenc-evil").exists() and not any("evil" in p for p in snapshot(tmp_path.parent))
    assert not (tmp_path/"out"/"x.h5").exists()


# ---- COCO
@pytest.fixture
def coco(tmp_path):
    Image.fromarray(np.full((16, 16, 3), 99, np.uint8)).save(tmp_path/"a.png")
    record = lambda i, outline: dict(id=i, image_id=0, category_id=1, segmentation=outline, iscrowd=0, bbox=[0, 0, 4, 4], area=16)
    content = dict(images=[dict(id=0, file_name="a.png", height=16, width=16)], categories=[dict(id=1, name="robot")],
                   annotations=[record(0, [[1, 1, 9, 1, 9, 9, 1, 9]]), record(1, dict(size=[16, 16], counts=[10, 6, 240]))])
    (tmp_path/COCO_JSON).write_text(json.dumps(content))
    return tmp_path


def test_coco_bytes(coco): assert fuzzed(coco/COCO_JSON, lambda: read_coco(coco, size=16), 120)


ODD = st.one_of(st.none(), st.booleans(), st.integers(-2**70, 2**70), st.floats(), st.text(max_size=5), st.just([]), st.just({}),
                st.lists(st.integers(-9, 99), max_size=4), st.just("../../etc/passwd"), st.just("a\0b"))


def places(value, path=()):
    "Where values lie in nested lists and dicts."
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else (): yield from places(inner, (*path, key))


def replaced(value, path, new):
    if not path: return new
    value = value.copy()
    value[path[0]] = replaced(value[path[0]], path[1:], new)
    return value


def test_coco_values(coco):
    "Each value of the JSON in turn becomes something else."
    whole = json.loads((coco/COCO_JSON).read_text())

    @profile
    @given(st.sampled_from(list(places(whole))), ODD)
    def check(place, odd):
        (coco/COCO_JSON).write_text(json.dumps(replaced(whole, place, odd)))
        refusal(lambda: read_coco(coco, size=16))
    check()


def test_run_lengths():
    @profile
    @given(st.text(max_size=30) | st.text(alphabet=[chr(c) for c in range(48, 112)], max_size=30), st.integers(1, 20), st.integers(1, 20))
    def check(text, height, width):
        refusal(unpack_counts, text)
        refusal(decode_rle, dict(size=[height, width], counts=text), height, width)
    check()


def test_zip_archives(coco, tmp_path):
    "Names with .. and a bomb: 200 MB of zeros in 200 KB."
    archive = tmp_path/"export.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name in (COCO_JSON, "a.png"): file.write(coco/name, name)
    before = snapshot(tmp_path.parent)
    assert fuzzed(archive, lambda: read_coco(archive, size=16), 60)
    content = json.loads((coco/COCO_JSON).read_text())
    content["images"][0]["file_name"] = "../evil.png"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(COCO_JSON, json.dumps(content))
        file.write(coco/"a.png", "../evil.png")
    refusal(lambda: read_coco(archive, size=16))
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file: file.writestr(COCO_JSON, bytes(200 * 2**20))
    assert refusal(lambda: read_coco(archive, size=16))
    assert snapshot(tmp_path.parent) == before


# ---- models, features, probes
SMALL = VQVAEConfig(n_hiddens=8, n_res_layers=1, embedding_dim=4, n_codes=8, downsample=(4, 4, 4), sequence_length=4, resolution=16)


@pytest.mark.parametrize("legacy", [False, True])
def test_lightning_checkpoints(tmp_path, legacy):
    path = tmp_path/"last.ckpt"
    from argparse import Namespace
    model = VQVAE(SMALL)
    torch.save(dict(state_dict=model.state_dict(), hyper_parameters=dict(args=Namespace(downsample=(4, 4, 4)))), path,
               _use_new_zipfile_serialization=not legacy)
    assert fuzzed(path, lambda: read_original(path), 40)


def test_model_folders(tmp_path, capsys):
    folder = save_pretrained(VQVAE(SMALL), tmp_path/"model")
    read = lambda: from_pretrained(folder)
    read()
    assert fuzzed(folder/"model.safetensors", read, 25) and fuzzed(folder/"config.json", read, 80)


def test_model_configurations(tmp_path, capsys):
    folder = save_pretrained(VQVAE(SMALL), tmp_path/"model")
    whole = json.loads((folder/"config.json").read_text())

    @profile
    @given(st.sampled_from(list(places(whole))), ODD)
    def check(place, odd):
        (folder/"config.json").write_text(json.dumps(replaced(whole, place, odd)))
        refusal(from_pretrained, folder)
    check()


def test_parts_of_features(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    encoder = load_encoder(torch.nn.Conv2d(3, 2, 1), device="cpu")
    extract(encoder, frames, cache=tmp_path)
    path = next(tmp_path.rglob("*.safetensors"))
    assert fuzzed(path, lambda: read_part(path), 80)
    assert fuzzed(path, lambda: extract(encoder, frames, cache=tmp_path), 40)


def test_probes(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    pixels = extract(load_encoder("pixels", device="cpu"), frames, cache=False)
    fit_probe(pixels, frames[..., 0] > 99, "linear1x1", epochs=1).save(tmp_path)
    read = lambda: Probe.load(tmp_path)
    assert fuzzed(tmp_path/"probe.json", read, 80) and fuzzed(tmp_path/"probe.pt", read, 40)
    whole = json.loads((tmp_path/"probe.json").read_text())

    @profile
    @given(st.sampled_from(list(places(whole))), ODD)
    def check(place, odd):
        (tmp_path/"probe.json").write_text(json.dumps(replaced(whole, place, odd)))
        refusal(read)
    check()


# ---- settings, grids, notebooks, results
def test_configurations():
    names = ["steps", "batch_size", "learning_rate", "minutes", "downsample", "layers", "betas", "every", "precision", "n_codes", "steps_gpt"]

    @profile
    @given(st.sampled_from(names) | st.text(max_size=8), ODD | st.text(max_size=12))
    def check(name, value): refusal(lambda: configure("tiny", **{name: value}))
    check()


def test_grids(tmp_path):
    for name, content in {"g.json": json.dumps([dict(encoder="pixels", head=["linear1x1", "unet"], lr=.1)]),
                          "g.toml": '[[row]]\nencoder = "pixels"\nhead = ["linear1x1", "unet"]\nlr = 0.1\n'}.items():
        path = tmp_path/name
        path.write_text(content)
        read = lambda: [Experiment.from_parameters(**row) for row in read_grid(path)]
        assert len(read()) == 2 and fuzzed(path, read, 120)


def test_rows():
    @profile
    @given(st.sampled_from([*Experiment.__dataclass_fields__, "seed", "seeds"]), ODD)
    def check(name, value): refusal(lambda: Experiment.from_parameters(**{name: value}))
    check()


def test_notebooks_of_jobs(tmp_path):
    "A damaged notebook is a job that is not done, or one whose digest is whole; never an error."
    job = Job(Experiment(encoder="pixels", head="linear1x1"), {}, tmp_path, "abc")
    job.result.write_text("{}")
    whole = json.dumps(dict(cells=[], metadata=dict(papermill=dict(exception=None), vpenc=dict(digest="abc"))))
    job.notebook.write_text(whole)
    assert job.done()
    for data in damaged(whole.encode(), 200 * MORE):
        job.notebook.write_bytes(data)
        assert job.done() in (True, False)

    @profile
    @given(st.sampled_from(list(places(json.loads(whole)))), ODD)
    def check(place, odd):
        job.notebook.write_text(json.dumps(replaced(json.loads(whole), place, odd)))
        assert job.done() in (True, False)
    check()


def test_results(tmp_path):
    result = dict(format="vpenc-result-1", name="a", experiment=dict(encoder="pixels", head="linear1x1", protocol="corrected"), data=dict(fingerprint="f", dataset="toy"),
                  seeds=[0], scores=[dict(iou=.5, iou_pooled=.5, dice=.6, boundary_f=.4, ap=.5, ece=.1, iou_at_threshold=.5, threshold=.5)],
                  per_image=[[.4, .6]], images=[[0, 1]], trajectory=[[0, 1]], head_parameters=4, encoder_ms=1., probe_seconds=1.,
                  peak_memory_mb=9., degenerate=False)
    path = tmp_path/"a.json"
    path.write_text(json.dumps(result))
    assert len(collect(tmp_path)) == 1
    assert fuzzed(path, lambda: collect(tmp_path), 80)

    @profile
    @given(st.sampled_from(list(places(result))), ODD)
    def check(place, odd):
        path.write_text(json.dumps(replaced(result, place, odd)))
        refusal(collect, tmp_path)
    check()


# ---- HDF5: in a process of its own, with 4 GB and a clock, because its library is C
CHILD = """
import resource, sys
sys.path.insert(0, {tests!r})
resource.setrlimit(resource.RLIMIT_CPU, (300 * {more}, 300 * {more}))
from test_fuzz import hdf5
hdf5({folder!r}, {kind!r}, {count})
"""


def hdf5(folder, kind, count):
    from vpenc.data.shards import open_clips
    folder = Path(folder)

    def clips():
        store = open_clips(folder if kind == "shards" else folder/"a.h5")
        try:
            for split in store.splits:
                for i in range(store.count(split)): [store.field(split, name, i) for name in ("data", *store.fields[split])]
        finally: store.close()
    read = (lambda: LabelledFrames.load(folder/"a.h5")) if kind == "labels" else clips
    read()
    path = folder/"a.h5"
    refused = fuzzed(path, read, count) + fuzzed(path, read, count, head=2048)  # most damage that matters is in the head
    assert refused, "nothing was refused"


@pytest.mark.parametrize("kind", ["clips", "shards", "labels"])
def test_hdf5(tmp_path, kind):
    rng = np.random.default_rng(0)
    clip = lambda: dict(video=rng.integers(0, 256, (3, 8, 8, 3), np.uint8), actions=rng.random((3, 4), np.float32))
    if kind == "labels": LabelledFrames(clip()["video"], np.ones((3, 8, 8), bool), name="x").save(tmp_path/"a.h5")
    else:
        for name in ("a.h5", "b.h5")[:1 + (kind == "shards")]: write_clips(tmp_path/name, dict(train=[clip(), clip()], test=[clip()]))
    code = CHILD.format(tests=str(ROOT/"tests"), more=MORE, folder=str(tmp_path), kind=kind, count=40)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300 * MORE, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert child.returncode == 0, f"exit {child.returncode}: {child.stderr[-1500:]}"
