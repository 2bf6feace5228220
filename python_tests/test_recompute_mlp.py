"""patch(model, recompute_mlp=True): against plain PEFT, the bytes that it saves, when it is not used and what then is
counted, and that it comes and goes as the rest of a patch does."""

import copy
import pickle

import pytest
import torch
from models import (
    HIDDEN,
    INNER,
    LAYERS,
    MODELS,
    Mask,
    Operators,
    assert_as_close_as_peft,
    batch,
    calls_per_forward,
    in_double,
    inputs,
    peft_model,
    results,
    two_adapters,
)
from torch import nn
from transformers import Trainer, TrainingArguments

import peft_kernels
from peft_kernels import memory
from peft_kernels.integrations import groups, recomputed

KNOWN = [name for name in MODELS if MODELS[name][3]]


def mlps(model):
    return [module for name, module in model.named_modules() if name.endswith(".mlp")]


def kinds(model):
    return [type(module).__name__ for module in mlps(model)]


def operators(model, **batch):
    with Operators() as counted:
        results(model, **batch)
    return counted.calls


@pytest.mark.parametrize("name", KNOWN)
def test_forward_and_every_gradient_equal_peft(name):
    model = peft_model(name)
    plain, exact = results(model), results(in_double(model))
    report = peft_kernels.patch(model, strict=True, recompute_mlp=True)
    assert_as_close_as_peft(results(model), plain, exact)
    assert report.fused == calls_per_forward(report) and not report.fallbacks
    rows = [row for row in report.rows if row.kind == "mlp"]
    assert len(rows) == LAYERS and all(row.kernel and not row.reason for row in rows)
    counted = operators(model)
    assert counted["lora_mlp"] == counted["lora_mlp_backward"] == LAYERS
    assert counted["lora_linear"] == counted["lora_linear_backward"] == 2 * LAYERS  # of attention


@pytest.mark.parametrize(
    "targets", [["gate_proj", "up_proj"], ["gate_proj", "up_proj", "down_proj", "q_proj"]], ids=str
)
@pytest.mark.parametrize("changes", [{"mlp_bias": True}, {"hidden_act": "gelu"}, {"hidden_act": "relu"}], ids=str)
def test_other_activations_biases_and_a_plain_projection(changes, targets):
    model = peft_model("llama", changes, target_modules=targets, lora_bias=True)
    plain, exact = results(model), results(in_double(model))
    report = peft_kernels.patch(model, strict=True, recompute_mlp=True)
    assert_as_close_as_peft(results(model), plain, exact)
    assert operators(model)["lora_mlp"] == LAYERS and not report.fallbacks


def test_bytes_kept_for_the_backward():
    """One patched model keeps f(g) and a, the other neither: two matrices of the MLP's width for each layer."""
    model = peft_model("llama").bfloat16()
    sizes = {}
    for recompute_mlp in (False, True):
        with peft_kernels.patch(model, strict=True, recompute_mlp=recompute_mlp):
            sizes[recompute_mlp] = memory.saved_bytes(lambda: model(**inputs()).loss, model.parameters())
    tokens = inputs()["input_ids"].numel()
    assert sizes[False] - sizes[True] == LAYERS * 2 * tokens * INNER * 2
    layer = mlps(model)[0]
    with peft_kernels.patch(model, strict=True, recompute_mlp=True):
        x = torch.randn(1, tokens, HIDDEN).bfloat16().requires_grad_()
        kept = memory.saved_bytes(lambda: layer(x), model.parameters())
    assert kept == tokens * (2 * (HIDDEN + 2 * INNER) + 4 * 3 * 4)  # x, g and u in bf16; three h of rank 4 in fp32


