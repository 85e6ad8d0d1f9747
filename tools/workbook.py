"""The workbook: the lessons with their exercises emptied, and what becomes of the answers.

    python tools/workbook.py write        # workbook/: a notebook for each lesson; work in it is never overwritten
    python tools/workbook.py progress     # what is done, wrong and open
    python tools/workbook.py mine         # workbook/mine/: a library of the learner's answers, where they are right
    python tools/workbook.py source DIR   # the lessons with nbgrader's solution marks, for a teacher

The cells carry nbgrader's metadata (schema 3), so that a workbook can be released, collected and graded with it.
"""

import argparse
import ast
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from exercises.checking import (  # noqa: E402
    LESSONS,
    WAITS,
    Exercise,
    Open,
    Said,
    defined_by,
    exercises,
    find,
    lesson_path,
    solution,
    verdict,
)

WORKBOOK = ROOT / "workbook"
HOW = """**A workbook.** This is the lesson with its central pieces left for you. Where a cell says
`raise NotImplementedError`, write the body; the next cell checks it and says what it sees. Hints stand folded above it,
a solution below. To go on without writing one, use the course's: `{target} = course("{name}")`. Your work is never
overwritten: after an update of the course, `make workbook` brings in what is new and leaves what you changed."""
SETUP = 'import sys\n\nsys.path.insert(0, "..")  # the course\'s folder\n\nfrom exercises import check, course'

Cell = dict[str, Any]


