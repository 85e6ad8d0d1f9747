"""Exercises of 01, tokenization."""

import random
from collections import Counter, defaultdict
from functools import cache
from itertools import pairwise
from typing import Any

import regex
import tiktoken

from exercises.checking import Exercise, Mistake

MODULE = "minigpt_lib.text.bpe"
Pair = tuple[bytes, bytes]


def letters(seed: int, n: int) -> list[bytes]:
    """n different letters."""
    return [letter.encode() for letter in random.Random(seed).sample("abcdefghijklmnopqrstuvwxyz", n)]


def token_rows(seed: int) -> list[list[bytes]]:
    """Words as rows of tokens: none, one, two, a run of the same, and mixed ones with repeated neighbours."""
    x, y, z = letters(seed, 3)
    mixed = random.Random(seed).choices([x, y, x + y, z + z + x], k=9)
    return [[], [x], [x, y], [x] * 4, [z, x + y, z, x + y, x], mixed]


def neighbours_run(f, seed: int) -> dict[str, list]:
    """The pairs, and how often each occurs, for which a pair must be a tuple."""
    rows = token_rows(seed)
    return {"pairs": [f(row) for row in rows], "counted": [Counter(f(row)) for row in rows]}


def merge_inputs(seed: int) -> list[tuple[list[bytes], Pair]]:
    """Odd and even runs, a pair at the end and one before it, a pair turned round, one that is only spelt alike."""
    x, y, z = letters(seed, 3)
    rng, tokens = random.Random(seed), [x, y, x + y]
    drawn = [(rng.choices(tokens, k=12), (rng.choice(tokens), rng.choice(tokens))) for _ in range(4)]
    return [
        ([x, y, z, x, y], (x, y)),
        ([x] * 5, (x, x)),
        ([x] * 4, (x, x)),
        ([x, y, x, z], (x, y)),
        ([y, x, z], (x, y)),
        ([x + y, z, x, y + z], (x, y + z)),
        ([x], (x, x)),
        ([], (x, y)),
        *drawn,
    ]


def replaced(row: list[bytes], pair: Pair) -> list[bytes]:
    """The merge by Python's str.replace: each token is written as one character, the joined pair as another."""
    tokens = sorted({*row, *pair})
    letter = {token: chr(0x4E00 + i) for i, token in enumerate(tokens)}
    spelt = "".join(letter[token] for token in row).replace(letter[pair[0]] + letter[pair[1]], "+")
    token = {letter[t]: t for t in tokens} | {"+": pair[0] + pair[1]}
    return [token[character] for character in spelt]


def weighted_words(seed: int) -> dict[bytes, int]:
    """Words with weights above 1: a rare pair first, a run, one like banana, a single letter, two bytes, others."""
    rng, (x, y, z, q, r) = random.Random(seed), letters(seed, 5)
    words = [q + r, x * 5, y + (x + z) * 2 + x, x, "é".encode()]
    words += [b"".join(rng.choices([x, y, z], k=rng.randint(2, 7))) for _ in range(8)]
    weights = [2, *(rng.randint(3, 9) for _ in words[1:])]
    return dict(zip(words, weights, strict=True))


def index_run(cls: type, seed: int) -> dict[str, Any]:
    """All that the index knows at first. The heap is shown as `pop_best` empties it."""
    index, popped = cls(weighted_words(seed)), []
    while len(popped) < 1000 and (best := index.pop_best()) is not None:
        popped.append(best)
    return {
        "words": index.words,
        "freq": [index.freq[i] for i in range(len(index.words))],
        "counts": {pair: n for pair, n in index.counts.items() if n},
        "where": {pair: sorted(places) for pair, places in index.where.items()},
        "popped": popped,
    }


