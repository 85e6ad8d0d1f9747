"""minigpt_lib.training.loop and .run against plain PyTorch, Transformers, explicit formulas, and real kills."""

import math
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from tiny import TINY, V, batch_of, build, flat, losses, windows_of

from minigpt_lib.model.gpt import GPTConfig, GPTLanguageModel
from minigpt_lib.training.data import TokenWindows
from minigpt_lib.training.distributed import Engine
from minigpt_lib.training.loop import is_due, train_loop, train_step
from minigpt_lib.training.loss import count_targets, summed_loss
from minigpt_lib.training.optim import TrainConfig, configure_optimizer, lr_at
from minigpt_lib.training.run import pretrain, pretrain_config, train
from minigpt_lib.training.token_files import encode_corpus

ROOT = Path(__file__).resolve().parents[1]
MATRICES = ("wte.weight", "wpe.weight", "c_attn.weight", "c_proj.weight", "c_fc.weight")


# ---- the loop against independent ones ------------------------------------------------------------------------------


def hugging_face_twin(model: GPTLanguageModel) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    sizes = {"n_positions": c.n_ctx, "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    twin = GPT2LMHeadModel(GPT2Config(vocab_size=c.vocab_size, **sizes, **dropout, use_cache=False))
    mine = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in twin.named_parameters():
            key = name.removeprefix("transformer.")
            conv1d = key.startswith("h.") and key.endswith("weight") and p.dim() == 2
            p.copy_(mine[key].T if conv1d else mine[key])
    return twin


def test_twenty_steps_equal_a_plain_loop_on_transformers(seed):
    cfg = TrainConfig(steps=20, lr=5e-3, min_lr=1e-3, warmup=4, weight_decay=0.3, grad_clip=0.7, betas=(0.85, 0.97))
    model, windows = build(seed), windows_of(seed)
    twin = hugging_face_twin(model)
    decayed = [p for n, p in twin.named_parameters() if n.endswith(MATRICES)]
    rest = [p for n, p in twin.named_parameters() if not n.endswith(MATRICES)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}],
        betas=(0.85, 0.97),
        fused=False,
    )
    expected, norms = [], []
    for step in range(20):
        idx, targets = windows.batch(step)
        loss = F.cross_entropy(twin(idx).logits.reshape(-1, V), targets.reshape(-1))
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.7)))
        rate = 5e-3 * (step + 1) / 5 if step < 4 else 1e-3 + 2e-3 * (1 + math.cos(math.pi * (step - 4) / 15))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    history = train(model, windows.batch, cfg, progress=False)
    difference = np.abs(np.array(losses(history)) - expected).max()
    assert difference < 1e-4, f"largest difference {difference} (seed {seed})"
    assert np.allclose([r["grad_norm"] for r in history], norms, rtol=1e-3), f"seed {seed}"
    assert max(norms) > 0.7, "clipping never happened, so it is not tested"
    assert (flat(model) - flat(build(seed))).abs().mean() > 5e-3, "nothing moved, so nothing is tested"
    twins = {n.removeprefix("transformer."): p for n, p in twin.named_parameters()}
    for name, p in model.named_parameters():
        other = twins[name].T if p.shape != twins[name].shape or name.endswith(MATRICES[2:]) else twins[name]
        difference = (p - other).abs().detach()
        if name.endswith("c_attn.bias"):  # the softmax ignores the bias of the keys: its gradient is but noise
            difference[TINY.n_embd : 2 * TINY.n_embd] = 0
        assert difference.mean() < 1e-4, f"{name} (seed {seed})"


def test_what_decays_and_what_does_not(seed):
    model = build(seed)
    cfg = TrainConfig(weight_decay=0.25)
    optimizer = configure_optimizer(model, cfg)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert optimizer.defaults["fused"] is True, "all tensors in one pass"
    count = sum(len(g["params"]) for g in optimizer.param_groups)
    assert count == len(decay) == len(list(model.parameters())), "a tied tensor counts once"
    for name, p in model.named_parameters():
        assert decay[id(p)] == (0.25 if name.endswith(MATRICES) else 0.0), name
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()  # without a gradient only decay moves anything
    for name, p in model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.25) if name.endswith(MATRICES) else before[name]
        assert torch.allclose(p, expected, rtol=0, atol=1e-6), f"{name} (seed {seed})"


