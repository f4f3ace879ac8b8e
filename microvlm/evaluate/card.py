"""Put scores into the metadata of a model card."""

import re
from collections import Counter
from pathlib import Path

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import yaml_dump

from ..hub import hub_id, public_path
from .memory import counted
from .report import CAPTION_LABELS, LANGUAGE_LABELS, RETRIEVAL_LABELS, blocks

TASK = "image-text-to-text"
CARD_MEMORY = ("recall_same", "recall_view", "recall_words", "scope_accuracy", "scope_auroc", "scope_eer", "memory_kl")
FRONT = re.compile(r"\A(\ufeff?---[ \t]*(\r?\n))(.*?)(^---[ \t]*(?:\r?\n|\Z))", re.DOTALL | re.MULTILINE)
INDEX = re.compile(r"^model-index:.*?(?=^[^\s-]|\Z)", re.DOTALL | re.MULTILINE)


def card_metrics(result: dict) -> dict[str, tuple[str, float, dict[str, int]]]:
    """metric type -> label, value and sample size of what a model card says: captions, language, retrieval and memory of the model itself."""
    found, pictures = {}, {"pictures": result["pictures"]}
    for title, labels, columns in blocks(result):
        if title in ("Language", "Retrieval"):
            found |= {
                key: (labels[key], columns[""][key], pictures) for key in labels if key not in ("tokens", "pairs")
            }
        elif title == "Captions":
            found |= {key: (label, columns["model"][key], pictures) for key, label in labels.items()}
        elif title == "Memory":
            for entry in result["memory"]:
                facts, questions = entry["facts"], {"questions": entry["questions"]}
                found |= {
                    f"memory_{facts}_{k}": (f"{labels[k]}, {counted(facts)}", entry[k], questions) for k in CARD_MEMORY
                }
    return {key: figure for key, figure in found.items() if figure[1] is not None}


def card_group(metric: str) -> str | None:
    """The group that measures a metric of the card; None: it is not of this command."""
    if re.match(r"memory_\d+_", metric):
        return "memory"
    groups = {"captions": CAPTION_LABELS, "language": LANGUAGE_LABELS, "retrieval": RETRIEVAL_LABELS}
    return next((group for group, labels in groups.items() if metric in labels), None)


def split_of(path: str) -> str | None:
    """The split that a file's name says it is."""
    return next((name for name in ("train", "validation", "test") if Path(path).stem.startswith(name)), None)


def unusual(result: dict) -> dict[str, str]:
    """The dtype of a model that was not scored in float32."""
    return {"dtype": result["dtype"]} if result.get("dtype", "float32") != "float32" else {}


def card_results(results: dict[str, dict]) -> list[EvalResult]:
    """Entries of a card's `model-index`; a data set goes by its Hub id or path, of an absolute path by the file's name.

    Raises:
        ValueError: two data sets of one name.
    """

    names = {path: hub_id(path) or public_path(path) for path in results}
    for name, number in Counter(names.values()).items():
        if number > 1:
            raise ValueError(f"{number} data sets would both be called {name} in the card: give relative paths.")
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=names[path],
            dataset_name=names[path],
            dataset_split=split_of(path),
            metric_type=metric,
            metric_name=label,
            metric_value=round(value, 6),
            metric_args=sample | unusual(result),
        )
        for path, result in results.items()
        for metric, (label, value, sample) in card_metrics(result).items()
    ]


def read_card(path: str) -> tuple[str, dict]:
    """Text of a model card with its own line ends, and its metadata.

    Raises:
        OSError: it cannot be read.
        ValueError: its metadata is not a YAML mapping.
    """
    text = Path(path).read_bytes().decode("utf-8")
    front = FRONT.match(text)
    try:
        data = yaml.safe_load(front[3]) if front else {}
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata of {path} is not YAML: {' '.join(str(error).split())}") from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ValueError(f"the metadata of {path} is not a mapping.")
    return text, data


def card_with(path: str, results: dict[str, dict], groups, name: str) -> str:
    """The text of a model card with these results in its `model-index`, all else as it was.

    Earlier figures of the same data set go when their group is among `groups`; other data sets and metrics stay.

    Args:
        name: of the model, where the card has no `model-index` and no heading.

    Raises:
        OSError, ValueError: a card that cannot be read, or whose `model-index` cannot be.
    """
    text, data = read_card(path)
    new = card_results(results)
    if heading := re.search(r"^# (.+?)\s*$", FRONT.sub("", text), re.MULTILINE):  # the metadata may have comments
        name = heading[1]
    kept = []
    if data.get("model-index"):
        try:
            name, kept = model_index_to_eval_results(data["model-index"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the model-index of {path} is not of the Hub's form: {error!r}") from error
    measured = {(r.dataset_type, r.dataset_split) for r in new}
    kept = [
        r
        for r in kept
        if (r.task_type, r.dataset_type, r.dataset_split) not in {(TASK, *pair) for pair in measured}
        or card_group(r.metric_type) not in groups
    ]
    index = {"model-index": eval_results_to_model_index(name, [*kept, *new])}
    if front := FRONT.match(text):
        line_end, old = front[2], front[3]
        block = yaml_dump(index, sort_keys=False, line_break=line_end)
        place = INDEX.search(old)
        new_front = old[: place.start()] + block + old[place.end() :] if place else old + block
        try:
            good = yaml.safe_load(new_front) == data | index
        except yaml.YAMLError:
            good = False
        if not good:
            raise ValueError(f"a model-index cannot be written into the metadata of {path}: use YAML in block style.")
        return text[: front.start(3)] + new_front + text[front.end(3) :]
    return f"---\n{yaml_dump(index, sort_keys=False)}---\n{text}"
