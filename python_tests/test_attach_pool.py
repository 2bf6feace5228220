"""A model that serves the adapters of a pool: against PEFT with each adapter alone, with counts; every kind of LoRA
that PEFT saves, what is refused, versions, threads, exceptions, and the plain model back."""

import contextvars
import copy
import pickle
import re
import threading

import huggingface_hub
import pytest
import torch
from models import (
    GENERATING,
    MODELS,
    ROWS,
    Operators,
    assert_as_close_as_peft,
    base_model,
    each_alone,
    in_double,
    in_rows,
    inputs,
    nothing_is_left,
    peft_model,
    served,
    with_adapter,
)
from peft import IA3Config, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

import peft_kernels
from peft_kernels.integrations.pooled import pool_of
from peft_kernels.integrations.rows import RowAdapters, entered


def tokens(rows: int = len(ROWS)) -> dict:
    """For generate; a forward of T5 wants labels too."""
    return {"input_ids": inputs(rows)["input_ids"]}


@torch.no_grad()
def logits(model, rows=ROWS, batch=None):
    with in_rows(rows):
        return model(**batch or inputs(len(rows))).logits


def assert_as_alone(plain, model, alone, rows=ROWS):
    batch = inputs(len(rows))
    exact = each_alone(in_double(plain), {n: in_double(m) for n, m in alone.items()}, rows, batch)
    assert_as_close_as_peft({"logits": logits(model, rows)}, each_alone(plain, alone, rows, batch), exact)


def calls_per_forward(model, alone):
    """One for the projections of a known group, one for each other layer that an adapter touches."""
    touched = {n for m in alone.values() for n in m.targeted_module_names}
    owners = [n for n, m in model.named_modules() if hasattr(type(m), "group")]
    grouped = {
        name for name in touched if name.rpartition(".")[0] in owners and not name.endswith(("o_proj", "down_proj"))
    }
    return len(touched - grouped) + len({(n.rpartition(".")[0]) for n in grouped})


@pytest.mark.parametrize("name", MODELS)
def test_each_row_equals_its_adapter_alone(name):
    plain, model, alone = served(name)
    with Operators() as operators:
        assert_as_alone(plain, model, alone)
    assert operators.calls["batched_lora_"] == calls_per_forward(model, alone)
    assert operators.calls["batched_lora_route"] <= 2, "one for each number of rows that the layers have"
    with torch.no_grad(), Operators() as operators:
        assert model(**inputs(5)).logits.equal(plain(**inputs(5)).logits), "no adapters of rows: the plain model"
    assert not operators.calls and nothing_is_left(model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
def test_generation(name):
    assert name in GENERATING
    plain, model, alone = served(name)
    asked = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "eos_token_id": None, "pad_token_id": 0}
    with in_rows(ROWS, beams=2):  # an encoder sees each sequence once
        found = model.generate(**tokens(), **asked)
    if name != "bart":
        with in_rows([n for n in ROWS for _ in range(2)]):
            assert model.generate(**tokens(), **asked).equal(found)
    for i, n in enumerate(ROWS):
        expected = (plain if n is None else alone[n]).generate(input_ids=tokens()["input_ids"][i : i + 1], **asked)
        assert found[i].tolist() == expected[0].tolist(), f"row {i}, {n}"


def test_beams_that_are_not_said_are_asked_for():
    _, model, _ = served("bart")
    with (
        in_rows(ROWS),
        pytest.raises(ValueError, match=r"adapter_ids\(\.\.\., beams=n\) says how often"),
    ):
        model.generate(**tokens(), num_beams=2, max_new_tokens=2)
    for beams in (0, 1.5, True):
        with pytest.raises(ValueError, match="beams must be an integer of 1 or more"), in_rows(ROWS, beams=beams):
            pass


KINDS = {
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3, "1.mlp.up_proj": 7}},
    "dora": {"use_dora": True},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "up_proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_lora(kind):
    assert_as_alone(*served("gemma3" if kind == "embedding" else "llama", **KINDS[kind]))


def test_dora_of_layers_with_a_bias():
    assert_as_alone(*served("gpt2", use_dora=True))


def test_kinds_in_one_batch():
    plain, model, alone = served()
    for seed, (kind, changes) in enumerate(KINDS.items()):
        alone[kind] = with_adapter(plain, 10 + seed, **changes)
    for kind in list(KINDS)[:5]:
        pool_of(model).load(kind, alone[kind])
    assert_as_alone(plain, model, alone, [*list(KINDS)[:5], None, *ROWS])


