"""Attention against PyTorch's own implementations, slow loops, and what a mask must guarantee."""

import math
import random

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from oracles import AppendingStore, assert_close
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from minigpt_lib.model.attention import CausalSelfAttention, KVStore, attention, causal_mask, fused_attention

LENGTHS = [(1, 1), (2, 2), (9, 9), (1, 7), (3, 8), (7, 8)]  # (T, S)


@pytest.fixture(autouse=True)
def seeded(seed):
    random.seed(seed)


def some_qkv(T: int, S: int, hs: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(2, 3, n, hs, dtype=dtype) for n in (T, S, S))  # (B, nh, T or S, hs)


def by_loops_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`by_loops` for every batch row and head."""
    return torch.stack([torch.stack([by_loops(*h) for h in zip(*b, strict=True)]) for b in zip(q, k, v, strict=True)])


def by_loops(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head, (T, hs) and (S, hs), the T queries being the last of the S positions; the formula with plain loops."""
    T, S, rows = len(q), len(k), []
    for t in range(T):
        e = [torch.exp((q[t] * k[s]).sum() / math.sqrt(len(q[t]))) for s in range(S - T + t + 1)]
        rows.append(sum(w * v[s] for s, w in enumerate(e)) / sum(e))
    return torch.stack(rows)  # (T, hs)


def random_module(**options) -> CausalSelfAttention:
    n_head = random.choice([1, 2, 3, 4])
    module = CausalSelfAttention(n_head * random.choice([4, 8, 10]), n_head, **options)
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module


# ---- the mask ----


def test_causal_mask_is_the_end_of_the_full_triangle():
    for T, S in LENGTHS:
        mask = causal_mask(T, S)
        assert mask.dtype == torch.bool and mask.shape == (T, S)
        for t in range(T):
            assert mask[t].tolist() == [s <= S - T + t for s in range(S)]
    assert torch.equal(causal_mask(6), causal_mask(6, 6))


@pytest.mark.parametrize("T, S", [(5, 3), (0, 4), (0, 0)])
def test_causal_mask_refuses_impossible_lengths(T, S):
    with pytest.raises(ValueError, match=f"T={T} .*S={S} "):
        causal_mask(T, S)


# ---- the formula, explicit and fused ----


@pytest.mark.parametrize("T, S", LENGTHS)
@pytest.mark.parametrize("path", [lambda *a: attention(*a)[0], fused_attention], ids=["explicit", "fused"])
def test_causal_attention_equals_loops_and_pytorch(seed, path, T, S):
    q, k, v = some_qkv(T, S, dtype=torch.float64)
    y = path(q, k, v)
    loops = by_loops_all(q, k, v)
    assert_close(y, loops, 1e-12)
    assert_close(path(q.float(), k.float(), v.float()), loops.float())
    assert_close(y, F.scaled_dot_product_attention(q, k, v, causal_lower_right(T, S)), 1e-12)


@pytest.mark.parametrize("path", [lambda *a: attention(*a)[0], fused_attention], ids=["explicit", "fused"])
def test_any_boolean_mask_is_respected(seed, path):
    q, k, v = some_qkv(6, 9)
    mask = torch.rand(2, 1, 6, 9) < 0.4
    mask[..., 0] |= ~mask.any(-1)  # no empty row
    assert_close(path(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask))
    elsewhere = v.masked_fill(~mask.any(dim=2)[..., None], 1e4)  # keys that nobody may look at
    assert_close(path(q, k, elsewhere, mask), path(q, k, v, mask))


def test_weights_are_a_distribution_over_the_allowed_keys(seed):
    q, k, v = some_qkv(5, 8)
    y, att = attention(q, k, v)
    assert_close(att.sum(-1), torch.ones(2, 3, 5), 1e-6)
    assert (att[..., ~causal_mask(5, 8)] == 0).all() and (att[..., causal_mask(5, 8)] > 0).all()
    assert_close(att @ v, y)


def test_scores_are_divided_by_the_root_of_the_head_width(seed):
    hs = random.choice([4, 16, 64])
    q, k = torch.zeros(1, hs), torch.zeros(2, hs)  # (T, hs), (S, hs)
    q[0, 0], k[1, 0] = 3.0, 5.0
    _, att = attention(q, k, torch.zeros(2, hs))
    assert math.isclose(att[0, 1].item(), 1 / (1 + math.exp(-15 / math.sqrt(hs))), rel_tol=1e-5)


@pytest.mark.parametrize("T, S", LENGTHS)
def test_gradients_equal_pytorch_and_loops(seed, T, S):
    data, weight = some_qkv(T, S, dtype=torch.float64), torch.randn(2, 3, T, 12, dtype=torch.float64)

    def gradients(f) -> list[Tensor]:
        inputs = [a.clone().requires_grad_() for a in data]
        return list(torch.autograd.grad((f(*inputs) * weight).sum(), inputs))

    oracle = gradients(by_loops_all)
    for f in (lambda *a: attention(*a)[0], fused_attention):
        for a, b in zip(gradients(f), oracle, strict=True):
            assert_close(a, b, 1e-11)


def test_gradcheck_of_the_explicit_formula(seed):
    inputs = [torch.randn(n, 2, dtype=torch.float64, requires_grad=True) for n in (2, 4, 4)]
    assert torch.autograd.gradcheck(lambda *a: attention(*a)[0], inputs)


def test_large_scores_do_not_overflow(seed):
    q, k, v = some_qkv(6, 6)
    assert attention(q * 1e4, k, v)[0].isfinite().all() and fused_attention(q * 1e4, k, v).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(seed, dtype):
    q, k, v = some_qkv(4, 6, dtype=dtype)
    tol = 6e-2 if dtype == torch.bfloat16 else 1e-12
    assert attention(q, k, v)[0].dtype == fused_attention(q, k, v).dtype == dtype
    assert_close(attention(q, k, v)[0].double(), fused_attention(q, k, v).double(), tol)


