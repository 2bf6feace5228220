"""transformers' continuous batching with one adapter per request: the engine is theirs, the adapters are a pool's, or
the prefixes of the model.

The engine packs the tokens of all running requests into one row [1, T] at every step. What is added here is the slot of
each token, in a buffer that keeps its address, since steps may be replays of captured graphs. Requests pin their
adapter's version from the moment that they are added until they have ended. Blocks of the cache are not shared between
requests: transformers knows them by their tokens alone, and keys and values depend on the adapter too. Prefixes are
said anew to each step, with the number of its requests, so none of its parts may be compiled or captured.
"""

import contextlib
from collections.abc import Callable, Sequence, Set

import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import GenerationOutput

from peft_kernels.integrations.attachments import root_of
from peft_kernels.integrations.packed import MANAGERS, PackedRows, packed
from peft_kernels.integrations.pooled import find_pool, pool_of
from peft_kernels.integrations.prefixes import prefix_names, prefixes_in
from peft_kernels.integrations.requests import CHILD, Requests
from peft_kernels.integrations.rows import Rows, entered
from peft_kernels.ops import AdapterPool

ROUTE = torch.ops.peft_kernels.batched_lora_route.default
WAIT_S = 1.0  # how long one look for a result waits


class TokenRows(Rows):
    """The slots of the tokens of one forward: ids [T'], of which a forward of T tokens has the first T."""

    one_forward = True

    def __init__(self, pool: AdapterPool, ids: Tensor, kept: Tensor | None):
        super().__init__("continuous batching", ids, pool.slots)
        self.pool = pool
        self.kept = kept  # places of the tokens whose logits are wanted, where the model gives its lm_head no others

    def in_pool(self, pool: AdapterPool) -> "TokenRows":
        if pool is not self.pool:
            raise RuntimeError("continuous batching: the model has layers of another pool")
        return self

    def at_output(self) -> Rows:
        return self if self.kept is None else KeptRows(self.pool, self.ids, self.kept)

    def make_route(self, leading: torch.Size, device: torch.device) -> Tensor:
        return ROUTE(self._flat(leading), self.count)  # slots are never out of range

    def _flat(self, leading: torch.Size) -> Tensor:
        return self.ids[: leading.numel()]

    def close(self) -> None:
        """Nothing: requests hold the pins."""


class KeptRows(TokenRows):
    """The slots of the tokens that the lm_head is given."""

    def _flat(self, leading: torch.Size) -> Tensor:
        return self.ids[self.kept[: leading.numel()].long()]


