"""Open a timm vision tower as a part of a composed checkpoint."""

import json
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from transformers.image_utils import PILImageResampling

from .parts import fetch, load_weights

# of a weight file without a config.json next to it: the tower of microvlm/train/distill_vision.py
OWN_TOWER = {"architecture": "deit_tiny_patch16_224", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}


@dataclass
class VisionPart:
    """A timm model without its classifier, and how its images are prepared."""

    architecture: str
    model_args: dict | None
    weights: dict[str, torch.Tensor]
    width: int
    num_patches: int
    image_size: tuple[int, int]
    mean: list[float]
    std: list[float]
    interpolation: str


def read_source(source: str, revision: str | None) -> tuple[dict[str, Any], Path]:
    """Read the config of a folder, Hub repo or weight file, and find its weights.

    Raises:
        ValueError: it has none.
    """
    if os.path.isfile(source):
        config_file = Path(source).with_name("config.json")
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else OWN_TOWER
        return config, Path(source)
    config_file = fetch(source, "config.json", revision)
    weight_file = fetch(source, "model.safetensors", revision) or fetch(source, "pytorch_model.bin", revision)
    if config_file is None or weight_file is None:
        missing = "config.json" if config_file is None else "model.safetensors or pytorch_model.bin"
        raise ValueError(f"--vision {source!r} has no {missing}: expected a timm model in its Hub layout.")
    return json.loads(config_file.read_text(encoding="utf-8")), weight_file


def patch_grid(model: nn.Module, input_size: list[int]) -> tuple[tuple[int, int], int]:
    """Find image size and number of patches of a vision transformer or convnet.

    Raises:
        ValueError: it is neither.
    """
    patch_embed = getattr(model, "patch_embed", None)
    if hasattr(model, "num_prefix_tokens") and hasattr(patch_embed, "num_patches"):
        return tuple(patch_embed.img_size), patch_embed.num_patches
    # a convnet: every place of its last map is a patch
    with torch.inference_mode():
        features = model.eval().forward_features(torch.zeros(1, *input_size))
    if features.ndim != 4 or features.shape[1] != model.num_features:
        raise ValueError("it is neither a vision transformer nor a convnet, whose features have places.")
    return tuple(input_size[1:]), features[0, 0].numel()


def load_vision(source: str, revision: str | None = None) -> VisionPart:
    """Read a vision transformer or a convnet in timm's Hub layout.

    Args:
        source: a folder or Hub repo with `config.json` ({"architecture", "num_classes", "pretrained_cfg"}) and
            `model.safetensors` or `pytorch_model.bin`; or a bare weight file, without a `config.json` next to it a
            DeiT-Tiny of `microvlm/train/distill_vision.py` (mean and std 0.5).
        revision: of the Hub repo.

    Raises:
        ValueError: not that layout, an architecture that timm does not know or whose features have no places, or
            weights that are not those of the architecture.
    """
    config, weight_file = read_source(source, revision)
    architecture = config.get("architecture") or ""
    try:
        model_args = {k: v for k, v in (config.get("model_args") or {}).items() if k != "num_classes"}
        model = timm.create_model(architecture, num_classes=0, **model_args)
        settings = {**model.default_cfg, **config.get("pretrained_cfg", {})}
        PILImageResampling[settings["interpolation"].upper()]
        image_size, num_patches = patch_grid(model, settings["input_size"])
        # the classifier is left out
        classifier = settings.get("classifier") or ()
        classifier = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
        weights = {name: t for name, t in load_weights(weight_file).items() if not name.startswith(classifier)}
        model.load_state_dict(weights)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = textwrap.shorten(str(error), 500)
        raise ValueError(f"--vision {source!r} is no timm model of architecture {architecture!r}: {reason}") from error
    return VisionPart(
        architecture=architecture,
        model_args=model_args or None,
        weights=weights,
        width=model.num_features,
        num_patches=num_patches,
        image_size=image_size,
        mean=list(settings["mean"]),
        std=list(settings["std"]),
        interpolation=settings["interpolation"],
    )
