"""Which samples of an op, and in which dtypes, its interpreted Triton kernels run."""

import pytest
import torch


def in_all_dtypes(op):
    """Every sample in every pair of dtypes."""
    return [_run(sample, pair) for sample in _quick(op) for pair in sample.dtypes]


def in_turns(op, long=(), wide=None):
    """The same; by default in one pair, another for each sample, and none of those that are `long`.

    `wide`: which samples take turns in fp32 and fp64, the others in 16 bits; None: all in any. What leaves the range of
    fp16 can fail in fp16 alone, and is run in it.
    """
    half = (torch.float16, torch.float16)
    for place, sample in enumerate(_quick(op)):
        turns = [pair for pair in sample.dtypes if wide is None or (pair[0].itemsize > 2) == (sample.id in wide)]
        chosen = half if sample.id.startswith("beyond-fp16") else turns[place % len(turns)]
        for pair in sample.dtypes:
            later = sample.id in long or pair != chosen
            yield _run(sample, pair, marks=[pytest.mark.slow] if later else [])


def _quick(op):
    return [sample for sample in op.samples() if not sample.busy]  # the busy ones take hours


def _run(sample, pair, marks=()):
    name = "/".join(str(dtype).removeprefix("torch.") for dtype in pair)
    return pytest.param(sample, pair, id=f"{sample.id}-{name}", marks=marks)
