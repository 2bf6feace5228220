"""AdaLoRA and VeRA in patched models against PEFT: results, gradients, switches, merging, saving; what is not kept."""

import copy
import pickle

import pytest
import torch
from models import (
    HIDDEN,
    LAYERS,
    Mask,
    adapted,
    assert_as_close_as_peft,
    assert_fused_like_peft,
    assert_saves_like_peft,
    base_model,
    calls_per_forward,
    in_double,
    inputs,
    randomise,
    results,
)
from peft import AdaLoraConfig, VeraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import peft_kernels
from peft_kernels.integrations.gathering import DISABLED, MERGED

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "mlp.c_proj"],
    "t5": ["q", "v", "wi", "wo"],
}


def adalora(name="llama", **changes):
    config = AdaLoraConfig(
        **{"init_r": 6, "target_r": 4, "lora_alpha": 8, "total_step": 20, "target_modules": TARGETS[name]} | changes
    )
    config.orth_reg_weight = 0.1
    return adapted(name, config)


def vera(name="llama", **changes):
    return adapted(name, VeraConfig(**{"r": 8, "target_modules": TARGETS[name]} | changes))


@pytest.mark.parametrize("make", [adalora, vera])
@pytest.mark.parametrize("name", TARGETS)
def test_a_step_is_pefts(make, name):
    model = make(name)
    report = assert_fused_like_peft(model)
    assert {row.kind for row in report.rows} - {"qkv", "gate_up"} == {
        "adalora.SVDLinear" if make is adalora else "vera.Linear"
    }
    if name == "llama":
        assert report.fused == 4 * LAYERS  # qkv, o, gate and up, down


