"""transformers' continuous batching with one adapter per request: the engine is theirs, the adapters are a pool's.

The engine packs the tokens of all running requests into one row [1, T] at every step. What is added here is the slot of
each token, in a buffer that keeps its address, since steps may be replays of captured graphs. Requests pin their
adapter's version from the moment that they are added until they have ended. Blocks of the cache are not shared between
requests: transformers knows them by their tokens alone, and keys and values depend on the adapter too.
"""

import contextlib
import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput

from peft_kernels.integrations.rows import Rows, entered
from peft_kernels.integrations.transformers import POOL_SITE
from peft_kernels.ops import AdapterPool

SOURCE = "continuous batching"
CHILD = "__child#"  # what transformers puts between a request's id and the number of a further sequence of it
WAIT_S = 1.0  # how long one look for a result waits


class TokenRows(Rows):
    """The slots of the tokens of one step: ids [T'], of which a step of T tokens has the first T."""

    def __init__(self, pool: AdapterPool, ids: Tensor):
        super().__init__(SOURCE, ids, pool.slots)
        self.pool = pool

    def in_pool(self, pool: AdapterPool) -> "TokenRows":
        if pool is not self.pool:
            raise RuntimeError("continuous batching: the model has layers of another pool")
        return self

    def _flat(self, leading: torch.Size) -> Tensor:
        return self.ids[: leading.numel()]

    def close(self) -> None:
        """Nothing: requests hold the pins."""


class Requests:
    """The slots of the requests that have not ended, and the pins that keep them as they are."""

    def __init__(self, pool: AdapterPool, sequences: int):
        self.pool, self.sequences = pool, sequences  # sequences of one request
        self._lock = threading.Lock()
        self._slots: dict[str, int] = {}
        self._pins: dict[str, contextlib.ExitStack] = {}
        self._left: dict[str, int] = {}

    def begin(self, request_id: str, adapter: str | None) -> None:
        pins = contextlib.ExitStack()
        slot = -1 if adapter is None else pins.enter_context(self.pool.pin(adapter))
        with self._lock:
            self._slots[request_id], self._pins[request_id] = slot, pins
            self._left[request_id] = self.sequences

    def slot(self, request_id: str) -> int:
        return self._slots.get(_parent(request_id), -1)

    def end(self, request_id: str, all_of_it: bool = False) -> None:
        """One of a request's sequences has ended, or all of them."""
        request_id = _parent(request_id)
        with self._lock:
            if request_id not in self._left:
                return
            self._left[request_id] -= self._left[request_id] if all_of_it else 1
            if self._left[request_id]:
                return
            del self._left[request_id], self._slots[request_id]
            pins = self._pins.pop(request_id)
        pins.close()

    def end_all(self) -> None:
        for request_id in list(self._left):
            self.end(request_id, all_of_it=True)


def _parent(request_id: str) -> str:
    return request_id.partition(CHILD)[0]


class EndingRouter(OutputRouter):
    """transformers' router of results, which also lets the adapters of ended requests go."""

    requests: Requests

    def deliver(self, output: GenerationOutput) -> None:
        super().deliver(output)
        if output.is_finished():
            self.requests.end(output.request_id)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        super().deliver_batch(outputs)
        for output in outputs:
            if output.is_finished():
                self.requests.end(output.request_id)


class AdapterBatchingManager(ContinuousBatchingManager):
    """transformers' ContinuousBatchingManager whose requests have adapters; `init_continuous_batching` makes one."""

    requests: Requests
    ids: Tensor | None  # int32 [T'], T' the most tokens of a step
    growths: int  # of the pool, when the graphs that are there were captured

    def add_request(self, input_ids: list[int], request_id: str | None = None, *args, adapter: str | None = None,
                    **kwargs) -> str | None:  # fmt: skip
        """As transformers', with the name of an adapter of the pool, or None for the base model.

        Raises:
            KeyError: there is no such adapter.
        """
        if request_id is None:
            with self._request_lock:
                request_id = f"req_{self._request_counter}"
                self._request_counter += 1
        self.requests.begin(request_id, adapter)
        added = None
        try:
            added = super().add_request(input_ids, request_id, *args, **kwargs)
        finally:
            if added is None:
                self.requests.end(request_id, all_of_it=True)
        return added

    def cancel_request(self, request_id: str) -> None:
        super().cancel_request(request_id)
        self.requests.end(request_id, all_of_it=True)

    def stop(self, *args, **kwargs) -> None:
        super().stop(*args, **kwargs)
        if not self.is_running():
            self.requests.end_all()

    def warmup(self) -> None:
        """Graphs that are captured here take the ids from the same buffer as those that run."""
        if self.batch_processor is None:
            self.batch_processor = self._create_batch_processor()
        with entered(self._rows()):
            super().warmup()

    def _create_batch_processor(self):
        processor = super()._create_batch_processor()
        if self.ids is None:
            tokens = processor.max_batch_tokens
            self.ids = torch.full((tokens,), -1, dtype=torch.int32, device=self.requests.pool.device)
            self.growths = self.requests.pool.growths
        return processor

    def _generation_step(self) -> None:
        buffers = self.batch_processor.inputs_and_outputs
        pairs = getattr(buffers, "io_pairs", None)  # two of them where the next step is prepared while one runs
        step = buffers if pairs is None else pairs[buffers.current_pair].host_io
        slots = [s for r in step.requests_in_batch for s in [self.requests.slot(r.state.request_id)] * r.query_length]
        ids = torch.tensor(slots + [-1] * (step.num_q_tokens - len(slots)), dtype=torch.int32)
        if buffers.compute_stream is None:
            self.ids[: len(ids)].copy_(ids)
        else:
            with torch.cuda.stream(buffers.compute_stream):  # after the step before, which reads the buffer
                self.ids[: len(ids)].copy_(ids.pin_memory(), non_blocking=True)
        if self.growths != self.requests.pool.growths:
            self.growths = self.requests.pool.growths
            for each in (buffers,) if pairs is None else (pair.device_io for pair in pairs):
                each.graphs = type(each.graphs)()  # the pool's tensors lie elsewhere now
        with entered(self._rows()):
            super()._generation_step()

    def _rows(self) -> TokenRows:
        return TokenRows(self.requests.pool, self.ids)


