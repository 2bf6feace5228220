"""What an operator does above its backends that writes into its first argument and has no gradient.

Its Autograd kernel refuses what needs a gradient and dual tensors, and tells autograd that what is written to is no
longer what it may have saved (its version). In inference mode, which leaves out that key, the ADInplaceOrView kernel
tells it: inference mode has that one wherever a tensor is from outside.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from peft_kernels.ops.common.projections import refuse_tangents
from peft_kernels.registry import below_in_place


def in_place(name: str, text: str) -> Callable[..., dict[str, Callable]]:
    """`above` of a registry.Function: `<name>: <text>` refuses what needs a gradient. What the operator writes to is
    its first argument, a tensor or a list of them."""

    def above(namespace) -> dict[str, Callable]:
        op = getattr(namespace, name).default

        def counting(written, *rest) -> None:
            _counted(op, written, *rest)

        def refusing(*arguments) -> None:
            if torch.is_grad_enabled() or forward_ad._current_level >= 0:
                tensors = list(_tensors(arguments))
                refuse_tangents(name, None, [tensors])
                if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
                    raise RuntimeError(f"{name}: {text}")
            counting(*arguments)

        return {"Autograd": refusing, "ADInplaceOrView": counting}

    return above


def call_in_place(op: Callable, written: Tensor | list[Tensor], *rest) -> None:
    """op(written, *rest). Where there is nothing to refuse, without those kernels, which cost 6 us: as much as all else
    of a small call."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or forward_ad._current_level >= 0:
        op(written, *rest)
    else:
        _counted(op, written, *rest)


def _counted(op: Callable, written: Tensor | list[Tensor], *rest) -> None:
    """The version is raised behind the operator: what it refuses it has not written to."""
    with below_in_place():
        op(written, *rest)
    increment_version(written)


def _tensors(arguments):
    """Those among the arguments and in lists among them."""
    for argument in arguments:
        for value in argument if isinstance(argument, list | tuple) else (argument,):
            if isinstance(value, Tensor):
                yield value
