"""Official weights: from a hub on this machine, from OpenAI's server on this machine, and what happens without them."""

import hashlib
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from serving import File, Server, serve
from tf_writer import random_tensors, write

from minigpt_lib.cli import main
from minigpt_lib.download import FetchError
from minigpt_lib.model.gpt import GPTConfig, GPTLanguageModel
from minigpt_lib.paths import MODEL_NAMES
from minigpt_lib.weights.convert import WeightsError
from minigpt_lib.weights.hub import HUB, OPENAI, check_sha256, fetch, fetch_openai, openai_cache
from minigpt_lib.weights.pretrained import load_pretrained, save_pretrained

ROOT = Path(__file__).resolve().parents[1]
REVISION = HUB["gpt2"][1]


@pytest.fixture
def server() -> Server:
    with serve() as found:
        yield found


@pytest.fixture
def folder(tmp_path, seed) -> Path:
    return save_pretrained(GPTLanguageModel(GPTConfig(83, 24, 20, 2, 5)), tmp_path / "model")


def publish(server: Server, folder: Path, name: str = "gpt2", **how) -> tuple[str, str]:
    """Serve a model as the hub does; returns the path of its weights and their SHA-256."""
    repo, revision, _ = HUB[name]
    start = f"/{repo}/resolve/{revision}"
    for file in ("config.json", "model.safetensors"):
        body = (folder / file).read_bytes()
        digest = hashlib.sha256(body).hexdigest()
        headers = {"X-Repo-Commit": revision, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(body))} if "model" in file else {}
        server.files[f"{start}/{file}"] = File(body, headers=headers)
    weights = server.files[f"{start}/model.safetensors"]
    for key, value in how.items():
        setattr(weights, key, value)
    return f"{start}/model.safetensors", digest


def elsewhere(code: str, server: Server | None, cache: Path, **env: str) -> subprocess.CompletedProcess:
    """Run code in a fresh process whose hub is this server: huggingface_hub reads its variables when it is imported."""
    settings = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    settings |= {"HF_HOME": str(cache), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1"}
    settings |= {"HF_ENDPOINT": server.url} if server else {}
    head = "import sys, hashlib\nimport minigpt_lib.weights.hub as hub\n"
    head += "from minigpt_lib.weights.pretrained import load_pretrained\n"
    return subprocess.run([sys.executable, "-c", head + code], cwd=ROOT, env=settings | env, capture_output=True,
                          text=True, timeout=300)  # fmt: skip


def pinned(digest: str) -> str:
    """Code that pins the SHA-256 of the served file in place of the real one."""
    return f'hub.HUB["gpt2"] = (*hub.HUB["gpt2"][:2], {digest!r})\n'


LOAD = 'model = load_pretrained("gpt2")\nprint(model.wpe.weight.double().sum().item())\n'


def names_in(cache: Path) -> set[str]:
    return {p.name for p in cache.rglob("*") if p.is_file() or p.is_symlink()}


# --- the hub


def test_weights_come_from_the_mirror_once_and_then_from_the_cache(server, folder, tmp_path):
    path, digest = publish(server, folder)
    first = elsewhere(pinned(digest) + LOAD, server, tmp_path / "hf")
    assert first.returncode == 0, first.stderr
    want = load_pretrained(folder).wpe.weight.double().sum().item()
    assert float(first.stdout) == want
    asked = len(server.requests)
    again = elsewhere(pinned(digest) + LOAD, server, tmp_path / "hf")
    assert float(again.stdout) == want and len(server.requests) == asked
    away = elsewhere(pinned(digest) + LOAD, None, tmp_path / "hf", HF_HUB_OFFLINE="1")
    assert float(away.stdout) == want and len(server.gets(path)) == 1


def test_a_cut_line_to_the_hub_is_resumed(server, tmp_path, seed):
    """The hub's client writes 10 MB at a time, so the file has to be larger."""
    folder = save_pretrained(GPTLanguageModel(GPTConfig(83, 24, 400, 2, 5)), tmp_path / "model")
    path, digest = publish(server, folder, cuts=[11_000_000])
    done = elsewhere(pinned(digest) + LOAD, server, tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    first, second = server.gets(path)
    assert first is None and int(second[6:-1]) >= 10_000_000


@pytest.mark.parametrize("pin", [True, False])
def test_wrong_bytes_from_the_hub_are_refused(server, folder, tmp_path, pin):
    """With a hash of our own, and with the one that the hub states."""
    path, digest = publish(server, folder)
    body = bytearray(server.files[path].body)
    body[-100] ^= 1
    server.files[path].body = bytes(body)
    code = f'hub.HUB["gpt2"] = (*hub.HUB["gpt2"][:2], {digest if pin else None!r})\n'
    done = elsewhere(code + LOAD, server, tmp_path / "hf")
    assert done.returncode == 1 and done.stdout == ""
    assert "WeightsError" in done.stderr and "SHA-256" in done.stderr and "delete" in done.stderr
    code += "from minigpt_lib.cli import main\nsys.exit(main(['verify', 'gpt2', '--device', 'cpu']))"
    done = elsewhere(code, server, tmp_path / "hf")  # a failed check, with its line in the table
    assert done.returncode == 1 and "SHA-256" in done.stdout and "0 passed, 1 failed" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "how",
    [
        {"status": 403},
        {"status": 404},
        {"body": b"<html>log in</html>", "kind": "text/html", "headers": {}},
        {"cuts": [1000] + [0] * 50},
    ],
)
def test_a_hub_that_fails_is_a_fetch_error_with_ways_out(server, folder, tmp_path, how):
    publish(server, folder, **how)
    done = elsewhere(LOAD, server, tmp_path / "hf")
    assert done.returncode == 1 and done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    words = ("FetchError", "openai-community/gpt2", REVISION[:8], server.url, "HF_ENDPOINT", "HF_HUB_OFFLINE")
    assert all(word in last for word in words), last
    assert "model.safetensors" not in names_in(tmp_path / "hf")


def test_processes_at_the_same_time_share_one_cache(server, folder, tmp_path):
    path, digest = publish(server, folder)
    with ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda _: elsewhere(pinned(digest) + LOAD, server, tmp_path / "hf"), range(3)))
    assert [run.returncode for run in runs] == [0, 0, 0], runs[0].stderr
    assert len({run.stdout for run in runs}) == 1


