"""The exercises: stubs are open, known mistakes named as themselves, solutions right; and the ways of the workbook."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import workbook  # noqa: E402

from exercises.checking import (  # noqa: E402
    Open,
    Wrong,
    compare,
    course,
    defined_by,
    exercises,
    find,
    mistaken,
    solution,
    verdict,
)

NAMES = list(exercises())
MISTAKES = [(name, i) for name in NAMES for i in range(len(exercises()[name].mistakes))]


@pytest.mark.parametrize("name", NAMES)
def test_an_exercise_says_all_that_a_learner_needs(name):
    exercise = exercises()[name]
    assert re.fullmatch(r"0\d\.\w+", name) and 1 <= exercise.level <= 3 and 1 <= exercise.minutes <= 45
    assert len(exercise.mistakes) >= 3 and exercise.hints and exercise.title and exercise.against
    node = find(solution(name), exercise.target)
    assert isinstance(node, ast.FunctionDef)


@pytest.mark.parametrize("name", NAMES)
def test_a_stub_is_open_and_says_whose_turn_it_is(name, seed):
    exercise = exercises()[name]
    source = workbook.emptied(solution(name), [exercise], workbook.stub)
    with pytest.raises(Open, match=f"{re.escape(name)}  is still open.*waits for you"):
        verdict(name, defined_by(source, exercise), seed)


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_is_right_whatever_the_inputs(name, seed):
    for i in range(20):
        assert "✓" in verdict(name, course(name), seed + i)


@pytest.mark.parametrize(("name", "number"), MISTAKES)
def test_a_known_mistake_is_named_as_itself(name, number, seed):
    exercise = exercises()[name]
    mistake = exercise.mistakes[number]
    for i in range(5):
        with pytest.raises(Wrong) as said:
            verdict(name, mistaken(exercise, mistake), seed + i)
        assert mistake.says in str(said.value), str(said.value)


def test_an_unknown_mistake_gets_the_first_place_that_differs(seed):
    exercise = exercises()["02.one_head"]
    source = solution("02.one_head").replace("@ v  #", "@ v * 1.5  #")
    with pytest.raises(Wrong, match=r"02\.one_head  \[0, 0\] is \S+, expected \S+\.  \(against torch's"):
        verdict("02.one_head", defined_by(source, exercise), seed)


def test_an_exception_shows_the_learners_own_line_first(seed):
    exercise = exercises()["02.one_head"]
    with pytest.raises(Wrong, match="RuntimeError: "):
        verdict("02.one_head", defined_by(solution("02.one_head").replace("k.T", "k"), exercise), seed)


@pytest.mark.parametrize(
    ("yours", "expected", "says"),
    [
        (1.0, 1.0, ""),
        (1.0, 1.1, "the result is 1, expected 1.1"),
        ([1, 2], [1, 2, 3], "length is 2, expected 3"),
        ({"a": 1}, {"a": 1, "b": 2}, "['b'] is missing"),
        (float("nan"), 1.0, "the result is nan"),
        ("Oslo", "Paris", "the result is 'Oslo', expected 'Paris'"),
        (True, 1, "the result is True, expected 1"),
        ([1, 2, 3], [1, 2, 3], ""),
    ],
)
def test_comparing_names_the_first_place(yours, expected, says):
    largest, first = compare(yours, expected, 1e-5)
    assert (first == "") == (says == "") and says in first and (largest == 0) == (says == "")


# --- the workbook


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    workbook.write(tmp_path / "workbook")
    return tmp_path / "workbook"


def cells(folder: Path, lesson: str) -> tuple[Path, dict]:
    path = folder / workbook.lesson_path(lesson).name
    return path, json.loads(path.read_text("utf-8"))


def answer(folder: Path, name: str, source: str) -> None:
    """Write an answer into the workbook, as a learner does."""
    path, notebook = cells(folder, exercises()[name].lesson)
    code, target = [c for c in notebook["cells"] if c["cell_type"] == "code"], exercises()[name].target
    (own,) = [c for c in code if find("".join(c["source"]), target)]
    own["source"] = source.splitlines(True)
    path.write_text(json.dumps(notebook))


def test_the_workbook_holds_stubs_checks_and_folded_solutions(folder):
    for name, exercise in exercises().items():
        _, notebook = cells(folder, exercise.lesson)
        text = ["".join(c["source"]) for c in notebook["cells"]]
        assert sum(f'raise NotImplementedError("Exercise {name} waits for you' in t for t in text) == 1
        assert sum(t.startswith(f'check("{name}", ') for t in text) == 1
        assert any("<summary>Solution</summary>" in t and solution(name).strip() in t for t in text)
        assert not any(c.get("outputs") for c in notebook["cells"])
        ids = [c["id"] for c in notebook["cells"]]
        assert len(set(ids)) == len(ids)


def test_the_cells_are_nbgraders(folder):
    """Schema 3: unique ids, one solution cell or one graded cell with points each."""
    for lesson in {e.lesson for e in exercises().values()}:
        _, notebook = cells(folder, lesson)
        graded = [c["metadata"]["nbgrader"] for c in notebook["cells"] if "nbgrader" in c["metadata"]]
        assert len({g["grade_id"] for g in graded}) == len(graded) > 0
        for g in graded:
            assert g["schema_version"] == 3 and re.fullmatch(r"[\w-]+", g["grade_id"]) and not g["task"]
            assert (g["solution"], g["grade"], g["locked"]) in ((True, False, False), (False, True, True))
            assert g["solution"] or g["points"] >= 1


def test_written_again_nothing_of_the_learners_is_lost(folder, capsys):
    before = {p.name: p.read_text("utf-8") for p in folder.glob("*.ipynb")}
    workbook.write(folder)
    assert {p.name: p.read_text("utf-8") for p in folder.glob("*.ipynb")} == before
    answer(folder, "02.one_head", solution("02.one_head") + "  # mine")
    path, notebook = cells(folder, "02")
    own = {"cell_type": "markdown", "id": "aaaa", "metadata": {}, "source": ["my note"]}
    notebook["cells"].insert(4, own)
    behind = notebook["cells"][3]["id"]
    path.write_text(json.dumps(notebook))
    workbook.write(folder)
    _, again = cells(folder, "02")
    text = ["".join(c["source"]) for c in again["cells"]]
    assert any(t.endswith("# mine") for t in text) and text.count("my note") == 1
    assert again["cells"][text.index("my note") - 1]["id"] == behind


def test_what_is_new_in_the_course_comes_in_and_a_conflict_is_named(folder, capsys, monkeypatch):
    mine = solution("02.one_head") + "  # mine"
    answer(folder, "02.one_head", mine)
    make = workbook.workbook_of

    def changed(lesson, *args):
        notebook = make(lesson, *args)
        for c in notebook["cells"]:
            source = "".join(c["source"])
            if lesson == "02" and ("def one_head" in source or source.startswith("# 2 ")) and "Solution" not in source:
                c["source"] = [source + "\n# new"]
                c["metadata"]["minigpt"]["digest"] = workbook.digest(source + "\n# new")
        return notebook

    monkeypatch.setattr(workbook, "workbook_of", changed)
    capsys.readouterr()
    workbook.write(folder)
    _, notebook = cells(folder, "02")
    text = ["".join(c["source"]) for c in notebook["cells"]]
    assert text[0].endswith("# new") and mine in text
    assert "the course changed this cell too, yours stays: def one_head" in capsys.readouterr().out


def test_progress_tells_done_wrong_and_open(folder, capsys):
    answer(folder, "02.one_head", solution("02.one_head"))
    wrong = exercises()["02.causal_mask"].mistakes[0]
    answer(folder, "02.causal_mask", solution("02.causal_mask").replace(wrong.old, wrong.new))
    answer(folder, "03.gelu", "def gelu_v1(x):\n    return undefined")
    capsys.readouterr()
    states = workbook.progress(folder)
    told = capsys.readouterr().out
    assert states["02.one_head"] == "done" and states["02.causal_mask"] == states["03.gelu"] == "wrong"
    assert [n for n, state in states.items() if state != "open"] == ["02.one_head", "02.causal_mask", "03.gelu"]
    assert wrong.says in told and "NameError" in told and f"1 of {len(states)} done" in told


@pytest.mark.slow
def test_mine_is_a_library_of_the_right_answers(folder, capsys):
    said, mine = '"""x (B, T, C) -> q, k and v', '"""Mine: x (B, T, C) -> q, k and v'
    answer(folder, "02.split_heads", solution("02.split_heads").replace(said, mine))
    target = workbook.mine(folder)
    told = capsys.readouterr().out
    assert "yours   02.split_heads" in told and "course  02.causal_mask" in told
    assert "Mine: x (B, T, C)" in (target / "minigpt_lib" / "model" / "attention.py").read_text("utf-8")
    code = "from minigpt_lib import LLM; print(LLM.load('mini').generate('The capital of Norway is', temperature=0))"
    env = {"PYTHONPATH": str(target), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=target, env=env, capture_output=True, text=True, timeout=300
    )
    assert "Oslo" in done.stdout, done.stderr