class AdapterBatchingManager(ContinuousBatchingManager):
    """transformers' ContinuousBatchingManager whose requests have adapters; `init_continuous_batching` makes one."""

    requests: Requests
    ids: Tensor | None  # int32 [T'], T' the most tokens of a step
    kept: Tensor  # int32, as many as a step has requests at most
    growths: int  # of the pool, when the graphs that are there were captured
    has_prefixes: bool
    packed: PackedRows | None  # the prefixes of the step, in a model that has some

    def __init__(self, *args, requests: Requests, **kwargs):
        self.requests, self.has_prefixes = requests, bool(requests.prefixes)
        self.ids, self.packed = None, None
        super().__init__(*args, **kwargs)
        MANAGERS.add(self)

    def switch_to_cb_friendly_attn(self, *args, **kwargs) -> None:
        """As transformers', but for a model with prefixes: its attention knows the engine's steps, and stays."""
        if not self.has_prefixes:
            super().switch_to_cb_friendly_attn(*args, **kwargs)

    def add_request(self, input_ids: list[int], request_id: str | None = None, *args, adapter: str | None = None,
                    **kwargs) -> str | None:  # fmt: skip
        """As transformers', with the name of an adapter of the pool or of a prefix, or None for neither. A request
        without a prefix of its own has the active one, if one is. A prefix must stay until its requests have ended:
        without it the engine ends, and with that all requests.

        Raises:
            KeyError: there is no such adapter.
            ValueError: the request_id is taken.
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
                self.requests.end(request_id)
        return added

    def cancel_request(self, request_id: str) -> None:
        for i in range(self.num_return_sequences - 1):
            super().cancel_request(f"{request_id}{CHILD}{i}")
        super().cancel_request(request_id)
        self.requests.cancel(request_id)

    def stop(self, *args, **kwargs) -> None:
        super().stop(*args, **kwargs)
        if not self.is_running():
            self.requests.end()
            if self._original_attn_impl is not None:  # it had not started, and then theirs leaves this
                self.model.set_attn_implementation(self._original_attn_impl)
                self._original_attn_impl = None

    def _create_batch_processor(self):
        processor = super()._create_batch_processor()
        if self.ids is None and self.requests.pool is not None:
            device = self.requests.pool.device
            self.ids = torch.full((processor.max_batch_tokens,), -1, dtype=torch.int32, device=device)
            self.kept = torch.zeros(processor.scheduler.max_requests_per_batch, dtype=torch.int32, device=device)
            self.growths = self.requests.pool.growths
        runner = processor.model_runner
        for name in ("_forward_process_and_sample", "_compiled_varlen", "_compiled_decode"):
            forward = getattr(runner, name)
            if forward is not None and not hasattr(forward, "with_rows"):
                setattr(runner, name, self._with_rows(forward))
        return processor

    def _with_rows(self, forward: Callable) -> Callable:
        """A forward of the engine, each time with a route of its own: those that are captured must hold theirs."""

        def run(model, *args):
            with contextlib.ExitStack() as step:
                if self.requests.pool is not None:
                    keeps = self.batch_processor.model_runner.supports_logits_to_keep(self.model)
                    kept = self.kept if keeps else None
                    step.enter_context(entered(TokenRows(self.requests.pool, self.ids, kept)))
                if self.packed is not None:
                    step.enter_context(packed(self.packed))
                return forward(model, *args)

        run.with_rows = True
        return run

    def _run_generation_loop(self) -> None:
        try:
            super()._run_generation_loop()
        finally:
            self.requests.end()

    def _generation_loop_body(self, processor, *args, **kwargs) -> bool:
        if not processor.has_pending_requests():
            self.requests.let_go([])  # the last ones have ended, and there may be no step to come
        return super()._generation_loop_body(processor, *args, **kwargs)

    def _generation_step(self) -> None:
        processor = self.batch_processor
        buffers, scheduler = processor.inputs_and_outputs, processor.scheduler
        forked = (state.request_id for state in scheduler._requests_to_fork)
        pairs = getattr(buffers, "io_pairs", None)  # two of them where the next step is prepared while one runs
        step = buffers if pairs is None else pairs[buffers.current_pair].host_io
        batch = [r.state.request_id for r in step.requests_in_batch]
        self.requests.let_go([*scheduler.active_requests, *scheduler.waiting_requests, *forked, *batch])
        if self.has_prefixes:
            if not self.requests.prefixes:  # the model attends as it did before, which needs masks that nobody makes
                raise RuntimeError("continuous batching: the engine ends, as the last prefix was taken off")
            lengths = [r.query_length for r in step.requests_in_batch]
            self.packed = PackedRows([self.requests.prefix(i) for i in batch], lengths, self.model.device)
        if self.requests.pool is not None:
            self._write_slots(step, buffers, pairs)
        super()._generation_step()

    def _write_slots(self, step, buffers, pairs) -> None:
        slots = [s for r in step.requests_in_batch for s in [self.requests.slot(r.state.request_id)] * r.query_length]
        ids = torch.tensor(slots + [-1] * (step.num_q_tokens - len(slots)), dtype=torch.int32)
        on_gpu = buffers.compute_stream is not None
        with torch.cuda.stream(buffers.compute_stream) if on_gpu else contextlib.nullcontext():
            # In the step's own stream: after the step before, which reads the buffers, and after what the pool wrote.
            self.requests.pool.wait_for_writes()
            self.ids[: len(ids)].copy_(ids.pin_memory() if on_gpu else ids, non_blocking=True)
            self.kept.copy_(step.logits_indices, non_blocking=True)
        if self.growths != self.requests.pool.growths:
            self.growths = self.requests.pool.growths
            for each in (buffers,) if pairs is None else (pair.device_io for pair in pairs):
                each.graphs = type(each.graphs)()  # the pool's tensors lie elsewhere now


def init_continuous_batching(
    model: nn.Module,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    **kwargs,
) -> AdapterBatchingManager:
    """transformers' `model.init_continuous_batching` for a model with a pool, with prefixes, or with both: requests may
    each have an adapter.

    Args:
        model: what `peft_kernels.attach_pool`, or `peft_kernels.attach` with a prefix, was given.
        generation_config, kwargs: as transformers has them.
        continuous_batching_config: as transformers has it, with allow_block_sharing=False; with prefixes, without
            CUDA graphs, compiled steps and asynchronous batching.

    Raises:
        ValueError: the model has neither, its prefixes join in differently, or the config lets requests share blocks
            of the cache, or asks for what prefixes do not go with; or the model keeps a manager from before its pool
            or its first prefix.

    Example:
        >>> manager = peft_kernels.init_continuous_batching(model)
        >>> manager.start()
        >>> request = manager.add_request(prompt, adapter="french", max_new_tokens=20)
        >>> print(manager.get_result(request).generated_tokens)
        >>> manager.stop(block=True)
    """
    root = root_of(model)
    prefixes = prefix_names(root)
    pool = find_pool(model) if prefixes else pool_of(model)
    _require_one_composition(root)
    cached = getattr(root, "_cached_continuous_batching_manager", None)
    if cached is not None and not _serves(cached, pool, prefixes):
        raise ValueError(
            "init_continuous_batching: the model keeps a manager that does not know its adapters of now; "
            "model.destroy_cached_continuous_batching_manager() lets it go"
        )
    if continuous_batching_config is None:
        continuous_batching_config = ContinuousBatchingConfig(allow_block_sharing=False)
    if continuous_batching_config.allow_block_sharing:
        raise ValueError(
            "init_continuous_batching: allow_block_sharing must be False; blocks are shared by their tokens alone, and "
            "a request would read keys and values of another one's adapter"
        )
    if cached is not None:
        return root.init_continuous_batching()  # which may have to switch the attention again
    generation_config = generation_config or root.generation_config
    if generation_config.eos_token_id is None:
        generation_config.eos_token_id = -1  # as transformers does: none
    requests = Requests(pool, prefixes, [places for _, places in prefixes_in(root)])
    manager = AdapterBatchingManager(root, generation_config, continuous_batching_config, requests=requests, **kwargs)
    if prefixes:
        _require_plain_steps(manager.continuous_batching_config)
    return manager


def _serves(manager: ContinuousBatchingManager, pool: AdapterPool | None, prefixes: Set[str]) -> bool:
    if not isinstance(manager, AdapterBatchingManager) or manager.requests.pool is not pool:
        return False
    return manager.requests.prefixes is prefixes or not (prefixes or manager.has_prefixes)


def _require_one_composition(root: nn.Module) -> None:
    found = {prefix.composition: name for _, prefixes in prefixes_in(root) for name, prefix in prefixes.items()}
    if len(found) > 1:
        raise ValueError(
            "init_continuous_batching: the prefixes of a model must have one composition, as requests share a step; "
            + ", ".join(f"{name!r} has {composition!r}" for composition, name in found.items())
        )


def _require_plain_steps(config: ContinuousBatchingConfig) -> None:
    asked = {
        "use_cuda_graph": any(config.cuda_graph_booleans),
        "varlen_compile_config": config.varlen_compile_config is not None,
        "decode_compile_config": config.decode_compile_config is not None,
        "use_async_batching": config.use_async_batching,
    }
    if wrong := [name for name, is_asked in asked.items() if is_asked]:
        raise ValueError(
            f"init_continuous_batching: {', '.join(wrong)} must be left out in a model with prefixes: which requests, "
            "and how many, have which is said anew to each step, and neither a graph nor a compiled step is told"
        )


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
        model: as in `init_continuous_batching`.
        inputs: the tokens of each prompt.
        adapters: for each prompt the name of an adapter of the pool or of a prefix, or None for neither. One without a
            prefix of its own has the active one, if one is: `set_active(model, [])` before, and it has none.
        generation_config, continuous_batching_config: as in `init_continuous_batching`.
        max_new_tokens: for each prompt; if not given, the generation config's.

    Returns:
        transformers' GenerationOutput of each prompt, in order; where a request failed, its `error` says why.

    Raises:
        ValueError: as `init_continuous_batching`, or there is not one adapter for each prompt, or the config asks for
            several sequences of a prompt, for which there is the manager.
        TypeError: inputs are no lists of token ids.
        KeyError: there is no such adapter.
        RuntimeError: the engine stopped.

    Example:
        >>> outputs = peft_kernels.generate_batch(model, prompts, adapters=["french", None], max_new_tokens=20)
        >>> outputs[0].generated_tokens
    """
    inputs = _prompts(inputs)
    if isinstance(adapters, str) or len(adapters) != len(inputs):
        raise ValueError(f"generate_batch: adapters must have one entry per input ({len(inputs)}), got {adapters!r}")
    sequences = getattr(generation_config or model.generation_config, "num_return_sequences", None) or 1
    if sequences > 1:
        raise ValueError(f"generate_batch: num_return_sequences must be 1, got {sequences}")
    with torch.inference_mode(False), torch.no_grad():  # the engine's thread writes to what is made here
        manager = init_continuous_batching(model, generation_config, continuous_batching_config)
        try:
            for adapter in adapters:
                manager.requests.require(adapter)  # before anything has started
            return _generate(manager, inputs, adapters, max_new_tokens)
        finally:
            manager.stop(block=True)
            manager.destroy()


def _prompts(inputs: Sequence[Sequence[int]]) -> list[list[int]]:
    """The tokens of each prompt; a tensor's rows are prompts too."""
    remedy = "must be a list with the token ids of each prompt, as in tokenizer(prompts)['input_ids']"
    if isinstance(inputs, str) or not isinstance(inputs, Sequence | Tensor):
        raise TypeError(f"generate_batch: inputs {remedy}, got a {type(inputs).__name__}")
    prompts = [tokens.tolist() if isinstance(tokens, Tensor) else tokens for tokens in inputs]
    for i, tokens in enumerate(prompts):
        if not isinstance(tokens, Sequence) or not all(isinstance(token, int) for token in tokens):
            raise TypeError(f"generate_batch: inputs {remedy}, got {inputs[i]!r} in place {i}")
    return [list(tokens) for tokens in prompts]


def _generate(
    manager: AdapterBatchingManager,
    inputs: Sequence[Sequence[int]],
    adapters: Sequence[str | None],
    max_new_tokens: int | None,
) -> list[GenerationOutput]:
    manager.warmup()
    manager.start()
    ids = [
        manager.add_request(tokens, adapter=adapter, max_new_tokens=max_new_tokens)
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
