"""minigpt_lib.text.tokenizer: tokenizers read from and written to folders, with Transformers as the judge."""

import copy
import json
import pickle
import random
from pathlib import Path

import pytest
import tiktoken
from tokenizers import ByteLevelBPETokenizer, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from minigpt_lib.paths import data_dir
from minigpt_lib.text.bpe import ENDOFTEXT, GPT2_PATTERN, train_bpe
from minigpt_lib.text.tokenizer import (
    byte_letters,
    load_ranks,
    load_tokenizer,
    merges_of_ranks,
    ranks_of_merges,
    save_ranks,
    save_tokenizer,
    spell,
    unspell,
)

HARD = ["", " ", "   ", "\n\n x", "Hello world", "don't I'LL 123 ½", "naïve café", "猫头鹰が飛ぶ", "👩‍🚀🦉 ok",
        "\ufeff\x00\u00a0", "tab\tand\r\nlines", "e\u0301", "a" * 200, "-- (!?) --"]  # fmt: skip
TEXT = "the cat sat on the mat, and the café by the sea was closed. naïve 12 123 1234 猫 猫 the then there! " * 5
CL100K = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
CL100K += r"|\s*[\r\n]|\s+(?!\S)|\s+"


def texts(seed: int, special: list[str]) -> list[str]:
    """The hard ones, and random mixtures of them with special tokens."""
    rng = random.Random(seed)
    bits = [*HARD, *special, " the", "the", " ", "🦉", "é"]
    return HARD + special + ["".join(rng.choices(bits, k=8)) for _ in range(60)]


def agree(enc: tiktoken.Encoding, folder: Path, seed: int) -> None:
    """Transformers reads `folder` with the ids of `enc`, special tokens included, and back."""
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in texts(seed, sorted(enc.special_tokens_set)):
        ids = enc.encode(text, allowed_special="all")
        assert theirs(text).input_ids == ids, f"seed {seed}: {text!r}"
        assert theirs.decode(ids) == enc.decode(ids), f"seed {seed}: {text!r}"
    assert theirs.eos_token_id == enc.eot_token


