"""DoRA in patched models against PEFT: results, gradients, dropout, groups, mixed batches, switches, saving; when norms
are computed and when they are kept."""

import copy
import gc

import pytest
import torch
from models import (
    LAYERS,
    Operators,
    adapted,
    assert_as_close_as_peft,
    assert_fused_like_peft,
    assert_saves_like_peft,
    base_model,
    calls_per_forward,
    in_double,
    inputs,
    lora_config,
    nothing_is_left,
    peft_model,
    randomise,
    results,
)
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

import peft_kernels
from peft_kernels.integrations import dora
from peft_kernels.integrations.dora import TOGETHER
from peft_kernels.integrations.gathering import DISABLED, MERGED, ONE_EACH


def dora_model(name="llama", **changes):
    targets = {"gpt2": ["c_attn", "c_fc", "c_proj"]}.get(name, "all-linear")
    return peft_model(name, **{"target_modules": targets, "use_dora": True, "fan_in_fan_out": name == "gpt2"} | changes)


def mlp_of(model):
    return model.base_model.model.model.layers[0].mlp


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_step_is_pefts(name):
    model = dora_model(name)
    with Operators() as operators:
        report = assert_fused_like_peft(model)
    layers = sum(row.kind == "lora.Linear" for row in report.rows)
    assert operators.calls["dora_scale"] == operators.calls["dora_norm"] == layers
    assert operators.calls["lora_linear"] == calls_per_forward(report)
    assert name != "llama" or report.fused == 4 * LAYERS  # q, k and v are one call, gate and up another


def test_in_16_bit():
    for factors in (torch.float32, torch.bfloat16):
        model = dora_model().bfloat16()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(factors)
        assert_fused_like_peft(model)


