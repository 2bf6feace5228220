"""patch, unpatch and the report: what changes, what does not, what is left alone and why; always with a count."""

import copy
import pickle
import sys
import threading

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from models import (
    HEADS,
    HIDDEN,
    LAYERS,
    assert_as_close_as_peft,
    base_model,
    calls_per_forward,
    in_double,
    inputs,
    lora_config,
    peft_model,
    randomise,
    results,
)
from peft import get_peft_model
from peft.tuners import lora
from torch import nn
from transformers import Trainer, TrainingArguments

import peft_kernels
from peft_kernels.integrations.gathering import WITHOUT_KERNEL
from peft_kernels.integrations.peft import FusedLinear
from peft_kernels.integrations.targets import FAMILIES, GROUPS, MLP_FORWARD, fingerprint, forward_is_known


def kinds(model):
    return {name: type(module) for name, module in model.named_modules()}


def attributes(model):
    return {name: set(module.__dict__) for name, module in model.named_modules()}


def test_unpatch_restores_classes_and_bits():
    model = peft_model("llama").eval()
    before, classes, state = model(**inputs()).logits, kinds(model), attributes(model)
    report = peft_kernels.patch(model)
    assert attributes(model) == state  # nothing is stashed on a module
    assert kinds(model) != classes
    model(**inputs())
    peft_kernels.unpatch(model)
    assert kinds(model) == classes and attributes(model) == state
    assert torch.equal(model(**inputs()).logits, before)
    assert report.fused == calls_per_forward(report)


def test_both_are_context_managers():
    model = peft_model("llama")
    classes = kinds(model)
    with peft_kernels.patch(model) as report:
        patched = kinds(model)
        report.verify(**inputs())
        with peft_kernels.unpatch(model):
            assert kinds(model) == classes
        assert kinds(model) == patched
        with peft_kernels.patch(model):  # changes nothing, so it takes nothing back
            pass
        assert kinds(model) == patched
    assert kinds(model) == classes
    assert report.fused == calls_per_forward(report)


def test_patching_twice_changes_nothing_and_picks_up_new_modules():
    model = peft_model("llama", target_modules=["q_proj"])
    first = peft_kernels.patch(model, strict=True)
    assert calls_per_forward(first) == LAYERS
    assert [row.name for row in peft_kernels.patch(model).rows] == [row.name for row in first.rows]
    model.add_adapter("more", lora_config(target_modules=["k_proj", "v_proj", "up_proj"]))
    randomise(model).set_adapter("more")
    with pytest.raises(RuntimeError, match=r"k_proj: came after patch"):
        first.verify(**inputs())
    assert "up_proj: came after patch" in str(first)
    plain, exact = None, results(in_double(model))
    with peft_kernels.unpatch(model):
        plain = results(model)
    second = peft_kernels.patch(model, strict=True)
    assert_as_close_as_peft(results(model), plain, exact)
    assert {row.kind for row in second.rows} == {"lora.Linear", "qkv"}
    assert calls_per_forward(second) == 2 * LAYERS and second.verify(**inputs())


def test_a_report_counts_from_its_own_patch():
    model = peft_model("llama")
    first = peft_kernels.patch(model, strict=True)
    with model.disable_adapter():
        model(**inputs())
    model(**inputs())
    second = peft_kernels.patch(model)
    assert first.fused and first.fallbacks and second.fused == 0 and not second.fallbacks
    model(**inputs())
    assert second.fused == calls_per_forward(second) and first.fused == 2 * second.fused and not second.fallbacks


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match=r"no PEFT layer.*get_peft_model"):
        peft_kernels.patch(base_model("llama"))


def test_a_model_that_serves_a_pool_is_refused_in_words():
    model = base_model("llama")
    peft_kernels.attach_pool(model, adapters=2)
    with pytest.raises(ValueError, match=r"patch: the model serves a pool, .*unpatch\(model\)"):
        peft_kernels.patch(model)


@pytest.mark.parametrize("function", ["patch", "unpatch", "attach_pool", "set_active", "attach", "load", "detach"])
def test_what_is_no_module_is_refused_in_words(function):
    more = {"set_active": ["a"], "attach": [peft_kernels.BottleneckConfig()], "load": ["folder"]}
    with pytest.raises(TypeError, match=f"^{function}: model must be a torch.nn.Module, got str"):
        getattr(peft_kernels, function)("llama", *more.get(function, []))


