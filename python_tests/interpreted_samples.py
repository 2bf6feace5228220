"""Which samples of an op, and in which dtypes, its kernels run where that is slow: Triton's interpreter, the emulator.

`make test` runs every sample but those that are `long` in one pair of dtypes, another for each sample, so that every
pair meets several edges; the rest of the product is marked slow, and `make test-all` runs it too.
"""

import pytest
import torch


def in_turns(op, long=(), wide=None, first=0):
    """Every sample in every pair of dtypes; not marked slow in one pair, from `first` on, unless the sample is `long`.

    `wide`: which samples take turns in fp32 and fp64, the others in 16 bits; None: all in any. What leaves the range of
    fp16 can fail in fp16 alone, and is run in it.
    """
    half = (torch.float16, torch.float16)
    quick = [sample for sample in op.samples() if not sample.busy]  # the busy ones take hours
    for place, sample in enumerate(quick):
        turns = [pair for pair in sample.dtypes if wide is None or (pair[0].itemsize > 2) == (sample.id in wide)]
        chosen = half if sample.id.startswith("beyond-fp16") else turns[(first + place) % len(turns)]
        for pair in sample.dtypes:
            later = sample.id in long or pair != chosen
            name = "/".join(str(dtype).removeprefix("torch.") for dtype in pair)
            yield pytest.param(sample, pair, id=f"{sample.id}-{name}", marks=[pytest.mark.slow] if later else [])
