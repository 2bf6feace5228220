"""batched_lora_ as a torch operator: what the adapters of a pool add to one batch, in place, for inference.

Schema, check, fake, cost, registration; there is no gradient. Legend: M rows of x, K in_features; slices (index g) of
one x with N_g out_features, such as q, k and v; slots of an AdapterPool, which the ids of the route name. x may
lie where a y lies: it is read before y is written, so that a graph which gives the op a copy of y computes the same.
"""

import torch
from torch import Tensor

from peft_kernels.ops.batched_lora import pooled_reference
from peft_kernels.ops.batched_lora.pooled_reference import FIRST_PAGE, PAGE, tiles
from peft_kernels.ops.batched_lora.pooled_samples import bad_inputs, evaluate, samples
from peft_kernels.ops.batched_lora.route import ROUTE, length
from peft_kernels.ops.common.in_place import in_place
from peft_kernels.ops.common.projections import FLOATS, check_tensor, dtype_name, require
from peft_kernels.registry import Cost, Function, Op, register

NAME = "batched_lora_"
SCHEMA = (
    "(Tensor(a!)[] y, Tensor x, Tensor route, Tensor pages_in, Tensor[] pages_out, Tensor[] table, Tensor[] scaling, "
    "Tensor[] down_bias) -> ()"
)
NO_GRADIENT = "writes into y and has no gradient; batched_lora has one, torch.no_grad() needs none"


# -- check ------------------------------------------------------------------------------------------------------------


def _unit_stride(matrix: Tensor) -> bool:
    return matrix.shape[1] == 1 or matrix.stride(1) == 1


def _check_pages(name: str, pages: Tensor, width: int, words: str) -> None:
    require(
        NAME,
        pages.dim() == 3 and pages.shape[1:] == (PAGE, width) and pages.is_contiguous(),
        f"{name} must be contiguous, of shape [pages, {PAGE}, {words}={width}], got {list(pages.shape)}",
    )


