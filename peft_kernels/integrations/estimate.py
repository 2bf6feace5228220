"""What N adapters of a model cost, before anything is loaded: memory in an AdapterPool, and what a decode step reads.

The model is built on the meta device from its config.json. Sites: the S linear layers K -> N that PEFT adapts. For
one adapter of rank R, summed over the sites:

    trainable parameters   R (K + N)                          as PEFT reports them
    bytes in a pool        ceil(R / 8) 8 (K + N) itemsize     pages of 8 rank rows, and a row of each site's table
    bytes read by a step   R (K + N) itemsize                 true ranks: the rest of a page is not read

A step of a decode batch reads every weight once (of a table that is only looked up, a row per row of the batch) and
each adapter once that some row has. Where bytes are the limit, what it reads with adapters over what it reads without
is the price. The KV cache is left out, so the price is the most; every expert, and an encoder, count as read.
"""

import math
import re
import warnings
from collections import Counter
from dataclasses import dataclass

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Embedding, Linear, LoraLayer
from torch import nn

from peft_kernels.integrations.gathering import MAX_RANK
from peft_kernels.ops import Site
from peft_kernels.ops.batched_lora.entries import MAX_POOL_RANK
from peft_kernels.ops.batched_lora.pages import PageStore, SiteTable

_META = torch.device("meta")
_AUTO = (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM, transformers.AutoModel)


@dataclass(frozen=True)
class Question:
    """`adapters` of one rank in the pool, `distinct` of them in a decode batch of `rows` rows."""

    adapters: int
    rank: int
    target_modules: str | tuple[str, ...] = "all-linear"  # as in PEFT's LoraConfig
    dtype: torch.dtype = torch.bfloat16  # of the base
    adapter_dtype: torch.dtype | None = None  # None: the base's
    rows: int = 32
    distinct: int | None = None  # None: as many as there can be


@dataclass(frozen=True)
class SiteKind:
    """Sites that differ only in the numbers in their names."""

    name: str  # with "*" in place of the numbers
    count: int
    K: int
    N: int


@dataclass(frozen=True)
class Estimate:
    """The answer. Bytes unless the name says otherwise."""

    sites: tuple[SiteKind, ...]
    base_parameters: int
    base: int
    adapter_parameters: int  # trainable ones of one adapter
    adapter: int  # its pages and its rows of the tables
    pool: int  # all adapters: pages in use, and the tables with their one slot more
    pool_at_most: int  # while pages are spare: they are doubled when they run out
    step_base: int  # read by one decode step
    step_adapters: int  # read beside it for the distinct adapters
    distinct: int
    token_base: float  # of a step, for each of its rows
    token: float
    price: float  # with adapters over without, where bytes are the limit
    notes: tuple[str, ...]


def model_on_meta(name: str) -> nn.Module:
    """The model that a folder's or a model id's config.json describes, without weights.

    Raises:
        ValueError: it cannot be read, or describes no model of this transformers.
    """
    config = _config(name)
    named = (getattr(transformers, kind, None) for kind in config.architectures or ())
    make = next((kind for kind in named if kind is not None), None)
    if make is None:
        auto = next((auto for auto in _AUTO if type(config) in auto._model_mapping), None)
        _require(auto is not None, f"transformers {transformers.__version__} has no model for a {config.model_type}")
        make = auto.from_config
    with _META:
        return make(config)


def _config(name: str) -> transformers.PretrainedConfig:
    try:  # what is there already needs no network
        return transformers.AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError):
        pass
    try:
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise ValueError(
            f"estimate: MODEL must be a folder with a config.json, or a model id of the Hugging Face Hub that is in "
            f"its cache or can be fetched; '{name}' is not: {reason}"
        ) from None


