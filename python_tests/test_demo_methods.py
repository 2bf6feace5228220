"""The demo's methods side by side: their budgets, what they train, what is counted, and that wrong things are found."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import peft_kernels

pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from peft_kernels.demo import corpus, methods, plots, prefixes, report, task

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def size():
    training = dict(base_steps=20, method_steps=8, method_batch=4, batch=4, window=32, held_out_windows=8)
    return task.Size(**training, hidden=32, intermediate=48, layers=1, heads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def base(size, folder):
    base = task.train_base(corpus.english(), size, 0, CPU, lambda loss: None)
    base.save_pretrained(folder / "base")
    base.config._name_or_path = str(folder / "base")
    return base


@pytest.fixture(scope="module")
def text():
    return corpus.choose(1)[0][0]


def compare(text, base, size, folder, ticks=None):
    fitted = methods.fitted(base, 2)
    return methods.compare(fitted, text, base, size, 0, folder, (ticks if ticks is not None else []).append)


def test_every_method_gets_the_budget_of_the_first_as_nearly_as_whole_widths_allow():
    with torch.device("meta"):
        base = LlamaForCausalLM(task.SIZES["full"].config())
    found = methods.fitted(base, 16)
    assert found.keys() == methods.METHODS.keys()
    budget = methods.trainable(found["LoRA"].attach(base))
    assert budget == 4 * 16 * (4 * 512 + 3 * 960)
    for name, method in found.items():
        counts = [
            methods.trainable(methods.METHODS[name](width).attach(base))
            for width in (method.width - 1, method.width, method.width + 1)
        ]
        assert abs(counts[1] - budget) == min(abs(count - budget) for count in counts), name
    assert found["serial, FFN (Pfeiffer)"].width == found["parallel, attention"].width == 153


def test_all_methods_start_at_the_base_and_learn_on_the_same_batches(size, base, text, folder):
    weights, ticks = copy.deepcopy(base.state_dict()), []
    found = compare(text, base, size, folder, ticks)
    assert [t.method for t in found] == list(methods.METHODS)
    assert len(ticks) == len(found) * size.method_steps
    for t in found:
        assert t.problems == []
        assert t.bits_after < t.bits_before
        assert t.losses[0] == pytest.approx(found[0].losses[0]), "B = 0: the first loss is the base's"
        assert len(t.losses) == len(t.step_times_ms) == t.steps == size.method_steps
        assert {file.name for file in (folder / t.adapter).iterdir()} >= {"adapter_config.json"}
    assert len({t.losses[-1] for t in found}) == len(found), "no two methods are the same one"
    assert len({t.adapter for t in found}) == len(found)
    assert found[0].ratio == 1
    assert all(torch.equal(weights[key], value) for key, value in base.state_dict().items())
    configs = {t.method: json.loads((folder / t.adapter / "adapter_config.json").read_text()) for t in found}
    assert set(configs["LoRA, FFN"]["target_modules"]) == set(methods.FFN)
    serial, parallel = configs["serial, FFN (Pfeiffer)"], configs["parallel, FFN"]
    assert {key for key in serial if serial[key] != parallel[key]} == {"insertion", "reads"}
    scaled = configs["parallel, FFN, s = 4"]
    assert {key for key in scaled if scaled[key] != parallel[key]} == {"scaling"}
    assert scaled["scaling"] == 4


def _learns_nothing(monkeypatch):
    monkeypatch.setattr(methods.Arm, "step", lambda self, batch: self.losses.append(0.0) or self.seconds.append(1.0))


def _saves_something_else(monkeypatch):
    save = peft_kernels.save_pretrained

    def changed(model, folder):
        other = copy.deepcopy(model)
        with torch.no_grad():
            next(p for p in other.parameters() if p.requires_grad).add_(1)
        save(other, folder)

    monkeypatch.setattr(peft_kernels, "save_pretrained", changed)


def _loads_another_form(monkeypatch):
    load = peft_kernels.load

    def changed(model, folder, **kwargs):
        load(model, folder, **kwargs)
        for module in model.modules():
            if isinstance(module, peft_kernels.modules.BottleneckAdapter):
                module.scaling *= 2

    monkeypatch.setattr(peft_kernels, "load", changed)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_learns_nothing, "did not improve"),
        (_saves_something_else, "not the one that was saved"),
        (_loads_another_form, "its logits are others"),
    ],
)
def test_what_is_wrong_with_a_method_is_found(size, base, text, folder, monkeypatch, spoil, said):
    names = ("LoRA", "parallel, FFN")
    monkeypatch.setattr(methods, "METHODS", {name: methods.METHODS[name] for name in names})
    spoil(monkeypatch)
    found = compare(text, base, size, folder)[1]
    assert len(found.problems) == 1
    assert said in found.problems[0]


@pytest.mark.parametrize(
    ("bits", "problems"),
    [
        ([5.0, 4.0, 5.5, 6.0], []),
        ([5.0, 4.0, 6.0, 6.0], ["it did not improve on the held-out text: 6.000 to 6.000 bits"]),
        ([5.0, 4.0, 4.9, 4.5], ["it did not improve on the held-out text: 4.500 to 4.900 bits"]),
    ],
    ids=["above the base model", "where it began", "worse than it began"],
)
def test_a_prefix_is_judged_by_where_it_began(size, base, text, folder, monkeypatch, bits, problems):
    """bits: of the base model, of LoRA, of the prefix, and of the prefix as it began."""
    bits = iter(bits)
    monkeypatch.setattr(prefixes, "INITS", {"text": prefixes.INITS["text"]})
    monkeypatch.setattr(methods.task, "held_out_bits", lambda *_: next(bits))
    assert prefixes.compare(4, text, base, size, 0, folder, [].append)[1].problems == problems


def _trained(budget: int, bits: dict[str, dict[str, float]]) -> list[methods.Trained]:
    return [
        methods.Trained(domain, name, budget, budget, 1, 3e-3, 3, 5.0, value, 1.0, 1.0)
        for domain, by_method in bits.items()
        for name, value in by_method.items()
    ]


def test_the_papers_findings_are_counted_not_asserted(tmp_path):
    good = dict.fromkeys(methods.METHODS, 4.0) | {"parallel, FFN": 3.5, "parallel, FFN, s = 4": 3.25}
    bad = dict.fromkeys(methods.METHODS, 4.0) | {"parallel, FFN": 4.5, "LoRA, FFN": 3.0}
    trained = _trained(100, {"a": good, "b": bad})
    gains = {claim.words: claim.gains for claim in methods.claims(trained)}
    assert gains["parallel beats serial"] == [0.5, -0.5]
    assert gains["the FFN beats attention with LoRA"] == [0.0, 1.0]
    assert gains["s = 4 beats s = 1"] == [0.25, 0.5]
    said = report.methods_conclusion(trained)
    assert "parallel beats serial: 1 of 2 (+0.000 bits" in said
    assert "with LoRA: 1 of 2 (+0.500 bits" in said
    assert "s = 4 beats s = 1: 2 of 2" in said
    assert "none of it is significant" in said
    several = trained + [dataclasses.replace(t, budget=200, parameters=200) for t in trained]
    assert len(methods.claims(several)[0].gains) == 4
    assert [len(table.rows) for table in report.side_by_side(several)] == [1 + len(methods.METHODS)] * 2
    plots.methods(tmp_path / "methods.png", several, "a device")
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")


def test_prefixes_start_where_they_say_and_learn(size, base, text, folder, tmp_path):
    size, ticks = dataclasses.replace(size, method_steps=16), []
    found = prefixes.compare(4, text, base, size, 0, folder, ticks.append)
    assert [t.method for t in found] == ["LoRA", *(prefixes.BEGINS + name for name in prefixes.INITS)]
    assert len(ticks) == len(found) * size.method_steps
    by_name = {t.method.removeprefix(prefixes.BEGINS): t for t in found}
    assert by_name["zero"].losses[0] == pytest.approx(by_name["LoRA"].losses[0]), "the first loss is the base's"
    assert by_name["random"].losses[0] != pytest.approx(by_name["LoRA"].losses[0])
    for t in found:
        assert t.problems == []
        assert t.bits_after < t.bits_before
    assert by_name["random"].parameters == 4 * 2 * size.hidden * size.layers
    assert by_name["zero"].parameters == by_name["random"].parameters + size.heads * size.layers
    saved = json.loads((folder / by_name["MLP"].adapter / "adapter_config.json").read_text())
    assert saved["prefix_projection"] is False, "what the MLP gives is saved, and not the MLP"
    longer = [dataclasses.replace(t, width=8) for t in found[1:]]
    several = [*found, *longer, *(dataclasses.replace(t, domain="b") for t in found)]
    first, second = report.by_length(several)
    assert [len(table.rows) for table in (first, second)] == [1 + len(found)] * 2
    assert [len(table.columns) for table in (first, second)] == [7, 6], "the longer one is on one domain"
    assert f"random {by_name['random'].bits_after - by_name['LoRA'].bits_after:+.3f}" in report.prefixes_conclusion(
        found
    )
    plots.prefixes(tmp_path / "prefixes.png", several, "a device")
    assert (tmp_path / "prefixes.png").read_bytes().startswith(b"\x89PNG")
