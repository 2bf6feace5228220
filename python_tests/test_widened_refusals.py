"""What widen leaves as it is or refuses, what a widened model refuses, and the remedies that the words name."""

import copy

import pytest
import torch
import transformers as hf
from models import _DECODER, inputs
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize
from widened_models import adapted, assert_same, assert_unchanged, blocks, logits, plain, snapshot

import peft_kernels
from peft_kernels import BottleneckConfig


def test_training_is_refused():
    model = adapted()
    peft_kernels.widen(model)
    assert not any(p.requires_grad for p in model.parameters())
    model.train()
    with pytest.raises(RuntimeError, match=r"model.layers.0.mlp is widened, for inference; .*unwiden\(model\)"):
        logits(model)
    peft_kernels.unwiden(model)
    model(**inputs()).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".bottleneck." in n)


def test_adapters_are_changed_on_the_unwidened_model(tmp_path):
    model = adapted()
    peft_kernels.save_pretrained(model, tmp_path)
    peft_kernels.widen(model)
    before = snapshot(model)
    for call in (
        lambda: peft_kernels.set_active(model, []),
        lambda: peft_kernels.attach(model, BottleneckConfig(), "other"),
        lambda: peft_kernels.load(model, tmp_path, "other"),
        lambda: peft_kernels.detach(model),
        lambda: peft_kernels.widen(model),
    ):
        with pytest.raises(ValueError, match=r"the model is widened; peft_kernels.unwiden\(model\) first"):
            call()
        assert_unchanged(model, before)
    assert peft_kernels.active_adapters(model) == ("default",)


def test_what_replaces_a_part_is_noticed():
    model = adapted()
    peft_kernels.widen(model)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(RuntimeError, match="its up_proj was replaced or has changed class since"):
        logits(wrapped)
    with pytest.raises(RuntimeError, match="its up_proj was replaced"):
        peft_kernels.unwiden(model)
    wrapped.unload()
    peft_kernels.unwiden(model)


def test_a_pool_is_noticed():
    model = adapted()
    peft_kernels.widen(model)
    with pytest.raises(ValueError, match=r"attach_pool: the model is widened; peft_kernels\.unwiden"):
        peft_kernels.attach_pool(model, adapters=2)
    logits(model)


# -- what is left, what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BottleneckConfig(), r"serial: widen\(model, serial=True\)"),
        (BottleneckConfig.parallel(norm="layer_norm"), "has a norm"),
        (BottleneckConfig.parallel(gate=True), "has a gate"),
        (BottleneckConfig.parallel(representation="attention"), "no hidden units"),
    ],
)
def test_a_form_that_cannot_be_widened(config, reason):
    model = adapted(config=config)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"no block can be widened:\n.*{reason}"):
        peft_kernels.widen(model)
    assert_unchanged(model, before)


def test_blocks_of_another_form_run_as_before(monkeypatch):
    model = adapted(config=BottleneckConfig.parallel(r=4, representation="both"))
    widened = copy.deepcopy(model)
    report = peft_kernels.widen(widened)
    assert len(report.widened) == len(report.left) == 2
    assert {row.reason for row in report.left} == {
        "a parallel adapter of an attention block has no hidden units to join"
    }
    text = str(report)
    assert "2 blocks widened, 2 left as they are" in text and "parallel, gated" in text and "left: a parallel" in text
    assert_same(widened, model, monkeypatch)


def test_a_mixture_of_experts_is_left():
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**_DECODER | {"num_local_experts": 4})).eval()
    peft_kernels.attach(model, BottleneckConfig.parallel(r=4))
    with pytest.raises(ValueError, match="a mixture of experts has no one last projection"):
        peft_kernels.widen(model)


def test_an_unknown_forward_is_left():
    model = adapted()
    mlp = model.model.layers[0].mlp
    own = type("OwnMLP", (type(mlp).family_class,), {"forward": lambda self, x: self.down_proj(x)})
    mlp.__class__ = type(mlp).over(own)
    report = peft_kernels.widen(model)
    assert [row.name for row in report.left] == ["model.layers.0.mlp"]
    assert "the forward of OwnMLP is not one that is known" in report.left[0].reason


