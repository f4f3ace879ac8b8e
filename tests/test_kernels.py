"""Low-bit CPU kernels: every target that runs here gives the bits of torch, which integers check."""

import ctypes
import os
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from microvlm.packing_microvlm import (
    FORMATS,
    MAX_COLUMNS,
    ZERO,
    Scheme,
    pack_codes,
    panel_bytes,
    panels_from_bytes,
    unpack_panels,
)
from microvlm.quantization_microvlm import PackedWeight, fake_quantize_activation, matrix_of

from microvlm import (
    codegen_microvlm as codegen,
    kernels_microvlm as kernels,
    llvm_microvlm as llvm,
    threads_microvlm as threads,
)

RANGES = {2: (-1, 1), 4: (-8, 7), 8: (-128, 127)}
RUNNABLE = [name for name in llvm.TARGETS if llvm.runs_here(name)]
needs_native = pytest.mark.skipif(not RUNNABLE, reason="llvmlite is not installed")


@pytest.fixture(params=RUNNABLE)
def native(request, monkeypatch):
    """Calls go to one target, and small ones are shared with the workers too."""
    monkeypatch.setattr(llvm, "target", lambda: request.param)
    monkeypatch.setattr(codegen, "target", lambda: request.param)
    monkeypatch.setattr(kernels, "GRAIN", 2**12)
    return request.param


def random_codes(rows, columns, bits, seed=0):
    low, high = RANGES[bits]
    return torch.randint(
        low, high + 1, (rows, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(seed)
    )


def pack_panels(codes, bits):
    """Lay out signed codes."""
    return pack_codes(codes.view(torch.uint8) + ZERO[bits], bits)  # wraps: -1 is 255


def low_bit_linear_reference(x, matrix, bias=None):
    """A linear layer in torch."""
    quantized = kernels.quantize_reference(x.reshape(-1, x.shape[-1]))
    y = kernels.low_bit_linear_quantized_reference(quantized, matrix, x.dtype, bias)
    return y.view(*x.shape[:-1], matrix.rows)


def matrix_from(codes, bits, scale):
    return kernels.Matrix(pack_panels(codes, bits), scale, *codes.shape, bits)


def random_layer(rows, columns, bits, seed=0):
    """Codes, their matrix and a bias."""
    g = torch.Generator().manual_seed(seed)
    codes = random_codes(rows, columns, bits, seed)
    return codes, matrix_from(codes, bits, torch.rand(rows, generator=g) + 0.1), torch.randn(rows, generator=g)


def run_python(code, **env):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **env}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)


# ------------------------------------------------------------------------------------------------------- packed weights


@pytest.mark.parametrize("bits", RANGES)
def test_panels_round_trip(bits):
    for columns in range(1, 71):
        for rows in range(1, 10):
            codes = random_codes(rows, columns, bits, seed=columns)
            panels = pack_panels(codes, bits)
            assert panels.shape == (panel_bytes(rows, columns, bits),)
            assert torch.equal(unpack_panels(panels, rows, columns, bits), codes), (rows, columns)


def test_panel_layout():
    codes = torch.zeros(5, 65, dtype=torch.int8)
    codes[0, 0], codes[3, 1], codes[1, 64], codes[4, 6] = 1, -1, 1, 1
    panels = pack_panels(codes, 2)  # 8 vectors of 16 rows x 4 bytes
    expected = torch.full((512,), 0b01010101, dtype=torch.uint8)
    expected[0], expected[4 * 3 + 1], expected[4 * 64 + 4] = 0b01010110, 0b01010100, 0b01010110
    expected[4 * 4 + 2] = 0b01011001  # column 6: the second field of the third byte
    assert torch.equal(panels, expected)
    four = pack_panels(codes, 4)  # 16 vectors, 8 columns each
    assert four[0] == 0x89 and four[4 * 3 + 1] == 0x87 and four[8 * 64 + 4] == 0x89 and four[4 * 4 + 2] == 0x98
    eight = pack_panels(codes, 8)
    assert eight[4 * 3 + 1] == 127 and eight[64 + 4 * 4 + 2] == 129 and eight[16 * 64 + 4] == 129


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows,columns", [(1, 1), (3, 64), (16, 70), (17, 203), (4100, 1300)])
def test_panels_from_bytes(rows, columns, format):
    form, g = FORMATS[format], torch.Generator().manual_seed(columns)
    weight = PackedWeight(rows, columns, Scheme(format))
    codes = torch.randint(form.low, form.high + 1, (rows, columns), dtype=torch.int8, generator=g)
    codes = codes.sign() | 1 if format == "binary" else codes
    weight.weight = form.pack(codes)
    assert torch.equal(matrix_of([weight]).panels, pack_panels(codes, form.bits))
    twice = matrix_of([weight, weight])
    assert torch.equal(unpack_panels(twice.panels, 2 * rows, columns, form.bits), codes.repeat(2, 1))


