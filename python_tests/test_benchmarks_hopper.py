"""The kernels for Hopper as a contender beside the others, on a CPU, whose backend stands in for `cuda`."""

import contextlib
import dataclasses
import os

import pytest
import torch
from benchmark_rows import write

from benchmarks import arms, bottleneck_arms, decoder_arms, gate, hopper, plan, record, roofline, run, runs, shapes
from benchmarks.batched_lora import arms as mixed_arms
from benchmarks.batched_lora import cells as mixed_cells
from peft_kernels import backends, registry, testing

CPU = torch.device("cpu")
F32 = torch.float32
LINEAR = shapes.Cell("lora_linear", F32, 4, 32, 48, 4, shapes.variants(F32), ("op",))


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch):
    """A Hopper GPU, for all that hopper.py knows."""
    if backends.operator_library() is None:
        pytest.skip("the library is not built")
    monkeypatch.delenv(hopper.VARIABLE, raising=False)
    monkeypatch.setattr(hopper, "DEFAULT", "cpu")
    monkeypatch.setattr(hopper, "REFUSED", [])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    there = hopper.there
    monkeypatch.setattr(hopper, "there", lambda device: there(torch.device("cuda")))


def asked():
    return os.environ.get(hopper.VARIABLE)


# -- the environment --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, "", "0"])
@pytest.mark.parametrize("raises", [False, True])
def test_the_environment_is_set_around_a_step_and_put_back(before, raises, monkeypatch):
    if before is not None:
        monkeypatch.setenv(hopper.VARIABLE, before)
    seen = []

    def step(arm):
        seen.append((arm.backend, asked()))
        if raises:
            raise RuntimeError("no launch")
        return 1.0

    for backend in (hopper.BACKEND, "cuda", "peer"):
        with pytest.raises(RuntimeError) if raises else contextlib.nullcontext():
            hopper.stepping(step)(runs.Arm("op", backend, lambda: None))
        assert asked() == before
    assert seen == [(hopper.BACKEND, "1"), ("cuda", before), ("peer", before)]


def test_there_are_none_elsewhere_and_where_the_environment_says_something(monkeypatch):
    ours = [runs.Arm("op", "cpu", lambda: None)]
    assert [arm.backend for arm in hopper.beside(ours, CPU)] == [hopper.BACKEND, "cpu"]
    for value in ("0", "1"):
        monkeypatch.setenv(hopper.VARIABLE, value)
        assert hopper.beside(ours, CPU) == ours
    monkeypatch.setenv(hopper.VARIABLE, "")
    assert len(hopper.beside(ours, CPU)) == 2
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert hopper.beside(ours, CPU) == ours


# -- arms -------------------------------------------------------------------------------------------------------------


def labels(made):
    return [(arm.name, arm.backend) for arm in made]


def test_every_op_with_such_kernels_has_the_arm_before_the_one_it_is_compared_with():
    found = labels(arms.build(LINEAR, CPU, ("op",))[0])
    assert found[2:] == [("op", hopper.BACKEND), ("op", "cpu")] * 2
    found = labels(mixed_arms.build(mixed_cells.cells("quick")[0], CPU, ("op",))[0])
    assert found[2:] == [
        ("op", hopper.BACKEND), ("op", "cpu"), ("op alone", hopper.BACKEND), ("op alone", "cpu")
    ]  # fmt: skip
    one = bottleneck_arms.Cell(F32, 64, 96, 8, 16, 1, "training")
    for cell in (one, dataclasses.replace(one, adapters=4, direction="inference")):
        assert labels(bottleneck_arms.build(cell, CPU, ("op",))[0])[2:] == [("op", hopper.BACKEND), ("op", "cpu")]


def test_whole_layers_have_it_too():
    pytest.importorskip("peft")
    from benchmarks import decoder

    training, decoding = decoder.cells("quick")[:2]
    found = labels(decoder_arms.build(training, CPU, ("peft", "patched"))[0])
    assert found[2:] == [("peft", "peft"), ("patched", hopper.BACKEND), ("patched", "cpu")]
    rows = decoder.time_cell(decoding, ("pool",), decoder.Run(CPU, 2, 0.0, record.provenance(CPU)))
    assert [row.backend for row in rows] == ["torch", "torch", hopper.BACKEND, "cpu"]
    assert f"| pool {hopper.BACKEND} | pool |" in decoder.markdown(rows, "")


