"""A served model that is compiled or captured: copies of the modules of its own, all tensors shared, static buffers.

A graph can read no context variable, so the modules that a runner calls are its own: their pool sites find the ids in
the runner. The route is made once per forward, inside the graph, from the ids; replays read what the buffers hold then.
One runner per thread; runners of one model share its weights and its pool.
"""

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType

import torch
from torch import Tensor, nn

from peft_kernels.integrations.pool_sites import PoolSite
from peft_kernels.integrations.pooled import ModelPool, pool_of
from peft_kernels.integrations.prefixes import prefix_names
from peft_kernels.integrations.rows import expansion
from peft_kernels.integrations.transformers import POOL_SITE, forward_was_replaced

ROUTE = torch.ops.peft_kernels.batched_lora_route.default


class StaticRows:
    """The slots of the rows of a runner's present call, one for each sequence, in a buffer that keeps its address.

    One buffer for each number of sequences. `routes` lives as long as a forward: a pair (rows, route) for each number
    of rows that its layers have.
    """

    def __init__(self, pool: ModelPool):
        self.pool = pool
        self.buffers: dict[int, Tensor] = {}
        self.ids: Tensor | None = None  # int32 [B]
        self.expand = 1  # so many times generate may repeat each sequence (beams)
        self.routes: list[tuple[int, Tensor]] = []
        self.seen = False  # whether a site has asked

    def set(self, slots: list[int], expand: int) -> None:
        B, self.expand, self.seen = len(slots), expand, False
        with torch.inference_mode(False):  # a later call may be outside of it
            if B not in self.buffers:
                self.buffers[B] = torch.empty(B, dtype=torch.int32, device=self.pool.device)
                torch._dynamo.mark_static_address(self.buffers[B])
            self.ids = self.buffers[B]
            self.ids.copy_(torch.tensor(slots, dtype=torch.int32))

    def at_output(self) -> "StaticRows":
        return self

    def route(self, leading: torch.Size, device: torch.device) -> Tensor:
        M, B = leading.numel(), len(self.ids)
        for known, route in self.routes:
            if known == M:
                return route
        if leading[0] not in (B, B * self.expand):
            raise ValueError(f"Runner: there are adapters for {B} rows, and a layer's input has {leading[0]}")
        route = ROUTE(self.ids[:, None].expand(B, M // B).reshape(-1), self.pool.slots)
        self.routes.append((M, route))
        return route


class RunnerSite(PoolSite):
    """The site of a runner's own module."""

    def __init__(self, site: PoolSite, static: StaticRows):
        super().__init__(site.pool, site.name, site.output)
        self.static = static

    def rows(self) -> StaticRows:
        self.static.seen = True
        return self.static


class Runner:
    """A model with a pool, ready to be called with an adapter for each row by one thread, compiled if wanted.

    Args:
        model: what `peft_kernels.attach_pool` was given.
        compile: arguments for torch.compile, such as `{"fullgraph": True}` or, on a GPU, `{"mode":
            "reduce-overhead"}`, which captures CUDA graphs; None runs eagerly.

    Adapters may be added, replaced and removed meanwhile, and a call keeps the versions that it began with: all that is
    an edit of tables, and nothing is compiled or captured again while the pool's tensors are large enough
    (`pool.reserve`). Weights are shared with the model, and changes of them are seen; changes of its modules are not.

    Raises:
        ValueError: the model has no pool, or a module of it has a forward of its own, such as a compiled one, which a
            copy would share; or a call has not one adapter for each row, or names a prefix.
        RuntimeError: a second thread calls while a call runs, or no served layer ran in a call.
        KeyError: there is no such adapter.

    Example:
        >>> pool = peft_kernels.attach_pool(model, adapters=64)
        >>> pool.load("french", "checkpoints/french")
        >>> runner = peft_kernels.Runner(model, compile={"fullgraph": True})
        >>> logits = runner(input_ids, adapters=["french", None]).logits
        >>> tokens = runner.generate(input_ids, adapters=["french", None], max_new_tokens=20)
    """

    def __init__(self, model: nn.Module, compile: dict | None = None):
        self.pool = pool_of(model)
        own = [name or type(model).__name__ for name, module in model.named_modules() if forward_was_replaced(module)]
        if own:
            raise ValueError(f"Runner: {own[0]} has a forward of its own; make the runner before wrapping it")
        self._rows = StaticRows(self.pool)
        self._busy = threading.Lock()
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self._model = copy.deepcopy(model, shared)
        self._model.__dict__.pop("_compiled_call", None)  # what generate has compiled is bound to the model
        for module in self._model.modules():
            if POOL_SITE in module.__dict__:
                module.pool_site = RunnerSite(module.pool_site, self._rows)
        forward = _forward_of(self._model, self._rows)
        self._model.forward = forward if compile is None else torch.compile(forward, **compile)

    @torch.no_grad()
    def __call__(self, *args, adapters: Sequence[str | None], **kwargs):
        """The model's forward, row i with adapters[i], or None for the base model."""
        with self._rows_of(adapters, expand=1):
            return self._model(*args, **kwargs)

    @torch.no_grad()
    def generate(self, *args, adapters: Sequence[str | None], **kwargs):
        """The model's generate, sequence i with adapters[i]; beams and returned sequences follow their sequence."""
        with self._rows_of(adapters, expansion(kwargs, self._model)):
            return self._model.generate(*args, **kwargs)

    @contextlib.contextmanager
    def _rows_of(self, adapters: Sequence[str | None], expand: int) -> Iterator[None]:
        if isinstance(adapters, str):
            raise TypeError(f"Runner: adapters must be a list with an entry for each row, got {adapters!r}")
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("Runner: it is in a call by another thread; make one runner for each thread")
        try:
            with contextlib.ExitStack() as pins:
                slot_of = {name: pins.enter_context(self.pool.pin(name)) for name in {*adapters} - {None}}
                named = [name for name, slot in slot_of.items() if slot < 0 or name in prefix_names(self._model)]
                if named:
                    raise ValueError(
                        f"Runner: {named[0]!r} is a prefix, and a runner gives rows the adapters of its pool; all rows "
                        "have the prefix that was active when it was made, and peft_kernels.adapter_ids gives each its "
                        "own"
                    )
                self._rows.set([slot_of.get(name, -1) for name in adapters], expand)
                yield
                if not self._rows.seen:
                    raise RuntimeError("Runner: no served layer ran in the call")
        finally:
            self._rows.routes.clear()
            self._busy.release()


def _forward_of(model: nn.Module, rows: StaticRows) -> Callable:
    """A model's forward that leaves no route behind, so that none is an output of a graph."""
    family_forward = type(model).forward

    def forward(*args, **kwargs):
        rows.routes = []
        output = family_forward(model, *args, **kwargs)
        rows.routes = []
        return output

    # torch.compile counts recompilations by code object, and those of other runners are not this one's.
    own = FunctionType(forward.__code__.replace(), globals(), closure=forward.__closure__)
    return functools.update_wrapper(own, model.forward)  # generate reads its signature
