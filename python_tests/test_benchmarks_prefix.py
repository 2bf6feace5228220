"""The benchmark of prefix_attention: its grids, arms, rows, table and targets. Nothing here asserts a time."""

import dataclasses

import pytest
import torch
from benchmark_rows import model_rows, prefix_rows

from benchmarks import prefix_arms, prefix_attention, prefix_models, record, report, runs

CPU = torch.device("cpu")
SMALL = prefix_attention.Cell(torch.float64, 4, 2, 16, 3, 7, 7, 5, 1, "training")
DECODE = prefix_attention.Cell(torch.float64, 4, 2, 16, 3, 1, 7, 5, 3, "inference")
NO_BACKWARD = {"merged": "no gradient", "flex": "no backward"}  # on a CPU


def test_the_grid():
    cells = prefix_attention.cells("cpu")
    places = [(c.B, c.S, c.T, c.P, c.prefixes, c.direction) for c in cells if c.dtype is torch.float32]
    targets = [target.place for target in prefix_attention.TARGETS]
    assert places[: len(targets)] == targets  # a run that is cut has them
    assert {c.P for c in cells if c.S == 1} == {32, 128, 1024, 8192}
    assert {c.prefixes for c in prefix_attention.cells("gpu")} == {1, 64}


@pytest.mark.parametrize("cell", [SMALL, DECODE], ids=lambda cell: cell.title)
@pytest.mark.parametrize("arm", ["peft", "cat", pytest.param("flex", marks=pytest.mark.slow), "merged", "op"])
def test_the_arms_compute_the_same(cell, arm):
    cell = dataclasses.replace(cell, dtype=torch.float32) if arm == "flex" else cell  # it knows no fp64
    torch.manual_seed(0)
    problem = prefix_arms.Problem(cell, CPU)
    expected = problem.step(lambda: reference(problem))()
    if arm in NO_BACKWARD and cell.direction == "training":
        with pytest.raises(runs.NotHere, match=NO_BACKWARD[arm]):
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


def test_the_table_and_the_targets(tmp_path):
    rows = prefix_rows()
    table = report.module_markdown(prefix_attention, rows, tmp_path / "a.csv")
    assert "| float32 | 32 | 1 | 128 | 128 | shared | inference | 1.5 | 2.0% | 1.10 | 1.10 | 0.50 |" in table
    assert [met for met, _ in prefix_attention.verdicts(rows)] == [True, True, True]
    slow = prefix_attention.verdicts(prefix_rows(ratio=1.2))
    assert [met for met, _ in slow] == [False, False, False] and "1.091 against 1.00" in slow[-1][1]


# -- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", prefix_models.cells("quick"), ids=lambda cell: cell.step)
def test_a_model_computes_the_same_with_pefts_prefix_and_ours(cell):
    pytest.importorskip("peft")
    torch.manual_seed(0)
    arms, left_out = prefix_models.build(dataclasses.replace(cell, dtype=torch.float64), CPU, prefix_models.ARMS)
    assert [arm.name for arm in arms] == ["none", "none_again", "peft", "attached"] and not left_out
    for _ in range(2):  # a step leaves the cache as it was
        none, again, peft, _ = (arm.run() for arm in arms)
        assert torch.equal(none, again) and (peft - none).abs().max() > 0.1
        assert not runs.differing(arms[2:], torch.float64)


def test_the_table_and_the_target_of_models(tmp_path):
    rows = model_rows()
    table = report.module_markdown(prefix_models, rows, tmp_path / "a.csv")
    assert "| float32 | demo | 16 | 128 | 0 | 32 | training | 1.5 | 2.0% | 1.20 | 1.10 |" in table
    assert [met for met, _ in prefix_models.verdicts(rows)] == [True]
    slow = prefix_models.verdicts(model_rows(ratio=1.5))
    assert not slow[0][0] and "1.250 against 1.00" in slow[0][1]
