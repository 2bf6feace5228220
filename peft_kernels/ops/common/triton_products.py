"""The product of two tiles in Triton, and fp32 numbers in it as 16-bit parts.

An fp32 number v next to 16-bit activations becomes v = v0 + v1 (+ v2), each a 16-bit number, so that products run on
tensor cores and lose nothing that shows: two parts where the result is rounded to 16 bits; three of bf16 (24 bits) or
two of fp16 (22 bits) where it stays fp32.
"""

import torch
import triton
import triton.language as tl

PROGRAMS = 264  # what split work aims at: two programs for each of an H200's 132 processors


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


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What h, ds and sums are kept in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def exact_parts(narrow: torch.dtype, wide: torch.dtype) -> int:
    """How many numbers of one dtype make one of another, where the result is kept in fp32."""
    if narrow.itemsize > 2 or narrow is wide:
        return 1
    return 3 if narrow is torch.bfloat16 else 2
