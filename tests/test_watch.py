"""minigpt_lib.training.monitor: what is shown and written while a run goes on."""

import json
import sys
import types

import pytest
import torch
from tiny import batch_of, build, flat, windows_of

from minigpt_lib.training.chunked_loss import SummedLoss
from minigpt_lib.training.loss import evaluate_loss
from minigpt_lib.training.monitor import (
    flops_per_token,
    live_plot,
    measured_peak,
    progress_bar,
    sample_text,
    tensorboard_log,
)
from minigpt_lib.training.optim import TrainConfig, lr_at
from minigpt_lib.training.run import train


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


def test_progress_goes_to_stderr(seed, capsys):
    train(build(seed), windows_of(seed).batch, TrainConfig(steps=3))
    captured = capsys.readouterr()
    assert captured.out == "" and "3/3" in captured.err and "loss" in captured.err
    train(build(seed), windows_of(seed).batch, TrainConfig(steps=3), progress=False)
    assert capsys.readouterr().err == ""
    with progress_bar(0, 3, show=False) as show:
        show({"loss": 1.0})


def test_without_tqdm_training_works_and_says_so_once(seed, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    model, cfg = build(seed), TrainConfig(steps=5, eval_every=2)
    before = flat(model)
    evaluate = lambda: evaluate_loss(model, [batch_of(seed, 2)])  # noqa: E731
    history = train(model, windows_of(seed).batch, cfg, evaluate=evaluate, sample=lambda: "so far")
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "no progress bar without tqdm (pip install tqdm): a line now and then instead"
    lines = [line for line in said[1:] if line.startswith("step")]
    assert [line.split(":")[0] for line in lines] == ["step 2 of 5", "step 4 of 5", "step 5 of 5"]
    shown = zip(history[1::2] + history[4:], lines, strict=True)
    assert all(f"held out {r['val_loss']:.3f}" in line for r, line in shown)
    assert "    so far" in said and not torch.equal(flat(model), before)
    with progress_bar(0, 3, seconds=0) as show:
        show({"step": 0, "loss": 1.25, "tokens_per_s": 7.0})
    assert "step 1 of 3: loss 1.250, 7 tokens/s" in capsys.readouterr().err


def test_the_peak_is_measured_on_random_numbers(monkeypatch):
    """On zeros or ones a chip draws less power and computes faster than it ever will in training."""
    asked, real = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, **how: asked.append(shape) or real(*shape, **how))
    measured_peak(torch.device("cpu"), repeats=1)
    assert asked == [(2, 1024, 1024)]


def test_flops_equal_what_pytorch_counts(seed):
    """Against PyTorch's counter, which sees the products as they run, those of explicit attention included."""
    from torch.utils.flop_counter import FlopCounterMode

    B, T = 3, 12
    idx, targets = batch_of(seed, B)
    for frozen in (False, True):
        model = build(seed)
        model.h[0].requires_grad_(not frozen)
        for block in model.h:
            block.attn.fused = False
        with FlopCounterMode(display=False) as counter:
            model(idx, targets)[1].backward()
        assert counter.get_total_flops() == B * T * flops_per_token(model, T), f"frozen {frozen}"


@pytest.mark.parametrize("counted", [1.0, 0.75, 0.25])
def test_flops_leave_out_the_head_where_no_target_counts(seed, counted):
    """A masked prompt costs no product with the head, so a tuning's share of the peak must not count one."""
    from torch.utils.flop_counter import FlopCounterMode

    B, T = 3, 12
    idx, targets = batch_of(seed, B)
    targets[:, : round((1 - counted) * T)] = -100
    for frozen in (False, True):
        model = build(seed)
        for block in model.h:
            block.attn.fused = False
        model.wte.weight.requires_grad_(not frozen)
        with FlopCounterMode(display=False) as counter:
            SummedLoss(model)(idx, targets).backward()
        unseen = 0 if frozen else 2 * int((targets != -100).sum()) * model.wte.weight.numel()  # addmm_ is not counted
        assert counter.get_total_flops() + unseen == B * T * flops_per_token(model, T, counted), f"frozen {frozen}"


