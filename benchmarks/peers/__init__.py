"""Thin front ends to other projects' LoRA kernels: imported where installed, named as absent where not.

Each module has NAME, the arm's name in the CSV. Those for training have `load(device)`, which returns
`f(x, weight, lora_A, lora_B, scaling, p) -> y` with autograd or raises ImportError saying what is missing, and where
the peer has functions for a whole layer `layer_functions(device)`. Dropout is done as the peer's own training does it.
Those for serving, sglang.py and vllm.py, say what they have themselves.
Nothing of the peers' code is in this project.
"""

from collections.abc import Callable
from functools import cache

import torch

from benchmarks.peers import automodel, axolotl, unsloth

MODULES = (unsloth, axolotl, automodel)


@cache
def find(device: torch.device) -> tuple[dict[str, Callable], list[str]]:
    """The peers that can be called here, and a line for each that cannot."""
    found, missing = {}, []
    for module in MODULES:
        try:
            found[module.NAME] = module.load(device)
        except ImportError as error:
            missing.append(f"{module.NAME}: {error}")
    return found, missing
