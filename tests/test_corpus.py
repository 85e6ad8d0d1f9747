"""minigpt_lib.training.data: windows, and token files against tiktoken's own encoding of the whole text."""

import hashlib
import os
import random
import re

import numpy as np
import pytest
import tiktoken
import torch
from tiny import T, windows_of

from minigpt_lib.text.tokenizer import load_tokenizer
from minigpt_lib.training.data import TokenWindows, heldout_batches
from minigpt_lib.training.token_files import (
    HEADER,
    build_token_file,
    encode_corpus,
    encode_texts,
    find_sources,
    find_texts,
    left_out,
    load_tokens,
    open_tokens,
    read_documents,
    read_header,
    tokenizer_hash,
    tokens_hash,
)


@pytest.mark.parametrize("trial", range(4))
def test_an_epoch_uses_every_id_once_and_targets_are_shifted_by_one(trial, seed):
    rng = random.Random(seed + trial)
    window, per_epoch, rest = rng.randint(1, 9), rng.randint(8, 14), [0, 1, 3, 0][trial]
    n = window * per_epoch + min(rest, window - 1)
    batch_size = rng.randint(1, per_epoch)
    tokens = np.arange(n)
    windows = TokenWindows(tokens, window, batch_size, seed=seed)
    batches = [windows.batch(i) for i in range(3 * per_epoch)]
    idx, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert idx.dtype == targets.dtype == torch.int64 and batches[0][0].shape == (batch_size, window)
    assert torch.equal(targets, (idx + 1) % n), "each target is the id after its input"
    assert torch.equal(idx[:, 1:], targets[:, :-1])
    for epoch in range(3):
        used = targets[epoch * per_epoch : (epoch + 1) * per_epoch].flatten().tolist()
        assert len(used) == len(set(used)) == window * per_epoch > n - window, f"epoch {epoch} (seed {seed})"
        if n % window == 0:
            assert sorted(used) == list(range(n))
    assert not torch.equal(idx[:per_epoch], idx[per_epoch : 2 * per_epoch]), "epochs differ"


def test_batches_are_a_pure_function_of_their_number(seed):
    a, b = windows_of(seed, n=200), windows_of(seed, n=200)
    order = list(range(40))
    forward = [a.batch(i) for i in order]
    random.Random(seed).shuffle(order)
    for i in order:
        assert all(torch.equal(x, y) for x, y in zip(b.batch(i), forward[i], strict=True)), f"batch {i} (seed {seed})"
    other = TokenWindows(a.tokens, T, 4, seed=seed + 1)
    assert any(not torch.equal(other.batch(i)[0], forward[i][0]) for i in range(5))


def test_heldout_batches_count_each_target_once_in_order(seed):
    n = random.Random(seed).randint(30, 90)
    batches = heldout_batches(np.arange(n), window=7, batch_size=3)
    idx, targets = (torch.cat(parts).flatten() for parts in zip(*batches, strict=True))
    whole = (n - 1) // 7 * 7
    assert idx.tolist() == list(range(whole)) and targets.tolist() == list(range(1, whole + 1))
    assert len(heldout_batches(np.arange(n), 7, 1, limit=2)) == 2


def test_the_corpus_is_encoded_as_tiktoken_does(tmp_path, byte_encoding, seed):
    rng = random.Random(seed)
    alphabet = "ab é\n\t漢🙂'<|>"
    documents = ["".join(rng.choices(alphabet, k=rng.randint(1, 60))).strip() or "x" for _ in range(30)]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(documents[:20]) + "\n<|endoftext|>\n", "utf-8")
    (tmp_path / "b.txt").write_text("<|endoftext|>".join(documents[20:]), "utf-8")  # not on a line of its own
    assert read_documents(tmp_path / "a.txt") == documents[:20]
    expected = byte_encoding.encode("".join(d + "<|endoftext|>" for d in documents), allowed_special="all")
    ids = encode_corpus([tmp_path / "a.txt", tmp_path / "b.txt"], byte_encoding)
    assert ids.dtype == np.uint16 and ids.tolist() == expected, f"seed {seed}"
    second = encode_corpus(str(tmp_path / "b.txt"), byte_encoding).tolist()
    assert second == expected[-len(second) :] and second.count(256) == 10


