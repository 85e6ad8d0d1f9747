"""Downloads from a server on this machine that misbehaves: resumed, checked, whole or not at all."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
from serving import File, Server, serve

from minigpt_lib import download as module
from minigpt_lib.download import FetchError, download, offline, openai_url
from minigpt_lib.text import tokenizer
from minigpt_lib.text.bpe import ENDOFTEXT, train_bpe
from minigpt_lib.text.tokenizer import load_tokenizer, merges_of_ranks, spell

ROOT = Path(__file__).resolve().parents[1]
K = 2**14  # bytes are written in pieces of this size; of one that is cut nothing is kept
QUICK = {"timeout": 0.5, "wait": 0.01, "progress": False}


@pytest.fixture
def server() -> Server:
    with serve() as found:
        yield found


@pytest.fixture
def body() -> bytes:
    return os.urandom(700_000)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "cache" / "file"


def sha(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def left(path: Path) -> set[str]:
    """The files beside `path`, but for the lock."""
    return {p.name for p in path.parent.iterdir()} - {path.name + ".lock"} if path.parent.exists() else set()


# --- what works


def test_a_file_arrives_once(server, body, path):
    server.files["/f"] = File(body)
    for _ in range(2):
        assert download(f"{server.url}/f", path, sha256=sha(body), size=len(body), **QUICK).read_bytes() == body
    assert server.gets("/f") == [None] and left(path) == {"file"}


def test_a_cut_line_is_resumed_in_the_same_call(server, body, path):
    server.files["/f"] = File(body, cuts=[12 * K, 9 * K, 0, 6 * K + 77])
    download(f"{server.url}/f", path, sha256=sha(body), **QUICK)
    wanted = [int(r[6:-1]) for r in server.gets("/f")[1:]]
    assert path.read_bytes() == body and wanted == [12 * K, 21 * K, 21 * K, 27 * K] and left(path) == {"file"}


def test_silence_is_ended_and_resumed(server, body, path):
    server.files["/f"] = File(body, stalls=[20 * K])
    download(f"{server.url}/f", path, sha256=sha(body), **QUICK)
    assert path.read_bytes() == body and server.gets("/f") == [None, f"bytes={20 * K}-"]


def test_the_next_call_goes_on_where_the_last_one_stopped(server, body, path):
    server.files["/f"] = File(body, cuts=[15 * K, 0, 0, 0])
    with pytest.raises(FetchError, match="the line is cut|reset|aborted"):
        download(f"{server.url}/f", path, sha256=sha(body), **QUICK)
    assert not path.exists() and left(path) == {"file.part"}
    server.requests.clear()
    server.files["/f"].cuts = []
    download(f"{server.url}/f", path, sha256=sha(body), **QUICK)
    assert path.read_bytes() == body and server.gets("/f") == [f"bytes={15 * K}-"] and left(path) == {"file"}


def test_a_part_of_another_file_is_thrown_away(server, body, path):
    path.parent.mkdir()
    for part in (b"x" * 1000, b"x" * len(body), b"x" * (len(body) + 5)):
        path.with_name("file.part").write_bytes(part)
        server.files["/f"] = File(body)
        download(f"{server.url}/f", path, sha256=sha(body), **QUICK)
        assert path.read_bytes() == body and left(path) == {"file"}
        path.unlink()


def test_a_server_without_ranges_is_read_from_the_start(server, body, path):
    server.files["/f"] = File(body, cuts=[300_000], ranges=False)
    download(f"{server.url}/f", path, sha256=sha(body), **QUICK)
    assert path.read_bytes() == body


def test_a_part_that_was_not_asked_for_is_not_appended(server, body, path):
    """There is neither a hash nor a size here that would tell afterwards."""
    server.files["/f"] = File(body, cuts=[12 * K], grain=100_000)
    assert download(f"{server.url}/f", path, **QUICK).read_bytes() == body
    assert server.gets("/f") == [None, f"bytes={12 * K}-", None] and left(path) == {"file"}


def test_a_redirect_is_followed(server, body, path):
    server.files |= {"/old": File(to="/f", status=302), "/f": File(body, cuts=[100_000])}
    download(f"{server.url}/old", path, sha256=sha(body), **QUICK)
    assert path.read_bytes() == body


def test_a_server_that_is_busy_is_asked_again(server, body, path):
    server.files["/f"] = File(b"later", 503)
    with pytest.raises(FetchError, match="503"):
        download(f"{server.url}/f", path, sha256=sha(body), **QUICK)
    assert len(server.gets("/f")) == 3 and left(path) == set()


def test_a_damaged_file_in_the_cache_is_replaced(server, body, path):
    path.parent.mkdir()
    path.write_bytes(body[:-1] + b"?")
    server.files["/f"] = File(body)
    download(f"{server.url}/f", path, sha256=sha(body), **QUICK)
    assert path.read_bytes() == body


# --- what must fail, and leave nothing that looks like the file


@pytest.mark.parametrize(
    ("file", "words", "asked"),
    [
        (File(b"no", 403, "text/plain"), "403 Forbidden", 1),
        (File(b"no", 404, "text/plain"), "404 Not Found", 1),
        (File(b"<html>log in</html>", kind="text/html; charset=utf-8"), "web page", 1),
        (File(b"<html>log in</html>"), "19 bytes instead of 700,000|SHA-256", 1),
        (File(bytes(700_000)), "SHA-256 is .* instead of", 1),
        (File(os.urandom(699_999)), "699,999 bytes instead of 700,000", 1),
        (File(os.urandom(900_000)), "more than its 700,000 bytes came", 1),
        (File(os.urandom(700_000), claim=600_000), "600,000 bytes instead of 700,000", 1),
        (File(to="/nowhere", status=302), "404", 1),
    ],
)
@pytest.mark.parametrize("before", [None, b"what was there"])
def test_wrong_answers_are_named_and_leave_the_old_file(server, body, path, file, words, asked, before):
    server.files["/f"] = file
    path.parent.mkdir()
    if before:
        path.write_bytes(before)
    with pytest.raises(FetchError, match=words) as caught:
        download(f"{server.url}/f", path, sha256=sha(body), size=len(body), **QUICK)
    assert all(word in str(caught.value) for word in (f"{server.url}/f", "Ways out", str(path)))
    assert len(server.gets("/f")) == asked
    assert left(path) == ({"file"} if before else set()) and (not before or path.read_bytes() == before)


def test_more_bytes_claimed_than_there_are(server, body, path):
    server.files["/f"] = File(body, claim=len(body) + 10)
    with pytest.raises(FetchError, match="the line is cut"):
        download(f"{server.url}/f", path, sha256=sha(body), size=len(body), **QUICK)
    assert left(path) == {"file.part"} and len(server.gets("/f")) > 3


def test_a_server_that_never_gets_to_the_end_is_not_asked_for_ever(server, body, path):
    """It knows no ranges, and its line is cut now later, now sooner: more than the attempt before is no progress."""
    server.files["/f"] = File(body, cuts=[20 * K, 12 * K] * 20, ranges=False)
    with pytest.raises(FetchError, match="the line is cut"):
        download(f"{server.url}/f", path, sha256=sha(body), **QUICK)
    assert len(server.gets("/f")) == 4 and left(path) == {"file.part"}


def test_nobody_there_is_said_soon(path):
    with pytest.raises(FetchError, match="refused") as caught:
        download("http://127.0.0.1:9/f", path, **QUICK)
    assert "Ways out" in str(caught.value) and left(path) == set()


def test_a_folder_that_cannot_be_written(server, body, tmp_path):
    server.files["/f"] = File(body)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(FetchError, match="could not be saved"):
        download(f"{server.url}/f", tmp_path / "file" / "f", **QUICK)


def test_offline_asks_nobody(server, body, path, monkeypatch):
    server.files["/f"] = File(body)
    for value, expected in (("1", True), ("true", True), ("0", False), ("", False)):
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        assert offline() is expected
    monkeypatch.setenv("HF_HUB_OFFLINE", "YES")
    with pytest.raises(FetchError, match="HF_HUB_OFFLINE"):
        download(f"{server.url}/f", path, **QUICK)
    assert server.requests == [] and left(path) == set()


def test_a_kill_leaves_no_file_under_its_name(server, body, path):
    server.files["/f"] = File(body, stalls=[400_000])
    code = f"""
