"""LLVM in the process: which instruction sets there are, writing a kernel's IR with llvmlite, and compiling it.

A kernel is a function kernel(arguments, begin, end). `arguments` points to 64-bit words: pointers, then integers.
begin and end bound a range of panels, tokens or heads, so that threads can share the work.

No C compiler is needed. Set MICROVLM_KERNELS to the name of a target to force it.
"""

import functools
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

try:
    from llvmlite import binding, ir
except ImportError:
    binding = ir = VOID = I8 = I16 = I32 = I64 = F32 = PTR = None
else:
    VOID, I8, I16, I32, I64 = ir.VoidType(), *(ir.IntType(n) for n in (8, 16, 32, 64))
    F32, PTR = ir.FloatType(), ir.PointerType()

ROUND = 1.5 * 2**23  # adding it to |v| < 2**22 rounds v half to even and leaves the integer in the low mantissa bits


# ------------------------------------------------------------------------------------------------------------- targets


class Target(NamedTuple):
    """An instruction set."""

    arch: str  # of the CPU, "" for any
    width: int  # bytes of the vector that a dot product takes
    tiles: tuple[
        int, ...
    ]  # numbers of tokens that share unpacked weights: the first as often as it goes, then the next
    features: tuple[str, ...]  # that the CPU must have


AVX512 = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni")
TARGETS = {  # best first
    "avx512-vnni": Target("x86_64", 64, (12, 4, 1), AVX512),
    "avx-vnni": Target("x86_64", 32, (6, 1), ("avx2", "fma", "avxvnni")),
    "avx2": Target("x86_64", 32, (4, 1), ("avx2", "fma")),
    "neon-dotprod": Target("aarch64", 16, (8, 1), ("dotprod",)),
    "generic": Target("", 16, (1,), ()),
}


def arch_of(triple: str | None = None) -> str:
    """Return the architecture of a target triple, default: of this process."""
    return (triple or binding.get_process_triple()).split("-")[0].replace("arm64", "aarch64")


def runs_here(name: str) -> bool:
    """Check that llvmlite is installed and this CPU has what a target needs."""
    if ir is None or sys.platform == "win32":
        return False
    features = binding.get_host_cpu_features()
    return TARGETS[name].arch in ("", arch_of()) and all(features.get(f) for f in TARGETS[name].features)


@functools.cache
def target() -> str:
    """Choose the kernels once: a key of `TARGETS`, or "torch"; MICROVLM_KERNELS may name it."""
    name = os.environ.get("MICROVLM_KERNELS", "auto")
    if name == "auto":
        return next((known for known in TARGETS if runs_here(known)), "torch")
    if name == "torch":
        return name
    if name not in TARGETS:
        raise ValueError(f"MICROVLM_KERNELS is {name!r}; expected one of {', '.join(['auto', 'torch', *TARGETS])}.")
    if not runs_here(name):
        raise RuntimeError(f"MICROVLM_KERNELS asks for {name!r}, which this CPU (or the missing llvmlite) cannot run.")
    return name


def native_available() -> bool:
    """Check that calls with CPU tensors run compiled kernels."""
    return target() != "torch"


# ------------------------------------------------------------------------------------------------------------- emitting


def const(type_, value, lanes: int | None = None):
    """Return a constant, of a vector with `lanes`."""
    return ir.Constant(type_, value) if lanes is None else ir.Constant(ir.VectorType(type_, lanes), [value] * lanes)


def int64(value: int):
    return ir.Constant(I64, value)


