"""Draw the same random numbers again, for gradient caching."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def embedded_pairs(outputs) -> torch.Tensor:
    """Pictures and texts in the shared space, (R, 2, C) float32."""
    return torch.stack([outputs.image_embeds, outputs.text_embeds], 1).float()


def random_state(device: torch.device) -> tuple[torch.Tensor, ...]:
    """States of the generators that a forward pass on `device` draws from."""
    return torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


@contextmanager
def drawn_again(state: tuple[torch.Tensor, ...] | None, device: torch.device) -> Iterator[None]:
    """Let a block draw the numbers that followed `random_state`, and what comes behind it those it would have drawn without the block."""
    if state is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        for generator in state[1:]:
            torch.cuda.set_rng_state(generator, device)
        yield
