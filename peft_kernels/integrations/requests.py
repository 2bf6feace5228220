"""What the requests of continuous batching hold, from the moment that they are added until they have ended."""

import contextlib
import threading
from collections.abc import Iterable, Sequence, Set

from peft_kernels.modules import Prefix, Prefixes
from peft_kernels.ops import AdapterPool

CHILD = "__child#"  # what transformers puts between a request's id and the number of a further sequence of it
WAIT_S = 1.0  # for the end of a step


class Requests:
    """The slots and the prefixes of requests, by id, and the pins that keep the slots as they are.

    A request goes when the engine's scheduler knows neither it nor a further sequence of it any more; one that it has
    not seen yet stays, unless it was cancelled. Its id may come again after that, for which `begin` waits: its result
    is out before the step is over. `prefixes`: names of those of the model, as they are now. `places`: they themselves,
    by attention; where one is put back under its name, it is another one, which its requests did not ask for.
    """

    def __init__(self, pool: AdapterPool | None, prefixes: Set[str] = frozenset(), places: Sequence[Prefixes] = ()):
        self.pool, self.prefixes, self.places = pool, prefixes, places
        self._lock = threading.Condition()
        self._slots: dict[str, int] = {}
        self._prefixes: dict[str, tuple[str | None, Prefix | None]] = {}
        self._pins: dict[str, contextlib.ExitStack] = {}
        self._seen: set[str] = set()

    def begin(self, request_id: str, adapter: str | None) -> None:
        with contextlib.ExitStack() as pins, self._lock:
            if CHILD in request_id or not self._lock.wait_for(lambda: request_id not in self._slots, WAIT_S):
                raise ValueError(
                    f"add_request: request_id must be another one than those of running requests, without '{CHILD}', "
                    f"got {request_id!r}"
                )
            self.require(adapter)
            pooled = adapter is not None and self.pool is not None
            self._slots[request_id] = pins.enter_context(self.pool.pin(adapter)) if pooled else -1
            self._prefixes[request_id] = (adapter, self._find(adapter)) if adapter in self.prefixes else (None, None)
            self._pins[request_id] = pins.pop_all()

    def require(self, adapter: str | None) -> None:
        """Raises KeyError where there is no such adapter."""
        if adapter is None or adapter in self.prefixes:
            return
        if self.pool is None:
            has = ", ".join(map(repr, sorted(self.prefixes)))
            raise KeyError(f"the model has no prefix {adapter!r}; it has {has}")
        self.pool.slot(adapter)

    def slot(self, request_id: str) -> int:
        return self._slots[_parent(request_id)]

    def prefix(self, request_id: str) -> str | None:
        """The name of a request's prefix; None: the active one."""
        name, prefix = self._prefixes[_parent(request_id)]
        if name is not None and self._find(name) is not prefix:
            raise RuntimeError(
                f"continuous batching: the engine ends, as the prefix {name!r} was taken off before its requests had "
                "ended"
            )
        return name

    def _find(self, name: str) -> Prefix | None:
        """The prefix of this name in the first attention that has one."""
        return next((prefixes[name] for prefixes in self.places if name in prefixes), None)

    def cancel(self, request_id: str) -> None:
        self._seen.add(request_id)

    def let_go(self, known: Iterable[str]) -> None:
        """Ends those that were seen and are not among the ids that a scheduler knows."""
        known = {_parent(request_id) for request_id in known}
        with self._lock:
            gone = [i for i in self._slots if i in self._seen and i not in known]
            pins = [self._pins.pop(i) for i in gone]
            for request_id in gone:
                del self._slots[request_id], self._prefixes[request_id]
            self._seen = (self._seen | known) & self._slots.keys()
            self._lock.notify_all()
        for pin in pins:
            pin.close()

    def end(self, *request_ids: str) -> None:
        """Ends these, or all."""
        ended = set(request_ids or self._slots)
        self._seen |= ended
        self.let_go(self._slots.keys() - ended)


def _parent(request_id: str) -> str:
    return request_id.partition(CHILD)[0]
