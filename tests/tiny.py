"""What the tests of training share: a tiny model, batches and windows with fresh numbers, ways to look at a run."""

from dataclasses import replace

import numpy as np
import torch

from minigpt_lib.model.gpt import GPTConfig, GPTLanguageModel
from minigpt_lib.training.data import TokenWindows

V, T = 61, 12
TINY = GPTConfig(vocab_size=V, n_ctx=16, n_embd=24, n_layer=2, n_head=3)


def build(seed: int, **changes) -> GPTLanguageModel:
    """A tiny model whose weights, biases and LayerNorm's included, are large enough that all of them matter."""
    gen = torch.Generator().manual_seed(seed)
    model = GPTLanguageModel(replace(TINY, **changes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = name.endswith("weight") and p.dim() == 1
            p.copy_(torch.randn(p.shape, generator=gen) * 0.15 + gain)
    return model


def windows_of(seed: int, batch_size: int = 4, n: int = 500) -> TokenWindows:
    tokens = np.random.default_rng(seed).integers(V, size=n).astype(np.uint16)
    return TokenWindows(tokens, window=T, batch_size=batch_size, seed=seed)


def batch_of(seed: int, rows: int, share: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and targets, of which about `share` count (at least one)."""
    gen = torch.Generator().manual_seed(seed)
    idx, targets = torch.randint(V, (2, rows, T), generator=gen)
    masked = targets.masked_fill(torch.rand(rows, T, generator=gen) >= share, -100)
    masked[0, -1] = targets[0, -1]
    return idx, masked


def flat(model: GPTLanguageModel) -> torch.Tensor:
    """All parameters in one row, without their gradients."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def losses(history: list[dict[str, float]]) -> list[float]:
    return [record["loss"] for record in history]
