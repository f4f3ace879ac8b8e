"""Contrast with more pairs than fit in memory: GradCache (Gao et al., arXiv 2101.06983).

A first pass without gradient embeds all micro-batches of an optimizer step. The pass with gradient then replaces its
own embeddings among them. Each process takes the gradient of the whole loss by its own pairs; they add up to the whole.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class PairCache:
    """Embeddings of all pairs of an optimizer step, without gradient, as one micro-batch sees them."""

    pairs: torch.Tensor  # of all micro-batches and ranks, (R, 2, C)
    first: int  # index of the micro-batch's own first pair
    random_state: tuple[torch.Tensor, ...] | None = None  # of `random_state`, before its first pass

    def replace(self, own: torch.Tensor) -> torch.Tensor:
        """All pairs, with those at hand (N, 2, C) in their place."""
        return torch.cat([self.pairs[: self.first], own, self.pairs[self.first + len(own) :]])


def embedded_pairs(outputs, captioned: torch.BoolTensor | None = None) -> torch.Tensor:
    """Images and texts in the shared space, (R, 2, C) float32; of episodes only those whose text is the caption."""
    pairs = torch.stack([outputs.image_embeds, outputs.text_embeds], 1).float()
    return pairs if captioned is None else pairs[captioned]


@torch.no_grad()
def embed_step(trainer, micro_batches: Iterable[tuple[dict, torch.Tensor | None]]) -> list[PairCache]:
    """Embed the pairs of a step's micro-batches without gradient; a cache for each."""
    trainer.model_wrapped.train()
    own, states = [], []
    for inputs, captioned in micro_batches:
        states.append(random_state(trainer.args.device))
        with trainer.compute_loss_context_manager():
            outputs = trainer.model_wrapped(**inputs, return_alignment="only", use_fusion=False)
        own.append(embedded_pairs(outputs, captioned))
    return gather_pairs(trainer.accelerator, own, states)


def gather_pairs(accelerator, own: list[torch.Tensor], states: list | None = None) -> list[PairCache]:
    """Gather the pairs (N, 2, C) of every micro-batch from all ranks."""
    ranks = gather_rows(accelerator, torch.cat(own))
    pairs, first, caches = torch.cat(ranks), sum(map(len, ranks[: accelerator.process_index])), []
    for part, state in zip(own, states or [None] * len(own), strict=True):
        caches.append(PairCache(pairs, first, state))
        first += len(part)
    return caches


def gather_rows(accelerator, x: torch.Tensor) -> list[torch.Tensor]:
    """Gather tensors (R, ...) of all ranks, whose R may differ."""
    if accelerator.num_processes == 1:
        return [x]
    counts = accelerator.gather(torch.tensor([len(x)], device=x.device)).tolist()
    parts = accelerator.gather(accelerator.pad_across_processes(x)).split(max(counts))
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def random_state(device: torch.device) -> tuple[torch.Tensor, ...]:
    """States of the generators that a forward pass on `device` draws from."""
    return torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


@contextmanager
def replayed_randomness(state: tuple[torch.Tensor, ...] | None, device: torch.device) -> Iterator[None]:
    """Draw inside the block the random numbers that followed `random_state`."""
    if state is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        for generator in state[1:]:
            torch.cuda.set_rng_state(generator, device)
        yield