def test_packing_errors():
    with pytest.raises(ValueError, match="columns is 131072; expected 1 to 131071"):
        panel_bytes(1, 2**17, 2)
    with pytest.raises(ValueError, match="a byte of five trits is at most 242, got 243"):
        panels_from_bytes(torch.tensor([[243]], dtype=torch.uint8), 5, FORMATS["ternary"])
    with pytest.raises(ValueError, match=r"6 weights a row take uint8 \(rows, 2\), got torch.uint8 \(1, 1\)"):
        panels_from_bytes(torch.tensor([[0]], dtype=torch.uint8), 6, FORMATS["ternary"])


# ------------------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("bits", RANGES)
def test_reference_equals_integers(bits):
    rows, columns = 21, 2500  # for 8 bits more columns than one exact float32 product
    codes, matrix, bias = random_layer(rows, columns, bits)
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
    x_q, s, sums = kernels.quantize_reference(x)
    q = np.clip(np.round(x.numpy() * s.numpy()[:, None]), -128, 127).astype(np.int64)
    assert np.array_equal(x_q[:, :columns].numpy(), q) and not x_q[:, columns:].any()
    assert np.array_equal(sums.numpy(), q.sum(1))
    sums = q @ codes.numpy().astype(np.int64).T
    expected = sums * matrix.scale.double().numpy() / s.double().numpy()[:, None] + bias.double().numpy()
    y = low_bit_linear_reference(x, matrix, bias)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-5, atol=1e-4)


def test_rounding_is_that_of_training():
    x = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    x_q, s, _ = kernels.quantize(x)
    assert torch.equal(x_q[:, :100].float() / s[:, None], fake_quantize_activation(x, 8))