def digest(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def cell(kind: str, origin: str, source: str, **nbgrader: Any) -> Cell:
    """A notebook cell that remembers where it comes from and what it said then."""
    metadata: dict[str, Any] = {"minigpt": {"origin": origin, "digest": digest(source)}}
    if nbgrader:
        metadata["nbgrader"] = {"grade": False, "locked": False, "schema_version": 3, "solution": False, "task": False}
        metadata["nbgrader"] |= nbgrader
    made = {"cell_type": kind, "id": digest(origin)[:8], "metadata": metadata, "source": source.splitlines(True)}
    return made | ({"execution_count": None, "outputs": []} if kind == "code" else {})


# --- emptying


def body_lines(node: ast.FunctionDef | ast.ClassDef) -> tuple[int, int]:
    """The first and last line of a definition's body, without its docstring."""
    assert isinstance(node, ast.FunctionDef)
    documented = isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
    rest = node.body[1:] if documented else node.body
    return rest[0].lineno, node.end_lineno or rest[-1].lineno


def emptied(source: str, wanted: list[Exercise], body: Callable[[Exercise, list[str], str], list[str]]) -> str:
    """A cell's source with the body of each exercise's function replaced by what `body` makes of it."""
    lines = source.split("\n")
    for exercise in sorted(wanted, key=lambda e: -find(source, e.target).lineno):  # type: ignore[union-attr]
        node = find(source, exercise.target)
        assert node is not None
        first, last = body_lines(node)
        indent = " " * (node.col_offset + 4)
        lines[first - 1 : last] = body(exercise, lines[first - 1 : last], indent)
    return "\n".join(lines)


def stub(exercise: Exercise, lines: list[str], indent: str) -> list[str]:
    """What stands in the place of a solution: the error that says whose turn it is."""
    return [f'{indent}raise NotImplementedError("{WAITS.format(exercise.name)}: {exercise.title}")']


def marked(exercise: Exercise, lines: list[str], indent: str) -> list[str]:
    """A solution between nbgrader's marks."""
    return [f"{indent}### BEGIN SOLUTION", *lines, f"{indent}### END SOLUTION"]


# --- writing


def exercise_cells(source: str, wanted: list[Exercise], origin: str, body: Callable[..., list[str]]) -> list[Cell]:
    """The cells of the workbook for a cell of the lesson that holds exercises."""
    made = [
        cell(
            "markdown",
            f"{e.name} text",
            f"**Exercise {e.name} · {e.title} · {'●' * e.level}{'○' * (3 - e.level)} · {e.minutes} minutes.**"
            + "".join(
                f"\n\n<details><summary>{'Hint' if i == 0 else 'Another hint'}</summary>\n\n{hint}\n\n</details>"
                for i, hint in enumerate(e.hints)
            ),
        )
        for e in wanted
    ]
    grade_id = wanted[0].name.replace(".", "-")
    made.append(cell("code", origin, emptied(source, wanted, body), grade_id=grade_id, solution=True))
    for e in wanted:
        test = f'check("{e.name}", {e.target.split(".")[0]})'
        grading = {"grade_id": f"{e.name.replace('.', '-')}-check", "grade": True, "locked": True, "points": e.level}
        made.append(cell("code", f"{e.name} check", test, **grading))
    folded = f"<details><summary>Solution</summary>\n\n```python\n{source}\n```\n\n</details>"
    return [*made, cell("markdown", f"{wanted[0].name} solution", folded)]


def workbook_of(lesson: str, body: Callable[..., list[str]] = stub) -> dict[str, Any]:
    """A lesson's notebook with its exercises emptied, checks beside them, and no outputs."""
    notebook = json.loads(lesson_path(lesson).read_text("utf-8"))
    own = [e for e in exercises().values() if e.lesson == lesson]
    cells = []
    for i, old in enumerate(notebook["cells"]):
        source = "".join(old["source"]).replace("](images/", "](../notebooks/images/")
        wanted = [e for e in own if old["cell_type"] == "code" and find(source, e.target)]
        if wanted:
            cells += exercise_cells(source, wanted, old["id"], body)
        else:
            cells.append(cell(old["cell_type"], old["id"], source))
        if i == 0 and own:
            text = HOW.format(target=own[0].target.split(".")[0], name=own[0].name)
            cells += [cell("markdown", "how", text), cell("code", "setup", SETUP)]
    metadata = {"kernelspec": notebook["metadata"].get("kernelspec", {}), "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def origin_of(made: Cell) -> str | None:
    return made["metadata"].get("minigpt", {}).get("origin")


def merged(old: list[Cell], new: list[Cell]) -> tuple[list[Cell], list[str]]:
    """The new cells with the learner's work kept, and the names of cells that both sides changed.

    A cell that the learner changed stays as it is; one of the learner's own stays behind the cell it stood behind.
    """
    known, followers, conflicts = {}, {}, []  # by origin; own cells by the origin they follow
    last: str | None = None
    for made in old:
        origin = origin_of(made)
        if origin is None:
            followers.setdefault(last, []).append(made)
        else:
            known[origin] = made
            last = origin
    cells = list(followers.pop(None, []))
    for fresh in new:
        origin = origin_of(fresh)
        kept = known.get(origin or "")
        then = kept["metadata"]["minigpt"]["digest"] if kept else None
        if kept and digest("".join(kept["source"])) != then:  # the learner's work
            if then != fresh["metadata"]["minigpt"]["digest"]:
                conflicts.append("".join(fresh["source"]).strip().splitlines()[0])
            cells.append(kept)
        else:
            cells.append(fresh)
        cells += followers.pop(origin, [])
    for rest in followers.values():  # what followed a cell that the course no longer has
        cells += rest
    new_origins = {origin_of(c) for c in new}
    gone = [c for o, c in known.items() if o not in new_origins]
    cells += [c for c in gone if digest("".join(c["source"])) != c["metadata"]["minigpt"]["digest"]]
    return cells, conflicts


def save(path: Path, notebook: dict[str, Any]) -> None:
    """Write a notebook whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(notebook, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def write(folder: Path = WORKBOOK) -> None:
    """Write or bring up to date the workbook of every lesson that has exercises."""
    folder.mkdir(exist_ok=True)
    for lesson in LESSONS:
        notebook, path = workbook_of(lesson), folder / lesson_path(lesson).name
        count = sum(e.lesson == lesson for e in exercises().values())
        conflicts: list[str] = []
        if path.exists():
            notebook["cells"], conflicts = merged(json.loads(path.read_text("utf-8"))["cells"], notebook["cells"])
        save(path, notebook)
        print(f"{path.relative_to(folder.parent)}: {count} exercises")
        for name in conflicts:
            print(f"  the course changed this cell too, yours stays: {name}")


def source_of(folder: Path) -> None:
    """The lessons with their solutions between nbgrader's marks, as nbgrader's `source` folder wants them."""
    for lesson in LESSONS:
        name = lesson_path(lesson).stem
        (folder / name).mkdir(parents=True, exist_ok=True)
        save(folder / name / f"{name}.ipynb", workbook_of(lesson, marked))
        print(folder / name / f"{name}.ipynb")


# --- answers


def answers(folder: Path = WORKBOOK) -> dict[str, str | None]:
    """The source of each exercise's cell, with the learner's own definitions before it; None where it is gone."""
    found: dict[str, str | None] = dict.fromkeys(exercises())
    for lesson in LESSONS:
        path = folder / lesson_path(lesson).name
        if not path.exists():
            continue
        own = ""
        for made in json.loads(path.read_text("utf-8"))["cells"]:
            source = "".join(made["source"])
            if made["cell_type"] != "code":
                continue
            for exercise in exercises().values():
                if exercise.lesson == lesson and find(source, exercise.target):
                    found[exercise.name] = own + source
            if origin_of(made) is None and find_any(source):
                own += source + "\n"
    return found


def find_any(source: str) -> bool:
    """Whether a cell of the learner's own only defines and imports: then an answer may use it."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return False
    return all(isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)) for n in body)


