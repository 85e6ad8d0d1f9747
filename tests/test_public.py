"""The library as others see it: public names, direction of the imports, an import that does nothing else."""

import ast
import graphlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "minigpt_lib"
NAMES = [
    "LLM", "GPTConfig", "GPTLanguageModel", "CausalSelfAttention", "load_tokenizer", "load_pretrained",
    "save_pretrained", "KVCache", "generate", "stream", "FastGPT", "NativeGPT", "add_lora", "merge_lora",
    "unmerge_lora", "lora_disabled", "save_adapter", "load_adapter", "pretrain", "finetune", "TrainConfig",
    "load_records", "build_prompt", "encode_prompt", "build_app",
]  # fmt: skip


def notebook_of() -> dict[str, int]:
    """The place among the notebooks of the one that writes each module, by module."""
    places: dict[str, int] = {}
    for i, path in enumerate(sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))):
        default = ""
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            source = "".join(cell["source"])
            if named := re.search(r"^#\| default_exp (\S+)", source, re.M):
                default = named[1]
            if exported := re.search(r"^#\| exporti?(?: (\S+))?$", source, re.M):
                module = exported[1] or default
                assert places.setdefault(module, i) == i, f"two notebooks write {module}"
    return places


PLACES = notebook_of()
ORDER = sorted(PLACES, key=lambda name: name == "__init__")  # the package's own face comes last
ROOMS = sorted(p.parent.name for p in LIBRARY.glob("*/__init__.py"))
MODULES = sorted(
    ".".join(p.relative_to(LIBRARY).with_suffix("").parts)
    for p in LIBRARY.rglob("*.py")
    if p.stem != "_modidx" and not (p.stem == "__init__" and p.parent != LIBRARY)
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
NEEDED = {re.split(r"[<>=]", line)[0] for line in PROJECT["dependencies"]} - {"requests", "filelock"}  # these: later
LATER = ("gradio", "matplotlib", "ipywidgets", "IPython", "tqdm", "huggingface_hub", "transformers", "peft")


def tree(module: str) -> ast.Module:
    return ast.parse((LIBRARY / f"{module.replace('.', '/')}.py").read_text("utf-8"))


def imported(node: ast.AST, module: str) -> list[str]:
    """The modules that an import statement of `module` names, relative ones spelled out."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    if not node.level:
        base = node.module
    else:
        above = f"minigpt_lib.{module}".split(".")[: -node.level]
        base = ".".join([*above, *([node.module] if node.module else [])])
    names = [f"{base}.{alias.name}" for alias in node.names]
    return names if base == "minigpt_lib" or base.removeprefix("minigpt_lib.") in ROOMS else [base]


def run(code: str, *flags: str) -> str:
    """What a fresh Python prints; fails if it writes to stderr."""
    done = subprocess.run([sys.executable, *flags, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def test_every_module_is_known_here():
    assert sorted(ORDER) == MODULES


# --- names


@pytest.mark.parametrize("name", NAMES)
def test_public_name_works_from_the_package(name):
    import minigpt_lib

    found = getattr(minigpt_lib, name)
    assert found.__module__.startswith("minigpt_lib.") and found.__doc__
    assert getattr(sys.modules[found.__module__], name) is found
    assert name in minigpt_lib.__all__ and name in dir(minigpt_lib)


def test_the_package_exports_these_names_and_no_others():
    import minigpt_lib

    assert sorted(minigpt_lib.__all__) == sorted(NAMES)
    assert run("from minigpt_lib import *; print(GPTConfig.__name__, build_app.__name__)") == "GPTConfig build_app\n"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        minigpt_lib.nonsense  # noqa: B018
    with pytest.raises(ImportError):
        exec("from minigpt_lib import nonsense")


def test_editors_are_told_the_same_names():
    body = ast.parse((LIBRARY / "__init__.pyi").read_text("utf-8")).body
    imports = [(node.module, alias) for node in body if isinstance(node, ast.ImportFrom) for alias in node.names]
    typed = {alias.name: module for module, alias in imports if module != "minigpt_lib"}
    assert all(alias.asname == alias.name for _, alias in imports)  # `name as name`: handed on
    import minigpt_lib

    assert sorted(typed) == sorted(NAMES) and (LIBRARY / "py.typed").is_file()
    for name, module in typed.items():
        assert getattr(minigpt_lib, name).__module__ == module


def test_modules_are_reached_through_the_package():
    modules = [m for m in ORDER if m != "__init__"]
    shown = run(f"import minigpt_lib\nfor m in {modules}: print(eval('minigpt_lib.' + m).__name__)")
    assert shown.splitlines() == [f"minigpt_lib.{m}" for m in modules]


def test_the_version_is_one():
    import minigpt_lib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert minigpt_lib.__version__ == project["version"]


def test_each_exported_name_is_defined_once():
    homes: dict[str, list[str]] = {}
    for module in ORDER[:-1]:
        for node in tree(module).body:
            names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
            targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
            names += [t.id for t in targets if isinstance(t, ast.Name)]
            for name in names:
                if not name.startswith("_"):
                    homes.setdefault(name, []).append(module)
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}
    for module in ORDER[:-1]:
        exported = __import__(f"minigpt_lib.{module}", fromlist=["x"]).__all__
        assert sorted(exported) == sorted(n for n, where in homes.items() if where == [module])


# --- imports


def needed_by(module: str) -> set[str]:
    """The library's modules that a module imports, inside functions and TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(tree(module)):
        found |= {name.removeprefix("minigpt_lib.") for name in imported(node, module) if name[:11] == "minigpt_lib"}
        assert not (isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names)), "a star import"
    return found - {"__version__"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_to_earlier_notebooks_or_stay_in_their_own(module):
    for other in needed_by(module):
        assert PLACES[other] <= PLACES[module], f"{module} imports {other}, which a later notebook writes"


def test_no_module_needs_itself_in_the_end():
    order = graphlib.TopologicalSorter({module: needed_by(module) for module in MODULES})
    assert len(list(order.static_order())) == len(MODULES)  # raises CycleError for a circle


@pytest.mark.parametrize("module", MODULES)
def test_at_module_level_only_the_four_packages_are_imported(module):
    found = {name.split(".")[0] for node in tree(module).body for name in imported(node, module)}
    assert found <= set(sys.stdlib_module_names) | NEEDED | {"minigpt_lib"}


@pytest.mark.parametrize("module", MODULES)
def test_the_header_names_the_notebook_that_it_comes_from(module):
    path = LIBRARY / f"{module.replace('.', '/')}.py"
    text = path.read_text("utf-8")
    header = re.search(r"^# AUTOGENERATED! DO NOT EDIT! File to edit: (\S+)\.$", text, re.M)
    assert header and (path.parent / header[1]).resolve().is_file()
    cells = set(re.findall(r"^# %% (\S+/notebooks/\S+\.ipynb|\.\./notebooks/\S+\.ipynb) #", text, re.M))
    assert cells == {header[1]}


# --- what importing does


def test_importing_everything_prints_nothing_changes_nothing_and_loads_nothing_heavy():
    code = f"""
import os, random, signal, sys, threading, warnings
import numpy, torch, tiktoken, safetensors.torch, torch.utils.checkpoint, logging
import torch._dynamo.config, torch._inductor.config
def state():
    return {{
        "dtype": torch.get_default_dtype(), "device": torch.get_default_device(), "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(), "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(), "tf32": torch.backends.cuda.matmul.allow_tf32,
        "dynamo": torch._dynamo.config.get_config_copy(), "inductor": torch._inductor.config.get_config_copy(),
        "cudnn": torch.backends.cudnn.benchmark, "print": str(torch._tensor_str.PRINT_OPTS),
        "seed": torch.initial_seed(),
        "torch rng": torch.get_rng_state().sum().item(), "numpy rng": str(numpy.random.get_state()[1][:4]),
        "random": hash(random.getstate()), "numpy": str(numpy.geterr()), "env": dict(os.environ),
        "warnings": list(warnings.filters), "path": list(sys.path), "cwd": os.getcwd(), "hook": sys.excepthook,
        "int": signal.getsignal(signal.SIGINT), "n threads": threading.active_count(), "log": logging.root.level,
        "handlers": list(logging.root.handlers), "recursion": sys.getrecursionlimit(),
    }}
before, loaded = state(), set(sys.modules)  # torch itself loads tqdm where it finds it
for module in {ORDER[:-1]}:
    __import__("minigpt_lib." + module)
import minigpt_lib
for name in minigpt_lib.__all__:
    getattr(minigpt_lib, name)
after = state()
assert before == after, {{k: (before[k], after[k]) for k in before if before[k] != after[k]}}
heavy = [m for m in {LATER} if m in sys.modules and m not in loaded]
assert not heavy, heavy
"""
    assert run(code) == ""


def test_the_package_itself_loads_no_torch():
    assert run("import sys, minigpt_lib; print('torch' in sys.modules, minigpt_lib.__version__)").startswith("False ")


def test_the_library_imports_with_its_four_dependencies_alone():
    """As on a machine without the extras: importing any other package of theirs fails."""
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {LATER}:
            raise ImportError(name + " is not installed")
sys.meta_path.insert(0, Blocked())
from minigpt_lib import *
try:
    build_app("mini")
except (ImportError, FileNotFoundError) as error:
    print(type(error).__name__, "minigpt-lib[course]" in str(error))
"""
    assert run(code) == "ImportError True\n"
