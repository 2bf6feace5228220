"""Prefix tuning beside LoRA on the demo's domains: how long the prefix is, and what it begins with.

    o = softmax(q [P_k ; K]^T) [P_v ; V],  P keys and values in each layer         (Li and Liang 2021, arXiv:2101.00190)

Everything is as in methods.py: one seed, the same batches for all, turns step by step, a learning rate chosen on a text
that is none of the domains (INITS). Without the MLP, prefixes have fewer parameters than LoRA here; all are counted.
"""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from peft_kernels import PrefixTuningConfig
from peft_kernels.demo import methods, task
from peft_kernels.demo.corpus import Text
from peft_kernels.demo.methods import Attached, Method, PatchedLora, Trained

LENGTH = 32
LENGTHS = (1, 8, 32, 128)  # with --all
BEGINS = "prefix, "  # every method but LoRA


def _prefix(learning_rate: float, **fields) -> Callable[[int, Text], Attached]:
    def of_length(P: int, text: Text) -> Attached:
        ids = text.train[:P].tolist() if fields.get("init") == "text" else None
        return Attached(PrefixTuningConfig(num_virtual_tokens=P, text=ids, **fields), learning_rate)

    return of_length


# At the right: bits per byte after 16 steps on the code tables (5.19 before), with learning rates of 0.01, 0.03 and
# 0.1, with the MLP of 0.003 and 0.01.
INITS: dict[str, Callable[[int, Text], Attached]] = {
    "random": _prefix(0.1),  # 5.13, 5.00, 4.56
    "text": _prefix(0.1, init="text"),  # 5.19, 4.79, 4.21: the keys and values of the domain's first bytes
    "zero": _prefix(0.1, init="zero", composition="add", gate=True),  # 5.12, 4.72, 4.14
    "MLP": _prefix(0.01, prefix_projection=True),  # 3.97, 3.73
}
SERVED = ("random", "text", "MLP")  # rows of one batch share a composition


def arms(P: int, text: Text) -> dict[str, Method]:
    """LoRA, and a prefix of P positions from each start."""
    return {"LoRA": PatchedLora()} | {f"{BEGINS}{name}": of(P, text) for name, of in INITS.items()}


def compare(
    P: int, text: Text, base: nn.Module, size: task.Size, seed: int, folder: Path, tick: Callable
) -> list[Trained]:
    """LoRA and the prefixes of one length on one domain. Calls `tick(loss)` after every step of each."""
    return methods.compare(arms(P, text), text, base, size, seed, folder, tick)


def served(found: list[Trained], domain: str) -> dict[str, str]:
    """The folders of the prefixes that answer together, by what they began with."""
    of_domain = {t.method: t.adapter for t in found if t.domain == domain and t.width == LENGTH}
    return {name: of_domain[BEGINS + name] for name in SERVED}
