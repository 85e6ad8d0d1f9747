"""What a reader may rely on in the notebooks: run in order, no errors, lessons of a size that a person finishes."""

import ast
import re
import statistics
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
LESSONS = [p for p in NOTEBOOKS if re.match(r"0\d_", p.name)]  # a letter after the number, or 10: a workshop
WORKSHOPS = [p for p in NOTEBOOKS if p not in LESSONS]
EXEMPT = "# NBVAL_IGNORE_OUTPUT"
RICH = {"image/png", "text/html", "application/vnd.jupyter.widget-view+json"}
MEASURED = "time|second|memory|byte|speed|device|thread|widget|interact|progress|measure"
EXPORT = re.compile(r"^#\| export", re.M)

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
each_workshop = pytest.mark.parametrize("path", WORKSHOPS, ids=lambda p: p.stem)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code" and c.source.strip()]


def prose(path: Path) -> str:
    return "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")


def code_lines(source: str) -> list[str]:
    """The lines of a cell, without blank ones and those that only speak to nbdev or nbval."""
    return [line for line in source.splitlines() if line.strip() and not line.startswith(("#|", EXEMPT))]


def parse(source: str) -> ast.Module:
    """The cell as Python, without IPython's `%` and `!` lines."""
    return ast.parse("\n".join("pass" if re.match(r"\s*[%!]", line) else line for line in source.splitlines()))


def defined(cell: nbformat.NotebookNode) -> list[ast.stmt]:
    return [n for n in parse(cell.source).body if isinstance(n, (ast.ClassDef, ast.FunctionDef))]


# --- all notebooks


@each
def test_runs_in_order_without_errors(path):
    cells = code_cells(path)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    outputs = [o for c in cells for o in c.outputs]
    assert not [o.ename for o in outputs if o.output_type == "error"]
    assert not [o.text for o in outputs if o.get("name") == "stderr" and re.search("Warning|Traceback", o.text)]


def test_numbers_are_in_order_and_every_letter_follows_its_lesson():
    numbers = [p.name.split("_")[0] for p in NOTEBOOKS]
    assert [n for n in numbers if len(n) == 2] == [f"{n:02}" for n in range(11)]
    for number in numbers:
        if len(number) == 3 and number[2] > "b":
            assert f"{number[:2]}{chr(ord(number[2]) - 1)}" in numbers, f"{number} without the one before it"


@each
def test_starts_with_its_title(path):
    number = path.name.split("_")[0].removeprefix("0")
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown" and re.match(rf"# {number} · [A-Z]", first.source), first.source[:40]


@each
def test_is_made_of_short_cells(path):
    """A cell that holds one class, or one piece of C++ or CSS, may be as long as that is."""
    cells = code_cells(path)
    assert path in WORKSHOPS or statistics.median(len(code_lines(c.source)) for c in cells) < 8
    for cell in cells:
        whole = sum(not isinstance(n, (ast.Import, ast.ImportFrom)) for n in parse(cell.source).body) == 1
        assert len(code_lines(cell.source)) <= (120 if whole and EXPORT.search(cell.source) else 45), cell.source[:200]


@each
def test_checks_what_it_claims(path):
    cells = code_cells(path)
    checking = [c for c in cells if any(isinstance(n, ast.Assert) for n in ast.walk(parse(c.source)))]
    assert len(checking) >= 0.15 * len(cells), f"{len(checking)} of {len(cells)} code cells hold an assertion"


@each
def test_has_a_closing_and_a_size_that_github_shows(path):
    images = sum("image/png" in o.get("data", {}) for c in code_cells(path) for o in c.outputs)
    assert (path in WORKSHOPS or images >= 1) and images <= 12
    assert path.stat().st_size < 700_000
    assert re.search(r"^## What was exported", prose(path), re.M) and re.search(r"^## Next", prose(path), re.M)


@each
def test_only_times_pictures_and_widgets_are_exempt_from_comparison(path):
    """An exempt cell shows a picture or a widget, or says in a comment which measurement makes it so."""
    for cell in code_cells(path):
        if EXEMPT not in cell.source:
            continue
        rich = any(set(o.get("data", {})) & RICH for o in cell.outputs)
        measured = re.search(MEASURED, cell.source, re.I)
        assert rich or measured or not cell.outputs, f"exempt without a reason:\n{cell.source}"


def printed(cell: nbformat.NotebookNode) -> str:
    texts = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs]
    return "\n".join(t for t in texts if t and not re.match(r"<(Figure|IPython|Axes)", t))


@each
def test_numbers_are_printed_not_verdicts(path):
    """At most a tenth of the outputs hold nothing but truth values."""
    outputs = [text for c in code_cells(path) if (text := printed(c)).strip()]
    verdicts = [t for t in outputs if all(re.search(r"(True|False)\W*$", line) for line in t.strip().splitlines())]
    assert len(verdicts) <= 0.1 * len(outputs), verdicts


# --- lessons and workshops


@each_lesson
def test_a_lesson_is_of_a_size_that_a_person_finishes(path):
    assert sum(len(code_lines(c.source)) for c in code_cells(path)) <= 460


def test_the_lessons_export_what_can_be_read_in_an_evening():
    """The code alone; what it says of itself in docstrings comes on top."""
    exported = [c.source for path in LESSONS for c in code_cells(path) if EXPORT.search(c.source)]
    documented = sum(
        n.body[0].end_lineno - n.body[0].lineno + 1
        for source in exported
        for n in ast.walk(parse(source))
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(n)
    )
    assert sum(len(code_lines(source)) for source in exported) - documented <= 1600


@each_workshop
def test_a_workshop_says_who_may_skip_it_and_stays_a_tour(path):
    assert sum(len(code_lines(c.source)) for c in code_cells(path)) <= 980
    first = nbformat.read(path, as_version=4).cells[0].source
    assert re.search(r"\bskip\b", first, re.I), "its first cell does not say who may skip it"


@each_lesson
def test_a_draft_comes_before_every_finished_class(path):
    """`Block_v1`, of at most 20 lines, before `Block`; records, errors and protocols are their own draft."""
    drafts = set()
    for cell in code_cells(path):
        for node in defined(cell):
            stem = re.fullmatch(r"(\w+)_v\d+", node.name)
            if stem and len(code_lines(ast.unparse(node))) <= 20:
                drafts.add(stem[1].lower().replace("_", ""))
            if not EXPORT.search(cell.source) or not isinstance(node, ast.ClassDef):
                continue
            bases = {ast.unparse(b).split(".")[-1] for b in node.bases}
            plain = node.decorator_list or bases & {"Protocol", "NamedTuple", "TypedDict", "ValueError"}
            name = node.name.lower()
            assert plain or any(d in name or name in d for d in drafts), f"no draft before {node.name}"


@each_lesson
def test_a_lesson_exports_only_what_is_used_later(path):
    """By a later cell that is exported, by a later notebook, or as one of the package's public names."""
    from minigpt_lib import __all__ as public

    cells = code_cells(path)
    later = "\n".join(c.source for p in NOTEBOOKS[NOTEBOOKS.index(path) + 1 :] for c in code_cells(p))
    for i, cell in enumerate(cells):
        if EXPORT.search(cell.source):
            rest = later + "\n".join(c.source for c in cells[i + 1 :] if EXPORT.search(c.source))
            for node in defined(cell):
                assert node.name in public or re.search(rf"\b{node.name}\b", rest), f"{node.name} is used nowhere later"
