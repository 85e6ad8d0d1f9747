"""Exercises of 06, the KV cache."""

import math
from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor

from exercises.checking import Exercise, Mistake
from minigpt_lib.model.gpt import GPTConfig, GPTLanguageModel

SAMPLING, CACHE, LOOP = (f"minigpt_lib.generation.{name}" for name in ("sampling", "kv_cache", "loop"))
CONFIG = GPTConfig(vocab_size=31, n_ctx=24, n_embd=24, n_layer=3, n_head=4)
SMALL = GPTConfig(vocab_size=31, n_ctx=24, n_embd=6, n_layer=3, n_head=2)

# --- what may be drawn


def nucleus(logits: Tensor, p: float) -> Tensor:
    """One row (V,), token by token, the likeliest first, until the sum has reached p."""
    weights = [math.exp(z - logits.max().item()) for z in logits.tolist()]
    kept, total = torch.full_like(logits, -math.inf), 0.0
    for i in sorted(range(len(weights)), key=lambda i: -weights[i]):
        kept[i] = logits[i]
        total += weights[i] / sum(weights)
        if total >= p:
            break
    return kept


def top_p_inputs() -> list[tuple[Tensor, float]]:
    """Flat rows and steep ones, in one batch and in a batch of batches; double, so that no sum is a matter of luck."""
    rows = 2 * torch.randn(4, 40).double() * torch.tensor([[0.5], [1.0], [2.0], [8.0]])
    return [(rows, 0.05), (rows, 0.5), (rows, 0.9), (torch.randn(2, 3, 9).double(), 0.7)]


def top_p_run(f: Callable, seed: int) -> list:
    equal = f(torch.zeros(1, 4), 0.5)  # four tokens of a quarter each: two of them sum to a half
    return [*(f(z.clone(), p) for z, p in top_p_inputs()), equal.isfinite().sum().item()]


def top_p_oracle(seed: int) -> list:
    kept = [[nucleus(row, p) for row in z.flatten(0, -2)] for z, p in top_p_inputs()]
    return [*(torch.stack(rows).view_as(z) for rows, (z, _) in zip(kept, top_p_inputs(), strict=True)), 2]


OPTIONS = (
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 9},
    {"temperature": None, "top_p": 0.6},
    {"temperature": 1.7, "top_p": 0.8, "top_k": 6},
    {"temperature": 1.3, "top_p": 0.92, "min_p": 0.19},
    {"temperature": 0.8, "top_k": 5, "top_p": 1, "min_p": 0.25},
)


def filter_inputs() -> list[tuple[Tensor, dict]]:
    """Rows of the same 12 logits in any order and at any height, in bfloat16 the last."""
    logits = 2.2 - 0.3 * torch.arange(12) + 0.1 * torch.arange(12).sin()  # no sum or ratio is close to its limit
    rows = torch.stack([logits[torch.randperm(12)] + torch.randn(()) for _ in range(3)])
    return [*((rows, options) for options in OPTIONS), (rows[:1].bfloat16(), {"temperature": 0.7})]


def filter_run(f: Callable, seed: int) -> list[Tensor]:
    small = f(torch.tensor([1.0, 3.0, 2.0]), 1e-42).softmax(-1)
    return [*(f(z.clone(), **options) for z, options in filter_inputs()), small]


def filter_oracle(seed: int) -> list[Tensor]:
    """Row by row, with sets of tokens: each filter looks at what the one before it has left."""
    results = []
    for z, options in filter_inputs():
        rows = []
        for row in z.double() / (options["temperature"] or 1):
            order = row.argsort(descending=True)
            row[order[options.get("top_k", 12) :]] = -math.inf
            row = nucleus(row, options["top_p"]) if options.get("top_p", 1) < 1 else row
            share = row.softmax(-1) / row.softmax(-1).max()
            row[share < options.get("min_p", 0)] = -math.inf
            rows.append(row)
        results.append(torch.stack(rows))
    return [*results, torch.tensor([0.0, 1.0, 0.0])]


# --- the cache


def pieces() -> list[tuple[Tensor, list[tuple[Tensor, Tensor]]]]:
    """Ids (2, T) and for every layer keys and values (2, 2, T, 3), for T = 5, 1, 4, 3."""
    return [
        (torch.randint(31, (2, n)), [(torch.randn(2, 2, n, 3), torch.randn(2, 2, n, 3)) for _ in range(3)])
        for n in (5, 1, 4, 3)
    ]