# -- what is timed ----------------------------------------------------------------------------------------------------


def time_linear():
    peaks = {F32: roofline.Peak(1e10, 1e10)}
    return run.time_cell(LINEAR, ("op",), run.Run(CPU, plan.Plan(2, 0.0), peaks, record.provenance(CPU)))[0]


def spied(monkeypatch, spoil=lambda y: y):
    """The operator notes what the environment said in each call; where it said 1, its y is spoilt."""
    original, seen = arms._backend, []

    def backend(*given):
        arm = original(*given)

        def call(x):
            seen.append(asked())
            y = arm.call(x)
            y.register_hook(lambda gradient: seen.append(asked()))
            return spoil(y) if asked() == "1" else y

        return dataclasses.replace(arm, call=call)

    monkeypatch.setattr(arms, "_backend", backend)
    return seen


def test_both_run_in_the_same_rounds_each_in_its_environment(monkeypatch, tmp_path):
    seen = spied(monkeypatch)
    rows = time_linear()
    ours = [row for row in rows if row.arm == "op" and row.direction == "forward+backward"]
    assert [(row.backend, row.p, row.rounds) for row in ours] == [
        (backend, p, 2) for p in ("0", "0.1") for backend in (hopper.BACKEND, "cpu")
    ]
    assert len(seen) > 20 and seen.count("1") == seen.count(None), "forward and backward of either alike"
    assert len({row.saved_bytes for row in ours if row.p == "0"}) == 1
    assert len(record.read(write(tmp_path / "a.csv", rows))) == len(rows)


def test_one_that_computes_something_else_is_not_timed(monkeypatch):
    spied(monkeypatch, lambda y: 1.5 * y)
    rows = [row for row in time_linear() if row.arm == "op"]
    wrong = [row for row in rows if row.backend == hopper.BACKEND]
    assert len(wrong) == 2 and all("something else than op" in row.not_timed for row in wrong)
    assert not any(row.not_timed for row in rows if row.backend == "cpu")


def test_one_that_fails_is_not_timed(monkeypatch):
    def fails(y):
        raise RuntimeError("no launch")

    spied(monkeypatch, fails)
    rows = {(row.backend, row.not_timed) for row in time_linear() if row.arm == "op"}
    assert rows == {(hopper.BACKEND, "RuntimeError: no launch"), ("cpu", "")}
    assert asked() is None


def test_a_module_s_arm_that_differs_is_not_timed_and_is_not_what_others_are_judged_by():
    def step():
        return torch.ones(3) * (2 if asked() == "1" else 1)

    def build(cell, device, kinds):
        base = [runs.Arm(name, "torch", lambda: torch.ones(1)) for name in ("base", "base_again")]
        return base + hopper.beside([runs.Arm("op", "cpu", step)], device), {}

    found = runs.timed(build, LINEAR, (), (), runs.Run(CPU, 2, 0.0, {}), ("op",))
    assert [arm.backend for arm in found.times] == ["torch", "torch", "cpu"]
    ((name, backend, reason),) = found.absent
    assert (name, backend) == ("op", hopper.BACKEND) and "100.0%" in reason


# -- the gate ---------------------------------------------------------------------------------------------------------


def test_samples_run_in_both_environments_and_a_wrong_candidate_is_left_out(monkeypatch):
    op, seen = registry.ops()["lora_linear"], []
    monkeypatch.setattr(testing, "assert_matches_oracle", lambda *given: seen.append(asked()))
    ran = gate.check(op, ["cpu"], {(F32, F32)}, CPU)
    assert ran == len(seen) > 10 and seen.count("1") == seen.count(None)

    def wrong(*given):
        assert asked() is None, "it is wrong"

    monkeypatch.setattr(testing, "assert_matches_oracle", wrong)
    assert gate.check(op, ["cpu"], {(F32, F32)}, CPU) == ran / 2
    assert len(hopper.REFUSED) == 1 and "it is wrong" in hopper.REFUSED[0] and asked() is None
    ours = [runs.Arm("op", "cpu", lambda: None)]
    assert hopper.beside(ours, CPU) == ours
