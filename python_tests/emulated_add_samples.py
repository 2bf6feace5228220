"""lora_add_ on the emulator, which the registry's samples do not reach: the bits of lora_add, in place.

Not collected by itself: test_emulated.py runs it.
"""

import pytest
import torch
from emulated import (
    EMULATED,
    SCHEDULES,
    in_order,  # noqa: F401  (a fixture of every test)
    of_schedules,
    set_schedule,
)

from peft_kernels.ops.lora_linear.add_samples import PAIRS, problem


@of_schedules
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("ranks", [(16, 3), (1,) * 33], ids=["two", "more than one launch takes"])
@pytest.mark.parametrize("rows", [5, 150])
def test_in_place_has_the_same_bits(rows, ranks, pair):
    """Also where x is the residual, which is written to after x has been read, whatever the schedule."""
    arguments = problem("cpu", *pair, rows=(rows,), K=72, N=72, ranks=ranks, p=0.1, lora_biased=True)
    residual, x, *rest = arguments.values()
    expected = [EMULATED.lora_add.default(residual, of, *rest)[0] for of in (x, residual)]
    for schedule in SCHEDULES:
        set_schedule(*schedule)
        first, second = residual.clone(), residual.clone()
        EMULATED.lora_add_.default(first, x, *rest)
        EMULATED.lora_add_.default(second, second, *rest)
        assert torch.equal(first, expected[0]) and torch.equal(second, expected[1])
