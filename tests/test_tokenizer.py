"""minigpt_lib.text: trainer against a slow explicit one, encoder against tiktoken, files and errors."""

import base64
import json
import random
import time
import unicodedata
from collections import Counter

import pytest
import regex
import tiktoken
from tiktoken.load import load_tiktoken_bpe

from minigpt_lib.paths import data_dir
from minigpt_lib.text import tokenizer
from minigpt_lib.text.bpe import (
    ENDOFTEXT,
    GPT2_PATTERN,
    BPETokenizer,
    PairIndex,
    check_ranks,
    count_pretokens,
    iter_merges,
    merge_bytes,
    merge_pair,
    neighbours,
    replace_surrogates,
    split_special,
    train_bpe,
)
from minigpt_lib.text.tokenizer import load_ranks, load_tokenizer, save_ranks, train_tokenizer

BYTES = {bytes([b]): b for b in range(256)}
# OpenAI's pattern as GPT-2 was released with it
READABLE = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
FIXED = ["", " ", "  ", "\n", " \n ", "\n\n\nx", "a" * 300, " " * 300 + "x", "I'll say I'LL don’t", "0123 ٣², ½",
         "naïve café", "猫头鹰", "שלום", "👩‍🚀🦉", "\ufeffbom", "\x00\x01", "tab\tand\r\nwindows",
         "<|endoftext|", "e\u0301"]


def random_text(rng: random.Random, length: int = 60) -> str:
    """Half everyday characters, half any assigned character of Unicode (of the version that Python knows)."""
    everyday = "the cat's 12 \n\t.,!?<|>'re"
    out = []
    while len(out) < length:
        c = rng.choice([*rng.choices(everyday, k=2), chr(rng.randrange(0x3000)), chr(rng.randrange(0x110000))])
        if unicodedata.category(c) not in ("Cs", "Cn"):
            out.append(c)
    return "".join(out)


def small_texts(rng: random.Random) -> list[str]:
    """Texts over few letters, so that ties, repetitions and equal bytes by different ways are common."""
    letters = rng.choice(["ab", "abc ", "aé ", "ab'st "])
    return ["".join(rng.choices(letters, k=rng.randint(0, 60))) for _ in range(rng.randint(1, 5))]


def slow_merges(texts: list[str], pattern: str = READABLE) -> list[tuple[tuple[bytes, bytes], int]]:
    """BPE as in the paper: all pairs counted anew for every merge; highest count, then lowest pair."""
    parts = [part for text in texts for part in text.split(ENDOFTEXT)]
    words = Counter(piece.encode() for part in parts for piece in regex.findall(pattern, part))
    split = {word: [bytes([b]) for b in word] for word in words}
    merges = []
    while True:
        counts = Counter()
        for word, tokens in split.items():
            for i in range(len(tokens) - 1):
                counts[tokens[i], tokens[i + 1]] += words[word]
        if not counts:
            return merges
        pair = sorted(counts, key=lambda p: (-counts[p], p))[0]
        merges.append((pair, counts[pair]))
        for tokens in split.values():
            i = 0
            while i < len(tokens) - 1:
                if (tokens[i], tokens[i + 1]) == pair:
                    tokens[i : i + 2] = [pair[0] + pair[1]]
                i += 1


