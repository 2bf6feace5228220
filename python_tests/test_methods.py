"""Bottleneck adapters as a method: the config, the module, several adapters on a model, LoRA beside them, files."""

import copy
import json
import math

import pytest
import torch
from bottlenecks import PARALLEL, SERIAL, llama, logits, with_values
from models import (
    HIDDEN,
    LAYERS,
    base_model,
    lora_config,
)
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import peft_kernels
from peft_kernels import BitFitConfig, BottleneckConfig
from peft_kernels.modules import BottleneckAdapter

# -- config -----------------------------------------------------------------------------------------------------------

BAD_FIELDS = {
    "r-zero": ({"r": 0}, "r must be an integer from 1 to 1024, got 0"),
    "r-large": ({"r": 1025}, "r must be an integer from 1 to 1024, got 1025"),
    "r-float": ({"r": 0.5}, "r must be an integer .* got 0.5; reduction_factor=16 makes it a part"),
    "r-bool": ({"r": True}, "r must be an integer"),
    "both-widths": ({"r": 4, "reduction_factor": 16}, "r and reduction_factor both say .* give one of them"),
    "reduction": ({"reduction_factor": 0}, "reduction_factor must be a number above 0, got 0"),
    "activation": ({"activation": "quick_gelu"}, "activation must be one of identity, relu, .*got 'quick_gelu'"),
    "activation-type": ({"activation": torch.relu}, "activation must be one of"),
    "insertion": ({"insertion": "sequential"}, "insertion must be one of serial, parallel, got 'sequential'"),
    "representation": ({"representation": "mlp"}, "representation must be one of ffn, attention, both, got 'mlp'"),
    "scaling": ({"scaling": "big"}, "scaling must be a finite number, 'learned' or 'channel', got 'big'"),
    "scaling-inf": ({"scaling": math.inf}, "scaling must be a finite number"),
    "gate": ({"gate": 1}, "gate must be True or False, got 1"),
    "norm": ({"norm": "batch_norm"}, "norm must be one of none, layer_norm, rms_norm, got 'batch_norm'"),
    "dropout": ({"dropout_p": 1.0}, r"dropout_p must be a probability in \[0, 1\), got 1.0"),
    "dropout-place": ({"dropout_on": "input"}, "dropout_on must be one of bottleneck, output, got 'input'"),
    "drop-path": ({"drop_path": -0.1}, "drop_path must be a probability"),
    "init": ({"init": "zero"}, "init must be one of mam, lora, bert, houlsby, got 'zero'"),
    "layers": ({"layers": 3}, "layers must be a list or range of layer indices from 0, or None .*got 3"),
    "layers-negative": ({"layers": [-1]}, "layers must be a list or range"),
    "layers-none": ({"layers": []}, "layers must be a list or range"),
}


@pytest.mark.parametrize(("fields", "text"), BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_a_wrong_field_is_refused_in_words(fields, text):
    with pytest.raises(ValueError, match=f"BottleneckConfig: {text}"):
        BottleneckConfig(**fields)


def test_presets_are_the_methods_of_the_papers():
    assert BottleneckConfig.houlsby().representations == ("attention", "ffn")
    pfeiffer = BottleneckConfig.pfeiffer(r=8)
    assert (pfeiffer.insertion, pfeiffer.representation, pfeiffer.scaling) == ("serial", "ffn", 1.0)
    scaled = BottleneckConfig.scaled_parallel(r=512)
    assert (scaled.insertion, scaled.scaling, scaled.init) == ("parallel", 4.0, "mam")
    plus = BottleneckConfig.adapter_plus()
    assert (plus.scaling, plus.drop_path, plus.reads, plus.bottleneck(768)) == ("channel", 0.1, "sum", 8)
    assert BottleneckConfig.houlsby().init == plus.init == "houlsby" and pfeiffer.reads == "output"
    assert BottleneckConfig.adapter_plus(r=4).bottleneck(768) == 4 and BottleneckConfig().bottleneck(768) == 48
    assert BottleneckConfig(reduction_factor=16).bottleneck(8) == 1
    with pytest.raises(ValueError, match="reduction_factor must be 2 or more at a width of 2048, got 1"):
        BottleneckConfig(reduction_factor=1).bottleneck(2048)


@pytest.mark.parametrize("alias", ["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python", "swish", "linear"])
def test_names_of_transformers_mean_the_same_functions(alias):
    from transformers.activations import ACT2FN

    from peft_kernels.ops.common.activations import ACTIVATIONS

    h = torch.linspace(-4, 4, 33, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[BottleneckConfig(activation=alias).activation](h), ACT2FN[alias](h))


def test_a_config_is_written_and_read():
    config = BottleneckConfig.adapter_plus(layers=range(2, 5), activation="swish")
    assert BottleneckConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="there is no field 'rank'; the fields are r, reduction_factor"):
        BottleneckConfig.from_dict({"rank": 8})


