"""Exercises of 02, attention."""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from exercises.checking import Exercise, Mistake

MODULE = "minigpt_lib.model.attention"
T, C, HS = 7, 24, 5  # all different, so that a mistake in one shows


def one_head_inputs() -> list[torch.Tensor]:
    return [torch.randn(T, C), *(torch.randn(C, HS) / 2 for _ in range(3))]


def one_head_oracle(seed: int) -> torch.Tensor:
    x, W_q, W_k, W_v = one_head_inputs()
    return F.scaled_dot_product_attention(x @ W_q, x @ W_k, x @ W_v, is_causal=True)


def mask_oracle(seed: int) -> list[torch.Tensor]:
    sizes = ((1, 1), (T, T), (3, T), (1, T))
    return [torch.tensor([[s <= S - t + i for s in range(S)] for i in range(t)]) for t, S in sizes]


def qkv(queries: int = T) -> list[torch.Tensor]:
    """Queries (2, 3, queries, HS), keys and values (2, 3, T, HS), of norms that are not 1."""
    return [1.5 * torch.randn(2, 3, n, HS) for n in (queries, T, T)]


def attention_run(f, seed: int) -> list[torch.Tensor]:
    return [*f(*qkv()), *f(*qkv(3)), *f(*qkv(), mask=own_text_mask())]


def attention_oracle(seed: int) -> list[torch.Tensor]:
    """All queries, the last three of them alone, and a mask of one's own; values of one place each show the weights."""
    eye, causal, results = torch.eye(T).expand(2, 3, T, T), torch.ones(T, T).tril().bool(), []
    for queries, mask in ((T, causal), (3, causal[-3:]), (T, own_text_mask())):
        q, k, v = qkv(queries)
        results += [F.scaled_dot_product_attention(q, k, values, mask) for values in (v, eye)]
    return results


def module_of(cls: Callable[[int, int], nn.Module]) -> nn.Module:
    """Attention of 4 heads of 6 channels, its biases large enough to matter; the same for the same seed of torch."""
    module, gen = cls(C, 4), torch.Generator().manual_seed(torch.initial_seed())
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=gen) / 3)
    torch.manual_seed(torch.initial_seed())  # what comes next does not depend on how the module was made
    return module


class Reference(nn.Module):
    """The same parameters, the computation by PyTorch's own module."""

    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.n_head = n_head

    def forward(self, x: torch.Tensor, forbidden: torch.Tensor) -> torch.Tensor:
        return F.multi_head_attention_forward(
            *[x.transpose(0, 1)] * 3,
            C,
            self.n_head,
            self.c_attn.weight,
            self.c_attn.bias,
            None,
            None,
            False,
            0.0,
            self.c_proj.weight,
            self.c_proj.bias,
            need_weights=False,
            attn_mask=forbidden,
        )[0].transpose(0, 1)


def own_text_mask() -> torch.Tensor:
    """(T, T), True = may look: two texts in one row, of 4 and 3 tokens, each causal."""
    text = torch.tensor([0] * 4 + [1] * 3)
    return torch.ones(T, T).tril().bool() & (text[:, None] == text)


class Store:
    """Keeps the keys and values of layer 3 and counts its calls."""

    def __init__(self):
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert layer == 3, f"layer {layer}: the store is for the layer that the caller names, 3"
        self.kept.append((k, v))
        return tuple(torch.cat(parts, 2) for parts in zip(*self.kept, strict=True))


def module_run(cls: type, seed: int) -> list[torch.Tensor]:
    module, x, store = module_of(cls).eval(), torch.randn(2, T, C), Store()
    pieces = [module(piece, kv_cache=store, layer=3) for piece in x.split([3, 1, T - 4], dim=1)]
    explicit = module_of(lambda *sizes: cls(*sizes, dropout=0.5, fused=False)).eval()
    return [module(x), module(x, own_text_mask()), torch.cat(pieces, 1), explicit(x)]


def module_oracle(seed: int) -> list[torch.Tensor]:
    module, x = module_of(Reference), torch.randn(2, T, C)
    whole = module(x, ~torch.ones(T, T).tril().bool())
    own = module(x, ~own_text_mask())
    explicit = module_of(Reference)
    return [whole, own, whole, explicit(x, ~torch.ones(T, T).tril().bool())]


def heads_oracle(seed: int) -> list[list]:
    """By a loop over every number: channel h * 6 + i of q is channel i of head h."""
    module, x = module_of(Reference), torch.randn(2, T, C)
    rows = module.c_attn(x)  # (2, T, 3C)
    return [
        torch.stack([torch.stack([part[:, :, h * 6 + i] for i in range(6)], -1) for h in range(4)], 1)
        for part in (rows[..., :C], rows[..., C : 2 * C], rows[..., 2 * C :])
    ]


