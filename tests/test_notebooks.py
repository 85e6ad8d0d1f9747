"""What a reader may rely on in the notebooks: run in order, no errors, short cells, only due exemptions."""

import ast
import re
import statistics
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
MODULES = {
    "00": "runtime", "01": "tokenizer", "02": "attention", "03": "model", "04": "training", "05": "weights",
    "06": "generation", "06b": "fast", "06c": "native", "07": "lora", "08": "sft", "09": "chat",
}  # fmt: skip
EXEMPT = "# NBVAL_IGNORE_OUTPUT"
RICH = {"image/png", "text/html", "application/vnd.jupyter.widget-view+json"}
MEASURED = "time|second|memory|byte|speed|device|thread|widget|interact|progress|measure"

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code" and c.source.strip()]


def code_lines(source: str) -> list[str]:
    """The lines of a cell, without blank ones and those that only speak to nbdev or nbval."""
    return [line for line in source.splitlines() if line.strip() and not line.startswith(("#|", EXEMPT))]


def test_runs_in_order_without_errors(path):
    cells = code_cells(path)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    outputs = [o for c in cells for o in c.outputs]
    assert not [o.ename for o in outputs if o.output_type == "error"]
    assert not [o.text for o in outputs if o.get("name") == "stderr" and re.search("Warning|Traceback", o.text)]


def test_exports_its_module(path):
    number = path.name.split("_")[0]
    assert f"#| default_exp {MODULES[number]}" in code_cells(path)[0].source
    assert [p.name.split("_")[0] for p in NOTEBOOKS] == list(MODULES)


def test_starts_with_its_title(path):
    number = path.name.split("_")[0].removeprefix("0")
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown" and re.match(rf"# {number} · [A-Z]", first.source), first.source[:40]


def test_is_made_of_short_cells(path):
    lengths = [len(code_lines(c.source)) for c in code_cells(path)]
    assert statistics.median(lengths) < 8 and max(lengths) <= 45


def test_checks_what_it_claims(path):
    cells = code_cells(path)
    checking = [c for c in cells if any(isinstance(n, ast.Assert) for n in ast.walk(parse(c.source)))]
    assert len(checking) >= 0.15 * len(cells), f"{len(checking)} of {len(cells)} code cells hold an assertion"


def parse(source: str) -> ast.Module:
    """The cell as Python, without IPython's `%` and `!` lines."""
    return ast.parse("\n".join("pass" if re.match(r"\s*[%!]", line) else line for line in source.splitlines()))


def test_has_plots_a_closing_and_a_size_that_github_shows(path):
    images = sum("image/png" in o.get("data", {}) for c in code_cells(path) for o in c.outputs)
    assert 1 <= images <= 12
    assert path.stat().st_size < 700_000
    text = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")
    assert re.search(r"^## What was exported", text, re.M) and re.search(r"^## Next", text, re.M)


def test_only_times_pictures_and_widgets_are_exempt_from_comparison(path):
    """An exempt cell shows a picture or a widget, or says in a comment which measurement makes it so."""
    for cell in code_cells(path):
        if EXEMPT not in cell.source:
            continue
        rich = any(set(o.get("data", {})) & RICH for o in cell.outputs)
        measured = re.search(MEASURED, cell.source, re.I)
        assert rich or measured or not cell.outputs, f"exempt without a reason:\n{cell.source}"
