"""`minipeft.kernels.rotary` on a GPU: queries and keys in one call, each number read and written once."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _turn_heads(  # type: ignore[no-untyped-def]
    x, y, first, second, into_first, into_second, x_head, y_head,
    heads: tl.constexpr, half: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """All heads of a token: (a, b) becomes (a * first + b * into_first, b * second + a * into_second).

    Each product is rounded to the dtype of y before they are added.
    """
    head, feature = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (feature < half)
    a = tl.load(x + head * x_head + feature, mask=inside, other=0).to(tl.float32)
    b = tl.load(x + head * x_head + half + feature, mask=inside, other=0).to(tl.float32)
    dtype = y.dtype.element_ty
    own, other = (a * first).to(dtype).to(tl.float32), (b * into_first).to(dtype).to(tl.float32)
    tl.store(y + head * y_head + feature, own + other, mask=inside)
    own, other = (b * second).to(dtype).to(tl.float32), (a * into_second).to(dtype).to(tl.float32)
    tl.store(y + head * y_head + half + feature, own + other, mask=inside)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _turn(  # type: ignore[no-untyped-def]
    q, q_batch, q_head, q_token, k, k_batch, k_head, k_token,
    cos, sin, angle_batch, angle_token, new_q, new_k,
    tokens, q_heads: tl.constexpr, k_heads: tl.constexpr, half: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """One token of one row of the batch a program; in capitals powers of two, as Triton wants them, that hold the numbers."""
    program = tl.program_id(0).to(tl.int64)
    row, token = program // tokens, program % tokens
    feature = tl.arange(0, HALF)[None, :]
    at, inside = row * angle_batch + token * angle_token + feature, feature < half
    first = tl.load(cos + at, mask=inside, other=0).to(tl.float32)
    second = tl.load(cos + at + half, mask=inside, other=0).to(tl.float32)
    into_first = -tl.load(sin + at, mask=inside, other=0).to(tl.float32)
    into_second = tl.load(sin + at + half, mask=inside, other=0).to(tl.float32)
    if BACK:
        into_first, into_second = into_second, into_first
    q += row * q_batch + token * q_token
    k += row * k_batch + token * k_token
    new_q += program * q_heads * half * 2
    new_k += program * k_heads * half * 2
    _turn_heads(q, new_q, first, second, into_first, into_second, q_head, half * 2, q_heads, half, Q_HEADS, HALF)
    _turn_heads(k, new_k, first, second, into_first, into_second, k_head, half * 2, k_heads, half, K_HEADS, HALF)


def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """As `rotary.by_torch`."""
    batch, q_heads, tokens, features = q.shape
    k_heads = k.shape[1]
    new_q, new_k = q.new_empty(batch, tokens, q_heads, features), k.new_empty(batch, tokens, k_heads, features)
    cos, sin = cos.expand(batch, 1, tokens, features), sin.expand(batch, 1, tokens, features)
    q, k, cos, sin = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, cos, sin))
    sin = sin if sin.stride() == cos.stride() else sin.contiguous()
    cos = cos if cos.stride() == sin.stride() else cos.contiguous()
    wide = triton.next_power_of_2
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]  # Triton runs on the current device
        _turn[(batch * tokens,)](
            q, q.stride(0), q.stride(1), q.stride(2), k, k.stride(0), k.stride(1), k.stride(2),
            cos, sin, cos.stride(0), cos.stride(2), new_q, new_k, tokens, q_heads, k_heads, features // 2,
            Q_HEADS=wide(q_heads), K_HEADS=wide(k_heads), HALF=wide(features // 2), BACK=back,
            enable_fp_fusion=False,  # which would not round the products
        )  # fmt: skip
    return new_q.transpose(1, 2), new_k.transpose(1, 2)
