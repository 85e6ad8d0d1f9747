"""GPT-2 against Hugging Face's with the same random weights, and everything the model promises about its inputs."""

import copy
import math
import random
from dataclasses import FrozenInstanceError
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from oracles import AppendingStore, assert_close
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GPT2Config, GPT2LMHeadModel

from minigpt_lib.model.gpt import (
    MLP,
    PRESETS,
    Block,
    GPTConfig,
    GPTLanguageModel,
    LayerNorm,
    check_input,
    next_token_loss,
    padding_mask,
)


@pytest.fixture(autouse=True)
def seeded(seed):
    random.seed(seed)


def tiny_config(**changes) -> GPTConfig:
    n_head = random.choice([1, 2, 3, 4])
    sizes = {"vocab_size": random.randint(50, 120), "n_ctx": 32, "n_embd": n_head * random.choice([8, 12, 16])}
    return GPTConfig(**(sizes | {"n_head": n_head, "n_layer": random.randint(1, 4)} | changes))


@torch.no_grad()
def randomize(model: nn.Module, std: float = 0.1) -> None:
    """All parameters at random: fresh biases (0) and norms (1) would hide mistakes."""
    for name, p in model.named_parameters():
        p.normal_(1.0 if p.dim() == 1 and name.endswith("weight") else 0.0, std)


def tiny_model(**changes) -> GPTLanguageModel:
    model = GPTLanguageModel(tiny_config(**changes))
    randomize(model)
    return model.eval()


def hugging_face(config: GPTConfig) -> GPT2LMHeadModel:
    """Transformers' GPT-2 of the same shape."""
    shape = {"vocab_size": config.vocab_size, "n_positions": config.n_ctx, "n_embd": config.n_embd}
    depth = {"n_layer": config.n_layer, "n_head": config.n_head, "bos_token_id": 0, "eos_token_id": 0}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**shape, **depth, **dropout)).eval()


def is_transposed(name: str, p: Tensor) -> bool:
    return p.dim() == 2 and name.startswith("h.")


@torch.no_grad()
def pair(config: GPTConfig, std: float = 0.1) -> tuple[GPTLanguageModel, GPT2LMHeadModel]:
    """This model and Hugging Face's with the same random weights, every parameter accounted for."""
    theirs, ours = hugging_face(config), GPTLanguageModel(config).eval()
    randomize(theirs, std)
    own = dict(ours.named_parameters())
    for name, p in theirs.transformer.named_parameters():
        own.pop(name).copy_(p.T if is_transposed(name, p) else p)
    assert not own, f"parameters that Hugging Face does not have: {list(own)}"
    return ours, theirs


def some_ids(model: GPTLanguageModel, B: int = 2, T: int = 20) -> Tensor:
    return torch.randint(model.config.vocab_size, (B, T))


# ---- against Hugging Face ----


@pytest.mark.parametrize("fused", [True, False])
def test_logits_and_every_hidden_state_equal_hugging_face(fused):
    ours, theirs = pair(tiny_config())
    for block in ours.h:
        block.attn.fused = fused
    idx = some_ids(ours, T=ours.config.n_ctx)  # all positions
    with torch.no_grad():
        want = theirs(idx, output_hidden_states=True)
        assert_close(ours(idx)[0], want.logits)
        assert_close(ours.hidden_states(idx), want.hidden_states[-1])
        x = ours.wte(idx) + ours.wpe.weight
        for i, block in enumerate(ours.h):
            assert_close(x, want.hidden_states[i])
            x = block(x)
    assert want.logits.std() > 0.1  # not a comparison of zeros


def test_parts_equal_hugging_face():
    ours, theirs = pair(tiny_config(n_layer=2))
    x = torch.randn(2, 7, ours.config.n_embd)
    for mine, other in zip(ours.h, theirs.transformer.h, strict=True):
        assert_close(mine.ln_1(x), other.ln_1(x))
        assert_close(mine.mlp(x), other.mlp(x))
        assert_close(mine(x), other(x)[0] if isinstance(other(x), tuple) else other(x))


