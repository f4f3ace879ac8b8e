"""Choose ScopeNet's threshold on pictures outside training, and store it in the checkpoint's config.

    python scripts/calibrate_scope.py runs/nano_memory --data data/pictures/validation_seen.parquet

For every number of facts, memories are taught, and asked with an augmented view of each stored picture and with pictures that share no word
with any of them. The threshold is the lowest at which no number of facts up to K lets more than `--false-alarms` of the latter through.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from memory_recall import Bench, auroc, equal_error_rate, table  # noqa: E402

from caption import replacing  # noqa: E402
from data_microvlm import load_rows  # noqa: E402


def scores(bench: Bench, size: int, memories: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scope probabilities of written and of unrelated pictures, over several memories of `size` facts."""
    positive, negative = [], []
    for _ in range(memories):
        pictures = bench.choose(size)
        memory = bench.teach([pictures], [["This is it."] * size])
        stored = set().union(*(bench.words[i] for i in pictures))
        unrelated = [i for i in range(len(bench.captions)) if not bench.words[i] & stored]
        positive.append(bench.scope(1, pictures, memory))
        if unrelated:
            negative.append(bench.scope(0, unrelated, memory))
    if not negative:
        raise ValueError(f"no picture is unrelated to {size} facts: give more pictures.")
    return torch.cat(positive), torch.cat(negative)


def lowest_threshold(negatives: list[torch.Tensor], false_alarms: float) -> float:
    """The lowest probability that at most this share of every set of negatives reaches."""
    highest = 0.0
    for negative in negatives:
        allowed = int(false_alarms * len(negative))
        highest = max(highest, float(negative.sort(descending=True).values[min(allowed, len(negative) - 1)]))
    return min(max(highest + 1e-4, 1e-4), 1 - 1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True, help="pictures that the model was not trained on")
    parser.add_argument("--false-alarms", type=float, default=0.02)
    options = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(
        options.checkpoint, trust_remote_code=True, dtype=torch.float32
    ).eval()
    bench = Bench(
        model, AutoProcessor.from_pretrained(options.checkpoint, trust_remote_code=True), load_rows(options.data)
    )
    slots = model.config.memory_config.num_slots
    sizes = [size for size in (1, 4, 16, 64, slots) if size < len(bench.captions)]
    found = {size: scores(bench, size, max(4, 256 // size)) for size in sizes}
    threshold = lowest_threshold([negative for _, negative in found.values()], options.false_alarms)
    lines = [
        [size, len(n), auroc(p, n), equal_error_rate(p, n), float((p >= threshold).float().mean()),
         float((n >= threshold).float().mean())]
        for size, (p, n) in found.items()
    ]  # fmt: skip
    print(f"threshold {threshold:.4f}\n")
    print(table(["facts", "unrelated", "AUROC", "EER", "written: on", "unrelated: on"], lines))
    path = Path(options.checkpoint) / "config.json"
    config = json.loads(path.read_text())
    config["memory_config"]["scope_threshold"] = round(threshold, 4)
    with replacing(str(path), "w") as file:
        file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
