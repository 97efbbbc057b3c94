"""What layers are called in LoRA files, in three layouts.

    diffusers   transformer.LAYER.lora_A.weight, .lora_B.weight; the scale is declared in the metadata
    kohya       lora_unet_PUBLISHED_LAYER.lora_down.weight, .lora_up.weight, .alpha; CLIP's begin with lora_te1_
    comfyui     diffusion_model.PUBLISHED.LAYER.lora_down.weight, ...; CLIP's with text_encoders.clip_l.transformer.

Files of other programs mix them: published names without a prefix, lora_A and lora_B under them, diffusers' names with
.alpha.  All of these are read.
"""

from collections.abc import Iterable
from typing import NamedTuple

from pipeline.flux import published

LAYOUTS = ("diffusers", "kohya", "comfyui")
TRANSFORMER, CLIP = "transformer", "text_encoder"
PREFIXES = {
    "diffusers": {TRANSFORMER: "transformer.", CLIP: "text_encoder."},
    "kohya": {TRANSFORMER: "lora_unet_", CLIP: "lora_te1_"},
    "comfyui": {TRANSFORMER: "diffusion_model.", CLIP: "text_encoders.clip_l.transformer."},
}
DOWN, UP = {"diffusers": ".lora_A.weight"}, {"diffusers": ".lora_B.weight"}
DOWN |= dict.fromkeys(("kohya", "comfyui"), ".lora_down.weight")
UP |= dict.fromkeys(("kohya", "comfyui"), ".lora_up.weight")
ALPHA = ".alpha"
ENDINGS = {ending: role for role, endings in (("down", DOWN), ("up", UP)) for ending in endings.values()}
ENDINGS[ALPHA] = "alpha"

MOST_CLIP_LAYERS = 64
"""CLIP-L has 12."""


class Place(NamedTuple):
    """Where a change belongs.  layer: diffusers' name, or the published one where ``is_published``."""

    component: str
    layer: str
    is_published: bool


def parts_of(key: str) -> tuple[str, str] | None:
    """The stem of a tensor's name, and "down", "up" or "alpha"; None where it is nothing of a LoRA's."""
    for ending, role in ENDINGS.items():
        if key.endswith(ending):
            return key.removesuffix(ending), role
    return None


class Places:
    """Where stems of LoRA files belong, for a transformer with these layers."""

    def __init__(self, layers: Iterable[str]):
        self._layers = set(layers)
        own = published.names(self._layers)
        self._published = {spelled(name): name for name in own} | {name: name for name in own}
        clip = [f"text_model.encoder.layers.{n}.{part}" for n in range(MOST_CLIP_LAYERS) for part in _clip_parts()]
        self._clip = {spelled(name): name for name in clip} | {name: name for name in clip}

    def find(self, stem: str) -> Place | None:
        """None where the model has no such layer."""
        for layout, prefixes in PREFIXES.items():
            for component, prefix in prefixes.items():
                if stem.startswith(prefix):
                    return self._placed(component, stem.removeprefix(prefix), layout)
        return self._placed(TRANSFORMER, stem, "diffusers") or self._placed(TRANSFORMER, stem, "comfyui")

    def _placed(self, component: str, short: str, layout: str) -> Place | None:
        if component == CLIP:
            return Place(CLIP, self._clip[short], False) if short in self._clip else None
        if layout == "diffusers":
            return Place(TRANSFORMER, short, False) if short in self._layers else None
        return Place(TRANSFORMER, self._published[short], True) if short in self._published else None


def _clip_parts() -> Iterable[str]:
    yield from (f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj"))
    yield from ("mlp.fc1", "mlp.fc2")


def spelled(name: str) -> str:
    """A layer's name as kohya's layout has it."""
    return name.replace(".", "_")


def stem(layout: str, component: str, layer: str) -> str:
    """What a layer's tensors begin with."""
    return PREFIXES[layout][component] + (spelled(layer) if layout == "kohya" else layer)
