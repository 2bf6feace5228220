"""Adapters and what lies around a model: DDP, which has to come after them; and one module at which they are noted."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from models import base_model
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import peft_kernels
from peft_kernels import BitFitConfig, BottleneckConfig, PrefixTuningConfig
from peft_kernels.integrations.attachments import NOTE

DOUBLE = Path(__file__).parent / "data" / "adapterhub" / "bert" / "double_seq_bn"
CONFIG, PREFIX = BottleneckConfig(r=2), PrefixTuningConfig(num_virtual_tokens=3)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('ddp')}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("config", [CONFIG, BitFitConfig(), PREFIX])
def test_ddp_comes_after_what_makes_parameters_trainable(config, one_process, tmp_path):
    model = base_model("gpt2")
    peft_kernels.attach(model, config, "a")
    peft_kernels.attach(model, config, "b")
    peft_kernels.save_pretrained(model, tmp_path, "a")
    wrapped = DistributedDataParallel(model)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    for call in (
        lambda: peft_kernels.attach(wrapped, config, "c"),
        lambda: peft_kernels.load(wrapped, tmp_path, "c"),
        *([lambda: peft_kernels.set_active(wrapped, "a")] if config in (CONFIG, PREFIX) else []),
    ):
        with pytest.raises(
            ValueError, match=r"DistributedDataParallel, .*before, and DistributedDataParallel\(model\)"
        ):
            call()
    assert {key for key, p in model.named_parameters() if p.requires_grad} == trained
    assert peft_kernels.active_adapters(wrapped) == ("b",)
    peft_kernels.set_active(wrapped, "b")
    peft_kernels.set_active(wrapped, "a", trainable=False)
    peft_kernels.save_pretrained(wrapped, tmp_path, "a")
    assert load_file(tmp_path / "adapter_model.safetensors")


def test_adapters_are_noted_at_one_module(tmp_path):
    model = base_model("llama")
    peft_kernels.attach(model.model, CONFIG, "a")
    weight = model.model.layers[0].mlp.bottleneck["a"].down_weight
    for call in (
        lambda: peft_kernels.attach(model, BottleneckConfig(r=4), "a"),
        lambda: peft_kernels.attach(model, CONFIG, "b"),
        lambda: peft_kernels.attach(model, BitFitConfig(), "b"),
        lambda: peft_kernels.set_active(model, []),
        lambda: peft_kernels.save_pretrained(model, tmp_path, "a"),
        lambda: peft_kernels.detach(model, "a"),
    ):
        with pytest.raises(ValueError, match="model has adapters that were attached to it; pass that module"):
            call()
    assert model.model.layers[0].mlp.bottleneck["a"].down_weight is weight and NOTE not in model.__dict__
    peft_kernels.detach(model.model, "a")
    peft_kernels.attach(model, CONFIG, "a")
    for call in (
        lambda: peft_kernels.attach(model.model, CONFIG, "a"),
        lambda: peft_kernels.attach(model.model, CONFIG, "z"),
        lambda: peft_kernels.set_active(model.model, []),
        lambda: peft_kernels.detach(model.model, "a"),
    ):
        with pytest.raises(ValueError, match=r"layers.0.mlp has an adapter 'a' that was attached to another module"):
            call()
    peft_kernels.save_pretrained(model, tmp_path, "a")
    del model.model.layers[1].mlp._modules["bottleneck"]
    with pytest.raises(ValueError, match=r"the adapter 'a' is no longer at model.layers.1.mlp"):
        peft_kernels.save_pretrained(model, tmp_path / "none", "a")
    assert not (tmp_path / "none").exists()


def test_prefixes_are_noted_at_one_module(tmp_path):
    model = base_model("llama")
    peft_kernels.attach(model.model, PREFIX, "a")
    for call in (
        lambda: peft_kernels.attach(model, PREFIX, "b"),
        lambda: peft_kernels.set_active(model, []),
        lambda: peft_kernels.save_pretrained(model, tmp_path, "a"),
        lambda: peft_kernels.detach(model, "a"),
    ):
        with pytest.raises(ValueError, match="model has adapters that were attached to it; pass that module"):
            call()
    peft_kernels.detach(model.model, "a")
    assert model.config._attn_implementation == "sdpa"
    peft_kernels.attach(model, PREFIX, "a")
    for call in (
        lambda: peft_kernels.attach(model.model, PREFIX, "z"),
        lambda: peft_kernels.detach(model.model, "a"),
    ):
        with pytest.raises(ValueError, match=r"layers.0.self_attn has an adapter 'a' that was attached to another"):
            call()
    peft_kernels.save_pretrained(model, tmp_path, "a")


def test_a_head_beside_an_adapter_of_adapterhub_is_named(tmp_path):
    def model():
        return hf.BertModel.from_pretrained(DOUBLE.parent)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft_kernels.load(model(), DOUBLE)
    shutil.copytree(DOUBLE, tmp_path / "a")
    (tmp_path / "a" / "head_config.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"head_config.json, model_head\) is not read"):
        peft_kernels.load(model(), tmp_path / "a")

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model()
            self.config = self.model.config

    peft_kernels.load(Around(), DOUBLE)


def test_a_pool_says_the_types_that_it_reads(tmp_path):
    model = base_model("llama")
    pool = peft_kernels.attach_pool(model, adapters=2)
    for said in ({}, {"peft_type": [3]}, []):
        (tmp_path / "adapter_config.json").write_text(json.dumps(said))
        with pytest.raises(ValueError, match="must be LORA or BOTTLENECK, got"):
            pool.load("a", tmp_path)


def test_beams_are_of_sequences():
    with pytest.raises(ValueError, match=r"beams=3 repeats sequences; ids must have shape \[B\] then, got \[2, 4\]"):
        peft_kernels.adapter_ids(torch.zeros(2, 4, dtype=torch.int64), ["a"], beams=3).__enter__()
    rows = peft_kernels.integrations.rows.RowAdapters("adapter_ids", torch.zeros(3, dtype=torch.int32), ("a",), 2)
    with pytest.raises(ValueError, match=r"ids for \[3\], or 6 with beams=2, which a layer's input"):
        rows.make_route(torch.Size([9, 5]), torch.device("cpu"))