def test_gradients_equal_hugging_face():
    ours, theirs = pair(tiny_config())
    idx, targets = some_ids(ours), some_ids(ours)
    _, loss = ours(idx, targets)
    other = F.cross_entropy(theirs(idx).logits.flatten(0, 1), targets.flatten())
    assert_close(loss, other)
    loss.backward()
    other.backward()
    for name, p in theirs.transformer.named_parameters():
        mine = ours.get_parameter(name).grad
        assert mine.abs().max() > 0, f"no gradient for {name}"
        assert_close(mine, p.grad.T if is_transposed(name, p) else p.grad)


def test_left_padding_equals_hugging_face_with_its_position_ids():
    ours, theirs = pair(tiny_config())
    idx, attention_mask = some_ids(ours, 3, 10), torch.ones(3, 10, dtype=torch.int64)
    attention_mask[1, :4] = 0
    attention_mask[2, :7] = 0
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        want = theirs(idx, attention_mask=attention_mask, position_ids=position_ids).logits
        logits, _ = ours(idx, attention_mask=attention_mask)
    real = attention_mask.bool()
    assert_close(logits[real], want[real])


def test_the_124m_shape_equals_hugging_face():
    ours, theirs = pair(GPTConfig.preset("gpt2"), std=0.03)
    idx = some_ids(ours, 1, 24)
    with torch.no_grad():
        logits, want = ours(idx)[0], theirs(idx).logits
    assert_close(logits, want, 1e-4)
    assert want.std() > 0.1 and ours.num_parameters() == 124_439_808


def test_parameter_names_are_gpt2s():
    config = tiny_config()
    theirs = [name for name, _ in hugging_face(config).transformer.named_parameters()]
    model = GPTLanguageModel(config)
    assert sorted(name for name, _ in model.named_parameters()) == sorted(theirs)
    assert sorted(model.state_dict()) == sorted([*theirs, "lm_head.weight"])


# ---- the parts ----


def test_layer_norm_equals_the_formula():
    C, eps = random.randint(2, 40), random.choice([1e-5, 1e-3])
    norm, x = LayerNorm(C, eps), torch.randn(3, 5, C) * 3 + 1
    randomize(norm)
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    assert_close(norm(x), (x - mean) / torch.sqrt(var + eps) * norm.weight + norm.bias)
    assert_close(norm(x), F.layer_norm(x, (C,), norm.weight, norm.bias, eps), 1e-6)


def test_the_config_sets_every_epsilon():
    model = GPTLanguageModel(tiny_config(layer_norm_epsilon=0.25))
    norms = [m for m in model.modules() if isinstance(m, LayerNorm)]
    assert len(norms) == 2 * model.config.n_layer + 1 and all(norm.eps == 0.25 for norm in norms)
    assert GPTConfig().layer_norm_epsilon == 1e-5


def test_mlp_uses_the_tanh_form():
    mlp, x = MLP(12), torch.randn(4, 6, 12) * 3
    for p in mlp.parameters():
        nn.init.normal_(p, std=0.5)
    h = x @ mlp.c_fc.weight.T + mlp.c_fc.bias  # (B, T, 4C)
    tanh = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    exact = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    assert_close(mlp(x), tanh @ mlp.c_proj.weight.T + mlp.c_proj.bias)
    assert (mlp(x) - (exact @ mlp.c_proj.weight.T + mlp.c_proj.bias)).abs().max() > 1e-4


def test_both_residual_connections():
    config = tiny_config()
    block, x = Block(config), torch.randn(2, 6, config.n_embd)
    randomize(block)
    assert_close(block(x), (y := x + block.attn(block.ln_1(x))) + block.mlp(block.ln_2(y)), 1e-6)
    for layer in (block.attn.c_proj, block.mlp.c_proj):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    assert torch.equal(block(x), x)


# ---- what a position may know ----


def test_a_later_token_cannot_change_an_earlier_logit():
    model = tiny_model()
    idx, t = some_ids(model), random.randrange(1, 20)
    other = idx.clone()
    other[:, t:] = (idx[:, t:] + torch.randint(1, model.config.vocab_size, idx[:, t:].shape)) % model.config.vocab_size
    a, b = model(idx)[0], model(other)[0]
    assert torch.equal(a[:, :t], b[:, :t]) and not torch.allclose(a[:, t:], b[:, t:], atol=1e-3)