def test_reasons_strict_and_the_table():
    model = base_model("llama")
    model.model.embed_tokens.scale_grad_by_freq = True
    model = get_peft_model(model, lora_config(target_modules=["embed_tokens", "q_proj", "k_proj"], use_dora=False))
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].register_forward_hook(lambda *a: None)
    classes = kinds(model)
    with pytest.raises(RuntimeError, match=r"nothing was changed(.|\n)*embed_tokens(.|\n)*hook on lora_A"):
        peft_kernels.patch(model, strict=True)
    assert kinds(model) == classes
    report = peft_kernels.patch(model)
    reasons = {row.name.removeprefix("base_model.model.model."): row.reason for row in report.rows if row.reason}
    assert reasons == {
        "embed_tokens": "scale_grad_by_freq gradients, as the base layer says",
        "layers.0.self_attn": "q_proj: hook on lora_A, lora_B or lora_dropout",
        "layers.0.self_attn.q_proj": "hook on lora_A, lora_B or lora_dropout",
    }
    model(**inputs())
    assert report.fused == 2  # k_proj of the first layer, the group of the second
    assert "left alone: scale_grad_by_freq gradients, as the base layer says" in [line[2] for line in report.table()]
    assert "left alone" in str(report)
    assert "1 left alone, 2 fused calls so far" in repr(report)


def test_strict_asks_for_layers_and_not_for_groups():
    model = peft_model("llama", target_modules=["q_proj", "k_proj"])
    model.base_model.model.model.layers[0].self_attn.v_proj.__class__ = Projection
    report = peft_kernels.patch(model, strict=True)
    assert [row.reason for row in report.left] == ["v_proj: the base layer is a Projection"]
    model(**inputs())
    assert report.fused == 3 and not report.fallbacks  # q and k of the first layer, the group of the second


class Projection(nn.Linear):
    """A layer that may compute something else."""


def test_a_hook_on_a_projection_still_runs():
    model = peft_model("llama")
    report = peft_kernels.patch(model, strict=True)
    seen = []
    hook = model.base_model.model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *a: seen.append(1))
    model(**inputs())
    assert seen == [1] and report.fallbacks == {"k_proj: hook": 1}
    assert report.fused == calls_per_forward(report) + 2  # three projections instead of one group
    with pytest.raises(RuntimeError, match=r"layers.0.self_attn: k_proj: hook"):
        report.verify(**inputs())
    hook.remove()
    report.verify(**inputs())


def test_verify_names_what_was_not_reached():
    model = peft_model("llama")
    report = peft_kernels.patch(model)
    model.base_model.model.model.layers[0].mlp.forward = lambda x: x
    with pytest.raises(RuntimeError, match=r"layers.0.mlp.down_proj: not reached by this forward"):
        report.verify(**inputs())
    assert report.fused == calls_per_forward(report) - 2


def test_verify_knows_that_the_model_was_unpatched():
    model = peft_model("llama")
    with peft_kernels.patch(model) as report:
        report.verify(**inputs())
    with pytest.raises(RuntimeError, match="no longer patched") as error:
        report.verify(**inputs())
    assert "not reached" not in str(error.value)
    peft_kernels.patch(model)
    report.verify(**inputs())


def test_a_group_of_merged_projections_is_said_to_be_merged():
    model = peft_model("llama")
    report = peft_kernels.patch(model)
    model.merge_adapter()
    model(**inputs())
    model.unmerge_adapter()
    assert {why for calls in report.calls().values() for why in calls.fallbacks} == {"merged: the base layer alone"}
    with model.disable_adapter():
        model(**inputs())
    disabled = {why for name, calls in report.calls().items() if "self_attn" in name for why in calls.fallbacks}
    assert disabled == {"merged: the base layer alone", "adapters disabled: the base layer alone"}


def test_copies_and_pickles_stay_patched():
    model = peft_model("llama").eval()
    report = peft_kernels.patch(model, strict=True)
    with torch.no_grad():
        expected = model(**inputs()).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(kinds(twin).values()) == list(kinds(model).values())
        again = peft_kernels.patch(twin)
        with torch.no_grad():
            assert torch.equal(twin(**inputs()).logits, expected)
        assert again.fused == calls_per_forward(again) == report.fused
        peft_kernels.unpatch(twin)
        assert not any(isinstance(module, FusedLinear) for module in twin.modules())


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("hooks_first", [True, False])
def test_accelerate_hooks(hooks_first, everywhere):
    model = peft_model("llama")
    classes = kinds(model)
    plain, exact = results(model), results(in_double(model))

    def attach():
        for module in model.modules():
            if everywhere or isinstance(module, lora.Linear) or type(module).__name__.endswith("Attention"):
                add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))

    if hooks_first:
        attach()
    report = peft_kernels.patch(model, strict=True)
    if not hooks_first:
        attach()
    assert_as_close_as_peft(results(model), plain, exact)
    assert report.fused == calls_per_forward(report) and not report.fallbacks
    if not hooks_first:
        remove_hook_from_module(model, recurse=True)
    report.verify(**inputs())
    peft_kernels.unpatch(model)
    assert kinds(model) == classes
    fused = report.fused
    assert {name: t.tolist() for name, t in results(model).items()} == {name: t.tolist() for name, t in plain.items()}
    assert report.fused == fused


