"""The activations of a bottleneck in Triton, in fp32 or fp64, by their numbers in ops/common/activations.py.

All from exp(-|h|), which never overflows, and erf; NaN stays NaN. gelu_tanh = h sigmoid(2 z), z = a (h + b h^3).
tanh is (1 - e) / (1 + e), e = exp(-2 |h|), away from 0 and Lambert's continued fraction near it, so that small h keep
all their digits.
"""

import triton
import triton.language as tl

from peft_kernels.ops.common.activations import GELU_TANH, LEAK, NAMES

_RELU, _GELU, _GELU_TANH, _SILU, _TANH, _SIGMOID, _LEAKY_RELU = (tl.constexpr(i) for i in range(1, len(NAMES)))
_LEAK = tl.constexpr(LEAK)
_SQRT_HALF = tl.constexpr(0.5**0.5)
_TWICE, _CUBE = tl.constexpr(2 * GELU_TANH[0]), tl.constexpr(GELU_TANH[1])


@triton.jit
def sigmoid(h):
    e = tl.exp(-tl.abs(h))
    return tl.where(h < 0, e, 1.0) / (1.0 + e)


@triton.jit
def tanh(h):
    e = tl.exp(-2.0 * tl.abs(h))
    far = (1.0 - e) / (1.0 + e)
    square = tl.where(tl.abs(h) < 0.4, h * h, 0.0)
    above = 135135.0 + square * (17325.0 + square * (378.0 + square))
    below = 135135.0 + square * (62370.0 + square * (3150.0 + square * 28.0))
    return tl.where(tl.abs(h) < 0.4, h * above / below, tl.where(h < 0, -far, far))


@triton.jit
def activated(h, number):
    """f(h), f the activation of a number that the program has read."""
    if number == _RELU:
        h = tl.where(h <= 0, 0.0, h)
    elif number == _GELU:
        h = 0.5 * h * (1.0 + tl.erf(h * _SQRT_HALF))
    elif number == _GELU_TANH:
        h = h * sigmoid((h + h * h * h * _CUBE) * _TWICE)
    elif number == _SILU:
        h = h * sigmoid(h)
    elif number == _TANH:
        h = tanh(h)
    elif number == _SIGMOID:
        h = sigmoid(h)
    elif number == _LEAKY_RELU:
        h = tl.where(h <= 0, h * _LEAK, h)
    return h
