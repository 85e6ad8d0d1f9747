"""minigpt_lib.atomic: links, names and permissions (kills and full disks: test_checkpoints.py)."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minigpt_lib.atomic import write_atomically

posix = pytest.mark.skipif(os.name != "posix", reason="links and modes are POSIX's")


def temporary_names(path: Path, times: int) -> list[str]:
    """The names under which `write_atomically` lets a file be filled."""
    names = []
    for _ in range(times):
        write_atomically(path, lambda p: names.append(p.name) or p.write_text("x"))
    return names


def test_the_temporary_name_is_hidden_beside_the_file_and_never_the_same(tmp_path):
    names = temporary_names(tmp_path / "a.json", 20)
    assert len(set(names)) == 20
    assert all(name.startswith(".a.json.") and name.endswith(".tmp") and len(name) >= 24 for name in names)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@posix
def test_a_link_under_a_guessed_name_is_not_followed(tmp_path):
    (tmp_path / "diary").write_text("mine")
    for guess in (".a.json.tmp", ".a.json.0.tmp"):
        (tmp_path / guess).symlink_to(tmp_path / "diary")
    write_atomically(tmp_path / "a.json", lambda p: p.write_text("new"))
    assert (tmp_path / "diary").read_text() == "mine" and (tmp_path / "a.json").read_text() == "new"


@posix
def test_a_link_under_the_files_own_name_is_replaced_not_followed(tmp_path):
    (tmp_path / "diary").write_text("mine")
    (tmp_path / "a.json").symlink_to(tmp_path / "diary")
    write_atomically(tmp_path / "a.json", lambda p: p.write_text("new"))
    assert (tmp_path / "diary").read_text() == "mine" and not (tmp_path / "a.json").is_symlink()


@posix
def test_a_writer_that_leaves_a_link_is_refused(tmp_path):
    (tmp_path / "diary").write_text("mine")

    def swap(path: Path) -> None:
        path.unlink()
        path.symlink_to(tmp_path / "diary")

    with pytest.raises(OSError, match="symbolic links|ELOOP"):
        write_atomically(tmp_path / "a.json", swap)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["diary"]


@posix
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_a_file_gets_the_permissions_of_any_new_file(tmp_path, umask, mode):
    """safetensors writes files that only their owner can read; a model must be readable for whoever serves it."""
    writers = {
        "a.txt": lambda p: p.write_text("x"),
        "a.safetensors": lambda p: save_file({"w": torch.zeros(2)}, p),
        "a.pt": lambda p: torch.save({"w": torch.zeros(2)}, p),
    }
    before = os.umask(umask)
    try:
        for name, write in writers.items():
            write_atomically(tmp_path / name, write)
    finally:
        os.umask(before)
    assert {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == dict.fromkeys(writers, mode)


def test_a_writer_that_fails_leaves_nothing_and_the_old_file(tmp_path):
    write_atomically(tmp_path / "a", lambda p: p.write_text("old"))

    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("no power")

    with pytest.raises(RuntimeError, match="no power"):
        write_atomically(tmp_path / "a", fail)
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


def test_what_a_kill_left_is_removed_when_it_is_old_and_only_then(tmp_path):
    old, young, other = (tmp_path / name for name in (f".a.{'0' * 16}.tmp", f".a.{'1' * 16}.tmp", f".b.{'0' * 16}.tmp"))
    for path in (old, young, other):
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (time.time() - 7200,) * 2)
    write_atomically(tmp_path / "a", lambda p: p.write_text("x"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [young.name, other.name, "a"]


def test_several_writers_at_once_leave_one_whole_file(tmp_path):
    def write(i: int) -> None:
        for _ in range(20):
            write_atomically(tmp_path / "a", lambda p: p.write_text(str(i) * 50_000))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))  # raises what a writer raises
    text = (tmp_path / "a").read_text()
    assert len(text) == 50_000 and len(set(text)) == 1 and len(list(tmp_path.iterdir())) == 1
