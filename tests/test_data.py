"""The data of the small written world: it can be rebuilt, it is clean, and the groups hold."""

import csv
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[1] / "data"
SEPARATOR = "<|endoftext|>"
SPLITS = ("train", "val", "test")
OUTPUTS = [
    "corpus/train.txt",
    "corpus/heldout.txt",
    "corpus/practice.txt",
    "instructions/train.json",
    "instructions/val.json",
    "instructions/test.json",
    "facts.json",
]


def compose(out: Path, seed: int) -> dict[str, str]:
    """Run the composer and return the digest of each file it writes."""
    command = [sys.executable, DATA / "compose.py", "--seed", str(seed), "--out", out]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return digests(out)


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of each composed file in a folder."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in OUTPUTS}


def read(name: str) -> str:
    """Return a text file of the data folder, with its line ends as they are."""
    return (DATA / name).read_bytes().decode("utf-8")


@cache
def facts() -> list[dict[str, str]]:
    """Return the fact list."""
    return json.loads(read("facts.json"))


def group(name: str) -> list[dict[str, str]]:
    """Return the facts of a group."""
    return [fact for fact in facts() if fact["group"] == name]


@cache
def split(name: str) -> list[dict[str, str]]:
    """Return the records of a split."""
    return json.loads(read(f"instructions/{name}.json"))


@cache
def records() -> list[dict[str, str]]:
    """Return all records."""
    return [record for name in SPLITS for record in split(name)]


@cache
def corpus(name: str) -> str:
    """Return a corpus text."""
    return read(f"corpus/{name}.txt")


def sentences(text: str) -> list[str]:
    """Return the different sentences of a text in lower case, roughly split."""
    parts = re.split(r"\n|(?<=[.?!])[\"']?\s+", text.lower())
    return [part for part in dict.fromkeys(parts) if part.strip()]


@cache
def corpus_index() -> dict[str, list[str]]:
    """Return the sentences of all corpus texts by the words they have."""
    return index(sentences(corpus("train") + corpus("heldout") + corpus("practice")))


@cache
def record_index() -> dict[str, list[str]]:
    """Return the sentences of all records by the words they have."""
    return index(sentences("\n".join(part for record in records() for part in texts_of(record))))


def texts_of(record: dict) -> list[str]:
    """Return all texts of a record, the turns before it included."""
    before = [text for turn in record.get("history", []) for text in turn]
    return [*before, record["instruction"], record["input"], record["output"]]


def index(items: list[str]) -> dict[str, list[str]]:
    """Return the items by the words they have."""
    words: dict[str, list[str]] = {}
    for item in items:
        for word in dict.fromkeys(re.findall(r"\w+", item)):
            words.setdefault(word, []).append(item)
    return words


def said(fact: dict[str, str], sentence_index: dict[str, list[str]]) -> list[str]:
    """Return the sentences that have both the subject and the answer of a fact."""
    subject, answer = fact["subject"].lower(), fact["answer"].lower()
    if fact["relation"] == "sum":
        first, second = subject.split(" plus ")
        forms = [f"{first} plus {second}", f"{second} plus {first}", f"{first} and {second}"]
        pattern = rf"\b({'|'.join(forms)})\b"
    else:
        pattern = rf"\b{re.escape(subject)}\b"
    near = sentence_index.get(re.findall(r"\w+", answer)[0], [])
    found = [item for item in near if re.search(rf"\b{re.escape(answer)}\b", item)]
    return [item for item in found if re.search(pattern, item)]


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory) -> dict[str, str]:
    """Compose with the committed seed into a new folder."""
    return compose(tmp_path_factory.mktemp("same"), seed=0)


def test_same_seed_gives_the_committed_bytes(rebuilt):
    assert rebuilt == digests(DATA)


def test_another_seed_gives_other_bytes(rebuilt, tmp_path):
    other = compose(tmp_path, seed=1)
    assert [name for name in OUTPUTS if other[name] == rebuilt[name]] == []


def test_line_ends_and_total_size():
    blobs = [(DATA / name).read_bytes() for name in OUTPUTS]
    assert not any(b"\r" in blob for blob in blobs)
    assert sum(map(len, blobs)) < 8_000_000


def test_train_text_size_and_separator():
    text = corpus("train")
    assert 4_000_000 <= len(text.encode()) <= 5_000_000
    assert text.endswith(f"\n{SEPARATOR}\n")
    assert text.count(SEPARATOR) == text.count(f"\n{SEPARATOR}\n") > 5_000
    assert "User:" not in text and "Assistant:" not in text


