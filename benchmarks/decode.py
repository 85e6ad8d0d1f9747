"""Greedy decoding beside Transformers, CTranslate2 and llama.cpp: the same random weights, everything in one run.

    python benchmarks/decode.py [--model gpt2] [--prompt 32] [--new 256] [--repeats 3] [--parts PART ...]

single: one prompt, every form of weights; batch: several prompts at once; long: with and without a cache up to 900
tokens; parts: where the time of one token goes; lookup: prompt lookup; int8: what the rounding costs in loss and saves
in bytes. The decoders take turns, those with the same kind of weights side by side and a read of memory between them,
and every second round goes backwards, so that a drift of the machine meets all alike; a ratio is the median of the
rounds' ratios. Ends with the figures beside their targets and writes benchmarks/results/decode_MODEL.json; parts that
are not run keep their figures there.
A peer that is not installed, fails or hangs is named and left out.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import peers
import torch
from common import RESULTS, interleaved, machine, summary, write
from transformers.utils import logging
from workers import Worker

from minigpt_lib.generation.compiled import FastGPT, step_inputs, windows
from minigpt_lib.generation.decode import generate, stream
from minigpt_lib.generation.kv_cache import KVCache
from minigpt_lib.generation.native import MOST, NativeGPT, text_struct
from minigpt_lib.generation.prompt_lookup import generate_lookup
from minigpt_lib.generation.quantized import FEW
from minigpt_lib.model.gpt import PRESETS, GPTConfig, GPTLanguageModel
from minigpt_lib.text.tokenizer import load_tokenizer
from minigpt_lib.weights.pretrained import load_pretrained

BATCHES = (1, 4, 16)
LENGTHS = (32, 64, 128, 256, 512, 900)
KINDS = {"float32": None, "bfloat16": "bfloat16", "int8": "int8"}  # what this library calls them
BOUND = " / memory bound"
TARGETS = {  # ratio of tokens per second, unless said otherwise: at least
    "packed float32 / transformers float32": 1.3,
    "C++ float32 / ctranslate2 float32": 1.2,
    "C++ float32 / llama.cpp float32": 1.2,
    "C++ float32 / memory bound": 0.8,
    "C++ bfloat16 / llama.cpp bfloat16": 1.0,
    "C++ int8 / llama.cpp int8": 1.0,
}


def random_model(name: str) -> GPTLanguageModel:
    """GPT-2's shape with fresh weights. Positions are strong, so that greedy text is not one token again and again."""
    torch.manual_seed(0)
    model = GPTLanguageModel(GPTConfig.preset(name)).eval()
    model.wpe.weight.data *= 20
    return model


def prompt_of(model: GPTLanguageModel, rows: int, T: int) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (rows, T), generator=torch.Generator().manual_seed(rows))


def megabytes(model: GPTLanguageModel) -> dict[str, float]:
    """What one step must read: every weight but the table of positions, of which it needs one row."""
    n = model.num_parameters() - model.wpe.weight.numel()
    return {"float32": 4 * n / 1e6, "bfloat16": 2 * n / 1e6, "int8": n / 1e6}


class Memory:
    """Reads of 400 MB, far more than the processor's caches hold; `read` gives GB/s of the fastest of six."""

    def __init__(self):
        self.buffer, self.seen = torch.ones(100_000_000), []
        self.patterns = (self.buffer.sum, self.buffer.view(torch.int64).sum, self.buffer.amax)

    def read(self) -> float:
        seconds = []
        for pattern in self.patterns * 2:
            begin = time.perf_counter()
            pattern()
            seconds.append(time.perf_counter() - begin)
        self.seen.append(self.buffer.nbytes / min(seconds) / 1e9)
        return self.seen[-1]

    def summary(self) -> dict[str, float]:
        found = {"median": statistics.median(self.seen), "slowest": min(self.seen), "fastest": max(self.seen)}
        print(f"{'read of memory':28} {found['median']:8.1f} GB/s       ({min(self.seen):.1f} to {max(self.seen):.1f})")
        return {name: round(value, 2) for name, value in found.items()}


def in_turn(
    ask: dict[str, Callable[[], object]], rounds: int, lost: dict[str, str]
) -> tuple[dict[str, list[float]], Memory]:
    """Seconds of each, round by round, with a read of memory before each; who fails goes to `lost` with the reason."""
    seconds, memory = {name: [] for name in ask}, Memory()
    for r in range(rounds):
        for name in list(seconds) if r % 2 == 0 else list(seconds)[::-1]:
            memory.read()
            begin = time.perf_counter()
            try:
                ask[name]()
            except RuntimeError as error:
                lost[name] = str(error)
                del seconds[name]
                continue
            seconds[name].append(time.perf_counter() - begin)
    return seconds, memory


