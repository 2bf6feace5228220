"""Axolotl's fused projection (`axolotl.kernels.lora.LoRA_O`; tried with 0.19.0), without the framework."""

import logging
from unittest.mock import MagicMock

from torch.nn.functional import dropout

from benchmarks.peers.isolated import import_isolated

NAME = "axolotl"
# bitsandbytes is read at import; an unquantised weight never reaches it
_STAND_INS = {
    "axolotl.utils.logging": {"get_logger": lambda name, *_: logging.getLogger(name)},
    "bitsandbytes": {"__version__": "0.46.0"},
    "bitsandbytes.functional": {"QuantState": type("QuantState", (), {}), "get_ptr": None, "lib": MagicMock()},
}


def load(device):
    """f(x, weight, lora_A, lora_B, scaling, p); the kernel takes x in three dimensions, and the dropped x beside it."""
    function = import_isolated("axolotl.kernels.lora", _STAND_INS, required=("triton",)).LoRA_O

    def call(x, weight, lora_A, lora_B, scaling, p):
        dropped = dropout(x, p)[None] if p else None
        y = function.apply(x[None], dropped, weight, None, None, lora_A, lora_B, scaling, None, None)
        return y[0]

    return call
