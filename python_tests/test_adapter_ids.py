"""Ids per sequence or per token by adapter_ids in patched models: against PEFT's adapter_names and each adapter alone;
what is refused, in words; checkpointing by hand; torch.compile."""

import pytest
import torch
from models import batch, calls_per_forward, in_double, inputs, nothing_is_left, results, two_adapters
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft_kernels
from peft_kernels.integrations.gathering import INACTIVE
from peft_kernels.integrations.peft import FusedLinear
from peft_kernels.integrations.rows import RowAdapters


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_by_hand(use_reentrant):
    model = two_adapters().train()
    peft_kernels.patch(model)
    layer = next(m for m in model.modules() if isinstance(m, FusedLinear) and "other" in m.lora_A)
    x = torch.randn(4, 5, layer.in_features, requires_grad=True)
    ids = dict(ids=[0, 1, -1, 1], adapters=["default", "other"])

    def entering(x):
        with peft_kernels.adapter_ids(**ids):
            return layer(x)

    expected = torch.autograd.grad(entering(x).sum(), x)
    inside = checkpoint(entering, x, use_reentrant=use_reentrant)
    inside.sum().backward()
    assert torch.equal(x.grad, *expected)
    with peft_kernels.adapter_ids(**ids):
        outside = checkpoint(layer, x, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="called again inside the backward"):
        outside.sum().backward()


@pytest.mark.parametrize("ids,adapters,error,text", [
    ([0, 2], ["a", "b"], ValueError, r"ids must be -1 or lie in \[0, 2\), got 2"),
    ([0, -2], ["a", "b"], ValueError, r"got -2"),
    ([0.5, 1.0], ["a", "b"], TypeError, "ids must be integers"),
    (["a", "b"], ["a", "b"], TypeError, r"ids must be integers.*got \['a', 'b'\]"),
    ([0, None], ["a", "b"], TypeError, "ids must be integers.*-1 for none"),
    ([[0], [0, 1]], ["a", "b"], TypeError, "ids must be integers, one for each sequence or one for each token"),
    ([[[0]]], ["a"], ValueError, r"ids must have shape \[B\] or \[B, S\], got \[1, 1, 1\]"),
    ([0], "a", TypeError, "adapters must be a list of str"),
    ([0], ["a", "a"], ValueError, "adapters must differ from each other"),
])  # fmt: skip
def test_bad_ids_are_refused_in_words(ids, adapters, error, text):
    with pytest.raises(error, match=f"^adapter_ids: .*{text}"), peft_kernels.adapter_ids(ids, adapters):
        pass


def test_ids_on_a_gpu_that_are_out_of_range_stand_for_no_adapter():
    """They are not looked at when the block is entered."""
    rows = RowAdapters("adapter_ids", torch.tensor([-2, 0, 1, 7, -1], dtype=torch.int32), ("a", "b"))
    assert rows.among((1,), torch.Size((5,)), torch.device("cpu")).tolist() == [-1, -1, 0, -1, -1]


def test_ids_that_reach_nothing_are_refused():
    model = two_adapters().eval()
    with (
        pytest.raises(RuntimeError, match=r"no patched layer ran inside.*patch\(model\).*attach_pool\(model\)"),
        peft_kernels.adapter_ids([0, 0], adapters=["default"]),
    ):
        model(**inputs())
    peft_kernels.patch(model)
    with (
        pytest.raises(ValueError, match="no layer that ran has an adapter 'oter'"),
        peft_kernels.adapter_ids([0, 0], adapters=["default", "oter"]),
    ):
        model(**inputs())
    with (
        pytest.raises(ValueError, match=r"adapter_ids: there are ids for \[2, 3\]"),
        peft_kernels.adapter_ids([[0] * 3] * 2, adapters=["default"]),
    ):
        model(**inputs())
    assert nothing_is_left(model)


