"""The plain and the chunked loss against PyTorch's cross-entropy on whole logits, and what is kept in memory."""

import copy
import random
import types

import pytest
import torch
import torch.nn.functional as F
from tiny import TINY, T, V, batch_of, build
from torch.utils._python_dispatch import TorchDispatchMode

from minigpt_lib.training import chunked_loss as chunked_module
from minigpt_lib.training import loss as loss_module
from minigpt_lib.training.chunked_loss import (
    CHUNK,
    CUDA_CHUNK,
    SummedLoss,
    chunk_rows,
    chunked_cross_entropy,
    summed_loss_in_chunks,
)
from minigpt_lib.training.loss import amp_dtype, count_targets, evaluate_loss, summed_loss

both_losses = pytest.mark.parametrize("loss_of", [summed_loss, summed_loss_in_chunks])


class Made(TorchDispatchMode):
    """Notes the shape of every tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        self.shapes += [t.shape for t in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(t)]
        return out


def problem(seed: int, n: int, c: int = 16, v: int = 203, size: float = 1.0):
    gen = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(rows, c, generator=gen).mul_(size).requires_grad_() for rows in (n, v))
    return x, weight, torch.randint(v, (n,), generator=gen)


def whole(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")


def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, inputs))


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, in units of the largest number."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("rows", [1, 7, 64, 1000, None])
def test_value_and_gradients_equal_plain_cross_entropy(rows, seed):
    x, weight, targets = problem(seed, n=random.Random(seed).randint(8, 90))
    scale = torch.rand(()) + 0.1
    mine, theirs = chunked_cross_entropy(x, weight, targets, rows), whole(x, weight, targets)
    assert mine.dtype == torch.float32 and mine.shape == ()
    assert abs(mine - theirs) < 1e-6 * theirs.abs(), f"seed {seed}"
    pairs = zip(gradients(scale * mine, x, weight), gradients(scale * theirs, x, weight), strict=True)
    for name, (a, b) in zip(("x", "weight"), pairs, strict=True):
        assert a.shape == b.shape and off(a, b) < 2e-6, f"gradient of {name}: {off(a, b)} (seed {seed})"


def test_gpt2s_vocabulary_in_the_default_chunks(seed):
    x, weight, targets = problem(seed, n=CHUNK // 50257 + 9, c=8, v=50257)
    with Made() as made:
        mine = chunked_cross_entropy(x, weight, targets)
    widest = max(shape.numel() for shape in made.shapes)
    assert widest == -(-len(x) // 2) * len(weight) < CHUNK < len(x) * len(weight), "two equal chunks"
    theirs = whole(x, weight, targets)
    assert abs(mine - theirs) < 1e-6 * theirs.abs(), f"seed {seed}"
    for a, b in zip(gradients(mine, x, weight), gradients(theirs, x, weight), strict=True):
        assert off(a, b) < 1e-5, f"seed {seed}"


@pytest.mark.parametrize("rows", [3, 10])
def test_no_tensor_holds_more_than_a_chunk_of_logits(rows, seed):
    x, weight, targets = problem(seed, n=40)
    with Made() as made:
        chunked_cross_entropy(x, weight, targets, rows).backward()
    logits = [shape.numel() for shape in made.shapes if len(weight) in shape and x.size(1) not in shape]
    assert max(logits) == rows * len(weight)
    assert max(shape.numel() for shape in made.shapes) == max(rows, x.size(1)) * len(weight)


def test_a_frozen_head_costs_no_gradient_of_its_weight(seed):
    x, weight, targets = problem(seed, n=40)
    expected = gradients(whole(x, weight, targets), x)[0]
    weight.requires_grad_(False)
    with Made() as made:
        loss = chunked_cross_entropy(x, weight, targets, rows=9)
        loss.backward()
    assert off(x.grad, expected) < 2e-6 and weight.grad is None
    assert not [s for s in made.shapes if s == weight.shape], "nothing as large as the weight is made"
    x.grad = None
    x.requires_grad_(False)
    weight.requires_grad_()
    chunked_cross_entropy(x, weight, targets, rows=9).backward()
    assert off(weight.grad, gradients(whole(x, weight, targets), weight)[0]) < 2e-6 and x.grad is None


def test_without_gradients_only_the_value_is_computed(seed):
    x, weight, targets = problem(seed, n=40)
    with Made() as made, torch.no_grad():
        loss = chunked_cross_entropy(x, weight, targets, rows=9)
    assert not loss.requires_grad and abs(loss - whole(x, weight, targets)) < 1e-6 * loss
    assert weight.shape not in made.shapes and x.shape not in made.shapes


def test_autocast_is_as_close_as_plain_autocast(seed):
    x, weight, targets = problem(seed, n=60, c=32, size=0.4)
    exact = whole(x, weight, targets)
    truth = gradients(exact, x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = chunked_cross_entropy(x, weight, targets, rows=16), whole(x, weight, targets)
    assert mine.dtype == torch.float32 and 0 < abs(mine - exact) < 2e-3 * exact, f"seed {seed}"
    for a, b, t in zip(gradients(mine, x, weight), gradients(theirs, x, weight), truth, strict=True):
        assert a.dtype == torch.float32
        error, usual = float((a - t).norm() / t.norm()), float((b - t).norm() / t.norm())
        assert 0 < error < 1.5 * usual + 1e-3, f"{error} against {usual} (seed {seed})"


@pytest.mark.parametrize(
    ("device", "units", "dtype"),
    [
        ("cpu", True, torch.bfloat16),
        ("cpu", False, None),
        ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float16),
        ("mps", False, torch.float16),
    ],
)
def test_auto_is_bf16_where_there_are_units_for_it_else_fp16_on_a_gpu(device, units, dtype, monkeypatch):
    monkeypatch.setattr(loss_module, "describe_device", lambda device: types.SimpleNamespace(bf16=units))
    assert amp_dtype.__wrapped__("auto", torch.device(device)) is dtype


def test_huge_scores_overflow_nothing(seed):
    x, weight, targets = problem(seed, n=30, size=60.0)
    mine, theirs = chunked_cross_entropy(x, weight, targets, rows=8), whole(x, weight, targets)
    assert theirs > 1e4 and abs(mine - theirs) < 1e-6 * theirs, f"seed {seed}"
    for a, b in zip(gradients(mine, x, weight), gradients(theirs, x, weight), strict=True):
        assert a.isfinite().all() and off(a, b) < 1e-4, f"seed {seed}"


def test_a_second_backward_pass_is_refused(seed):
    x, weight, targets = problem(seed, n=5)
    loss = chunked_cross_entropy(x, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward a second time"):
        loss.backward()


def test_no_position_gives_zero():
    x, weight, _ = problem(0, n=3)
    loss = chunked_cross_entropy(x[:0], weight, torch.zeros(0, dtype=torch.int64))
    assert loss == 0 and not gradients(loss, weight)[0].any()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_the_gradient_of_the_whole_model_tied_matrix_included(share, checkpointing, seed, monkeypatch):
    monkeypatch.setattr(chunked_module, "CHUNK", 5 * V)
    idx, targets = batch_of(seed, 4, share)
    expected, model = build(seed), build(seed).train()
    model.gradient_checkpointing = checkpointing
    (expected(idx, targets)[1] * count_targets(targets)).backward()
    for _ in range(2):  # gradients add up, as accumulation needs it
        summed_loss_in_chunks(model, idx, targets).backward()
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert float((p.grad / 2 - q.grad).abs().max()) < 1e-5 * max(1, float(q.grad.abs().max())), f"{name} {seed}"


class Allocated(Made):
    """Notes the shapes of new memory only: not what an operation writes into or looks at."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        before = len(self.shapes)
        out = super().__torch_dispatch__(operation, types, args, kwargs)
        if torch.is_tensor(out) and any(torch.is_tensor(t) and t.data_ptr() == out.data_ptr() for t in args):
            del self.shapes[before:]
        return out


