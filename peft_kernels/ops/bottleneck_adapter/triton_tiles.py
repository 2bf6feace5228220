"""What the Triton kernels of bottleneck_adapter share: the norm's statistics, numbers in double precision, how operands
are cut into parts, and the table of tile sizes.

Products: operands of one 16-bit type go in as they are; fp32 ones (n(x), u, dh, s B, fp32 factors) beside 16-bit ones
are cut into bf16 numbers, which reach as far as fp32: 2 parts where the result is rounded to 16 bits, 3 where it stays
fp32. Left operands are computed in registers, so no tile has more than 32 rows: mma.sync takes them from there, which a
pipelined wgmma must not (triton issue 9433). Tiles depend on shapes and dtypes only.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.ops.common.triton_dropout import keep_tile
from peft_kernels.ops.common.triton_products import OPTIONS, TYPES, accumulator, as_number, number


class Tile(NamedTuple):
    """Rows, bottlenecks and columns of one program's tile, and how it is run."""

    M: int
    E: int
    W: int
    num_warps: int
    num_stages: int


def tile(x: torch.dtype, M: int, E: int, W: int) -> Tile:
    """For products of rows of W columns of x or y with a factor. The mask is drawn for 32 bottlenecks at a time."""
    rows = 16 if M <= 16 else 32
    if x.itemsize > 2:
        return Tile(rows, 32, 32, _wide_warps(x, W), 2 if x.itemsize > 4 else 3)
    return Tile(rows, 64 if E > 32 else 32, 64 if E <= 32 and _aligned(W) else 32, 4, 3)


def up_tile(x: torch.dtype, factor: torch.dtype, M: int, E: int, W: int) -> Tile:
    """For products whose contraction is the bottleneck, and whose results are rows of W columns."""
    few = tile(x, M, E, W)
    if x.itemsize > 2:
        return few._replace(num_warps=8 if E > 32 else few.num_warps)  # expand makes f(h) again for each E
    longest = 64 if factor is torch.bfloat16 else 32  # fp16 beside fp32 goes in as two parts
    large = M > 16 and longest >= E and factor.itemsize == 2 and _aligned(W)  # what else is as large spills
    return few._replace(E=64 if 32 < E <= 64 else 32, W=128 if large else 64)


def gradient_tile(x: torch.dtype, factor: torch.dtype, W: int) -> Tile:
    """For sums over the rows."""
    if x.itemsize > 2:
        return Tile(32, 32, 32, _wide_warps(x, W), 2)
    return Tile(32, 32, 128 if factor.itemsize == 2 and _aligned(W) else 64, 4, 3)


def _aligned(W: int) -> bool:
    """Rows can be read 16 bytes at a time; if not, each element has an address of its own, in registers."""
    return W % 8 == 0


def _wide_warps(x: torch.dtype, W: int) -> int:
    """Warps of an fp32 or fp64 tile, which multiplies out of registers: four spill, but for aligned fp32."""
    return 4 if x.itemsize == 4 and _aligned(W) else 8


def product_type(x: torch.dtype, *others: torch.dtype) -> torch.dtype:
    """What the operands of a product go in as: x's own type unless another one is wider."""
    if x.itemsize > 2 or all(dtype is x for dtype in others):
        return x
    return torch.bfloat16


def parts(product: torch.dtype, operand: torch.dtype, limit: int) -> int:
    """How many numbers of the product's type an operand goes in as."""
    if product.itemsize > 2 or operand is product:
        return 1
    return min(limit, 2 if operand.itemsize == 2 else 3)


def cut(x: torch.dtype, left: torch.dtype, right: torch.dtype, limit: int) -> dict:
    """The constants of a product_of_splits; x says which precision all is for."""
    product = product_type(x, left, right)
    return {
        "PRODUCT": TYPES[product],
        "LEFT": parts(product, left, limit),
        "RIGHT": parts(product, right, limit),
        "LIMIT": limit,
    }


def vector(tensor: Tensor | None) -> Tensor | None:
    """A bias, scale, gate or norm's weight in one dimension, contiguous."""
    return None if tensor is None else tensor.reshape(-1).contiguous()


@triton.jit(do_not_specialize=["M", "eps"])
def _statistics_kernel(
    stats_ptr, x_ptr, M, K, eps, stride_xm,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ACCUMULATOR: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """stats[0, m] = the mean of row m, 0 unless CENTRED; stats[1, m] = 1 / sqrt(mean of (x - mean)^2 + eps)."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + tl.arange(0, BLOCK_K)[None, :]
    mean = tl.zeros((BLOCK_M,), ACCUMULATOR)
    if CENTRED:
        total = tl.zeros((BLOCK_M, BLOCK_K), ACCUMULATOR)
        for k in range(0, K, BLOCK_K):
            mask = mask_m[:, None] & (k + tl.arange(0, BLOCK_K) < K)[None, :]
            total += tl.load(x_ptrs + k, mask=mask, other=0.0).to(ACCUMULATOR)
        mean = tl.sum(total, 1) / tl.cast(K, ACCUMULATOR)
    squares = tl.zeros((BLOCK_M, BLOCK_K), ACCUMULATOR)
    for k in range(0, K, BLOCK_K):
        mask = mask_m[:, None] & (k + tl.arange(0, BLOCK_K) < K)[None, :]
        x = tl.load(x_ptrs + k, mask=mask, other=0.0).to(ACCUMULATOR)
        centred = tl.where(mask, x - mean[:, None], 0.0)
        squares += centred * centred
    variance = tl.sum(squares, 1) / tl.cast(K, ACCUMULATOR)
    tl.store(stats_ptr + offs_m, mean, mask=mask_m)
    reciprocal = 1.0 / tl.sqrt(variance + as_number(eps, ACCUMULATOR))
    tl.store(stats_ptr + M + offs_m, reciprocal, mask=mask_m)


def statistics(x: Tensor, norm: str, eps: float) -> Tensor | None:
    """[2, M]: mean and reciprocal deviation of each row, for the kernels' `normed`; None without a norm."""
    if norm == "none":
        return None
    (M, K), dtype = x.shape, accumulator(x.dtype)
    stats = x.new_empty((2, M), dtype=dtype)
    _statistics_kernel[(triton.cdiv(M, 4),)](
        stats, x, M, K, number(eps, dtype), x.stride(0),
        BLOCK_M=4, BLOCK_K=512, ACCUMULATOR=TYPES[dtype], CENTRED=norm == "layer_norm", num_warps=4, **OPTIONS,
    )  # fmt: skip
    return stats


@triton.jit
def normed(x, mean, reciprocal, DTYPE: tl.constexpr):
    """(x - mean) / deviation for a tile of rows, before the norm's weight and bias."""
    return (x.to(DTYPE) - mean[:, None]) * reciprocal[:, None]


@triton.jit
def kept(value, seed_ptr, start_m, start_n, keep_below, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """drop(value) for a tile of the mask."""
    keep = keep_tile(seed_ptr, start_m, start_n, 0, keep_below, BLOCK_M, BLOCK_N)
    return tl.where(keep, value * (65536.0 / tl.cast(keep_below, value.dtype)), 0.0)
