"""LoRA on embeddings in patched models against PEFT: results, every gradient, calls, switches, saving, tied
heads."""

import copy
import pickle

import pytest
import torch
from embedding_models import TABLES, block, embedding_model, ids_of, padded, several_adapters, step, tables
from models import (
    HIDDEN,
    VOCAB,
    Operators,
    assert_as_close_as_peft,
    assert_fused_like_peft,
    assert_saves_like_peft,
    base_model,
    in_double,
    inputs,
    lora_config,
    nothing_is_left,
    peft_model,
    randomise,
    results,
)
from peft import get_peft_model
from torch import Tensor, nn

import peft_kernels
from peft_kernels.integrations.embeddings import MIXED, FusedEmbedding
from peft_kernels.integrations.gathering import DISABLED, INACTIVE, MERGED, UNMERGES


def columns(model: nn.Module) -> Tensor:
    """Ids whose column of A has a gradient, in a model with one table."""
    (table,) = tables(model)
    return table.lora_embedding_A["default"].grad.abs().amax(0).nonzero().flatten()


# -- a step -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_a_step_is_pefts(name):
    scaled = {"scale_embedding": True} if name == "bart" else {}
    model = embedding_model(name, scaled)
    with Operators() as operators:
        report = assert_fused_like_peft(model, **padded())
    count = len(tables(model))
    assert count == max(len(TABLES[name]), 2 if name == "bart" else 1)  # of the encoder and of the decoder
    assert [row.kind for row in report.rows] == ["lora.Embedding"] * count
    assert operators.calls == {"lora_embedding": count, "lora_embedding_backward": count}
    report.verify(**inputs())


def test_padding_has_no_gradient_and_no_other_token_misses_one():
    model = embedding_model()
    peft_kernels.patch(model, strict=True)
    results(model, **padded())
    tokens = padded()["input_ids"][:, :-1].unique()  # of the last one nothing is predicted
    assert tokens[0] == 0 and columns(model).equal(tokens[1:])
    tables(model)[0].base_layer.padding_idx = None
    results(model, **padded())
    assert columns(model).equal(tokens)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_all_active_adapters_are_one_call(name):
    model = several_adapters(name)
    with Operators() as operators:
        assert_fused_like_peft(model, **padded())
    assert operators.calls["lora_embedding"] == operators.calls["lora_embedding_backward"] == 1
    frozen = model.get_parameter("base_model.model.model.embed_tokens.lora_embedding_B.minor")
    assert not frozen.requires_grad and frozen.grad is None


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "bart"])
def test_in_16_bit(name, factors):
    model = embedding_model(name, {"scale_embedding": True} if name == "bart" else {}).bfloat16()
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.to(factors)
    assert_fused_like_peft(model, **padded())


def test_the_scale_is_that_of_the_base_layer():
    """A model that was in 16 bits holds another number than the one that transformers keeps beside it."""
    model = embedding_model("gemma3").bfloat16().float()
    base = tables(model)[0].base_layer
    assert base.embed_scale.item() != torch.tensor(base.scalar_embed_scale).item()
    assert_fused_like_peft(model)
    base.embed_scale = nn.Parameter(torch.tensor([3.0]))  # and one that is trained
    peft_kernels.unpatch(model)
    report = assert_fused_like_peft(model)
    assert base.embed_scale.grad is not None and report.fused == 1


# -- one layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [ids_of(5).int(), ids_of(1)[0], ids_of(2, 0), ids_of(2, 3, 4)], ids=str)
def test_ids_of_any_shape(ids):
    model = block()
    plain, exact = step(model, ids), step(in_double(model), ids)
    report = peft_kernels.patch(model, strict=True)
    assert_as_close_as_peft(step(model, ids), plain, exact)
    assert report.fused == 1 and not report.fallbacks


def test_the_base_layer_is_called_once_as_a_module():
    model, seen = block(), []
    base = tables(model)[0].base_layer
    base.register_forward_hook(lambda module, args, y: seen.append(1) or 2 * y)
    base.weight.requires_grad_()
    plain, exact = step(model), step(in_double(model))
    report = peft_kernels.patch(model, strict=True)
    seen.clear()
    assert_as_close_as_peft(step(model), plain, exact)
    assert seen == [1] and report.fused == 1 and "base_model.model.layer.base_layer.weight" in plain


def test_inputs_that_are_to_have_a_gradient():
    """What reentrant checkpointing asks for, before PEFT comes."""
    model = base_model("llama")
    model.enable_input_require_grads()
    model = randomise(get_peft_model(model, lora_config(target_modules=["embed_tokens", "q_proj"])))
    assert tables(model)[0].base_layer._forward_hooks
    assert_fused_like_peft(model)


