"""LoRA training of GPT-2's 124M shape: this library against Transformers + PEFT in plain PyTorch.

    python benchmarks/lora.py losses      # 30 steps on the very same batches: largest difference of the losses
    python benchmarks/lora.py memory      # peak memory of each side, every one in a process of its own
    python benchmarks/lora.py speed       # label tokens per second; stops after --seconds, goes on when called again

Both sides: the same random weights, r=8 on c_attn, alpha 8, AdamW, the same 200 records, loss on replies only.
Theirs: Hugging Face's GPT-2 with PEFT's defaults, random batches of 8 padded to the longest, labels of -100 for the
prompt. Ours: batches by tokens and length, 8 records in the mean; the head only where a label is; float32, and bf16
under autocast. The records are Alpaca's if a copy lies in ../shared/alpaca, else the course's own. On a CUDA device
both sides run under bf16 autocast and memory is what PyTorch allocated. Results go to benchmarks/results/lora.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import peft
import torch
import transformers
from common import RESULTS, machine, write

from minigpt_lib.batching import Example, LengthBatches, encode_records, pad, real_share
from minigpt_lib.lora import add_lora, lora_parameters
from minigpt_lib.model import GPTConfig, GPTLanguageModel
from minigpt_lib.optimization import TrainConfig, configure_optimizer
from minigpt_lib.records import load_records
from minigpt_lib.runtime import data_dir, pick_device
from minigpt_lib.tokenizer import load_tokenizer
from minigpt_lib.training import train_step
from minigpt_lib.weights import to_hf_state

ALPACA = Path(__file__).resolve().parents[2] / "shared" / "alpaca" / "alpaca_en_demo.json"
CFG = TrainConfig(lr=2e-4, weight_decay=0.0, grad_clip=0.0)
R, ALPHA, BATCH, RECORDS, MAX_LEN = 8, 8, 8, 200, 1024


def examples(count: int = RECORDS, max_len: int = MAX_LEN) -> tuple[list[Example], str]:
    """The records as token ids and labels, and where they are from."""
    path = ALPACA if ALPACA.is_file() else data_dir() / "instructions" / "train.json"
    records = random.Random(0).sample(load_records(path), count)
    return encode_records(load_tokenizer("gpt2"), records, max_len), "Alpaca" if path == ALPACA else "data/instructions"


def build() -> GPTLanguageModel:
    torch.manual_seed(0)
    return add_lora(GPTLanguageModel(GPTConfig.preset("gpt2")), r=R, alpha=ALPHA)


def build_theirs(ours: GPTLanguageModel) -> torch.nn.Module:
    """Hugging Face's GPT-2 with PEFT, and all numbers of `ours`."""
    config = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = transformers.GPT2LMHeadModel(config)
    base = {name: p for name, p in ours.state_dict().items() if ".adapters." not in name}
    model.transformer.load_state_dict(to_hf_state(base))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["c_attn"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, wanted)
    with torch.no_grad():
        for name, p in lora_parameters(ours).items():
            layer, matrix = name.split(".adapters.default.")
            model.get_parameter(f"base_model.model.transformer.{layer}.{matrix}.default.weight").copy_(p)
    return model


class Ours:
    """One step of this library's training on a batch of numbers of examples."""

    def __init__(self, few: list[Example], device: torch.device, precision: str):
        self.model, self.examples = build().to(device), few
        self.cfg = TrainConfig(lr=CFG.lr, weight_decay=0.0, grad_clip=0.0, precision=precision)
        self.optimizer = configure_optimizer(self.model, self.cfg)

    def step(self, members: list[int]) -> float:
        self.model.train()
        return train_step(self.model, self.optimizer, [pad([self.examples[n] for n in members])], CFG.lr, self.cfg)[0]


class Theirs:
    """The same with Transformers and PEFT."""

    def __init__(self, few: list[Example], device: torch.device, precision: str):
        self.model, self.examples, self.precision = build_theirs(build()).to(device).train(), few, precision
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=CFG.lr, betas=CFG.betas, eps=1e-8, weight_decay=0.0)

    def batch(self, members: list[int]) -> dict[str, torch.Tensor]:
        rows = [self.examples[n] for n in members]
        T = max(len(ids) for ids, _ in rows)
        filled = [(ids + [0] * (T - len(ids)), [1] * len(ids) + [0] * (T - len(ids)),
                   labels + [-100] * (T - len(ids))) for ids, labels in rows]  # fmt: skip
        device = next(self.model.parameters()).device
        ids, mask, labels = (torch.tensor(part, device=device) for part in zip(*filled, strict=True))  # (B, T) each
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def step(self, members: list[int]) -> float:
        batch = self.batch(members)
        cast = torch.autocast(batch["labels"].device.type, torch.bfloat16, enabled=self.precision == "bf16")
        with cast:
            loss = self.model(**batch).loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def labels_in(few: list[Example], members: list[int]) -> int:
    return sum(label != -100 for n in members for label in few[n][1][1:])


def sides(device: torch.device) -> dict[str, tuple[type, str]]:
    """Name: class and precision. On a GPU both in bf16, on a CPU PEFT in float32 and ours in both."""
    if device.type == "cuda":
        return {"peft bf16": (Theirs, "bf16"), "ours bf16": (Ours, "bf16")}
    return {"peft fp32": (Theirs, "fp32"), "ours fp32": (Ours, "fp32"), "ours bf16": (Ours, "bf16")}


