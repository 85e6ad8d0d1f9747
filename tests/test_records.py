"""Instruction records: read, checked, cleaned, split and fetched."""

import copy
import hashlib
import json
import random
import sys
import types

import pytest
from instructions import some_records, text

from minigpt_lib.tuning.records import (
    check_records,
    clean_records,
    fetch_alpaca,
    load_records,
    read_records,
    record_key,
    record_messages,
    record_turns,
    split_records,
    with_history,
)


def test_load_records(tmp_path):
    path = tmp_path / "records.json"
    good = [{"instruction": "Say hi.", "output": "Hi."}, {"instruction": "a", "input": "b", "output": "ç", "task": "t"}]
    path.write_text(json.dumps(good, ensure_ascii=False), "utf-8")
    assert load_records(path) == good


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[{", "not JSON"),
        ("", "not JSON"),
        ("{}", "expected a list of at least one record"),
        ("[]", "expected a list of at least one record"),
        ('[{"instruction": "a", "output": "b"}, 7]', "record 2: expected an object.*int"),
        ('[{"instruction": "a", "output": "b"}, {"instruction": "a"}]', "record 2: the field 'output' is missing"),
        ('[{"output": "b"}]', "record 1: the field 'instruction' is missing; it has output"),
        ('[{"instruction": "a", "output": "  "}]', "record 1: the field 'output' must be text that is not empty"),
        ('[{"instruction": 3, "output": "b"}]', "record 1: the field 'instruction' must be text"),
        ('[{"instruction": "a", "input": 5, "output": "b"}]', "record 1: the field 'input' must be text, not 5"),
        ('[{"instruction": "a", "output": "b", "history": [["x"]]}]', "record 1: the field 'history'"),
        ('[{"instruction": "a", "output": "b", "history": 5}]', "record 1: the field 'history' must be a list"),
        ('[{"instruction": "a", "output": "b", "history": [["x", null]]}]', "'history' must be text, not None"),
        ('[{"instruction": "a", "output": "b", "history": [[" ", "y"]]}]', "the field 'history' must be text that is"),
    ],
)
def test_bad_record_files(tmp_path, content, words):
    path = tmp_path / "records.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        load_records(path)
    assert "records.json" in str(error.value)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        load_records(tmp_path / "nothing.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not JSON"):
        load_records(tmp_path / "binary.json")


def test_with_history(seed):
    records = some_records(200)
    before = copy.deepcopy(records)
    mixed = with_history(records, 0.5, seed)
    assert records == before and mixed == with_history(records, 0.5, seed)
    longer = [r for r in mixed if "history" in r]
    assert 60 < len(longer) < 140 and {len(r["history"]) for r in longer} == {1, 2}
    assert [r["output"] for r in mixed] == [r["output"] for r in records]
    assert with_history(records, 0.0) == records and len(with_history(records[:1], 1.0)) == 1
    check_records(mixed)


def chat(*said: str) -> dict:
    return {"messages": [{"role": "assistant" if n % 2 else "user", "content": t} for n, t in enumerate(said)]}


def test_jsonl_and_chats(tmp_path):
    records = [{"instruction": "a", "output": "b\u2028c"}, chat("Hi", "Hello.", "Bye", "Take care."), chat("1", "2")]
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n\n", "utf-8")
    assert load_records(path) == read_records(path) == records
    assert record_turns(records[1]) == [("Hi", "Hello.", True), ("Bye", "Take care.", True)]
    assert [m["role"] for m in record_messages(records[1])] == ["user", "assistant", "user"]
    path.write_text('{"instruction": "a", "output": "b"}\n{"instruction": ', "utf-8")
    with pytest.raises(ValueError, match=r"records\.jsonl, line 2, is not JSON"):
        load_records(path)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "'messages' must be a list of turns"),
        ("Hi", "'messages' must be a list of turns"),
        ([{"role": "user", "content": "Hi"}], "'messages' must be a list of turns"),
        ([{"role": "system", "content": "Hi"}, {"role": "user", "content": "x"}], "message 1 has role 'system'"),
        ([{"role": "user", "content": "Hi"}, {"role": "user", "content": "x"}], "message 2 has role 'user'"),
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}], "message 2 must be text, not"),
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " "}], "message 2 must be text that is"),
        (["Hi", "Hello"], "message 1 has role None"),
        ([{"role": "user"}, {"role": "assistant", "content": "x"}], "message 1 must be text, not None"),
    ],
)
def test_bad_chats(messages, words):
    with pytest.raises(ValueError, match=f"record 2: .*{words}"):
        check_records([chat("a", "b"), {"messages": messages}])


