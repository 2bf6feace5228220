"""Axolotl's LoRA functions (`axolotl.kernels.lora`; tried with 0.19.0), without the framework.

LoRA_O is one projection; LoRA_QKV and LoRA_MLP are those of a layer of a Llama. A dropped x is an argument of theirs.
"""

import logging
from functools import cache
from unittest.mock import MagicMock

from torch.nn.functional import dropout

from benchmarks.peers.isolated import import_isolated
from benchmarks.peers.layers import Functions

NAME = "axolotl"
# bitsandbytes is read at import; an unquantised weight never reaches it
_STAND_INS = {
    "axolotl.utils.logging": {"get_logger": lambda name, *_: logging.getLogger(name)},
    "bitsandbytes": {"__version__": "0.46.0"},
    "bitsandbytes.functional": {"QuantState": type("QuantState", (), {}), "get_ptr": None, "lib": MagicMock()},
}


@cache
def _module():
    return import_isolated("axolotl.kernels.lora", _STAND_INS, required=("triton",))


def load(device):
    """f(x, weight, lora_A, lora_B, scaling, p); the kernel takes x in three dimensions, and the dropped x beside it."""
    function = _module().LoRA_O

    def call(x, weight, lora_A, lora_B, scaling, p):
        dropped = dropout(x, p)[None] if p else None
        y = function.apply(x[None], dropped, weight, None, None, lora_A, lora_B, scaling, None, None)
        return y[0]

    return call


def layer_functions(device) -> Functions:
    """As Axolotl puts them into a model: one mask for all that read the same x, and none before the down projection."""
    module = _module()

    def arguments(members):
        return [given for weight, a, b, scaling in members for given in (weight, None, None, a, b, scaling, None, None)]

    def dropped(x, p):
        return dropout(x, p) if p else None

    def qkv(x, members, p):
        return module.LoRA_QKV.apply(x, dropped(x, p), *arguments(members), True)

    def mlp(x, members, p):
        kernels = module.swiglu_forward, module.swiglu_backward
        return module.LoRA_MLP.apply(x, dropped(x, p), *arguments(members), *kernels, True)

    def projection(x, member, p):
        return module.LoRA_O.apply(x, dropped(x, p), *arguments([member]))

    return Functions(qkv, mlp, projection)
