"""Prepare a run: its arguments and folder, the model and its teacher, what trains at which rate, statistics."""

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm.optim
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedConfig,
    TrainingArguments,
)

from ..data.collators import CaptionCollator
from ..data.episodes import EpisodeCollator, ImageEpisodeCollator
from ..data.rows import text_ids
from ..files import write_text
from ..model import QUANT_METHOD, load_plain, require
from ..tables import text_table
from .checkpoints import checkpoints, is_complete, newest_complete
from .data import TrainingData
from .recipe import Recipe, load_recipe, to_dict

# what the order of the rows, the parameters and the optimizer's state in a checkpoint depend on
FIXED = "train replay replay_share revision limit exclude_copyleft seed data_seed learning_rate learning_rates "
FIXED += "trainable config optimizer"


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """Build `TrainingArguments` with our defaults; refuse processes that would each train alone."""
    defaults = {"remove_unused_columns": False, "label_names": ["labels"], "report_to": "none"}
    if recipe.data.stream is not None:
        defaults["ignore_data_skip"] = True  # the stream goes on from its own place
    args = TrainingArguments(**defaults | recipe.training)
    started = int(os.environ.get("WORLD_SIZE", 1))
    problem = f"{started} processes were started, but each would train alone"
    require(args.world_size >= started, f"{problem}: without a GPU set training.use_cpu: true.")
    return args


def check_output(recipe: Recipe, args: TrainingArguments, resume: bool) -> Path | None:
    """Refuse to overwrite a source or another run; find the checkpoint to resume from."""
    output = Path(args.output_dir)
    sources = {"model": recipe.model, "distillation.teacher": recipe.distillation and recipe.distillation.teacher}
    for key, source in sources.items():
        same = source and Path(source).is_dir() and os.path.realpath(source) == os.path.realpath(output)
        require(not same, f"training.output_dir {output} is the folder of {key}, which the run would overwrite.")
    if not resume:
        if any(map(is_complete, checkpoints(output))):
            advice = "--resume goes on with it, or choose another output_dir."
            raise FileExistsError(f"{output} has checkpoints of a run: {advice}")
        return None
    checkpoint, recipe_file = newest_complete(output), output / "recipe.yaml"
    runs = load_recipe(recipe_file) if recipe_file.exists() else recipe, recipe
    values = [vars(TrainingArguments) | vars(run) | vars(run.data) | run.training for run in runs]
    for name in FIXED.split():
        was, now = (run.get(name) for run in values)
        problem = f"{checkpoint} was written with {name} {was!r}; a run goes on exactly with the same only, not with"
        require(was == now, f"{problem} {now!r}: start a new run from it as `model`.")
    return checkpoint


def write_settings(recipe: Recipe, args: TrainingArguments) -> None:
    """Write recipe and training arguments next to the run, without tokens: they are pushed."""
    output = Path(args.output_dir)
    training = {key: value for key, value in recipe.training.items() if not key.endswith("_token")}
    write_text(output / "recipe.yaml", yaml.safe_dump(to_dict(recipe) | {"training": training}, sort_keys=False))
    write_text(output / "training_arguments.json", args.to_json_string())


def change_config(config, values: dict[str, Any]):
    """Change values of a config by dotted name; it is checked like a new one."""
    changed = config.to_dict()
    for name, value in values.items():
        whole = isinstance(getattr(config, name, None), PreTrainedConfig)
        require(not whole, f"config: {name} is a section: name its values one by one, as {name}.NAME.")
        *parents, leaf = name.split(".")
        section = changed
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        require(isinstance(section, dict) and leaf in section, f"config: the model has no {name!r}.")
        section[leaf] = value
    return type(config).from_dict(changed)


def check_patterns(section: str, patterns: Iterable[str], model: torch.nn.Module) -> None:
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        matches = any(re.search(pattern, name) for name in names)
        require(matches, f"{section}: {pattern!r} matches no parameter of the model.")


def set_trainable(model: torch.nn.Module, patterns: list[str]) -> None:
    """Freeze every parameter whose name no pattern matches (`re.search`)."""
    check_patterns("trainable", patterns, model)
    for name, parameter in model.named_parameters():
        trains = any(re.search(pattern, name) for pattern in patterns)
        possible = parameter.is_floating_point() or not trains
        require(possible, f"trainable: {name} is quantised ({parameter.dtype}) and cannot train.")
        parameter.requires_grad_(trains)


def muon_matrices(model) -> set[torch.nn.Parameter]:
    """Collect the matrices of linear layers, but no table of words."""
    head = model.get_output_embeddings()
    return {m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head}


def build_optimizer(trainer, learning_rates: dict[str, float], matrices: set) -> torch.optim.Optimizer:
    """Build the optimizer of a trainer's model; the first pattern of `learning_rates` that matches counts.

    timm's Muon takes `matrices` and AdamW the rest; without matrices it is the one of the arguments.
    """
    model, args = trainer.model, trainer.args
    # parameters that share rate, weight decay and rule
    decay, groups = set(trainer.get_decay_parameter_names(model)), defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = next((rate for p, rate in learning_rates.items() if re.search(p, name)), args.learning_rate)
            groups[rate, name in decay, parameter in matrices].append(parameter)
    if matrices:
        betas = (args.adam_beta1, args.adam_beta2)
        kind, kwargs = timm.optim.Muon, {"lr": args.learning_rate, "betas": betas, "nesterov": True}
    else:
        kind, kwargs = trainer.get_optimizer_cls_and_kwargs(args)
    return kind(
        [
            {"params": parameters, "lr": rate, "weight_decay": args.weight_decay if decays else 0.0}
            | ({"use_fallback": not by_muon} if matrices else {})
            for (rate, decays, by_muon), parameters in groups.items()
        ],
        **kwargs,
    )