@pytest.mark.parametrize("make", [adalora, vera])
@pytest.mark.parametrize(
    ("base", "factors"),
    [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
def test_on_a_16_bit_base(make, base, factors):
    model = make().to(base)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "lora_" in name or "ranknum" in name or "vera_" in name:
            tensor.data = tensor.data.to(factors)
    assert_fused_like_peft(model)


@pytest.mark.parametrize("make", [adalora, vera])
def test_dropout_is_drawn_anew_and_only_in_training(make):
    name = "lora_dropout" if make is adalora else "vera_dropout"
    model = make(**{name: 0.3}).train()
    report = peft_kernels.patch(model, strict=True)
    assert not torch.equal(results(model)["logits"], results(model)["logits"])
    model.eval()
    patched = results(model)
    with peft_kernels.unpatch(model):
        plain = results(model)
    assert_as_close_as_peft(patched, plain, results(in_double(model)))
    assert report.fused == 3 * calls_per_forward(report) and not report.fallbacks
    layer = model.train().base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(6, layer.in_features)
    torch.manual_seed(3)
    seed = peft_kernels.new_seed()
    torch.manual_seed(3)
    found = layer(x)
    getattr(layer, name)["default"] = Mask(seed, 0.3, 0)
    with peft_kernels.unpatch(model):
        torch.testing.assert_close(found, layer(x))


@pytest.mark.parametrize("make", [adalora, vera])
def test_switches_merging_and_saving(make, tmp_path):
    model = make().eval()
    report = peft_kernels.patch(model, strict=True)
    with torch.no_grad():
        before = model(**inputs()).logits
    with model.disable_adapter():
        assert torch.equal(model(**inputs()).logits, base_model("llama").eval()(**inputs()).logits)
    fused = report.fused
    assert fused == calls_per_forward(report) and DISABLED in report.fallbacks
    model.merge_adapter()
    with torch.no_grad():
        merged = model(**inputs()).logits
    assert MERGED in report.fallbacks and report.fused == fused
    model.unmerge_adapter()
    assert_as_close_as_peft({"merged": merged}, {"merged": before}, {"merged": model.double()(**inputs()).logits})
    assert_saves_like_peft(make(), base_model("llama"), tmp_path)


@pytest.mark.parametrize("make", [adalora, vera])
def test_rows_with_adapters_of_their_own(make):
    """PEFT has no mixed batches of these methods."""
    model = make().eval()
    config = model.peft_config["default"]
    if make is adalora:
        config.inference_mode = True  # PEFT trains one adapter of this method at a time
    model.add_adapter("other", config)
    randomise(model)
    tokens = inputs(rows=4)["input_ids"]
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = model(input_ids=tokens).logits
    with model.disable_adapter():
        alone[None] = model(input_ids=tokens).logits
    peft_kernels.patch(model, strict=True)
    with peft_kernels.adapter_ids([1, -1, 0, 1], ["default", "other"]):
        mixed = model(input_ids=tokens).logits
    expected = torch.stack([alone[name][i] for i, name in enumerate(["other", None, "default", "other"])])
    torch.testing.assert_close(mixed, expected)


@pytest.mark.parametrize("make", [adalora, vera])
def test_rows_of_a_layer_in_a_state_without_a_kernel_are_refused(make):
    model = make(target_modules=["down_proj"]).eval()
    report = peft_kernels.patch(model, strict=True)
    for layer in model.base_model.model.model.layers:
        dropouts = layer.mlp.down_proj.lora_dropout if make is adalora else layer.mlp.down_proj.vera_dropout
        dropouts["default"] = nn.Dropout1d(0.0)
    model(**inputs())
    method = "AdaLoRA" if make is adalora else "VeRA"
    refused = rf"adapter_ids: PEFT has no mixed batch of {method}, .* \(lora_dropout is a Dropout1d\).*set_adapter"
    with peft_kernels.adapter_ids([0, -1], ["default"]), pytest.raises(ValueError, match=refused):
        model(**inputs())
    assert report.fallbacks == {"lora_dropout is a Dropout1d": LAYERS + 1} and report.fused == 0
    model.merge_adapter()
    with peft_kernels.adapter_ids([0, -1], ["default"]), pytest.raises(ValueError, match=f"{method}, .* \\(merged"):
        model(**inputs())


STATES = {
    "active": lambda model: None,
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "inactive": lambda model: [m.set_adapter([]) for m in model.modules() if isinstance(m, BaseTunerLayer)],
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("make", [adalora, vera])
def test_under_autocast_the_output_has_pefts_dtype(make, state):
    """x's for VeRA, in every state; what autocast computed in for AdaLoRA."""
    model = make().eval()
    STATES[state](model)
    mlp, x = model.base_model.model.model.layers[0].mlp, torch.randn(3, HIDDEN)
    with torch.autocast("cpu", torch.bfloat16):
        plain = [mlp.gate_proj(x), mlp.up_proj(x), mlp(x)]
        peft_kernels.patch(model, strict=state != "merged")
        found = [mlp.gate_proj(x), mlp.up_proj(x), mlp(x)]
        grouped = mlp.project(x)
    assert plain[0].dtype is (torch.bfloat16 if make is adalora else torch.float32)
    assert [y.dtype for y in found] == [y.dtype for y in plain]
    assert (grouped is None) == (state != "active")
    assert grouped is None or [y.dtype for y in grouped] == [y.dtype for y in plain[:2]]


def test_under_autocast_an_mlp_with_vera_is_not_recomputed():
    model = vera()
    report = peft_kernels.patch(model, strict=True, recompute_mlp=True)
    mlp, x = model.base_model.model.model.layers[0].mlp, torch.randn(3, HIDDEN)
    mlp(x)
    assert not report.fallbacks
    with torch.autocast("cpu", torch.bfloat16):
        assert mlp(x).dtype is torch.float32
    assert report.fallbacks == {"not recomputed: gate_proj: VeRA under autocast: its output is cast": 1}


def test_adalora_allocates_ranks_while_it_is_patched():
    """PEFT's allocator reads the gradients of E, masks E in place, and resizes at the end."""
    states = []
    for patched in (False, True):
        model = adalora(tinit=1, tfinal=1, deltaT=1, total_step=6, init_r=4, target_r=2)
        if patched:
            report = peft_kernels.patch(model, strict=True)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for step in range(6):
            loss = model(**inputs()).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
        states.append(model.base_model.peft_config["default"].rank_pattern)
    assert states[0] and states[0] == states[1]
    assert report.fused == 6 * calls_per_forward(report)


def test_a_rank_of_zero_is_left_to_peft():
    model = adalora().eval()
    report = peft_kernels.patch(model, strict=True)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    for factor, shape in (("lora_A", (0, layer.in_features)), ("lora_E", (0, 1)), ("lora_B", (layer.out_features, 0))):
        getattr(layer, factor)["default"] = nn.Parameter(torch.zeros(shape))
    model(**inputs())
    assert report.fallbacks == {"rank 0": 1} and report.fused == calls_per_forward(report) - 1


@pytest.mark.parametrize("make", [adalora, vera])
def test_classes_copies_and_compiled_graphs(make):
    model = make().eval()
    classes = {name: type(module) for name, module in model.named_modules()}
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    peft_kernels.patch(model, strict=True)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    mlp, x = model.base_model.model.model.layers[0].mlp, torch.randn(2, 5, HIDDEN)
    wanted = [p for p in mlp.parameters() if p.requires_grad]
    expected = torch.autograd.grad(mlp(x).square().sum(), wanted)
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), wanted), expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        report = peft_kernels.patch(twin, strict=True)
        with torch.no_grad():
            assert torch.equal(twin(**inputs()).logits, model(**inputs()).logits)
        assert report.fused == calls_per_forward(report)
    peft_kernels.unpatch(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes


def test_vera_keeps_nothing_for_its_frozen_factors():
    """Neither x nor a gradient of A; the vectors alone train."""
    model = vera(target_modules=["down_proj"])
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(50, layer.in_features)
    peft_kernels.patch(model, strict=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x).sum().backward()
    assert not any(t.shape == x.shape for t in saved)
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {
        "vera_lambda_d.default",
        "vera_lambda_b.default",
    }
