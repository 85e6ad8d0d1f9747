"""Exercises of 09, chat."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from exercises.checking import Exercise, Mistake
from exercises.lesson_03 import CONFIG, wide_awake
from exercises.lesson_08 import at_hand, encoding, sentence
from minigpt_lib.chat.session import Reply
from minigpt_lib.generation.decode import Step
from minigpt_lib.model.gpt import GPTLanguageModel

SESSION, INSPECT = "minigpt_lib.chat.session", "minigpt_lib.chat.inspect"


def talk_of(rng: random.Random, turns: int) -> list[dict[str, str]]:
    """A conversation of so many finished turns, long ones and short ones, and a question."""
    said = [sentence(rng, rng.randint(1, 14)) for _ in range(2 * turns + 1)]
    return [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(said)]


def ids_of(talk: list[dict[str, str]]) -> list[list[int]]:
    """The prompt in pieces, by tiktoken: one for each finished turn with its end token, and the last question."""
    enc, said = encoding(), [m["content"] for m in talk]
    texts = [f"User: {q}\nAssistant: {a}<|endoftext|>" for q, a in zip(said[:-1:2], said[1::2], strict=True)]
    return [enc.encode(text, allowed_special="all") for text in [*texts, f"User: {said[-1]}\nAssistant:"]]


# --- a reply


class Script:
    """A model that knows one reply: shown the prompt and its beginning, it names the next token; else it babbles."""

    def __init__(self, prompt: list[int], reply: str):
        enc = encoding()
        self.text = [*prompt, *enc.encode_ordinary(reply), enc.eot_token]
        self.start, self.vocab_size = len(prompt), enc.n_vocab
        self.lost, self.asked_elsewhere = (enc.encode_ordinary(word)[0] for word in (" green", " stone"))

    def __call__(self, idx: torch.Tensor) -> tuple[torch.Tensor, None]:
        ids = idx[0].tolist()
        knows = self.start <= len(ids) < len(self.text) and ids == self.text[: len(ids)]
        following = [self.asked_elsewhere] * (len(ids) - 1) + [self.text[len(ids)] if knows else self.lost]
        return F.one_hot(torch.tensor([following]), self.vocab_size).float(), None


def scripts(seed: int) -> list[tuple[list[dict[str, str]], str, int]]:
    """Conversations, the replies that they get, and how many tokens there may be: enough, just enough, too few."""
    rng = random.Random(seed)
    talks, replies = [talk_of(rng, turns) for turns in (0, 2, 1)], [" " + sentence(rng, 7) for _ in range(3)]
    length = len(encoding().encode_ordinary(replies[1]))
    return list(zip(talks, replies, (60, length, 4), strict=True))


def answer_run(f: Callable[..., str], seed: int) -> list[str]:
    from minigpt_lib.tuning.chat_template import encode_prompt

    with at_hand(f, enc=encoding(), encode_prompt=encode_prompt, DEVICE=torch.device("cpu")):
        return [f(Script(sum(ids_of(talk), []), reply), talk, limit) for talk, reply, limit in scripts(seed)]


def answer_oracle(seed: int) -> list[str]:
    enc = encoding()
    return [enc.decode(enc.encode_ordinary(reply)[:limit]).strip() for _, reply, limit in scripts(seed)]


# --- a conversation that is too long


def fit_run(f: Callable[..., tuple[list[int], int]], seed: int) -> list[Any]:
    return fits(seed, lambda talk, n_ctx, room: f(encoding(), talk, n_ctx, room))


def fits(seed: int, fit: Callable[..., Any]) -> list[Any]:
    """`fit` for conversations of 0 to 5 turns and numbers of positions from far too few to one more than needed."""
    rng, found = random.Random(seed), []
    for turns in (0, 1, 2, 3, 5):
        talk, room = talk_of(rng, turns), rng.randint(1, 9)
        enough = len(sum(ids_of(talk), [])) + room
        for n_ctx in (3, *range(max(8, enough // 4), enough + 2)):
            try:
                found.append(fit(talk, n_ctx, room))
            except ValueError:
                found.append("ValueError")
    return found


def fit_oracle(seed: int) -> list[Any]:
    """Tries all numbers of turns to leave out, and takes the first that serves."""

    def fit(talk: list[dict[str, str]], n_ctx: int, room: int) -> Any:
        pieces = ids_of(talk)
        total, left = sum(map(len, pieces)), [sum(map(len, pieces[:k])) for k in range(len(pieces))]
        fitting = [k for k, out in enumerate(left) if total - out + room <= n_ctx]
        if not fitting:
            raise ValueError
        if fitting[0] == 0:
            return sum(pieces, []), 0
        steps = math.ceil((total + room - n_ctx) / (n_ctx // 4))
        in_steps = [k for k in fitting if left[k] >= steps * (n_ctx // 4)]
        latest = len(pieces) - 2  # so many may go without the latest turn
        dropped = min([*in_steps[:1], max(latest, fitting[0])])
        return sum(pieces[dropped:], []), dropped

    return fits(seed, fit)


# --- how long it took


@dataclass
class Clock:
    """A clock that goes on only when it is told to."""

    now: float = 0.0
    made: list[Any] = field(default_factory=list)

    def perf_counter(self) -> float:
        return self.now

    def working(self, items: list[Any], seconds: list[float]) -> Iterator[Any]:
        """The items, each of which takes its seconds to make."""
        for item, s in zip(items, seconds, strict=True):
            self.now += s
            self.made.append(item)
            yield item

    def names(self) -> dict[str, Any]:
        """What a function that measures time may use."""
        module = SimpleNamespace(perf_counter=self.perf_counter, time=self.perf_counter, monotonic=self.perf_counter)
        return {"time": module, "perf_counter": self.perf_counter}


def seconds_of(seed: int) -> tuple[list[float], list[float]]:
    """How long five items take to make, and how long their reader waits before asking for each."""
    rng = random.Random(seed)
    return [rng.randint(1, 40) / 8 for _ in range(5)], [rng.randint(1, 40) / 8 for _ in range(5)]


def timed_run(f: Callable[..., Any], seed: int) -> list[Any]:
    (work, waits), clock, found = seconds_of(seed), Clock(100.0), []
    with at_hand(f, **clock.names()):
        items = iter(f(clock.working(list("minis"), work)))
        for wait in waits:
            clock.now += wait
            found.append([next(items), len(clock.made)])
        return [*found, next(items, "no more")]


def timed_oracle(seed: int) -> list[Any]:
    return [
        *([(s, item), n + 1] for n, (s, item) in enumerate(zip(seconds_of(seed)[0], "minis", strict=True))),
        "no more",
    ]


# --- a reply as it grows

HARD = ("Καλημέρα", "🌊", "東京", "Ålesund", "naïve 🐟")


def written(seed: int) -> list[tuple[list[int], str]]:
    """Token ids and what ends them: an end token, before more; nothing; and nothing in the middle of a character."""
    enc, rng = encoding(), random.Random(seed)
    hard = rng.sample(HARD, len(HARD))
    ids = [enc.encode_ordinary(f" {sentence(rng)} {a} {b}, {c}!") for a, b, c in (hard[:3], hard[2:], hard[1:4])]
    half = list("🌊".encode())[: rng.randint(1, 3)]
    half_ids = [enc.encode_single_token(bytes([b])) for b in half]
    return [([*ids[0], enc.eot_token, *ids[1]], "length"), (ids[1], "context"), ([*ids[2], *half_ids], "length")]


def write_run(f: Callable[..., Iterator[Reply]], seed: int) -> list[Any]:
    found = []
    for ids, cut in written(seed):
        clock, blank = Clock(), torch.zeros(1, 1)
        steps = [Step(torch.tensor([i]), blank, None) for i in ids]

        def timed(items: Iterator[Any], clock: Clock = clock) -> Iterator[tuple[float, Any]]:
            begin = clock.now
            for item in items:
                yield clock.now - begin, item
                begin = clock.now

        with at_hand(f, timed=timed, **clock.names()):
            made = clock.working(steps, [1.0 + n / 8 for n in range(len(steps))])
            for r in f(made, encoding(), Reply("", (), 0.0, 0.0, 9, 4, 64, 1, ""), cut):
                latest = next((n for n, step in enumerate(steps, start=1) if step is r.step), None)
                found.append(
                    [r.text, r.ids, r.first_token_s, r.seconds, r.prompt_tokens, r.finish, latest, len(clock.made)]
                )
                clock.now += 0.5
    return found


def write_oracle(seed: int) -> list[Any]:
    """After each token all bytes so far, less those at the end that are no character yet."""
    enc, found = encoding(), []

    def row(ids: list[int], finish: str) -> list[Any]:
        raw = b"".join(enc.decode_tokens_bytes([i for i in ids if i != enc.eot_token]))
        text = raw.decode("utf-8", errors="replace" if finish else "ignore")
        return [text, tuple(ids), 1.0, sum(1.0 + n / 8 for n in range(len(ids))), 9, finish, len(ids), len(ids)]

    for ids, cut in written(seed):
        if enc.eot_token in ids:
            ids, cut = ids[: ids.index(enc.eot_token) + 1], "end"
        found += [row(ids[:n], "") for n in range(1, len(ids) + 1) if ids[n - 1] != enc.eot_token]
        found.append(row(ids, cut))
    return found


# --- where the heads look


def models_and_ids(seed: int) -> list[tuple[GPTLanguageModel, list[int]]]:
    """Three layers with random weights, in float32 and bfloat16."""
    config = type(CONFIG)(vocab_size=31, n_ctx=12, n_embd=24, n_layer=3, n_head=4)
    ids = [random.Random(seed).randrange(31) for _ in range(9)]
    models = [wide_awake(GPTLanguageModel(config), seed) for _ in range(2)]
    return [(models[0], ids), (models[0], ids[:1]), (models[1].bfloat16(), ids)]


@torch.no_grad()
def maps_oracle(seed: int) -> list[torch.Tensor]:
    """Hooks catch every layer's queries and keys; the values are one place each, so that the output is the weights."""
    found = []
    for model, ids in models_and_ids(seed):
        caught: list[torch.Tensor] = []
        hooks = [b.attn.c_attn.register_forward_hook(lambda _m, _x, y, c=caught: c.append(y)) for b in model.h]
        model(torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        places, maps = torch.eye(len(ids)).expand(4, -1, -1), []
        for y in caught:
            q, k, _ = (part.float().unflatten(-1, (4, 6)).movedim(1, 0) for part in y[0].chunk(3, -1))
            maps.append(F.scaled_dot_product_attention(q, k, places, is_causal=True))
        found.append(torch.stack(maps))
    return found


EXERCISES = (
    Exercise(
        name="09.answer",
        title="a reply: write on until the end token",
        target="answer_v1",
        minutes=8,
        level=1,
        module=SESSION,
        against="a scripted model, whose reply is known",
        run=answer_run,
        expected=answer_oracle,
        mistakes=(
            Mistake(
                "the end token in the reply gives: it ends the reply and is no part of it.",
                "if (i := int(logits[0, -1].argmax())) == enc.eot_token:\n            break\n        ids.append(i)",
                "ids.append(int(logits[0, -1].argmax()))\n        if ids[-1] == enc.eot_token:\n            break",
            ),
            Mistake(
                "going on behind the end token gives: the reply is over there.",
                "== enc.eot_token:\n            break",
                "== enc.eot_token:\n            pass",
            ),
            Mistake("prompt and reply together give: only what is new is the reply.", "ids[start:]", "ids"),
            Mistake(
                "counting the prompt gives: max_new_tokens is the limit of the reply alone.",
                "start + max_new_tokens",
                "max_new_tokens",
            ),
            Mistake(
                "reading the last message alone gives: the whole conversation is the prompt.",
                "encode_prompt(enc, messages)",
                "encode_prompt(enc, messages[-1:])",
            ),
            Mistake(
                "the logits of the first position give: what comes next stands at the last one.",
                "logits[0, -1]",
                "logits[0, 0]",
            ),
            Mistake(
                "leaving the space in front gives: it comes from the template, and the reader need not see it.",
                ".strip()",
                "",
            ),
        ),
        hints=(
            "`encode_prompt(enc, messages)` gives the ids to begin with; note how many there are.",
            "In the loop: all ids so far into the model as (1, T), the likeliest token of the last position, and "
            "either it is `enc.eot_token`, or it is appended.",
        ),
    ),
    Exercise(
        name="09.fit",
        title="which turns go when a conversation outgrows its context",
        target="fit_turns",
        minutes=20,
        level=3,
        module=SESSION,
        against="a search through all numbers of turns, for every n_ctx",
        run=fit_run,
        expected=fit_oracle,
        mistakes=(
            Mistake(
                "cutting within a turn gives: only whole turns go.",
                "return ids[start:], dropped",
                "return ids[max(0, leave_out) :], dropped",
            ),
            Mistake(
                "dropping as little as possible gives: what is too much is rounded up to steps of n_ctx // 4.",
                "min(-(-too_many // step) * step, max([too_many, *starts[-2:-1]]))",
                "too_many",
            ),
            Mistake(
                "rounding down gives: then it still does not fit.",
                "-(-too_many // step)",
                "(too_many // step)",
            ),
            Mistake(
                "giving up the latest turn for the steps gives: it goes only if it does not fit.",
                "min(-(-too_many // step) * step, max([too_many, *starts[-2:-1]]))",
                "min(-(-too_many // step) * step, max([too_many, *starts[-1:]]))",
            ),
            Mistake(
                "leaving no room gives: `room` positions stay free for the reply.",
                "len(ids) + room - n_ctx",
                "len(ids) - n_ctx",
            ),
            Mistake(
                "counting messages gives: a turn is a question with its reply.",
                "return ids[start:], dropped",
                "return ids[start:], 2 * dropped",
            ),
        ),
        hints=(
            "Encode once and look for the end tokens: behind each a turn begins, and a prompt may begin there.",
            "Too many are len(ids) + room - n_ctx; rounded up, so many tokens should go, in whole turns. If that would "
            "take the latest turn, keep it, unless it does not fit.",
        ),
    ),
    Exercise(
        name="09.timed",
        title="how long a generator works, whatever its reader does meanwhile",
        target="timed",
        minutes=6,
        level=2,
        module=SESSION,
        against="a clock that is set by hand",
        run=timed_run,
        expected=timed_oracle,
        mistakes=(
            Mistake(
                "a clock that is never set again gives: the seconds are those of one item.",
                "item\n        begin = time.perf_counter()",
                "item",
            ),
            Mistake(
                "counting the reader's time gives: set the clock again when the reader comes back, behind the yield.",
                "yield time.perf_counter() - begin, item\n        begin = time.perf_counter()",
                "spent = time.perf_counter() - begin\n        begin = time.perf_counter()\n        yield spent, item",
            ),
            Mistake(
                "making all items at once gives: an item is made when it is asked for.",
                "for item in items:",
                "for item in list(items):",
            ),
            Mistake(
                "the item before its seconds gives: the seconds come first.",
                "yield time.perf_counter() - begin, item",
                "yield item, time.perf_counter() - begin",
            ),
        ),
        hints=(
            "Between two items a `for` loop over `items` waits for the next one: that time counts.",
            "While a generator stands at its `yield`, the reader is at work: take the time again right behind it.",
        ),
    ),
    Exercise(
        name="09.write",
        title="a reply that grows, and never shows half a character",
        target="_write",
        minutes=20,
        level=3,
        module=SESSION,
        against="decoding all bytes so far after every token, Greek, Japanese and emoji among them",
        run=write_run,
        expected=write_oracle,
        mistakes=(
            Mistake(
                "decoding token by token gives: a character may lie in two tokens. Keep its bytes until it is whole.",
                "letters.decode(enc.decode_single_token_bytes(i))",
                "enc.decode([i])",
            ),
            Mistake(
                "going on behind the end token gives: what comes after it is not asked for.",
                'cut = "end"\n            break',
                'cut = "end"',
            ),
            Mistake(
                "a reply cut off inside a character gives: at the end the decoder is flushed, which shows it as �.",
                'letters.decode(b"", final=True)',
                '""',
            ),
            Mistake(
                "a first_token_s that grows gives: it is the time of the first token, and stays.",
                "first = reply.first_token_s or spent",
                "first = spent",
            ),
            Mistake(
                "the seconds of a single token give: they add up.",
                "spent = reply.seconds + seconds",
                "spent = seconds",
            ),
            Mistake(
                'a reply that ends without saying why gives: `finish` is "end" behind the end token, else `cut`.',
                "finish=cut",
                'finish=""',
            ),
        ),
        hints=(
            '`timed(...)` gives the seconds of each step; `codecs.getincrementaldecoder("utf-8")(errors="replace")` '
            "keeps the bytes of an unfinished character; `replace(reply, …)` makes the next reply.",
            "Each token: id, seconds and step into the reply; at the end token leave the loop; else add the text and "
            "yield. Behind the loop yield once more, with the decoder's rest and `finish`.",
        ),
    ),
    Exercise(
        name="09.maps",
        title="where every head looks, with the blocks walked by hand",
        target="attention_maps",
        minutes=12,
        level=2,
        module=INSPECT,
        against="torch's scaled_dot_product_attention on the queries and keys that hooks catch",
        run=lambda f, seed: [f(model, ids) for model, ids in models_and_ids(seed)],
        expected=maps_oracle,
        mistakes=(
            Mistake(
                "leaving out the positions gives: every token is wte + wpe.",
                " + model.wpe(torch.arange(idx.size(1), device=idx.device))",
                "",
            ),
            Mistake(
                "every layer on the embeddings gives: a block's output is what the next one reads.",
                "x = block(x)",
                "block(x)",
            ),
            Mistake("leaving out ln_1 gives: attention reads the normalised stream.", "block.ln_1(x)", "x"),
            Mistake(
                "what was fetched gives: `attention` returns that first, and then the weights.",
                "attention(q, k, v)[1][0]",
                "attention(q, k, v)[0][0]",
            ),
            Mistake(
                "computing in the model's own type gives: the weights are to be in float32, queries and keys first.",
                "(t.float() for t in block.attn.heads(block.ln_1(x)))",
                "block.attn.heads(block.ln_1(x))",
            ),
        ),
        hints=(
            "Begin as the model does, with wte and wpe; in each block note the weights, then let the block go on.",
            "`block.attn.heads(block.ln_1(x))` gives q, k and v; `attention` of the three has the weights as its "
            "second result, (1, nh, T, T).",
        ),
    ),
)