def update_run(cls: type, seed: int) -> list:
    cache, results = cls(SMALL, batch_size=2, max_len=15), []
    for ids, layers in pieces():
        results += [[t.clone() for t in cache.update(i, *kv)] for i, kv in enumerate(layers)]
        cache.advance(ids)
    kept = [cache.keys.clone(), cache.values.clone(), cache.pos]
    for rows, n in ((2, 3), (1, 2)):  # more positions than the two that are left; a row too few
        try:
            cache.update(0, *torch.ones(2, rows, 2, n, 3))
            results.append("taken")
        except Exception as error:
            results.append(type(error).__name__)
    return results + kept


def update_oracle(seed: int) -> list:
    so_far: list[list[tuple[Tensor, Tensor]]] = [[], [], []]
    results: list = []
    for _, layers in pieces():
        for kept, kv in zip(so_far, layers, strict=True):
            kept.append(kv)
            results.append([torch.cat(parts, 2) for parts in zip(*kept, strict=True)])
    room = list(torch.zeros(2, 3, 2, 2, 15, 3))
    for whole, parts in zip(room, zip(*results[-3:], strict=True), strict=True):
        whole[:, :, :, :13] = torch.stack(parts)
    return [*results, "ValueError", "ValueError", *room, 13]


def model_of(seed: int) -> GPTLanguageModel:
    """Three layers whose numbers are large enough to matter; the same for the same seed."""
    model, gen = GPTLanguageModel(CONFIG).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=gen) / 4 + (p.dim() == 1) * 0.5)
    return model


def texts_of(seed: int) -> Tensor:
    return torch.randint(31, (2, 11), generator=torch.Generator().manual_seed(seed + 1))


PADDING = torch.tensor([[1] * 11, [0] * 4 + [1] * 7])  # the second text has 7 tokens


@torch.no_grad()
def prefill_run(f: Callable, seed: int) -> list:
    from minigpt_lib.generation.kv_cache import KVCache

    model, idx, fed, results = model_of(seed), texts_of(seed), [], []
    model.h[0].register_forward_pre_hook(lambda module, args: fed.append(args[0].size(1)))
    for chunk in (None, 4, 1):
        results.append(f(model, idx, KVCache.for_model(model, 2), chunk=chunk))
    cache = KVCache.for_model(model, 2)
    results += [f(model, idx[:, :5], cache), f(model, idx[:, 5:], cache, chunk=4), cache.pos]
    cache = KVCache.for_model(model, 2)
    for end, chunk in ((6, None), (11, 3)):
        results.append(f(model, idx[:, cache.pos : end], cache, attention_mask=PADDING[:, :end], chunk=chunk))
    return [*results, fed]


@torch.no_grad()
def prefill_oracle(seed: int) -> list:
    """One pass without a cache, and each of the two texts by itself, without padding."""
    model, idx = model_of(seed), texts_of(seed)
    whole = model(idx)[0]
    alone = [whole[0], torch.cat([torch.zeros(4, 31), model(idx[1:, 4:])[0][0]])]
    ragged = [torch.stack([row[end - 1] for row in alone]) for end in (6, 11)]
    last, fed = whole[:, -1], [11, 4, 4, 3, *[1] * 11, 5, 4, 2, 6, 3, 2]
    return [last, last, last, whole[:, 4], last, 11, *ragged, fed]


# --- the loop