# -- module -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["mam", "lora", "bert", "houlsby"])
def test_starts(init):
    adapter, x, r = BottleneckAdapter(64, 16, init=init), torch.randn(5, 64), torch.randn(5, 64)
    assert not adapter.down_bias.any() and not adapter.up_bias.any()
    down, up = adapter.down_weight.detach(), adapter.up_weight.detach()
    if init in ("mam", "lora"):
        assert torch.equal(adapter(x), x) and torch.equal(adapter(x, r), r) and down.abs().max() <= 64**-0.5
    elif init == "bert":
        assert all(0.01 < weight.std() < 0.03 for weight in (down, up))
    else:
        assert all(0 < weight.abs().max() <= 0.02 for weight in (down, up))
    with pytest.raises(ValueError, match="init must be one of mam, lora, bert, houlsby, got 'zeros'"):
        BottleneckAdapter(64, 16, init="zeros")


def test_the_module_is_the_op_with_its_parameters_and_a_seed():
    adapter = BottleneckAdapter(32, 8, 24, activation="gelu", scaling="learned", norm="rms_norm", dropout_p=0.5)
    assert [key for key, _ in adapter.named_parameters()] == [
        "down_weight", "down_bias", "up_weight", "up_bias", "scale", "norm_weight",
    ]  # fmt: skip
    nn.init.normal_(adapter.up_weight)
    x, r = torch.randn(2, 3, 32), torch.randn(2, 3, 24)
    torch.manual_seed(4)
    y = adapter(x, r)
    torch.manual_seed(4)
    parts = (adapter.down_weight, adapter.down_bias, adapter.up_weight, adapter.up_bias)
    more = {"activation": "gelu", "scale": adapter.scale, "norm": "rms_norm", "norm_weight": adapter.norm_weight}
    seed = peft_kernels.new_seed()
    assert torch.equal(y, peft_kernels.bottleneck_adapter(x, r, *parts, **more, dropout_p=0.5, seed=seed))
    assert torch.equal(adapter.eval()(x, r), peft_kernels.bottleneck_adapter(x, r, *parts, **more))


def test_stochastic_depth_takes_whole_samples_and_a_gate_each_token():
    adapter = BottleneckAdapter(8, 4, drop_path=0.5, gate=True)
    nn.init.normal_(adapter.up_weight)
    x = torch.randn(64, 3, 8)
    torch.manual_seed(1)
    part = adapter(x) - x
    full = adapter.eval()(x) - x
    dropped = (part == 0).flatten(1).all(1)
    assert 16 < dropped.sum() < 48
    torch.testing.assert_close(part[~dropped], 2 * full[~dropped])
    adapter.gate_weight.data.normal_()
    gates = torch.sigmoid(x @ adapter.gate_weight[0] + adapter.gate_bias)
    torch.testing.assert_close(adapter(x) - x, 2 * gates[..., None] * full)


