"""requirements.txt, environment.yml and pyproject.toml name the same packages, and agree on their versions."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
NAMED = ("torch", "tiktoken", "numpy", "matplotlib", "jupyterlab", "ipywidgets", "gradio", "nbval")


def pins(lines: list[str]) -> dict[str, str]:
    """{package: version} of the lines that hold an exact pin."""
    found = [re.fullmatch(r"([\w.-]+)==([\w.+-]+)", line.strip()) for line in lines]
    return {canonicalize_name(m[1]): m[2] for m in found if m}


@pytest.fixture(scope="module")
def required() -> dict[str, str]:
    return pins((ROOT / "requirements.txt").read_text("utf-8").splitlines())


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_every_line_of_requirements_is_an_exact_pin(required):
    lines = [line.strip() for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines()]
    packages = [line for line in lines if line and not line.startswith(("#", "-c"))]
    assert len(packages) == len(required) and set(NAMED) <= set(required)


def test_environment_has_the_same_pins(required):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pins(pip) == required
    assert "--constraint constraints.txt" in pip and "--editable ." in pip


def test_the_ranges_of_the_project_admit_the_pins(required, project):
    extras = project["optional-dependencies"]
    ranges = [Requirement(r) for r in project["dependencies"] + sum(extras.values(), [])]
    assert not [str(r) for r in ranges if not r.specifier.contains(required[canonicalize_name(r.name)])]
    assert {canonicalize_name(r.name) for r in ranges} == set(required)


def test_the_library_itself_needs_four_packages_and_what_they_bring(project):
    needed = {"torch", "tiktoken", "numpy", "safetensors"} | {"regex", "requests", "filelock"}
    assert {Requirement(r).name for r in project["dependencies"]} == needed
    assert set(project["optional-dependencies"]) == {"course", "dev", "bench"}
    assert project["scripts"] == {"minigpt": "minigpt_lib.cli:main"}


def test_no_package_is_pinned_twice(required):
    constraints = pins((ROOT / "constraints.txt").read_text("utf-8").splitlines())
    assert len(constraints) > 50 and not set(constraints) & set(required)


def test_what_is_installed_is_what_is_pinned(required):
    installed = {name: version(name).split("+")[0] for name in required}
    assert installed == required