def test_factors_in_fp32_on_a_model_in_bfloat16():
    plain = base_model("llama").eval()
    alone = with_adapter(plain, 0, target_modules=["embed_tokens", "q_proj", "down_proj"])
    exact = each_alone(in_double(plain), {"a": in_double(alone)}, ["a", None], inputs(2))
    half = {n: m.bfloat16() for n, m in (("plain", copy.deepcopy(plain)), ("a", copy.deepcopy(alone)))}
    model = copy.deepcopy(half["plain"])
    peft_kernels.attach_pool(model, dtype=torch.float32).load("a", alone)
    peft = each_alone(half["plain"], {"a": half["a"]}, ["a", None], inputs(2))
    assert_as_close_as_peft({"logits": logits(model, ["a", None])}, peft, exact)


def test_from_a_folder(tmp_path):
    _, model, alone = served(target_modules=["embed_tokens", "q_proj"])
    alone["french"].save_pretrained(tmp_path)
    before = logits(model)
    pool_of(model).load("french", tmp_path, replace=True)
    assert logits(model).equal(before)


REFUSED = {
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "bias": ({"bias": "all"}, "bias='all'"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_pool_cannot_hold(kind):
    changes, words = REFUSED[kind]
    model = base_model("llama").eval()
    pool = peft_kernels.attach_pool(model)
    with pytest.raises(ValueError, match=f"adapter 'a': .*{words}"):
        pool.load("a", with_adapter(base_model("llama"), 0, **changes))
    assert not len(pool)


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"has PEFT adapters.*model.unload\(\)"):
        peft_kernels.attach_pool(peft_model("llama"))
    with pytest.raises(ValueError, match="no linear layer"):
        peft_kernels.attach_pool(nn.Sequential(nn.LayerNorm(3)))
    with torch.device("meta"), pytest.raises(ValueError, match="one device, got meta"):
        peft_kernels.attach_pool(nn.Sequential(nn.Linear(3, 3)))
    _, model, _ = served()
    with pytest.raises(ValueError, match="has a pool"):
        peft_kernels.attach_pool(model)
    with pytest.raises(TypeError, match=r"unpatch\(model\)"):
        pickle.dumps(model)
    with pytest.raises(RuntimeError, match=r"torch.no_grad\(\)"), in_rows(ROWS):
        model(**tokens())
    with pytest.raises(KeyError, match="no adapter 'dutch'"), in_rows(["dutch"]):
        model(**tokens(1))
    other = get_peft_model(base_model("llama"), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="its peft_type is IA3; a pool holds LoRA"):
        pool_of(model).load("ia3", other)
    with pytest.raises(KeyError, match=r"did you mean 'model\.layers\.0"):
        pool_of(model).load("t5", with_adapter(base_model("bart"), 0))
    assert nothing_is_left(model)


def test_a_folder_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "french").mkdir()
    model = base_model("llama")
    pool = peft_kernels.attach_pool(model, adapters=2)
    near = re.escape(f"load: there is no folder {tmp_path / 'frnch'} (did you mean {tmp_path / 'french'}?), and no id")
    with pytest.raises(ValueError, match=near):
        pool.load("french", tmp_path / "frnch")
    with pytest.raises(ValueError, match="no folder someone/else, and as an id of the Hugging Face Hub it has no"):
        pool.load("french", "someone/else")
    with pytest.raises(ValueError, match=r"french has no adapter_config.json that can be read"):
        peft_kernels.load(model, tmp_path / "french")


def test_a_task_that_outlives_the_block_raises():
    _, model, _ = served()
    with in_rows(["french"]), torch.no_grad():
        context = contextvars.copy_context()
        model(**tokens(1))
    with torch.no_grad(), pytest.raises(RuntimeError, match="after the block has ended"):
        context.run(model, **tokens(1))


def test_ids_out_of_range_on_a_device_that_is_not_waited_for():
    """As on a GPU, where nobody looks at the ids before the route does: never another adapter, and not silent."""
    _, model, _ = served()
    for ids in ([-2], [2], [99]):
        rows = RowAdapters("test", torch.tensor(ids), ("french", "german"))
        with pytest.raises(ValueError, match="out of range"), torch.no_grad(), entered(rows):
            model(**tokens(1))


def test_layers_of_other_dtypes():
    """T5 keeps one layer in fp32 when the rest is in half precision."""
    model = base_model("llama").bfloat16().eval()
    model.model.layers[0].mlp.down_proj.float()
    pool = peft_kernels.attach_pool(model)
    assert pool.dtype is torch.float32
    peft_kernels.unpatch(model)
    pool = peft_kernels.attach_pool(model.double())
    pool.load("a", with_adapter(base_model("llama"), 0))
    with pytest.raises(TypeError, match=r"q_proj computes in torch.float32 and its pool stores torch.float64"):
        logits(model.float(), ["a"])