@pytest.mark.parametrize("preset", ["houlsby", "pfeiffer", "parallel", "scaled_parallel", "adapter_plus"])
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_parameters_are_those_that_attach_adds(name, preset):
    config = getattr(BottleneckConfig, preset)(r=5)
    model = base_model(name)
    before = sum(p.numel() for p in model.parameters())
    sites = peft_kernels.attach(model, config)
    added = sum(p.numel() for p in model.parameters()) - before
    channel = HIDDEN if preset == "adapter_plus" else 0
    assert added == len(sites) * config.parameters(HIDDEN) == len(sites) * (2 * HIDDEN * 5 + 5 + HIDDEN + channel)
    assert len(sites) == (2 if preset == "houlsby" else 1) * LAYERS


# -- several on a model -----------------------------------------------------------------------------------------------


def test_serial_ones_stack_in_order_and_parallel_ones_are_summed():
    model = llama()
    base = logits(model)
    for name, config in (("one", SERIAL), ("two", SERIAL), ("left", PARALLEL), ("right", PARALLEL)):
        peft_kernels.attach(model, config, name)
        assert peft_kernels.active_adapters(model) == (name,)
    with_values(model, "one", "two", "left", "right")
    mlp, x = model.model.layers[1].mlp, torch.randn(2, 3, HIDDEN)
    plain, adapters = type(mlp).family_class.forward(mlp, x), mlp.bottleneck
    for names in (["one", "two"], ["two", "one"]):
        peft_kernels.set_active(model, names)
        assert torch.equal(mlp(x), adapters[names[1]](adapters[names[0]](plain)))
    peft_kernels.set_active(model, ["left", "right"])
    assert torch.equal(mlp(x), adapters["right"](x, adapters["left"](x, plain)))
    peft_kernels.set_active(model, ["one", "left"])  # the serial one reads what the parallel one has been added to
    assert torch.equal(mlp(x), adapters["one"](adapters["left"](x, plain)))
    assert {key.split(".bottleneck.")[1].split(".")[0] for key, p in model.named_parameters() if p.requires_grad} == {
        "one", "left",
    }  # fmt: skip
    peft_kernels.set_active(model, [])
    assert torch.equal(logits(model), base) and not any(p.requires_grad for p in model.parameters())
    peft_kernels.set_active(model, "two")
    peft_kernels.detach(model, "one")
    peft_kernels.detach(model, "two")
    assert torch.equal(logits(model), base)
    for name in ("left", "right"):
        peft_kernels.detach(model, name)
    assert not [key for key in model.state_dict() if "bottleneck" in key] and model.lm_head.weight.requires_grad


def test_layers_are_left_out():
    model = base_model("bart").eval()
    assert peft_kernels.attach(model, BottleneckConfig(r=2, layers=[1])) == ("model.decoder.layers.0",)
    model = llama(num_hidden_layers=4)
    sites = peft_kernels.attach(model, BottleneckConfig(r=2, layers=range(1, 4)))
    assert [site.split(".")[2] for site in sites] == ["1", "2", "3"]
    full = logits(with_values(model, "default"))
    peft_kernels.set_active(model, "default", skip_layers=range(2))
    dropped, kept = logits(model), model.state_dict()
    assert not torch.equal(dropped, full)
    peft_kernels.detach(model)
    peft_kernels.attach(model, BottleneckConfig(r=2, layers=[2, 3]))
    model.load_state_dict({key: kept[key] for key in model.state_dict()})
    assert torch.equal(logits(model), dropped)
    with pytest.raises(ValueError, match=r"skip_layers must lie in \[0, 4\), the layers of this model, got 4"):
        peft_kernels.set_active(model, "default", skip_layers=[4])
    peft_kernels.set_active(model, "default", skip_layers=[2, 3])
    assert peft_kernels.active_adapters(model) == ()


