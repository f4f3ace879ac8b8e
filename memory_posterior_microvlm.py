"""The maths of an episodic memory: pure functions on the posterior of a Bayesian linear regression.

Addresses W (N, K) go to contents Z (N, content size). The prior of the memory is N(0, I), the posterior has the mean
M (K, Z) and the covariance Sigma (K, K), which all content columns share.
R independent memories are one batch: addresses (R, N, K), contents (R, N, Z).
Formulas: Larimar (arXiv 2403.11901), the Kanerva machine (arXiv 1804.01756), docs/memory.md.
"""

import math

import torch
import torch.nn.functional as F

Posterior = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # mean (R, K, Z), covariance (R, K, K), log det Sigma (R,)


def no_autocast(x: torch.Tensor) -> torch.autocast:
    """Disable autocast on the device of `x`."""
    return torch.autocast(x.device.type, enabled=False)


def sherman_morrison(mean, covariance, log_det, address, content, noise, sign=1.0) -> Posterior:
    """Take one observation into the posterior of every row, or out of it (Larimar, eq. 3).

        Delta = z - w M,   s = w Sigma w^T + sign noise,   g = Sigma w^T / s,   M += g Delta,   Sigma -= g (w Sigma)

    with log det Sigma += log(noise) - log(sign s). Rank one, O(K^2 + K Z) per row.

    Args:
        noise: variance of the observation noise, > 0.
        sign: 1 to write, -1 to take the same observation out, 0 to leave the row; a number or (R,).
    """
    sign = torch.as_tensor(sign, dtype=mean.dtype, device=mean.device).expand(len(mean))
    # gain and error of the observation
    w_sigma = torch.einsum("rk,rkl->rl", address, covariance)
    s = (w_sigma * address).sum(-1) + torch.where(sign == 0, torch.ones_like(sign), sign) * noise  # (R,)
    gain = w_sigma / s.unsqueeze(-1) * sign.abs().unsqueeze(-1)
    error = content - torch.einsum("rk,rkz->rz", address, mean)
    # mean, covariance, log determinant
    mean = mean + gain.unsqueeze(-1) * error.unsqueeze(1)
    covariance = covariance - gain.unsqueeze(-1) * w_sigma.unsqueeze(1)
    covariance = (covariance + covariance.mT) / 2
    step = math.log(noise) - (sign * s).clamp(min=torch.finfo(s.dtype).tiny).log()
    return mean, covariance, log_det + torch.where(sign == 0, torch.zeros_like(step), step)


def sequential_write(mean, covariance, log_det, addresses, contents, noise, active) -> Posterior:
    """Take N observations into the posterior, one after the other; arguments as in `direct_write`."""
    for n in range(addresses.shape[1]):
        mean, covariance, log_det = sherman_morrison(
            mean, covariance, log_det, addresses[:, n], contents[:, n], noise, active[:, n].to(mean.dtype)
        )
    return mean, covariance, log_det


def direct_write(mean, covariance, log_det, addresses, contents, noise, active=None) -> Posterior:
    """Take N observations into the posterior at once, by one Cholesky factor of an N x N matrix.

        G = W Sigma W^T + noise I,   M += Sigma W^T G^-1 (Z - W M),   Sigma -= Sigma W^T G^-1 W Sigma

    The same posterior as N rank-one writes in any order. `active` (R, N) is False for places to leave out.
    """
    if active is not None:  # an observation at address zero changes nothing
        addresses = addresses * active.unsqueeze(-1)
    # gain of all observations
    w_sigma = addresses @ covariance  # (R, N, K)
    gram = w_sigma @ addresses.mT + noise * torch.eye(addresses.shape[1], dtype=mean.dtype, device=mean.device)
    factor = torch.linalg.cholesky(gram)
    gain = torch.cholesky_solve(w_sigma, factor).mT  # (R, K, N)
    # mean, covariance, log determinant
    mean = mean + gain @ (contents - addresses @ mean)
    covariance = covariance - gain @ w_sigma
    covariance = (covariance + covariance.mT) / 2
    log_det = log_det + addresses.shape[1] * math.log(noise)
    log_det = log_det - 2 * torch.diagonal(factor, dim1=-2, dim2=-1).log().sum(-1)
    return mean, covariance, log_det


WRITE_METHODS = {"sequential": sequential_write, "direct": direct_write}


def memory_kl(mean, covariance, log_det) -> torch.Tensor:
    """Compute the KL of the posterior N(mean, covariance x I_Z) from the prior N(0, I x I_Z), divided by K Z.

        KL = (Z tr(Sigma) + |M|^2 - K Z - Z log det Sigma) / 2

    Trace and log-determinant count once per content column, in contrast to Larimar's formula. (R,), nats per entry.
    """
    K, Z = mean.shape[1:]
    trace = torch.diagonal(covariance, dim1=-2, dim2=-1).sum(-1)
    square = mean.square().sum((1, 2))
    return (Z * trace + square - K * Z - Z * log_det) / (2 * K * Z)


def address_kl(address: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Compute the KL of u = sqrt(K) w from a standard normal prior, divided by K.

    A unit address has entries of size 1 / sqrt(K); scaled by sqrt(K) they have the size the prior expects.
    As the length is fixed, the term of the mean is constant: only the variance is learned from it.
    Means w (..., K), log variance of u (K,) -> (...,), nats per slot.
    """
    K = address.shape[-1]
    return 0.5 * (log_variance.exp() + K * address.square() - 1 - log_variance).mean(-1)


def draw_address(addresses, active, similarity, sharpness: float) -> torch.Tensor:
    """Compute the address that a similarity (R, Q, N) to the items points to, (R, Q, K).

    One step of a modern Hopfield network (arXiv 2008.02217, eq. 3): the mean of the stored addresses under
    softmax(sharpness x similarity), at unit length; zero where nothing is stored.
    """
    scores = (sharpness * similarity).masked_fill(~active.unsqueeze(1), torch.finfo(similarity.dtype).min)
    return F.normalize(scores.softmax(-1) @ addresses.to(similarity.dtype), dim=-1)  # empty places hold zeros


def read_statistics(similarity, variance, active, num_slots: int, by_words=None) -> torch.Tensor:
    """Gather the input of ScopeNet, (R, Q, 9).

    Per query: its three largest similarities, their mean and standard deviation, the variance, the load of the memory
    in two scales, and whether it is a question in words.

    similarity (R, Q, N) to the items, variance (R, Q), active (R, N), by_words (R, Q, 1) or None.
    """
    # similarities: the best, their mean and spread
    K, count = num_slots, active.sum(1).to(similarity.dtype).view(-1, 1, 1)
    top = F.pad(similarity, (0, 3)).topk(3, dim=-1).values  # with zeros, however many places are empty
    mean = similarity.sum(-1, keepdim=True) / count.clamp(min=1)
    spread = ((similarity - mean) * active.unsqueeze(1)).square().sum(-1, keepdim=True) / count.clamp(min=1)
    spread = (spread + 1e-6).sqrt()
    # how full the memory is, and the kind of question
    load = torch.cat([(1 + count).log() / math.log(1 + K), count / K], -1).expand(*similarity.shape[:2], 2)
    kind = torch.zeros_like(mean) if by_words is None else by_words.to(similarity.dtype)
    return torch.cat([top, mean, spread, variance.unsqueeze(-1), load, kind], -1)