@pytest.mark.parametrize("bits", RANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_equals_torch(native, bits, dtype):
    shapes = [(M, 5 + 7 * M, 40 * M + M) for M in range(1, 10)] + [
        (1, 8, 64),
        (4, 4, 128),
        (2, 3, 5000),
        (1, 1, 1),
        (0, 4, 64),
    ]
    for M, rows, columns in shapes:
        _, matrix, bias = random_layer(rows, columns, bits, seed=M)
        g = torch.Generator().manual_seed(M)
        x = (torch.randn(M, columns, generator=g) * 3).to(dtype)
        residual = torch.randn(M, rows, generator=g).to(dtype)
        quantized = kernels.quantize(x)
        for got, expected in zip(quantized, kernels.quantize_reference(x)):
            assert got.dtype == expected.dtype and torch.equal(got, expected), (M, columns)
        for b in (bias, None):
            y = kernels.low_bit_linear(x, matrix, b)
            assert y.dtype == dtype
            assert torch.equal(y, low_bit_linear_reference(x, matrix, b)), (M, rows, columns)
        arguments = quantized, matrix, dtype, bias, residual
        y = kernels.low_bit_linear_quantized(*arguments)
        assert torch.equal(y, kernels.low_bit_linear_quantized_reference(*arguments))


@pytest.mark.parametrize("bits", RANGES)
@pytest.mark.parametrize("columns", [64, 4864, MAX_COLUMNS])
def test_extremes(native, bits, columns):
    low, high = RANGES[bits]
    codes = torch.tensor([low, high, 0, 1, -1], dtype=torch.int8).view(5, 1).expand(5, columns)
    matrix = matrix_from(codes.contiguous(), bits, torch.ones(5))
    x = torch.tensor([1.0, -1.0, 0.0]).view(3, 1).expand(3, columns) * 3e30
    arguments = kernels.quantize(x), matrix, torch.float32
    y = kernels.low_bit_linear_quantized(*arguments)
    assert torch.equal(y, kernels.low_bit_linear_quantized_reference(*arguments))
    assert torch.equal(
        kernels.quantize(x)[0][:, :columns].unique(dim=1), torch.tensor([[127], [-127], [0]], dtype=torch.int8)
    )
    s = kernels.quantize(x)[1].double()[:, None]
    expected = torch.tensor([127.0, -127.0, 0.0], dtype=torch.float64)[:, None] * columns * codes[:, 0].double() / s
    assert torch.allclose(y.double(), expected, rtol=1e-6, atol=0)
    x_q = torch.full((1, columns), -128, dtype=torch.int8)  # no float gives it, and the sums still hold
    x_q, sums = F.pad(x_q, (0, -columns % 64)), torch.tensor([-128 * columns], dtype=torch.int32)
    y = kernels.low_bit_linear_quantized(kernels.Quantized(x_q, torch.ones(1), sums), matrix, torch.float32)
    assert torch.equal(y[0], (codes[:, 0].int() * -128 * columns).float())


def test_bfloat16_rounds_ties_to_even(native):
    matrix = matrix_from(torch.ones(4, 3, dtype=torch.int8), 2, torch.ones(4))
    x_q = torch.tensor(
        [[127, 127, 3 + 2 * i] for i in range(8)], dtype=torch.int8
    )  # sums 257, 259, ...: between two bfloat16
    sums = x_q.sum(1, dtype=torch.int32)
    x_q = F.pad(x_q, (0, 61))
    y = kernels.low_bit_linear_quantized(kernels.Quantized(x_q, torch.ones(8), sums), matrix, torch.bfloat16)
    assert torch.equal(y[:, 0].float(), torch.tensor([256.0, 260, 260, 264, 264, 268, 268, 272]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_stays_not_finite(native, dtype, bad):
    _, matrix, bias = random_layer(6, 70, 2)
    x = torch.randn(6, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1, 3] = x[4, 69] = bad
    y = kernels.low_bit_linear(x, matrix, bias)
    reference = low_bit_linear_reference(x, matrix, bias)
    assert y.isnan().all(dim=1).tolist() == [False, True, False, False, True, False]
    assert torch.equal(y.isnan(), reference.isnan()) and torch.equal(y[~y.isnan()], reference[~y.isnan()])
    assert torch.equal(kernels.quantize(x)[0], kernels.quantize_reference(x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M,columns", [(1, 64), (3, 37), (5, 896)])
def test_fused_helpers(native, dtype, M, columns):
    g = torch.Generator().manual_seed(columns)
    x, weight = (torch.randn(M, columns, generator=g) * 4).to(dtype), torch.rand(columns, generator=g) + 0.5
    gate_up = (torch.randn(M, 2 * columns, generator=g) * 8).to(dtype)
    gate_up[0, :3] = torch.tensor([-200.0, 200.0, -90.0])
    for got, expected in [
        (kernels.quantize(*arguments), kernels.quantize_reference(*arguments))
        for arguments in ((x, weight, 1e-6), (gate_up, None, 0.0, True), (gate_up, weight, 1e-6, True))
    ]:
        assert torch.allclose(got[1], expected[1], rtol=1e-5, atol=0)
        difference = (got[0].int() - expected[0].int()).abs()
        assert difference.max() <= 1 and difference.float().mean() < 0.01
        assert torch.equal(got[0].sum(1, dtype=torch.int32), got[2])


def test_leading_dimensions_and_strides(native):
    codes, matrix, _ = random_layer(7, 66, 4)
    x = torch.randn(2, 66, 3, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    y = kernels.low_bit_linear(x, matrix)
    assert y.shape == (2, 3, 7)
    w = codes.float() * matrix.scale[:, None]
    assert torch.allclose(y, F.linear(fake_quantize_activation(x, 8), w), rtol=1e-4, atol=1e-3)


def test_argument_errors():
    codes, matrix, _ = random_layer(6, 70, 2)
    x = torch.randn(2, 70)
    quantized = kernels.quantize(x)
    scale = r"scale is torch.float32 \(5,\) on cpu; expected contiguous torch.float32 \(6,\) on cpu"
    with pytest.raises(ValueError, match=scale):
        matrix_from(codes, 2, matrix.scale[:5])
    with pytest.raises(
        ValueError, match=r"panels is torch.uint8 \(1024,\) on cpu; expected contiguous torch.uint8 \(512,\)"
    ):
        kernels.Matrix(pack_panels(codes, 4), matrix.scale, 6, 70, 2)
    with pytest.raises(ValueError, match=r"bias is torch.float64 \(6,\)"):
        kernels.low_bit_linear(x, matrix, matrix.scale.double())
    part = matrix, torch.arange(6)
    for width in (64, 69, 71):  # all but the first are padded to 128 columns, as 70 are
        wrong = torch.zeros(2, width)
        for call, argument in ((kernels.low_bit_linear, matrix), (kernels.low_bit_linear_mixed, [part])):
            with pytest.raises(ValueError, match=rf"x is torch.float32 \(2, {width}\); expected 70 columns"):
                call(wrong, argument)
    with pytest.raises(ValueError, match=r"x is torch.float16 \(2, 70\); expected float32 or bfloat16"):
        kernels.quantize(x.half())
    with pytest.raises(ValueError, match="dtype is torch.float16; expected"):
        kernels.low_bit_linear_quantized(quantized, matrix, torch.float16)
    residual = r"residual is torch.float32 \(2, 6\) on cpu; expected contiguous torch.bfloat16"
    with pytest.raises(ValueError, match=residual):
        kernels.low_bit_linear_quantized(quantized, matrix, torch.bfloat16, residual=torch.zeros(2, 6))
    with pytest.raises(ValueError, match="x has 3 columns; expected an even number"):
        kernels.quantize(torch.zeros(1, 3), gated=True)
    with pytest.raises(ValueError, match=r"weight is torch.float32 \(69,\)"):
        kernels.quantize(x, torch.ones(69), 1e-6)


def test_choice_of_target(monkeypatch):
    choose = llvm.target.__wrapped__
    monkeypatch.setenv("MICROVLM_KERNELS", "torch")
    assert choose() == "torch"
    monkeypatch.setenv("MICROVLM_KERNELS", "sse9")
    with pytest.raises(ValueError, match="MICROVLM_KERNELS is 'sse9'; expected one of auto, torch, avx512-vnni"):
        choose()
    monkeypatch.setattr(llvm, "runs_here", lambda name: name == "generic")
    monkeypatch.setenv("MICROVLM_KERNELS", "avx2")
    with pytest.raises(RuntimeError, match="'avx2', which this CPU"):
        choose()
    monkeypatch.setenv("MICROVLM_KERNELS", "auto")
    assert choose() == "generic"
    monkeypatch.setattr(llvm, "runs_here", lambda name: False)
    assert choose() == "torch"


@needs_native
@pytest.mark.parametrize("bits", RANGES)
def test_lowers_to_the_dot_product_of_arm(bits):
    llvm.binding.initialize_all_targets()
    llvm.binding.initialize_all_asmprinters()
    for name, instruction in [("neon-dotprod", r"sdot"), ("generic", r"s?m(ul|la|lal|ull)2?")]:
        machine = llvm.machine_of(name, "aarch64-linux-gnu")
        text = machine.emit_assembly(llvm.optimize(codegen.emit(name, "linear", bits, True), machine))
        assert re.search(rf"\t{instruction}\tv", text)
    assert "fmadd" not in text and "fmla" not in text
    assert "\tfcvtn" not in text  # bfloat16 rounds in integers


# -------------------------------------------------------------------------------------------------------------- threads


@pytest.fixture
def two_threads(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@needs_native
def test_many_callers(two_threads, native):
    layers = [random_layer(300 + 8 * i, 130, bits, seed=i)[1:] for i, bits in enumerate([2, 4, 8, 2])]
    inputs = [torch.randn(1 + i, 130) for i in range(4)]
    expected = [low_bit_linear_reference(x, *layer) for x, layer in zip(inputs, layers)]
    wrong = []

    def call(i):
        for _ in range(50):
            if not torch.equal(kernels.low_bit_linear(inputs[i], *layers[i]), expected[i]):
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@needs_native
def test_workers_share_and_wake(two_threads):
    seen = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    def kernel(_, begin, end):
        seen.append((begin, end, threading.get_ident()))
        time.sleep(0.05)

    for idle in (0.0, 0.3):  # the workers still spin, the workers sleep
        time.sleep(idle)
        seen.clear()
        threads.run(ctypes.cast(kernel, ctypes.c_void_p).value, b"", 29, 3)
        assert sorted(part[:2] for part in seen) == [(i, min(i + 3, 29)) for i in range(0, 29, 3)]
        assert len({part[2] for part in seen}) == 2


POOL_USER = """
import os, sys, time, torch, conftest
from microvlm import kernels_microvlm as k, threads_microvlm as threads
from microvlm.packing_microvlm import pack_codes
torch.set_num_threads(2)
k.GRAIN = 2**12
codes = torch.randint(0, 3, (512, 128), dtype=torch.uint8)
matrix = k.Matrix(pack_codes(codes, 2), torch.ones(512), 512, 128, 2)
x = torch.randn(1, 128)
expected = k.low_bit_linear_quantized_reference(k.quantize_reference(x), matrix, x.dtype)
def check():
    assert all(torch.equal(k.low_bit_linear(x, matrix), expected) for _ in range(20))
check()
assert threads.pool is not None and all(thread.is_alive() for thread in threads.pool.threads)
"""


@needs_native
def test_works_after_fork_and_exits():
    code = """
child = os.fork()
check()
assert threads.pool is not None and all(thread.is_alive() for thread in threads.pool.threads)
if child:
    assert os.waitpid(child, 0)[1] == 0
print("done", time.time())
"""
    result = run_python(POOL_USER + code)
    assert result.returncode == 0, result.stderr
    last = max(float(line.split()[1]) for line in result.stdout.splitlines())
    assert result.stdout.count("done") == 2 and time.time() - last < 20  # a hang would last until the timeout


@needs_native
def test_one_thread_makes_no_workers():
    code = POOL_USER.rsplit("check()\nassert", 1)[0].replace("set_num_threads(2)", "set_num_threads(1)")
    result = run_python(code + "check()\nassert threads.pool is None")
    assert result.returncode == 0, result.stderr


@needs_native
def test_idle_workers_sleep():
    code = """
time.sleep(0.2)
before = time.process_time()
time.sleep(0.5)
assert time.process_time() - before < 0.05
check()
threads.stop_pool()
check()
"""
    result = run_python(POOL_USER + code)
    assert result.returncode == 0, result.stderr


# ------------------------------------------------------------------------------------------------------------- programs


@needs_native
def test_a_program_is_its_steps(native):
    _, matrix, bias = random_layer(128, 64, 2)
    _, down, _ = random_layer(64, 64, 4, seed=1)
    weight, x = torch.rand(64) + 0.5, torch.zeros(1, 64)
    program = kernels.Program()
    gate_up = program.linear(program.quantize(x, weight, 1e-6), matrix, bias)
    y = program.linear(program.quantize(gate_up, gated=True), down, residual=x)
    plain, squared = program.quantize(x), program.quantize(gate_up, weight, 1e-5, gated=True)
    for seed in range(3):
        x.copy_(torch.randn(1, 64, generator=torch.Generator().manual_seed(seed)))
        program()
        first = kernels.quantize(x, weight, 1e-6)
        expected = kernels.low_bit_linear_quantized(first, matrix, torch.float32, bias)
        assert torch.equal(gate_up, expected)
        quantized = kernels.quantize(expected, gated=True)
        expected = kernels.low_bit_linear_quantized(quantized, down, torch.float32, residual=x)
        assert torch.equal(y, expected)
        assert all(map(torch.equal, plain, kernels.quantize(x)))
        assert all(map(torch.equal, squared, kernels.quantize(gate_up, weight, 1e-5, gated=True)))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads,kv_heads,head_dim", [(14, 2, 64), (3, 3, 6), (20, 5, 128), (4, 1, 80)])
@pytest.mark.parametrize("items", [0, 4])
def test_attention_of_new_tokens(native, two_threads, dtype, heads, kv_heads, head_dim, items):
    g = torch.Generator().manual_seed(items)
    capacity, half = 40, head_dim // 2
    turn = torch.zeros(1, head_dim)
    length = torch.zeros((), dtype=torch.int64)
    kept = [torch.full((1, kv_heads, capacity, head_dim), float("nan"), dtype=dtype) for _ in range(2)]
    memory = [torch.randn(1, kv_heads, items, head_dim, generator=g).to(dtype) for _ in range(2)]
    gate, scaling = -0.7, head_dim**-0.5
    arguments = heads, kv_heads, head_dim, scaling, dtype
    program, attention = kernels.Program(), kernels.Attention(*arguments)
    qkv = torch.zeros(1, (heads + 2 * kv_heads) * head_dim)
    step = attention.tokens(qkv, turn, length)
    program.attention(attention)
    keys, values = (torch.zeros(kv_heads, 0, head_dim, dtype=torch.float64) for _ in range(2))
    for T in (7, 1, 1, 20, 1):  # several tokens directly, one by the program
        past = keys.shape[1]
        states = torch.randn(T, heads + 2 * kv_heads, head_dim, generator=g)
        angles = torch.arange(past, past + T)[:, None] * 0.3 ** torch.arange(half).double()
        turns = torch.cat([angles.cos(), angles.sin()], -1).float()
        length.fill_(past)
        if T == 1:
            qkv.copy_(states.view(1, -1)), turn.copy_(turns)
            attention.bind(*kept, tuple(memory) if items else None, gate)
            program()
            out = step
        else:
            several = kernels.Attention(*arguments)
            out = several.tokens(states.flatten(1).clone(), turns, length)
            several.bind(*kept, tuple(memory) if items else None, gate)
            several()

        states, (cos, sin) = states.double().transpose(0, 1), turns.double().split(half, -1)
        first, second = states[: heads + kv_heads].split(half, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(dtype).double()
        keys = torch.cat([keys, turned[heads:]], 1)
        values = torch.cat([values, states[heads + kv_heads :].to(dtype).double()], 1)
        every = [torch.cat([t, m[0].double()], 1) for t, m in zip((keys, values), memory)]
        repeated = [t.repeat_interleave(heads // kv_heads, 0) for t in every]
        scores = turned[:heads] @ repeated[0].mT * scaling
        scores[:, :, past + T :] += gate
        scores[:, :, : past + T] += torch.full((T, past + T), -torch.inf).triu(past + 1)
        expected = (scores.softmax(-1) @ repeated[1]).transpose(0, 1).flatten(1)
        # a key on the edge between two bfloat16 numbers may fall on the other side
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    tokens = keys.shape[1]
    torch.testing.assert_close(kept[0][0, :, :tokens].double(), keys, rtol=1e-2, atol=1e-5)
    assert torch.equal(kept[1][0, :, :tokens].double(), values)
    assert kept[0][0, :, tokens:].isnan().all()  # nothing was written beyond


@needs_native
def test_attention_is_given_what_it_expects():
    attention = kernels.Attention(2, 1, 8, 1.0, torch.float32)
    length, keys = torch.zeros((), dtype=torch.int64), torch.zeros(1, 1, 4, 8)
    with pytest.raises(
        ValueError, match=r"qkv is torch.float32 \(3, 24\) on cpu; expected contiguous torch.float32 \(3, 32\)"
    ):
        attention.tokens(torch.zeros(3, 24), torch.zeros(3, 8), length)
    with pytest.raises(
        ValueError, match=r"turns is torch.float32 \(1, 8\) on cpu; expected contiguous torch.float32 \(3, 8\)"
    ):
        attention.tokens(torch.zeros(3, 32), torch.zeros(1, 8), length)
    attention.tokens(torch.zeros(3, 32), torch.zeros(3, 8), length)
    with pytest.raises(
        ValueError, match=r"keys or values is torch.bfloat16 \(1, 1, 4, 8\) on cpu; expected contiguous"
    ):
        attention.bind(keys, keys.bfloat16())
    with pytest.raises(ValueError, match=r"keys or values is torch.float32 \(1, 1, 4, 8\) on cpu; expected contiguous"):
        attention.bind(keys, torch.zeros(1, 1, 8, 8)[:, :, ::2])
    with pytest.raises(ValueError, match=r"keys or values is torch.float32 \(1, 1, 5, 8\) on cpu; expected contiguous"):
        attention.bind(keys, torch.zeros(1, 1, 5, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 6])
def test_rows_of_several_widths(native, dtype, tokens):
    rows, columns = 203, 70
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    parts, whole = [], torch.zeros(rows, columns)
    for places, bits in zip(order.split([50, 150, 3]), (4, 2, 8)):
        codes, matrix, _ = random_layer(len(places), columns, bits, seed=bits)
        parts.append((matrix, places))
        whole[places] = codes.float() * matrix.scale[:, None]
    x = torch.randn(2, tokens, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = kernels.low_bit_linear_mixed(x, parts)
    for matrix, places in parts:
        assert torch.equal(y[..., places], low_bit_linear_reference(x, matrix))
    expected = F.linear(fake_quantize_activation(x.float(), 8), whole)
    torch.testing.assert_close(y.float(), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-1)


@needs_native
def test_kernel_threads_are_torchs_meanwhile():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(KeyError), threads.kernel_threads():
            assert torch.get_num_threads() == 1 and threads.helper_count() == 2
            with threads.kernel_threads():  # nested
                assert threads.helper_count() == 2
            assert threads.helper_count() == 2
            raise KeyError
        assert torch.get_num_threads() == 3 and threads.helper_count() == 2
    finally:
        torch.set_num_threads(before)