def test_dropout_is_the_mask_replayed():
    model = peft_model("llama", {"num_hidden_layers": 1}, lora_dropout=0.25).train()
    twin = copy.deepcopy(model)
    torch.manual_seed(9)
    layer = twin.base_model.model.model.layers[0]
    for group in (("q_proj", "k_proj", "v_proj"), ("o_proj",)):
        seed = peft_kernels.new_seed()
        for stream, name in enumerate(group):
            getattr(layer.self_attn, name).lora_dropout["default"] = Mask(seed, 0.25, stream)
    seed = peft_kernels.new_seed()
    for name, key, stream in (("gate_proj", seed, 0), ("up_proj", seed, 1), ("down_proj", ~seed, 0)):
        getattr(layer.mlp, name).lora_dropout["default"] = Mask(key, 0.25, stream)
    plain, exact = results(twin), results(in_double(twin))
    report = peft_kernels.patch(model, strict=True, recompute_mlp=True)
    torch.manual_seed(9)
    assert_as_close_as_peft(results(model), plain, exact)
    assert not report.fallbacks


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_with_dropout(use_reentrant):
    model = peft_model("llama", lora_dropout=0.3)
    model.enable_input_require_grads()
    model.train()
    report = peft_kernels.patch(model, strict=True, recompute_mlp=True)
    torch.manual_seed(5)
    expected = results(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(5)
    found = results(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not report.fallbacks


def test_autocast():
    model = peft_model("llama")
    exact = results(in_double(model))
    found = []
    for patched in (True, False):
        if patched:
            report = peft_kernels.patch(model, strict=True, recompute_mlp=True)
        with torch.autocast("cpu", torch.bfloat16):
            found.append({n: t.bfloat16() for n, t in results(model).items()})  # bf16 is what rounded them
        if patched:
            assert not report.fallbacks and report.fused == calls_per_forward(report)
            peft_kernels.unpatch(model)
    assert_as_close_as_peft(*found, exact)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compile_of_a_patched_model_is_one_graph(dropout):
    torch._dynamo.reset()
    model = peft_model("llama", {"num_hidden_layers": 1}, lora_dropout=dropout).train()
    expected = results(model) if dropout == 0 else None
    exact = results(in_double(model)) if dropout == 0 else None
    peft_kernels.patch(model, strict=True, recompute_mlp=True)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    found = results(torch.compile(model, backend=backend, fullgraph=True))
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert len(graphs) == 1 and called.count("peft_kernels.lora_mlp.default") == 1
    assert called.count("peft_kernels.lora_linear.default") == 2
    if dropout == 0:
        assert_as_close_as_peft({n.removeprefix("_orig_mod."): t for n, t in found.items()}, expected, exact)


# -- when it is not used ----------------------------------------------------------------------------------------------


def test_without_gradients_the_path_is_the_grouped_one():
    model = peft_model("llama").eval()
    report = peft_kernels.patch(model, strict=True, recompute_mlp=True).verify(**inputs())
    with torch.no_grad(), Operators() as counted:
        model(**inputs())
    assert not counted.calls["lora_mlp"] and counted.calls["lora_linear"] == calls_per_forward(report)
    assert not report.fallbacks


def _hook(module):
    module.register_forward_hook(lambda *_: None)


def _act(model):
    for mlp in mlps(model):
        mlp.act_fn = nn.Tanh()


def _hooks(path):
    return lambda model: [_hook(mlp.get_submodule(path)) for mlp in mlps(model)]


STATES = {
    "hook": (_hooks("down_proj"), "down_proj: hook"),
    "hook-inside": (_hooks("down_proj.lora_A.default"), "down_proj: hook on lora_A, lora_B or lora_dropout"),
    "hook-base": (_hooks("down_proj.base_layer"), "down_proj: hook on base_layer"),
    "hook-act": (_hooks("act_fn"), "act_fn: hook"),
    "act": (_act, "act_fn is a Tanh"),
    "gate-hook": (_hooks("gate_proj"), "gate_proj: hook"),
}


@pytest.mark.parametrize("id", STATES)
def test_a_state_that_is_not_one_call_takes_the_grouped_path_and_is_counted(id):
    change, reason = STATES[id]
    model = peft_model("llama")
    report = peft_kernels.patch(model, strict=True, recompute_mlp=True)
    change(model)
    plain = peft_model("llama")
    change(plain)
    assert_as_close_as_peft(results(model), results(plain), results(in_double(plain)))
    assert report.fallbacks[f"not recomputed: {reason}"] == LAYERS
    assert operators(model)["lora_mlp"] == 0
    assert any(reason == row.reason for row in peft_kernels.patch(model).rows if row.kind == "mlp")


def test_a_variant_takes_the_grouped_path():
    model = peft_model("llama", use_dora=True)
    plain, exact = results(model), results(in_double(model))
    peft_kernels.patch(model, recompute_mlp=True)
    assert_as_close_as_peft(results(model), plain, exact)
    assert operators(model)["lora_mlp"] == 0


def test_rows_with_adapters_of_their_own_take_the_grouped_path():
    model = two_adapters().eval()
    plain, exact = (results(m, **batch()) for m in (model, in_double(model)))
    report = peft_kernels.patch(model, strict=True, recompute_mlp=True)
    assert_as_close_as_peft(results(model, **batch()), plain, exact)
    assert report.fallbacks == {"not recomputed: rows with adapters of their own": LAYERS}


def test_switches_are_read_at_every_call():
    model = two_adapters()
    report = peft_kernels.patch(model, strict=True, recompute_mlp=True)

    def disabled():
        model.base_model.disable_adapter_layers()

    def merged():
        model.base_model.enable_adapter_layers()
        model.merge_adapter()

    states = {
        "both": (lambda: model.base_model.set_adapter(["default", "other"]), LAYERS),
        "other": (lambda: model.set_adapter("other"), LAYERS),
        "disabled": (disabled, 0),
        "merged": (merged, 0),
        "unmerged": (model.unmerge_adapter, LAYERS),
    }
    model.enable_input_require_grads()  # so that there is a gradient where no adapter is active
    for state, (change, wanted) in states.items():
        change()
        assert operators(model)["lora_mlp"] == wanted, state
        found, exact = results(model), results(in_double(model))
        with peft_kernels.unpatch(model):
            plain = results(model)
        assert_as_close_as_peft(found, plain, exact)
    assert not any(reason.startswith("not recomputed") for reason in report.fallbacks)


# -- how it comes and goes --------------------------------------------------------------------------------------------


def test_it_comes_over_a_patch_and_goes_with_unpatch():
    model = peft_model("llama")
    plain, kept = kinds(model), {name: t.clone() for name, t in model.state_dict().items()}
    peft_kernels.patch(model, strict=True)
    grouped = kinds(model)
    over = peft_kernels.patch(model, strict=True, recompute_mlp=True)
    assert kinds(model) == ["RecomputedLlamaMLP"] * LAYERS != grouped
    assert [row.kind for row in peft_kernels.patch(model).rows] == [row.kind for row in over.rows]  # nothing changed
    assert kinds(model) == ["RecomputedLlamaMLP"] * LAYERS
    with peft_kernels.unpatch(model):
        assert kinds(model) == plain
    over.restore()
    assert kinds(model) == grouped
    peft_kernels.unpatch(model)
    assert kinds(model) == plain
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())


def test_copies_and_pickles_stay_patched():
    model = peft_model("llama")
    peft_kernels.patch(model, strict=True, recompute_mlp=True)
    expected = results(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kinds(twin) == kinds(model)
        found = results(twin)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert operators(twin)["lora_mlp"] == LAYERS


def test_every_class_is_found_by_its_name():
    for group in groups.GROUPS.values():
        if group.kind == "gate_up":
            kind = recomputed.recomputed_class(group)
            assert getattr(recomputed, kind.__name__) is kind and issubclass(kind, groups.fused_class(group))
    with pytest.raises(AttributeError, match="RecomputedLlamaAttention"):
        recomputed.RecomputedLlamaAttention  # noqa: B018


def test_trainer_callback(tmp_path):
    model = peft_model("llama")
    before = kinds(model)
    data = [{key: value[0] for key, value in inputs(rows=1).items()}] * 4
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    callback = peft_kernels.PeftKernelsCallback(strict=True, recompute_mlp=True)
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    assert callback.report.fused == 2 * calls_per_forward(callback.report) and not callback.report.fallbacks
    assert {row.kind for row in callback.report.rows} == {"lora.Linear", "qkv", "mlp"} and kinds(model) == before
