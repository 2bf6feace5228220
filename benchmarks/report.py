"""The README's tables and the plots, from the CSVs of a CPU and of a GPU.

    python benchmarks/report.py                     writes README.md between its markers, and the plot
    python benchmarks/report.py --check             exits 1 where the README is not what the CSVs give

Says which performance targets are met, and by how much the others are missed.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the checkout is the package

import typer

from benchmarks import (
    bottleneck,
    cuda_tables,
    decoder,
    lora_variants,
    plots,
    prefix_attention,
    prefix_models,
    record,
    tables,
    targets,
    train_many,
)
from benchmarks.batched_lora import tables as mixed_tables
from benchmarks.batched_lora import timing as mixed
from benchmarks.record import Row


def origin(rows: list[record.Origin], path: Path) -> str:
    """Where the numbers come from, in one sentence."""
    row, rounds = rows[0], min(row.rounds for row in rows if not row.not_timed)
    digest, dirty, _ = row.commit.partition("-dirty")
    revision = digest[:12] + dirty
    kernels = f", {row.instruction_set} kernels" if row.instruction_set else ""
    on_gpu = f"driver {row.driver}, CUDA {row.cuda}, Triton {row.triton}"
    where = on_gpu if row.cuda else f"{row.threads} threads{kernels}"
    return (
        f"Measured on {row.device}, {where}, torch {row.torch}, transformers {row.transformers}, "
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


# What a GPU's CSVs are of: the op, whose file is OP_cuda.csv, and its rows.
CUDA = {tables.OP: Row, mixed_tables.NAME: mixed.Row, decoder.NAME: decoder.Row}


def cuda_rows(results: Path) -> dict[str, list]:
    """By op, what its CSV in a folder holds; nothing where there is none."""
    paths = {op: results / f"{op}_cuda.csv" for op in CUDA}
    return {op: record.read(path, CUDA[op]) if path.exists() else [] for op, path in paths.items()}


def cuda_verdicts(rows: dict[str, list]) -> list[tuple[bool | None, str, str, str]]:
    """(met, title, limit, measured) for every target of a GPU; met is None where it was not measured."""
    return [
        *targets.cuda_verdicts(rows[tables.OP]),
        *targets.pool_verdicts(rows[mixed_tables.NAME]),
        *targets.decoding_verdicts(rows[decoder.NAME]),
    ]


def cuda_markdown(rows: dict[str, list]) -> str:
    """All that stands between the README's markers for the GPU; without rows, that nothing was measured."""
    linear, pool, layers = (rows[op] for op in CUDA)
    from_where = {op: origin(found, Path(f"{op}_cuda.csv")) for op, found in rows.items() if found}
    parts = [] if linear else ["Not measured yet; on a machine with a GPU, `make gpu-check` measures it."]
    if linear:
        parts.append("Time over the frozen `nn.Linear` of the same rounds, medians. " + from_where[tables.OP])
        for direction, timing in cuda_tables.VIEWS:
            table = cuda_tables.view(linear, direction, timing)
            parts += [f"{direction}, {cuda_tables.TITLES[timing]}:", table] if table else []
        reasons = cuda_tables.not_timed(linear)
        parts += ["Not timed:", "\n".join(f"* {line}" for line in reasons)] if reasons else []
    if pool:
        title = "Microseconds that adapters of rows add to a layer, from a CUDA graph with a cold L2, medians."
        parts += [f"{title} {from_where[mixed_tables.NAME]}", mixed_tables.added_table(pool)]
    if layers:
        parts.append(decoder.markdown(layers, from_where[decoder.NAME]).strip())
    parts.append(cuda_tables.target_table(cuda_verdicts(rows)))
    return "\n\n".join(parts) + "\n"


def module_markdown(tables_of: ModuleType, rows: list[record.Origin], path: Path) -> str:
    """All that stands between the README's markers for an op, by the module of its tables."""
    command = f"python benchmarks/run.py --op {tables_of.NAME} --grid cpu --out benchmarks/results/{path.name}"
    if not rows:
        return f"Not measured yet; on a machine that does nothing else, `{command}` measures it.\n"
    return tables_of.markdown(rows, origin(rows, path))


def replaced(text: str, block: str, name: str = tables.OP) -> str:
    """`text` with `block` between the markers of `name`. Raises ValueError where it has none."""
    begin, end = (f"<!-- benchmark:{name}:{word} -->" for word in ("begin", "end"))
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"README must hold {begin} and {end}")
    return f"{head}{begin}\n{block}{end}{tail}"


OUTCOMES = {True: "met   ", False: "MISSED", None: "not measured yet"}
RESULTS = record.ROOT / "benchmarks/results"


# Ops with a module of their own for their tables, and the rows of their CSVs.
MODULES = (
    (mixed_tables, mixed.Row),
    (train_many, train_many.Row),
    (bottleneck, bottleneck.Row),
    (prefix_attention, prefix_attention.Row),
    (prefix_models, prefix_models.Row),
    (lora_variants, lora_variants.Row),
)


def main(
    results: Annotated[Path, typer.Option(help="Folder of what run.py wrote: OP_cpu.csv; need not hold all")] = RESULTS,
    readme: Annotated[Path, typer.Option(help="File with the markers")] = record.ROOT / "README.md",
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 where the README differs")] = False,
) -> None:
    """Puts the tables of the CSVs into README, plots beside lora_linear's, and says which targets are met."""
    csv = results / f"{tables.OP}_cpu.csv"
    rows, on_gpu = record.read(csv), cuda_rows(results)
    before = readme.read_text()
    after = replaced(before, markdown(rows, csv))
    after = replaced(after, cuda_markdown(on_gpu), f"{tables.OP}:cuda")
    found = []
    for module, kind in MODULES:
        path = results / f"{module.NAME}_cpu.csv"
        measured = record.read(path, kind) if path.exists() else []
        after = replaced(after, module_markdown(module, measured, path), module.NAME)
        if measured and module is not train_many:  # it has no target
            found += module.verdicts(measured)
    for met, sentence in [*targets.verdicts(rows), *found]:
        typer.echo(f"{OUTCOMES[met]}  {sentence}")
    for met, title, limit, measured in cuda_verdicts(on_gpu):
        typer.echo(f"{OUTCOMES[met]}  GPU, {title}: at most {limit}" + (f", {measured}" if measured else ""))
    if check:
        typer.echo("README agrees with the CSVs" if before == after else f"{readme.name} differs from its CSVs")
        raise typer.Exit(before != after)
    readme.write_text(after)
    typer.echo(f"written: {readme.name}, {', '.join(path.name for path in plots.draw(rows, csv.with_suffix('')))}")


if __name__ == "__main__":
    typer.run(main)
