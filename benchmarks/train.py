"""Full training steps of the GPT-2 124M shape: speed and memory, beside nanoGPT or Transformers with plain PyTorch.

    python benchmarks/train.py [--nanogpt CHECKOUT] [--layers 12] [--batch 4] [--window 256] [--repeats 5]

A step is forward, backward, clipping and AdamW on random ids. Speeds are medians of steps taken in turn in one process;
peak memory is the high-water mark of a fresh process for each candidate, less what the process had before the model and
less four times the weights (weights, gradients, AdamW's two moments). Without a checkout of nanoGPT the peer is
Transformers' GPT-2 with torch.optim.AdamW, used as nanoGPT's loop uses it. Writes benchmarks/results/train.json.
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

from minigpt_lib.checkpoints import load_checkpoint, save_checkpoint
from minigpt_lib.model import GPTConfig, GPTLanguageModel
from minigpt_lib.optimization import TrainConfig, configure_optimizer
from minigpt_lib.training import train_step
from minigpt_lib.watch import flops_per_token, measured_peak

LR = 1e-4
OURS, RECOMPUTED, PEER = "minigpt", "minigpt, gradient checkpointing", "peer"


def ours(args: argparse.Namespace, precision: str = "fp32", recompute: bool = False) -> tuple[nn.Module, Callable]:
    model = GPTLanguageModel(GPTConfig.preset("gpt2", n_layer=args.layers)).to(args.device).train()
    model.gradient_checkpointing = recompute
    cfg = TrainConfig(precision=precision)
    optimizer, batch = configure_optimizer(model, cfg), random_batch(args)
    return model, lambda: train_step(model, optimizer, [batch], LR, cfg)


def peer(args: argparse.Namespace) -> tuple[nn.Module, Callable]:
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
    idx, targets = (t.to(args.device) for t in random_batch(args))

    def step() -> None:
        loss_of(idx, targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

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


def speeds(args: argparse.Namespace) -> tuple[dict[str, list[float]], nn.Module]:
    model, step = ours(args)
    candidates = {"minigpt, fp32": step, f"{PEER}, fp32": peer(args)[1], "minigpt, bf16": ours(args, "bf16")[1]}
    return interleaved(candidates, args.repeats), model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", metavar="CHECKOUT", help="a checkout of karpathy/nanoGPT to measure against")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        measure_memory(args)
        return
    memory = {name: memory_of(name, args) for name in (OURS, RECOMPUTED, PEER)} if args.device == "cpu" else {}
    seconds, model = speeds(args)
    tokens = args.batch * args.window
    rows = {name: summary(times, tokens) for name, times in seconds.items()}
    rate = {name: row["tokens_per_s"] for name, row in rows.items()}
    saving = checkpoint_seconds(model)
    peak = measured_peak(torch.device(args.device))
    step = statistics.median(seconds["minigpt, fp32"])
    ratios = {
        "fp32: minigpt / peer": rate["minigpt, fp32"] / rate[f"{PEER}, fp32"],
        "minigpt: bf16 / fp32": rate["minigpt, bf16"] / rate["minigpt, fp32"],
        "share of the measured fp32 peak": rate["minigpt, fp32"] * flops_per_token(model, args.window) / peak,
        "a checkpoint every 500 steps, share of the time": saving["write_s"] / (500 * step),
    }
    for name in (OURS, RECOMPUTED) if memory else ():
        ratios[f"memory above the state: {name} / peer"] = memory[name]["above_bytes"] / memory[PEER]["above_bytes"]
    for name, row in rows.items():
        print(f"{name:16} {row['tokens_per_s']:8.1f} tokens/s   ({row['slowest']:.1f} to {row['fastest']:.1f})")
    for name, row in memory.items():
        print(f"{name:34} {row['above_bytes'] / 1e6:7.0f} MB above {row['state_bytes'] / 1e6:.0f} MB")
    print(*(f"{name}: {ratio:.3f}" for name, ratio in ratios.items()), sep="\n")
    who = "nanoGPT" if args.nanogpt else "Transformers GPT-2, torch.optim.AdamW"
    settings = {k: v for k, v in vars(args).items() if k not in ("memory", "nanogpt")} | {"peer": who, "dropout": 0.0}
    results = {"machine": machine(), "settings": settings, "rows": rows, "memory": memory, "checkpoint": saving}
    results |= {"peak_flops": peak, "ratios": {name: round(ratio, 4) for name, ratio in ratios.items()}}
    name = "train" if args.layers == 12 else f"train_{args.layers}_layers"
    print("written to", write(name, results))


if __name__ == "__main__":
    main()
