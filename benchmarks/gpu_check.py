"""Decoding on a GPU, checked and measured: `python benchmarks/gpu_check.py [--device cuda|cpu] [--parts PART ...]`.

Each part is a process of its own with a limit of its own, so one that hangs or crashes the GPU leaves the others alone.
What was found goes to benchmarks/results/gpu_check_NAME.json as it comes, failures too. `--device cpu` runs the same
with a tiny model, kernels in Triton's interpreter where Triton is installed: it shows that the script works, no speed.
Needs neither Jupyter nor a network; Transformers is compared where it is installed.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
LIMITS = {"correct": 90, "threads": 60, "decode": 120, "fused": 120}  # seconds, on a GPU
PROMPT, NEW = 32, 256

import torch  # noqa: E402

from minigpt_lib.generation.compiled import FastGPT, RecordedSteps  # noqa: E402
from minigpt_lib.generation.cuda import FusedGPT, interpreted, triton  # noqa: E402
from minigpt_lib.generation.decode import generate, plan_decode  # noqa: E402
from minigpt_lib.generation.kv_cache import KVCache  # noqa: E402
from minigpt_lib.generation.quantized import PackedGPT  # noqa: E402
from minigpt_lib.model.gpt import GPTConfig, GPTLanguageModel  # noqa: E402


def random_model(device: torch.device, dtype: torch.dtype) -> GPTLanguageModel:
    """The 124M shape on a GPU, a tiny one elsewhere; strong positions, so that greedy text varies."""
    tiny = {} if device.type == "cuda" else {"vocab_size": 97, "n_ctx": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    torch.manual_seed(0)
    model = GPTLanguageModel(GPTConfig.preset("gpt2", **tiny)).eval()
    model.wpe.weight.data *= 20
    return model.to(device, dtype)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    run()
    times = []
    for _ in range(repeats if device.type == "cuda" else 1):
        wait(device)
        begin = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def fast_of(model: GPTLanguageModel, weights: str | None = None) -> FastGPT:
    """FastGPT with recorded steps; on a CPU they run unrecorded."""
    fast = FastGPT(model, weights, compile=model.wpe.weight.is_cuda)
    fast.backend = fast.backend or RecordedSteps(fast)
    return fast


def logits_of_steps(model: GPTLanguageModel, idx: torch.Tensor, T: int) -> torch.Tensor:
    """Logits behind each token of idx from the T-th on, one step each: the same tokens for every model."""
    cache, rows = KVCache.for_model(model, 1, idx.size(1)), []
    with torch.inference_mode():
        model.last_logits(idx[:, :T], cache)
        for t in range(T, idx.size(1)):
            rows.append(model.last_logits(idx[:, t : t + 1], cache)[0].float())
    return torch.stack(rows)


def decode_all(model: FastGPT | FusedGPT, idx: torch.Tensor, new: int, **options) -> torch.Tensor:
    plan = plan_decode(model, idx, new, kv_cache=model.new_cache(1, idx.size(1) + new), **options)
    for _ in model.decode(plan):
        pass
    return plan.ids


def sizes(device: torch.device) -> tuple[int, int]:
    return (PROMPT, NEW) if device.type == "cuda" else (9, 5)


def correct(device: torch.device) -> dict:
    """Each way of decoding against the packed model without it: logits of every step, on the same tokens."""
    (T, new), out = sizes(device), {}
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        model = random_model(device, dtype)
        idx = torch.randint(0, model.config.vocab_size, (1, T + min(new, 120)), device=device)
        for weights in (None, "bfloat16", "int8"):
            want = logits_of_steps(PackedGPT(model, weights), idx, T)
            ways = {"recorded": lambda: fast_of(model, weights)}  # noqa: B023
            if triton is not None:
                ways["Triton"] = lambda: FusedGPT(model, weights)  # noqa: B023
            for name, made in ways.items():
                off = float((logits_of_steps(made(), idx, T) - want).norm() / want.norm())
                out[f"{name}, {weights or 'own'} weights, {str(dtype)[6:]}"] = {"off": off, "ok": off < limit}
    model = random_model(device, torch.float32)
    idx = torch.randint(0, model.config.vocab_size, (1, T), device=device)
    want = generate(model, idx, new, temperature=0)
    for made in (fast_of, FusedGPT) if triton is not None else (fast_of,):
        equal = int((decode_all(made(model), idx, new, temperature=0) == want).sum()) - T
        out[f"{made.__name__}: greedy float32 tokens of {new}"] = {"equal": equal, "ok": equal == new}
    return out


def threads(device: torch.device) -> dict:
    """Models that record in several threads at once, beside one that just decodes."""
    from concurrent.futures import ThreadPoolExecutor

    model, (T, new) = random_model(device, torch.float32), sizes(device)
    idx = torch.randint(0, model.config.vocab_size, (1, T), device=device)
    want = generate(model, idx, new, temperature=0)
    makers = [lambda: fast_of(model), lambda: fast_of(model), lambda: model]
    with ThreadPoolExecutor(3) as pool:
        texts = list(pool.map(lambda made: generate(made(), idx, new, temperature=0), makers))
    return {"three threads": {"ok": all(torch.equal(text, want) for text in texts)}}


def speed_of(run: Callable[[], object], new: int, device: torch.device) -> dict:
    return {"tokens/s": round(new / median_seconds(run, device), 1)}


def decode(device: torch.device) -> dict:
    model, (T, new) = random_model(device, torch.bfloat16), sizes(device)
    idx = torch.randint(0, model.config.vocab_size, (1, T), device=device)
    out = {"memory": memory(model, device)}
    fast = fast_of(model)
    own = fast.new_cache(1, T + new)
    ways = {"plain": lambda: generate(model, idx, new, temperature=0),
            "recorded, a step per replay": lambda: (own.reset(), generate(fast, idx, new, temperature=0, kv_cache=own)),
            "recorded, 16 tokens per replay": lambda: decode_all(fast, idx, new, temperature=0),
            "the same, sampled, top-k 40": lambda: decode_all(fast, idx, new, temperature=0.8, top_k=40)}  # fmt: skip
    out |= {name: speed_of(run, new, device) for name, run in ways.items()}
    try:
        import peers

        with tempfile.TemporaryDirectory() as folder:
            theirs = peers.transformers_model(model.float().cpu(), Path(folder)).to(device, torch.bfloat16)
        out["transformers"] = speed_of(lambda: peers.transformers_generate(theirs, idx, new), new, device)
    except Exception as error:  # whatever their version says: the rest still counts
        out["transformers"] = {"skipped": f"{type(error).__name__}: {str(error)[:100]}"}
    return out


def fused(device: torch.device) -> dict:
    if triton is None:
        return {"fused": {"skipped": "Triton is not installed"}}
    model, (T, new) = random_model(device, torch.bfloat16), sizes(device)
    idx = torch.randint(0, model.config.vocab_size, (1, T), device=device)
    out = {"memory": memory(model, device)}
    early = (False, True) if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9 else (False,)
    for weights in (None, "int8"):
        for pdl in early:
            made = FusedGPT(model, weights, pdl=pdl)
            for name, options in {"greedy": {"temperature": 0}, "sampled": {"temperature": 0.8}}.items():
                label = f"Triton, {weights or 'bfloat16'}{', early start' if pdl else ''}, {name}"
                out[label] = speed_of(lambda: decode_all(made, idx, new, **options), new, device)  # noqa: B023
    return out


def memory(model: GPTLanguageModel, device: torch.device) -> dict:
    """How fast the device copies, and the tokens a second at which the bfloat16 weights alone would pass."""
    a = torch.randn(2**28 if device.type == "cuda" else 2**20, device=device)
    b = torch.empty_like(a)
    rate = 2 * a.nbytes / median_seconds(lambda: b.copy_(a), device)
    weights = 2 * (model.num_parameters() - model.wpe.weight.numel())
    return {"GB/s": round(rate / 1e9, 1), "bound, tokens/s": round(rate / weights, 1)}


PARTS = {"correct": correct, "threads": threads, "decode": decode, "fused": fused}


def machine(device: torch.device) -> dict:
    found = {"python": sys.version.split()[0], "torch": torch.__version__,
             "triton": None if triton is None else triton.__version__, "interpreter": interpreted()}  # fmt: skip
    if device.type != "cuda":
        return {"gpu": None} | found
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()
    return {"gpu": torch.cuda.get_device_name(device), "driver": driver} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/gpu_check_NAME.json)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # this is one part's own process
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.inside:
        print("RESULT " + json.dumps(PARTS[args.parts[0]](device)))
        return
    about = machine(device)
    name = re.sub(r"[^a-z0-9]+", "_", (about["gpu"] or "cpu").lower().removeprefix("nvidia ")).strip("_")
    out = args.out or ROOT / "benchmarks" / "results" / f"gpu_check_{name}.json"
    results = {"machine": about, "parts": {}}
    for part in args.parts:
        begin, limit = time.perf_counter(), LIMITS[part] * (1 if device.type == "cuda" else 10)
        command = [sys.executable, __file__, "--inside", "--device", args.device, "--parts", part]
        env = os.environ | ({} if device.type == "cuda" else {"TRITON_INTERPRET": "1"})
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            last = (done.stderr.strip().splitlines() or ["no result"])[-1]
            found = json.loads(lines[-1].removeprefix("RESULT ")) if lines else {"failed": {"ok": False, "error": last}}
        except subprocess.TimeoutExpired:
            found = {"failed": {"ok": False, "error": f"not done within {limit} s"}}
        results["parts"][part] = {"seconds": round(time.perf_counter() - begin, 1), "rows": found}
        for what, row in found.items():
            print(f"{ {True: 'ok', False: 'FAIL'}.get(row.get('ok'), ''):5}{part:9}{what:52}{row}", flush=True)
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"written to {out}")
    failed = [row for part in results["parts"].values() for row in part["rows"].values() if row.get("ok") is False]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
