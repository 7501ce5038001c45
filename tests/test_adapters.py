"""Models of transformers, diffusers and timm, from folders, through cache, Table 1's row, explorer and latents. Small, random, no download."""
import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import vpenc
from vpenc.data.masks import LabelledFrames, save_labels, split_by_trajectory
from vpenc.data.sim import SimConfig, simulate

ROOT = Path(__file__).resolve().parents[1]
SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, patch_size=16, image_size=64)
DINO = {name: SIZES[name] for name in SIZES if name != "intermediate_size"} | dict(mlp_ratio=2)
VJEPA = dict(DINO, crop_size=64, frames_per_clip=4, pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=1)
del VJEPA["image_size"]
TRANSFORMERS = {  # class -> class of its configuration, sizes, shape of the last hidden state of one 64x64 frame
    "Dinov2Model": ("Dinov2Config", DINO, (1, 24, 4, 4)),
    "Dinov2WithRegistersModel": ("Dinov2WithRegistersConfig", DINO, (1, 24, 4, 4)),
    "DINOv3ViTModel": ("DINOv3ViTConfig", SIZES | dict(num_register_tokens=4), (1, 24, 4, 4)),
    "ViTModel": ("ViTConfig", SIZES, (1, 24, 4, 4)),
    "ViTMAEModel": ("ViTMAEConfig", SIZES, (1, 24, 4, 4)),
    "IJepaModel": ("IJepaConfig", SIZES, (1, 24, 4, 4)),
    "CLIPVisionModel": ("CLIPVisionConfig", SIZES, (1, 24, 4, 4)),
    "SiglipVisionModel": ("SiglipVisionConfig", SIZES, (1, 24, 4, 4)),
    "VideoMAEModel": ("VideoMAEConfig", SIZES | dict(num_frames=4), (2, 24, 4, 4)),
    "TimesformerModel": ("TimesformerConfig", SIZES | dict(num_frames=4), (4, 24, 4, 4)),
    "VivitModel": ("VivitConfig", SIZES | dict(num_frames=4, tubelet_size=[2, 16, 16]), (2, 24, 4, 4)),
    "VJEPA2Model": ("VJEPA2Config", VJEPA, (8, 24, 4, 4)),
}
TWO = dict(down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1)
FOUR = dict(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4)
DIFFUSERS = {
    "AutoencoderKL": (TWO | dict(block_out_channels=(8, 16), up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4), (1, 4, 32, 32)),
    "AutoencoderKLTemporalDecoder": (TWO | dict(block_out_channels=(32, 64)), (1, 4, 32, 32)),
    "AutoencoderKLCogVideoX": (FOUR, (2, 4, 8, 8)),
    "AutoencoderKLWan": (dict(base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1), (2, 4, 8, 8)),
}


@pytest.fixture(scope="module")
def frames(): return np.concatenate([simulate(i, SimConfig(frames=1)).video for i in range(3)])


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    clips = [simulate(i, SimConfig(frames=2)) for i in range(10)]
    number = np.repeat(np.arange(10), 2)
    labelled = LabelledFrames(np.concatenate([clip.video for clip in clips]), np.concatenate([clip.masks for clip in clips]).astype(bool),
                              number, split_by_trajectory(number, dict(train=.5, val=.25, test=.25)), "few")
    path = tmp_path_factory.mktemp("labels") / "few.h5"
    save_labels(labelled, path)
    return path


def saved(kind, folder):
    "A folder of a small random model, and what one frame becomes."
    torch.manual_seed(0)
    if kind in TRANSFORMERS:
        library = pytest.importorskip("transformers")
        if not hasattr(library, kind): pytest.skip(f"this transformers has no {kind}")
        config, sizes, shape = TRANSFORMERS[kind]
        net = getattr(library, kind)(getattr(library, config)(**sizes))
    else:
        library = pytest.importorskip("diffusers")
        options, shape = DIFFUSERS[kind]
        net = getattr(library, kind)(**options)
    net.save_pretrained(folder)
    return folder, shape


