"""Prefixes trained by others' means, transformers' Trainer and Inductor; and beside a pool and a runner."""

import pytest
import torch
from models import base_model, in_rows, inputs, served
from peft import PrefixTuningConfig as PeftsConfig
from peft import TaskType, get_peft_model
from prefixes import LENGTHS, prefixed, with_values
from transformers import Trainer, TrainingArguments

import peft_kernels
from peft_kernels import PrefixTuningConfig

PROJECTED = PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=6)


def test_trainer_trains_a_prefix_that_is_saved_and_loaded(tmp_path):
    model = base_model("llama")
    peft_kernels.attach(model, PROJECTED, "task")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    rows = [{key: tensor[0] for key, tensor in inputs().items()}] * 4
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        learning_rate=0.05, gradient_checkpointing=True, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    seen = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(seen) == 4 and seen[-1] < seen[0]
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {key for key in before if ".prefixes.task." in key}
    peft_kernels.save_pretrained(model, tmp_path / "saved", "task")
    again = base_model("llama")
    peft_kernels.load(again, tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs()).logits, model.eval()(**inputs()).logits)


def test_an_attention_and_its_gradients_through_inductor():
    model = prefixed("llama")
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(5), requires_grad=True)
    angles = model.model.rotary_emb(hidden, torch.arange(7)[None])
    wanted = [hidden, attention.prefixes["default"].weight]
    results = []
    for call in (attention, torch.compile(attention, fullgraph=True)):
        out, _ = call(hidden_states=hidden, position_embeddings=angles, attention_mask=None)
        results.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


def test_a_pool_refuses_prefixes_in_words(tmp_path):
    _, model, _ = served()
    peft_kernels.save_pretrained(prefixed(), tmp_path / "ours")
    theirs = get_peft_model(base_model("llama"), PeftsConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2))
    theirs.save_pretrained(tmp_path / "pefts")
    pool = peft_kernels.integrations.pooled.pool_of(model)
    for folder in ("ours", "pefts"):
        with pytest.raises(ValueError, match=r"adapter 'task': a pool holds no prefixes; peft_kernels\.load\(model, "):
            pool.load("task", tmp_path / folder)


@torch.no_grad()
def test_a_runner_has_the_active_prefix_and_gives_rows_none():
    _, model, _ = served()
    for name, P in (LENGTHS | {"french": 3}).items():
        peft_kernels.attach(model, PrefixTuningConfig(num_virtual_tokens=P), name)
    with_values(model)
    peft_kernels.set_active(model, "short")
    runner, ids = peft_kernels.Runner(model), inputs()["input_ids"]
    found = runner(ids, adapters=["german", None]).logits
    with in_rows(["german", None]):
        assert torch.equal(model(ids).logits, found)
    for name in ("long", "french"):
        with pytest.raises(ValueError, match=f"Runner: '{name}' is a prefix, and a runner gives rows the adapters of"):
            runner(ids, adapters=[name, None])


def test_what_is_on_meta_is_refused():
    with pytest.raises(ValueError, match=r"the parameters of model.layers.0.self_attn are on meta; move them"):
        peft_kernels.attach(base_model("llama").to("meta"), PROJECTED)
