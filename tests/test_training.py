"""minigpt_lib.training against plain PyTorch, Transformers, explicit formulas, and real kills."""

import json
import math
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from tiny import TINY, T, V, batch_of, build, flat, losses, windows_of

from minigpt_lib import training
from minigpt_lib.model import GPTConfig, GPTLanguageModel
from minigpt_lib.training import (
    TokenWindows,
    TrainConfig,
    configure_optimizer,
    count_targets,
    encode_corpus,
    evaluate_loss,
    heldout_batches,
    interrupt_flag,
    is_due,
    load_checkpoint,
    lr_at,
    pretrain,
    progress_bar,
    read_documents,
    run_step,
    save_checkpoint,
    summed_loss,
    train,
    train_step,
    write_atomically,
)

ROOT = Path(__file__).resolve().parents[1]
MATRICES = ("wte.weight", "wpe.weight", "c_attn.weight", "c_proj.weight", "c_fc.weight")


@pytest.fixture
def byte_encoding() -> tiktoken.Encoding:
    """256 bytes and the special token: enough to check what is encoded."""
    ranks = {bytes([i]): i for i in range(256)}
    return tiktoken.Encoding("bytes", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})


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
    assert abs(expected[0] - expected[-1]) > 0.05, "nothing was learnt, so nothing is tested"
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


def test_schedule_of_a_single_step_uses_the_full_rate():
    assert lr_at(0, TrainConfig(steps=1, lr=0.5)) == 0.5


# ---- accumulation, masks, precision, checkpointing ------------------------------------------------------------------


def sgd_gradient(model, batches, cfg=None):
    """The gradient that train_step uses, read off from one step of plain SGD with rate 1."""
    before = flat(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)
    loss, norm = train_step(model, optimizer, batches, 1.0, cfg or TrainConfig(grad_clip=0))
    return before - flat(model), loss, norm


def test_accumulation_equals_the_big_batch_with_unequal_counts(seed):
    micro = [batch_of(seed, 4, 1.0), batch_of(seed + 1, 4, 0.0), batch_of(seed + 2, 4, 0.4)]
    counts = [count_targets(t) for _, t in micro]
    assert counts[1] == 1 and len(set(counts)) == 3
    big = tuple(torch.cat(parts) for parts in zip(*micro, strict=True))
    model = build(seed)
    model(*big)[1].backward()
    truth = torch.cat([p.grad.flatten() for p in model.parameters()])
    accumulated, loss, norm = sgd_gradient(build(seed), micro)
    at_once, loss_big, _ = sgd_gradient(build(seed), [big])
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


def test_a_micro_batch_without_targets_is_harmless(seed):
    idx, targets = batch_of(seed, 4)
    nothing = (idx, torch.full_like(targets, -100))
    alone, loss, _ = sgd_gradient(build(seed), [(idx, targets)])
    together, loss_both, _ = sgd_gradient(build(seed), [nothing, (idx, targets), nothing])
    assert abs(loss - loss_both) < 1e-6 and (alone - together).abs().max() < 1e-6
    with pytest.raises(ValueError, match="every target is -100"):
        train_step(build(seed), configure_optimizer(build(seed), TrainConfig()), [nothing], 1e-3, TrainConfig())
    with pytest.raises(ValueError, match=r"step 0: every target is -100"):
        train(build(seed), lambda i: nothing, TrainConfig(steps=2), progress=False)


def test_stale_gradients_do_not_leak_into_a_step(seed):
    batch = batch_of(seed, 4)
    clean, *_ = sgd_gradient(build(seed), [batch])
    model = build(seed)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    dirty, *_ = sgd_gradient(model, [batch])
    assert torch.equal(clean, dirty)


