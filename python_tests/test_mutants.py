"""A test of the tests: numeric bugs of the kind that suites for behaviour let through, planted one at a time around a
backend's operators. The oracle must catch each of them on some sample, and nothing without them."""

import pytest
import torch

from peft_kernels import backends, registry, testing

OP = registry.ops()["lora_linear"]
BACKENDS = backends.linked("lora_linear", "cpu")


def positions(arguments, name):
    """Where the gradients of one input stand in the list that the backward returns."""
    groups = ("x", "weight", "bias", "lora_A", "lora_B", "lora_bias")
    sizes = [1 if g == "x" else len(arguments[g]) for g in groups]
    start = sum(sizes[: groups.index(name)])
    return range(start, start + sizes[groups.index(name)])


def scale_forgotten(forward, backward, arguments):
    count = len(arguments["scaling"])
    return (
        lambda *a: forward(*a[:7], [1.0] * count, *a[8:]),
        lambda *a: backward(*a[:7], [1.0] * count, *a[8:]),
    )


def dropout_skipped(forward, backward, arguments):
    count = len(arguments["dropout_p"])
    return (
        lambda *a: forward(*a[:8], [0.0] * count, None),
        lambda *a: backward(*a[:8], [0.0] * count, None, a[10]),
    )


def second_adapter_ignored(forward, backward, arguments):
    def mutant(*a):
        lora_B = [b if i == 0 else torch.zeros_like(b) for i, b in enumerate(a[4])]
        return forward(*a[:4], lora_B, *a[5:])

    return mutant, backward


def gradient_times(name, factor):
    def plant(forward, backward, arguments):
        def mutant(*a):
            grads = list(backward(*a))
            for i in positions(arguments, name):
                grads[i] = grads[i] * factor
            return grads

        return forward, mutant

    return plant


MUTANTS = {
    "scale forgotten": scale_forgotten,
    "dropout skipped": dropout_skipped,
    "second adapter ignored": second_adapter_ignored,
    "dA zeroed": gradient_times("lora_A", 0),
    "dB doubled": gradient_times("lora_B", 2),
    "dx zeroed": gradient_times("x", 0),
    "dW zeroed": gradient_times("weight", 0),
    "bias gradient negated": gradient_times("bias", -1),
}


def caught_by(plant, backend, dtype):
    """Ids of the samples on which the oracle refuses the planted operators."""
    caught = []
    for sample in OP.samples():
        if (dtype, dtype) not in sample.dtypes:
            continue
        arguments = sample.make("cpu", dtype, dtype)
        try:
            testing.assert_matches_oracle(OP, arguments, *plant(*testing.operators(backend, OP), arguments))
        except AssertionError:
            caught.append(sample.id)
    return caught


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, backend, dtype):
    assert caught_by(MUTANTS[name], backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_caught_without_a_mutant(backend):
    assert caught_by(lambda forward, backward, _: (forward, backward), backend, torch.bfloat16) == []
