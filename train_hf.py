"""Train MicroVLM: one recipe, one run.

    python train_hf.py recipes/nano_stage1.yaml
    python train_hf.py recipes/nano_stage1.yaml --set training.max_steps=20 --set training.output_dir=runs/try

A recipe is a YAML file with a section per part (`RECIPE_KEYS` below): which checkpoint to start from, which parameters
train, which data, which losses at which weight, and `training`, handed to `TrainingArguments` as it is. Unknown keys
are refused. A stage is a recipe; the next stage names the output of the one before in `model`.

The loss is a weighted sum of named parts (`LOSSES`), composed in `MicroVLMTrainer.compute_loss` and logged apart: language modelling
and alignment in stage 1; with `data.episodes` also those of the memory.
"""

import argparse
import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm.optim
import torch
import torch.nn.functional as F
import yaml
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from data_microvlm import (
    CaptionCollator,
    EpisodeCollator,
    FeatureCollator,
    cache_vision_features,
    gray_copy,
    load_rows,
    picture_augmentation,
)

logger = logging.getLogger("train_hf")

RECIPE_KEYS = {
    "model": "checkpoint to start from, a folder or Hub id",
    "revision": "its revision on the Hub",
    "config": "values of the model's config to change, by dotted name: use_memory, memory_config.num_slots, ...",
    "trainable": "regular expressions on parameter names; a parameter trains when one matches",
    "attn_implementation": "of the language model: eager trains faster than sdpa on a CPU",
    "compile": "modules that run through torch.compile, by name",
    "optimizer": "muon: Muon on the weights of linear layers, AdamW on the rest; default: training.optim",
    "learning_rates": "regular expression -> learning rate, for parts that differ from training.learning_rate",
    "calibration_rows": "standardise the adapter's input with statistics of so many training pictures; 0: keep",
    "loss_weights": "lm, align, and with episodes memory_kl, address_kl, reconstruction, scope, key",
    "data": "train, validation (path), format, exclude_copyleft, image_size, augmentation, max_unreadable_share, limit, "
    "vision_cache (views, folder: keep the features of a frozen vision tower), "
    "episodes (groups, sizes, shares, names, key_pairs: teach the memory, see EpisodeCollator)",
    "training": "TrainingArguments",
}
DATA_KEYS = {
    "train",
    "validation",
    "format",
    "exclude_copyleft",
    "image_size",
    "augmentation",
    "max_unreadable_share",
    "limit",
    "vision_cache",
    "episodes",
}
EPISODE_INPUTS = (
    "support_features",
    "support_tokens",
    "support_active",
    "target_tokens",
    "known",
    "key_features",
)
LOSSES = ("lm", "align", "memory_kl", "address_kl", "reconstruction", "scope", "key")


