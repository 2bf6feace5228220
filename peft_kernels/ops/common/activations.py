"""The activations f of a bottleneck or of a gated product and their slopes f', by name. Kernels and tables know them by
number: their place in this order, which csrc has too; 0 is the identity, which makes LoRA of a bottleneck.
"""

import math

import torch
from torch import Tensor

LEAK = 0.01  # leaky_relu's slope below 0
GELU_TANH = math.sqrt(2 / math.pi), 0.044715  # h / 2 (1 + tanh(first (h + second h^3)))

ACTIVATIONS = {
    "identity": lambda h: h,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda h: torch.nn.functional.gelu(h, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": lambda h: torch.nn.functional.leaky_relu(h, LEAK),
}
NAMES = tuple(ACTIVATIONS)
# For references: on a processor with AVX-512 F.gelu makes NaN of infinity.
EXACT = ACTIVATIONS | {"gelu": lambda h: h * torch.special.ndtr(h)}


def _gelu_slope(h: Tensor) -> Tensor:
    normal = torch.exp(-h * h / 2) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(h) + h * normal


def _gelu_tanh_slope(h: Tensor) -> Tensor:
    """(1 + tanh z) / 2 is the logistic function of 2 z, which does not cancel; past 64 nothing changes."""
    a, b = GELU_TANH
    h = h.clamp(-64, 64)
    z = 2 * a * (h + b * h**3)
    share = torch.sigmoid(z)
    return share + h * share * torch.sigmoid(-z) * 2 * a * (1 + 3 * b * h * h)


def _silu_slope(h: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(h)
    return sigmoid * (1 + h * (1 - sigmoid))


SLOPES = {  # f'(h); relu's and leaky_relu's at 0 are those of PyTorch
    "identity": torch.ones_like,
    "relu": lambda h: torch.where(h.isnan(), h, (h > 0).to(h.dtype)),
    "gelu": _gelu_slope,
    "gelu_tanh": _gelu_tanh_slope,
    "silu": _silu_slope,
    "tanh": lambda h: 1 - torch.tanh(h) ** 2,
    "sigmoid": lambda h: torch.sigmoid(h) * (1 - torch.sigmoid(h)),
    "leaky_relu": lambda h: torch.where(h.isnan(), h, torch.where(h > 0, 1.0, torch.full_like(h, LEAK))),
}
