"""Products with 2, 4 and 8-bit weights that stay packed in memory, without a C compiler: on a CPU, and through `triton_microvlm.py` on a GPU.

LLVM IR is written with llvmlite, compiled in the process and called through ctypes. The arithmetic is that of BitNet b1.58 (arXiv
2402.17764) with one scale per token and one per output row, and every sum is an integer, so torch gives the same bits:

    s_m = 127 / max(max |x_m|, 1e-5),   q_m = round(x_m s_m),   y_mr = (sum_c w_rc q_mc) (scale_r / s_m) + bias_r

Notable:
- Weights are stored in panels of 16 rows (`pack_panels`), a 32-bit lane of a vector for each: the dot product of four bytes adds up
  within a row, so nothing is summed across lanes, a decode step reads memory in order, and all widths and instruction sets share one loop.
- Stored weights are unsigned, u = w + zero, because the x86 dot product takes unsigned x signed: sum w q = sum u q - zero sum q.
- Threads are workers that enter a compiled loop once and wait there on an atomic counter: a Python thread pool would cost more
  than most of the products.

Nothing here has a gradient. Set MICROVLM_KERNELS to the name of a target to force it.
"""

import atexit
import contextlib
import ctypes
import functools
import os
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .triton_microvlm import available as triton_available, low_bit_linear_quantized as low_bit_linear_triton

try:
    from llvmlite import binding, ir
except ImportError:
    binding = ir = None
else:
    VOID, I1, I8, I16, I32, I64 = ir.VoidType(), *(ir.IntType(n) for n in (1, 8, 16, 32, 64))
    F32, PTR = ir.FloatType(), ir.PointerType()

EPS = 1e-5  # floor of the activation scale, as in quantization_microvlm
ROWS, COLUMNS = 16, 64  # of a panel, and what columns are filled up to a multiple of
GROUP = 4  # bytes that a dot product adds up
MAX_COLUMNS = 2**17 - 1  # 128 * 128 * columns must stay below 2**31
ZERO = {2: 1, 4: 8, 8: 128}  # bits -> the code that means 0
GRAIN = 2**17  # least products in a piece of work; smaller calls stay on the caller
LAYOUT_PIECE = 16  # panels in a piece of work of `panels_from_bytes`
PIECES = 8  # of a large product, for each thread
ROUND = 1.5 * 2**23  # adding it to |v| < 2**22 rounds v half to even and leaves the integer in the low mantissa bits


# ------------------------------------------------------------------------------------------------------------ packed weights


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _check_bits(bits: int, columns: int) -> None:
    if bits not in ZERO:
        raise ValueError(f"bits is {bits}; expected 2, 4 or 8.")
    if not 0 < columns <= MAX_COLUMNS:
        raise ValueError(f"columns is {columns}; expected 1 to {MAX_COLUMNS}, so that a sum fits 32 bits.")


def panel_bytes(rows: int, columns: int, bits: int) -> int:
    """Length of the packed form of a (rows, columns) matrix."""
    _check_bits(bits, columns)
    return _up(rows, ROWS) * _up(columns, COLUMNS) * bits // 8


