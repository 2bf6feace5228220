"""Which adapter each row of a call has: one object per call, found by every layer that the call reaches.

A context variable carries it, so threads and asynchronous tasks do not see each other's. Checkpointed layers take it
along into the backward (`keeping`). Nothing is left on a module. The routing of a batch is worked out once per shape of
the rows, by the first layer that needs it, for all of them.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from contextvars import ContextVar

import torch
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import ALoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.vera import VeraLayer
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers.pytorch_utils import Conv1D

from peft_kernels.integrations.counts import mark_trained_by_row, was_trained_by_row
from peft_kernels.ops import AdapterPool, batched_lora_route

BASE = "__base__"  # PEFT's name for rows without an adapter
BLOCK = "adapter_ids"
KEPT_ROUTES = 8  # a generation without a cache asks for another one at every token
NOTHING = object()  # it is known that the call gives no adapters to rows
OUTSIDE = object()  # there are adapters of rows, and a graph is being traced


class Rows:
    """What the rows of one call have: ids[i] is row i's, -1 stands for none, and all are below `count`.

    ids [B], one per sequence, or [B, S], one per token. `source` is what the user gave, for messages. `expand`: so many
    times generate may repeat each sequence (beams).
    """

    one_forward = False  # whether each forward has an object of its own
    others_active = False  # whether rows of id -1 have the active prefix

    def __init__(self, source: str, ids: Tensor, count: int, expand: int = 1):
        self.source, self.ids, self.count, self.expand = source, ids, count, expand
        self._routes: dict[tuple, Tensor] = {}

    def route(self, leading: torch.Size, device: torch.device) -> Tensor:
        """For an op on x [*leading, K]."""
        return self._once((leading, device), lambda: self.make_route(leading, device), device)

    def among(self, chosen: tuple[int, ...], leading: torch.Size, device: torch.device) -> Tensor:
        """For an op on x [*leading, K] with some of the adapters: the place among them of each row's, or -1."""

        def make():
            place = torch.full((self.count + 1,), -1, dtype=torch.int32, device=self.ids.device)
            place[list(chosen)] = torch.arange(len(chosen), dtype=torch.int32, device=self.ids.device)
            flat = self._flat(leading).long()
            return place[flat.where((flat >= 0) & (flat < self.count), self.count)].to(device)  # the last: no adapter

        return self._once((chosen, leading, device), make, device)

    def _once(self, key: tuple, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        if device.type == "cuda" and not self.one_forward and torch.cuda.is_current_stream_capturing():
            return make()  # a replay would not make again what is from before the capture
        try:
            return self._routes[key]
        except KeyError:
            if len(self._routes) == KEPT_ROUTES:
                del self._routes[next(iter(self._routes))]
            return self._routes.setdefault(key, make())

    def make_route(self, leading: torch.Size, device: torch.device) -> Tensor:
        return batched_lora_route(self._flat(leading).to(device), self.count)

    def at_output(self) -> "Rows":
        """The rows that the model's lm_head is given."""
        return self

    def of_sequences(self, count: int) -> Tensor:
        """The id of each of so many sequences [count]; beams have that of the sequence they are of."""
        if self.ids.dim() != 1:
            raise ValueError(f"{self.source}: prefixes are for whole sequences; give one id per sequence")
        return self._flat(torch.Size((count,)))

    def _flat(self, leading: torch.Size) -> Tensor:
        """The id of each row of a tensor with these leading sizes."""
        B, M, sizes = self.ids.shape[0], math.prod(leading), tuple(self.ids.shape)
        if self.ids.dim() == 1:
            fits = bool(leading) and leading[0] in (B, B * self.expand)
        else:
            fits = leading[:2] == sizes or leading == (self.ids.numel(),)
        if not fits:
            beams = f", or {B * self.expand} with beams={self.expand}" if self.expand > 1 else ""
            raise ValueError(
                f"{self.source}: there are ids for {list(sizes)}{beams}, which a layer's input of leading sizes "
                f"{list(leading)} does not match. Give one per sequence or, to adapter_ids, one per token; where "
                "generate repeats sequences (num_beams, num_return_sequences), adapter_ids(..., beams=n) says how "
                "often, and adapter_names and Runner.generate know it"
            )
        flat = self.ids.reshape(-1)
        return flat.repeat_interleave(M // flat.numel()) if flat.numel() else flat


class RowAdapters(Rows):
    """The adapters of the rows of one call: `adapters[ids[i]]` is row i's.

    `seen`: whether a layer has asked. `found`: the ids of the adapters that some layer has, or None where no layer has
    looked for any. `calls`: by module, what a generation gathered for its first token and calls again with for the
    others; None where the model may change between two forwards.
    """

    def __init__(self, source: str, ids: Tensor, adapters: tuple[str, ...], expand: int = 1, calls: dict | None = None):
        super().__init__(source, ids, max(1, len(adapters)), expand)
        self.adapters, self.calls = adapters, calls
        self.seen = False
        self.found: set[int] | None = None
        self._names: dict[tuple, list[str]] = {}
        self._in_pools: dict[AdapterPool, Rows] = {}
        self._pins = contextlib.ExitStack()
        self._closed = False

    def in_pool(self, pool: AdapterPool) -> Rows:
        """The same rows, with the slots of their adapters in a pool; the slots are pinned until the call ends."""
        self.seen = True
        if self._closed:
            raise RuntimeError(
                f"{self.source}: a layer is called after the block has ended, by a task that was started inside; "
                "its adapters may be gone. Wait for the task inside the block, or enter the block in the task"
            )
        if pool not in self._in_pools:
            slots = [self._pins.enter_context(pool.pin(name)) for name in self.adapters]
            self.look([name for name, slot in zip(self.adapters, slots, strict=True) if slot >= 0])
            outside = pool.slots  # what the route counts as out of range: ids on a GPU are not looked at before
            slot_of = torch.tensor([outside, -1, *slots, outside], dtype=torch.int32, device=self.ids.device)
            ids = slot_of[self.ids.long().clamp(-2, len(slots)) + 2]
            self._in_pools[pool] = Rows(self.source, ids, pool.slots, self.expand)
        return self._in_pools[pool]

    def close(self) -> None:
        """The call has ended: its adapters may go."""
        self._closed = True
        self._pins.close()

    def look(self, present: Container[str]) -> None:
        """Notes which of the adapters a layer has."""
        self.found = (self.found or set()).union(i for i, name in enumerate(self.adapters) if name in present)

    @property
    def by_token(self) -> bool:
        """Whether it was said for each token, and not for each sequence."""
        return self.ids.dim() == 2

    def for_peft(self, leading: torch.Size, module: nn.Module) -> dict:
        """The arguments that say the same to a module's own forward by PEFT, whose input has these leading sizes."""
        if leading not in self._names:
            self._names[leading] = [BASE if i < 0 else self.adapters[i] for i in self._flat(leading).tolist()]
        return {"adapter_names": self._names[leading]}


# -- what a call carries ----------------------------------------------------------------------------------------------

_CURRENT: ContextVar[RowAdapters | object | None] = ContextVar("peft_kernels_row_adapters", default=None)
_COUNT_LOCK = threading.Lock()
_entered_count = 0
_ENTERED = False  # whether any thread is inside: what code under torch.compile has in place of the context variable


@contextlib.contextmanager
def entered(rows: RowAdapters) -> Iterator[None]:
    """Inside, the layers that this thread calls give each row its adapter."""
    outer = _CURRENT.get()
    if isinstance(outer, RowAdapters):
        outer.seen = True  # `rows` wins inside
    _count(1)
    token = _CURRENT.set(rows)
    try:
        yield
    finally:
        _CURRENT.reset(token)
        _count(-1)
        rows.close()


def _count(change: int) -> None:
    global _entered_count, _ENTERED
    with _COUNT_LOCK:
        _entered_count += change
        _ENTERED = _entered_count > 0


def current(module: nn.Module) -> RowAdapters | object | None:
    """The adapters of the rows that `module` is called with, or None: then PEFT's active adapters are for all rows.

    OUTSIDE under torch.compile, where no graph reads a context variable: the caller hands itself to `outside_graph`.
    """
    if is_compiling():
        return OUTSIDE if _ENTERED else None
    rows = _CURRENT.get()
    if rows is None:
        if torch._C._current_graph_task_id() != -1 and was_trained_by_row(module):
            raise RuntimeError(
                f"adapter_names, adapter_ids: a {type(module).__name__} that was trained with an adapter for each row "
                "is called again inside the backward, and the adapters of that call are not known there. Checkpoint "
                "with model.gradient_checkpointing_enable(), or enter adapter_ids inside the checkpointed function"
            )
        return None
    if rows is NOTHING:
        return None
    rows.seen = True
    if module.training:
        mark_trained_by_row(module)
    return rows


def in_block() -> bool:
    """Whether a call is made inside `adapter_ids`."""
    rows = _CURRENT.get()
    return isinstance(rows, RowAdapters) and rows.source == BLOCK


def rows_in_pool(pool: AdapterPool) -> Rows | object | None:
    """What the rows of the present call have in a pool, None where no call gives adapters to rows; OUTSIDE as above."""
    if is_compiling():
        return OUTSIDE if _ENTERED else None
    rows = _CURRENT.get()
    return None if rows is None or rows is NOTHING else rows.in_pool(pool)


@torch.compiler.disable(reason="which adapter each row has is not known inside a graph")
def outside_graph(function: Callable, *args, **kwargs):
    return function(*args, **kwargs)


def keeping(function: Callable) -> Callable:
    """The function, to be called now and in the backward, both times with the adapters of now."""
    rows = _CURRENT.get() or NOTHING

    def run(*args, **kwargs):
        token = _CURRENT.set(rows)
        try:
            return function(*args, **kwargs)
        finally:
            _CURRENT.reset(token)

    return run


TOKENWISE = (nn.Linear, Conv1D, nn.Embedding)


def by_peft(
    forward: Callable, module: nn.Module, rows: RowAdapters | None, x: Tensor, *args, reason: str = "", **kwargs
) -> Tensor:
    """PEFT's own forward of a module, told the adapters of the rows in PEFT's way; `reason`: why it is not fused."""
    if rows is None or "adapter_names" in kwargs:
        return forward(module, x, *args, **kwargs)
    _require_told(rows, module, reason or "see patch's report")
    rows.look(adapters_of(module))
    if rows.ids.dim() == 1:
        return forward(module, x, *args, **rows.for_peft(x.shape[:1], module), **kwargs)
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
    if not isinstance(base, TOKENWISE):
        raise ValueError(f"adapter_ids: ids per token do not reach into a {type(base).__name__}; give one per sequence")
    leading = x.shape[:-1] if x.is_floating_point() else x.shape
    flat = forward(module, x.reshape(-1, *x.shape[len(leading) :]), *args, **rows.for_peft(leading, module), **kwargs)
    return flat.reshape(*leading, *flat.shape[1:])


def _require_told(rows: RowAdapters, module: nn.Module, reason: str) -> None:
    """Raises where PEFT's own forward cannot be told, or would take in silence, what the rows have."""
    method = "AdaLoRA" if isinstance(module, AdaLoraLayer) else "VeRA" if isinstance(module, VeraLayer) else ""
    without = f"a {type(module).__name__} has no kernel for it here ({reason})"
    if method:
        raise ValueError(
            f"{rows.source}: PEFT has no mixed batch of {method}, and {without}. Change that, or run the rows of each "
            "adapter by themselves after model.set_adapter(name)"
        )
    variants = getattr(module, "lora_variant", {}) if rows.source == BLOCK else {}
    for name in rows.adapters:
        if isinstance(variants.get(name), ALoraLinearVariant):
            how = f"{without}; pass adapter_names" if rows.by_token else "pass adapter_names, or ids per token"
            raise ValueError(f"adapter_ids: {name!r} is an aLoRA, which rows have from its invocation on: {how}")


def adapters_of(module: nn.Module) -> Container[str]:
    """Names of the adapters of a LoRA layer, or of a wrapper around a module that is trained whole."""
    if isinstance(module, LoraLayer):
        return {*module.lora_A, *module.lora_embedding_A}
    return module.vera_lambda_d if isinstance(module, VeraLayer) else module._adapters


# -- from names, from ids ---------------------------------------------------------------------------------------------


def from_names(names: Sequence[str], known: set[str], expand: int) -> RowAdapters:
    """What PEFT's `adapter_names` says. Raises where PEFT does."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"adapter_names: must be a list of str, one for each sequence, got {names!r}")
    index: dict[str, int] = {}
    ids = [-1 if name == BASE else index.setdefault(name, len(index)) for name in names]
    if strangers := sorted(index.keys() - known):
        raise ValueError(
            f"adapter_names: the model has no adapter {', '.join(map(repr, strangers))}; it has "
            f"{', '.join(map(repr, sorted(known)))}, and {BASE!r} stands for none"
        )
    return RowAdapters("adapter_names", torch.tensor(ids, dtype=torch.int32), tuple(index), expand, {})


def expansion(kwargs: dict, model: nn.Module) -> int:
    """How many times a model's generate, called with these arguments, repeats each sequence."""
    configs = kwargs.get("generation_config"), getattr(model, "generation_config", None)
    sizes = (
        next((n for n in (kwargs.get(name), *(getattr(c, name, None) for c in configs)) if n), 1)
        for name in ("num_beams", "num_return_sequences")
    )
    return max(sizes)


@contextlib.contextmanager
def adapter_ids(ids: Tensor | Sequence, adapters: Sequence[str], *, beams: int = 1) -> Iterator[None]:
    """Inside, each sequence or each token that a patched model is given has its own adapter, or none.

    Args:
        ids: `[B]`, one for each sequence, or `[B, S]`, one for each token; a tensor of integers or (nested) lists.
            i stands for `adapters[i]`, -1 for no adapter.
        adapters: names of adapters of the model. Which of them are active does not matter.
        beams: how many times a generate inside repeats each sequence (num_beams, or num_return_sequences where that is
            larger): with ids per sequence, an encoder then runs on B rows and the decoder on B * beams.

    It holds for calls by the thread that entered it, not for threads that it starts. In training too (dropout,
    gradients for every adapter named, zeros for those that no row has), and for backwards of checkpointed layers that
    run later. Layers without a kernel, or in a state without one, run PEFT's own mixed forward and are counted in the
    report. PEFT's argument `adapter_names` does the same for whole sequences and wins where both are given; the places
    that PEFT finds for an active aLoRA do not. In a model with an `AdapterPool` the names are the pool's, and their
    versions of the first call inside are kept until the end.

    Raises:
        KeyError: the model's pool has no adapter of a name.
        ValueError: an id is below -1 or not below len(adapters); adapters has a name twice; beams is below 1, or above
            it with ids per token; a layer's input does not have the rows of the ids; an aLoRA is named with ids per
            sequence, which do not say where it begins; PEFT has no mixed batch of a layer that has no kernel; at the
            end, if no layer that ran has an adapter of one of the names.
        RuntimeError: at the end, if no patched layer ran.

    Example:
        >>> peft_kernels.patch(model)
        >>> with peft_kernels.adapter_ids([0, -1, 1], adapters=["french", "german"]):
        ...     logits = model(input_ids=input_ids).logits  # the second of the three sequences by the base model
    """
    if isinstance(beams, bool) or not isinstance(beams, int) or beams < 1:
        raise ValueError(f"adapter_ids: beams must be an integer of 1 or more, got {beams!r}")
    checked = _checked(ids, adapters)
    if beams > 1 and checked.dim() == 2:
        got = list(checked.shape)
        raise ValueError(f"adapter_ids: beams={beams} repeats sequences; ids must have shape [B] then, got {got}")
    rows = RowAdapters(BLOCK, checked, tuple(adapters), beams)
    with entered(rows):
        yield
    if not rows.seen:
        raise RuntimeError(
            "adapter_ids: no patched layer ran inside, so no row had an adapter; peft_kernels.patch(model) patches a "
            "PEFT model, peft_kernels.attach_pool(model) gives a plain one a pool, and both must come before the block"
        )
    if missing := [] if rows.found is None else [n for i, n in enumerate(rows.adapters) if i not in rows.found]:
        raise ValueError(f"adapter_ids: no layer that ran has an adapter {', '.join(map(repr, missing))}")


def _checked(ids: Tensor | Sequence, adapters: Sequence[str]) -> Tensor:
    if isinstance(adapters, str) or not all(isinstance(name, str) for name in adapters):
        raise TypeError(f"adapter_ids: adapters must be a list of str, got {adapters!r}")
    if len(set(adapters)) != len(adapters):
        raise ValueError(f"adapter_ids: adapters must differ from each other, got {list(adapters)}")
    try:
        ids = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            "adapter_ids: ids must be integers, one for each sequence or one for each token of each: i stands for "
            f"adapters[i], and -1 for none; got {ids!r}. Of names: [-1 if name is None else adapters.index(name) for "
            "name in names]"
        ) from None
    if ids.dtype not in (torch.int32, torch.int64) and ids.numel():
        raise TypeError(f"adapter_ids: ids must be integers (int32 or int64), got {ids.dtype}")
    if ids.dim() not in (1, 2):
        raise ValueError(f"adapter_ids: ids must have shape [B] or [B, S], got {list(ids.shape)}")
    outside = ids[(ids < -1) | (ids >= len(adapters))] if ids.is_cpu else ids[:0]  # a GPU is not waited for
    if outside.numel():
        raise ValueError(f"adapter_ids: ids must be -1 or lie in [0, {len(adapters)}), got {outside.flatten()[0]}")
    return ids.to(torch.int32, copy=True)
