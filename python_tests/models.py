"""Tiny random models of every type that patching knows, and the comparison of a patched one with plain PEFT.

The comparison holds no tolerance: with `exact` the PEFT model in fp64, a patched model may be off by twice what plain
PEFT is off in the same dtype, plus what rounding each term of the longest sum once costs.
"""

import copy
from collections import Counter

import torch
import transformers as hf
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peft_kernels
from peft_kernels.integrations import rows

VOCAB, HIDDEN, INNER, LAYERS, HEADS = 64, 32, 48, 2, 4

_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PER_HEAD = {"head_dim": 8}
_GEMMA2 = {"query_pre_attn_scalar": 8, "sliding_window": 4}
_ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_BART = {
    "vocab_size": VOCAB, "d_model": HIDDEN, "dropout": 0.0, "max_position_embeddings": 64,
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
_GPT2 = {
    "vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_OPT = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "word_embed_proj_dim": HIDDEN, "ffn_dim": INNER, "dropout": 0.0,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCAB, "d_model": HIDDEN, "d_kv": 8, "d_ff": INNER, "num_layers": 1, "num_heads": HEADS,
    "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip

# model type -> (model class, config class, config, whether its modules with several projections are known)
MODELS = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, _DECODER, True),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, _DECODER, True),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, _DECODER | _PER_HEAD, True),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, _DECODER | {"sliding_window": 4}, True),
    "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig, _DECODER | _PER_HEAD, True),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, _DECODER | _PER_HEAD | _GEMMA2, True),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, _DECODER | _PER_HEAD | _GEMMA2, True),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, _GPT2, False),
    "opt": (hf.OPTForCausalLM, hf.OPTConfig, _OPT, False),
    "bert": (hf.BertForMaskedLM, hf.BertConfig, _ENCODER, False),
    "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig, _ENCODER | {"pad_token_id": 0}, False),
    "bart": (hf.BartForConditionalGeneration, hf.BartConfig, _BART, False),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config, _T5, False),
}
GENERATING = [name for name in MODELS if name not in ("bert", "roberta")]


def base_model(name: str, **changes) -> nn.Module:
    """A random model of a type, always with the same weights."""
    model_class, config_class, config, _ = MODELS[name]
    torch.manual_seed(1)
    return model_class(config_class(**config | changes))


def lora_config(**changes) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": "all-linear"} | changes)


def randomise(model: nn.Module) -> nn.Module:
    """Gives the adapters weights whose part of the output is as large as the base's; always the same ones."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + torch.rand(parameter.shape, generator=generator) / 2)
            elif "lora_" in name and parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5 / 4)
            elif "lora_" in name or "vera_lambda" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model


def peft_model(name: str, base_changes: dict | None = None, **changes) -> nn.Module:
    return randomise(get_peft_model(base_model(name, **base_changes or {}), lora_config(**changes)))


def adapted(name: str, config: PeftConfig, base_changes: dict | None = None) -> nn.Module:
    """A model of a type with trained adapters of any method."""
    return randomise(get_peft_model(base_model(name, **base_changes or {}), config))


def inputs(rows: int = 2, tokens: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids}


def results(model: nn.Module, **batch) -> dict[str, Tensor]:
    """Loss, logits and every gradient of one step."""
    model.zero_grad()
    out = model(**batch or inputs())
    out.loss.backward()
    found = {"loss": out.loss, "logits": out.logits}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def in_double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def calls_per_forward(report: peft_kernels.PatchReport) -> int:
    """One for each group and one for each layer outside of groups."""
    return sum(1 for row in report.rows if row.kernel and not row.group)


def assert_as_close_as_peft(patched: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Every tensor of `patched` against fp64: its error at most twice the error of plain PEFT, and one rounding more.

    Where PEFT is lucky with a tensor, its error in nine of ten tensors of that dtype counts, measured in roundings of a
    tensor's largest element: so much does this model make of a rounding.
    """
    assert patched.keys() == plain.keys() == exact.keys()
    roundings = {}  # errors in roundings, by tensor: ours and PEFT's
    for name, tensor in patched.items():
        assert tensor.shape == plain[name].shape and tensor.dtype == plain[name].dtype, name
        if not tensor.numel():
            continue
        reference, limits = exact[name].double(), torch.finfo(tensor.dtype)
        longest = max(INNER, HIDDEN, *tensor.shape)
        rounding = max(limits.eps * longest**0.5 * reference.abs().max().item(), limits.tiny)
        roundings[name] = [(t.double() - reference).abs().max().item() / rounding for t in (tensor, plain[name])]
    failed = []
    for name, (error, error_peft) in roundings.items():
        same = [theirs for other, (_, theirs) in roundings.items() if patched[other].dtype == patched[name].dtype]
        usual = torch.tensor(same, dtype=torch.float64).quantile(0.9).item()
        if not error <= 2 * max(error_peft, usual) + 1:
            failed.append(f"{name}: {error:.3g} roundings, PEFT {error_peft:.3g}, {usual:.3g} in nine of ten tensors")
    assert not failed, "; ".join(failed)