@pytest.mark.parametrize("trial", range(5))
def test_schedule_against_formula_and_torch(trial, seed):
    rng = random.Random(seed + trial)
    steps = rng.randint(2, 300)
    warmup = rng.randint(0, steps - 2)
    lr = 10 ** rng.uniform(-5, -1)
    cfg = TrainConfig(steps=steps, warmup=warmup, lr=lr, min_lr=lr * rng.random())
    ours = [lr_at(step, cfg) for step in range(steps)]
    for step, value in enumerate(ours):
        if step < warmup:
            expected = lr * (step + 1) / (warmup + 1)
        else:
            share = (step - warmup) / (steps - 1 - warmup)
            expected = cfg.min_lr + (lr - cfg.min_lr) * (1 + math.cos(math.pi * share)) / 2
        assert abs(value - expected) < 1e-12, (step, cfg)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - 1 - warmup, cfg.min_lr)
    for step in range(warmup, steps):
        assert abs(optimizer.param_groups[0]["lr"] - ours[step]) < 1e-6 * lr, (step, cfg)
        optimizer.step()
        cosine.step()
    assert ours[warmup] == max(ours) and abs(max(ours) - lr) < 1e-9 * lr and abs(ours[-1] - cfg.min_lr) < 1e-9 * lr


def test_a_linear_schedule_equals_torchs(seed):
    cfg = TrainConfig(steps=random.Random(seed).randint(20, 90), lr=3e-3, min_lr=6e-4, warmup=7, decay="linear")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.lr)
    line = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, cfg.min_lr / cfg.lr, cfg.steps - 1 - cfg.warmup)
    for step in range(cfg.warmup, cfg.steps):
        assert abs(optimizer.param_groups[0]["lr"] - lr_at(step, cfg)) < 1e-9, (step, cfg)
        optimizer.step()
        line.step()
    assert lr_at(0, cfg) == cfg.lr / 8 and lr_at(cfg.steps - 1, cfg) == pytest.approx(cfg.min_lr)


def test_schedule_of_a_single_step_uses_the_full_rate():
    assert lr_at(0, TrainConfig(steps=1, lr=0.5)) == 0.5


# ---- accumulation, masks, precision, checkpointing ------------------------------------------------------------------


either_way = pytest.mark.parametrize("fast", [False, True], ids=["plain", "engine"])


def sgd_gradient(model, batches, cfg=None, fast=False):
    """The gradient that train_step uses, plain or with the engine, read off from one step of SGD with rate 1."""
    before, cfg = flat(model), cfg or TrainConfig(grad_clip=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)
    loss, norm = train_step(model, optimizer, batches, 1.0, cfg, engine=Engine(model, cfg) if fast else None)
    return before - flat(model), loss, norm


@either_way
def test_accumulation_equals_the_big_batch_with_unequal_counts(fast, seed):
    micro = [batch_of(seed, 4, 1.0), batch_of(seed + 1, 4, 0.0), batch_of(seed + 2, 4, 0.4)]
    counts = [count_targets(t) for _, t in micro]
    assert counts[1] == 1 and len(set(counts)) == 3
    big = tuple(torch.cat(parts) for parts in zip(*micro, strict=True))
    model = build(seed)
    model(*big)[1].backward()
    truth = torch.cat([p.grad.flatten() for p in model.parameters()])
    accumulated, loss, norm = sgd_gradient(build(seed), micro, fast=fast)
    at_once, loss_big, _ = sgd_gradient(build(seed), [big], fast=fast)
    for mine in (accumulated, at_once):
        difference = float((mine - truth).abs().max())
        assert difference < 2e-6, f"largest difference {difference} (seed {seed})"
    assert abs(loss - loss_big) < 1e-5 and abs(loss - build(seed)(*big)[1].item()) < 1e-5
    assert abs(norm - float(truth.norm())) < 1e-4 * norm


def test_accumulated_run_equals_a_run_with_the_big_batches(seed):
    def big(i):
        return tuple(torch.cat(parts) for parts in zip(*(small.batch(3 * i + j) for j in range(3)), strict=True))

    small = windows_of(seed, batch_size=2)
    cfg = TrainConfig(steps=6, lr=1e-3, accumulate=3)
    a = train(build(seed), small.batch, cfg, progress=False)
    b = train(build(seed), big, replace(cfg, accumulate=1), progress=False)
    assert np.abs(np.array(losses(a)) - losses(b)).max() < 1e-5, f"seed {seed}"