def judged(name: str, source: str | None) -> tuple[str, str]:
    """ "done", "wrong" or "open", and the words that a check says."""
    if source is None:
        return "open", f"{name}  is not in the workbook: make workbook"
    try:
        return "done", verdict(name, defined_by(source, exercises()[name]))
    except Open as said:
        return "open", str(said)
    except Said as said:
        return "wrong", str(said)
    except Exception as error:  # the cell itself does not run
        return "wrong", f"{name}  {type(error).__name__}: {error}"


def progress(folder: Path = WORKBOOK) -> dict[str, str]:
    """Print a table of the exercises: done, wrong or open, with their minutes. Returns the states by name."""
    if not folder.is_dir():
        raise SystemExit("there is no workbook yet: make workbook")
    states = {}
    for name, source in answers(folder).items():
        exercise = exercises()[name]
        states[name], words = judged(name, source)
        sign = {"done": "✓", "wrong": "✗", "open": "·"}[states[name]]
        print(f"{sign} {name:24} {exercise.minutes:3} min  {exercise.title}")
        if states[name] == "wrong":
            print(f"    {words}")
    done = [n for n, state in states.items() if state == "done"]
    left = sum(exercises()[n].minutes for n in states if n not in done)
    print(f"{len(done)} of {len(states)} done; about {left} minutes to go")
    return states


def taken(course_source: str, answer: str, exercise: Exercise) -> str:
    """The course's cell with the learner's definition of one exercise in it."""
    there, own = find(course_source, exercise.target), find(answer, exercise.target)
    assert there is not None and own is not None
    lines, theirs = course_source.split("\n"), answer.split("\n")
    lines[there.lineno - 1 : there.end_lineno] = theirs[own.lineno - 1 : own.end_lineno]
    return "\n".join(lines)


def mine(folder: Path = WORKBOOK) -> Path:
    """Export the learner's right answers, and the course's code for the rest, into folder/mine; say whose is whose."""
    states, sources, target = progress(folder), answers(folder), folder / "mine"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for name in ("notebooks", "tools"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, target)
    own = {}
    for name, state in states.items():
        exercise, source = exercises()[name], sources[name]
        if state != "done" or source is None or "#| export" not in solution(name):
            continue
        path = target / "notebooks" / lesson_path(exercise.lesson).name
        notebook = json.loads(path.read_text("utf-8"))
        for made in notebook["cells"]:
            text = "".join(made["source"])
            if made["cell_type"] == "code" and find(text, exercise.target):
                made["source"] = taken(text, source, exercise).splitlines(True)
                own[name] = exercise.target
        save(path, notebook)
    subprocess.run([sys.executable, "tools/export.py"], cwd=target, check=True)
    (target / "data").symlink_to(ROOT / "data")
    library = [n for n in exercises() if "#| export" in solution(n)]
    for name in library:
        print(f"{'yours ' if name in own else 'course'}  {name:24} {exercises()[name].target}")
    print(f"{target.relative_to(folder.parent)}/minigpt_lib runs on {len(own)} of {len(library)} pieces of your own")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("write", "progress", "mine", "source"))
    parser.add_argument("folder", nargs="?", type=Path, help="where to (source only)")
    args = parser.parse_args()
    if args.what == "source":
        source_of(args.folder or WORKBOOK / "source")
    else:
        {"write": write, "progress": progress, "mine": mine}[args.what]()


if __name__ == "__main__":
    main()
