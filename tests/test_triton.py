"""The GPU kernel, in Triton's interpreter on a CPU: the bits of the torch path, in the modules that use it."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CHECK = """
import itertools, torch
from conftest import tiny_inputs, tiny_model
from microvlm import kernels_microvlm as kernels, triton_microvlm
from test_packing import packed

g = torch.Generator().manual_seed(0)
for bits, M, (rows, columns), dtype in itertools.product(
    (2, 4, 8), (1, 19), ((5, 70), (130, 64)), (torch.float32, torch.bfloat16)
):
    low, high = {2: (-1, 1), 4: (-8, 7), 8: (-128, 127)}[bits]
    codes = torch.randint(low, high + 1, (rows, columns), dtype=torch.int8, generator=g)
    panels, scale = kernels.pack_panels(codes, bits), torch.rand(rows, generator=g) + 0.1
    for bias, residual in ((None, None), (torch.randn(rows, generator=g), torch.randn(M, rows, generator=g).to(dtype))):
        quantized = kernels.quantize_rows(torch.randn(M, columns, generator=g))
        arguments = quantized, panels, scale, bias, rows, columns, bits, dtype, residual
        expected = kernels.low_bit_linear_quantized_reference(*quantized, *arguments[1:])
        x_q, s, _ = quantized
        got = triton_microvlm.low_bit_linear_quantized(x_q, s, panels, scale, bias, bits, dtype, residual)
        if dtype == torch.float32:
            assert torch.equal(got, expected), (bits, M, rows, columns)
        else:  # the interpreter cuts bfloat16 off where a GPU rounds
            torch.testing.assert_close(got, expected, rtol=2**-7, atol=0)
print("kernel")

schemes = {r"model\\.language_model\\.layers\\..*_proj": {"format": "ternary"}}
schemes[r"model\\.language_model\\.embed_tokens"] = {
    "format": "ternary", "group_size": "row", "frequent_rows": 16, "frequent_format": "int4"
}
model, inputs = tiny_model("qwen2"), tiny_inputs()
model = packed(model, schemes)
plain = model(**inputs).logits
calls = []
def on_gpu(*arguments):
    calls.append(arguments[0].shape)
    return triton_microvlm.low_bit_linear_quantized(*arguments)
kernels._gpu, kernels.low_bit_linear_triton = lambda x: True, on_gpu
kernels._native = lambda x: False
model.model.packed_decoder = lambda: None
logits = model(**inputs).logits
assert len(calls) == 2 * 7 + 2, len(calls)
torch.testing.assert_close(logits, plain, rtol=1e-3, atol=1e-3)
print("model")
"""


def test_in_the_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    done = subprocess.run([sys.executable, "-c", CHECK], env=env, capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == ["kernel", "model"], done.stdout + done.stderr[-3000:]


def test_it_compiles_for_a_gpu():
    """As far as is possible without one: Triton's own types and shapes, to the language of the GPU's assembler."""
    code = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from microvlm import triton_microvlm
pointers = {"x_q": "*i8", "s": "*fp32", "panels": "*u8", "scale": "*fp32", "bias": "*fp32", "residual": "*bf16", "y": "*bf16"}
signature = {**pointers, "M": "i32", "R": "i32", "padded": "i32"}
for bits in (2, 4, 8):
    constants = {"BITS": bits, "HAS_BIAS": True, "HAS_RESIDUAL": True, "BLOCK_M": 16, "BLOCK_R": 64, "BLOCK_C": 64}
    source = ASTSource(triton_microvlm._linear, {**signature, **dict.fromkeys(constants, "constexpr")}, constants)
    print("mma" in triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"])
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    code = "import conftest\n" + code
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == ["True"] * 3, done.stdout + done.stderr[-3000:]
