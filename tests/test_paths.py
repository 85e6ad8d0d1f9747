"""minigpt_lib.paths: model names and choice, the data folder, the cache, folders that are ours alone."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minigpt_lib import paths
from minigpt_lib.paths import (
    MODEL_NAMES,
    ModelChoice,
    cache_dir,
    check_model_name,
    choose_model,
    data_dir,
    private_folder,
)

ROOT = Path(__file__).resolve().parents[1]
posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes of folders are POSIX's")
as_root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can become two users")


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    for name in ("MINIGPT_MODEL", "MINIGPT_DATA", "MINIGPT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda", "cuda:3"])
def test_the_device_decides_about_the_default_model(device):
    expected = "mini" if device == "cpu" else "gpt2"
    for d in (device, torch.device(device)):
        assert choose_model(d) == ModelChoice(expected, asked=False)


def test_a_model_that_somebody_named_is_marked_as_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIGPT_MODEL", "gpt2-large")
    assert choose_model("cpu") == ModelChoice("gpt2-large", asked=True)
    assert choose_model("cuda", "mini") == ModelChoice("mini", asked=True)
    assert choose_model("cpu", str(tmp_path)) == ModelChoice(str(tmp_path), asked=True)
    assert str(choose_model("cpu", "gpt2")) == "gpt2"
    monkeypatch.setenv("MINIGPT_MODEL", "")
    assert choose_model("cpu") == ModelChoice("mini", asked=False)


@pytest.mark.parametrize("name", MODEL_NAMES[1:])
def test_a_hub_name_is_the_model_of_that_name(monkeypatch, name):
    assert check_model_name(f"openai-community/{name}") == name
    monkeypatch.setenv("MINIGPT_MODEL", f"openai-community/{name}")
    assert choose_model("cpu") == ModelChoice(name, asked=True)


@pytest.mark.parametrize("name", ["gpt2", "mini", "openai-community/gpt2"])
def test_a_folder_with_the_name_of_a_model_is_not_taken_for_it_without_a_word(monkeypatch, tmp_path, capsys, name):
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    paths._say_which_is_meant.cache_clear()
    assert [check_model_name(name), check_model_name(name)] == [name.split("/")[-1]] * 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and repr(name) in err and f"./{name}" in err
    assert check_model_name(f"./{name}") == f"./{name}" and capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["gpt3", "Mini", "no/such/folder", "", "openai-community/mini", "gpt2/", "other/gpt2"])
def test_an_unknown_model_is_refused_and_the_known_ones_are_listed(monkeypatch, name):
    with pytest.raises(ValueError) as caught:
        check_model_name(name)
    assert repr(name) in str(caught.value) and all(known in str(caught.value) for known in MODEL_NAMES)
    if name:
        monkeypatch.setenv("MINIGPT_MODEL", name)
        with pytest.raises(ValueError, match="unknown model"):
            choose_model("cpu")


def test_a_file_is_no_model(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ValueError, match="unknown model"):
        check_model_name(str(file))


def test_the_data_lie_beside_the_package():
    folder = data_dir()
    assert (folder / "mini" / "tokenizer.tiktoken").is_file()


def test_the_data_folder_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIGPT_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        data_dir()
    assert str(tmp_path) in str(caught.value) and "MINIGPT_DATA" in str(caught.value)
    (tmp_path / "mini").mkdir()
    assert data_dir() == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.setenv("MINIGPT_DATA", f"~/{tmp_path.name}")
    assert data_dir() == tmp_path


@pytest.mark.parametrize("place", ["beside", "inside"])
def test_a_working_copy_and_a_wheel_both_find_their_data(monkeypatch, tmp_path, place):
    package = tmp_path / "minigpt_lib"
    package.mkdir()
    spec = SimpleNamespace(origin=str(package / "__init__.py"))
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(FileNotFoundError) as caught:
        data_dir()
    assert str(tmp_path / "data") in str(caught.value) and str(package / "data") in str(caught.value)
    data = (tmp_path if place == "beside" else package) / "data"
    (data / "mini").mkdir(parents=True)
    assert data_dir() == data


# --- the cache, and folders that are ours alone


def test_the_cache_is_the_users_own_and_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "minigpt" and not cache_dir().exists()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "minigpt"
    monkeypatch.setenv("MINIGPT_CACHE", "~/mine")
    assert cache_dir() == tmp_path / "mine"


@posix
def test_a_private_folder_is_made_for_this_user_alone(tmp_path):
    folder = tmp_path / "new" / "cache"
    before = os.umask(0o002)  # as where every user has a group of their own
    try:
        assert private_folder(folder) == folder
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    assert private_folder(folder) == folder  # others may read


@posix
@pytest.mark.parametrize("mode", [0o775, 0o777, 0o722, 0o1777])
def test_a_folder_that_others_can_write_is_refused(tmp_path, mode):
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(PermissionError, match="can be written by other users.*chmod go-w.*MINIGPT_CACHE") as caught:
        private_folder(folder)
    assert str(folder) in str(caught.value)


@posix
def test_a_folder_inside_one_that_everybody_can_write_is_refused_unless_it_is_sticky(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    with pytest.raises(PermissionError, match="where everybody can replace it"):
        private_folder(tmp_path / "shared" / "cache")
    (tmp_path / "shared").chmod(0o1777)  # as /tmp: nobody renames or removes what belongs to another
    assert private_folder(tmp_path / "shared" / "cache").is_dir()


@as_root
@pytest.mark.parametrize("what", ["folder", "link"])
def test_what_another_user_owns_is_refused(tmp_path, what):
    folder = tmp_path / "cache"
    (tmp_path / "ours").mkdir(mode=0o700)
    if what == "link":
        folder.symlink_to(tmp_path / "ours")
    else:
        folder.mkdir(mode=0o700)
    assert private_folder(folder) == folder
    os.chown(folder, 65534, 65534, follow_symlinks=False)
    with pytest.raises(PermissionError, match="belongs to another user"):
        private_folder(folder)


@as_root
def test_two_users_of_one_machine():
    """A folder of root's is fine for another user to trust, one of a third user's is not."""
    base = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    base.chmod(0o755)
    for name, owner in (("root", 0), ("theirs", 12345), ("mine", 65534)):
        (base / name).mkdir(mode=0o755)
        os.chown(base / name, owner, owner)
    code = """
import os, pathlib, sys
from minigpt_lib.paths import private_folder
os.setgid(65534); os.setuid(65534)
for name in ("root", "theirs", "mine"):
    try:
        private_folder(pathlib.Path(sys.argv[1]) / name)
        print(name, "trusted")
    except PermissionError:
        print(name, "refused")
"""
    done = subprocess.run([sys.executable, "-c", code, base], cwd=ROOT, capture_output=True, text=True, timeout=300)
    shutil.rmtree(base)
    assert done.stdout.split("\n")[:3] == ["root trusted", "theirs refused", "mine trusted"], done.stderr