def parameter_count(parameter: torch.nn.Parameter) -> int:
    """Count the numbers of a parameter; NF4 packs two into a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def trainable_table(model: torch.nn.Module) -> str:
    """List modules, their parameters, and the share of these that trains."""
    counts = defaultdict(lambda: [0, 0])
    for name, parameter in model.named_parameters():
        for part in (".".join(name.split(".")[:2]), "total"):
            counts[part][0] += parameter_count(parameter)
            counts[part][1] += parameter_count(parameter) * parameter.requires_grad
    parts = sorted(counts, key=lambda part: (part == "total", part))
    rows = [[part, *counts[part], f"{counts[part][1] / counts[part][0]:.1%}"] for part in parts]
    return text_table(["part", "parameters", "trainable", "share"], rows)


@torch.no_grad()
def calibrate_adapter(model, collator: CaptionCollator, rows) -> None:
    """Set the input statistics of adapter and memory from the images of `rows`."""
    model.eval()
    skip = model.model.vision_tower.num_prefix_tokens  # the class token
    features, rows = [], list(rows)
    for start in range(0, len(rows), 32):
        pixel_values = collator(rows[start : start + 32])["pixel_values"].to(model.device)
        features.append(model.get_image_features(pixel_values).last_hidden_state)
    features = torch.cat(features)
    model.model.adapter.calibrate(features[:, skip:].flatten(0, 1))
    if memory := model.model.memory:
        memory.key_encoder.calibrate(memory.key_encoder.pool(features, skip))


def calibrate(model, data: TrainingData, count: int) -> None:
    """Set the statistics of adapter, keys and words, which do not train, of `count` images."""
    rows = data.sample(count) if count else []
    if rows:
        calibrate_adapter(model, data.eval_collator, rows)
    # the memory, from what it is taught
    memory = model.model.memory
    if isinstance(data.collator, EpisodeCollator):
        memory.key_encoder.calibrate(data.collator.pooled.flatten(0, 1))
        memory.calibrate_words(data.collator.story.sentences())
    elif rows and isinstance(data.collator, ImageEpisodeCollator):
        captions = [row["caption"] for row in rows if isinstance(row["caption"], str)]
        memory.calibrate_words(text_ids(data.processor.tokenizer, captions))


def unquantized_modules(model, trainable: list[str]) -> list[str]:
    """List linear layers not to quantise: those that train, adapter, alignment and memory."""
    problem = "quantization: the config makes linears ternary, from weights that NF4 would change."
    advice = "Compose from ternary weights and set config: {qat_config.ternary_modules: null}."
    require(not model.config.qat_config.ternary_modules, f"{problem} {advice}")
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    parts = ("model.vision_tower.", "model.language_model.")
    return [n for n in names if not n.startswith(parts) or any(re.search(p, f"{n}.weight") for p in trainable)]


def load_model(recipe: Recipe):
    """Load processor and model of a recipe, packed weights unpacked, ready to train."""
    # config, with the recipe's changes
    source = {"trust_remote_code": True, "revision": recipe.revision}
    processor = AutoProcessor.from_pretrained(recipe.model, **source)
    config = change_config(AutoConfig.from_pretrained(recipe.model, **source), recipe.config)
    if recipe.attn_implementation:
        source["attn_implementation"] = recipe.attn_implementation
    # packed checkpoints train unpacked, bitsandbytes' weights stay as they are
    stored = getattr(config, "quantization_config", None) or {}
    packed = (stored if isinstance(stored, dict) else stored.to_dict()).get("quant_method") == QUANT_METHOD
    if recipe.quantization is not None:
        advice = "unpack it with model.dequantize(), save that, and give its folder to `quantization`."
        require(not packed, f"{recipe.model} is packed: {advice}")
        with torch.device("meta"):
            empty = AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
        skip = unquantized_modules(empty, recipe.trainable)
        source["quantization_config"] = BitsAndBytesConfig(llm_int8_skip_modules=skip, **recipe.quantization)
    # weights
    model = AutoModelForImageTextToText.from_pretrained(recipe.model, config=config, dtype=torch.float32, **source)
    if packed:
        model = model.dequantize(torch.float32)
        print(f"{recipe.model} is packed: its weights were unpacked to train", flush=True)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # an evaluation would repack its weights for evaluations alone
    set_trainable(model, recipe.trainable)
    return processor, model


def load_teacher(recipe: Recipe, model):
    """Load the teacher of `distillation`, or None."""
    if recipe.distillation is None:
        return None
    teacher = load_plain(recipe.distillation.teacher)
    # features of one tower go to both models
    key = next((key for key in ("vision_cache", "episodes") if getattr(recipe.data, key) is not None), None)
    if key is not None:
        tower = model.model.vision_tower
        own, other = tower.state_dict(), teacher.model.vision_tower.state_dict()
        same = own.keys() == other.keys() and all(torch.equal(own[name].cpu(), other[name].cpu()) for name in own)
        frozen = not any(p.requires_grad for p in tower.parameters())
        problem = "distillation.teacher has another vision tower than the model, whose features"
        require(same and frozen, f"{problem} data.{key} gives to both: leave data.{key} out.")
    return teacher