def test_heldout_documents_are_not_in_train():
    text = corpus("heldout")
    assert 150_000 <= len(text.encode()) <= 250_000
    train = set(corpus("train").split(f"\n{SEPARATOR}\n"))
    held = text.split(f"\n{SEPARATOR}\n")[:-1]
    assert len(held) > 100
    assert [document for document in held if document in train] == []


def test_passages_are_used_and_some_are_held_out():
    parts = []
    for path in sorted((DATA / "passages").glob("*.txt")):
        parts += re.split(r"^## .*\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert len(parts) >= 150
    longest = [max((line.strip() for line in part.splitlines()), key=len) for part in parts]
    in_train = [line in corpus("train") for line in longest]
    in_heldout = [line in corpus("heldout") for line in longest]
    assert all(a != b for a, b in zip(in_train, in_heldout, strict=True))
    assert 0.05 <= sum(in_heldout) / len(parts) <= 0.12


def test_tables_have_one_answer_for_each_subject():
    total = 0
    for path in sorted((DATA / "facts").glob("*.csv")):
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        subjects = [row["subject"] for row in rows]
        assert len(subjects) == len(set(subjects)), path.name
        assert all(1 <= len(row["answer"].split()) <= 3 for row in rows), path.name
        total += len(rows)
    assert total == len(facts()) >= 900


def test_fact_list_schema():
    keys = {"id", "relation", "subject", "answer", "group", "prompt", "question", "reply"}
    assert all(set(fact) == keys for fact in facts())
    assert len({fact["id"] for fact in facts()}) == len(facts())
    assert len({fact["prompt"] for fact in facts()}) == len(facts())
    assert len({fact["question"] for fact in facts()}) == len(facts())
    assert all(fact["reply"] == f"{fact['prompt']} {fact['answer']}." for fact in facts())
    assert all(fact["question"].endswith("?") for fact in facts())


def test_group_sizes():
    counts = Counter(fact["group"] for fact in facts())
    assert set(counts) == {"tuned", "pretrained", "absent"}
    assert counts["tuned"] >= 400 and counts["pretrained"] >= 200 and counts["absent"] >= 60
    assert len({fact["relation"] for fact in facts()}) >= 12


def test_known_facts_are_in_the_training_text():
    missing = [f["id"] for f in group("tuned") + group("pretrained") if f["reply"] not in corpus("train")]
    assert missing == []


def test_known_facts_are_frequent():
    """Each known fact is said in at least 25 sentences; counted with repeats."""
    counts = Counter(re.split(r"\n|(?<=[.?!])[\"']?\s+", corpus("train").lower()))
    lookup = index(sentences(corpus("train")))
    plurals = plural_forms()
    few = {}
    for fact in group("tuned") + group("pretrained"):
        forms = [fact, *({**fact, **more} for more in plurals.get(fact["id"], []))]
        found = dict.fromkeys(item for form in forms for item in said(form, lookup))
        total = sum(counts[item] for item in found)
        if total < 25:
            few[fact["id"]] = total
    assert few == {}


def plural_forms() -> dict[str, list[dict[str, str]]]:
    """Return for each fact its subject and answer in the plural, where the table has one."""
    forms = {}
    for path in sorted((DATA / "facts").glob("*.csv")):
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                name = f"{path.stem}/{row['subject'].lower().replace(' ', '-')}"
                subjects = [row["subject"], row.get("plural") or row["subject"]]
                answers = [row["answer"], row.get("answer_plural") or row["answer"]]
                forms[name] = [{"subject": s, "answer": a} for s in subjects for a in answers]
    return forms


def test_facts_often_end_with_the_answer():
    """At least five lines or sentences of the training text end with subject, then answer."""
    ends = Counter(re.split(r"\n|(?<=[.?!])[\"']?\s+", corpus("train")))
    few = [f["id"] for f in group("tuned") + group("pretrained") if ends_with(f, ends) < 5]
    assert few == []


def ends_with(fact: dict[str, str], ends: Counter) -> int:
    """Count the canonical sentence and its frames ("Did you know that ...")."""
    reply = fact["reply"]
    inner = reply[0].lower() + reply[1:]
    if not hasattr(ends_with, "lookup"):
        ends_with.lookup = {}
        for item, count in ends.items():
            last = re.findall(r"\w+", item)[-1:] or [""]
            ends_with.lookup.setdefault(last[0], []).append((item, count))
    near = ends_with.lookup.get(re.findall(r"\w+", fact["answer"])[-1], [])
    subject = fact["subject"].split(" plus ")[0]
    shape = re.compile(rf"\b{re.escape(subject)}.*\b{re.escape(fact['answer'])}\W*$", re.IGNORECASE)
    return sum(c for item, c in near if reply in item or inner in item or shape.search(item))


def test_prompts_have_one_continuation():
    """Where the training text has a canonical prompt, the answer follows."""
    text, wrong = corpus("train"), []
    for fact in group("tuned") + group("pretrained"):
        start = text.find(fact["prompt"] + " ")
        while start >= 0:
            rest = text[start + len(fact["prompt"]) :][: len(fact["answer"]) + 1]
            if rest != f" {fact['answer']}" and not text[start - 1].isalnum():
                wrong.append((fact["prompt"], rest))
            start = text.find(fact["prompt"] + " ", start + 1)
    assert wrong == []


def test_absent_facts_are_nowhere():
    found = {f["id"]: (said(f, corpus_index()) + said(f, record_index()))[:1] for f in group("absent")}
    assert {key: value for key, value in found.items() if value} == {}
    texts = [corpus(name) for name in ("train", "heldout", "practice")]
    everything = "\n".join(texts + [record["output"] for record in records()])
    assert [f["id"] for f in group("absent") if f["reply"] in everything] == []


def test_pretrained_facts_are_in_no_record():
    found = {f["id"]: said(f, record_index())[:1] for f in group("pretrained")}
    assert {key: value for key, value in found.items() if value} == {}
    asked = {text for record in records() for text in texts_of(record)}
    untuned = group("pretrained") + group("absent")
    assert [f["id"] for f in untuned if f["question"] in asked or f["prompt"] in asked] == []
    ids = {record.get("fact") for record in records()}
    assert [f["id"] for f in untuned if f["id"] in ids] == []


def test_tuned_facts_are_asked_in_train():
    asked = {record.get("fact") for record in split("train")}
    assert [fact["id"] for fact in group("tuned") if fact["id"] not in asked] == []


def test_record_schema():
    ids = {fact["id"] for fact in facts()}
    for record in records():
        assert set(record) - {"fact", "history"} == {"instruction", "input", "output", "task"}
        assert all(isinstance(value, str) for key, value in record.items() if key != "history")
        assert all(len(turn) == 2 and all(map(str.strip, turn)) for turn in record.get("history", []))
        assert record["instruction"].strip() and record["output"].strip()
        assert record.get("fact") is None or record["fact"] in ids
        assert not re.search(r"[{}\[\]|]|  ", record["instruction"] + record["output"])


def test_records_are_unique_over_all_splits():
    pairs = Counter(tuple(texts_of(record)[:-1]) for record in records())
    assert [pair for pair, count in pairs.items() if count > 1] == []


def test_record_counts():
    assert len(records()) >= 2_000
    for name, share in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
        assert abs(len(split(name)) / len(records()) - share) < 0.03
    assert sum(bool(record["input"]) for record in records()) >= 0.2 * len(records())


def test_record_tasks():
    tasks = Counter(record["task"] for record in records())
    assert len(tasks) >= 14
    assert min(tasks.values()) >= 10
    for name in SPLITS:
        assert {record["task"] for record in split(name)} == set(tasks)


def test_outputs_are_short():
    lengths = sorted(len(record["output"].split()) for record in records())
    assert lengths[len(lengths) // 2] < 20
    assert lengths[-1] < 90


def test_no_leftovers_of_templates():
    """Braces, choice marks, doubled spaces and wrong articles do not occur in the corpus."""
    text = corpus("train").replace(SEPARATOR, "")
    assert re.findall(r"[{}\[\]|]", text) == []
    marks = {
        "two spaces": r"\w  +\w",
        "a for an": r"\ba (?:apple|egg|owl|ant|old|animal|elephant|hour|umbrella|insect|onion)\b",
        "an for a": r"\ban (?:dog|hen|bird|mammal|unicorn|uniform|bus|horse|fruit|tree)\b",
        "two stops": r"[a-z][.?!][\"']?\.(?!\.)",
    }
    assert {name: found for name, mark in marks.items() if (found := re.findall(mark, text)[:3])} == {}