def test_clipping_bounds_the_step_and_keeps_the_direction(seed):
    batch = batch_of(seed, 4)
    free, _, norm = sgd_gradient(build(seed), [batch], TrainConfig(grad_clip=0))
    limit = norm / 3
    clipped, _, reported = sgd_gradient(build(seed), [batch], TrainConfig(grad_clip=limit))
    assert abs(reported - norm) < 1e-4 * norm, "the norm is reported before clipping"
    assert (clipped - free / 3).abs().max() < 1e-5 * max(1, norm), f"seed {seed}"
    loose, *_ = sgd_gradient(build(seed), [batch], TrainConfig(grad_clip=2 * norm))
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
    from minigpt_lib import model as model_module

    calls, real = [], model_module.checkpoint
    monkeypatch.setattr(model_module, "checkpoint", lambda *a, **k: calls.append(1) or real(*a, **k))
    model = build(seed).eval()
    model.gradient_checkpointing = True
    train(model, windows_of(seed).batch, TrainConfig(steps=2), progress=False)
    assert len(calls) == 2 * TINY.n_layer and not model.training


# ---- windows and the corpus -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trial", range(4))
def test_an_epoch_uses_every_id_once_and_targets_are_shifted_by_one(trial, seed):
    rng = random.Random(seed + trial)
    window, per_epoch, rest = rng.randint(1, 9), rng.randint(2, 12), rng.choice([0, 1, 3])
    n = window * per_epoch + min(rest, window - 1)
    batch_size = rng.randint(1, per_epoch)
    tokens = np.arange(n)
    windows = TokenWindows(tokens, window, batch_size, seed=seed)
    batches = [windows.batch(i) for i in range(3 * per_epoch)]
    idx, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert idx.dtype == targets.dtype == torch.int64 and batches[0][0].shape == (batch_size, window)
    assert torch.equal(targets, (idx + 1) % n), "each target is the id after its input"
    assert torch.equal(idx[:, 1:], targets[:, :-1])
    for epoch in range(3):
        used = targets[epoch * per_epoch : (epoch + 1) * per_epoch].flatten().tolist()
        assert len(used) == len(set(used)) == window * per_epoch > n - window, f"epoch {epoch} (seed {seed})"
        if n % window == 0:
            assert sorted(used) == list(range(n))
    if per_epoch >= 8:
        assert not torch.equal(idx[:per_epoch], idx[per_epoch : 2 * per_epoch]), "epochs differ"


def test_batches_are_a_pure_function_of_their_number(seed):
    a, b = windows_of(seed, n=200), windows_of(seed, n=200)
    order = list(range(40))
    forward = [a.batch(i) for i in order]
    random.Random(seed).shuffle(order)
    for i in order:
        assert all(torch.equal(x, y) for x, y in zip(b.batch(i), forward[i], strict=True)), f"batch {i} (seed {seed})"
    other = TokenWindows(a.tokens, T, 4, seed=seed + 1)
    assert any(not torch.equal(other.batch(i)[0], forward[i][0]) for i in range(5))


def test_heldout_batches_count_each_target_once_in_order(seed):
    n = random.Random(seed).randint(30, 90)
    batches = heldout_batches(np.arange(n), window=7, batch_size=3)
    idx, targets = (torch.cat(parts).flatten() for parts in zip(*batches, strict=True))
    whole = (n - 1) // 7 * 7
    assert idx.tolist() == list(range(whole)) and targets.tolist() == list(range(1, whole + 1))
    assert len(heldout_batches(np.arange(n), 7, 1, limit=2)) == 2


def test_the_corpus_is_encoded_as_tiktoken_does(tmp_path, byte_encoding, seed):
    rng = random.Random(seed)
    alphabet = "ab é\n\t漢🙂'<|>"
    documents = ["".join(rng.choices(alphabet, k=rng.randint(1, 60))).strip() or "x" for _ in range(30)]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(documents[:20]) + "\n<|endoftext|>\n", "utf-8")
    (tmp_path / "b.txt").write_text("<|endoftext|>".join(documents[20:]), "utf-8")  # not on a line of its own
    assert read_documents(tmp_path / "a.txt") == documents[:20]
    expected = byte_encoding.encode("".join(d + "<|endoftext|>" for d in documents), allowed_special="all")
    ids = encode_corpus([tmp_path / "a.txt", tmp_path / "b.txt"], byte_encoding)
    assert ids.dtype == np.uint16 and ids.tolist() == expected, f"seed {seed}"
    second = encode_corpus(str(tmp_path / "b.txt"), byte_encoding).tolist()
    assert second == expected[-len(second) :] and second.count(256) == 10


