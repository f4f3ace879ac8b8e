"""Storage of low-bit weights: rounding to whole numbers, bytes on disk, panels in memory.

    weight (R, C)  ->  numbers (R, C) int8, scales float  ->  bytes (R, C / per_byte)  ->  panels

Notable:
- A byte on disk holds 8 signs, 5 trits, 2 nibbles or 1 number; rows start at a whole byte.
- Panels hold 16 rows next to each other, one 32-bit lane of a vector register for each (`pack_codes`). A dot product
  of four bytes then adds up inside a row, so nothing is summed across lanes and memory is read in order.
- Numbers in panels are unsigned, u = w + zero, because the x86 dot product takes unsigned times signed:
  sum w q = sum u q - zero sum q.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .configuration_microvlm import require

EPS = 1e-5  # floor of every scale, as in BitNet's reference code
ROWS, COLUMNS = 16, 64  # rows of a panel, and what its columns are padded to a multiple of
GROUP = 4  # bytes that a dot product adds up
MAX_COLUMNS = 2**17 - 1  # 128 * 128 * columns must stay below 2**31
ZERO = {2: 1, 4: 8, 8: 128}  # bits -> the code that means 0


def round_up(n: int, multiple: int) -> int:
    """Round a whole number up to a multiple."""
    return -(-n // multiple) * multiple


# ------------------------------------------------------------------------------------------------------ bytes on disk


@dataclass(frozen=True)
class Format:
    """How numbers are stored: `per_byte` columns are digits of a byte, the first lowest."""

    low: int
    high: int
    bits: int  # of a number in panels
    base: int  # of the digits
    per_byte: int  # digits of a byte; with one, the byte is the number itself

    @property
    def largest(self) -> int:
        """Largest byte that digits make."""
        return self.base**self.per_byte - 1

    @property
    def step(self) -> int:
        """Distance of two numbers."""
        return (self.high - self.low) // (self.base - 1)

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """Pack numbers (R, C), filled up with 0, into uint8 (R, ceil(C / per_byte))."""
        if self.per_byte == 1:
            return values.view(torch.uint8)
        digits = ((values - self.low) // self.step).to(torch.uint8)
        digits = F.pad(digits, (0, -values.shape[1] % self.per_byte), value=-self.low // self.step)
        return sum(digits[:, i :: self.per_byte] * self.base**i for i in range(self.per_byte))

    def unpack(self, packed: torch.Tensor, columns: int) -> torch.Tensor:
        """Invert `pack`: int8 (R, columns)."""
        if self.per_byte == 1:
            return packed.view(torch.int8)
        return numbers_of_bytes(self, packed.device)[packed.int()].flatten(1)[:, :columns]

    def check(self, packed: torch.Tensor, columns: int, where: str = "") -> None:
        """Raise a ValueError if bytes are not rows of `columns` numbers in this format."""
        width, shape = -(-columns // self.per_byte), f"{packed.dtype} {tuple(packed.shape)}"
        fits = packed.dtype == torch.uint8 and packed.ndim == 2 and packed.shape[1] == width
        require(fits, f"{where}{columns} weights a row take uint8 (rows, {width}), got {shape}.")
        if self.largest < 255 and packed.numel():
            most = int(packed.max())
            require(most <= self.largest, f"{where}a byte of five trits is at most {self.largest}, got {most}.")


FORMATS = {
    "binary": Format(-1, 1, 2, 2, 8),
    "ternary": Format(-1, 1, 2, 3, 5),
    "int4": Format(-8, 7, 4, 16, 2),
    "int8": Format(-128, 127, 8, 256, 1),
}


@functools.cache
def numbers_of_bytes(form: Format, device: torch.device) -> torch.Tensor:
    """Return the numbers of every byte up to the largest, int8 (256, per_byte)."""
    every = torch.arange(256, device=device).clamp(max=form.largest).unsqueeze(1)
    digits = every // form.base ** torch.arange(form.per_byte, device=device) % form.base
    return (form.low + form.step * digits).to(device, torch.int8)


# ----------------------------------------------------------------------------------------------------------- rounding


@dataclass(frozen=True)
class Scheme:
    """How the weight of a module is stored, an entry of `quantization_config.modules`."""

    format: str = "ternary"  # binary (1 bit, the sign), ternary (1.6 bits), int4 or int8
    group_size: int | str = "tensor"  # which weights share a scale: "tensor", "row", or a number of columns of a row
    activation_bits: int | None = 8  # 8 rounds the input per token, for products of whole numbers; None unpacks
    scale_type: str = "float32"  # or float16
    frequent_rows: int = 0  # of an embedding: the number of rows stored in `frequent_format`
    frequent_format: str = "int8"

    def __post_init__(self):
        size, frequent, formats = self.group_size, self.frequent_rows, ", ".join(FORMATS)
        grouped = size in ("tensor", "row") or isinstance(size, int) and size > 0
        for name, fits, expected in (
            ("format", self.format in [*FORMATS], f"one of {formats}"),  # a list: a value may have no hash
            ("frequent_format", self.frequent_format in [*FORMATS], f"one of {formats}"),
            ("group_size", grouped, "'tensor', 'row' or a number of columns"),
            ("activation_bits", self.activation_bits in (8, None), "8 or null"),
            ("scale_type", self.scale_type in ("float16", "float32"), "float16 or float32"),
            ("frequent_rows", type(frequent) is int and frequent >= 0, "a whole number"),
        ):
            require(fits, f"{name} must be {expected}, got {getattr(self, name)!r}.")

    @property
    def scale_dtype(self) -> torch.dtype:
        return getattr(torch, self.scale_type)

    def groups(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the shape of the scales."""
        if self.group_size == "tensor":
            return 1, 1
        return rows, 1 if self.group_size == "row" else -(-columns // self.group_size)


def group_weights(weight: torch.Tensor, group_size: int | str) -> torch.Tensor:
    """Split a matrix into groups that share a scale: (1 or R, groups, size), padded with 0."""
    if group_size == "tensor":
        return weight.reshape(1, 1, -1)
    size = weight.shape[1] if group_size == "row" else group_size
    return F.pad(weight, (0, -weight.shape[1] % size)).unflatten(1, (-1, size))


def spread(scale: torch.Tensor, group_size: int | str, columns: int) -> torch.Tensor:
    """Expand scales to what multiplies a matrix: one per column where groups have their own."""
    return scale.repeat_interleave(group_size, 1)[:, :columns] if isinstance(group_size, int) else scale


def ternary_quantize(weight: torch.Tensor, group_size: int | str = "tensor") -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix to three values by its mean magnitude (BitNet b1.58, arXiv 2402.17764).

    group_size: what shares a scale: "tensor", "row", or a number of columns (the last group may be shorter).

    Returns values in {-1, 0, 1}, float32 (R, C), and the scales, float32: () for the tensor, else (R, 1) or
    (R, ceil(C / group_size)). Values times scales approximate the weight.
    """
    weight = weight.float()
    if group_size == "tensor":
        scale = weight.abs().mean().clamp(min=EPS)
    else:
        members = group_weights(torch.ones_like(weight[:1]), group_size).sum(-1)
        scale = (group_weights(weight.abs(), group_size).sum(-1) / members).clamp(min=EPS)
    return (weight / spread(scale, group_size, weight.shape[1])).round().clamp(-1, 1), scale


def quantize_weight(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix to whole numbers with scales that fit their groups.

    Binary and ternary scales start at the mean magnitude and are refined by least squares, which leaves a ternary
    matrix what it is. Those of integers are the best of 16 fractions of the largest magnitude.

    Returns int8 (R, C) and the scales, shape `scheme.groups(R, C)`. Numbers times scales approximate the weight.
    """
    form, size = FORMATS[scheme.format], scheme.group_size
    groups = group_weights(weight.float(), size)
    inside = group_weights(torch.ones_like(weight, dtype=torch.float32), size)

    def rounded(scale: torch.Tensor) -> torch.Tensor:
        if scheme.format == "binary":
            return torch.where(groups < 0, -inside, inside)
        return (groups / scale).round().clamp(form.low, form.high)

    if form.bits == 2:
        # alternate between rounding and the scale of least squares
        scale = groups.abs().mean(-1, keepdim=True).clamp(min=EPS)
        for _ in range(8):
            values = rounded(scale)
            norm = values.square().sum(-1, keepdim=True).clamp(min=1)
            scale = ((groups * values).sum(-1, keepdim=True) / norm).clamp(min=EPS)
    else:
        # try fractions of the scale that reaches the largest number
        largest = groups.abs().amax(-1, keepdim=True).clamp(min=EPS) / form.high
        scale, least = largest, torch.full_like(largest, torch.inf)
        for fraction in torch.linspace(1, 0.55 if form.bits == 4 else 0.9, 16).tolist():
            error = (rounded(largest * fraction) * largest * fraction - groups).square().sum(-1, keepdim=True)
            scale, least = torch.where(error < least, largest * fraction, scale), torch.minimum(error, least)
    # round with the scale as it is stored, and drop the padding
    scale = scale.to(scheme.scale_dtype)
    values = rounded(scale.float()).to(torch.int8)
    if size != "tensor":
        values = values.flatten(1)[:, : weight.shape[1]]
    return values.reshape(weight.shape), scale.squeeze(-1)


# ----------------------------------------------------------------------------------------------------------- panels


def panel_bytes(rows: int, columns: int, bits: int) -> int:
    """Return the length of the panels of a (rows, columns) matrix."""
    fits = 0 < columns <= MAX_COLUMNS
    require(fits, f"columns is {columns}; expected 1 to {MAX_COLUMNS}, so that a sum fits 32 bits.")
    return round_up(rows, ROWS) * round_up(columns, COLUMNS) * bits // 8


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Lay out unsigned codes (R, C) uint8 as panels, (`panel_bytes`(R, C, bits),) uint8.

    A panel holds 16 rows as vectors of 64 bytes, four bytes of every row. A byte has 8 / bits fields, the first in the
    lowest bits. The first fields of the four bytes are four neighbouring columns, the next fields the next four.
    Columns are padded with zero weights to a multiple of 64, rows to a multiple of 16.
    """
    R, C = codes.shape
    codes = F.pad(codes, (0, -C % COLUMNS, 0, -R % ROWS), value=ZERO[bits])
    # four bytes of a row as one number: (panel, row, vector, field), then fields joined
    fours = codes.view(torch.int32).view(len(codes) // ROWS, ROWS, -1, 8 // bits)
    packed = fours[..., 0].clone()
    for k in range(1, 8 // bits):
        packed |= fours[..., k] << (k * bits)
    return packed.transpose(1, 2).reshape(-1).view(torch.uint8)


def unpack_panels(panels: torch.Tensor, rows: int, columns: int, bits: int) -> torch.Tensor:
    """Return the numbers of panels, int8 (rows, columns)."""
    count, padded = round_up(rows, ROWS) // ROWS, round_up(columns, COLUMNS)
    # split bytes into fields, (panel, vector, field, row, byte)
    packed = panels.view(count, padded * bits // (8 * GROUP), 1, ROWS, GROUP)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=panels.device).view(-1, 1, 1)
    codes = (packed >> shifts) & (2**bits - 1)
    # rows first, without the padding
    codes = codes.permute(0, 3, 1, 2, 4).reshape(count * ROWS, padded)
    return (codes[:rows, :columns] - ZERO[bits]).view(torch.int8)


def panels_from_bytes(packed: torch.Tensor, columns: int, form: Format) -> torch.Tensor:
    """Lay out packed rows, uint8 (R, ceil(columns / per_byte)), as the panels of their weights."""
    form.check(packed, columns)
    length, every = panel_bytes(ROWS, columns, form.bits), torch.arange(256, dtype=torch.uint8, device=packed.device)
    codes = form.unpack(every.unsqueeze(1), form.per_byte).view(torch.uint8) + ZERO[form.bits]  # wraps: -1 is 255
    panels = packed.new_empty(round_up(len(packed), ROWS) // ROWS, length)
    step = round_up(2**20 // columns, ROWS)  # rows at a time: a large matrix is never unpacked as a whole
    for start in range(0, len(packed), step):
        part = packed[start : start + step]
        numbers = codes[part.flatten().int()].view(len(part), -1)[:, :columns]
        panels[start // ROWS : (start + step) // ROWS] = pack_codes(numbers, form.bits).view(-1, length)
    return panels.view(-1)
