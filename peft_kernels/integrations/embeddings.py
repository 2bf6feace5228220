"""LoRA on a table of embeddings: y = base(ids) + c sum over the active adapters of s A[:, ids]^T B^T, in one op call.

The base layer is called as a module, once. c is what it multiplies its rows by, where it does (`embed_scale`: Gemma,
BART); PEFT multiplies the adapters' part by it too. A Python number goes into s. A tensor goes into B [N, R], and no
device is waited for: the number that transformers keeps beside it is another one once the model was cast to 16 bits and
back. lora_dropout drops nothing here, in PEFT neither.

What the table holds is its own affair (4 bits, a parametrization): only its rows are seen. Where they are none that the
op takes (of another dtype, without all dimensions of ids), the op is given zeros, and its output is added to them.
"""

import torch
from peft.tuners.lora import Embedding, variants
from torch import Tensor, nn

from peft_kernels.integrations.gathering import (
    DTYPES,
    PLAIN,
    UNMERGES,
    WITHOUT_KERNEL,
    Call,
    add_factors,
    tensor_of,
)
from peft_kernels.integrations.peft import add_active, forward_over_base

LORA_EMBEDDING = torch.ops.peft_kernels.lora_embedding.default
MIXED = "rows with adapters of their own on an embedding"
NO_DROPOUT = nn.Identity()


def unfit_table(base: nn.Module, x: Tensor) -> str:
    """Why adapters on a table of embeddings can be in no call, or nothing. x: on the device of the call."""
    if reason := WITHOUT_KERNEL["lora_embedding"].get(x.device.type):
        return reason
    if base.max_norm is not None:
        return "max_norm of the base layer, which PEFT applies to lora_embedding_A as well"
    if base.scale_grad_by_freq or base.sparse:
        return f"{'sparse' if base.sparse else 'scale_grad_by_freq'} gradients, as the base layer says"
    scale = getattr(base, "embed_scale", None)
    return "embed_scale of the base layer is not one number" if isinstance(scale, Tensor) and scale.numel() != 1 else ""


def add_table(call: Call, layer: Embedding, x: Tensor, types=PLAIN) -> str:
    """Adds the active adapters of a layer to a call without projections; returns why that cannot be, or nothing."""
    if reason := unfit_table(layer.get_base_layer(), x):
        return reason
    if layer._disable_adapters or layer.merged_adapters:
        return UNMERGES if layer._disable_adapters and layer.merged_adapters else ""
    return add_active(call, layer, layer._modules["lora_embedding_A"], (), _add_adapter, x, types)


def _add_adapter(call: Call, layer: Embedding, name: str, x: Tensor, types) -> str:
    kind = type(layer.lora_variant.get(name))
    if kind not in (type(None), variants.MiCAEmbeddingVariant):
        return kind.__name__.removesuffix("EmbeddingVariant") + " changes the maths"
    if layer.input_fns.get(name) is not None or layer.output_fns.get(name) is not None:
        return "tensor parallel: PEFT changes ids and rows"
    base, modules = layer.get_base_layer(), layer._modules
    a, b = (tensor_of(modules[factor], name) for factor in ("lora_embedding_A", "lora_embedding_B"))
    if reason := add_factors(call, base, NO_DROPOUT, a, b, None, layer.r[name], layer.scaling[name], a, types):
        return reason
    if a.device != x.device:
        return f"x is on {x.device} and lora_embedding_A on {a.device}"
    if a.dim() != 2 or b.dim() != 2:
        return "lora_embedding_A or B is flattened: its shards are not gathered"
    if a.shape[1] != call.lora_A[0].shape[1]:
        return "tables of several sizes in one call"
    if a.shape[1] < (rows := _rows(base)):
        return f"lora_embedding_A has {a.shape[1]} columns and the table {rows} rows"
    if base.padding_idx is not None and not 0 <= base.padding_idx < a.shape[1]:
        return f"padding_idx {base.padding_idx} of the base layer"
    return ""


def _rows(base: nn.Module) -> int:
    """How many ids a table takes. A packed weight does not say; Idefics' have a second table for the last ids."""
    weight = tensor_of(base, "weight")
    has_rows = weight is not None and weight.shape[1:] == (base.embedding_dim,)
    return (weight.shape[0] if has_rows else base.num_embeddings) + getattr(base, "num_additional_embeddings", 0)


def _run(call: Call, layer: Embedding, x: Tensor) -> Tensor:
    y, base = layer._modules["base_layer"](x), layer.get_base_layer()
    scale, lora_B, scaling = getattr(base, "embed_scale", None), call.lora_B, call.scaling
    if isinstance(scale, Tensor):
        lora_B = [b * scale.reshape(()).to(b.dtype) for b in lora_B]
    elif isinstance(scale, int | float):
        scaling = [s * scale for s in scaling]
    arguments = x, call.lora_A, lora_B, scaling, base.padding_idx
    shape, dtype = (*x.shape, lora_B[0].shape[0]), lora_B[0].dtype
    if type(y) in PLAIN and y.shape == shape and (y.dtype, dtype) in DTYPES:
        return LORA_EMBEDDING(y, *arguments)[0]
    return (y + LORA_EMBEDDING(x.new_zeros(shape, dtype=dtype), *arguments)[0]).to(y.dtype)


class FusedEmbedding(Embedding):
    """`peft.tuners.lora.Embedding` whose adapters are one op on its base layer's output."""

    asks_for_rows = True
    forward = forward_over_base(Embedding, add_table, _run, MIXED)
