"""Ways to address an episodic memory: from keys to places, through the reference memory M_ref (K, C).

    pseudoinverse   w = k M_ref^T (M_ref M_ref^T + lambda I)^-1, an exact ridge solve by Cholesky
    ben_cohen       w = k M_ref^+, the pseudo-inverse by the iteration of Ben-Israel and Cohen
    gaussian        w = softmax of -|k - m_i|^2 / (2 tau^2)
    waves           w = cos x + sin x, x = k M_ref^T / tau: random Fourier features of exp(-|k - k'|^2 / 2 tau^2)

The first is the default. Larimar (arXiv 2403.11901) has the second, and an LSTM over an episode (`KeyOrder`).
An address depends on the key and M_ref alone, never on what was written: that makes forgetting exact.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .configuration_microvlm import MicroVLMMemoryConfig


def ridge_inverse(reference: torch.Tensor, config: MicroVLMMemoryConfig) -> torch.Tensor:
    """Invert M_ref (K, C) with the ridge `address_ridge`, to (C, K)."""
    identity = torch.eye(len(reference), dtype=reference.dtype, device=reference.device)
    gram = reference @ reference.mT + config.address_ridge * identity
    return torch.cholesky_solve(reference, torch.linalg.cholesky(gram)).mT


def ben_cohen_inverse(a: torch.Tensor, steps: int) -> torch.Tensor:
    """Invert a (K, C) by the Ben-Israel and Cohen iteration X <- 2 X - X A X, to (C, K).

    The start A^T / (|A|_1 |A|_inf) converges for every A to the Moore-Penrose inverse; a constant scale would
    diverge for a large norm, and be far from done after a few steps for a small one.
    """
    x = a.mT / (a.abs().sum(0).max() * a.abs().sum(1).max())
    for _ in range(steps):
        x = 2 * x - x @ a @ x
    return x


def product_address(keys: torch.Tensor, inverse: torch.Tensor, config: MicroVLMMemoryConfig) -> torch.Tensor:
    """Address keys (..., C) by an inverse (C, K), to (..., K)."""
    return keys @ inverse


def gaussian_address(keys: torch.Tensor, reference: torch.Tensor, config: MicroVLMMemoryConfig) -> torch.Tensor:
    """Address keys (..., C) by their distances from the rows of M_ref (K, C), to (..., K)."""
    distance = keys.square().sum(-1, keepdim=True) - 2 * keys @ reference.mT + reference.square().sum(-1)
    return (-distance / (2 * config.address_temperature**2)).softmax(-1)


def waves_address(keys: torch.Tensor, reference: torch.Tensor, config: MicroVLMMemoryConfig) -> torch.Tensor:
    """Address keys (..., C) by waves whose frequencies are M_ref's rows (K, C), to (..., K).

    Not linear in the key, so that K may exceed C (Rahimi and Recht 2007).
    """
    phase = keys @ reference.mT * (math.sqrt(max(reference.shape)) / config.address_temperature)
    return phase.cos() + phase.sin()


class Addressing(NamedTuple):
    """Two steps: `prepare` M_ref, once for the same weights, and `address` keys with what it gives; all float32."""

    prepare: Callable[[torch.Tensor, MicroVLMMemoryConfig], torch.Tensor]
    address: Callable[[torch.Tensor, torch.Tensor, MicroVLMMemoryConfig], torch.Tensor]


ADDRESSINGS = {
    "pseudoinverse": Addressing(ridge_inverse, product_address),
    "ben_cohen": Addressing(
        lambda reference, config: ben_cohen_inverse(reference, config.ben_cohen_steps), product_address
    ),
    "gaussian": Addressing(lambda reference, config: reference, gaussian_address),
    "waves": Addressing(lambda reference, config: reference, waves_address),
}


class KeyOrder(nn.LSTM):
    """Bidirectional LSTM over the keys (R, E, C) of an episode, for `ordering="lstm"`."""

    def __init__(self, code_size: int):
        super().__init__(code_size, code_size // 2, bidirectional=True, batch_first=True)

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        return super().forward(keys)[0]