def test_autocast_changes_nothing_here():
    model = block()
    peft_kernels.patch(model, strict=True)
    expected = step(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = step(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Scaled(nn.Embedding):
    """As Gemma's, with any shape of its scale."""

    embed_scale = torch.tensor([[3.0]])

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale.flatten()[0]


class Positions(nn.Embedding):
    """Rows for all sequences at once."""

    def forward(self, ids):
        return super().forward(ids[0])


class Doubled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids).double()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", [nn.Embedding, Scaled, Positions])
def test_one_graph_under_compile(kind, autocast):
    torch.compiler.reset()
    model = block(kind(VOCAB, HIDDEN))
    model.add_adapter("more", lora_config(target_modules=["layer"], r=3))
    model.base_model.set_adapter(["default", "more"])
    peft_kernels.patch(randomise(model), strict=True)
    eager, base = model.base_model.model, tables(model)[0].base_layer
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for ids in (ids_of(), ids_of(3, 5), ids_of(4, 11)):
            expected, found = step(eager, ids), step(compiled, ids)
            found = {name.removeprefix("_orig_mod."): tensor for name, tensor in found.items()}
            assert found.keys() == expected.keys() and len(found) == 5
            assert all(torch.equal(found[name], expected[name]) for name in expected)
        with model.disable_adapter():
            assert torch.equal(compiled(ids_of()), base(ids_of()))


# -- what a table holds, and what it returns --------------------------------------------------------------------------


def assert_one_call_like_peft(model: nn.Module, exact: nn.Module) -> None:
    plain, exact = step(model), step(exact)
    report = peft_kernels.patch(model, strict=True)
    with Operators() as operators:
        assert_as_close_as_peft(step(model), plain, exact)
    assert [row.reason for row in report.rows] == [""] and report.fused == 1 and not report.fallbacks
    assert operators.calls == {"lora_embedding": 1, "lora_embedding_backward": 1}


@pytest.mark.parametrize(
    ("kind", "factors"),
    [
        (Positions, torch.float32),
        (Positions, torch.bfloat16),
        (Doubled, torch.float32),
        (Doubled, torch.bfloat16),
        (nn.Embedding, torch.float64),
    ],
)
def test_rows_that_the_op_does_not_take(kind, factors):
    """Of fewer dimensions than ids, or of a dtype that the op does not take beside that of the factors."""
    model = block(kind(VOCAB, HIDDEN, padding_idx=3))
    model.add_adapter("more", lora_config(target_modules=["layer"], r=3))
    model.base_model.set_adapter(["default", "more"])
    (table,) = tables(randomise(model))
    table.lora_embedding_A.to(factors), table.lora_embedding_B.to(factors)
    table.base_layer.weight.requires_grad_()
    assert_one_call_like_peft(model, in_double(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["EmbeddingNF4", "EmbeddingFP4", "Embedding8bit"])
def test_a_quantised_table(kind, dtype):
    bnb = pytest.importorskip("bitsandbytes")
    table = getattr(bnb.nn, kind)(VOCAB, 2 * HIDDEN, dtype=dtype).to("cpu")  # 64 elements share a scale
    rows = table(torch.arange(VOCAB)).detach()
    assert rows.dtype == dtype and not table.weight.is_floating_point()
    assert_one_call_like_peft(block(table), block(nn.Embedding.from_pretrained(rows.float())).double())


def test_a_parametrized_table():
    table = nn.Embedding(VOCAB, HIDDEN)
    nn.utils.parametrizations.weight_norm(table)
    model = block(table)
    for weight in table.parameters():
        weight.requires_grad_()
    assert_one_call_like_peft(model, in_double(model))


# -- switches ---------------------------------------------------------------------------------------------------------


def assert_same(model: nn.Module, twin: nn.Module) -> None:
    with torch.no_grad():
        found, plain, exact = ({"y": m(**inputs()).logits} for m in (model, twin, in_double(twin)))
    assert_as_close_as_peft(found, plain, exact)


def test_switches_and_merging_are_pefts():
    model = several_adapters().eval()
    twin = copy.deepcopy(model)
    report = peft_kernels.patch(model, strict=True)
    (layer,) = tables(model)

    def both(change):
        for m in (model, twin):
            change(m)
        before = report.calls()["base_model.model.model.embed_tokens"]
        assert_same(model, twin)
        made = report.calls()["base_model.model.model.embed_tokens"] - before
        return made.fused, dict(+made.fallbacks)

    assert both(lambda m: m.set_adapter("stable")) == (1, {})
    assert both(lambda m: m.set_adapter("elsewhere")) == (0, {INACTIVE: 1})
    assert both(lambda m: m.base_model.set_adapter(["minor", "default"])) == (1, {})
    assert both(lambda m: m.base_model.disable_adapter_layers()) == (0, {DISABLED: 1})
    assert both(lambda m: m.base_model.enable_adapter_layers()) == (1, {})
    assert both(lambda m: m.merge_adapter()) == (0, {MERGED: 1})
    assert both(lambda m: m.unmerge_adapter()) == (1, {})
    assert both(lambda m: m.merge_adapter() or m.base_model.disable_adapter_layers()) == (0, {UNMERGES: 1})
    assert not layer.merged
    assert both(lambda m: m.base_model.enable_adapter_layers()) == (1, {})
    assert both(lambda m: m.delete_adapter("minor")) == (1, {})
    assert both(lambda m: tables(m)[0].scale_layer(0.5)) == (1, {})


def test_patching_in_any_state_and_back():
    model = several_adapters().eval()
    classes = {name: type(module) for name, module in model.named_modules()}
    model.set_adapter("stable")
    with model.disable_adapter():
        report = peft_kernels.patch(model, strict=True)
    assert report.verify(**inputs()).fused == 1
    with torch.no_grad():
        expected = model(**inputs()).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert isinstance(tables(twin)[0], FusedEmbedding) and torch.equal(twin(**inputs()).logits, expected)
    peft_kernels.unpatch(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    model.merge_adapter()
    assert {row.reason for row in peft_kernels.patch(model).rows if row.kind == "lora.Embedding"} == {MERGED}
    merged = model.merge_and_unload()
    assert_same(merged, copy.deepcopy(merged))
    assert type(merged.get_input_embeddings()) is nn.Embedding


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_saving_and_loading(name, tmp_path):
    untied = {"tie_word_embeddings": False}
    model = peft_model(name, untied, target_modules=[*TABLES[name], "q_proj"])
    assert_saves_like_peft(model, base_model(name, **untied), tmp_path)


# -- tied heads, rows -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings")
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("ensure", [True, False])
def test_a_head_that_is_tied_to_the_table(name, ensure):
    changes = dict(target_modules=[*TABLES[name], "lm_head"], ensure_weight_tying=ensure)
    model, exact = (peft_model(name, {"tie_word_embeddings": True}, **changes) for _ in range(2))
    (table,), head = tables(model), model.base_model.model.lm_head
    assert head.base_layer.weight is table.base_layer.weight
    of_head = [head.lora_A["default"].weight, head.lora_B["default"].weight]
    of_table = [table.lora_embedding_B["default"], table.lora_embedding_A["default"]]
    assert all((h.data_ptr() == t.data_ptr()) == ensure for h, t in zip(of_head, of_table, strict=True))
    plain = results(model, **padded())
    report = peft_kernels.patch(model, strict=True)
    with Operators() as operators:
        assert_as_close_as_peft(results(model, **padded()), plain, results(exact.double(), **padded()))
    assert [row.kind for row in report.rows] == ["lora.Embedding", "lora.Linear"]
    assert operators.calls["lora_embedding"] == operators.calls["lora_linear"] == 1


def test_trainable_tokens_of_another_layer():
    model = embedding_model(target_modules=["embed_tokens", "q_proj"], trainable_token_indices={"lm_head": [1, 5]})
    plain, exact = results(model), results(in_double(model))
    report = peft_kernels.patch(model)
    assert_as_close_as_peft(results(model), plain, exact)
    assert report.calls()["base_model.model.model.embed_tokens"].fused == 1


def test_rows_with_adapters_of_their_own_are_told_to_peft():
    model = several_adapters().eval()
    names = ["default", "stable", "__base__", "minor"]
    plain, exact = (results(m, **inputs(rows=4), adapter_names=names) for m in (model, in_double(model)))
    report = peft_kernels.patch(model, strict=True)
    assert_as_close_as_peft(results(model, **inputs(rows=4), adapter_names=names), plain, exact)
    assert report.fallbacks[MIXED] == 1 and nothing_is_left(model)
    per_token = torch.tensor([0, 1, -1, 2])[:, None].expand(4, 7)
    with peft_kernels.adapter_ids(per_token, adapters=["default", "stable", "minor"]):
        assert_as_close_as_peft(results(model, **inputs(rows=4)), plain, exact)
    assert report.fallbacks[MIXED] == 2
