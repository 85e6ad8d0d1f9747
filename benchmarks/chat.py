"""The chat app as a client sees it: start-up, first token, tokens per second, the second turn, two users at once.

    python benchmarks/chat.py [--model mini] [--repeats 7] [--new 128]

Each repeat is a new session over HTTP, as a browser would open it. The times are the client's: queue, server and stream
included. Prints medians with the best and the worst, and writes benchmarks/results/chat_MODEL.json.
"""

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from common import machine, write

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "Tell me a short story about a fox who lives near a river and has many friends in the old forest."


def start(model: str) -> tuple[subprocess.Popen, str, float]:
    """`minigpt chat` in a process of its own: the process, its address, and the seconds until it served the page."""
    command = [sys.executable, "-u", "-m", "minigpt_lib.cli", "chat", "--model", model, "--port", "0"]
    quiet = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False"}
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=quiet, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    if "http://" not in line:
        raise SystemExit("the app did not start")
    address = line.split()[3]
    httpx.get(address).raise_for_status()
    return process, address, time.perf_counter() - began


class Session:
    """A reader's session: asks, and notes when what came."""

    def __init__(self, address: str):
        self.http = httpx.Client(base_url=address + "/gradio_api", timeout=300)
        self.name = secrets.token_hex(6)
        functions = httpx.get(address + "/config").json()["dependencies"]
        self.fn = next(f["id"] for f in functions if f["api_name"] == "chat")
        named = self.http.get("/info").json()["named_endpoints"]["/chat"]["parameters"]
        self.defaults = [p.get("parameter_default") for p in named][1:]

    def ask(self, message: str, new: int, *, cache: bool = True) -> dict[str, float]:
        """Seconds to the first token and to the last, and the reply's own count of tokens (temperature 1, no top-k)."""
        settings = [1.0, 0, 1.0, new, cache, "7", *self.defaults[6:]]
        body = {"data": [message, None, *settings], "fn_index": self.fn, "session_hash": self.name}
        began, first, pages = time.perf_counter(), None, 0
        self.http.post("/queue/join", json=body).raise_for_status()
        with self.http.stream("GET", "/queue/data", params={"session_hash": self.name}) as stream:
            for line in stream.iter_lines():
                if '"process_generating"' in line:
                    pages += 1
                    if pages == 2 and first is None:  # the first page shows the question, the second the first token
                        first = time.perf_counter() - began
                if '"process_completed"' in line:
                    total = time.perf_counter() - began
                    values = json.loads(line.removeprefix("data: "))["output"]["data"]
                    break
        status = next(v for v in values if isinstance(v, str) and "positions used" in v)
        tokens = int(status.split(" token")[0].rsplit(">", 1)[-1])
        return {"first_token_s": first, "total_s": total, "tokens": tokens}


def together(address: str, new: int, users: int = 2) -> list[dict[str, float]]:
    """What so many readers get who ask at the same moment."""
    sessions = [Session(address) for _ in range(users)]
    with ThreadPoolExecutor(users) as pool:
        return list(pool.map(lambda session: session.ask(QUESTION, new), sessions))


def rate(answer: dict[str, float]) -> float:
    """Tokens per second after the first."""
    return (answer["tokens"] - 1) / (answer["total_s"] - answer["first_token_s"])


def spread(values: list[float], digits: int = 4) -> dict[str, float]:
    return {"median": round(statistics.median(values), digits), "best": round(min(values), digits),
            "worst": round(max(values), digits)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--new", type=int, default=128, help="tokens a reply, at most")
    args = parser.parse_args()
    starts = []
    for n in range(args.starts):
        process, address, seconds = start(args.model)
        starts.append(seconds)
        if n < args.starts - 1:
            process.terminate()
            process.wait()
    names = ("first", "second", "second, cache off", "first, two at once", "rate", "rate, two at once")
    rows: dict[str, list[float]] = {name: [] for name in names}
    try:
        Session(address).ask(QUESTION, 16)  # not counted: the first request of all
        for _ in range(args.repeats):
            with_cache, without = Session(address), Session(address)
            one = with_cache.ask(QUESTION, args.new)
            rows["first"].append(one["first_token_s"])
            rows["rate"].append(rate(one))
            rows["second"].append(with_cache.ask("And then?", 16)["first_token_s"])
            without.ask(QUESTION, args.new, cache=False)
            rows["second, cache off"].append(without.ask("And then?", 16, cache=False)["first_token_s"])
            for each in together(address, args.new):
                rows["first, two at once"].append(each["first_token_s"])
                rows["rate, two at once"].append(rate(each))
    finally:
        process.terminate()
    results = {
        "machine": machine(),
        "settings": vars(args),
        "start_s": spread(starts, 2),
        "first_token_s": {name: spread(rows[name]) for name in names[:4]},
        "tokens_per_s": {"alone": spread(rows["rate"], 1), "each of two at once": spread(rows["rate, two at once"], 1)},
    }
    ratio = results["first_token_s"]["second"]["median"] / results["first_token_s"]["first"]["median"]
    shared = results["tokens_per_s"]["each of two at once"]["median"] / results["tokens_per_s"]["alone"]["median"]
    results["ratios"] = {"second turn's first token / first turn's": round(ratio, 2),
                         "tokens per second, each of two at once / alone": round(shared, 2)}
    print(json.dumps({name: results[name] for name in results if name != "machine"}, indent=1))
    print("written to", write(f"chat_{args.model}", results))


if __name__ == "__main__":
    main()