def share_of_bound(model: GPTLanguageModel, idx: torch.Tensor, new: int, mb: float) -> float:
    """The time that reading the weights would take, divided by the time that decoding takes.

    The memory's speed is read every 16 tokens, because a virtual machine's can double or halve within seconds.
    """
    memory, tokens, needed, taken = Memory(), stream(model, idx, new, temperature=0), 0.0, 0.0
    next(tokens)  # the prompt
    before = memory.read()
    for _ in range(1, new - 15, 16):
        begin = time.perf_counter()
        for _ in range(16):
            next(tokens)
        taken += time.perf_counter() - begin
        after = memory.read()
        needed += 16 * mb / 1e3 * (1 / before + 1 / after) / 2
        before = after
    return needed / taken


def ratio(ours: list[float], theirs: list[float]) -> float:
    """How many times as fast: the median over the rounds."""
    return round(statistics.median(t / o for o, t in zip(ours, theirs, strict=True)), 3)


def rows_of(seconds: dict[str, list[float]], tokens: int) -> dict[str, dict[str, float]]:
    rows = {name: summary(times, tokens) for name, times in seconds.items()}
    for name, row in rows.items():
        spread = f"({row['slowest']:.1f} to {row['fastest']:.1f})"
        print(f"{name:28} {row['tokens_per_s']:8.1f} tokens/s   {spread}", flush=True)
    return rows