EXERCISES = (
    Exercise(
        name="02.one_head",
        title="one head: who looks at whom, and what is fetched",
        target="one_head",
        minutes=10,
        level=2,
        module=MODULE,
        against=f"torch's scaled_dot_product_attention, T={T}, C={C}, hs={HS}",
        run=lambda f, seed: f(*one_head_inputs()),
        expected=one_head_oracle,
        mistakes=(
            Mistake(
                f"dividing by √C = √{C} gives: the scale is √d_k, the width of one head ({HS} here).",
                "math.sqrt(q.size(-1))",
                "math.sqrt(x.size(-1))",
            ),
            Mistake("scores without a scale give: divide them by √d_k.", " / math.sqrt(q.size(-1))", ""),
            Mistake(
                "looking into the future gives: no score has been crossed out.",
                ".masked_fill(~may_look, -math.inf)",
                "",
            ),
            Mistake("crossing out the past gives: keep the lower triangle, not the upper.", ".tril()", ".triu()"),
            Mistake(
                "a softmax over the queries gives: each row of weights, not each column, adds up to 1.",
                ".softmax(dim=-1)",
                ".softmax(dim=0)",
            ),
        ),
        hints=(
            "Write the shape after every line first; only one product of q and k gives (T, T).",
            "Four steps: project, score, cross out, fetch. Crossed out is −∞, before the softmax.",
        ),
    ),
    Exercise(
        name="02.causal_mask",
        title="which keys a query may see, also when only the last queries are asked for",
        target="causal_mask",
        minutes=8,
        level=2,
        module=MODULE,
        against="a loop over all pairs",
        run=lambda f, seed: [f(1), f(T), f(3, T), f(1, T)],
        expected=mask_oracle,
        mistakes=(
            Mistake(
                "a query that may not see itself gives: the diagonal belongs to it.", ".tril(S - T)", ".tril(S - T - 1)"
            ),
            Mistake(
                "a triangle in the upper left corner gives: the T queries are the last of the S positions.",
                ".tril(S - T)",
                ".tril()",
            ),
            Mistake(
                "True for what is forbidden gives: here True means may look.",
                "return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)",
                "return ~torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)",
            ),
        ),
        hints=(
            "Query i of the T stands at position S - T + i, and sees the keys up to there.",
            "`torch.ones(T, S).tril(k)` keeps the k-th diagonal above the main one, and all below it.",
        ),
    ),
    Exercise(
        name="02.attention",
        title="the finished formula, for any number of heads and rows at once",
        target="attention",
        minutes=10,
        level=2,
        module=MODULE,
        against=f"torch's scaled_dot_product_attention, (2, 3, {T}, {HS})",
        run=attention_run,
        expected=attention_oracle,
        mistakes=(
            Mistake("dividing by d_k gives: the scale is its root.", "math.sqrt(q.size(-1))", "q.size(-1)"),
            Mistake(
                "a softmax over the queries gives: the weights of one query add up to 1.", "dim=-1)\n", "dim=-2)\n"
            ),
            Mistake(
                "a score of 0 for forbidden keys gives: e^0 is 1, and they are still seen. Only −∞ becomes 0.",
                'float("-inf")',
                "0.0",
            ),
            Mistake(
                "multiplying the scores with the mask after the softmax gives: the weights no longer add up to 1.",
                '.masked_fill(~mask, float("-inf")).softmax(dim=-1)',
                ".softmax(dim=-1) * mask",
            ),
        ),
        hints=(
            "Everything before the last two dimensions is only carried along: transpose the last two of k.",
            "Return two things: what was fetched, and the weights.",
        ),
    ),
    Exercise(
        name="02.split_heads",
        title="one product for q, k and v of all heads, and how it is taken apart",
        target="CausalSelfAttention.heads",
        minutes=12,
        level=3,
        module=MODULE,
        against="a loop over heads and channels",
        run=lambda cls, seed: list(module_of(cls).heads(torch.randn(2, T, C))),
        expected=heads_oracle,
        mistakes=(
            Mistake(
                "reshaping to (B, nh, T, hs) at once gives: positions and heads get mixed. Split C, then swap.",
                ".view(B, T, self.n_head, C // self.n_head).transpose(1, 2)",
                ".reshape(B, self.n_head, T, C // self.n_head)",
            ),
            Mistake(
                "heads that take every 4th channel give: head h owns the channels h * hs to (h + 1) * hs - 1.",
                ".view(B, T, self.n_head, C // self.n_head).transpose(1, 2)",
                ".view(B, T, C // self.n_head, self.n_head).permute(0, 3, 1, 2)",
            ),
            Mistake(
                "keys in the place of queries give: c_attn holds q, k and v in this order.",
                "q, k, v = self.c_attn(x)",
                "k, q, v = self.c_attn(x)",
            ),
        ),
        hints=(
            "`split(C, dim=-1)` gives q, k and v, (B, T, C) each.",
            "(B, T, C) is (B, T, nh, hs) in memory; only then may the heads come before the positions.",
        ),
    ),
    Exercise(
        name="02.module",
        title="the module: split, attend, join, project",
        target="CausalSelfAttention.forward",
        minutes=15,
        level=3,
        module=MODULE,
        against="torch's multi_head_attention_forward with the same weights, without and with a mask",
        run=module_run,
        expected=module_oracle,
        mistakes=(
            Mistake(
                "joining without swapping back gives: heads and positions change places before the reshape.",
                "y.transpose(1, 2).reshape(x.shape)",
                "y.reshape(x.shape)",
            ),
            Mistake(
                "leaving c_proj out gives: the heads' outputs are still to be mixed.",
                "self.c_proj(y.transpose(1, 2).reshape(x.shape))",
                "y.transpose(1, 2).reshape(x.shape)",
            ),
            Mistake(
                "ignoring the mask gives: hand it on.",
                "y = fused_attention(q, k, v, mask, dropout_p)",
                "y = fused_attention(q, k, v, None, dropout_p)",
            ),
            Mistake(
                "adding x gives: the residual is the block's business, in notebook 03.",
                "return self.resid_dropout(",
                "return x + self.resid_dropout(",
            ),
        ),
        hints=(
            "`heads` gives q, k, v with the heads before the positions; `fused_attention` keeps that order.",
            "Undo the split by the same two steps backwards.",
        ),
    ),
)
