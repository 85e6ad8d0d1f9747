"""Greedy decoding with and without the KV cache, beside Transformers, with the same random weights in one run.

    python benchmarks/decode.py [--model gpt2] [--prompt 32] [--new 128] [--repeats 3]

Prints tokens per second (median, slowest, fastest) and ratios, and writes benchmarks/results/decode_MODEL.json.
"""

import argparse
import tempfile

import torch
from common import interleaved, machine, summary, write
from transformers import GPT2LMHeadModel
from transformers.utils import logging

from minigpt_lib.generation import generate
from minigpt_lib.model import PRESETS, GPTConfig, GPTLanguageModel
from minigpt_lib.weights import save_pretrained


def twins(name: str) -> tuple[GPTLanguageModel, GPT2LMHeadModel]:
    """Our model and Transformers' with the same random weights."""
    torch.manual_seed(0)
    ours = GPTLanguageModel(GPTConfig.preset(name)).eval()
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(ours, folder)
        return ours, GPT2LMHeadModel.from_pretrained(folder).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2", choices=PRESETS)
    parser.add_argument("--prompt", type=int, default=32, help="tokens in the prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    logging.set_verbosity_error()
    ours, theirs = twins(args.model)
    idx = torch.randint(0, ours.config.vocab_size, (1, args.prompt), generator=torch.Generator().manual_seed(1))
    keep_going = {"min_new_tokens": args.new, "max_new_tokens": args.new, "do_sample": False, "pad_token_id": 0}

    candidates = {
        "minigpt, KV cache": lambda: generate(ours, idx, args.new, temperature=0),
        "minigpt, no cache": lambda: generate(ours, idx, args.new, temperature=0, use_cache=False),
        "transformers, KV cache": lambda: theirs.generate(idx, attention_mask=torch.ones_like(idx), **keep_going),
    }
    with torch.inference_mode():
        cached, uncached = candidates["minigpt, KV cache"](), candidates["minigpt, no cache"]()
        agree = torch.equal(cached, uncached)
        seconds = interleaved(candidates, args.repeats)
    rows = {name: summary(times, args.new) for name, times in seconds.items()}
    rate = {name: row["tokens_per_s"] for name, row in rows.items()}
    ratios = {
        "cached / uncached": round(rate["minigpt, KV cache"] / rate["minigpt, no cache"], 2),
        "minigpt / transformers, both cached": round(rate["minigpt, KV cache"] / rate["transformers, KV cache"], 2),
    }
    for name, row in rows.items():
        print(f"{name:24} {row['tokens_per_s']:9.1f} tokens/s   ({row['slowest']:.1f} to {row['fastest']:.1f})")
    print(*(f"{name}: {ratio:.2f}" for name, ratio in ratios.items()), f"equal tokens: {agree}", sep="\n")
    settings = vars(args) | {"dtype": "float32", "batch": 1}
    results = {"machine": machine(), "settings": settings, "rows": rows, "ratios": ratios, "equal_tokens": agree}
    print("written to", write(f"decode_{args.model}", results))


if __name__ == "__main__":
    main()
