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
import multiprocessing
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch
from common import machine

from minigpt_lib.batching import LengthBatches, encode_records
from minigpt_lib.evaluation import complete, decode_reply, format_rate, recall
from minigpt_lib.lora import count_trainable, lora_disabled
from minigpt_lib.loss import evaluate_loss
from minigpt_lib.model import GPTConfig
from minigpt_lib.records import load_records
from minigpt_lib.runtime import data_dir
from minigpt_lib.sft import Recipe, finetune, recipe_for
from minigpt_lib.template import encode_prompt
from minigpt_lib.tokenizer import load_tokenizer
from minigpt_lib.training import write_atomically
from minigpt_lib.weights import load_pretrained

ALL_LINEAR = ("c_attn", "c_proj", "c_fc")
TOO_HIGH = 20  # times the recipe's learning rate


def plan(recipe: Recipe) -> list[dict]:
    """The rows of the table: a name and what is different from the recipe. The recipe itself is marked as shipped."""
    rows = [{"name": f"LoRA r={r}, c_attn", "r": r, "targets": ("c_attn",)} for r in (1, 2, 4, 8, 16)]
    rows.append({"name": "LoRA r=8, all linear", "r": 8, "targets": ALL_LINEAR})
    best = {"r": recipe.r, "targets": recipe.targets}
    for row in rows:
        row["shipped"] = row["r"] == recipe.r and set(row["targets"]) == set(recipe.targets)
    if not any(row["shipped"] for row in rows):
        rows.append({"name": "LoRA, the recipe", "shipped": True, **best})
    rows.append({"name": "full fine-tuning", "full": True})
    rows.append({"name": "full, a fifth of its learning rate", "full": True, "lr": recipe.lr_full / 5})
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
        recipe.add_lora(model, seed)
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


def load(limit: int | None) -> tuple:
    """Tokenizer, records by part, and the facts to report on; `limit` shortens what is measured on."""
    enc, here = load_tokenizer("mini"), data_dir()
    parts = {part: load_records(here / "instructions" / f"{part}.json") for part in ("train", "val", "test")}
    parts["test"] = parts["test"][:limit]
    return enc, parts, test_facts(here)[:: 1 if limit is None else 5]


def run_one(row: dict, seed: int | None, shorten: int, limit: int | None) -> list[dict]:
    """One training and its measurements, in a process of its own with one thread; seed None is the base."""
    torch.set_num_threads(1)
    enc, parts, facts = load(limit)
    if seed is None:
        run = {"seed": None, **measure(load_pretrained("mini"), enc, parts["test"], facts)}
        return [{"name": "base", "trainable": 0, "runs": [run]}]
    model, learnt, seconds = tune(row, seed, enc, parts["train"], parts["val"], shorten)
    run = {"seed": seed, "seconds": seconds, "val_loss": round(learnt["val_loss"], 4)}
    run |= measure(model, enc, parts["test"], facts)
    out = [{"name": row["name"], **{k: learnt[k] for k in ("trainable", "lr", "steps")}, "runs": [run]}]
    if row.get("shipped"):
        with lora_disabled(model):
            run = {"seed": seed, **measure(model, enc, parts["test"], facts)}
        out.append({"name": f"{row['name']}, switched off", "trainable": 0, "runs": [run]})
    return out


def run_all(rows: list[dict], seeds: list[int], shorten: int, limit: int | None, workers: int) -> Iterator[list[dict]]:
    """Every row with every seed, `workers` at a time; yields the table so far whenever a seed is complete."""
    table: dict[str, dict] = {}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(run_one, {}, None, shorten, limit)]
        by_seed = {seed: [pool.submit(run_one, row, seed, shorten, limit) for row in rows] for seed in seeds}
        for seed in seeds:
            for job in jobs + by_seed[seed]:
                for result in job.result():
                    show(result)
                    runs = table[result["name"]]["runs"] if result["name"] in table else []
                    table[result["name"]] = result | {"runs": runs + result["runs"]}
            jobs = []
            yield list(table.values())


def show(row: dict) -> None:
    """One line of the table: means over the seeds."""
    mean = lambda get: statistics.mean(get(run) for run in row["runs"])  # noqa: E731
    recalls = [f"{mean(lambda r, g=g: r['recall'][g]):6.1%}" for g in ("tuned", "pretrained", "absent")]
    document = mean(lambda r: r["document"]["pretrained"])
    print(f"{row['name']:32} {row['trainable']:>9,}  loss {mean(lambda r: r['test_loss']):6.3f}  "
          f"format {mean(lambda r: r['format']):6.1%}  recall {' '.join(recalls)}  document {document:6.1%}  "
          f"unknown {mean(lambda r: r['unknown']):6.1%}  seconds {[r.get('seconds') for r in row['runs']]}", flush=True)


def report(results: list[dict], recipe: Recipe, rows: list[dict], minutes: float) -> dict:
    """What is written to alignment.json."""
    here = data_dir()
    groups = Counter(fact["group"] for fact in test_facts(here))
    sizes = {p: len(load_records(here / "instructions" / f"{p}.json")) for p in ("train", "val", "test")}
    return {
        "command": "python benchmarks/alignment.py",
        "machine": machine(),
        "minutes": round(minutes, 1),
        "seeds": sorted({run["seed"] for row in results for run in row["runs"]} - {None}),
        "recipe": asdict(recipe),
        "shipped": next(row["name"] for row in rows if row.get("shipped")),
        "records": sizes,
        "facts": dict(sorted(groups.items())),
        "rows": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, three rows, few steps; nothing is written")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time, with one thread each")
    parser.add_argument("--out", type=Path, help="default: data/mini/alignment.json, with --quick nowhere")
    args = parser.parse_args()
    recipe, begin = recipe_for(GPTConfig.preset("mini")), time.perf_counter()
    rows, seeds = plan(recipe), args.seeds
    if args.quick:
        few = ("LoRA r=1, c_attn", "LoRA r=8, all linear", "full fine-tuning")
        rows, seeds = [row | {"shipped": row["name"] == few[1]} for row in rows if row["name"] in few], [0]
    out = args.out or (None if args.quick else data_dir() / "mini" / "alignment.json")
    for results in run_all(rows, seeds, 4 if args.quick else 1, 60 if args.quick else None, args.workers):
        minutes = (time.perf_counter() - begin) / 60
        print(f"{minutes:.1f} minutes", flush=True)
        if out is not None:
            text = json.dumps(report(results, recipe, rows, minutes), indent=1) + "\n"
            write_atomically(out, lambda t, text=text: t.write_text(text, "utf-8"))
            print(f"wrote {out}", flush=True)


if __name__ == "__main__":
    main()
