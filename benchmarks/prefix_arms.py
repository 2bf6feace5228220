"""The arms of the benchmark of prefix_attention: prefix_attention.py says what each is."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from benchmarks.runs import Arm, NotHere, arms_of, kernels

NAME = "prefix_attention"
ARMS = ("peft", "cat", "flex", "merged", "op")


@dataclass(frozen=True)
class Cell:
    """B rows of S queries on T own keys behind a prefix of P, one for all rows or one for each."""

    dtype: torch.dtype
    Hq: int
    Hkv: int
    D: int
    B: int
    S: int
    T: int
    P: int
    prefixes: int  # 1 or B
    direction: str  # "training" or "inference"

    @property
    def title(self) -> str:
        dtype, heads = str(self.dtype).removeprefix("torch."), f"{self.Hq}/{self.Hkv} heads of {self.D}"
        whose = "shared" if self.prefixes == 1 else "one a row"
        return f"{dtype} {heads} B={self.B} S={self.S} T={self.T} P={self.P} {whose} {self.direction}"


class Problem:
    """q, k, v as projections leave them, the prefixes, and which one a row has."""

    def __init__(self, cell: Cell, device: torch.device):
        self.cell, self.device, self.training = cell, device, cell.direction == "training"

        def by_token(heads, tokens):
            rows = torch.randn(cell.B, tokens, heads, cell.D, device=device).to(cell.dtype)
            return rows.transpose(1, 2).requires_grad_(self.training)

        def prefix():
            shape = cell.prefixes, cell.Hkv, cell.P, cell.D
            return torch.randn(shape, device=device).to(cell.dtype).requires_grad_(self.training)

        self.q, self.k, self.v = by_token(cell.Hq, cell.S), by_token(cell.Hkv, cell.T), by_token(cell.Hkv, cell.T)
        self.pk, self.pv = prefix(), prefix()
        self.ids = torch.arange(cell.B, dtype=torch.int32, device=device) % cell.prefixes
        self.dout = torch.randn_like(self.q)

    def step(self, forward: Callable[[], Tensor], with_prefix: bool = True) -> Callable[[], object]:
        """What is timed: the output, or the gradients too."""
        if not self.training:
            return torch.no_grad()(forward)
        leaves = (self.q, self.k, self.v, *((self.pk, self.pv) if with_prefix else ()))
        return lambda: torch.autograd.grad(forward(), leaves, self.dout)

    def behind(self, prefix: Tensor, own: Tensor) -> Tensor:
        """[prefix ; own], a copy of the prefix for each row."""
        return torch.cat([prefix.expand(self.cell.B, -1, -1, -1), own], 2)

    def repeated(self, keys: Tensor) -> Tensor:
        """A head of keys for each query head."""
        return keys.repeat_interleave(self.cell.Hq // self.cell.Hkv, 1)


def none(problem: Problem) -> Callable[[], Tensor]:
    """Attention without a prefix, as transformers calls SDPA where there is no mask."""
    causal = problem.cell.S > 1
    return lambda: functional.scaled_dot_product_attention(
        problem.q, problem.k, problem.v, is_causal=causal, enable_gqa=True
    )


def _peft(problem: Problem) -> list[Arm]:
    """In prefill PEFT puts a copy of the prefix for each row before the keys, and SDPA gets a mask of booleans and
    repeated keys; in decoding the copies are in the cache already."""
    cell = problem.cell
    mask = torch.ones(cell.S, cell.P + cell.T, dtype=torch.bool, device=problem.device).tril(cell.P + cell.T - cell.S)
    mask = mask.expand(cell.B, 1, -1, -1)
    cached = [problem.behind(*pair).detach() for pair in ((problem.pk, problem.k), (problem.pv, problem.v))]

    def forward():
        pairs = ((problem.pk, problem.k), (problem.pv, problem.v))
        key, value = cached if cell.S == 1 else (problem.behind(*pair) for pair in pairs)
        key, value = problem.repeated(key), problem.repeated(value)
        return functional.scaled_dot_product_attention(problem.q, key, value, attn_mask=mask)

    return [Arm("peft", "torch", problem.step(forward))]


def _cat(problem: Problem) -> list[Arm]:
    """The best of PyTorch: concatenated keys, causal from the lower right; every backend of SDPA that a GPU has."""
    cell = problem.cell
    bias = causal_lower_right(cell.S, cell.P + cell.T)

    def forward():
        key, value = problem.behind(problem.pk, problem.k), problem.behind(problem.pv, problem.v)
        if cell.S == 1:
            return functional.scaled_dot_product_attention(problem.q, key, value, enable_gqa=True)
        return functional.scaled_dot_product_attention(
            problem.q, problem.repeated(key), problem.repeated(value), attn_mask=bias
        )

    if problem.device.type == "cpu":
        return [Arm("cat", "torch", problem.step(forward))]

    def through(backend):
        def run():
            with sdpa_kernel(backend):
                return forward()

        return run

    names = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
    return [Arm("cat", n.lower(), problem.step(through(getattr(SDPBackend, n)))) for n in names]


def _flex(problem: Problem) -> list[Arm]:
    """FlexAttention over the concatenation, compiled."""
    if problem.device.type == "cpu" and problem.training:
        raise NotHere("FlexAttention has no backward on a CPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    cell = problem.cell
    offset = cell.P + cell.T - cell.S
    mask = create_block_mask(
        lambda b, h, q, k: k <= q + offset, None, None, cell.S, cell.P + cell.T, device=str(problem.device)
    )
    compiled = torch.compile(flex_attention, dynamic=False)

    def forward():
        key, value = problem.behind(problem.pk, problem.k), problem.behind(problem.pv, problem.v)
        return compiled(problem.q, key, value, block_mask=mask, enable_gqa=True)

    return [Arm("flex", "inductor", problem.step(forward))]


def _merged(problem: Problem) -> list[Arm]:
    """Two calls of flash attention, merged by their log-sum-exps; for one prefix the rows are folded into queries."""
    cell = problem.cell
    if problem.training:
        raise NotHere("the log-sum-exp of PyTorch's flash attention has no gradient")
    flash = (
        torch.ops.aten._scaled_dot_product_flash_attention
        if problem.device.type == "cuda"
        else torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    )

    def unfolded(rows):
        heads = rows.reshape(cell.Hkv, -1, cell.B, cell.S, rows.shape[-1])  # [Hkv, group, B, S, ...]
        return heads.permute(2, 0, 1, 3, 4).flatten(1, 2)

    def forward():
        q = problem.q
        own, own_lse = flash(q, problem.repeated(problem.k), problem.repeated(problem.v), 0.0, cell.S > 1)[:2]
        if cell.prefixes == 1:  # [1, Hkv, group * B * S, D]
            folded = q.unflatten(1, (cell.Hkv, -1)).permute(1, 2, 0, 3, 4).reshape(1, cell.Hkv, -1, cell.D)
            prefix, lse = flash(folded, problem.pk, problem.pv)[:2]
            prefix, lse = unfolded(prefix), unfolded(lse.reshape(1, cell.Hkv, -1, 1))[..., 0]
        else:
            prefix, lse = flash(q, problem.repeated(problem.pk), problem.repeated(problem.pv))[:2]
        share = torch.sigmoid(lse.reshape(own_lse.shape) - own_lse)[..., None].to(own.dtype)
        return own + (prefix - own) * share

    return [Arm("merged", "torch", problem.step(forward))]


def _op(problem: Problem) -> list[Arm]:
    cell = problem.cell
    ids = None if cell.prefixes == 1 else problem.ids
    rest = (ids, *[None] * 7, "merge", cell.D**-0.5, True, 0, False, 0.0, 0.0, None)
    made = [
        Arm("op", name, problem.step(
            lambda kernel=kernel: kernel(problem.q, problem.k, problem.v, problem.pk, problem.pv, *rest)[0]))
        for name, kernel in kernels(NAME, problem.device)
    ]  # fmt: skip
    if not made:
        raise NotHere(f"no backend but the reference is linked for {problem.device.type}")
    return made


_MAKERS = {"peft": _peft, "cat": _cat, "flex": _flex, "merged": _merged, "op": _op}


def build(cell: Cell, device: torch.device, kinds: tuple[str, ...]) -> tuple[list[Arm], dict[str, str]]:
    """Attention without a prefix twice and the arms of the given kinds; and for each that cannot be here, why."""
    problem = Problem(cell, device)
    base = [Arm(name, "torch", problem.step(none(problem), with_prefix=False)) for name in ("none", "none_again")]
    arms, left_out = arms_of(problem, _MAKERS, kinds)
    return base + arms, left_out