def test_bad_corpora_are_refused(tmp_path, byte_encoding):
    with pytest.raises(FileNotFoundError, match=r"no corpus file .*missing\.txt"):
        encode_corpus(tmp_path / "missing.txt", byte_encoding)
    (tmp_path / "empty.txt").write_text("\n<|endoftext|>\n \n")
    with pytest.raises(ValueError, match=r"empty\.txt holds no text"):
        encode_corpus(tmp_path / "empty.txt", byte_encoding)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8: byte 3"):
        encode_corpus(tmp_path / "latin.txt", byte_encoding)
    ranks = {bytes([i]): i for i in range(256)}
    special = {"<|endoftext|>": 70_000}
    wide = tiktoken.Encoding("wide", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=special)
    with pytest.raises(ValueError, match="70001 tokens do not fit .* 65535"):
        encode_corpus(tmp_path / "latin.txt", wide)


# ---- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_one_batch_is_learnt_by_heart(share, seed):
    idx, targets = batch_of(seed, 3, share)
    idx[:, 0] = torch.arange(3)  # different beginnings: equal ones with different ends cannot be told apart
    model = GPTLanguageModel(replace(TINY, n_embd=48))
    cfg = TrainConfig(steps=120, lr=1e-2, warmup=5, min_lr=1e-3)
    history = train(model, lambda i: (idx, targets), cfg, progress=False)
    assert history[0]["loss"] > 3 and history[-1]["loss"] < 0.05, f"{history[-1]['loss']} (seed {seed})"


def test_frozen_parameters_stay_and_are_not_stored(tmp_path, seed):
    model = build(seed)
    for name, p in model.named_parameters():
        p.requires_grad_("c_attn" in name)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, windows_of(seed).batch, TrainConfig(steps=3), folder=tmp_path, progress=False)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) is ("c_attn" not in name), name
    stored = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert stored and all("c_attn" in name for name in stored)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        train(model, windows_of(seed).batch, TrainConfig(steps=1), progress=False)


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


def test_history_evaluation_and_jsonl(tmp_path, seed):
    cfg, seen, measured = TrainConfig(steps=7, eval_every=3, lr=1e-3, min_lr=1e-4, warmup=2), [], []

    def evaluate():
        measured.append(evaluate_loss(model, [batch_of(seed, 4)]))
        return measured[-1]

    model = build(seed)
    options = {"evaluate": evaluate, "on_step": lambda r: seen.append(dict(r)), "folder": tmp_path, "progress": False}
    history = train(model, windows_of(seed).batch, cfg, **options)
    assert [r["step"] for r in history] == list(range(7)) and seen == history
    assert [r["lr"] for r in history] == [lr_at(step, cfg) for step in range(7)]
    assert [r["step"] for r in history if "val_loss" in r] == [2, 5, 6]
    assert [r["val_loss"] for r in history if "val_loss" in r] == measured
    assert all(r["tokens_per_s"] > 0 and r["grad_norm"] > 0 for r in history)
    assert [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()] == history


def test_due():
    assert [s for s in range(10) if is_due(s, 4, 10)] == [3, 7, 9] and [s for s in range(5) if is_due(s, 0, 5)] == [4]


def test_run_step_numbers_its_micro_batches(seed):
    asked, windows, model = [], windows_of(seed), build(seed)
    cfg = TrainConfig(steps=9, accumulate=3)
    run_step(model, configure_optimizer(model, cfg), lambda i: asked.append(i) or windows.batch(i), 4, cfg)
    assert asked == [12, 13, 14]