def test_the_tied_matrix_gets_one_gradient_that_both_its_uses_add_to(seed):
    model, (idx, targets) = build(seed).train(), batch_of(seed, 4)
    assert len(targets.flatten()) != model.config.n_embd, "or the scores would have the shape of the matrix"
    with Allocated() as made:
        summed_loss_in_chunks(model, idx, targets).backward()
    assert made.shapes.count(model.wte.weight.shape) == 1
    assert not model.wte._forward_hooks


def test_a_head_of_its_own_and_a_frozen_matrix_get_what_plain_cross_entropy_gives(seed):
    idx, targets = batch_of(seed, 4, 0.4)
    expected = build(seed)
    expected.lm_head.weight = torch.nn.Parameter(torch.randn_like(expected.wte.weight))
    model = copy.deepcopy(expected)
    (expected(idx, targets)[1] * count_targets(targets)).backward()
    summed_loss_in_chunks(model, idx, targets).backward()
    for name in ("wte", "lm_head"):
        assert off(getattr(model, name).weight.grad, getattr(expected, name).weight.grad) < 1e-5, f"{name} {seed}"
    frozen = build(seed)
    frozen.wte.weight.requires_grad_(False)
    summed_loss_in_chunks(frozen, idx, targets).backward()
    assert frozen.wte.weight.grad is None and frozen.wpe.weight.grad.any()


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
@both_losses
def test_summed_loss_and_evaluate_loss_equal_the_model(loss_of, share, seed):
    model, batches = build(seed), [batch_of(seed + i, rows, share) for i, rows in enumerate((3, 1, 5))]
    sums, counts = [], []
    for idx, targets in batches:
        n = int((targets != -100).sum())
        assert count_targets(targets) == n
        sums.append(model(idx, targets)[1].item() * n)
        counts.append(n)
        assert abs(loss_of(model, idx, targets).item() - sums[-1]) < 1e-4, f"seed {seed}"
    assert abs(evaluate_loss(model, batches, loss=loss_of) - sum(sums) / sum(counts)) < 1e-5, f"seed {seed}"


