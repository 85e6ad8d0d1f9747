"""Loading a GPT-2 from its file: time and peak memory beside Transformers' from_pretrained, fresh processes in turn.

    python benchmarks/load.py [--models gpt2 gpt2-medium] [--repeats 7]

The weights are random, in the shapes of the named models, in one safetensors file that Transformers wrote; the file is
in the page cache. Measured are the call itself, the first logits after it (a file that was only mapped is read then),
and the peak of the process's memory above what it was before the call, as a multiple of the model's bytes. The same for
OpenAI's layout, which only this library reads. Writes benchmarks/results/load.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine, write

LAYOUTS = {"minigpt": "hub", "transformers": "hub", "minigpt, OpenAI's layout": "openai", "minigpt, own file": "own"}


def memory(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure(who: str, folder: str, dtype: str) -> dict[str, float]:
    """One load in this process; imports are done before the clock starts."""
    import torch

    kind = getattr(torch, dtype)
    if who == "transformers":
        from transformers import GPT2LMHeadModel
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()

        def load():
            return GPT2LMHeadModel.from_pretrained(folder, dtype=kind).eval()
    else:
        from minigpt_lib.weights import load_pretrained

        def load():
            return load_pretrained(folder, dtype=kind)

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, started = memory("VmRSS"), time.perf_counter()
    model = load()
    loaded, peak = time.perf_counter(), memory("VmHWM")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    with torch.inference_mode():
        model(torch.tensor([[5]]))
    ready = time.perf_counter()
    return {
        "load_s": loaded - started,
        "first_logits_s": ready - started,
        "peak_of_load": (peak - before) / size,
        "peak_with_logits": (memory("VmHWM") - before) / size,
    }


def make_files(name: str, place: Path) -> dict[str, Path]:
    """A random model in three layouts: as Transformers writes it, as OpenAI did, and as this library writes it."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from minigpt_lib.model import GPTConfig
    from minigpt_lib.weights import config_to_hf, load_pretrained, save_pretrained

    torch.manual_seed(0)
    config = GPTConfig.preset(name)
    folders = {layout: place / name / layout for layout in ("hub", "openai", "own")}
    GPT2LMHeadModel(GPT2Config(**config_to_hf(config))).save_pretrained(folders["hub"])
    model = load_pretrained(folders["hub"])
    save_pretrained(model, folders["own"])
    write_openai(model, folders["openai"])
    return folders


def write_openai(model, folder: Path) -> None:
    """The model as a TensorFlow checkpoint, with the writer of the tests."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import tf_writer

    from minigpt_lib.tensor_files import crc32c
    from minigpt_lib.weights import to_hf_state

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["gpt2", "gpt2-medium"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--one", nargs=3, metavar=("WHO", "FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one)))
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    settings = {"repeats": args.repeats, "page_cache": "warm", "cores": cores}
    results: dict[str, object] = {"machine": machine(), "settings": settings}
    with tempfile.TemporaryDirectory() as place:
        for name in args.models:
            folders = make_files(name, Path(place))
            for dtype in ("float32", "bfloat16"):
                results[f"{name}, {dtype}"] = compare(f"{name}, {dtype}", folders, dtype, args.repeats)
    print("written to", write("load", results))


def compare(title: str, folders: dict[str, Path], dtype: str, repeats: int) -> dict[str, dict]:
    """The medians of all candidates, each run `repeats` times in a process of its own, in turn."""
    runs: dict[str, list[dict[str, float]]] = {who: [] for who in LAYOUTS}
    for file in (file for folder in folders.values() for file in folder.iterdir()):
        with file.open("rb") as f:  # into the page cache
            while f.read(2**24):
                pass
    for _ in range(repeats):
        for who, layout in LAYOUTS.items():
            command = [sys.executable, __file__, "--one", who, str(folders[layout]), dtype]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
            runs[who].append(json.loads(done.stdout.splitlines()[-1]))
    rows = {}
    for who, all_runs in runs.items():
        rows[who] = {key: round(statistics.median(run[key] for run in all_runs), 3) for key in all_runs[0]}
        rows[who]["slowest_load_s"] = round(max(run["load_s"] for run in all_runs), 3)
        rows[who]["fastest_load_s"] = round(min(run["load_s"] for run in all_runs), 3)
    for key in ("load_s", "first_logits_s"):
        rows[f"{key}: minigpt / transformers"] = round(rows["minigpt"][key] / rows["transformers"][key], 2)
    print(f"\n{title:26} load, s (fastest to slowest)   first logits, s   peak / model's bytes: load, with logits")
    for who in LAYOUTS:
        r = rows[who]
        span = f"({r['fastest_load_s']:.3f} to {r['slowest_load_s']:.3f})"
        peaks = f"{r['peak_of_load']:.2f}, {r['peak_with_logits']:.2f}"
        print(f"  {who:24} {r['load_s']:.3f} {span:24} {r['first_logits_s']:12.3f} {peaks:>26}")
    for key in ("load_s", "first_logits_s"):
        print(f"  {key}: minigpt / transformers {rows[f'{key}: minigpt / transformers']:.2f}")
    return rows


if __name__ == "__main__":
    main()
