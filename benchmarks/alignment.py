"""What instruction tuning does to a model's manners and to its knowledge: the whole experiment.

    python benchmarks/alignment.py            # every row, three seeds, writes data/mini/alignment.json run by run
    python benchmarks/alignment.py --quick    # one seed, three rows, a third of the steps, writes nothing

The base model `mini` is tuned on data/instructions/train.json in several ways, each for the same number of steps
(--steps), a part of the recipe's training, so that many fit into an hour. Each result is measured on records and
facts that it was not tuned on:

* test_loss   mean nats per reply token on records of data/instructions/test.json;
* format      share of test instructions answered with some text, the end token, and no forged turn (greedy); end: share
              that reach the end token; repeated: mean share of 4-grams that came before in the reply;
* recall      share of facts in data/facts.json answered in the chat template, by group: "tuned" (in the corpus and in
              the records), "pretrained" (in the corpus only), "absent" (nowhere);
* document    the same facts as the beginning of a document that the model completes, the way the base learnt them;
* unknown     share of "absent" facts to which the reply is that it does not know.

The shipped adapter, the result of the whole recipe, is measured once, on all test records and facts. Hyperparameters
were chosen on data/instructions/val.json and on every fourth fact; the table leaves both out. A run that is in the
file already is not repeated: call the script again to go on.
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

from minigpt_lib.atomic import write_atomically
from minigpt_lib.model.gpt import GPTConfig
from minigpt_lib.paths import data_dir
from minigpt_lib.text.tokenizer import load_tokenizer
from minigpt_lib.training.loss import evaluate_loss
from minigpt_lib.tuning.batching import LengthBatches, encode_records
from minigpt_lib.tuning.chat_template import encode_prompt
from minigpt_lib.tuning.cleaning import load_records
from minigpt_lib.tuning.lora import count_trainable, lora_disabled
from minigpt_lib.tuning.metrics import complete, decode_reply, recall, reply_rates
from minigpt_lib.tuning.peft_io import load_adapter
from minigpt_lib.tuning.sft import Recipe, finetune, recipe_for
from minigpt_lib.weights.pretrained import load_pretrained

ALL_LINEAR = ("c_attn", "c_proj", "c_fc")
TOO_HIGH = 20  # times the recipe's learning rate
STEPS, TABLE_RECORDS = 300, 150
RECIPE_ROW, SHIPPED = "LoRA, the recipe's shape", "the shipped adapter"


def plan(recipe: Recipe) -> list[dict]:
    """The rows of the table: a name and what is different from the recipe."""
    rows = [{"name": f"LoRA r={r}, c_attn", "r": r, "targets": ("c_attn",)} for r in (1, 2, 4, 8, 16)]
    rows.append({"name": "LoRA r=8, all linear", "r": 8, "targets": ALL_LINEAR})
    best = {"r": recipe.r, "targets": recipe.targets}
    rows.append({"name": RECIPE_ROW, **best})
    rows.append({"name": "full fine-tuning", "full": True})
    rows.append({"name": "full, a fifth of its learning rate", "full": True, "lr": recipe.lr_full / 5})
    rows.append({"name": "recipe, prompt not masked", "mask_prompt": False, **best})
    rows.append({"name": f"recipe, learning rate x {TOO_HIGH}", "lr": recipe.lr * TOO_HIGH, **best})
    return rows


def measure(model, enc, records: list[dict], facts: list[dict]) -> dict:
    """All numbers of one run."""
    recipe = recipe_for(model.config)
    test = LengthBatches(encode_records(enc, records, recipe.max_len), 32)
    absent = [encode_prompt(enc, f["question"]) for f in facts if f["group"] == "absent"]
    replies = [decode_reply(enc, ids).lower() for ids in complete(model, enc, absent, 32)]
    return {
        "test_loss": round(evaluate_loss(model, [test.batch(i) for i in range(len(test))]), 4),
        **{k: round(v, 4) for k, v in reply_rates(model, enc, records).items()},
        "recall": {k: round(v, 4) for k, v in sorted(recall(model, enc, facts).items())},
        "document": {k: round(v, 4) for k, v in sorted(recall(model, enc, facts, style="document").items())},
        "unknown": round(sum("do not know" in t for t in replies) / len(replies), 4),
    }


def tune(row: dict, seed: int, enc, train: list[dict], steps: int):
    """A freshly loaded base, tuned as `row` says. Returns the model and what it was tuned with."""
    model = load_pretrained("mini")
    recipe, full = recipe_for(model.config), row.get("full", False)
    if not full:
        recipe = replace(recipe, r=row["r"], alpha=recipe.alpha / recipe.r * row["r"], targets=tuple(row["targets"]))
        recipe.add_lora(model, seed)
    lr = row.get("lr", recipe.lr_full if full else recipe.lr)
    cfg = recipe.train_config(len(train), full=full, seed=seed, steps=steps, lr=lr, eval_every=0)
    begin = time.perf_counter()
    mask = row.get("mask_prompt", True)
    history = finetune(model, enc, train, cfg=cfg, recipe=recipe, mask_prompt=mask, progress=False)
    seconds = round(time.perf_counter() - begin, 1)
    return model, {"trainable": count_trainable(model)[0], "lr": lr}, {"seconds": seconds, "loss": history[-1]["loss"]}


def test_facts(here: Path) -> list[dict]:
    """The facts to report on: all but every fourth, which are for choosing hyperparameters."""
    facts = json.loads((here / "facts.json").read_text("utf-8"))
    return [fact for n, fact in enumerate(facts) if n % 4]


def some_facts(facts: list[dict]) -> list[dict]:
    """For the table: every third tuned fact, every second pretrained one, and all that are absent."""
    every = {"tuned": 3, "pretrained": 2, "absent": 1}
    by_group = {group: [fact for fact in facts if fact["group"] == group] for group in every}
    return [fact for group, step in every.items() for fact in by_group[group][::step]]


class Table:
    """The results so far, written whenever one is added."""

    def __init__(self, out: Path | None, head: dict):
        self.out, self.head, self.rows = out, head, {}
        if out is not None and out.is_file():
            old = json.loads(out.read_text("utf-8"))
            if all(old.get(key) == value for key, value in head.items()):
                self.rows = {row["name"]: row for row in old["rows"]}

    def has(self, name: str, seed: int | None) -> bool:
        return any(run["seed"] == seed for run in self.rows.get(name, {"runs": []})["runs"])

    def add(self, name: str, seed: int | None, facts: dict, run: dict) -> None:
        row = self.rows.setdefault(name, {"name": name, **facts, "runs": []})
        row["runs"].append({"seed": seed, **run})
        show(row | {"runs": row["runs"][-1:]})
        if self.out is not None:
            text = json.dumps(self.head | {"machine": machine(), "rows": list(self.rows.values())}, indent=1) + "\n"
            write_atomically(self.out, lambda t: t.write_text(text, "utf-8"))


def show(row: dict) -> None:
    """One line of the table: means over the seeds."""
    mean = lambda get: statistics.mean(get(run) for run in row["runs"])  # noqa: E731
    recalls = [f"{mean(lambda r, g=g: r['recall'][g]):6.1%}" for g in ("tuned", "pretrained", "absent")]
    document = mean(lambda r: r["document"]["pretrained"])
    print(f"{row['name']:34} {row['trainable']:>9,}  loss {mean(lambda r: r['test_loss']):6.3f}  "
          f"format {mean(lambda r: r['format']):6.1%}  recall {' '.join(recalls)}  document {document:6.1%}  "
          f"unknown {mean(lambda r: r['unknown']):6.1%}", flush=True)


def head(recipe: Recipe, steps: int, parts: dict, facts: list[dict], few: list[dict]) -> dict:
    """What the numbers depend on: results of another head are not continued."""
    return {
        "command": "python benchmarks/alignment.py",
        "steps": steps,
        "recipe": json.loads(json.dumps(asdict(recipe))),
        "records": {name: len(records) for name, records in parts.items()},
        "table_records": TABLE_RECORDS,
        "facts": dict(sorted(Counter(fact["group"] for fact in facts).items())),
        "table_facts": dict(sorted(Counter(fact["group"] for fact in few).items())),
    }


def run_all(table: Table, rows: list[dict], seeds: list[int], steps: int, parts: dict, facts: list[dict]) -> None:
    enc, few = load_tokenizer("mini"), some_facts(facts)
    test = parts["test"][:TABLE_RECORDS]
    if not table.has("base", None):
        table.add("base", None, {"trainable": 0}, measure(load_pretrained("mini"), enc, test, few))
    if not table.has(SHIPPED, None) and table.out is not None:
        shipped = load_adapter(load_pretrained("mini"), data_dir() / "mini" / "adapter")
        size = {"trainable": count_trainable(shipped)[0]}
        table.add(SHIPPED, None, size, measure(shipped, enc, parts["test"], facts))
        with lora_disabled(shipped):
            table.add(f"{SHIPPED}, switched off", None, {"trainable": 0}, measure(shipped, enc, test, few))
    for seed in seeds:
        for row in rows:
            if not table.has(row["name"], seed):
                model, known, run = tune(row, seed, enc, parts["train"], steps)
                table.add(row["name"], seed, known, run | measure(model, enc, test, few))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, three rows, few steps; nothing is written")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="default: data/mini/alignment.json, with --quick nowhere")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    here = data_dir()
    recipe = replace(recipe_for(GPTConfig.preset("mini")), max_len=256)  # as the stored runs; no record is longer
    parts = {part: load_records(here / "instructions" / f"{part}.json") for part in ("train", "val", "test")}
    rows, facts, seeds, steps = plan(recipe), test_facts(here), args.seeds, args.steps
    if args.quick:
        few = ("LoRA r=1, c_attn", "LoRA r=8, all linear", "full fine-tuning")
        rows, seeds, steps = [row for row in rows if row["name"] in few], [0], steps // 3
    out = args.out or (None if args.quick else here / "mini" / "alignment.json")
    table = Table(out, head(recipe, steps, parts, facts, some_facts(facts)))
    run_all(table, rows, seeds, steps, parts, facts)


if __name__ == "__main__":
    main()
