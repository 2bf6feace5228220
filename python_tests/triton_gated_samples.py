"""gated_product's Triton kernels interpreted on CPU tensors: every sample against the oracle.

Not collected by itself: test_triton.py runs it in a process of its own with TRITON_INTERPRET=1, which must be set
before triton is imported.
"""

import interpreted_samples
import pytest
import triton_interpreter

triton_interpreter.install()

from peft_kernels import registry, testing  # noqa: E402
from peft_kernels.ops.lora_linear import triton_gated  # noqa: E402

OP = registry.ops()["gated_product"]


@pytest.mark.parametrize("sample,pair", interpreted_samples.in_turns(OP))
def test_matches_oracle(sample, pair):
    with testing.poisoned_memory():
        functions = (triton_gated.FUNCTIONS[function.name] for function in OP.functions)
        testing.assert_matches_oracle(OP, sample.make("cpu", *pair), *functions)