@pytest.mark.parametrize("kind", [*TRANSFORMERS, *DIFFUSERS])
def test_every_family(kind, frames, labels, tmp_path):
    "Taps, cache, random twin, and a row of Table 1 of its layer and of its random twin's."
    from vpenc.encoders.features import extract
    from vpenc.experiments.experiment import Experiment, run_experiment
    folder, shape = saved(kind, tmp_path / "model")
    encoder = vpenc.load_encoder(f"hf:{folder}", device="cpu")
    features = extract(encoder, frames, cache=tmp_path / "cache")
    assert tuple(features.values.shape) == (3, *shape) and features.tap == "hf:last"
    assert features.stride == (encoder.span("hf:last") / shape[0], 64 / shape[2], 64 / shape[3])
    assert list((tmp_path / "cache").rglob("*.safetensors"))  # its identity can be told
    again = extract(vpenc.load_encoder(f"hf:{folder}", device="cpu"), frames, cache=tmp_path / "cache")
    assert torch.equal(again.values, features.values) and again.fingerprint == encoder.fingerprint
    assert features.values.std(0).max() > 0  # frames differ
    for name in (f"hf:{folder}:layer[0]", f"random/hf:{folder}"):
        row = Experiment(encoder=name, head="linear1x1", data=str(labels), labels=8, epochs=2)
        result = run_experiment(row, cache=tmp_path / "cache")
        assert 0 <= result["iou"] <= 1 and result["encoder_ms"] > 0 and result["tap"] == ("random/" * name.startswith("random/")) + ("hf:layer[0]" if "layer" in name else "hf:last")
        assert tmp_path / "model/config.json" in row.inputs()


@pytest.mark.parametrize("kind", ["VideoMAEModel", "DINOv3ViTModel", "AutoencoderKL"])
def test_explorer_and_latents(kind, frames, tmp_path):
    from vpenc.encoders.latents import by_depth, encode_taps
    from vpenc.views.explorer import ExploreState, Explorer
    folder, _ = saved(kind, tmp_path / "model")
    view = Explorer(frames, f"hf:{folder}", device="cpu")
    state = ExploreState()
    for _ in view.loading(state): pass
    assert view.taps(state) == {"last": 1, **({"mean": 1} if kind == "VideoMAEModel" else {}), "layer": 3 if kind == "AutoencoderKL" else 2}
    panels = view.views(ExploreState(tap="layer", layer=0))
    assert {"frame", "pca", "similarity", "channel"} <= set(panels) and "layer[0]" in panels["pca"].title and "futures" not in panels
    taps = encode_taps(vpenc.load_encoder(f"hf:{folder}", device="cpu"), frames)
    assert by_depth(taps)[:2] == ["hf:layer[0]", "hf:layer[1]"]


def test_preparation_is_the_processors(tmp_path, frames):
    "The same numbers as from a frame that is prepared by hand with Pillow, from a processor's file."
    from PIL import Image
    folder, _ = saved("DINOv3ViTModel", tmp_path / "model")
    (folder / "preprocessor_config.json").write_text('{"size": {"height": 128, "width": 128}, "resample": 2, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}')
    model = vpenc.load_encoder(f"hf:{folder}", device="cpu").model
    got = model.prepared(torch.from_numpy(frames[:1]).permute(0, 3, 1, 2) / 255)
    by_hand = np.asarray(Image.fromarray(frames[0]).resize((128, 128), Image.Resampling.BILINEAR), np.float32) / 255
    by_hand = (by_hand - [.5, .4, .3]) / [.2, .3, .4]
    assert tuple(got.shape) == (1, 3, 128, 128) and np.abs(got[0].permute(1, 2, 0).numpy() - by_hand).max() < .03  # Pillow rounds to 8 bits


