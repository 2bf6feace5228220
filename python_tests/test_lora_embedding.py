"""lora_embedding beside the registry's samples: ids that no table has, what is kept for the backward, words for what
cannot be, ids inside a buffer, gradients that are needed alone."""

import pytest
import torch
from torch.nn import functional

import peft_kernels
from peft_kernels import testing
from peft_kernels.ops.lora_linear.embedding_samples import PAIRS, problem
from peft_kernels.registry import ops

F32 = torch.float32
OP = ops()["lora_embedding"]
BACKENDS = ["reference", "cpu"]


def public(arguments: dict):
    residual, ids, lora_A, lora_B, scaling, padding_idx = arguments.values()
    return peft_kernels.lora_embedding(residual, ids, lora_A, lora_B, scaling=scaling, padding_idx=padding_idx)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("unknown", [-1, 40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_id_that_no_table_has_is_refused(backend, unknown, dtype):
    forward, backward = testing.operators(backend, OP)
    good = problem("cpu", F32, F32, V=40, ids_dtype=dtype)
    bad = good | {"ids": good["ids"].clone().index_fill_(0, torch.tensor([5]), unknown)}
    h = forward(*good.values())[1]
    with pytest.raises((RuntimeError, IndexError)):
        forward(*bad.values())
    with pytest.raises((RuntimeError, IndexError)):
        backward(good["residual"], bad["ids"], h, *list(bad.values())[2:], [True, True])
    with pytest.raises(IndexError, match=rf"lora_embedding: ids must lie in \[0, 40\), got {unknown}"):
        public(bad)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_are_needed_alone(backend, pair):
    forward, backward = testing.operators(backend, OP)
    arguments = problem("cpu", *pair, rows=(40,), ranks=(3, 5), padding_idx=7)
    y, h = forward(*arguments.values())
    dy, rest = testing.output_gradients([y])[0], list(arguments.values())[2:]
    full = backward(dy, arguments["ids"], h, *rest, [True] * 4)
    for i, gradient in enumerate(full):
        needs = [j == i for j in range(4)]
        with testing.poisoned_memory():
            alone = backward(dy, arguments["ids"], h if i > 1 else None, *rest, needs)
        assert torch.equal(alone[i], gradient)
        assert [t.numel() > 0 for t in alone] == needs


@pytest.mark.parametrize("trained", ["lora_A", "lora_B"])
def test_what_is_kept_for_the_backward(trained):
    """Of A the shape alone: it may change, or be offloaded, before the backward."""
    arguments, kept = problem("cpu", F32, F32), []
    arguments[trained][0].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = public(arguments)
    ids, (b,), h = arguments["ids"], arguments["lora_B"], arguments["ids"].numel() * 4
    assert [t.numel() for t in kept] == ([ids.numel(), b.numel()] if trained == "lora_A" else [ids.numel(), h])
    expected = torch.autograd.grad(y, arguments[trained], torch.ones_like(y), retain_graph=True)[0]
    with torch.no_grad():
        arguments["lora_A"][0].add_(1)
    assert torch.equal(torch.autograd.grad(y, arguments[trained], torch.ones_like(y))[0], expected)


def test_it_is_what_embedding_makes():
    """Gradients against PyTorch's own, padding_idx and all."""
    arguments = problem("cpu", torch.float64, torch.float64, rows=(3, 9), V=11, padding_idx=4)
    residual, (a,), (b,) = (arguments[n] for n in ("residual", "lora_A", "lora_B"))
    leaves = [t.requires_grad_() for t in (residual, a, b)]
    low = functional.embedding(arguments["ids"], a.T, padding_idx=4)
    expected = residual + arguments["scaling"][0] * low @ b.T
    found = public(arguments)
    torch.testing.assert_close(found, expected)
    dy = torch.randn_like(expected)
    for ours, theirs in zip(*(torch.autograd.grad(y, leaves, dy) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert (arguments["ids"] == 4).any() and not torch.autograd.grad(public(arguments), a, dy)[0][:, 4].any()


def test_ids_inside_a_buffer():
    arguments = problem("cpu", F32, F32)
    buffer = torch.full((30,), 10**9)
    buffer[5:17] = arguments["ids"]
    assert torch.equal(public(arguments | {"ids": buffer[5:17]}), public(arguments))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"scaling": torch.tensor(2.0)}, TypeError, "scaling must be a number or a sequence of them, got Tensor"),
        ({"lora_A": None}, TypeError, "lora_A must be a Tensor or a sequence of them, got NoneType"),
        ({"residual": None}, TypeError, "residual must be a Tensor, got NoneType"),
        ({"padding_idx": 1.0}, TypeError, "padding_idx must be an int or None, got float"),
        ({"padding_idx": -1}, ValueError, r"padding_idx must lie in \[0, 40\), got -1"),
    ],
)
def test_what_cannot_be_has_words(change, error, text):
    with pytest.raises(error, match=f"lora_embedding: {text}"):
        public(problem("cpu", F32, F32) | change)


def test_one_adapter_may_come_in_a_list_or_alone():
    arguments = problem("cpu", F32, F32)
    (a,), (b,) = arguments["lora_A"], arguments["lora_B"]
    assert torch.equal(public(arguments | {"lora_A": a, "lora_B": [b], "scaling": 1.0}), public(arguments))