def test_offloading_hooks_are_respected():
    model = peft_model("llama")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    add_hook_to_module(layer.lora_A["default"], AlignDevicesHook(execution_device="cpu", offload=True))
    report = peft_kernels.patch(model)
    assert "hook" in next(row.reason for row in report.rows if row.name.endswith("layers.0.self_attn.q_proj"))
    model(**inputs())
    assert report.fused == calls_per_forward(report) + 1  # k and v of the first layer instead of its group


def test_weights_that_are_not_loaded_are_left_alone():
    nowhere = peft_model("llama").to("meta")
    report = peft_kernels.patch(nowhere)
    assert not any(isinstance(module, FusedLinear) for module in nowhere.modules())
    assert all(row.reason.endswith("on meta: offloaded, or not loaded yet") for row in report.rows)
    model = peft_model("llama")
    cpu_offload(model, execution_device="cpu")
    assert all("meta" in row.reason for row in peft_kernels.patch(model).rows)


def test_where_only_the_definition_would_serve_peft_is_faster(monkeypatch):
    patched = peft_model("llama")
    with peft_kernels.patch(patched, strict=True) as report:
        monkeypatch.setitem(WITHOUT_KERNEL["lora_linear"], "cpu", "nothing here")
        patched(**inputs())
        assert report.fused == 0 and all("nothing here" in reason for reason in report.fallbacks)
    with pytest.raises(RuntimeError, match="nothing here"):
        peft_kernels.patch(patched, strict=True)


def test_two_threads_with_a_model_each():
    models = [peft_model("llama", r=r).eval() for r in (2, 5)]
    reports = [peft_kernels.patch(model, strict=True) for model in models]
    with torch.no_grad():
        expected = [model(**inputs()).logits for model in models]
    wrong = []

    def work(i):
        with torch.no_grad():
            for _ in range(10):
                if not torch.equal(models[i](**inputs()).logits, expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert [report.fused for report in reports] == [11 * calls_per_forward(report) for report in reports]


@pytest.mark.parametrize("unpatch_at_end", [True, False])
@pytest.mark.parametrize("patched_before", [True, False])
def test_trainer_callback(tmp_path, patched_before, unpatch_at_end):
    model = peft_model("llama", target_modules=["q_proj", "v_proj", "down_proj"])
    if patched_before:
        peft_kernels.patch(model, strict=True)
    before = kinds(model)
    data = [{key: value[0] for key, value in inputs(rows=1).items()}] * 6
    arguments = TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    callback = peft_kernels.PeftKernelsCallback(strict=True, unpatch_at_end=unpatch_at_end)
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    assert callback.report.fused == 3 * calls_per_forward(callback.report) and not callback.report.fallbacks
    assert (kinds(model) == before) is (patched_before or unpatch_at_end)


def test_families_say_what_their_classes_have():
    for family in FAMILIES:
        model = base_model(family.name)
        attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
        assert (type(attention).__name__, type(mlp).__name__) == (family.attention, family.mlp)
        assert (type(attention).__module__, type(mlp).__module__) == (family.module, family.module)
        assert all(forward_is_known(GROUPS[family.module, type(m).__name__], type(m)) for m in (attention, mlp))
        assert all(hasattr(attention, norm) for norm in family.norms)
        assert hasattr(attention, "q_norm") == bool(family.norms)
    report = peft_kernels.patch(peft_model("llama"))
    assert report.fused == 0 and HIDDEN % HEADS == 0


def test_a_forward_is_known_by_what_it_does(monkeypatch):
    def formatted(self, x: torch.Tensor) -> torch.Tensor:
        down_proj = self.down_proj(
            self.act_fn(self.gate_proj(x))  # as in LlamaMLP
            * self.up_proj(x)
        )
        return down_proj

    def with_a_step(self, x):
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 2)
        return down_proj

    model = peft_model("llama")
    mlp = type(model.base_model.model.model.layers[0].mlp)
    monkeypatch.setattr(mlp, "forward", with_a_step)
    plain, exact = results(model), results(in_double(model))
    report = peft_kernels.patch(model, strict=True)
    reason = "LlamaMLP.forward is not the one that is known: another version of transformers, or replaced"
    assert {(row.kind, row.reason) for row in report.left} == {("gate_up", reason)}
    assert_as_close_as_peft(results(model), plain, exact)
    assert report.fused == 5 * LAYERS and not report.fallbacks  # qkv, o, gate, up, down
    assert fingerprint(formatted) == MLP_FORWARD


def test_the_table_without_rich(monkeypatch):
    report = peft_kernels.patch(peft_model("llama"))
    monkeypatch.setitem(sys.modules, "rich", None)
    lines = str(report).splitlines()
    assert lines[1].split() == ["module", "kind", "kernel", "fused", "calls", "fallbacks"]
    assert f"layers.*.self_attn (x{LAYERS})" in lines[2] and report.fused == 0