def estimate(model: nn.Module, question: Question) -> Estimate:
    """What the adapters of a question cost on a model, which is given LoRA layers on the meta device by this.

    Raises:
        ValueError: a number is out of range, PEFT finds no target, or none that a pool holds.
    """
    q, distinct = question, distinct_of(question)
    _require(1 <= q.rank <= MAX_POOL_RANK, f"rank must be from 1 to {MAX_POOL_RANK}, got {q.rank}")
    size, dtype = q.dtype.itemsize, q.adapter_dtype or q.dtype
    parameters, read = sum(p.numel() for p in model.parameters()), size * read_by_a_step(model, q.rows)
    quantised = getattr(getattr(model, "config", None), "quantization_config", None) is not None
    notes = ("the checkpoint is quantised, and counted here as if it were not",) if quantised else ()
    if q.rank > MAX_RANK:
        notes += (f"a pool serves rank {q.rank}; training with it is left to PEFT's own forward above {MAX_RANK}",)
    sites, trainable, left_out = _adapted(model, q)
    pages = sum(_pages(width, q.rank, dtype) for site, _ in sites.values() for width in (site.K, site.N))
    row, table = (len(sites) * _table(slots, q.rank, dtype) for slots in (1, q.adapters + 1))
    columns = sum((1 if looked_up else site.K) + site.N for site, looked_up in sites.values())
    adapters = distinct * dtype.itemsize * q.rank * columns
    return Estimate(
        sites=_kinds(sites),
        base_parameters=parameters,
        base=size * parameters,
        adapter_parameters=trainable,
        adapter=pages + row,
        pool=q.adapters * pages + table,
        pool_at_most=2 * q.adapters * pages + table,
        step_base=read,
        step_adapters=adapters,
        distinct=distinct,
        token_base=read / q.rows,
        token=(read + adapters) / q.rows,
        price=(read + adapters) / read,
        notes=notes + left_out,
    )


def distinct_of(q: Question) -> int:
    """How many adapters a decode batch has. Raises ValueError where a count is out of range."""
    most = min(q.rows, q.adapters)
    distinct = most if q.distinct is None else q.distinct
    _require(most >= 1, f"adapters and rows must be 1 or more, got {q.adapters} and {q.rows}")
    _require(0 <= distinct <= most, f"distinct must be from 0 to {most}, the rows and the adapters, got {distinct}")
    return distinct


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise ValueError(f"estimate: {text}")


def read_by_a_step(model: nn.Module, rows: int) -> int:
    """Parameters that a step reads: of an embedding that is not an output layer too, a row per row of the batch."""
    tables = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters(False)}
    others = (m for m in model.modules() if not isinstance(m, nn.Embedding))
    whole = {p for module in others for p in module.parameters(False)}
    return sum(p.numel() for p in whole) + sum(min(rows, len(p)) * math.prod(p.shape[1:]) for p in tables - whole)


def _adapted(model: nn.Module, q: Question) -> tuple[dict[str, tuple[Site, bool]], int, tuple[str, ...]]:
    """The sites by name, each with whether a row reads one column of its A (an embedding) or all; the trainable
    parameters of an adapter; and a note on each kind of target that is no site."""
    targets = q.target_modules if isinstance(q.target_modules, str) else list(q.target_modules)
    config = LoraConfig(r=q.rank, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out of Conv1D, which PEFT sets right itself
        adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    sites = {
        n: (Site(m.in_features, m.out_features), type(m) is Embedding)
        for n, m in layers.items()
        if type(m) in (Linear, Embedding)
    }
    others = Counter((pattern(n), type(m).__name__) for n, m in layers.items() if n not in sites)
    _require(bool(sites), f"none of {q.target_modules} is a linear layer or an embedding")
    left_out = tuple(
        f"{name} ({count}): a pool holds no {kind}; counted in the trainable parameters only"
        for (name, kind), count in others.items()
    )
    return sites, adapted.get_nb_trainable_parameters()[0], left_out


def _kinds(sites: dict[str, tuple[Site, bool]]) -> tuple[SiteKind, ...]:
    counts = Counter((pattern(name), site.K, site.N) for name, (site, _) in sites.items())
    return tuple(SiteKind(name, count, K, N) for (name, K, N), count in counts.items())


def pattern(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _pages(width: int, rank: int, dtype: torch.dtype) -> int:
    """Bytes of the pages that a factor takes, by the pool's own storage."""
    store = PageStore(width, dtype, _META)
    store.take(rank)
    return store.pages.nbytes


def _table(slots: int, rank: int, dtype: torch.dtype) -> int:
    """Bytes of what the slots have at a site, likewise."""
    table = SiteTable(slots, torch.float64 if dtype is torch.float64 else torch.float32, _META)
    table.reserve(rank)
    return sum(tensor.nbytes for tensor in table.tensors)
