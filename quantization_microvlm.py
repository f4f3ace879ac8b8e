"""Ternary training: BitNet b1.58 (arXiv 2402.17764) weights with the straight-through estimator.

The latent weights stay in floating point and are rounded in every forward pass, so one checkpoint trains and runs the same way:

    scale = mean |W|,   W_q = round(W / scale) clipped to {-1, 0, 1},   y = x_q (W_q scale)^T + b

with x_q the input rounded per token to `activation_bits` bits. Same arithmetic as the online `AutoBitLinear` of transformers, without
its need for a C compiler at run time.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .kernels_microvlm import (
    ZERO,
    MixedRows,
    low_bit_linear,
    low_bit_linear_mixed,
    panels_from_bytes,
    panels_from_trits,
)

QUANT_METHOD = "microvlm"
# of numbers and scales, as safetensors calls them
STORED_DTYPES = {torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}
EPS = 1e-5  # floor of every scale, as in BitNet's reference code


def ternary_quantize(weight: torch.Tensor, group_size: int | str = "tensor") -> tuple[torch.Tensor, torch.Tensor]:
    """Absmean rounding of a weight matrix.

    Args:
        weight: (R, C), any floating dtype.
        group_size: what shares a scale: "tensor", "row", or so many columns of a row (the last group may be shorter).

    Returns:
        Values in {-1, 0, 1}, float32, of the same shape, and the scales, float32: () for the tensor, else (R, 1) or (R, ceil(C / group_size)).
        Values times scales approximate the weight.
    """
    weight = weight.float()
    if group_size == "tensor":
        scale = weight.abs().mean().clamp(min=EPS)
    else:
        size = weight.shape[1] if group_size == "row" else group_size
        groups = F.pad(weight.abs(), (0, -weight.shape[1] % size)).unflatten(1, (-1, size))
        members = torch.full_like(groups[0, :, 0], size)
        members[-1] -= groups.shape[1] * size - weight.shape[1]
        scale = (groups.sum(-1) / members).clamp(min=EPS)
    return (weight / spread(scale, group_size, weight.shape[1])).round().clamp(-1, 1), scale


def spread(scale: torch.Tensor, group_size: int | str, columns: int) -> torch.Tensor:
    """Scales as they multiply a matrix of so many columns: one per column where groups have their own."""
    return scale.repeat_interleave(group_size, 1)[:, :columns] if isinstance(group_size, int) else scale


def fake_ternary(weight: torch.Tensor, group_size: int | str = "tensor") -> torch.Tensor:
    """The weight rounded to three values, in its own shape and dtype, with the gradient of the identity."""
    values, scale = ternary_quantize(weight.detach(), group_size)
    rounded = (values * spread(scale, group_size, weight.shape[1])).to(weight.dtype)
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
        group_size: of the rounding, see `ternary_quantize`.
    """

    def __init__(
        self,
        *args,
        ternary_weights: bool = True,
        activation_bits: int | None = 8,
        group_size: int | str = "tensor",
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.ternary_weights = ternary_weights
        self.activation_bits = activation_bits
        self.group_size = group_size

    def rounded_weight(self) -> torch.Tensor:
        """The weight that `forward` computes with."""
        return fake_ternary(self.weight, self.group_size) if self.ternary_weights else self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.rounded_weight()
        if self.activation_bits is not None:
            x = fake_quantize_activation(x, self.activation_bits)
        return F.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ternary_weights={self.ternary_weights}, activation_bits={self.activation_bits}"


def replace_with_ternary(
    model: nn.Module,
    patterns: list[str],
    ternary_weights: bool = True,
    activation_bits: int | None = 8,
    group_size: int | str = "tensor",
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
                group_size=group_size,
            )
            new.weight = old.weight
            if old.bias is not None:
                new.bias = old.bias
            model.set_submodule(name, new)
        replaced += names
    return replaced


# ------------------------------------------------------------------------------------------------------ packed weights


def pack_trits(values: torch.Tensor) -> torch.Tensor:
    """Five values of {-1, 0, 1} to a byte, rows by themselves: 1.6 bits a weight.

    A byte is the sum of (value + 1) * 3**i over its five columns, i = 0 first; the last byte of a row is filled up with zeros.

    Args:
        values: (R, C), any dtype.

    Returns:
        uint8 (R, ceil(C / 5)).

    Raises:
        ValueError: another value than -1, 0 or 1.
    """
    if bool((values.abs() > 1).any()) or bool((values != values.round()).any()):
        raise ValueError("values must be -1, 0 or 1.")
    digits = F.pad(values.to(torch.uint8) + 1, (0, -values.shape[1] % 5), value=1)
    out = torch.zeros(len(digits), digits.shape[1] // 5, dtype=torch.uint8, device=values.device)
    for i in range(5):
        out += digits[:, i::5] * 3**i
    return out


def unpack_trits(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of `pack_trits`.

    Args:
        packed: uint8 (R, ceil(columns / 5)).
        columns: C.

    Returns:
        int8 (R, C).

    Raises:
        ValueError: another shape, or a byte above 242, which no five trits make.
    """
    check_trits(packed, columns)
    return trits_of_bytes(packed.device)[packed.int()].flatten(1)[:, :columns]


@functools.cache
def trits_of_bytes(device: torch.device) -> torch.Tensor:
    """The five values of every byte, int8 (243, 5)."""
    return (torch.arange(243).unsqueeze(1) // 3 ** torch.arange(5) % 3 - 1).to(device, torch.int8)


def check_trits(packed: torch.Tensor, columns: int) -> None:
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != -(-columns // 5):
        raise ValueError(
            f"{columns} trits a row take uint8 (rows, {-(-columns // 5)}), got {packed.dtype} {tuple(packed.shape)}."
        )
    if packed.numel() and int(packed.max()) > 242:
        raise ValueError(f"a byte of five trits is at most 242, got {int(packed.max())}.")


def pack_nibbles(values: torch.Tensor) -> torch.Tensor:
    """Two values of -8 to 7 to a byte, the first in the low half: (R, C) -> uint8 (R, ceil(C / 2))."""
    codes = F.pad((values + 8).to(torch.uint8), (0, values.shape[1] % 2), value=8)
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack_nibbles(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of `pack_nibbles`: int8 (R, columns)."""
    return torch.stack([packed & 15, packed >> 4], 2).flatten(1)[:, :columns].to(torch.int8) - 8


def pack_signs(values: torch.Tensor) -> torch.Tensor:
    """Eight values of -1 or 1 to a byte, the first in the lowest bit: (R, C) -> uint8 (R, ceil(C / 8))."""
    bits = F.pad((values > 0).to(torch.uint8), (0, -values.shape[1] % 8)).unflatten(1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=values.device)).sum(-1, dtype=torch.uint8)


def unpack_signs(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of `pack_signs`: int8 (R, columns)."""
    bits = packed.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(1)[:, :columns].to(torch.int8) * 2 - 1


def pack_bytes(values: torch.Tensor) -> torch.Tensor:
    """Int8 (R, C) as bytes (R, C)."""
    return values.view(torch.uint8)


def unpack_bytes(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Bytes (R, C) -> int8 (R, C)."""
    return packed.view(torch.int8)


@dataclass(frozen=True)
class Format:
    """How whole numbers are stored.

    Attributes:
        low, high: the range.
        bits: of the numbers in memory (`kernels_microvlm.py`).
        per_byte: how many share a byte on disk.
        pack, unpack: between int8 (R, C) and uint8 (R, ceil(C / per_byte)).
    """

    low: int
    high: int
    bits: int
    per_byte: int
    pack: Callable[[torch.Tensor], torch.Tensor]
    unpack: Callable[[torch.Tensor, int], torch.Tensor]


FORMATS = {
    "binary": Format(-1, 1, 2, 8, pack_signs, unpack_signs),
    "ternary": Format(-1, 1, 2, 5, pack_trits, unpack_trits),
    "int4": Format(-8, 7, 4, 2, pack_nibbles, unpack_nibbles),
    "int8": Format(-128, 127, 8, 1, pack_bytes, unpack_bytes),
}


def quantize_weight(weight: torch.Tensor, scheme: "Scheme") -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as whole numbers and scales; numbers times scale approximate it.

    Scales are fitted to their group: binary and ternary ones start at absmean and are refined by least squares, which leaves a matrix that is ternary already
    what it is; those of integers are the best of 16 fractions of the largest magnitude.

    Args:
        weight: (R, C), any floating dtype.
        scheme: format and groups.

    Returns:
        int8 (R, C) and the scales, (1, 1) for the tensor, (R, 1) for rows, (R, ceil(C / group_size)) for groups.
    """
    form = FORMATS[scheme.format]
    if scheme.group_size == "tensor":
        groups = weight.float().reshape(1, 1, -1)
    else:
        size = weight.shape[1] if scheme.group_size == "row" else scheme.group_size
        groups = F.pad(weight.float(), (0, -weight.shape[1] % size)).unflatten(1, (-1, size))
    rounded = lambda scale: (groups / scale).round().clamp(form.low, form.high)  # noqa: E731
    if scheme.format == "binary":
        inside = torch.ones_like(groups)
        if scheme.group_size != "tensor":
            inside = F.pad(torch.ones_like(weight, dtype=torch.float32), (0, -weight.shape[1] % size)).view(
                groups.shape
            )
        rounded = lambda scale: torch.where(groups < 0, -inside, inside)  # noqa: E731
    if form.bits == 2:
        scale = groups.abs().mean(-1, keepdim=True).clamp(min=EPS)
        for _ in range(8):
            values = rounded(scale)
            scale = (
                (groups * values).sum(-1, keepdim=True) / values.square().sum(-1, keepdim=True).clamp(min=1)
            ).clamp(min=EPS)
    else:
        largest = groups.abs().amax(-1, keepdim=True).clamp(min=EPS) / form.high
        scale, least = largest, torch.full_like(largest, torch.inf)
        for fraction in torch.linspace(1, 0.55 if form.bits == 4 else 0.9, 16).tolist():
            error = (rounded(largest * fraction) * largest * fraction - groups).square().sum(-1, keepdim=True)
            scale, least = torch.where(error < least, largest * fraction, scale), torch.minimum(error, least)
    scale = scale.to(scheme.scale_dtype)
    values = rounded(scale.float()).to(torch.int8).flatten(1)[:, : weight.shape[1] if len(groups) > 1 else None]
    return values.reshape(-1)[: weight.numel()].view(weight.shape), scale.squeeze(-1)


@dataclass(frozen=True)
class Scheme:
    """How a module's weight is stored, an entry of `quantization_config.modules`.

    Args:
        format: binary (1 bit, the sign), ternary (1.6 bits), int4 or int8.
        group_size: which weights share a scale: "tensor", "row", or so many columns of a row.
        activation_bits: round the input per token to 8 bits, which makes the product one of whole numbers; None: the weight is unpacked to
            floating point in every pass.
        scale_type: float16 or float32.
        frequent_rows: of an embedding: so many rows are stored in `frequent_format`.
        frequent_format: of those rows.

    Raises:
        ValueError: another value.
    """

    format: str = "ternary"
    group_size: int | str = "tensor"
    activation_bits: int | None = 8
    scale_type: str = "float32"
    frequent_rows: int = 0
    frequent_format: str = "int8"

    def __post_init__(self):
        for name in ("format", "frequent_format"):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in FORMATS:
                raise ValueError(f"{name} must be one of {', '.join(FORMATS)}, got {getattr(self, name)!r}.")
        if self.group_size not in ("tensor", "row") and not (isinstance(self.group_size, int) and self.group_size > 0):
            raise ValueError(f"group_size must be 'tensor', 'row' or a number of columns, got {self.group_size!r}.")
        if self.activation_bits not in (8, None):
            raise ValueError(f"activation_bits must be 8 or null, got {self.activation_bits!r}.")
        if self.scale_type not in ("float16", "float32"):
            raise ValueError(f"scale_type must be float16 or float32, got {self.scale_type!r}.")
        if type(self.frequent_rows) is not int or self.frequent_rows < 0:
            raise ValueError(f"frequent_rows must be a whole number, got {self.frequent_rows!r}.")

    @property
    def scale_dtype(self) -> torch.dtype:
        return getattr(torch, self.scale_type)

    def groups(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the scales."""
        if self.group_size == "tensor":
            return 1, 1
        return rows, 1 if self.group_size == "row" else -(-columns // self.group_size)


def kernel_input(x: torch.Tensor) -> torch.Tensor:
    """Float16, which the kernels do not take, as float32; another dtype as it is."""
    return x.float() if x.dtype == torch.float16 else x


class PackedWeight(nn.Module):
    """A matrix (R, C) of whole numbers, stored packed, and its scales.

    The first product lays the numbers out for the kernels, in 2, 4 or 8 bits each; the packed bytes stay what `state_dict` has.

    Args:
        rows, columns: R and C.
        scheme: how it is stored.
    """

    def __init__(self, rows: int, columns: int, scheme: Scheme, device=None):
        super().__init__()
        self.rows, self.columns, self.scheme, self.format = rows, columns, scheme, FORMATS[scheme.format]
        shape = (rows, -(-columns // self.format.per_byte))
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.uint8, device=device))
        scales = torch.ones(scheme.groups(rows, columns), dtype=scheme.scale_dtype, device=device)
        self.register_buffer("weight_scale", scales)
        self.panels = None

    @torch.no_grad()
    def store(self, weight: torch.Tensor, as_trained: bool = False) -> None:
        """Quantise a matrix (R, C) into this one; `as_trained` rounds as a `TernaryLinear` with the scheme's groups."""
        if as_trained:
            values, scale = ternary_quantize(weight, self.scheme.group_size)
            values, self.weight_scale = values.to(torch.int8), scale.view(-1, 1) if scale.ndim < 2 else scale
        else:
            values, self.weight_scale = quantize_weight(weight, self.scheme)
        self.weight, self.panels = self.format.pack(values), None

    def check(self, name: str) -> None:
        """Raise a ValueError that names the tensor if its bytes are not of this format."""
        if self.scheme.format == "ternary":
            try:
                check_trits(self.weight, self.columns)
            except ValueError as error:
                raise ValueError(f"{name}.weight: {error}") from error

    def values(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The numbers of some rows, or of all, int8 (N, C)."""
        return self.format.unpack(self.weight if rows is None else self.weight[rows], self.columns)

    def dequantize(self, rows: torch.Tensor | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Numbers times scales, of some rows or of all, (N, C)."""
        scale = self.weight_scale.float()
        if rows is not None and len(scale) > 1:
            scale = scale[rows]
        return (self.values(rows).float() * spread(scale, self.scheme.group_size, self.columns)).to(dtype)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x (..., C) times the transposed matrix, plus bias, (..., R)."""
        if not self.whole_numbers:
            if self.scheme.activation_bits is not None:
                x = fake_quantize_activation(x, self.scheme.activation_bits)
            return F.linear(x, self.dequantize(dtype=x.dtype), None if bias is None else bias.to(x.dtype))
        self.lay_out()
        row_bias = None if bias is None else bias.detach().float()
        matrix = (self.panels, self.row_scales, row_bias, self.rows, self.columns, self.format.bits)
        return low_bit_linear(kernel_input(x), *matrix).to(x.dtype)

    @property
    def whole_numbers(self) -> bool:
        """Whether products are of whole numbers, in the kernels: with rounded inputs and a scale for the tensor or a row."""
        return self.scheme.activation_bits == 8 and not isinstance(self.scheme.group_size, int)

    def lay_out(self) -> None:
        """`panels` and `row_scales` for the kernels, if they are not there yet."""
        if self.panels is None:
            self.row_scales, self.panels = self.row_scale(), panels_of([self])

    def row_scale(self) -> torch.Tensor:
        return self.weight_scale.float().flatten().expand(self.rows).contiguous()

    def _load_from_state_dict(self, *args, **kwargs):
        self.panels = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn, recurse=True):
        scale, self.panels = self.weight_scale, None
        super()._apply(fn, recurse)
        self.weight_scale = scale.to(self.weight.device)  # a new dtype is not for scales
        return self

    def extra_repr(self) -> str:
        return f"{self.columns}, {self.rows}, {self.scheme}"


def panels_of(weights: list[PackedWeight]) -> torch.Tensor:
    """The numbers of matrices with one format and width, one below the other, as the kernels read them."""
    first = weights[0]
    packed = torch.cat([w.weight for w in weights]) if len(weights) > 1 else first.weight
    if first.scheme.format == "ternary":
        return panels_from_trits(packed, first.columns)
    form, every = first.format, torch.arange(256, dtype=torch.uint8, device=packed.device).unsqueeze(1)
    digits = form.unpack(every, form.per_byte).view(torch.uint8) + ZERO[form.bits]  # wraps: -1 is 255
    return panels_from_bytes(packed, first.columns, form.bits, digits)


class PackedLinear(PackedWeight):
    """A linear layer (..., in) -> (..., out) with a packed weight.

    Args:
        in_features, out_features, bias: as of `nn.Linear`.
        scheme: how the weight is stored.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, scheme: Scheme, device=None, dtype=None):
        super().__init__(out_features, in_features, scheme, device)
        self.in_features, self.out_features = in_features, out_features
        self.trained: dict | None = None  # what the `TernaryLinear` in this place was made with, if one was
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, self.bias)

    @torch.no_grad()
    def unpacked(self, dtype: torch.dtype) -> nn.Linear:
        """A layer in floating point that computes with the same weights: a `TernaryLinear` where there was one."""
        weight = self.dequantize()
        kwargs = {"bias": self.bias is not None, "device": weight.device, "dtype": dtype}
        if self.trained is None:
            new = nn.Linear(self.columns, self.rows, **kwargs)
        else:
            new = TernaryLinear(self.columns, self.rows, **kwargs, **self.trained)
            if new.ternary_weights:  # values times scale / mean |values|, whose absmean is the scale
                _, share = ternary_quantize(self.values().float(), new.group_size)
                weight = weight / spread(share, new.group_size, self.columns)
        new.weight.data = weight.to(dtype)
        if self.bias is not None:
            new.bias.data = self.bias.detach().to(dtype)
        return new


class PackedEmbedding(nn.Module):
    """A vocabulary (V, D) of packed rows, which is also the head's matrix when they are tied. Frequent rows may have a format of their own.

    Args:
        num_embeddings, embedding_dim: V and D.
        scheme: how rows are stored.
        dtype: of `forward`.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, scheme: Scheme, device=None, dtype=None):
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.dtype = dtype or torch.get_default_dtype()
        self.rest = PackedWeight(num_embeddings - scheme.frequent_rows, embedding_dim, scheme, device)
        self.frequent = None
        if scheme.frequent_rows:
            own = replace(scheme, format=scheme.frequent_format, frequent_rows=0)
            self.frequent = PackedWeight(scheme.frequent_rows, embedding_dim, own, device)
            bits = torch.zeros(-(-num_embeddings // 8), dtype=torch.uint8, device=device)
            self.register_buffer("is_frequent", bits)  # a bit per row, the first row's lowest
        self._places = self._mixed = None

    @torch.no_grad()
    def store(self, weight: torch.Tensor, counts: torch.Tensor | None = None) -> None:
        """Quantise a vocabulary (V, D); `counts` (V,) say how often its rows are used."""
        if self.frequent is None:
            return self.rest.store(weight)
        if counts is None:
            raise ValueError("frequent_rows needs counts of the tokens.")
        chosen = torch.zeros(len(weight), dtype=torch.bool)
        chosen[counts.argsort(descending=True, stable=True)[: self.frequent.rows]] = True
        self.frequent.store(weight[chosen])
        self.rest.store(weight[~chosen])
        self.is_frequent = pack_signs(chosen.unsqueeze(0))[0]
        self._places = self._mixed = None

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Which rows are frequent (V,), and every row's place in its part (V,)."""
        if self._places is None:
            chosen = unpack_signs(self.is_frequent.unsqueeze(0), self.num_embeddings)[0] > 0
            self._places = chosen, torch.where(chosen, chosen.cumsum(0), (~chosen).cumsum(0)) - 1
        return self._places

    def _load_from_state_dict(self, *args, **kwargs):
        self._places = self._mixed = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn, recurse=True):
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        self._places = self._mixed = None
        return super()._apply(fn, recurse)

    def check(self, name: str) -> None:
        self.rest.check(f"{name}.rest")
        if self.frequent is not None:
            self.frequent.check(f"{name}.frequent")
            if int(self.places()[0].sum()) != self.frequent.rows:
                raise ValueError(
                    f"{name}.is_frequent marks {int(self.places()[0].sum())} rows of {self.frequent.rows}."
                )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """All rows, (N, D)."""
        return self.rows_of(torch.arange(self.num_embeddings, device=self.rest.weight_scale.device), dtype)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Rows (..., D) of tokens (...)."""
        return self.rows_of(input_ids.flatten(), self.dtype).view(*input_ids.shape, -1)

    def rows_of(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows (N, D) of tokens (N,)."""
        if self.frequent is None:
            return self.rest.dequantize(ids, dtype)
        chosen, place = (t[ids] for t in self.places()[:2])
        rows = torch.empty(len(ids), self.embedding_dim, dtype=dtype, device=ids.device)
        for part, mask in ((self.frequent, chosen), (self.rest, ~chosen)):
            if len(where := mask.nonzero().squeeze(1)):
                rows[where] = part.dequantize(place[where], dtype)
        return rows

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of hidden states (..., D)."""
        if self.frequent is None:
            return self.rest.product(x)
        if not self.rest.whole_numbers:
            logits = x.new_empty(*x.shape[:-1], self.num_embeddings)
            for part, where in self.parts():
                logits[..., where] = part.product(x)
            return logits
        if self._mixed is None:
            self._mixed = []
            for part, where in self.parts():
                part.lay_out()
                rows = MixedRows(part.panels, part.row_scales, part.format.bits, where, self.num_embeddings)
                self._mixed.append(rows)
        return low_bit_linear_mixed(kernel_input(x), self._mixed, self.embedding_dim).to(x.dtype)

    def parts(self) -> list[tuple[PackedWeight, torch.Tensor]]:
        """The two parts, and which rows each holds."""
        chosen = self.places()[0]
        return [(part, mask.nonzero().squeeze(1)) for part, mask in ((self.frequent, chosen), (self.rest, ~chosen))]


class PackedHead(nn.Module):
    """The head of a model whose vocabulary is a `PackedEmbedding`, which it shares and does not own."""

    def __init__(self, embedding: PackedEmbedding):
        super().__init__()
        self.shared = (embedding,)  # a tuple: not a part, so not saved twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared[0].product(x)


# ------------------------------------------------------------------------------------------------------ in from_pretrained


class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint.

    Args:
        modules: regular expression on a module's dotted name, matched whole -> entries of `Scheme`; the first that matches counts. A module that
            none matches stays as it is.
        order: the expressions in the order in which they are tried, as config.json sorts the names of `modules`; default: theirs.

    Raises:
        ValueError: no such object, an entry that `Scheme` refuses, or an order of other expressions.
    """

    def __init__(self, modules: dict[str, dict] | None = None, order: list[str] | None = None, **kwargs):
        self.quant_method = QUANT_METHOD
        if not isinstance(modules, dict) or not all(isinstance(values, dict) for values in modules.values()):
            raise ValueError(
                f"quantization_config.modules must be an object of expressions with an object each, got {modules!r}."
            )
        for pattern in modules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"quantization_config.modules: {pattern!r} is not a regular expression: {error}."
                ) from error
        if order is not None and not (
            isinstance(order, list) and all(isinstance(p, str) for p in order) and sorted(order) == sorted(modules)
        ):
            raise ValueError(
                "quantization_config.order must hold every expression of quantization_config.modules once."
            )
        self.modules = {pattern: modules[pattern] for pattern in order or modules}
        if list(self.modules) != sorted(self.modules):
            self.order = list(self.modules)
        self.schemes()

    def schemes(self) -> dict[str, Scheme]:
        known = {f.name for f in fields(Scheme)}
        for pattern, values in self.modules.items():
            if unknown := sorted(set(values) - known):
                raise ValueError(f"{pattern}: unknown key {', '.join(unknown)}. Known: {', '.join(sorted(known))}.")
        return {pattern: Scheme(**values) for pattern, values in self.modules.items()}


def replace_with_packed(
    model: nn.Module, config: PackedConfig, dtype: torch.dtype | None = None
) -> dict[str, nn.Module]:
    """Swap the linear layers and embeddings that `config` names for packed ones of the same shape; a tied head follows its embedding.

    Args:
        model: on any device, `meta` included.
        config: which, and how.
        dtype: of the packed embeddings' output and of biases; default: that of the weight.

    Returns:
        What was put in, by name.

    Raises:
        ValueError: a pattern that matches no linear layer or embedding, or a format that a layer does not take.
    """
    new, used = {}, set()
    schemes = config.schemes()
    for name, module in model.named_modules():
        pattern = next((p for p in schemes if re.fullmatch(p, name)), None)
        if pattern is None or not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        used.add(pattern)
        scheme, weight = schemes[pattern], module.weight
        kwargs = {"device": weight.device, "dtype": dtype or weight.dtype}
        if isinstance(module, nn.Embedding):
            new[name] = PackedEmbedding(*weight.shape, scheme, **kwargs)
        elif scheme.frequent_rows:
            raise ValueError(f"{name} is a linear layer: frequent_rows is for embeddings.")
        else:
            new[name] = PackedLinear(module.in_features, module.out_features, module.bias is not None, scheme, **kwargs)
            if isinstance(module, TernaryLinear):
                options = ("ternary_weights", "activation_bits", "group_size")
                new[name].trained = {option: getattr(module, option) for option in options}
    if missing := [p for p in schemes if p not in used]:
        raise ValueError(
            f"quantization_config.modules: {missing[0]!r} matches no linear layer or embedding of the model."
        )
    for name, module in new.items():
        model.set_submodule(name, module)
    embedding = model.get_input_embeddings()
    if isinstance(embedding, PackedEmbedding):
        if not model.config.get_text_config().tie_word_embeddings:
            raise ValueError("the vocabulary can be packed when the head is tied to it.")
        model.set_output_embeddings(PackedHead(embedding))
        model._tied_weights_keys = model.all_tied_weights_keys = {}
    return new


class PackedQuantizer(HfQuantizer):
    """Opens packed checkpoints in `from_pretrained` and saves them as they are."""

    requires_calibration = True  # there is nothing to quantise on the way: microvlm pack writes the checkpoint

    def _process_model_before_weight_loading(self, model, dtype=None, checkpoint_files=None, **kwargs):
        new = replace_with_packed(model, self.quantization_config, dtype)
        expected = {f"{name}.{key}": t for name, module in new.items() for key, t in module.state_dict().items()}
        state, missing = model.state_dict(), set(expected) if checkpoint_files else set()
        for file in checkpoint_files or []:
            with safe_open(file, framework="pt") as tensors:
                for name in sorted(state.keys() & set(tensors.keys())):
                    stored, target = tensors.get_slice(name), state[name]
                    shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
                    if name in expected and shape != tuple(target.shape):
                        raise ValueError(f"{name} has the shape {shape}, expected {tuple(target.shape)}.")
                    if name in expected and not name.endswith(".bias"):
                        if dtype != (want := STORED_DTYPES[target.dtype]):
                            raise ValueError(f"{name} is stored as {dtype}, expected {want}.")
                    elif target.is_floating_point() and not dtype.startswith(("F", "BF")):  # transformers casts those
                        raise ValueError(f"{name} is stored as {dtype}, expected a floating point type.")
                missing -= set(tensors.keys())
        if missing:
            raise ValueError(f"{min(missing)} is missing in the packed checkpoint.")

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name, module in model.named_modules():
            if isinstance(module, (PackedEmbedding, PackedLinear)):
                module.check(name)

    def _dequantize(self, model, dtype=None):
        """Plain layers in the place of packed ones. What was trained ternary gets weights that round to the same numbers and scales."""
        dtype = dtype or model.dtype
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedEmbedding):
                new = nn.Embedding(module.num_embeddings, module.embedding_dim, dtype=dtype)
                new.weight.data = module.dequantize().to(dtype)
            elif isinstance(module, PackedLinear):
                new = module.unpacked(dtype)
            elif isinstance(module, PackedHead):
                V, D = module.shared[0].num_embeddings, module.shared[0].embedding_dim
                new = nn.Linear(D, V, bias=False, device="meta")  # tied below
            else:
                module.__dict__.pop("_decoder", None)  # of a MicroVLMModel
                continue
            model.set_submodule(name, new.requires_grad_().train(module.training))
        model.__dict__.pop("_tied_weights_keys", None)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        model.tie_weights()
        kept = {name: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
        model.to(dtype)
        for name, buffer in kept.items():  # rotary frequencies, which from_pretrained does not round either
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def register_quantizer() -> None:
    """Give transformers this copy's classes for packed checkpoints.

    Every checkpoint brings a copy of this file. `from_pretrained` of the model calls this first, so each model gets the classes of its
    own copy, whichever copy was imported last.
    """
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = PackedConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = PackedQuantizer