# ---- interruptions --------------------------------------------------------------------------------------------------

RUN = TrainConfig(steps=12, lr=3e-3, warmup=3, accumulate=2, checkpoint_every=3)


def whole_run(seed):
    return train(build(seed, dropout=0.1), windows_of(seed).batch, RUN, progress=False)


@pytest.mark.parametrize("at", [2, 3, 7])
def test_resume_is_bit_equal(tmp_path, at, seed):
    def fail(record):
        if record["step"] == at:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError):
        options = {"on_step": fail, "folder": tmp_path, "progress": False}
        train(build(seed, dropout=0.1), windows_of(seed).batch, RUN, **options)
    if at == 2:  # killed before the first checkpoint
        with pytest.raises(FileNotFoundError, match=r"checkpoint\.pt to resume from: start with resume=False"):
            train(build(seed), windows_of(seed).batch, RUN, folder=tmp_path, resume=True, progress=False)
        return
    model, seen = build(seed + 1, dropout=0.1), []  # other weights: all must come from the file
    resumed = train(
        model, windows_of(seed).batch, RUN, folder=tmp_path, resume=True, on_step=seen.append, progress=False
    )
    assert seen[0]["step"] == at // 3 * 3, "goes on after the last checkpoint"
    straight = build(seed, dropout=0.1)
    expected = train(straight, windows_of(seed).batch, RUN, progress=False)
    assert losses(resumed) == losses(expected) and [r["step"] for r in resumed] == list(range(12)), f"seed {seed}"
    assert torch.equal(flat(model), flat(straight)), f"seed {seed}"
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 12
    again = train(build(seed, dropout=0.1), windows_of(seed).batch, RUN, folder=tmp_path, resume=True, progress=False)
    assert losses(again) == losses(expected), "a finished run is not run again"


CHILD = """
import sys, time
sys.path.insert(0, "tests")
import torch
import test_training as t
folder, seed, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
cfg = t.replace(t.RUN, steps=10_000, checkpoint_every=1)
t.train(t.build(seed, dropout=0.1), t.windows_of(seed).batch, cfg, folder=folder, progress=False)
"""