@pytest.mark.parametrize("field", ["instruction", "input", "output"])
def test_half_characters_are_named(field):
    record = {"instruction": "a", "input": "b", "output": "c"} | {field: "fine \ud83d not"}
    with pytest.raises(ValueError, match=f"record 1: the field '{field}' holds half a character"):
        check_records([record])
    check_records([record | {field: "fine \U0001f600"}])
    with pytest.raises(ValueError, match="record 1: the field 'history' holds half a character"):
        check_records([record | {field: "fine", "history": [["a", "b"], ["c", "\ud83d"]]}])


def test_nulls(tmp_path):
    check_records([{"instruction": "a", "input": None, "output": "b", "history": None}])
    assert record_turns({"instruction": "a", "input": None, "output": "b"}) == [("a", "b", True)]
    with pytest.raises(ValueError, match="record 1: the field 'output' must be text, not None"):
        check_records([{"instruction": "a", "output": None}])
    for empty in ([], None, "text", 3):
        with pytest.raises(ValueError, match="expected a list of at least one record"):
            check_records(empty)


def test_cleaning_reports_every_dropped_record(seed):
    good = some_records(random.randint(3, 9))
    for n, record in enumerate(good):
        record["instruction"] += f" {n}"  # so that none is another's duplicate
    bad = {
        "output' must be text that": {"instruction": "a", "output": ""},
        "too long: 100,001 characters, the limit is 10,000": {"instruction": "a", "output": "x" * 100_000},
        "not NoneType": None,
        "'instruction' is missing": {"output": "a"},
        "half a character": {"instruction": "\udc00", "output": "a"},
        "must be text, not 7": {"instruction": "a", "output": 7},
        "'history' must be a list of pairs": {"instruction": "a", "output": "b", "history": True},
        "duplicate of record 1": {**good[0], "output": f" {good[0]['output']} \n", "task": "other fields do not count"},
    }
    mixed = [good[0], *random.sample([*good[1:], *bad.values()], len(good) - 1 + len(bad))]
    kept, dropped = clean_records(mixed)
    assert kept == [r for r in mixed if r in good] and len(dropped) == len(bad)
    for number, reason in dropped:
        words = next(words for words, record in bad.items() if record is mixed[number - 1])
        assert words in reason
    assert clean_records(good) == (good, []) and clean_records([]) == ([], [])
    check_records(kept)


def test_the_split_depends_on_each_record_alone(seed):
    records = [{"instruction": f"{text()} {n}", "output": text()} for n in range(600)]
    train, val = split_records(records, 0.2)
    assert sorted(map(record_key, train + val)) == sorted(map(record_key, records)) and 60 < len(val) < 190
    shuffled = random.sample(records, 300)
    part_train, part_val = split_records(shuffled, 0.2)
    assert all(r in val for r in part_val) and all(r in train for r in part_train)
    assert split_records(records, 0.0)[1] == [] and split_records(records, 1.0)[0] == []
    as_chat = chat(records[0]["instruction"], records[0]["output"])
    assert record_key(as_chat) == record_key(records[0]) != record_key(records[1])


@pytest.fixture
def hub(monkeypatch):
    """huggingface_hub with a download that writes `hub.content` and counts."""
    fake = types.SimpleNamespace(content=b"[]", calls=0)

    def hf_hub_download(repo, name, *, repo_type, revision, local_dir):
        assert repo_type == "dataset"
        fake.calls += 1
        local_dir.mkdir(parents=True, exist_ok=True)
        (local_dir / name).write_bytes(fake.content)

    fake.hf_hub_download = hf_hub_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


def test_alpaca_is_fetched_once_and_checked(hub, tmp_path):
    hub.content = json.dumps(some_records(3)).encode()
    path = fetch_alpaca(tmp_path / "a")
    assert path.read_bytes() == hub.content and fetch_alpaca(tmp_path / "a") == path and hub.calls == 1
    digest = hashlib.sha256(hub.content).hexdigest()
    assert (tmp_path / "a" / "alpaca.sha256").read_text().strip() == digest
    assert fetch_alpaca(tmp_path / "b", sha256=digest.upper()).is_file()
    path.write_bytes(hub.content + b" ")  # another file than the one that was trusted
    with pytest.raises(ValueError, match=f"expected {digest}: it was removed"):
        fetch_alpaca(tmp_path / "a")
    assert not path.exists() and fetch_alpaca(tmp_path / "a") == path
    with pytest.raises(ValueError, match=f"has SHA-256 {digest}, expected 00"):
        fetch_alpaca(tmp_path / "c", sha256="00" * 32)
    assert not list((tmp_path / "c").glob("*.json"))


def test_alpaca_without_the_hub_library(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"minigpt-lib\[course\]"):
        fetch_alpaca(tmp_path)