from pathlib import Path
from minigpt_lib.download import download
download({server.url + "/f"!r}, Path({str(path)!r}), timeout=60, progress=False)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as p:
        part = path.with_name("file.part")
        for _ in range(2000):
            if part.exists() and part.stat().st_size > 200_000:
                break
            server.over.wait(0.01)
        p.kill()
    assert not path.exists() and part.stat().st_size > 200_000
    assert download(f"{server.url}/f", path, sha256=sha(body), **QUICK).read_bytes() == body
    assert left(path) == {"file"}


def test_processes_at_the_same_time_fetch_it_once(server, body, path):
    server.files["/f"] = File(body, cuts=[100_000, 200_000])
    code = f"""
from pathlib import Path
from minigpt_lib.download import download
download({server.url + "/f"!r}, Path({str(path)!r}), sha256={sha(body)!r}, wait=0.1, progress=False)
"""
    running = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(4)]
    assert [p.wait(120) for p in running] == [0] * 4
    assert path.read_bytes() == body and len(server.gets("/f")) == 3 and left(path) == {"file"}


def test_progress_is_shown_where_tqdm_is(server, body, path, capsys):
    pytest.importorskip("tqdm")
    server.files["/f"] = File(body)
    download(f"{server.url}/f", path, timeout=5)
    err = capsys.readouterr().err
    assert "file" in err and "100%" in err