def equal(tokens: list[int], wanted: list[int]) -> int:
    """How many tokens agree before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(tokens, wanted, strict=True)) if a != b), len(wanted))


def build(group: str, args: argparse.Namespace) -> tuple[dict[str, Callable[[int], list[int]]], dict]:
    """The decoders of one group, as functions from a number of new tokens to these, and their compile times."""
    quiet(args)
    model, folder = random_model(args.model), Path(tempfile.mkdtemp(dir=args.folder))
    idx, seconds = prompt_of(model, 1, args.prompt), {}
    prompt = idx[0].tolist()
    if group == "minigpt":
        ours = {"packed float32": FastGPT(model, compile=False)}
        ours |= {f"compiled {kind}": FastGPT(model, weights) for kind, weights in KINDS.items()}
        ours |= {f"C++ {kind}": NativeGPT(model, weights) for kind, weights in KINDS.items()}
        seconds = {name: round(m.compile_seconds, 1) for name, m in ours.items() if m.compile_seconds > 0.05}
        run = {name: lambda new, m=m: generate(m, idx, new, temperature=0)[0, len(prompt) :].tolist()
               for name, m in ours.items()}  # fmt: skip
        for name, m in ours.items():
            mb = megabytes(model)[name.split()[-1]]
            run[f"{name}{BOUND}"] = lambda new, m=m, mb=mb: share_of_bound(m, idx, new, mb)
    elif group == "transformers":
        theirs = peers.transformers_model(model, folder)
        run = {"float32": lambda new: peers.transformers_generate(theirs, idx, new)[0, len(prompt) :].tolist()}
    elif group == "ctranslate2":
        made = {kind: peers.ctranslate2_decoder(model, folder, kind, args.threads) for kind in ("float32", "int8")}
        run = {kind: lambda new, d=d: d(prompt, new) for kind, d in made.items()}
    else:
        kinds = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0"}
        made = {name: peers.llama_decoder(model, folder, kind, args.threads) for name, kind in kinds.items()}
        run = {kind: lambda new, d=d: d(prompt, new) for kind, d in made.items()}
    return {f"{group} {name}": f for name, f in run.items()}, seconds


def single(args: argparse.Namespace, model: GPTLanguageModel, folder: Path) -> dict:
    """One prompt, every decoder in every form of weights that it has.

    Each group has a process of its own, because their thread pools get into each other's way in one; only one runs.
    """
    found = {"minigpt": True, "transformers": True, "ctranslate2": peers.HAVE_CT2, "llama.cpp": peers.HAVE_LLAMA}
    lost = {group: "not installed" for group, there in found.items() if not there}
    workers, ask, compiled, tokens = [], {}, {}, {}
    args.folder = str(folder)
    for group in (name for name, there in found.items() if there):
        try:
            workers.append(Worker(build, (group, args)))  # waits, so that none compiles beside another
        except RuntimeError as error:
            lost[group] = str(error)
            continue
        compiled |= workers[-1].notes
        names = [name for name in workers[-1].names if not name.endswith(BOUND)]
        ask |= {name: lambda w=workers[-1], name=name: w.ask(name, 8) for name in names}
    for name, warm in list(ask.items()):
        try:
            warm()
        except RuntimeError as error:
            lost[name] = str(error)
            del ask[name]

    def timed(name: str) -> Callable[[], None]:
        worker = next(w for w in workers if name in w.names)
        return lambda: tokens.update({name: worker.ask(name, args.new)})

    in_order = sorted(ask, key=lambda name: (list(KINDS).index(name.split()[-1]), "C++" in name, name))
    seconds, memory = in_turn({name: timed(name) for name in in_order}, args.repeats, lost)
    bounds = [name for name in workers[0].names if name.endswith(BOUND)]
    shares = {name: [workers[0].ask(name, args.new) for _ in range(3)] for name in bounds}
    for worker in workers:
        worker.stop()
    print("left out:", lost or "nobody")
    return {
        "rows": rows_of(seconds, args.new), "read_gb_per_s": memory.summary(), "megabytes": megabytes(model),
        "compile_seconds": compiled, "missing": lost,
        "equal_tokens": {name: equal(t, tokens["minigpt packed float32"]) for name, t in tokens.items()},
        "settings": {"prompt": args.prompt, "new": args.new, "repeats": args.repeats, "batch": 1},
        "ratios": single_ratios(seconds, shares),
    }  # fmt: skip


def single_ratios(seconds: dict[str, list[float]], shares: dict[str, list[float]]) -> dict[str, float]:
    pairs = [("packed float32", "transformers float32")]
    others = ("transformers", "ctranslate2", "llama.cpp")
    pairs += [(f"{way} {k}", f"{peer} {k}") for way in ("compiled", "C++") for k in KINDS for peer in others]
    ours = {name.removeprefix("minigpt "): name for name in seconds if name.startswith("minigpt")}
    pairs = [(a, b) for a, b in pairs if a in ours and b in seconds]
    out = {f"{a} / {b}": ratio(seconds[ours[a]], seconds[b]) for a, b in pairs}
    out |= {name.removeprefix("minigpt "): round(statistics.median(values), 3) for name, values in shares.items()}
    return out


def batch(args: argparse.Namespace, model: GPTLanguageModel, folder: Path) -> dict:
    """Several prompts of equal length at once, float32; tokens per second of all rows together."""
    theirs, native, out, new = peers.transformers_model(model, folder), NativeGPT(model), {}, args.batch_new
    for B in BATCHES:
        idx, fast = prompt_of(model, B, args.prompt), FastGPT(model, batch_size=B)
        print(f"batch {B}:", flush=True)
        decode = {
            "minigpt plain": lambda idx=idx: generate(model, idx, new, temperature=0),
            "minigpt fast": lambda idx=idx, fast=fast: generate(fast, idx, new, temperature=0),
            "transformers": lambda idx=idx: peers.transformers_generate(theirs, idx, new),
        }
        if B <= FEW:
            decode["minigpt C++"] = lambda idx=idx: generate(native, idx, new, temperature=0)
        same = bool(torch.equal(decode["minigpt fast"](), decode["transformers"]()))
        seconds, memory = in_turn(decode, args.repeats, {})
        ratios = {name: ratio(times, seconds["transformers"]) for name, times in seconds.items()}
        print("times Transformers:", ratios)
        out[str(B)] = {"rows": rows_of(seconds, B * new), "read_gb_per_s": memory.summary(), "equal_tokens": same,
                       "of transformers": ratios}  # fmt: skip
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
    ways = {"no cache": (model, False), "cache, plain": (model, True)}
    ways |= {"cache, compiled": (FastGPT(model), True), "cache, C++": (NativeGPT(model), True)}
    repeats = {"no cache": 2, "cache, plain": 7, "cache, compiled": 15, "cache, C++": 15}
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


def medians_ms(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Milliseconds of each, taken in turn, because a difference of two is wanted."""
    return {name: 1e3 * statistics.median(times) for name, times in interleaved(runs, repeats).items()}


def function_of(fast: FastGPT | NativeGPT, idx: torch.Tensor, cache: KVCache, S: int) -> Callable[[], object]:
    """The compiled part of the step behind S tokens, its inputs ready."""
    cache.pos = S
    if isinstance(fast, FastGPT):
        inputs = (*step_inputs(idx, S, None, S + 1), *windows(cache, S + 1))
        return lambda: fast.backend.run[1](*inputs)
    text = text_struct(idx, cache, None, 1, fast.config.vocab_size)
    return lambda: fast._call(text)