def test_order_matters():
    model = tiny_model()
    idx = torch.arange(12)[None]  # (1, T)
    swapped = idx[:, [1, 0, *range(2, 12)]]
    assert (model(idx)[0][:, -1] - model(swapped)[0][:, -1]).abs().max() > 1e-3


def test_padding_mask_and_positions():
    mask, positions = padding_mask(torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]), T=4)
    assert positions.tolist() == [[0, 1, 2, 3], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert mask.shape == (3, 1, 4, 4) and mask.dtype == torch.bool
    assert torch.equal(mask[0, 0], torch.ones(4, 4).tril().bool())
    assert mask[1, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert torch.equal(mask[2, 0], torch.eye(4).bool())
    late, late_positions = padding_mask(torch.tensor([[0, 1, 1, 1]]), T=2)
    assert late[0, 0].int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 1]] and late_positions.tolist() == [[1, 2]]
    with pytest.raises(ValueError, match="T=5 .*S=4"):
        padding_mask(torch.ones(1, 4), T=5)


@pytest.mark.parametrize("fused", [True, False])
def test_left_padded_rows_equal_the_rows_alone(fused):
    model = tiny_model()
    for block in model.h:
        block.attn.fused = fused
    lengths = random.sample(range(1, 16), 4) + [16]
    idx, attention_mask = some_ids(model, 5, 16), torch.zeros(5, 16, dtype=torch.int64)
    for row, n in enumerate(lengths):
        attention_mask[row, 16 - n :] = 1
    logits, _ = model(idx, attention_mask=attention_mask)
    assert logits.isfinite().all()
    for row, n in enumerate(lengths):
        assert_close(logits[row, 16 - n :], model(idx[row : row + 1, 16 - n :])[0][0])
    row = lengths.index(min(lengths))
    assert not torch.allclose(logits[row, -1], model(idx)[0][row, -1], atol=1e-3)  # without the mask it would matter


@pytest.mark.parametrize("fused", [True, False])
def test_right_padding_and_empty_rows_stay_finite_with_gradients(fused):
    model = tiny_model()
    for block in model.h:
        block.attn.fused = fused
    attention_mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    idx = some_ids(model, 3, 5)
    logits, _ = model(idx, attention_mask=attention_mask)
    assert_close(logits[0, :3], model(idx[:1, :3])[0][0])
    logits.sum().backward()
    assert logits.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())


def test_pieces_through_a_store_equal_the_whole():
    model = tiny_model(n_layer=3)
    idx, store = some_ids(model, 2, 15), AppendingStore()
    pieces = [model(piece, kv_cache=store)[0] for piece in idx.split([6, 1, 1, 7], dim=1)]
    assert_close(torch.cat(pieces, dim=1), model(idx)[0])
    assert store.pos == 15 and sorted(store.kept) == [0, 1, 2]


def test_padded_pieces_through_a_store_equal_the_rows_alone():
    model = tiny_model()
    idx, attention_mask, store = some_ids(model, 3, 14), torch.ones(3, 14, dtype=torch.int64), AppendingStore()
    attention_mask[0, :5] = 0
    attention_mask[1, :2] = 0
    pieces, end = [], 0
    for piece in idx.split([8, 1, 4, 1], dim=1):
        end += piece.size(1)
        pieces.append(model(piece, kv_cache=store, attention_mask=attention_mask[:, :end])[0])
    logits = torch.cat(pieces, dim=1)
    for row, start in enumerate((5, 2, 0)):
        assert_close(logits[row, start:], model(idx[row : row + 1, start:])[0][0])


# ---- head and loss ----


def test_head_shares_memory_with_the_embedding():
    model = tiny_model()
    assert model.lm_head.weight is model.wte.weight
    for same in (copy.deepcopy(model), copy.deepcopy(model).to(torch.float64)):
        assert same.lm_head.weight.data_ptr() == same.wte.weight.data_ptr() != model.wte.weight.data_ptr()
    idx = some_ids(model)
    assert_close(model(idx)[0], model.hidden_states(idx) @ model.wte.weight.T)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert (model.wte.weight == 0).all()


