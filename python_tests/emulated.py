"""The emulator's operator library of one build, as operators of torch: what the files of emulated samples share.

PK_EMULATED names the build (plain, asan, race), PK_EMULATED_LIBRARY locates the library.
"""

import ctypes
import os

import pytest
import torch

from peft_kernels import registry, testing

BUILD, LIBRARY = os.environ["PK_EMULATED"], ctypes.CDLL(os.environ["PK_EMULATED_LIBRARY"])
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
LATE, EARLY, RANDOM = 0, 1, 2  # when a cp.async lands
# (order of threads and blocks, copies)
SCHEDULES = [(0, LATE), (1, RANDOM), (2, EARLY)] if BUILD == "plain" else [(3, RANDOM)]

OPS = [op for op in registry.ops().values() if "cuda" in op.backends]
registry._define(f"peft_kernels_emulated_{BUILD}", OPS)
LIBRARY.peft_kernels_bind(f"peft_kernels_emulated_{BUILD}".encode(), b"CPU")
LIBRARY.peft_kernels_poison.restype = ctypes.c_float
POISON = LIBRARY.peft_kernels_poison(1)  # for all that follows: it is a library of tests
NAMES = ("lora_linear", "batched_lora_", "bottleneck_adapter", "prefix_attention")
OP, POOLED, BOTTLENECK, ATTENTION = (registry.ops()[name] for name in NAMES)
EMULATED = getattr(torch.ops, f"peft_kernels_emulated_{BUILD}")


def of_schedules(test):
    """What asan and race find does not hang on the schedule: in these builds such a test is slow."""
    return test if BUILD == "plain" else pytest.mark.slow(test)


@pytest.fixture(autouse=True)
def in_order():
    """For files of tests to import: each test begins with threads and blocks in order."""
    set_schedule(0, LATE)


def set_schedule(seed, copies):
    LIBRARY.peft_kernels_emulator_schedule(ctypes.c_uint64(seed), copies)


def operators(op):
    """Forward and backward of an op."""
    return testing.operators(f"emulated_{BUILD}", op)
