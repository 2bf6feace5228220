"""The README's tables and the plots, from a benchmark's CSV.

    python benchmarks/report.py                     writes README.md between its markers, and the plot
    python benchmarks/report.py --check             exits 1 where the README is not what the CSV gives

Says which performance targets are met, and by how much the others are missed.
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the checkout is the package

import typer

from benchmarks import plots, record, tables, targets
from benchmarks.record import Row


def origin(rows: list[Row], path: Path) -> str:
    """Where the numbers come from, in one sentence."""
    row, rounds = rows[0], min(row.rounds for row in rows)
    digest, dirty, _ = row.commit.partition("-dirty")
    revision = digest[:12] + dirty
    return (
        f"Measured on {row.device}, {row.threads} threads, torch {row.torch}, transformers {row.transformers}, "
        f"PEFT {row.peft}, peft_kernels {row.peft_kernels} at {revision}, "
        f"{row.date[:10]}, at least {rounds} rounds a cell; `benchmarks/results/{path.name}`."
    )


def markdown(rows: list[Row], path: Path) -> str:
    """All that stands between the README's markers."""
    parts = [
        "Time over the frozen `nn.Linear` of the same process (1.00: an adapter at no cost), geometric means. "
        + origin(rows, path),
        tables.mean_table(rows, targets.LIMITS),
        "Every cell, forward+backward, PEFT / patched:",
        tables.cell_table(rows),
        "Kept between forward and backward:",
        tables.saved_table(rows),
    ]
    for title, table in (
        ("Others, over the cells they were timed in, forward+backward:", tables.contender_table(rows)),
        ("The price of the call itself, with next to nothing to compute:", tables.seam_table(rows)),
    ):
        parts += [title, table] if table else []
    return "\n\n".join(parts) + "\n"


def replaced(text: str, block: str) -> str:
    """`text` with `block` between its markers. Raises ValueError where it has none."""
    begin, end = (f"<!-- benchmark:{tables.OP}:{word} -->" for word in ("begin", "end"))
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"README must hold {begin} and {end}")
    return f"{head}{begin}\n{block}{end}{tail}"


def main(
    csv: Annotated[Path, typer.Argument(help="What run.py wrote")] = record.ROOT
    / "benchmarks/results/lora_linear_cpu.csv",
    readme: Annotated[Path, typer.Option(help="File with the markers")] = record.ROOT / "README.md",
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 where the README differs")] = False,
) -> None:
    """Puts the tables of CSV into README, plots beside the CSV, and says which targets are met."""
    rows = record.read(csv)
    before = readme.read_text()
    after = replaced(before, markdown(rows, csv))
    for met, sentence in targets.verdicts(rows):
        typer.echo(f"{'met   ' if met else 'MISSED'}  {sentence}")
    if check:
        typer.echo("README agrees with the CSV" if before == after else f"{readme.name} differs from {csv.name}")
        raise typer.Exit(before != after)
    readme.write_text(after)
    typer.echo(f"written: {readme.name}, {', '.join(path.name for path in plots.draw(rows, csv.with_suffix('')))}")


if __name__ == "__main__":
    typer.run(main)