@either_way
def test_a_micro_batch_without_targets_is_harmless(fast, seed):
    idx, targets = batch_of(seed, 4)
    nothing = (idx, torch.full_like(targets, -100))
    alone, loss, _ = sgd_gradient(build(seed), [(idx, targets)], fast=fast)
    together, loss_both, _ = sgd_gradient(build(seed), [nothing, (idx, targets), nothing], fast=fast)
    assert abs(loss - loss_both) < 1e-6 and (alone - together).abs().max() < 1e-6
    with pytest.raises(ValueError, match="every target is -100"):
        train_step(build(seed), configure_optimizer(build(seed), TrainConfig()), [nothing], 1e-3, TrainConfig())
    with pytest.raises(ValueError, match=r"step 0: every target is -100"):
        train(build(seed), lambda i: nothing, TrainConfig(steps=2), progress=False)


@either_way
def test_stale_gradients_do_not_leak_into_a_step(fast, seed):
    batch = batch_of(seed, 4)
    clean, *_ = sgd_gradient(build(seed), [batch], fast=fast)
    model = build(seed)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    dirty, *_ = sgd_gradient(model, [batch], fast=fast)
    assert torch.equal(clean, dirty)


@either_way
def test_clipping_bounds_the_step_and_keeps_the_direction(fast, seed):
    batch = batch_of(seed, 4)
    free, _, norm = sgd_gradient(build(seed), [batch], TrainConfig(grad_clip=0), fast=fast)
    limit = norm / 3
    clipped, _, reported = sgd_gradient(build(seed), [batch], TrainConfig(grad_clip=limit), fast=fast)
    assert abs(reported - norm) < 1e-4 * norm, "the norm is reported before clipping"
    assert (clipped - free / 3).abs().max() < 1e-5 * max(1, norm), f"seed {seed}"
    loose, *_ = sgd_gradient(build(seed), [batch], TrainConfig(grad_clip=2 * norm), fast=fast)
    assert torch.equal(loose, free)


def test_bf16_stays_close_and_keeps_float32_weights(seed):
    cfg = TrainConfig(steps=5, lr=1e-3)
    model = build(seed)
    exact = train(build(seed), windows_of(seed).batch, cfg, progress=False)
    half = train(model, windows_of(seed).batch, replace(cfg, precision="bf16"), progress=False)
    difference = np.abs(np.array(losses(exact)) - losses(half)).max()
    assert 0 < difference < 0.05, f"largest difference {difference} (seed {seed})"
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert summed_loss(model, *batch_of(seed, 2), precision="bf16").dtype == torch.float32


def test_gradient_checkpointing_changes_no_gradient(seed):
    batch, results = batch_of(seed, 4), []
    for on in (False, True):
        model = build(seed, dropout=0.2).train()
        model.gradient_checkpointing = on
        torch.manual_seed(seed)
        results.append(sgd_gradient(model, [batch])[0])
    assert (results[0] - results[1]).abs().max() < 1e-6, f"seed {seed}"


def test_gradient_checkpointing_is_used_inside_the_loop(seed, monkeypatch):
    from minigpt_lib.model import gpt as model_module

    calls, real = [], model_module.checkpoint
    monkeypatch.setattr(model_module, "checkpoint", lambda *a, **k: calls.append(1) or real(*a, **k))
    model = build(seed).eval()
    model.gradient_checkpointing = True
    train(model, windows_of(seed).batch, TrainConfig(steps=2), progress=False)
    assert len(calls) == 2 * TINY.n_layer and not model.training


# ---- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_one_batch_is_learnt_by_heart(share, seed):
    idx, targets = batch_of(seed, 3, share)
    idx[:, 0] = torch.arange(3)  # different beginnings: equal ones with different ends cannot be told apart
    model = GPTLanguageModel(replace(TINY, n_embd=48))
    cfg = TrainConfig(steps=120, lr=1e-2, warmup=5, min_lr=1e-3)
    history = train(model, lambda i: (idx, targets), cfg, progress=False)
    assert history[0]["loss"] > 3 and history[-1]["loss"] < 0.05, f"{history[-1]['loss']} (seed {seed})"