class RecipeLoader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but `1e-4` is a number, not a text."""


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def check_keys(section: str, given: dict, known) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"unknown key in {section}: {', '.join(unknown)}. Known: {', '.join(sorted(known))}.")


def load_recipe(path: str, overrides: list[str] = ()) -> dict[str, Any]:
    """A recipe with `section.key=value` overrides (YAML values) applied.

    Raises:
        ValueError: unknown or missing keys, or an override without `=`.
    """
    recipe = yaml.load(Path(path).read_text(), RecipeLoader)
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, got {override!r}.")
        *parents, leaf = name.split(".")
        section = recipe
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = yaml.load(value, RecipeLoader)
    check_keys(path, recipe, RECIPE_KEYS)
    for key in ("model", "trainable", "data", "training"):
        if key not in recipe:
            raise ValueError(f"{path} has no {key!r}: {RECIPE_KEYS[key]}.")
    check_keys("data", recipe["data"], DATA_KEYS)
    if "train" not in recipe["data"]:
        raise ValueError(f"{path} has no data.train: the training data.")
    if recipe.get("optimizer") not in (None, "muon"):
        raise ValueError(f"optimizer {recipe['optimizer']!r} is not muon; others go by training.optim.")
    if (cache := recipe["data"].get("vision_cache")) and set(cache) != {"views", "folder"}:
        raise ValueError(f"data.vision_cache takes views and folder, got {', '.join(sorted(cache))}.")
    if recipe["data"].get("episodes") and not cache:
        raise ValueError("data.episodes needs data.vision_cache: memories are trained on kept features.")
    check_keys("loss_weights", recipe.setdefault("loss_weights", {"lm": 1.0, "align": 0.0}), LOSSES)
    return recipe


def change_config(config, values: dict[str, Any]):
    """A config with values changed by dotted name, checked as a new one is.

    Raises:
        ValueError: a name the config does not have, or a value it refuses.
    """
    changed = config.to_dict()
    for name, value in values.items():
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
        parameter.requires_grad_(any(re.search(pattern, name) for pattern in patterns))


def trainable_table(model: torch.nn.Module) -> str:
    """A line per module: parameters, and the share of them that trains."""
    rows = defaultdict(lambda: [0, 0])
    for name, parameter in model.named_parameters():
        part = ".".join(name.split(".")[:2])
        for key in (part, "total"):
            rows[key][0] += parameter.numel()
            rows[key][1] += parameter.numel() * parameter.requires_grad
    lines = [f"{'part':<24}{'parameters':>14}{'trainable':>14}{'share':>8}"]
    for part in sorted(rows, key=lambda p: (p == "total", p)):
        count, trains = rows[part]
        lines.append(f"{part:<24}{count:>14,}{trains:>14,}{trains / count:>8.1%}")
    return "\n".join(lines)


@torch.no_grad()
def calibrate_adapter(model, collator: CaptionCollator, rows) -> None:
    """Set the adapter's input statistics from the vision features of `rows`, read as `collator` reads them."""
    features = []
    model.eval()
    skip = model.model.vision_tower.timm_model.num_prefix_tokens  # the class token
    for start in range(0, len(rows), 32):
        pixel_values = collator(list(rows.select(range(start, min(start + 32, len(rows))))))["pixel_values"]
        features.append(model.get_image_features(pixel_values).last_hidden_state[:, skip:].flatten(0, 1))
    model.model.adapter.calibrate(torch.cat(features))


def labelled_logits(labels: torch.Tensor) -> dict[str, Any]:
    """Arguments of `forward` that spare the logits before the first position with a label, in labels (B, T)."""
    labelled = torch.nonzero((labels != -100).any(0)).flatten()
    if not len(labelled) or labelled[0] == 0:
        return {}
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    keep = labels.shape[1] - int(labelled[0]) + 1
    return {"logits_to_keep": keep, "shift_labels": shifted[:, -keep:].contiguous()}


