"""Text in, text out: `LLM.generate` beside Transformers' `generate`, the same random weights, tokenizing included.

    python benchmarks/llm.py [--model gpt2] [--prompt 32] [--new 256] [--repeats 5]

Greedy, one text, float32. The two take turns, every second round backwards; the ratio is the median of the rounds'
ratios. With GPT-2's vocabulary where it is at hand, else with that of `mini`. Writes benchmarks/results/llm_MODEL.json.
"""

import argparse
import statistics
import tempfile
import time

import torch
from common import machine, write
from decode import prompt_of, random_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from minigpt_lib import LLM, load_tokenizer, save_pretrained
from minigpt_lib.download import FetchError


def vocabulary():
    try:
        return "gpt2", load_tokenizer("gpt2")
    except FetchError:
        return "mini", load_tokenizer("mini")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    logging.set_verbosity_error()
    name, enc = vocabulary()
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(random_model(args.model), folder, enc)
        llm = LLM.load(folder, device="cpu")
        theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        text = enc.decode((prompt_of(llm.model, 1, args.prompt)[0] % enc.n_vocab).clamp(max=enc.n_vocab - 2).tolist())

        def ours() -> str:
            return llm.generate(text, temperature=0, max_new_tokens=args.new)

        def transformers() -> str:
            ids = tokenizer(text, return_tensors="pt").input_ids
            with torch.inference_mode():
                new = theirs.generate(ids, max_new_tokens=args.new, do_sample=False, pad_token_id=enc.eot_token)
            return tokenizer.decode(new[0, ids.size(1) :])

        runs = {"LLM.generate": ours, "Transformers": transformers}
        texts = {key: run() for key, run in runs.items()}  # warms both up
        written = {key: len(enc.encode_ordinary(t)) for key, t in texts.items()}
        seconds: dict[str, list[float]] = {key: [] for key in runs}
        for i in range(args.repeats):
            for key in list(runs)[:: 1 if i % 2 == 0 else -1]:
                begin = time.perf_counter()
                runs[key]()
                seconds[key].append(time.perf_counter() - begin)
    ratios = [b / a for a, b in zip(seconds["LLM.generate"], seconds["Transformers"], strict=True)]
    results = {
        "machine": machine(),
        "vocabulary": name,
        "decoder": llm.decoder,
        "equal text": texts["LLM.generate"] == texts["Transformers"],
        "tokens of the texts": written,
        "tokens per second": {key: round(args.new / statistics.median(s), 1) for key, s in seconds.items()},
        "times Transformers": round(statistics.median(ratios), 2),
        "slowest and fastest round": [round(min(ratios), 2), round(max(ratios), 2)],
        "arguments": vars(args),
    }
    write(f"llm_{args.model}", results)
    print({key: value for key, value in results.items() if key != "machine"})


if __name__ == "__main__":
    main()
