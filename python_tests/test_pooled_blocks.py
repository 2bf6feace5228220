"""Bottleneck adapters in the pool of a model: one batch with rows of LoRA, serial, parallel and no adapter, each as it
is alone; through runners and generation; what is refused; the plain model back."""

import copy

import pytest
import torch
from models import (
    TARGETS,
    Operators,
    assert_as_close_as_peft,
    base_model,
    each_alone,
    in_double,
    in_rows,
    inputs,
    nothing_is_left,
    with_adapter,
)
from safetensors.torch import load_file, save_file

import peft_kernels
from peft_kernels import BottleneckConfig
from peft_kernels.integrations.pooled import pool_of

CONFIGS = {
    "behind": BottleneckConfig.pfeiffer(r=5, activation="gelu"),
    "beside": BottleneckConfig.scaled_parallel(r=9),
    "houlsby": BottleneckConfig.houlsby(r=3, scaling="learned", layers=[1]),
    "plus": BottleneckConfig.adapter_plus(r=4, activation="silu", reads="output"),
    "heads": BottleneckConfig.parallel(r=8, representation="attention", activation="gelu_tanh"),
}
MIXED = ["behind", None, "french", "beside", "plus", "houlsby", "heads", "behind"]


def with_bottleneck(plain, folder, name, config):
    """A copy of a model with one adapter, whose part of the output shows; and its files."""
    model = copy.deepcopy(plain)
    peft_kernels.attach(model, config, name)
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".bottleneck.{name}." in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    peft_kernels.save_pretrained(model, folder / name, name)
    return model.eval()


def served(model_name, folder, names=CONFIGS):
    """A plain model; one with a pool of LoRA and bottleneck adapters; and the plain one with each adapter alone."""
    plain = base_model(model_name).eval()
    alone = {name: with_bottleneck(plain, folder, name, CONFIGS[name]) for name in names}
    model = copy.deepcopy(plain)
    pool = peft_kernels.attach_pool(model, adapters=8)
    for name in alone:
        pool.load(name, folder / name)
    alone["french"] = with_adapter(plain, 0, target_modules=TARGETS.get(model_name, "all-linear"))
    pool.load("french", alone["french"])
    return plain, model, alone, pool


@torch.no_grad()
def logits(model, rows):
    with in_rows(rows):
        return model(**inputs(len(rows))).logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "opt", "t5", "bart"])
def test_each_row_equals_its_adapter_alone(name, tmp_path):
    plain, model, alone, _ = served(name, tmp_path, ("behind", "beside", "plus") if name in ("t5", "bart") else CONFIGS)
    rows = [row for row in MIXED if row is None or row in alone]
    batch = inputs(len(rows))
    exact = each_alone(in_double(plain), {n: in_double(m) for n, m in alone.items()}, rows, batch)
    found = {"logits": logits(model, rows)}
    assert_as_close_as_peft(found, each_alone(plain, alone, rows, batch), exact)
    with torch.no_grad():
        assert model(**batch).logits.equal(plain(**batch).logits) and nothing_is_left(model)


def test_a_block_that_no_adapter_touches_costs_no_call(tmp_path):
    plain, model, _, pool = served("llama", tmp_path, ())
    with Operators() as operators:
        logits(model, ["french", None])
    before = operators.calls["batched_lora_"]
    with_bottleneck(plain, tmp_path, "behind", CONFIGS["behind"])
    pool.load("behind", tmp_path / "behind")
    with Operators() as operators:
        logits(model, ["french", None])
    assert operators.calls["batched_lora_"] == before + 2, "one for each layer's serial site"


@pytest.mark.parametrize("compile", [None, {"fullgraph": True, "backend": "aot_eager"}], ids=["eager", "fullgraph"])
def test_a_runner_computes_what_the_model_does(compile, tmp_path):
    _, model, _, _ = served("llama", tmp_path)
    runner = peft_kernels.Runner(model, compile)
    for rows in (MIXED, MIXED[::-1]):
        found = runner(input_ids=inputs(len(rows))["input_ids"], adapters=rows).logits
        torch.testing.assert_close(found, logits(model, rows))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation(name, tmp_path):
    plain, model, alone, _ = served(name, tmp_path)
    tokens = inputs(len(MIXED))["input_ids"]
    asked = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    with in_rows(MIXED):
        found = model.generate(tokens, **asked)
    for i, row in enumerate(MIXED):
        expected = (plain if row is None else alone[row]).generate(tokens[i : i + 1], **asked)
        assert found[i].tolist() == expected[0].tolist(), row


def test_unpatch_gives_the_plain_model_back_for_a_while(tmp_path):
    plain, model, _, _ = served("gpt2", tmp_path)
    before, kinds = logits(model, MIXED), [type(m) for m in model.modules()]
    with peft_kernels.unpatch(model):
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
        assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in model.modules()] == kinds and logits(model, MIXED).equal(before)
    peft_kernels.unpatch(model)
    peft_kernels.attach_pool(model)


REFUSED = {
    "norm": (dict(norm="layer_norm"), "norm='layer_norm' normalises what the adapter reads"),
    "gate": (dict(gate=True), "gate=True works a gate out for each token"),
}


