"""What every benchmark shares: the machine described, repeats with medians, results as JSON."""

import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> dict[str, object]:
    """Processor, cores, device and versions: what a figure depends on."""
    info = {"processor": processor(), "threads": torch.get_num_threads(), "system": platform.system()}
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "transformers": version("transformers")}
    return info | {"python": platform.python_version()} | versions


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def interleaved(
    candidates: dict[str, Callable[[], object]], repeats: int, warm: bool = True
) -> dict[str, list[float]]:
    """Seconds of each candidate, `repeats` times in turn, so that a drift of the machine meets them all alike.

    With `warm` each runs once untimed first.
    """
    for run in candidates.values() if warm else ():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def summary(seconds: list[float], tokens: int) -> dict[str, float]:
    """Median tokens per second with the slowest and the fastest run."""
    rates = sorted(tokens / s for s in seconds)
    median = statistics.median(rates)
    return {"tokens_per_s": round(median, 2), "slowest": round(rates[0], 2), "fastest": round(rates[-1], 2)}


def write(name: str, results: dict[str, object]) -> Path:
    """Store results as benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return path
