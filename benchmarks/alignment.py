"""What instruction tuning does to a model's manners and to its knowledge: the whole experiment.

    python benchmarks/alignment.py            # every row, two seeds, writes data/mini/alignment.json
    python benchmarks/alignment.py --quick    # one seed, three rows, a quarter of the steps, writes nothing

The base model `mini` is tuned on data/instructions/train.json in several ways. Each result is measured on records and
facts that it was not tuned on:

* test_loss   mean nats per reply token on data/instructions/test.json;
* format      share of test instructions answered with some text, the end token, and no forged turn (greedy);
* recall      share of facts in data/facts.json answered in the chat template, by group: "tuned" (in the corpus and in
              the records), "pretrained" (in the corpus only), "absent" (nowhere);
* document    the same facts as the beginning of a document that the model completes, the way the base learnt them;
* unknown     share of "absent" facts to which the reply is that it does not know.

Hyperparameters were chosen on data/instructions/val.json and on every fourth fact; the table leaves both out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import torch
from common import machine

from minigpt_lib.lora import count_trainable, lora_disabled
from minigpt_lib.runtime import data_dir
from minigpt_lib.sft import (
    LengthBatches,
    complete,
    decode_reply,
    encode_prompt,
    encode_records,
    finetune,
    format_rate,
    load_records,
    recall,
    recipe_for,
)
from minigpt_lib.tokenizer import load_tokenizer
from minigpt_lib.training import evaluate_loss, write_atomically
from minigpt_lib.weights import load_pretrained

ALL_LINEAR = ("c_attn", "c_proj", "c_fc")
TOO_HIGH = 20  # times the recipe's learning rate


def plan(recipe) -> list[dict]:
    """The rows of the table: a name and what is different from the recipe."""
    rows = [{"name": f"LoRA r={r}, c_attn", "r": r, "targets": ("c_attn",)} for r in (1, 2, 4, 8, 16)]
    rows.append({"name": "LoRA r=8, all linear", "r": 8, "targets": ALL_LINEAR})
    shipped = {"name": "recipe (the shipped adapter)", "r": recipe.r, "targets": recipe.targets}
    if (shipped["r"], set(shipped["targets"])) != (8, set(ALL_LINEAR)):
        rows.append(shipped)
    rows.append({"name": "full fine-tuning", "full": True})
    best = {"r": recipe.r, "targets": recipe.targets}
    rows.append({"name": "recipe, prompt not masked", "mask_prompt": False, **best})
    rows.append({"name": f"recipe, learning rate x {TOO_HIGH}", "lr": recipe.lr * TOO_HIGH, **best})
    return rows


def measure(model, enc, records: list[dict], facts: list[dict]) -> dict:
    """All numbers of one row."""
    recipe = recipe_for(model.config)
    test = LengthBatches(encode_records(enc, records, recipe.max_len), 32)
    absent = [encode_prompt(enc, f["question"]) for f in facts if f["group"] == "absent"]
    replies = [decode_reply(enc, ids).lower() for ids in complete(model, enc, absent, 32)]
    return {
        "test_loss": round(evaluate_loss(model, [test.batch(i) for i in range(len(test))]), 4),
        "format": round(format_rate(model, enc, records), 4),
        "recall": {k: round(v, 4) for k, v in sorted(recall(model, enc, facts).items())},
        "document": {k: round(v, 4) for k, v in sorted(recall(model, enc, facts, style="document").items())},
        "unknown": round(sum("do not know" in t for t in replies) / len(replies), 4),
    }


def tune(row: dict, seed: int, enc, train: list[dict], val: list[dict], shorten: int):
    """A freshly loaded base, tuned as `row` says. Returns the model, what was learnt with, and seconds."""
    model = load_pretrained("mini")
    recipe, full = recipe_for(model.config), row.get("full", False)
    if not full:
        recipe = replace(recipe, r=row["r"], alpha=recipe.alpha / recipe.r * row["r"], targets=tuple(row["targets"]))
        torch.manual_seed(seed)
        recipe.add_lora(model)
    cfg = recipe.train_config(len(train), full=full, seed=seed)
    lr = row.get("lr", cfg.lr)
    cfg = replace(cfg, steps=cfg.steps // shorten, warmup=cfg.warmup // shorten, lr=lr, min_lr=lr / 10, eval_every=0)
    begin = time.perf_counter()
    keep = {"recipe": recipe, "mask_prompt": row.get("mask_prompt", True), "progress": False}
    history = finetune(model, enc, train, val_records=val, cfg=cfg, **keep)
    seconds = round(time.perf_counter() - begin, 1)
    facts = {"trainable": count_trainable(model)[0], "lr": lr, "steps": cfg.steps, "val_loss": history[-1]["val_loss"]}
    return model, facts, seconds


def test_facts(here: Path) -> list[dict]:
    """The facts to report on: all but every fourth, which are for choosing hyperparameters."""
    facts = json.loads((here / "facts.json").read_text("utf-8"))
    return [fact for n, fact in enumerate(facts) if n % 4]


def run_rows(rows: list[dict], seeds: list[int], shorten: int, limit: int | None) -> list[dict]:
    """Every row with every seed; prints a line each."""
    enc, here = load_tokenizer("mini"), data_dir()
    train, val, test = (load_records(here / "instructions" / f"{part}.json") for part in ("train", "val", "test"))
    test, facts = test[:limit], test_facts(here)[:: 1 if limit is None else 5]
    base = {"seed": None, **measure(load_pretrained("mini"), enc, test, facts)}
    out = [{"name": "base", "trainable": 0, "runs": [base]}]
    show(out[0])
    for row in rows:
        result = {"name": row["name"], "runs": []}
        off = {"name": f"{row['name']}, switched off", "trainable": 0, "runs": []}
        for seed in seeds:
            model, learnt, seconds = tune(row, seed, enc, train, val, shorten)
            result |= {k: learnt[k] for k in ("trainable", "lr", "steps")}
            run = {"seed": seed, "seconds": seconds, "val_loss": round(learnt["val_loss"], 4)}
            result["runs"].append(run | measure(model, enc, test, facts))
            if row["name"].startswith("recipe (") or row["name"] == "LoRA r=8, all linear":
                with lora_disabled(model):
                    off["runs"].append({"seed": seed, **measure(model, enc, test, facts)})
        for done in (result, off):
            if done["runs"]:
                out.append(done)
                show(done)
    return out


def show(row: dict) -> None:
    """One line of the table: means over the seeds."""
    mean = lambda get: statistics.mean(get(run) for run in row["runs"])  # noqa: E731
    recalls = [f"{mean(lambda r, g=g: r['recall'][g]):6.1%}" for g in ("tuned", "pretrained", "absent")]
    document = mean(lambda r: r["document"]["pretrained"])
    print(f"{row['name']:32} {row['trainable']:>9,}  loss {mean(lambda r: r['test_loss']):6.3f}  "
          f"format {mean(lambda r: r['format']):6.1%}  recall {' '.join(recalls)}  document {document:6.1%}  "
          f"unknown {mean(lambda r: r['unknown']):6.1%}  seconds {[r.get('seconds') for r in row['runs']]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, three rows, few steps; nothing is written")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, help="default: data/mini/alignment.json, with --quick nowhere")
    args = parser.parse_args()
    recipe, begin = recipe_for(load_pretrained("mini").config), time.perf_counter()
    rows, seeds = plan(recipe), args.seeds
    if args.quick:
        few = ("LoRA r=1, c_attn", "LoRA r=8, all linear", "full fine-tuning")
        rows, seeds = [row for row in rows if row["name"] in few], [0]
    results = run_rows(rows, seeds, 4 if args.quick else 1, 60 if args.quick else None)
    minutes = (time.perf_counter() - begin) / 60
    print(f"{minutes:.1f} minutes")
    out = args.out or (None if args.quick else data_dir() / "mini" / "alignment.json")
    if out is not None:
        here = data_dir()
        groups = Counter(fact["group"] for fact in test_facts(here))
        sizes = {p: len(load_records(here / "instructions" / f"{p}.json")) for p in ("train", "val", "test")}
        report = {"command": "python benchmarks/alignment.py", "machine": machine(), "minutes": round(minutes, 1),
                  "seeds": seeds, "recipe": asdict(recipe), "records": sizes, "facts": dict(sorted(groups.items())),
                  "rows": results}  # fmt: skip
        write_atomically(out, lambda t: t.write_text(json.dumps(report, indent=1) + "\n", "utf-8"))
        print(f"wrote {out}")


if __name__ == "__main__":
    main()