def as_tiktoken(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding("x", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={ENDOFTEXT: len(ranks)})


@pytest.fixture(scope="module")
def corpus() -> str:
    return (data_dir() / "corpus" / "train.txt").read_text("utf-8")


@pytest.fixture(scope="module")
def ranks(corpus) -> dict[bytes, int]:
    return train_bpe(corpus.split(ENDOFTEXT)[::20], 700)


# --- text to words ---


def test_the_pattern_is_tiktokens_and_cuts_as_the_released_one(seed):
    assert as_tiktoken(BYTES)._pat_str == GPT2_PATTERN
    from tiktoken_ext.openai_public import r50k_pat_str

    rng = random.Random(seed)
    for text in FIXED + [random_text(rng) for _ in range(300)]:
        pieces = regex.findall(GPT2_PATTERN, text)
        assert pieces == regex.findall(READABLE, text) == regex.findall(r50k_pat_str, text), f"seed {seed}: {text!r}"
        assert "".join(pieces) == text


def test_split_special_keeps_every_character_in_its_place():
    special = {"<|a|>", "<|a|>b", "+"}
    assert split_special("x<|a|>bc<|a|>+", special) == ["x", "<|a|>b", "c", "<|a|>", "", "+", ""]
    assert split_special("x<|a|>", set()) == ["x<|a|>"]
    assert split_special("", {"+"}) == [""]


def test_surrogates_are_replaced_as_tiktoken_does(ranks):
    enc, bpe = as_tiktoken(ranks), BPETokenizer(ranks)
    for text in ("a\ud83eb", "\udd89", "\ud83e\udd89", "\ufeffx\ud800"):  # the third is an owl in two halves
        assert bpe.encode_ordinary(text) == enc.encode_ordinary(text) == enc.encode_ordinary(replace_surrogates(text))
    assert replace_surrogates("\ufeffé🦉") == "\ufeffé🦉"
    assert count_pretokens(["\ud83e"]) == {"\ufffd".encode(): 1}


def test_pretokens_are_counted_over_documents_and_without_special_tokens():
    texts = ["a b b<|endoftext|> b", " b", ""]
    assert count_pretokens(texts) == {b"a": 1, b" b": 4}
    assert count_pretokens(["a<|x|>a"], special=("<|x|>",)) == {b"a": 2}
    assert count_pretokens(["12"], r"\d", ()) == {b"1": 1, b"2": 1}


# --- the trainer ---


def test_merging_goes_from_left_to_right():
    a, b = b"a", b"b"
    assert merge_pair([a, a, a], (a, a)) == [b"aa", a]
    assert merge_pair([a, a, a, a], (a, a)) == [b"aa", b"aa"]
    assert merge_pair([a, b, a, b, b], (a, b)) == [b"ab", b"ab", b]
    assert merge_pair([b"ab", b"c"], (a, b"bc")) == [b"ab", b"c"]  # same bytes, other pair
    assert merge_pair([], (a, b)) == [] and neighbours([a]) == []


def test_merges_equal_those_of_counting_everything_anew(seed):
    rng = random.Random(seed)
    for _ in range(60):
        texts = small_texts(rng)
        assert list(iter_merges(count_pretokens(texts))) == slow_merges(texts), f"seed {seed}: {texts}"


def test_merges_on_real_text_equal_those_of_counting_everything_anew(corpus, seed):
    docs = random.Random(seed).sample(corpus.split(ENDOFTEXT), 12)
    slow = slow_merges(docs)
    assert list(iter_merges(count_pretokens(docs))) == slow and len(slow) > 100, f"seed {seed}"


def test_the_index_stays_true_to_the_words(seed):
    rng = random.Random(seed)
    counts = count_pretokens([random_text(rng, 400) for _ in range(3)] + small_texts(rng))
    index = PairIndex(counts)
    for _ in range(100):
        best = index.pop_best()
        if best is None:
            break
        index.merge(best[0])
        true = Counter()
        for word, n in zip(index.words, counts.values(), strict=True):
            for pair in neighbours(word):
                true[pair] += n
        assert +index.counts == true, f"seed {seed}"
    assert all(b"".join(word) == piece for word, piece in zip(index.words, counts, strict=True))


def test_a_tie_goes_to_the_lowest_pair():
    assert next(iter_merges({b"zy": 3, b"ab": 3, b"ba": 3}))[0] == (b"a", b"b")
    assert next(iter_merges({b"zy": 4, b"ab": 3}))[0] == (b"z", b"y")


def test_order_of_the_texts_does_not_matter(corpus, seed):
    docs = corpus.split(ENDOFTEXT)[::100]
    expected = train_bpe(docs, 400)
    random.Random(seed).shuffle(docs)
    assert list(train_bpe(docs, 400).items()) == list(expected.items()), f"seed {seed}"


def test_ranks_are_bytes_then_merges_and_a_small_vocabulary_begins_a_large_one(corpus, ranks):
    assert list(ranks.values()) == list(range(699)) and {t: r for t, r in ranks.items() if r < 256} == BYTES
    small = train_bpe(corpus.split(ENDOFTEXT)[::20], 300)
    assert small == {t: r for t, r in ranks.items() if r < 299}
    assert train_bpe(iter(["abc"]), 257) == BYTES
    assert len(train_bpe(["ab" * 5], 256, special=())) == 256


def test_tokens_stay_inside_pretokens_and_out_of_special_tokens(corpus, ranks):
    assert not any(b"<|" in token or b" " in token.strip(b" ") for token in ranks)
    text = f"aaa{ENDOFTEXT}" * 50
    assert list(train_bpe([text], 259))[256:] == [b"aa", b"aaa"]  # and there is nothing else to merge
    assert b"<|" in {left + right for (left, right), _ in iter_merges(count_pretokens([text], special=()))}
    with pytest.raises(ValueError, match="only 259 tokens"):
        train_bpe([text], 260)


def test_every_merge_makes_a_new_token_and_encoding_replays_the_training(seed):
    rng = random.Random(seed)
    for _ in range(40):
        texts = [*small_texts(rng), random_text(rng)]
        joined = [left + right for (left, right), _ in slow_merges(texts)]
        assert len(set(joined)) == len(joined), f"seed {seed}: {texts}"
        trained = train_bpe(texts, 256 + len(joined) // 2, special=())
        assert list(trained)[256:] == joined[: len(joined) // 2], f"seed {seed}: {texts}"
        index = PairIndex(counts := count_pretokens(texts))
        for _ in range(len(joined) // 2):
            index.merge(index.pop_best()[0])
        assert index.words == [merge_bytes(piece, trained) for piece in counts], f"seed {seed}: {texts}"


@pytest.mark.parametrize(("size", "special"), [(256, (ENDOFTEXT,)), (0, ()), (257, ("<|a|>", "<|b|>"))])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(size, special):
    with pytest.raises(ValueError, match=rf"vocab_size {size} is too small.* at least {256 + len(special)}"):
        train_bpe(["text"], size, special=special)


def test_too_little_text_says_how_far_it_goes():
    with pytest.raises(ValueError, match=r"vocab_size 300 can't be reached.* only 261 tokens"):
        train_bpe(["aaaa ab"], 300)  # aa, ' a', ' ab' and aaaa
    assert list(train_bpe(["aaaa ab"], 261))[256:] == [b"aa", b" a", b" ab", b"aaaa"]


# --- the encoder ---


def test_ids_equal_tiktokens_on_any_text(ranks, seed):
    rng = random.Random(seed)
    bpe, enc = BPETokenizer(ranks), as_tiktoken(ranks)
    for text in FIXED + [random_text(rng) for _ in range(400)]:
        ids = bpe.encode_ordinary(text)
        assert ids == enc.encode_ordinary(text), f"seed {seed}: {text!r}"
        assert bpe.decode(ids) == enc.decode(ids) == text, f"seed {seed}: {text!r}"


def test_ids_equal_tiktokens_whatever_the_vocabulary(seed):
    rng = random.Random(seed)
    for _ in range(30):
        trained = train_bpe([*small_texts(rng), "abc cab", random_text(rng, 30)], 262)
        bpe, enc = BPETokenizer(trained), as_tiktoken(trained)
        for text in [*small_texts(rng), random_text(rng)]:
            assert bpe.encode_ordinary(text) == enc.encode_ordinary(text), f"seed {seed}: {text!r}"


@pytest.mark.parametrize("kind", ["one letter", "two letters", "latin", "chinese", "digits", "signs", "spaces"])
def test_a_word_of_ten_thousand_letters_takes_less_than_a_second(ranks, kind, seed):
    letters = {"one letter": "a", "two letters": "ab", "latin": "abcdefghijklmnopqrstuvwxyzé", "digits": "0123456789",
               "chinese": [chr(c) for c in range(0x4E00, 0x5000)], "signs": "!?#-", "spaces": " \t"}[kind]  # fmt: skip
    word = "".join(random.Random(seed).choices(letters, k=10_000))
    bpe, enc = BPETokenizer(ranks), as_tiktoken(ranks)
    start = time.process_time()
    ids = bpe.encode_ordinary(word)
    assert time.process_time() - start < 1, f"seed {seed}"
    assert ids == enc.encode_ordinary(word), f"seed {seed}"


def test_merging_in_a_heap_is_merging_step_by_step(seed):
    """Any table, ranks in any order, tokens to which no merge leads included."""
    rng = random.Random(seed)
    for _ in range(300):
        words = {bytes(rng.choices(b"abc", k=rng.randint(2, 6))) for _ in range(rng.randint(1, 12))}
        table = {token: i for i, token in enumerate(rng.sample([*BYTES, *words], 256 + len(words)))}
        piece = bytes(rng.choices(b"abc", k=rng.randint(0, 40)))
        parts = [bytes([b]) for b in piece]
        while found := [(table[a + b], i) for i, (a, b) in enumerate(neighbours(parts)) if a + b in table]:
            i = min(found)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        assert merge_bytes(piece, table) == parts, f"seed {seed}: {piece}"


def test_ids_equal_tiktokens_on_every_character_that_both_know():
    """Only characters newer than one of the two may be cut differently: whether they are letters depends on its age."""
    bpe, enc = BPETokenizer(BYTES | {b"a1": 256}), as_tiktoken(BYTES | {b"a1": 256})

    def kinds(character: str) -> list[list[str]]:
        """How the pattern takes it: a letter, a number, white space or a sign, by Python's regex and by tiktoken's."""
        cuts = {"L": r"\p{L}", "N": r"\p{N}", "S": r"\s"}
        here = [k for k, pattern in cuts.items() if regex.fullmatch(pattern, character)]
        there = [k for k, e in rust.items() if e.encode_ordinary(character)]
        return [here, there]

    rust = {k: tiktoken.Encoding(k, pat_str=p, mergeable_ranks=BYTES, special_tokens={})
            for k, p in {"L": r"\p{L}", "N": r"\p{N}", "S": r"\s"}.items()}  # fmt: skip
    known = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
    assert len(known) > 250_000
    for start in range(0, len(known), 50_000):
        text = "".join(f"a{c}1{c} {c}'s\n" for c in known[start : start + 50_000])
        assert bpe.encode_ordinary(text) == enc.encode_ordinary(text)
    new = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) == "Cn"][::97]
    for c in new:
        here, there = kinds(c)
        if here == there:
            text = f"a{c}1{c} {c}'s"
            assert bpe.encode_ordinary(text) == enc.encode_ordinary(text), hex(ord(c))


def test_ranks_in_another_order_change_the_cuts_as_in_tiktoken(seed):
    rng = random.Random(seed)
    tokens = [*BYTES, b"ab", b"bc", b"abc", b"bcd", b"cd", b"abcd", b"aa", b"aaa"]
    for _ in range(50):
        rng.shuffle(tokens)
        shuffled = {token: i for i, token in enumerate(tokens)}
        bpe, enc = BPETokenizer(shuffled), as_tiktoken(shuffled)
        for text in ("abcd", "aaaaa", "".join(rng.choices("abcd", k=30))):
            assert bpe.encode_ordinary(text) == enc.encode_ordinary(text), f"seed {seed}: {text}"


def test_a_pretoken_that_is_a_token_is_taken_whole_as_in_tiktoken():
    table = BYTES | {b"abc": 256}  # no merge leads to it
    bpe, enc = BPETokenizer(table), as_tiktoken(table)
    assert bpe.encode_ordinary("abc abc") == enc.encode_ordinary("abc abc") == [256, *b" abc"]


def test_lowest_rank_comes_first_not_the_longest_token():
    vocabulary = BYTES | {b"bc": 256, b"ab": 257, b"abx": 258}
    assert merge_bytes(b"abc", vocabulary) == [b"a", b"bc"]
    assert merge_bytes(b"", vocabulary) == [] and merge_bytes(b"\xff", vocabulary) == [b"\xff"]
    assert merge_bytes(b"abab", vocabulary) == [b"ab", b"ab"]


def test_any_bytes_come_back_and_broken_ones_decode_as_in_tiktoken(ranks, seed):
    rng = random.Random(seed)
    bpe, enc = BPETokenizer(ranks), as_tiktoken(ranks)
    for _ in range(200):
        ids = rng.choices(range(700), k=rng.randint(0, 20))
        assert bpe.decode_bytes(ids) == enc.decode_bytes(ids), f"seed {seed}: {ids}"
        assert bpe.decode(ids) == enc.decode(ids), f"seed {seed}: {ids}"
    raw = rng.randbytes(64)
    assert bpe.decode_bytes(raw) == raw  # ids 0 to 255 are the bytes themselves


def test_gpt2s_own_vocabulary(gpt2_encoding, corpus, seed):
    rng = random.Random(seed)
    bpe = BPETokenizer(gpt2_encoding._mergeable_ranks)
    assert (bpe.n_vocab, bpe.eot_token, gpt2_encoding.n_vocab) == (50257, 50256, 50257)
    assert bpe.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert bpe.encode("Hello, my dog is a little") == [15496, 11, 616, 3290, 318, 257, 1310]
    for text in [*FIXED, corpus[:20_000], *(random_text(rng) for _ in range(100))]:
        assert bpe.encode_ordinary(text) == gpt2_encoding.encode_ordinary(text), f"seed {seed}: {text[:80]!r}"
    assert load_tokenizer("gpt2-xl").n_vocab == 50257


# --- special tokens ---


@pytest.mark.parametrize("text", [ENDOFTEXT, f"a {ENDOFTEXT}b{ENDOFTEXT}", f"{ENDOFTEXT}\n"])
def test_special_tokens_need_permission(ranks, text):
    bpe, enc = BPETokenizer(ranks), as_tiktoken(ranks)
    for encode in (bpe.encode, enc.encode):
        with pytest.raises(ValueError, match=r"<\|endoftext\|>"):
            encode(text)
    n = text.count(ENDOFTEXT)
    for allowed in ({ENDOFTEXT}, [ENDOFTEXT], "all"):
        ids = bpe.encode(text, allowed_special=allowed)
        assert ids == enc.encode(text, allowed_special={ENDOFTEXT}) and ids.count(699) == n
    plain = bpe.encode_ordinary(text)
    assert plain == enc.encode_ordinary(text) == enc.encode(text, disallowed_special=()) and 699 not in plain
    assert bpe.decode(ids) == bpe.decode(plain) == text


def test_only_the_allowed_special_tokens_pass(ranks):
    special = {"<|x|>": 699, "<|y|>": 800}
    bpe = BPETokenizer(ranks, special=special)
    enc = tiktoken.Encoding("x", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    assert bpe.encode("a<|x|>b<|y|>", allowed_special="all") == enc.encode("a<|x|>b<|y|>", allowed_special="all")
    assert bpe.encode(f"a{ENDOFTEXT}") == enc.encode(f"a{ENDOFTEXT}")  # no special token of this vocabulary
    assert bpe.encode("a<|x|>", allowed_special={"<|x|>", "<|unknown|>"})[-1] == 699
    with pytest.raises(ValueError, match=r"'<\|y\|>'"):
        bpe.encode("a<|x|>b<|y|>", allowed_special={"<|x|>"})
    assert bpe.n_vocab == enc.n_vocab == 801 and bpe.decode([800, 97, 699]) == "<|y|>a<|x|>"


# --- bad tables and ids ---


def test_ids_outside_the_vocabulary_are_refused(ranks):
    vocabulary = BPETokenizer(ranks)
    for bad in (700, -1, 10**9):
        with pytest.raises(ValueError, match=rf"token id {bad} .*end at 699"):
            vocabulary.decode([65, bad])
    with pytest.raises(ValueError, match="token id 750 "):
        BPETokenizer(ranks, special={"<|y|>": 800}).decode([750])  # in the gap between the ranks and the special token


def test_a_table_with_missing_bytes_or_gaps_is_refused():
    without = {token: rank for token, rank in BYTES.items() if token not in (b"\x07", b"\xff")}
    with pytest.raises(ValueError, match="here: 2 of the 256 bytes have no rank, the first is byte 7"):
        check_ranks(without, "here")
    for bad in (BYTES | {b"ab": 257}, BYTES | {b"ab": 255}):
        for use in (check_ranks, BPETokenizer):
            with pytest.raises(ValueError, match="ranks of 257 tokens must be 0 to 256"):
                use(bad)
    for special in ({"<|x|>": 255}, {"<|x|>": 256, "<|y|>": 256}):
        with pytest.raises(ValueError, match="clash"):
            BPETokenizer(BYTES, special=special)


# --- files ---


def test_files_are_tiktokens_format_and_come_back(ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # tiktoken would keep a copy of the file in the temporary folder
    file = tmp_path / "new" / "t.tiktoken"
    save_ranks(dict(reversed(ranks.items())), file)
    assert load_ranks(file) == load_tiktoken_bpe(str(file)) == ranks
    assert list(load_ranks(file)) == list(ranks)  # written in the order of the ranks
    save_ranks(BYTES, str(file))
    assert load_ranks(str(file)) == BYTES and [p.name for p in file.parent.iterdir()] == ["t.tiktoken"]


def test_a_bad_table_leaves_the_old_file(tmp_path):
    file = tmp_path / "t.tiktoken"
    save_ranks(BYTES, file)
    with pytest.raises(ValueError, match="must be 0 to"):
        save_ranks(BYTES | {b"ab": 300}, file)
    assert load_ranks(file) == BYTES


@pytest.mark.parametrize("line", ["YWI=", "YWI= 256 7", "YWI= x", "?? 256", ""])
def test_a_line_that_is_no_rank_is_named(tmp_path, line):
    file = tmp_path / "t.tiktoken"
    save_ranks(BYTES, file)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:100], line, *lines[100:]]))
    with pytest.raises(ValueError, match=r"t\.tiktoken, line 101: expected 'base64 rank'"):
        load_ranks(file)


