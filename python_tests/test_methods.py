"""Bottleneck adapters as a method: the config, the module, several adapters on a model, LoRA beside them, files."""

import json
import math
import shutil

import pytest
import torch
from models import (
    HIDDEN,
    LAYERS,
    assert_as_close_as_peft,
    base_model,
    calls_per_forward,
    in_double,
    inputs,
    lora_config,
    randomise,
    results,
)
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments

import peft_kernels
from peft_kernels import BottleneckConfig
from peft_kernels.modules import BottleneckAdapter

SERIAL = BottleneckConfig.houlsby(r=4)
PARALLEL = BottleneckConfig.scaled_parallel(r=3)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=inputs()["input_ids"]).logits


def llama(**changes) -> nn.Module:
    return base_model("llama", **changes).eval()


def with_values(model: nn.Module, *names: str) -> nn.Module:
    """Adapters that do something, each its own."""
    with torch.no_grad():
        for seed, name in enumerate(names):
            generator = torch.Generator().manual_seed(seed)
            for key, parameter in model.named_parameters():
                if f".bottleneck.{name}." in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 16)
    return model


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
    assert (plus.scaling, plus.drop_path, plus.bottleneck(768)) == ("channel", 0.1, 8)
    assert BottleneckConfig.adapter_plus(r=4).bottleneck(768) == 4 and BottleneckConfig().bottleneck(768) == 48
    assert BottleneckConfig(reduction_factor=16).bottleneck(8) == 1
    with pytest.raises(ValueError, match="reduction_factor must be 2 or more at a width of 2048, got 1"):
        BottleneckConfig(reduction_factor=1).bottleneck(2048)


@pytest.mark.parametrize("alias", ["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python", "swish", "linear"])
def test_names_of_transformers_mean_the_same_functions(alias):
    from transformers.activations import ACT2FN

    from peft_kernels.ops.bottleneck_adapter.reference import ACTIVATIONS

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
    sites = peft_kernels.attach(with_values(model, "default"), BottleneckConfig(r=2, layers=range(1, 4), init="bert"))
    assert [site.split(".")[2] for site in sites] == ["1", "2", "3"]
    full = logits(model)
    peft_kernels.set_active(model, "default", skip_layers=range(2))
    dropped = logits(model)
    peft_kernels.detach(model)
    peft_kernels.attach(model, BottleneckConfig(r=2, layers=[2, 3]))
    assert not torch.equal(dropped, full)
    with pytest.raises(ValueError, match=r"skip_layers must lie in \[0, 4\), the layers of this model, got 4"):
        peft_kernels.set_active(model, "default", skip_layers=[4])
    peft_kernels.set_active(model, "default", skip_layers=[2, 3])
    assert peft_kernels.active_adapters(model) == ()