def test_positions_without_a_label_never_reach_the_head(seed, monkeypatch):
    seen, real = [], chunked_cross_entropy
    spy = lambda x, *args, **how: seen.append((x.shape, args[1])) or real(x, *args, **how)  # noqa: E731
    monkeypatch.setattr(chunked_module, "chunked_cross_entropy", spy)
    idx, targets = batch_of(seed, 4, 0.3)
    summed_loss_in_chunks(build(seed), idx, targets)
    (shape, wanted), *rest = seen
    assert not rest and shape == (count_targets(targets), TINY.n_embd)
    assert wanted.tolist() == targets[targets != -100].tolist()


@both_losses
def test_ids_outside_the_vocabulary_are_named(loss_of, seed):
    model, (idx, targets) = build(seed), batch_of(seed, 2)
    for what, wrong in (("token id", 0), ("target", 1)):
        for bad in (V, -1):
            batch = [idx.clone(), targets.clone()]
            batch[wrong][1, 3] = bad
            with pytest.raises(ValueError, match=f"{what} {bad} is outside the vocabulary: ids run from 0 to {V - 1}"):
                loss_of(model, *batch)


def test_evaluate_loss_turns_dropout_off_and_restores_the_mode(seed):
    model, batches = build(seed, dropout=0.5), [batch_of(seed, 4)]
    for mode in (True, False):
        model.train(mode)
        assert evaluate_loss(model, batches) == evaluate_loss(model, batches)
        assert model.training is mode and all(p.grad is None for p in model.parameters())
    for nothing in ([], [(batches[0][0], torch.full((4, T), -100))]):
        with pytest.raises(ValueError, match="no target"):
            evaluate_loss(model, nothing)


@pytest.mark.parametrize("rows", [1, 7, None])
@pytest.mark.parametrize("row_by_row", [False, True])
def test_either_layout_of_the_scores_gives_the_same(row_by_row, rows, seed):
    """(V, n), which a CPU likes, and (n, V), which a GPU likes; the last chunk is shorter."""
    x, weight, targets = problem(seed, n=random.Random(seed).randint(8, 90))
    mine, theirs = chunked_cross_entropy(x, weight, targets, rows, row_by_row=row_by_row), whole(x, weight, targets)
    assert abs(mine - theirs) < 1e-6 * theirs.abs(), f"seed {seed}"
    for a, b in zip(gradients(mine, x, weight), gradients(theirs, x, weight), strict=True):
        assert off(a, b) < 2e-6, f"seed {seed}"


