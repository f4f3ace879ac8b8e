"""The CPU kernels in LLVM IR. Every sum of a product is an integer, so torch gives the same bits.

    linear, placed                product of packed weights and rounded tokens        `LinearKernel`
    plain, rms, silu, relu2       rounding of tokens to 8 bits, fused with a norm     `QuantizeKernel`
    turn, attention               attention of new tokens                             `AttentionKernel`

One loop over panels serves all widths and instruction sets. Methods emit what their name says into the kernel;
`llvm_microvlm.py` has the emitter.
"""

import functools
import struct
from collections.abc import Callable
from typing import NamedTuple

from .llvm_microvlm import (
    F32,
    I8,
    I16,
    I32,
    I64,
    ROUND,
    TARGETS,
    VOID,
    Emitter,
    built_once,
    compile_ir,
    const,
    element,
    int64,
    ir,
    target,
)
from .packing_microvlm import EPS, GROUP, ROWS, ZERO

# ------------------------------------------------------------------------------------------------------- linear kernel


class Lanes(NamedTuple):
    """The rows that the lanes of a vector hold: the first, which exist, how many; their data."""

    row: object
    mask: object
    count: object
    scale: object
    bias: object
    weights: object


class LinearKernel(Emitter):
    """The product with packed weights, for a range of panels.

    y = (sum w q) (scale / s) + bias + residual

    With `placed`, the result of row r goes to column `places[r]` of y, whose tokens are `wide` apart.
    """

    def __init__(self, name: str, bits: int, bf16: bool, placed: bool = False):
        super().__init__("x_q s sums panels scale bias residual y places", "tokens rows stride wide")
        self.name, self.bits, self.bf16, self.placed = name, bits, bf16, placed
        self.width, self.tiles = TARGETS[name].width, TARGETS[name].tiles
        self.lanes, self.fields = self.width // GROUP, 8 // bits
        self.signed = bits == 8 and name == "neon-dotprod"  # its dot product takes signed weights
        self.bytes = ir.VectorType(I8, self.width)

    def body(self, p) -> None:
        for part in range(0, ROWS * GROUP, self.width):
            self.part_of_panel(p, part)

    def part_of_panel(self, p, part: int) -> None:
        """All tokens times the rows whose bytes are a vector at `part` of the panel."""
        b, lanes = self.b, self.lanes
        # the rows of the lanes, without those that fill up the last panel
        row = b.add(b.mul(p, int64(ROWS)), int64(part // GROUP))
        iota = ir.Constant(ir.VectorType(I64, lanes), list(range(lanes)))
        mask = b.icmp_signed("<", b.add(self.splat(row, lanes), iota), self.splat(self.rows, lanes))
        scale, bias = (self.read_rows(t, row, mask, False, self.scale) for t in (self.scale, self.bias))
        start = b.mul(b.mul(p, self.stride), int64(ROWS * self.bits // 8))
        weights = self.at(self.panels, b.add(start, int64(part)))
        left = b.sub(self.rows, row)
        count = b.select(b.icmp_signed("<", left, int64(lanes)), left, int64(lanes))
        rows = Lanes(row, mask, count, scale, bias, weights)
        # tokens in tiles that share unpacked weights
        m = int64(0)
        for size in self.tiles:
            m, _ = self.loop(m, self.tokens, size, functools.partial(self.tile, rows, size))

    def read_rows(self, pointer, index, mask, bf16: bool, instead):
        """The lanes' floats at an index; -0, which adds nothing, where masked.

        All are masked if the pointer is null, and the load is at a readable address `instead`: null would not
        fault, but take 200 cycles.
        """
        b, kind = self.b, element(bf16)
        exists = b.icmp_unsigned("!=", b.ptrtoint(pointer, I64), int64(0))
        minus_zero = const(kind, 1 << (15 if bf16 else 31), self.lanes)
        where, align = self.at(b.select(exists, pointer, instead), index, kind), ir.Constant(I32, kind.width // 8)
        name, mask = f"llvm.masked.load.v{self.lanes}i{kind.width}.p0", b.and_(mask, self.splat(exists, self.lanes))
        return self.to_float(self.call(name, minus_zero.type, where, align, mask, minus_zero))

    def tile(self, rows: Lanes, size: int, m, _):
        """Tokens m to m + size times the rows."""
        b = self.b
        inputs = [self.at(self.x_q, b.mul(b.add(m, int64(t)), self.stride)) for t in range(size)]
        # few tokens: a sum for every field, or each product would wait for the one before
        sets = self.fields if size == 1 else 1
        # a field k of two bits may stay where it is, times 4^k, which its own sum is divided by
        in_place = self.bits == 2 and sets == self.fields and self.name != "neon-dotprod"

        def add_vector(c, accs):
            accs, where = list(accs), b.mul(c, int64(ROWS * self.bits // 8))  # c: the first column
            vector = b.load(self.at(rows.weights, where), align=1, typ=self.bytes)
            for k in range(self.fields):
                u, at = self.field(vector, k, in_place), b.add(c, int64(k * GROUP))
                for t, pointer in enumerate(inputs):
                    four = self.splat(b.load(self.at(pointer, at), align=1, typ=I32), self.lanes)
                    i = t * sets + k % sets
                    accs[i] = self.dot(accs[i], u, b.bitcast(four, self.bytes))
            return accs

        # sum up over the columns, then write token by token
        zeros = [const(I32, 0, self.lanes)] * (size * sets)
        _, accs = self.loop(int64(0), self.stride, GROUP * self.fields, add_vector, zeros)
        for t in range(size):
            token, total = b.add(m, int64(t)), None
            for k, acc in enumerate(accs[t * sets : (t + 1) * sets]):
                acc = b.ashr(acc, const(I32, k * self.bits, self.lanes)) if in_place else acc
                total = acc if total is None else b.add(total, acc)
            self.write_token(rows, token, total)

    def field(self, vector, k: int, in_place: bool):
        """The k-th field of every byte."""
        b = self.b
        if self.bits == 8:
            return b.xor(vector, const(I8, 128, self.width)) if self.signed else vector
        if in_place:
            return b.and_(vector, const(I8, 3 << (k * self.bits), self.width))
        shifted = b.lshr(vector, const(I8, k * self.bits, self.width))
        return b.and_(shifted, const(I8, 2**self.bits - 1, self.width))

    def dot(self, acc, u, x):
        """Add the products of the bytes u (unsigned; signed for neon) and x (signed), in fours."""
        b, width = self.b, self.width
        if self.name.endswith("vnni"):
            name = f"llvm.x86.avx512.vpdpbusd.{8 * width}"
            return self.call(name, acc.type, acc, *(b.bitcast(v, acc.type) for v in (u, x)))
        if self.name == "neon-dotprod":
            return self.call("llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, acc, u, x)
        if self.name == "generic":
            shorts = ir.VectorType(I16, width)  # 255 * -128 fits
            products = b.sext(b.mul(b.zext(u, shorts), b.sext(x, shorts)), ir.VectorType(I32, width))
            for size in (width // 2, width // 4):
                products = self.add_pairs(*(self.shuffle(products, products, range(i, i + size)) for i in (0, size)))
            return b.add(acc, products)
        shorts = ir.VectorType(I16, 16)
        if self.bits < 8:  # pairs reach 128 * -128 * 2, the last value before saturation
            pairs = self.call("llvm.x86.avx2.pmadd.ub.sw", shorts, u, x)
            return b.add(acc, self.call("llvm.x86.avx2.pmadd.wd", acc.type, pairs, const(I16, 1, 16)))
        sums = []
        for half in (range(16), range(16, 32)):
            wide = b.zext(self.shuffle(u, u, half), shorts), b.sext(self.shuffle(x, x, half), shorts)
            sums.append(self.call("llvm.x86.avx2.pmadd.wd", acc.type, *wide))
        return b.add(acc, self.add_pairs(*sums))

    def add_pairs(self, p, q):
        """Sums of neighbouring lanes, first of p, then of q."""
        lanes = range(0, 2 * p.type.count, 2)
        return self.b.add(self.shuffle(p, q, lanes), self.shuffle(p, q, [i + 1 for i in lanes]))

    def write_token(self, rows: Lanes, token, total) -> None:
        """Scale the integer sums of one token, add bias and residual, and store them."""
        b, lanes = self.b, self.lanes
        # u = w + zero
        if not self.signed:
            zero = b.mul(b.load(self.at(self.sums, token, I32), typ=I32), ir.Constant(I32, ZERO[self.bits]))
            total = b.sub(total, self.splat(zero, lanes))
        token_scale = self.splat(b.load(self.at(self.s, token, F32), typ=F32), lanes)
        out = b.fmul(b.sitofp(total, ir.VectorType(F32, lanes)), b.fdiv(rows.scale, token_scale))
        # bias and residual
        index = b.add(b.mul(token, self.rows), rows.row)
        out = b.fadd(out, rows.bias)
        out = b.fadd(out, self.read_rows(self.residual, index, rows.mask, self.bf16, self.y))
        raw, kind = self.from_float(out, self.bf16), element(self.bf16)
        # rows of this matrix lie together in y, or where `places` says
        if not self.placed:
            name, align = f"llvm.masked.store.v{lanes}i{kind.width}.p0", ir.Constant(I32, kind.width // 8)
            self.call(name, VOID, raw, self.at(self.y, index, kind), align, rows.mask)
            return

        def place(k, _):
            start = b.mul(token, self.wide)
            where = b.add(start, b.load(self.at(self.places, b.add(rows.row, k), I64), typ=I64))
            b.store(b.extract_element(raw, k), self.at(self.y, where, kind), align=kind.width // 8)

        self.loop(int64(0), rows.count, 1, place)


# ----------------------------------------------------------------------------------------------------- quantize kernel


class QuantizeKernel(Emitter):
    """Rounding of a range of tokens to 8 bits.

    kind: "plain" rounds x itself, "rms" its RMS norm, "silu" silu(gate) up, "relu2" the RMS norm of relu(gate)^2 up.
    """

    def __init__(self, kind: str, bf16: bool):
        super().__init__("x weight scratch x_q s sums", "columns padded eps")
        self.kind, self.bf16 = kind, bf16
        self.gated, self.normed = kind in ("silu", "relu2"), kind in ("rms", "relu2")

    def body(self, m) -> None:
        b = self.b
        self.start = b.mul(m, self.columns)
        self.temporary = self.at(self.scratch, self.start, F32)
        # reciprocal of the root mean square
        if self.normed:
            mean = b.fdiv(self.sweep(self.add_square, (F32, 0.0), b.fadd), b.sitofp(self.columns, F32))
            eps = b.bitcast(b.trunc(self.eps, I32), F32)
            self.rms = b.fdiv(const(F32, 1.0), self.call("llvm.sqrt.f32", F32, b.fadd(mean, eps)))
        # largest magnitude: floats of one sign compare like their bits
        floor = struct.unpack("i", struct.pack("f", EPS))[0]
        top = self.sweep(self.largest, (I32, floor), lambda p, q: b.select(b.icmp_signed(">", p, q), p, q))
        # a reciprocal and a product, as torch computes 127 / tensor
        self.factor = b.fmul(b.fdiv(const(F32, 1.0), b.bitcast(top, F32)), const(F32, 127.0))
        # round, and pad with 0
        self.codes = self.at(self.x_q, b.mul(m, self.padded))
        total = self.sweep(self.add_rounded, (I32, 0), b.add)
        self.loop(self.columns, self.padded, 1, lambda c, _: b.store(const(I8, 0), self.at(self.codes, c)) and ())
        b.store(self.factor, self.at(self.s, m, F32))
        b.store(total, self.at(self.sums, m, I32))

    def sweep(self, body: Callable, zeros: tuple, combine: Callable):
        """Fold body(lanes, column, state) over a row; `combine` joins lanes.

        16 columns at a time, then one by one.
        """
        c, total = int64(0), None
        for lanes in (16, 1):
            step = functools.partial(lambda n, c, states: [body(n, c, states[0])], lanes)
            c, (state,) = self.loop(c, self.columns, lanes, step, [const(*zeros, lanes)])
            for i in range(lanes):
                lane = self.b.extract_element(state, ir.Constant(I32, i))
                total = lane if total is None else combine(total, lane)
        return total

    def read(self, lanes: int, at, bf16: bool, pointer):
        kind = element(bf16)
        raw = self.b.load(self.at(pointer, at, kind), align=kind.width // 8, typ=ir.VectorType(kind, lanes))
        return self.to_float(raw)

    def read_x(self, lanes: int, c):
        return self.read(lanes, self.b.add(self.start, c), self.bf16, self.x)

    def value(self, lanes: int, c):
        """What is rounded."""
        v = self.read(lanes, c, False, self.temporary) if self.gated else self.read_x(lanes, c)
        if not self.normed:
            return v
        v = self.b.fmul(v, self.splat(self.rms, lanes))
        return self.b.fmul(v, self.read(lanes, c, False, self.weight))

    def gate_up(self, lanes: int, c):
        """act(gate) up, which stays in `temporary`."""
        b = self.b
        at = b.add(b.add(self.start, self.start), c)
        gate = self.read(lanes, at, self.bf16, self.x)
        up = self.read(lanes, b.add(at, self.columns), self.bf16, self.x)
        if self.kind == "silu":
            act = b.fdiv(gate, b.fadd(const(F32, 1.0, lanes), self.exp(b.fneg(gate))))
        else:
            act = b.select(b.fcmp_ordered("<", gate, const(F32, 0.0, lanes)), const(F32, 0.0, lanes), gate)
            act = b.fmul(act, act)
        v = b.fmul(act, up)
        b.store(v, self.at(self.temporary, c, F32), align=4)
        return v

    def add_square(self, lanes: int, c, total):
        v = self.gate_up(lanes, c) if self.gated else self.read_x(lanes, c)
        return self.b.fadd(total, self.b.fmul(v, v))

    def largest(self, lanes: int, c, top):
        b, v = self.b, self.gate_up(lanes, c) if self.kind == "silu" else self.value(lanes, c)
        raw = b.and_(b.bitcast(v, ir.VectorType(I32, lanes)), const(I32, 0x7FFFFFFF, lanes))
        return b.select(b.icmp_signed(">", raw, top), raw, top)  # in this order infinity and NaN are the largest

    def add_rounded(self, lanes: int, c, total):
        b = self.b
        v = b.fmul(self.value(lanes, c), self.splat(self.factor, lanes))
        # |v| <= 127 (1 + 2^-20) rounds to 127 without a clamp; NaN becomes 0
        integer = b.bitcast(b.fadd(v, const(F32, ROUND, lanes)), ir.VectorType(I32, lanes))
        integer = b.select(b.fcmp_ordered("ord", v, v), integer, const(I32, 0, lanes))
        short = b.trunc(integer, ir.VectorType(I8, lanes))
        b.store(short, self.at(self.codes, c), align=1)
        return b.add(total, b.sext(short, total.type))


# ---------------------------------------------------------------------------------------------------- attention kernel


class AttentionKernel(Emitter):
    """Attention of new tokens, in two kernels over the same arguments.

    "turn", for a range of tokens: turn queries, in place, and keys to their positions; append keys and values.
    "attention", for a range of query heads: every token attends to all tokens up to itself, and to the memory's
    keys and values, whose scores have `gate` added.
    """

    def __init__(self, kind: str, head_dim: int, bf16: bool):
        super().__init__(
            "qkv turns length keys values memory_keys memory_values scratch out",
            "tokens capacity groups heads items floats",
        )
        b = self.b
        self.body = self.turn_token if kind == "turn" else self.query_head
        self.bf16, self.half, self.d = bf16, head_dim // 2, int64(head_dim)
        # two floats in one word
        floats = (b.bitcast(b.trunc(b.lshr(self.floats, int64(shift)), I32), F32) for shift in (0, 32))
        self.scaling, self.gate = floats
        self.past, self.query_heads = b.load(self.length, typ=I64), b.mul(self.heads, self.groups)
        self.qkv_width = b.mul(b.add(self.query_heads, b.add(self.heads, self.heads)), self.d)

    def read_halves(self, pointer, at, kind=None):
        """The two halves of a head's vector, float32."""
        kind, align = kind or I32, (kind or I32).width // 8
        places = (self.at(pointer, self.b.add(at, int64(i)), kind) for i in (0, self.half))
        type_ = ir.VectorType(kind, self.half)
        return [self.to_float(self.b.load(place, align=align, typ=type_)) for place in places]

    def write_halves(self, pair, pointer, at, bf16: bool = False) -> None:
        kind = element(bf16)
        for i, value in zip((0, self.half), pair):
            place = self.at(pointer, self.b.add(at, int64(i)), kind)
            self.b.store(self.from_float(value, bf16), place, align=kind.width // 8)

    def turn_token(self, m) -> None:
        b, d = self.b, self.d
        # one row of qkv holds the heads of queries, keys and values
        row, (cos, sin) = b.mul(m, self.qkv_width), self.read_halves(self.turns, b.mul(m, d))

        def turn(head):
            first, second = self.read_halves(self.qkv, b.add(row, b.mul(head, d)))
            real = b.fsub(b.fmul(first, cos), b.fmul(second, sin))
            return real, b.fadd(b.fmul(second, cos), b.fmul(first, sin))

        def query(h, _):
            rounded = [self.to_float(self.from_float(v, self.bf16)) for v in turn(h)]
            self.write_halves(rounded, self.qkv, b.add(row, b.mul(h, d)))

        def key_and_value(g, _):
            place = b.mul(b.add(b.mul(g, self.capacity), b.add(self.past, m)), d)
            self.write_halves(turn(b.add(self.query_heads, g)), self.keys, place, self.bf16)
            value = b.add(row, b.mul(b.add(b.add(self.query_heads, self.heads), g), d))
            self.write_halves(self.read_halves(self.qkv, value), self.values, place, self.bf16)

        self.loop(int64(0), self.query_heads, 1, query)
        self.loop(int64(0), self.heads, 1, key_and_value)

    def query_head(self, h) -> None:
        b, d = self.b, self.d
        g = b.sdiv(h, self.groups)
        text, memory = b.mul(b.mul(g, self.capacity), d), b.mul(b.mul(g, self.items), d)
        scores = self.at(self.scratch, b.mul(h, b.add(self.capacity, self.items)), F32)

        def attend(m, _):
            q = self.read_halves(self.qkv, b.add(b.mul(m, self.qkv_width), b.mul(h, d)))
            count = b.add(self.past, b.add(m, int64(1)))
            # per source: its tensor from this head on, how many tokens, where their scores begin, what is added to them
            keys = (self.keys, text, count, int64(0), None), (self.memory_keys, memory, self.items, count, self.gate)
            values = (self.values, text, count, int64(0)), (self.memory_values, memory, self.items, count)
            # softmax of the scores of both sources
            top = ir.Constant(F32, float("-inf"))
            for source in keys:
                top = self.score(q, scores, source, top)
            weight = self.exponentiate(scores, b.add(count, self.items), top)
            # values by their weights
            sums = [const(F32, 0.0, self.half)] * 2
            for source in values:
                sums = self.weigh(scores, source, sums)
            share = self.splat(b.fdiv(ir.Constant(F32, 1.0), weight), self.half)
            place = b.mul(b.add(b.mul(m, self.query_heads), h), d)
            self.write_halves([b.fmul(value, share) for value in sums], self.out, place)

        self.loop(int64(0), self.tokens, 1, attend)

    def fused(self, p, q, plus):
        return self.call(f"llvm.fmuladd.v{self.half}f32", p.type, p, q, plus)

    def score(self, q, scores, source, top):
        """Store the scores of a source's keys; returns the largest score so far."""
        b = self.b
        pointer, start, number, offset, gate = source

        def step(t, state):
            k = self.read_halves(pointer, b.add(start, b.mul(t, self.d)), element(self.bf16))
            s = b.fmul(self.sum_lanes(self.fused(q[1], k[1], b.fmul(q[0], k[0]))), self.scaling)
            s = s if gate is None else b.fadd(s, gate)
            b.store(s, self.at(scores, b.add(offset, t), F32), align=4)
            return [b.select(b.fcmp_ordered(">", s, state[0]), s, state[0])]

        return self.loop(int64(0), number, 1, step, [top])[1][0]

    def exponentiate(self, scores, total, top):
        """Replace scores by exp(score - top); returns their sum."""
        b, t, weight = self.b, int64(0), ir.Constant(F32, 0.0)

        def step(lanes, t, state):
            place = self.at(scores, t, F32)
            score = b.load(place, align=4, typ=ir.VectorType(F32, lanes))
            e = self.exp(b.fsub(score, self.splat(top, lanes)))
            b.store(e, place, align=4)
            return [b.fadd(state[0], e)]

        for lanes in (16, 1):
            t, (sums,) = self.loop(t, total, lanes, functools.partial(step, lanes), [const(F32, 0.0, lanes)])
            weight = b.fadd(weight, self.sum_lanes(sums))
        return weight

    def weigh(self, scores, source, sums):
        """Add a source's values, times their weights."""
        b = self.b
        pointer, start, number, offset = source

        def step(t, state):
            p = self.splat(b.load(self.at(scores, b.add(offset, t), F32), typ=F32), self.half)
            v = self.read_halves(pointer, b.add(start, b.mul(t, self.d)), element(self.bf16))
            return [self.fused(p, value, total) for value, total in zip(v, state)]

        return self.loop(int64(0), number, 1, step, sums)[1]


# ---------------------------------------------------------------------------------------------------------- compiled


def emit(name: str, kind: str, size: int, bf16: bool) -> str:
    """Write a kernel in LLVM IR; `size` is the bits of a weight or the width of a head."""
    if kind in ("turn", "attention"):
        return AttentionKernel(kind, size, bf16).emit()
    if kind in ("linear", "placed"):
        return LinearKernel(name, size, bf16, placed=kind == "placed").emit()
    return QuantizeKernel(kind, bf16).emit()


@built_once
def compile_kernel(name: str, kind: str, size: int, bf16: bool) -> int:
    """Compile a kernel at its first use, see `emit`; returns its address."""
    return compile_ir(name, emit(name, kind, size, bf16))("kernel")


def kernel(kind: str, size: int, bf16: bool) -> int:
    """Return the address of a kernel for this CPU."""
    return compile_kernel(target(), kind, size, bf16)