def assert_fused_like_peft(model: nn.Module, fallbacks: dict | None = None, **batch) -> peft_kernels.PatchReport:
    """One step patched against one by plain PEFT, a fused call of each group and of each layer outside of groups."""
    plain, exact = results(model, **batch), results(in_double(model), **batch)
    report = peft_kernels.patch(model, strict=True)
    assert_as_close_as_peft(results(model, **batch), plain, exact)
    assert report.fused == calls_per_forward(report), report
    assert report.fallbacks == (fallbacks or {}) and not report.left, report
    return report


def assert_saves_like_peft(model: nn.Module, base: nn.Module, path) -> None:
    """What a patched model saves is what PEFT saves, and PEFT loads it to a model that computes the same."""
    peft_kernels.patch(model, strict=True)
    state = get_peft_model_state_dict(model)
    with peft_kernels.unpatch(model):
        plain = get_peft_model_state_dict(model)
        assert list(plain) == list(state) and all(torch.equal(plain[k], state[k]) for k in plain)
    model.save_pretrained(path)
    loaded = PeftModel.from_pretrained(base, path).eval()
    with torch.no_grad():
        expected = model.eval()(**inputs()).logits
        peft_kernels.patch(loaded, strict=True)
        assert torch.equal(loaded(**inputs()).logits, expected)


class Operators(TorchDispatchMode):
    """Counts the calls of this library's operators."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "peft_kernels":
            self.calls[function._opname] += 1
        return function(*args, **kwargs or {})


NAMES = ["default", "other", "__base__", "other"]
# layers with one row of input per sequence, which PEFT asks for
TARGETS = {"opt": ["q_proj", "k_proj", "v_proj", "out_proj"]}


def two_adapters(name: str = "llama", base_changes: dict | None = None, **changes) -> nn.Module:
    """A second adapter of other rank and scaling on some of the layers of the first; both trained."""
    targets = TARGETS.get(name, "all-linear")
    model = peft_model(name, base_changes, **{"target_modules": targets} | changes)
    touched = sorted(model.targeted_module_names)[::2]
    model.add_adapter("other", lora_config(**{"r": 3, "lora_alpha": 5, "target_modules": touched} | changes))
    model.set_requires_grad(["default", "other"])
    return randomise(model)


def batch(names=NAMES, **more) -> dict:
    """Inputs with a row for each name of an adapter."""
    return inputs(rows=len(names)) | {"adapter_names": names} | more


def nothing_is_left(model: nn.Module) -> bool:
    """No hook on a module, no adapters of rows in this thread."""
    hooked = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    return not hooked and rows._CURRENT.get() is None and not rows._ENTERED


class Mask(nn.Module):
    """A dropout that keeps what the op keeps."""

    def __init__(self, seed, p, stream):
        super().__init__()
        self.seed, self.p, self.stream = seed, p, stream

    def forward(self, x):
        keep = peft_kernels.lora_dropout_mask(self.seed, x.numel() // x.shape[-1], x.shape[-1], self.p, self.stream)
        kept_of_65536 = max(1, int((1 - self.p) * 65536 + 0.5))
        return x * keep.view(x.shape) * (65536 / kept_of_65536)


RANKS = {"french": 4, "german": 8, "greek": 3}
ROWS = ["greek", None, "french", "german", "french"]


def with_adapter(base: nn.Module, seed: int, **changes) -> nn.Module:
    """A copy of a model with one trained adapter, another one for each seed."""
    model = get_peft_model(copy.deepcopy(base), lora_config(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + torch.rand(parameter.shape, generator=generator) / 2)
            elif "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5 / 4)
    return model.eval()


def served(name: str = "llama", **changes) -> tuple[nn.Module, nn.Module, dict[str, nn.Module]]:
    """The plain model, one with a pool, and by name the PEFT models whose adapters the pool has."""
    plain = base_model(name).eval()
    changes = {"target_modules": TARGETS.get(name, "all-linear")} | changes
    alone = {n: with_adapter(plain, i, r=r, **changes) for i, (n, r) in enumerate(RANKS.items())}
    model = copy.deepcopy(plain)
    pool = peft_kernels.attach_pool(model, adapters=8)
    for n, peft in alone.items():
        pool.load(n, peft)
    return plain, model, alone


@torch.no_grad()
def each_alone(plain: nn.Module, alone: dict[str, nn.Module], rows: list, inputs: dict) -> dict[str, Tensor]:
    """Logits of each row by PEFT's model of its adapter, or by the plain model."""
    outputs = {n: (plain if n is None else alone[n])(**inputs).logits for n in dict.fromkeys(rows)}
    return {"logits": torch.stack([outputs[n][i] for i, n in enumerate(rows)])}


def small_cache(**changes) -> hf.ContinuousBatchingConfig:
    """For continuous batching of a few tokens at a time: requests wait, and prompts go in parts."""
    page = (
        "page_size" if "page_size" in hf.ContinuousBatchingConfig.__dataclass_fields__ else "block_size"
    )  # until 5.17
    sizes = {"num_blocks": 64, page: 4, "max_batch_tokens": 12, "allow_block_sharing": False}
    return hf.ContinuousBatchingConfig(**sizes | changes)


def in_rows(rows: list, **options):
    """The context of a call whose rows have these adapters."""
    names = [n for n in dict.fromkeys(rows) if n is not None]
    return peft_kernels.adapter_ids([-1 if n is None else names.index(n) for n in rows], names, **options)