REFUSED = {
    "taken": (lambda m: peft_kernels.attach(m, SERIAL, "there"), "has an adapter 'there'; choose another name"),
    "dot": (lambda m: peft_kernels.attach(m, SERIAL, "a.b"), "name must be a str without dots, got 'a.b'"),
    "attribute": (lambda m: peft_kernels.attach(m, SERIAL, "train"), "must not be that of an attribute .* 'train'"),
    "layers": (
        lambda m: peft_kernels.attach(m, BottleneckConfig(layers=[9]), "x"),
        r"layers must lie in \[0, 2\), the layers of this model, got 9",
    ),
    "unknown": (
        lambda m: peft_kernels.set_active(m, ["x"]),
        "set_active: the model has no adapter 'x'; it has 'there'",
    ),
    "twice": (lambda m: peft_kernels.set_active(m, ["there", "there"]), "names must differ from each other"),
    "detach": (lambda m: peft_kernels.detach(m), "detach: the model has no adapter 'default'; it has 'there'"),
    "save": (lambda m: peft_kernels.save_pretrained(m, "/", "x"), "save_pretrained: the model has no"),
    "nothing": (
        lambda m: peft_kernels.attach(nn.Linear(2, 2), SERIAL),
        "no attention block is known in a Linear; .*pass the model",
    ),
}


