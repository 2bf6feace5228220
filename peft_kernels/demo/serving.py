"""Many adapters in one batch: the base model and the demo's adapters answer together, and what many of them cost.

Answers: rows of the base and of every adapter, LoRA or bottleneck, go through one `generate` of a model with a pool,
and rows of the base and of the prefixes that share the softmax through one of a model that has them. With l the logits
of a row at every byte that it wrote, l64 those of a model with that adapter alone (PEFT's, or that of
`peft_kernels.load`) in fp64, and e = |l - l64|_max, it has to be that

    e(mixed) <= bound,     bound = 2 e(alone) + (eps sqrt(longest) + eps) |l64|_max

with eps and `longest` the rounding and the longest reduction of the model, and that the row writes what it writes alone
wherever the two largest elements of l64 are further apart than the bound.

Throughput: decode steps of the base model, the pool, and PEFT's adapter_names with and without the patch, taking turns;
the same rule holds for their logits.
"""

import contextlib
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

import peft_kernels
from peft_kernels.demo import task
from peft_kernels.demo.corpus import Text
from peft_kernels.methods import CONFIGS

ARMS = ("base", "pool", "patched", "peft")
DISTINCT = (1, 4, 16, 64)  # adapters in one batch, as far as there are rows for them
UNTIMED = 2  # steps of each arm before the clock runs
APART = 0.1  # standard deviation of what the weights of a copy are multiplied by, around 1


@dataclass
class Answer:
    """One row of the mixed batch beside a model with its adapter alone."""

    adapter: str | None  # None: the base model
    prompt: str
    mixed: str
    alone: str
    error: float
    error_alone: float
    bound: float
    problems: list[str] = field(default_factory=list)


@dataclass
class Throughput:
    """Decode steps of `rows` rows with `distinct` adapters; every mapping has a value for each arm."""

    distinct: int
    rows: int
    step_ms: dict[str, float] = field(default_factory=dict)  # medians
    ratio: dict[str, float] = field(default_factory=dict)  # of the step time to the base model's
    tokens_per_second: dict[str, float] = field(default_factory=dict)
    step_times_ms: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Serving:
    """What both parts found."""

    answers: list[Answer]  # of LoRA and bottleneck adapters
    prefixed: list[Answer]  # of prefixes
    throughput: list[Throughput]
    problems: list[str]
    adapter_parameters: int  # of one of the adapters
    seconds: float


def turns(size: task.Size) -> int:
    """How often `serve` calls `tick`."""
    return len(_counts(size)) * size.decode_turns


@torch.no_grad()
def serve(
    base: nn.Module, adapters: dict[str, Path], bottlenecks: dict[str, Path], prefixes: dict[str, Path],
    texts: dict[str, Text], english: Text, size: task.Size, seed: int, tick: Callable,
) -> Serving:  # fmt: skip
    """`adapters`: by name, the folder that PEFT has saved; `bottlenecks`, `prefixes`: those of
    peft_kernels.save_pretrained. `texts`: by name, what each was trained on."""
    begin = time.perf_counter()
    base.eval()
    answers, prefixed = (
        answer_together(base, have(base, folders), folders, _questions(folders, texts, size), size)
        for have, folders in ((_with_pool, adapters | bottlenecks), (_with_prefixes, prefixes))
    )
    rows, problems, parameters = _throughput(base, list(adapters.values()), english, size, seed, tick)
    problems += [f"{a.adapter or 'base'}: {problem}" for a in (*answers, *prefixed) for problem in a.problems]
    return Serving(answers, prefixed, rows, problems, parameters, time.perf_counter() - begin)


# -- answers ----------------------------------------------------------------------------------------------------------


