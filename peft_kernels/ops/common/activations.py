"""The activations f of a bottleneck, by name. Kernels and tables know them by number: their place in this order, which
csrc has too; 0 is the identity, which makes LoRA of a bottleneck.
"""

import math

import torch

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