def test_sigkill_and_resume_is_bit_equal(tmp_path, seed):
    """A real process, killed without warning while it writes a checkpoint in every step."""
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(seed), str(torch.get_num_threads())]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "history.jsonl"
    wanted, deadline = random.Random(seed).randint(3, 12), time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > wanted):
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()[1]
        time.sleep(0.002)
    child.kill()
    child.communicate()
    done = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
    assert done >= wanted and child.returncode != 0
    cfg = replace(RUN, steps=10_000, checkpoint_every=0)

    def stop_after(record):
        if record["step"] == done + 4:
            raise RuntimeError("enough")

    runs = []
    for options in ({"folder": tmp_path, "resume": True}, {}):
        seen = []
        with pytest.raises(RuntimeError, match="enough"):
            watch = lambda r, seen=seen: seen.append(r["loss"]) or stop_after(r)  # noqa: E731
            train(build(seed, dropout=0.1), windows_of(seed).batch, cfg, on_step=watch, progress=False, **options)
        runs.append(seen)
    resumed, straight = runs
    assert len(resumed) == 5 and resumed == straight[done:], f"killed after {done} steps (seed {seed})"
    written = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    assert written[:done] == straight[:done], f"seed {seed}"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_torn_checkpoint_is_refused(tmp_path, share, seed):
    train(build(seed), windows_of(seed).batch, replace(RUN, steps=4), folder=tmp_path, progress=False)
    path = tmp_path / "checkpoint.pt"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged .*delete it"):
        train(build(seed), windows_of(seed).batch, replace(RUN, steps=4), folder=tmp_path, resume=True, progress=False)
    torch.save({"something": "else"}, path)
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        train(build(seed), windows_of(seed).batch, replace(RUN, steps=4), folder=tmp_path, resume=True, progress=False)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, seed, monkeypatch):
    model = build(seed)
    optimizer = configure_optimizer(model, RUN)
    path = save_checkpoint(tmp_path, model, optimizer, 1, [], RUN)
    before = path.read_bytes()

    def half(state, target):
        Path(target).write_bytes(before[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path, model, optimizer, 2, [], RUN)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_files_are_flushed_before_they_are_renamed(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(training.os, name)
        monkeypatch.setattr(training.os, name, lambda *a, name=name, real=real: calls.append(name) or real(*a))
    write_atomically(tmp_path / "new" / "a.txt", lambda p: p.write_text("x"))
    assert calls == ["fsync", "replace"] and (tmp_path / "new" / "a.txt").read_text() == "x"


def test_a_checkpoint_of_something_else_is_refused_and_changes_nothing(tmp_path, seed):
    train(build(seed), windows_of(seed).batch, RUN, folder=tmp_path, progress=False)

    def refuse(model, cfg, message):
        before = flat(model)
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path, model, configure_optimizer(model, cfg), cfg)
        assert torch.equal(flat(model), before)

    refuse(build(seed, n_layer=1), RUN, "another model: n_layer is 2 there and 1 here")
    refuse(build(seed, n_head=2), RUN, "another model: n_head is 3 there and 2 here")
    refuse(build(seed), replace(RUN, lr=1e-3), "another TrainConfig: lr is 0.003 there and 0.001 here")
    refuse(build(seed), replace(RUN, steps=13), "another TrainConfig: steps is 12 there and 13 here")
    frozen = build(seed)
    frozen.wpe.weight.requires_grad_(False)
    refuse(frozen, RUN, r"another set of trained parameters: wpe\.weight")
    model = build(seed + 1)
    loose = replace(RUN, eval_every=5, checkpoint_every=0)  # these change no weight
    step, history = load_checkpoint(tmp_path, model, configure_optimizer(model, loose), loose)
    assert step == 12 and len(history) == 12
    with pytest.raises(ValueError, match="resume=True needs folder"):
        train(build(seed), windows_of(seed).batch, RUN, resume=True, progress=False)


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, seed):
    def press(record):
        if record["step"] == 4:
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    options = {"on_step": press, "progress": False}
    with pytest.raises(KeyboardInterrupt, match=r"stopped after 5 of 12 steps: .*resume=True"):
        train(build(seed, dropout=0.1), windows_of(seed).batch, RUN, folder=tmp_path, **options)
    with pytest.raises(KeyboardInterrupt, match="stopped after 5 of 12 steps: nothing is saved"):
        train(build(seed, dropout=0.1), windows_of(seed).batch, RUN, **options)
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = train(
        build(seed, dropout=0.1), windows_of(seed).batch, RUN, folder=tmp_path, resume=True, progress=False
    )
    assert losses(resumed) == losses(whole_run(seed)), f"seed {seed}"


def test_a_second_ctrl_c_stops_at_once_and_threads_may_train(seed):
    with pytest.raises(KeyboardInterrupt), interrupt_flag() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        signal.raise_signal(signal.SIGINT)
    out = []
    worker = threading.Thread(target=lambda: out.append(whole_run(seed)))
    worker.start()
    worker.join()
    assert len(out[0]) == 12


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

    with pytest.raises(FloatingPointError, match=r"step 3: the loss is .*lower lr than 0\.003"):
        train(model, batch_at, replace(RUN, accumulate=1), progress=False)
    assert torch.equal(flat(model), before["weights"])


