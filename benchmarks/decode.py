"""Greedy decoding beside Transformers, CTranslate2 and llama.cpp: the same random weights, everything in one run.

    python benchmarks/decode.py [--model gpt2] [--prompt 32] [--new 256] [--repeats 3] [--parts PART ...]

single: one prompt, every form of weights; long: with and without a cache up to 900 tokens; batch: several prompts at
once; lookup: speculative decoding by prompt lookup. Prints medians with the slowest and the fastest run, beside the
bandwidth of the memory measured in between, and writes benchmarks/results/decode_MODEL.json; parts that are not run
keep their figures there.
CTranslate2 and llama.cpp's Python binding are left out, and named, where they are not installed.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import peers
import torch
from common import RESULTS, interleaved, machine, summary, write
from transformers.utils import logging

from minigpt_lib.cache import KVCache
from minigpt_lib.fast import FastGPT
from minigpt_lib.generation import generate
from minigpt_lib.lookup import generate_lookup
from minigpt_lib.model import PRESETS, GPTConfig, GPTLanguageModel

BATCHES = (1, 4, 16)
LENGTHS = (32, 64, 128, 256, 512, 900)


def random_model(name: str) -> GPTLanguageModel:
    """GPT-2's shape with fresh weights. Positions are strong, so that greedy text is not one token again and again."""
    torch.manual_seed(0)
    model = GPTLanguageModel(GPTConfig.preset(name)).eval()
    model.wpe.weight.data *= 20
    return model


def read_seconds(buffer: torch.Tensor) -> Callable[[], object]:
    """A plain read of a buffer far larger than the processor's caches."""
    return lambda: buffer.sum()


def megabytes(model: GPTLanguageModel) -> dict[str, float]:
    """What one step must read: every weight but the table of positions, of which it needs one row."""
    n = model.num_parameters() - model.wpe.weight.numel()
    return {"float32": 4 * n / 1e6, "bfloat16": 2 * n / 1e6, "int8": n / 1e6}


def rates(
    candidates: dict[str, Callable[[], object]], tokens: int, repeats: int, warm: bool = True
) -> tuple[dict, dict]:
    """Tokens per second of each candidate, and GB/s of plain reads taken in turn with them."""
    buffer = torch.ones(100_000_000)  # 400 MB
    seconds = interleaved(candidates | {"read": read_seconds(buffer)}, repeats, warm)
    gigabytes = sorted(buffer.nbytes / s / 1e9 for s in seconds.pop("read"))
    rows = {name: summary(times, tokens) for name, times in seconds.items()}
    for name, row in rows.items():
        spread = f"({row['slowest']:.1f} to {row['fastest']:.1f})"
        print(f"{name:30} {row['tokens_per_s']:8.1f} tokens/s   {spread}", flush=True)
    read = {"median": statistics.median(gigabytes), "slowest": gigabytes[0], "fastest": gigabytes[-1]}
    print(f"{'plain read of memory':30} {read['median']:8.1f} GB/s")
    return rows, {name: round(value, 2) for name, value in read.items()}


def equal(tokens: list[int], wanted: list[int]) -> int:
    """How many tokens agree before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(tokens, wanted, strict=True)) if a != b), len(wanted))


def build(group: str, args: argparse.Namespace, folder: Path) -> tuple[dict[str, Callable[[], list[int]]], dict]:
    """The decoders of one group, as functions without arguments that return the new tokens, and compile times."""
    model, new = random_model(args.model), args.new
    idx = torch.randint(0, model.config.vocab_size, (1, args.prompt), generator=torch.Generator().manual_seed(1))
    prompt, seconds = idx[0].tolist(), {}
    if group == "minigpt":
        ours = {"packed float32": FastGPT(model, compile=False)}
        for kind, weights in (("float32", None), ("bfloat16", "bfloat16"), ("int8", "int8")):
            ours[f"compiled {kind}"] = FastGPT(model, weights)
            seconds[kind] = round(ours[f"compiled {kind}"].compile_seconds, 1)
        run = {name: lambda m=m: generate(m, idx, new, temperature=0)[0, len(prompt) :].tolist()
               for name, m in ours.items()}  # fmt: skip
    elif group == "transformers":
        theirs = peers.transformers_model(model, folder)
        run = {"float32": lambda: peers.transformers_generate(theirs, idx, new)[0, len(prompt) :].tolist()}
    elif group == "ctranslate2":
        made = {kind: peers.ctranslate2_decoder(model, folder, kind, args.threads) for kind in ("float32", "int8")}
        run = {kind: lambda d=d: d(prompt, new) for kind, d in made.items()}
    else:
        kinds = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0"}
        made = {name: peers.llama_decoder(model, folder, kind, args.threads) for name, kind in kinds.items()}
        run = {kind: lambda d=d: d(prompt, new) for kind, d in made.items()}
    return {f"{group} {name}": f for name, f in run.items()}, seconds


def serve(pipe: Connection, group: str, args: argparse.Namespace) -> None:
    """A process for one group: tells its decoders' names, then runs the one it is asked for and returns the tokens."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        run, seconds = build(group, args, Path(folder))
        pipe.send((list(run), seconds))
        while (name := pipe.recv()) is not None:
            pipe.send(run[name]())


