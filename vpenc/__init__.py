"""Turn a video prediction model into a visual encoder, and measure honestly what its latents know.

The names below are what one types most; each is imported when it is first used, so `import vpenc` itself is quick.
Everything else is reached through its module: `vpenc.data`, `models`, `training`, `encoders`, `probing`, `experiments`, `views`.
"""
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .data.masks import LabelledFrames as LabelledFrames
    from .data.sim import simulate as simulate
    from .data.video import ClipStore as ClipStore
    from .encoders.taps import load_encoder as load_encoder
    from .experiments.experiment import Experiment as Experiment
    from .models.checkpoints import load_magvit as load_magvit, load_videogpt as load_videogpt, load_vqvae as load_vqvae
    from .probing.probe import fit_probe as fit_probe
    from .views.explore import explore as explore
    from .views.label import label as label

_HOME = {  # public name -> the module that defines it
    "load_encoder": "encoders.taps", "load_videogpt": "models.checkpoints", "load_vqvae": "models.checkpoints",
    "load_magvit": "models.checkpoints", "fit_probe": "probing.probe", "Experiment": "experiments.experiment", "simulate": "data.sim",
    "LabelledFrames": "data.masks", "ClipStore": "data.video", "explore": "views.explore", "label": "views.label",
}
__all__ = [*_HOME]


if not TYPE_CHECKING:  # or a type checker would take any name
    def __getattr__(name: str):
        "The public name, imported on first use (PEP 562)."
        if name not in _HOME: raise AttributeError(f"module 'vpenc' has no attribute {name!r}; the public names are {', '.join(_HOME)}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        return value


def __dir__(): return sorted({*globals(), *_HOME})
