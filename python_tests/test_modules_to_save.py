"""Heads that are trained and saved with an adapter: modules_to_save, of every method of our own."""

import copy
import os
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import transformers as hf
from accelerate import cpu_offload
from models import MODELS, base_model, inputs
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import peft_kernels
from peft_kernels import BitFitConfig, BottleneckConfig, MAMConfig, PrefixTuningConfig, PTuningV2Config

HEAD = ["classifier"]
CONFIGS = {
    "bottleneck": BottleneckConfig.pfeiffer(r=4, modules_to_save=HEAD),
    "bitfit": BitFitConfig(["query", "intermediate.dense"], modules_to_save=HEAD),
    "prefix": PTuningV2Config(num_virtual_tokens=3, prefix_dropout=0.0, modules_to_save=HEAD),
    "mam": MAMConfig(
        PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=6),
        BottleneckConfig.scaled_parallel(r=4, modules_to_save=HEAD),
    ),
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
    with pytest.raises(
        ValueError, match=r"set_active: classifier\.weight can have .* of one adapter, got first and second"
    ):
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
    "bias": (
        lambda m: peft_kernels.attach(m, BitFitConfig(["query", "valeu"])),
        "attach: BitFit: target_modules: a BertForSequenceClassification has no bias in a module 'valeu'",
    ),
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


# -- several, frozen parameters, gradients, tied ones -----------------------------------------------------------------


def test_what_trains_other_parameters_is_active_together():
    model = classifier()
    peft_kernels.attach(model, BitFitConfig(["query"]), "fit")
    fit = logits(trained(model))
    peft_kernels.attach(model, CONFIGS["bottleneck"], "head")
    trained(model)
    peft_kernels.set_active(model, ["fit", "head"], trainable="fit")
    query = model.bert.encoder.layer[0].attention.self.query.bias
    assert query.requires_grad and not model.classifier.weight.requires_grad
    assert peft_kernels.active_adapters(model) == ("head", "fit")
    peft_kernels.detach(model, "head")
    assert torch.equal(logits(model), fit) and query.requires_grad
    peft_kernels.detach(model, "fit")
    assert torch.equal(logits(model), logits(classifier()))


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_the_user_had_frozen_stays_frozen(kind):
    model = classifier()
    model.requires_grad_(False).bert.pooler.requires_grad_(True)
    before = {key: p.requires_grad for key, p in model.named_parameters()}
    for name in ("first", "second"):
        peft_kernels.attach(model, CONFIGS[kind], name)
    for name in ("first", "second"):
        peft_kernels.detach(model, name)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == before


def test_an_adapter_freezes_what_is_under_the_active_one():
    model = classifier()
    peft_kernels.attach(model, CONFIGS["bottleneck"], "first", freeze=False)
    peft_kernels.attach(model, CONFIGS["bottleneck"], "second")
    peft_kernels.set_active(model, [])
    assert not any(p.requires_grad for p in model.parameters())
    for name in ("first", "second"):
        peft_kernels.detach(model, name)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("others", [[], ["second"]], ids=["base", "another"])
def test_a_gradient_stays_with_its_adapter(others):
    model = classifier()
    for name in ("second", "first"):
        peft_kernels.attach(model, CONFIGS["bottleneck"], name)
    model(**_batch(), labels=torch.zeros(len(_batch()["input_ids"]), dtype=torch.long)).loss.backward()
    peft_kernels.set_active(model, "first", trainable=False)
    assert model.classifier.weight.grad is not None
    peft_kernels.set_active(model, others)
    assert model.classifier.weight.grad is None