def test_each_device_gets_the_layout_and_the_chunks_that_suit_it(seed, monkeypatch):
    """What would happen on a GPU, seen on tensors that only pretend to be there."""
    assert chunk_rows(16 * 1024, 50257, "cpu") == 328 and chunk_rows(16 * 1024, 50257, "cuda") == 4096
    for kind, most in (("cpu", CHUNK), ("mps", CHUNK), ("cuda", CUDA_CHUNK)):
        for n in (1, 5, random.Random(seed).randint(6, 40_000)):
            rows = chunk_rows(n, 50257, kind)
            assert rows >= 1 and rows * 50257 <= most and rows == -(-n // -(-n // rows)), (kind, n, "equal chunks")
    assert chunk_rows(0, 50257, "cpu") == chunk_rows(3, 2**40, "cuda") == 1
    seen = []
    monkeypatch.setattr(chunked_module._ChunkedCrossEntropy, "apply", lambda *args: seen.append(args))
    monkeypatch.setattr(chunked_module, "compiled_gradient", lambda: "compiled")
    for kind in ("cpu", "cuda"):
        for compiled in (False, True):
            device = types.SimpleNamespace(type=kind)
            fake = type("Fake", (), {"__len__": lambda self: 5, "device": device, "dtype": torch.float32})()
            chunked_cross_entropy(fake, fake, None, compiled=compiled)
    layouts = [(args[-1], args[-2]) for args in seen]
    plain = chunked_module._losses_to_gradient
    assert layouts == [(False, plain), (False, plain), (True, plain), (True, "compiled")]


def test_pytorchs_own_chunked_loss_agrees(seed):
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("PyTorch before 2.13 has no linear_cross_entropy")
    x, weight, targets = problem(seed, n=80)
    chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=random.Random(seed).randint(3, 40))
    theirs = F.linear_cross_entropy(x, weight, targets, reduction="sum", options=chunks)
    mine = chunked_cross_entropy(x, weight, targets, rows=11)
    assert abs(mine - theirs) < 1e-6 * theirs, f"seed {seed}"
    for a, b in zip(gradients(mine, x, weight), gradients(theirs, x, weight), strict=True):
        assert off(a, b) < 1e-5, f"seed {seed}"


def test_the_plain_loss_measures_without_holding_all_logits(seed):
    model, (idx, targets) = build(seed), batch_of(seed, 200)
    n = count_targets(targets)
    assert n > 2 * 1024
    with Made() as made, torch.no_grad():
        total = summed_loss(model, idx, targets)
    assert max(shape.numel() for shape in made.shapes if V in shape and TINY.n_embd not in shape) == 1024 * V
    assert abs(total / n - model(idx, targets)[1]) < 1e-4, f"seed {seed}"


def test_the_module_of_the_loss_is_the_chunked_one(seed):
    model, batch = build(seed), batch_of(seed, 4, 0.5)
    assert SummedLoss(model)(*batch) == summed_loss_in_chunks(model, *batch)
    assert SummedLoss(model, "bf16")(*batch) == summed_loss_in_chunks(model, *batch, precision="bf16")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype, seed):
    x, weight, targets = problem(seed, n=300, c=64, v=1003, size=0.4)
    truth = whole(x, weight, targets)
    expected = gradients(truth, x, weight)
    moved = [t.detach().cuda().requires_grad_() for t in (x, weight)]
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        mine = chunked_cross_entropy(*moved, targets.cuda(), rows=64)
    assert abs(mine.cpu() - truth) < (1e-4 if dtype == torch.float32 else 1e-2) * truth
    for a, b in zip(gradients(mine, *moved), expected, strict=True):
        assert off(a.cpu(), b) < (1e-3 if dtype == torch.float32 else 5e-2)
