"""P-tuning v2 and the MAM adapter: what they train, together with what, and how they are saved."""

import json

import pytest
import torch
import transformers as hf
from models import _ENCODER, GENERATING, MODELS, base_model, inputs
from prefixes import losses, of_tokens, padded
from torch import nn

import peft_kernels
from peft_kernels import BottleneckConfig, MAMConfig, PrefixTuningConfig, PTuningV2Config
from peft_kernels.integrations.prefixes import prefixes_in

SMALL = MAMConfig(
    PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=6),
    BottleneckConfig.scaled_parallel(r=4, activation="gelu"),
)


def with_both(model: nn.Module) -> nn.Module:
    """A model whose two halves do something, each alone too."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".prefixes." in key or ".bottleneck." in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_mam_has_both_halves_at_once(name, tmp_path):
    model, batch = base_model(name).eval(), padded("right")
    before = model(**batch).logits
    places = peft_kernels.attach(model, SMALL, "mam")
    with_both(model)
    found = losses(model, batch)
    assert all(found[key].any() for key, p in model.named_parameters() if p.requires_grad)
    assert {"prefixes" in key for key in found if ".mam." in key} == {True, False}
    peft_kernels.save_pretrained(model, tmp_path, "mam")
    again = base_model(name).eval()
    assert peft_kernels.load(again, tmp_path, "loaded", trainable=True) == places
    saved = of_tokens(again, again(**batch).logits, batch)
    assert torch.equal(saved, found["logits"])
    for half in (SMALL.prefix, SMALL.ffn):
        alone = base_model(name).eval()
        assert set(peft_kernels.attach(alone, half)) < set(places)
        with_both(alone)
        assert not torch.equal(alone(**batch).logits, again(**batch).logits)
    peft_kernels.detach(model, "mam")
    assert torch.equal(model(**batch).logits, before) and all(p.requires_grad for p in model.parameters())
    assert [type(module) for module in model.modules()] == [type(module) for module in base_model(name).modules()]


@pytest.mark.parametrize("name", GENERATING)
@torch.no_grad()
def test_mam_generates(name):
    model, ids = base_model(name).eval(), inputs(2, 5)["input_ids"]
    peft_kernels.attach(model, SMALL)
    with_both(model)
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, plain = (model.generate(input_ids=ids, use_cache=cache, **greedy) for cache in (True, False))
    assert torch.equal(cached, plain)


def test_configs_are_written_and_read():
    paper = MAMConfig()
    assert (paper.prefix.num_virtual_tokens, paper.ffn.r, paper.ffn.scaling) == (30, 512, 4.0)
    read = MAMConfig.from_dict(json.loads(json.dumps(SMALL.to_dict())))
    assert read == MAMConfig(SMALL.prefix.baked(), SMALL.ffn)
    with pytest.raises(ValueError, match="MAMConfig: there is no field 'r'; the fields are prefix, ffn"):
        MAMConfig.from_dict({"r": 8})
    with pytest.raises(TypeError, match="MAMConfig: ffn must be a BottleneckConfig, got a PrefixTuningConfig"):
        MAMConfig(ffn=PrefixTuningConfig())
    config = PTuningV2Config(num_virtual_tokens=3, layers=[1])
    assert PTuningV2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.prefix_dropout == 0.1 and config.to_dict()["peft_type"] == "P_TUNING_V2"
    with pytest.raises(ValueError, match="PTuningV2Config: prefix_projection must be False, there is no MLP, got True"):
        PTuningV2Config(prefix_projection=True)


HEADS = {"sequence": hf.BertForSequenceClassification, "token": hf.BertForTokenClassification}


def classifiers() -> dict[str, nn.Module]:
    """A head for sequences and one for tokens, on one encoder."""
    torch.manual_seed(1)
    models = {name: head(hf.BertConfig(**_ENCODER, num_labels=3)) for name, head in HEADS.items()}
    models["token"].bert = models["sequence"].bert
    return models


def test_one_prefix_learns_two_tasks_with_their_heads():
    models, batch = classifiers(), padded("right")
    batch.pop("labels")
    labels = {"sequence": torch.tensor([0, 1, 2]), "token": batch["input_ids"] % 3}
    base = models["sequence"].bert
    frozen = {key: p.detach().clone() for key, p in base.named_parameters()}
    peft_kernels.attach(models["sequence"], PTuningV2Config(num_virtual_tokens=8, prefix_dropout=0.0))
    models["token"].bert.requires_grad_(False)
    for _, prefixes in prefixes_in(models["token"]):
        prefixes.requires_grad_(True)
    heads = [p for model in models.values() for p in model.classifier.requires_grad_(True).parameters()]
    prefix = [p for p in base.parameters() if p.requires_grad]
    assert len(prefix) == 2
    optimizer = torch.optim.Adam(prefix + heads, lr=0.05)

    def step():
        optimizer.zero_grad()
        losses = [model(**batch, labels=labels[name]).loss for name, model in models.items()]
        apart = [torch.autograd.grad(loss, prefix, retain_graph=True) for loss in losses]
        sum(losses).backward()
        for parameter, *parts in zip(prefix, *apart, strict=True):
            assert all(part.any() for part in parts)
            torch.testing.assert_close(parameter.grad, sum(parts))
        optimizer.step()
        return [loss.item() for loss in losses]

    steps = [step() for _ in range(20)]
    assert all(last < first / 2 for first, last in zip(steps[0], steps[-1], strict=True))
    assert all(torch.equal(p, frozen[key]) for key, p in base.named_parameters() if key in frozen)
