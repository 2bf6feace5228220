"""prefix_attention against what it stands for: PyTorch's own attention over explicit concatenations, in fp64, forward
and gradients; what the compositions are equal to; masks that no gradient reaches; values out of range."""

import itertools
import math

import pytest
import torch

import peft_kernels
from peft_kernels import backends, registry, testing
from peft_kernels.ops.prefix_attention.samples import GRADIENTS, problem

OP = registry.ops()["prefix_attention"]
BACKENDS = backends.linked("prefix_attention", "cpu")
F64 = torch.float64


def attend(arguments, backend="reference"):
    return testing.operators(backend, OP)[0](*arguments.values())


def leaves(arguments):
    """The same arguments, those with a gradient as leaves."""
    wanted = [name for name in GRADIENTS if arguments[name] is not None]
    return arguments | {name: arguments[name].detach().clone().requires_grad_() for name in wanted}, wanted


def concatenated(a, r):
    """Row r by torch's attention over [P_k ; K], with an explicit mask; its own keys from the first that is seen."""
    q, k, v = (a[name][r] for name in ("query", "key", "value"))
    n = 0 if a["prefix_ids"] is None else int(a["prefix_ids"][r])
    P = 0 if n < 0 else a["prefix_key"].shape[2] if a["prefix_lengths"] is None else int(a["prefix_lengths"][n])
    group, S, T = q.shape[0] // k.shape[0], q.shape[1], k.shape[1]
    key, value = (
        torch.cat([a[name][max(n, 0)][:, :P], own], 1) for name, own in (("prefix_key", k), ("prefix_value", v))
    )
    at, column = torch.arange(S)[:, None] + T - S, torch.arange(-P, T)[None]
    seen = (column <= at) | torch.tensor(not a["is_causal"])
    if a["sliding_window"]:
        inside = column > at - a["sliding_window"]
        seen = seen & (inside | (column < 0 if not a["window_over_prefix"] else False))
    mask = torch.zeros(q.shape[0], S, P + T, dtype=F64).masked_fill(~seen, -math.inf)
    if a["attn_mask"] is not None:
        own = a["attn_mask"][r if len(a["attn_mask"]) > 1 else 0].expand(q.shape[0], S, T)
        own = torch.zeros((), dtype=F64).where(own, -math.inf) if own.dtype is torch.bool else own
        prefix = torch.zeros(q.shape[0], S, P, dtype=F64) if a["prefix_bias"] is None else a["prefix_bias"][0, :, :, :P]
        mask = mask + torch.cat([prefix, own], -1)
    key, value = (t.repeat_interleave(group, 0) for t in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(q, key, value, attn_mask=mask, scale=a["scale"])


CASES = {
    "plain": {},
    "groups": dict(Hq=8, Hkv=2),
    "decode": dict(S=1, T=23, B=3),
    "chunk": dict(S=5, T=21),
    "bidirectional": dict(causal=False, mask="right"),
    "left": dict(mask="left", P=3),
    "window": dict(window=4, S=19),
    "over-prefix": dict(window=4, S=19, over_prefix=True),
    "positions": dict(mask="additive", bias=True, causal=False),
    "several": dict(B=4, n=3, ids=(2, -1, 0, 2), lengths=(5, 3, 4)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_is_attention_over_the_concatenation(case, backend):
    arguments, wanted = leaves(problem("cpu", F64, **CASES[case]))
    out = attend(arguments, backend)[0]
    expected = torch.stack([concatenated(arguments, r) for r in range(len(out))])
    dout = testing.output_gradients([out])[0]
    grads = torch.autograd.grad(out, [arguments[n] for n in wanted], dout, retain_graph=True)
    expected_grads = torch.autograd.grad(expected, [arguments[n] for n in wanted], dout)
    torch.testing.assert_close(out, expected)
    for name, grad, other in zip(wanted, grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, other.nan_to_num(0), msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_query_sees_the_whole_prefix(backend):
    arguments = problem("cpu", F64, P=7)
    out = attend(arguments, backend)[0]
    for p in range(7):
        changed = arguments["prefix_value"].clone()
        changed[:, :, p] += 1
        assert not torch.equal(attend(arguments | {"prefix_value": changed}, backend)[0][:, :, 0], out[:, :, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_merge_is_a_gated_sum_of_two_attentions(backend):
    """He et al. 2022 (arXiv:2110.04366, eq. 7): o = (1 - g) o_X + g o_P, g = sigmoid(lse_P - lse_X)."""
    arguments = problem("cpu", F64, S=7)
    out, lse, _ = attend(arguments, backend)
    alone = problem("cpu", F64, S=7) | {"prefix_ids": torch.tensor([-1, -1], dtype=torch.int32)}
    own, own_lse, _ = attend(arguments | {"prefix_ids": alone["prefix_ids"]}, backend)
    both, _, prefix_lse = attend(arguments | {"composition": "add"}, backend)
    g = torch.sigmoid(prefix_lse - own_lse)[..., None]
    torch.testing.assert_close(out, (1 - g) * own + g * (both - own))
    torch.testing.assert_close(lse, torch.logaddexp(own_lse, prefix_lse))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("composition", ["merge", "add", "relu", "linear"])
def test_packed_sequences_are_the_sequences_alone(composition, backend):
    ends = (0, 3, 4, 9)
    a = problem("cpu", F64, B=1, packed=(ends, ends), n=2, ids=(1, -1, 0), composition=composition, gates=(1, 1))
    out = attend(a, backend)[0]
    for r, (start, end) in enumerate(itertools.pairwise(ends)):
        alone = {name: a[name][:, :, start:end] for name in ("query", "key", "value")}
        alone |= {name: a[name][r : r + 1] for name in ("prefix_ids", "gate", "key_gate")}
        alone |= {"cu_seqlens_q": None, "cu_seqlens_k": None}
        torch.testing.assert_close(out[:, :, start:end], attend(a | alone, backend)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("composition", ["merge", "add"])
def test_rows_do_not_depend_on_the_batch(composition, backend):
    """Each row is, bit for bit, what it is alone; so are the gradients of a prefix that one row has, wherever the row
    is. Those of a prefix of several rows are summed in the order of the rows."""
    a = problem("cpu", torch.float32, B=4, S=11, n=3, ids=(2, -1, 0, 2), lengths=(5, 3, 4), composition=composition)
    out = attend(a, backend)[0]
    dout, order = testing.output_gradients([out])[0], torch.tensor([2, 3, 1, 0])
    found = []
    for rows in (torch.arange(4), order, order):
        given, _ = leaves(a | {name: a[name][rows] for name in ("query", "key", "value", "prefix_ids")})
        prefixes = [given[name] for name in ("prefix_key", "prefix_value")]
        found.append(torch.autograd.grad(attend(given, backend)[0], prefixes, dout[rows]))
    for plain, moved, again in zip(*found, strict=True):
        assert torch.equal(moved[:2], plain[:2]) and plain[0].any() and torch.equal(again, moved)
        torch.testing.assert_close(moved, plain)
    for r in range(4):
        alone = {name: a[name][r : r + 1] for name in ("query", "key", "value", "prefix_ids")}
        assert torch.equal(attend(a | alone, backend)[0], out[r : r + 1])


@pytest.mark.parametrize("name", ["attn_mask", "prefix_bias"])
def test_a_mask_that_wants_a_gradient_is_refused(name):
    arguments = problem("cpu", torch.float32, mask="additive", bias=True)
    arguments[name].requires_grad_()
    with pytest.raises(TypeError, match=f"prefix_attention: {name} has no gradient here; detach"):
        peft_kernels.prefix_attention(**arguments)
    with torch.no_grad():
        peft_kernels.prefix_attention(**arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name, value, text",
    [
        ("prefix_ids", (2, 0), r"prefix_ids must lie in \[-1, 1\], got 2"),
        ("prefix_ids", (0, -2), r"prefix_ids must lie in \[-1, 1\], got -2"),
        ("prefix_lengths", (0, 6), r"prefix_lengths must lie in \[0, 5\], got 6"),
    ],
)
def test_values_out_of_range_are_refused(name, value, text, backend):
    arguments = problem("cpu", torch.float32, n=2, ids=(0, 1), lengths=(5, 4))
    arguments[name] = torch.tensor(value, dtype=torch.int32)
    with pytest.raises((ValueError, RuntimeError), match=text):
        attend(arguments, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ends", [(1, 4, 9), (0, 5, 4, 9), (0, 4, 8)])
def test_packed_ends_must_rise_to_the_size(ends, backend):
    good = (0, 4, 9) if len(ends) == 3 else (0, 4, 5, 9)
    arguments = problem("cpu", torch.float32, B=1, packed=(good, good))
    arguments["cu_seqlens_q"] = torch.tensor(ends, dtype=torch.int32)
    with pytest.raises((ValueError, RuntimeError), match="cu_seqlens_q must rise from 0 to 9"):
        attend(arguments, backend)


def test_lse_is_returned_on_request():
    arguments = problem("cpu", torch.float32)
    out, lse = peft_kernels.prefix_attention(**arguments, return_lse=True)
    assert torch.equal(out, peft_kernels.prefix_attention(**arguments)) and lse.shape == out.shape[:3]


def test_autocast_casts_queries_keys_values_and_prefixes():
    arguments = problem("cpu", torch.float32, gates=(1, 1), mask="additive")
    with torch.autocast("cpu", torch.bfloat16):
        out = peft_kernels.prefix_attention(**arguments)
    names = ("query", "key", "value", "prefix_key", "prefix_value", "attn_mask")
    cast = arguments | {name: arguments[name].bfloat16() for name in names}
    assert out.dtype is torch.bfloat16 and torch.equal(out, peft_kernels.prefix_attention(**cast))