def test_ids_per_row_are_names_per_row():
    model = two_adapters().eval()
    peft_kernels.patch(model, strict=True)
    expected = results(model, **batch())
    with peft_kernels.adapter_ids(torch.tensor([0, 1, -1, 1]), adapters=["default", "other"]):
        found = results(model, **inputs(rows=4))
        named = model(**batch(["__base__"] * 4)).logits  # an argument of the call wins
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with model.disable_adapter():
        torch.testing.assert_close(named, model(**inputs(rows=4)).logits)
    assert nothing_is_left(model)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_ids_per_token(name):
    """Every adapter layer, OPT's flattened ones too, gives each token what its adapter alone gives it."""
    model = two_adapters(name, target_modules="all-linear").eval()
    ids = torch.randint(-1, 2, (2, 7), generator=torch.Generator().manual_seed(4))
    report = peft_kernels.patch(model, strict=True)
    seen = []

    def look(layer, args, y):
        seen.append((layer, args[0].reshape(14, -1), y.reshape(14, -1)))

    layers = [m for n, m in model.named_modules() if n in {row.name for row in report.rows if "Linear" in row.kind}]
    hooks = [layer.register_forward_hook(look) for layer in layers]
    with peft_kernels.adapter_ids(ids, adapters=["default", "other"]), torch.no_grad():
        model(input_ids=inputs()["input_ids"])
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(layers) and report.fused + report.fallbacks[INACTIVE] >= len(layers)
    peft_kernels.unpatch(model)
    for adapter, active in enumerate(["default", "other", None]):
        rows = ids.flatten() == (adapter if active else -1)
        model.set_adapter(active or "default")
        for layer, x, y in seen:
            alone = layer(x) if active else layer.base_layer(x)
            torch.testing.assert_close(y[rows], alone[rows])


def test_training_together_is_training_each_alone():
    """Every adapter's loss is the mean over its own rows; their sum is trained in one batch. In fp64."""
    model = in_double(two_adapters()).eval()
    ids, tokens = torch.tensor([0, 1, 0, 1, 1]), inputs(rows=5)["input_ids"]
    alone = {}
    for adapter, name in enumerate(["default", "other"]):
        model.set_adapter(name)
        own = tokens[ids == adapter]
        alone |= {n: grad for n, grad in results(model, input_ids=own, labels=own).items() if f".{name}." in n}
    model.set_requires_grad(["default", "other"])
    model.zero_grad()
    report = peft_kernels.patch(model, strict=True)
    with peft_kernels.adapter_ids(ids, adapters=["default", "other"]):
        logits = model(input_ids=tokens).logits
    each = nn.functional.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none")  # [B, S - 1]
    sum(each[ids == adapter].mean() for adapter in (0, 1)).backward()
    together = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(together, alone)
    assert report.fused == calls_per_forward(report)


def test_disabled_adapters_are_disabled():
    model = two_adapters().eval()
    peft_kernels.patch(model, strict=True)
    with model.disable_adapter():
        expected = model(**inputs(rows=4)).logits
        assert torch.equal(model(**batch()).logits, expected)
    with torch.no_grad(), peft_kernels.adapter_ids([0, 1, -1, 1], adapters=["default", "other"]):
        mixed = model(**inputs(rows=4)).logits
        assert not torch.equal(mixed, expected)
        with model.disable_adapter():
            assert torch.equal(model(**inputs(rows=4)).logits, expected)
        assert torch.equal(model(**inputs(rows=4)).logits, mixed)


def test_a_compiled_module_leaves_the_graph_for_the_adapters():
    model = two_adapters().eval()
    report = peft_kernels.patch(model, strict=True)
    mlp, x = model.base_model.model.model.layers[0].mlp, torch.randn(4, 5, 32)
    ids = dict(ids=[0, 1, -1, 1], adapters=["default", "other"])
    compiled, whole = (torch.compile(mlp, backend="eager", fullgraph=full) for full in (False, True))
    with torch.no_grad():
        active = mlp(x)
        torch.testing.assert_close(whole(x), active)
        with (
            pytest.raises(torch._dynamo.exc.Unsupported, match="which adapter each row has is not known inside a"),
            peft_kernels.adapter_ids(**ids),
        ):
            whole(x)
        torch._dynamo.reset()
        torch.testing.assert_close(compiled(x), active)
        with peft_kernels.adapter_ids(**ids):
            expected, before = mlp(x), report.fused
            assert torch.equal(compiled(x), expected) and report.fused == before + 2
        torch.testing.assert_close(compiled(x), active)