@pytest.mark.parametrize("changes,text", REFUSED.values(), ids=REFUSED)
def test_what_a_pool_cannot_hold_is_refused(changes, text, tmp_path):
    plain, model, _, pool = served("llama", tmp_path, ())
    with_bottleneck(plain, tmp_path, "a", BottleneckConfig.pfeiffer(r=3, **changes))
    with pytest.raises(ValueError, match=f"adapter 'a': {text}.*peft_kernels.load") as caught:
        pool.load("a", tmp_path / "a")
    assert "serves it alone" in str(caught.value) and pool.names() == ["french"] and pool_of(model) is pool


def test_files_that_do_not_fit_are_refused(tmp_path):
    plain, model, _, pool = served("llama", tmp_path, ())
    with_bottleneck(plain, tmp_path, "a", CONFIGS["behind"])
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.1.mlp.bottleneck."
    for changed, text in (
        (
            {k: t for k, t in tensors.items() if not k.startswith(key)},
            r"has no .*layers\.1\.mlp.*, which its config",
        ),
        (
            {k: t for k, t in tensors.items() if k != f"{key}up_bias"},
            r"has no .*layers\.1\.mlp\.bottleneck\.up_bias",
        ),
        (tensors | {"odd": torch.ones(1)}, "the model has no place for odd"),
        (
            tensors | {f"{key}down_bias": torch.ones(3)},
            r"mlp.bottleneck.down_bias must have shape \[5\] in this model, got \[3\]",
        ),
        (tensors | {f"{key}scale": torch.ones(1)}, "the model has no place for .*mlp.bottleneck.scale"),
        (
            tensors | {k.replace("mlp", "self_attn"): t.clone() for k, t in tensors.items()},
            "the model has no place for .*self_attn.bottleneck",
        ),
    ):
        save_file(changed, file)
        with pytest.raises(ValueError, match=text):
            pool.load("a", tmp_path / "a")
    assert pool_of(model) is pool and pool.names() == ["french"]


def test_bitfit_and_folders_of_no_adapter_are_refused(tmp_path):
    plain, model, _, pool = served("bert", tmp_path, ())
    peft_kernels.attach(plain, peft_kernels.BitFitConfig(), "a")
    peft_kernels.save_pretrained(plain, tmp_path / "a", "a")
    with pytest.raises(ValueError, match=r"adapter 'a': BitFit trains biases .* peft_kernels.load.* serves it alone"):
        pool.load("a", tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"the peft_type in .* must be LORA or BOTTLENECK, got None"):
        pool.load("a", tmp_path / "a")
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        pool.load("a", tmp_path / "nowhere")
    assert pool.names() == ["french"] and pool_of(model) is pool


def test_numbers_that_are_not_finite_are_taken_where_that_is_said(tmp_path):
    plain, model, _, pool = served("llama", tmp_path, ())
    with_bottleneck(plain, tmp_path, "a", CONFIGS["behind"])
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.1.mlp.bottleneck.up_bias"][0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(ValueError, match="allow_nonfinite=True takes them"):
        pool.load("a", tmp_path / "a")
    before = logits(model, ["french", None])
    pool.load("a", tmp_path / "a", allow_nonfinite=True)
    found = logits(model, ["french", "a"])
    assert found[0].equal(before[0]) and found[1].isnan().any()


def test_adapters_of_the_model_and_of_its_pool(tmp_path):
    """What `attach` gives is for all rows: a block has that or places in the pool."""
    plain, model, _, pool = served("llama", tmp_path, ("behind",))
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp cannot have an adapter: the model's pool has bottleneck adapters"
    ):
        peft_kernels.attach(model, CONFIGS["behind"])
    peft_kernels.attach(model, CONFIGS["heads"])  # its blocks are free
    with_bottleneck(plain, tmp_path, "heads", CONFIGS["heads"])
    with pytest.raises(ValueError, match=r"self_attn.* has bottleneck adapters of the model's own"):
        pool.load("heads", tmp_path / "heads")
    other = copy.deepcopy(plain)
    peft_kernels.attach(other, CONFIGS["behind"])
    pool = peft_kernels.attach_pool(other)
    assert not [site for site in pool.sites if "bottleneck" in site]
    with pytest.raises(ValueError, match="cannot take adapters: the model has bottleneck adapters of its own"):
        pool.load("heads", tmp_path / "heads")
    assert pool_of(other) is pool


def test_the_widest_bottleneck(tmp_path):
    plain, model, alone, pool = served("llama", tmp_path, ())
    alone["wide"] = with_bottleneck(plain, tmp_path, "wide", BottleneckConfig.pfeiffer(r=1024))
    pool.load("wide", tmp_path / "wide")
    rows, exact = ["french", "wide", None], {n: in_double(m) for n, m in alone.items()}
    expected, batch = each_alone(plain, alone, rows, inputs(3)), inputs(3)
    found = {"logits": logits(model, rows)}
    assert_as_close_as_peft(found, expected, each_alone(in_double(plain), exact, rows, batch))
