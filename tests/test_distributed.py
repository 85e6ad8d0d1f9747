"""Two processes against one: DistributedDataParallel and FSDP2 over gloo, as `torchrun` starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from ranks import runs
from tiny import batch_of, build

from minigpt_lib.training import distributed as module
from minigpt_lib.training.chunked_loss import SummedLoss
from minigpt_lib.training.distributed import (
    Engine,
    Ranks,
    all_sum,
    current_ranks,
    own_rows,
    parallelised,
    process_group,
    synchronised,
)
from minigpt_lib.training.loss import count_targets

ROOT = Path(__file__).resolve().parents[1]

needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="PyTorch without gloo"
)


def torchrun(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


@needs_gloo
def test_two_ranks_equal_one_process(tmp_path, seed):
    """Every run, divided in either way, resumed from the checkpoint of the other way: losses and weights to 1e-5."""
    done = torchrun("tests/ranks.py", str(tmp_path / "two"), str(seed % 10_000))
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = json.loads((tmp_path / "two" / "losses.json").read_text()), runs(tmp_path / "one", seed % 10_000)
    assert "all need the same, shared folder" in two.pop("alone")
    assert two.pop("error") == "batch_size=3 must be a multiple of the 2 ranks that share it"
    for name, expected in one.items():
        difference = np.abs(np.array(two[name]) - expected)
        print(name, difference.max())
        assert len(two[name]) == len(expected) and difference.max() < 1e-5, f"{name} (seed {seed})"
    for name in ("from ddp to fsdp", "from fsdp to ddp"):
        difference = np.abs(np.array(two[name]) - one["ddp"]).max()
        assert difference < 1e-5, f"{name}: {difference} (seed {seed})"
    assert abs(one["ddp"][0] - one["ddp"][-1]) > 0.01, "nothing was learnt, so nothing is tested"
    assert sorted(p.name for p in (tmp_path / "two" / "ddp").iterdir()) == [
        "checkpoint-00000004.pt", "checkpoint-00000008.pt", "history.jsonl"
    ]  # fmt: skip


@needs_gloo
def test_the_module_runs_under_torchrun_and_goes_on(tmp_path):
    (tmp_path / "text.txt").write_text("One two three four five. " * 400)
    words = ["-m", "minigpt_lib.training.run", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run")]
    words += ["--window", "16", "--steps", "3", "--batch-size", "4", "--prompt", "One", "--device", "cpu"]
    words += ["--precision", "fp32", "--lr", "1e-3"]
    for _ in range(2):
        done = torchrun(*words)
        assert done.returncode == 0, done.stderr[-3000:]
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "run" / "train.tokens").exists() and "3/3" in done.stderr
    apart = [*words[:3], "--out", str(tmp_path / "fsdp"), *words[5:], "--fsdp"]  # samples too come from a divided model
    done = torchrun(*apart)
    assert done.returncode == 0, done.stderr[-3000:]
    both = [(tmp_path / name / "history.jsonl").read_text().splitlines() for name in ("run", "fsdp")]
    losses = np.array([[json.loads(line)["loss"] for line in lines] for lines in both])
    assert np.abs(losses[0] / losses[1] - 1).max() < 1e-5, losses
    assert all("One" in json.loads(lines[-1])["sample"] for lines in both)
    done = torchrun(*words, "--lr", "0.5")
    assert done.returncode != 0 and "another TrainConfig: lr is 0.001 there and 0.5 here" in done.stderr


@needs_gloo
def test_the_command_pretrain_runs_under_torchrun(tmp_path):
    """Two processes, one model folder, and the losses of the same command in one process."""
    (tmp_path / "text.txt").write_text("One two three four five. " * 400)
    words = ["-m", "minigpt_lib.cli", "pretrain", "--data", str(tmp_path / "text.txt"), "--window", "16"]
    words += ["--steps", "3", "--device", "cpu", "--precision", "fp32", "--out"]
    two = torchrun(*words, str(tmp_path / "two"))
    assert two.returncode == 0 and two.stdout.count("holds the model") == 1, two.stderr[-3000:]
    command = [sys.executable, *words, str(tmp_path / "one")]
    one = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert one.returncode == 0, one.stderr[-3000:]
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert files[0] == files[1] and "model.safetensors" in files[0] and "train.tokens" not in files[0]
    lines = [(tmp_path / name / "history.jsonl").read_text().splitlines() for name in ("one", "two")]
    losses = np.array([[json.loads(line)["loss"] for line in part] for part in lines])
    assert losses.shape == (2, 3) and np.abs(losses[0] - losses[1]).max() < 1e-5, losses


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_each_row_belongs_to_one_rank(world, seed):
    idx, targets = batch_of(seed, 5, 0.7)
    parts = [own_rows((idx, targets), Ranks(rank, world)) for rank in range(world)]
    assert sum(count_targets(t) for _, t in parts) == count_targets(targets)
    rows = [row for x, t in parts if count_targets(t) or len(x) > 1 for row in x.tolist()]
    assert all(len(x) >= 1 for x, _ in parts), "a rank without a row would keep the others waiting"
    assert all(row in idx.tolist() for row in rows)


def test_without_torchrun_nothing_is_distributed(seed, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # left over from somebody else: torchrun's own sign is another one
    with process_group(torch.device("cpu")) as device:
        assert device == torch.device("cpu") and current_ranks() == Ranks(0, 1) and current_ranks().main
    loss = SummedLoss(build(seed))
    assert parallelised(loss, fsdp=True) is loss and all_sum(torch.tensor(3.0)) == 3
    with synchronised(loss, last=False):
        pass


@pytest.mark.parametrize("micro", [1, 3])
def test_gradients_travel_once_a_step(micro, seed, monkeypatch):
    """With `no_sync` in all micro-batches but the last, as DistributedDataParallel itself sees it."""
    from minigpt_lib.training import loop as training
    from minigpt_lib.training.optim import TrainConfig, configure_optimizer

    class Spy(nn.parallel.DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module, self.require_backward_grad_sync, self.seen = module, True, []

        def forward(self, *args):
            self.seen.append(self.require_backward_grad_sync)
            return self.module(*args)

    model, cfg = build(seed), TrainConfig()
    spy = Spy(SummedLoss(model))
    batches = [batch_of(seed + i, 2) for i in range(micro)]
    training.train_step(model, configure_optimizer(model, cfg), batches, 1e-3, cfg, engine=Engine(model, cfg, loss=spy))
    assert spy.seen == [False] * (micro - 1) + [True]


def test_the_batch_is_not_moved_before_its_ids_are_looked_at(seed, monkeypatch):
    """With device_ids, DistributedDataParallel would move it to the GPU, where a wrong id is an assertion of CUDA's."""
    made = []
    monkeypatch.setattr(module, "current_ranks", lambda: Ranks(0, 2))
    monkeypatch.setattr(module, "DistributedDataParallel", lambda loss, **how: made.append(how) or loss)
    parallelised(SummedLoss(build(seed)))
    assert made == [{}]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_join_over_nccl(tmp_path):
    (tmp_path / "text.txt").write_text("One two three four five. " * 400)
    done = torchrun("-m", "minigpt_lib.training.run", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"),
                    "--window", "16", "--steps", "3", "--batch-size", "4", "--device", "cuda")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
