"""Put scores into the metadata of a model card."""

import re
from collections import Counter
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard

from ..hub import TASK, hub_id, metric_entry, public_path
from ..model import require
from .memory import count_facts
from .report import LABELS, MEMORY_LABELS

CARD_MEMORY = ("recall_same", "recall_view", "recall_words", "scope_accuracy", "scope_auroc", "scope_eer", "memory_kl")
CARD_GROUPS = {group: LABELS[group] for group in ("captions", "language", "retrieval")}
COUNTS = ("tokens", "pairs")  # no scores


def card_metrics(result: dict) -> dict[str, tuple[str, float, dict[str, int]]]:
    """Choose what a card says of one data set: metric type -> label, value and sample size."""
    metrics, size = {}, {"pictures": result["pictures"]}
    for group, labels in CARD_GROUPS.items():
        values = result.get("model" if group == "captions" else group, {})
        metrics |= {key: (label, values.get(key), size) for key, label in labels.items() if key not in COUNTS}
    for entry in result.get("memory", []):
        facts, questions = entry["facts"], {"questions": entry["questions"]}
        for key in CARD_MEMORY:
            label = f"{MEMORY_LABELS[key]}, {count_facts(facts)}"
            metrics[f"memory_{facts}_{key}"] = label, entry.get(key), questions
    return {key: metric for key, metric in metrics.items() if metric[1] is not None}


def card_group(metric: str) -> str | None:
    """Find the group that measures a metric of the card; None: this command does not."""
    if re.match(r"memory_\d+_", metric):
        return "memory"
    return next((group for group, labels in CARD_GROUPS.items() if metric in labels), None)


def card_results(results: dict[str, dict]) -> list[EvalResult]:
    """Write the entries of a card's `model-index`; a data set goes by its Hub id or public path."""
    names = {path: hub_id(path) or public_path(path) for path in results}
    for name, number in Counter(names.values()).items():
        require(number == 1, f"{number} data sets would both be called {name} in the card: give relative paths.")
    entries = []
    for path, result in results.items():
        # the split by the file's name; a dtype other than float32 is named
        split = next((name for name in ("train", "validation", "test") if Path(path).stem.startswith(name)), None)
        dtype = {} if result.get("dtype", "float32") == "float32" else {"dtype": result["dtype"]}
        for metric, (label, value, sample) in card_metrics(result).items():
            entries.append(metric_entry(names[path], split, metric, label, round(value, 6), sample | dtype))
    return entries


def card_with(path: str, results: dict[str, dict], groups, name: str) -> ModelCard:
    """Open a model card and put results into its `model-index`.

    Earlier scores of the same data sets and `groups` go; all other metrics, other metadata and the text stay. A card
    without `model-index` and heading gets the `name` of the model.
    """
    try:
        card = ModelCard(Path(path).read_bytes().decode("utf-8-sig"))  # keeps the line ends
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"the metadata of {path} cannot be read: {' '.join(str(error).split())}") from error
    # earlier results that these do not replace
    new = card_results(results)
    sets = {(TASK, entry.dataset_type, entry.dataset_split) for entry in new}
    others = [
        entry
        for entry in card.data.eval_results or []
        if (entry.task_type, entry.dataset_type, entry.dataset_split) not in sets
        or card_group(entry.metric_type) not in groups
    ]
    # a model-index needs a name
    heading = re.search(r"^# (.+?)\s*$", card.text, re.MULTILINE)
    card.data.model_name = card.data.model_name or (heading[1] if heading else name)
    card.data.eval_results = others + new
    return card