def _questions(adapters, texts: dict[str, Text], size: task.Size) -> list[tuple[str | None, Tensor]]:
    """Each domain's text is to be continued by the base model and by the domain's adapters."""
    found = []
    for text in dict.fromkeys(texts[name] for name in adapters):
        prompt = text.held_out[: size.window // 2]
        found += [(who, prompt) for who in (None, *(name for name in adapters if texts[name] is text))]
    return found


def _with_pool(base: nn.Module, adapters: dict[str, Path]) -> nn.Module:
    model = copy.deepcopy(base)
    pool = peft_kernels.attach_pool(model, adapters=len(adapters))
    for name, source in adapters.items():
        pool.load(name, source)
    return model


def _with_prefixes(base: nn.Module, adapters: dict[str, Path]) -> nn.Module:
    model = copy.deepcopy(base)
    for name, source in adapters.items():
        peft_kernels.load(model, source, name)
    peft_kernels.set_active(model, [])
    return model.eval()


def answer_together(
    base: nn.Module, model: nn.Module, adapters: dict[str, Path], questions: list[tuple[str | None, Tensor]],
    size: task.Size,
) -> list[Answer]:  # fmt: skip
    """All questions in one batch by a model with all adapters, and every row again by one with its adapter alone."""
    names = list(adapters)
    prompts = torch.stack([prompt for _, prompt in questions]).long().to(next(base.parameters()).device)  # [B, S]
    ids = [-1 if name is None else names.index(name) for name, _ in questions]
    with peft_kernels.adapter_ids(ids, names):
        mixed = _generate(model, prompts, size.generated, output_logits=True, return_dict_in_generate=True)
    logits = torch.stack(mixed.logits, dim=1)  # [B, generated, 256]
    answers: list[Answer | None] = [None] * len(questions)
    for name in (None, *names):
        alone = base if name is None else _alone(base, adapters[name])
        rows = [row for row, (wanted, _) in enumerate(questions) if wanted == name]
        written = _generate(alone, prompts[rows], size.generated)
        along, exact = (
            each(input_ids=mixed.sequences[rows], use_cache=False).logits[:, prompts.shape[1] - 1 : -1].double()
            for each in (alone, copy.deepcopy(alone).double())
        )
        rounding = _rounding(alone)
        for i, row in enumerate(rows):
            sequences = mixed.sequences[row, prompts.shape[1] :], written[i, prompts.shape[1] :]
            answers[row] = judge(name, prompts[row], sequences, (logits[row].double(), along[i], exact[i]), rounding)
    return answers


def _alone(base: nn.Module, folder: Path) -> nn.Module:
    """A copy of the base with one adapter, which is PEFT's or ours."""
    model = copy.deepcopy(base)
    if json.loads((folder / "adapter_config.json").read_text())["peft_type"] not in CONFIGS:
        return PeftModel.from_pretrained(model, folder)
    peft_kernels.load(model, folder)
    return model.eval()


def _generate(model: nn.Module, prompts: Tensor, steps: int, **kwargs):
    return model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        **kwargs,
    )


def _rounding(model: nn.Module) -> float:
    """What rounding can cost an element of the largest size."""
    eps = torch.finfo(next(model.parameters()).dtype).eps
    return eps * max(max(p.shape) for p in model.parameters()) ** 0.5 + eps


def judge(
    name: str | None, prompt: Tensor, written: tuple[Tensor, Tensor], logits: tuple[Tensor, Tensor, Tensor],
    rounding: float,
) -> Answer:  # fmt: skip
    """A row's verdict. `written` by mixed batch and alone; `logits` of both and in fp64 [generated, 256]."""
    (tokens, alone), (mixed, along, exact) = written, logits
    error, error_alone = ((each - exact).abs().max().item() for each in (mixed, along))
    bound = 2 * error_alone + rounding * exact.abs().max().item()
    answer = Answer(name, *map(task.readable, (prompt, tokens, alone)), error, error_alone, bound)
    if not error <= bound:  # so that NaN is a problem
        answer.problems.append(f"its logits in the mixed batch are {error:.2g} off, and {bound:.2g} is rounding")
    top = exact.topk(2).values
    sure = top[:, 0] - top[:, 1] > bound
    differ = tokens != alone
    first = differ & (differ.cumsum(0) == 1)  # beyond it the model alone has read something else
    wrong = sure & (first | (tokens != along.argmax(-1)))
    if wrong.any():
        answer.problems.append(f"it writes {answer.mixed!r} in the mixed batch and {answer.alone!r} alone")
    return answer


# -- throughput -------------------------------------------------------------------------------------------------------


