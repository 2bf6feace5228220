"""The benchmark of prefix_attention: its grids, arms, rows, table and targets. Nothing here asserts a time."""

import pytest
import torch
import typer
from benchmark_rows import prefix_rows, write
from typer.testing import CliRunner

from benchmarks import gate, prefix_arms, prefix_attention, record, report, run, runs, shapes

CPU = torch.device("cpu")
SMALL = prefix_attention.Cell(torch.float64, 4, 2, 16, 3, 7, 7, 5, 1, "training")
DECODE = prefix_attention.Cell(torch.float64, 4, 2, 16, 3, 1, 7, 5, 3, "inference")


def test_grids():
    for grid in shapes.GRIDS:
        found = prefix_attention.cells(grid)
        assert len(found) == len(set(found)) > 1
        assert grid in prefix_attention.LEAST_ROUNDS and grid in prefix_attention.SECONDS
    places = {
        (c.B, c.S, c.T, c.P, c.prefixes, c.direction) for c in prefix_attention.cells("cpu") if c.dtype is torch.float32
    }
    assert all(target.place in places for target in prefix_attention.TARGETS)
    assert {c.prefixes for c in prefix_attention.cells("gpu")} == {1, 64}


@pytest.mark.parametrize("cell", [SMALL, DECODE], ids=lambda cell: cell.title)
@pytest.mark.parametrize("arm", ["peft", "cat", "merged", "op"])
def test_the_arms_compute_the_same(cell, arm):
    torch.manual_seed(0)
    problem = prefix_arms.Problem(cell, CPU)
    expected = problem.step(lambda: reference(problem))()
    if arm == "merged" and cell is SMALL:
        with pytest.raises(runs.NotHere, match="no gradient"):
            prefix_arms._MAKERS[arm](problem)
        return
    made = prefix_arms._MAKERS[arm](problem)
    assert made
    for one in made:
        torch.testing.assert_close(one.run(), expected)


def reference(problem):
    ids = problem.ids if problem.cell.prefixes > 1 else None
    rest = (ids, *[None] * 7, "merge", problem.cell.D**-0.5, True, 0, False, 0.0, 0.0, None)
    op = torch.ops.peft_kernels_reference.prefix_attention.default
    return op(problem.q, problem.k, problem.v, problem.pk, problem.pv, *rest)[0]


def test_a_cell_has_a_row_for_every_arm_and_for_those_that_are_not_there():
    how = prefix_attention.Run(CPU, 2, 0.0, record.provenance(CPU))
    rows = prefix_attention.time_cell(SMALL, ("cat", "merged"), how)
    assert [row.arm for row in rows] == ["none", "none_again", "cat", "merged"]
    assert rows[0].ratio_p50 == rows[0].flop_ratio == 1 and rows[2].flop_ratio == pytest.approx(1 + 35 / 28)
    assert "no gradient" in rows[3].not_timed and rows[2].rounds == 2
    assert "no prefix" in prefix_attention.described(SMALL, rows, 1.0)


def test_the_command_times_the_quick_grid(tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr(gate, "check", lambda op, *others: checked.append(op.name) or 20)
    app, out = typer.Typer(), tmp_path / "out.csv"
    app.command()(run.main)
    options = ("--op", "prefix_attention", "--arms", "cat", "--rounds", "1", "--seconds", "0", "--out", str(out))
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    assert checked == ["prefix_attention"]
    rows = record.read(out, prefix_attention.Row)
    assert {row.arm for row in rows} == {"none", "none_again", "cat"}
    assert {row.direction for row in rows} == {"training", "inference"}


def test_the_table_and_the_targets(tmp_path):
    rows = prefix_rows()
    assert record.read(write(tmp_path / "a.csv", rows, prefix_attention.Row), prefix_attention.Row) == rows
    table = report.module_markdown(prefix_attention, rows, tmp_path / "a.csv")
    assert "| float32 | 32 | 1 | 128 | 128 | shared | inference | 1.5 | 2.0% | 1.10 | 1.10 | 0.50 |" in table
    assert len(table.splitlines()) == 4 + len(prefix_attention.cells("cpu"))
    assert [met for met, _ in prefix_attention.verdicts(rows)] == [True, True, True]
    slow = prefix_attention.verdicts(prefix_rows(ratio=1.2))
    assert [met for met, _ in slow] == [False, False, False] and "1.091 against 1.00" in slow[-1][1]
    assert [met for met, _ in prefix_attention.verdicts([])] == [False, False, False]
