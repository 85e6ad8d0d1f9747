"""How an answer is checked: run, compared with the oracle, and where it differs, with every known mistake."""

import ast
import importlib
import json
import math
import secrets
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
LESSONS = ("00", "01", "02", "03", "04", "05", "06", "07", "08", "09")


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that is often given: the solution with `old` replaced by `new`, and the words that name it."""

    says: str
    old: str
    new: str


@dataclass(frozen=True)
class Exercise:
    """One piece for the learner to write: the function, method or class `target` in a cell of its lesson."""

    name: str  # "02.one_head"
    title: str
    target: str  # "one_head", or "KVCache.update" for a method
    minutes: int
    level: int  # 1 to 3
    module: str  # whose names the solution may use
    against: str  # the oracle, for people
    run: Callable[[Any, int], Any]  # (answer, seed) -> what it computes: tensors, numbers, texts, or nests of them
    expected: Callable[[int], Any]  # seed -> the same from the oracle
    mistakes: tuple[Mistake, ...]
    hints: tuple[str, ...]
    tolerance: float = 1e-5
    given: Mapping[str, Any] = field(default_factory=dict)  # further names that the solution may use

    @property
    def lesson(self) -> str:
        """The lesson's number, "02"."""
        return self.name.split(".")[0]


class Said(Exception):
    """Something to say to the learner: IPython shows the message alone, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class Open(Said, NotImplementedError):
    """An exercise that nobody has written yet."""


class Wrong(Said, AssertionError):
    """An answer that differs from what is expected; the message says how."""


WAITS = "Exercise {} waits for you"  # the error that a stub raises begins so


@cache
def exercises() -> dict[str, Exercise]:
    """All exercises by name, in the order of the lessons."""
    found: dict[str, Exercise] = {}
    for lesson in LESSONS:
        if (Path(__file__).parent / f"lesson_{lesson}.py").is_file():
            for exercise in importlib.import_module(f"exercises.lesson_{lesson}").EXERCISES:
                assert exercise.name not in found, f"{exercise.name} is there twice"
                found[exercise.name] = exercise
    return found


# --- the solution: a cell of the lesson


@cache
def lesson_path(lesson: str) -> Path:
    """The notebook of a lesson."""
    (path,) = (ROOT / "notebooks").glob(f"{lesson}_*.ipynb")
    return path


def find(source: str, target: str) -> ast.FunctionDef | ast.ClassDef | None:
    """The definition of `target` in a cell's source: a function, a class, or a method written as Class.method."""
    try:
        nodes: list[ast.stmt] = ast.parse(source).body
    except SyntaxError:  # a cell with IPython's own syntax
        return None
    found = None
    for name in target.split("."):
        found = next((n for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name), None)
        if found is None:
            return None
        nodes = found.body
    return found