def index_oracle(seed: int) -> dict[str, Any]:
    """Every pair of letters is looked for in every word by the package regex, which finds overlapping ones, too."""
    words = weighted_words(seed)
    singles = sorted({bytes([b]) for word in words for b in word})
    counts, where = {}, {}
    for left in singles:
        for right in singles:
            found = [len(regex.findall(regex.escape(left + right), word, overlapped=True)) for word in words]
            if any(found):
                counts[left, right] = sum(n * weight for n, weight in zip(found, words.values(), strict=True))
                where[left, right] = [i for i, n in enumerate(found) if n]
    popped = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rows = [[word[i : i + 1] for i in range(len(word))] for word in words]
    return {"words": rows, "freq": list(words.values()), "counts": counts, "where": where, "popped": popped}


def filled(cls: type, seed: int) -> Any:
    """An index as `__init__` has to leave it, without calling it: `merge` is checked by itself."""
    index, known = cls.__new__(cls), index_oracle(seed)
    index.words, index.freq, index.counts = known["words"], known["freq"], Counter(known["counts"])
    index.where = defaultdict(set, {pair: set(places) for pair, places in known["where"].items()})
    index.heap = sorted((-n, pair) for pair, n in index.counts.items())
    return index


def trainer_run(cls: type, seed: int) -> dict[str, list]:
    """Merge by merge to the end: the choice and the counts. Words looked at: only the first merge fixes how many."""
    index, rounds, looked = filled(cls, seed), [], []
    while len(rounds) < 200 and (best := index.pop_best()) is not None:
        looked.append(index.merge(best[0]))
        rounds.append((*best, {pair: n for pair, n in index.counts.items() if n}))
    return {"merges": rounds, "words": index.words, "looked at": looked[:1]}


def trainer_oracle(seed: int) -> dict[str, list]:
    """The same by counting all pairs anew in every round."""
    words = weighted_words(seed)
    rows, rounds, looked = [[bytes([b]) for b in word] for word in words], [], []

    def count() -> Counter[Pair]:
        counts: Counter[Pair] = Counter()
        for row, weight in zip(rows, words.values(), strict=True):
            for pair in pairwise(row):
                counts[pair] += weight
        return counts

    while counts := count():
        best = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[0]
        looked.append(sum(best[0] in pairwise(row) for row in rows))
        rows = [replaced(row, best[0]) for row in rows]
        rounds.append((*best, count()))
    return {"merges": rounds, "words": rows, "looked at": looked[:1]}


@cache
def mini() -> tuple[dict[bytes, int], tiktoken.Encoding, list[str]]:
    """mini's ranks, a tokenizer of tiktoken's that takes a text as one piece, and pre-tokens of the held-out text."""
    from minigpt_lib.paths import data_dir
    from minigpt_lib.text.bpe import GPT2_PATTERN
    from minigpt_lib.text.tokenizer import load_ranks

    ranks = load_ranks(data_dir() / "mini" / "tokenizer.tiktoken")
    enc = tiktoken.Encoding("one piece", pat_str=r"(?s).+", mergeable_ranks=ranks, special_tokens={})
    text = (data_dir() / "corpus" / "heldout.txt").read_text("utf-8")
    return ranks, enc, sorted(set(regex.findall(GPT2_PATTERN, text)))


def pieces(seed: int) -> list[str]:
    """`lowest`, held-out pre-tokens, two or three of them in one, odd runs, and scripts that mini has never seen."""
    rng, (_, _, words) = random.Random(seed), mini()
    joined = ["".join(rng.choices(words, k=rng.randint(2, 3))).replace(" ", "") for _ in range(100)]
    runs = [letter * rng.choice((3, 5, 7)) for letter in "eslot"]
    return ["lowest", *rng.sample(words, 150), *(j for j in joined if j), *runs, "café猫🦉", "x"]


def encode_run(f, seed: int) -> list[list[bytes]]:
    ranks = mini()[0]
    return [f(piece.encode(), ranks) for piece in pieces(seed)]


def encode_oracle(seed: int) -> list[list[bytes]]:
    enc = mini()[1]
    return [enc.decode_tokens_bytes(enc.encode_ordinary(piece)) for piece in pieces(seed)]