class Script:
    """A model of 13 tokens, each of which has its one follower; four texts of three tokens, and two stop ids."""

    def __init__(self, room: int, bad: tuple[int, int] = (99, 0), value: float = math.nan):
        self.circle = torch.randperm(13)
        self.table = torch.randn(13, 13)
        self.table[:, 12] = -math.inf  # as a filter leaves it
        self.table[self.circle, self.circle.roll(-1)] = 9 + torch.rand(13)
        self.stops = self.circle[[5, 9]]
        self.ids = torch.zeros(4, 3 + room, dtype=torch.int64)
        self.starts = (2, 7, 10, 9)  # 3, 2, 8 and 9 tokens until a stop; the last begins behind one
        self.ids[:, :3] = torch.stack([self.circle[[s - 2, s - 1, s]] for s in self.starts])
        self.bad, self.value = bad, value  # (column, row) whose logits are not numbers
        self.read_at: list[int] = []

    def read(self, t: int) -> Tensor:
        self.read_at.append(t)
        logits = self.table[self.ids[:, t - 1]]
        if self.bad[0] == t:
            logits[self.bad[1], self.ids[self.bad[1], t - 1]] = self.value  # of a token that is not the next
        return logits

    def choose(self, logits: Tensor) -> Tensor:
        return logits.masked_fill(~logits.isfinite(), -math.inf).argmax(-1)


def loop_cases() -> list[tuple[Script, bool, int]]:
    """(script, whether it may stop, look_every)"""
    cases = [(Script(14), True, 1), (Script(6), True, 1), (Script(5), False, 1), (Script(14), True, 4)]
    cases += [(Script(7, (5, 1)), True, 1), (Script(7, (4, 2), math.inf), True, 4), (Script(6, (8, 3)), True, 4)]
    return cases


def loop_run(f: Callable, seed: int) -> list:
    def columns(script: Script, stops: bool, look_every: int):
        ids = script.stops if stops else script.stops[:0]
        return f(script.read, script.choose, script.ids, 3, ids, look_every)

    results: list = []
    for script, stops, look_every in loop_cases():
        told, end = [], "through"
        try:
            for column, logits in columns(script, stops, look_every):
                told.append([column.clone(), logits.clone()])
        except FloatingPointError:
            end = "FloatingPointError"
        results += [told, end, script.ids.clone(), script.read_at]
    script = Script(6)
    results.append([column.clone() for column, _ in islice(columns(script, True, 1), 2)])
    return [*results, script.read_at]


def loop_oracle(seed: int) -> list:
    """Each text by itself, along the circle to its stop."""

    def texts(script: Script, stops: bool, columns: int) -> Tensor:
        rows = []
        for at in script.starts:
            row: list[int] = []
            for n in range(columns):
                stopped = stops and row and row[-1] in script.stops.tolist()
                row.append(row[-1] if stopped else script.circle[(at + n + 1) % 13].item())
            rows.append(row)
        return torch.tensor(rows)

    results: list = []
    lengths = [(9, 9), (6, 6), (5, 5), (12, 12), (2, 2), (3, 3), (5, 5)]
    for (script, stops, _), (n, _) in zip(loop_cases(), lengths, strict=True):
        failed = script.bad[0] < 99
        text, ids = texts(script, stops, n), script.ids.clone()
        told = []
        for i in range(n):
            before = script.ids[:, 2] if i == 0 else text[:, i - 1]
            logits = script.table[before]
            if script.bad[0] == 3 + i:
                logits[script.bad[1], before[script.bad[1]]] = script.value
            told.append([text[:, i], logits])
        ids[:, 3 : 3 + n] = text
        results += [told, "FloatingPointError" if failed else "through", ids, list(range(3, 3 + n + failed))]
    script = Script(6)
    return [*results, list(texts(script, True, 2).T), [3, 4]]


