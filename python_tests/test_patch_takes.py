"""One model with every kind of adapter that PEFT trains side by side: what patch takes, and what it leaves and why."""

import torch
from models import (
    HIDDEN,
    INNER,
    Operators,
    assert_as_close_as_peft,
    base_model,
    in_double,
    inputs,
    lora_config,
    randomise,
    results,
)
from peft import get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import peft_kernels


class Shifted(nn.Linear):
    """A linear layer of somebody's own."""

    def forward(self, x):
        return super().forward(x) + 1


def with_every_adapter():
    """Different kinds on different projections, all active."""
    model = base_model("llama")
    for layer in model.model.layers:
        layer.mlp.gate_proj = Shifted(HIDDEN, INNER, bias=False)
    kinds = {
        "plain": (["up_proj", "lm_head", "embed_tokens"], {}),
        "dora": (["q_proj"], {"use_dora": True}),
        "orthonormal": (["k_proj"], {"init_lora_weights": "olora"}),
        "mica": (["o_proj"], {"init_lora_weights": "mica"}),
        "rank_stabilised": (["v_proj"], {"use_rslora": True, "lora_dropout": 0.1}),
        "over_another": (["gate_proj"], {}),
        "principal": (["down_proj"], {"init_lora_weights": "pissa"}),
    }
    adapted = None
    for name, (targets, changes) in kinds.items():
        config = lora_config(target_modules=targets, **changes)
        if adapted is None:
            adapted = get_peft_model(model, config, adapter_name=name)
        else:
            adapted.add_adapter(name, config)
    adapted.base_model.set_adapter(list(kinds))
    return randomise(adapted).eval()


def test_every_adapter_of_a_model_runs_fused():
    model = with_every_adapter()
    plain, exact = results(model), results(in_double(model))
    report = peft_kernels.patch(model, strict=True)
    with Operators() as operators:
        assert_as_close_as_peft(results(model), plain, exact)
    layers = [row for row in report.rows if row.kind in ("lora.Linear", "lora.Embedding")]
    assert len(layers) == 16 and all(row.kernel and not row.reason for row in layers)
    # q, k and v of a layer are one call; its gate is another kernel, so that gate and up cannot be one
    assert [(row.kind, row.reason) for row in report.left] == [
        ("gate_up", "gate_proj: its base layer is another kernel")
    ] * 2
    calls = [operators.calls[op] for op in ("lora_linear", "lora_add", "lora_embedding")]
    assert report.fused == sum(calls) == 2 * 5 + 2 and calls[2] == 1
    assert operators.calls["lora_add"] == operators.calls["dora_scale"] == 2
    report.verify(**inputs())


def test_what_is_left_has_the_true_reason():
    torch.manual_seed(1)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=2,
        )
    )  # fmt: skip
    model = get_peft_model(
        model, lora_config(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    )
    report = peft_kernels.patch(randomise(model))
    experts = [row.reason for row in report.rows if row.kind == "ParamWrapper"]
    assert len(experts) == 2 and len(set(experts)) == 1 and "MoE experts" in experts[0]
    assert {row.kind for row in report.left} == {"ParamWrapper"}
    model(**inputs())
    assert report.fused == 1 and not report.fallbacks
