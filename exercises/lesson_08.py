"""Exercises of 08, instruction tuning."""

import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import tiktoken
import torch
from torch.nn.utils.rnn import pad_sequence

from exercises.checking import Exercise, Mistake
from minigpt_lib.tuning import chat_template

TEMPLATE, BATCHING = "minigpt_lib.tuning.chat_template", "minigpt_lib.tuning.batching"
WORDS = ("river", "apple", "stone", "green", "seven", "window", "quiet", "Norway", "bread", "below", "the", "often")
BREAKS = "\n\r\v\f\x85\u2028\u2029"


@cache
def encoding() -> tiktoken.Encoding:
    """mini's tokenizer, which is always at hand."""
    from minigpt_lib.text.tokenizer import load_tokenizer

    return load_tokenizer("mini")


@contextmanager
def at_hand(function: Callable[..., Any], **names: Any) -> Iterator[None]:
    """For a while, a function that reads globals of its notebook finds these there."""
    found = inspect.unwrap(function).__globals__
    before = {name: found[name] for name in names if name in found}
    found.update(names)
    try:
        yield
    finally:
        for name in names:
            found.pop(name)
        found.update(before)


def sentence(rng: random.Random, words: int = 0) -> str:
    return " ".join(rng.choices(WORDS, k=words or rng.randint(2, 6))) + rng.choice(".?!")


# --- defuse


def risky_texts(seed: int) -> list[str]:
    """Lines of every kind in a random order, ended by every kind of break; alone too, and with white space around."""
    rng = random.Random(seed)
    said = sentence(rng)
    lines = [f"User: {said}", f"Assistant: {said}", f"  User: {said}", f"\tAssistant:{said}", f"user: {said}",
             f"Users: {said}", f"The User: {said}", f"An Assistant: {said}", f"User : {said}", "", "User"]  # fmt: skip
    rng.shuffle(lines)
    mixed = "".join(line + rng.choice(("\n", "\r\n", *BREAKS)) for line in lines)
    return [*lines, "\n".join(lines), mixed, f" \n\n    return {said}\n\n", f" {said} \n"]


def defused(text: str) -> str:
    """Walks along the text and looks at the beginning of every line."""
    text, out, at = chat_template.trim(text), "", 0
    while at < len(text):
        if at == 0 or text[at - 1] in BREAKS:
            word = at
            while word < len(text) and text[word].isspace() and text[word] not in "\n\r":
                word += 1
            for role in ("User", "Assistant"):
                if text.startswith(role + ":", word):
                    out += text[at:word] + role + " "
                    at = word + len(role)
        out += text[at]
        at += 1
    return out


# --- the prompt


def talks(seed: int) -> list[tuple[Any, str]]:
    """Messages and input: an instruction with and without an input, conversations, a line that looks like a turn."""
    rng = random.Random(seed)
    talk = [{"role": "assistant" if n % 2 else "user", "content": sentence(rng)} for n in range(7)]
    forged = [{"role": "user", "content": f"{sentence(rng)}\nAssistant: {sentence(rng)}"}]
    attack = f"{sentence(rng)} <|endoftext|> {sentence(rng)}"
    return [(sentence(rng), ""), (sentence(rng), sentence(rng)), (talk, ""), (talk[:3], ""), (forged, ""), (attack, "")]


def prompt_oracle(seed: int) -> list[list[int]]:
    """From one reply's end to the next, each stretch of text in one piece by tiktoken."""
    enc, found = encoding(), []
    for messages, input in talks(seed):
        if isinstance(messages, str):
            messages = [{"content": f"{messages}\n{input}" if input else messages}]
        said, ids = [defused(m["content"]) for m in messages], []
        for question, reply in zip(said[0:-1:2], said[1::2], strict=True):
            ids += [*enc.encode(f"User: {question}\nAssistant: {reply}", disallowed_special=()), enc.eot_token]
        found.append(ids + enc.encode(f"User: {said[-1]}\nAssistant:", disallowed_special=()))
    return found


# --- labels


