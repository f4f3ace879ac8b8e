"""Read a training recipe: one YAML file, one run.

The sections are the dataclasses below. Three rules make one set of values out of a file:

1. `base: other.yaml` starts from another file: sections are merged key by key, other values are replaced.
2. `--set section.key=value` comes last; the value is YAML.
3. A key without a value (`null`) is a key left out. An unknown key is refused by its name.
"""

import re
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import BitsAndBytesConfig, TrainingArguments

from ..data.augment import image_augmentation
from .losses import EPISODE_LOSSES, LOSSES

LIST_KEYS = ("trainable", "compile")  # one text is a list of one
DOTTED_KEYS = ("config", "learning_rates")  # sections whose own keys have dots


def option(text: str, default: Any = None, **kwargs) -> Any:
    """Describe an optional key of a recipe."""
    return field(metadata={"help": text}, **(kwargs or {"default": default}))


def required(text: str) -> Any:
    return option(text, MISSING)


@strict
@dataclass(kw_only=True)
class StreamConfig:
    """`data.stream`: read shards as they come."""

    shuffle_buffer: int = option("rows of a block, which is shuffled", 1000)


@strict
@dataclass(kw_only=True)
class VisionCacheConfig:
    """`data.vision_cache`: compute the features of a frozen vision tower once."""

    views: int = required("augmentations of every image")
    folder: str = required("where the features are stored")


@strict
@dataclass(kw_only=True)
class EpisodesConfig:
    """`data.episodes`: teach the memory. `size` is for images as they come, the rest for `data.vision_cache`."""

    size: int | None = option("rows of an episode, of ImageEpisodeCollator")
    groups: int | None = option("memories of a batch, as the rest of EpisodeCollator")
    sizes: list[int] | None = option("smallest and largest number of facts in a memory")
    shares: dict[str, float | int] | None = option("of the kinds of query")
    names: int | None = option("number of invented names")
    key_pairs: int | None = option("images of the contrastive loss of keys")


@strict
@dataclass(kw_only=True)
class DataConfig:
    """`data`: what the run reads."""

    train: str | list[str] = required("the training data: paths, globs, hf:// addresses")
    validation: str | list[str] | None = option("the same for evaluation")
    format: str | None = option("parquet or webdataset; default: from the path")
    revision: str | None = option("of a data set on the Hub")
    exclude_copyleft: bool = option("leave out rows with a copyleft licence", False)
    image_size: int | None = option("side of the images; default: the processor's")
    augmentation: dict[str, float | int] | None = option("arguments of image_augmentation")
    max_unreadable_share: float | int = option("a larger share of unreadable rows ends the run", 0.01)
    max_caption_tokens: int | None = option("longer captions are cut")
    limit: int | None = option("rows of the training data")
    validation_limit: int | None = option("rows of the validation data")
    stream: StreamConfig | None = option("read shards as they come")
    vision_cache: VisionCacheConfig | None = option("store the features of a frozen vision tower")
    episodes: EpisodesConfig | None = option("teach the memory")

    def validate_augmentation(self):
        check_keys("data.augmentation", self.augmentation or {}, signature(image_augmentation).parameters)

    def validate_sources(self):
        if self.stream is not None and self.vision_cache is not None:
            raise ValueError("data.vision_cache stores features of a data set, data.stream stores nothing: choose one.")
        if self.stream is not None and self.exclude_copyleft:
            raise ValueError("data.exclude_copyleft needs all rows at once: not with data.stream.")
        if self.episodes is None:
            return
        known = set(to_dict(self.episodes))
        if self.vision_cache is None and "size" not in known:
            raise ValueError("data.episodes needs data.vision_cache, or a size: episodes of images as they come.")
        check_keys(
            "data.episodes",
            known,
            {"size"} if self.vision_cache is None else {option.name for option in fields(EpisodesConfig)} - {"size"},
        )


@strict
@dataclass(kw_only=True)
class EvaluationConfig:
    """`evaluation`: what an evaluation measures besides the losses."""

    captions: int | None = option("number of fixed validation images that are captioned")
    memory: int | None = option("number of batches of episodes")


@strict
@dataclass(kw_only=True)
class DistillationConfig:
    """`distillation`: learn from another model's logits."""

    teacher: str = required("a checkpoint; for quantisation-aware training the model's own full weights")
    temperature: float | int = option("both sides' logits are divided by it", 1.0)


