"""One patched LoRA layer in every state that PEFT can bring it into, against PEFT's own forward, with a count."""

import copy
import pickle

import pytest
import torch
from models import Mask, assert_as_close_as_peft, in_double, lora_config, randomise
from peft import BdLoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

import peft_kernels
from peft_kernels.integrations.gathering import MAX_RANK
from peft_kernels.integrations.peft import FusedLinear

K, N = 24, 40


class Block(nn.Module):
    """One layer called `layer`, the target of the adapters."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def block(layer=None, adapters=1, dtype=torch.float32, **changes):
    torch.manual_seed(1)
    model = get_peft_model(
        Block(nn.Linear(K, N) if layer is None else layer).to(dtype), lora_config(target_modules=["layer"], **changes)
    )
    for i in range(1, adapters):
        model.add_adapter(f"more{i}", lora_config(target_modules=["layer"], **changes | {"r": i, "lora_alpha": 3 * i}))
    model.base_model.set_adapter(["default", *(f"more{i}" for i in range(1, adapters))])
    return randomise(model)


def lora_layer(model):
    return model.base_model.model.layer


def rows(*shape, dtype=torch.float32):
    return torch.randn(*shape or (3, 5, K), generator=torch.Generator().manual_seed(4)).to(dtype)


def step(model, x=None):
    """Output, gradient of x and of every parameter that wants one."""
    model.zero_grad()
    x = (rows() if x is None else x).clone().requires_grad_()
    y = model(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(6)).to(y.dtype)
    (y * weight).sum().backward()
    found = {"y": y, "x": x.grad} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def assert_fused_like_peft(model, x=None):
    x = rows(dtype=lora_layer(model).weight.dtype) if x is None else x
    plain, exact = step(model, x), step(in_double(model), x.double())
    with peft_kernels.patch(model, strict=True) as report:
        assert_as_close_as_peft(step(model, x), plain, exact)
    assert report.fused == 1 and not report.fallbacks


def assert_falls_back(model, reason, x=None):
    """Patched while it can be fused; what came since is left to PEFT, with the reason."""
    assert isinstance(lora_layer(model), FusedLinear)
    report = peft_kernels.patch(model)
    found = step(model, x)
    assert report.fused == 0 and any(reason in text for text in report.fallbacks), report.fallbacks
    with peft_kernels.unpatch(model):
        plain = step(model, x)
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    "changes",
    [{}, {"lora_bias": True}, {"use_rslora": True}, {"r": 1}, {"r": MAX_RANK}, {"init_lora_weights": "pissa"}],
    ids=lambda changes: ",".join(changes) or "default",
)
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(K, N), lambda: nn.Linear(K, N, bias=False), lambda: Conv1D(N, K)],
    ids=["Linear", "no_bias", "Conv1D"],
)  # fmt: skip
def test_configurations(make, changes):
    if isinstance(layer := make(), Conv1D):
        changes = changes | {"fan_in_fan_out": True}
    assert_fused_like_peft(block(layer, **changes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    assert_fused_like_peft(block(dtype=dtype))


def test_factors_in_the_dtype_of_a_bf16_base():
    model = block(dtype=torch.bfloat16)
    assert_fused_like_peft(model.to(torch.bfloat16))


@pytest.mark.parametrize("shape", [(K,), (1, K), (0, K), (2, 3, 4, K)], ids=str)
def test_batch_shapes(shape):
    assert_fused_like_peft(block(), rows(*shape))


def test_the_frozen_weights_get_gradients_where_they_want_them():
    model = block(lora_bias=True)
    for parameter in lora_layer(model).base_layer.parameters():
        parameter.requires_grad_()
    assert_fused_like_peft(model)


def test_several_active_adapters_are_one_call():
    assert_fused_like_peft(block(adapters=3))


@pytest.mark.parametrize("adapters", [1, 2])
def test_dropout_is_the_mask_replayed(adapters):
    model = block(adapters=adapters, lora_dropout=0.4).train()
    twin = copy.deepcopy(model)
    torch.manual_seed(8)
    seed = peft_kernels.new_seed()
    for stream, name in enumerate(lora_layer(twin).active_adapters):
        lora_layer(twin).lora_dropout[name] = Mask(seed, 0.4, stream)
    plain, exact = step(twin), step(in_double(twin), rows().double())
    report = peft_kernels.patch(model, strict=True)
    torch.manual_seed(8)
    assert_as_close_as_peft(step(model), plain, exact)
    assert not torch.equal(step(model)["y"], step(model)["y"])  # another draw, another mask
    model.eval()
    patched = step(model)
    with peft_kernels.unpatch(model):
        plain = step(model)
    assert_as_close_as_peft(patched, plain, step(in_double(model), rows().double()))
    assert report.fused == 4


def test_merged_and_disabled_adapters_cost_one_call_of_the_base_layer():
    model = block()
    report = peft_kernels.patch(model, strict=True)
    layer = lora_layer(model)
    with torch.no_grad():
        with model.disable_adapter():
            assert torch.equal(model(rows()), layer.base_layer(rows()))
        model.merge_adapter()
        assert torch.equal(model(rows()), layer.base_layer(rows()))
        with model.disable_adapter():  # PEFT unmerges here
            model(rows())
        assert not layer.merged
        layer.set_adapter([])
        assert torch.equal(model(rows()), layer.base_layer(rows()))
    assert report.fused == 0 and sum(report.fallbacks.values()) == 4 == len(report.fallbacks)


def test_states_that_are_left_to_peft():
    def drop_rows(model):
        lora_layer(model).lora_dropout["default"] = nn.Dropout1d(0.0)

    def hook_base(model):
        lora_layer(model).base_layer.register_forward_hook(lambda module, args, y: 2 * y)

    def hook_factor(model):
        lora_layer(model).lora_A["default"].register_full_backward_hook(lambda *a: None)

    def parametrized(model):
        parametrize.register_parametrization(lora_layer(model).lora_B["default"], "weight", nn.Tanh())

    def replaced(model):
        lora_layer(model).lora_A["default"].forward = lambda x: x[..., :4]

    def learned_scaling(model):
        lora_layer(model).scaling["default"] = torch.tensor(2.0)

    def drop_everything(model):
        lora_layer(model).lora_dropout["default"] = nn.Dropout(1.0)

    def several_dtypes(model):
        model.add_adapter("more", lora_config(target_modules=["layer"]))
        model.base_model.set_adapter(["default", "more"])
        lora_layer(model).lora_A["more"].bfloat16()
        lora_layer(model).lora_B["more"].bfloat16()

    def wrong_dtype(model):
        model.add_adapter("more", lora_config(target_modules=["layer"]))
        model.base_model.set_adapter(["default", "more"])
        lora_layer(model).lora_A["more"].double()
        lora_layer(model).lora_B["more"].double()

    reasons = {
        drop_rows: "lora_dropout is a Dropout1d",
        hook_base: "hook on base_layer",
        hook_factor: "hook on lora_A",
        parametrized: "lora_B a ParametrizedLinear",
        replaced: "hook on lora_A",
        learned_scaling: "scaling is a Tensor",
        drop_everything: "drops everything",
        several_dtypes: "factors of several dtypes in one call",
        wrong_dtype: "factors in torch.float64 on a base in torch.float32",
    }
    for change, reason in reasons.items():
        model = block()
        peft_kernels.patch(model, strict=True)
        change(model)
        assert_falls_back(model, reason)


def test_states_at_the_moment_of_patch_pass():
    def merged(model):
        model.merge_adapter()
        return model.unmerge_adapter

    def disabled_while_merged(model):
        model.merge_adapter()
        model.base_model.disable_adapter_layers()
        return model.base_model.enable_adapter_layers  # PEFT unmerges in the forward

    def dora_is_active_too(model):
        model.add_adapter("dora", lora_config(target_modules=["layer"], use_dora=True))
        model.base_model.set_adapter(["default", "dora"])
        return lambda: model.set_adapter("default")

    def hooked(module):
        return module.register_forward_hook(lambda *a: None).remove

    reasons = {
        merged: "merged: the base layer alone",
        disabled_while_merged: "disabled while merged: PEFT unmerges",
        dora_is_active_too: "DoRA together with another active adapter",
        lambda model: hooked(lora_layer(model).base_layer): "hook on base_layer",
        lambda model: hooked(lora_layer(model).lora_A["default"]): "hook on lora_A, lora_B or lora_dropout",
    }
    for enter, reason in reasons.items():
        model = block().eval()
        leave = enter(model)
        with pytest.raises(RuntimeError, match=rf"nothing was changed(.|\n)*{reason}"):
            peft_kernels.patch(model, strict=True)
        assert not isinstance(lora_layer(model), FusedLinear)
        report = peft_kernels.patch(model)
        assert not report.left and [row.reason for row in report.rows] == [reason]
        assert f"(at patch: {reason})" in " ".join(report.table()[0])
        with pytest.raises(RuntimeError, match=reason):
            report.verify(x=rows())
        assert report.fused == 0
        leave()
        model(rows())
        report.verify(x=rows())
        with peft_kernels.unpatch(model):
            plain = step(model)
        assert_as_close_as_peft(step(model), plain, step(in_double(model), rows().double()))
        assert report.fused, reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_bdlora": BdLoraConfig(target_modules_bd_a=["layer"], nblocks=2)}, "BdLora changes the maths"),
        ({"r": MAX_RANK + 1}, f"rank {MAX_RANK + 1} is above {MAX_RANK}"),
    ],
)
def test_adapters_that_have_no_kernel_wait_for_one_that_has(changes, reason):
    model = block(**changes)
    report = peft_kernels.patch(model)
    assert [row.reason for row in report.rows] == [reason]
    with pytest.raises(RuntimeError, match=reason):
        peft_kernels.patch(model, strict=True)
    if "use_bdlora" in changes:
        assert_falls_back(model, reason)
    assert report.fused == 0
    model.add_adapter("plain", lora_config(target_modules=["layer"]))
    model.set_adapter("plain")
    assert report.verify(x=rows()).fused == 1


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(K, N, 1), "LoRA on Conv2d has no kernel"),
        (nn.MultiheadAttention(K, 2), "LoRA on MultiheadAttention has no kernel"),
    ],
)
def test_other_layers_have_no_kernel(layer, reason):
    report = peft_kernels.patch(block(layer))
    assert reason in [row.reason for row in report.left] and report.fused == 0


def test_adapted_parameters_have_no_kernel():
    config = lora_config(target_modules=[], target_parameters=["layer.weight"])
    report = peft_kernels.patch(get_peft_model(Block(nn.Linear(K, N)), config))
    assert "not a linear layer" in report.left[0].reason and report.fused == 0


def test_classes_that_others_made_are_left_alone():
    model = block()
    layer = lora_layer(model)
    layer.extra = nn.Parameter(torch.ones(1))
    parametrize.register_parametrization(layer, "extra", nn.Identity())
    assert peft_kernels.patch(model).left[0].reason == "its class was made by torch.nn.utils.parametrize"
    model = block()
    layer = lora_layer(model)
    layer.__class__ = type("FSDPLinear", (type(layer),), {})
    assert peft_kernels.patch(model).left[0].reason == "its class was made by FSDP; patch before sharding"
    layer.__class__ = type("MyLinear", (type(layer).__bases__[0],), {})
    assert peft_kernels.patch(model).left[0].reason == "MyLinear has a forward of its own"
    layer.__class__ = lora.Linear
    layer.forward = lambda x: x
    report = peft_kernels.patch(model)
    assert report.left[0].reason == "the instance has a forward of its own" and report.fused == 0


def test_an_input_of_another_dtype_does_what_peft_does():
    model = block()
    x = rows(dtype=torch.bfloat16)
    with pytest.raises(RuntimeError) as plain:
        model(x)
    report = peft_kernels.patch(model, strict=True)
    with pytest.raises(RuntimeError) as patched:
        model(x)
    assert str(patched.value) == str(plain.value) and report.fused == 0
    assert list(report.fallbacks) == ["x is torch.bfloat16 and the base layer torch.float32"]


def test_casting_can_be_switched_off_in_peft():
    model = block(dtype=torch.bfloat16)
    report = peft_kernels.patch(model, strict=True)
    lora_layer(model).cast_input_dtype_enabled = False
    with pytest.raises(RuntimeError):  # as plain PEFT: a bf16 x and fp32 factors
        model(rows(dtype=torch.bfloat16))
    assert report.fused == 0 and "cast_input_dtype_enabled is off" in report.fallbacks


def test_a_layer_pickles_and_the_report_outlives_the_model():
    model = block()
    report = peft_kernels.patch(model, strict=True)
    model(rows())
    twin = pickle.loads(pickle.dumps(model))
    assert isinstance(lora_layer(twin), FusedLinear) and torch.equal(twin(rows()), model(rows()))
    assert report.fused == 2
    del model, twin
    assert report.fused == 0 and "1 modules patched" in str(report)
    with pytest.raises(RuntimeError, match="gone"):
        report.verify(x=rows())


def test_an_adapter_that_is_added_and_deleted_later():
    model = block()
    report = peft_kernels.patch(model, strict=True)
    model.add_adapter("more", lora_config(target_modules=["layer"], r=3))
    randomise(model).set_adapter("more")
    patched = step(model)
    with peft_kernels.unpatch(model):
        plain = step(model)
    assert_as_close_as_peft(patched, plain, step(in_double(model), rows().double()))
    model.delete_adapter("more")
    model(rows())
    assert report.fused == 2 and not report.fallbacks
