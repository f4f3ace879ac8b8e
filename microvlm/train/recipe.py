"""Read a training recipe: one YAML file, one run.

The sections are the dataclasses below. `--set section.key=value` changes a value; the value is YAML. A key without a
value (`null`) is a key left out. An unknown key is refused by its name.
"""

from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import BitsAndBytesConfig, TrainingArguments

from ..data.augment import image_augmentation
from ..data.layouts import is_remote
from ..model import require
from ..recipes import check_keys, check_types, read_recipe
from .losses import EPISODE_LOSSES, LOSSES

LIST_KEYS = ("trainable", "compile")  # one text is a list of one


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
    """`data.episodes`: teach the memory. `size` is for images as they come, `texts` for both, the rest for features."""

    size: int | None = option("rows of an episode, of ImageEpisodeCollator")
    groups: int | None = option("memories of a batch, as the rest of EpisodeCollator")
    sizes: list[int] | None = option("smallest and largest number of facts in a memory")
    shares: dict[str, float | int] | None = option("of the kinds of query")
    names: int | None = option("number of invented names")
    texts: str | None = option("a file of sentences to teach, one a line; default: captions, forms with names")
    key_pairs: int | None = option("images of the contrastive loss of keys")


@strict
@dataclass(kw_only=True)
class DataConfig:
    """`data`: what the run reads."""

    train: str | list[str] = required("the training data: paths, globs, hf:// addresses")
    validation: str | list[str] | None = option("the same for evaluation")
    revision: str | None = option("of a data set on the Hub")
    exclude_copyleft: bool = option("leave out rows with a copyleft licence", False)
    augmentation: dict[str, float | int] | None = option("arguments of image_augmentation")
    max_unreadable_share: float | int = option("a larger share of unreadable rows ends the run", 0.01)
    max_caption_tokens: int | None = option("longer captions are cut")
    limit: int | None = option("rows of the training data")
    validation_limit: int | None = option("rows of the validation data")
    replay: str | list[str] | None = option("images of what the model knows, mixed in so that it is not forgotten")
    replay_share: float | int = option("their share of the rows", 0.5)
    stream: StreamConfig | None = option("read shards as they come")
    vision_cache: VisionCacheConfig | None = option("store the features of a frozen vision tower")
    episodes: EpisodesConfig | None = option("teach the memory")

    def validate_sources(self):
        check_keys("data.augmentation", self.augmentation or {}, signature(image_augmentation).parameters)
        stream, cache, episodes = self.stream, self.vision_cache, self.episodes
        remote, limited = is_remote(self.validation or ""), self.validation_limit is not None
        problems = {
            "vision_cache stores features of a data set, data.stream stores nothing: choose one.": stream and cache,
            "replay needs all rows at once: not with data.stream.": stream and self.replay,
            "replay_share is between 0 and 1.": not 0 < self.replay_share < 1,
            "exclude_copyleft needs all rows at once: not with data.stream.": stream and self.exclude_copyleft,
            "train on the Hub is read as a stream: set data.stream, or download its files first.": (
                is_remote(self.train) and not stream
            ),
            "validation on the Hub needs data.validation_limit: its rows are kept on the disk.": remote and not limited,
            "episodes needs data.vision_cache, or a size: episodes of images as they come.": (
                episodes and not cache and episodes.size is None
            ),
        }
        for problem, found in problems.items():
            require(not found, f"data.{problem}")
        if episodes:
            names = {option.name for option in fields(EpisodesConfig)}
            check_keys("data.episodes", to_dict(episodes), names - {"size"} if cache else {"size", "texts"})


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
        check_training(self.training)
        check_keys("quantization", self.quantization or {}, signature(BitsAndBytesConfig).parameters)
        BitsAndBytesConfig(**self.quantization or {})  # a TypeError names it

    def validate_sections(self):
        distills, taught = bool(self.loss_weights.get("distill")), self.distillation is not None
        require(distills == taught, "loss_weights.distill and distillation.teacher go together.")
        require(any(self.loss_weights.values()), "loss_weights has no weight above zero: nothing would train.")
        names = [] if self.data.episodes else [name for name in EPISODE_LOSSES if self.loss_weights.get(name)]
        require(not names, f"loss_weights: {', '.join(names)} need data.episodes, which teach the memory.")
        for name, count in to_dict(self.evaluation).items():
            require(not count or bool(self.data.validation), f"evaluation.{name} needs data.validation.")


def check_training(training: dict[str, Any]) -> None:
    """Refuse what `TrainingArguments` does not take."""
    kinds = get_type_hints(TrainingArguments)
    check_keys("training", training, kinds)
    # where a float can be, an int can
    kinds = {key: kinds[key] | int if float in (kinds[key], *get_args(kinds[key])) else kinds[key] for key in training}
    check_types("training", training, kinds)
    require(training.get("gradient_accumulation_steps", 1) > 0, "gradient_accumulation_steps is not positive.")


def load_recipe(path: str | Path, overrides: list[str] = ()) -> Recipe:
    """Read a recipe with `section.key=value` overrides."""
    return check_recipe(read_recipe(path, overrides), path)


def check_recipe(values: dict[str, Any], path: str | Path) -> Recipe:
    """Make a recipe of the values of a file."""
    for key in LIST_KEYS:
        if isinstance(values.get(key), str):
            values[key] = [values[key]]
    if isinstance(values.get("training"), dict):
        training = {key: value for key, value in values["training"].items() if value is not None}
        no = [key for key, value in training.items() if str(key).endswith("_strategy") and value is False]
        values["training"] = training | dict.fromkeys(no, "no")  # YAML reads `no` as false
    return build(Recipe, values, str(path))


def build(kind: type, values: Any, name: str, prefix: str = "") -> Any:
    """Make a section of a mapping, and its inner ones; messages call it `name`."""
    require(isinstance(values, dict), f"{name} is a section of keys, got {values!r}.")
    check_keys(name, values, [option.name for option in fields(kind)])
    values = {key: value for key, value in values.items() if value is not None}
    # required keys and inner sections
    for option in fields(kind):
        key, required = option.name, option.default is option.default_factory is MISSING
        require(key in values or not required, f"{name} has no {key!r}: {option.metadata['help']}.")
        section = next((part for part in (option.type, *get_args(option.type)) if is_dataclass(part)), None)
        if section and key in values:
            values[key] = build(section, values[key], prefix + key, f"{prefix}{key}.")
    # types and what excludes each other
    try:
        return kind(**values)
    except StrictDataclassFieldValidationError as error:
        raise ValueError(f"{name}: {error.__cause__}.") from error
    except StrictDataclassClassValidationError as error:
        raise ValueError(str(error.__cause__)) from error


def to_dict(section: Any) -> dict[str, Any]:
    """Turn a section into the mapping it was built of, with its defaults."""
    return asdict(section, dict_factory=lambda values: {k: v for k, v in values if v is not None})
