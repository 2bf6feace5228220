"""Methods beside LoRA whose layers add a low-rank product too, in the same op call.

AdaLoRA (arXiv:2303.10512): y = x W^T + b + s / r (drop(x) (A * e)^T) B^T, with a singular value e of each rank.
VeRA (arXiv:2310.11454):    y = x W^T + b + lambda_b * ((lambda_d * (drop(x) A^T)) B^T), A and B frozen and shared.

What is scaled by rank or by output is folded into a factor, by autograd: e into the smaller one, both of VeRA's vectors
into B, so that its A needs neither a gradient nor x for one.
"""

import functools
from collections.abc import Callable

from peft.tuners import vera
from peft.tuners.adalora import AdaLoraLayer, SVDLinear
from peft.tuners.lora import Embedding, Linear
from torch import Tensor

from peft_kernels.integrations.embeddings import FusedEmbedding, add_table
from peft_kernels.integrations.gathering import Call, add_factors, describe_type, fold
from peft_kernels.integrations.peft import FusedLinear, add_layer, adding, fused_forward


def add_svd(call: Call, layer: AdaLoraLayer, name: str, x: Tensor, types) -> str:
    """Adds an AdaLoRA adapter to the call's last projection; returns why it cannot be added, or nothing."""
    modules = layer._modules
    a, b, e, r = (modules[f]._parameters[name] for f in ("lora_A", "lora_B", "lora_E", "ranknum"))
    if any(type(t) not in types for t in (a, b, e, r)):
        return describe_type(next(t for t in (a, b, e, r) if type(t) not in types))
    rank, scaling, dropout = a.shape[0], layer.scaling[name], modules["lora_dropout"]._modules[name]
    a, b = fold(a, b, e.flatten() / (r + 1e-5))  # 1e-5: PEFT's
    return add_factors(call, layer, dropout, a, b, None, rank, scaling, x, types)


def add_vera(call: Call, layer: vera.Linear, name: str, x: Tensor, types) -> str:
    """The same for a VeRA adapter."""
    modules = layer._modules
    by_rank, by_output = (modules[f]._parameters[name] for f in ("vera_lambda_d", "vera_lambda_b"))
    a, b = (modules[f]._buffers[name] for f in ("vera_A", "vera_B"))
    if any(type(t) not in types for t in (a, b, by_rank, by_output)):
        return describe_type(next(t for t in (a, b, by_rank, by_output) if type(t) not in types))
    a, b = a[:, : layer.in_features].to(x.device), b[: layer.out_features].to(x.device)
    b = b * by_rank * by_output.unsqueeze(-1)
    return add_factors(call, layer, modules["vera_dropout"]._modules[name], a, b, None, a.shape[0], 1.0, x, types)


add_svd_layer = adding("lora_A", "_parameters", add_svd)
add_vera_layer = adding("vera_lambda_d", "_parameters", add_vera)


def in_dtype_of_x(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A forward whose output is cast to what x is, in every state, as VeRA's are: autocast gives another dtype."""

    @functools.wraps(forward)
    def forward_and_cast(self, x: Tensor, *args, **kwargs) -> Tensor:
        return forward(self, x, *args, **kwargs).to(x.dtype)

    return forward_and_cast


class FusedSVDLinear(SVDLinear):
    """`peft.tuners.adalora.SVDLinear` whose forward is one op, as in `FusedLinear`."""

    asks_for_rows = True
    forward = fused_forward(SVDLinear, add_svd_layer)


class FusedVeraLinear(vera.Linear):
    """`peft.tuners.vera.Linear` whose forward is one op, as in `FusedLinear`."""

    asks_for_rows = True
    forward = in_dtype_of_x(fused_forward(vera.Linear, add_vera_layer))


# By the class that PEFT gives a layer, what `patch` gives it, and what adds either to a call.
FUSED = {Linear: FusedLinear, SVDLinear: FusedSVDLinear, vera.Linear: FusedVeraLinear, Embedding: FusedEmbedding}
ADDS = {Linear: add_layer, SVDLinear: add_svd_layer, vera.Linear: add_vera_layer, Embedding: add_table}
ADDS |= {FUSED[kind]: add for kind, add in ADDS.items()}
