"""Writes what `test_adapterhub.py` reads: adapters of random small models, saved by AdapterHub's `adapters` itself.

Run in an environment of its own (adapters 1.3.0, transformers 4.57.6): python make.py FOLDER. For each model a folder
with the model, `inputs` and the last hidden state without an adapter; in it one folder per configuration, as
`save_adapter(..., use_safetensors=True)` writes it, and the last hidden state with that adapter.
"""

import sys
from pathlib import Path

import adapters
import torch
from safetensors.torch import save_file
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
)

D, F, V = 16, 24, 40
BERT_LIKE = dict(hidden_size=D, intermediate_size=F, num_hidden_layers=2, num_attention_heads=2, vocab_size=V)
MODELS = {
    "bert": lambda: BertModel(BertConfig(**BERT_LIKE, max_position_embeddings=16)),
    "roberta": lambda: RobertaModel(RobertaConfig(**BERT_LIKE, max_position_embeddings=18)),
    "bart": lambda: BartModel(
        BartConfig(
            d_model=D, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=F, decoder_ffn_dim=F, vocab_size=V, max_position_embeddings=16,
        )
    ),
    "t5": lambda: T5Model(
        T5Config(d_model=D, d_ff=F, d_kv=8, num_heads=2, num_layers=2, vocab_size=V, decoder_start_token_id=0)
    ),
    "gpt2": lambda: GPT2Model(GPT2Config(n_embd=D, n_layer=2, n_head=2, vocab_size=V, n_positions=16)),
    "llama": lambda: LlamaModel(LlamaConfig(**BERT_LIKE, max_position_embeddings=16)),
}  # fmt: skip
CONFIGS = {
    "seq_bn": "seq_bn[reduction_factor=4]",
    "double_seq_bn": "double_seq_bn[reduction_factor=4]",
    "par_bn": "par_bn[reduction_factor=4]",
    "scaled_par_bn": "scaled_par_bn[reduction_factor=4]",
}


def hidden(model, inputs):
    with torch.no_grad():
        return model(**inputs).last_hidden_state.contiguous()


def main(folder: Path) -> None:
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():  # the usual initialisation is so small that a wrong place would hardly show
            for parameter in model.parameters():
                parameter.copy_(
                    torch.randn_like(parameter) * (0.5 if parameter.dim() > 1 else 0.2) + (parameter.dim() == 1)
                )
        model.save_pretrained(folder / name)
        inputs = {"input_ids": torch.randint(3, V, (2, 7))}
        if name in ("bart", "t5"):
            inputs["decoder_input_ids"] = torch.randint(3, V, (2, 5))
        tensors = inputs | {"without": hidden(model, inputs)}
        adapters.init(model)
        for config_name, config in CONFIGS.items():
            model.add_adapter(config_name, config=config)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if f".{config_name}." in key:
                        parameter.copy_(torch.randn_like(parameter) * 0.4)
            model.set_active_adapters(config_name)
            tensors[config_name] = hidden(model, inputs)
            model.save_adapter(str(folder / name / config_name), config_name, use_safetensors=True, with_head=False)
            model.set_active_adapters(None)
        assert torch.equal(hidden(model, inputs), tensors["without"])
        save_file(tensors, folder / name / "outputs.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
