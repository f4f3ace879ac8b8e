"""Ways to address an episodic memory: from keys to places, through the reference memory M_ref (K, C).

    pseudoinverse   w = k M_ref^T (M_ref M_ref^T + lambda I)^-1, an exact ridge solve by Cholesky
    ben_cohen       w = k M_ref^+, the pseudo-inverse by the iteration of Ben-Israel and Cohen
    gaussian        w = softmax of -|k - m_i|^2 / (2 tau^2)
    waves           w = cos x + sin x, x = k M_ref^T / tau: random Fourier features of exp(-|k - k'|^2 / 2 tau^2)

The first is the default. Larimar (arXiv 2403.11901) has the second.
An address depends on the key and M_ref alone, never on what was written: that makes forgetting exact.
"""

import math

import torch

from .configuration_microvlm import MicroVLMMemoryConfig


def ridge_inverse(reference: torch.Tensor, ridge: float) -> torch.Tensor:
    """Invert M_ref (K, C) with a ridge, to (C, K)."""
    identity = torch.eye(len(reference), dtype=reference.dtype, device=reference.device)
    gram = reference @ reference.mT + ridge * identity
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


def prepare_reference(reference: torch.Tensor, config: MicroVLMMemoryConfig) -> torch.Tensor:
    """Make of M_ref (K, C) what `address_keys` takes: its inverse (C, K), or itself."""
    if config.addressing == "pseudoinverse":
        return ridge_inverse(reference, config.address_ridge)
    if config.addressing == "ben_cohen":
        return ben_cohen_inverse(reference, config.ben_cohen_steps)
    return reference


def address_keys(keys: torch.Tensor, prepared: torch.Tensor, config: MicroVLMMemoryConfig) -> torch.Tensor:
    """Address keys (..., C) by what `prepare_reference` made, to (..., K)."""
    tau = config.address_temperature
    if config.addressing == "gaussian":
        distance = keys.square().sum(-1, keepdim=True) - 2 * keys @ prepared.mT + prepared.square().sum(-1)
        return (-distance / (2 * tau**2)).softmax(-1)
    if config.addressing == "waves":  # not linear in the key, so that K may exceed C (Rahimi and Recht 2007)
        phase = keys @ prepared.mT * (math.sqrt(max(prepared.shape)) / tau)
        return phase.cos() + phase.sin()
    return keys @ prepared
