"""Tensors in files: mapped or converted, whole or in shards, and every bit of them accounted for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from minigpt_lib.model.gpt import GPTConfig
from minigpt_lib.weights.convert import WeightsError, check_finite, config_to_hf
from minigpt_lib.weights.pretrained import load_pretrained, save_pretrained
from minigpt_lib.weights.stored import (
    StoredTensor,
    all_finite,
    map_file,
    safetensors_entries,
    write_safetensors,
)

ROOT = Path(__file__).resolve().parents[1]
CONFIG = GPTConfig(83, 24, 20, 2, 5)


def random_oracle(config: GPTConfig = CONFIG) -> GPT2LMHeadModel:
    oracle = GPT2LMHeadModel(GPT2Config(**config_to_hf(config))).eval()
    for name, p in oracle.named_parameters():
        norm = ".ln_" in name and name.endswith("weight") and config.n_embd >= 100
        p.data.normal_(1 if norm else 0, 0.3 if config.n_embd < 100 else 0.02)
    return oracle


@torch.no_grad()
def largest_difference(model, oracle, T: int) -> float:
    idx = torch.randint(0, model.config.vocab_size, (2, T))  # (B, T)
    ours, theirs = model(idx)[0], oracle(idx).logits  # (B, T, vocab_size)
    assert theirs.std() > 0.1
    return (ours - theirs).abs().max().item()


@pytest.fixture
def file(tmp_path, seed) -> Path:
    """A file of this library with three tensors."""
    tensors = {"a": torch.randn(7, 5), "b": torch.randn(3_000_001), "c": torch.randn(4).half()}
    write_safetensors(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


# --- one file


def test_what_is_written_is_read_by_the_formats_own_library(file):
    theirs, ours = load_file(file), {name: t.load() for name, t in safetensors_entries(file.parent).items()}
    assert set(theirs) == set(ours) == {"a", "b", "c"}
    assert all(torch.equal(theirs[name], t) and theirs[name].dtype == t.dtype for name, t in ours.items())


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float64])
def test_mapped_and_converted_tensors_hold_the_same_numbers(file, dtype):
    want = load_file(file)
    for name, t in safetensors_entries(file.parent).items():
        got = t.load(dtype=dtype)
        assert torch.equal(got, want[name].to(dtype or want[name].dtype)) and got.is_contiguous()
        assert t.equal(want[name]) and t.equal(t) and not t.equal(want[name].flip(0))


def test_a_tensor_at_an_odd_place_is_read_too(tmp_path, seed):
    t = torch.randn(50)
    (tmp_path / "raw").write_bytes(b"xyz" + t.numpy().tobytes())
    stored = StoredTensor("t", tmp_path / "raw", 3, (5, 10), torch.float32)
    assert torch.equal(stored.load(), t.view(5, 10))


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_every_flipped_bit_is_noticed_and_its_tensor_named(file, seed, dtype):
    content = file.read_bytes()
    entries = safetensors_entries(file.parent)
    for _ in range(12):
        name = ["a", "b", "c"][int(torch.randint(3, ()))]
        t = entries[name]
        place = t.offset + int(torch.randint(t.numel * t.dtype.itemsize, ()))
        bit = 1 << int(torch.randint(8, ()))
        file.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        with pytest.raises(WeightsError, match=f"bytes of {name} have changed|{name} holds"):
            t.load(dtype=dtype)
    file.write_bytes(content)
    assert all(torch.isfinite(t.load(dtype=dtype)).all() for t in entries.values())


def test_a_file_cut_while_it_is_read(file):
    t = safetensors_entries(file.parent)["b"]
    file.write_bytes(file.read_bytes()[:5_000_000])
    with pytest.raises(WeightsError, match="cut off"):
        t.load(dtype=torch.float64)


@pytest.mark.parametrize("crc", ["{", "[1]", '{"a": 1}'])
def test_damaged_checksums_are_an_error_not_a_pass(tmp_path, seed, crc):
    save_file({"a": torch.randn(3)}, tmp_path / "model.safetensors", metadata={"format": "pt", "crc32c": crc})
    with pytest.raises(WeightsError, match="checksums|have changed"):
        safetensors_entries(tmp_path)["a"].load()


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_each_load_is_a_tensor_of_its_own(file, dtype):
    t = safetensors_entries(file.parent)["b"]
    first = t.load(dtype=dtype).zero_()
    assert t.load(dtype=dtype).abs().sum() > 0 and first.abs().sum() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not let go of a mapped file")
def test_a_tensor_outlives_its_file(file):
    want = load_file(file)["b"].clone()
    t = safetensors_entries(file.parent)["b"].load()
    file.unlink()
    assert torch.equal(t, want)
    assert torch.equal(t.mul_(2), want * 2)


def test_a_number_too_large_for_the_wanted_type_is_refused(tmp_path):
    save_file({"a": torch.tensor([1.0, 7e4, -1e5])}, tmp_path / "model.safetensors")
    t = safetensors_entries(tmp_path)["a"]
    assert t.load().tolist() == [1, 7e4, -1e5] and torch.isfinite(t.load(dtype=torch.bfloat16)).all()
    with pytest.raises(WeightsError, match="a holds 2 values.*torch.float16"):
        t.load(dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_among_many_is_found(tmp_path, seed, dtype, bad):
    """Wherever it stands, and also among numbers whose sum overflows."""
    top = torch.finfo(dtype).max
    t = torch.full((100_003,), top, dtype=dtype)
    t[::2] *= -1 if torch.rand(()) < 0.5 else 1
    check_finite("t", t)
    t[int(torch.randint(len(t), ()))] = bad
    with pytest.raises(WeightsError, match="t holds 1 values"):
        check_finite("t", t)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_in_any_tensor_of_a_plain_file_is_found(tmp_path, seed, bad):
    """Tensors of several types and lengths, of which some are asked for; what lies between them does not count."""
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float32, torch.float32]
    tensors = {f"t{i}": torch.randn(int(torch.randint(1, 50_000, ())), dtype=dtype) for i, dtype in enumerate(dtypes)}
    tensors["bytes"] = torch.zeros(3, dtype=torch.uint8)
    for name in [name for name in tensors if name != "bytes"]:
        place = int(torch.randint(len(tensors[name]), ()))
        good, tensors[name][place] = tensors[name][place].clone(), bad
        save_file(tensors, tmp_path / "model.safetensors")
        entries = safetensors_entries(tmp_path)
        files = {t.path: map_file(t.path) for t in entries.values()}
        asked = [t for t in entries.values() if t.name != "bytes"]
        assert not all_finite(asked, files)
        assert all_finite([t for t in asked if t.name != name], files)
        tensors[name][place] = good


# --- shards


@pytest.fixture
def shards(tmp_path, seed) -> tuple[Path, GPT2LMHeadModel]:
    """A folder that Transformers wrote in several files."""
    oracle = random_oracle()
    oracle.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    return tmp_path, oracle


def test_shards_load_with_equal_logits(shards):
    folder, oracle = shards
    assert largest_difference(load_pretrained(folder), oracle, 24) <= 1e-5


def edit_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("transformer.ln_f.bias"), "different tensors: transformer.ln_f.bias"),
        (lambda m: m.update({"transformer.extra": next(iter(m.values()))}), "different tensors: transformer.extra"),
        (lambda m: m.update({"transformer.ln_f.bias": "../model.safetensors"}), "outside its folder"),
        (lambda m: m.update({"transformer.ln_f.bias": 3}), "not an index"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(shards, change, words):
    edit_index(shards[0], change)
    with pytest.raises(WeightsError, match=words):
        load_pretrained(shards[0])


def test_a_missing_or_damaged_shard_is_named(shards):
    last = sorted(shards[0].glob("model-*.safetensors"))[-1]
    content = last.read_bytes()
    last.write_bytes(content[:-10])
    with pytest.raises(WeightsError, match=f"{last.name}.*cut off"):
        load_pretrained(shards[0])
    last.unlink()
    with pytest.raises(FileNotFoundError, match=last.name):
        load_pretrained(shards[0])


def test_an_index_that_is_no_index(shards):
    (shards[0] / "model.safetensors.index.json").write_text("<html>")
    with pytest.raises(WeightsError, match="not an index"):
        load_pretrained(shards[0])


# --- at full size


def test_the_124m_shape_there_and_back(tmp_path, seed):
    """Random weights in GPT-2's shape: Transformers -> here -> Transformers, logits within 1e-4."""
    oracle = random_oracle(GPTConfig.preset("gpt2"))
    oracle.save_pretrained(tmp_path / "theirs")
    model = load_pretrained(tmp_path / "theirs")
    assert model.num_parameters() == 124_439_808
    assert largest_difference(model, oracle, 10) <= 1e-4
    save_pretrained(model, tmp_path / "ours")
    back, info = GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert largest_difference(model, back.eval(), 10) <= 1e-4
    for folder in ("theirs", "ours"):
        (tmp_path / folder / "model.safetensors").unlink()  # a gigabyte


PEAK = """
import sys, torch
from pathlib import Path
from minigpt_lib.weights.pretrained import load_pretrained
def memory(key):
    return next(int(l.split()[1]) * 1024 for l in Path("/proc/self/status").read_text().splitlines() if key in l)
load_pretrained("mini")  # what is imported late
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
model = load_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
size = sum(p.numel() * p.element_size() for p in model.parameters())
print((memory("VmHWM") - before) / size)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_the_memory_of_one_model(tmp_path, seed, dtype):
    config = GPTConfig(20_000, 512, 768, 6, 12)  # 58 million parameters
    folder = save_pretrained_random(config, tmp_path)
    command = [sys.executable, "-c", PEAK, str(folder), dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if "PermissionError" in done.stderr:
        pytest.skip("this system does not let a process reset its peak")
    assert done.returncode == 0, done.stderr
    ratio = float(done.stdout)
    assert 0.9 <= ratio <= 1.2, ratio  # every page was looked at, and none of them twice


def save_pretrained_random(config: GPTConfig, folder: Path) -> Path:
    oracle = random_oracle(config)
    oracle.save_pretrained(folder)
    return folder