def test_the_share_of_the_peak_counts_the_head_for_replies_alone(seed, monkeypatch):
    import minigpt_lib.training.run as training

    monkeypatch.setattr(training, "measured_peak", lambda device, dtype: 2.0)
    model, (idx, targets) = build(seed), batch_of(seed, 2)
    targets[:, : idx.size(1) // 2] = -100
    cost = training._cost(model, (idx, targets), TrainConfig(steps=1))
    assert cost == flops_per_token(model, idx.size(1), 0.5) / 2 < flops_per_token(model, idx.size(1)) / 2


def test_the_peak_is_one_that_a_matrix_product_reaches():
    peak = measured_peak(torch.device("cpu"))
    assert 1e9 < peak < 1e15
    assert measured_peak(torch.device("cpu"), torch.bfloat16) > 1e8


def test_the_bar_shows_the_share_of_the_peak_and_samples(capsys):
    with progress_bar(0, 4, cost=0.25 / 1000) as show:
        show({"step": 0, "loss": 2.0, "tokens_per_s": 1000.0, "sample": "Once upon a time", "val_loss": 2.5})
        show({"step": 1, "loss": 1.9, "tokens_per_s": 1000.0})
    assert "loss 1.900, held out 2.500, 1,000 tokens/s, 25% of peak" in (shown := capsys.readouterr().err)
    assert "step 1: Once upon a time" in shown


def test_a_peak_that_a_step_beats_is_not_a_peak(monkeypatch):
    """However busy the machine was when the peak was measured, no share is above one, and its measure is named."""
    import tqdm

    shown = []
    monkeypatch.setattr(tqdm.tqdm, "set_postfix_str", lambda bar, text, refresh: shown.append(text.split("s, ")[-1]))
    with progress_bar(0, 5, cost=1 / 1000) as show:
        for speed in (500.0, 1000.0, 1600.0, 1000.0, 2000.0, 500.0):
            show({"step": 0, "loss": 2.0, "tokens_per_s": speed})
    assert shown == ["50% of peak", "100% of peak", *(f"{n}% of fastest step" for n in (100, 62, 100, 25))]


def test_samples_come_with_the_evaluations_and_change_nothing(tmp_path, byte_encoding, seed):
    model = build(seed, vocab_size=257, dropout=0.2)
    windows = windows_of(seed)
    cfg = TrainConfig(steps=5, eval_every=2)
    look = lambda: sample_text(model, byte_encoding, "ab", n=20)  # noqa: E731
    history = train(model, windows.batch, cfg, sample=look, folder=tmp_path, progress=False)
    assert [r["step"] for r in history if "sample" in r] == [1, 3, 4]
    assert all(r["sample"].startswith("ab") for r in history if "sample" in r)
    assert [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()] == history
    plain = train(build(seed, vocab_size=257, dropout=0.2), windows.batch, cfg, progress=False)
    assert [r["loss"] for r in plain] == [r["loss"] for r in history]
    state = torch.get_rng_state()
    model.train()
    assert sample_text(model, byte_encoding, "ab", n=30, seed=3) == sample_text(
        model, byte_encoding, "ab", n=30, seed=3
    )
    assert model.training and torch.equal(torch.get_rng_state(), state), "n_ctx is passed, too"


def test_tensorboard_gets_every_number(tmp_path, monkeypatch):
    written = []
    writer = types.SimpleNamespace(
        add_scalar=lambda *a: written.append(a), add_text=lambda *a: written.append(a), flush=lambda: None
    )
    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = lambda folder: writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    tensorboard_log(tmp_path)({"step": 3, "loss": 1.5, "sample": "Hi"})
    assert written == [("loss", 1.5, 3), ("sample", "Hi", 3)]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        tensorboard_log(tmp_path)


def test_the_live_plot_is_drawn_anew_in_place(monkeypatch, capsys):
    import IPython.display

    shown = []
    handle = types.SimpleNamespace(update=lambda image: shown.append(("update", image.data)))
    monkeypatch.setattr(
        IPython.display, "display", lambda image, display_id: shown.append(("new", image.data)) or handle
    )
    draw = live_plot(every=3)
    for step in range(7):
        draw({"step": step, "loss": 5.0 - step} | ({"val_loss": 4.0} if step == 3 else {}))
    assert [kind for kind, _ in shown] == ["new", "update", "update"]
    assert all(data.startswith(b"\x89PNG") for _, data in shown) and len({data for _, data in shown}) == 3
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert live_plot()({"step": 0, "loss": 1.0}) is None
    assert capsys.readouterr().err.startswith("no picture of the loss without matplotlib and IPython (pip install ")
