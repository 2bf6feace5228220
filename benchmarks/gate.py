"""No time is taken of a wrong result: the registry's samples, through the oracle, before anything is timed."""

import torch

from benchmarks import hopper
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

    Raises RedGateError naming the backend, the sample and the dtypes of the first that fails. Of the kernels for Hopper
    that are off by default it is noted in hopper.REFUSED instead.
    """
    ran = sum(_check(op, name, pairs, device) for name in names)
    if hopper.DEFAULT in names and hopper.there(device):
        try:
            with hopper.asked_for(hopper.BACKEND):
                ran += _check(op, hopper.DEFAULT, pairs, device)
        except RedGateError as red:
            hopper.REFUSED.append(f"with {hopper.VARIABLE}=1, {red}")
    return ran


def _check(op: registry.Op, name: str, pairs: set, device: torch.device) -> int:
    """One backend."""
    ran, (forward, backward) = 0, testing.operators(name, op)
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
