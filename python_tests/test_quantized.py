"""LoRA on 4-bit, 8-bit and other bases that are somebody else's kernel, against PEFT: results, every gradient, saving,
calls, what is kept for the backward, and when the base's output may be written to."""

import copy
import pickle

import pytest
import torch
from models import (
    HIDDEN,
    LAYERS,
    Operators,
    assert_as_close_as_peft,
    inputs,
    lora_config,
    randomise,
    results,
)
from peft import (
    AdaLoraConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
)
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from quantised_models import (
    KINDS,
    PROJECTIONS,
    assert_step_like_peft,
    eight_bit,
    exactly,
    four_bit,
    halved,
    lora_on,
    quantised,
    subclassed,
)
from torch import nn

import peft_kernels
from peft_kernels.integrations.dora import dequantised
from peft_kernels.integrations.foreign_bases import MIXED
from peft_kernels.integrations.gathering import DISABLED, INACTIVE


@pytest.mark.parametrize("quantise", KINDS)
def test_a_step_is_pefts(quantise):
    assert_step_like_peft(lora_on(quantise))


@pytest.mark.parametrize("quantise", [four_bit, eight_bit])
def test_fp32_adapters_on_a_bf16_model(quantise):
    model = lora_on(quantise, torch.bfloat16)
    assert model.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight.dtype is torch.float32
    assert_step_like_peft(model)


@pytest.mark.parametrize("quantise", KINDS)
def test_inference_and_where_it_may_be_in_place(quantise):
    model = lora_on(quantise).eval()
    with torch.no_grad():
        plain, exact = model(**inputs()).logits, exactly(model)(**inputs()).logits
        report = peft_kernels.patch(model, strict=True)
        with Operators() as operators:
            found = model(**inputs()).logits
    assert_as_close_as_peft({"y": found}, {"y": plain}, {"y": exact})
    own = PROJECTIONS if quantise is four_bit else 0
    assert (operators.calls["lora_add_"], operators.calls["lora_add"]) == (own, PROJECTIONS - own)
    report.verify(**inputs())


def test_an_output_that_somebody_sees_is_not_written_to():
    model = lora_on(four_bit, target_modules=["down_proj"]).eval()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    peft_kernels.patch(model, strict=True)
    x, seen = torch.randn(3, layer.in_features), []
    with torch.no_grad():
        expected = layer.base_layer(x)
        hook = layer.base_layer.register_forward_hook(lambda module, args, y: seen.append(y))
        with Operators() as operators:
            y = layer(x)
            assert torch.equal(seen[0], expected) and not torch.equal(y, expected)
            hook.remove()
            assert torch.equal(layer(x), y)
    assert (operators.calls["lora_add"], operators.calls["lora_add_"]) == (1, 1)


