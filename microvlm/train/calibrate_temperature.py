"""Scale the logits so that their probabilities fit images outside training."""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoProcessor

from ..data.rows import load_rows
from ..evaluate.language import reference_batches
from ..model import load_plain


@torch.no_grad()
def reference_logits(model, processor, rows, batch_size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of every token of the reference captions, each given the picture and those before it, (N, V), and the tokens, (N,)."""
    logits, targets = [], []
    for batch, length in reference_batches(model, processor, rows, batch_size):
        labels = batch.pop("labels")[:, -length:]
        answers = labels != -100
        logits.append(model(**batch, logits_to_keep=length + 1).logits[:, :-1][answers])
        targets.append(labels[answers])
    return torch.cat(logits), torch.cat(targets)


def best_temperature(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """The T of least cross-entropy of `logits / T` (N, V) with `targets` (N,): convex in 1 / T."""
    log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_scale], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits * log_scale.exp().float(), targets)
        value.backward()
        return value

    optimizer.step(loss)
    return float((-log_scale.detach()).exp())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("out", metavar="OUT", help="a folder that does not exist")
    parser.add_argument("--data", required=True, help="pictures that the model was not trained on")
    options = parser.parse_args(arguments)
    if Path(options.out).exists():
        sys.exit(f"error: {options.out} exists: choose another folder.")
    model = load_plain(options.checkpoint).eval()
    processor = AutoProcessor.from_pretrained(options.checkpoint, trust_remote_code=True)
    logits, targets = reference_logits(model, processor, load_rows(options.data))
    temperature = best_temperature(logits, targets)
    before, after = (float(F.cross_entropy(logits / t, targets)) for t in (1.0, temperature))
    with torch.no_grad():
        model.model.language_model.norm.weight /= temperature
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    print(f"temperature {temperature:.4f}: {before:.4f} -> {after:.4f} nats a token over {len(targets)} tokens")