LONGEST_MATCH = """    parts = []
    while piece:
        n = max(n for n in range(1, len(piece) + 1) if piece[:n] in ranks)
        parts, piece = [*parts, piece[:n]], piece[n:]
"""

EXERCISES = (
    Exercise(
        name="01.neighbours",
        title="all pairs of neighbours in a word",
        target="neighbours",
        minutes=3,
        level=1,
        module=MODULE,
        against="Python's itertools.pairwise, words of 0 to 9 tokens",
        run=neighbours_run,
        expected=lambda seed: neighbours_run(lambda row: list(pairwise(row)), seed),
        mistakes=(
            Mistake(
                "pairs that do not overlap give: each token but the first and the last stands in two pairs.",
                "zip(word, word[1:]",
                "zip(word[::2], word[1::2]",
            ),
            Mistake(
                "the right one first gives: a pair is (left, right), as in the text.",
                "zip(word, word[1:]",
                "zip(word[1:], word",
            ),
            Mistake(
                "a set gives: a pair that occurs twice is there twice, in the order of the word.",
                "list(zip(word, word[1:], strict=False))",
                "list(dict.fromkeys(zip(word, word[1:], strict=False)))",
            ),
            Mistake(
                "going round gives: behind the last token nothing follows, n tokens make n − 1 pairs.",
                "word[1:]",
                "word[1:] + word[:1]",
            ),
            Mistake(
                "`strict=True` gives: the word without its first token is one shorter, and that is meant.",
                "strict=False",
                "strict=True",
            ),
        ),
        hints=("Lay the word beside itself without its first token, and read the columns.",),
    ),
    Exercise(
        name="01.merge_pair",
        title="one merge in one word, from left to right",
        target="merge_pair",
        minutes=8,
        level=1,
        module=MODULE,
        against="Python's str.replace on words with one character a token",
        run=lambda f, seed: [f(list(row), pair) for row, pair in merge_inputs(seed)],
        expected=lambda seed: [replaced(row, pair) for row, pair in merge_inputs(seed)],
        mistakes=(
            Mistake(
                "going on by one after a join gives: the right token is used up, too, so go on by two.",
                "i += 2",
                "i += 1",
            ),
            Mistake(
                "a loop over the pairs alone gives: the last token must be kept when nothing joins it.",
                "while i < len(word)",
                "while i + 1 < len(word)",
            ),
            Mistake(
                "joining only the first occurrence gives: go on to the end of the word.",
                "(word[i], word[i + 1]) == pair",
                "(word[i], word[i + 1]) == pair and len(out) == i",
            ),
            Mistake(
                "comparing the joined bytes gives: ab + c and a + bc are spelt alike, and are two different pairs.",
                "(word[i], word[i + 1]) == pair",
                "word[i] + word[i + 1] == b''.join(pair)",
            ),
            Mistake(
                "joining the pair in either order gives: left is left, (b, a) is another pair than (a, b).",
                "(word[i], word[i + 1]) == pair",
                "sorted((word[i], word[i + 1])) == sorted(pair)",
            ),
        ),
        hints=(
            "A place i in the word and a new list: each step adds one token to the list, the joined one or word[i].",
            "What may the last token be compared with? Look whether there is a next one first.",
        ),
    ),
    Exercise(
        name="01.pair_counts",
        title="how often each pair occurs in weighted words, and in which of them",
        target="PairIndex.__init__",
        minutes=10,
        level=2,
        module=MODULE,
        against="the package regex, which looks for every pair in every word",
        run=index_run,
        expected=index_oracle,
        mistakes=(
            Mistake(
                "counting a word once gives: a pair counts as often as its word occurs in the text.",
                "self.counts[pair] += self.freq[i]",
                "self.counts[pair] += 1",
            ),
            Mistake(
                "counting a pair once per word gives: `banana` holds a + n twice.",
                "for pair in neighbours(word):",
                "for pair in set(neighbours(word)):",
            ),
            Mistake(
                "counts without the minus give: the smallest entry is in front of a heap, so it must be −count.",
                "[(-n, pair) for",
                "[(n, pair) for",
            ),
            Mistake(
                "a list that is not yet a heap gives: `heapq.heapify` puts it in order once.",
                "\n        heapq.heapify(self.heap)",
                "",
            ),
            Mistake(
                "`where` with counts in it gives: it holds the numbers of the words, the first word is 0.",
                "self.where[pair].add(i)",
                "self.where[pair].add(self.freq[i])",
            ),
        ),
        hints=(
            "The other methods read `words` (lists of single bytes), `freq` (a count for each word), `counts` by pair, "
            "`where` by pair (a set: the numbers of the words) and `heap` (entries (-count, pair)).",
            "`index_v1` has made two of the five.",
        ),
    ),
    Exercise(
        name="01.trainer",
        title="the trainer's step: merge a pair, and repair only the counts around it",
        target="PairIndex.merge",
        minutes=20,
        level=3,
        module=MODULE,
        against="a trainer that counts everything anew, merge by merge to the end",
        run=trainer_run,
        expected=trainer_oracle,
        mistakes=(
            Mistake(
                "leaving the old pairs in the counts gives: the word's pairs of before the merge are to be taken off.",
                "delta[p] -= self.freq[i]",
                "pass",
            ),
            Mistake(
                "a change of one for each pair gives: it is the word's weight that is taken off and put on.",
                """delta[p] -= self.freq[i]
            self.words[i] = merge_pair(self.words[i], pair)
            for p in neighbours(self.words[i]):
                delta[p] += self.freq[i]""",
                """delta[p] -= 1
            self.words[i] = merge_pair(self.words[i], pair)
            for p in neighbours(self.words[i]):
                delta[p] += 1""",
            ),
            Mistake(
                "new counts that never reach the heap give: `pop_best` only finds what was pushed.",
                "heapq.heappush(self.heap, (-self.counts[p], p))",
                "pass",
            ),
            Mistake(
                "words not listed under their new pairs give: `where` has to learn the pairs that a merge makes.",
                "self.where[p].add(i)",
                "pass",
            ),
            Mistake(
                "words left as they were give: keep the merged word, and count its new pairs.",
                "            self.words[i] = merge_pair(self.words[i], pair)\n",
                "",
            ),
        ),
        hints=(
            "For each word in `where[pair]`: its old pairs off, the merge, its new pairs on, its number into `where`.",
            "Old entries in the heap may stay. Push one (-count, pair) for every pair whose count has changed.",
        ),
    ),
    Exercise(
        name="01.encode",
        title="cut a pre-token into tokens: the lowest rank first",
        target="merge_bytes_v1",
        minutes=12,
        level=2,
        module=MODULE,
        against="tiktoken with mini's table, some 250 pre-tokens and nonsense",
        run=encode_run,
        expected=encode_oracle,
        mistakes=(
            Mistake(
                "the longest token from the left gives: the cuts come from replaying the merges, lowest rank first.",
                "    parts = [bytes([b]) for b in piece]\n",
                LONGEST_MATCH,
            ),
            Mistake(
                "joining the leftmost pair that makes a token gives: among all of them, the lowest rank goes first.",
                "[(ranks[left + right], i) for",
                "[(0, i) for",
            ),
            Mistake(
                "the highest rank first gives: the merge that was learnt first has the lowest.",
                "min(found)",
                "max(found)",
            ),
            Mistake(
                "the rightmost of equal pairs gives: in `eee` the first two are joined.",
                "min(found)",
                "min(found, key=lambda entry: (entry[0], -entry[1]))",
            ),
        ),
        hints=(
            "In each round look at all `neighbours` whose joined bytes have a rank, and join one pair of them.",
            "`min` over tuples (rank, place) finds the lowest rank, and among equals the leftmost place.",
        ),
    ),
)