def trained(folder: Path, special: list[str], size: int = 330) -> Tokenizer:
    """A tokenizer as Hugging Face's own trainer makes it: its special tokens come first."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=size, special_tokens=special, **options))
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return made


def settings(folder: Path, **words: object) -> None:
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind | words))


def change(folder: Path, **steps: object) -> None:
    file = folder / "tokenizer.json"
    spec = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(spec | {k: v(spec[k]) if callable(v) else v for k, v in steps.items()}), "utf-8")


# --- read


@pytest.mark.parametrize("special", [["<s>", "<pad>", "</s>"], [ENDOFTEXT], ["<|im_start|>", "<|im_end|>"]])
def test_a_tokenizer_json_is_read_with_its_own_ids_and_end(tmp_path, special, seed):
    trained(tmp_path, special)
    settings(tmp_path, eos_token=special[-1])
    enc = load_tokenizer(tmp_path)
    assert enc.eot_token == len(special) - 1 and enc.special_tokens_set == set(special)
    agree(enc, tmp_path, seed)


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
@pytest.mark.parametrize("special", [["<s>", "</s>"], [ENDOFTEXT, "[PAD]"]])
def test_vocab_and_merges_are_read_as_transformers_reads_them(tmp_path, names, special, seed):
    made = ByteLevelBPETokenizer(add_prefix_space=False)
    made.train_from_iterator([TEXT], vocab_size=330, special_tokens=special, show_progress=False)
    made.save_model(str(tmp_path))
    end = special[0] if special[0] == ENDOFTEXT else special[1]
    settings(tmp_path, tokenizer_class="GPT2Tokenizer", eos_token=end, bos_token=end, unk_token=end)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for old, new in zip(("vocab.json", "merges.txt"), names, strict=True):
        (tmp_path / old).rename(tmp_path / new)
    enc = load_tokenizer(tmp_path)
    assert enc.eot_token == special.index(end) and enc.special_tokens_set == set(special)
    for text in texts(seed, [end]):
        assert theirs(text).input_ids == enc.encode(text, allowed_special="all"), f"seed {seed}: {text!r}"


def test_a_padding_token_added_behind_the_end_is_not_the_end(tmp_path, seed):
    """50258 ids where GPT-2 has 50257: the last one is [PAD]."""
    ranks = train_bpe([TEXT], 300)
    special = {ENDOFTEXT: 299, "[PAD]": 300}
    enc = tiktoken.Encoding("x", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    save_tokenizer(enc, tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 301, "eos_token_id": 299}')
    again = load_tokenizer(tmp_path)
    assert (again.n_vocab, again.eot_token) == (301, 299)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["pad_token"] == "[PAD]"
    agree(again, tmp_path, seed)


def test_a_padded_vocabulary_goes_in_and_out_again(tmp_path, seed):
    """4160 rows for 4096 tokens, 50304 for 50257: what is beyond the tokens is nothing."""
    enc, folder = load_tokenizer("mini"), tmp_path
    for turn in range(3):
        folder = tmp_path / str(turn)
        save_tokenizer(enc, folder)
        (folder / "config.json").write_text('{"vocab_size": 4160, "eos_token_id": 4159}')
        again = load_tokenizer(folder)
        assert (again.n_vocab, again.eot_token) == (4096, 4095)
        assert (again._mergeable_ranks, again._special_tokens) == (enc._mergeable_ranks, enc._special_tokens)
        enc = again
    agree(enc, folder, seed)


@pytest.mark.parametrize(
    ("config", "told", "expected"),
    [
        ({"eos_token_id": 1}, None, 1),
        ({"eos_token_id": [1, 2]}, "<s>", 1),
        ({"eos_token_id": 999}, "</s>", 2),
        ({"eos_token_id": None}, {"content": "</s>", "lstrip": False}, 2),
        ({}, "<pad>", 1),
        ({"eos_token_id": 40}, "</s>", 40),  # an ordinary token
    ],
)
def test_where_a_text_ends_is_said_by_config_then_by_the_tokenizer(tmp_path, config, told, expected):
    trained(tmp_path, ["<s>", "<pad>", "</s>"])
    settings(tmp_path, **({"eos_token": told} if told else {}))
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 330}))
    assert load_tokenizer(tmp_path).eot_token == expected


def test_an_end_is_never_guessed(tmp_path):
    trained(tmp_path, ["<s>", "</s>"])
    with pytest.raises(ValueError, match="names no end token.*eos_token_id"):
        load_tokenizer(tmp_path)


def test_an_encoding_with_an_end_of_its_own_is_copied_and_sent_to_processes(tmp_path):
    trained(tmp_path, ["<s>", "</s>"])
    settings(tmp_path, eos_token="</s>")
    enc = load_tokenizer(tmp_path)
    for other in (copy.deepcopy(enc), pickle.loads(pickle.dumps(enc))):
        assert isinstance(other, tiktoken.Encoding) and other.eot_token == enc.eot_token == 1
        assert other.encode("the cat</s>", allowed_special="all") == enc.encode("the cat</s>", allowed_special="all")


def test_a_pattern_of_its_own_is_kept(tmp_path, seed):
    made = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(CL100K), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = {"special_tokens": [ENDOFTEXT], "initial_alphabet": alphabet, "show_progress": False}
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=330, **special))
    made.save(str(tmp_path / "tokenizer.json"))
    settings(tmp_path, eos_token=ENDOFTEXT)
    enc = load_tokenizer(tmp_path)
    agree(enc, tmp_path, seed)
    save_tokenizer(enc, tmp_path / "again")
    assert not (tmp_path / "again" / "tokenizer.tiktoken").exists()
    agree(load_tokenizer(tmp_path / "again"), tmp_path / "again", seed)


# --- refused, by name

TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}]}


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ({"normalizer": {"type": "NFC"}}, "normalizer is .*NFC"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer is .*Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer.type is 'Whitespace'"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space is True"),
        ({"pre_tokenizer": None}, "pre_tokenizer.type is None"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}]}}, "Digits"),
        ({"post_processor": {"type": "BertProcessing"}}, "post_processor.type is 'BertProcessing'"),
        ({"post_processor": TEMPLATE}, "post_processor is .*SpecialToken"),
        ({"model": lambda m: m | {"type": "Unigram"}}, "model.type is 'Unigram'"),
        ({"model": lambda m: m | {"dropout": 0.1}}, "model.dropout is 0.1"),
        ({"model": lambda m: m | {"byte_fallback": True}}, "model.byte_fallback is True"),
        ({"model": lambda m: m | {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix is '</w>'"),
        ({"added_tokens": lambda a: [a[0] | {"lstrip": True}, *a[1:]]}, "lstrip of the token '<s>' is True"),
        ({"model": lambda m: m | {"merges": m["merges"][::-1]}}, "not in the order of the ids"),
        ({"model": lambda m: m | {"merges": m["merges"][:-1]}}, "no merge makes the token"),
        ({"model": lambda m: m | {"merges": [*m["merges"], ["a"]]}}, "a merge joins two tokens"),
        ({"model": lambda m: m | {"vocab": {k: v for k, v in m["vocab"].items() if k != "Ġ"}}}, "1 of the 256 bytes"),
        ({"added_tokens": lambda a: [a[0] | {"id": 50}, *a[1:]]}, "gives the id 50 to two tokens"),
    ],
)
def test_a_step_that_would_change_the_ids_is_refused_by_name(tmp_path, steps, words):
    trained(tmp_path, ["<s>", "</s>"])
    settings(tmp_path, eos_token="</s>")
    load_tokenizer(tmp_path)  # good before the change
    change(tmp_path, **steps)
    with pytest.raises(ValueError, match=words) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_real_normalizers_and_templates_are_refused(tmp_path):
    made = trained(tmp_path, ["<s>", "</s>"])
    settings(tmp_path, eos_token="</s>")
    made.normalizer = normalizers.NFKC()
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="normalizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"tokenizer_class": "RobertaTokenizer"}, "tokenizer_class is 'RobertaTokenizer'"),
        ({"tokenizer_class": "CLIPTokenizerFast"}, "tokenizer_class is 'CLIPTokenizer'"),
        ({"add_bos_token": True}, "add_bos_token is True"),
        ({"add_prefix_space": True}, "add_prefix_space is True"),
    ],
)
def test_vocab_and_merges_of_another_kind_are_refused(tmp_path, told, words):
    made = ByteLevelBPETokenizer()
    made.train_from_iterator([TEXT], vocab_size=300, special_tokens=[ENDOFTEXT], show_progress=False)
    made.save_model(str(tmp_path))
    settings(tmp_path, **({"tokenizer_class": "GPT2Tokenizer"} | told))
    with pytest.raises(ValueError, match=words):
        load_tokenizer(tmp_path)


def test_two_tokenizers_in_one_folder_are_not_chosen_between(tmp_path):
    save_tokenizer(load_tokenizer("mini"), tmp_path)
    load_tokenizer(tmp_path)
    save_ranks(train_bpe([TEXT], 300), tmp_path / "tokenizer.tiktoken")
    with pytest.raises(ValueError, match="are different tokenizers: delete the one that is out of date"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["{broken", "[]", '{"model": null}', "{}"])
def test_a_tokenizer_json_that_is_none_is_named(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


# --- written


def test_mini_is_read_by_transformers_as_it_lies_here(seed):
    agree(load_tokenizer("mini"), data_dir() / "mini", seed)


def test_minis_files_say_the_same(tmp_path):
    save_tokenizer(load_tokenizer("mini"), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.tiktoken"):
        assert (tmp_path / name).read_bytes() == (data_dir() / "mini" / name).read_bytes(), name


@pytest.mark.parametrize("special", [{ENDOFTEXT: 299}, {ENDOFTEXT: 299, "<|user|>": 300, "[PAD]": 307}])
def test_what_is_written_is_read_by_both(tmp_path, special, seed):
    ranks = train_bpe([TEXT], 300)
    enc = tiktoken.Encoding("x", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    save_tokenizer(enc, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "tokenizer.json", "tokenizer_config.json", "tokenizer.tiktoken"}  # fmt: skip
    assert load_ranks(tmp_path / "out" / "tokenizer.tiktoken") == ranks
    again = load_tokenizer(tmp_path / "out")
    assert (again._mergeable_ranks, again._special_tokens, again._pat_str) == (ranks, special, GPT2_PATTERN)
    agree(again, tmp_path / "out", seed)


def test_ids_with_gaps_and_special_tokens_in_front_are_written_too(tmp_path, seed):
    trained(tmp_path, ["<s>", "</s>"])
    settings(tmp_path, eos_token="</s>")
    enc = load_tokenizer(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.tiktoken").write_text("of an earlier save")
    save_tokenizer(enc, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.tiktoken").exists()
    again = load_tokenizer(tmp_path / "out")
    assert again.eot_token == 1 and again._mergeable_ranks == enc._mergeable_ranks
    agree(again, tmp_path / "out", seed)


def test_gpt2s_own_vocabulary_is_written_and_read(gpt2_encoding, tmp_path, seed):
    by_name = load_tokenizer("gpt2")
    for part in ("name", "_pat_str", "_mergeable_ranks", "_special_tokens", "n_vocab", "eot_token"):
        assert getattr(by_name, part) == getattr(gpt2_encoding, part)
    save_tokenizer(by_name, tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 50304, "eos_token_id": 50256}')
    again = load_tokenizer(tmp_path)
    assert again._mergeable_ranks == gpt2_encoding._mergeable_ranks and again.eot_token == 50256
    agree(again, tmp_path, seed)


def test_a_table_that_no_merges_make_is_not_written(tmp_path):
    table = {bytes([b]): b for b in range(256)} | {b"abc": 256}
    enc = tiktoken.Encoding("x", pat_str=GPT2_PATTERN, mergeable_ranks=table, special_tokens={ENDOFTEXT: 257})
    with pytest.raises(ValueError, match="b'abc' can't come from a merge"):
        save_tokenizer(enc, tmp_path)
    assert not list(tmp_path.iterdir())


# --- bytes and merges


def test_bytes_are_spelled_as_in_gpt2s_files():
    assert byte_letters() == {ord(byte): letter for byte, letter in _from_tiktoken().items()}
    assert spell(b" the\n") == "ĠtheĊ" and unspell("ĠtheĊ") == b" the\n"
    assert unspell(spell(bytes(range(256)))) == bytes(range(256))
    with pytest.raises(ValueError, match="'猫' stands for no byte"):
        unspell("a猫")


def _from_tiktoken() -> dict[str, str]:
    """The same table as tiktoken builds it in load.py, written out from its rule: printable bytes first."""
    printable = [chr(b) for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    rest = [chr(b) for b in range(256) if chr(b) not in printable]
    return {c: c for c in printable} | {c: chr(256 + n) for n, c in enumerate(rest)}


def test_merges_and_ranks_are_the_same_thing(seed):
    rng = random.Random(seed)
    for _ in range(20):
        text = "".join(rng.choices("abc é", k=200))
        ranks = train_bpe([text], 256 + rng.randint(1, 10), special=())
        merges = [(spell(left), spell(right)) for left, right in merges_of_ranks(ranks)]
        vocab = {spell(token): rank for token, rank in ranks.items()}
        assert ranks_of_merges(vocab, merges, "x") == ranks, f"seed {seed}"


def test_a_table_whose_merges_tiktoken_would_not_repeat_is_refused():
    """`a` + `bc` is in no merge here, but makes a token: Hugging Face keeps the two apart, tiktoken joins them."""
    letters = {letter: b for b, letter in byte_letters().items()}
    vocab = letters | {"bc": 256, "ab": 257, "abc": 258}
    assert ranks_of_merges(vocab, [("b", "c"), ("a", "b"), ("a", "bc")], "x")[b"abc"] == 258
    with pytest.raises(ValueError, match="not in the order of the ids"):
        ranks_of_merges(vocab, [("b", "c"), ("a", "b"), ("ab", "c")], "x")
