"""How often each patched module ran fused, and why it did not otherwise.

The counters live here, weakly keyed by module, and not on the modules: a patched model pickles, copies and saves as if
it had never been patched. Calls inside a compiled region are not counted (there is no Python left to count them).
"""

import threading
from collections import Counter
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary, ref

from torch import nn
from torch.compiler import is_compiling


@dataclass
class Calls:
    fused: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)  # reason -> calls
    trained_by_row: bool = False  # was ever called in training with an adapter for each row

    def __sub__(self, earlier: "Calls") -> "Calls":
        return Calls(self.fused - earlier.fused, self.fallbacks - earlier.fallbacks)


_CALLS: WeakKeyDictionary[nn.Module, Calls] = WeakKeyDictionary()
_FIRST_CALL = threading.Lock()


def _of(module: nn.Module) -> Calls:
    try:
        return _CALLS.data[ref(module)]  # what `_CALLS[module]` does, without a Python call on the hot path
    except KeyError:
        with _FIRST_CALL:
            return _CALLS.setdefault(module, Calls())


def count_fused(module: nn.Module) -> None:
    if not is_compiling():
        _of(module).fused += 1


def count_fallback(module: nn.Module, reason: str) -> None:
    if not is_compiling():
        _of(module).fallbacks[reason] += 1


def mark_trained_by_row(module: nn.Module) -> None:
    _of(module).trained_by_row = True


def was_trained_by_row(module: nn.Module) -> bool:
    found = _CALLS.get(module)
    return found is not None and found.trained_by_row


def calls(module: nn.Module) -> Calls:
    """A copy of a module's counts."""
    found = _CALLS.get(module, Calls())
    return Calls(found.fused, Counter(found.fallbacks))
