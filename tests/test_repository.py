"""The tree as a whole: README's commands and links exist, the export is in sync, nothing stray is committed."""

import filecmp
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "data/README.md", "benchmarks/README.md"]


def commands(document: str) -> list[str]:
    """The lines of a document's shell blocks, without comments and continuations."""
    blocks = re.findall(r"```(?:sh|bash|shell)\n(.*?)```", (ROOT / document).read_text("utf-8"), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" # ")[0].strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def subcommands(*words: str) -> str:
    """The help text of `minigpt` or of one of its commands."""
    command = [sys.executable, "-m", "minigpt_lib.cli", *words, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout


def missing(command: str) -> str | None:
    """What a command of a document names that does not exist, or None."""
    words = [w for w in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", w)]
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
        return next((w for w in words[1:] if "=" not in w and w not in targets), None)
    if words[0].endswith("minigpt"):
        text = subcommands(words[1])
        return next((w for w in words[2:] if w.startswith("--") and w.split("=")[0] not in text), None)
    if words[0].endswith("python") and words[1] != "-m":
        return None if (ROOT / words[1]).is_file() else words[1]
    return None


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_exist(document):
    found = commands(document)
    assert found, f"{document} shows no command"
    wrong = {c: missing(c) for c in found if missing(c)}
    assert not wrong


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text("utf-8")
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text)
    local = [link for link in links if "://" not in link]
    assert not [link for link in local if not ((ROOT / document).parent / link).exists()]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_help_says_all_that_the_makefile_says_of_its_targets():
    about = re.findall(r"^([a-z]+):[^#]*## (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.M)
    command = ["make", "--no-print-directory", "help"]  # inside `make test` it would also say where it is
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    assert [line.split(maxsplit=2) for line in told.splitlines()] == [["make", *words] for words in about]
    assert len(about) >= 10


def test_the_library_is_what_the_notebooks_export(tmp_path):
    passing = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("notebooks", "minigpt_lib", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=passing)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for module in (tmp_path / "minigpt_lib").rglob("*.py"):
        module.unlink()
    subprocess.run([sys.executable, "tools/export.py"], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    ours = sorted(str(p.relative_to(ROOT / "minigpt_lib")) for p in (ROOT / "minigpt_lib").rglob("*.py"))
    theirs = sorted(str(p.relative_to(tmp_path / "minigpt_lib")) for p in (tmp_path / "minigpt_lib").rglob("*.py"))
    assert theirs == ours
    same, different, errors = filecmp.cmpfiles(ROOT / "minigpt_lib", tmp_path / "minigpt_lib", ours, shallow=False)
    assert not different and not errors and len(same) == len(ours)


def test_binaries_stay_small():
    folder = ROOT / "data" / "mini"
    assert (folder / "model.safetensors").stat().st_size <= 12_000_000
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= 16_000_000
