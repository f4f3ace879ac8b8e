"""Open the model of a recipe and choose what trains."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, PreTrainedConfig

from ..data.collators import CaptionCollator
from ..model import QUANT_METHOD


def change_config(config, values: dict[str, Any]):
    """A config with values changed by dotted name, checked as a new one is.

    Raises:
        ValueError: a name the config does not have, a whole section, or a value it refuses.
    """
    changed = config.to_dict()
    for name, value in values.items():
        if isinstance(getattr(config, name, None), PreTrainedConfig):
            raise ValueError(f"config: {name} is a section: name its values one by one, as {name}.NAME.")
        *parents, leaf = name.split(".")
        section = changed
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if not isinstance(section, dict) or leaf not in section:
            raise ValueError(f"config: the model has no {name!r}.")
        section[leaf] = value
    return type(config).from_dict(changed)


def check_patterns(section: str, patterns: Iterable[str], model: torch.nn.Module) -> None:
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(f"{section}: {pattern!r} matches no parameter of the model.")


def set_trainable(model: torch.nn.Module, patterns: list[str]) -> None:
    """Freeze every parameter whose name no pattern matches (`re.search`).

    Raises:
        ValueError: a pattern that matches no parameter.
    """
    check_patterns("trainable", patterns, model)
    for name, parameter in model.named_parameters():
        trains = any(re.search(pattern, name) for pattern in patterns)
        if trains and not parameter.is_floating_point():
            raise ValueError(f"trainable: {name} is quantised ({parameter.dtype}) and cannot train.")
        parameter.requires_grad_(trains)


def parameter_count(parameter: torch.nn.Parameter) -> int:
    """Numbers that a parameter stands for; NF4 packs two into a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def trainable_table(model: torch.nn.Module) -> str:
    """A line per module: parameters, and the share of them that trains."""
    rows = defaultdict(lambda: [0, 0])
    for name, parameter in model.named_parameters():
        part = ".".join(name.split(".")[:2])
        for key in (part, "total"):
            rows[key][0] += parameter_count(parameter)
            rows[key][1] += parameter_count(parameter) * parameter.requires_grad
    lines = [f"{'part':<24}{'parameters':>14}{'trainable':>14}{'share':>8}"]
    for part in sorted(rows, key=lambda p: (p == "total", p)):
        count, trains = rows[part]
        lines.append(f"{part:<24}{count:>14,}{trains:>14,}{trains / count:>8.1%}")
    return "\n".join(lines)


@torch.no_grad()
def calibrate_adapter(model, collator: CaptionCollator, rows) -> None:
    """Set the input statistics of adapter and memory from the vision features of `rows`, read as `collator` reads them."""
    features = []
    model.eval()
    skip = model.model.vision_tower.num_prefix_tokens  # the class token
    rows = list(rows)
    for start in range(0, len(rows), 32):
        pixel_values = collator(rows[start : start + 32])["pixel_values"].to(model.device)
        features.append(model.get_image_features(pixel_values).last_hidden_state)
    features = torch.cat(features)
    model.model.adapter.calibrate(features[:, skip:].flatten(0, 1))
    if memory := model.model.memory:
        memory.key_encoder.calibrate(memory.key_encoder.pool(features, skip))


def unquantized_modules(model, trainable: list[str]) -> list[str]:
    """Names of the linear layers that stay out of a quantised model: those that train, and all but vision tower and language model.

    Raises:
        ValueError: the language model is ternary.
    """
    if model.config.qat_config.ternary_modules:
        raise ValueError(
            "quantization: the config makes linears ternary, from weights that NF4 would change. Compose from ternary weights and set "
            "config: {qat_config.ternary_modules: null}."
        )
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    parts = ("model.vision_tower.", "model.language_model.")
    trains = lambda name: any(re.search(pattern, f"{name}.weight") for pattern in trainable)  # noqa: E731
    return [name for name in names if not name.startswith(parts) or trains(name)]


def load_model(recipe: dict[str, Any]):
    """Processor and model of a recipe, with its changes of the config; the parameters it names train, packed weights unpacked.

    Raises:
        ValueError: NF4 is asked for on a packed checkpoint.
    """
    source = {"trust_remote_code": True, "revision": recipe.get("revision")}
    processor = AutoProcessor.from_pretrained(recipe["model"], **source)
    config = change_config(AutoConfig.from_pretrained(recipe["model"], **source), recipe.get("config", {}))
    if recipe.get("attn_implementation"):
        source["attn_implementation"] = recipe["attn_implementation"]
    stored = getattr(config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    packed = stored.get("quant_method") == QUANT_METHOD  # bitsandbytes' weights stay as they are
    if (in_4_bits := recipe.get("quantization")) is not None:
        if packed:
            raise ValueError(
                f"{recipe['model']} is packed: unpack it with model.dequantize(), save that, and give its folder to `quantization`."
            )
        with torch.device("meta"):
            empty = AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
        skip = unquantized_modules(empty, recipe["trainable"])
        source["quantization_config"] = BitsAndBytesConfig(llm_int8_skip_modules=skip, **in_4_bits)
    model = AutoModelForImageTextToText.from_pretrained(recipe["model"], config=config, dtype=torch.float32, **source)
    if packed:
        model = model.dequantize(torch.float32)
        print(f"{recipe['model']} is packed: its weights were unpacked to train", flush=True)
    for module in model.modules():
        if hasattr(
            module, "support_avx512bf16_for_cpu"
        ):  # a pass without gradient would repack its weights for such passes alone
            module.support_avx512bf16_for_cpu = False
    set_trainable(model, recipe["trainable"])
    return processor, model


def check_teacher(data: dict[str, Any], model, teacher) -> None:
    """Refuse a teacher that would be given features of another vision tower than its own.

    Raises:
        ValueError: it has other weights, or the student's do not stay as they are.
    """
    key = next((key for key in ("vision_cache", "episodes") if data.get(key)), None)
    if key is None:
        return
    own, other = (m.model.vision_tower.state_dict() for m in (model, teacher))
    same = own.keys() == other.keys() and all(torch.equal(own[name].cpu(), other[name].cpu()) for name in own)
    if not same or any(p.requires_grad for p in model.model.vision_tower.parameters()):
        raise ValueError(
            f"distillation.teacher has another vision tower than the model, whose features data.{key} gives to both: leave data.{key} out."
        )