def test_the_tied_gradient_is_the_sum_of_both_uses():
    model = tiny_model()
    idx, targets = some_ids(model), some_ids(model)
    model(idx, targets)[1].backward()
    tied = model.wte.weight.grad.clone()
    head = model.wte.weight.detach().clone().requires_grad_()
    model.zero_grad()
    next_token_loss(model.hidden_states(idx) @ head.T, targets).backward()
    assert_close(tied, model.wte.weight.grad + head.grad)
    assert head.grad.abs().max() > 1e-4 and model.wte.weight.grad.abs().max() > 1e-4


def test_loss_counts_only_targets_that_count():
    model = tiny_model()
    idx, targets = some_ids(model), some_ids(model)
    targets[torch.rand(targets.shape) < 0.5] = -100
    targets[0, 0] = 3
    logits, loss = model(idx, targets)
    assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100), 1e-6)
    by_hand = -logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0][targets != -100].mean()
    assert_close(loss, by_hand)
    assert model(idx)[1] is None


def test_a_batch_without_counting_targets_gives_zero_and_no_nan():
    model = tiny_model()
    _, loss = model(some_ids(model), torch.full((2, 20), -100))
    loss.backward()
    assert loss.item() == 0.0 and all((p.grad == 0).all() for p in model.parameters())


# ---- a fresh model ----


def test_initialisation():
    config = tiny_config(vocab_size=400, n_ctx=128, n_embd=128, n_head=4, n_layer=random.choice([2, 5]))
    model = GPTLanguageModel(config)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (0.0 if name.endswith("bias") else 1.0)).all(), name
            continue
        std = 0.02 / (math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1)
        assert abs(p.std().item() / std - 1) < 0.04, f"{name}: {p.std().item():.5f} instead of {std:.5f}"
        assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name


def test_init_weights_fills_everything_and_obeys_its_generator():
    config = tiny_config()
    with torch.device("meta"):
        empty = GPTLanguageModel(config)
    empty = empty.to_empty(device="cpu")
    with torch.no_grad():
        for p in empty.parameters():
            p.fill_(math.nan)
    empty.init_weights(torch.Generator().manual_seed(5))
    again = GPTLanguageModel(config)
    again.init_weights(torch.Generator().manual_seed(5))
    assert all(torch.equal(p, empty.get_parameter(name)) for name, p in again.named_parameters())


def test_the_residual_scaling_keeps_the_stream_flat():
    stds = []
    for n_layer in (2, 24):
        model = GPTLanguageModel(tiny_config(n_embd=128, n_head=4, n_layer=n_layer, vocab_size=100))
        x = model.wte(some_ids(model, 4, 32)) + model.wpe.weight
        for block in model.h:
            x = block(x)
        stds.append(x.std().item())
    assert 0.8 < stds[1] / stds[0] < 1.25, stds  # without the factor it would be about 3


def test_loss_at_the_start_is_near_ln_vocab_size():
    for vocab_size in (300, 4096):
        model = GPTLanguageModel(tiny_config(vocab_size=vocab_size, n_embd=192, n_head=6, n_layer=3)).eval()
        with torch.no_grad():
            loss = model(some_ids(model, 16, 32), some_ids(model, 16, 32))[1].item()
        expected = math.log(vocab_size) + 0.02**2 * 192 / 2
        assert abs(loss - expected) < 0.08, f"{loss:.3f} against {expected:.3f}"


def set_dropout(model: GPTLanguageModel, place: str | None) -> None:
    """Dropout of 0.5 at one of GPT-2's four places, none at the others."""
    model.drop.p = 0.5 * (place == "embedding")
    for block in model.h:
        block.attn.dropout = 0.5 * (place == "weights")
        block.attn.resid_dropout.p = 0.5 * (place == "attention")
        block.mlp.dropout.p = 0.5 * (place == "mlp")


