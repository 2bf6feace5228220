"""Adapters that AdapterHub's package has written (data/adapterhub/make.py): they give its outputs, or are refused."""

import copy
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import peft_kernels

DATA = Path(__file__).parent / "data" / "adapterhub"
HEADS = {
    "bart": hf.BartForConditionalGeneration,
    "bert": hf.BertForSequenceClassification,
    "gpt2": hf.GPT2LMHeadModel,
    "llama": hf.LlamaForCausalLM,
    "roberta": hf.RobertaForMaskedLM,
    "t5": hf.T5ForConditionalGeneration,
}
PREFIXES = {
    "bart": "model",
    "bert": "bert",
    "gpt2": "transformer",
    "llama": "model",
    "roberta": "roberta",
    "t5": "transformer",
}
CONFIGS = ("seq_bn", "double_seq_bn", "par_bn", "scaled_par_bn")


@functools.cache
def _read(name: str, kind):
    torch.manual_seed(0)
    return kind.from_pretrained(DATA / name).eval()


def a_model(name: str, kind=hf.AutoModel):
    return copy.deepcopy(_read(name, kind))


def recorded(name: str) -> tuple[dict, dict]:
    """Inputs, and the last hidden states by configuration."""
    tensors = load_file(DATA / name / "outputs.safetensors")
    inputs = {key: tensors.pop(key) for key in list(tensors) if key.endswith("input_ids")}
    return inputs, tensors


def changed(folder: Path, model: str, config: str, options=None, tensors=None, **about) -> Path:
    """A copy of a saved adapter with other options, tensors (a function of them), or other entries of its config."""
    shutil.copytree(DATA / model / config, folder)
    path = folder / "adapter_config.json"
    saved = json.loads(path.read_text())
    saved["config"] |= options or {}
    path.write_text(json.dumps(saved | about))
    if tensors is not None:
        path = folder / "adapter.safetensors"
        save_file(tensors(load_file(path)), path)
    return folder


def state(model) -> tuple:
    kinds = [(name, type(module), dict(module.__dict__).keys()) for name, module in model.named_modules()]
    parameters = [(name, id(p), p.requires_grad, p.clone()) for name, p in model.named_parameters()]
    return kinds, [entry[:3] for entry in parameters], torch.cat([entry[3].flatten() for entry in parameters])


def refused(model, source, words: str) -> None:
    """The load raises with these words, and the model is what it was."""
    before = state(model)
    with pytest.raises(ValueError, match=words):
        peft_kernels.load(model, source)
    after = state(model)
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", HEADS)
def test_outputs_are_those_of_adapterhub(name, config, tmp_path):
    model, (inputs, expected) = a_model(name), recorded(name)
    sites = peft_kernels.load(model, DATA / name / config, "theirs", trainable=True)
    layers = 4 if name in ("bart", "t5") else 2
    assert len(sites) == layers * (2 if config == "double_seq_bn" else 1)
    found = model(**inputs).last_hidden_state
    torch.testing.assert_close(found, expected[config])
    assert not torch.allclose(found, expected["without"])
    (found * torch.randn(found.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if ".bottleneck.theirs." in key}
    assert len(gradients) == len(sites) * (5 if config == "scaled_par_bn" else 4)
    assert all(g.isfinite().all() for g in gradients.values())
    assert all(g.any() for key, g in gradients.items() if key.endswith("up_bias"))
    assert any(g.any() for key, g in gradients.items() if key.endswith("down_weight"))  # a relu may be 0 everywhere
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".bottleneck." not in key)
    peft_kernels.save_pretrained(model, tmp_path, "theirs")
    peft_kernels.load(model, tmp_path, "ours")
    assert torch.equal(model(**inputs).last_hidden_state, found)
    peft_kernels.detach(model, "theirs")
    peft_kernels.detach(model, "ours")
    assert state(model)[0] == state(a_model(name))[0]
    torch.testing.assert_close(model(**inputs).last_hidden_state, expected["without"])


@pytest.mark.parametrize("name", HEADS)
def test_models_with_heads_and_names_with_their_prefixes(name, tmp_path):
    inputs, expected = recorded(name)

    def prefixed(tensors):
        return {f"{PREFIXES[name]}.{key}": tensor for key, tensor in tensors.items()}

    for i, config in enumerate(CONFIGS):
        with_prefix = changed(tmp_path / str(i), name, config, tensors=prefixed)
        for source in (DATA / name / config, with_prefix):
            model = a_model(name, HEADS[name])
            peft_kernels.load(model, source)
            with torch.no_grad():
                out = model(**inputs, output_hidden_states=True)
            states = out.get("decoder_hidden_states") or out.hidden_states
            torch.testing.assert_close(states[-1], expected[config])
        model = a_model(name)
        peft_kernels.load(model, with_prefix)
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).last_hidden_state, expected[config])


def test_adapters_of_one_model_together():
    model, (inputs, expected) = a_model("llama"), recorded("llama")
    for config in CONFIGS:
        peft_kernels.load(model, DATA / "llama" / config, config)
    for config in CONFIGS:
        peft_kernels.set_active(model, config)
        torch.testing.assert_close(model(**inputs).last_hidden_state, expected[config])
    peft_kernels.set_active(model, [])
    torch.testing.assert_close(model(**inputs).last_hidden_state, expected["without"])
    peft_kernels.set_active(model, CONFIGS)
    assert not any(torch.allclose(model(**inputs).last_hidden_state, e) for e in expected.values())


