"""Exercises of 02, attention."""


import torch

from exercises.checking import Exercise


def qkv(seed: int, T: int = 7, S: int = 7, hs: int = 5) -> list[torch.Tensor]:
    """Queries (2, 3, T, hs), keys and values (2, 3, S, hs), of norms that are not 1."""
    torch.manual_seed(seed)
    return [2 * torch.randn(2, 3, n, hs) for n in (T, S, S)]


def mask_oracle(seed: int) -> list:
    return [torch.ones(t, t).tril().bool() for t in (1, 4, 7)]


EXERCISES = (
    Exercise(
        name="02.causal_mask",
        title="which keys a query may see",
        target="causal_mask",
        minutes=5,
        level=1,
        module="minigpt_lib.model.attention",
        against="torch.tril",
        run=lambda f, seed: [f(t) for t in (1, 4, 7)],
        expected=mask_oracle,
        mistakes=(),
        hints=("Row t may use columns 0 to t.",),
    ),
)