@strict
@dataclass(kw_only=True)
class Recipe:
    """One run. The next stage names the output of this one in its `model`."""

    model: str = required("checkpoint to start from, a folder or Hub id")
    trainable: list[str] = required("regular expressions on parameter names; a parameter trains when one matches")
    data: DataConfig = required("what the run reads")
    training: dict[str, Any] = required("TrainingArguments")
    revision: str | None = option("of the checkpoint on the Hub")
    config: dict[str, Any] = option("values of the model's config to change, by dotted name", default_factory=dict)
    quantization: dict[str, Any] | None = option("BitsAndBytesConfig for frozen linears of vision tower and decoder")
    attn_implementation: str | None = option("of the language model: eager trains faster than sdpa on a CPU")
    compile: list[str] = option("modules that run through torch.compile", default_factory=list)
    optimizer: Literal["muon"] | None = option("Muon for linear layers, AdamW for the rest; default: training.optim")
    learning_rates: dict[str, float | int] = option("regular expression -> rate of its own", default_factory=dict)
    calibration_rows: int = option("images whose statistics standardise the adapter's input; 0: none", 0)
    loss_weights: dict[str, float | int] = option(
        "weight of every term of the loss", default_factory={"lm": 1.0, "align": 0.0}.copy
    )
    distillation: DistillationConfig | None = option("learn from another model's logits")
    evaluation: EvaluationConfig = option("what an evaluation measures", default_factory=EvaluationConfig)
    max_nonfinite_steps: int = option("as many steps in a row without a finite loss end the run", 3)

    def validate_keys(self):
        check_keys("loss_weights", self.loss_weights, LOSSES)
        check_keys("training", self.training, [option.name for option in fields(TrainingArguments)])
        check_keys("quantization", self.quantization or {}, signature(BitsAndBytesConfig).parameters)

    def validate_losses(self):
        if bool(self.loss_weights.get("distill")) != (self.distillation is not None):
            raise ValueError("loss_weights.distill and distillation.teacher go together.")
        taught = [name for name in EPISODE_LOSSES if self.loss_weights.get(name)]
        if taught and self.data.episodes is None:
            raise ValueError(f"loss_weights: {', '.join(taught)} need data.episodes, which teach the memory.")


class RecipeLoader(yaml.SafeLoader):
    """Read YAML 1.1, but `1e-4` is a number and a repeated key is refused."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_recipe(path: str | Path, overrides: list[str] = ()) -> Recipe:
    """Read a recipe with `section.key=value` overrides.

    Raises:
        ValueError: unknown, missing or repeated keys, values of the wrong type, or sections that exclude each other.
    """
    values = read_recipe(path, overrides)
    for key in LIST_KEYS:
        if isinstance(values.get(key), str):
            values[key] = [values[key]]
    if isinstance(values.get("training"), dict):
        for key, value in values["training"].items():
            if key.endswith("_strategy") and value is False:  # YAML reads `no` as false
                values["training"][key] = "no"
    return build(Recipe, values, str(path))


def read_recipe(path: str | Path, overrides: list[str] = (), derived: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read the values of a recipe of any kind: its base, its own, the overrides."""
    path = Path(path)
    if path in derived:
        raise ValueError(f"{path}: its base leads back to itself.")
    values = parse(path.read_text(), str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no recipe: expected keys with values, got {values!r}.")
    # start from the base
    if base := values.pop("base", None):
        values = merge(read_recipe(path.parent / base, (), (*derived, path)), values)
    for override in overrides:
        set_value(values, override)
    return values


def set_value(values: dict[str, Any], override: str) -> None:
    """Change one value by its dotted name, `section.key=value`."""
    name, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"--set takes key=value, got {override!r}.")
    *parents, leaf = name.split(".", 1 if name.partition(".")[0] in DOTTED_KEYS else -1)
    for parent in parents:
        values[parent] = values = values.get(parent) or {}
        if not isinstance(values, dict):
            raise ValueError(f"--set {name}: {parent} is {values!r}, not a section.")
    values[leaf] = parse(value, f"--set {name}")


def parse(text: str, name: str) -> Any:
    try:
        return yaml.load(text, RecipeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not YAML: {' '.join(str(error).split())}.") from error


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Replace values of `base`; where both have a section, inside it."""
    both = {k: merge(base[k], v) for k, v in changes.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | changes | both


def build(kind: type, values: Any, name: str, prefix: str = "") -> Any:
    """Make a section of a mapping, and the sections inside it.

    Args:
        kind: the section's dataclass.
        name: of the section in messages; `prefix` goes before those of its own sections.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{name} is a section of keys, got {values!r}.")
    options = {option.name: option for option in fields(kind)}
    check_keys(name, values, options)
    values = {key: value for key, value in values.items() if value is not None}
    # required keys and inner sections
    for key, option in options.items():
        if key not in values and option.default is option.default_factory is MISSING:
            raise ValueError(f"{name} has no {key!r}: {option.metadata['help']}.")
        section = next((part for part in (option.type, *get_args(option.type)) if is_dataclass(part)), None)
        if section and key in values:
            values[key] = build(section, values[key], prefix + key, f"{prefix}{key}.")
    # types and what excludes each other
    try:
        return kind(**values)
    except StrictDataclassFieldValidationError as error:
        raise ValueError(f"{name}: {error.__cause__}.") from error
    except StrictDataclassClassValidationError as error:
        raise error.__cause__ from error


def check_keys(section: str, keys: Iterable[str], known: Iterable[str]) -> None:
    unknown = sorted(set(keys) - set(known))
    if unknown:
        raise ValueError(f"unknown key in {section}: {', '.join(unknown)}. Known: {', '.join(sorted(known))}.")


def to_dict(section: Any) -> dict[str, Any]:
    """Turn a section into the mapping it was built of, with its defaults."""
    values = {option.name: getattr(section, option.name) for option in fields(section)}
    return {k: to_dict(v) if is_dataclass(v) else v for k, v in values.items() if v is not None}
