"""A step of transformers' continuous batching whose requests have prefixes: the tokens of all requests are packed into
one row [1, T], behind each other, and so are the keys that its paged cache gives for them.

A model with prefixes keeps its own attention function (`attending.py`), of which the engine does not know.
"""

import contextlib
import inspect
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from peft_kernels.integrations.rows import Rows


class PackedRows(Rows):
    """The prefixes of the requests of one step: ids [requests] into `adapters`, -1 where a request has the active one.

    lengths [requests]: how many tokens of each are in the step.
    """

    others_active = True

    def __init__(self, names: Sequence[str | None], lengths: Sequence[int], device: torch.device):
        self.adapters = tuple(dict.fromkeys(name for name in names if name is not None))
        ids = [-1 if name is None else self.adapters.index(name) for name in names]
        super().__init__("continuous batching", torch.tensor(ids, dtype=torch.int32, device=device), len(self.adapters))
        self.lengths = torch.tensor(lengths, device=device)

    def of_sequences(self, count: int) -> Tensor:
        return self.ids

    def of_tokens(self) -> Tensor:
        """The id of each token [T]."""
        return self.ids.repeat_interleave(self.lengths)

    def look(self, present) -> None:
        """Nothing: requests are refused where no attention has their prefix."""


MANAGERS = weakref.WeakSet()  # of continuous batching with adapters

_STEP: ContextVar[PackedRows | None] = ContextVar("peft_kernels_packed_rows", default=None)


@contextlib.contextmanager
def packed(rows: PackedRows) -> Iterator[None]:
    """Inside is a step of the engine."""
    token = _STEP.set(rows)
    try:
        yield
    finally:
        _STEP.reset(token)


def packed_rows() -> PackedRows | None:
    """The prefixes of the step that this thread runs, None outside of one."""
    return None if is_compiling() else _STEP.get()


def require_own_attention(model: nn.Module) -> None:
    """Raises ValueError where an engine has given the model another attention, and will take it away again."""
    switched = any(m.model is model and m._original_attn_impl is not None for m in list(MANAGERS))
    if switched or model.config._attn_implementation.startswith("paged|"):
        raise ValueError(
            f"attach: the attention is {model.config._attn_implementation!r}, which continuous batching has set: stop "
            "its manager, or set_attn_implementation, before a prefix comes in"
        )


def from_paged_cache(
    module: nn.Module, cache, key: Tensor, value: Tensor, sliding_window: int | None, step: dict
) -> tuple[Tensor, Tensor, dict]:
    """Puts keys and values [1, Hkv, T, D] of a step into the cache; gives those of all its tokens, and of the tokens
    before that they see, and what the op is told of where requests begin and end. `step` is what the engine says."""
    given = {"key_states": key, "value_states": value, "layer_idx": module.layer_idx}
    if "kwargs" in inspect.signature(cache.update).parameters:
        key, value = cache.update(**given, kwargs=step)
        ends = step["cu_seq_lens_k"]
    else:  # transformers below 5.23
        key, value = cache.update(**given, read_index=step["read_index"], write_index=step["write_index"])
        key, value = (t.transpose(0, 1)[None] for t in (key, value))
        ends = step["cu_seq_lens_k"]
        ends = ends["sliding_attention" if sliding_window else "full_attention"] if isinstance(ends, dict) else ends
    where = {"cu_seqlens_q": step["cu_seq_lens_q"].int(), "cu_seqlens_k": ends.int()}
    return key, value, where | {"sliding_window": sliding_window or 0}