def plan(few: list[Example], side: str) -> list[list[int]]:
    """One epoch's batches."""
    batches = LengthBatches(few, BATCH, seed=0, chunk=1 if side.startswith("peft") else 64)
    return [batches.members(i) for i in range(len(batches))]


def losses(device: torch.device) -> dict:
    """30 steps on the same batches in float32, short records, so that it takes minutes and not an hour."""
    few, source = examples(60, max_len=64)
    mine, theirs = Ours(few, device, "fp32"), Theirs(few, device, "fp32")
    batches = [[2 * i, 2 * i + 1] for i in range(30)]
    pairs = [(mine.step(members), theirs.step(members)) for members in batches]
    worst = max(abs(a - b) for a, b in pairs)
    print(f"30 steps, from {pairs[0][1]:.4f} to {pairs[-1][1]:.4f}; largest difference of the losses {worst:.1e}")
    return {"steps": 30, "records": source, "ours": [a for a, _ in pairs], "peft": [b for _, b in pairs],
            "largest_difference": worst}  # fmt: skip


def peak(side: str, device: torch.device) -> float:
    """GB at the peak of a step on the side's largest batch; called in a process of its own."""
    few, _ = examples()
    kind, precision = sides(device)[side]
    trainer = kind(few, device, precision)
    largest = max(plan(few, side), key=lambda members: len(members) * max(len(few[n][0]) for n in members))
    trainer.step(largest)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def memory(device: torch.device) -> dict:
    found = {}
    for side in sides(device):
        command = [sys.executable, __file__, "peak", "--side", side, "--device", device.type]
        found[side] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        print(f"{side}: {found[side]:.2f} GB at its largest batch", flush=True)
    base = next(iter(found))
    return {"gigabytes": found, "share_of_peft": {side: round(found[side] / found[base], 3) for side in found}}


def speed(device: torch.device, seconds: float, before: dict) -> dict:
    """Round by round one batch of each side; earlier rounds are kept, so that a short visit can be continued."""
    few, source = examples()
    plans = {side: plan(few, side) for side in sides(device)}
    done = before.get("rounds", []) if before.get("records") == source else []
    begin, trainers = time.perf_counter(), {s: kind(few, device, p) for s, (kind, p) in sides(device).items()}
    for trainer in trainers.values():
        trainer.step([min(range(len(few)), key=lambda n: len(few[n][0]))])  # not timed
    longest = 0.0
    while len(done) < len(plans["ours bf16"]) and time.perf_counter() - begin + longest < seconds:
        row, started = {}, time.perf_counter()
        for side, trainer in trainers.items():
            members, at = plans[side][len(done)], time.perf_counter()
            trainer.step(members)
            if device.type == "cuda":
                torch.cuda.synchronize()
            row[side] = [labels_in(few, members), round(time.perf_counter() - at, 4)]
        done.append(row)
        longest = max(longest, time.perf_counter() - started)
        print(len(done), row, flush=True)
    return summary(done, few, source, plans)


def summary(done: list[dict], few: list[Example], source: str, plans: dict) -> dict:
    rates, spread = {}, {}
    for side in done[0]:
        per_round = sorted(row[side][0] / row[side][1] for row in done)
        rates[side] = round(sum(row[side][0] for row in done) / sum(row[side][1] for row in done), 1)
        spread[side] = {"slowest": round(per_round[0], 1), "median": round(statistics.median(per_round), 1),
                        "fastest": round(per_round[-1], 1)}  # fmt: skip
    base = next(iter(rates))
    ratios = {side: round(rate / rates[base], 2) for side, rate in rates.items()}
    shares = {"ours": real_share(LengthBatches(few, BATCH)), "peft": real_share(LengthBatches(few, BATCH, chunk=1))}
    print("label tokens per second", rates, "times PEFT", ratios)
    return {"records": source, "record_count": len(few), "rounds_done": len(done),
            "rounds_in_an_epoch": len(plans[base]), "label_tokens_per_s": rates, "per_round": spread,
            "times_peft": ratios,
            "real_positions": {k: round(v, 3) for k, v in shares.items()}, "rounds": done}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("losses", "memory", "speed", "peak"))
    parser.add_argument("--seconds", type=float, default=3600, help="of speed: stop before the round that passes this")
    parser.add_argument("--side", help="of peak: which side")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    device, path = pick_device(args.device), RESULTS / "lora.json"
    if args.part == "peak":
        print(peak(args.side, device))
        return
    results = {}
    with contextlib.suppress(FileNotFoundError):
        results = json.loads(path.read_text("utf-8"))
    run = {"losses": losses, "memory": memory, "speed": lambda d: speed(d, args.seconds, results.get("speed", {}))}
    part = run[args.part](device) | {"machine": machine() | {"peft": peft.__version__}}
    shape = {"shape": "gpt2, random weights", "r": R, "alpha": ALPHA, "targets": ["c_attn"], "batch_size": BATCH}
    write("lora", {"command": "python benchmarks/lora.py losses|memory|speed"} | shape | results | {args.part: part})


if __name__ == "__main__":
    main()
