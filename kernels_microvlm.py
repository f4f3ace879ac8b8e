"""Products with 2, 4 and 8-bit weights that stay packed in memory, on a CPU without a C compiler.

The arithmetic is that of BitNet b1.58 (arXiv 2402.17764) with one scale per token and one per output row. Every sum is
an integer, so compiled code and torch give the same bits:

    s_m = 127 / max(max |x_m|, 1e-5),   q_m = round(x_m s_m),   y_mr = (sum_c w_rc q_mc) (scale_r / s_m) + bias_r

An operation here runs a compiled kernel for CPU tensors where it can, else its `_reference` in torch; on a GPU always
the reference. Nothing here has a gradient. M counts tokens, C columns of the input, R rows of the weight.
"""

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .codegen_microvlm import kernel
from .configuration_microvlm import require
from .llvm_microvlm import native_available
from .packing_microvlm import COLUMNS, EPS, ROWS, ZERO, panel_bytes, round_up, unpack_panels
from .threads_microvlm import helper_count, run, run_many

DTYPES = (torch.float32, torch.bfloat16)
CPU = torch.device("cpu")
GRAIN = 2**17  # least products in a piece of work; smaller calls stay on the caller
PIECES = 8  # of a large product, for each thread
KINDS = {(False, False): "plain", (False, True): "rms", (True, False): "silu", (True, True): "relu2"}  # gated, normed


class Quantized(NamedTuple):
    """M tokens rounded to 8 bits, x ~ x_q / s."""

    x_q: torch.Tensor  # (M, C up to a multiple of 64) int8, padded with 0
    s: torch.Tensor  # (M,) float32
    sums: torch.Tensor  # (M,) int32, of x_q


@dataclass(frozen=True, eq=False)
class Matrix:
    """A packed weight (rows, columns) as the kernels read it."""

    panels: torch.Tensor  # uint8, see `pack_codes`
    scale: torch.Tensor  # (rows,) float32
    rows: int
    columns: int
    bits: int

    def __post_init__(self):
        length, device = panel_bytes(self.rows, self.columns, self.bits), self.panels.device
        check("panels", self.panels, (length,), torch.uint8, device)
        check("scale", self.scale, (self.rows,), torch.float32, device)


class Job(NamedTuple):
    """A kernel, its arguments, how much to do, and how much at a time."""

    kernel: int
    arguments: bytes | ctypes.Array
    total: int
    chunk: int


def check(name: str, tensor: torch.Tensor | None, shape: tuple, dtype: torch.dtype, device: torch.device) -> None:
    """Raise a ValueError if a tensor, unless None, is not what a kernel takes."""
    if (
        tensor is None
        or (tensor.shape, tensor.dtype, tensor.device) == (shape, dtype, device)
        and tensor.is_contiguous()
    ):
        return
    found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
    raise ValueError(f"{name} is {found}; expected contiguous {dtype} {shape} on {device}.")


def is_native(x: torch.Tensor) -> bool:
    """Check that calls with this tensor run compiled kernels."""
    return native_available() and x.is_cpu


def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Allocate what a kernel writes, on the CPU; torch's defaults belong to the whole process."""
    return torch.empty(shape, dtype=dtype, device=CPU)


