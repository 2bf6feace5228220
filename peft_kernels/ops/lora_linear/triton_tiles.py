"""What the Triton kernels of lora_linear share: h and ds stored as 16-bit parts, sums of partials in a fixed order, and
the table of tile sizes.

Tiles depend on shape, dtype and architecture only, never on a measurement at run time, so results are repeatable and
nothing is timed at import.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from peft_kernels.ops.common.triton_products import rank_block, rest_of

MOST_ADAPTERS = 8  # of one launch: a kernel has code for each, and 33 compile for minutes


class Tile(NamedTuple):
    """Rows, columns and contraction of one program's tile, and how it is run."""

    M: int
    N: int
    K: int
    num_warps: int
    num_stages: int


@triton.jit
def store_parts(value, parts_ptrs, stride_part, mask, PARTS: tl.constexpr):
    """Stores value as PARTS numbers of a narrower dtype, stride_part apart; nothing for PARTS = 0."""
    rest = value
    for i in tl.static_range(PARTS):
        part = rest.to(parts_ptrs.dtype.element_ty)
        tl.store(parts_ptrs + tl.cast(stride_part, tl.int64) * i, part, mask=mask)
        rest = rest_of(rest, part)


@triton.jit(do_not_specialize=["count", "splits"])
def _sum_partials_kernel(
    out_ptr, parts_ptr, partial_ptr, count, splits, columns, stride_partial, stride_out, stride_part,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i] = partial[0, i] + partial[1, i] + ..., always in that order."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    total = tl.load(partial_ptr + offs, mask=mask, other=0.0)
    for split in range(1, splits):
        total += tl.load(partial_ptr + offs + tl.cast(split, tl.int64) * stride_partial, mask=mask, other=0.0)
    where = offs // columns * stride_out + offs % columns
    tl.store(out_ptr + where, total.to(out_ptr.dtype.element_ty), mask=mask)
    if PARTS > 0:
        store_parts(total, parts_ptr + where, stride_part, mask, PARTS)


def sum_partials(out: Tensor, partial: Tensor, parts: Tensor | None = None) -> None:
    """out [rows, columns] = the sum of partial [splits, rows, columns] over the splits; out as parts [P, ...] too.

    out and parts have unit inner stride and the same distance between rows; each plane of partial is contiguous.
    """
    splits, rows, columns = partial.shape
    count = rows * columns
    _sum_partials_kernel[(triton.cdiv(count, 256),)](
        out, parts, partial, count, splits, columns, partial.stride(0), out.stride(0),
        0 if parts is None else parts.stride(0),
        PARTS=0 if parts is None else parts.shape[0], BLOCK=256, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def architecture(tensor: Tensor) -> int:
    """Compute capability of the current device, 90 for Hopper; a CPU tensor (interpreted kernels) counts as 80."""
    return 80 if tensor.is_cpu else driver.active.get_current_target().arch


def has_large_shared_memory(arch: int) -> bool:
    """227 KiB a block; kernels for the rest must do with 99 KiB, which all of sm_80 and later have."""
    return arch in (90, 100, 103)


def has_tensor_memory(arch: int) -> bool:
    """Accumulators lie in tensor memory, 512 columns. Triton 3.6 takes BLOCK_N of them for each product of a chain, and
    compiles a kernel that wants more to a trap."""
    return arch in (100, 103)


def gemm_tile(arch: int, dtype: torch.dtype, M: int, N: int, accumulators: int) -> Tile:
    """The tile of the large product; `accumulators` is how many it must hold at once."""
    if dtype is torch.float64:
        return Tile(32, 32, 16, 4, 2)
    if dtype is torch.float32:
        return Tile(16, 32, 32, 4, 2) if M <= 16 else Tile(64, 64, 16, 4, 2)
    if M <= 16:
        return Tile(16, 32, 64 if accumulators > 1 else 128, 4, 4)  # two and 128 columns spill on sm_80
    if M <= 64 or N <= 64:
        return Tile(64, 64, 64, 4, 3)
    if not has_large_shared_memory(arch):
        return Tile(64 if accumulators > 1 else 128, 128, 32, 8, 4)
    if M <= 512 or N <= 1024 or accumulators > 1:
        return Tile(128, 128, 64, 8, 4)
    return Tile(128, 256, 64, 8, 3)


def low_rank_tile(dtype: torch.dtype, M: int, N: int) -> Tile:
    """The same without a base: what it takes is the traffic of out, and of a residual that stands in registers too."""
    if dtype.itemsize > 2:
        return Tile(16 if M <= 16 else 32, 32, 16, 4, 2)
    return Tile(16 if M <= 16 else 64, 64, 64, 4, 3)


def shrink_tile(dtype: torch.dtype, M: int, R: int, dropout: bool) -> Tile:
    """h = x A^T. 32 rows at most: mma.sync takes x, masked in registers, from there, which wgmma must not (README)."""
    if dtype is torch.float64:
        return Tile(32, min(rank_block(R), 32), 32, 8, 2)  # four warps spill under Triton 3.6
    if dtype is torch.float32:
        return Tile(32, min(rank_block(R), 32), 32, 4, 3)
    columns = {16: 64 if dropout else 128, 32: 64, 64: 32}[rank_block(R)]  # twice as many spill
    return Tile(16 if M <= 16 else 32, rank_block(R), columns, 4, 3)


def factor_tile(arch: int, dtype: torch.dtype, R: int, N: int) -> Tile:
    """ds = dy B and dB = dy^T h: (rows, columns of dy, rank). Columns that are no vectors need more registers."""
    if dtype.itemsize > 2:
        return Tile(32, 32, min(rank_block(R), 32), 4, 2)
    if dtype is torch.float16:
        return Tile(32, 128, min(rank_block(R), 32), 8, 3)  # parts of dy: more rows spill, or four warps
    if N % 16 != 0:
        return Tile(32, 128, min(rank_block(R), 32), 4, 3)
    wide = has_large_shared_memory(arch) and R <= 32
    return Tile(64, 256 if wide else 128, min(rank_block(R), 32), 8 if wide else 4, 3)


def input_tile(dtype: torch.dtype, R: int) -> Tile:
    """dA = ds^T drop(x): (rows of x, rank, columns of x)."""
    if dtype.itemsize > 2:
        return Tile(32, min(rank_block(R), 32), 32, 4, 2)
    rows = 32 if dtype is torch.float16 else 64  # parts of x: more rows spill
    return Tile(rows, min(rank_block(R), 32), 128, 4, 3)