def test_without_a_network_it_fails_within_seconds(tmp_path):
    load = LOAD.splitlines()[0]
    code = f"import time\nstart = time.time()\ntry:\n    {load}\nfinally:\n    print(time.time() - start)"
    done = elsewhere(code, None, tmp_path / "hf", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1 and "FetchError" in done.stderr.splitlines()[-1]
    assert float(done.stdout) < 15  # the hub's own client tries for half a minute
    done = elsewhere(code, None, tmp_path / "hf", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in done.stderr and float(done.stdout) < 15


def test_a_hub_that_stays_silent_is_not_waited_for(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        silent.listen(5)
        began = time.monotonic()
        code = 'hub.fetch("gpt2", timeout=1)'
        done = elsewhere(code, None, tmp_path / "hf", HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert "FetchError" in done.stderr and "Timeout" in done.stderr and time.monotonic() - began < 60


def test_unknown_names_list_the_known_ones():
    for f in (fetch, fetch_openai):
        with pytest.raises(ValueError, match="mini.*gpt2-xl"):
            f("mini")
    assert set(HUB) == set(OPENAI) == set(MODEL_NAMES) - {"mini"}
    assert all(len(revision) == 40 for _, revision, _ in HUB.values())


def test_large_files_are_checked_against_the_name_the_cache_gives_them(folder, monkeypatch, tmp_path):
    """The hub's cache stores a file as blobs/<sha256> and links to it: models without a pinned hash are checked too."""
    raw = (folder / "model.safetensors").read_bytes()
    blob = tmp_path / hashlib.sha256(raw).hexdigest()
    blob.write_bytes(raw)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, file, revision: str(folder / file))
    assert load_pretrained("gpt2-medium").config.n_embd == 20
    blob.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(WeightsError, match="SHA-256"):
        load_pretrained("gpt2-medium")
    with pytest.raises(WeightsError, match="SHA-256"):
        check_sha256(folder / "config.json", "0" * 64)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_the_content_is_checked_where_the_cache_has_no_links(server, folder, tmp_path, name):
    """Without links the cache does not say the hash: it is our own pin, or what the hub stated at the download."""
    path, digest = publish(server, folder, name)
    code = (pinned(digest) if name == "gpt2" else "") + LOAD.replace("gpt2", name)
    first = elsewhere(code, server, tmp_path / "hf", HF_HUB_DISABLE_SYMLINKS="1")
    assert first.returncode == 0, first.stderr
    (file,) = (tmp_path / "hf").rglob("model.safetensors")
    assert not file.is_symlink()
    offline = {"HF_HUB_DISABLE_SYMLINKS": "1", "HF_HUB_OFFLINE": "1"}
    assert elsewhere(code, None, tmp_path / "hf", **offline).stdout == first.stdout
    raw = bytearray(file.read_bytes())
    raw[8] ^= 8  # "{" becomes "s"
    file.write_bytes(raw)
    flipped = elsewhere(code, None, tmp_path / "hf", **offline)
    assert flipped.returncode == 1 and "SHA-256" in flipped.stderr and digest in flipped.stderr, flipped.stderr


def test_a_cache_that_was_filled_by_others_asks_for_the_hash_once(server, folder, tmp_path):
    path, digest = publish(server, folder, "gpt2-medium")
    code, no_links = LOAD.replace("gpt2", "gpt2-medium"), {"HF_HUB_DISABLE_SYMLINKS": "1"}
    assert elsewhere(code, server, tmp_path / "hf", **no_links).returncode == 0
    (note,) = (tmp_path / "hf").rglob("*.sha256")
    note.unlink()
    asked = len(server.requests)
    for _ in range(2):
        assert elsewhere(code, server, tmp_path / "hf", **no_links).returncode == 0
    assert len(server.requests) == asked + 1 and len(server.gets(path)) == 1 and note.read_text() == digest
    note.write_text("0" * 64)
    refused = elsewhere(code, None, tmp_path / "hf", **no_links)
    assert refused.returncode == 1 and "0" * 64 in refused.stderr


def test_without_the_hub_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"minigpt-lib\[course\]"):
        fetch("gpt2")


# --- OpenAI's server


@pytest.fixture
def release(server, tmp_path, seed, monkeypatch) -> Server:
    """OpenAI's server on this machine, with a tiny model in place of the 124M one."""
    source = tmp_path / "source"
    tensors = random_tensors(np.random.default_rng(seed))
    write(source, tensors)
    for file in source.iterdir():
        server.files[f"/gpt-2/models/124M/{file.name}"] = File(file.read_bytes())
    monkeypatch.setitem(OPENAI, "gpt2", ("124M", sum(t.size for t in tensors.values()), None))
    monkeypatch.setenv("MINIGPT_OPENAI_URL", f"{server.url}/gpt-2")
    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path / "cache"))
    server.wpe = torch.from_numpy(tensors["model/wpe"])
    return server


