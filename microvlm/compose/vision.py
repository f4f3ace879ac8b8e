"""Open a timm vision tower as a part of a composed checkpoint."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from transformers.image_utils import PILImageResampling

from .parts import fetch, load_weights

DEFAULT_ARCHITECTURE = "deit_tiny_patch16_224"  # of a weight file without a config.json beside it: our distilled tower


@dataclass
class VisionPart:
    """A timm model: its weights under timm's names without the classifier, and how its pictures are prepared."""

    architecture: str
    model_args: dict | None
    weights: dict[str, torch.Tensor]
    width: int
    num_patches: int
    image_size: tuple[int, int]
    mean: list[float]
    std: list[float]
    interpolation: str


def load_vision(source: str, revision: str | None = None) -> VisionPart:
    """Read a vision transformer or a convnet in timm's Hub layout.

    Args:
        source: a folder or Hub repo with `config.json` ({"architecture", "num_classes", "pretrained_cfg"}) and
            `model.safetensors` or `pytorch_model.bin`; or a bare weight file, which without a `config.json` beside it
            is taken for a DeiT-Tiny of `scripts/distill_vision.py` (mean and std 0.5).
        revision: of the Hub repo.

    Raises:
        ValueError: not that layout, an architecture that timm does not know or whose features have no places, or
            weights that are not those of the architecture.
    """
    if os.path.isfile(source):
        weight_file = Path(source)
        config_file = weight_file.with_name("config.json")
        config_file = config_file if config_file.is_file() else None
        config = {"architecture": DEFAULT_ARCHITECTURE, "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    else:
        config_file = fetch(source, "config.json", revision)
        weight_file = fetch(source, "model.safetensors", revision) or fetch(source, "pytorch_model.bin", revision)
        if config_file is None:
            raise ValueError(f"--vision {source!r} has no config.json: expected a timm model in its Hub layout.")
        if weight_file is None:
            raise ValueError(f"--vision {source!r} has neither model.safetensors nor pytorch_model.bin.")
    if config_file is not None:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    architecture = config.get("architecture")
    if not architecture:
        raise ValueError(
            f"--vision {source!r}: config.json has no 'architecture', so this is no timm model. "
            'Expected {"architecture": "deit_tiny_patch16_224", "num_classes": 1000, "pretrained_cfg": {...}}.'
        )
    if not timm.is_model(architecture):
        raise ValueError(f"--vision {source!r}: timm {timm.__version__} has no architecture {architecture!r}.")

    skeleton = timm.create_model(architecture, num_classes=0, **(config.get("model_args") or {}))
    pretrained = {**skeleton.default_cfg, **config.get("pretrained_cfg", {})}
    patch_embed = getattr(skeleton, "patch_embed", None)
    if hasattr(skeleton, "num_prefix_tokens") and hasattr(patch_embed, "num_patches"):
        image_size, num_patches = tuple(patch_embed.img_size), patch_embed.num_patches
    else:  # a convnet: every place of its last map is a patch
        image_size = tuple(pretrained["input_size"][1:])
        with torch.inference_mode():
            features = skeleton.eval().forward_features(torch.zeros(1, 3, *image_size))
        if features.ndim != 4 or features.shape[1] != skeleton.num_features:
            raise ValueError(
                f"--vision {source!r}: {architecture!r} is neither a vision transformer nor a convnet, whose features have places."
            )
        num_patches = features[0, 0].numel()
    if pretrained["interpolation"].upper() not in PILImageResampling.__members__:
        raise ValueError(f"--vision {source!r}: unknown interpolation {pretrained['interpolation']!r}.")

    weights = load_weights(weight_file)
    classifier = pretrained.get("classifier") or ()
    classifier = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(classifier)}
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != expected:
        shapes = [
            f"{n} is {found[n]}, expected {expected[n]}" for n in expected if n in found and found[n] != expected[n]
        ]
        raise ValueError(
            f"--vision {source!r}: the weights are not those of {architecture!r}: "
            + "; ".join(
                f"{len(names)} {what} (such as {names[0]})"
                for what, names in (
                    ("tensors are missing", sorted(expected.keys() - found)),
                    ("tensors do not belong there", sorted(found.keys() - expected)),
                    ("tensors have another shape", shapes),
                )
                if names
            )
        )
    return VisionPart(
        architecture=architecture,
        model_args=config.get("model_args"),
        weights=weights,
        width=skeleton.num_features,
        num_patches=num_patches,
        image_size=image_size,
        mean=list(pretrained["mean"]),
        std=list(pretrained["std"]),
        interpolation=pretrained["interpolation"],
    )