def test_train_restores_mode_gradients_and_random_state(seed):
    model = build(seed, dropout=0.1).eval()
    state = torch.get_rng_state()
    first = train(model, windows_of(seed).batch, TrainConfig(steps=3), progress=False)
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert all(p.grad is None for p in model.parameters())
    torch.rand(7)  # neither the state outside nor drawing numbers inside changes a run
    watched = build(seed, dropout=0.1)
    draw = lambda record: torch.rand(5)  # noqa: E731
    again = train(watched, windows_of(seed).batch, TrainConfig(steps=3), on_step=draw, progress=False)
    assert losses(first) == losses(again)
    reseeded = TrainConfig(steps=3, seed=1)
    other = train(build(seed, dropout=0.1), windows_of(seed).batch, reseeded, progress=False)
    assert losses(first) != losses(other), "another seed, another dropout"


def test_due():
    assert [s for s in range(10) if is_due(s, 4, 10)] == [3, 7, 9] and [s for s in range(5) if is_due(s, 0, 5)] == [4]


def test_the_loop_numbers_its_micro_batches_and_starts_where_it_is_told(seed):
    asked, windows, cfg = [], windows_of(seed), TrainConfig(steps=6, accumulate=3)
    history = train_loop(build(seed), lambda i: asked.append(i) or windows.batch(i), cfg, start=4)
    assert asked == [12, 13, 14, 15, 16, 17] and [r["step"] for r in history] == [4, 5]
    assert [r["lr"] for r in history] == [lr_at(4, cfg), lr_at(5, cfg)]


def test_dropout_differs_from_step_to_step_and_comes_again_with_the_step(seed):
    cfg, batch = TrainConfig(steps=9), batch_of(seed, 4)

    def loss_of(step):
        once = replace(cfg, steps=step + 1)
        return train_loop(build(seed, dropout=0.3), lambda i: batch, once, start=step)[0]["loss"]

    assert loss_of(3) == loss_of(3) and loss_of(3) != loss_of(4), f"seed {seed}"


def test_dropout_differs_from_rank_to_rank(seed, monkeypatch):
    """Two ranks that dropped the same units would see less variety than one process does."""
    import minigpt_lib.training.distributed as module

    seen = []
    for rank in (0, 1, 0):
        monkeypatch.setattr(module, "current_ranks", lambda rank=rank: module.Ranks(rank, 1))
        model = build(seed, dropout=0.3)
        engine = Engine(model, TrainConfig())
        assert engine.rank == rank
        batch = batch_of(seed, 4)
        seen.append(train_loop(model, lambda i, b=batch: b, TrainConfig(steps=1), engine=engine)[0]["loss"])
    assert seen[0] == seen[2] != seen[1], f"seed {seed}"


def test_the_engine_takes_the_steps_of_the_plain_loop(seed):
    cfg = TrainConfig(steps=6, lr=3e-3, warmup=2, accumulate=2, grad_clip=0.5)
    plain, fast = build(seed), build(seed)
    a = train_loop(plain, windows_of(seed).batch, cfg)
    b = train_loop(fast, windows_of(seed).batch, cfg, engine=Engine(fast, cfg))
    assert np.abs(np.array(losses(a)) - losses(b)).max() < 1e-5, f"seed {seed}"
    assert (flat(plain) - flat(fast)).abs().mean() < 1e-5 < (flat(plain) - flat(build(seed))).abs().mean()


def test_adamw_follows_the_formula_where_epsilon_matters(seed):
    """Gradients of the size of epsilon, so that another epsilon would move the weights by another amount."""
    layer, gen = torch.nn.Linear(3, 4, bias=False).double(), torch.Generator().manual_seed(seed)
    optimizer = configure_optimizer(layer, TrainConfig(lr=0.1, weight_decay=0.0, betas=(0.9, 0.95)))
    w, m, v = layer.weight.detach().clone(), 0.0, 0.0
    for t in range(1, 6):
        g = torch.randn(4, 3, generator=gen, dtype=torch.float64) * 1e-8
        layer.weight.grad = g.clone()
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        w = w - 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        assert (layer.weight - w).abs().max() < 1e-6, f"step {t} (seed {seed})"