class Clock(StoppingCriteria):
    """Stops nothing, but notes when each token of a generation was there."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        task.wait(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def steps_ms(self) -> list[float]:
        """Of every token but the first, whose step reads the prompt."""
        return [1e3 * (after - before) for before, after in zip(self.times[:-1], self.times[1:], strict=True)]


def _counts(size: task.Size) -> list[int]:
    return [count for count in DISTINCT if count <= size.decode_rows]


def _throughput(
    base: nn.Module, folders: list[Path], english: Text, size: task.Size, seed: int, tick: Callable
) -> tuple[list[Throughput], list[str], int]:
    """The rows, what went wrong, and the parameters of one adapter."""
    counts = _counts(size)
    peft = _copies(base, folders, counts[-1], seed)
    names = list(peft.peft_config)
    parameters = sum(p.numel() for key, p in peft.named_parameters() if f".{names[0]}." in key)
    patched = copy.deepcopy(peft)
    report = peft_kernels.patch(patched)
    served = copy.deepcopy(base)
    pool = peft_kernels.attach_pool(served, adapters=len(names))
    for name in names:
        pool.load(name, peft, name)
    models = {"base": base, "pool": served, "patched": patched, "peft": peft}
    prompts = next(task.batches(english.held_out, size, 1, seed, next(base.parameters()).device))[:, : size.window // 8]
    prompts = prompts.repeat(-(-size.decode_rows // len(prompts)), 1)[: size.decode_rows]
    found = [_measure(models, names[:count], prompts, size, tick) for count in counts]
    problems = _unequal(models, names, prompts)
    problems += [f"{row.name} was left alone: {row.reason}" for row in report.left]
    problems += [f"{count} calls were not fused: {why}" for why, count in report.fallbacks.items()]
    return found, problems, parameters


def _copies(base: nn.Module, folders: list[Path], count: int, seed: int) -> PeftModel:
    """PEFT's model with that many adapters: the trained ones in turn, each with weights of its own."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), folders[0], adapter_name="copy0")
    for i in range(1, count):
        model.load_adapter(folders[i % len(folders)], adapter_name=f"copy{i}")
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter *= 1 + APART * torch.randn_like(parameter)
    return model.eval()


@contextlib.contextmanager
def _rows_of(arm: str, names: list[str], rows: int) -> Iterator[dict]:
    """Inside, a model of that arm, called with what this yields, gives the rows the adapters in turn."""
    ids = [row % len(names) for row in range(rows)]
    if arm == "pool":
        with peft_kernels.adapter_ids(ids, names):
            yield {}
    else:
        yield {} if arm == "base" else {"adapter_names": [names[i] for i in ids]}


def _unequal(models: dict[str, nn.Module], names: list[str], prompts: Tensor) -> list[str]:
    """What is wrong with the logits of the prompts, by the rule for answers; what is timed has to be right."""
    logits = {}
    for arm, model in (models | {"exact": copy.deepcopy(models["peft"]).double()}).items():
        with _rows_of(arm, names, len(prompts)) as asked:
            logits[arm] = model(input_ids=prompts, use_cache=False, **asked).logits.double()
    exact = logits["exact"]
    error = {arm: (logits[arm] - exact).abs().max().item() for arm in ("pool", "patched", "peft")}
    bound = 2 * error["peft"] + _rounding(models["peft"]) * exact.abs().max().item()
    return [
        f"{len(names)} adapters: the logits of arm {arm} are {error[arm]:.2g} off, and {bound:.2g} is rounding"
        for arm in ("pool", "patched")
        if not error[arm] <= bound
    ]


def _measure(models: dict[str, nn.Module], names: list[str], prompts: Tensor, size: task.Size, tick: Callable):
    """One row of the table: the arms take turns, generation by generation, and the first one changes."""

    def steps_ms(arm: str, steps: int) -> list[float]:
        clock = Clock()
        with _rows_of(arm, names, len(prompts)) as asked:
            _generate(models[arm], prompts, steps + 1, stopping_criteria=StoppingCriteriaList([clock]), **asked)
        return clock.steps_ms()

    found = Throughput(len(names), len(prompts), step_times_ms={arm: [] for arm in ARMS})
    for arm in ARMS:
        steps_ms(arm, UNTIMED)
    for turn in range(size.decode_turns):
        first = turn % len(ARMS)
        for arm in (*ARMS[first:], *ARMS[:first]):
            found.step_times_ms[arm] += steps_ms(arm, size.decode_steps)
        tick()
    for arm, times in found.step_times_ms.items():
        found.step_ms[arm] = statistics.median(times)
        found.ratio[arm] = found.step_ms[arm] / found.step_ms["base"]
        found.tokens_per_second[arm] = 1e3 * len(prompts) / found.step_ms[arm]
    return found
