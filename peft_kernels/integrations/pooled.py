"""A model whose layers take the adapters of a pool: y = base(x), then one in-place call that adds to y.

`attach_pool` gives the model's linear layers and embeddings a subclass whose forward is their own and adds, in place,
what the adapters of the rows say. A linear base may be any nn.Linear, a quantised one too. q, k and v, and gate and up,
of the families in `targets.py` share one call. Rows without adapters, and calls without any, cost nothing.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from weakref import ref

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_kernels.integrations.adapter_folders import about, is_pefts
from peft_kernels.integrations.blocks import CHILD, adapted_class, require_module, sites_of
from peft_kernels.integrations.checkpoints import Source, read_adapter
from peft_kernels.integrations.gathering import intercepted
from peft_kernels.integrations.groups import grouped_class
from peft_kernels.integrations.named import subclass
from peft_kernels.integrations.pool_sites import PoolSite, add_, add_embedded_
from peft_kernels.integrations.pooled_blocks import FORMS, read_bottleneck, require_base, site_name
from peft_kernels.integrations.prefix_positions import CHILD as SHIFTS
from peft_kernels.integrations.prefixes import prefix_names
from peft_kernels.integrations.rows import OUTSIDE, Rows, outside_graph
from peft_kernels.integrations.targets import Group, forward_is_known, group_of
from peft_kernels.integrations.transformers import OWN_FORWARD, POOL_SITE, forward_was_replaced, made_by_fsdp, swap
from peft_kernels.ops import AdapterPool, Site
from peft_kernels.ops.batched_lora.entries import FLOATS, MAX_POOL_RANK

HAS_OWN = "the model has bottleneck adapters of its own, which all rows share; peft_kernels.detach takes them off"
SEQUENCE_FIRST = ("xlnet", "fsmt")


# -- layers -----------------------------------------------------------------------------------------------------------


def _members(family_class: type, add: Callable) -> dict:
    def forward(self, *args, **kwargs):
        site = self.pool_site
        rows = site.rows()
        if rows is OUTSIDE:
            return outside_graph(forward, self, *args, **kwargs)
        y = family_class.forward(self, *args, **kwargs)
        if rows is not None:
            add(rows, args[0] if args else next(iter(kwargs.values())), y, site)
        return y

    return {"forward": forward}


def _add_linear_(rows: Rows, x: Tensor, y: Tensor, site: PoolSite) -> None:
    add_(rows.at_output() if site.output else rows, x, [y], [site])


@functools.cache
def linear_class(family_class: type) -> type:
    """A linear layer of some class, with what the adapters of its place add."""
    return subclass(linear_class, family_class, _members(family_class, _add_linear_))


@functools.cache
def embedding_class(family_class: type) -> type:
    """An embedding of some class, with what the adapters of its place add."""
    return subclass(embedding_class, family_class, _members(family_class, add_embedded_))


def project(owner: nn.Module, x: Tensor) -> list[Tensor] | None:
    """y of each projection of an owner with one call for all of them, or None where each has to see to itself."""
    members = [owner._modules[name] for name in owner.group.projections]
    if any(POOL_SITE not in member.__dict__ or intercepted(member, x) for member in members):
        return None
    sites = [member.pool_site for member in members]
    rows = sites[0].rows()
    if rows is None or rows is OUTSIDE:
        return None
    ys = [type(member).family_class.forward(member, x) for member in members]
    add_(rows, x, ys, sites)
    return ys


@functools.cache
def pooled_group_class(group: Group) -> type:
    """The subclass whose instances add to all projections of one x in one call."""
    return grouped_class("Pooled", group, project)


class PooledBlock(nn.Module):
    """What the bottleneck adapters of rows do to a block: `forward(x, y)`, x its input, y its output, which is changed.

    A child of the block's owner, as `BottleneckAdapters` is, without parameters; a place of its own for each form.
    """

    def __init__(self, pool: AdapterPool, owner: str):
        super().__init__()
        for form in FORMS:
            self.add_module(form, nn.Module())
            self._modules[form].pool_site = PoolSite(pool, site_name(owner, form), output=False)

    @property
    def active_names(self) -> bool:
        """Whether some adapter has ever touched the block."""
        sites = (place.pool_site for place in self._modules.values())
        return any(site.pool.touched(site.name) for site in sites)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for form in FORMS:
            site = self._modules[form].pool_site
            rows = site.rows()
            if rows is OUTSIDE:
                return outside_graph(self.forward, x, y)
            if rows is not None:
                add_(rows, x if form == "parallel" else y, [y], [site])
        return y


def pool_of(model: nn.Module) -> "ModelPool":
    """The pool that a model serves. Raises ValueError if it has none."""
    if (pool := find_pool(model)) is None:
        raise ValueError("the model has no pool; peft_kernels.attach_pool(model) gives it one")
    return pool


def find_pool(model: nn.Module) -> "ModelPool | None":
    """The pool that a model serves, if it has one."""
    return next((module.pool_site.pool for module in model.modules() if POOL_SITE in module.__dict__), None)


# -- a model ----------------------------------------------------------------------------------------------------------


class ModelPool(AdapterPool):
    """The pool of one model, made by `attach_pool`; its sites are the names of the model's layers.

    `left_alone` says, by name, which layers adapters cannot touch, and why.
    """

    def __init__(self, model: nn.Module, sites: dict[str, Site], left_alone: dict[str, str], **kwargs):
        super().__init__(sites, **kwargs)
        self.left_alone = left_alone
        self._model = ref(model)

    @contextlib.contextmanager
    def pin(self, name: str) -> Iterator[int]:
        """As in `AdapterPool`; -1 for a prefix of the model that no adapter in the pool has the name of."""
        model = self._model()
        if model is not None and name in prefix_names(model) and name not in self.names():
            yield -1
            return
        with super().pin(name) as slot:
            yield slot

    def load(
        self, name: str, source: Source, adapter_name: str = "default", replace: bool = False,
        allow_nonfinite: bool = False,
    ) -> int:  # fmt: skip
        """Adds an adapter that HF PEFT has made, or a bottleneck adapter, and returns its slot.

        Args:
            name: as in `add`.
            source: a folder or hub id with adapter_config.json and adapter_model.safetensors; or a PeftModel, and then
                `adapter_name` says which of its adapters.
            replace, allow_nonfinite: as in `add`.

        LoRA, rsLoRA, lora_bias, DoRA, patterns of ranks and alphas; on linear layers, Conv1D, embeddings and lm_head.
        Bottleneck adapters, serial and parallel, that `peft_kernels.save_pretrained` or AdapterHub has written (as in
        `peft_kernels.load`); without a norm of what they read, without a gate, and not of the residual stream.

        Raises:
            ValueError: the adapter is more than that, or does not fit the model; it says where.

        Example:
            >>> pool = peft_kernels.attach_pool(model, adapters=64)
            >>> pool.load("french", "checkpoints/french")
        """
        layers, said = _Layers(self), None if isinstance(source, nn.Module) else about(source)
        if said is None or is_pefts(said):
            found = read_adapter(source, adapter_name, layers, name)
        else:
            found = read_bottleneck(self._model(), source, said, layers, name)
        return self.add(name, found, replace, allow_nonfinite)


class _Layers(Mapping):
    """The layers of a pool's model by their sites. Another name raises, and says why it is none."""

    def __init__(self, pool: ModelPool):
        self._pool, self._model = pool, pool._model()
        if self._model is None:
            raise RuntimeError("AdapterPool: its model is gone")

    def __getitem__(self, site: str) -> nn.Module:
        if reason := self._pool.left_alone.get(site):
            raise ValueError(f"AdapterPool: {site} cannot take adapters: {reason}")
        self._pool.tables(site)  # raises for a name that is no site's, with the nearest that is
        return self._model.get_submodule(site)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pool.sites)

    def __len__(self) -> int:
        return len(self._pool.sites)


