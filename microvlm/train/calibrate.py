"""Choose thresholds and temperature on images outside training."""

import argparse
import copy
import json
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..data.rows import load_rows
from ..evaluate.bench import Bench
from ..files import atomic_file
from ..metrics import auroc, equal_error_rate
from ..tables import markdown_table

MOST = 5000  # scores for the equal error rate


def scores(bench: Bench, size: int, memories: int) -> dict[str, tuple[torch.Tensor, ...]]:
    """Scope probabilities of written, of unrelated and of look-alike pictures, and of questions about the first two, over several
    memories of `size` facts; no look-alikes where the memories leave none.
    """
    found = {"pictures": ([], [], []), "words": ([], [])}
    for _ in range(memories):
        pictures = bench.choose(size)
        memory = bench.teach([pictures], [bench.facts(bench.draw.sample(bench.names["new"], size), pictures)])
        asked = pictures, *bench.unwritten(pictures)
        for kind, views in (("pictures", (1, 0, 0)), ("words", (None, None))):
            for part, view, indices in zip(found[kind], views, asked):
                if indices:
                    part.append(bench.scope(view, indices, memory))
    if not found["pictures"][1]:
        raise ValueError(f"no picture is unrelated to {size} facts: give more pictures.")
    return {kind: tuple(torch.cat(part) if part else torch.empty(0) for part in parts) for kind, parts in found.items()}


def lowest_threshold(negative: torch.Tensor, false_alarms: float) -> float:
    """The lowest probability that at most this share of the negatives reaches; with a share of 1 the lowest there is."""
    allowed = int(false_alarms * len(negative))
    value = float(negative.sort(descending=True).values[allowed]) if allowed < len(negative) else 0.0
    return round(min(max(value + 1e-4, 1e-4), 1 - 1e-4), 4)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True, help="pictures that the model was not trained on")
    parser.add_argument("--false-alarms", type=float, default=0.015, help="share of the unrelated that may pass")
    parser.add_argument("--look-alikes", type=float, default=1.0, help="share of the look-alikes that may pass; 1, any")
    options = parser.parse_args(arguments)
    model = AutoModelForImageTextToText.from_pretrained(
        options.checkpoint, trust_remote_code=True, dtype=torch.float32
    ).eval()
    bench = Bench(
        model, AutoProcessor.from_pretrained(options.checkpoint, trust_remote_code=True), load_rows(options.data)
    )
    slots = model.config.memory_config.num_slots
    sizes = [size for size in sorted({1, 4, 16, 64, slots}) if size <= slots and size < len(bench.captions)]
    found = {size: scores(bench, size, max(16, 256 // size)) for size in sizes}
    path = Path(options.checkpoint) / "config.json"
    config = json.loads(path.read_text())
    for kind, name in (("pictures", "scope_threshold"), ("words", "word_threshold")):
        lines = []
        for size in sizes:
            positive, negative, *alike = found[size][kind]
            allowed = zip((negative, *alike), (options.false_alarms, options.look_alikes))
            threshold = max(lowest_threshold(x, share) for x, share in allowed if len(x))
            on = [float((x >= threshold).float().mean()) if len(x) else None for x in (positive, negative, *alike)]
            quality = auroc(positive, negative), equal_error_rate(positive[:MOST], negative[:MOST])
            lines.append([size, threshold, len(negative), *quality, *on])
        columns = ["facts", "threshold", "unrelated", "AUROC", "EER", "written: on", "unrelated: on", "look-alikes: on"]
        columns = columns[: len(lines[0])]
        print(f"Asked by {kind}.\n\n{markdown_table(columns, lines)}\n")
        config["memory_config"][name] = [line[:2] for line in lines]
    type(model.config).from_dict(copy.deepcopy(config))  # raises where it would not open again
    with atomic_file(str(path), "w") as file:
        file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")
