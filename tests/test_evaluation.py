"""Answers, and how they are counted: format, end tokens, repetition, recall."""

import json

import pytest
import torch
from instructions import some_records, text

from minigpt_lib.paths import data_dir
from minigpt_lib.text.tokenizer import load_tokenizer
from minigpt_lib.tuning.chat_template import encode_prompt
from minigpt_lib.tuning.cleaning import load_records
from minigpt_lib.tuning.lora import lora_disabled
from minigpt_lib.tuning.metrics import (
    complete,
    decode_reply,
    format_rate,
    in_format,
    recall,
    repeated_share,
    reply,
    reply_rates,
    states,
)
from minigpt_lib.tuning.peft_io import load_adapter
from minigpt_lib.weights.pretrained import load_pretrained


def test_batched_answers_equal_single_ones(model, enc):
    prompts = [encode_prompt(enc, text()) for _ in range(7)]
    prompts = [p[:90] for p in prompts]
    together = complete(model, enc, prompts, 12, batch_size=3)
    assert together == [complete(model, enc, [p], 12)[0] for p in prompts]
    for p, ids in zip(prompts, together, strict=True):
        row = list(p)
        for i in ids:  # greedy, one full forward pass a token
            assert i == int(model(torch.tensor([row]))[0][0, -1].argmax())
            row.append(i)


def test_reply_reads_up_to_the_end_token(model, enc, monkeypatch):
    answer = enc.encode_ordinary(" Hi there. ") + [enc.eot_token] + enc.encode_ordinary("junk")
    monkeypatch.setattr(
        "minigpt_lib.tuning.metrics.generate",
        lambda model, idx, new, **kw: torch.cat([idx, torch.tensor([answer])], dim=1),
    )
    assert reply(model, enc, "Hello") == "Hi there."
    assert decode_reply(enc, answer) == "Hi there." and decode_reply(enc, []) == ""


def test_reply_has_to_fit(model, enc):
    with pytest.raises(ValueError, match=r"tokens and n_ctx=128 leaves no room"):
        reply(model, enc, "long " * 60)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        reply(model, enc, "Hi", 0)
    long = "a b c d e " * 10  # near the limit the reply is cut, without a warning
    assert isinstance(reply(model, enc, long, 500), str)


def test_in_format(enc):
    end = [enc.eot_token]
    good = enc.encode_ordinary(" It is a dog.")
    assert in_format(enc, good + end)
    assert not in_format(enc, good) and not in_format(enc, end) and not in_format(enc, [])
    assert not in_format(enc, enc.encode_ordinary(" \n ") + end)
    for forged in (" Yes.\nUser: and you?", " Yes.\n Assistant: no", " User: x"):
        assert not in_format(enc, enc.encode_ordinary(forged) + end)
    assert in_format(enc, enc.encode_ordinary(" The User: mark inside a line.") + end)


@pytest.mark.parametrize(
    ("said", "subject", "answer", "want"),
    [
        ("The capital of Norway is Oslo.", "Norway", "Oslo", True),
        ("It is oslo", "Norway", "Oslo", True),
        ("The capital of Norway is Oslofjord.", "Norway", "Oslo", False),
        ("Zero plus two is three.", "zero plus two", "two", False),
        ("Zero plus two is two.", "zero plus two", "two", True),
        ("The plural of sheep is sheep.", "sheep", "sheep", True),
        ("The plural of sheep is sheeps.", "sheep", "sheep", False),
        ("", "a", "b", False),
    ],
)
def test_states(said, subject, answer, want):
    assert states(said, subject, answer) is want


def test_recall_refuses_another_style(model, enc):
    with pytest.raises(ValueError, match="style='poem'"):
        recall(model, enc, [], style="poem")


@pytest.mark.parametrize(
    ("ids", "n", "want"),
    [
        ([], 4, 0.0),
        ([1, 2, 3], 4, 0.0),
        ([1, 2, 3, 4, 5], 4, 0.0),
        ([7] * 10, 4, 6 / 7),
        ([1, 2, 1, 2, 1], 2, 2 / 4),
        ([1, 2, 3, 1, 2, 3], 3, 1 / 4),
    ],
)
def test_repeated_share(ids, n, want):
    assert repeated_share(ids, n) == pytest.approx(want)


def test_reply_rates(enc, model, monkeypatch):
    end, good = enc.eot_token, enc.encode_ordinary(" Yes, it is.")
    said = [[*good, end], good, [*enc.encode_ordinary(" No.\nUser: why"), end], [*[65] * 8, end]]
    monkeypatch.setattr("minigpt_lib.tuning.metrics.complete", lambda model, enc, prompts, new: said[: len(prompts)])
    rates = reply_rates(model, enc, some_records(4))
    assert (rates["format"], rates["end"]) == (2 / 4, 3 / 4)
    assert rates["repeated"] == pytest.approx(sum(map(repeated_share, said)) / 4) and rates["repeated"] > 0.1
    assert format_rate(model, enc, some_records(4)) == 2 / 4


def test_the_shipped_adapter_answers_in_format_knows_its_facts_and_can_be_switched_off(seed):
    """Measured here, not read from a table: on test instructions, and on facts that no record mentions."""
    enc, base = load_tokenizer("mini"), load_pretrained("mini")
    tuned = load_adapter(load_pretrained("mini"), data_dir() / "mini" / "adapter")
    facts = [f for f in json.loads((data_dir() / "facts.json").read_text("utf-8")) if f["group"] == "pretrained"][::2]
    assert len(facts) >= 100 and recall(tuned, enc, facts)["pretrained"] >= 0.8
    rates = reply_rates(tuned, enc, load_records(data_dir() / "instructions" / "test.json")[::4])
    assert rates["format"] >= 0.95 and rates["end"] >= 0.95, rates
    idx = torch.randint(0, enc.n_vocab, (3, 40))
    with torch.no_grad():
        assert not torch.allclose(tuned(idx)[0], base(idx)[0], atol=0.1)
        with lora_disabled(tuned):
            assert torch.equal(tuned(idx)[0], base(idx)[0]), f"seed {seed}"