def test_bad_corpora_are_refused(tmp_path, byte_encoding):
    with pytest.raises(FileNotFoundError, match=r"no corpus file .*missing\.txt"):
        encode_corpus(tmp_path / "missing.txt", byte_encoding)
    (tmp_path / "empty.txt").write_text("\n<|endoftext|>\n \n")
    with pytest.raises(ValueError, match=r"empty\.txt holds no text"):
        encode_corpus(tmp_path / "empty.txt", byte_encoding)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8: byte 3"):
        encode_corpus(tmp_path / "latin.txt", byte_encoding)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"the folder .*folder holds no \.txt file"):
        encode_corpus(tmp_path / "folder", byte_encoding)
    (tmp_path / "late.txt").write_bytes(b"fine " * 1000 + b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8: byte 5000 "):
        list(encode_texts(tmp_path / "late.txt", byte_encoding, size=64))


def test_bad_windows_are_refused():
    for call in (lambda w, b: TokenWindows(np.arange(8), w, b), lambda w, b: heldout_batches(np.arange(8), w, b)):
        with pytest.raises(ValueError, match="window=0 must be at least 1"):
            call(0, 1)
        with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
            call(1, 0)
        with pytest.raises(ValueError, match="has 8 tokens, one window of 8 needs 9"):
            call(8, 1)
        call(7, 1)


def test_a_vocabulary_beyond_16_bits_takes_32(tmp_path):
    ranks = {bytes([i]): i for i in range(256)}
    wide = tiktoken.Encoding(
        "wide", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 70_000}
    )
    (tmp_path / "a.txt").write_text("a b<|endoftext|>c")
    ids = build_token_file(tmp_path / "a.tokens", tmp_path / "a.txt", wide)
    assert ids.dtype == np.uint32 and ids.tolist() == [97, 32, 98, 70_000, 99, 70_000]


# ---- token files ----------------------------------------------------------------------------------------------------


def wild_text(rng: random.Random, n: int) -> str:
    """Text in which cutting is dangerous: runs of blanks and line breaks, contractions, other scripts, long words."""
    pieces = [" ", "  ", "\n", "\n\n", " \n ", "\t", "\r\n", "\u00a0", "\u3000", "don't", "we'll", "é", "漢字", "🙂",
              "12345", "word", "x" * 40, "...", "\x1c", "<|endof", "text|>", "<|endoftext|>"]  # fmt: skip
    return "".join(rng.choices(pieces, k=n)) + "end"


@pytest.mark.parametrize("size", [1, 5, 17, 64, 333])
def test_streaming_in_small_blocks_gives_the_tokens_of_the_whole(tmp_path, size, seed):
    enc, rng = load_tokenizer("mini"), random.Random(seed)
    for number in range(20):
        path = tmp_path / f"{number}.txt"
        path.write_bytes(wild_text(rng, 60).encode())
        expected = []
        for document in read_documents(path):
            expected += [*enc.encode_ordinary(document), enc.eot_token]
        found = np.concatenate(list(encode_texts(path, enc, size=size)))
        assert found.tolist() == expected, f"{path.read_bytes()!r} (seed {seed})"


def test_gpt2s_own_pattern_survives_the_cuts(tmp_path, gpt2_encoding, seed):
    path = tmp_path / "a.txt"
    path.write_bytes(wild_text(random.Random(seed), 3000).replace("<|endoftext|>", " ").encode())
    expected = [*gpt2_encoding.encode_ordinary(read_documents(path)[0]), gpt2_encoding.eot_token]
    assert np.concatenate(list(encode_texts(path, gpt2_encoding, size=100))).tolist() == expected, f"seed {seed}"