class Keeps(Operators):
    """Keeps an alias of whatever is computed."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        y = super().__torch_dispatch__(function, types, args, kwargs)
        self.kept = [*getattr(self, "kept", ()), *([y.detach()] if isinstance(y, torch.Tensor) else [])]
        return y


@pytest.mark.parametrize("mode", [Operators, Keeps])
def test_an_output_of_which_somebody_has_an_alias_is_not_written_to(mode):
    model = lora_on(four_bit, target_modules=["down_proj"]).eval()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    peft_kernels.patch(model, strict=True)
    x, seen = torch.randn(3, layer.in_features), []
    with torch.no_grad():
        expected = layer.base_layer(x)
        if mode is Operators:
            hook = nn.modules.module.register_module_forward_hook(
                lambda module, args, y: seen.append(y.detach()) if module is layer.base_layer else None
            )
        with mode() as operators:
            layer(x)
        if mode is Operators:
            hook.remove()
        assert any(torch.equal(y, expected) for y in seen or operators.kept)
    assert (operators.calls["lora_add"], operators.calls["lora_add_"]) == (1, 0)


def test_dropout_is_drawn_anew_and_replayed():
    model = lora_on(four_bit, target_modules=["down_proj"], lora_dropout=0.4).train()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    peft_kernels.patch(model, strict=True)
    x = torch.randn(3, layer.in_features)
    assert not torch.equal(layer(x), layer(x))
    torch.manual_seed(3)
    seed, y = peft_kernels.new_seed(), None
    torch.manual_seed(3)
    y = layer(x)
    mask = peft_kernels.lora_dropout_mask(seed, 3, layer.in_features, 0.4, 0)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    kept = int(0.6 * 65536 + 0.5)
    expected = layer.base_layer(x) + layer.scaling["default"] * (x * mask * (65536 / kept)) @ a.mT @ b.mT
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("quantise", [four_bit, eight_bit])
def test_less_is_kept_than_by_peft(quantise):
    """In bf16 with fp32 adapters PEFT keeps an fp32 copy of x; 8-bit and 4-bit bases keep nothing of it."""
    model = lora_on(quantise, torch.bfloat16, target_modules=["down_proj"], lora_dropout=0.1).train()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(200, layer.in_features, dtype=torch.bfloat16, requires_grad=True)

    def kept():
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: storages.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
        ):
            layer(x).sum().backward()
        return sum(t.untyped_storage().nbytes() for t in storages.values() if t.dim() and len(t) == 200)

    plain = kept()
    peft_kernels.patch(model, strict=True)
    patched = kept()
    assert patched <= x.numel() * 2 + 200 * 4 * 4 < plain


@pytest.mark.parametrize("quantise", KINDS)
def test_it_saves_loads_and_restores(quantise, tmp_path):
    model = lora_on(quantise).eval()
    classes = {name: type(module) for name, module in model.named_modules()}
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    peft_kernels.patch(model, strict=True)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    with torch.no_grad():
        expected = model(**inputs()).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised(quantise), tmp_path).eval()
    report = peft_kernels.patch(loaded, strict=True)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs()).logits, expected)
    assert report.fused == PROJECTIONS
    peft_kernels.unpatch(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert get_peft_model_state_dict(model).keys() == get_peft_model_state_dict(loaded).keys()


def test_switches_rows_and_reasons():
    model = lora_on(four_bit).eval()
    model.add_adapter("other", lora_config(r=3))
    randomise(model)
    report = peft_kernels.patch(model, strict=True)
    assert {row.reason for row in report.left} == {
        "q_proj: its base layer is another kernel",
        "gate_proj: its base layer is another kernel",
    }
    with torch.no_grad():
        with model.disable_adapter():
            model(**inputs())
        assert report.fused == 0 and report.fallbacks == {"adapters disabled: the base layer alone": PROJECTIONS}
        batch = inputs(rows=3)
        mixed = model(**batch, adapter_names=["default", "__base__", "other"]).logits
        with peft_kernels.unpatch(model):
            torch.testing.assert_close(mixed, model(**batch, adapter_names=["default", "__base__", "other"]).logits)
        assert report.fallbacks[MIXED] == PROJECTIONS and report.fused == 0
        model.base_model.set_adapter(["default", "other"])
        model(**inputs())
        assert report.fused == PROJECTIONS
        for layer in model.modules():
            if hasattr(layer, "lora_A"):
                layer.set_adapter([])
        model(**inputs())
        assert report.fallbacks[INACTIVE] == PROJECTIONS
    twin = pickle.loads(pickle.dumps(model.base_model.model.model.layers[0].mlp.up_proj))
    assert type(twin) is type(model.base_model.model.model.layers[0].mlp.up_proj)


@pytest.mark.parametrize("quantise", [four_bit, eight_bit])
def test_merging(quantise):
    model = lora_on(quantise).eval()
    report = peft_kernels.patch(model, strict=True)
    with torch.no_grad():
        model.merge_adapter()
        merged = model(**inputs()).logits
        with peft_kernels.unpatch(model):
            assert torch.equal(model(**inputs()).logits, merged)
        model.unmerge_adapter()
        found = model(**inputs()).logits
        with peft_kernels.unpatch(model):
            plain = model(**inputs()).logits
        assert_as_close_as_peft({"y": found}, {"y": plain}, {"y": exactly(model)(**inputs()).logits})
    assert report.fused == PROJECTIONS and report.fallbacks == {"merged: the base layer alone": PROJECTIONS}


@pytest.mark.parametrize("quantise", [four_bit, eight_bit, subclassed])
def test_dora(quantise):
    model = lora_on(quantise, use_dora=True)
    exact = results(exactly(model))
    plain = results(lora_on(quantise, use_dora=True))  # an 8-bit layer on a CPU outlives one step of PEFT's
    report = peft_kernels.patch(model, strict=True)
    with Operators() as operators:
        assert_as_close_as_peft(results(model), plain, exact)
    assert report.fused == operators.calls["lora_add"] == operators.calls["dora_norm"] == PROJECTIONS
    model.eval().requires_grad_(False)
    with torch.no_grad():
        with Operators() as operators:
            model(**inputs())
            found = model(**inputs()).logits
        plain = lora_on(quantise, use_dora=True).eval()(**inputs()).logits  # 8 bits round x too in inference
        assert_as_close_as_peft({"y": found}, {"y": plain}, {"y": exact["logits"]})
        assert operators.calls["dora_norm"] == PROJECTIONS and not report.fallbacks
        model.to("cpu").float()  # which swaps tensors of a subclass, where nobody refers to them weakly
        assert torch.equal(model(**inputs()).logits, found)


def test_dora_with_dropout_is_left_to_peft():
    model = lora_on(four_bit, use_dora=True, lora_dropout=0.3).train()
    report = peft_kernels.patch(model)
    reason = "DoRA with dropout on a base that is another kernel"
    assert {row.reason for row in report.rows if row.kernel} == {reason}
    torch.manual_seed(4)
    found = results(model)
    with peft_kernels.unpatch(model):
        torch.manual_seed(4)
        plain = results(model)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert report.fused == 0 and report.fallbacks == {reason: PROJECTIONS}


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("quantise", KINDS)
def test_autocast(quantise, device):
    model = lora_on(quantise, target_modules=["up_proj", "down_proj"])
    report = peft_kernels.patch(model, strict=True)
    x = torch.randn(3, HIDDEN)
    mlp = model.base_model.model.model.layers[0].mlp
    with torch.autocast(device, torch.bfloat16):
        found = mlp(x)
        with peft_kernels.unpatch(model):
            plain = mlp(x)
    assert found.dtype is plain.dtype and report.fused == 2
    exact = exactly(model).base_model.model.model.layers[0].mlp(x.double())
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize("nested", [False, True])
def test_a_weight_packed_for_the_processor_is_dequantised(nested):
    """What bitsandbytes does to a weight at its first inference where there is AVX512_BF16: its scales are rounded."""
    bnb = pytest.importorskip("bitsandbytes")
    base = bnb.nn.Linear4bit(128, 64, False, torch.float32, quant_type="nf4", compress_statistics=nested).to("cpu")
    before = dequantised(base)
    packed, state = bnb.functional._convert_weight_packed_for_cpu(base.weight.data, base.weight.quant_state)
    base.weight.data, base.weight.quant_state = packed, state
    for _ in range(2):  # the layer stays as it is
        found = dequantised(base)
        assert found.dtype is before.dtype
        assert ((found - before).abs() <= before.abs() * torch.finfo(torch.bfloat16).eps).all()
    assert base.weight.data is packed or torch.equal(base.weight.data, packed)
    assert state.packing_format_for_cpu and state.absmax.dtype is torch.bfloat16


@pytest.mark.parametrize("quantise", [four_bit, halved])
def test_vera_gives_the_dtype_of_x_under_autocast(quantise):
    model = randomise(get_peft_model(quantised(quantise), VeraConfig(r=6, target_modules=["up_proj"])))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    report, x = peft_kernels.patch(model, strict=True), torch.randn(3, HIDDEN)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
        with model.disable_adapter():
            assert layer(x).dtype is torch.float32
        with peft_kernels.unpatch(model):
            assert layer(x).dtype is torch.float32
    assert found.dtype is torch.float32 and report.fused == 1


def test_checkpointed_training():
    model = prepare_model_for_kbit_training(quantised(four_bit), use_gradient_checkpointing=False)
    model = randomise(get_peft_model(model, lora_config(lora_dropout=0.1))).train()
    model.enable_input_require_grads()
    report = peft_kernels.patch(model, strict=True)
    torch.manual_seed(5)
    expected = results(model)
    once = report.fused
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(5)
    found = results(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert once == PROJECTIONS and report.fused > 2 * once and not report.fallbacks


def test_tokens_of_an_alora_are_told_to_peft():
    model = lora_on(four_bit, alora_invocation_tokens=[7, 9], task_type="CAUSAL_LM")
    batch = inputs()
    batch["input_ids"][0, 2:4] = torch.tensor([7, 9])
    plain = results(model, **batch)
    report = peft_kernels.patch(model)
    found = results(model, **batch)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert report.fused == 0 and report.fallbacks == {MIXED: PROJECTIONS}


@pytest.mark.parametrize("config", [AdaLoraConfig, VeraConfig])
@pytest.mark.parametrize("quantise", [four_bit, eight_bit, halved])
def test_other_methods(quantise, config):
    sizes = {"r": 6} if config is VeraConfig else {"init_r": 6, "total_step": 9}
    targets = ["q_proj", "v_proj", "down_proj"]
    model = randomise(get_peft_model(quantised(quantise), config(target_modules=targets, **sizes)))
    assert_step_like_peft(model, calls=3 * LAYERS)
    report = peft_kernels.patch(model, strict=True)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(**inputs()).logits, quantised(quantise)(**inputs()).logits)
    assert report.fallbacks == {DISABLED: 3 * LAYERS} and report.fused == 0


def test_a_compiled_block_is_one_graph():
    model = lora_on(halved)
    peft_kernels.patch(model, strict=True)
    mlp, x = model.base_model.model.model.layers[0].mlp, torch.randn(2, 5, HIDDEN)
    wanted = [p for p in mlp.parameters() if p.requires_grad]
    expected = torch.autograd.grad(mlp(x).square().sum(), wanted)
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), wanted), expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), mlp(x))


class Packed(nn.Module):
    """A layer in a packed format, of which only sizes are known."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("packed", torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8))
        self.bias = None
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x @ self.packed.to(x.dtype).mT / 512


@pytest.mark.parametrize("family", [GPTQLoraLinear, AwqLoraLinear])
def test_packed_formats(family):
    torch.manual_seed(2)
    layer = family(Packed(24, 40), "default", lora_config(), r=4, lora_alpha=16)
    randomise(layer)
    x = torch.randn(5, 24, requires_grad=True)
    wanted = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    exact = torch.autograd.grad(copy.deepcopy(layer).double()(x.double()).square().sum(), [x])[0]
    y = layer(x)
    plain = torch.autograd.grad(y.square().sum(), wanted)
    with peft_kernels.patch(layer, strict=True) as report:
        calls = layer.base_layer.calls
        found = layer(x)
        assert layer.base_layer.calls == calls + 1 and report.fused == 1
        torch.testing.assert_close(found, y)
        gradients = torch.autograd.grad(found.square().sum(), wanted)
        torch.testing.assert_close(gradients, plain)
        torch.testing.assert_close(gradients[0], exact.float())
    assert type(layer) is family
