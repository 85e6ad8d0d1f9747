"""Full training steps of the GPT-2 124M shape: speed and memory, beside nanoGPT or Transformers with plain PyTorch.

    python benchmarks/train.py [--nanogpt CHECKOUT] [--layers 12] [--batch N] [--window N] [--repeats 5]

A step is forward, backward, clipping and AdamW on random ids. Speeds are medians of steps taken in turn in one process;
peak memory is the high-water mark of a fresh process for each candidate, less what the process had before the model and
less four times the weights (weights, gradients, AdamW's two moments). Without a checkout of nanoGPT the peer is
Transformers' GPT-2 with torch.optim.AdamW, used as nanoGPT's loop uses it. Writes benchmarks/results/train.json.

On a CUDA device both sides run in bf16 and compiled, on 16 rows of 1,024 tokens unless told otherwise. What counts is
the share of the bf16 peak that a matrix product reaches there. Writes benchmarks/results/train_cuda.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from common import interleaved, machine, summary, write

from minigpt_lib.model.gpt import GPTConfig, GPTLanguageModel
from minigpt_lib.training.checkpoint import load_checkpoint, save_checkpoint
from minigpt_lib.training.distributed import Engine
from minigpt_lib.training.loop import train_step
from minigpt_lib.training.monitor import flops_per_token, measured_peak
from minigpt_lib.training.optim import TrainConfig, configure_optimizer

LR = 1e-4
OURS, RECOMPUTED, PEER = "minigpt", "minigpt, gradient checkpointing", "peer"


def ours(
    args: argparse.Namespace, precision: str = "fp32", recompute: bool = False, compiled: bool = False
) -> tuple[nn.Module, Callable]:
    model = GPTLanguageModel(GPTConfig.preset("gpt2", n_layer=args.layers)).to(args.device).train()
    model.gradient_checkpointing = recompute
    for block in model.h if compiled else ():  # as TrainConfig(compile=True) does it
        block.compile()
    cfg = TrainConfig(precision=precision, compile=compiled)
    optimizer, batch, engine = configure_optimizer(model, cfg), random_batch(args), Engine(model, cfg)
    return model, lambda: train_step(model, optimizer, [batch], LR, cfg, engine=engine)


def peer(args: argparse.Namespace, precision: str = "fp32", compiled: bool = False) -> tuple[nn.Module, Callable]:
    """nanoGPT's loop (zero, forward, loss, backward, clip, step) around its own model or Transformers'."""
    if args.nanogpt:
        sys.path.insert(0, args.nanogpt)
        from model import GPT
        from model import GPTConfig as TheirConfig

        sizes = {"vocab_size": 50257, "block_size": 1024, "n_layer": args.layers, "n_head": 12, "n_embd": 768}
        model = GPT(TheirConfig(**sizes, dropout=0.0, bias=True)).to(args.device).train()
        optimizer = model.configure_optimizers(0.1, LR, (0.9, 0.95), args.device)
        loss_of = lambda idx, targets: model(idx, targets)[1]  # noqa: E731
    else:
        from transformers import GPT2Config, GPT2LMHeadModel

        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
        model = GPT2LMHeadModel(GPT2Config(n_layer=args.layers, **off)).to(args.device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
        loss_of = lambda idx, targets: F.cross_entropy(model(idx).logits.flatten(0, 1), targets.flatten())  # noqa: E731
    if compiled:
        model.compile()
    idx, targets = (t.to(args.device) for t in random_batch(args))

    def step() -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(idx, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for a GPU, as a loop that logs its loss does

    return model, step


def random_batch(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    return tuple(torch.randint(50257, (2, args.batch, args.window), generator=gen))


def status(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def warm_up(args: argparse.Namespace) -> None:
    """Load what PyTorch and the peer load on first use: libraries are not the model's memory."""
    if args.memory == PEER and not args.nanogpt:
        import transformers.models.gpt2.modeling_gpt2  # noqa: F401
    p = nn.Parameter(torch.ones(64, 64))
    F.cross_entropy(p @ p, torch.zeros(64, dtype=torch.int64)).backward()
    torch.optim.AdamW([p]).step()


def measure_memory(args: argparse.Namespace) -> None:
    """In a process of its own: two steps (the second one has the optimizer's moments), then what was needed at most."""
    warm_up(args)
    before = status("VmRSS")
    model, step = peer(args) if args.memory == PEER else ours(args, recompute=args.memory == RECOMPUTED)
    state = 4 * sum(p.numel() * 4 for p in model.parameters())
    step(), step()
    peak = status("VmHWM") - before
    print(json.dumps({"peak_bytes": peak, "state_bytes": state, "above_bytes": peak - state}))


