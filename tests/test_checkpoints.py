"""Checkpoint files: every kind the original can have written, broken ones, and hostile ones."""
import argparse
import builtins
import collections
import functools
import io
import os
import pickle
import re
import runpy
import subprocess
import zipfile

import pytest
import torch

import reference_videogpt as plain
from reference_videogpt import Case
from vpenc.models.checkpoints import LightningFile, build_original, convert, from_pretrained, load_videogpt, load_vqvae
from vpenc.models.videogpt import VideoGPT
from vpenc.models.vqvae import VQVAE

SMALL = Case(hiddens=4, dim=3, codes=5, resolution=16, hidden=12, heads=2, widths=(4, 4, 4, 6), blocks=(1, 2, 1, 1))


pytestmark = pytest.mark.usefixtures("one_thread")


def gpt_file(path, case=SMALL, weights=None, args=None, **options):
    weights = plain.random_weights(plain.gpt_shapes(case)) if weights is None else weights
    return plain.write_checkpoint(path, weights, args or plain.arguments(case), **options)


def flattened(value):  # a 3D kernel of a one-frame ResNet is kept as its middle slice
    return value[:, :, value.shape[2] // 2]


def assert_holds(model, weights, dtype=torch.float32):
    state = model.state_dict()
    wanted = {name: value for name, value in weights.items() if not name.endswith(".mask")}
    assert list(state) and set(state) == set(wanted)
    for name, value in state.items():
        given = wanted[name] if wanted[name].ndim == value.ndim else flattened(wanted[name])
        if given.is_floating_point(): given = given.to(dtype).float()
        assert value.dtype == given.dtype and torch.equal(value, given), name
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def rewrite(path, change):
    "Apply `change(name, bytes) -> bytes` to the entries of a zip archive."
    with zipfile.ZipFile(path) as archive: entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items(): archive.writestr(name, change(name, content))


def refusal(path, load=load_videogpt):
    "The one-line error for a rejected file."
    with pytest.raises(ValueError) as error: load(path)
    message = str(error.value)
    assert "\n" not in message and path.name in message
    return message


# ---- what the original can have written
KINDS = {
    "full, frame": SMALL,
    "full, unconditional": SMALL.but(cond_frames=0),
    "full, class": SMALL.but(cond_frames=0, classes=3),
    "full, class and two frames": SMALL.but(cond_frames=2, classes=3),
    "sparse, frame": SMALL.but(attn_type="sparse", downsample=(4, 2, 2)),
    "sparse, class": SMALL.but(attn_type="sparse", downsample=(4, 2, 2), cond_frames=0, classes=2),
    "128 pixels": SMALL.but(resolution=128, downsample=(4, 8, 8)),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_loads(tmp_path, name, legacy):
    case = KINDS[name]
    weights = plain.random_weights(plain.gpt_shapes(case))
    path = gpt_file(tmp_path / "gpt.ckpt", case, weights, legacy=legacy)
    model = load_videogpt(path)
    assert_holds(model, weights)
    config, tokens = model.config, model.config.vqvae
    assert (config.hidden_dim, config.heads, config.layers, config.dropout, config.attn_dropout) == (case.hidden, case.heads, case.layers, 0.2, 0.3)
    assert (config.attn_type, config.n_cond_frames, config.n_classes) == (case.attn_type, case.cond_frames, case.classes)
    assert (tokens.downsample, tokens.sequence_length, tokens.resolution) == (case.downsample, case.length, case.resolution)
    assert_holds(load_vqvae(path), {n.removeprefix("vqvae."): value for n, value in weights.items() if n.startswith("vqvae.")})


@pytest.mark.parametrize("options", [dict(weights_only=True), dict(amp=True), dict(optimizer=False), dict(amp=True, legacy=True)], ids=str)
def test_every_container_loads(tmp_path, options):
    weights = plain.random_weights(plain.gpt_shapes(SMALL))
    assert_holds(load_videogpt(gpt_file(tmp_path / "gpt.ckpt", SMALL, weights, **options)), weights)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_vqvae_file(tmp_path, legacy):
    case = SMALL.but(downsample=(4, 8, 2), res_layers=3)
    weights = plain.random_weights(plain.vqvae_shapes(case))
    path = plain.write_checkpoint(tmp_path / "vqvae.ckpt", weights, plain.vqvae_arguments(case), legacy=legacy)
    model = load_vqvae(path)
    assert_holds(model, weights)
    assert model.config.downsample == (4, 8, 2) and model.config.latent_shape == (4, 2, 8)
    assert isinstance(from_pretrained(path), VQVAE)
    assert "load_vqvae" in refusal(path, load_videogpt)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(tmp_path, dtype):
    weights = plain.random_weights(plain.gpt_shapes(SMALL))
    stored = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
    assert_holds(load_videogpt(gpt_file(tmp_path / "gpt.ckpt", SMALL, stored)), weights, dtype)


def test_cuda_storages(tmp_path):
    "A file written from a GPU names `cuda:0` as the location of its storages."
    weights = plain.random_weights(plain.gpt_shapes(SMALL))
    path = gpt_file(tmp_path / "gpt.ckpt", SMALL, weights)
    cpu, cuda = (b"X" + len(device).to_bytes(4, "little") + device for device in (b"cpu", b"cuda:0"))
    rewrite(path, lambda name, content: content.replace(cpu, cuda) if name.endswith("data.pkl") else content)
    with pytest.raises((RuntimeError, pickle.UnpicklingError, ModuleNotFoundError)): torch.load(path, weights_only=False)
    assert cuda in zipfile.ZipFile(path).read("gpt/data.pkl")
    assert_holds(load_videogpt(path), weights)


def test_views_and_parameters(tmp_path):
    "Transposed, sliced and shared storages, and parameters instead of tensors."
    weights = plain.random_weights(plain.gpt_shapes(SMALL))
    flat = torch.cat([value.flatten() for value in weights.values() if value.is_floating_point()])
    views, start = {}, 0
    for name, value in weights.items():
        if not value.is_floating_point(): views[name] = value; continue
        views[name] = flat[start : start + value.numel()].view(value.shape)
        start += value.numel()
    views["fc_in.weight"] = weights["fc_in.weight"].T.contiguous().T
    views["fc_out.weight"] = torch.nn.Parameter(torch.stack([weights["fc_out.weight"]] * 2, 1)[:, 1])
    assert_holds(load_videogpt(gpt_file(tmp_path / "gpt.ckpt", SMALL, views)), weights)


def test_optimizer_state_and_masks_are_not_read(tmp_path):
    "Their numbers may even be gone."
    weights = plain.random_weights(plain.gpt_shapes(SMALL))
    path = gpt_file(tmp_path / "gpt.ckpt", SMALL, weights)
    with LightningFile(path) as file:
        needed = {f"gpt/data/{stored.storage}" for name, stored in file.tensors.items() if not name.endswith(".mask")}
    before = path.stat().st_size
    rewrite(path, lambda name, content: b"" if "/data/" in name and name not in needed else content)
    assert path.stat().st_size < before / 2
    assert_holds(load_videogpt(path), weights)


def test_arguments_that_shapes_tell_may_be_missing(tmp_path):
    case = SMALL.but(attn_type="sparse", downsample=(4, 2, 2))
    args = argparse.Namespace(heads=2, sequence_length=16)
    config = load_videogpt(gpt_file(tmp_path / "gpt.ckpt", case, args=args)).config
    assert (config.attn_type, config.layers, config.n_cond_frames, config.vqvae.resolution) == ("sparse", 2, 1, 16)
    assert (config.dropout, config.attn_dropout) == (0.2, 0.3)  # the original's defaults
    full = load_videogpt(gpt_file(tmp_path / "full.ckpt", SMALL.but(cond_frames=0), args=argparse.Namespace(heads=2, sequence_length=16, resolution=16)))
    assert full.config.attn_type == "full" and full.config.n_cond_frames == 0


@pytest.mark.parametrize("name, value", [("heads", None), ("heads", 5), ("heads", 0), ("heads", "4"), ("heads", -4), ("sequence_length", None),
                                         ("sequence_length", 12), ("resolution", [64]), ("layers", 10**9), ("layers", 1), ("attn_type", "ring"),
                                         ("dropout", "much"), ("resolution", 2**40)])
def test_arguments_that_make_no_model(tmp_path, name, value):
    args = plain.arguments(SMALL, **{name: value})
    if value is None: delattr(args, name)
    message = refusal(gpt_file(tmp_path / "gpt.ckpt", args=args, optimizer=False))
    assert name in message or "emb.d_0" in message or "attn_nets.1" in message, message


def test_without_arguments(tmp_path):
    torch.save({"state_dict": plain.random_weights(plain.gpt_shapes(SMALL))}, tmp_path / "bare.ckpt")
    assert "heads" in refusal(tmp_path / "bare.ckpt")


# ---- files that do not fit
class Altered:
    "A checkpoint's file, with other tensors in it."
    def __init__(self, file, tensors): self.path, self.args, self.tensors, self.read, self.fail = file.path, file.args, tensors, file.read, file.fail


def test_each_missing_or_misshaped_tensor_is_named(tmp_path):
    "Missing (every other one) or misshaped: although sizes are read off the tensors, that one is named, and no other."
    case = SMALL.but(classes=3, layers=1, blocks=(1, 1, 1, 2))
    def told(tensors):
        with pytest.raises(ValueError) as error: build_original(Altered(file, tensors))
        return str(error.value)
    with LightningFile(gpt_file(tmp_path / "gpt.ckpt", case, optimizer=False)) as file:
        build_original(Altered(file, file.tensors))
        for i, (name, stored) in enumerate(file.tensors.items()):
            if name.endswith(".mask"): continue
            if i % 2:
                message = told({n: t for n, t in file.tensors.items() if n != name})
                assert f"1 tensor does not fit VideoGPT: missing {name}" in message, message
                continue
            shape = stored.shape
            wrong = [(shape[0] + 1, *shape[1:]), (*shape[:-1], shape[-1] + 1), (*shape, 2)][i % 3] if shape else (3,)
            message = told({**file.tensors, name: stored._replace(shape=wrong)})
            assert f"1 tensor does not fit VideoGPT: {name} is {wrong}, expected " in message, message


def test_all_problems_in_one_message(tmp_path):
    weights = plain.random_weights(plain.gpt_shapes(SMALL))
    gone = ["cond_pos_embd.emb.d_0", "attn_stack.pos_embd.emb.d_1", "fc_in.weight", "vqvae.codebook.N", "attn_stack.attn_nets.0.attn.w_qs.weight"]
    for name in gone: del weights[name]
    weights["norm.g"], weights["vqvae.more"], weights["decoder"] = torch.ones(7), torch.ones(1), torch.ones(2, 2)
    message = refusal(gpt_file(tmp_path / "gpt.ckpt", SMALL, weights))
    assert all(f"missing {name}" in message for name in gone) and "8 tensors" in message
    assert "unexpected vqvae.more" in message and "unexpected decoder" in message and "norm.g is (7,), expected (12,)" in message


def test_vqvae_that_halves_only_once(tmp_path):
    "The original builds its last convolution for 3 channels there, which cannot run; with the right shape the model is a good one."
    case = SMALL.but(downsample=(2, 2, 2), length=8)
    weights = plain.random_weights(plain.vqvae_shapes(case))
    args = plain.vqvae_arguments(case)
    model = load_vqvae(plain.write_checkpoint(tmp_path / "good.ckpt", weights, args))
    clip = torch.rand(1, 3, 8, 16, 16) - 0.5
    torch.testing.assert_close(model.encode_continuous(clip), plain.vqvae_encode(weights, clip, (2, 2, 2))[0], atol=2e-5, rtol=0)
    weights["encoder.conv_last.conv.weight"] = torch.ones(4, 3, 3, 3, 3)
    message = refusal(plain.write_checkpoint(tmp_path / "original.ckpt", weights, args), load_vqvae)
    assert "1 tensor does not fit VQVAE: encoder.conv_last.conv.weight is (4, 3, 3, 3, 3), expected (4, 4, 3, 3, 3)" in message


@pytest.mark.parametrize("args", [dict(downsample=None), dict(downsample=(4, 4)), dict(downsample=(3, 3, 3)), dict(downsample=(2, 2, 2)),
                                  dict(downsample="444"), dict(downsample=(4, 4, "x")), dict(downsample=())], ids=str)
def test_vqvae_arguments_that_make_no_model(tmp_path, args):
    path = plain.write_checkpoint(tmp_path / "vqvae.ckpt", plain.random_weights(plain.vqvae_shapes(SMALL)), plain.vqvae_arguments(SMALL, **args))
    assert "downsamp" in refusal(path, load_vqvae)


# ---- damaged files
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_cut_off_anywhere(tmp_path, legacy):
    whole = gpt_file(tmp_path / "whole.ckpt", optimizer=False, legacy=legacy).read_bytes()
    path = tmp_path / "cut.ckpt"
    lengths = {*range(0, 40), *range(0, len(whole), len(whole) // 60), *(len(whole) - n for n in (1, 2, 10, 22, 100, 1000))}
    named = 0
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        named += bool(re.search(r": (vqvae|resnet|attn_stack|norm|fc_)\S+: damaged or cut off", refusal(path)))
    assert named > 10 if legacy else named == 0  # a zip archive has its index at the end: without it there are no names


def test_damaged_numbers_name_their_tensor(tmp_path):
    weights = plain.random_weights(plain.gpt_shapes(SMALL))
    path = gpt_file(tmp_path / "gpt.ckpt", SMALL, weights, optimizer=False)
    data = bytearray(path.read_bytes())
    at = data.index(weights["fc_out.weight"].numpy().tobytes())
    data[at + 5] ^= 1
    path.write_bytes(data)
    assert "fc_out.weight: damaged or cut off" in refusal(path)


@pytest.mark.parametrize("content", [b"", b"P", b"PK", b"\x80", b"\x80\x02.", b"hello", b"\x80\x02N.", b"(lp0\n.", bytes(1000), b"PK\x05\x06" + bytes(18),
                                     pickle.dumps({"state_dict": {"a": 1}}), pickle.dumps(0x1950A86A20F9469CFC6C) + pickle.dumps(1001),
                                     pickle.dumps(0x1950A86A20F9469CFC6C) + pickle.dumps(1001) + pickle.dumps([])], ids=str)
def test_files_that_are_no_checkpoint(tmp_path, content):
    (tmp_path / "odd.ckpt").write_bytes(content)
    for load in (load_videogpt, load_vqvae): assert "not a readable checkpoint" in refusal(tmp_path / "odd.ckpt", load)


# ---- hostile files
class Call:
    "Pickles as the call of a function."
    def __init__(self, function, *args): self.call = function, args
    def __reduce__(self): return self.call


class Build:
    "Pickles as an object whose state is set by a call."
    def __init__(self, function, *args): self.call = function, args
    def __reduce__(self): return collections.OrderedDict, (), Call(self.call[0], *self.call[1])


class Item:
    "Pickles as a dict that gets its entries from calls."
    def __init__(self, function, *args): self.call = function, args
    def __reduce__(self): return collections.OrderedDict, (), None, None, iter([(1, Call(self.call[0], *self.call[1]))])


def attacks(trap):
    write = f"open({str(trap)!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch {trap}"),
        "eval": Call(builtins.eval, write),
        "exec": Call(builtins.exec, write),
        "open": Call(builtins.open, str(trap), "w"),
        "popen": Call(subprocess.Popen, ["touch", str(trap)]),
        "check_output": Call(subprocess.check_output, ["touch", str(trap)]),
        "mkdir": Call(os.mkdir, str(trap)),
        "save": Call(torch.save, {}, str(trap)),
        "runpy": Call(runpy.run_path, str(trap.parent / "code.py")),
        "partial": Call(functools.partial(os.system, f"touch {trap}")),
        "map": Call(list, Call(map, os.system, [f"touch {trap}"])),
        "nested": Call(getattr, Call(__import__, "os"), "system"),
        "nested twice": Call(Call, Call(os.system, f"touch {trap}"), [Call(os.mkdir, str(trap))]),
        "as a state": Build(os.system, f"touch {trap}"),
        "as an entry": Item(os.system, f"touch {trap}"),
        "storage": Call(torch._utils._rebuild_tensor_v2, Call(os.system, f"touch {trap}"), 0, (2,), (1,), False, Call(os.mkdir, str(trap))),
        "hooks": Call(torch._utils._rebuild_parameter, Call(os.mkdir, str(trap)), True, Call(os.system, f"touch {trap}")),
        "load": Call(torch.load, str(trap.parent / "inner.ckpt"), None, None),
        "from file": Call(torch.from_file, str(trap), True, 4),
    }


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("position", ["state_dict", "a tensor", "args", "an argument", "callbacks", "optimizer", "root"])
def test_hostile_pickles_create_nothing(tmp_path, position, legacy):
    home, trap = tmp_path / "home", tmp_path / "trap"
    home.mkdir()
    (tmp_path / "code.py").write_text(f"open({str(trap)!r}, 'w')")
    weights = plain.random_weights(plain.vqvae_shapes(SMALL))
    path, refused = home / "bad.ckpt", set()
    for name, attack in attacks(trap).items():
        content = {"state_dict": weights, "callbacks": {}, "optimizer_states": [], "hyper_parameters": {"args": plain.vqvae_arguments(SMALL)}}
        if position == "state_dict": content["state_dict"] = attack
        if position == "a tensor": content["state_dict"] = {**weights, "codebook.N": attack}
        if position == "args": content["hyper_parameters"] = {"args": attack}
        if position == "an argument": content["hyper_parameters"]["args"].downsample = attack
        if position == "callbacks": content["callbacks"] = {"x": attack}
        if position == "optimizer": content["optimizer_states"] = attack
        if position == "root": content = attack
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        for load in (load_videogpt, load_vqvae):
            try: load(path)
            except ValueError as error:
                assert "bad.ckpt" in str(error) and "\n" not in str(error), name
                if load is load_vqvae: refused.add(name)
        assert not trap.exists() and [p.name for p in home.iterdir()] == ["bad.ckpt"], name
    assert refused == ({"storage"} if position in ("callbacks", "optimizer") else {*attacks(trap)})


def test_the_traps_are_real(tmp_path):
    "Python's own unpickler springs them."
    for name in ("os.system", "eval", "popen", "as a state", "as an entry", "nested twice"):
        trap = tmp_path / "trap"
        try: pickle.loads(pickle.dumps(attacks(trap)[name], protocol=2))
        except Exception: pass
        for _ in range(500):
            if trap.exists(): break
            __import__("time").sleep(0.01)
        assert trap.exists(), name
        trap.rmdir() if trap.is_dir() else trap.unlink()


def test_archives_with_tricks(tmp_path):
    "Names that climb out of the folder, compressed bombs, two indices: nothing is written, and each error is reported."
    home = tmp_path / "home"
    home.mkdir()
    index = pickle.dumps({"state_dict": {"a": 1}})
    bomb = io.BytesIO()
    tricks = {
        "climb": [("../../evil/data.pkl", index), ("../../evil.txt", b"x")],
        "root": [("/data.pkl", index), ("/tmp/evil", b"x")],
        "two": [("a/data.pkl", index), ("b/data.pkl", index)],
        "none": [("a/data.txt", index)],
        "big-endian": [("a/data.pkl", index), ("a/byteorder", b"big")],
    }
    for name, entries in tricks.items():
        path = home / f"{name}.ckpt"
        with zipfile.ZipFile(path, "w") as archive:
            for entry, content in entries: archive.writestr(entry, content)
        assert "not a readable checkpoint" in refusal(path)
        path.unlink()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", index)
        archive.writestr("a/data/0", bytes(50_000_000))
    path = home / "bomb.ckpt"
    path.write_bytes(bomb.getvalue())
    assert "compressed" in refusal(path)
    assert [p.name for p in home.iterdir()] == ["bomb.ckpt"] and [p.name for p in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_small_file_with_big_claims(tmp_path, legacy):
    "Expanded and shared storages claim gigabytes that the file does not have; they are never allocated."
    case = SMALL.but(hidden=3072, cond_frames=0)  # each MLP matrix 150 MB
    row = torch.zeros(())
    with torch.device("meta"): shapes = plain.gpt_shapes(case)
    expanded = {name: row.expand(shape) for name, shape in shapes.items()}
    assert "damaged or cut off" in refusal(gpt_file(tmp_path / "expanded.ckpt", case, expanded, optimizer=False, legacy=legacy))
    block = torch.zeros(300_000)
    shared = {f"attn_stack.attn_nets.{i}.x": block for i in range(10_000)}
    assert "its tensors would take" in refusal(gpt_file(tmp_path / "shared.ckpt", case, shared, optimizer=False, legacy=legacy))


# ---- vpenc's own folders
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
def test_saved_and_loaded(tmp_path, name, dtype, capsys):
    model = load_videogpt(gpt_file(tmp_path / "gpt.ckpt", KINDS[name], optimizer=False))
    model.save_pretrained(tmp_path / "folder", dtype=dtype)
    again = VideoGPT.from_pretrained(tmp_path / "folder")
    assert again.config == model.config
    parameters = dict(model.named_parameters())
    for key, value in again.state_dict().items():
        wanted = model.state_dict()[key]
        if dtype and key in parameters: wanted = wanted.to(dtype).float()
        assert torch.equal(value, wanted), key
    printed = re.search(r"sha256 ([0-9a-f]{64})", capsys.readouterr().out)[1]
    assert printed in (tmp_path / "folder" / "config.json").read_text()
    assert torch.equal(VQVAE.from_pretrained(tmp_path / "folder").codebook.N, model.vqvae.codebook.N)


def test_folder_with_huge_configuration(tmp_path):
    load_videogpt(gpt_file(tmp_path / "gpt.ckpt")).save_pretrained(tmp_path / "folder")
    path = tmp_path / "folder" / "config.json"
    path.write_text(path.read_text().replace('"hidden_dim": 12', '"hidden_dim": 1200000'))
    assert "norm.g is (12,), expected (1200000,)" in refusal(tmp_path / "folder")


def test_convert(tmp_path, capsys):
    weights = plain.random_weights(plain.gpt_shapes(SMALL))
    convert(gpt_file(tmp_path / "gpt.ckpt", SMALL, weights), tmp_path / "out")
    printed = capsys.readouterr().out
    assert_holds(load_videogpt(tmp_path / "out"), weights)
    total = sum(p.numel() for p in load_videogpt(tmp_path / "out").parameters())
    assert f"{total:,}" in printed and re.search("sha256 [0-9a-f]{64}", printed) and "hidden_dim" in printed
    assert "gpt.ckpt" in (tmp_path / "out" / "README.md").read_text()
    plain.write_checkpoint(tmp_path / "v.ckpt", plain.random_weights(plain.vqvae_shapes(SMALL)), plain.vqvae_arguments(SMALL))
    convert(tmp_path / "v.ckpt", tmp_path / "tokens", dtype="bfloat16")
    assert isinstance(load_vqvae(tmp_path / "tokens"), VQVAE)
    with pytest.raises(ValueError, match="dtype"): convert(tmp_path / "v.ckpt", tmp_path / "x", dtype="int8")
    assert not (tmp_path / "x").exists()