# --- GPT-2's vocabulary


KEYS = {"vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
        "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"}  # fmt: skip


@pytest.fixture
def vocabulary(server, tmp_path, monkeypatch) -> Server:
    """OpenAI's server on this machine, with a small vocabulary in place of the real one, and no shared folders."""
    ranks = train_bpe(["the cat and the hat " * 9], 262)
    words = {spell(token): rank for token, rank in ranks.items()} | {ENDOFTEXT: 261}
    merges = "".join(f"{spell(left)} {spell(right)}\n" for left, right in merges_of_ranks(ranks))
    bodies = {"vocab.bpe": f"#version: 0.2\n{merges}".encode(), "encoder.json": json.dumps(words).encode()}
    server.files |= {f"/gpt-2/encodings/main/{name}": File(body) for name, body in bodies.items()}
    monkeypatch.setattr(tokenizer, "_GPT2_FILES", {name: sha(body) for name, body in bodies.items()})
    monkeypatch.setenv("MINIGPT_OPENAI_URL", f"{server.url}/gpt-2/")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    (tmp_path / "shared").mkdir()
    monkeypatch.setattr(tokenizer.tempfile, "gettempdir", lambda: str(tmp_path / "shared"))
    return server


def is_the_small_one(enc: tiktoken.Encoding) -> bool:
    return (enc.name, enc.n_vocab, enc.eot_token) == ("gpt2", 262, 261) and len(enc.encode("the")) < 3


def kept(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.suffix != ".lock"} if folder.exists() else set()


def test_the_vocabulary_goes_where_tiktoken_looks(vocabulary, tmp_path):
    for _ in range(2):
        assert is_the_small_one(load_tokenizer("gpt2"))
    assert len(vocabulary.requests) == 2 and kept(tmp_path / "tiktoken") == set(KEYS.values())


@pytest.mark.parametrize("setting", [None, ""])
def test_without_a_setting_it_goes_to_the_users_own_cache(vocabulary, tmp_path, monkeypatch, setting):
    """Never to a predictable name in a folder that all users of the machine share."""
    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path / "mine"))
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    if setting is None:
        monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    else:
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", setting)
    assert is_the_small_one(load_tokenizer("gpt2"))
    assert kept(tmp_path / "mine" / "tiktoken") == set(KEYS.values()) and not list((tmp_path / "shared").iterdir())
    if os.name == "posix":
        assert (tmp_path / "mine" / "tiktoken").stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.name != "posix", reason="modes of folders are POSIX's")
def test_a_cache_that_others_can_write_is_not_written(vocabulary, tmp_path, monkeypatch):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path / "open"))
    (tmp_path / "open" / "tiktoken").mkdir(parents=True)
    (tmp_path / "open" / "tiktoken").chmod(0o777)
    with pytest.raises(FetchError, match="can be written by other users"):
        load_tokenizer("gpt2")
    assert vocabulary.requests == [] and not kept(tmp_path / "open" / "tiktoken")


