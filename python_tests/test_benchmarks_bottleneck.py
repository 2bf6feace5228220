"""The benchmark of bottleneck_adapter: its grids, arms, rows, table and targets. Nothing here asserts a time."""

import dataclasses

import pytest
import torch
from benchmark_rows import bottleneck_rows

from benchmarks import bottleneck, record, report

CPU = torch.device("cpu")
SMALL = bottleneck.Cell(torch.float64, 24, 40, 6, 5, 1, "training")


def test_the_grid():
    assert {cell.M for cell in bottleneck.cells("gpu")} == set(bottleneck.ROWS)
    assert {cell.adapters for cell in bottleneck.cells("cpu")} == set(bottleneck.ADAPTERS)
    places = {(c.d, c.E, c.M, c.adapters, c.direction) for c in bottleneck.cells("cpu") if c.dtype is torch.float32}
    assert all(target.place in places for target in bottleneck.TARGETS)
    assert {cell.d for cell in bottleneck.cells("full", "qwen3-0.6b")} == {1024}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_widened_computes_what_eager_does(dtype):
    cell = dataclasses.replace(SMALL, dtype=dtype, direction="inference")
    arms, left_out = bottleneck.build(cell, CPU, ("eager", "widened"))
    found = {arm.name: arm.run() for arm in arms}
    assert not left_out
    torch.testing.assert_close(found["widened"], found["eager"])
    _, left_out = bottleneck.build(SMALL, CPU, ("widened",))
    assert "inference" in left_out["widened"]


@pytest.mark.parametrize("adapters", [1, 3])
def test_the_arms_compute_the_same(adapters):
    cell = dataclasses.replace(SMALL, adapters=adapters, direction="training" if adapters == 1 else "inference")
    arms, left_out = bottleneck.build(cell, CPU, ("eager", "op"))
    found = {arm.name: arm.run() for arm in arms}
    assert {"ffn", "ffn_again", "eager"} <= set(found) and set(left_out) <= {"op"}
    if "op" in found:
        count = len(found["ffn"])  # the gradient of x, which every arm has; then the adapter's
        assert count == 1 or adapters > 1
        torch.testing.assert_close(found["op"], found["eager"])
        assert not torch.equal(found["ffn"][0], found["op"][0])


def test_a_cell_has_a_row_for_every_arm_and_for_those_that_are_not_there():
    rows = bottleneck.time_cell(SMALL, ("eager", "adapterhub"), bottleneck.Run(CPU, 2, 0.0, record.provenance(CPU)))
    by_arm = {row.arm: row for row in rows}
    assert list(by_arm) == ["ffn", "ffn_again", "eager", "adapterhub"]
    assert by_arm["ffn"].ratio_p50 == 1 and by_arm["ffn"].flop_ratio == 1
    assert by_arm["eager"].flop_ratio == pytest.approx(1 + 2 * 6 / (3 * 40)) and by_arm["eager"].rounds == 2
    assert "FFN" in bottleneck.described(SMALL, rows, 1.0)


def test_the_table_and_the_targets(tmp_path):
    rows = bottleneck_rows()
    table = report.module_markdown(bottleneck, rows, tmp_path / "a.csv")
    assert "| float32 | 1024 x 2816 | 256 | 8 | 8 | inference | 1.5 | 2.0% | 1.10 | 1.02 |" in table
    assert [met for met, _ in bottleneck.verdicts(rows)] == [True, True, True]
    slow = bottleneck.verdicts(bottleneck_rows(ratio=1.2))
    assert [met for met, _ in slow] == [True, False, False] and "1.200 against 1.100" in slow[-1][1]