def single(args: argparse.Namespace, model: GPTLanguageModel, folder: Path) -> dict:
    """One prompt, every decoder in every form of weights that it has.

    Each group has a process of its own, because their thread pools get into each other's way in one; only one runs.
    """
    found = {"minigpt": True, "transformers": True, "ctranslate2": peers.HAVE_CT2, "llama.cpp": peers.HAVE_LLAMA}
    context, ask, seconds, workers = get_context("spawn"), {}, {}, []
    for group in (name for name, there in found.items() if there):
        mine, theirs = context.Pipe()
        workers.append((context.Process(target=serve, args=(theirs, group, args), daemon=True), mine))
        workers[-1][0].start()
        names, compiled = mine.recv()  # before the next one starts, so that none compiles beside another
        ask |= {name: lambda pipe=mine, name=name: (pipe.send(name), pipe.recv())[1] for name in names}
        seconds |= compiled
    tokens = {name: run() for name, run in ask.items()}
    rows, read = rates(ask, args.new, args.repeats, warm=False)
    for worker, pipe in workers:
        pipe.send(None)
        worker.join()
    return {
        "rows": rows, "read_gb_per_s": read, "megabytes": megabytes(model), "compile_seconds": seconds,
        "equal_tokens": {name: equal(t, tokens["minigpt packed float32"]) for name, t in tokens.items()},
        "missing": [name for name, there in found.items() if not there],
        "settings": {"prompt": args.prompt, "new": args.new, "repeats": args.repeats, "batch": 1},
        "ratios": single_ratios({n: r["tokens_per_s"] for n, r in rows.items()}, read["median"], megabytes(model)),
    }  # fmt: skip


def single_ratios(rate: dict[str, float], read: float, size: dict[str, float]) -> dict[str, float]:
    ours = {kind: rate[f"minigpt compiled {kind}"] for kind in size}
    out = {"packed float32 / transformers": rate["minigpt packed float32"] / rate["transformers float32"]}
    for kind, value in ours.items():
        out[f"compiled {kind} / memory bound"] = value * size[kind] / 1e3 / read
        for peer in ("transformers", "ctranslate2", "llama.cpp"):
            if f"{peer} {kind}" in rate:
                out[f"compiled {kind} / {peer} {kind}"] = value / rate[f"{peer} {kind}"]
    return {name: round(value, 3) for name, value in out.items()}


def batch(args: argparse.Namespace, model: GPTLanguageModel, folder: Path) -> dict:
    """Several prompts of equal length at once, float32; tokens per second of all rows together."""
    theirs, out, new = peers.transformers_model(model, folder), {}, args.batch_new
    for B in BATCHES:
        idx = torch.randint(0, model.config.vocab_size, (B, args.prompt), generator=torch.Generator().manual_seed(B))
        fast, packed = FastGPT(model, batch_size=B), FastGPT(model, compile=False, batch_size=B)
        print(f"batch {B}:", flush=True)
        decode = {
            "minigpt plain": lambda idx=idx: generate(model, idx, new, temperature=0),
            "minigpt compiled": lambda idx=idx, fast=fast: generate(fast, idx, new, temperature=0),
            "minigpt packed": lambda idx=idx, packed=packed: generate(packed, idx, new, temperature=0),
            "transformers": lambda idx=idx: peers.transformers_generate(theirs, idx, new),
        }
        same = bool(torch.equal(decode["minigpt compiled"](), decode["transformers"]()))
        rows, read = rates(decode, B * new, args.repeats)
        theirs_rate = rows["transformers"]["tokens_per_s"]
        ratios = {name: round(row["tokens_per_s"] / theirs_rate, 3) for name, row in rows.items()}
        out[str(B)] = {"rows": rows, "read_gb_per_s": read, "equal_tokens": same, "of transformers": ratios}
    return {"sizes": out, "settings": {"prompt": args.prompt, "new": new, "repeats": args.repeats}}


@torch.inference_mode()
def step_seconds(model: GPTLanguageModel, S: int, cached: bool, repeats: int) -> float:
    """Median seconds for the token behind S tokens."""
    cache = KVCache.for_model(model) if cached else None
    idx = torch.zeros(1, 1 if cached else S, dtype=torch.int64)
    times = []
    for _ in range(repeats + 1):
        if cache is not None:
            cache.pos = S - 1  # as if filled: what the numbers are does not change the time
        begin = time.perf_counter()
        model.last_logits(idx, cache)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def interpolated_total(per_token: list[float]) -> float:
    """Seconds for all tokens from the first length to the last, straight lines in between."""
    pairs = list(zip(LENGTHS, per_token, strict=True))
    return sum((b - a) * (s + t) / 2 for (a, s), (b, t) in zip(pairs, pairs[1:], strict=False))


