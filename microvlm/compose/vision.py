"""Open a timm vision tower as a part of a composed checkpoint."""

import json
import math
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import timm.models
import torch
from torch import nn
from transformers.image_utils import PILImageResampling
from transformers.utils import cached_file

from ..hub import check_source
from ..model import require

VISION_PREFIX = "model.vision_tower.timm_model."
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


def read_source(source: str, revision: str | None) -> tuple[dict[str, Any], str | Path]:
    """Read the config of a folder, Hub repo or weight file, and find its weights."""
    if os.path.isfile(source):
        config_file = Path(source).with_name("config.json")
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else OWN_TOWER
        return config, Path(source)
    check_source(source)
    config_file = cached_file(source, "config.json", revision=revision)
    require(config_file is not None, "it has no config.json.")
    options = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    names = ("model.safetensors", "pytorch_model.bin")
    weight_file = next(filter(None, (cached_file(source, name, **options) for name in names)), None)
    require(weight_file is not None, "it has neither model.safetensors nor pytorch_model.bin.")
    return json.loads(Path(config_file).read_text(encoding="utf-8")), weight_file


def patch_grid(model: nn.Module, input_size: list[int]) -> tuple[tuple[int, int], int]:
    """Find image size and number of patches of a vision transformer or convnet."""
    patch_embed = getattr(model, "patch_embed", None)
    if hasattr(model, "num_prefix_tokens") and hasattr(patch_embed, "num_patches"):
        return tuple(patch_embed.img_size), patch_embed.num_patches
    # a convnet or a windowed transformer: every place of its last map is a patch
    with torch.inference_mode():
        features = model.eval().forward_features(torch.zeros(1, *input_size))[0]
    if features.ndim == 3 and getattr(model, "output_fmt", "NCHW") == "NCHW":
        features = features.movedim(0, -1)
    *places, width = features.shape
    # places end to end, and no class token among them
    reduction = model.feature_info[-1]["reduction"] if len(places) == 1 and hasattr(model, "feature_info") else 1
    is_map = len(places) == 2 or places == [math.prod(side // reduction for side in input_size[1:])]
    has_places = is_map and width == model.num_features
    require(has_places, "it is neither a vision transformer nor a convnet, whose features have places.")
    return tuple(input_size[1:]), math.prod(places)


def load_vision(source: str, revision: str | None = None) -> VisionPart:
    """Read a vision transformer or a convnet in timm's Hub layout, or `OWN_TOWER` from a bare weight file."""
    try:
        config, weight_file = read_source(source, revision)
        architecture = config.get("architecture") or ""
        model_args = {k: v for k, v in (config.get("model_args") or {}).items() if k != "num_classes"}
        model = timm.create_model(architecture, num_classes=0, **model_args)
        settings = {**model.default_cfg, **config.get("pretrained_cfg", {})}
        PILImageResampling[settings["interpolation"].upper()]
        image_size, num_patches = patch_grid(model, settings["input_size"])
        # the classifier is left out, with what it has of its own
        with torch.device("meta"):
            classifier = timm.create_model(architecture, **model_args).state_dict().keys() - model.state_dict().keys()
        stored = timm.models.load_state_dict(str(weight_file), weights_only=True)
        weights = {name: tensor for name, tensor in stored.items() if name not in classifier}
        model.load_state_dict(weights)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = textwrap.shorten(str(error), 500)
        raise ValueError(f"--vision {source!r} cannot be read as a timm model: {reason}") from error
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