EXERCISES = (
    Exercise(
        name="06.top_p",
        title="the fewest likely tokens that sum to p, for all rows at once",
        target="keep_top_p",
        minutes=12,
        level=2,
        module=SAMPLING,
        against="a loop over the tokens of each row, flat rows and steep ones",
        run=top_p_run,
        expected=top_p_oracle,
        mistakes=(
            Mistake(
                "dropping the token that crosses p gives: a token stays if the sum before it has not reached p.",
                "before >= p",
                "before + probability >= p",
            ),
            Mistake(
                "keeping a token too many gives: where the sum has just reached p, it is enough.",
                "before >= p",
                "before > p",
            ),
            Mistake(
                "summing from the least likely token on gives: sort in descending order.",
                "descending=True",
                "descending=False",
            ),
            Mistake(
                "rows that are left sorted give: each logit goes back to the token that it belongs to.",
                "logits.scatter(-1, index, value.masked_fill(before >= p, -math.inf))",
                "value.masked_fill(before >= p, -math.inf)",
            ),
            Mistake(
                "a logit of 0 for what is dropped gives: e^0 is 1, and it can still be drawn. Only −∞ becomes 0.",
                "-math.inf",
                "0.0",
            ),
            Mistake(
                "summing the logits gives: it is probabilities that sum to p, after a softmax.",
                "value.softmax(-1)",
                "value",
            ),
        ),
        hints=(
            "`cumsum` of the sorted probabilities counts each token itself; what was the sum before it?",
            "`sort` also says where each value came from; `scatter(-1, index, …)` puts it back there.",
        ),
    ),
    Exercise(
        name="06.temperature",
        title="temperature and three filters, in their order",
        target="filter_logits",
        minutes=8,
        level=1,
        module=SAMPLING,
        against="sets of tokens, row by row, for seven settings",
        run=filter_run,
        expected=filter_oracle,
        mistakes=(
            Mistake(
                "multiplying by the temperature gives: a high one flattens, so it divides.",
                "/ max(temperature, 1e-6)",
                "* max(temperature, 1e-6)",
            ),
            Mistake(
                "top-p before top-k gives: top-k comes first, and top-p sums up what it has left.",
                """    logits = logits if top_k is None else keep_top_k(logits, top_k)
    logits = logits if top_p in (None, 1) else keep_top_p(logits, top_p)
""",
                """    logits = logits if top_p in (None, 1) else keep_top_p(logits, top_p)
    logits = logits if top_k is None else keep_top_k(logits, top_k)
""",
            ),
            Mistake(
                "a temperature after the filters gives: it comes first, and decides how many tokens top-p keeps.",
                """    logits = logits.float() / max(temperature, 1e-6)  # far below that float32 overflows
    logits = logits if top_k is None else keep_top_k(logits, top_k)
    logits = logits if top_p in (None, 1) else keep_top_p(logits, top_p)
    return logits if min_p is None else keep_min_p(logits, min_p)""",
                """    logits = logits.float()
    logits = logits if top_k is None else keep_top_k(logits, top_k)
    logits = logits if top_p in (None, 1) else keep_top_p(logits, top_p)
    return (logits if min_p is None else keep_min_p(logits, min_p)) / max(temperature, 1e-6)""",
            ),
            Mistake(
                "dividing in the logits' own type gives: bfloat16 has three digits. Make them float32 first.",
                "logits.float() / max(",
                "logits / max(",
            ),
            Mistake(
                "dividing by 1e-42 gives: float32 overflows, and no token is left. Divide by 1e-6 at least.",
                "max(temperature, 1e-6)",
                "temperature",
            ),
            Mistake(
                "forgetting min-p gives: it comes last.",
                "return logits if min_p is None else keep_min_p(logits, min_p)",
                "return logits",
            ),
        ),
        hints=(
            "One line each: divide, then `keep_top_k`, `keep_top_p`, `keep_min_p`, each only if it is asked for.",
            "A top_p of 1 keeps everything, and `keep_top_p` refuses it. How small may a divisor of float32 be?",
        ),
    ),
    Exercise(
        name="06.update",
        title="where new keys and values go, and what attention gets back",
        target="KVCache.update",
        minutes=10,
        level=2,
        module=CACHE,
        against="torch.cat of all pieces, three layers, 5, 1, 4 and 3 tokens",
        run=update_run,
        expected=update_oracle,
        mistakes=(
            Mistake(
                "writing from place 0 on gives: new keys go behind the `pos` that are filled.",
                """self.keys[layer, :, :, self.pos : end] = k
        self.values[layer, :, :, self.pos : end] = v""",
                """self.keys[layer, :, :, : k.size(2)] = k
        self.values[layer, :, :, : k.size(2)] = v""",
            ),
            Mistake(
                "giving back the new ones alone gives: attention wants all keys and values so far.",
                "return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]",
                "return k, v",
            ),
            Mistake(
                "giving back all the room gives: places that are still zeros would be looked at, too.",
                "return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]",
                "return self.keys[layer], self.values[layer]",
            ),
            Mistake(
                "giving back what was there before gives: the new positions look at themselves, too.",
                "return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]",
                "return self.keys[layer, :, :, : self.pos], self.values[layer, :, :, : self.pos]",
            ),
            Mistake(
                "counting in `update` gives: every layer calls it with the same tokens; `advance` counts them once.",
                "        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]",
                "        self.pos = end\n        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]",
            ),
            Mistake(
                "storing without a look at the room gives: `check_room` refuses what does not fit.",
                "        self.check_room(k.size(0), end)\n",
                "",
            ),
        ),
        hints=(
            "The new positions are `pos` to `pos + T`; T stands in the shape of k.",
            "`keys[layer]` is (B, nh, max_len, hs): the places are its third dimension.",
        ),
    ),
    Exercise(
        name="06.prefill",
        title="a prompt in chunks, also where the texts of a batch differ in length",
        target="prefill",
        minutes=12,
        level=2,
        module=CACHE,
        against="one pass without a cache, and each text by itself without padding",
        run=prefill_run,
        expected=prefill_oracle,
        tolerance=1e-4,
        mistakes=(
            Mistake(
                "handing on the whole mask gives: a chunk's mask ends where the chunk ends.",
                "attention_mask[:, : cache.pos + part.size(1)]",
                "attention_mask",
            ),
            Mistake(
                "a mask of the chunk's own positions gives: it also covers what the cache holds.",
                "attention_mask[:, : cache.pos + part.size(1)]",
                "attention_mask[:, : part.size(1)]",
            ),
            Mistake(
                "leaving the mask out gives: the shorter text then looks at its padding.",
                "model.last_logits(part, cache, mask)",
                "model.last_logits(part, cache)",
            ),
            Mistake(
                "returning after the first chunk gives: only the last one's logits matter.",
                "\n    return logits",
                "\n        return logits",
            ),
            Mistake(
                "reading everything in one pass gives: `chunk` says how many tokens at most.",
                "(idx,) if chunk is None else idx.split(chunk, dim=1)",
                "(idx,)",
            ),
            Mistake(
                "chunks of rows give: it is the positions that are cut, dim=1.",
                "idx.split(chunk, dim=1)",
                "idx.split(chunk, dim=0)",
            ),
        ),
        hints=(
            "`idx.split(chunk, dim=1)` gives the pieces; the cache knows by itself where each begins.",
            "The mask covers the cached positions and the new ones: `cache.pos` plus the chunk's length.",
        ),
    ),
    Exercise(
        name="06.loop",
        title="the loop: read, choose, stop, hand out",
        target="decode_loop",
        minutes=20,
        level=3,
        module=LOOP,
        against="each of four texts by itself, token by token, to its stop",
        run=loop_run,
        expected=loop_oracle,
        mistakes=(
            Mistake(
                "a finished row that goes on gives: it repeats its stop id.",
                "torch.where(done, ids[:, t - 1], choose(logits))",
                "choose(logits)",
            ),
            Mistake(
                "ending with the first finished row gives: the others go on.",
                "look and done.all()",
                "look and done.any()",
            ),
            Mistake(
                "a stop id in the prompt that counts gives: a row is finished when it has produced one.",
                "done = torch.zeros(B, dtype=torch.bool, device=ids.device)",
                "done = (ids[:, T - 1, None] == stop_ids).any(-1)",
            ),
            Mistake(
                "waiting for all stop ids at once gives: any of them ends a row.",
                "(ids[:, t, None] == stop_ids).any(-1)",
                "(ids[:, t, None] == stop_ids).all(-1)",
            ),
            Mistake(
                "looking at every column gives: on a GPU that waits each time. `look_every` says how often to look.",
                "look and done.all()",
                "done.all()",
            ),
            Mistake(
                "going on with NaN gives: raise FloatingPointError when a row's logits are not numbers.",
                "if look and not sound.all():",
                "if False:",
            ),
            Mistake(
                "forgetting NaN between two looks gives: note it in every column, look at the note now and then.",
                "sound = sound & logits",
                "sound = logits",
            ),
            Mistake(
                "reading one column further gives: column t is chosen from the logits behind the first t columns.",
                "logits = read(t)",
                "logits = read(t + 1)",
            ),
        ),
        hints=(
            "Before the loop no row is done. In it: read, choose, write column t, note who is done, yield.",
            "`torch.where(done, ids[:, t - 1], new)` lets a finished row repeat itself; the last column is always "
            "one to look at.",
        ),
    ),
)