def test_a_damaged_folder_is_refused_in_one_line(tmp_path):
    from safetensors.torch import load_file, save_file
    folder, _ = saved("VideoMAEModel", tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    lost = next(name for name in state if "attention" in name)
    save_file({name: value for name, value in state.items() if name != lost}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights of VideoMAEModel are not in the file") as error: vpenc.load_encoder(f"hf:{folder}")
    assert "\n" not in str(error.value)


def test_importing_vpenc_imports_none_of_it_and_a_missing_extra_is_one_line():
    code = ("import sys, vpenc\n"
            "from vpenc.encoders import adapters, taps\n"
            "from vpenc.experiments.experiment import Experiment\n"
            "taps.tap_names(); Experiment(encoder='hf:facebook/dinov2-base:layer[3]')\n"
            "print(sorted({'transformers', 'diffusers', 'timm'} & set(sys.modules)))\n"
            "sys.modules['transformers'] = sys.modules['timm'] = None\n"
            "import tempfile, pathlib\n"
            "folder = pathlib.Path(tempfile.mkdtemp()); (folder/'config.json').write_text('{\"model_type\": \"dinov2\"}')\n"
            "for name in (f'hf:{folder}', 'timm:resnet18'):\n"
            "    try: vpenc.load_encoder(name)\n"
            "    except ImportError as error: print(error)\n")
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == ["[]", "transformers is missing; pip install 'vpenc[hf]' brings it", "timm is missing; pip install 'vpenc[timm]' brings it"]


def test_timm(tmp_path, frames):
    try: timm = importlib.import_module("timm")
    except Exception as error: pytest.skip(f"timm cannot be imported: {error}")
    from vpenc.encoders.adapters import of_timm
    for name, shape in (("resnet18", (1, 512, 2, 2)), ("vit_tiny_patch16_224", (1, 192, 14, 14))):
        torch.manual_seed(0)
        net = timm.create_model(name, pretrained=False, features_only=True)
        features = vpenc.load_encoder("timm:last", weights=of_timm(net), device="cpu")(frames)
        assert features.values.shape[2] == shape[1] and features.tap == "timm:last" and not features.fingerprint.startswith("unknown")
        twin = vpenc.load_encoder("random/timm:layer[0]", weights=of_timm(net), device="cpu")(frames)
        assert twin.tap == "random/timm:layer[0]"


def test_action_conditioned_futures_are_refused_in_one_line(frames):
    from vpenc.encoders.futures import futures_of
    from vpenc.models.ivideogpt import IVideoGPT, IVideoGPTConfig
    from vpenc.views.explorer import ExploreState, Explorer
    kinds = dict(block_out_channels=(32, 32, 64), layers_per_block=1, latent_channels=8, num_vq_embeddings=16, num_dyn_embeddings=8)
    llama = dict(vocab_size=26, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = IVideoGPT(IVideoGPTConfig(kinds, llama, action_dim=4)).eval()
    with pytest.raises(ValueError, match="action-conditioned model need actions"): futures_of(model)
    view = Explorer(frames, vpenc.load_encoder(model, device="cpu"), device="cpu")
    with pytest.raises(ValueError, match="cannot sample futures: .* need actions") as error:
        for _ in view.preparing(ExploreState(futures=2)): pass
    assert "\n" not in str(error.value) and "pca" in view.views(ExploreState())


def test_the_notebook_that_compares_models(labels, tmp_path):
    "analysis/models with its defaults, on few frames: every family in one table, whose numbers are those of the runs' files."
    import json
    import papermill
    pytest.importorskip("transformers"), pytest.importorskip("diffusers")
    out = tmp_path / "models"
    few = dict(data=str(labels), labels="4,8", seeds="0", test=4, epochs=2, cache=str(tmp_path / "cache"), out=str(out))
    papermill.execute_notebook(ROOT / "nbs/analysis/models.ipynb", tmp_path / "models.ipynb", few, cwd=str(tmp_path), progress_bar=False)
    header, _, *lines = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in (out / "models.md").open()]
    rows = [dict(zip(header, line)) for line in lines]
    assert [row["encoder"].split(" ")[0].split(":")[0] for row in rows] == ["videogpt", "magvit", "ivideogpt", "hf", "hf", "hf", "hf"]
    runs = [json.loads(path.read_text()) for path in out.glob("*.json")]
    found = {tuple(run["experiment"][key] for key in ("encoder", "weights", "labels")): run for run in runs}
    assert len(found) == 7 * 2 * 2 + 2 * 2  # encoders and their twins, floors; 4 and 8 labels
    mine, twin = (found[prefix + "videogpt:resnet:stages", "videogpt-sim", 8] for prefix in ("", "random/"))
    assert rows[0]["IoU"] == f"{mine['iou']:.3f}" and rows[0]["random twin"] == f"{twin['iou']:.3f}"
    assert rows[0]["gain over twin"].startswith(f"{mine['iou'] - twin['iou']:+.3f}")
    assert all((out / f"models.{kind}").stat().st_size > 1000 for kind in ("svg", "png"))