@pytest.mark.parametrize("poison", ["weight", "gradient"])
def test_a_loss_that_is_not_finite_names_the_step_and_moves_nothing(poison, seed):
    model, windows, before = build(seed), windows_of(seed), {}
    if poison == "gradient":  # a finite loss with an infinite gradient
        model.ln_f.weight.register_hook(lambda grad: grad * math.inf if before else grad)

    def batch_at(i):
        if i == 3:
            if poison == "weight":
                model.ln_f.bias.data[0] = math.inf
            before["weights"] = flat(model)
        return windows.batch(i)

    said = "this step moved no weight" if poison == "gradient" else "the weights were not finite before this step"
    with pytest.raises(FloatingPointError, match=rf"step 3: the loss is .*{said}.*lower lr than 0\.003"):
        train(model, batch_at, TrainConfig(steps=12, lr=3e-3, warmup=3), progress=False)
    assert torch.equal(flat(model), before["weights"])


# ---- bad input, and the whole recipe --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"accumulate": -1}, "accumulate=-1 must be at least 1"),
        ({"lr": 0.0}, "lr=0.0 must be greater than 0"),
        ({"lr": -1e-3}, "lr=-0.001 must be greater than 0"),
        ({"lr": math.nan}, "lr=nan must be greater than 0"),
        ({"lr": 1e-3, "min_lr": 1e-2}, "min_lr=0.01 must lie between 0 and lr=0.001"),
        ({"steps": 10, "warmup": 10}, "warmup=10 must be smaller than steps=10"),
        ({"warmup": -1}, "warmup=-1 must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be at least 0"),
        ({"grad_clip": -1.0}, "grad_clip=-1.0 must be at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0\.9, 1\.0\) must be two in \[0, 1\)"),
        ({"precision": "fp8"}, "precision='fp8' must be one of fp32, bf16, fp16, auto"),
        ({"decay": "step"}, "decay='step' must be one of cosine, linear"),
        ({"eval_every": -1}, "eval_every=-1 must be at least 0"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
    ],
)
def test_nonsense_is_refused_when_the_config_is_made(wrong, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**wrong)