def test_some_of_a_group_have_dora_and_others_lora_or_nothing():
    model = dora_model(target_modules=["q_proj", "up_proj"], r=3)
    model.add_adapter("plain", lora_config(target_modules=["k_proj", "down_proj"]))
    model.base_model.set_adapter(["default", "plain"])
    assert_fused_like_peft(randomise(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_pefts_to_the_mask(dtype):
    """PEFT drops x before W too; its draws are the same where the layers are called in its order."""
    model = dora_model(lora_dropout=0.3).train().to(dtype)

    def step(model):
        torch.manual_seed(5)
        return results(model)

    plain, exact = step(model), step(in_double(model))
    report = peft_kernels.patch(model, strict=True)
    assert_as_close_as_peft(step(model), plain, exact)
    assert report.fused == 7 * LAYERS and report.fallbacks == {ONE_EACH: 2 * LAYERS}
    report.verify(**inputs())
    model.eval()
    assert_as_close_as_peft(results(model), results(peft_plain(model)), results(in_double(peft_plain(model))))
    assert report.fallbacks == {ONE_EACH: 4 * LAYERS}


def peft_plain(model):
    """A copy that plain PEFT runs."""
    twin = copy.deepcopy(model)
    peft_kernels.unpatch(twin)
    return twin


def test_together_with_another_adapter_it_is_left_to_peft():
    for order in (["default", "plain"], ["plain", "default"]):
        model = dora_model(target_modules=["down_proj"])
        model.add_adapter("plain", lora_config(target_modules=["down_proj"]))
        model.base_model.set_adapter(order)
        randomise(model)
        plain = results(model)
        report = peft_kernels.patch(model)
        assert {row.reason for row in report.rows} == {TOGETHER}
        found = results(model)
        assert all(torch.equal(found[name], plain[name]) for name in plain)
        assert report.fused == 0 and report.fallbacks == {TOGETHER: LAYERS}


def test_switches_merging_and_saving(tmp_path):
    model = dora_model().eval()
    report = peft_kernels.patch(model, strict=True)
    with torch.no_grad():
        before, exact = model(**inputs()).logits, in_double(peft_plain(model))(**inputs()).logits
        with model.disable_adapter():
            assert torch.equal(model(**inputs()).logits, base_model("llama").eval()(**inputs()).logits)
        model.merge_adapter()
        assert_as_close_as_peft({"y": model(**inputs()).logits}, {"y": before}, {"y": exact})
        model.unmerge_adapter()
        assert_as_close_as_peft({"y": model(**inputs()).logits}, {"y": before}, {"y": exact})
    assert report.fused == 2 * calls_per_forward(report) and {DISABLED, MERGED} <= report.fallbacks.keys()
    assert_saves_like_peft(dora_model(), base_model("llama"), tmp_path)


# -- rows -------------------------------------------------------------------------------------------------------------


def three_adapters():
    """DoRA, DoRA of another rank and plain LoRA, on different layers."""
    model = dora_model(r=4)
    model.add_adapter("other", lora_config(r=3, use_dora=True, target_modules=["q_proj", "o_proj", "up_proj"]))
    model.add_adapter("plain", lora_config(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
    return randomise(model)


ADAPTERS = ["default", "other", "plain"]
ROWS = ["plain", "default", None, "other", "default"]


def test_each_row_has_its_own_adapter():
    """PEFT refuses DoRA in a mixed batch, so each adapter is run alone."""
    model = three_adapters().eval()
    tokens = inputs(rows=5)["input_ids"]
    alone = {}
    for name in ADAPTERS:
        model.set_adapter(name)
        alone[name] = [results_of(model, tokens), results_of(in_double(model), tokens)]
    with model.disable_adapter():
        alone[None] = [results_of(model, tokens), results_of(in_double(model), tokens)]
    report = peft_kernels.patch(model, strict=True)
    plain, exact = (torch.stack([alone[name][i][row] for row, name in enumerate(ROWS)]) for i in range(2))
    with torch.no_grad():
        by_names = model(input_ids=tokens, adapter_names=[name or "__base__" for name in ROWS]).logits
        with peft_kernels.adapter_ids([-1 if name is None else ADAPTERS.index(name) for name in ROWS], ADAPTERS):
            by_ids = model(input_ids=tokens).logits
    assert_as_close_as_peft({"y": by_names}, {"y": plain}, {"y": exact})
    assert torch.equal(by_ids, by_names)
    assert report.fused == 2 * calls_per_forward(report) and not report.fallbacks and nothing_is_left(model)


@torch.no_grad()
def results_of(model, tokens):
    return model(input_ids=tokens).logits


def test_training_together_is_training_each_alone():
    model = in_double(three_adapters()).eval()
    tokens, ids = inputs(rows=5)["input_ids"], torch.tensor([2, 0, -1, 1, 0])
    alone = {}
    for index, name in enumerate(ADAPTERS):
        model.set_adapter(name)
        model.zero_grad()
        model(input_ids=tokens[ids == index]).logits.square().sum().backward()
        alone |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and f".{name}." in n}
    model.set_requires_grad(ADAPTERS)
    model.zero_grad()
    peft_kernels.patch(model, strict=True)
    with peft_kernels.adapter_ids(ids, ADAPTERS):
        model(input_ids=tokens).logits.square().sum().backward()
    together = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(together, alone)


def test_dropout_in_a_mixed_batch_is_refused_by_peft():
    model = dora_model(lora_dropout=0.2).train()
    report = peft_kernels.patch(model, strict=True)
    with peft_kernels.adapter_ids([0, -1], ["default"]), pytest.raises(ValueError, match="when DoRA is enabled"):
        model(**inputs())
    assert "DoRA with dropout in a mixed batch" in report.fallbacks and report.fused == 0


# -- norms ------------------------------------------------------------------------------------------------------------


def norms(function):
    with Operators() as operators:
        function()
    return operators.calls["dora_norm"]


def test_norms_of_what_is_frozen_are_kept():
    model = dora_model(target_modules=["down_proj"]).eval()
    report = peft_kernels.patch(model, strict=True)

    def infer():
        with torch.no_grad():
            model(**inputs())

    assert [norms(infer), norms(infer)] == [LAYERS, LAYERS]
    model.requires_grad_(False)
    assert [norms(infer), norms(infer), norms(lambda: model(**inputs()))] == [LAYERS, 0, 0]
    model.train()
    assert [norms(infer), norms(infer)] == [LAYERS, 0]
    model.eval()
    assert [norms(infer), norms(infer)] == [LAYERS, 0]
    with peft_kernels.unpatch(model):
        infer()
    assert [norms(infer), norms(infer)] == [LAYERS, 0]
    mlp_of(model).down_proj.lora_B["default"].weight.requires_grad_(True)
    assert [norms(infer), norms(infer)] == [1, 1]
    mlp_of(model).down_proj.lora_B["default"].weight.requires_grad_(False)
    assert [norms(infer), norms(infer)] == [1, 0]
    with torch.inference_mode():
        assert norms(lambda: model(**inputs())) == 0
    state = {name: 1.5 * tensor for name, tensor in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, state)
    assert [norms(infer), norms(infer)] == [LAYERS, 0]
    model.merge_adapter()
    model.unmerge_adapter()
    assert [norms(infer), norms(infer)] == [LAYERS, 0]
    mlp_of(model).down_proj.scale_layer(2.0)
    assert [norms(infer), norms(infer)] == [1, 0]
    assert report.fused and not report.fallbacks


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_of_any_optimizer_is_seen(optimizer_class):
    """A fused optimizer changes a parameter without a trace on it."""
    model = dora_model(target_modules=["down_proj"]).eval()
    peft_kernels.patch(model, strict=True)
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    for _ in range(2):
        results(model)
        with torch.no_grad():
            model(**inputs())
        optimizer.step()
        with torch.no_grad():
            found, plain = model(**inputs()).logits, peft_plain(model)(**inputs()).logits
            exact = in_double(peft_plain(model))(**inputs()).logits
        assert_as_close_as_peft({"y": found}, {"y": plain}, {"y": exact})


def test_a_norm_of_inference_mode_serves_training_of_the_magnitude():
    model = dora_model(target_modules=["down_proj"]).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("magnitude" in name)
    plain, exact = results(model), results(in_double(model))
    peft_kernels.patch(model, strict=True)
    with torch.inference_mode():
        assert norms(lambda: model(**inputs())) == LAYERS
    found = {}
    assert norms(lambda: found.update(results(model))) == 0
    assert_as_close_as_peft(found, plain, exact)


def test_a_parameter_that_was_replaced_is_seen():
    model = dora_model(target_modules=["down_proj"]).eval().requires_grad_(False)
    peft_kernels.patch(model, strict=True)
    with torch.no_grad():
        model(**inputs())
        base = mlp_of(model).down_proj.base_layer
        base.weight = torch.nn.Parameter(2 * base.weight, requires_grad=False)
        assert norms(lambda: model(**inputs())) == 1


def test_nothing_stays_of_a_model_that_is_gone():
    gc.collect()
    before = len(dora._NORMS)
    model = dora_model(target_modules=["down_proj"]).eval().requires_grad_(False)
    state = {name: set(module.__dict__) for name, module in model.named_modules()}
    peft_kernels.patch(model, strict=True)
    with torch.no_grad():
        model(**inputs())
    assert len(dora._NORMS) == before + LAYERS
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == state
    del model
    gc.collect()
    assert len(dora._NORMS) == before


def test_states_that_are_left_to_peft():
    def hooked(layer):
        layer.lora_magnitude_vector["default"].register_forward_hook(lambda *a: None)

    def wide(layer):
        layer.lora_magnitude_vector["default"].double()

    reasons = {
        hooked: "hook on lora_A, lora_B or lora_dropout",
        wide: "a magnitude in torch.float64 on a base in torch.",
    }
    for change, reason in reasons.items():
        model = dora_model(target_modules=["down_proj"]).eval()
        report = peft_kernels.patch(model, strict=True)
        change(mlp_of(model).down_proj)
        model(**inputs())
        assert report.fused == LAYERS - 1 and [why.startswith(reason) for why in report.fallbacks] == [True]


def test_a_compiled_step_is_one_graph():
    model = dora_model(target_modules=["gate_proj", "up_proj", "down_proj"], lora_dropout=0.0)
    peft_kernels.patch(model, strict=True)
    mlp, x = mlp_of(model), torch.randn(2, 5, 32)
    wanted = [p for p in mlp.parameters() if p.requires_grad]
    expected = torch.autograd.grad(mlp(x).square().sum(), wanted)
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x).square().sum(), wanted)
    torch.testing.assert_close(found, expected)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), mlp(x))


def test_a_head_and_a_checkpoint():
    model = adapted("llama", lora_config(target_modules=["lm_head", "q_proj"], use_dora=True))
    model.enable_input_require_grads()
    report = peft_kernels.patch(model.train(), strict=True)
    expected = results(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = results(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert report.fused > 2 * calls_per_forward(report) and not report.fallbacks


def test_one_of_several_adapters_is_loaded_alone(tmp_path):
    model = three_adapters()
    peft_kernels.patch(model, strict=True)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path / "other", adapter_name="other").eval()
    model.eval().set_adapter("other")
    report = peft_kernels.patch(loaded, strict=True)
    # Not bit for bit: what MKL sums of a loaded tensor depends on where the file put it.
    tokens = inputs()["input_ids"]
    torch.testing.assert_close(results_of(loaded, tokens), results_of(model, tokens))
    assert report.fused == calls_per_forward(report)