def pointers(*tensors: torch.Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


# ------------------------------------------------------------------------------------------------------ rounding tokens


def quantize_job(x, weight=None, eps: float = 0.0, gated: bool = False) -> tuple[Job, Quantized, torch.Tensor | None]:
    """Prepare `quantize`: the job, what it writes, and its scratch memory."""
    kind = KINDS[gated, weight is not None]
    M, columns = len(x), x.shape[1] // 2 if gated else x.shape[1]
    check("x", x, x.shape, x.dtype, CPU)
    check("weight", weight, (columns,), torch.float32, CPU)
    padded, scratch = round_up(columns, COLUMNS), new(M, columns) if gated else None
    quantized = Quantized(new(M, padded, dtype=torch.int8), new(M), new(M, dtype=torch.int32))
    arguments = struct.pack("8qfi", *pointers(x, weight, scratch, *quantized), columns, padded, eps, 0)
    job = Job(kernel(kind, 8, x.dtype == torch.bfloat16), arguments, M, max(1, GRAIN // (8 * padded)))
    return job, quantized, scratch


def quantize_reference(x: torch.Tensor, weight=None, eps: float = 0.0, gated: bool = False) -> Quantized:
    """Compute `quantize` in torch."""
    y = x.float()
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up if weight is None else gate.relu().square() * up
    if weight is not None:
        y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    # one scale per token; a NaN gets the code 0
    s = 127 / y.abs().amax(dim=-1, keepdim=True).clamp(min=EPS)
    q = (y * s).round()  # at most 127 (1 + 2^-20) before rounding: needs no clamp
    q = q.masked_fill(q.isnan(), 0).to(torch.int8)
    return Quantized(F.pad(q, (0, -q.shape[1] % COLUMNS)), s[:, 0], q.sum(-1, dtype=torch.int32))


def quantize(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 0.0, gated: bool = False) -> Quantized:
    """Round every token to 8 bits, as `fake_quantize_activation` does.

    A token with a NaN or an infinity gets 0 where x * s is NaN; its products are NaN. Compiled code gives the bits of
    torch; with a weight or a gate, up to the order of the sum and the error of exp: s within 1e-5 relative, codes
    within 1.

    Args:
        x: (M, C) float32 or bfloat16; computed in float32.
        weight: (C,) float32, to round the RMS norm x / sqrt(mean x^2 + eps) * weight.
        eps: added to the mean square.
        gated: x is (M, 2 C), gates in the first half, and silu(gate) up is rounded; with a weight, the RMS norm of
            relu(gate)^2 up, which BitNet's MLP gives to its last product.
    """
    known, C = x.ndim == 2 and x.dtype in DTYPES, x.shape[-1]
    require(known, "x is {} {}; expected float32 or bfloat16 (tokens, columns).", x.dtype, tuple(x.shape))
    require(not gated or C % 2 == 0, "x has {} columns; expected an even number.", C)
    if not is_native(x):
        return quantize_reference(x, weight, eps, gated)
    x = x.contiguous()
    job, quantized, _scratch = quantize_job(x, weight, eps, gated)  # scratch memory lives until the run is over
    run(*job)
    return quantized


# ------------------------------------------------------------------------------------------------------------- products


def linear_job(quantized: Quantized, matrix: Matrix, y: torch.Tensor, bias=None, residual=None, places=None) -> Job:
    (M, padded), rows = quantized.x_q.shape, matrix.rows
    check_product(quantized, matrix, y.dtype, bias, residual)
    check("y", y, (M, rows if places is None else y.shape[1]), y.dtype, CPU)
    check("places", places, (rows,), torch.int64, CPU)
    tensors = pointers(*quantized, matrix.panels, matrix.scale, bias, residual, y, places)
    # the words of a `LinearKernel`, in order
    arguments = struct.pack("13q", *tensors, M, rows, padded, y.shape[1])
    address = kernel("linear" if places is None else "placed", matrix.bits, y.dtype == torch.bfloat16)
    count = round_up(rows, ROWS) // ROWS
    # long pieces: memory is read in long runs
    chunk = max(1, GRAIN // (ROWS * padded * max(M, 1)), count // (PIECES * (helper_count() + 1)))
    return Job(address, arguments, count, chunk)


def check_product(quantized: Quantized, matrix: Matrix, dtype: torch.dtype, bias=None, residual=None) -> None:
    require(dtype in DTYPES, "dtype is {}; expected torch.float32 or torch.bfloat16.", dtype)
    M, device = len(quantized.x_q), matrix.panels.device
    check("x_q", quantized.x_q, (M, round_up(matrix.columns, COLUMNS)), torch.int8, device)
    check("s", quantized.s, (M,), torch.float32, device)
    check("sums", quantized.sums, (M,), torch.int32, device)
    check("bias", bias, (matrix.rows,), torch.float32, device)
    check("residual", residual, (M, matrix.rows), dtype, device)


def low_bit_linear_quantized_reference(
    quantized: Quantized,
    matrix: Matrix,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `low_bit_linear_quantized` in torch, with the same bits, on any device."""
    rows, columns, bits = matrix.rows, matrix.columns, matrix.bits
    x_q, s, _ = quantized
    exact = 2**24 // (128 * ZERO[bits])  # columns whose sum float32 holds exactly
    panel = panel_bytes(ROWS, columns, bits)
    parts = []
    for start in range(0, rows, 8192):
        # unpack some rows, and add up sums that are exact
        count = min(8192, rows - start)
        part = matrix.panels[start // ROWS * panel : round_up(start + count, ROWS) // ROWS * panel]
        w = unpack_panels(part, count, columns, bits).float()
        pairs = zip(x_q[:, :columns].float().split(exact, dim=1), w.split(exact, dim=1))
        parts.append(sum((x @ w.T).to(torch.int32) for x, w in pairs))
    # scale, and add in float32
    y = torch.cat(parts, dim=1).float() * (matrix.scale / s[:, None])
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + residual.float()
    return y.to(dtype)


def low_bit_linear_quantized(
    quantized: Quantized,
    matrix: Matrix,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply rounded tokens by packed weights.

    y = (x_q w^T) (scale / s) + bias + residual in float32, rounded once to `dtype`.

    Args:
        quantized: M tokens, from one of the quantizers.
        matrix: (R, C).
        dtype: of the result, torch.float32 or torch.bfloat16.
        bias, residual: (R,) float32, and (M, R) of `dtype`.
    """
    if not is_native(quantized.x_q):
        check_product(quantized, matrix, dtype, bias, residual)
        return low_bit_linear_quantized_reference(quantized, matrix, dtype, bias, residual)
    y = new(len(quantized.x_q), matrix.rows, dtype=dtype)
    run(*linear_job(quantized, matrix, y, bias, residual))
    return y


def quantize_tokens(x: torch.Tensor, columns: int) -> Quantized:
    """Round x (..., C); its width is checked, as padding would hide another."""
    require(x.shape[-1] == columns, "x is {} {}; expected {} columns.", x.dtype, tuple(x.shape), columns)
    return quantize(x.reshape(-1, columns))


def low_bit_linear(x: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Apply a linear layer with packed weights, its input rounded per token to 8 bits.

    x (..., C) float32 or bfloat16, bias (R,) float32 -> (..., R) in the dtype of x. A token with a NaN or an infinity
    gives NaN in every row.
    """
    quantized = quantize_tokens(x, matrix.columns)
    return low_bit_linear_quantized(quantized, matrix, x.dtype, bias).view(*x.shape[:-1], matrix.rows)


def low_bit_linear_mixed(x: torch.Tensor, parts: Sequence[tuple[Matrix, torch.Tensor]]) -> torch.Tensor:
    """Apply `low_bit_linear` with a matrix in parts, whose rows lie among each other.

    Each part has its matrix, and the place of each of its rows in the whole, (its rows,) int64. Every row is in one.
    """
    rows, quantized = sum(matrix.rows for matrix, _ in parts), quantize_tokens(x, parts[0][0].columns)
    y = x.new_empty(len(quantized.x_q), rows)
    # every part writes its own rows
    for matrix, places in parts:
        if is_native(x):
            run(*linear_job(quantized, matrix, y, places=places))
        else:
            y[:, places] = low_bit_linear_quantized(quantized, matrix, x.dtype)
    return y.view(*x.shape[:-1], rows)


# ------------------------------------------------------------------------------------------------- attention, programs


class Attention:
    """Attention of one row's new tokens to a cache and a memory, with `native_available()`.

    Args:
        heads, kv_heads, head_dim: of queries, of keys and values; d, an even number.
        scaling: of the scores.
        dtype: of keys and values, float32 or bfloat16; queries are rounded to it too.
    """

    def __init__(self, heads: int, kv_heads: int, head_dim: int, scaling: float, dtype: torch.dtype):
        # a kernel holds half a head in registers and on the stack
        shared = kv_heads > 0 and heads % kv_heads == 0 and head_dim % 2 == 0 and head_dim <= 1024
        require(shared, "{} heads of width {} cannot share the keys of {}.", heads, head_dim, kv_heads)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.scaling, self.dtype = scaling, dtype
        self.buffer, self.bound = ctypes.create_string_buffer(8 * 15), None

    def tokens(self, qkv: torch.Tensor, turns: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """Set the new tokens; returns what a run writes, (T, heads d) float32.

        Args:
            qkv: (T, (heads + 2 kv heads) d) float32: queries, keys, values. The queries are turned in place.
            turns: (T, d) float32: cosines, then sines, of the positions, as rotary embeddings by halves take them.
            length: () int64, tokens in the cache before them.
        """
        T = len(qkv)
        check("qkv", qkv, (T, (self.heads + 2 * self.kv_heads) * self.head_dim), torch.float32, CPU)
        check("turns", turns, (T, self.head_dim), torch.float32, CPU)
        check("length", length, (), torch.int64, CPU)
        out = new(T, self.heads * self.head_dim)
        self.inputs, self.bound = (qkv, turns, length, out), None
        return out

    def bind(self, keys, values, memory: tuple[torch.Tensor, torch.Tensor] | None = None, gate: float = 0.0) -> None:
        """Set what the tokens attend to; the caller keeps it alive.

        Args:
            keys, values: contiguous (1, kv heads, capacity, d); new tokens are written from `length` on and must fit.
            memory: contiguous keys and values (1, kv heads, S, d) of the memory.
            gate: added to the memory's scores.
        """
        parts = (keys, values, *(memory or ()))
        capacity, items = keys.shape[2], memory[0].shape[2] if memory else 0
        bound = (*pointers(*parts), capacity, items, gate)
        if bound == self.bound:
            return
        for t, length in zip(parts, (capacity, capacity, items, items)):
            check("keys or values", t, (1, self.kv_heads, length, self.head_dim), self.dtype, CPU)
        # write the arguments of both kernels
        self.bound, self.scratch = bound, new(self.heads * (capacity + items))
        qkv, turns, length, out = self.inputs
        parts += (None,) * (4 - len(parts))
        words = pointers(qkv, turns, length, *parts, self.scratch, out)
        sizes = len(qkv), capacity, self.heads // self.kv_heads, self.kv_heads, items
        self.buffer[:] = struct.pack("14q2f", *words, *sizes, self.scaling, gate)

    def jobs(self) -> list[Job]:
        T = len(self.inputs[0])
        turn, attend = (kernel(kind, self.head_dim, self.dtype == torch.bfloat16) for kind in ("turn", "attention"))
        heads = Job(attend, self.buffer, self.heads, max(1, self.heads // 8))
        return [Job(turn, self.buffer, T, max(1, T // 8)), heads]

    def __call__(self) -> None:
        for job in self.jobs():
            run(*job)


class Eager:
    """Operations that run at once, as a `Program` records them."""

    quantize = staticmethod(quantize)

    @staticmethod
    def linear(quantized: Quantized, matrix: Matrix, bias=None, residual=None) -> torch.Tensor:
        return low_bit_linear_quantized(quantized, matrix, torch.float32, bias, residual)


class Program:
    """Operations recorded once and run in order by one call.

    Their tensors stay where they are: float32, contiguous, on a CPU with `native_available()`. Each method records a
    step and returns the tensors that it writes.
    """

    def __init__(self):
        self.steps: list[Job] = []
        self.tensors, self.jobs = [], None  # tensors are kept alive

    def quantize(self, x: torch.Tensor, weight=None, eps: float = 0.0, gated: bool = False) -> Quantized:
        """Record `quantize`."""
        job, quantized, scratch = quantize_job(x, weight, eps, gated)
        self.add(job, x, weight, scratch, *quantized)
        return quantized

    def linear(self, quantized: Quantized, matrix: Matrix, bias=None, residual=None) -> torch.Tensor:
        """Record `low_bit_linear_quantized` to float32."""
        y = new(len(quantized.x_q), matrix.rows)
        self.add(linear_job(quantized, matrix, y, bias, residual), *quantized, matrix, bias, residual, y)
        return y

    def attention(self, attention: Attention) -> None:
        """Record a run of `attention`; call its `tokens` before and its `bind` before every run."""
        for job in attention.jobs():
            self.add(job, attention)

    def add(self, job: Job, *tensors) -> None:
        buffer = job.arguments
        if isinstance(buffer, bytes):
            buffer = ctypes.create_string_buffer(buffer, len(buffer))
        self.tensors += [buffer, *tensors]
        self.steps.append(job._replace(arguments=ctypes.addressof(buffer)))
        self.jobs = (ctypes.c_int64 * (4 * len(self.steps)))(*(value for step in self.steps for value in step))

    def __call__(self) -> None:
        run_many(self.jobs, len(self.steps))
