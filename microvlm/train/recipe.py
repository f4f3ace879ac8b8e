"""Read a training recipe and check it."""

from pathlib import Path
from typing import Any

import yaml

RECIPE_KEYS = {
    "model": "checkpoint to start from, a folder or Hub id",
    "revision": "its revision on the Hub",
    "config": "values of the model's config to change, by dotted name: use_memory, memory_config.num_slots, ...",
    "trainable": "regular expressions on parameter names; a parameter trains when one matches",
    "quantization": "of frozen linears of vision tower and language model: BitsAndBytesConfig; what `trainable` names stays as it is",
    "attn_implementation": "of the language model: eager trains faster than sdpa on a CPU",
    "compile": "modules that run through torch.compile, by name",
    "optimizer": "muon: Muon on the weights of linear layers, AdamW on the rest; default: training.optim",
    "learning_rates": "regular expression -> learning rate, for parts that differ from training.learning_rate",
    "calibration_rows": "standardise the adapter's input with statistics of so many training pictures; 0: keep",
    "loss_weights": "lm (1 where it is left out), align, match (with config.use_fusion), with a teacher distill, and with episodes "
    "memory_kl, address_kl, reconstruction, scope, key",
    "distillation": "teacher (a checkpoint), temperature: `distill` is the KL divergence from its logits; for quantisation-aware training "
    "the model's own full-precision weights",
    "data": "train, validation (paths, globs, hf:// addresses), format, exclude_copyleft, image_size, augmentation, "
    "max_unreadable_share, max_caption_tokens, limit, validation_limit, revision, "
    "stream (shuffle_buffer: read shards as they come, see stream_microvlm.py), "
    "vision_cache (views, folder: keep the features of a frozen vision tower), "
    "episodes (teach the memory: size for PictureEpisodeCollator, or groups, sizes, shares, names, key_pairs for EpisodeCollator)",
    "evaluation": "captions: so many fixed validation pictures are captioned at every evaluation; memory: so many batches of episodes",
    "max_nonfinite_steps": "so many steps in a row without a finite loss and gradient end the run; they change no weight; default 3",
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
    "max_caption_tokens",
    "limit",
    "validation_limit",
    "revision",
    "stream",
    "vision_cache",
    "episodes",
}
EVALUATION_KEYS = {"captions", "memory"}
LIST_KEYS = ("trainable", "compile")
DOTTED_KEYS = ("config", "learning_rates")  # whose own keys have dots
MEMORY_LOSSES = ("memory_kl", "address_kl", "reconstruction", "scope", "key")
LOSSES = ("lm", "distill", "align", "match", *MEMORY_LOSSES)


class RecipeLoader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but `1e-4` is a number, not a text."""


def check_keys(section: str, given: dict, known) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"unknown key in {section}: {', '.join(unknown)}. Known: {', '.join(sorted(known))}.")


def load_recipe(path: str, overrides: list[str] = ()) -> dict[str, Any]:
    """A recipe with `section.key=value` overrides (YAML values) applied.

    Raises:
        ValueError: unknown or missing keys, an override without `=`, or weights of losses that the recipe does not compute.
    """
    recipe = yaml.load(Path(path).read_text(), RecipeLoader)
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, got {override!r}.")
        *parents, leaf = name.split(".", 1 if name.partition(".")[0] in DOTTED_KEYS else -1)
        section = recipe
        for parent in parents:
            section[parent] = section = section.get(parent) or {}
        section[leaf] = yaml.load(value, RecipeLoader)
    check_keys(path, recipe, RECIPE_KEYS)
    for key in ("model", "trainable", "data", "training"):
        if key not in recipe:
            raise ValueError(f"{path} has no {key!r}: {RECIPE_KEYS[key]}.")
    for key in LIST_KEYS:
        value = recipe.get(key)
        if isinstance(value, str):
            recipe[key] = [value]
        elif (value is not None or key == "trainable") and not (
            isinstance(value, list) and all(isinstance(item, str) for item in value)
        ):
            raise ValueError(f"{key} takes a list of texts, got {value!r}.")
    for key, value in recipe["training"].items():
        if key.endswith("_strategy") and value is False:  # YAML reads `no` as false
            recipe["training"][key] = "no"
    check_keys("data", recipe["data"], DATA_KEYS)
    if "train" not in recipe["data"]:
        raise ValueError(f"{path} has no data.train: the training data.")
    if recipe.get("optimizer") not in (None, "muon"):
        raise ValueError(f"optimizer {recipe['optimizer']!r} is not muon; others go by training.optim.")
    if (cache := recipe["data"].get("vision_cache")) and set(cache) != {"views", "folder"}:
        raise ValueError(f"data.vision_cache takes views and folder, got {', '.join(sorted(cache))}.")
    stream, episodes = recipe["data"].get("stream"), recipe["data"].get("episodes")
    if stream is not None:
        check_keys("data.stream", stream, {"shuffle_buffer"})
        if cache:
            raise ValueError("data.vision_cache keeps features of a data set, data.stream keeps nothing: choose one.")
    if episodes and "size" not in episodes and not cache:
        raise ValueError("data.episodes needs data.vision_cache, or a size: episodes of pictures as they come.")
    check_keys("evaluation", recipe.get("evaluation", {}), EVALUATION_KEYS)
    if "distillation" in recipe:
        check_keys("distillation", recipe["distillation"], {"teacher", "temperature"})
    check_keys("loss_weights", recipe.setdefault("loss_weights", {"lm": 1.0, "align": 0.0}), LOSSES)
    if bool(recipe["loss_weights"].get("distill")) != bool(recipe.get("distillation", {}).get("teacher")):
        raise ValueError("loss_weights.distill and distillation.teacher go together.")
    taught = [name for name in MEMORY_LOSSES if recipe["loss_weights"].get(name)]
    if taught and not episodes:
        raise ValueError(f"loss_weights: {', '.join(taught)} need data.episodes, which teach the memory.")
    return recipe
