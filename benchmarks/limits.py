"""What the device can do, measured: the facts that decide how an adapter is best added to a frozen linear.

copy            bytes per second, read plus written, of a copy that no cache holds
gemm K+e        y [M, N] = x [M, K+e] W^T, for e = 0 and EXTRAS: does a K loop that runs over [x | h] lose alignment?
gemm beta=1     y += x W^T in place: is the read of y hidden behind the product?
shrink          h [M, r] = x A^T: bytes per second through a product that is mostly reading
expand          y += h B^T in place: likewise, of one that is mostly writing what it has read
launch          the time that one more kernel of next to no work costs, in a CUDA graph (on a CPU: one more operator)

All are taken in the same rounds, in an order that turns, with a cold L2 on a GPU; ratios are within a round. Of few
rows a GPU does several products with weights of their own in one go: one takes not much more than events resolve.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import cuda_clock, record
from benchmarks import measure as rounds_of

RANK = 16
EXTRAS = (1, 4, 8, 16, 64)  # in bf16 rows are aligned to 2, 8, 16, 32 and 128 bytes
LAUNCHES = 50
COPIES, FEW_ROWS = 8, 64


@dataclass(frozen=True)
class Sizes:
    copy_bytes: int
    rows: tuple[int, ...]  # M
    K: int
    N: int
    dtype: torch.dtype


def sizes(device: torch.device) -> Sizes:
    if device.type == "cuda":
        return Sizes(1 << 30, (8192, 64, 16), 4096, 4096, torch.bfloat16)
    return Sizes(1 << 26, (256, 16), 1024, 1024, torch.float32)


@dataclass(frozen=True, eq=False)
class Fact:
    """`run` does `work` (bytes or flops) once."""

    name: str
    shape: str
    run: Callable[[], object]
    work: float
    unit: str
    against: str = ""  # the fact of the same shape that this one is a ratio of


@dataclass(frozen=True)
class Row(record.Origin):
    """One fact. `value` is in `unit`, from the median time; the ratio is of times."""

    fact: str
    shape: str
    dtype: str
    value: float
    unit: str
    ms_p20: float
    ms_p50: float
    ms_p80: float
    against: str
    ratio_p20: float
    ratio_p50: float
    ratio_p80: float
    rounds: int


def facts(device: torch.device, size: Sizes) -> list[Fact]:
    """Everything that is run, on random data: zeros are multiplied faster."""
    source = torch.randint(127, (size.copy_bytes,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    found = [Fact("copy", f"{size.copy_bytes} bytes", lambda: target.copy_(source), 2 * size.copy_bytes, "GB/s")]
    for M in size.rows:
        found += _products(device, size, M)
    one = torch.zeros(1, device=device)

    def launches():
        for _ in range(LAUNCHES):
            one.add_(1)

    found.append(Fact("launch 1", "1 element", lambda: one.add_(1), 0, "us"))
    found.append(Fact("launch", f"{LAUNCHES} x 1 element", launches, 0, "us", "launch 1"))
    return found


def _products(device: torch.device, size: Sizes, M: int) -> list[Fact]:
    def random(*shape):
        return torch.randn(shape, device=device).mul_(size.K**-0.5).to(size.dtype)

    count = COPIES if device.type == "cuda" and M <= FEW_ROWS else 1
    each = f", {count} of them" if count > 1 else ""

    def fact(name, K, N, run, work, unit, against="gemm"):
        def every():
            for i in range(count):
                run(i)

        return Fact(name, f"{M} x {K} x {N}{each}", every, count * work, unit, against)

    found = []
    y = random(M, size.N)
    for extra in (0, *EXTRAS):
        K = size.K + extra
        x, weights = random(M, K), [random(size.N, K) for _ in range(count)]

        def product(i, x=x, weights=weights):
            torch.mm(x, weights[i].t(), out=y)

        name = f"gemm K+{extra}" if extra else "gemm"
        against = "gemm" if extra else ""
        found.append(fact(name, K, size.N, product, 2 * M * size.N * K, "TFLOP/s", against))
    x, total, h = random(M, size.K), random(M, size.N), random(M, RANK)
    weights = [random(size.N, size.K) for _ in range(count)]
    factors = [(random(RANK, size.K), random(size.N, RANK)) for _ in range(count)]

    def onto(i):
        torch.addmm(total, x, weights[i].t(), out=total)

    def shrink(i):
        torch.mm(x, factors[i][0].t(), out=h)

    def expand(i):
        torch.addmm(total, h, factors[i][1].t(), out=total)

    read = size.dtype.itemsize * (x.numel() + RANK * size.K + h.numel())
    written = size.dtype.itemsize * (2 * total.numel() + RANK * size.N + h.numel())
    return [
        *found,
        fact("gemm beta=1", size.K, size.N, onto, 2 * M * size.N * size.K, "TFLOP/s"),
        fact("shrink", size.K, RANK, shrink, read, "GB/s"),
        fact("expand", RANK, size.N, expand, written, "GB/s"),
    ]


def clock(device: torch.device) -> Callable[[Fact], float]:
    """ms of one run: of a graph with a cold L2, or on the CPU."""
    if device.type != "cuda":

        def wall(fact: Fact) -> float:
            start = time.perf_counter_ns()
            fact.run()
            return (time.perf_counter_ns() - start) * 1e-6

        return wall
    flush, stream = cuda_clock.l2_flush(device), torch.cuda.Stream(device)
    graphs: dict[Fact, cuda_clock.Graph] = {}

    def replay(fact: Fact) -> float:
        if fact not in graphs:

            def body(mark):
                mark()
                fact.run()
                mark()

            graphs[fact] = cuda_clock.Graph(body, stream)
        flush()
        return graphs[fact]()[0]

    return replay


def measure(device: torch.device, size: Sizes, rounds: int) -> list[Row]:
    """All facts, `rounds` times."""
    found = facts(device, size)
    times = rounds_of.interleave(found, clock(device), rounds, 0.0)
    return rows_of(times, size, record.provenance(device))


def rows_of(times: dict[Fact, list[float]], size: Sizes, origin: dict) -> list[Row]:
    rows, base = [], {}
    for fact, taken in times.items():  # a fact follows the one that it is a ratio of
        base[fact.name] = taken
        ms = rounds_of.quantiles(taken)
        ratio = rounds_of.ratios(taken, base[fact.against or fact.name])
        if fact.name == "launch":
            value = 1e3 * (ms[1] - rounds_of.quantiles(base["launch 1"])[1]) / (LAUNCHES - 1)
        else:
            value = _rate(fact, ms[1])
        rows.append(
            Row(
                fact=fact.name,
                shape=fact.shape,
                dtype=str(size.dtype).removeprefix("torch."),
                value=value,
                unit=fact.unit,
                **dict(zip(("ms_p20", "ms_p50", "ms_p80"), ms, strict=True)),
                against=fact.against,
                **dict(zip(("ratio_p20", "ratio_p50", "ratio_p80"), ratio, strict=True)),
                rounds=len(taken),
                **origin,
            )
        )
    return rows


def _rate(fact: Fact, ms: float) -> float:
    scale = {"GB/s": 1e-6, "TFLOP/s": 1e-9}
    return fact.work / ms * scale[fact.unit] if fact.unit in scale else 1e3 * ms
