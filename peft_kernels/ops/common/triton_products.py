"""The product of two tiles in Triton, fp32 numbers in it as 16-bit parts, and what its launchers share.

An fp32 number v next to 16-bit activations becomes v = v0 + v1 (+ v2), each a 16-bit number, so that products run on
tensor cores and lose nothing that shows: two parts where the result is rounded to 16 bits; three of bf16 (24 bits) or
two of fp16 (22 bits) where it stays fp32.
h and ds reach as far as fp32 does, the largest fp16 is 65504: they go in as bf16, and so does fp16 that meets them.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
OPTIONS = {"maxnreg": 255, "enable_fp_fusion": True}  # of a launch: left alone, ptxas spills to use fewer registers
PROGRAMS = 264  # what split work aims at: two programs for each of an H200's 132 processors


@triton.jit
def as_number(value, DTYPE: tl.constexpr):
    """What `number` was given."""
    if tl.float64 == DTYPE:
        return tl.cast(value, tl.int64).to(tl.float64, bitcast=True)
    else:
        return value


@triton.jit
def product(a, b, accumulator):
    """accumulator + a b; fp32 products are exact, not tf32."""
    return tl.dot(a, b, accumulator, input_precision="ieee", out_dtype=accumulator.dtype)


@triton.jit
def rest_of(value, part):
    """value - part, the part being narrower; 0 beside an infinity or NaN, which is in the part whole."""
    part = part.to(value.dtype)
    return tl.where(tl.abs(part) < float("inf"), value - part, 0.0)


@triton.jit
def product_of_parts(a, b, accumulator, PARTS: tl.constexpr):
    """accumulator + a b, where b is wider than a and goes in as PARTS numbers of a's dtype (1: as it is)."""
    part = b.to(a.dtype)
    accumulator = product(a, part, accumulator)
    rest = b.to(accumulator.dtype)
    for _ in tl.static_range(PARTS - 1):
        rest = rest_of(rest, part)
        part = rest.to(a.dtype)
        accumulator = product(a, part, accumulator)
    return accumulator


@triton.jit
def product_of_splits(
    a, b, accumulator, PRODUCT: tl.constexpr, A_PARTS: tl.constexpr, B_PARTS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """accumulator + a b, each cut into numbers of type PRODUCT; part i of a meets part j of b where i + j < LIMIT."""
    rest_a = a.to(accumulator.dtype) if A_PARTS > 1 else a
    for i in tl.static_range(A_PARTS):
        part_a = rest_a.to(PRODUCT)
        rest_b = b.to(accumulator.dtype) if B_PARTS > 1 else b
        for j in tl.static_range(B_PARTS):
            if i + j < LIMIT:
                part_b = rest_b.to(PRODUCT)
                accumulator = product(part_a, part_b, accumulator)
                if i + j + 1 < LIMIT and j + 1 < B_PARTS:
                    rest_b = rest_of(rest_b, part_b)
        if i + 1 < A_PARTS:
            rest_a = rest_of(rest_a, part_a)
    return accumulator


def number(value: float, dtype: torch.dtype) -> float | int:
    """A number for a kernel. Triton takes a Python float as fp32: for fp64 its bits go in, as an integer."""
    return struct.unpack("<q", struct.pack("<d", value))[0] if dtype is torch.float64 else value


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What h, ds and sums are kept in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def exact_parts(narrow: torch.dtype, wide: torch.dtype) -> int:
    """How many numbers of one dtype make one of another, where the result is kept in fp32."""
    if narrow.itemsize > 2 or narrow is wide:
        return 1
    return 3 if narrow is torch.bfloat16 else 2


def low_type(dtype: torch.dtype) -> torch.dtype:
    """What parts of h and ds are beside activations of a dtype."""
    return torch.bfloat16 if dtype.itemsize == 2 else dtype


def low_parts(dtype: torch.dtype, result: torch.dtype) -> int:
    """How many of them h or ds goes in as, for a result."""
    if dtype.itemsize > 2:
        return 1
    return 2 if result.itemsize == 2 else 3


def parts_beside_low(dtype: torch.dtype, operand: torch.dtype) -> int:
    """How many of them an operand goes in as that meets h or ds, for activations of a dtype."""
    return 2 if dtype.itemsize == 2 and operand is not torch.bfloat16 else 1


def unit_rows(matrix: Tensor) -> Tensor:
    """A matrix whose rows are contiguous, at whatever distance; copied only where they are not."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def rank_block(R: int) -> int:
    """Ranks that one program takes: a power of two, 16 (the least that a tensor core takes) to 64."""
    return min(64, max(16, triton.next_power_of_2(R)))


def split(length: int, block: int, programs: int) -> tuple[int, int]:
    """Cuts `length` so that about PROGRAMS programs run: (pieces, length of a piece, a multiple of 4 blocks)."""
    wanted = triton.cdiv(PROGRAMS, max(programs, 1))
    unit = 4 * block
    piece = triton.cdiv(triton.cdiv(length, unit), min(wanted, triton.cdiv(length, unit))) * unit
    return triton.cdiv(length, piece), piece