@pytest.mark.parametrize(("call", "text"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_said(call, text):
    model = llama()
    peft_kernels.attach(model, SERIAL, "there")
    before = dict(model.named_modules()), logits(model)
    with pytest.raises(ValueError, match=text):
        call(model)
    assert dict(model.named_modules()) == before[0] and torch.equal(logits(model), before[1])


def test_other_configs_and_replaced_forwards_are_refused():
    model = llama()
    with pytest.raises(
        TypeError,
        match="PTuningV2Config or MAMConfig, got a LoraConfig; what PEFT",
    ):
        peft_kernels.attach(model, lora_config())
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: x
    with pytest.raises(ValueError, match=r"model.layers.1.mlp cannot have an adapter: .*its forward was replaced"):
        peft_kernels.attach(model, SERIAL)
    assert "bottleneck" not in model.model.layers[0].mlp._modules and model.lm_head.weight.requires_grad


def test_which_of_the_active_ones_are_trained():
    model = llama()
    for name in ("language", "task"):
        peft_kernels.attach(model, SERIAL, name)
    peft_kernels.set_active(model, ["language", "task"], trainable=["task"], skip_layers=(i for i in [0]))
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".bottleneck.task." in key and ".layers.0." not in key for key in trained)
    peft_kernels.set_active(model, ["language", "task"], trainable="language")
    assert all(".language." in key for key, parameter in model.named_parameters() if parameter.requires_grad)
    with pytest.raises(ValueError, match="trainable must name active adapters, got 'language'"):
        peft_kernels.set_active(model, "task", trainable=["language"])


def test_what_fails_on_the_way_leaves_the_model_as_it_was(monkeypatch):
    model, made = llama(), []

    def adapter(self, *args):
        made.append(self)
        if len(made) > 1:
            raise torch.OutOfMemoryError("none left")
        return BottleneckAdapter(args[0], 4)

    before = list(model.state_dict())
    monkeypatch.setattr(BottleneckConfig, "adapter", adapter)
    with pytest.raises(torch.OutOfMemoryError):
        peft_kernels.attach(model, SERIAL)
    assert list(model.state_dict()) == before and type(model.model.layers[0].mlp).__name__ == "LlamaMLP"
    monkeypatch.undo()
    assert peft_kernels.attach(model, SERIAL)


def test_wrappers_are_seen_through(tmp_path):
    model = llama()
    peft_kernels.attach(torch.compile(model, backend="eager"), SERIAL)
    peft_kernels.save_pretrained(nn.DataParallel(model), tmp_path)
    peft_kernels.load(llama(), tmp_path)
    with pytest.raises(ValueError, match=r"the parameters of model\.layers\.0\.self_attn are not there"):
        peft_kernels.load(llama().to("meta"), tmp_path)


@pytest.mark.parametrize("value,text", [(torch.nan, "infinities or NaN"), (None, "torch.int64")])
def test_files_of_other_numbers_are_refused(value, text, tmp_path):
    model = llama()
    peft_kernels.attach(model, SERIAL)
    peft_kernels.save_pretrained(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(iter(tensors))
    tensors[key] = tensors[key].long() if value is None else tensors[key] * value
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"must hold finite numbers of a floating-point dtype, got {text}"):
        peft_kernels.load(llama(), tmp_path)


# -- BitFit, and fine-tuning without adapters -------------------------------------------------------------------------


def shifted(model: nn.Module) -> nn.Module:
    """As after some training: what is trained has other values."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    return model


@pytest.mark.parametrize("name", ["gpt2", "bert", "bart", "opt", "qwen2"])
def test_bitfit_trains_biases_and_gives_them_back(name, tmp_path):
    model = base_model(name).eval()
    base, state = logits(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    biases = peft_kernels.attach(model, BitFitConfig(), "fit")
    assert torch.equal(logits(model), base) and all(key.endswith(".bias") for key in biases)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained == {key for key, _ in model.named_parameters() if key.endswith(".bias")} == set(biases)
    after = logits(shifted(model))
    peft_kernels.save_pretrained(model, tmp_path, "fit")
    peft_kernels.attach(model, BitFitConfig(), "second")  # starts from the base
    assert torch.equal(logits(model), base)
    peft_kernels.attach(model, SERIAL, "serial")
    peft_kernels.set_active(model, ["fit", "serial"])
    assert peft_kernels.active_adapters(model) == ("serial", "fit")
    peft_kernels.set_active(copy.deepcopy(model), [])
    peft_kernels.set_active(model, "fit")
    assert torch.equal(logits(model), after)
    peft_kernels.set_active(model, [])
    assert torch.equal(logits(model), base) and not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="have the values of one adapter, got fit and second"):
        peft_kernels.set_active(model, ["fit", "second"])
    for attached in ("fit", "second", "serial"):
        peft_kernels.detach(model, attached)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert peft_kernels.load(model, tmp_path) == biases and torch.equal(logits(model), after)
    peft_kernels.detach(model)
    assert torch.equal(logits(model), base)


def test_bitfit_of_some_modules_beside_lora():
    model = base_model("bert").eval()
    some = peft_kernels.attach(model, BitFitConfig(target_modules=["query", "intermediate.dense"]))
    assert len(some) == 2 * LAYERS and "bert.encoder.layer.0.attention.self.query.bias" in some
    model = get_peft_model(base_model("bert").eval(), lora_config(lora_bias=True))
    base = logits(model)
    assert set(some) < set(peft_kernels.attach(model, BitFitConfig()))
    assert not torch.equal(logits(shifted(model)), base)
    with pytest.raises(ValueError, match="BitFit trains biases, of which a LlamaForCausalLM has none; a Bottleneck"):
        peft_kernels.attach(llama(), BitFitConfig())
    for wrong in ("query", [], [1]):
        with pytest.raises(ValueError, match="BitFitConfig: target_modules must"):
            BitFitConfig(target_modules=wrong)


def test_all_parameters_or_those_of_the_top_layers():
    model = llama(num_hidden_layers=3)
    assert peft_kernels.train_top_layers(model, 2) == ("model.layers.1", "model.layers.2")
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        key for key, _ in model.named_parameters() if key.startswith(("model.layers.1", "model.layers.2"))
    }
    peft_kernels.train_all(model)
    assert all(p.requires_grad for p in model.parameters())
    assert peft_kernels.train_top_layers(base_model("bart"), 1) == ("model.decoder.layers.0",)
    with pytest.raises(ValueError, match="k must be from 1 to 3, the layers that are known, got 4"):
        peft_kernels.train_top_layers(model, 4)
