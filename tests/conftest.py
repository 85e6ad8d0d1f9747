"""Shared fixtures: a fresh seed for every test, and GPT-2's vocabulary where it can be had."""

import os
import random
import secrets
import signal
from pathlib import Path

import pytest
import tiktoken
import torch
from instructions import tiny_encoding, tiny_model

from minigpt_lib.model.gpt import GPTLanguageModel

ROOT = Path(__file__).resolve().parents[1]

# `make quick` runs these, without the tests of GPT-2's size in them: each core piece against its oracle, in seconds
QUICK = """attention model cache sampling loss data template records batching lora tokenizer atomic paths devices
evaluation notebooks pins tensor_files"""
LARGE = ("gpt2s_shape", "124m", "memory_of_one_model", "every_character", "hugging_face")

# what runs in the background of a shell ignores Ctrl-C and hands that on to its children, which the tests interrupt
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def seed() -> int:
    """A fresh seed each run, already given to torch and random; MINIGPT_TEST_SEED repeats one.

    pytest prints it when the test fails.
    """
    value = int(os.environ.get("MINIGPT_TEST_SEED") or secrets.randbelow(2**31))
    print(f"seed = {value} (MINIGPT_TEST_SEED={value} repeats it)")
    torch.manual_seed(value)
    random.seed(value)
    return value


@pytest.fixture(scope="session")
def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's own BPE; skips where its files are neither in a tiktoken cache nor reachable."""
    beside = ROOT.parent / "shared" / "tiktoken_cache"
    if "TIKTOKEN_CACHE_DIR" not in os.environ and beside.is_dir():
        os.environ["TIKTOKEN_CACHE_DIR"] = str(beside)
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests raises several kinds
        pytest.skip(f"GPT-2's vocabulary is not at hand (set TIKTOKEN_CACHE_DIR): {type(error).__name__}")


@pytest.fixture
def byte_encoding() -> tiktoken.Encoding:
    """256 bytes and the special token: enough to check what is encoded."""
    ranks = {bytes([i]): i for i in range(256)}
    return tiktoken.Encoding("bytes", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})


@pytest.fixture(scope="session")
def enc() -> tiktoken.Encoding:
    """The tiny vocabulary of the tests of instruction tuning; a file may have an `enc` of its own."""
    return tiny_encoding()


@pytest.fixture
def model(seed, enc) -> GPTLanguageModel:
    """A tiny model with fresh weights for that vocabulary, in eval mode; a file may have a `model` of its own."""
    return tiny_model(enc.n_vocab)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what `make quick` leaves out: notebooks, browsers, other processes, compilers and large models."""
    for item in items:
        if item.path.stem.removeprefix("test_") not in QUICK.split() or any(name in item.name for name in LARGE):
            item.add_marker("slow")