REFUSED = {
    "taken": (lambda m: peft_kernels.attach(m, SERIAL, "there"), "has an adapter 'there'; choose another name"),
    "dot": (lambda m: peft_kernels.attach(m, SERIAL, "a.b"), "name must be a str without dots, got 'a.b'"),
    "layers": (
        lambda m: peft_kernels.attach(m, BottleneckConfig(layers=[9]), "x"),
        r"layers must lie in \[0, 2\), the layers of this model, got 9",
    ),
    "unknown": (lambda m: peft_kernels.set_active(m, ["x"]), "set_active: the model has no .* 'x'; it has 'there'"),
    "twice": (lambda m: peft_kernels.set_active(m, ["there", "there"]), "names must differ from each other"),
    "detach": (lambda m: peft_kernels.detach(m), "detach: the model has no .* 'default'; it has 'there'"),
    "save": (lambda m: peft_kernels.save_pretrained(m, "/", "x"), "save_pretrained: the model has no"),
    "nothing": (lambda m: peft_kernels.attach(nn.Linear(2, 2), SERIAL), "no attention block is known in a Linear"),
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
    with pytest.raises(TypeError, match=r"config must be a .*BottleneckConfig, got a LoraConfig; what PEFT"):
        peft_kernels.attach(model, lora_config())
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: x
    with pytest.raises(ValueError, match=r"model.layers.1.mlp cannot change class: .*its forward was replaced"):
        peft_kernels.attach(model, SERIAL)
    assert "bottleneck" not in model.model.layers[0].mlp._modules and model.lm_head.weight.requires_grad


# -- LoRA beside it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patched", ["not", "before", "after"])
@pytest.mark.parametrize("first", ["lora", "bottleneck"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
def test_lora_and_bottleneck_adapters_work_together(name, first, patched):
    def build(patched):
        model = base_model(name).eval()
        if first == "bottleneck":
            peft_kernels.attach(model, SERIAL)
        model = randomise(get_peft_model(model, lora_config()))
        if patched == "before":
            peft_kernels.patch(model, strict=True)
        if first == "lora":
            peft_kernels.attach(model, SERIAL)
        peft_kernels.set_active(model, "default")  # PEFT has frozen what it does not know
        return with_values(model.eval(), "default")

    model, plain = build(patched), build("not")
    kinds = [type(m) for m in plain.modules()]
    expected, exact = results(plain), results(in_double(plain))
    assert {"lora_A", "lora_B", "bottleneck"} <= {part for key in expected for part in key.split(".")}
    if patched == "after":
        report = peft_kernels.patch(model, strict=True).verify(**inputs())
        found = results(model)
        assert report.fused == 2 * calls_per_forward(report) and not report.fallbacks
    else:
        found = results(model)
    assert_as_close_as_peft(found, expected, exact)
    peft_kernels.unpatch(model)
    assert [type(m) for m in model.modules()] == kinds
    with peft_kernels.patch(model):
        peft_kernels.detach(model)
    lora = randomise(get_peft_model(base_model(name).eval(), lora_config()))
    assert torch.equal(logits(model), logits(lora))
    assert [type(m) for m in model.modules()] == [type(m) for m in lora.modules()]
    assert list(model.state_dict()) == list(lora.state_dict())
    assert {k for k, p in model.named_parameters() if p.requires_grad} == {
        k for k, p in lora.named_parameters() if p.requires_grad
    }


def test_a_model_that_was_adapted_inside_of_patch_is_plain_afterwards():
    model = randomise(get_peft_model(llama(), lora_config()))
    with peft_kernels.patch(model):
        peft_kernels.attach(model, PARALLEL)
    kinds = {type(m).__name__ for m in model.modules()}
    assert not [kind for kind in kinds if kind.startswith("Fused")]
    assert len([key for key in results(model) if "bottleneck" in key]) == LAYERS * 4


def test_rows_with_their_own_lora_under_checkpointing():
    model = randomise(get_peft_model(base_model("bart"), lora_config())).train()
    peft_kernels.attach(model, PARALLEL)
    peft_kernels.patch(model)

    def a_step():
        with peft_kernels.adapter_ids([0, -1], ["default"]):
            return results(with_values(model, "default"))

    expected = a_step()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    found = a_step()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


# -- files, Trainer ---------------------------------------------------------------------------------------------------


def saved(folder, config=PARALLEL):
    model = llama()
    peft_kernels.attach(model, config)
    peft_kernels.save_pretrained(with_values(model, "default"), folder)
    return model


def test_files_are_those_of_peft(tmp_path):
    model = saved(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    assert about["peft_type"] == "BOTTLENECK" and about["scaling"] == 4.0 and about["r"] == 3
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.mlp.bottleneck.down_weight" in keys and len(keys) == 4 * LAYERS
    other = llama()
    state = torch.random.get_rng_state()
    peft_kernels.load(other, tmp_path, "other")
    assert torch.equal(torch.random.get_rng_state(), state) and not any(p.requires_grad for p in other.parameters())
    assert torch.equal(logits(other), logits(model))
    peft_kernels.load(other, tmp_path, "trained", trainable=True)
    assert sum(p.requires_grad for p in other.parameters()) == 4 * LAYERS
    under_lora = get_peft_model(llama(), lora_config())
    peft_kernels.load(under_lora, tmp_path)
    assert torch.equal(logits(under_lora), logits(model))


def _config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _weights(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


_KEY = "base_model.model.model.layers.1.mlp.bottleneck.up_bias"
BROKEN = {
    "no-folder": (shutil.rmtree, "has no adapter_config.json that can be read"),
    "no-config": (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json that can be read"),
    "not-json": (lambda f: (f / "adapter_config.json").write_text("{"), "has no adapter_config.json that can be read"),
    "not-a-dict": (lambda f: (f / "adapter_config.json").write_text("[]"), "must be BOTTLENECK, got None"),
    "lora": (lambda f: _config(f, peft_type="LORA"), "must be BOTTLENECK, got LORA; what PEFT has saved is loaded by"),
    "stranger": (lambda f: _config(f, rank=3), "there is no field 'rank'"),
    "field": (lambda f: _config(f, norm="batch"), "norm must be one of"),
    "layer": (lambda f: _config(f, layers=[7]), r"layers must lie in \[0, 2\)"),
    "no-weights": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "pytorch_adapter.bin"),
        "has no adapter_model.safetensors; a .bin file is a pickle and is not read",
    ),
    "cut-weights": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"12345678"), "cannot be read"),
    "missing": (lambda f: _weights(f, lambda t: t.pop(_KEY)), f"has no {_KEY}, which its config needs"),
    "too-many": (lambda f: _weights(f, lambda t: t.update(x=t[_KEY].clone())), "the model has no place for x"),
    "shape": (
        lambda f: _weights(f, lambda t: t.update({_KEY: torch.zeros(9)})),
        rf"{_KEY} must have shape \[32\] in this model, got \[9\]",
    ),
}


@pytest.mark.parametrize(("spoil", "text"), BROKEN.values(), ids=BROKEN)
def test_a_load_that_fails_changes_nothing(spoil, text, tmp_path):
    model = saved(tmp_path)
    before = dict(model.named_modules()), logits(model), {k: p.requires_grad for k, p in model.named_parameters()}
    spoil(tmp_path)
    with pytest.raises(ValueError, match=text):
        peft_kernels.load(model, tmp_path, "other")
    assert dict(model.named_modules()) == before[0] and torch.equal(logits(model), before[1])
    assert {k: p.requires_grad for k, p in model.named_parameters()} == before[2]
    assert peft_kernels.active_adapters(model) == ("default",)


def test_trainer_trains_it_and_its_parameters_are_counted(tmp_path, capsys):
    model = base_model("llama")
    peft_kernels.attach(model, BottleneckConfig.adapter_plus(r=4))
    peft_kernels.print_trainable_parameters(model)
    trainable, total = (sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (0, 1))
    words = f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
    assert capsys.readouterr().out.strip() == words
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    rows = [{key: tensor[0] for key, tensor in inputs().items()}] * 4
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, learning_rate=1e-2,
        gradient_checkpointing=True, save_strategy="no",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed and changed <= {key for key in before if ".bottleneck.default." in key}