def test_pretrain_learns_and_is_reproducible(tmp_path, byte_encoding, seed):
    text = "\n<|endoftext|>\n".join(random.Random(seed).choices(["the cat sat.", "a dog ran.", "one, two."], k=60))
    (tmp_path / "train.txt").write_text(text, "utf-8")
    (tmp_path / "other.txt").write_text(text[: len(text) // 2], "utf-8")
    config, cfg = replace(TINY, vocab_size=257), TrainConfig(steps=80, batch_size=8, lr=2e-2, eval_every=20, seed=seed)
    options = {"config": config, "window": 16, "heldout": tmp_path / "other.txt", "device": torch.device("cpu")}
    state = torch.get_rng_state()
    model, history = pretrain(
        tmp_path / "train.txt", byte_encoding, cfg, **options, folder=tmp_path / "run", progress=False
    )
    assert not model.training and abs(history[0]["loss"] - math.log(257)) < 0.3
    assert history[-1]["val_loss"] < 3 < history[0]["loss"], f"{history[-1]} (seed {seed})"
    assert torch.equal(torch.get_rng_state(), state) and (tmp_path / "run" / "checkpoint-00000080.pt").is_file()
    again, other = pretrain(tmp_path / "train.txt", byte_encoding, cfg, **options, progress=False)
    assert losses(other) == losses(history) and torch.equal(flat(again), flat(model)), f"seed {seed}"
    resumed, _ = pretrain(
        tmp_path / "train.txt", byte_encoding, cfg, **options, folder=tmp_path / "run", resume=True, progress=False
    )
    assert torch.equal(flat(resumed), flat(model))


def test_pretrain_refuses_what_cannot_work(tmp_path, byte_encoding, monkeypatch):
    (tmp_path / "short.txt").write_text("too short", "utf-8")
    config = replace(TINY, vocab_size=257)
    go = lambda **k: pretrain(tmp_path / "short.txt", byte_encoding, TrainConfig(steps=1), progress=False, **k)  # noqa: E731
    with pytest.raises(ValueError, match="window=17 is longer than n_ctx=16"):
        go(config=config, window=17)
    with pytest.raises(ValueError, match="the tokenizer has 257 ids, the model's vocab_size is only 61"):
        go(config=TINY, window=8)
    with pytest.raises(ValueError, match="the text has 10 tokens, one window of 16 needs 17"):
        go(config=config, window=16)
    monkeypatch.setattr("minigpt_lib.training.run._shared_tokens", lambda *a: pytest.fail("encoded first"))
    with pytest.raises(FileNotFoundError, match=r"no corpus file .*nowhere\.txt"):
        go(config=config, window=8, heldout=tmp_path / "nowhere.txt")
    (tmp_path / "brief.txt").write_text("brief", "utf-8")
    with pytest.raises(ValueError, match="the text has 6 tokens, one window of 12 needs 13"):
        go(config=config, window=12, heldout=tmp_path / "brief.txt")
    with pytest.raises(ValueError, match=r"nothing is left to train on: .*short\.txt is held out"):
        go(config=config, window=8, heldout=tmp_path / "short.txt")


def test_mini_is_the_default_model(tmp_path, byte_encoding):
    (tmp_path / "text.txt").write_text("a few words, again and again. " * 20, "utf-8")
    cfg = TrainConfig(steps=1, batch_size=1)
    model, _ = pretrain(tmp_path / "text.txt", byte_encoding, cfg, window=8, progress=False)
    assert model.config == GPTConfig.preset("mini")


def test_pretrain_goes_on_from_a_model(tmp_path, byte_encoding, seed):
    (tmp_path / "text.txt").write_text("a few words, again and again. " * 20, "utf-8")
    start = build(seed, vocab_size=257)
    before = flat(start)
    options = {"start": start, "window": 8, "device": torch.device("cpu"), "progress": False}
    model, history = pretrain(tmp_path / "text.txt", byte_encoding, TrainConfig(steps=3, lr=1e-2), **options)
    assert model is start and len(history) == 3 and not torch.equal(flat(start), before), "trained in place"
    windows = TokenWindows(encode_corpus(tmp_path / "text.txt", byte_encoding), 8, 8)
    expected = build(seed, vocab_size=257)(*windows.batch(0))[1].item()
    assert abs(history[0]["loss"] - expected) < 1e-5, f"its own weights were the start (seed {seed})"
    with pytest.raises(ValueError, match="config and start exclude each other"):
        pretrain(tmp_path / "text.txt", byte_encoding, TrainConfig(steps=1), config=TINY, **options)


def test_pretrain_reads_token_files_and_refuses_those_of_another_tokenizer(tmp_path, byte_encoding, seed):
    (tmp_path / "text.txt").write_text("a few words, again and again. " * 20, "utf-8")
    config = replace(TINY, vocab_size=257)
    options = {"config": config, "window": 8, "device": torch.device("cpu"), "progress": False}
    cfg = TrainConfig(steps=3)
    _, plain = pretrain(tmp_path / "text.txt", byte_encoding, cfg, **options)
    _, built = pretrain(tmp_path / "text.txt", byte_encoding, cfg, tokens=tmp_path / "a.tokens", **options)
    _, opened = pretrain(tmp_path / "a.tokens", byte_encoding, cfg, **options)
    assert losses(plain) == losses(built) == losses(opened)
    ranks = {bytes([255 - i]): i for i in range(256)}
    other = tiktoken.Encoding("other", pat_str=r"\S+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
    with pytest.raises(ValueError, match="was written with another tokenizer"):
        pretrain(tmp_path / "a.tokens", other, cfg, **options)


def test_encoding_a_long_text_says_how_far_it_is(tmp_path, byte_encoding, capsys):
    (tmp_path / "text.txt").write_bytes(b"some words\n" * (2**20 + 1000))
    config = replace(TINY, vocab_size=257)
    options = {"config": config, "window": 8, "device": torch.device("cpu"), "tokens": tmp_path / "a.tokens"}
    seen = []
    for progress in (False, True, True):  # in silence, built, found built
        pretrain(tmp_path / "text.txt", byte_encoding, TrainConfig(steps=1), progress=progress, **options)
        shown = re.findall(r"encoding the text: +(\d+)%", capsys.readouterr().err)
        seen.append([int(share) for share in shown])
        if not progress:
            (tmp_path / "a.tokens").unlink()
    silent, built, found = seen
    assert silent == found == [] and built == sorted(built) and len(built) > 10 and built[-1] == 100


def test_the_batch_of_a_step_that_is_not_finite_is_kept(tmp_path, seed):
    model, windows = build(seed), windows_of(seed)

    def batch_at(i):
        if i == 2:
            model.wte.weight.data[0, 0] = math.nan
        return windows.batch(i)

    with pytest.raises(FloatingPointError, match=r"step 2: .*its batches are in .*bad_batch\.pt"):
        train(model, batch_at, TrainConfig(steps=4), folder=tmp_path, progress=False)
    kept = torch.load(tmp_path / "bad_batch.pt", weights_only=True)
    assert kept["step"] == 2 and torch.equal(kept["batches"][0][0], windows.batch(2)[0])


def test_recomputation_works_with_frozen_embeddings_and_changes_no_loss(seed):
    runs = []
    for on in (False, True):
        model = build(seed, dropout=0.1)
        model.wte.weight.requires_grad_(False)
        model.wpe.weight.requires_grad_(False)
        cfg = TrainConfig(steps=4, lr=1e-2, gradient_checkpointing=on)
        runs.append(losses(train(model, windows_of(seed).batch, cfg, progress=False)))
        assert not model.gradient_checkpointing, "the switch is as it was"
    assert runs[0] == runs[1] and runs[0][0] != runs[0][-1], f"seed {seed}"


def test_compile_translates_the_blocks_and_leaves_them_as_they_were(seed, monkeypatch):
    """With a backend that runs the traced operations as they are: what is tested is our use of it, not Inductor."""
    real, calls = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: calls.append(self) or real(self, backend="eager"))
    plain = train(build(seed), windows_of(seed).batch, TrainConfig(steps=3), progress=False)
    model = build(seed)
    compiled = train(model, windows_of(seed).batch, TrainConfig(steps=3, compile=True), progress=False)
    assert calls == list(model.h) and np.abs(np.array(losses(plain)) - losses(compiled)).max() < 1e-5
    assert all(block._compiled_call_impl is None for block in model.h)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="Inductor needs a C++ compiler")
def test_inductor_compiles_the_blocks_and_gives_the_same_losses(seed):
    cfg = TrainConfig(steps=3)
    plain = train(build(seed, n_layer=1), windows_of(seed).batch, cfg, progress=False)
    torch._dynamo.utils.counters.clear()
    compiled = train(build(seed, n_layer=1), windows_of(seed).batch, replace(cfg, compile=True), progress=False)
    assert np.abs(np.array(losses(plain)) - losses(compiled)).max() < 1e-4, f"seed {seed}"
    assert torch._dynamo.utils.counters["inductor"], "nothing was compiled"


def test_fp16_follows_fp32_and_leaves_out_steps_that_overflow(seed, monkeypatch):
    cfg = TrainConfig(steps=5, lr=1e-3)
    exact = train(build(seed), windows_of(seed).batch, cfg, progress=False)
    half = train(build(seed), windows_of(seed).batch, replace(cfg, precision="fp16"), progress=False)
    difference = np.abs(np.array(losses(exact)) - losses(half)).max()
    assert 0 < difference < 0.05, f"largest difference {difference} (seed {seed})"
    norms = np.array([[a["grad_norm"], b["grad_norm"]] for a, b in zip(exact, half, strict=True)])
    assert np.abs(norms[:, 1] / norms[:, 0] - 1).max() < 0.05, f"clipping saw scaled gradients: {norms} (seed {seed})"
    model, batch = build(seed), batch_of(seed, 4)
    before, scaler = flat(model), torch.amp.GradScaler("cpu", init_scale=2.0**80)
    fp16 = TrainConfig(precision="fp16")
    engine = Engine(model, fp16, scaler=scaler)
    _, norm = train_step(model, configure_optimizer(model, fp16), [batch], 1e-3, fp16, engine=engine)
    assert not math.isfinite(norm) and torch.equal(flat(model), before) and scaler.get_scale() == 2.0**79


# ---- the recipe's defaults, and what it reads ------------------------------------------------------------------------


def test_the_recipe_has_one_set_of_defaults():
    cfg = pretrain_config()
    assert (cfg.steps, cfg.batch_size, cfg.lr, cfg.warmup, cfg.eval_every) == (4400, 4, 2e-3, 200, 220)
    assert cfg.precision == "auto" and cfg.checkpoint_minutes == 10 and cfg.min_lr == 2e-3 / 20
    short = pretrain_config(steps=30, lr=1e-2, seed=None, min_lr=None)
    assert (short.steps, short.min_lr, short.warmup, short.eval_every, short.seed) == (30, 5e-4, 3, 1, 0)
    assert pretrain_config(min_lr=0.0, warmup=0).min_lr == 0.0 and pretrain_config(warmup=0).warmup == 0


def corpus_of(folder: Path, seed: int, **sizes: int) -> Path:
    """Files NAME.txt of so many random words, each of its own alphabet, in a new folder."""
    rng = random.Random(seed)
    folder.mkdir()
    for name, n in sizes.items():
        (folder / f"{name}.txt").write_text(" ".join(f"{name}{rng.randint(0, 9)}" for _ in range(n)), "utf-8")
    return folder


def test_pretrain_follows_its_own_schedule_down_to_min_lr(tmp_path, byte_encoding, seed):
    folder, cfg = corpus_of(tmp_path / "c", seed, text=300), pretrain_config(steps=8, lr=1e-2, precision="fp32")
    options = {"config": replace(TINY, vocab_size=257), "window": 8, "device": torch.device("cpu"), "progress": False}
    _, history = pretrain(folder, byte_encoding, cfg, **options)
    assert [r["lr"] for r in history] == [lr_at(step, cfg) for step in range(8)]
    assert history[-1]["lr"] == pytest.approx(5e-4) and history[0]["val_loss"] > 0


@pytest.mark.parametrize("given", ["folder", "files", "named", "copy"])
def test_pretrain_never_trains_on_what_it_holds_out(given, tmp_path, byte_encoding, seed, monkeypatch, capsys):
    import minigpt_lib.training.run as module

    folder = corpus_of(tmp_path / "c", seed, a=400, heldout=200, z=100)
    corpus, heldout = folder, None
    if given == "files":
        corpus = sorted(folder.glob("*.txt"))
    elif given == "named":
        heldout = folder / "z.txt"
    elif given == "copy":  # the same text under another name
        (folder / "copy of it.txt").write_bytes((folder / "heldout.txt").read_bytes())
    read, real = [], module.TokenWindows

    def spy(ids, *rest):
        read.append(bytes(np.array(ids)[np.array(ids) < 256].astype(np.uint8)))
        return real(ids, *rest)

    monkeypatch.setattr(module, "TokenWindows", spy)
    options = {"config": replace(TINY, vocab_size=257), "window": 8, "device": torch.device("cpu"), "heldout": heldout}
    _, history = pretrain(corpus, byte_encoding, TrainConfig(steps=1, batch_size=2), **options)
    secret = b"z" if given == "named" else b"heldout"
    assert secret not in read[0] and b"a1" in read[0], f"trained on what it holds out (seed {seed})"
    assert "val_loss" in history[-1]
    said = capsys.readouterr().err
    assert "z.txt, of which" in said if given == "named" else "heldout.txt, of which" in said
    assert "training on" in said and "times" in said and "tokens" in said


def test_a_text_without_a_held_out_part_gives_its_end(tmp_path, byte_encoding, seed, capsys):
    folder = corpus_of(tmp_path / "c", seed, text=3000)
    options = {"config": replace(TINY, vocab_size=257), "window": 8, "device": torch.device("cpu")}
    n = len(encode_corpus(folder, byte_encoding))
    _, history = pretrain(folder, byte_encoding, TrainConfig(steps=1, batch_size=2), **options)
    held = min(n // 100 // 8, 32) * 8
    assert f"the last {held:,} tokens" in (said := capsys.readouterr().err) and f"{n - held - 1:,} tokens" in said
    assert "val_loss" in history[-1]
    _, history = pretrain(folder, byte_encoding, TrainConfig(steps=1, batch_size=2), heldout=False, **options)
    assert "held out: nothing" in (said := capsys.readouterr().err) and f"{n:,} tokens" in said
    assert "val_loss" not in history[-1]


def test_a_run_is_extended_and_its_first_part_stays(tmp_path, byte_encoding, seed):
    folder = corpus_of(tmp_path / "c", seed, text=600)
    options = {"config": replace(TINY, vocab_size=257), "window": 8, "device": torch.device("cpu"), "progress": False}
    short, longer = (TrainConfig(steps=n, batch_size=2, lr=1e-2) for n in (4, 9))
    _, first = pretrain(folder, byte_encoding, short, folder=tmp_path / "run", **options)
    with pytest.warns(UserWarning, match="planned for 4 steps and now goes to 9: from step 4 on"):
        _, both = pretrain(folder, byte_encoding, longer, folder=tmp_path / "run", **options)
    assert both[:4] == first and [r["step"] for r in both] == list(range(9))
    assert [r["lr"] for r in both[4:]] == [lr_at(step, longer) for step in range(4, 9)]
    with pytest.raises(ValueError, match="has 9 steps behind it, more than steps=4"):
        pretrain(folder, byte_encoding, short, folder=tmp_path / "run", **options)