@torch.inference_mode()
def parts(args: argparse.Namespace, model: GPTLanguageModel, folder: Path) -> dict:
    """Where a token's time goes, in ms: the step in C++ or what torch.compile made of it, and Python around it."""
    out, memory, idx = {}, Memory(), prompt_of(model, 1, args.prompt)
    S = args.prompt + args.new // 2  # the middle of the text that `single` writes
    for way, made in {"compiled": FastGPT, "C++": NativeGPT}.items():
        for kind, weights in KINDS.items():
            fast = made(model, weights)
            cache = KVCache.for_model(fast)

            def at(pos: int, run: Callable[[], object], cache: KVCache = cache) -> Callable[[], object]:
                return lambda: (setattr(cache, "pos", pos), run())

            prefill = medians_ms({"it": at(0, lambda: fast.last_logits(idx, cache))}, 3)["it"]  # noqa: B023
            inside = function_of(fast, idx[:, :1], cache, S)
            step = medians_ms({"whole": at(S, lambda: fast.last_logits(idx[:, :1], cache)),  # noqa: B023
                               "inside": inside}, 40)  # fmt: skip
            begin = time.perf_counter()
            generate(fast, idx, args.new, temperature=0)
            token = (1e3 * (time.perf_counter() - begin) - prefill) / (args.new - 1)
            rows = {"prefill of the prompt": prefill, "one token": token, "the function": step["inside"],
                    "its inputs and checks": step["whole"] - step["inside"],
                    "choice, bookkeeping and drift": token - step["whole"],
                    "weights at the memory's speed": megabytes(model)[kind] / memory.read()}  # fmt: skip
            name = f"{way} {kind}"
            out[name] = {part: round(value, 3) for part, value in rows.items()}
            print(f"{name:18} ms:", ", ".join(f"{part} {value:.2f}" for part, value in rows.items()), flush=True)
    head = 4e-6 * model.wte.weight.numel() / megabytes(model)["float32"]
    return out | {"share of the head in the weights": round(head, 3)}


def lookup(args: argparse.Namespace, model: GPTLanguageModel, folder: Path) -> dict:
    """Prompt lookup against plain greedy decoding on the course's own trained model, whose text repeats itself."""
    mini, enc = load_pretrained("mini"), load_tokenizer("mini")
    text = "The old lighthouse keeper wrote: the lamp must be lit at dusk, the lamp must be cleaned at dawn. He wrote:"
    idx = torch.tensor([enc.encode_ordinary(text)])
    fast, native, new = FastGPT(mini, rows=(1, 8)), NativeGPT(mini), 256
    found = generate_lookup(native, idx, new)
    decode = {
        "mini compiled": lambda: generate(fast, idx, new, temperature=0),
        "mini compiled, lookup": lambda: generate_lookup(fast, idx, new),
        "mini C++": lambda: generate(native, idx, new, temperature=0),
        "mini C++, lookup": lambda: generate_lookup(native, idx, new),
    }
    same = bool(torch.equal(found.ids, decode["mini compiled"]()))
    seconds, _ = in_turn(decode, args.repeats, {})
    gain = {way: ratio(seconds[f"mini {way}, lookup"], seconds[f"mini {way}"]) for way in ("compiled", "C++")}
    print(f"{found.acceptance:.0%} of {found.proposed} guesses taken, {found.tokens_per_pass:.2f} tokens per pass")
    return {"rows": rows_of(seconds, new), "acceptance": round(found.acceptance, 3), "equal_tokens": same,
            "tokens_per_pass": round(found.tokens_per_pass, 2), "lookup / plain": gain}  # fmt: skip


def loss_in_steps(model: NativeGPT, windows: torch.Tensor) -> float:
    """Mean loss over windows (n, T + 1), each read through the cache as decoding would."""
    losses = []
    for w in windows.split(1):
        cache = KVCache.for_model(model)
        logits = torch.cat([model(part, kv_cache=cache)[0] for part in w[:, :-1].split(MOST, dim=1)], dim=1)
        losses.append(torch.nn.functional.cross_entropy(logits[0], w[0, 1:]).item())
    return statistics.fmean(losses)