def _pack(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes (R, C) uint8 -> panels."""
    R, C = stored.shape
    stored = F.pad(stored, (0, _up(C, COLUMNS) - C, 0, _up(R, ROWS) - R), value=ZERO[bits])
    stored = stored.view(_up(R, ROWS) // ROWS, ROWS, -1, 8 // bits, GROUP)  # (panel, row, vector, field, byte)
    packed = stored[:, :, :, 0].clone()
    for k in range(1, 8 // bits):
        packed |= stored[:, :, :, k] << (k * bits)
    return packed.transpose(1, 2).reshape(-1)


def pack_panels(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack signed weight codes for the kernels.

    A panel holds 16 rows as vectors of 64 bytes, four bytes of every row. A byte has 8 / bits fields, the first in the lowest bits; the first
    fields of the four bytes are four neighbouring columns, the next fields the next four. Columns are filled up with zero weights to a
    multiple of 64, rows to one of 16.

    Args:
        codes: (R, C) int8; -1..1 for 2 bits, -8..7 for 4, -128..127 for 8.
        bits: 2, 4 or 8.

    Returns:
        (`panel_bytes`(R, C, bits),) uint8.

    Raises:
        ValueError: another width, dtype or shape, or a code out of range.
    """
    if codes.ndim != 2 or codes.dtype != torch.int8:
        raise ValueError(f"codes are {codes.dtype} {tuple(codes.shape)}; expected int8 (rows, columns).")
    _check_bits(bits, codes.shape[1])
    zero = ZERO[bits]
    low, high = -zero, 1 if bits == 2 else zero - 1
    if codes.numel() and (codes.min() < low or codes.max() > high):
        raise ValueError(f"codes span {int(codes.min())}..{int(codes.max())}; expected {low}..{high} for {bits} bits.")
    return _pack(codes.view(torch.uint8) + zero, bits)  # wraps: -1 is 255


def _check_panels(panels: torch.Tensor, rows: int, columns: int, bits: int) -> None:
    length = panel_bytes(rows, columns, bits)
    if panels.dtype != torch.uint8 or panels.shape != (length,) or not panels.is_contiguous():
        raise ValueError(
            f"panels are {panels.dtype} {tuple(panels.shape)}; expected contiguous uint8 ({length},) for "
            f"{rows} x {columns} weights of {bits} bits."
        )


def unpack_panels(panels: torch.Tensor, rows: int, columns: int, bits: int) -> torch.Tensor:
    """Inverse of `pack_panels`: (rows, columns) int8. Raises ValueError if the length does not fit."""
    _check_panels(panels, rows, columns, bits)
    count = _up(rows, ROWS) // ROWS
    packed = panels.view(count, _up(columns, COLUMNS) * bits // (8 * GROUP), 1, ROWS, GROUP)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=panels.device).view(-1, 1, 1)
    stored = (packed >> shifts) & (2**bits - 1)  # (panel, vector, field, row, byte)
    stored = stored.permute(0, 3, 1, 2, 4).reshape(count * ROWS, _up(columns, COLUMNS))
    return (stored[:rows, :columns] - ZERO[bits]).view(torch.int8)


def panels_from_bytes(packed: torch.Tensor, columns: int, bits: int, digits: torch.Tensor) -> torch.Tensor:
    """Panels of rows in which a byte stands for several weights.

    Args:
        packed: (R, ceil(columns / per_byte)) uint8.
        columns: C; weights beyond it are ignored.
        bits: 2, 4 or 8.
        digits: (256, per_byte) uint8, the weights of every byte, plus `ZERO[bits]`; per_byte at most 8.

    Returns:
        The same as `pack_panels` of the weights.

    Raises:
        ValueError: a shape or dtype that does not fit.
    """
    _check_bits(bits, columns)
    per_byte = digits.shape[1]
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != -(-columns // per_byte):
        raise ValueError(
            f"packed weights are {packed.dtype} {tuple(packed.shape)}; expected uint8 (rows, {-(-columns // per_byte)}) for {columns} columns."
        )
    length = panel_bytes(ROWS, columns, bits)
    panels = packed.new_empty(_up(packed.shape[0], ROWS) // ROWS, length)
    if _native(packed):
        packed, words = packed.contiguous(), torch.zeros(256, 8, dtype=torch.uint8)
        words[:, :per_byte] = digits
        padded = _up(columns, COLUMNS)
        scratch = torch.empty(_up(len(panels), LAYOUT_PIECE) // LAYOUT_PIECE, padded + 16, dtype=torch.uint8)
        pointers = [t.data_ptr() for t in (packed, words, panels, scratch)]
        arguments = struct.pack("9q", *pointers, len(packed), columns, padded, packed.shape[1], per_byte)
        _run(_compiled(target(), "layout", bits, False), arguments, len(panels), LAYOUT_PIECE)
        return panels.view(-1)
    step = _up(2**20 // columns, ROWS)
    for start in range(0, packed.shape[0], step):
        part = packed[start : start + step]
        stored = digits[part.flatten().int()].view(part.shape[0], -1)[:, :columns]
        panels[start // ROWS : (start + step) // ROWS] = _pack(stored, bits).view(-1, length)
    return panels.view(-1)


def panels_from_trits(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """2-bit panels from ternary rows with five weights per byte, byte = sum_i (w_i + 1) 3^i.

    Args:
        packed: (R, ceil(columns / 5)) uint8, the first column in the lowest digit.
        columns: C; digits beyond it are ignored.

    Returns:
        The same as `pack_panels` of the weights with 2 bits.

    Raises:
        ValueError: a shape or dtype that does not fit, or a byte above 242.
    """
    if packed.dtype == torch.uint8 and packed.numel() and packed.max() > 242:
        raise ValueError(f"packed trits hold the byte {int(packed.max())}; expected at most 242 (five base-3 digits).")
    digits = torch.arange(256, device=packed.device)[:, None] // 3 ** torch.arange(5, device=packed.device) % 3
    return panels_from_bytes(packed, columns, 2, digits.to(torch.uint8))


# ------------------------------------------------------------------------------------------------------------------- targets


class Target(NamedTuple):
    """An instruction set: the vector it dots with, how many tokens share unpacked weights, and what it asks of the CPU."""

    arch: str
    width: int  # bytes
    tiles: tuple[int, ...]  # tokens: the first as often as it goes, then the next
    features: tuple[str, ...]


TARGETS = {  # best first
    "avx512-vnni": Target(
        "x86_64", 64, (12, 4, 1), ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni")
    ),
    "avx-vnni": Target("x86_64", 32, (6, 1), ("avx2", "fma", "avxvnni")),
    "avx2": Target("x86_64", 32, (4, 1), ("avx2", "fma")),
    "neon-dotprod": Target("aarch64", 16, (8, 1), ("dotprod",)),
    "generic": Target("", 16, (1,), ()),
}


def _arch(triple: str | None = None) -> str:
    return (triple or binding.get_process_triple()).split("-")[0].replace("arm64", "aarch64")


def runs_here(name: str) -> bool:
    """Whether llvmlite is installed and this CPU has what the target asks for."""
    if ir is None or sys.platform == "win32":
        return False
    features = binding.get_host_cpu_features()
    return TARGETS[name].arch in ("", _arch()) and all(features.get(f) for f in TARGETS[name].features)


@functools.cache
def target() -> str:
    """The kernels in use: a key of `TARGETS`, or "torch". MICROVLM_KERNELS is read once, at the first call.

    Raises:
        ValueError: MICROVLM_KERNELS is not a known name.
        RuntimeError: it names a target that this CPU, or an environment without llvmlite, cannot run.
    """
    wanted = os.environ.get("MICROVLM_KERNELS", "auto")
    if wanted == "auto":
        return next((name for name in TARGETS if runs_here(name)), "torch")
    if wanted == "torch":
        return wanted
    if wanted not in TARGETS:
        raise ValueError(f"MICROVLM_KERNELS is {wanted!r}; expected one of {', '.join(['auto', 'torch', *TARGETS])}.")
    if not runs_here(wanted):
        raise RuntimeError(
            f"MICROVLM_KERNELS asks for {wanted!r}, which this CPU (or the missing llvmlite) cannot run."
        )
    return wanted


def native_available() -> bool:
    """Whether calls with CPU tensors run compiled kernels."""
    return target() != "torch"


# ------------------------------------------------------------------------------------------------------------------ emitting


def _const(type_, value, lanes: int | None = None):
    return ir.Constant(type_, value) if lanes is None else ir.Constant(ir.VectorType(type_, lanes), [value] * lanes)


def _int(value: int):
    return ir.Constant(I64, value)


def _call(b, name: str, result, *args):
    """Call an external function or an intrinsic, declared on first use."""
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(result, [a.type for a in args]), name)
    return b.call(function, args)


def _at(b, pointer, index, type_=None):
    return b.gep(pointer, [index], source_etype=I8 if type_ is None else type_)


def _shuffle(b, p, q, lanes: Sequence[int]):
    return b.shuffle_vector(p, q, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))


def _splat(b, value, lanes: int):
    first = b.insert_element(ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, ir.Constant(I32, 0))
    return _shuffle(b, first, first, [0] * lanes)


def _loop(b, start, stop, step: int, body: Callable, carry: Sequence = ()):
    """`for (i = start; i + step <= stop; i += step) carry = body(i, carry)`; returns the last i and carry."""
    before, head, inside, after = b.block, *(b.append_basic_block() for _ in range(3))
    b.branch(head)
    b.position_at_end(head)
    phis = [b.phi(value.type) for value in (start, *carry)]
    for phi, value in zip(phis, (start, *carry)):
        phi.add_incoming(value, before)
    following = b.add(phis[0], _int(step))
    b.cbranch(b.icmp_signed("<=", following, stop), inside, after)
    b.position_at_end(inside)
    for phi, value in zip(phis, (following, *body(phis[0], phis[1:]))):
        phi.add_incoming(value, b.block)
    b.branch(head)
    b.position_at_end(after)
    return phis[0], phis[1:]


def _kernel(pointers: int, integers: int):
    """A new function kernel(args, begin, end): its builder, its arguments out of the 64-bit words at `args`, and the range."""
    function = ir.Function(ir.Module(), ir.FunctionType(VOID, [PTR, I64, I64]), "kernel")
    b = ir.IRBuilder(function.append_basic_block())
    words = [
        b.load(_at(b, function.args[0], _int(i), I64), typ=PTR if i < pointers else I64)
        for i in range(pointers + integers)
    ]
    return b, words, *function.args[1:]


def _element(bf16: bool):
    return I16 if bf16 else I32


def _to_float(b, raw):
    """Float32 of raw bits, int32 or the int16 of bfloat16."""
    lanes = raw.type.count
    if raw.type.element == I16:
        raw = b.shl(b.zext(raw, ir.VectorType(I32, lanes)), _const(I32, 16, lanes))
    return b.bitcast(raw, ir.VectorType(F32, lanes))


def _from_float(b, value, bf16: bool):
    """Raw bits of float32 values; bfloat16 rounds half to even, as torch does."""
    lanes = value.type.count
    raw = b.bitcast(value, ir.VectorType(I32, lanes))
    if not bf16:
        return raw
    sixteen = _const(I32, 16, lanes)
    odd = b.and_(b.lshr(raw, sixteen), _const(I32, 1, lanes))
    short = b.lshr(b.add(b.add(raw, _const(I32, 0x7FFF, lanes)), odd), sixteen)
    short = b.select(b.fcmp_unordered("uno", value, value), _const(I32, 0x7FC0, lanes), short)
    return b.trunc(short, ir.VectorType(I16, lanes))


# ------------------------------------------------------------------------------------------------------------ linear kernels


def _pairs(b, p, q):
    """Sums of neighbouring lanes, of p and behind them of q."""
    lanes = range(0, 2 * p.type.count, 2)
    return b.add(_shuffle(b, p, q, lanes), _shuffle(b, p, q, [i + 1 for i in lanes]))


def _dot(b, name: str, bits: int, acc, u, x):
    """acc + the products of the bytes u (unsigned; signed for neon) and x (signed), every four of them summed into a lane."""
    width = TARGETS[name].width
    if name.endswith("vnni"):
        return _call(
            b, f"llvm.x86.avx512.vpdpbusd.{8 * width}", acc.type, acc, *(b.bitcast(v, acc.type) for v in (u, x))
        )
    if name == "neon-dotprod":
        return _call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, acc, u, x)
    if name == "generic":
        shorts = ir.VectorType(I16, width)  # 255 * -128 fits
        products = b.sext(b.mul(b.zext(u, shorts), b.sext(x, shorts)), ir.VectorType(I32, width))
        halves = [_shuffle(b, products, products, range(i, i + width // 2)) for i in (0, width // 2)]
        sums = _pairs(b, *halves)
        halves = [_shuffle(b, sums, sums, range(i, i + width // 4)) for i in (0, width // 4)]
        return b.add(acc, _pairs(b, *halves))
    shorts = ir.VectorType(I16, 16)
    if bits < 8:  # pairs reach 128 * -128 * 2, the last value before saturation
        pairs = _call(b, "llvm.x86.avx2.pmadd.ub.sw", shorts, u, x)
        return b.add(acc, _call(b, "llvm.x86.avx2.pmadd.wd", acc.type, pairs, _const(I16, 1, 16)))
    sums = []
    for half in (range(16), range(16, 32)):
        wide = b.zext(_shuffle(b, u, u, half), shorts), b.sext(_shuffle(b, x, x, half), shorts)
        sums.append(_call(b, "llvm.x86.avx2.pmadd.wd", acc.type, *wide))
    return b.add(acc, _pairs(b, *sums))


def linear_ir(name: str, bits: int, bf16: bool, placed: bool = False):
    """The product with packed weights, for a range of panels: y = (sum w q) (scale / s) + bias + residual.

    `placed`: a row's result goes where `places` (rows,) int64 says, in tokens of y that are `wide` apart.
    """
    _, width, tiles, _ = TARGETS[name]
    b, words, begin, end = _kernel(pointers=9, integers=4)
    x_q, s, sums, panels, scale, bias, residual, y, places, tokens, rows, stride, wide = words
    lanes, fields = width // GROUP, 8 // bits
    signed = bits == 8 and name == "neon-dotprod"
    bytes_ = ir.VectorType(I8, width)

    def field(vector, k, in_place):
        if bits == 8:
            return b.xor(vector, _const(I8, 128, width)) if signed else vector
        if in_place:
            return b.and_(vector, _const(I8, 3 << (k * bits), width))
        return b.and_(b.lshr(vector, _const(I8, k * bits, width)), _const(I8, 2**bits - 1, width))

    def rows_of(pointer, index, mask, bf16, instead):
        """The lanes' floats at an index; -0, which adds nothing, where masked or all of them if the pointer is null.

        Then the load is at a readable address `instead`: with every lane masked, null would not fault, but take 200 cycles.
        """
        given = b.icmp_unsigned("!=", b.ptrtoint(pointer, I64), _int(0))
        kind, minus_zero = _element(bf16), _const(_element(bf16), 1 << (15 if bf16 else 31), lanes)
        where, align = _at(b, b.select(given, pointer, instead), index, kind), ir.Constant(I32, kind.width // 8)
        name, mask = f"llvm.masked.load.v{lanes}i{kind.width}.p0", b.and_(mask, _splat(b, given, lanes))
        return _to_float(b, _call(b, name, minus_zero.type, where, align, mask, minus_zero))

    def part_of_panel(p, part):
        row = b.add(b.mul(p, _int(ROWS)), _int(part // GROUP))
        iota = ir.Constant(ir.VectorType(I64, lanes), list(range(lanes)))
        mask = b.icmp_signed("<", b.add(_splat(b, row, lanes), iota), _splat(b, rows, lanes))
        row_scale, row_bias = (rows_of(pointer, row, mask, False, scale) for pointer in (scale, bias))
        start = b.mul(b.mul(p, stride), _int(ROWS * bits // 8))
        weights = _at(b, panels, b.add(start, _int(part)))
        left = b.sub(rows, row)
        count = b.select(b.icmp_signed("<", left, _int(lanes)), left, _int(lanes))

        def tokens_of(size, m, _):
            inputs = [_at(b, x_q, b.mul(b.add(m, _int(t)), stride)) for t in range(size)]
            # few tokens: a sum for every field, or each product would wait for the one before
            sets = fields if size == 1 else 1
            # a field k of two bits may stay where it is, times 4^k, which its own sum is divided by
            in_place = bits == 2 and sets == fields and name != "neon-dotprod"

            def vector_of(c, accs):
                accs = list(accs)
                where = b.mul(c, _int(ROWS * bits // 8))  # c: the first column
                vector = b.load(_at(b, weights, where), align=1, typ=bytes_)
                for k in range(fields):
                    u, at = field(vector, k, in_place), b.add(c, _int(k * GROUP))
                    for t, pointer in enumerate(inputs):
                        four = _splat(b, b.load(_at(b, pointer, at), align=1, typ=I32), lanes)
                        i = t * sets + k % sets
                        accs[i] = _dot(b, name, bits, accs[i], u, b.bitcast(four, bytes_))
                return accs

            zeros = [_const(I32, 0, lanes)] * (size * sets)
            _, accs = _loop(b, _int(0), stride, GROUP * fields, vector_of, zeros)
            for t in range(size):
                token, total = b.add(m, _int(t)), None
                for k, acc in enumerate(accs[t * sets : (t + 1) * sets]):
                    acc = b.ashr(acc, _const(I32, k * bits, lanes)) if in_place else acc
                    total = acc if total is None else b.add(total, acc)
                if not signed:
                    zero = b.mul(b.load(_at(b, sums, token, I32), typ=I32), ir.Constant(I32, ZERO[bits]))
                    total = b.sub(total, _splat(b, zero, lanes))
                token_scale = _splat(b, b.load(_at(b, s, token, F32), typ=F32), lanes)
                out = b.fmul(b.sitofp(total, ir.VectorType(F32, lanes)), b.fdiv(row_scale, token_scale))
                index = b.add(b.mul(token, rows), row)
                out = b.fadd(b.fadd(out, row_bias), rows_of(residual, index, mask, bf16, y))
                raw, kind = _from_float(b, out, bf16), _element(bf16)
                align = ir.Constant(I32, kind.width // 8)
                if not placed:
                    suffix = f"v{lanes}i{kind.width}.p0"
                    _call(b, f"llvm.masked.store.{suffix}", VOID, raw, _at(b, y, index, kind), align, mask)
                    continue

                def place(k, _, token=token, raw=raw, kind=kind):
                    where = b.add(b.mul(token, wide), b.load(_at(b, places, b.add(row, k), I64), typ=I64))
                    b.store(b.extract_element(raw, k), _at(b, y, where, kind), align=kind.width // 8)
                    return ()

                _loop(b, _int(0), count, 1, place)
            return ()

        m = _int(0)
        for size in tiles:
            m, _ = _loop(b, m, tokens, size, functools.partial(tokens_of, size))

    def panel(p, _):
        for part in range(0, ROWS * GROUP, width):
            part_of_panel(p, part)
        return ()

    _loop(b, begin, end, 1, panel)
    b.ret_void()
    return b.module


def layout_ir(bits: int):
    """Panels of rows in which a byte stands for several weights, for a range of panels: a row is spelled out, then its fields are joined."""
    b, words, begin, end = _kernel(pointers=4, integers=5)
    packed, digits, panels, scratch, rows, columns, padded, row_bytes, per_byte = words
    zero, fields = ZERO[bits], 8 // bits
    panel_length = b.mul(padded, _int(ROWS * bits // 8))

    def panel(p, _):
        start = _at(b, panels, b.mul(p, panel_length))
        codes = _at(b, scratch, b.mul(b.sdiv(p, _int(LAYOUT_PIECE)), b.add(padded, _int(16))))

        def row(r, _):
            source = b.add(b.mul(p, _int(ROWS)), r)
            inside = b.icmp_signed("<", source, rows)

            def spell(i, _):
                byte = b.load(_at(b, packed, b.add(b.mul(source, row_bytes), i)), typ=I8)
                word = b.load(_at(b, digits, b.zext(byte, I64), I64), typ=I64)
                b.store(word, _at(b, codes, b.mul(i, per_byte)), align=1)  # what is too much, the next one writes over
                return ()

            _loop(b, _int(0), b.select(inside, row_bytes, _int(0)), 1, spell)
            filled = b.select(inside, columns, _int(0))
            _loop(b, filled, padded, 1, lambda c, _: b.store(ir.Constant(I8, zero), _at(b, codes, c)) and ())

            def join(c, _):
                word = None
                for k in range(fields):
                    part = b.load(_at(b, codes, b.add(c, _int(k * GROUP))), align=1, typ=I32)
                    part = b.shl(part, ir.Constant(I32, k * bits))
                    word = part if word is None else b.or_(word, part)
                vector = b.mul(c, _int(ROWS * bits // 8))
                b.store(word, _at(b, start, b.add(vector, b.mul(r, _int(GROUP)))), align=1)
                return ()

            _loop(b, _int(0), padded, GROUP * fields, join)
            return ()

        _loop(b, _int(0), _int(ROWS), 1, row)
        return ()

    _loop(b, begin, end, 1, panel)
    b.ret_void()
    return b.module


# ---------------------------------------------------------------------------------------------------------- quantize kernels


def _exp(b, x):
    """Float32 exp to about 2 units in the last place, by 2^n times a polynomial on |r| <= ln 2 / 2 (Cephes). |x| is cut at 87."""
    n = x.type.count
    for order, bound in (("<", -87.0), (">", 87.0)):  # a NaN compares false and stays
        x = b.select(b.fcmp_ordered(order, x, _const(F32, bound, n)), _const(F32, bound, n), x)
    shifted = b.fadd(b.fmul(x, _const(F32, 1.4426950408889634, n)), _const(F32, ROUND, n))
    k = b.fsub(shifted, _const(F32, ROUND, n))
    r = b.fsub(b.fsub(x, b.fmul(k, _const(F32, 0.693359375, n))), b.fmul(k, _const(F32, -2.12194440e-4, n)))
    series = _const(F32, 1 / 720, n)
    for factor in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        series = b.fadd(b.fmul(series, r), _const(F32, factor, n))
    exponent = b.shl(b.add(b.bitcast(shifted, ir.VectorType(I32, n)), _const(I32, 127, n)), _const(I32, 23, n))
    return b.fmul(series, b.bitcast(exponent, x.type))


def quantize_ir(kind: str, bf16: bool):
    """Rounding of a range of tokens to 8 bits: of x itself ("plain"), of its RMS norm ("rms"), of silu(gate) up ("silu"), or of the RMS
    norm of relu(gate)^2 up ("relu2")."""
    b, words, begin, end = _kernel(pointers=6, integers=3)
    x, weight, scratch, x_q, s, sums, columns, padded, eps = words

    def sweep(body, zeros, combine):
        """Sum up body(lanes, column, state) over a row, 16 columns at a time and then one by one; `combine` joins lanes."""
        c, total = _int(0), None
        for lanes in (16, 1):
            c, (state,) = _loop(b, c, columns, lanes, lambda c, v, n=lanes: [body(n, c, v[0])], [_const(*zeros, lanes)])
            for i in range(lanes):
                lane = b.extract_element(state, ir.Constant(I32, i))
                total = lane if total is None else combine(total, lane)
        return total

    def read(lanes, at, bf16, pointer):
        element = _element(bf16)
        raw = b.load(_at(b, pointer, at, element), align=element.width // 8, typ=ir.VectorType(element, lanes))
        return _to_float(b, raw)

    def token(m, _):
        start = b.mul(m, columns)
        temporary = _at(b, scratch, start, F32)
        gated, normed = kind in ("silu", "relu2"), kind in ("rms", "relu2")

        def value(lanes, c):
            v = read(lanes, c, False, temporary) if gated else read(lanes, b.add(start, c), bf16, x)
            return b.fmul(b.fmul(v, _splat(b, rms, lanes)), read(lanes, c, False, weight)) if normed else v

        def gate_up(lanes, c):
            """act(gate) up, which stays in `temporary`."""
            at = b.add(b.add(start, start), c)
            gate, up = read(lanes, at, bf16, x), read(lanes, b.add(at, columns), bf16, x)
            if kind == "silu":
                act = b.fdiv(gate, b.fadd(_const(F32, 1.0, lanes), _exp(b, b.fneg(gate))))
            else:
                act = b.select(b.fcmp_ordered("<", gate, _const(F32, 0.0, lanes)), _const(F32, 0.0, lanes), gate)
                act = b.fmul(act, act)
            v = b.fmul(act, up)
            b.store(v, _at(b, temporary, c, F32), align=4)
            return v

        def square(lanes, c, total):
            v = gate_up(lanes, c) if gated else read(lanes, b.add(start, c), bf16, x)
            return b.fadd(total, b.fmul(v, v))

        def largest(lanes, c, top):
            v = gate_up(lanes, c) if kind == "silu" else value(lanes, c)
            raw = b.and_(b.bitcast(v, ir.VectorType(I32, lanes)), _const(I32, 0x7FFFFFFF, lanes))
            return b.select(b.icmp_signed(">", raw, top), raw, top)  # in this order infinity and NaN are the largest

        def round_(lanes, c, total):
            v = b.fmul(
                value(lanes, c), _splat(b, scale, lanes)
            )  # |v| <= 127 (1 + 2^-20): rounds to 127 without a clamp
            integer = b.bitcast(b.fadd(v, _const(F32, ROUND, lanes)), ir.VectorType(I32, lanes))
            integer = b.select(b.fcmp_ordered("ord", v, v), integer, _const(I32, 0, lanes))
            short = b.trunc(integer, ir.VectorType(I8, lanes))
            b.store(short, _at(b, codes, c), align=1)
            return b.add(total, b.sext(short, total.type))

        if normed:
            mean = b.fdiv(sweep(square, (F32, 0.0), b.fadd), b.sitofp(columns, F32))
            floor = b.bitcast(b.trunc(eps, I32), F32)
            rms = b.fdiv(_const(F32, 1.0), _call(b, "llvm.sqrt.f32", F32, b.fadd(mean, floor)))
        floor = struct.unpack("i", struct.pack("f", EPS))[0]
        top = sweep(largest, (I32, floor), lambda p, q: b.select(b.icmp_signed(">", p, q), p, q))
        # a reciprocal and a product, as torch computes 127 / tensor
        scale = b.fmul(b.fdiv(_const(F32, 1.0), b.bitcast(top, F32)), _const(F32, 127.0))
        codes = _at(b, x_q, b.mul(m, padded))
        total = sweep(round_, (I32, 0), b.add)
        _loop(b, columns, padded, 1, lambda c, _: b.store(_const(I8, 0), _at(b, codes, c)) and ())
        b.store(scale, _at(b, s, m, F32))
        b.store(total, _at(b, sums, m, I32))
        return ()

    _loop(b, begin, end, 1, token)
    b.ret_void()
    return b.module


# ---------------------------------------------------------------------------------------------------------- attention kernel


def _total(b, value):
    """Sum of a vector's lanes, by halves while there are any."""
    lanes = value.type.count
    while lanes % 2 == 0:
        lanes //= 2
        value = b.fadd(*(_shuffle(b, value, value, range(start, start + lanes)) for start in (0, lanes)))
    total = b.extract_element(value, ir.Constant(I32, 0))
    for i in range(1, lanes):
        total = b.fadd(total, b.extract_element(value, ir.Constant(I32, i)))
    return total


def attention_ir(kind: str, head_dim: int, bf16: bool):
    """Attention of new tokens, in two steps over the same arguments.

    "turn", for a range of tokens: turn queries, in place, and keys to their positions, and keep keys and values.
    "attention", for a range of query heads: every token attends to all that is kept up to itself, and to the memory's keys and values,
    whose scores have `gate` added.
    """
    b, words, begin, end = _kernel(pointers=9, integers=6)
    qkv, turns, length, keys, values, memory_keys, memory_values, scratch, out = words[:9]
    tokens, capacity, groups, heads, items, floats = words[9:]
    half, stored = head_dim // 2, _element(bf16)
    d = _int(head_dim)
    scaling, gate = (b.bitcast(b.trunc(b.lshr(floats, _int(shift)), I32), F32) for shift in (0, 32))
    past, query_heads = b.load(length, typ=I64), b.mul(heads, groups)
    qkv_width = b.mul(b.add(query_heads, b.add(heads, heads)), d)

    def halves(pointer, at, element=I32):
        places = (_at(b, pointer, b.add(at, _int(i)), element) for i in (0, half))
        type_ = ir.VectorType(element, half)
        return [_to_float(b, b.load(place, align=element.width // 8, typ=type_)) for place in places]

    def store(pair, pointer, at, short=bf16):
        for i, value in zip((0, half), pair):
            element = _element(short)
            place = _at(b, pointer, b.add(at, _int(i)), element)
            b.store(_from_float(b, value, short), place, align=element.width // 8)

    def token(m, _):
        row, cos_sin = b.mul(m, qkv_width), halves(turns, b.mul(m, d))

        def turned(head):
            (first, second), (cos, sin) = halves(qkv, b.add(row, b.mul(head, d))), cos_sin
            return (
                b.fsub(b.fmul(first, cos), b.fmul(second, sin)),
                b.fadd(b.fmul(second, cos), b.fmul(first, sin)),
            )

        def query(h, _):
            rounded = [_to_float(b, _from_float(b, v, bf16)) for v in turned(h)]
            store(rounded, qkv, b.add(row, b.mul(h, d)), short=False)
            return ()

        def key(g, _):
            place = b.mul(b.add(b.mul(g, capacity), b.add(past, m)), d)
            store(turned(b.add(query_heads, g)), keys, place)
            value = b.add(row, b.mul(b.add(b.add(query_heads, heads), g), d))
            store(halves(qkv, value), values, place)
            return ()

        _loop(b, _int(0), query_heads, 1, query)
        _loop(b, _int(0), heads, 1, key)
        return ()

    def times(p, q, plus):
        return _call(b, f"llvm.fmuladd.v{half}f32", p.type, p, q, plus)

    def query_head(h, _):
        g = b.sdiv(h, groups)
        here, there = b.mul(b.mul(g, capacity), d), b.mul(b.mul(g, items), d)
        scores = _at(b, scratch, b.mul(h, b.add(capacity, items)), F32)

        def attend(m, _):
            q = halves(qkv, b.add(b.mul(m, qkv_width), b.mul(h, d)))
            count = b.add(past, b.add(m, _int(1)))
            # keys, values, where this head's begin, how many, and where their scores do
            text = keys, values, here, count, _int(0)
            memory = memory_keys, memory_values, there, items, count
            top = ir.Constant(F32, float("-inf"))
            for kept, _, start, number, offset in (text, memory):

                def score(t, state, kept=kept, start=start, offset=offset, more=None if kept is keys else gate):
                    k = halves(kept, b.add(start, b.mul(t, d)), stored)
                    s = b.fmul(_total(b, times(q[1], k[1], b.fmul(q[0], k[0]))), scaling)
                    s = s if more is None else b.fadd(s, more)
                    b.store(s, _at(b, scores, b.add(offset, t), F32), align=4)
                    return [b.select(b.fcmp_ordered(">", s, state[0]), s, state[0])]

                _, (top,) = _loop(b, _int(0), number, 1, score, [top])
            t, weight, total = _int(0), ir.Constant(F32, 0.0), b.add(count, items)
            for lanes in (16, 1):

                def exponent(t, state, n=lanes, top=top):
                    place = _at(b, scores, t, F32)
                    e = _exp(b, b.fsub(b.load(place, align=4, typ=ir.VectorType(F32, n)), _splat(b, top, n)))
                    b.store(e, place, align=4)
                    return [b.fadd(state[0], e)]

                t, (sums,) = _loop(b, t, total, lanes, exponent, [_const(F32, 0.0, lanes)])
                weight = b.fadd(weight, _total(b, sums))
            sums = [_const(F32, 0.0, half)] * 2
            for _, kept, start, number, offset in (text, memory):

                def weigh(t, state, kept=kept, start=start, offset=offset):
                    p = _splat(b, b.load(_at(b, scores, b.add(offset, t), F32), typ=F32), half)
                    v = halves(kept, b.add(start, b.mul(t, d)), stored)
                    return [times(p, value, sum_) for value, sum_ in zip(v, state)]

                _, sums = _loop(b, _int(0), number, 1, weigh, sums)
            share = _splat(b, b.fdiv(ir.Constant(F32, 1.0), weight), half)
            place = b.mul(b.add(b.mul(m, query_heads), h), d)
            store([b.fmul(value, share) for value in sums], out, place, short=False)
            return ()

        _loop(b, _int(0), tokens, 1, attend)
        return ()

    _loop(b, begin, end, 1, token if kind == "turn" else query_head)
    b.ret_void()
    return b.module


# ------------------------------------------------------------------------------------------------------------------- threads

# 64-bit words of a pool's state, each on its own 128 bytes so that no two share a cache line
FIELDS = (
    "generation",
    "next",
    "inside",
    "open",
    "busy",
    "sleepers",
    "stop",
    "kernel",
    "args",
    "total",
    "chunk",
    "limit",
    "wake",
    "wait",
)
SPINS = 2000  # of pause: some 30 to 100 microseconds, about the gap between two products of a decode step
PAUSE = {"x86_64": "call void @llvm.x86.sse2.pause()", "aarch64": "call void @llvm.aarch64.hint(i32 1)"}

# share: run chunks of the open job until none is left. worker: share in every job until stopped. run: post a job, share, wait.
#
# A job is open while its caller works on it. A worker says that it is inside before it looks whether the job is open, and the
# caller closes the job before it looks whether someone is inside (atomics are sequentially consistent), so the words of a job
# never change under a worker. A worker that has spun in vain counts itself as a sleeper and blocks in read() on a pipe; the next
# caller takes the count and writes as many bytes. A caller that finds the pool busy runs its job alone.
POOL_IR = """
declare void @llvm.x86.sse2.pause()
declare void @llvm.aarch64.hint(i32)
declare i64 @read(i32, ptr, i64)
declare i64 @write(i32, ptr, i64)
declare i32 @sched_yield()

define void @share(ptr %pool) {
  FIELDS
  %f = load ptr, ptr %kernel
  %a = load ptr, ptr %args
  %n = load i64, ptr %total
  %size = load i64, ptr %chunk
  br label %head
head:
  %i = atomicrmw add ptr %next, i64 1 seq_cst
  %begin = mul i64 %i, %size
  %more = icmp slt i64 %begin, %n
  br i1 %more, label %work, label %done
work:
  %full = add i64 %begin, %size
  %short = icmp slt i64 %n, %full
  %end = select i1 %short, i64 %n, i64 %full
  call void %f(ptr %a, i64 %begin, i64 %end)
  br label %head
done:
  ret void
}

define void @worker(ptr %pool) {
entry:
  FIELDS
  %byte = alloca i8
  br label %idle
idle:
  %seen = phi i64 [ 0, %entry ], [ %seen, %awake ], [ %now, %leave ]
  br label %spin
spin:
  %i = phi i64 [ 0, %idle ], [ %i1, %again ]
  %now = load atomic i64, ptr %generation seq_cst, align 8
  %same = icmp eq i64 %now, %seen
  br i1 %same, label %again, label %changed
again:
  PAUSE
  %i1 = add i64 %i, 1
  %patient = icmp eq i64 %i1, SPINS
  br i1 %patient, label %tired, label %spin
tired:
  %count = atomicrmw add ptr %sleepers, i64 1 seq_cst
  %last = load atomic i64, ptr %generation seq_cst, align 8
  %still = icmp eq i64 %last, %seen
  br i1 %still, label %sleep, label %awake
sleep:
  %pipe = load i64, ptr %wait
  %fd = trunc i64 %pipe to i32
  %got = call i64 @read(i32 %fd, ptr %byte, i64 1)
  br label %awake
awake:
  br label %idle
changed:
  %stopped = load atomic i64, ptr %stop seq_cst, align 8
  %end = icmp ne i64 %stopped, 0
  br i1 %end, label %done, label %enter
enter:
  %others = atomicrmw add ptr %inside, i64 1 seq_cst
  %opened = load atomic i64, ptr %open seq_cst, align 8
  %is_open = icmp ne i64 %opened, 0
  %most = load atomic i64, ptr %limit seq_cst, align 8
  %is_free = icmp slt i64 %others, %most
  %join = and i1 %is_open, %is_free
  br i1 %join, label %work, label %leave
work:
  call void @share(ptr %pool)
  br label %leave
leave:
  %left = atomicrmw sub ptr %inside, i64 1 seq_cst
  br label %idle
done:
  ret void
}

define void @run(ptr %pool, ptr %f, ptr %a, i64 %n, i64 %size, i64 %helpers) {
  FIELDS
  %none = icmp eq ptr %pool, null
  br i1 %none, label %alone, label %try
try:
  %taken = atomicrmw xchg ptr %busy, i64 1 seq_cst
  %is_busy = icmp ne i64 %taken, 0
  br i1 %is_busy, label %alone, label %post
alone:
  call void %f(ptr %a, i64 0, i64 %n)
  ret void
post:
  store ptr %f, ptr %kernel
  store ptr %a, ptr %args
  store i64 %n, ptr %total
  store i64 %size, ptr %chunk
  store atomic i64 %helpers, ptr %limit seq_cst, align 8
  store atomic i64 0, ptr %next seq_cst, align 8
  store atomic i64 1, ptr %open seq_cst, align 8
  %before = atomicrmw add ptr %generation, i64 1 seq_cst
  %asleep = atomicrmw xchg ptr %sleepers, i64 0 seq_cst
  %any = icmp ne i64 %asleep, 0
  br i1 %any, label %rouse, label %work
rouse:
  %pipe = load i64, ptr %wake
  %fd = trunc i64 %pipe to i32
  %wrote = call i64 @write(i32 %fd, ptr %pool, i64 %asleep)
  br label %work
work:
  call void @share(ptr %pool)
  store atomic i64 0, ptr %open seq_cst, align 8
  br label %wait_all
wait_all:
  %i = phi i64 [ 0, %work ], [ %i1, %again ], [ 0, %yield ]
  %busy_workers = load atomic i64, ptr %inside seq_cst, align 8
  %waiting = icmp ne i64 %busy_workers, 0
  br i1 %waiting, label %again, label %done
again:
  PAUSE
  %i1 = add i64 %i, 1
  %patient = icmp eq i64 %i1, SPINS
  br i1 %patient, label %yield, label %wait_all
yield:
  %y = call i32 @sched_yield()
  br label %wait_all
done:
  store atomic i64 0, ptr %busy seq_cst, align 8
  ret void
}

define void @run_many(ptr %pool, ptr %jobs, i64 %n, i64 %helpers) {
entry:
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%next, %loop]
  %first = shl i64 %i, 2
  %place0 = getelementptr i64, ptr %jobs, i64 %first
  %place1 = getelementptr i64, ptr %place0, i64 1
  %place2 = getelementptr i64, ptr %place0, i64 2
  %place3 = getelementptr i64, ptr %place0, i64 3
  %kernel = load ptr, ptr %place0
  %arguments = load ptr, ptr %place1
  %total = load i64, ptr %place2
  %chunk = load i64, ptr %place3
  call void @run(ptr %pool, ptr %kernel, ptr %arguments, i64 %total, i64 %chunk, i64 %helpers)
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %n
  br i1 %more, label %loop, label %done
done:
  ret void
}
"""


def _pool_ir() -> str:
    arch = _arch()
    fields = "\n".join(f"  %{name} = getelementptr [16 x i64], ptr %pool, i64 {i}" for i, name in enumerate(FIELDS))
    others = "\n".join(
        line for line in POOL_IR.splitlines() if "@llvm" not in line or arch in line.replace("x86", "x86_64")
    )
    return others.replace("FIELDS", fields).replace("PAUSE", PAUSE.get(arch, "")).replace("SPINS", str(SPINS))


class _Pool:
    """Threads which enter the compiled `worker` once and stay in it, without the GIL, until `stop`."""

    def __init__(self, workers: int):
        self.workers = workers
        self.pipe = os.pipe()
        os.set_blocking(self.pipe[1], False)
        self.buffer = ctypes.create_string_buffer(128 * (len(FIELDS) + 1))
        self.address = _up(ctypes.addressof(self.buffer), 128)
        self.write("wait", self.pipe[0])
        self.write("wake", self.pipe[1])
        loop = _pool_functions()[1]
        self.threads = [
            threading.Thread(target=loop, args=(self.address,), daemon=True, name="microvlm-kernels")
            for _ in range(workers)
        ]
        for thread in self.threads:
            thread.start()

    def write(self, field: str, value: int) -> None:
        ctypes.c_int64.from_address(self.address + 128 * FIELDS.index(field)).value = value

    def stop(self) -> None:
        self.write("stop", 1)
        self.write("generation", 2**62)
        os.write(self.pipe[1], bytes(self.workers))
        for thread in self.threads:
            thread.join()

    def __del__(self):  # not in `stop`: a caller may still be about to write
        for end in self.pipe:
            os.close(end)


_pool: _Pool | None = None
_pool_lock = threading.Lock()


def _stop_pool() -> None:
    """Before the interpreter goes: a worker must not run in code that is being freed."""
    global _pool
    pool, _pool = _pool, None
    if pool is not None:
        pool.stop()


def _forget_pool() -> None:
    """In a forked child, which has no threads: start anew at the next call."""
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


atexit.register(_stop_pool)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


_here = threading.local()


@contextlib.contextmanager
def kernel_threads():
    """Leave this thread's share of the cores to the kernels: torch's own operations run on one thread meanwhile.

    Threads of OpenMP wait by spinning, in the way of the workers here: a small operation of torch between two products costs more than both.
    """
    threads = torch.get_num_threads()
    if threads == 1 or not native_available():
        yield
        return
    _here.threads = threads
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        del _here.threads


def _helpers(wanted: bool = True) -> tuple[int, int]:
    """Address of the pool, or 0, and how many of its threads help: as many as torch has, see `kernel_threads`."""
    global _pool
    helpers = (getattr(_here, "threads", None) or torch.get_num_threads()) - 1
    if not wanted or not helpers:
        return 0, helpers
    pool = _pool
    if pool is None or pool.workers < helpers:
        with _pool_lock:
            if _pool is None or _pool.workers < helpers:
                _stop_pool()
                _pool = _Pool(helpers)
            pool = _pool
    return pool.address, helpers


def _run(kernel: int, arguments: bytes, total: int, chunk: int) -> None:
    """kernel(arguments, begin, end) over 0..total, shared in chunks."""
    address, helpers = _helpers(total > chunk)
    _pool_functions()[0](address, kernel, arguments, total, chunk, helpers)


# --------------------------------------------------------------------------------------------------------------- compilation


def _machine(name: str, triple: str | None = None):
    chosen = binding.Target.from_triple(triple or binding.get_process_triple())
    cpu = "x86-64" if _arch(triple) == "x86_64" else "generic"
    features = ",".join(f"+{f}" for f in TARGETS[name].features)
    return chosen.create_target_machine(cpu=cpu, features=features, opt=2, jit=triple is None)


def _optimized(source: str, machine):
    module = binding.parse_assembly(source)
    options = binding.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = False  # vectors are written out
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return module


def assembly(name: str, source: str, triple: str) -> str:
    """What the IR becomes on another machine, to read."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    machine = _machine(name, triple)
    return machine.emit_assembly(_optimized(source, machine))


def _engine(name: str, source: str):
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = _machine(name)
    engine = binding.create_mcjit_compiler(_optimized(source, machine), machine)
    engine.finalize_object()
    return engine


_ENGINES = []  # keeps compiled code alive


@functools.cache
def _compiled(name: str, kind: str, size: int, bf16: bool) -> int:
    """Address of a kernel, compiled at the first use. `size`: bits of a weight, or of an attention the width of a head."""
    if kind in ("turn", "attention"):
        module = attention_ir(kind, size, bf16)
    elif kind == "layout":
        module = layout_ir(size)
    elif kind in ("linear", "placed"):
        module = linear_ir(name, size, bf16, placed=kind == "placed")
    else:
        module = quantize_ir(kind, bf16)
    _ENGINES.append(_engine(name, str(module)))
    return _ENGINES[-1].get_function_address("kernel")


@functools.cache
def _pool_functions():
    """`run`, `worker` and `run_many` of POOL_IR."""
    _ENGINES.append(_engine("generic", _pool_ir()))
    i64, pointer = ctypes.c_int64, ctypes.c_void_p
    types = {
        "run": ctypes.CFUNCTYPE(None, pointer, pointer, ctypes.c_char_p, i64, i64, i64),
        "worker": ctypes.CFUNCTYPE(None, pointer),
        "run_many": ctypes.CFUNCTYPE(None, pointer, pointer, i64, i64),
    }
    return tuple(kind(_ENGINES[-1].get_function_address(name)) for name, kind in types.items())


# ---------------------------------------------------------------------------------------------------------------- public API

Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
DTYPES = (torch.float32, torch.bfloat16)


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; expected contiguous {dtype} {shape} on {device}."
        )


def _check_input(name: str, x: torch.Tensor) -> None:
    if x.ndim != 2 or x.dtype not in DTYPES:
        raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}; expected float32 or bfloat16 (tokens, columns).")
    _check_bits(8, x.shape[1])


def _native(x: torch.Tensor) -> bool:
    return native_available() and x.is_cpu


def _gpu(x: torch.Tensor) -> bool:
    return x.is_cuda and triton_available()


Job = tuple[int, bytes, int, int]  # a kernel, its arguments, how much there is to do, and how much of it at a time


def _quantize_job(kind: str, x, weight, scratch, quantized: Quantized, columns: int, eps: float) -> Job:
    padded = quantized[0].shape[1]
    tensors = [0 if t is None else t.data_ptr() for t in (x, weight, scratch, *quantized)]
    arguments = struct.pack("8qfi", *tensors, columns, padded, eps, 0)
    return _compiled(target(), kind, 8, x.dtype == torch.bfloat16), arguments, len(x), max(1, GRAIN // (8 * padded))


def _linear_job(quantized: Quantized, panels, scale, bias, residual, y, bits: int, places=None) -> Job:
    (M, padded), rows = quantized[0].shape, len(scale)
    tensors = [0 if t is None else t.data_ptr() for t in (*quantized, panels, scale, bias, residual, y, places)]
    arguments = struct.pack("13q", *tensors, M, rows, padded, y.shape[1])
    kernel = _compiled(target(), "linear" if places is None else "placed", bits, y.dtype == torch.bfloat16)
    count = _up(rows, ROWS) // ROWS
    # long pieces: memory is read in long runs
    return (
        kernel,
        arguments,
        count,
        max(1, GRAIN // (ROWS * padded * max(M, 1)), count // (PIECES * (_helpers(False)[1] + 1))),
    )


def _empty_quantized(M: int, columns: int) -> Quantized:
    return torch.empty(M, _up(columns, COLUMNS), dtype=torch.int8), torch.empty(M), torch.empty(M, dtype=torch.int32)


def _quantize(
    kind: str, x: torch.Tensor, columns: int, weight: torch.Tensor | None = None, eps: float = 0.0
) -> Quantized:
    quantized, x = _empty_quantized(len(x), columns), x.contiguous()
    scratch = torch.empty(len(x), columns) if kind in ("silu", "relu2") else None
    _run(*_quantize_job(kind, x, weight, scratch, quantized, columns, eps))
    return quantized


class Attention:
    """Attention of the new tokens of one row to what is kept, beside them a memory's keys and values. CPU, with `native_available()`.

    Args:
        heads, kv_heads, head_dim: of queries, of keys and values; d, an even number.
        scaling: of the scores.
        dtype: of what is kept, float32 or bfloat16; queries are rounded to it too.
    """

    def __init__(self, heads: int, kv_heads: int, head_dim: int, scaling: float, dtype: torch.dtype):
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.scaling, self.dtype = scaling, dtype
        self.buffer, self.bound = ctypes.create_string_buffer(8 * 15), None

    def tokens(self, qkv: torch.Tensor, turns: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """Name the new tokens.

        Args:
            qkv: (T, (heads + 2 kv heads) d) float32: queries, keys, values. The queries are turned in place.
            turns: (T, d) float32: cosines, then sines, of the positions, as rotary embeddings by halves take them.
            length: () int64, tokens kept before them.

        Returns:
            (T, heads d) float32, which a run writes.
        """
        T, device = len(qkv), length.device
        _check("qkv", qkv, (T, (self.heads + 2 * self.kv_heads) * self.head_dim), torch.float32, device)
        _check("turns", turns, (T, self.head_dim), torch.float32, device)
        _check("length", length, (), torch.int64, device)
        out = torch.empty(T, self.heads * self.head_dim)
        self.given, self.bound = (qkv, turns, length, out), None
        return out

    def bind(self, keys, values, memory: tuple[torch.Tensor, torch.Tensor] | None = None, gate: float = 0.0) -> None:
        """Name what is kept; the caller keeps it alive.

        Args:
            keys, values: contiguous (1, kv heads, capacity, d); new tokens are written from `length` on, for which there must be room.
            memory: contiguous keys and values (1, kv heads, S, d) that are attended to beside them.
            gate: added to the memory's scores.

        Raises:
            ValueError: a shape, dtype or layout that does not fit.
        """
        parts = (keys, values, *(memory or ()))
        capacity, items = keys.shape[2], memory[0].shape[2] if memory else 0
        bound = (*(t.data_ptr() for t in parts), capacity, items, gate)
        if bound == self.bound:
            return
        for t, length in zip(parts, (capacity, capacity, items, items)):
            _check("keys or values", t, (1, self.kv_heads, length, self.head_dim), self.dtype, keys.device)
        self.bound, self.scratch = bound, torch.empty(self.heads * (capacity + items))
        qkv, turns, length, out = self.given
        pointers = [t.data_ptr() for t in (qkv, turns, length, *parts)] + [0] * (4 - len(parts))
        pointers += [self.scratch.data_ptr(), out.data_ptr()]
        sizes = len(qkv), capacity, self.heads // self.kv_heads, self.kv_heads, items
        self.buffer[:] = struct.pack("14q2f", *pointers, *sizes, self.scaling, gate)

    def jobs(self) -> list[tuple[int, ctypes.Array, int, int]]:
        bf16, T = self.dtype == torch.bfloat16, len(self.given[0])
        turn, attend = (_compiled(target(), kind, self.head_dim, bf16) for kind in ("turn", "attention"))
        return [(turn, self.buffer, T, max(1, T // 8)), (attend, self.buffer, self.heads, max(1, self.heads // 8))]

    def __call__(self) -> None:
        for job in self.jobs():
            _run(*job)


class Program:
    """Quantizers and products on tensors that stay where they are, recorded once and run in order by one call.

    The tensors are float32 and contiguous, on a CPU with `native_available()`. Each method records a step and returns what it writes to.
    """

    def __init__(self):
        self.steps: list[Job] = []
        self.tensors, self.jobs = [], None

    def quantize(self, x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 0.0) -> Quantized:
        """`quantize_rows` of x (M, C), or with a weight `rms_norm_quantize`."""
        quantized = _empty_quantized(*x.shape)
        self._add(_quantize_job("plain" if weight is None else "rms", x, weight, None, quantized, x.shape[1], eps))
        self.tensors += [x, weight, *quantized]
        return quantized

    def gate(self, gate_up: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 0.0) -> Quantized:
        """`silu_mul_quantize`, or with a weight `relu2_norm_quantize`."""
        columns = gate_up.shape[1] // 2
        quantized, scratch = _empty_quantized(len(gate_up), columns), torch.empty(len(gate_up), columns)
        kind = "silu" if weight is None else "relu2"
        self._add(_quantize_job(kind, gate_up, weight, scratch, quantized, columns, eps))
        self.tensors += [gate_up, weight, scratch, *quantized]
        return quantized

    def linear(self, quantized: Quantized, panels, scale, bias, rows: int, bits: int, residual=None) -> torch.Tensor:
        """`low_bit_linear_quantized`."""
        y = torch.empty(len(quantized[0]), rows)
        self._add(_linear_job(quantized, panels, scale, bias, residual, y, bits))
        self.tensors += [*quantized, panels, scale, bias, residual, y]
        return y

    def attention(self, attention: Attention) -> None:
        """A run of `attention`, whose tokens are named before; `bind` is called before a run of the program."""
        for kernel, buffer, total, chunk in attention.jobs():
            self._step(kernel, buffer, total, chunk)
        self.tensors.append(attention)

    def _add(self, job: Job) -> None:
        kernel, arguments, total, chunk = job
        self._step(kernel, ctypes.create_string_buffer(arguments, len(arguments)), total, chunk)

    def _step(self, kernel: int, buffer: ctypes.Array, total: int, chunk: int) -> None:
        self.tensors.append(buffer)
        self.steps.append((kernel, ctypes.addressof(buffer), total, chunk))
        self.jobs = (ctypes.c_int64 * (4 * len(self.steps)))(*(value for step in self.steps for value in step))

    def __call__(self) -> None:
        address, helpers = _helpers()
        _pool_functions()[2](address, self.jobs, len(self.steps), helpers)


def quantize_rows_reference(x: torch.Tensor) -> Quantized:
    """`quantize_rows` in torch, with the same bits."""
    _check_input("x", x)
    y = x.float()
    s = 127 / y.abs().amax(dim=-1, keepdim=True).clamp(min=EPS)
    q = (y * s).round()  # at most 127 (1 + 2^-20) before rounding: the clamp of quantization_microvlm never acts
    q = q.masked_fill(q.isnan(), 0).to(torch.int8)
    return F.pad(q, (0, -q.shape[1] % COLUMNS)), s[:, 0], q.sum(-1, dtype=torch.int32)


def quantize_rows(x: torch.Tensor) -> Quantized:
    """Round every token to 8 bits, as `fake_quantize_activation` does.

    Args:
        x: (M, C) float32 or bfloat16. A token with a NaN or an infinity gets zeros where x * s is NaN; its products are NaN.

    Returns:
        x_q (M, C up to a multiple of 64) int8, padded with 0; s (M,) float32 with x ~ x_q / s; sums (M,) int32 of x_q.

    Raises:
        ValueError: another dtype or rank, or more than 131071 columns.
    """
    if not _native(x):
        return quantize_rows_reference(x)
    _check_input("x", x)
    return _quantize("plain", x, x.shape[1])


def rms_norm_quantize_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Quantized:
    """`rms_norm_quantize` in torch."""
    _check_input("x", x)
    _check("weight", weight, (x.shape[1],), torch.float32, x.device)
    x = x.float()
    return quantize_rows_reference(x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight)


def rms_norm_quantize(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Quantized:
    """`quantize_rows` of x / sqrt(mean x^2 + eps) * weight, all in float32.

    Equal to torch up to the order of the sum: s within 1e-5 relative, codes within 1.

    Args:
        x: (M, C) float32 or bfloat16.
        weight: (C,) float32.
        eps: added to the mean square.

    Returns:
        x_q, s and sums, as `quantize_rows`.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    if not _native(x):
        return rms_norm_quantize_reference(x, weight, eps)
    _check_input("x", x)
    _check("weight", weight, (x.shape[1],), torch.float32, x.device)
    return _quantize("rms", x, x.shape[1], weight, eps)


def _gated_columns(gate_up: torch.Tensor) -> int:
    _check_input("gate_up", gate_up)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has {gate_up.shape[1]} columns; expected an even number.")
    return gate_up.shape[1] // 2


def silu_mul_quantize_reference(gate_up: torch.Tensor) -> Quantized:
    """`silu_mul_quantize` in torch."""
    _check_input("gate_up", gate_up)
    gate, up = gate_up.float().chunk(2, dim=-1)
    return quantize_rows_reference(F.silu(gate) * up)


def silu_mul_quantize(gate_up: torch.Tensor) -> Quantized:
    """`quantize_rows` of silu(gate) * up, all in float32.

    Equal to torch up to the error of exp: s within 1e-5 relative, codes within 1.

    Args:
        gate_up: (M, 2 I) float32 or bfloat16, the gate in the first half.

    Returns:
        x_q (M, I up to a multiple of 64), s and sums, as `quantize_rows`.

    Raises:
        ValueError: a dtype or rank that does not fit, or an odd width.
    """
    columns = _gated_columns(gate_up)
    if not _native(gate_up):
        return silu_mul_quantize_reference(gate_up)
    return _quantize("silu", gate_up, columns)


def relu2_norm_quantize_reference(gate_up: torch.Tensor, weight: torch.Tensor, eps: float) -> Quantized:
    """`relu2_norm_quantize` in torch."""
    _check_input("gate_up", gate_up)
    gate, up = gate_up.float().chunk(2, dim=-1)
    return rms_norm_quantize_reference(gate.relu().square() * up, weight, eps)


def relu2_norm_quantize(gate_up: torch.Tensor, weight: torch.Tensor, eps: float) -> Quantized:
    """`rms_norm_quantize` of relu(gate)^2 up, all in float32: what BitNet's MLP gives its last product.

    Equal to torch up to the order of the sum: s within 1e-5 relative, codes within 1.

    Args:
        gate_up: (M, 2 I) float32 or bfloat16, the gate in the first half.
        weight: (I,) float32.
        eps: added to the mean square.

    Returns:
        x_q (M, I up to a multiple of 64), s and sums, as `quantize_rows`.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or an odd width.
    """
    columns = _gated_columns(gate_up)
    if not _native(gate_up):
        return relu2_norm_quantize_reference(gate_up, weight, eps)
    _check("weight", weight, (columns,), torch.float32, gate_up.device)
    return _quantize("relu2", gate_up, columns, weight, eps)


def _check_linear(x_q, s, sums, panels, scale, bias, rows, columns, bits, dtype, residual) -> None:
    _check_panels(panels, rows, columns, bits)
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; expected torch.float32 or torch.bfloat16.")
    M, device = x_q.shape[0], panels.device
    _check("x_q", x_q, (M, _up(columns, COLUMNS)), torch.int8, device)
    _check("s", s, (M,), torch.float32, device)
    _check("sums", sums, (M,), torch.int32, device)
    _check("scale", scale, (rows,), torch.float32, device)
    if bias is not None:
        _check("bias", bias, (rows,), torch.float32, device)
    if residual is not None:
        _check("residual", residual, (M, rows), dtype, device)


def low_bit_linear_quantized_reference(
    x_q: torch.Tensor,
    s: torch.Tensor,
    sums: torch.Tensor,
    panels: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    columns: int,
    bits: int,
    dtype: torch.dtype,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`low_bit_linear_quantized` in torch, with the same bits, on any device."""
    _check_linear(x_q, s, sums, panels, scale, bias, rows, columns, bits, dtype, residual)
    exact = 2**24 // (128 * ZERO[bits])  # columns whose sum float32 holds exactly
    panel = panel_bytes(ROWS, columns, bits)
    parts = []
    for start in range(0, rows, 8192):
        count = min(8192, rows - start)
        part = panels[start // ROWS * panel : _up(start + count, ROWS) // ROWS * panel]
        w = unpack_panels(part, count, columns, bits).float()
        pairs = zip(x_q[:, :columns].float().split(exact, dim=1), w.split(exact, dim=1))
        parts.append(sum((x @ w.T).to(torch.int32) for x, w in pairs))
    y = torch.cat(parts, dim=1).float() * (scale / s[:, None])
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + residual.float()
    return y.to(dtype)


def low_bit_linear_quantized(
    x_q: torch.Tensor,
    s: torch.Tensor,
    sums: torch.Tensor,
    panels: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    columns: int,
    bits: int,
    dtype: torch.dtype,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = (x_q w^T) (scale / s) + bias + residual, in float32, rounded once to `dtype`.

    Args:
        x_q: (M, columns up to a multiple of 64) int8, with s (M,) float32 and sums (M,) int32, from one of the quantizers.
        panels: uint8, from `pack_panels`.
        scale: (rows,) float32; one scale for the matrix is expanded by the caller.
        bias: (rows,) float32, or None.
        rows, columns, bits: as packed.
        dtype: of the result, torch.float32 or torch.bfloat16.
        residual: (M, rows) of that dtype, or None.

    Returns:
        (M, rows).

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    if not _native(x_q) and not _gpu(x_q):
        return low_bit_linear_quantized_reference(
            x_q, s, sums, panels, scale, bias, rows, columns, bits, dtype, residual
        )
    _check_linear(x_q, s, sums, panels, scale, bias, rows, columns, bits, dtype, residual)
    if _gpu(x_q):
        return low_bit_linear_triton(x_q, s, panels, scale, bias, bits, dtype, residual)
    y = torch.empty(len(x_q), rows, dtype=dtype)
    _run(*_linear_job((x_q, s, sums), panels, scale, bias, residual, y, bits))
    return y


def low_bit_linear_reference(
    x: torch.Tensor,
    panels: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    columns: int,
    bits: int,
) -> torch.Tensor:
    """`low_bit_linear` in torch, with the same bits, on any device."""
    x_q, s, sums = quantize_rows_reference(x.reshape(-1, x.shape[-1]))
    y = low_bit_linear_quantized_reference(x_q, s, sums, panels, scale, bias, rows, columns, bits, x.dtype)
    return y.view(*x.shape[:-1], rows)


def _check_width(x: torch.Tensor, columns: int) -> None:
    """Rounded inputs are filled up to a multiple of 64 columns, which hides another width."""
    if x.shape[-1] != columns:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; expected {columns} columns.")


@torch.compiler.disable
def low_bit_linear(
    x: torch.Tensor,
    panels: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    columns: int,
    bits: int,
) -> torch.Tensor:
    """A linear layer on packed weights, its input rounded per token to 8 bits. No gradient.

    Args:
        x: (..., columns) float32 or bfloat16.
        panels, scale, bias, rows, columns, bits: as in `low_bit_linear_quantized`.

    Returns:
        (..., rows) in the dtype of x. A token with a NaN or an infinity gives NaN in every row.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    _check_width(x, columns)
    x_q, s, sums = quantize_rows(x.reshape(-1, x.shape[-1]))
    y = low_bit_linear_quantized(x_q, s, sums, panels, scale, bias, rows, columns, bits, x.dtype)
    return y.view(*x.shape[:-1], rows)


@dataclass(frozen=True)
class MixedRows:
    """Some rows of a matrix whose rows have several widths.

    Args:
        panels, scale, bits: as in `low_bit_linear_quantized`.
        places: (its rows,) int64, which rows of the whole matrix these are.
        rows: of the whole matrix.

    Raises:
        ValueError: places that do not fit.
    """

    panels: torch.Tensor
    scale: torch.Tensor
    bits: int
    places: torch.Tensor
    rows: int

    def __post_init__(self):
        _check("places", self.places, (len(self.scale),), torch.int64, self.panels.device)
        if len(self.places) and not 0 <= int(self.places.min()) <= int(self.places.max()) < self.rows:
            raise ValueError(
                f"places go from {int(self.places.min())} to {int(self.places.max())}; expected 0 to {self.rows - 1}."
            )


def low_bit_linear_mixed_reference(x: torch.Tensor, parts: Sequence[MixedRows], columns: int) -> torch.Tensor:
    """`low_bit_linear_mixed` in torch, with the same bits, on any device."""
    y = x.new_empty(*x.shape[:-1], parts[0].rows)
    for part in parts:
        arguments = part.panels, part.scale, None, len(part.places), columns, part.bits
        y[..., part.places] = low_bit_linear_reference(x, *arguments)
    return y


@torch.compiler.disable
def low_bit_linear_mixed(x: torch.Tensor, parts: Sequence[MixedRows], columns: int) -> torch.Tensor:
    """`low_bit_linear` with a matrix in parts, whose rows lie among each other.

    Args:
        x: (..., columns) float32 or bfloat16.
        parts: of one matrix; a row that is in none is not written.
        columns: as packed.

    Returns:
        (..., rows) in the dtype of x.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    _check_width(x, columns)
    if not _native(x):
        y = x.new_empty(*x.shape[:-1], parts[0].rows)
        for part in parts:
            y[..., part.places] = low_bit_linear(x, part.panels, part.scale, None, len(part.places), columns, part.bits)
        return y
    quantized = quantize_rows(x.reshape(-1, x.shape[-1]))
    y = torch.empty(len(quantized[0]), parts[0].rows, dtype=x.dtype)
    for part in parts:
        if part.rows != y.shape[1]:
            raise ValueError(f"parts are of matrices with {y.shape[1]} and {part.rows} rows.")
        shape = len(part.places), columns, part.bits
        _check_linear(*quantized, part.panels, part.scale, None, *shape, x.dtype, None)
        _run(*_linear_job(quantized, part.panels, part.scale, None, None, y, part.bits, part.places))
    return y.view(*x.shape[:-1], y.shape[1])
