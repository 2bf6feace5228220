"""Ids out of range on a GPU, noticed without waiting for it: the next route that is asked for raises.

A route counts them on the device. The count is added up there, also by replays of a captured graph, and copied to
pinned memory behind the work; what has arrived by the time of the next call is what that call sees.
"""

import threading

import torch
from torch import Tensor

from peft_kernels.ops.batched_lora.route import OUT_OF_RANGE


class Watch:
    """The ids out of range that were seen on one device."""

    def __init__(self, device: torch.device):
        self._count = torch.zeros(1, dtype=torch.int32, device=device)
        self._arrived = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._reported = 0

    def note(self, route: Tensor) -> None:
        """Adds what a route counted; nothing waits."""
        self._count.add_(route[OUT_OF_RANGE])
        self._arrived.copy_(self._count, non_blocking=True)

    def check(self) -> None:
        """Raises, once, for what has arrived since the last time."""
        arrived = int(self._arrived)
        if arrived != self._reported:
            new, self._reported = arrived - self._reported, arrived
            raise ValueError(
                f"batched_lora_route: adapter_ids of an earlier call must be -1 or lie in [0, adapters); {new} rows "
                "were out of range and had no adapter"
            )


_WATCHES: dict[torch.device, Watch] = {}
_LOCK = threading.Lock()


def watch(device: torch.device, make: bool) -> Watch | None:
    """The one of a device, made if there is none; a graph that is being captured cannot make it."""
    with _LOCK:
        if make and device not in _WATCHES:
            _WATCHES[device] = Watch(device)
        return _WATCHES.get(device)