def test_progress_goes_to_stderr_and_needs_tqdm(seed, capsys, monkeypatch):
    train(build(seed), windows_of(seed).batch, TrainConfig(steps=3))
    captured = capsys.readouterr()
    assert captured.out == "" and "3/3" in captured.err and "loss" in captured.err
    train(build(seed), windows_of(seed).batch, TrainConfig(steps=3), progress=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    model = build(seed)
    before = flat(model)
    with pytest.raises(ImportError, match=r"pip install \"minigpt-lib\[course\]\""):
        train(model, windows_of(seed).batch, TrainConfig(steps=3))
    assert torch.equal(flat(model), before)
    with progress_bar(0, 3, show=False) as show:
        show({"loss": 1.0})


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
        ({"precision": "fp8"}, "precision='fp8' must be 'fp32' or 'bf16'"),
        ({"eval_every": -1}, "eval_every=-1 must be at least 0"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
    ],
)
def test_nonsense_is_refused_when_the_config_is_made(wrong, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**wrong)


def test_bad_windows_are_refused():
    for call in (lambda w, b: TokenWindows(np.arange(8), w, b), lambda w, b: heldout_batches(np.arange(8), w, b)):
        with pytest.raises(ValueError, match="window=0 must be at least 1"):
            call(0, 1)
        with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
            call(1, 0)
        with pytest.raises(ValueError, match="has 8 tokens, one window of 8 needs 9"):
            call(8, 1)
        call(7, 1)


def test_pretrain_learns_and_is_reproducible(tmp_path, byte_encoding, seed):
    text = "\n<|endoftext|>\n".join(random.Random(seed).choices(["the cat sat.", "a dog ran.", "one, two."], k=60))
    (tmp_path / "train.txt").write_text(text, "utf-8")
    config, cfg = replace(TINY, vocab_size=257), TrainConfig(steps=80, batch_size=8, lr=2e-2, eval_every=20, seed=seed)
    options = {"config": config, "window": 16, "heldout": tmp_path / "train.txt", "device": torch.device("cpu")}
    state = torch.get_rng_state()
    model, history = pretrain(
        tmp_path / "train.txt", byte_encoding, cfg, **options, folder=tmp_path / "run", progress=False
    )
    assert not model.training and abs(history[0]["loss"] - math.log(257)) < 0.3
    assert history[-1]["val_loss"] < 3 < history[0]["loss"], f"{history[-1]} (seed {seed})"
    assert torch.equal(torch.get_rng_state(), state) and (tmp_path / "run" / "checkpoint.pt").is_file()
    again, other = pretrain(tmp_path / "train.txt", byte_encoding, cfg, **options, progress=False)
    assert losses(other) == losses(history) and torch.equal(flat(again), flat(model)), f"seed {seed}"
    resumed, _ = pretrain(
        tmp_path / "train.txt", byte_encoding, cfg, **options, folder=tmp_path / "run", resume=True, progress=False
    )
    assert torch.equal(flat(resumed), flat(model))


def test_pretrain_refuses_what_cannot_work(tmp_path, byte_encoding):
    (tmp_path / "short.txt").write_text("too short", "utf-8")
    config = replace(TINY, vocab_size=257)
    go = lambda **k: pretrain(tmp_path / "short.txt", byte_encoding, TrainConfig(steps=1), progress=False, **k)  # noqa: E731
    with pytest.raises(ValueError, match="window=17 is longer than n_ctx=16"):
        go(config=config, window=17)
    with pytest.raises(ValueError, match="the tokenizer has 257 ids, the model's vocab_size is only 61"):
        go(config=TINY, window=8)
    with pytest.raises(ValueError, match="the text has 10 tokens, one window of 16 needs 17"):
        go(config=config, window=16)
    with pytest.raises(FileNotFoundError, match=r"no corpus file .*nowhere\.txt"):
        go(config=config, window=8, heldout=tmp_path / "nowhere.txt")


def test_mini_is_the_default_model(tmp_path, byte_encoding):
    (tmp_path / "text.txt").write_text("a few words, again and again. " * 20, "utf-8")
    cfg = TrainConfig(steps=1, batch_size=1)
    model, _ = pretrain(tmp_path / "text.txt", byte_encoding, cfg, window=8, progress=False)
    assert model.config == GPTConfig.preset("mini")
