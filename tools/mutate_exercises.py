"""Changes that nobody listed: which of them does the check of an exercise see?

    python tools/mutate_exercises.py [NAME ...] [--each 5] [--seed 0]

Takes single changes of each solution (another operator, a number one off, arguments swapped, a call left out, …) and
prints those that stay green: they are equivalent code, or the check has a hole.
"""

import argparse
import ast
import copy
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exercises.checking import Open, defined_by, exercises, find, solution, verdict

OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
             ast.MatMult: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Mod: ast.FloorDiv}  # fmt: skip
COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
               ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn}  # fmt: skip


def changed(node: ast.AST) -> Iterator[ast.AST]:
    """Other nodes that could stand in the place of a node."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
        if isinstance(node.op, (ast.Sub, ast.Div, ast.MatMult)):
            yield ast.BinOp(node.right, node.op, node.left)
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        yield ast.Compare(node.left, [COMPARISONS[type(node.ops[0])](), *node.ops[1:]], node.comparators)
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield ast.Constant(node.value + 1)
        yield ast.Constant(-node.value if node.value else 1)
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Call) and len(node.args) >= 2 and not any(isinstance(a, ast.Starred) for a in node.args):
        yield ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Invert, ast.Not)):
        yield node.operand
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):  # x.f(...) -> x
        yield node.func.value


def mutations(source: str, target: str) -> list[str]:
    """The cell's source with one change in the body of its target, every one that is possible."""
    tree = ast.parse(source)
    definition = find(source, target)
    assert isinstance(definition, ast.FunctionDef)
    body = [n for n in definition.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    inside = [n for statement in body if not raises_only(statement) for n in ast.walk(statement)]
    places = [(n.lineno, n.col_offset, n.end_lineno, n.end_col_offset) for n in inside if hasattr(n, "lineno")]
    found = []
    for node in ast.walk(tree):
        place = tuple(getattr(node, f, None) for f in ("lineno", "col_offset", "end_lineno", "end_col_offset"))
        if place in places:
            for other in changed(node):
                fresh = Replace(node, other).visit(copy.deepcopy(tree))
                found.append(ast.unparse(ast.fix_missing_locations(fresh)))
    plain = ast.unparse(tree)
    return sorted({f for f in found if f != plain})


def raises_only(statement: ast.stmt) -> bool:
    """A check of the arguments: an exercise does not ask for it."""
    return isinstance(statement, ast.If) and all(isinstance(s, ast.Raise) for s in statement.body)


class Replace(ast.NodeTransformer):
    """Puts another node into the place of one, found again by its place and kind."""

    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = ast.dump(old, include_attributes=True), new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if ast.dump(node, include_attributes=True) == self.old else self.generic_visit(node)


def difference(plain: str, other: str) -> str:
    pairs = zip(plain.splitlines(), other.splitlines(), strict=False)
    return " | ".join(b.strip() for a, b in pairs if a != b)


def stays_green(name: str, source: str) -> bool:
    def too_long(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)
    try:
        verdict(name, defined_by(source, exercises()[name]))
        return True
    except Open:
        raise
    except BaseException:
        return False
    finally:
        signal.alarm(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--each", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    green = tried = 0
    for name in args.names or exercises():
        source = solution(name)
        others = mutations(source, exercises()[name].target)
        random.Random(args.seed).shuffle(others)
        for other in others[: args.each]:
            tried += 1
            if stays_green(name, other):
                green += 1
                print(f"green  {name}: {difference(ast.unparse(ast.parse(source)), other)}", flush=True)
    print(f"{tried} changes tried, {green} stay green")
    return 0


if __name__ == "__main__":
    sys.exit(main())
