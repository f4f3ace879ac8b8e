"""Products with packed weights on a GPU: the arithmetic and the panels of `kernels_microvlm.py`, as a Triton kernel.

Checked by running the kernel in Triton's interpreter on a CPU (TRITON_INTERPRET=1, `tests/test_triton.py`); it has not been run on a GPU. There a
product and a sum may become one instruction, so the last bit may differ.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def available() -> bool:
    """Whether Triton is installed."""
    return triton is not None


if triton is not None:

    @triton.jit
    def _linear(
        x_q,
        s,
        panels,
        scale,
        bias,
        residual,
        y,
        M,
        R,
        padded,
        BITS: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        FIELDS: tl.constexpr = 8 // BITS
        ZERO: tl.constexpr = 1 if BITS == 2 else 2 ** (BITS - 1)
        m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        r = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        in_panel = (r // 16) * (16 * padded * BITS // 8) + (r % 16) * 4
        total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.int32)
        for start in range(0, padded, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            place = (c // (4 * FIELDS)) * 64 + c % 4
            code = tl.load(panels + in_panel[None, :] + place[:, None], mask=(r < R)[None, :], other=0).to(tl.int32)
            shift = ((c % (4 * FIELDS)) // 4) * BITS
            w = (((code >> shift[:, None]) & (2**BITS - 1)) - ZERO).to(tl.int8)
            x = tl.load(x_q + m[:, None] * padded + c[None, :], mask=(m < M)[:, None], other=0)
            total = tl.dot(x, w, acc=total, out_dtype=tl.int32)
        token_scale = tl.load(s + m, mask=m < M, other=1.0)
        row_scale = tl.load(scale + r, mask=r < R, other=0.0)
        out = total.to(tl.float32) * tl.div_rn(
            tl.broadcast_to(row_scale[None, :], (BLOCK_M, BLOCK_R)),
            tl.broadcast_to(token_scale[:, None], (BLOCK_M, BLOCK_R)),
        )
        if HAS_BIAS:
            out += tl.load(bias + r, mask=r < R, other=0.0)[None, :]
        inside = (m < M)[:, None] & (r < R)[None, :]
        at = m[:, None] * R + r[None, :]
        if HAS_RESIDUAL:
            out += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


def low_bit_linear_quantized(
    x_q: torch.Tensor,
    s: torch.Tensor,
    panels: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    dtype: torch.dtype,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `kernels_microvlm.low_bit_linear_quantized`, which checks its arguments: (M, rows) of `dtype`."""
    (M, padded), R = x_q.shape, len(scale)
    y = torch.empty(M, R, dtype=dtype, device=x_q.device)
    block_m, block_r = 16 if M <= 16 else 64, 64
    grid = triton.cdiv(M, block_m), triton.cdiv(R, block_r)
    given = (s if bias is None else bias), (s if residual is None else residual)  # a pointer that is not read
    _linear[grid](
        *(x_q, s, panels, scale, *given, y, M, R, padded),
        BITS=bits,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        BLOCK_M=block_m,
        BLOCK_R=block_r,
        BLOCK_C=64,
    )
    return y