@torch.inference_mode()
def int8(args: argparse.Namespace, model: GPTLanguageModel, folder: Path) -> dict:
    """The loss of the course's own trained model on held-out text with smaller weights, and the sizes at GPT-2's."""
    mini, enc = load_pretrained("mini").eval(), load_tokenizer("mini")
    text = (RESULTS.parents[1] / "data/corpus/heldout.txt").read_text(encoding="utf-8")
    windows = torch.tensor(enc.encode(text, allowed_special="all")[: 80 * 257]).view(-1, 257)
    loss, out = {}, {}
    for kind, weights in KINDS.items():
        small = FastGPT(mini, weights, compile=False)
        loss[kind] = statistics.fmean(small(w[:, :-1], w[:, 1:])[1].item() for w in windows.split(8))
        size = NativeGPT(model, weights).nbytes / 1e6
        change = loss[kind] / loss["float32"] - 1
        out[kind] = {"held-out loss": round(loss[kind], 5), "change": round(change, 6), "megabytes": round(size, 1)}
        print(f"{kind:9} loss of mini {loss[kind]:.4f} nats ({change:+.3%}), GPT-2's shape takes {size:.0f} MB")
    in_cpp = loss_in_steps(NativeGPT(mini, "int8"), windows)
    change = in_cpp / loss["float32"] - 1
    out["int8, C++"] = {"held-out loss": round(in_cpp, 5), "change": round(change, 6)}
    print(f"int8, C++ loss of mini {in_cpp:.4f} nats ({change:+.3%}), the numbers between the layers in 16 bits")
    return out | {"model": "mini, held-out text, 80 windows of 256 tokens"}


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


PARTS = {"single": single, "batch": batch, "int8": int8, "lookup": lookup, "long": long, "parts": parts}


def against_targets(results: dict) -> list[dict]:
    """Each target beside its figure."""
    figures = {name: (results.get("single", {}).get("ratios", {}).get(name), want) for name, want in TARGETS.items()}
    largest = results.get("batch", {}).get("sizes", {}).get(str(BATCHES[-1]), {})
    figures["batch 16, fast float32 / transformers float32"] = (
        largest.get("of transformers", {}).get("minigpt fast"), 1.5)  # fmt: skip
    figures["uncached / cached up to 900 tokens, seconds in total"] = (
        results.get("long", {}).get("no cache / cached", {}).get("cache, C++"), 25)  # fmt: skip
    rows = [{"what": name, "target": want, "measured": got} for name, (got, want) in figures.items()]
    change = results.get("int8", {}).get("int8, C++", {}).get("change")
    rows.append({"what": "C++ int8 held-out loss, change at most", "target": 0.005, "measured": change})
    gpu = results.get("cuda")
    one = gpu["1"] if isinstance(gpu, dict) else {}
    rows.append({"what": "GPU, bfloat16, CUDA graphs / transformers", "target": 15, "measured": one.get("ratio")})
    bound = one.get("share of memory bound")
    return [*rows, {"what": "GPU, bfloat16, CUDA graphs / memory bound", "target": 0.2, "measured": bound}]


def show(table: list[dict]) -> None:
    print(f"\n{'':56}{'target':>8} {'measured':>9}")
    for row in table:
        got, at_most = row["measured"], "at most" in row["what"]
        reached = got is not None and (got <= row["target"] if at_most else got >= row["target"])
        word = "not measured" if got is None else "reached" if reached else "not reached"
        print(f"{row['what']:56}{row['target']:8} {'' if got is None else got:>9}  {word}")
    print("on a GPU: " + ("measured" if torch.cuda.is_available() else "not measured, none was at hand"))


def quiet(args: argparse.Namespace) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2", choices=PRESETS)
    parser.add_argument("--prompt", type=int, default=32, help="tokens in the prompt")
    parser.add_argument("--new", type=int, default=256, help="tokens to generate for one prompt")
    parser.add_argument("--batch-new", type=int, default=32, help="tokens to generate for each prompt of a batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    args = parser.parse_args()
    quiet(args)
    model, begin = random_model(args.model), time.perf_counter()
    path = RESULTS / f"decode_{args.model}.json"
    results = json.loads(path.read_text("utf-8")) if path.exists() else {}
    chosen = {name: PARTS[name] for name in args.parts} | ({"cuda": cuda} if torch.cuda.is_available() else {})
    for name, run in chosen.items():
        print(f"\n{name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            key = name if args.threads == 2 else f"{name}, threads {args.threads}"
            results[key] = run(args, model, Path(folder)) | {"machine": machine()}
        results.setdefault("cuda", "not measured: no GPU was at hand")
        results["targets"] = against_targets(results)
        print(f"{time.perf_counter() - begin:.0f} s so far; written to", write(f"decode_{args.model}", results))
    show(results["targets"])


if __name__ == "__main__":
    main()