@cache
def solution(name: str) -> str:
    """The source of the lesson's cell that defines an exercise's target."""
    exercise = exercises()[name]
    notebook = json.loads(lesson_path(exercise.lesson).read_text("utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    found = [source for source in cells if find(source, exercise.target)]
    assert len(found) == 1, f"{name}: {len(found)} cells of the lesson define {exercise.target}"
    return found[0]


def defined_by(source: str, exercise: Exercise) -> Any:
    """What a cell's source defines under the exercise's name: its function or class. Raises what the source raises."""
    module = importlib.import_module(exercise.module)
    names = {"math": math, "torch": torch, "nn": torch.nn, "F": torch.nn.functional, "np": np, "Tensor": torch.Tensor}
    names |= vars(module) | dict(exercise.given) | {"__name__": f"exercise_{exercise.target.split('.')[0]}"}
    exec(compile(source, f"<{exercise.name}>", "exec"), names)
    return names[exercise.target.split(".")[0]]


def course(name: str) -> Any:
    """The course's own solution of an exercise, for whoever wants to go on without writing it."""
    return defined_by(solution(name), exercises()[name])


def mistaken(exercise: Exercise, mistake: Mistake) -> Any:
    """The solution with a mistake in it."""
    source = solution(exercise.name)
    assert source.count(mistake.old) == 1, f"{exercise.name}: {mistake.old!r} stands {source.count(mistake.old)} times"
    return defined_by(source.replace(mistake.old, mistake.new), exercise)


# --- comparing


def places(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The single values in a nest of tensors, lists and dictionaries, each with its place."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    if isinstance(value, np.ndarray):
        yield f"{path}.shape", tuple(value.shape)
        for index in np.ndindex(value.shape):
            yield f"{path}[{', '.join(map(str, index))}]", value[index].item()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from places(item, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        yield f"{path}.length", len(value)
        for i, item in enumerate(value):
            yield from places(item, f"{path}[{i}]")
    else:
        yield path, value


def apart(a: Any, b: Any) -> float:
    """How far two single values are apart: their difference, or infinity for what is not equal and not a number."""
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (a, b))
    if numbers and (a == b or (math.isnan(a) and math.isnan(b))):
        return 0.0
    if numbers:
        return abs(a - b) if math.isfinite(a - b) else math.inf
    return 0.0 if type(a) is type(b) and a == b else math.inf


def compare(yours: Any, expected: Any, tolerance: float) -> tuple[float, str]:
    """The largest difference, and words for the first place that differs ("" if none does)."""
    mine, theirs, largest, first = dict(places(yours)), dict(places(expected)), 0.0, ""
    for place, wanted in theirs.items():
        if place not in mine:
            return math.inf, first or f"{place.lstrip('.') or 'the result'} is missing (expected {shown(wanted)})"
        off = apart(mine[place], wanted)
        largest = max(largest, off)
        if off > tolerance and not first:
            first = f"{place.lstrip('.') or 'the result'} is {shown(mine[place])}, expected {shown(wanted)}"
    if len(mine) > len(theirs) and not first:
        place = next(p for p in mine if p not in theirs)
        return math.inf, f"{place.lstrip('.')} is {shown(mine[place])}, where nothing is expected"
    return largest, first


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value!r:.60}"


def outcome(exercise: Exercise, answer: Any, seed: int) -> Any:
    """What an answer computes, or the exception that it raises, as something that can be compared."""
    torch.manual_seed(seed)
    try:
        return exercise.run(answer, seed)
    except NotImplementedError as error:
        if str(error).startswith(WAITS.format(exercise.name)):
            raise Open(f"{exercise.name}  is still open: {error}") from None
        return error
    except Exception as error:
        return error


def same(a: Any, b: Any, tolerance: float) -> bool:
    """Whether two outcomes are alike: close numbers, or exceptions that say the same."""
    if isinstance(a, Exception) or isinstance(b, Exception):
        return type(a) is type(b) and str(a) == str(b)
    return compare(a, b, tolerance)[0] <= tolerance


def verdict(name: str, answer: Any, seed: int | None = None) -> str:
    """What to say of a right answer: a line with the largest difference. Raises `Open` or `Wrong`."""
    exercise = exercises()[name]
    seed = secrets.randbelow(2**31) if seed is None else seed
    with torch.random.fork_rng([]):
        yours = outcome(exercise, answer, seed)
        torch.manual_seed(seed)
        expected = exercise.expected(seed)
        if not isinstance(yours, Exception):
            largest, first = compare(yours, expected, exercise.tolerance)
            if not first and largest <= exercise.tolerance:
                size = f"largest difference {largest:.0e}" if largest else "equal"
                return f"{name}  against {exercise.against}: {size}   ✓"
        else:
            first = complaint(yours)
        for mistake in exercise.mistakes:
            if same(yours, outcome(exercise, mistaken(exercise, mistake), seed), exercise.tolerance):
                raise Wrong(f"{name}  {first}.\n    This is what {mistake.says}")
    raise Wrong(f"{name}  {first}.  (against {exercise.against}, seed {seed})")


def complaint(error: Exception) -> str:
    """The learner's own line first, then what went wrong there."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if "ipykernel" in f.filename or f.filename[:1] == "<"]
    where = f"line {own[-1].lineno}, `{own[-1].line}`: " if own and own[-1].line else ""
    return f"{where}{type(error).__name__}: {' '.join(str(error).split())}"


def check(name: str, answer: Any) -> None:
    """Say whether an answer is right. A wrong one ends the cell with what is known about the mistake."""
    print(verdict(name, answer))
    sys.stdout.flush()
