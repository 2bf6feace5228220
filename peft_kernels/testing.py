"""The oracle, and what else tests and benchmarks share. Nothing in the library imports this.

The oracle holds no tolerance. With out64 = the reference on the inputs in fp64, e_ref = |reference(dtype) - out64|_max
and e = |backend - out64|_max, a result passes if

    e <= 2 e_ref + (eps(accumulator) sqrt(longest) + eps(out)) max S

where `longest` is the longest reduction and S the same formula on the absolute values of the inputs: what rounding
each term once can cost. (An op whose formula subtracts gives an S of its own.) A backend may lose at most twice what
plain PyTorch loses. NaN must stand where it stands in out64 and nowhere else; the distances are taken over the rest.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from peft_kernels import backends, registry


@dataclass(frozen=True)
class Result:
    """One output of a backend beside what it should be."""

    name: str
    error: float
    bound: float

    @property
    def passes(self) -> bool:
        return self.error <= self.bound  # False for NaN


def operators(backend: str, op: registry.Op) -> tuple[Callable, Callable | None]:
    """Forward and backward operators of a backend: `torch.ops.peft_kernels_<backend>.<op>[_backward]`."""
    namespace = getattr(torch.ops, f"peft_kernels_{backend}")
    return tuple(f and getattr(namespace, f.name).default for f in (op.forward, op.backward))


def compare(op: registry.Op, sample: dict, forward: Callable, backward: Callable | None) -> list[Result]:
    """Every output and every gradient of `forward` and `backward` against the oracle, on one sample."""
    reference = tuple(f and f.reference for f in (op.forward, op.backward))
    dy = gradients_for(op, sample)
    exact, exact_dy = tree_map(_to_double, (sample, dy))
    outs = op.evaluate(forward, backward, sample, dy)
    outs_ref = op.evaluate(*reference, sample, dy)
    outs64 = op.evaluate(*reference, exact, exact_dy)
    if op.size:
        size = op.evaluate(*op.size, exact, exact_dy)
    else:
        size = op.evaluate(*reference, *tree_map(_absolute, (exact, exact_dy)))
    tensors = [t for t in tree_leaves(sample) if isinstance(t, Tensor)]
    longest = max(max(t.shape, default=1) for t in tensors)
    accumulator = torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32
    rounding = torch.finfo(accumulator).eps * longest**0.5
    results = []
    for name, out64 in outs64.items():
        out, ref = outs[name], outs_ref[name]
        if out.shape != out64.shape or out.dtype != ref.dtype:
            raise AssertionError(f"{name}: {out.dtype} {list(out.shape)}, expected {ref.dtype} {list(out64.shape)}")
        if out.numel():
            largest = size[name].abs().nan_to_num(0, posinf=0).max().item()
            bound = 2 * _distance(ref, out64) + (rounding + torch.finfo(out.dtype).eps) * largest
            results.append(Result(name, _distance(out, out64), bound))
    return results


def assert_matches_oracle(op: registry.Op, sample: dict, forward: Callable, backward: Callable | None) -> None:
    """Raises AssertionError naming every output that is further from fp64 than the oracle allows."""
    failed = [r for r in compare(op, sample, forward, backward) if not r.passes]
    if failed:
        raise AssertionError("; ".join(f"{r.name}: error {r.error:.3g} above {r.bound:.3g}" for r in failed))


def gradients_for(op: registry.Op, sample: dict) -> list[Tensor]:
    """`output_gradients` of an op's outputs, one or a list; none where it has no backward."""
    if not op.backward:
        return []
    return output_gradients(first_output(op.forward.reference(*sample.values())))


def first_output(outputs) -> list[Tensor]:
    """What has gradients of what an op returned: one tensor, or the first of several, which may be a list."""
    y = outputs if isinstance(outputs, Tensor) else outputs[0]
    return [y] if isinstance(y, Tensor) else y


def output_gradients(y: list[Tensor]) -> list[Tensor]:
    """Fixed pseudo-random gradients, one for each output."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in y]


def _to_double(value):
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _absolute(value):
    if isinstance(value, Tensor):
        return value.abs() if value.is_floating_point() else value
    return abs(value) if isinstance(value, float) else value


def _distance(a: Tensor, exact: Tensor) -> float:
    nowhere = exact.isnan()
    if not torch.equal(a.isnan(), nowhere):
        return float("nan")
    equal = nowhere | (a.double() == exact)  # infinities too
    return (a.double() - exact.double()).masked_fill(equal, 0).abs().max().item()


@contextlib.contextmanager
def poisoned_memory():
    """Inside, what PyTorch or our C++ allocates uninitialised is full of NaN: an output that was not written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    native = backends.operator_library() is not None
    if native:
        backends.poison_memory(on=True)
    try:
        yield
    finally:
        if native:
            backends.poison_memory(on=False)
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
