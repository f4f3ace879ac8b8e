"""Choose temperature and thresholds of a checkpoint on images outside training."""

from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoProcessor

from ..data.rows import load_rows
from ..evaluate.bench import Bench
from ..evaluate.language import reference_batches
from ..files import atomic_folder, check_out
from ..metrics import auroc, equal_error_rate
from ..model import load_plain, require
from ..tables import markdown_table
from .setup import change_config

MOST_SCORES = 5000  # for the equal error rate
FILLER = 1500  # images for memories that the data cannot fill
LEAST = 2  # images for each fact of a memory: some that it does not hold are asked
COLUMNS = ("facts", "threshold", "unrelated", "AUROC", "EER", "written: on", "unrelated: on", "look-alikes: on")


def best_temperature(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Find the T of least cross-entropy of `logits / T` with `targets`; convex in 1 / T."""
    log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_scale], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits * log_scale.exp().float(), targets)
        value.backward()
        return value

    optimizer.step(loss)
    return float((-log_scale.detach()).exp())


def calibrate_temperature(model, processor, rows: Dataset) -> None:
    """Divide the decoder's last norm by the best temperature (arXiv 1706.04599), in place."""
    # logits (N, V) of every token of the captions, and the tokens (N,)
    logits, targets = [], []
    with torch.no_grad():
        for batch, length in reference_batches(model, processor, rows, 16):
            labels = batch.pop("labels")[:, -length:]
            logits.append(model(**batch, logits_to_keep=length + 1).logits[:, :-1][labels != -100])
            targets.append(labels[labels != -100])
    logits, targets = torch.cat(logits), torch.cat(targets)
    # the best of them
    temperature = best_temperature(logits, targets)
    before, after = (float(F.cross_entropy(logits / t, targets)) for t in (1.0, temperature))
    with torch.no_grad():
        text = model.model.language_model
        getattr(text, "embedding_norm", getattr(text, "norm", None)).weight /= temperature  # LFM2's name
    print(f"temperature {temperature:.4f}: {before:.4f} -> {after:.4f} nats a token over {len(targets)} tokens")


def scores(bench: Bench, size: int, memories: int) -> dict[str, tuple[torch.Tensor, ...]]:
    """Collect scope probabilities of images, written, unrelated and look-alike, and of words about the first two."""
    parts = {"images": ([], [], []), "words": ([], [])}
    for _ in range(memories):
        written = bench.choose(size)
        facts = bench.facts(bench.draw.sample(bench.names["new"], size), written)
        memory = bench.teach([written], [facts])
        queries = written, *bench.unwritten(written)
        for kind, views in (("images", (1, 0, 0)), ("words", (None, None))):
            for part, view, indices in zip(parts[kind], views, queries):
                if indices:
                    part.append(bench.scope(view, indices, memory))
    return {k: tuple(torch.cat(part) if part else torch.empty(0) for part in v) for k, v in parts.items()}


def lowest_threshold(negative: torch.Tensor, false_alarms: float) -> float:
    """Find the lowest probability that at most this share of the negatives reaches."""
    allowed = int(false_alarms * len(negative))
    value = float(negative.sort(descending=True).values[allowed]) if allowed < len(negative) else 0.0
    return round(min(max(value + 1e-4, 1e-4), 1 - 1e-4), 4)


def calibrate_scope(model, processor, data: list[Dataset], false_alarms: float, look_alikes: float) -> None:
    """Set the thresholds of ScopeNet for several sizes of memory, in the model's config.

    A size is measured on the first images that are enough for it and leave some that are related to no fact.
    """
    benches = [Bench(model, processor, rows) for rows in data]
    slots = model.config.memory_config.num_slots
    by_size = {}
    for size in sorted({size for size in (1, 4, 16, 64, 256) if size < slots} | {slots}):
        found = (scores(bench, size, max(16, 256 // size)) for bench in benches if size * LEAST <= len(bench.captions))
        enough = next((parts for parts in found if len(parts["images"][1])), None)
        if enough:
            by_size[size] = enough
    require(bool(by_size), "no picture is unrelated to the others: give more pictures.")
    for kind, name in (("images", "scope_threshold"), ("words", "word_threshold")):
        lines = []
        for size in by_size:
            positive, *negatives = by_size[size][kind]
            # no more of either sort of negatives may pass
            shares = [(x, share) for x, share in zip(negatives, (false_alarms, look_alikes)) if len(x)]
            threshold = max(lowest_threshold(x, share) for x, share in shares)
            on = [float((x >= threshold).float().mean()) if len(x) else None for x in (positive, *negatives)]
            error = equal_error_rate(positive[:MOST_SCORES], negatives[0][:MOST_SCORES])
            lines.append([size, threshold, len(negatives[0]), auroc(positive, negatives[0]), error, *on])
        print(f"Asked by {kind}.\n\n{markdown_table(list(COLUMNS[: len(lines[0])]), lines)}\n")
        model.config = change_config(model.config, {f"memory_config.{name}": [line[:2] for line in lines]})


def main(
    checkpoint: str, out: str, data: str, filler=None, false_alarms=0.015, look_alikes=1.0, only=None, force=False
) -> None:
    """Write a copy of a checkpoint, unpacked in float32, with its temperature and thresholds chosen."""
    out = Path(out)
    check_out(out, force, [checkpoint])
    model, rows = load_plain(checkpoint).eval(), load_rows(data, split="validation")
    processor = AutoProcessor.from_pretrained(checkpoint)
    if only != "scope":
        calibrate_temperature(model, processor, rows)
    if only != "temperature" and (model.model.memory is not None or only == "scope"):
        data = [rows]
        if filler:
            more = load_rows(filler, split="train").shuffle(seed=0)
            data.append(more.select(range(min(FILLER, len(more)))))
        calibrate_scope(model, processor, data, false_alarms, look_alikes)
    # written whole or not at all
    with atomic_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
