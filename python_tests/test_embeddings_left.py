"""What patch leaves to PEFT of LoRA on embeddings, each with its true reason and counted."""

import pytest
import torch
from embedding_models import block, ids_of, step, tables
from models import HIDDEN, VOCAB, lora_config, randomise
from peft.tuners import lora
from torch import nn
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledEmbedding

import peft_kernels
from peft_kernels.integrations.embeddings import FusedEmbedding
from peft_kernels.integrations.gathering import MAX_RANK, NAMED, WITHOUT_KERNEL


def with_base(**attributes):
    def change(model):
        for name, value in attributes.items():
            setattr(tables(model)[0].base_layer, name, value)

    return change


def shifted(model):
    """As tensor parallel layers have it."""
    tables(model)[0].input_fns["default"] = lambda x: x[0]


def smaller(model):
    factor = tables(model)[0].lora_embedding_A
    model.add_adapter("more", lora_config(target_modules=["layer"]))
    model.base_model.set_adapter(["default", "more"])
    factor["more"] = nn.Parameter(factor["more"].detach().tile(1, 2))
    randomise(model)


def resized(model):
    """Tokens came after the adapters."""
    base = tables(model)[0].base_layer
    base.weight = nn.Parameter(torch.cat([base.weight.detach(), torch.ones(5, HIDDEN)]), requires_grad=False)


def in_several_dtypes(model):
    model.add_adapter("more", lora_config(target_modules=["layer"]))
    model.base_model.set_adapter(["default", "more"])
    for factor in (tables(model)[0].lora_embedding_A, tables(model)[0].lora_embedding_B):
        factor["more"] = nn.Parameter(factor["more"].detach().bfloat16())
    randomise(model)


LEFT = {
    "dora": ({"use_dora": True}, None, "Dora changes the maths"),
    "rank": ({"r": MAX_RANK + 1}, None, f"rank {MAX_RANK + 1} is above {MAX_RANK}"),
    "dtypes": ({}, in_several_dtypes, "factors of several dtypes in one call"),
    "sizes": ({}, smaller, "tables of several sizes in one call"),
    "resized": ({}, resized, f"lora_embedding_A has {VOCAB} columns and the table {VOCAB + 5} rows"),
    "padding": ({}, with_base(padding_idx=-1), "padding_idx -1 of the base layer"),
    "tensor-parallel": ({}, shifted, "tensor parallel: PEFT changes ids and rows"),
}
NEVER = {
    "max_norm": (with_base(max_norm=0.1), "max_norm of the base layer"),
    "sparse": (with_base(sparse=True), "sparse gradients"),
    "by-frequency": (with_base(scale_grad_by_freq=True), "scale_grad_by_freq gradients"),
    "scales": (with_base(embed_scale=torch.ones(HIDDEN)), "embed_scale of the base layer is not one number"),
}


@pytest.mark.filterwarnings("ignore:Found embed_scale attribute")
@pytest.mark.parametrize("before", [True, False], ids=["found-by-patch", "since"])
@pytest.mark.parametrize("case", [*LEFT, *NEVER])
def test_what_is_left_to_peft_has_the_true_reason(case, before):
    changes, change, reason = LEFT.get(case) or ({}, *NEVER[case])
    model, twin = (block(**changes) for _ in range(2))
    for other in (twin, model)[: 1 + before]:
        change and change(other)
    report = peft_kernels.patch(model)
    if before or change is None:
        assert [row.reason[: len(reason)] for row in report.rows] == [reason]
        assert (not report.left) == (case in LEFT)
    else:
        assert isinstance(tables(model)[0], FusedEmbedding)
        change(model)
    if case == "sparse":  # PEFT's backward raises
        twin.requires_grad_(False), model.requires_grad_(False)
    plain, found = step(twin), step(model)
    assert all(torch.equal(found[name], plain[name]) for name in plain) and found.keys() == plain.keys()
    assert report.fused == 0
    if not (before and case in NEVER):
        assert [text[: len(reason)] for text in report.fallbacks] == [reason]


class Ids(torch.Tensor):
    """A tensor of somebody's own."""


def test_other_arguments_are_left_to_peft():
    model = block(Named(VOCAB, HIDDEN))
    plain = [model(ids_of(), shift=1), model(ids_of().as_subclass(Ids))]
    report = peft_kernels.patch(model, strict=True)
    assert torch.equal(model(ids_of(), shift=1), plain[0])
    assert torch.equal(model(ids_of().as_subclass(Ids)), plain[1])
    assert report.fallbacks == {NAMED: 1, "x is a Ids": 1} and report.fused == 0


class Named(nn.Embedding):
    def forward(self, ids, shift=0):
        return super().forward(ids) + shift


def test_a_class_of_somebody_else_is_left_alone():
    model = block()
    tables(model)[0].__class__ = type("Mine", (lora.Embedding,), {})
    assert [row.reason for row in peft_kernels.patch(model).left] == ["Mine has a forward of its own"]


def test_a_device_without_a_kernel_keeps_pefts_layer(monkeypatch):
    model = block()
    monkeypatch.setitem(WITHOUT_KERNEL["lora_embedding"], "cpu", "nothing here")
    assert [row.reason for row in peft_kernels.patch(model).left] == ["nothing here"]
    assert not isinstance(tables(model)[0], FusedEmbedding)


@pytest.mark.parametrize("two", [False, True], ids=["of-4-bits", "with-a-second-table"])
def test_ids_that_lora_embedding_A_has_no_column_for(two):
    """PEFT refuses them; an op on a GPU would add nothing for them."""
    if two:
        model = block(IdeficsDecoupledEmbedding(VOCAB, 2, HIDDEN))
    else:
        bnb = pytest.importorskip("bitsandbytes")
        model = block(bnb.nn.EmbeddingNF4(VOCAB, 2 * HIDDEN).to("cpu"))
        tables(model)[0].base_layer = bnb.nn.EmbeddingNF4(VOCAB + 2, 2 * HIDDEN).to("cpu")
    plain = model(ids_of())
    report = peft_kernels.patch(model)
    reason = f"lora_embedding_A has {VOCAB} columns and the table {VOCAB + 2} rows"
    assert [row.reason for row in report.rows] == [reason]
    assert torch.equal(model(ids_of()), plain)
    assert tables(model)[0].base_layer(torch.tensor([VOCAB + 1])).shape[0] == 1
    with pytest.raises(IndexError):
        model(torch.tensor([VOCAB + 1]))
    assert report.fallbacks == {reason: 2} and report.fused == 0


def test_factors_may_be_flattened_while_a_model_is_patched():
    """As FSDP1's and ZeRO-3's are between forwards; in a forward they have their shape."""
    model = block()
    plain, factors = model(ids_of()), [d["default"] for d in factors_of(tables(model)[0])]
    shapes = [factor.shape for factor in factors]
    for factor in factors:
        factor.data = factor.data.flatten()
    report = peft_kernels.patch(model)
    assert "flattened" in report.rows[0].reason
    for factor, shape in zip(factors, shapes, strict=True):
        factor.data = factor.data.view(shape)
    torch.testing.assert_close(model(ids_of()), plain)
    assert report.fused == 1 and not report.fallbacks


def factors_of(layer):
    return layer.lora_embedding_A, layer.lora_embedding_B