def test_tied_parameters_are_saved_once(tmp_path):
    config = BottleneckConfig(r=2, modules_to_save=["wte", "lm_head"])
    model, other = base_model("gpt2").eval(), base_model("gpt2").eval()
    base = model.lm_head.weight.detach().clone()
    peft_kernels.attach(model, config)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    peft_kernels.save_pretrained(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert [key for key in saved if "bottleneck" not in key] == ["base_model.model.transformer.wte.weight"]
    peft_kernels.load(other, tmp_path)
    assert torch.equal(other.lm_head.weight, base + 1) and other.lm_head.weight is other.transformer.wte.weight
    peft_kernels.detach(other)
    assert torch.equal(other.lm_head.weight, base)


# -- what others do to the model afterwards ---------------------------------------------------------------------------

PEFTS = {
    "copied": LoraConfig(target_modules=["query"], task_type="SEQ_CLS"),
    "wrapped": LoraConfig(target_modules=["query", "classifier"]),
}


@pytest.mark.parametrize("way", PEFTS)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:.*the model does not run")
def test_a_head_that_peft_wraps_is_saved_switched_and_given_back(way, tmp_path):
    model = classifier()
    peft_kernels.attach(model, CONFIGS["bottleneck"], "task")
    head = trained(model).classifier
    weight, base = head.weight.detach().clone(), classifier().classifier.weight
    peft = get_peft_model(model, PEFTS[way])
    peft_kernels.save_pretrained(peft, tmp_path, "task")
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.classifier.weight"], weight) and saved.keys() > KEYS
    peft_kernels.attach(peft, BottleneckConfig(r=2), "plain")
    assert torch.equal(head.weight, base)
    if way == "copied":
        with pytest.warns(UserWarning, match="the model does not run classifier.weight, .*a copy that PEFT trains"):
            peft_kernels.set_active(peft, "task")
    else:
        peft_kernels.set_active(peft, "task")
    assert torch.equal(head.weight, weight)
    for name in ("task", "plain"):
        peft_kernels.detach(peft, name)
    assert torch.equal(head.weight, base) and not [key for key, _ in peft.named_parameters() if "bottleneck" in key]
    biases = peft_kernels.attach(peft, BitFitConfig(["classifier", "query"]))
    assert len(biases) == 3 and "classifier.bias" in biases, "PEFT's copy of a head is none of the model's"


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("way", ["meta", "offloaded"])
def test_values_do_not_go_into_parameters_that_are_not_there(way, kind, tmp_path):
    away = classifier()
    text = r"the parameters of \S+ are not there \(meta, or offloaded\); move them to a device first"
    adapted = trained(_attached(classifier(), kind))
    peft_kernels.save_pretrained(adapted, tmp_path)
    for model in (away, adapted):
        model.to("meta") if way == "meta" else cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match=f"^load: {text}"):
        peft_kernels.load(away, tmp_path)
    with pytest.raises(ValueError, match=f"^attach: {text}"):
        peft_kernels.attach(away, CONFIGS[kind])
    assert peft_kernels.active_adapters(away) == () and all(p.requires_grad for p in away.parameters())
    calls = {
        "set_active": lambda: peft_kernels.set_active(adapted, []),
        "detach": lambda: peft_kernels.detach(adapted),
        "attach": lambda: peft_kernels.attach(adapted, BottleneckConfig(r=2), "second"),
        "save_pretrained": lambda: peft_kernels.save_pretrained(adapted, tmp_path / "again"),
    }
    keys = list(adapted.state_dict())
    for function, call in calls.items():
        with pytest.raises(ValueError, match=f"^{function}: {text}"):
            call()
        assert peft_kernels.active_adapters(adapted) == ("default",) and list(adapted.state_dict()) == keys
    assert not (tmp_path / "again").exists()


def _attached(model: nn.Module, kind: str) -> nn.Module:
    peft_kernels.attach(model, CONFIGS[kind])
    return model


def test_errors_begin_with_the_function_that_was_called(tmp_path):
    peft_kernels.save_pretrained(_attached(classifier(), "bottleneck"), tmp_path)
    with pytest.raises(ValueError, match=r"^load: modules_to_save: a GPT2LMHeadModel has no parameters in a module "):
        peft_kernels.load(base_model("gpt2"), tmp_path)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_pool_serves_the_plain_model(kind, tmp_path):
    model, plain = classifier(), logits(classifier())
    peft_kernels.save_pretrained(trained(_attached(model, kind)), tmp_path)
    with pytest.raises(
        ValueError, match=r"attach_pool: .* values of the adapter 'default', .*set_active\(model, \[\]\)"
    ):
        peft_kernels.attach_pool(model, adapters=2)
    peft_kernels.set_active(model, [])
    peft_kernels.attach_pool(model, adapters=2)
    calls = {
        "attach": lambda: peft_kernels.attach(model, CONFIGS[kind], "second"),
        "load": lambda: peft_kernels.load(model, tmp_path, "second"),
        "set_active": lambda: peft_kernels.set_active(model, "default"),
    }
    for function, call in calls.items():
        with pytest.raises(ValueError, match=rf"^{function}: the model serves a pool, .*peft_kernels.unpatch\(model\)"):
            call()
    with peft_kernels.adapter_ids([-1] * len(plain), []):
        assert torch.equal(logits(model), plain)
    peft_kernels.detach(model)


# -- sharded by FSDP2 -------------------------------------------------------------------------------------------------


def _sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _work(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    try:
        for config in (CONFIGS["bottleneck"], CONFIGS["bitfit"], CONFIGS["prefix"]):
            _switch_and_save(config, f"{path}/{rank}")
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # gloo's threads abort the interpreter's own way out now and then


def _switch_and_save(config, folder: str) -> None:
    model, base = classifier(), logits(classifier())
    peft_kernels.attach(model, config)
    found = logits(trained(model))
    peft_kernels.save_pretrained(model, f"{folder}/one")
    before = load_file(f"{folder}/one/adapter_model.safetensors")
    sharded = _sharded(model)  # calls without a backward leave the head gathered
    assert torch.equal(logits(sharded), found)
    peft_kernels.set_active(sharded, [])
    assert torch.equal(sharded.classifier.weight.full_tensor(), classifier().classifier.weight)
    assert torch.equal(logits(sharded), base)
    peft_kernels.set_active(sharded, "default")
    assert torch.equal(logits(sharded), found)
    peft_kernels.save_pretrained(sharded, f"{folder}/two")
    after = load_file(f"{folder}/two/adapter_model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    if isinstance(config, BitFitConfig):
        peft_kernels.detach(sharded)
        loaded = _sharded(classifier())
        peft_kernels.load(loaded, f"{folder}/one")
        for model, expected in ((sharded, base), (loaded, found)):
            assert torch.equal(logits(model), expected)
        peft_kernels.detach(loaded)
        assert torch.equal(logits(loaded), base)


def test_sharded_heads_and_biases_are_switched_saved_and_loaded(tmp_path):
    multiprocessing.spawn(_work, (str(tmp_path),), nprocs=2)