class Emitter:
    """A kernel while it is written: IR builder `b`, arguments as attributes, `body` by subclass.

    Args:
        pointers, integers: names of the words at `arguments`.
    """

    def __init__(self, pointers: str, integers: str):
        function = ir.Function(ir.Module(), ir.FunctionType(VOID, [PTR, I64, I64]), "kernel")
        self.b = ir.IRBuilder(function.append_basic_block())
        arguments, self.begin, self.end = function.args
        types = [PTR] * len(pointers.split()) + [I64] * len(integers.split())
        for i, (name, type_) in enumerate(zip(f"{pointers} {integers}".split(), types)):
            setattr(self, name, self.b.load(self.at(arguments, int64(i), I64), typ=type_))

    def emit(self) -> str:
        """Run `body(i)` over the range of the kernel; returns the IR."""
        self.loop(self.begin, self.end, 1, lambda i, _: self.body(i))
        self.b.ret_void()
        return str(self.b.module)

    def call(self, name: str, result, *args):
        """Call an external function or an intrinsic, declared on first use."""
        function = self.b.module.globals.get(name)
        if function is None:
            function = ir.Function(self.b.module, ir.FunctionType(result, [a.type for a in args]), name)
        return self.b.call(function, args)

    def at(self, pointer, index, type_=None):
        """Address of an element."""
        return self.b.gep(pointer, [index], source_etype=I8 if type_ is None else type_)

    def shuffle(self, p, q, lanes: Sequence[int]):
        return self.b.shuffle_vector(p, q, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))

    def splat(self, value, lanes: int):
        undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
        first = self.b.insert_element(undefined, value, ir.Constant(I32, 0))
        return self.shuffle(first, first, [0] * lanes)

    def loop(self, start, stop, step: int, body: Callable, carry: Sequence = ()):
        """Write a loop; returns the last i and carry.

        for (i = start; i + step <= stop; i += step) carry = body(i, carry)

        A body without carry returns None.
        """
        b = self.b
        before, head, inside, after = b.block, *(b.append_basic_block() for _ in range(3))
        b.branch(head)
        # head: the next i decides
        b.position_at_end(head)
        phis = [b.phi(value.type) for value in (start, *carry)]
        for phi, value in zip(phis, (start, *carry)):
            phi.add_incoming(value, before)
        following = b.add(phis[0], int64(step))
        b.cbranch(b.icmp_signed("<=", following, stop), inside, after)
        # inside: the body, whose result is carried to the head
        b.position_at_end(inside)
        for phi, value in zip(phis, (following, *(body(phis[0], phis[1:]) or ()))):
            phi.add_incoming(value, b.block)
        b.branch(head)
        b.position_at_end(after)
        return phis[0], phis[1:]

    def to_float(self, raw):
        """Float32 of raw bits, int32 or the int16 of bfloat16."""
        lanes = raw.type.count
        # bfloat16 is the upper half of a float32
        if raw.type.element == I16:
            raw = self.b.shl(self.b.zext(raw, ir.VectorType(I32, lanes)), const(I32, 16, lanes))
        return self.b.bitcast(raw, ir.VectorType(F32, lanes))

    def from_float(self, value, bf16: bool):
        """Raw bits of float32 values; bfloat16 rounds half to even, as torch does."""
        b, lanes = self.b, value.type.count
        raw = b.bitcast(value, ir.VectorType(I32, lanes))
        if not bf16:
            return raw
        # add half of the last place, less one where that place is even; NaN stays NaN
        sixteen = const(I32, 16, lanes)
        odd = b.and_(b.lshr(raw, sixteen), const(I32, 1, lanes))
        short = b.lshr(b.add(b.add(raw, const(I32, 0x7FFF, lanes)), odd), sixteen)
        short = b.select(b.fcmp_unordered("uno", value, value), const(I32, 0x7FC0, lanes), short)
        return b.trunc(short, ir.VectorType(I16, lanes))

    def exp(self, x):
        """Float32 exp to 2 units in the last place, of |x| <= 87.

        2^n times a polynomial on |r| <= ln 2 / 2 (Cephes).
        """
        b, n = self.b, x.type.count
        for order, bound in (("<", -87.0), (">", 87.0)):  # a NaN compares false and stays
            x = b.select(b.fcmp_ordered(order, x, const(F32, bound, n)), const(F32, bound, n), x)
        # x = k ln 2 + r, with ln 2 in two parts
        shifted = b.fadd(b.fmul(x, const(F32, 1.4426950408889634, n)), const(F32, ROUND, n))
        k = b.fsub(shifted, const(F32, ROUND, n))
        r = b.fsub(b.fsub(x, b.fmul(k, const(F32, 0.693359375, n))), b.fmul(k, const(F32, -2.12194440e-4, n)))
        # the Taylor series of e^r, then 2^k by its exponent bits
        series = const(F32, 1 / 720, n)
        for factor in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
            series = b.fadd(b.fmul(series, r), const(F32, factor, n))
        exponent = b.shl(b.add(b.bitcast(shifted, ir.VectorType(I32, n)), const(I32, 127, n)), const(I32, 23, n))
        return b.fmul(series, b.bitcast(exponent, x.type))

    def sum_lanes(self, value):
        """Sum of a vector's lanes, by halves while there are any."""
        b, lanes = self.b, value.type.count
        while lanes % 2 == 0:
            lanes //= 2
            value = b.fadd(*(self.shuffle(value, value, range(start, start + lanes)) for start in (0, lanes)))
        total = b.extract_element(value, ir.Constant(I32, 0))
        for i in range(1, lanes):
            total = b.fadd(total, b.extract_element(value, ir.Constant(I32, i)))
        return total


def element(bf16: bool):
    """Type of a stored number's bits."""
    return I16 if bf16 else I32


# --------------------------------------------------------------------------------------------------------- compilation


def machine_of(name: str, triple: str | None = None):
    """Return LLVM's target machine, default: this one."""
    chosen = binding.Target.from_triple(triple or binding.get_process_triple())
    cpu = "x86-64" if arch_of(triple) == "x86_64" else "generic"
    features = ",".join(f"+{f}" for f in TARGETS[name].features)
    return chosen.create_target_machine(cpu=cpu, features=features, opt=2, jit=triple is None)


def optimize(source: str, machine):
    """Parse IR and run LLVM's passes over it."""
    module = binding.parse_assembly(source)
    options = binding.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = False  # vectors are written out
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return module


ENGINES = []  # keeps compiled code alive
# held while kernels, threads and panels are made, so that every thread gets them whole; no process is forked meanwhile
BUILDING = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=BUILDING.acquire, after_in_parent=BUILDING.release, after_in_child=BUILDING.release)


def built_once(function: Callable) -> Callable:
    """Cache what a function makes; threads that ask at the same time get one and the same."""
    made = functools.cache(function)

    @functools.wraps(function)
    def build(*args):
        with BUILDING:
            return made(*args)

    return functools.cache(build)  # made already: no lock


def compile_ir(name: str, source: str) -> Callable[[str], int]:
    """Compile IR for this process; returns a function from a name to its address."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = machine_of(name)
    engine = binding.create_mcjit_compiler(optimize(source, machine), machine)
    engine.finalize_object()
    ENGINES.append(engine)
    return engine.get_function_address