@pytest.mark.parametrize("right", [True, False])
def test_what_tiktoken_left_in_the_shared_folder_is_read_if_it_is_right(vocabulary, tmp_path, right):
    old = tmp_path / "shared" / "data-gym-cache"
    old.mkdir()
    for name, key in KEYS.items():
        body = vocabulary.files[f"/gpt-2/encodings/main/{name}"].body
        (old / key).write_bytes(body if right else body.replace(b"h", b"x"))
    assert is_the_small_one(load_tokenizer("gpt2"))
    assert len(vocabulary.requests) == (0 if right else 2) and kept(old) == set(KEYS.values())


@pytest.mark.skipif(os.name != "posix", reason="links are POSIX's")
@pytest.mark.parametrize("suffix", [".part", ".lock"])
def test_a_link_under_the_name_of_the_part_or_the_lock_is_not_followed(vocabulary, tmp_path, suffix):
    (tmp_path / "tiktoken").mkdir()
    (tmp_path / "diary").write_text("mine")
    (tmp_path / "tiktoken" / (KEYS["vocab.bpe"] + suffix)).symlink_to(tmp_path / "diary")
    with pytest.raises(FetchError, match=f"{suffix} is a link"):
        load_tokenizer("gpt2")
    assert (tmp_path / "diary").read_text() == "mine"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can become two users")
def test_a_part_of_another_user_is_not_written(server, body, path):
    server.files["/f"] = File(body)
    path.parent.mkdir()
    part = path.with_name("file.part")
    part.write_bytes(body[:1000])
    os.chown(part, 65534, 65534)
    with pytest.raises(FetchError, match="belongs to another user"):
        download(f"{server.url}/f", path, sha256=sha(body), **QUICK)
    assert part.read_bytes() == body[:1000] and not path.exists()


def test_a_vocabulary_that_is_not_the_right_one_is_refused(vocabulary, tmp_path):
    vocabulary.files["/gpt-2/encodings/main/encoder.json"] = File(b"{}")
    with pytest.raises(FetchError, match="SHA-256") as caught:
        load_tokenizer("gpt2")
    assert all(w in str(caught.value) for w in ("TIKTOKEN_CACHE_DIR", "mini", "MINIGPT_OPENAI_URL", vocabulary.url))
    assert kept(tmp_path / "tiktoken") == {KEYS["vocab.bpe"]}


def test_the_real_vocabulary_has_the_hashes_that_are_pinned(gpt2_encoding):
    cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR", "/nonexistent"))
    if not cache.is_dir():
        pytest.skip("tiktoken's cache is elsewhere")
    for name, expected in tokenizer._GPT2_FILES.items():
        address = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        assert sha((cache / hashlib.sha1(address.encode()).hexdigest()).read_bytes()) == expected
    source = Path(tiktoken.__file__).parent.parent / "tiktoken_ext" / "openai_public.py"
    assert all(expected in source.read_text() for expected in tokenizer._GPT2_FILES.values())


def test_a_folder_in_openais_layout_has_gpt2s_vocabulary_unless_it_brings_its_own(vocabulary, tmp_path):
    folder = tmp_path / "124M"
    folder.mkdir()
    (folder / "hparams.json").write_text('{"n_vocab": 50257}')
    assert is_the_small_one(load_tokenizer(folder))
    (folder / "hparams.json").write_text('{"n_vocab": 262}')
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        load_tokenizer(folder)
    for name in KEYS:
        (folder / name).write_bytes(vocabulary.files[f"/gpt-2/encodings/main/{name}"].body)
    assert load_tokenizer(folder).name == "124M" and load_tokenizer(folder).n_vocab == 262


def test_the_address_follows_the_mirror(monkeypatch):
    monkeypatch.delenv("MINIGPT_OPENAI_URL", raising=False)
    assert openai_url("a/b") == "https://openaipublic.blob.core.windows.net/gpt-2/a/b"
    monkeypatch.setenv("MINIGPT_OPENAI_URL", "http://mirror/x/")
    assert openai_url("a/b") == "http://mirror/x/a/b" and module.openai_url is openai_url