def test_keyword_arguments_of_layers():
    plain, model, _ = served()
    x = torch.randn(2, 32)
    assert model.lm_head(input=x).equal(plain.lm_head(input=x))


def test_a_file_that_is_not_what_its_config_says(tmp_path):
    plain, model, _ = served()
    pool = pool_of(model)
    peft_model = with_adapter(plain, 0, r=4)
    peft_model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k: t for k, t in tensors.items() if "layers.1." not in k}, path)
    with pytest.raises(ValueError, match=r"targets model\.layers\.1\..*of which it has no tensors"):
        pool.load("half", tmp_path)
    save_file({k: t[:2].clone() if "lora_A" in k else t[:, :2].clone() for k, t in tensors.items()}, path)
    with pytest.raises(ValueError, match=r"its config says r=4 for .*, and lora_A has rank 2"):
        pool.load("short", tmp_path)
    path.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"a \.bin file is a pickle"):
        pool.load("pickle", tmp_path)
    with pytest.raises(ValueError, match="with an adapter 'default', got a LlamaForCausalLM without adapters"):
        pool.load("plain", plain)
    assert not {"half", "short", "pickle", "plain"} & {*pool.names()}


def test_an_embedding_in_the_file_must_be_the_model_s(tmp_path):
    plain, model, _ = served()
    peft_model = with_adapter(plain, 0, target_modules=["embed_tokens"])
    with torch.no_grad():
        peft_model.get_input_embeddings().weight[0] += 1
    peft_model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(ValueError, match="is not the model's"):
        pool_of(model).load("other", tmp_path)


def test_the_scaling_of_a_model_in_memory_is_its_present_one():
    plain, model, _ = served()
    alone = {"half": with_adapter(plain, 0)}
    for module in alone["half"].modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", 0.5)
    pool_of(model).load("half", alone["half"])
    assert_as_alone(plain, model, alone, ["half", None])


def test_layers_that_are_left_alone():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "linear": nn.Linear(8, 8)})
    model["own"] = nn.Linear(8, 8)
    model["own"].forward = lambda x: x
    pool = peft_kernels.attach_pool(model)
    assert list(pool.sites) == ["linear"]
    assert set(pool.left_alone) == {"attention.out_proj", "own"}


def test_unpatch_gives_the_plain_model_back():
    plain, model, _ = served()
    kinds = [type(m) for m in plain.modules()]
    served_logits = logits(model)
    with peft_kernels.unpatch(model):
        assert [type(m) for m in model.modules()] == kinds
        assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in plain.modules()]
        pickle.dumps(model)
    assert logits(model).equal(served_logits)
    peft_kernels.unpatch(model)
    assert [type(m) for m in model.modules()] == kinds
    assert model.state_dict().keys() == plain.state_dict().keys()
    peft_kernels.attach_pool(model)


def test_a_copy_shares_the_pool():
    _, model, _ = served()
    assert logits(copy.deepcopy(model)).equal(logits(model))


@torch.no_grad()
def test_a_call_keeps_the_versions_that_it_began_with():
    plain, model, alone = served()
    before, pool = logits(model), pool_of(model)
    with in_rows(ROWS):
        model(**tokens())
        pool.load("french", with_adapter(plain, 9), replace=True)
        pool.remove("german")
        assert model(**tokens()).logits.equal(before)
    after = logits(model, ["french"])
    alone["french"] = with_adapter(plain, 9)
    assert_as_alone(plain, model, {"french": alone["french"]}, ["french"])
    assert not after.equal(before[2:3]) and pool.pinned == 0
    with pytest.raises(KeyError, match="german"):
        logits(model, ["german"])


def test_threads_with_different_adapters():
    _, model, _ = served()
    rows = [[n] for n in (*ROWS, "german", "greek", None)]
    expected = [logits(model, r) for r in rows]
    wrong = []

    def work(i):
        for _ in range(5):
            if not logits(model, rows[i]).equal(expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and nothing_is_left(model)


def test_an_exception_leaves_nothing_behind():
    _, model, _ = served()
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model)
    hook.remove()
    pool = pool_of(model)
    assert nothing_is_left(model) and pool.pinned == 0
    for name in pool.names():
        pool.remove(name)


def test_a_hook_on_a_projection_runs():
    plain, model, alone = served()
    seen = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))
    assert_as_alone(plain, model, alone)
    assert seen