def attach_pool(
    model: nn.Module, adapters: int = 256, *, dtype: torch.dtype | None = None, max_rank: int = MAX_POOL_RANK
) -> ModelPool:
    """Lets a model serve many adapters at once, each row of a batch its own; returns the pool that holds them.

    y[i] = base(x)[i] + s_a (x[i] A_a^T) B_a^T,  a the adapter of row i (Chen et al. 2023, arXiv:2310.18547)

    LoRA on layers, and on the FFN and attention blocks of transformers' models bottleneck adapters, which have
    f(x[i] A_a^T + a_a) B_a^T + b_a there, x the block's input (parallel) or its output (serial).

    Args:
        model: a transformers model, or any module with linear layers or embeddings, on one device; without adapters.
        adapters, max_rank: as in `AdapterPool`.
        dtype: what factors are stored in: if not given, the dtype of the model's weights, or float32 where they differ.

    Every linear layer (nn.Linear and its subclasses, Conv1D, lm_head) and nn.Embedding becomes a site; only instances
    change class, and sites that no adapter touches cost nothing. Which rows have which adapter is said by
    `peft_kernels.adapter_ids`, for each call. `peft_kernels.unpatch(model)` gives the plain model back. Towers with an
    input of their own (images, sound) are left alone: the rows of their batches are not those of the ids.

    Raises:
        ValueError: the model has PEFT layers, a pool, or an active head or BitFit adapter, lies on several devices or
            on meta, has no layer to serve, or puts the sequence before the batch inside (XLNet, FSMT).

    Example:
        >>> pool = peft_kernels.attach_pool(model, adapters=64)
        >>> pool.load("french", "checkpoints/french"), pool.load("german", "checkpoints/german")
        >>> with peft_kernels.adapter_ids([0, -1, 1], adapters=["french", "german"]):
        ...     tokens = model.generate(input_ids, max_new_tokens=20)  # the second of the three by the base model
    """
    require_module(model, "attach_pool")
    require_base(model, "attach_pool")
    sites, blocks, swaps, left_alone = _plan(model)
    weight = next(model.parameters())
    if dtype is None:
        dtypes = {p.dtype for p in model.parameters() if p.dtype in FLOATS}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    pool = ModelPool(model, sites, left_alone, adapters=adapters, dtype=dtype, device=weight.device, max_rank=max_rank)
    lm_head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for name in sites.keys() - {site_name(block, form) for block in blocks for form in FORMS}:
        module = model.get_submodule(name)
        module.pool_site = PoolSite(pool, name, output=module is lm_head)
    for block in blocks:
        model.get_submodule(block).add_module(CHILD, PooledBlock(pool, block))
    swap([*swaps.items()])
    return pool