def hooked(model):
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *args: None)


def parametrised(model):
    parametrize.register_parametrization(model.model.layers[1].mlp.up_proj, "weight", nn.Identity())


def tied(model):
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight


def views(model):
    gate, up = model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj
    both = torch.cat((gate.weight.detach(), up.weight.detach()))
    gate.weight.data, up.weight.data = both.chunk(2)


def shared(model):
    layers = model.model.layers
    layers[1].mlp.up_proj = layers[0].mlp.up_proj


def lora(model):
    get_peft_model(model, LoraConfig(target_modules=["down_proj"]))


def quantised(model):
    linear = model.model.layers[1].mlp.up_proj
    linear.__class__ = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn"})


def eight_bits(model):
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)


def subclassed(model):
    linear = model.model.layers[1].mlp.up_proj
    kind = type("DTensor", (torch.Tensor,), {})
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(kind))


def offloaded(model):
    model.model.layers[1].mlp.up_proj.to("meta")


def moved(model):
    model.model.layers[1].mlp.up_proj._hf_hook = object()


def replaced(model):
    linear = model.model.layers[1].mlp.up_proj
    linear.forward = lambda x: nn.Linear.forward(linear, x)


def two_dtypes(model):
    model.model.layers[1].mlp.up_proj.double()


def pooled(model):
    peft_kernels.attach_pool(model, adapters=2)


def training(model):
    model.train()


REFUSED = {
    training: "model.layers.0.mlp is in training mode; .*model.eval()",
    hooked: "up_proj in model.layers.1.mlp has hooks, .*remove them",
    parametrised: "up_proj in model.layers.1.mlp is parametrised; .*remove_parametrizations",
    tied: "up_proj in model.layers.0.mlp shares its memory .*p.data.clone()",
    views: "gate_proj in model.layers.0.mlp shares its memory .*p.data.clone()",
    shared: r"up_proj in model.layers.0.mlp is a module of another block too; .*copy.deepcopy\(module\)",
    lora: r"down_proj in model.layers.0.mlp is a PEFT layer \(Linear\); model.merge_and_unload\(\)",
    quantised: "up_proj in model.layers.1.mlp is a bitsandbytes.nn.Linear4bit, .*load the model unquantised",
    eight_bits: "up_proj in model.layers.1.mlp has a weight of torch.int8; load the model in float32",
    subclassed: "up_proj in model.layers.1.mlp has a sharded or quantised weight .*load the model",
    offloaded: "up_proj in model.layers.1.mlp has its weight on meta: offloaded.*; load it first",
    moved: "up_proj in model.layers.1.mlp is moved by accelerate .*; load the model whole",
    replaced: "up_proj in model.layers.1.mlp has a forward of its own; restore",
    two_dtypes: "model.layers.1.mlp reads x with weights of torch.float32 and torch.float64; cast to one",
    pooled: r"gate_proj in model.layers.0.mlp is served by a pool; peft_kernels.unpatch\(model\)",
}


@pytest.mark.parametrize("prepare", REFUSED, ids=lambda prepare: prepare.__name__)
def test_a_state_that_forbids_it_is_refused_and_nothing_changes(prepare):
    model = adapted()
    prepare(model)
    classes, pointers = [type(m) for m in model.modules()], [p.data_ptr() for p in model.parameters()]
    with pytest.raises(ValueError, match=f"widen: {REFUSED[prepare]}"):
        peft_kernels.widen(model)
    assert [type(m) for m in model.modules()] == classes and not blocks(model)
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_an_activation_of_two_blocks_is_refused_where_it_would_change():
    model = adapted("gpt2", activation="tanh")
    first, second = (layer.mlp for layer in model.transformer.h)
    second.act = first.act
    with pytest.raises(ValueError, match=r"widen: act in transformer.h.0.mlp is a module of another block too"):
        peft_kernels.widen(model)


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match=r"no block has an active adapter; peft_kernels.attach or set_active"):
        peft_kernels.widen(plain())
