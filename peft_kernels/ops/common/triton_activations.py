"""The activations f of a bottleneck and f' in Triton, in fp32 or fp64, by their numbers in ops/common/activations.py.

All from exp(-|h|), which never overflows, and erf; NaN stays NaN. With e = exp(-|h|): sigmoid(h) = 1 / (1 + e) or
e / (1 + e), sigmoid' = e / (1 + e)^2 with no 1 - sigmoid in it. gelu_tanh = h sigmoid(2 z), z = a (h + b h^3). tanh is
(1 - e^2) / (1 + e^2) away from 0 and Lambert's continued fraction near it, so that small h keep all their digits.
"""

import math

import triton
import triton.language as tl

from peft_kernels.ops.common.activations import GELU_TANH, LEAK, NAMES

_RELU, _GELU, _GELU_TANH, _SILU, _TANH, _SIGMOID, _LEAKY_RELU = (tl.constexpr(i) for i in range(1, len(NAMES)))
_LEAK = tl.constexpr(LEAK)
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_NORMAL = tl.constexpr(1 / math.sqrt(2 * math.pi))
_TWICE, _CUBE, _CUBE_SLOPE = (tl.constexpr(c) for c in (2 * GELU_TANH[0], GELU_TANH[1], 3 * GELU_TANH[1]))
_FAR = tl.constexpr(64.0)  # past it gelu_tanh's slope does not change, and a square of h would overflow


@triton.jit
def _sigmoid(h):
    e = tl.exp(-tl.abs(h))
    return tl.where(h < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _sigmoid_slope(h):
    e = tl.exp(-tl.abs(h))
    return e / ((1.0 + e) * (1.0 + e))


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
    """f(h), f the activation of a number: a constant of the kernel, or one that the program has read."""
    if number == _RELU:
        h = tl.where(h <= 0, 0.0, h)
    elif number == _GELU:
        h = 0.5 * h * (1.0 + tl.erf(h * _SQRT_HALF))
    elif number == _GELU_TANH:
        h = h * _sigmoid((h + h * h * h * _CUBE) * _TWICE)
    elif number == _SILU:
        h = h * _sigmoid(h)
    elif number == _TANH:
        h = tanh(h)
    elif number == _SIGMOID:
        h = _sigmoid(h)
    elif number == _LEAKY_RELU:
        h = tl.where(h <= 0, h * _LEAK, h)
    return h


@triton.jit
def slope(h, F: tl.constexpr):
    """f'(h), f the activation of the number F."""
    if F == _RELU:
        return tl.where(h > 0, 1.0, tl.where(h <= 0, 0.0, h))
    elif F == _GELU:
        return 0.5 * (1.0 + tl.erf(h * _SQRT_HALF)) + h * (tl.exp(-0.5 * h * h) * _NORMAL)
    elif F == _GELU_TANH:
        h = tl.where(h > _FAR, _FAR, tl.where(h < -_FAR, -_FAR, h))
        inner = (h + h * h * h * _CUBE) * _TWICE
        return _sigmoid(inner) + h * _sigmoid_slope(inner) * (1.0 + h * h * _CUBE_SLOPE) * _TWICE
    elif F == _SILU:
        return _sigmoid(h) + h * _sigmoid_slope(h)
    elif F == _TANH:
        return 4.0 * _sigmoid_slope(2.0 * h)
    elif F == _SIGMOID:
        return _sigmoid_slope(h)
    elif F == _LEAKY_RELU:
        return tl.where(h > 0, 1.0, tl.where(h <= 0, tl.full(h.shape, _LEAK, h.dtype), h))
    else:
        return tl.full(h.shape, 1.0, h.dtype)