def init_continuous_batching(
    model: nn.Module,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    **kwargs,
) -> AdapterBatchingManager:
    """transformers' `model.init_continuous_batching` for a model with a pool: requests may each have an adapter.

    Args:
        model: what `peft_kernels.attach_pool` was given.
        generation_config, kwargs: as transformers has them.
        continuous_batching_config: as transformers has it, with allow_block_sharing=False.

    Raises:
        ValueError: the model has no pool, or the config lets requests share blocks of the cache.

    Example:
        >>> manager = peft_kernels.init_continuous_batching(model)
        >>> manager.start()
        >>> request = manager.add_request(prompt, adapter="french", max_new_tokens=20)
        >>> print(manager.get_result(request).generated_tokens)
        >>> manager.stop(block=True)
    """
    site = next((m.__dict__[POOL_SITE] for m in model.modules() if POOL_SITE in m.__dict__), None)
    if site is None:
        raise ValueError(
            "init_continuous_batching: the model has no pool; peft_kernels.attach_pool(model) gives it one"
        )
    if continuous_batching_config is None:
        continuous_batching_config = ContinuousBatchingConfig(allow_block_sharing=False)
    if continuous_batching_config.allow_block_sharing:
        raise ValueError(
            "init_continuous_batching: allow_block_sharing must be False; blocks are shared by their tokens alone, and "
            "a request would read keys and values of another one's adapter"
        )
    manager = model.init_continuous_batching(generation_config, continuous_batching_config, **kwargs)
    requests = Requests(site.pool, manager.num_return_sequences)
    manager.__class__, manager.requests, manager.ids = AdapterBatchingManager, requests, None
    manager.output_router.__class__, manager.output_router.requests = EndingRouter, requests
    return manager


@torch.no_grad()
def generate_batch(
    model: nn.Module,
    inputs: Sequence[Sequence[int]],
    adapters: Sequence[str | None],
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    max_new_tokens: int | None = None,
) -> list[GenerationOutput]:
    """Generates for many prompts by continuous batching, each with its own adapter.

    Args:
        model: what `peft_kernels.attach_pool` was given.
        inputs: the tokens of each prompt.
        adapters: for each prompt a name in the pool, or None for the base model.
        generation_config, continuous_batching_config: as in `init_continuous_batching`.
        max_new_tokens: for each prompt; if not given, the generation config's.

    Returns:
        transformers' GenerationOutput of each prompt, in order; where a request failed, its `error` says why.

    Raises:
        ValueError: as `init_continuous_batching`, or there is not one adapter for each prompt.
        KeyError: there is no such adapter.
        RuntimeError: the engine stopped.

    Example:
        >>> outputs = peft_kernels.generate_batch(model, prompts, adapters=["french", None], max_new_tokens=20)
        >>> outputs[0].generated_tokens
    """
    if len(adapters) != len(inputs):
        raise ValueError(f"generate_batch: adapters must have one entry per input ({len(inputs)}), got {len(adapters)}")
    manager = init_continuous_batching(model, generation_config, continuous_batching_config)
    for adapter in {*adapters} - {None}:
        manager.requests.pool.slot(adapter)  # raises where there is none, before anything has started
    manager.warmup()
    manager.start()
    try:
        ids = [
            manager.add_request(list(tokens), adapter=adapter, max_new_tokens=max_new_tokens)
            for tokens, adapter in zip(inputs, adapters, strict=True)
        ]
        found: dict[str | None, GenerationOutput] = {}
        while len(found) < len(ids):
            output = manager.get_result(timeout=WAIT_S)
            if output is not None and output.is_finished():
                found[output.request_id] = output
            elif None in ids or (output is None and not manager.is_running()):
                raise RuntimeError("generate_batch: the engine stopped before all requests had ended")
        return [found[request_id] for request_id in ids]
    finally:
        manager.stop(block=True)
        manager.destroy()
