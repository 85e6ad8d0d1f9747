"""Small random models and prompts that the tests of decoding share, and decoding as slow and plain as can be."""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from minigpt_lib.generation.kv_cache import KVCache
from minigpt_lib.model.gpt import GPTConfig, GPTLanguageModel
from minigpt_lib.weights.convert import config_to_hf, to_hf_state

CONFIG = GPTConfig(vocab_size=71, n_ctx=64, n_embd=32, n_layer=3, n_head=4, dropout=0.3)


def random_model(config: GPTConfig = CONFIG) -> GPTLanguageModel:
    """Fresh random weights in every tensor; strong positions, so that greedy text does not repeat one token."""
    model = GPTLanguageModel(config).eval()
    for name, p in model.named_parameters():
        p.data.normal_(0, 1.0 if name == "wpe.weight" else 0.3 if p.dim() == 2 else 0.1)
        if ".ln_" in name or name == "ln_f.weight":
            p.data += name.endswith("weight")
    return model


def twin_of(model: GPTLanguageModel) -> GPT2LMHeadModel:
    """Transformers' GPT-2 with the same weights."""
    twin = GPT2LMHeadModel(GPT2Config(**config_to_hf(model.config))).eval().to(model.wpe.weight.dtype)
    twin.transformer.load_state_dict(to_hf_state(model.state_dict()))
    twin.tie_weights()
    return twin


def prompt(T: int, B: int = 1) -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, (B, T))  # (B, T)


def pad(rows: list[torch.Tensor], value: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (1, T_i) -> left-padded (B, T) and the mask (B, T)."""
    T = max(row.size(1) for row in rows)
    idx = torch.cat([F.pad(row, (T - row.size(1), 0), value=value) for row in rows])  # (B, T)
    return idx, torch.stack([torch.arange(T) >= T - row.size(1) for row in rows]).long()


@torch.no_grad()
def greedy_slow(model: GPTLanguageModel, idx: torch.Tensor, n: int) -> torch.Tensor:
    for _ in range(n):
        idx = torch.cat([idx, model(idx)[0][:, -1:].argmax(-1)], dim=1)  # (B, T + 1)
    return idx


def rounded(model: GPTLanguageModel, weights: str | None) -> GPTLanguageModel:
    """The oracle for smaller weights: a plain float32 model that holds the rounded numbers."""
    twin = copy.deepcopy(model)
    for layer in (m for m in twin.modules() if isinstance(m, nn.Linear)):
        w = layer.weight.data
        if weights == "bfloat16":
            layer.weight.data = w.bfloat16().float()
        elif weights == "int8":
            step = w.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
            layer.weight.data = (w / step).round() * step
    twin.wte.weight = twin.lm_head.weight
    return twin


def one_by_one(model: GPTLanguageModel, idx: torch.Tensor, T: int = 1, **options) -> torch.Tensor:
    """Logits (B, n, V) of a prefill of 5 tokens and then steps of T."""
    cache = KVCache.for_model(model, idx.size(0), **options)
    with torch.inference_mode():
        rows = [model(part, kv_cache=cache)[0] for part in (idx[:, :5], *idx[:, 5:].split(T, dim=1))]
    return torch.cat(rows, dim=1)