@pytest.mark.parametrize("place", ["embedding", "weights", "attention", "mlp", None])
def test_dropout_at_each_place_and_only_in_training(place):
    model = tiny_model()
    set_dropout(model, place)
    idx = some_ids(model)
    plain = model(idx)[0]
    assert torch.equal(model(idx)[0], plain)
    model.train()
    assert torch.equal(model(idx)[0], plain) == (place is None)


def test_the_config_sets_every_dropout_rate():
    model = GPTLanguageModel(tiny_config(dropout=0.3))
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)] + [block.attn.dropout for block in model.h]
    assert rates == [0.3] * (1 + 3 * model.config.n_layer)


# ---- parameters ----


@pytest.mark.parametrize(
    "name, tied, untied",
    [
        ("gpt2", 124_439_808, 163_037_184),
        ("gpt2-medium", 354_823_168, 406_286_336),
        ("gpt2-large", 774_030_080, 838_359_040),
        ("gpt2-xl", 1_557_611_200, 1_638_022_400),
    ],
)
def test_parameter_counts(name, tied, untied):
    with torch.device("meta"):
        model = GPTLanguageModel(GPTConfig.preset(name))
    assert (model.num_parameters(), model.num_parameters(tied=False)) == (tied, untied)


def test_parameter_count_of_mini_and_of_any_shape():
    assert 2_000_000 < GPTLanguageModel(GPTConfig.preset("mini")).num_parameters() < 6_000_000
    c = tiny_config()
    expected = (c.vocab_size + c.n_ctx + 2) * c.n_embd + c.n_layer * (12 * c.n_embd**2 + 13 * c.n_embd)
    assert GPTLanguageModel(c).num_parameters() == expected


# ---- gradient checkpointing ----


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_gives_the_same_gradients(dropout):
    model = tiny_model(dropout=dropout, n_layer=3).train()
    idx, targets, seed = some_ids(model), some_ids(model), random.randrange(2**31)
    runs = {}
    for model.gradient_checkpointing in (False, True):
        calls = []
        handles = [b.attn.register_forward_hook(lambda *_, calls=calls: calls.append(1)) for b in model.h]
        torch.manual_seed(seed)
        model.zero_grad()
        model(idx, targets)[1].backward()
        runs[model.gradient_checkpointing] = [p.grad.clone() for p in model.parameters()], len(calls)
        for handle in handles:
            handle.remove()
    assert (runs[False][1], runs[True][1]) == (3, 6)  # every block really ran a second time
    for a, b in zip(runs[False][0], runs[True][0], strict=True):
        assert_close(a, b, 1e-6)


def test_gradient_checkpointing_leaves_evaluation_and_stores_alone():
    model = tiny_model(n_layer=2)
    idx = some_ids(model)
    plain = model(idx)[0]
    model.gradient_checkpointing = True
    assert torch.equal(model(idx)[0], plain)
    store = AppendingStore()
    model.train()
    pieces = [model(piece, kv_cache=store)[0] for piece in idx.split(10, dim=1)]
    torch.cat(pieces, dim=1).sum().backward()  # a second forward pass would have appended twice
    assert store.kept[0][0].size(2) == 20


# ---- bad input ----


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"n_embd": 768, "n_head": 7}, ["n_embd=768", "n_head=7", "multiple"]),
        ({"n_layer": 0}, ["n_layer=0", "at least 1"]),
        ({"vocab_size": -5}, ["vocab_size=-5", "at least 1"]),
        ({"n_ctx": 0}, ["n_ctx=0", "at least 1"]),
        ({"n_head": 0}, ["n_head=0", "at least 1"]),
        ({"n_embd": 0}, ["n_embd=0", "at least 1"]),
        ({"n_layer": 2.5}, ["n_layer=2.5", "whole number"]),
        ({"n_ctx": "1024"}, ["n_ctx='1024'", "whole number"]),
        ({"dropout": 1.0}, ["dropout=1.0", "[0, 1)"]),
        ({"dropout": -0.1}, ["dropout=-0.1", "[0, 1)"]),
        ({"dropout": math.nan}, ["dropout=nan", "[0, 1)"]),
        ({"layer_norm_epsilon": 0.0}, ["layer_norm_epsilon=0.0", "above 0"]),
    ],
)
def test_config_refuses_shapes_that_cannot_work(changes, words):
    with pytest.raises(ValueError) as error:
        GPTConfig(**changes)
    assert all(word in str(error.value) for word in words), error.value


