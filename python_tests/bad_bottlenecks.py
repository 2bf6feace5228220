"""What bottleneck_adapter's backward must refuse: every argument's dtype, shape and device, and what is missing."""

import torch

from peft_kernels.ops.bottleneck_adapter.samples import problem

F32, BF16 = torch.float32, torch.bfloat16
TENSORS = ("dy", "x", "h", "down_weight", "up_weight", "up_bias", "scale", "gate", "norm_weight", "norm_bias", "seed")
H = "h must be the contiguous [M, bottleneck] that the forward returned"
NO_RESIDUAL = "residual must be given where out_features=48 is not in_features=64"
DTYPES = {"x": torch.int32, "down_weight": torch.float64, "seed": torch.int32}  # else bfloat16


def good(device="cpu") -> dict:
    """Arguments that the backward takes."""
    sizes = dict(rows=(3, 4), K=64, N=48, E=5, norm="layer_norm", scale="channel", gated=True, p=0.1)
    arguments = problem(device, F32, F32, **sizes)
    residual = arguments.pop("residual")
    del arguments["down_bias"]
    x, h = arguments.pop("x"), torch.ones(12, 5, device=device)
    return {"dy": torch.ones_like(residual), "x": x, "h": h, **arguments, "serial": False, "needs": [True] * 9}


def _shapes():
    """(argument, its new value, text)"""
    rules = {
        "dy": ((3, 4, 48), "[3, 4, 48], as x with out_features=48"),
        "gate": ((3, 4), "[3, 4], as x without its features"),
        "up_bias": ((48,), "[out_features=48]"),
        "norm_weight": ((64,), "[in_features=64]"),
        "norm_bias": ((64,), "[in_features=64]"),
    }
    for name, (shape, words) in rules.items():
        for other in ((*shape[:-1], shape[-1] - 1), (*shape[:-1], 1), (*shape, 1), shape[1:]):
            yield name, torch.zeros(other), f"{name} must have shape {words}, got {list(other)}"
    yield "dy", torch.zeros(4, 3, 48), "dy must have shape [3, 4, 48], as x with out_features=48, got [4, 3, 48]"
    yield "dy", torch.zeros(12, 48), "dy must have shape [3, 4, 48], as x with out_features=48, got [12, 48]"
    yield "x", torch.zeros(3, 4, 63), "down_weight must have shape [bottleneck, in_features=63], got [5, 64]"
    yield "x", torch.zeros(3, 5, 64), "gate must have shape [3, 5], as x without its features, got [3, 4]"
    yield "x", torch.zeros(()), "x must have shape [..., in_features], got a 0-d tensor"
    yield "x", torch.zeros(3, 4, 0), "x must have at least one feature"
    yield "down_weight", torch.zeros(5, 63), "down_weight must have shape [bottleneck, in_features=64], got [5, 63]"
    yield "down_weight", torch.zeros(64), "down_weight must have shape [bottleneck, in_features=64], got [64]"
    yield "down_weight", torch.zeros(1025, 64), "down_weight must have from 1 to 1024 rows, got 1025"
    yield "up_weight", torch.zeros(48, 4), "up_weight must have shape [out_features, bottleneck=5], got [48, 4]"
    yield "up_weight", torch.zeros(0, 5), "up_weight must have shape [out_features, bottleneck=5], got [0, 5]"
    yield "up_weight", torch.zeros(47, 5), "up_bias must have shape [out_features=47], got [48]"
    yield "scale", torch.zeros(2), "scale must have shape [1] or [out_features=48], got [2]"
    yield "scale", torch.zeros(()), "scale must have shape [1] or [out_features=48], got []"
    yield "seed", torch.zeros(1, dtype=torch.int64), "seed must be a 0-d tensor, got shape [1]"
    for h in (torch.zeros(12, 4), torch.zeros(11, 5), torch.zeros(3, 4, 5), torch.zeros(5, 12).t()):
        yield "h", h, H


def cases() -> list[tuple[str, dict, str]]:
    """(id, arguments to change, a part of the message)"""
    found = []
    for name in TENSORS:
        arguments = good()
        dtype = arguments[name].to(DTYPES.get(name, BF16))
        found.append((f"{name}-dtype", {name: dtype}, H if name == "h" else f"{name} must have dtype"))
        meta = arguments[name].to("meta")
        if name != "x":  # the device that the others must be on
            found.append((f"{name}-device", {name: meta}, H if name == "h" else f"{name} must be on x's device"))
    found += [(f"{name}-shape-{tuple(value.shape)}", {name: value}, text) for name, value, text in _shapes()]
    found += [
        ("needs-8", {"needs": [True] * 8}, "needs must have 9 entries, got 8"),
        ("needs-10", {"needs": [True] * 10}, "needs must have 9 entries, got 10"),
        ("serial", {"serial": True}, NO_RESIDUAL),
        ("seed-none", {"seed": None}, "seed must be given where dropout_p > 0"),
        ("scale-none", {"scale": None}, "scale must be given for its gradient"),
        ("gate-none", {"gate": None}, "gate must be given for its gradient"),
        ("norm-none", {"norm": "none", "norm_weight": None, "norm_bias": None}, "norm must not be 'none'"),
        ("norm-weight", {"norm": "none"}, "norm_weight must be None where norm is 'none'"),
        ("norm-bias", {"norm": "rms_norm"}, "norm_bias must be None where norm is 'rms_norm'"),
        ("norm-unknown", {"norm": "batch_norm"}, "norm must be one of none, layer_norm, rms_norm, got 'batch_norm'"),
        ("activation", {"activation": "swish"}, "activation must be one of identity, relu"),
        ("dropout-on", {"dropout_on": "x"}, "dropout_on must be one of bottleneck, output, got 'x'"),
        ("p", {"dropout_p": 1.0}, "dropout_p must lie in [0, 1), got 1"),
        ("scaling", {"scaling": float("nan")}, "scaling must be finite, got nan"),
        ("eps", {"eps": -1.0}, "eps must be finite and not negative, got -1"),
    ]
    return found