def memory_of(name: str, args: argparse.Namespace) -> dict[str, int]:
    words = [f"--{k}={getattr(args, k)}" for k in ("layers", "batch", "window", "device")]
    words += [f"--nanogpt={args.nanogpt}"] if args.nanogpt else []
    command = [sys.executable, __file__, *words, "--memory", name]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def checkpoint_seconds(model: nn.Module, repeats: int = 3) -> dict[str, float]:
    """Time to write a checkpoint of the full state (flushed to the disk), and to read one back."""
    cfg = TrainConfig()
    optimizer = configure_optimizer(model, cfg)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds = []
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:
        for n in range(repeats):
            begin = time.perf_counter()
            path = save_checkpoint(folder, model, optimizer, n + 1, [], cfg)
            seconds.append(time.perf_counter() - begin)
        size, begin = path.stat().st_size, time.perf_counter()
        load_checkpoint(folder, model, optimizer, cfg)
        return {"write_s": statistics.median(seconds), "slowest_s": max(seconds), "bytes": size,
                "read_s": time.perf_counter() - begin}  # fmt: skip


def candidates(args: argparse.Namespace) -> dict[str, tuple[nn.Module, Callable]]:
    """Name: model and step; the first is ours in the precision of the peer, which comes second."""
    if args.device == "cuda":
        how = {"precision": "bf16", "compiled": True}
        return {f"{OURS}, bf16, compiled": ours(args, **how), f"{PEER}, bf16, compiled": peer(args, **how)}
    return {f"{OURS}, fp32": ours(args), f"{PEER}, fp32": peer(args), f"{OURS}, bf16": ours(args, "bf16")}


def compare(rows: dict[str, dict], cost: float, peak: float) -> dict[str, float]:
    """The ratios of the speeds; cost is in operations a token, peak in operations a second in the first's precision."""
    rate = {name: row["tokens_per_s"] for name, row in rows.items()}
    first, second, *more = rate
    ratios = {f"{first} / {PEER}": rate[first] / rate[second]}
    ratios |= {f"{name} / {first}": rate[name] / rate[first] for name in more}
    return ratios | {f"share of the measured peak: {name}": rate[name] * cost / peak for name in (first, second)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", metavar="CHECKOUT", help="a checkout of karpathy/nanoGPT to measure against")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, help="rows (default: 4, on CUDA 16)")
    parser.add_argument("--window", type=int, help="tokens a row (default: 256, on CUDA 1024)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        measure_memory(args)
        return
    cuda = args.device == "cuda"
    args.batch, args.window = args.batch or (16 if cuda else 4), args.window or (1024 if cuda else 256)
    memory = {} if cuda else {name: memory_of(name, args) for name in (OURS, RECOMPUTED, PEER)}
    running = candidates(args)
    seconds = interleaved({name: step for name, (_, step) in running.items()}, args.repeats)
    first, (model, _) = next(iter(running.items()))
    rows = {name: summary(times, args.batch * args.window) for name, times in seconds.items()}
    peak = measured_peak(torch.device(args.device), torch.bfloat16 if cuda else None)
    ratios = compare(rows, flops_per_token(model, args.window), peak)
    saving = checkpoint_seconds(model)
    share = saving["write_s"] / (500 * statistics.median(seconds[first]))
    ratios["a checkpoint every 500 steps, share of the time"] = share
    for name in (OURS, RECOMPUTED) if memory else ():
        ratios[f"memory above the state: {name} / {PEER}"] = memory[name]["above_bytes"] / memory[PEER]["above_bytes"]
    for name, row in rows.items():
        print(f"{name:22} {row['tokens_per_s']:8.1f} tokens/s   ({row['slowest']:.1f} to {row['fastest']:.1f})")
    for name, row in memory.items():
        print(f"{name:34} {row['above_bytes'] / 1e6:7.0f} MB above {row['state_bytes'] / 1e6:.0f} MB")
    print(*(f"{name}: {ratio:.3f}" for name, ratio in ratios.items()), sep="\n")
    who = "nanoGPT" if args.nanogpt else "Transformers GPT-2, torch.optim.AdamW"
    settings = {k: v for k, v in vars(args).items() if k not in ("memory", "nanogpt")} | {"peer": who, "dropout": 0.0}
    results = {"machine": machine(), "settings": settings, "rows": rows, "memory": memory, "checkpoint": saving}
    results |= {"peak_flops": peak, "ratios": {name: round(ratio, 4) for name, ratio in ratios.items()}}
    name = ("train_cuda" if cuda else "train") + ("" if args.layers == 12 else f"_{args.layers}_layers")
    print("written to", write(name, results))


if __name__ == "__main__":
    main()
