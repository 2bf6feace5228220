"""What holds of every benchmark that is a module of its own: grids, the command, CSV, table. Nothing asserts a time."""

import dataclasses

import pytest
import torch
import typer
from benchmark_rows import MADE_UP, write
from typer.testing import CliRunner

from benchmarks import (
    bottleneck,
    gate,
    lora_variants,
    prefix_attention,
    prefix_models,
    record,
    report,
    run,
    runs,
    shapes,
    train_many,
)

pytest.importorskip("peft")

MODULES = {module.NAME: module for module in (bottleneck, prefix_attention, prefix_models, train_many, lora_variants)}
# One arm, and the ops whose samples are the gate.
QUICK = {
    "bottleneck_adapter": ("eager", ["bottleneck_adapter", "batched_lora_"]),
    "prefix_attention": ("cat", ["prefix_attention"]),
    "prefix_models": ("peft", ["prefix_attention"]),
    "lora_variants": ("peft", list(lora_variants.CALLED)),
    "train_many": ("together", ["lora_linear", "batched_lora"]),
}
of_every_module = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)


def command(*options):
    app = typer.Typer()
    app.command()(run.main)
    return CliRunner().invoke(app, options)


@of_every_module
def test_grids(module):
    for grid in shapes.GRIDS:
        found = module.cells(grid)
        assert len(found) == len(set(found)) > 1
        assert grid in module.LEAST_ROUNDS and grid in module.SECONDS


@of_every_module
def test_the_command_times_the_quick_grid(module, tmp_path, monkeypatch):
    checked, (arm, ops) = [], QUICK[module.NAME]
    monkeypatch.setattr(gate, "check", lambda op, *others: checked.append(op.name) or 20)
    out = tmp_path / "out.csv"
    result = command("--op", module.NAME, "--arms", arm, "--rounds", "1", "--seconds", "0", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert checked == ops
    rows = record.read(out, module.Row)
    base = [row.arm for row in rows[:2]]
    assert base[1] == f"{base[0]}_again" and {row.arm for row in rows} == {*base, arm}
    cells = module.cells("quick")
    assert len(rows) == 3 * len(cells) and {row.rounds for row in rows} == {1}
    shared = [f.name for f in dataclasses.fields(cells[0]) if f.name != "dtype"]
    assert [[getattr(row, n) for n in shared] for row in rows[::3]] == [[getattr(c, n) for n in shared] for c in cells]
    assert command("--op", module.NAME, "--arms", "merge").exit_code == 2


@of_every_module
def test_csv_and_table(module, tmp_path):
    rows = MADE_UP[module.NAME]()
    assert record.read(write(tmp_path / "a.csv", rows, module.Row), module.Row) == rows
    table = report.module_markdown(module, rows, tmp_path / "a.csv")
    assert len(table.splitlines()) == 4 + len(module.cells("cpu")) and "`benchmarks/results/a.csv`" in table
    command = f"--op {module.NAME} --grid cpu --out benchmarks/results/none.csv"
    assert command in report.module_markdown(module, [], tmp_path / "none.csv")


@pytest.mark.parametrize("name", [name for name, module in MODULES.items() if hasattr(module, "verdicts")])
def test_targets_that_were_not_measured_are_not_met(name):
    met = [met for met, _ in MODULES[name].verdicts([])]
    assert met and not any(met)
    assert len(met) == len(MODULES[name].verdicts(MADE_UP[name]()))


@pytest.mark.parametrize("op", run.OF_MODELS)
def test_what_is_not_there_is_said(op, monkeypatch):
    monkeypatch.setattr(runs, "absent", lambda: "peft")
    result = command("--op", op)
    assert result.exit_code == 2 and f"{op} needs peft" in result.output


def test_lora_on_an_embedding_is_among_the_variants():
    found = {g: [c for c in lora_variants.cells(g) if c.variant == "embedding"] for g in shapes.GRIDS}
    assert {(c.K, c.N, c.M, c.r, c.direction) for c in found["cpu"]} == {
        (32000, 1024, M, 16, "training") for M in (256, 2048)
    }
    arms, left_out = lora_variants.build(found["quick"][0], torch.device("cpu"), ("peft", "patched"))
    assert not left_out and [arm.name for arm in arms] == ["base", "base_again", "peft", "patched"]
    assert arms[0].run().shape == (8, 48)  # ids have no gradient
    assert [t.shape for t in arms[2].run()] == [(8, 48), (16, 64), (48, 16)]  # y, then those of A and B
    assert not runs.differing(arms[2:], torch.float32)
    with torch.no_grad():
        arms[2].model.base_model.model.layer.scaling["default"] *= 2
    assert runs.differing(arms[2:], torch.float32)


# -- arms that compute something else ---------------------------------------------------------------------------------


def stand_ins(wrong: str, backend: str):
    def build(cell, device, kinds):
        right = torch.arange(1.0, 5.0)
        results = {"none": right * 0, "none_again": right * 0, "a": right, "b": right + 1e-6, "op": right}
        results[wrong] = results[wrong] + 0.02
        made = [runs.Arm(n, backend if n == wrong else "torch", lambda y=y: (y,)) for n, y in results.items()]
        return made, {}

    return build


def test_a_contender_that_computes_something_else_is_not_timed():
    cell, how = prefix_attention.cells("quick")[0], runs.Run(torch.device("cpu"), 1, 0.0, {})
    times, timing, absent = runs.timed(stand_ins("a", "torch"), cell, (), ("torch",), how, ("a", "b", "op"))
    assert timing == "eager" and [arm.name for arm in times] == ["none", "none_again", "b", "op"]
    assert absent == [("a", "torch", "computes something else than op: 0.5% of the largest value away")]


def test_an_arm_of_ours_that_computes_something_else_stops_the_run(monkeypatch):
    monkeypatch.setattr(gate, "check", lambda *others: 0)
    monkeypatch.setattr(prefix_attention, "build", stand_ins("a", "peft_kernels"))
    monkeypatch.setattr(prefix_attention, "ARMS", ("a", "b", "op"))
    result = command("--op", "prefix_attention")
    assert result.exit_code == 2 and "refused" in result.output and "a peft_kernels computes" in result.output
