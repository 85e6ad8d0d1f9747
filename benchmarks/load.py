"""Loading a GPT-2 from its file: time and peak memory beside Transformers' from_pretrained, in rounds.

    python benchmarks/load.py [--models gpt2 gpt2-medium] [--repeats 9]

The weights are random, in the shapes of the named models, in one safetensors file that Transformers wrote; the file is
in the page cache. Every load has a process of its own, split off from one in which all imports are done and both
libraries have loaded a tiny model. Measured are the call itself, the first logits after it (a file that was only mapped
is read then), and the peak of the process's memory above what it was before the call, as a multiple of the model's
bytes. Both libraries load in turn, every second round backwards, and the ratio is the median of the rounds' ratios. The
same for the two layouts with checksums, which this library verifies, its own file and OpenAI's, set against
Transformers and the plain file.
Writes benchmarks/results/load.json. Linux only (it reads /proc).
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from common import machine, write
from transformers import GPT2Config, GPT2LMHeadModel

from minigpt_lib.model.gpt import GPTConfig
from minigpt_lib.weights.convert import config_to_hf, to_hf_state
from minigpt_lib.weights.crc32c import crc32c
from minigpt_lib.weights.pretrained import load_pretrained, save_pretrained

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
LAYOUTS = {  # who loads what
    "minigpt": "hub",
    "transformers": "hub",
    "minigpt, own file": "own",
    "minigpt, OpenAI's layout": "openai",
}
LOADERS = {
    "minigpt": lambda folder, kind: load_pretrained(folder, dtype=kind),
    "transformers": lambda folder, kind: GPT2LMHeadModel.from_pretrained(folder, dtype=kind).eval(),
}


def memory(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure(who: str, folder: Path, dtype: str) -> dict[str, float]:
    """One load in this process."""
    load, kind = LOADERS[who.split(",")[0]], getattr(torch, dtype)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, started = memory("VmRSS"), time.perf_counter()
    model = load(folder, kind)
    loaded, peak = time.perf_counter(), memory("VmHWM")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    asked = time.perf_counter()
    with torch.inference_mode():
        model(torch.tensor([[5]]))
    ready = time.perf_counter() - asked + loaded - started
    return {
        "load_s": loaded - started,
        "first_logits_s": ready,
        "peak_of_load": (peak - before) / size,
        "peak_with_logits": (memory("VmHWM") - before) / size,
    }


def in_child(threads: int, job: Callable, *args: object) -> object:
    """job(*args) in a process split off from this one, which has not yet started PyTorch's threads."""

    def run(answer: multiprocessing.connection.Connection) -> None:
        torch.set_num_threads(threads)
        answer.send(job(*args))

    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=run, args=(there,))
    child.start()
    there.close()
    answer = here.recv()  # EOFError if the child failed: its traceback is on the screen
    child.join()
    return answer


def make_files(config: GPTConfig, place: Path) -> dict[str, Path]:
    """A random model in three layouts: as Transformers writes it, as this library does, and as OpenAI did."""
    torch.manual_seed(0)
    folders = {layout: place / layout for layout in ("hub", "own", "openai")}
    GPT2LMHeadModel(GPT2Config(**config_to_hf(config))).save_pretrained(folders["hub"])
    model = load_pretrained(folders["hub"])
    save_pretrained(model, folders["own"])
    write_openai(model, folders["openai"])
    for file in (file for folder in folders.values() for file in folder.iterdir()):
        with file.open("rb+") as f:
            os.fsync(f.fileno())  # the disk is done with it before the clock starts
            while f.read(2**24):  # and it is in the page cache
                pass
    return folders


def write_openai(model, folder: Path) -> None:
    """The model as a TensorFlow checkpoint, with the writer of the tests."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import tf_writer

    tf_writer.slow_crc = crc32c  # a checksum bit by bit would take hours here
    tensors = {}
    for name, t in to_hf_state(model.state_dict()).items():
        kind, _, part = name.rpartition(".")
        end = "/b" if part == "bias" else "" if kind in ("wte", "wpe") else "/g" if "ln_" in kind else "/w"
        there = kind.replace("h.", "h", 1) if kind.startswith("h.") else kind
        t = t[None] if end == "/w" else t
        tensors[f"model/{there.replace('.', '/')}{end}"] = t.numpy()
    tf_writer.write(folder, dict(sorted(tensors.items())))
    c = model.config
    sizes = {"n_vocab": c.vocab_size, "n_ctx": c.n_ctx, "n_embd": c.n_embd, "n_head": c.n_head, "n_layer": c.n_layer}
    (folder / "hparams.json").write_text(json.dumps(sizes))


def compare(title: str, folders: dict[str, Path], dtype: str, repeats: int, threads: int) -> dict[str, dict]:
    """Medians of all candidates, and of the ratio of each to Transformers in the same round."""
    runs: dict[str, list[dict[str, float]]] = {who: [] for who in LAYOUTS}
    for r in range(repeats):
        for who, layout in list(LAYOUTS.items())[:: 1 if r % 2 == 0 else -1]:  # what ran before should not matter
            runs[who].append(in_child(threads, measure, who, folders[layout], dtype))
    rows: dict[str, dict] = {}
    for who, all_runs in runs.items():
        rows[who] = {key: round(statistics.median(run[key] for run in all_runs), 3) for key in all_runs[0]}
        rows[who]["slowest_load_s"] = round(max(run["load_s"] for run in all_runs), 3)
        rows[who]["fastest_load_s"] = round(min(run["load_s"] for run in all_runs), 3)
        for key in ("load_s", "first_logits_s"):
            rounds = [a[key] / b[key] for a, b in zip(all_runs, runs["transformers"], strict=True)]
            rows[who][f"{key}_to_transformers"] = round(statistics.median(rounds), 2)
    show(title, rows)
    return rows


def show(title: str, rows: dict[str, dict]) -> None:
    """The table on the screen."""
    columns = "load, s (fastest to slowest)  ratio   first logits, s  ratio   peak / model: load, with logits"
    print(f"\n{title:26} {columns}")
    for who, r in rows.items():
        span = f"({r['fastest_load_s']:.3f} to {r['slowest_load_s']:.3f})"
        loads = f"{r['load_s']:.3f} {span:22} {r['load_s_to_transformers']:5.2f}"
        logits = f"{r['first_logits_s']:15.3f} {r['first_logits_s_to_transformers']:8.2f}"
        print(f"  {who:24} {loads} {logits} {r['peak_of_load']:14.2f}, {r['peak_with_logits']:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["gpt2", "gpt2-medium"])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    started, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)  # threads would not survive the split into processes; each sets its own number
    cores = len(os.sched_getaffinity(0))
    settings = {"repeats": args.repeats, "page_cache": "warm", "cores": cores, "imports": "done, a tiny model loaded"}
    results: dict[str, object] = {"machine": machine() | {"threads": threads}, "settings": settings}
    with tempfile.TemporaryDirectory() as place:
        tiny = make_files(GPTConfig(64, 8, 8, 1, 1), Path(place) / "tiny")
        for who, layout in LAYOUTS.items():
            measure(who, tiny[layout], "bfloat16")
        for name in args.models:
            folders = in_child(threads, make_files, GPTConfig.preset(name), Path(place) / name)
            for dtype in ("float32", "bfloat16"):
                title = f"{name}, {dtype}"
                results[title] = compare(title, folders, dtype, args.repeats, threads)
    results["settings"] = settings | {"whole_run_s": round(time.perf_counter() - started)}
    print("written to", write("load", results))


if __name__ == "__main__":
    main()
