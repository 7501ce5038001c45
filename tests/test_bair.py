"""BAIR's TFRecords, written by the rules of their formats (independently of vpenc), become VideoGPT's HDF5 file."""
import os
import signal
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from vpenc.data import bair
from vpenc.data.bair import convert_bair
from vpenc.files import file_sha256
from vpenc.data.loader import clip_loader
from vpenc.data.video import ClipStore

ROOT = Path(__file__).resolve().parent.parent


# ---- an independent writer: CRC32C bit by bit through a table of 256, and hand-made protocol buffers
def crc_table():
    table = []
    for value in range(256):
        for _ in range(8): value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


TABLE = crc_table()


def masked(data):
    crc = 0xFFFFFFFF
    for byte in data: crc = TABLE[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def record(payload):
    length = struct.pack("<Q", len(payload))
    return length + struct.pack("<I", masked(length)) + payload + struct.pack("<I", masked(payload))


def varint(value):
    out = b""
    while value >= 128: out, value = out + bytes([value % 128 + 128]), value // 128
    return out + bytes([value])


def message(number, payload): return varint(number * 8 + 2) + varint(len(payload)) + payload


UNKNOWN = varint(77 * 8) + varint(5) + message(78, b"unknown") + varint(79 * 8 + 5) + b"abcd" + varint(80 * 8 + 1) + b"abcdefgh"


def example(features, style="plain"):
    """A tf.train.Example. Styles: plain; loose (floats not packed, unknown fields everywhere); shuffled (entries in another
    order, value before key, `features` in two pieces)."""
    entries = []
    for name, values in features.items():
        if isinstance(values, bytes): value = message(1, message(1, values))
        elif style == "loose": value = message(2, b"".join(varint(13) + struct.pack("<f", v) + UNKNOWN for v in values))
        else: value = message(2, message(1, struct.pack(f"<{len(values)}f", *values)))
        key, value = message(1, name.encode()), message(2, value + (UNKNOWN if style == "loose" else b""))
        entries.append(message(1, value + key if style == "shuffled" else key + value))
    if style == "loose": return UNKNOWN + message(1, UNKNOWN + b"".join(entries) + UNKNOWN) + UNKNOWN
    if style == "shuffled": return message(1, b"".join(entries[::-2])) + message(1, b"".join(entries[-2::-2]))
    return message(1, b"".join(entries))


def trajectory(seed, frames=3):
    rng = np.random.default_rng(seed)
    pixels = lambda: rng.integers(0, 256, (frames, 64, 64, 3), np.uint8)
    return dict(data=pixels(), main=pixels(), actions=rng.normal(size=(frames, 4)).astype("f4"), tip=rng.normal(size=(frames, 3)).astype("f4"))


def features_of(arrays):
    features = {}
    for t in range(len(arrays["data"])):
        features |= {f"{t}/image_aux1/encoded": arrays["data"][t].tobytes(), f"{t}/image_main/encoded": arrays["main"][t].tobytes(),
                     f"{t}/action": arrays["actions"][t].tolist(), f"{t}/endeffector_pos": arrays["tip"][t].tolist()}
    return features


STYLES = ("plain", "loose", "shuffled")
FILES = {"train/traj_0_to_1": (0, 1), "train/traj_2_to_3": (2, 3), "train/traj_10_to_11": (10, 11), "test/traj_0_to_0": (100,)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A folder with a tiny set, and its archive, packed in an unhelpful order."
    home = tmp_path_factory.mktemp("bair")
    for name, seeds in FILES.items():
        path = home / "softmotion30_44k" / f"{name}.tfrecords"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(record(example(features_of(trajectory(s)), STYLES[s % 3])) for s in seeds))
    with tarfile.open(home / "bair.tar", "w") as tar:
        for name in ("train/traj_2_to_3", "test/traj_0_to_0", "train/traj_10_to_11", "train/traj_0_to_1"):
            tar.add(home / "softmotion30_44k" / f"{name}.tfrecords", f"softmotion30_44k/{name}.tfrecords")
    return home


def check_content(path, camera="both"):
    store = ClipStore(path)
    for split, seeds in (("train", (0, 1, 2, 3, 10, 11)), ("test", (100,))):
        assert store.count(split) == len(seeds)
        for i, seed in enumerate(seeds):
            wanted = trajectory(seed)
            if camera == "main": wanted["data"] = wanted["main"]
            for name in ("data", *store.fields[split]): np.testing.assert_array_equal(store.field(split, name, i), wanted[name])
            assert store.trajectory(split, i) == (1_000_000 if split == "test" else seed)
    return store


@pytest.mark.parametrize("camera", ["aux1", "main", "both"])
def test_archive_becomes_videogpt_layout(tiny, tmp_path, camera):
    store = check_content(convert_bair(tiny / "bair.tar", tmp_path / "bair.h5", camera, jobs=1), camera)
    assert store.fields["train"] == (("actions", "tip", "main") if camera == "both" else ("actions", "tip"))
    with h5py.File(store.path) as file:
        assert file["train_data"].shape == (18, 64, 64, 3) and file["train_data"].dtype == np.uint8
        assert file["train_idx"][:].tolist() == [0, 3, 6, 9, 12, 15] and file["train_idx"].dtype == np.int64
        assert file["train_actions"].shape == (18, 4) and file["test_tip"].shape == (3, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bair.h5", "bair.h5.lock"]
    assert sum(len(batch) for batch in clip_loader(store, length=3, batch=2)) == 6


def test_jobs_and_container_do_not_show(tiny, tmp_path):
    wanted = file_sha256(convert_bair(tiny, tmp_path / "folder.h5", jobs=1))
    assert file_sha256(convert_bair(tiny / "bair.tar", tmp_path / "two.h5", jobs=2)) == wanted
    assert file_sha256(convert_bair(tiny / "softmotion30_44k", tmp_path / "inner.h5", jobs=1)) == wanted


def test_two_jobs_from_a_compressed_archive(tiny, tmp_path):
    with tarfile.open(tmp_path / "bair.tgz", "w:gz") as tar: tar.add(tiny / "softmotion30_44k", "softmotion30_44k")
    check_content(convert_bair(tmp_path / "bair.tgz", tmp_path / "bair.h5", "both", jobs=2))
    few = ClipStore(convert_bair(tmp_path / "bair.tgz", tmp_path / "few.h5", limit=3, jobs=1))
    assert few.count("train") == 3 and few.count("test") == 1


@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("position", ["length", "length crc", "payload", "payload crc"])
def test_one_flipped_bit_is_named(tiny, tmp_path, position, number):
    source = (tiny / "softmotion30_44k/train/traj_10_to_11.tfrecords").read_bytes()
    first = len(record(example(features_of(trajectory(10)), STYLES[10 % 3])))
    begin, end = ((0, first), (first, len(source)))[number]
    at = {"length": begin + 2, "length crc": begin + 11, "payload": begin + 5000, "payload crc": end - 2}[position]
    data = bytearray(source)
    data[at] ^= 32
    path = tmp_path / "set/train/traj_10_to_11.tfrecords"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    with pytest.raises(ValueError) as error: convert_bair(tmp_path / "set", tmp_path / "bair.h5", jobs=1)
    words = str(error.value)
    assert str(path) in words and f"record {number} " in words and f"the {position.split()[0]}'s CRC32C" in words and "\n" not in words
    assert not (tmp_path / "bair.h5").exists()


def test_truncated_archive_names_file_and_record(tiny, tmp_path):
    whole = (tiny / "bair.tar").read_bytes()
    with tarfile.open(tiny / "bair.tar") as tar: last = tar.getmembers()[-1]
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[:last.offset_data + last.size - 10])
    with pytest.raises(ValueError, match=r"cut.tar:softmotion30_44k/train/traj_0_to_1.tfrecords, record 1 .*cut off"):
        convert_bair(cut, tmp_path / "bair.h5", jobs=1)
    cut.write_bytes(whole)  # downloaded to the end: the conversion goes on
    check_content(convert_bair(cut, tmp_path / "bair.h5", jobs=1))


def test_missing_and_wrong_features_are_named(tmp_path):
    good = features_of(trajectory(0))
    cases = [("1/image_aux1/encoded", None), ("2/action", None), ("1/image_aux1/encoded", bytes(12289)), ("0/action", [1.0, 2.0, 3.0]),
             ("2/endeffector_pos", b"123456789012")]
    for i, (name, value) in enumerate(cases):
        path = tmp_path / f"{i}/train/traj_0_to_1.tfrecords"
        path.parent.mkdir(parents=True)
        bad = {k: v for k, v in (good | {name: value}).items() if v is not None}
        path.write_bytes(record(example(good)) + record(example(bad)))
        with pytest.raises(ValueError) as error: convert_bair(tmp_path / str(i), tmp_path / f"{i}.h5", jobs=1)
        assert str(path) in str(error.value) and "record 1 " in str(error.value) and repr(name) in str(error.value)
        assert "expected" in str(error.value) and "\n" not in str(error.value)


def test_kill_and_resume(tiny, tmp_path):
    "kill -9 after the first part: the rest is converted, and the file is the same as without the interruption."
    wanted = file_sha256(convert_bair(tiny / "bair.tar", tmp_path / "wanted.h5", jobs=1))
    out = tmp_path / "killed.h5"
    code = f"""import time, vpenc.data.bair as bair
quick = bair.read_trajectory
bair.read_trajectory = lambda *args: (time.sleep(.15), quick(*args))[1]
bair.convert_bair({str(tiny / 'bair.tar')!r}, {str(out)!r}, jobs=1)"""
    victim = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})
    finished = lambda: {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed.h5.parts").glob("[!.]*.h5")}
    while victim.poll() is None and not finished(): time.sleep(.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    survivors = finished()
    assert victim.returncode == -signal.SIGKILL and 1 <= len(survivors) < 4 and not out.exists()

    written = []
    real = bair.read_trajectory
    bair.read_trajectory = lambda *args: (written.append(1), real(*args))[1]
    try: convert_bair(tiny / "bair.tar", out, jobs=1)
    finally: bair.read_trajectory = real
    assert 0 < len(written) < 7 and file_sha256(out) == wanted and not (tmp_path / "killed.h5.parts").exists()


def test_command_line(tiny, tmp_path, capsys):
    from vpenc.cli import main
    words = ["data", "bair", str(tiny / "bair.tar"), "--out", str(tmp_path / "bair.h5"), "--camera", "both", "--jobs", "1"]
    assert main(words) == 0 and "made, 6 train and 1 test trajectories" in capsys.readouterr().out
    assert main(words) == 0 and "there already" in capsys.readouterr().out
    check_content(tmp_path / "bair.h5")
    assert main(["data", "bair", str(tmp_path), "--out", str(tmp_path / "x.h5")]) == 2
    assert "expected softmotion30_44k/{train,test}/" in capsys.readouterr().err


SHARED = Path(os.environ.get("VPENC_SHARED", ROOT.parent / "shared")) / "data" / "bair_trajectories_real.npz"


@pytest.mark.skipif(not SHARED.exists(), reason="no real frames at hand")
def test_real_frames_survive(tmp_path):
    real = np.load(SHARED)
    arrays = dict(data=real["ivgpt_npz_aux1"], main=real["ivgpt_npz_main"], actions=real["ivgpt_npz_action"].astype("f4"), tip=np.zeros((30, 3), "f4"))
    path = tmp_path / "set/test/traj_0_to_0.tfrecords"
    path.parent.mkdir(parents=True)
    path.write_bytes(record(example(features_of(arrays))))
    store = ClipStore(convert_bair(tmp_path / "set", tmp_path / "real.h5", "both", jobs=1))
    for name in arrays: np.testing.assert_array_equal(store.field("test", name, 0), arrays[name])
