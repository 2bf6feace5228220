"""The kernels for Hopper that are off by default, as a contender beside those that are on, in the same rounds.

The library asks the environment in every call whether it may take them, and a CUDA graph keeps what it captured: so an
arm of the backend `cuda_sm90` is one of `cuda` whose steps, forward and backward, run with PEFT_KERNELS_SM90=1. Where
the environment says something already, that holds for the whole run, and there are no such arms.

They are candidates: one that fails its samples is left out, and takes no other contender with it.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator

import torch

VARIABLE = "PEFT_KERNELS_SM90"
BACKEND = "cuda_sm90"
DEFAULT = "cuda"
REFUSED: list[str] = []  # why there are no such arms in this process


def there(device: torch.device) -> bool:
    """Whether this run has such arms."""
    if device.type != "cuda" or os.environ.get(VARIABLE) or REFUSED:
        return False
    return torch.cuda.get_device_capability() == (9, 0)


def beside(arms: list, device: torch.device) -> list:
    """The arms, and before each of `cuda` the same, weights too, for the kernels for Hopper."""
    if not there(device):
        return arms
    twins = {arm: dataclasses.replace(arm, backend=BACKEND) for arm in arms if arm.backend == DEFAULT}
    return [one for arm in arms for one in ([twins[arm]] if arm in twins else []) + [arm]]


@contextlib.contextmanager
def asked_for(backend: str) -> Iterator[None]:
    """What an arm of this backend is to find in the environment; afterwards it is as it was."""
    if backend != BACKEND:
        yield
        return
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def stepping(step: Callable) -> Callable:
    """A clock's step, with the environment that each arm is to find."""

    def of(arm):
        with asked_for(arm.backend):
            return step(arm)

    return of