def long(args: argparse.Namespace, model: GPTLanguageModel, folder: Path) -> dict:
    """Seconds per token at several lengths, with a cache and without, and their sum up to the longest."""
    fast = FastGPT(model)
    ways = {"no cache": (model, False), "cache, plain": (model, True), "cache, compiled": (fast, True)}
    repeats = {"no cache": 2, "cache, plain": 7, "cache, compiled": 15}
    seconds = {name: [step_seconds(m, S, cached, repeats[name]) for S in LENGTHS] for name, (m, cached) in ways.items()}
    totals = {name: interpolated_total(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(f"{name:16} {[round(1e3 * v, 1) for v in values]} ms a token, {totals[name]:.1f} s from 32 to 900")
    slow = totals["no cache"]
    return {
        "lengths": LENGTHS, "seconds": {name: [round(v, 6) for v in values] for name, values in seconds.items()},
        "total_seconds": {name: round(value, 2) for name, value in totals.items()},
        "no cache / cached": {name: round(slow / value, 2) for name, value in totals.items() if name != "no cache"},
    }  # fmt: skip


def lookup(args: argparse.Namespace, model: GPTLanguageModel, folder: Path) -> dict:
    """Prompt lookup against plain greedy decoding on the course's own trained model, whose text repeats itself."""
    from minigpt_lib.tokenizer import load_tokenizer
    from minigpt_lib.weights import load_pretrained

    mini, enc = load_pretrained("mini"), load_tokenizer("mini")
    text = "The old lighthouse keeper wrote: the lamp must be lit at dusk, the lamp must be cleaned at dawn. He wrote:"
    idx = torch.tensor([enc.encode_ordinary(text)])
    fast, new = FastGPT(mini, rows=(1, 8)), 256
    found = generate_lookup(fast, idx, new)
    decode = {
        "mini compiled": lambda: generate(fast, idx, new, temperature=0),
        "mini compiled, prompt lookup": lambda: generate_lookup(fast, idx, new),
    }
    same = bool(torch.equal(found.ids, decode["mini compiled"]()))
    rows, _ = rates(decode, new, args.repeats)
    print(f"{found.acceptance:.0%} of {found.proposed} guesses taken, {found.tokens_per_pass:.2f} tokens per pass")
    return {"rows": rows, "acceptance": round(found.acceptance, 3), "equal_tokens": same,
            "tokens_per_pass": round(found.tokens_per_pass, 2)}  # fmt: skip


def cuda(args: argparse.Namespace, model: GPTLanguageModel, folder: Path) -> dict:
    """On a GPU: bfloat16, CUDA graphs, batches of 1 and 64, beside Transformers and a read of the GPU's memory."""
    theirs = peers.transformers_model(model, folder).to("cuda", torch.bfloat16)
    ours = random_model(args.model).to("cuda", torch.bfloat16)
    buffer, out = torch.ones(1_000_000_000, device="cuda"), {}

    def waiting(run: Callable[[], object]) -> Callable[[], object]:
        return lambda: (run(), torch.cuda.synchronize())

    for B in (1, 64):
        idx = torch.randint(0, model.config.vocab_size, (B, args.prompt), device="cuda")
        fast = FastGPT(ours, batch_size=B)
        cache = KVCache.for_model(fast, B)
        decode = {
            "minigpt, CUDA graphs": lambda: generate(fast, idx, args.new, temperature=0, kv_cache=cache),  # noqa: B023
            "transformers": lambda: peers.transformers_generate(theirs, idx, args.new),  # noqa: B023
            "read": buffer.sum,
        }
        seconds = interleaved({name: waiting(run) for name, run in decode.items()}, args.repeats)
        read = buffer.nbytes / statistics.median(seconds.pop("read")) / 1e9
        rows = {name: summary(times, B * args.new) for name, times in seconds.items()}
        rate = {name: row["tokens_per_s"] for name, row in rows.items()}
        bound = rate["minigpt, CUDA graphs"] / B * megabytes(model)["bfloat16"] / 1e3 / read
        ratio = rate["minigpt, CUDA graphs"] / rate["transformers"]
        out[str(B)] = {"rows": rows, "read_gb_per_s": round(read, 1), "ratio": ratio, "share of memory bound": bound}
        print(f"batch {B}: {rate}, {ratio:.1f} times Transformers, {bound:.0%} of the memory bound")
    return out


PARTS = {"single": single, "long": long, "batch": batch, "lookup": lookup}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2", choices=PRESETS)
    parser.add_argument("--prompt", type=int, default=32, help="tokens in the prompt")
    parser.add_argument("--new", type=int, default=256, help="tokens to generate for one prompt")
    parser.add_argument("--batch-new", type=int, default=16, help="tokens to generate for each prompt of a batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    model = random_model(args.model)
    path = RESULTS / f"decode_{args.model}.json"
    results = json.loads(path.read_text("utf-8")) if path.exists() else {}
    parts = {name: PARTS[name] for name in args.parts} | ({"cuda": cuda} if torch.cuda.is_available() else {})
    for name, run in parts.items():
        with tempfile.TemporaryDirectory() as folder:
            key = name if args.threads == 2 else f"{name}, threads {args.threads}"
            results[key] = run(args, model, Path(folder)) | {"machine": machine()}
        results.setdefault("cuda", "not measured: no GPU was at hand")
        print("written to", write(f"decode_{args.model}", results))


if __name__ == "__main__":
    main()
