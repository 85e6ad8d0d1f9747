"""What the tests of instruction tuning share: a tiny vocabulary, a tiny model, messy random records."""

import random

import tiktoken

from minigpt_lib.model.gpt import GPTConfig, GPTLanguageModel
from minigpt_lib.text.bpe import GPT2_PATTERN

END = "<|endoftext|>"
WORDS = ["apple", "river", "User", "Assistant", ":", "\n", END, "42", "dog's", "ünï", "日本", ",", ".", "!", "("]
WORDS += ["stone", "bird", "User:", "Assistant:", "\nUser:", "\t"]
SIMPLE = [{"instruction": f"Say {w}.", "output": w} for w in ("one", "two", "three", "four", "five", "six")]


def tiny_encoding() -> tiktoken.Encoding:
    """A byte-level vocabulary of 256 bytes and a few merges, so that tests need no file."""
    ranks = {bytes([i]): i for i in range(256)}
    for merged in (b"Us", b"er", b"User", b"As", b"ss", b" a", b"th", b" th", b"is", b"an", b"in", b" th" + b"e"):
        ranks.setdefault(merged, len(ranks))
    return tiktoken.Encoding("tiny", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END: len(ranks)})


def tiny_model(vocab_size: int) -> GPTLanguageModel:
    return GPTLanguageModel(GPTConfig(vocab_size=vocab_size, n_ctx=128, n_embd=32, n_layer=2, n_head=2)).eval()


def words(low: int = 1, high: int = 12) -> str:
    return " ".join(random.choice(WORDS) for _ in range(random.randint(low, high)))


def text(low: int = 1, high: int = 12) -> str:
    """Random text that holds at least one letter, whatever is stripped."""
    return f"{words(low, high)} x"


def some_records(n: int) -> list[dict]:
    return [{"instruction": text(), "input": random.choice(["", text()]), "output": text(1, 20)} for _ in range(n)]