def test_a_truncated_or_missing_file_is_refused(tmp_path):
    file = tmp_path / "t.tiktoken"
    with pytest.raises(FileNotFoundError, match="t.tiktoken"):
        load_ranks(file)
    save_ranks(BYTES, file)
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:200]))
    with pytest.raises(ValueError, match=r"t\.tiktoken: 56 of the 256 bytes"):
        load_ranks(file)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"t\.tiktoken: 256 of the 256 bytes"):
        load_ranks(file)


def test_training_a_file_is_training_its_text(corpus, tmp_path):
    text = ENDOFTEXT.join(corpus.split(ENDOFTEXT)[::100])
    source, out = tmp_path / "text.txt", tmp_path / "out" / "tokenizer.tiktoken"
    source.write_text(text, encoding="utf-8")
    trained = train_tokenizer(source, out, vocab_size=500)
    assert trained == train_bpe(text.split(ENDOFTEXT), 500) == load_ranks(out)
    enc = load_tokenizer(out.parent)
    assert (enc.name, enc.n_vocab, enc.eot_token) == ("out", 500, 499)
    with pytest.raises(FileNotFoundError, match="nothing.txt"):
        train_tokenizer(tmp_path / "nothing.txt", out)


# --- the tokenizers of the models ---


def test_mini_is_what_the_corpus_gives(corpus):
    """The shipped file is the one that training on the shipped corpus writes."""
    assert load_ranks(data_dir() / "mini" / "tokenizer.tiktoken") == train_bpe([corpus], 4096)