@pytest.mark.parametrize("path", [lambda *a: attention(*a)[0], fused_attention], ids=["explicit", "fused"])
def test_dropout_acts_on_the_weights(seed, path):
    q, k, p = torch.randn(1, 400, 8), torch.randn(1, 400, 8), random.uniform(0.2, 0.6)
    v = torch.eye(400)[None]  # (1, S, S): the output is the weights themselves
    full = attention(q, k, v)[1]
    y = path(q, k, v, None, p)
    allowed, dropped = causal_mask(400), y[0] == 0
    share = dropped[allowed].float().mean().item()
    assert abs(share - p) < 0.01, f"{share:.3f} dropped at p={p:.3f}"  # of 80,200 weights: 0.01 is more than 5 sigma
    assert_close(y[0][~dropped], full[0][~dropped] / (1 - p))


# ---- the module ----


def test_module_equals_pytorchs_multihead_attention(seed):
    module = random_module()
    C = module.n_embd
    oracle = nn.MultiheadAttention(C, module.n_head, batch_first=True)
    oracle.load_state_dict({
        "in_proj_weight": module.c_attn.weight,
        "in_proj_bias": module.c_attn.bias,
        "out_proj.weight": module.c_proj.weight,
        "out_proj.bias": module.c_proj.bias,
    })  # fmt: skip
    x, weight = torch.randn(3, 11, C), torch.randn(3, 11, C)
    want, att = oracle(x, x, x, attn_mask=~causal_mask(11), average_attn_weights=False)
    (want * weight).sum().backward()
    for module.fused in (True, False):
        module.zero_grad()
        y = module(x)
        (y * weight).sum().backward()
        assert_close(y, want)
        assert_close(module.c_attn.weight.grad, oracle.in_proj_weight.grad, 1e-4)
        assert_close(module.c_attn.bias.grad, oracle.in_proj_bias.grad, 1e-4)
        assert_close(module.c_proj.weight.grad, oracle.out_proj.weight.grad, 1e-4)
        assert_close(module.c_proj.bias.grad, oracle.out_proj.bias.grad, 1e-4)
    assert_close(attention(*module.heads(x))[1], att)


@pytest.mark.parametrize("fused", [True, False])
def test_a_later_token_cannot_change_an_earlier_output(seed, fused):
    module = random_module(fused=fused).eval()
    x = torch.randn(2, 10, module.n_embd)
    t = random.randrange(1, 10)
    other = x.clone()
    other[:, t:] = torch.randn(2, 10 - t, module.n_embd)
    assert torch.equal(module(x)[:, :t], module(other)[:, :t])
    assert not torch.allclose(module(x)[:, t:], module(other)[:, t:], atol=1e-3)


@pytest.mark.parametrize("fused", [True, False])
def test_every_earlier_token_reaches_an_output_and_no_later_one(seed, fused):
    module = random_module(fused=fused)
    x = torch.randn(1, 6, module.n_embd, requires_grad=True)
    y = module(x)
    for t in range(6):
        (slope,) = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)
        reach = slope[0].abs().amax(-1)  # (T,)
        assert (reach[: t + 1] > 0).all() and (reach[t + 1 :] == 0).all()


@pytest.mark.parametrize("fused", [True, False])
def test_a_text_in_pieces_equals_the_whole(seed, fused):
    module = random_module(fused=fused).eval()
    x, layer = torch.randn(2, 12, module.n_embd), random.randrange(5)
    store: KVStore = AppendingStore()
    pieces = [module(piece, kv_cache=store, layer=layer) for piece in x.split([5, 1, 4, 2], dim=1)]
    assert_close(torch.cat(pieces, dim=1), module(x))
    assert list(store.kept) == [layer] and store.kept[layer][0].size(2) == 12
    assert not torch.allclose(pieces[1], module(x[:, 5:6]), atol=1e-3)  # the store was read, not only written


def test_module_dropout_only_while_training(seed):
    module = random_module(dropout=0.5)
    x = torch.randn(2, 8, module.n_embd)
    for module.fused in (True, False):
        module.train()
        assert not torch.equal(module(x), module(x))
        module.eval()
        assert torch.equal(module(x), module(x))
    module.train()
    nn.init.zeros_(module.c_proj.weight)
    nn.init.ones_(module.c_proj.bias)
    assert set(module(x).unique().tolist()) == {0.0, 2.0}  # dropout on the result, too


def test_dropout_of_the_module_reaches_the_weights(seed):
    for fused in (True, False):
        module = random_module(dropout=0.5, fused=fused)
        module.resid_dropout.p = 0.0
        x = torch.randn(2, 8, module.n_embd)
        assert not torch.allclose(module(x), module(x), atol=1e-4)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"n_embd": 768, "n_head": 7}, ["n_embd=768", "n_head=7"]),
        ({"n_embd": 8, "n_head": 0}, ["n_head=0"]),
        ({"n_embd": 0, "n_head": 2}, ["n_embd=0"]),
        ({"n_embd": 8, "n_head": 2, "dropout": 1.0}, ["dropout=1.0", "[0, 1)"]),
        ({"n_embd": 8, "n_head": 2, "dropout": -0.1}, ["dropout=-0.1", "[0, 1)"]),
    ],
)
def test_wrong_sizes_are_refused(arguments, words):
    with pytest.raises(ValueError) as error:
        CausalSelfAttention(**arguments)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("shape", [(2, 9, 32), (9, 24), (1, 2, 9, 24)])
def test_an_input_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="n_embd=24") as error:
        CausalSelfAttention(24, 3)(torch.zeros(shape))
    assert str(shape) in str(error.value)
