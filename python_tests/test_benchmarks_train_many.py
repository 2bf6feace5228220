"""The benchmark of training many adapters at once: its arms, rows and table. Nothing here asserts a time."""

import dataclasses
import math

import pytest
import torch
import typer
from benchmark_rows import trained_rows, write
from typer.testing import CliRunner

from benchmarks import gate, record, report, run, shapes, train_many

pytest.importorskip("peft")

CPU = torch.device("cpu")
SMALL = train_many.Cell(torch.float32, 64, 96, 1, 3, 2, 8, 4)


def a_run():
    return train_many.Run(CPU, 2, 0.0, record.provenance(CPU))


def command(*options):
    app = typer.Typer()
    app.command()(run.main)
    return CliRunner().invoke(app, ["--op", "train_many", *options])


def test_grids():
    for grid in shapes.GRIDS:
        found = train_many.cells(grid)
        assert len(found) == len(set(found)) > 1
        assert grid in train_many.LEAST_ROUNDS and grid in train_many.SECONDS
    axes = {(cell.adapters, cell.rows) for cell in train_many.cells("cpu")}
    assert axes == {(adapters, rows) for adapters in train_many.ADAPTERS for rows in train_many.ROWS}


def test_the_arms_train_the_same_in_fp64():
    found = []
    for patched, step in ((False, "one_after_another"), (True, "one_after_another"), (True, "together")):
        problem = train_many.Problem(dataclasses.replace(SMALL, dtype=torch.float64), CPU, patched)
        before = {n: p.detach().clone() for n, p in problem.model.named_parameters() if "lora_B" in n}
        problem.model.set_requires_grad(problem.cell.names)
        for _ in range(2):
            assert getattr(problem, step)() > 0
        found.append({n: p.detach() for n, p in problem.model.named_parameters() if "lora_" in n})
        assert all(not torch.equal(found[-1][n], p) for n, p in before.items())
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_a_cell_has_a_row_for_every_arm():
    rows = train_many.time_cell(SMALL, train_many.ARMS, a_run())
    by_arm = {row.arm: row for row in rows}
    assert list(by_arm) == ["peft", "peft_again", "alone", "together", "peft_mixed"]
    assert "adapter_names" in by_arm["peft_mixed"].not_timed and math.isnan(by_arm["peft_mixed"].ratio_p50)
    together = by_arm["together"]
    assert (together.adapters, together.rows, together.tokens, together.rounds) == (3, 2, 8, 2)
    assert together.tokens_per_s == pytest.approx(1e3 * 48 / together.ms_p50)
    assert by_arm["peft"].ratio_p50 == 1
    said = train_many.described(SMALL, rows, 1)
    assert "not timed: ValueError" in said and "tokens/s" in said


def test_the_command_times_the_quick_grid(tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr(gate, "check", lambda op, *others: checked.append(op.name) or 20)
    out = tmp_path / "out.csv"
    result = command("--arms", "together", "--rounds", "1", "--seconds", "0", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert checked == ["lora_linear", "batched_lora"]
    rows = record.read(out, train_many.Row)
    assert {row.arm for row in rows} == {"peft", "peft_again", "together"}
    assert {row.adapters for row in rows} == {1, 4}


def test_the_table_has_a_line_for_every_cell(tmp_path):
    rows = trained_rows()
    assert record.read(write(tmp_path / "a.csv", rows, train_many.Row), train_many.Row) == rows
    table = report.module_markdown(train_many, rows, tmp_path / "a.csv")
    assert "| float32 | 16 | 4 x 64 | 1.5 | 2.0% | 0.50 | **0.50** |" in table
    assert "2 Llama layers, d = 1024, r = 16" in table and "a.csv" in table
    assert len(table.splitlines()) == 4 + len(train_many.cells("cpu"))


def test_what_is_not_measured_or_not_there_is_said(tmp_path, monkeypatch):
    assert "--op train_many --grid cpu" in report.module_markdown(train_many, [], tmp_path / "none.csv")
    assert command("--arms", "merged").exit_code == 2
    monkeypatch.setattr(train_many, "absent", lambda: "peft")
    result = command()
    assert result.exit_code == 2 and "train_many needs peft" in result.output