def _plan(model: nn.Module):
    """Sites by name; the owners of blocks; modules and their new classes; and by name what is left alone and why."""
    sites, swaps, left_alone, owned = {}, {}, {}, {}
    if (kind := getattr(getattr(model, "config", None), "model_type", None)) in SEQUENCE_FIRST:
        raise ValueError(f"attach_pool: {kind} puts the sequence before the batch: its rows are not the batch's")
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            raise ValueError(
                f"attach_pool: {name} has PEFT adapters; take them off with model.unload() (and pool.load(name, "
                "peft_model) before that), or use them where they are with peft_kernels.patch(model)"
            )
        if POOL_SITE in module.__dict__:
            raise ValueError("attach_pool: the model has a pool; peft_kernels.unpatch(model) takes it off")
        if reason := _keeps_inside(module, model):
            owned |= {f"{name}.{child}" if name else child: reason for child, _ in module.named_modules()}
        site = _site(module)
        if site is None:
            group = group_of(type(module))
            if group and forward_is_known(group, type(module)) and not _obstacle(module):
                swaps[module] = pooled_group_class(group)
        elif reason := owned.get(name) or _obstacle(module):
            left_alone[name] = reason
        else:
            sites[name] = site
            make = embedding_class if isinstance(module, nn.Embedding) else linear_class
            swaps[module] = make(type(module))
    if not sites:
        raise ValueError("attach_pool: the model has no linear layer and no embedding that could take adapters")
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise ValueError(f"attach_pool: the model must lie on one device, got {', '.join(sorted(devices))}")
    blocks, own = [], any(CHILD in module._modules for module in model.modules())
    for block in sites_of(model) if isinstance(model, PreTrainedModel) else ():
        owner, places = model.get_submodule(block.name), [site_name(block.name, form) for form in FORMS]
        if reason := HAS_OWN if own else owned.get(block.name) or _obstacle(owner):
            left_alone |= dict.fromkeys(places, reason)
        else:
            blocks.append(block.name)
            sites |= dict.fromkeys(places, Site(block.width, block.width))
            swaps[owner] = adapted_class(block.block, swaps.get(owner, type(owner)))
    return sites, blocks, swaps, left_alone


def _keeps_inside(module: nn.Module, model: nn.Module) -> str:
    """Why no layer inside a module can take adapters, or nothing."""
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weights itself"
    parts = isinstance(module, PreTrainedModel) and isinstance(model, PreTrainedModel)
    if parts and type(module.config) not in (type(model.config), type(model.config.get_text_config())):
        return f"{type(module).__name__} has an input of its own, whose rows are not those of the ids"
    return ""


def _site(module: nn.Module) -> Site | None:
    if isinstance(module, nn.Linear):
        return Site(module.in_features, module.out_features)
    if isinstance(module, Conv1D):
        return Site(*module.weight.shape)
    if isinstance(module, nn.Embedding):
        return Site(module.num_embeddings, module.embedding_dim)
    return None


def _obstacle(module: nn.Module) -> str:
    """Why a module cannot change class, or nothing."""
    if made_by_fsdp(module):
        return "its class was made by FSDP"
    if is_parametrized(module):
        return "its class was made by torch.nn.utils.parametrize"
    if SHIFTS in module._modules:
        return "a prefix shifts its positions"
    return OWN_FORWARD if forward_was_replaced(module) else ""
