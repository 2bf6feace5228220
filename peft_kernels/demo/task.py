"""The demo's task: a byte-level Llama, trained from scratch on English, and what is measured about such a model.

Loss = mean cross entropy of the next byte; bits per byte = loss / ln 2. Every random choice (weights, batches) comes
from the seed, and none from the arm that is being trained. How long everything takes is set in SIZES and only there.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_kernels import memory
from peft_kernels.demo.corpus import Text


@dataclass(frozen=True)
class Size:
    """The model, and how many steps each part of the demo takes."""

    base_steps: int = 240  # training the base model on English
    adapt_steps: int = 36  # adapting it to one domain, for each of the three arms
    extra_steps: int = 20  # the same where only the time and the loss curves are compared
    method_domains: int = 4  # on which methods are compared with each other
    method_steps: int = 16  # of each of them there
    method_batch: int = 8
    hidden: int = 256
    intermediate: int = 704
    layers: int = 4
    heads: int = 4
    batch: int = 16
    window: int = 128  # bytes in a row of a batch
    held_out_windows: int = 96
    generated: int = 32  # bytes that each arm writes, three times, and each row of the mixed batch once
    decode_rows: int = 64  # of the batches in which many adapters are timed
    decode_steps: int = 12  # of one generation there
    decode_turns: int = 4  # generations of each arm

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=256,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=4 * self.window,
            tie_word_embeddings=True,
            initializer_range=0.06,  # 1 / sqrt(hidden); with the usual 0.02 so few steps end half a bit higher
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )


SIZES = {
    "full": Size(),
    "quick": Size(
        base_steps=100,
        adapt_steps=14,
        extra_steps=8,
        method_domains=1,
        method_steps=8,
        batch=8,
        held_out_windows=48,
        generated=16,
        decode_rows=16,
        decode_steps=6,
        decode_turns=3,
    ),
}


def batches(data: Tensor, size: Size, steps: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Random windows of a text: int64 [batch, window], the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(size.window)
    for _ in range(steps):
        starts = torch.randint(len(data) - size.window, (size.batch, 1), generator=generator)
        yield data[starts + offsets].long().to(device)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch, labels=batch, use_cache=False).loss


def train_base(text: Text, size: Size, seed: int, device: torch.device, tick: Callable) -> LlamaForCausalLM:
    """The base model: AdamW, 5 % warm-up, then a cosine down to a tenth. Calls `tick(loss)` after every step."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(size.config()).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    warm_up = max(1, size.base_steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.55 + 0.45 * math.cos(math.pi * step / size.base_steps)),
    )
    for batch in batches(text.train, size, size.base_steps, seed, device):
        loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        tick(loss.item())
    return model.eval()


@torch.no_grad()
def held_out_bits(model: nn.Module, text: Text, size: Size, device: torch.device) -> float:
    """Bits per byte on the held-out text: windows spread evenly over it."""
    model.eval()
    data = text.held_out
    count = min(size.held_out_windows, len(data) // size.window)
    starts = torch.linspace(0, len(data) - size.window, count).long().unsqueeze(1)
    windows = data[starts + torch.arange(size.window)].long().to(device)  # [count, window]
    losses = [loss_of(model, part).item() * len(part) for part in windows.split(size.batch)]
    return sum(losses) / count / math.log(2)


@torch.no_grad()
def write(model: nn.Module, prompt: Tensor, size: Size) -> Tensor:
    """The `generated` most likely bytes after a prompt [1, T]: one row at a time, as in a chat."""
    model.eval()
    ids = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=size.generated,
        do_sample=False,
        pad_token_id=0,
    )
    return ids[0, prompt.shape[1] :]


def readable(ids: Tensor) -> str:
    return bytes(ids.tolist()).decode("latin-1")


def wait(device: torch.device) -> None:
    """Until what was asked of a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def saved_bytes(model: nn.Module, batch: Tensor) -> int:
    """Bytes that autograd keeps from forward to backward in a training step, without the parameters'."""
    model.train()
    return memory.saved_bytes(lambda: loss_of(model, batch), model.parameters())