def test_mini_agrees_with_our_encoder(corpus, seed):
    rng = random.Random(seed)
    enc, bpe = load_tokenizer("mini"), BPETokenizer(load_ranks(data_dir() / "mini" / "tokenizer.tiktoken"))
    assert (enc.name, enc.n_vocab, enc.eot_token, bpe.n_vocab) == ("mini", 4096, 4095, 4096)
    start = rng.randrange(len(corpus) - 200_000)
    for text in [*FIXED, corpus[start : start + 200_000], *(random_text(rng) for _ in range(200))]:
        ids = enc.encode(text, allowed_special="all")
        assert ids == bpe.encode(text, allowed_special="all"), f"seed {seed}: {text[:80]!r}"
        assert enc.decode(ids) == text


def make_folder(path, vocab: int | None, config: object = None):
    if vocab:
        words = (f"w{i}" for i in range(10_000))
        save_ranks(train_bpe([" ".join(next(words) for _ in range(500))], vocab), path / "tokenizer.tiktoken")
    if config is not None:
        (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def test_a_folder_brings_its_own_tokenizer(tmp_path):
    folder = make_folder(tmp_path, 300, {"vocab_size": 300})
    for name in (folder, str(folder)):
        assert load_tokenizer(name).n_vocab == 300


@pytest.mark.parametrize("size", [50257, 50304, 4096, None])
def test_a_folder_without_a_tokenizer_gets_none_whatever_its_size(tmp_path, size):
    make_folder(tmp_path, None, {"vocab_size": size} if size else None)
    with pytest.raises(FileNotFoundError, match="no tokenizer in .*merges.txt.*save_tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.txt", "spiece.model", "vocab.json"])
