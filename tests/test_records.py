"""Instruction records: read, checked, cleaned, split and fetched."""

import copy
import hashlib
import json
import random
import sys
import types

import pytest
from instructions import some_records, text

from minigpt_lib.tuning.batching import encode_record
from minigpt_lib.tuning.chat_template import build_prompt
from minigpt_lib.tuning.cleaning import (
    as_record,
    clean_records,
    fetch_alpaca,
    load_records,
    read_records,
    read_utf8,
    record_key,
    split_records,
    unused_keys,
)
from minigpt_lib.tuning.records import check_records, record_messages, record_turns, with_history


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
    (tmp_path / "binary.json").write_bytes(b"\x7fELF\x02\x01")
    with pytest.raises(ValueError, match="not JSON"):
        load_records(tmp_path / "binary.json")


# --- text comes in one way

SAID = [{"instruction": "Grüße 日本", "output": "é\nß"}, {"instruction": "Say 🙂.", "output": "ok"}]


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["records.json", "records.jsonl"])
def test_utf8_with_or_without_a_mark_and_either_line_end(tmp_path, codec, end, name):
    lines = [json.dumps(r, ensure_ascii=False) for r in SAID]
    text = end.join(lines) + end if name.endswith("l") else f"[{end}{f',{end}'.join(lines)}{end}]"
    (tmp_path / name).write_bytes(text.encode(codec))
    assert load_records(tmp_path / name) == SAID


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf16_is_named(tmp_path, codec):
    path = tmp_path / "records.json"
    path.write_bytes(json.dumps(SAID).encode(codec))
    with pytest.raises(ValueError, match=r"records\.json is UTF-16 or UTF-32, not UTF-8"):
        load_records(path)


def test_a_bad_byte_is_named_with_its_place(tmp_path, seed):
    lines = [json.dumps({"instruction": text(), "output": text()}).encode() for _ in range(9)]
    at, byte = random.randrange(9), random.choice([0x80, 0xE9, 0xFF])
    place = random.randint(1, len(lines[at]) - 1)
    lines[at] = lines[at][:place] + bytes([byte]) + lines[at][place:]
    for end in (b"\n", b"\r\n"):
        (tmp_path / "r.jsonl").write_bytes(end.join(lines))
        with pytest.raises(ValueError, match=rf"r\.jsonl, line {at + 1}, byte {place + 1}: 0x{byte:02x} is not UTF-8"):
            load_records(tmp_path / "r.jsonl")


def test_line_ends_inside_a_text_are_one_character(enc):
    """What a person typed under Windows is learnt, and asked, as the same tokens."""
    records = [{"instruction": f"Sort:{end}a{end}b", "output": f"a{end}b"} for end in ("\n", "\r\n")]
    assert encode_record(enc, records[0]) == encode_record(enc, records[1])
    assert build_prompt(records[0]["instruction"]) == build_prompt(records[1]["instruction"])


# --- schemas


def test_sharegpt_and_prompt_completion_say_the_same_as_messages(tmp_path):
    talk = chat("Hi", "Hello.", "Bye", "Take care.")
    share = {"conversations": [{"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]}
                               for m in talk["messages"]]}  # fmt: skip
    pair = {"prompt": "Bye", "completion": " Take care."}
    long = {"prompt": talk["messages"][:3], "completion": talk["messages"][3:]}
    (tmp_path / "r.json").write_text(json.dumps([share | {"id": "7"}, pair, long, talk]))
    turns = [record_turns(record) for record in load_records(tmp_path / "r.json")]
    assert turns[0] == turns[3] == [("Hi", "Hello.", True), ("Bye", "Take care.", True)]
    assert [(q, r.strip(), learnt) for q, r, learnt in turns[1]] == [("Bye", "Take care.", True)]
    assert turns[2] == [("Hi", "Hello.", False), ("Bye", "Take care.", True)]
    assert share["conversations"][0] == {"from": "human", "value": "Hi"}, "the caller's record was changed"


def test_foreign_schemas_keep_what_they_are(enc):
    plain = {"instruction": "a", "output": "b", "prompt": "kept", "completion": "kept"}
    assert as_record(plain) is plain and as_record("text") == "text" and as_record(None) is None
    share = {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}
    assert record_turns(as_record(share)) == [("a", "b", True)]
    assert encode_record(enc, as_record({"prompt": "a", "completion": " b"})) == encode_record(
        enc, {"instruction": "a", "output": "b"}
    )


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"conversations": "Hi"}, "'messages' must be a list of turns"),
        ({"conversations": [{"from": "human", "value": "a"}] * 2}, "message 2 has role 'user'"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "tool", "value": "b"}]}, "has role 'tool'"),
        ({"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "b"}]}, "message 1 must be text"),
        ({"prompt": "a"}, "'instruction' is missing; it has prompt"),
        ({"prompt": ["a"], "completion": "b"}, "'instruction' must be text"),
    ],
)
def test_bad_records_of_other_schemas(tmp_path, record, words):
    (tmp_path / "r.json").write_text(json.dumps([SAID[1], record]))
    with pytest.raises(ValueError, match=f"record 2: .*{words}"):
        load_records(tmp_path / "r.json")


SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [*SYSTEM, {"role": "assistant", "content": "b"}]},
        {"messages": SYSTEM},
        {"conversations": [{"from": who, "value": "x"} for who in ("system", "human", "gpt")]},
    ],
)
def test_a_system_turn_is_refused_by_name(tmp_path, record):
    (tmp_path / "r.json").write_text(json.dumps([record]))
    with pytest.raises(ValueError, match="message 1 has role 'system'.*no system turn: put its text"):
        load_records(tmp_path / "r.json")


def test_keys_that_are_not_used_are_named_once(tmp_path):
    talk = chat("Hi", "Hello.", "Bye", "Take care.")
    for message in talk["messages"]:
        message["tool_calls"] = []
    records = [SAID[0] | {"system": "x", "task": "t"}, SAID[1] | {"system": "y"}, talk | {"id": 1}]
    assert unused_keys(records) == {"messages: tool_calls": 4, "system": 2}
    (tmp_path / "r.json").write_text(json.dumps(records))
    with pytest.warns(UserWarning, match=r"not used: 'messages: tool_calls' \(4 times\), 'system' \(2 times\)") as seen:
        load_records(tmp_path / "r.json")
    assert len(seen) == 1


def test_no_key_of_our_own_schemas_is_called_unused(tmp_path, recwarn):
    talk = chat("a", "b")
    talk["messages"][1]["weight"] = 1
    records = [SAID[0] | {"input": "", "history": [["a", "b"]]}, talk, {"prompt": "a", "completion": "b"}]
    (tmp_path / "r.json").write_text(json.dumps(records))
    load_records(tmp_path / "r.json")
    assert not recwarn.list


def test_weight_0_is_read_and_not_learnt(enc):
    talk = chat("a", "b", "c", "d", "e", "f")
    talk["messages"][1]["weight"] = 0
    assert [learnt for *_, learnt in record_turns(talk)] == [False, True, True]
    ids, labels = encode_record(enc, talk)
    assert ids == encode_record(enc, chat("a", "b", "c", "d", "e", "f"))[0]
    assert enc.decode([i for i in labels if i != -100]) == " d<|endoftext|> f<|endoftext|>"
    talk["messages"][5]["weight"] = 0
    assert [(q, r) for q, r, _ in record_turns(talk)] == [("a", "b"), ("c", "d")], "after the last reply learnt"


@pytest.mark.parametrize(("weights", "words"), [((0, 0), "every weight is 0"), ((1, 0.5), "message 4 has weight 0.5")])
def test_bad_weights(weights, words):
    talk = chat("a", "b", "c", "d")
    talk["messages"][1]["weight"], talk["messages"][3]["weight"] = weights
    with pytest.raises(ValueError, match=f"record 1: .*{words}"):
        check_records([talk])


def test_read_utf8(tmp_path):
    (tmp_path / "t").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert read_utf8(tmp_path / "t") == "a\nb\rc\n"


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
