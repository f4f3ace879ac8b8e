"""Ternary training: BitNet b1.58 (arXiv 2402.17764) weights with the straight-through estimator.

The latent weights stay in floating point and are rounded in every forward pass, so one checkpoint trains and runs the same way:

    scale = mean |W|,   W_q = round(W / scale) clipped to {-1, 0, 1},   y = x_q (W_q scale)^T + b

with x_q the input rounded per token to `activation_bits` bits. Same arithmetic as the online `AutoBitLinear` of transformers, without
its need for a C compiler at run time.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-5  # floor of every scale, as in BitNet's reference code


def ternary_quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Absmean rounding of a weight matrix.

    Args:
        weight: any shape, any floating dtype.

    Returns:
        Values in {-1, 0, 1}, float32, of the same shape, and the scale (), float32: `values * scale` approximates the weight.
    """
    weight = weight.float()
    scale = weight.abs().mean().clamp(min=EPS)
    return (weight / scale).round().clamp(-1, 1), scale


def fake_ternary(weight: torch.Tensor) -> torch.Tensor:
    """The weight rounded to three values, in its own shape and dtype, with the gradient of the identity."""
    values, scale = ternary_quantize(weight.detach())
    rounded = (values * scale).to(weight.dtype)
    return rounded + (weight - weight.detach())  # an exact zero that carries the gradient


def fake_quantize_activation(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Symmetric rounding of (..., C) with one scale per token, in its own dtype, with the gradient of the identity."""
    top = 2 ** (bits - 1) - 1
    y = x.detach().float()
    scale = top / y.abs().amax(dim=-1, keepdim=True).clamp(min=EPS)
    y = (y * scale).round().clamp(-top - 1, top) / scale
    return y.to(x.dtype) + (x - x.detach())


class TernaryLinear(nn.Linear):
    """A linear layer (..., in) -> (..., out) that computes with ternary weights and keeps latent ones.

    Args:
        ternary_weights: round the weights; off for weights which are ternary as stored.
        activation_bits: width of the per-token input rounding, or None.
    """

    def __init__(self, *args, ternary_weights: bool = True, activation_bits: int | None = 8, **kwargs):
        super().__init__(*args, **kwargs)
        self.ternary_weights = ternary_weights
        self.activation_bits = activation_bits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = fake_ternary(self.weight) if self.ternary_weights else self.weight
        if self.activation_bits is not None:
            x = fake_quantize_activation(x, self.activation_bits)
        return F.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ternary_weights={self.ternary_weights}, activation_bits={self.activation_bits}"


def replace_with_ternary(
    model: nn.Module, patterns: list[str], ternary_weights: bool = True, activation_bits: int | None = 8
) -> list[str]:
    """Swap the linear layers whose dotted name fully matches one of `patterns` for `TernaryLinear`; returns their names.

    Raises:
        ValueError: a pattern that matches no linear layer.
    """
    linears = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    replaced = []
    for pattern in patterns:
        names = [name for name in linears if re.fullmatch(pattern, name)]
        if not names:
            raise ValueError(f"qat_config.ternary_modules: {pattern!r} matches no linear layer of the model.")
        for name in names:
            old = linears.pop(name)
            new = TernaryLinear(
                old.in_features,
                old.out_features,
                bias=old.bias is not None,
                device=old.weight.device,
                dtype=old.weight.dtype,
                ternary_weights=ternary_weights,
                activation_bits=activation_bits,
            )
            new.weight = old.weight
            if old.bias is not None:
                new.bias = old.bias
            model.set_submodule(name, new)
        replaced += names
    return replaced