def test_options_in_our_terms(tmp_path):
    options = {
        "dropout": 0.2,
        "stochastic_depth": 0.1,
        "non_linearity": "GELU",
        "leave_out": [0],
        "reduction_factor": 4.5,
    }
    options |= {"scaling": "channel", "original_ln_before": True}
    places = [f"encoder.layer.1.{place}.adapters.double_seq_bn" for place in ("output", "attention.output")]

    def fitting(tensors):
        kept = {key: tensor for key, tensor in tensors.items() if key.startswith(tuple(places))}
        narrow = {key: tensor[..., :3] if "up.weight" in key else tensor for key, tensor in kept.items()}
        narrow |= {key: tensor[:3] for key, tensor in kept.items() if "down" in key}
        return {key: t.contiguous() for key, t in narrow.items()} | {f"{p}.scaling": torch.ones(16) for p in places}

    source = changed(tmp_path / "theirs", "bert", "double_seq_bn", options, fitting)
    model = a_model("bert")
    sites = peft_kernels.load(model, source)
    assert sites == ("encoder.layer.1.attention.output", "encoder.layer.1.output")
    peft_kernels.save_pretrained(model, tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    expected = {
        "r": 3, "dropout_p": 0.2, "dropout_on": "output", "drop_path": 0.1, "activation": "gelu", "layers": [1],
        "scaling": "channel", "insertion": "serial", "reads": "sum", "representation": "both", "init": "bert",
    }  # fmt: skip
    assert {key: saved[key] for key in expected} == expected


OPTIONS = {
    "ln_before": True,
    "ln_after": True,
    "use_gating": True,
    "phm_layer": True,
    "inv_adapter": "nice",
    "cross_adapter": True,
    "original_ln_after": False,
    "residual_before_ln": "post_add",
    "reduction_factor": {"0": 4, "default": 8},
    "non_linearity": "mish",
    "architecture": "lora",
    "invertible_adapter": {"block_type": "nice"},
    "a_later_option": 1,
    "scaling": "sometimes",
    "output_adapter": False,
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_without_an_equal_is_refused_by_name(option, tmp_path):
    refused(a_model("bert"), changed(tmp_path / "a", "bert", "seq_bn", {option: OPTIONS[option]}), option)


def test_options_that_say_nothing_are_read_over(tmp_path):
    inputs, expected = recorded("gpt2")
    silent = {"residual_before_ln": False, "adapter_residual_before_ln": True, "phm_dim": 8, "learn_phm": False}
    model = a_model("gpt2")
    peft_kernels.load(model, changed(tmp_path / "a", "gpt2", "double_seq_bn", silent))
    torch.testing.assert_close(model(**inputs).last_hidden_state, expected["double_seq_bn"])


def test_files_that_do_not_fit_are_refused(tmp_path):
    model = a_model("bert")
    without = changed(tmp_path / "bin", "bert", "seq_bn")
    (without / "adapter.safetensors").rename(without / "pytorch_adapter.bin")
    refused(model, without, r"adapter.safetensors.*is not read.*use_safetensors=True")
    broken = changed(tmp_path / "broken", "bert", "seq_bn")
    (broken / "adapter.safetensors").write_bytes(b"nothing")
    refused(model, broken, "adapter.safetensors .* cannot be read")
    refused(model, DATA / "roberta" / "seq_bn", "of type roberta, this one is a bert")
    refused(a_model("llama"), changed(tmp_path / "other", "llama", "par_bn", model_type="phi3"), "of type phi3")
    refused(model, changed(tmp_path / "wide", "bert", "seq_bn", hidden_size=32), "hidden_size of 32, this model has 16")
    refused(model, changed(tmp_path / "r", "bert", "seq_bn", {"reduction_factor": 2}), r"must have shape \[8")
    refused(
        model, changed(tmp_path / "both", "bert", "seq_bn", {"mh_adapter": True}), "attention.output.*its config needs"
    )
    refused(
        model, changed(tmp_path / "name", "bert", "seq_bn", name="other"), "has no place for encoder.layer.0.output"
    )

    def a_head(tensors):
        return tensors | {"encoder.layer.0.output.adapters.seq_bn.gate.weight": torch.ones(1, 16)}

    refused(model, changed(tmp_path / "head", "bert", "seq_bn", tensors=a_head), "no place for .*gate.weight")

    def deeper(tensors):
        return {key.replace(".layer.1.", ".layer.7."): tensor for key, tensor in tensors.items()}

    refused(model, changed(tmp_path / "deep", "bert", "seq_bn", tensors=deeper), r"no place for encoder.layer.7.")
    peft_kernels.load(model, DATA / "bert" / "seq_bn", "default")
    with pytest.raises(ValueError, match="has an adapter 'default'"):
        peft_kernels.load(model, DATA / "bert" / "par_bn")
    torch.testing.assert_close(model(**recorded("bert")[0]).last_hidden_state, recorded("bert")[1]["seq_bn"])


@pytest.mark.parametrize("name", HEADS)
def test_rows_of_a_pool_have_the_outputs_of_adapterhub(name):
    model, (inputs, expected) = a_model(name), recorded(name)
    pool = peft_kernels.attach_pool(model, adapters=4)
    pool.load("double", DATA / name / "double_seq_bn")
    twice = {key: tensor[:1].expand(2, *tensor.shape[1:]) for key, tensor in inputs.items()}
    with torch.no_grad(), peft_kernels.adapter_ids([0, -1], adapters=["double"]):
        found = model(**twice).last_hidden_state
    torch.testing.assert_close(found, torch.stack([expected["double_seq_bn"][0], expected["without"][0]]))
    with pytest.raises(ValueError, match=r"adapter 'par': reads='stream' reads the residual stream .*serves it alone"):
        pool.load("par", DATA / name / "par_bn")