def test_presets():
    assert GPTConfig.preset("gpt2") == GPTConfig()
    assert GPTConfig.preset("gpt2", dropout=0.1).dropout == 0.1
    for name, sizes in PRESETS.items():
        c = GPTConfig.preset(name)
        assert (c.vocab_size, c.n_ctx, c.n_embd, c.n_layer, c.n_head) == sizes
    with pytest.raises(ValueError) as error:
        GPTConfig.preset("gpt3")
    assert "'gpt3'" in str(error.value) and all(name in str(error.value) for name in PRESETS)
    with pytest.raises(FrozenInstanceError):
        GPTConfig().n_layer = 3


@pytest.mark.parametrize(
    "idx, words",
    [
        (torch.zeros(1, 33, dtype=torch.int64), ["33 positions", "n_ctx=32"]),
        (torch.zeros(1, 0, dtype=torch.int64), ["(1, 0)", "at least one token"]),
        (torch.zeros(0, 4, dtype=torch.int64), ["(0, 4)", "at least one token"]),
        (torch.tensor([1, 2, 3]), ["(3,)", "(B, T)"]),
        (torch.tensor([[0, 50]]), ["token id 50", "0 to 49"]),
        (torch.tensor([[0, -1]]), ["token id -1", "0 to 49"]),
        (torch.zeros(1, 4), ["torch.float32", "int64"]),
    ],
)
def test_ids_that_cannot_be_read_are_refused(idx, words):
    model = tiny_model(vocab_size=50)
    with pytest.raises(ValueError) as error:
        model(idx)
    assert all(word in str(error.value) for word in words), error.value


def test_the_limits_themselves_are_accepted():
    model = tiny_model(vocab_size=50)
    assert model(torch.full((1, 32), 49))[0].shape == (1, 32, 50)
    assert_close(model(torch.tensor([[0, 49]], dtype=torch.int32))[0], model(torch.tensor([[0, 49]]))[0], 1e-7)


@pytest.mark.parametrize("bad", [50, -1, -99])
def test_targets_outside_the_vocabulary_are_refused(bad):
    model = tiny_model(vocab_size=50)
    with pytest.raises(ValueError, match=f"target {bad} .*0 to 49"):
        model(torch.tensor([[1, 2]]), torch.tensor([[-100, bad]]))


def test_targets_and_masks_of_another_shape_are_refused():
    model = tiny_model()
    idx = some_ids(model, 2, 6)
    with pytest.raises(ValueError, match=r"targets have shape \(2, 5\), expected \(2, 6\)"):
        model(idx, idx[:, 1:])
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 5\), expected \(2, 6\)"):
        model(idx, attention_mask=torch.ones(2, 5))
    store = AppendingStore()
    model(idx, kv_cache=store)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1\), expected \(2, 7\)"):
        model(idx[:, :1], kv_cache=store, attention_mask=torch.ones(2, 1))


def test_the_position_limit_counts_what_the_store_holds():
    model = tiny_model()
    store = AppendingStore()
    model(some_ids(model, 1, 30), kv_cache=store)
    with pytest.raises(ValueError, match="33 positions .*n_ctx=32"):
        model(some_ids(model, 1, 3), kv_cache=store)
    assert store.pos == 30
    model(some_ids(model, 1, 2), kv_cache=store)  # up to the limit is fine


def test_the_model_compiles_without_a_graph_break():
    model = tiny_model()
    idx = some_ids(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(idx, idx)[1], model(idx, idx)[1], 1e-6)