def test_a_tokenizer_of_another_kind_is_named(tmp_path, name):
    make_folder(tmp_path, None, {"vocab_size": 50257})
    (tmp_path / name).write_text("{}")
    with pytest.raises(FileNotFoundError, match=f"no tokenizer in .*only {name}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("size", [300, 301, 320, 50257])
def test_a_model_may_have_more_rows_than_there_are_tokens(tmp_path, size):
    enc = load_tokenizer(make_folder(tmp_path, 300, {"vocab_size": size, "eos_token_id": size - 1}))
    assert (enc.n_vocab, enc.eot_token) == (300, 299)  # the id of a row without a token ends nothing


@pytest.mark.parametrize("size", [299, 256])
def test_a_tokenizer_that_does_not_fit_its_model_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match=rf"has 300 tokens, but .*config says vocab_size {size}"):
        load_tokenizer(make_folder(tmp_path, 300, {"vocab_size": size}))


@pytest.mark.parametrize("config", ["{not json", "[1, 2]"])
def test_a_config_that_is_no_json_object_is_named(tmp_path, config):
    with pytest.raises(ValueError, match=r"config\.json is not a JSON object"):
        load_tokenizer(make_folder(tmp_path, 300, config))


def test_unknown_names_and_unreachable_files_say_the_way_out(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="unknown model 'gpt-2': use one of mini, gpt2"):
        load_tokenizer("gpt-2")

    def offline(*_args, **_kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tokenizer, "download", offline)
    monkeypatch.setattr(tokenizer.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    with pytest.raises(OSError, match="TIKTOKEN_CACHE_DIR.*'mini'.*no route to host"):
        load_tokenizer("gpt2")


def test_every_line_of_the_shipped_file_is_base64_and_rank():
    lines = (data_dir() / "mini" / "tokenizer.tiktoken").read_bytes().splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(4095))
    assert base64.b64decode(lines[65].split()[0]) == b"A"
