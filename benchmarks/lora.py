"""LoRA training of GPT-2's 124M shape: this library against Transformers + PEFT in plain PyTorch.

    python benchmarks/lora.py                    # all of it, at most about --minutes 8; called again it goes on
    python benchmarks/lora.py losses memory      # some parts; --fresh forgets what was measured before

* losses   30 steps on the very same batches of 8 short records, float32: largest difference
* memory   peak memory of each side on its largest batch, every one in a process of its own
* speed    label tokens per second, in rounds: the next batch of each side's epoch, in turn, until the minutes are
           over. The batches of an epoch come in random order, so that the first few are like the rest

Both sides: the same random weights, r=8 on c_attn, alpha 8, AdamW, the same 200 records, loss on replies only.
Theirs: Hugging Face's GPT-2 with PEFT's defaults, random batches of 8 padded to the longest, labels of -100 for the
prompt. Ours: batches by tokens and length, 8 records in the mean; the head only where a label is; float32, and bf16
under autocast. The records are Alpaca's if a copy lies in ../shared/alpaca, else the course's own. On a CUDA device
both sides run under bf16 autocast and memory is what PyTorch allocated. Results go to benchmarks/results/lora.json,
after every part and every round.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from common import RESULTS, machine

from minigpt_lib.atomic import write_atomically
from minigpt_lib.devices import pick_device
from minigpt_lib.model.gpt import GPTConfig, GPTLanguageModel
from minigpt_lib.paths import data_dir
from minigpt_lib.text.tokenizer import load_tokenizer
from minigpt_lib.training.distributed import Engine
from minigpt_lib.training.loop import train_step
from minigpt_lib.training.optim import TrainConfig, configure_optimizer
from minigpt_lib.tuning.batching import Example, LengthBatches, encode_records, pad, real_share
from minigpt_lib.tuning.cleaning import load_records
from minigpt_lib.tuning.lora import add_lora, lora_parameters
from minigpt_lib.weights.convert import to_hf_state

SHARED = Path(__file__).resolve().parents[2] / "shared"
ALPACA = SHARED / "alpaca" / "alpaca_en_demo.json"
CFG = TrainConfig(lr=2e-4, weight_decay=0.0, grad_clip=0.0)
R, ALPHA, BATCH, RECORDS, MAX_LEN = 8, 8, 8, 200, 1024
STEPS, SHORT = 30, 64  # of the comparison of losses: how many, and the tokens of its longest record
PARTS = ("losses", "memory", "speed")


def source() -> tuple[Path, str]:
    """The file of records, and what it is called."""
    return (ALPACA, "Alpaca") if ALPACA.is_file() else (data_dir() / "instructions" / "train.json", "data/instructions")


def examples(count: int = RECORDS, longest: int | None = None) -> list[Example]:
    """`count` random records as token ids and labels; with `longest` only such as fit into so many tokens."""
    records = load_records(source()[0])
    random.Random(0).shuffle(records)
    enc = load_tokenizer("gpt2")
    encoded = (encode_records(enc, [record], MAX_LEN)[0] for record in records)
    return list(itertools.islice((e for e in encoded if longest is None or len(e[0]) <= longest), count))


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
        self.optimizer, self.engine = configure_optimizer(self.model, self.cfg), Engine(self.model, self.cfg)

    def step(self, members: list[int]) -> float:
        self.model.train()
        batch = pad([self.examples[n] for n in members])
        return train_step(self.model, self.optimizer, [batch], CFG.lr, self.cfg, engine=self.engine)[0]


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
    """The same batches for both in float32; short records, whole ones, so that it takes minutes and not an hour."""
    few = examples(STEPS * BATCH, SHORT)
    mine, theirs = Ours(few, device, "fp32"), Theirs(few, device, "fp32")
    batches = [list(range(i * BATCH, (i + 1) * BATCH)) for i in range(STEPS)]
    pairs = [(mine.step(members), theirs.step(members)) for members in batches]
    worst = max(abs(a - b) for a, b in pairs)
    print(f"{STEPS} steps, from {pairs[0][1]:.4f} to {pairs[-1][1]:.4f}; largest difference of the losses {worst:.1e}")
    return {"steps": STEPS, "longest_record": SHORT, "ours": [a for a, _ in pairs], "peft": [b for _, b in pairs],
            "largest_difference": worst}  # fmt: skip


def peak(side: str, device: torch.device) -> float:
    """GB at the peak of a step on the side's largest batch; called in a process of its own."""
    few = examples()
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