class EpochCallback(TrainerCallback):
    """Tells the collator the epoch, for its augmentation."""

    def __init__(self, collator: CaptionCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.set_epoch(int(state.epoch))


class MicroVLMTrainer(Trainer):
    """`Trainer` whose loss is a weighted sum of the model's named parts, each logged apart.

    Args:
        loss_weights: weight per part; a part with weight 0 is not computed.
        learning_rates: regular expression on parameter names -> learning rate; the first that matches counts.
        eval_collator: collator of the evaluation data (no augmentation); default: the training one.
        muon: Muon (timm's) on the weights of linear layers, AdamW on the rest, instead of `args.optim`.

    Raises:
        ValueError: a pattern of `learning_rates` that matches no parameter.
    """

    def __init__(
        self,
        *args,
        loss_weights: dict[str, float],
        learning_rates: dict[str, float] | None = None,
        eval_collator=None,
        muon: bool = False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.eval_collator = eval_collator or self.data_collator
        self.loss_weights = loss_weights
        self.learning_rates = learning_rates or {}
        self.muon = muon
        check_patterns("learning_rates", self.learning_rates, self.model)
        self.parts = defaultdict(lambda: [0.0, 0])  # sum and count since the last log, per training or evaluation part

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        align = self.loss_weights.get("align", 0.0)
        kwargs = {"return_alignment": True} if align else {}
        extra = {}
        if "support_tokens" in inputs:
            episode = {name: inputs[name] for name in EPISODE_INPUTS}
            inputs = {name: value for name, value in inputs.items() if name not in EPISODE_INPUTS}
            asked = inputs["attention_mask"] * (inputs["labels"] == -100)  # the answer is no part of the question
            kwargs["memory_readout"], extra = self.accelerator.unwrap_model(model).memory_losses(
                inputs["input_ids"], asked, inputs["vision_features"], **episode
            )
        if num_items_in_batch is not None:
            kwargs["num_items_in_batch"] = num_items_in_batch
        if "vision_features" in inputs:
            features = BaseModelOutputWithPooling(last_hidden_state=inputs["vision_features"])
            inputs = {k: v for k, v in inputs.items() if k != "vision_features"}
            if len(features.last_hidden_state):
                kwargs["mm_encoder_outputs"] = {"image": features}
        if model.training:
            kwargs |= {"use_cache": False} | labelled_logits(inputs["labels"])
        speaks = not model.training or align or self.loss_weights.get("lm", 1.0)  # else only the memory's own losses
        outputs = model(**inputs, **kwargs) if speaks else None
        # With num_items_in_batch the LM term is this micro-batch's share of a mean over all tokens of the step, on all
        # ranks. Shares add up over micro-batches, but gradients are averaged over ranks: hence the factor. A term that
        # is a mean over its own micro-batch has to be divided by their number, or it would count that often.
        shared = num_items_in_batch is not None
        steps = self.current_gradient_accumulation_steps if model.training and shared else 1
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices and shared else 1
        parts, loss = {}, 0.0
        if speaks:
            parts["lm"] = outputs.loss * ranks
            loss = self.loss_weights.get("lm", 1.0) * parts["lm"]
        if align:
            alignment = self.accelerator.unwrap_model(model).alignment_loss(outputs)
            if alignment is not None:
                parts["align"] = alignment
                loss = loss + align * alignment / steps
        for name, value in extra.items():
            parts[name] = value
            if weight := self.loss_weights.get(name, 0.0):
                loss = loss + weight * value / steps
        # in the log, a mean over training steps, or over evaluated rows as in Trainer's own eval_loss
        weight = 1 if model.training else len(inputs["input_ids"])
        for name, value in parts.items():
            scale = steps if name == "lm" else 1  # a share back to a mean
            entry = self.parts[("" if model.training else "eval_") + name]
            entry[0] += value.detach().item() * scale * weight
            entry[1] += weight
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        prefix = "eval_" if any(k.startswith("eval_") for k in logs) else ""
        for key in [k for k in self.parts if k.startswith("eval_") == bool(prefix)]:
            total, count = self.parts.pop(key)
            mean = torch.tensor([total, count], device=self.args.device)
            total, count = self.accelerator.reduce(mean, "sum").tolist()
            logs[f"{key}_loss"] = total / count
        super().log(logs, start_time)

    def create_optimizer(self, model=None):
        if self.optimizer is None and (self.learning_rates or self.muon):
            decay = set(self.get_decay_parameter_names(self.model))
            head = self.model.get_output_embeddings()
            linear = {m.weight for m in self.model.modules() if isinstance(m, torch.nn.Linear) and m is not head}
            groups = defaultdict(list)
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    rate = next(
                        (r for p, r in self.learning_rates.items() if re.search(p, name)), self.args.learning_rate
                    )
                    groups[rate, name in decay, self.muon and parameter in linear].append(parameter)
            if self.muon:
                betas = (self.args.adam_beta1, self.args.adam_beta2)
                cls, kwargs = timm.optim.Muon, {"betas": betas, "nesterov": True}
            else:
                cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args)
                kwargs.pop("lr", None)
            self.optimizer = cls(
                [
                    {"params": p, "lr": rate, "weight_decay": self.args.weight_decay if decays else 0.0}
                    | ({"use_fallback": not muon} if self.muon else {})
                    for (rate, decays, muon), p in groups.items()
                ],
                **kwargs,
            )
        return super().create_optimizer(model)

    def get_eval_dataloader(self, eval_dataset=None):
        training, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file; keys:\n" + "; ".join(f"{k}: {v}" for k, v in RECIPE_KEYS.items()))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in output_dir")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    recipe = load_recipe(options.recipe, options.set)
    data = recipe["data"]
    args = TrainingArguments(
        **{"remove_unused_columns": False, "label_names": ["labels"], "report_to": "none"} | recipe["training"]
    )
    set_seed(args.seed)

    source = {"trust_remote_code": True, "revision": recipe.get("revision")}
    processor = AutoProcessor.from_pretrained(recipe["model"], **source)
    if recipe.get("attn_implementation"):
        source["attn_implementation"] = recipe["attn_implementation"]
    config = AutoConfig.from_pretrained(recipe["model"], trust_remote_code=True, revision=recipe.get("revision"))
    model = AutoModelForImageTextToText.from_pretrained(
        recipe["model"], config=change_config(config, recipe.get("config", {})), dtype=torch.float32, **source
    )
    set_trainable(model, recipe["trainable"])
    print(trainable_table(model), flush=True)

    rows = load_rows(data["train"], data.get("format"), data.get("exclude_copyleft", False), data.get("limit"))
    validation = load_rows(data["validation"], data.get("format")) if data.get("validation") else None
    prompt = model.default_prompt(1)[0].tolist()
    augment = None if data.get("augmentation") is None else picture_augmentation(**data["augmentation"])
    collator, plain = (
        CaptionCollator(processor, prompt, a, data.get("image_size"), data.get("max_unreadable_share", 0.01), args.seed)
        for a in (augment, None)
    )
    if recipe.get("calibration_rows"):
        sample = rows.shuffle(seed=args.seed).select(range(min(recipe["calibration_rows"], len(rows))))
        calibrate_adapter(model, plain, sample)
    if data.get("vision_cache"):
        if any(p.requires_grad for p in model.model.vision_tower.parameters()):
            raise ValueError("data.vision_cache needs a frozen vision tower, but `trainable` matches its parameters.")
        transform = json.dumps(data.get("augmentation"), sort_keys=True)
        with args.main_process_first(desc="vision features"):
            features, readable = cache_vision_features(
                model.model.vision_tower, collator, rows, **data["vision_cache"], transform=transform
            )
            gray = None
            if data.get("episodes") and model.config.memory_config.gray_weight:
                copier = CaptionCollator(processor, prompt, gray_copy, data.get("image_size"), seed=args.seed)
                gray, _ = cache_vision_features(
                    model.model.vision_tower, copier, rows, 1, data["vision_cache"]["folder"], "gray"
                )
        if len(readable) < len(rows):
            print(f"{len(rows) - len(readable)} of {len(rows)} training rows could not be read: skipped", flush=True)
        rows = readable
        collator = FeatureCollator(features, processor, prompt)
    if data.get("episodes"):
        if "concept" not in rows.column_names:
            raise ValueError("data.episodes needs a column `concept`: which pictures show the same thing.")
        skip = model.model.vision_tower.timm_model.num_prefix_tokens
        pool = model.model.memory.key_encoder.pool
        pool_all = lambda view: torch.cat([pool(part, skip) for part in view.split(512)])  # noqa: E731
        pooled = torch.stack([pool_all(view) for view in features])
        model.model.memory.key_encoder.calibrate(pooled.flatten(0, 1))
        collator = EpisodeCollator(
            features,
            pooled,
            None if gray is None else pool_all(gray[0]),
            rows["caption"][:],
            rows["concept"][:],
            processor,
            prompt,
            model.config.memory_config.max_content_tokens,
            seed=args.seed,
            **data["episodes"],
        )
        model.model.memory.calibrate_words(collator.sentences())
    for name in recipe.get("compile", []):
        model.get_submodule(name).compile()

    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    trainer = MicroVLMTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=collator,
        eval_collator=plain,
        processing_class=processor,
        callbacks=[EpochCallback(collator)],
        loss_weights=recipe["loss_weights"],
        learning_rates=recipe.get("learning_rates"),
        muon=recipe.get("optimizer") == "muon",
    )
    trainer.train(resume_from_checkpoint=options.resume or None)
    if collator.unreadable:
        print(f"{collator.unreadable} of {collator.seen} training rows could not be read and were skipped", flush=True)
    trainer.save_model()
    (output / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1))


if __name__ == "__main__":
    main()