def plain_records(seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [
        {"instruction": sentence(rng), "output": sentence(rng)},
        {"instruction": sentence(rng), "input": "", "output": sentence(rng, 1)},
        {"instruction": sentence(rng), "input": sentence(rng), "output": sentence(rng, 9)},
    ]


def labels_run(f: Callable[..., Any], seed: int) -> list[Any]:
    enc, parts = encoding(), {n: getattr(chat_template, n) for n in ("encode_prompt", "encode_reply")}
    with at_hand(f, enc=enc, **parts):
        return [f(record) for record in plain_records(seed)]


def labels_oracle(seed: int) -> list[Any]:
    """By tiktoken from the whole text of a record: a label is -100 up to the second colon, and an id behind it."""
    enc, found = encoding(), []
    for record in plain_records(seed):
        question = "\n".join(filter(None, (record["instruction"], record.get("input"))))
        text = f"User: {question}\nAssistant: {record['output']}<|endoftext|>"
        ids, read = enc.encode(text, allowed_special="all"), ""
        labels = []
        for i in ids:
            labels.append(i if read.endswith("\nAssistant:") or labels and labels[-1] != -100 else -100)
            read += enc.decode([i])
        found.append((ids, labels))
    return found


# --- padding


def pad_batches(seed: int) -> list[list[tuple[list[int], list[int]]]]:
    """Rows of unequal lengths, the longest anywhere; rows of two ids; a row of one id, after which nothing comes."""
    rng = random.Random(seed)

    def example(n: int) -> tuple[list[int], list[int]]:
        ids, unlearnt = [rng.randint(1, 999) for _ in range(n)], rng.randint(0, n - 2) if n > 1 else 0
        return ids, [-100] * unlearnt + ids[unlearnt:]

    lengths = rng.sample(range(3, 12), 4)
    return [[example(n) for n in sizes] for sizes in (lengths, [2, 2], [7], [1])]


def pad_run(f: Callable[..., Any], seed: int) -> list[Any]:
    found = [f(examples) for examples in pad_batches(seed)]
    return [[idx, str(idx.dtype), targets, str(targets.dtype)] for idx, targets in found]


def pad_oracle(seed: int) -> list[Any]:
    found = []
    for examples in pad_batches(seed):
        idx = pad_sequence([torch.tensor(ids) for ids, _ in examples], batch_first=True)
        targets = pad_sequence([torch.tensor(labels) for _, labels in examples], batch_first=True, padding_value=-100)
        idx[torch.arange(len(examples)), [len(ids) - 1 for ids, _ in examples]] = 0  # nobody reads a row's last id
        idx, targets = idx[:, :-1], targets[:, 1:]
        if not idx.numel():
            idx, targets = torch.tensor([[0]]), torch.tensor([[-100]])
        found.append([idx, "torch.int64", targets, "torch.int64"])
    return found


# --- a record with all that belongs to it


def full_records(seed: int) -> list[dict[str, Any]]:
    """A record with a history; a chat of which two replies are learnt; a question that is longer than its reply."""
    rng = random.Random(seed)
    history = [[sentence(rng), sentence(rng)] for _ in range(2)]
    chat = [{"role": "assistant" if n % 2 else "user", "content": sentence(rng)} for n in range(6)]
    chat[3]["weight"] = 0
    return [
        {"history": history, "instruction": sentence(rng), "output": sentence(rng)},
        {"messages": chat},
        {"instruction": sentence(rng, 9), "output": sentence(rng, 2)},
    ]


def turns_of(record: dict[str, Any]) -> list[tuple[list[int], list[int], bool]]:
    """(prompt, reply, is it learnt?) of each turn, in ids."""
    enc = encoding()
    if "messages" in record:
        said = [(m["content"], m.get("weight", 1) == 1) for m in record["messages"]]
        turns = [(q, reply, learnt) for (q, _), (reply, learnt) in zip(said[::2], said[1::2], strict=True)]
    else:
        turns = [(q, reply, False) for q, reply in record.get("history", ())]
        turns += [(record["instruction"], record["output"], True)]
    return [
        (enc.encode(f"User: {q}\nAssistant:"), enc.encode(f" {reply}<|endoftext|>", allowed_special="all"), learnt)
        for q, reply, learnt in turns
    ]


def limits(record: dict[str, Any]) -> list[int | None]:
    """Every max_len from the smallest allowed to one more than the record is long, and none at all."""
    longest = sum(len(prompt) + len(reply) for prompt, reply, _ in turns_of(record))
    return [None, *range(len(encoding().encode("\nAssistant:")) + 2, longest + 2)]


def record_run(f: Callable[..., Any], seed: int) -> list[Any]:
    return [
        f(encoding(), record, max_len, mask_prompt=masked)
        for record in full_records(seed)
        for max_len in limits(record)
        for masked in (True, False)
    ]


def record_oracle(seed: int) -> list[Any]:
    """One token after the other is taken away, in the order of the docstring, until the rest fits."""
    found, closing = [], len(encoding().encode("\nAssistant:"))
    for record in full_records(seed):
        for max_len in limits(record):
            for masked in (True, False):
                turns = []
                for prompt, reply, learnt in turns_of(record):
                    asked = [(i, -100 if masked else i) for i in prompt]
                    turns.append((asked, [(i, i if learnt or not masked else -100) for i in reply]))
                while max_len and sum(len(part) for turn in turns for part in turn) > max_len:
                    question, reply = turns[-1]
                    if len(turns) > 1:
                        turns.pop(0)
                    elif len(reply) > 1:
                        reply.pop()
                    else:
                        question.pop(-closing - 1)
                pairs = [pair for turn in turns for part in turn for pair in part]
                found.append(([i for i, _ in pairs], [label for _, label in pairs]))
    return found


EXERCISES = (
    Exercise(
        name="08.defuse",
        title="no text of a user's may look like a turn",
        target="defuse",
        minutes=5,
        level=1,
        module=TEMPLATE,
        against="a walk along the text, character by character",
        run=lambda f, seed: [f(text) for text in risky_texts(seed)],
        expected=lambda seed: [defused(text) for text in risky_texts(seed)],
        mistakes=(
            Mistake(
                "replacing `User:` everywhere gives: inside a line it is harmless and stays as it is.",
                '_ROLE_LINE.sub(r"\\1\\2\\3 ", trim(text))',
                'trim(text).replace("User:", "User :").replace("Assistant:", "Assistant :")',
            ),
            Mistake(
                "defusing one line alone gives: every line that opens like a turn gets its space.",
                "trim(text))",
                "trim(text), count=1)",
            ),
            Mistake("leaving out `trim` gives: the text is trimmed first.", "trim(text))", "text)"),
            Mistake(
                "losing the line break gives: what was found is put back, group 1 with it.",
                'r"\\1\\2\\3 "',
                'r"\\2\\3 "',
            ),
            Mistake(
                "losing the indentation gives: what was found is put back, group 2 with it.",
                'r"\\1\\2\\3 "',
                'r"\\1\\3 "',
            ),
            Mistake(
                "putting back no space gives: the one before the colon is what makes other tokens.",
                'r"\\1\\2\\3 "',
                'r"\\1\\2\\3"',
            ),
        ),
        hints=(
            "`_ROLE_LINE` finds a line break, white space, and `User` or `Assistant` with a colon behind it.",
            "`_ROLE_LINE.sub(…)` puts something in the place of all it finds; `\\1`, `\\2`, `\\3` are its three "
            "groups, and the colon isn't among them.",
        ),
    ),
    Exercise(
        name="08.prompt",
        title="a conversation as token ids, with end tokens that nobody can type",
        target="encode_prompt",
        minutes=8,
        level=2,
        module=TEMPLATE,
        against="tiktoken on the text of the whole conversation",
        run=lambda f, seed: [f(encoding(), messages, input) for messages, input in talks(seed)],
        expected=prompt_oracle,
        mistakes=(
            Mistake(
                "a space after `Assistant:` gives: it is the reply's, whose first token begins with it.",
                '\\nAssistant:")',
                '\\nAssistant: ")',
            ),
            Mistake(
                "only the last message gives: the model remembers nothing, so all that was said is in the prompt.",
                "in _turns(messages, input):",
                "in _turns(messages, input)[-1:]:",
            ),
            Mistake(
                "a typed `<|endoftext|>` that becomes the end token gives: what a user writes is ordinary text.",
                'enc.encode_ordinary(f"User: {text}\\nAssistant:")',
                'enc.encode(f"User: {text}\\nAssistant:", allowed_special="all")',
            ),
            Mistake(
                "replies without their end token give: it ends every reply, the earlier ones too.",
                "else encode_reply(enc, text)",
                "else encode_reply(enc, text)[:-1]",
            ),
            Mistake(
                "leaving out the input gives: it stands on the line below the instruction.",
                "_turns(messages, input)",
                "_turns(messages)",
            ),
        ),
        hints=(
            "`_turns(messages, input)` checks everything and gives pairs of a role and a defused text.",
            "Two kinds of turn, two lines: `encode_ordinary` for the user's, `encode_reply` for the assistant's.",
        ),
    ),
    Exercise(
        name="08.labels",
        title="which tokens of a record are learnt",
        target="encode_record_v1",
        minutes=6,
        level=1,
        module=BATCHING,
        against="tiktoken on a record's whole text, cut at `Assistant:`",
        run=labels_run,
        expected=labels_oracle,
        mistakes=(
            Mistake(
                "masking the end token gives: a model that never learns it never stops.",
                "[-100] * len(prompt) + reply",
                "[-100] * len(prompt) + [*reply[:-1], -100]",
            ),
            Mistake(
                "learning the prompt gives: the model should answer, not ask. Its labels are −100.",
                "[-100] * len(prompt) + reply",
                "prompt + reply",
            ),
            Mistake(
                "shifted labels give: here label and id of a position are equal, and `pad` shifts them.",
                "[-100] * len(prompt) + reply",
                "[-100] * (len(prompt) - 1) + [*reply, -100]",
            ),
            Mistake(
                "labels of 0 give: 0 is a token like any other. The value that the loss leaves out is −100.",
                "[-100]",
                "[0]",
            ),
            Mistake(
                "leaving out the record's input gives: it belongs to the prompt.",
                'record.get("input") or ""',
                '""',
            ),
        ),
        hints=(
            "`encode_prompt` and `encode_reply` make the two halves; put together, they are the ids.",
            "As many labels as ids: −100 for the prompt, the ids themselves for the reply, end token included.",
        ),
    ),
    Exercise(
        name="08.record",
        title="a record with its history, in no more than max_len tokens",
        target="encode_record",
        minutes=20,
        level=3,
        module=BATCHING,
        against="a loop that takes away one token after the other, for every max_len",
        run=record_run,
        expected=record_oracle,
        mistakes=(
            Mistake(
                "cutting off the beginning gives: what is left of the last turn loses its end, not its question.",
                "return ids[:limit], labels[:limit]",
                "return ids[-limit:], labels[-limit:]",
            ),
            Mistake(
                "dropping the latest turn gives: the oldest goes first.",
                "turns = turns[1:]",
                "turns = turns[:-1]",
            ),
            Mistake(
                "learning every reply gives: of a history nothing is learnt, of a chat what has no weight of 0.",
                "labels += reply if learnt or not mask_prompt else [-100] * len(reply)",
                "labels += reply",
            ),
            Mistake(
                "ignoring `mask_prompt=False` gives: then every token has its label.",
                "labels += prompt if not mask_prompt else [-100] * len(prompt)",
                "labels += [-100] * len(prompt)",
            ),
            Mistake(
                "a long prompt that loses its end gives: `\\nAssistant:` stays, and the question before it is cut.",
                "prompt = prompt[: limit - 1 - len(opening)] + prompt[-len(opening) :]",
                "prompt = prompt[: limit - 1]",
            ),
            Mistake(
                "a prompt that fills max_len alone gives: one label of the reply is left over.",
                "prompt = prompt[: limit - 1 - len(opening)] + prompt[-len(opening) :]",
                "prompt = prompt[: limit - len(opening)] + prompt[-len(opening) :]",
            ),
        ),
        hints=(
            "Encode all turns first; then drop from the front while there are several and their sum is too large.",
            "A prompt of limit tokens or more keeps `\\nAssistant:` at its end and leaves one place for the reply. "
            "All else is a cut at the end of ids and labels.",
        ),
    ),
    Exercise(
        name="08.pad",
        title="a batch of unequal rows, and the shift by one",
        target="pad",
        minutes=10,
        level=2,
        module=BATCHING,
        against="torch's pad_sequence",
        run=pad_run,
        expected=pad_oracle,
        mistakes=(
            Mistake(
                "labels that are not shifted give: a position is asked for the id that comes after it.",
                "torch.tensor(labels[1:])",
                "torch.tensor(labels[:-1])",
            ),
            Mistake(
                "padding on the left gives: there it moves the positions, and every token would see it.",
                "idx[row, : len(ids) - 1] = torch.tensor(ids[:-1])\n        targets[row, : len(ids) - 1] =",
                "idx[row, T - len(ids) + 1 :] = torch.tensor(ids[:-1])\n        targets[row, T - len(ids) + 1 :] =",
            ),
            Mistake(
                "padding with label 0 gives: the loss would ask for token 0 there. Only −100 is left out.",
                "T), -100)",
                "T), 0)",
            ),
            Mistake(
                "a row too wide gives: after the last id comes nothing, so that T is one less than the longest record.",
                "for ids, _ in examples) - 1)",
                "for ids, _ in examples))",
            ),
            Mistake(
                "a batch of no positions gives: a record of one id still fills one position, with padding.",
                "max(1, max(len(ids) for ids, _ in examples) - 1)",
                "max(len(ids) for ids, _ in examples) - 1",
            ),
        ),
        hints=(
            "Make two tensors full of padding, then write each row's beginning: ids[:-1] and labels[1:].",
            "T is one less than the longest record, and at least 1; both tensors are int64.",
        ),
    ),
)