def speed(device: torch.device, until: float, before: dict, store: Callable[[dict], None]) -> None:
    """Round by round one batch of each side; stores after each, and goes on after the rounds in `before`."""
    few, done = examples(), before.get("rounds", [])
    plans = {side: plan(few, side) for side in sides(device)}
    trainers = {side: kind(few, device, precision) for side, (kind, precision) in sides(device).items()}
    for trainer in trainers.values():
        trainer.step([min(range(len(few)), key=lambda n: len(few[n][0]))])  # not timed
    longest = 0.0
    for number in range(len(done), min(map(len, plans.values()))):
        started = time.perf_counter()
        if done and started + longest > until:
            return
        done.append({side: timed(trainer, plans[side][number], few) for side, trainer in trainers.items()})
        longest = max(longest, time.perf_counter() - started)
        store(summary(done, few, plans))


def timed(trainer: Ours | Theirs, members: list[int], few: list[Example]) -> list[float]:
    """Label tokens and seconds of a step."""
    begin = time.perf_counter()
    trainer.step(members)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return [labels_in(few, members), round(time.perf_counter() - begin, 4)]


def summary(done: list[dict], few: list[Example], plans: dict[str, list]) -> dict:
    """Per side the rate over all rounds, the median round with the slowest and the fastest, and times PEFT."""
    rates, spread = {}, {}
    for side in plans:
        per_round = sorted(row[side][0] / row[side][1] for row in done)
        rates[side] = round(sum(row[side][0] for row in done) / sum(row[side][1] for row in done), 1)
        spread[side] = {"slowest": round(per_round[0], 1), "median": round(statistics.median(per_round), 1),
                        "fastest": round(per_round[-1], 1)}  # fmt: skip
    base = next(iter(rates))
    ratios = {side: round(rate / rates[base], 2) for side, rate in rates.items()}
    medians = {side: round(spread[side]["median"] / spread[base]["median"], 2) for side in rates}
    shares = {"ours": real_share(LengthBatches(few, BATCH)), "peft": real_share(LengthBatches(few, BATCH, chunk=1))}
    print(f"{len(done)} rounds: label tokens per second {rates}, times PEFT {ratios}", flush=True)
    return {"record_count": len(few), "rounds_done": len(done), "rounds_in_an_epoch": min(map(len, plans.values())),
            "label_tokens_per_s": rates, "per_round": spread, "times_peft": ratios, "times_peft_median": medians,
            "real_positions": {k: round(v, 3) for k, v in shares.items()}, "rounds": done}  # fmt: skip


class Results:
    """The file of results; what it holds already counts if it was measured with the same settings."""

    def __init__(self, path: Path, device: torch.device, fresh: bool):
        settings = {"shape": "gpt2, random weights", "r": R, "alpha": ALPHA, "targets": ["c_attn"], "batch_size": BATCH}
        settings |= {"records": source()[1], "device": device.type}
        facts = {"command": "python benchmarks/lora.py", "settings": settings}
        self.path, self.all = path, facts | {"machine": machine() | {"peft": peft.__version__}}
        with contextlib.suppress(FileNotFoundError):
            old = json.loads(path.read_text("utf-8"))
            same = all(old.get(key) == value for key, value in self.all.items())
            self.all |= {part: old[part] for part in PARTS if part in old and same and not fresh}

    def store(self, part: str, found: dict) -> None:
        self.all[part] = found
        write_atomically(self.path, lambda t: t.write_text(json.dumps(self.all, indent=1) + "\n", "utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=8.0, help="no new round of speed begins after so many")
    parser.add_argument("--fresh", action="store_true", help="measure again what the results hold already")
    parser.add_argument("--out", type=Path, default=RESULTS / "lora.json")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if unknown := set(args.parts) - {*PARTS, "peak"}:
        parser.error(f"{', '.join(unknown)}: the parts are {', '.join(PARTS)}")
    transformers.logging.set_verbosity_error()
    if (SHARED / "tiktoken_cache").is_dir():
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    device, until = pick_device(args.device), time.perf_counter() + 60 * args.minutes
    if "peak" in args.parts:
        print(peak(args.side, device))
        return
    results = Results(args.out, device, args.fresh)
    for part, run in (("losses", losses), ("memory", memory)):
        if part in (args.parts or PARTS) and part not in results.all:
            results.store(part, run(device))
    if "speed" in (args.parts or PARTS):
        speed(device, until, results.all.get("speed", {}), lambda found: results.store("speed", found))
    print("written to", args.out)


if __name__ == "__main__":
    main()
