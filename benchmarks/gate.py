"""No time is taken of a wrong result: the registry's samples, through the oracle, before anything is timed."""

import torch

from peft_kernels import backends, registry, testing


class RedGateError(Exception):
    """A backend that was to be timed fails a sample."""


def backends_of(kinds: tuple[str, ...], device_type: str) -> list[str]:
    """Names of the backends that arms of these kinds run."""
    linked = backends.linked("lora_linear", device_type)
    names = [name for name in linked if name != "reference"] if "op" in kinds else []
    names += ["reference"] if "reference" in kinds else []
    names += [backends.bound(device_type)] if "patched" in kinds else []
    return list(dict.fromkeys(names))


def check(op: registry.Op, names: list[str], pairs: set[tuple[torch.dtype, torch.dtype]], device: torch.device) -> int:
    """Runs every sample in the (activation, factor) dtypes that will be timed; returns how many ran.

    Raises RedGateError naming the backend, the sample and the dtypes of the first that fails.
    """
    ran = 0
    for name in names:
        forward, backward = testing.operators(name, op)
        for sample in op.samples():
            for dtype, factor_dtype in sample.dtypes:
                if (dtype, factor_dtype) not in pairs:
                    continue
                try:
                    testing.assert_matches_oracle(op, sample.make(device, dtype, factor_dtype), forward, backward)
                except Exception as error:  # a crash is as red as a wrong number
                    where = f"sample '{sample.id}' of {op.name} in {dtype}, factors {factor_dtype}"
                    raise RedGateError(f"backend {name} fails {where}: {error}") from error
                ran += 1
    return ran