def test_a_folder_is_all_its_texts_in_order(tmp_path, byte_encoding):
    for name, text in (("b.txt", "B"), ("a.txt", "A"), ("sub/c.txt", "C"), ("notes.md", "no")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert [p.name for p in find_texts(tmp_path)] == ["a.txt", "b.txt", "c.txt"]
    assert [p.name for p in find_texts([tmp_path / "sub", tmp_path / "a.txt"])] == ["c.txt", "a.txt"]
    assert encode_corpus(tmp_path, byte_encoding).tolist() == [65, 256, 66, 256, 67, 256]


def test_folders_are_read_in_the_order_given_and_files_in_that_of_their_names(tmp_path, monkeypatch):
    for name in ("y/b.txt", "y/a.txt", "x/d.txt", "x/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    real = type(tmp_path).rglob  # a disk may list its files in any order
    for turn in (1, -1):
        monkeypatch.setattr(type(tmp_path), "rglob", lambda self, kind, turn=turn: sorted(real(self, kind))[::turn])
        assert [p.name for p in find_texts([tmp_path / "y", tmp_path / "x"])] == ["a.txt", "b.txt", "c.txt", "d.txt"]
        assert [p.name for p in find_texts([tmp_path / "x", tmp_path / "y"])] == ["c.txt", "d.txt", "a.txt", "b.txt"]


# ---- text that comes from anywhere ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("size", [1, 3, 50, 2**20])
def test_marks_and_line_ends_make_no_difference(tmp_path, byte_encoding, mark, end, size):
    text = "one caf\u00e9\n\nline two\n<|endoftext|>\nand \u6f22\n"
    (tmp_path / "a.txt").write_bytes(mark + text.replace("\n", end).encode())
    expected = [*"one caf\u00e9\n\nline two".encode(), 256, *"and \u6f22".encode(), 256]
    assert np.concatenate(list(encode_texts(tmp_path / "a.txt", byte_encoding, size=size))).tolist() == expected
    assert read_documents(tmp_path / "a.txt") == ["one caf\u00e9\n\nline two", "and \u6f22"]


@pytest.mark.parametrize("size", [1, 7, 2**20])
def test_a_bad_byte_is_named_with_its_place(tmp_path, byte_encoding, size, seed):
    rng = random.Random(seed)
    good = "".join(rng.choices(["a", "\u00e9", "\u6f22", "\n", " word"], k=200)).encode() + b"\n"
    bad = rng.choice([b"\xff", b"\xe9 ", b"\xc3("])
    for mark in (b"", b"\xef\xbb\xbf"):
        raw = mark + good + bad + b" more"
        (tmp_path / "a.txt").write_bytes(raw)
        at = len(mark) + len(good)
        place = rf"a\.txt is not UTF-8: byte {at} \(0x{raw[at]:02x}, line {1 + good.count(10)}\)"
        with pytest.raises(ValueError, match=place):
            list(encode_texts(tmp_path / "a.txt", byte_encoding, size=size))
        with pytest.raises(ValueError, match=place):
            read_documents(tmp_path / "a.txt")


@pytest.mark.parametrize("kind", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf16_is_named(tmp_path, byte_encoding, kind):
    (tmp_path / "a.txt").write_bytes("Plain words, as Notepad saves them.".encode(kind))
    for read in (lambda: encode_corpus(tmp_path, byte_encoding), lambda: read_documents(tmp_path / "a.txt")):
        with pytest.raises(ValueError, match=r"a\.txt is UTF-16, not UTF-8: convert it first, e\.g\. iconv"):
            read()


# ---- what is read, and what is not ----------------------------------------------------------------------------------


def lay_out(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the text of {name}")
    return folder


CLUTTER = {
    ".ipynb_checkpoints/a-checkpoint.txt": ".ipynb_checkpoints (hidden)",
    ".git/objects/x.txt": ".git (hidden)",
    ".#a.txt": ".#a.txt (hidden)",
    "._a.txt": "._a.txt (hidden)",
    "a.txt~": "a.txt~ (a backup)",
    "#a.txt#": "#a.txt# (a backup)",
    "~$a.txt": "~$a.txt (a backup)",
    "a.bak.txt": "a.bak.txt (a backup)",
    "sub/a.txt.orig": "sub/a.txt.orig (a backup)",
    "a-checkpoint.txt": "a-checkpoint.txt (a backup)",
    "code.py": "1 \u00d7 .py",
}


@pytest.mark.parametrize("name", CLUTTER)
def test_hidden_files_and_backups_are_left_out_and_named(tmp_path, name):
    lay_out(tmp_path, "a.txt", "sub/B.TXT", name)
    sources = find_sources(tmp_path)
    assert [p.name for p in sources.files] == ["a.txt", "B.TXT"] == [p.name for p in find_texts(tmp_path)]
    assert sources.left_out == [CLUTTER[name]] == left_out(tmp_path)


def test_what_the_shell_lists_is_sorted_out_too(tmp_path):
    lay_out(tmp_path, "a.txt", "a.txt~", "heldout.txt")
    sources = find_sources(sorted(tmp_path.iterdir()))  # folder/*
    assert [p.name for p in sources.files] == ["a.txt"] and [p.name for p in sources.heldout] == ["heldout.txt"]
    assert sources.left_out == ["a.txt~ (a backup)"]
    assert [p.name for p in find_sources(tmp_path / "a.txt~").files] == ["a.txt~"], "the only one, and asked for"


@pytest.mark.parametrize("name", ["heldout.txt", "held-out.txt", "val.txt", "Validation.txt", "sub/valid.txt"])
def test_a_held_out_text_is_found_and_kept_out(tmp_path, name):
    lay_out(tmp_path, "a.txt", "b.txt", name)
    sources = find_sources(tmp_path)
    assert [p.name for p in sources.files] == ["a.txt", "b.txt"]
    assert [p.relative_to(tmp_path).as_posix() for p in sources.heldout] == [name]
    assert name.split("/")[-1] in [p.name for p in find_sources(tmp_path, heldout=False).files]
    alone = find_sources(tmp_path / name)
    assert [p.name for p in alone.files] == [name.split("/")[-1]] and not alone.heldout, "all that there is"


def test_a_copy_or_a_link_of_the_held_out_text_is_kept_out(tmp_path):
    lay_out(tmp_path, "a.txt", "heldout.txt")
    (tmp_path / "copy.txt").write_bytes((tmp_path / "heldout.txt").read_bytes())
    (tmp_path / "link.txt").symlink_to(tmp_path / "heldout.txt")
    assert [p.name for p in find_sources(tmp_path).files] == ["a.txt"]
    assert [p.name for p in find_sources([tmp_path / "a.txt", tmp_path / "copy.txt"]).files] == ["a.txt"]
    beside = find_sources(tmp_path / "a.txt")
    assert [p.name for p in beside.heldout] == ["heldout.txt"], "beside the text"
    repeated = find_sources([tmp_path / "a.txt", tmp_path / "a.txt"])
    assert [p.name for p in repeated.files] == ["a.txt", "a.txt"], "a text that is to count twice"


def test_a_token_file_holds_the_ids_and_is_built_once(tmp_path, byte_encoding, monkeypatch):
    text, file, said = tmp_path / "a.txt", tmp_path / "a.tokens", []
    text.write_text("one two three " * 1000)
    ids = build_token_file(file, text, byte_encoding, progress=lambda done, total: said.append((done, total)))
    expected = encode_corpus(text, byte_encoding)
    assert isinstance(ids, np.memmap) and not ids.flags.writeable and np.array_equal(ids, expected)
    assert said[-1] == (14_000, 14_000) and file.stat().st_size == HEADER + 2 * len(expected)
    header = read_header(file)
    assert (
        header["sha256"] == hashlib.sha256(expected.tobytes()).hexdigest() == tokens_hash(ids) == tokens_hash(expected)
    )
    stamp = file.stat().st_mtime_ns
    build_token_file(file, text, byte_encoding, progress=lambda *a: pytest.fail("encoded again"))
    assert file.stat().st_mtime_ns == stamp and np.array_equal(load_tokens(file, byte_encoding), expected)
    text.write_text("another text")
    assert np.array_equal(build_token_file(file, text, byte_encoding), encode_corpus(text, byte_encoding))


def test_a_token_file_from_another_tokenizer_is_refused_and_kept(tmp_path, byte_encoding):
    text, file = tmp_path / "a.txt", tmp_path / "a.tokens"
    text.write_text("one two three")
    build_token_file(file, text, byte_encoding)
    before = file.read_bytes()
    for other in (load_tokenizer("mini"), _bytes_with(pat_str=r"\S|\s+"), _bytes_with(shift=1)):
        for call in (open_tokens, load_tokens, lambda path, enc: build_token_file(path, text, enc)):
            with pytest.raises(ValueError, match=r"a\.tokens was written with another tokenizer"):
                call(file, other)
    assert file.read_bytes() == before
    assert tokenizer_hash(byte_encoding) == tokenizer_hash(_bytes_with()), "the name does not count"


def _bytes_with(pat_str: str = r"\S+|\s+", shift: int = 0) -> tiktoken.Encoding:
    ranks = {bytes([(i + shift) % 256]): i for i in range(256)}
    return tiktoken.Encoding("other", pat_str=pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})


def test_a_token_file_follows_its_texts(tmp_path, byte_encoding):
    """A text that changed is encoded anew even if its length did not, and files in another order are another corpus."""
    a, b, file = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "a.tokens"
    a.write_text("one two")
    b.write_text("six ten")
    os.utime(a, ns=(10**18, 10**18))
    assert build_token_file(file, [a, b], byte_encoding).tolist() == [*b"one two", 256, *b"six ten", 256]
    a.write_text("two one")
    os.utime(a, ns=(10**18 + 1, 10**18 + 1))
    assert build_token_file(file, [a, b], byte_encoding).tolist() == [*b"two one", 256, *b"six ten", 256]
    assert build_token_file(file, [b, a], byte_encoding).tolist() == [*b"six ten", 256, *b"two one", 256]


@pytest.mark.parametrize("keep", [0, 100, HEADER - 1, HEADER, HEADER + 10, -1])
def test_a_token_file_that_was_cut_off_is_refused(tmp_path, byte_encoding, keep):
    (tmp_path / "a.txt").write_text("one two three")
    build_token_file(tmp_path / "a.tokens", tmp_path / "a.txt", byte_encoding)
    data = (tmp_path / "a.tokens").read_bytes()
    (tmp_path / "a.tokens").write_bytes(data[:keep])
    with pytest.raises(ValueError, match=r"a\.tokens (is not a token file|has \d+ bytes, its header says)"):
        open_tokens(tmp_path / "a.tokens", byte_encoding)
    with pytest.raises(FileNotFoundError, match="no token file"):
        open_tokens(tmp_path / "b.tokens", byte_encoding)


def test_a_failed_build_leaves_nothing(tmp_path, byte_encoding):
    (tmp_path / "a.txt").write_bytes(b"good text " * 300_000 + b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8"):
        build_token_file(tmp_path / "a.tokens", tmp_path / "a.txt", byte_encoding)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_windows_of_a_mapped_file_are_those_of_the_array(tmp_path, byte_encoding, seed):
    (tmp_path / "a.txt").write_text("".join(random.Random(seed).choices("abc def\n", k=3000)))
    ids = build_token_file(tmp_path / "a.tokens", tmp_path / "a.txt", byte_encoding)
    mapped, plain = (TokenWindows(x, T, 4, seed) for x in (ids, np.array(ids)))
    assert np.shares_memory(mapped.tokens, ids), "no copy"
    for i in range(5):
        assert all(torch.equal(a, b) for a, b in zip(mapped.batch(i), plain.batch(i), strict=True))
    val = zip(heldout_batches(ids, T, 4), heldout_batches(np.array(ids), T, 4), strict=True)
    assert all(torch.equal(a[0], b[0]) for a, b in val)
    assert re.fullmatch("[0-9a-f]{64}", tokens_hash(ids))
