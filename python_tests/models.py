"""Tiny random models of every type that patching knows, and the comparison of a patched one with plain PEFT.

The comparison holds no tolerance: with `exact` the PEFT model in fp64, a patched model may be off by twice what plain
PEFT is off in the same dtype, plus what rounding each term of the longest sum once costs.
"""

import copy

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import peft_kernels

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
            if "lora_" in name and parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5 / 4)
            elif "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model


def peft_model(name: str, base_changes: dict | None = None, **changes) -> nn.Module:
    return randomise(get_peft_model(base_model(name, **base_changes or {}), lora_config(**changes)))


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


class Mask(nn.Module):
    """A dropout that keeps what the op keeps."""

    def __init__(self, seed, p, stream):
        super().__init__()
        self.seed, self.p, self.stream = seed, p, stream

    def forward(self, x):
        keep = peft_kernels.lora_dropout_mask(self.seed, x.numel() // x.shape[-1], x.shape[-1], self.p, self.stream)
        kept_of_65536 = max(1, int((1 - self.p) * 65536 + 0.5))
        return x * keep.view(x.shape) * (65536 / kept_of_65536)