def _check_slice(g: int, y, x, pages_in, pages_out, table, scaling, down_bias, slots) -> None:
    """One y and what is added to it."""
    M = x.shape[0]
    check_tensor(NAME, f"y[{g}]", y, x, (x.dtype,), f"{dtype_name(x.dtype)}, as x")
    require(
        NAME,
        y.dim() == 2 and y.shape[0] == M and y.shape[1] >= 1,
        f"y[{g}] must have shape [M={M}, out_features], got {list(y.shape)}",
    )
    require(
        NAME,
        _unit_stride(y) and (M <= 1 or y.stride(0) >= y.shape[1]),
        f"y[{g}] must have unit stride along out_features and rows that do not overlap, got strides {list(y.stride())}",
    )
    name = f"pages_out[{g}]"
    check_tensor(NAME, name, pages_out, x, (pages_in.dtype,), f"{dtype_name(pages_in.dtype)}, as pages_in")
    _check_pages(name, pages_out, y.shape[1], "out_features")
    check_tensor(NAME, f"table[{g}]", table, x, (torch.int32,), "int32")
    require(
        NAME,
        table.dim() == 2 and table.shape[0] == slots and table.shape[1] >= 6 and table.shape[1] % 2 == 0
        and table.is_contiguous(),
        f"table[{g}] must be contiguous, of shape [slots, 4 + 2 T], T >= 1, slots as in table[0], "
        f"got {list(table.shape)}",
    )  # fmt: skip
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    check_tensor(NAME, f"scaling[{g}]", scaling, x, (wide,), dtype_name(wide))
    require(
        NAME,
        scaling.dim() == 1 and scaling.shape[0] == slots and scaling.is_contiguous(),
        f"scaling[{g}] must be contiguous, of shape [slots={slots}], got {list(scaling.shape)}",
    )
    ranks = PAGE * ((table.shape[1] - FIRST_PAGE) // 2)
    check_tensor(NAME, f"down_bias[{g}]", down_bias, x, (wide,), dtype_name(wide))
    require(
        NAME,
        tuple(down_bias.shape) in ((0,), (slots, ranks)) and down_bias.is_contiguous(),
        f"down_bias[{g}] must be contiguous, of shape [0] or [slots={slots}, 8 T={ranks}], got {list(down_bias.shape)}",
    )


def check(y, x, route, pages_in, pages_out, table, scaling, down_bias) -> None:
    """Refuses what the op cannot take, in words. The C++ bindings repeat the rules and the texts, and check the numbers
    inside route and table too, where they lie on the CPU."""
    check_tensor(NAME, "x", x, x, FLOATS, "float32, float16, bfloat16 or float64")
    require(NAME, x.dim() == 2 and x.shape[1] >= 1, f"x must have shape [M, in_features], got {list(x.shape)}")
    require(NAME, _unit_stride(x), f"x must have unit stride along in_features, got stride {x.stride(1)}")
    require(NAME, len(y) >= 1, "y must name at least one output, got none")
    for name, entries in {"pages_out": pages_out, "table": table, "scaling": scaling, "down_bias": down_bias}.items():
        require(NAME, len(entries) == len(y), f"{name} must have one entry per y ({len(y)}), got {len(entries)}")
    M, K = x.shape
    rule = f"{dtype_name(x.dtype)}, as x" + ("" if x.dtype is torch.float64 else ", or float32")
    allowed = (x.dtype,) if x.dtype is torch.float64 else (x.dtype, torch.float32)
    check_tensor(NAME, "pages_in", pages_in, x, allowed, rule)
    _check_pages("pages_in", pages_in, K, "in_features")
    slots = table[0].shape[0] if table[0].dim() else 0
    for g, slice in enumerate(zip(y, pages_out, table, scaling, down_bias, strict=True)):
        _check_slice(g, slice[0], x, pages_in, *slice[1:], slots)
    check_tensor(NAME, "route", route, x, (torch.int32,), "int32")
    size = length(M, slots)
    require(
        NAME,
        tuple(route.shape) == (size,) and route.is_contiguous(),
        f"route must be contiguous, of shape [{size}] for M={M} and adapters={slots}, got {list(route.shape)}",
    )


# -- fake and reference -----------------------------------------------------------------------------------------------


def fake(y, x, route, pages_in, pages_out, table, scaling, down_bias) -> None:
    check(y, x, route, pages_in, pages_out, table, scaling, down_bias)


def reference(y, x, route, pages_in, pages_out, table, scaling, down_bias) -> None:
    check(y, x, route, pages_in, pages_out, table, scaling, down_bias)
    pooled_reference.add_(y, x, route, pages_in, pages_out, table, scaling, down_bias)


# -- cost and registration --------------------------------------------------------------------------------------------


def cost(y, x, route, pages_in, pages_out, table, scaling, down_bias) -> dict[str, Cost]:
    """Least flops and bytes: the factors of every adapter that has a row read once, routed rows of x in, of y in and
    out."""
    pieces = tiles(route, x.shape[0])
    rows, flops, factors = sum(len(rows) for _, rows in pieces), 0, 0
    for y_g, table_g in zip(y, table, strict=True):
        width = x.shape[1] + y_g.shape[1]
        ranks = table_g[:, 0].tolist()
        flops += sum(2 * len(rows) * ranks[slot] * width for slot, rows in pieces)
        factors += sum(ranks[slot] * width for slot in {slot for slot, _ in pieces})
    activations = rows * (x.shape[1] + 2 * sum(y_g.shape[1] for y_g in y))
    numbers = sum(4 * t.shape[1] for t in table) * len({slot for slot, _ in pieces})
    return {
        "forward": Cost(
            flops, x.element_size() * activations + pages_in.element_size() * factors + numbers + 4 * route.numel()
        )
    }


POOLED = register(
    Op(
        name=NAME,
        formula="y[i] += s[a(i)] f(x[i] A[a(i)]^T + a) B[a(i)]^T, factors in pages",
        functions=(Function(NAME, SCHEMA, fake, reference, in_place(NAME, NO_GRADIENT)), ROUTE),
        samples=samples,
        bad_inputs=bad_inputs,
        evaluate=evaluate,
        cost=cost,
        check=check,
        backends=("reference", "cpu", "cuda", "triton"),
        python_backends={"triton": "peft_kernels.ops.batched_lora.triton_kernel"},
    )
)
