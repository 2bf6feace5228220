"""Heads that are trained and saved with an adapter: modules_to_save, of bottleneck adapters and of BitFit."""

import copy

import pytest
import torch
import transformers as hf
from models import MODELS, base_model, inputs
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

import peft_kernels
from peft_kernels import BitFitConfig, BottleneckConfig

HEAD = ["classifier"]
CONFIGS = {
    "bottleneck": BottleneckConfig.pfeiffer(r=4, modules_to_save=HEAD),
    "bitfit": BitFitConfig(["query", "intermediate.dense"], modules_to_save=HEAD),
}
KEYS = {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return hf.BertForSequenceClassification(MODELS["bert"][1](**MODELS["bert"][2], num_labels=3)).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(**_batch()).logits


def _batch() -> dict:
    return {"input_ids": inputs()["input_ids"]}


def trained(model, steps: int = 3) -> nn.Module:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    labels = torch.arange(len(inputs()["input_ids"])) % 3
    for _ in range(steps):
        model(**_batch(), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_head_is_trained_saved_loaded_and_given_back(kind, tmp_path):
    plain, model = classifier(), classifier()
    peft_kernels.attach(model, CONFIGS[kind], "task")
    assert model.classifier.weight.requires_grad and not model.bert.pooler.dense.weight.requires_grad
    trained(model)
    assert not torch.equal(model.classifier.weight, plain.classifier.weight)
    found = logits(model)
    peft_kernels.save_pretrained(model, tmp_path, "task")
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() > KEYS
    assert torch.equal(saved["base_model.model.classifier.weight"], model.classifier.weight)
    other = classifier()
    peft_kernels.load(other, tmp_path, "again")
    assert torch.equal(logits(other), found) and not other.classifier.weight.requires_grad
    peft_kernels.set_active(model, [])
    assert torch.equal(logits(model), logits(plain))
    peft_kernels.set_active(model, "task")
    twin = copy.deepcopy(model)
    assert torch.equal(logits(model), found) and torch.equal(logits(twin), found)
    for adapted, name in ((model, "task"), (twin, "task"), (other, "again")):
        peft_kernels.detach(adapted, name)
        state = plain.state_dict()
        assert adapted.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in adapted.state_dict().items())
        assert all(p.requires_grad for p in adapted.parameters())


def test_each_adapter_has_a_head_of_its_own():
    model = classifier()
    peft_kernels.attach(model, CONFIGS["bottleneck"], "first")
    trained(model)
    first = logits(model)
    peft_kernels.attach(model, CONFIGS["bottleneck"], "second")
    assert torch.equal(model.classifier.weight, classifier().classifier.weight), "of the base, not of the first"
    second = logits(trained(model))
    with pytest.raises(ValueError, match="modules_to_save have the values of one adapter, got first and second"):
        peft_kernels.set_active(model, ["first", "second"])
    assert torch.equal(logits(model), second)
    peft_kernels.set_active(model, "first")
    assert torch.equal(logits(model), first)
    peft_kernels.attach(model, BottleneckConfig(r=2), "plain")
    peft_kernels.set_active(model, ["first", "plain"], trainable=["plain"])
    assert torch.equal(logits(model), first) and not model.classifier.weight.requires_grad  # B of the plain one is 0


def test_files_have_the_keys_of_peft(tmp_path):
    peft = get_peft_model(classifier(), LoraConfig(target_modules=["query"], modules_to_save=HEAD))
    peft.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() > KEYS
    with pytest.raises(ValueError, match="classifier has adapters of PEFT's, which trains and saves it"):
        peft_kernels.attach(peft, CONFIGS["bottleneck"])


REFUSED = {
    "str": (lambda m: BottleneckConfig(modules_to_save="classifier"), "modules_to_save must be a list of names"),
    "empty": (lambda m: BitFitConfig(modules_to_save=[""]), "modules_to_save must hold names of modules"),
    "unknown": (lambda m: _attach(m, "head"), "a BertForSequenceClassification has no parameters in a module 'head'"),
    "block": (lambda m: _attach(m, "encoder"), "bert.encoder has, or is in, a block for adapters; name a head"),
    "inside": (lambda m: _attach(m, "0.output.dense"), "has, or is in, a block for adapters"),
    "buffers": (lambda m: _attach(m, "embeddings"), "bert.embeddings has buffers"),
    "tied": (lambda m: _attach(base_model("gpt2"), "lm_head"), r"transformer\.wte\.weight is tied to one of its"),
}


def _attach(model, name):
    peft_kernels.attach(model, BottleneckConfig(r=2, modules_to_save=[name]))


@pytest.mark.parametrize(("call", "text"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_saved_is_refused(call, text):
    model = classifier()
    before = list(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=text):
        call(model)
    assert (list(model.state_dict()), [type(m) for m in model.modules()]) == before


def test_a_pool_refuses_it(tmp_path):
    model = classifier()
    peft_kernels.attach(model, CONFIGS["bottleneck"])
    peft_kernels.save_pretrained(model, tmp_path)
    served = classifier()
    pool = peft_kernels.attach_pool(served)
    with pytest.raises(ValueError, match=r"modules_to_save=.* trains parts of the model, which a pool does not hold"):
        pool.load("task", tmp_path)