# ---- the type of the logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_weights_are_float32_and_not_rounded(dtype):
    """Two tokens whose scores are far from 0 and close together: rounded to bfloat16 they would tie."""
    model = tiny_model(n_embd=64, n_head=4).to(dtype)
    with torch.no_grad():
        model.ln_f.bias.fill_(4.0)  # scores far from 0, as GPT-2's are
        idx, store = some_ids(model), AppendingStore()
        x, W = model.hidden_states(idx), model.wte.weight
        want = x.double() @ W.double().T  # (B, T, vocab_size)
        for logits in (model(idx)[0], model(idx, idx)[0], model(idx, kv_cache=store)[0]):
            assert logits.dtype == torch.float32
            assert_close(logits.double(), want, 1e-4)
        assert_close(model.last_logits(idx).double(), want[:, -1], 1e-4)
    assert (want.to(dtype).double() - want).abs().max() > 1e-3  # rounding would have shown
    logits, loss = model(idx, idx)  # with gradients the product is the layer's own
    loss.backward()
    assert logits.dtype == torch.float32 and model.wte.weight.grad.isfinite().all()


def test_logits_keep_float32_and_float64():
    model = tiny_model()
    idx = some_ids(model)
    assert model(idx)[0].dtype == model.last_logits(idx).dtype == torch.float32
    assert model.double()(idx)[0].dtype == torch.float64
    with torch.no_grad():
        assert model(idx)[0].dtype == torch.float64


def test_logits_are_float32_under_autocast():
    model = tiny_model()
    idx = some_ids(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(idx)[0].dtype == torch.float32


def test_on_a_gpu_the_head_multiplies_into_float32(monkeypatch):
    """No GPU needed: fake tensors say which product would run there, and what comes out."""
    lm_head = nn.Linear(32, 64, bias=False, device="meta")
    with FakeTensorMode():
        lm_head.weight = nn.Parameter(torch.empty(64, 32, dtype=torch.bfloat16, device="cuda"))
        x = torch.empty(2, 5, 32, dtype=torch.bfloat16, device="cuda")
        asked, mm = [], torch.mm
        monkeypatch.setattr(torch, "mm", lambda *a, **options: asked.append(options) or mm(*a, **options))
        head = partial(GPTLanguageModel.head, SimpleNamespace(lm_head=lm_head))
        with torch.no_grad():
            logits, last = head(x), head(torch.empty(2, 32, dtype=torch.bfloat16, device="cuda"))
        assert asked == [{"out_dtype": torch.float32}] * 2
        assert (logits.shape, logits.dtype, logits.device.type) == ((2, 5, 64), torch.float32, "cuda")
        assert (last.shape, last.dtype) == ((2, 64), torch.float32)


# ---- ids on a GPU


@pytest.mark.parametrize(
    "T, training, capturing, looks",
    [(5, False, False, 1), (1, False, False, 0), (5, True, False, 0), (5, False, True, 0)],
)
def test_ids_on_a_gpu_are_looked_at_where_it_costs_little(monkeypatch, T, training, capturing, looks):
    """An id without a row ends every later CUDA call of the process; a look at one new token would wait each time."""
    seen = []
    monkeypatch.setattr("minigpt_lib.model.gpt.check_ids", lambda *arguments: seen.append(arguments))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    config = tiny_config()
    with FakeTensorMode():
        idx = torch.zeros(2, T, dtype=torch.int64, device="cuda")
        check_input(idx, config, 0, None, training)
    assert len(seen) == looks and all(a[1] is idx and a[2] == config.vocab_size for a in seen)


# ---- other programs that run the model


def test_exported_with_a_length_that_is_left_open():
    model = tiny_model(n_ctx=64)
    T = torch.export.Dim("T", min=2, max=64)
    program = torch.export.export(model, (some_ids(model, 1, 9),), dynamic_shapes={"idx": {1: T}})
    for n in (2, 17, 64):
        idx = some_ids(model, 1, n)
        assert_close(program.module()(idx)[0], model(idx)[0])


@pytest.mark.filterwarnings("ignore")  # jit is deprecated, and warns of every size that becomes a constant
def test_traced():
    model = tiny_model().requires_grad_(False)
    idx = some_ids(model, 1, 9)
    traced = torch.jit.trace(lambda idx: model(idx)[0], idx, check_trace=False)
    other = some_ids(model, 1, 9)
    assert_close(traced(other), model(other)[0])