DATA = "/gpt-2/models/124M/model.ckpt.data-00000-of-00001"


def test_openais_files_are_fetched_once_and_load(release, tmp_path):
    release.files[DATA].cuts = [5000]
    for _ in range(2):
        found = fetch_openai("gpt2")
        assert torch.equal(load_pretrained(found).wpe.weight, release.wpe)
    assert found == openai_cache() / "openai" / "124M" and tmp_path in found.parents
    assert len(release.requests) == 4  # three files, one of them cut once


def test_openais_files_with_a_flipped_bit_or_of_another_length_are_refused(release):
    body = bytearray(release.files[DATA].body)
    body[1234] ^= 4
    release.files[DATA].body = bytes(body)
    with pytest.raises(WeightsError, match="have changed|NaN"):
        load_pretrained(fetch_openai("gpt2"))
    (openai_cache() / "openai" / "124M" / "model.ckpt.data-00000-of-00001").unlink()
    release.files[DATA].body = bytes(body[:-4])
    with pytest.raises(FetchError, match="bytes instead of"):
        fetch_openai("gpt2")
    assert not list(openai_cache().rglob("*.data-00000-of-00001"))


def test_verify_takes_openais_files(release, capsys, monkeypatch):
    assert main(["verify", "gpt2", "--openai", "--device", "cpu"]) == 1  # it is not GPT-2
    out = capsys.readouterr().out
    assert "loads strictly" in out and "MD5" in out and "FAIL" in out and "124,439,808" in out
    release.files.clear()
    monkeypatch.setenv("MINIGPT_CACHE", str(openai_cache() / "other"))
    assert main(["verify", "gpt2", "--openai"]) == 3
    assert "404" in capsys.readouterr().err


def test_the_cache_is_where_the_variables_say(monkeypatch, tmp_path):
    monkeypatch.delenv("MINIGPT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert openai_cache() == tmp_path / "minigpt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert openai_cache() == Path.home() / ".cache" / "minigpt"
