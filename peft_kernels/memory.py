"""What autograd keeps between a forward and its backward, in bytes; for the demo, the benchmarks and the tests."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(run: Callable[[], Tensor], parameters: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct storages that autograd keeps while `run` goes forward, without the parameters'."""
    skip = {p.untyped_storage().data_ptr() for p in parameters}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skip and tensor.numel():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()  # held, so that no storage is freed and counted twice
    del out
    return sum(kept.values())
