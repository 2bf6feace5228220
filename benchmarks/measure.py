"""Interleaved timing in one process.

A step of an arm is y = arm(x), y.backward(dy), with x and the factors wanting gradients; the clock gives the time of
its forward part and of the whole. Every round takes one step of every arm. The order is turned by one arm from round
to round and every second round runs backwards, so that no arm always follows the same neighbour. What happens to the
machine meanwhile happens to all arms: ratios are taken within a round.
"""

import gc
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.arms import Arm

Step = tuple[float, float]  # ms of the forward part, ms of forward and backward
QUANTILES = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)


def order(index: int, count: int) -> list[int]:
    """In which order round `index` takes `count` arms."""
    shift = index // 2 % count
    turned = [*range(shift, count), *range(shift)]
    return turned[::-1] if index % 2 else turned


def interleave(
    arms: list[Arm], step: Callable[[Arm], Step], rounds: int, seconds: float, warmup: int = 2
) -> dict[Arm, list[Step]]:
    """At least `rounds` rounds, and more until `seconds` have passed. The first `warmup` rounds are thrown away."""
    steps = {arm: [] for arm in arms}
    for index in range(warmup):
        for i in order(index, len(arms)):
            step(arms[i])
    gc.collect()
    gc.disable()  # a collection inside one arm's step would be billed to that arm
    try:
        end, index = time.perf_counter() + seconds, 0
        while index < rounds or time.perf_counter() < end:
            for i in order(index, len(arms)):
                steps[arms[i]].append(step(arms[i]))
            index += 1
    finally:
        gc.enable()
    return steps


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    return tuple(torch.tensor(values, dtype=torch.float64).quantile(QUANTILES).tolist())


def ratios(values: list[float], frozen: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80 of the ratio to the frozen linear of the same round."""
    return quantiles([value / base for value, base in zip(values, frozen, strict=True)])


def runnable(arms: list, step: Callable, foreign: tuple[str, ...]) -> tuple[list, dict]:
    """The arms that survive one step, and why the others do not. Only contenders that are not ours may fail."""
    kept, failed = [], {}
    for arm in arms:
        try:
            step(arm)
            kept.append(arm)
        except Exception as error:
            if arm.backend not in foreign:
                raise
            failed[arm] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return kept, failed


def contenders(arms: list) -> tuple[str, ...]:
    """The backends of all arms but the two that are the base."""
    return tuple({arm.backend for arm in arms[2:]})


def compared(times: dict, base, again) -> Iterator[tuple[object, dict[str, float]]]:
    """Each arm with its columns: rounds, ms and ratio to `base`; and how far `again`, which equals it, is from it."""
    spread = max(abs(ratio - 1) for ratio in ratios(times[again], times[base]))
    for arm, taken in times.items():
        ms, ratio = quantiles(taken), ratios(taken, times[base])
        numbers = zip(("ms_p20", "ms_p50", "ms_p80", "ratio_p20", "ratio_p50", "ratio_p80"), (*ms, *ratio), strict=True)
        yield arm, {"rounds": len(taken), **dict(numbers), "aa_spread": spread}


def clear_gradients(arm: Arm, x: Tensor) -> None:
    # set to none, as optimizers do: otherwise every step would also time an accumulation
    x.grad = None
    for parameter in arm.parameters:
        parameter.grad = None


def cpu_clock(x: Tensor, dy: Tensor) -> Callable[[Arm], Step]:
    """Wall time of each step on the CPU."""

    def step(arm: Arm) -> Step:
        clear_gradients(arm, x)
        start = time.perf_counter_ns()
        y = arm.call(x)
        middle = time.perf_counter_ns()
        y.backward(dy)
        end = time.perf_counter_ns()
        return (middle - start) * 1e-6, (end - start) * 1e-6

    return step
