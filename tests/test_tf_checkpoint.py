"""OpenAI's layout read without TensorFlow: a checkpoint that TensorFlow made, and ones of an independent writer."""

import base64
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from make_tf_checkpoint import HPARAMS, number, shapes
from tf_writer import random_tensors, slow_crc, table, write

from minigpt_lib.weights.convert import TRANSPOSED, WeightsError, from_openai_names
from minigpt_lib.weights.crc32c import crc32c
from minigpt_lib.weights.pretrained import config_from_openai, load_pretrained
from minigpt_lib.weights.tf_checkpoint import read_bundle, read_table

MADE = json.loads(Path(__file__).with_name("tf_checkpoint.json").read_text("utf-8"))


@pytest.fixture
def rng(seed) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def made(tmp_path) -> Path:
    """The folder that TensorFlow wrote."""
    for name, text in MADE["files"].items():
        (tmp_path / name).write_bytes(base64.b64decode(text))
    (tmp_path / "hparams.json").write_text(json.dumps(MADE["hparams"]))
    return tmp_path


# --- the checksum


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"", 0),
    ],
)
def test_crc32c_of_the_standards_vectors(data, crc):
    assert crc32c(data) == crc


def test_crc32c_is_that_of_the_definition_at_every_length(rng):
    for n in [*range(12), *rng.integers(12, 100_000, 12), 5684, 5685, 5686, 11370, 11371, 45_480]:
        data = rng.bytes(int(n))
        cut = int(rng.integers(0, n + 1))
        assert crc32c(data) == slow_crc(data) == crc32c(data[cut:], crc32c(data[:cut])), n
        assert crc32c(np.frombuffer(data, np.uint8)) == crc32c(data)


def test_crc32c_sees_every_single_bit(rng):
    data = bytearray(rng.bytes(20_000))
    want = crc32c(data)
    for place in rng.integers(0, len(data), 60):
        data[place] ^= 1 << place % 8
        assert crc32c(data) != want
        data[place] ^= 1 << place % 8
    assert crc32c(data) == want


# --- what TensorFlow wrote


def test_tensorflows_checkpoint_is_read_bit_for_bit(made):
    assert "TensorFlow 2" in MADE["made by"] and "tensorflow" not in sys.modules
    found = read_bundle(made / "model.ckpt")
    assert {name: t.shape for name, t in found.items()} == shapes(**HPARAMS)
    for name, t in found.items():
        assert torch.equal(t.load(), torch.from_numpy(number(name, t.shape))), name


def test_the_model_from_tensorflows_checkpoint_has_every_number_in_its_place(made):
    model = load_pretrained(made)
    config = config_from_openai(made / "hparams.json")
    assert model.config == config and (config.vocab_size, config.n_ctx, config.n_layer) == (21, 7, 2)
    state = model.state_dict()
    for name, shape in shapes(**HPARAMS).items():
        want = torch.from_numpy(number(name, shape)).squeeze(0)
        ours = name.removeprefix("model/").replace("/g", ".weight").replace("/w", ".weight")
        ours = {"wte": "wte.weight", "wpe": "wpe.weight"}.get(name.removeprefix("model/"), ours)
        ours = ours.replace("/b", ".bias").replace("/", ".")
        ours = f"h.{ours[1:]}" if ours[1].isdigit() else ours
        assert torch.equal(state[ours], want.t() if ours.endswith(TRANSPOSED) else want), name


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what is mapped is read from Linux's /proc")
def test_the_numbers_are_the_files_own_pages_and_no_copy(made):
    model = load_pretrained(made)
    lines = Path("/proc/self/maps").read_text().splitlines()
    lines = [line for line in lines if line.endswith(str(made / "model.ckpt.data-00000-of-00001"))]
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    assert all(any(a <= p.data_ptr() < b for a, b in spans) for p in model.parameters())


def test_flipping_any_one_byte_of_the_index_is_noticed(made, rng):
    path = made / "model.ckpt.index"
    content = path.read_bytes()
    flips = [(place, int(rng.integers(8))) for place in range(len(content) - 48)]
    flips += [(len(content) - 1 - i // 8, i % 8) for i in range(48 * 8)]  # the footer has no checksum: every bit of it
    for place, bit in flips:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        with pytest.raises(WeightsError) as caught:
            read_bundle(made / "model.ckpt")
        assert str(path) in str(caught.value)


def test_flipping_any_byte_of_the_numbers_names_the_tensor(made, rng):
    path = made / "model.ckpt.data-00000-of-00001"
    content = path.read_bytes()
    found = read_bundle(made / "model.ckpt")
    for place in map(int, rng.integers(0, len(content), 40)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.integers(8)]) + content[place + 1 :])
        hit = next(n for n, t in found.items() if t.offset <= place < t.offset + 4 * t.numel)
        with pytest.raises(WeightsError, match="have changed|NaN") as caught:
            load_pretrained(made)
        short = next(iter(from_openai_names({hit: found[hit]})))
        assert hit in str(caught.value) or short in str(caught.value)


@pytest.mark.parametrize("name", ["model.ckpt.index", "model.ckpt.data-00000-of-00001"])
@pytest.mark.parametrize("cut", [0, 1, 40, 0.5, -1])
def test_a_file_that_ends_early_is_refused(made, name, cut):
    content = (made / name).read_bytes()
    (made / name).write_bytes(content[: int(len(content) * cut) if isinstance(cut, float) else cut])
    with pytest.raises(WeightsError) as caught:
        load_pretrained(made)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["model.ckpt.index", "model.ckpt.data-00000-of-00001", "hparams.json"])
def test_a_web_page_in_place_of_a_file_is_refused(made, name):
    (made / name).write_text("<!DOCTYPE html><html><body>Sign in</body></html>")
    with pytest.raises(WeightsError, match=name):
        load_pretrained(made)


def test_files_that_do_not_belong_together_are_refused(made):
    with (made / "model.ckpt.data-00000-of-00001").open("ab") as f:
        f.write(bytes(4))
    with pytest.raises(WeightsError, match="do not belong together"):
        load_pretrained(made)
    (made / "model.ckpt.data-00000-of-00001").unlink()
    with pytest.raises(FileNotFoundError, match="data-00000-of-00001"):
        load_pretrained(made)
    (made / "model.ckpt.index").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.ckpt\.index"):
        load_pretrained(made)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_layer": 3}, "missing: .*h.2"),
        ({"n_layer": 1}, "unknown: .*h.1"),
        ({"n_embd": 16, "n_head": 4}, r"wte.weight has shape \(21, 8\).*\(21, 16\)"),
        ({"n_head": 3}, "hparams.json"),
        ({"n_ctx": "7"}, "hparams.json"),
    ],
)
def test_hparams_that_do_not_fit_are_refused(made, change, words):
    (made / "hparams.json").write_text(json.dumps(HPARAMS | change))
    with pytest.raises(WeightsError, match=words):
        load_pretrained(made)


# --- what another writer wrote


@pytest.mark.parametrize("options", [{}, {"shards": 3}, {"per_block": 1}, {"per_block": 99, "every": 16}, {"every": 1}])
def test_tables_of_any_make_are_read(tmp_path, rng, options):
    tensors = random_tensors(rng)
    prefix = write(tmp_path, tensors, **options)
    found = read_bundle(prefix)
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name].load(), torch.from_numpy(t)) for name, t in tensors.items())
    assert torch.equal(load_pretrained(tmp_path).wte.weight, torch.from_numpy(tensors["model/wte"]))


def test_other_number_types(tmp_path, rng):
    tensors = {"a": rng.standard_normal((3, 5)), "b": rng.integers(0, 9, 4), "c": np.float16([[1, 2]])}
    found = read_bundle(write(tmp_path, tensors))
    assert all(torch.equal(found[name].load(), torch.from_numpy(t)) for name, t in tensors.items())


def test_keys_with_long_values_and_varints_of_several_bytes(tmp_path, rng):
    pairs = {rng.bytes(int(n)) + bytes([i]): rng.bytes(int(n) * 40) for i, n in enumerate(rng.integers(0, 60, 50))}
    (tmp_path / "t.index").write_bytes(table(pairs, per_block=7, every=4))
    assert read_table(tmp_path / "t.index") == pairs


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model/h1/ln_2/b"), "missing: h.1.ln_2.bias"),
        (lambda t: t.update({"global_step": np.zeros((), np.int64)}), "unknown: global_step"),
        (lambda t: t.update({"model/h9/ln_2/b": np.ones(8, np.float32)}), "unknown: h.9.ln_2.bias"),
        (lambda t: t.update({"model/wpe": np.ones((9, 8), np.float32)}), r"wpe.weight has shape \(9, 8\)"),
        (lambda t: t.update({"model/wpe": np.ones((7, 8), np.float16)}), "wpe.weight is torch.float16"),
        (lambda t: t.update({"model/wpe": np.ones((7, 8), np.int64)}), "wpe.weight has dtype torch.int64"),
        (lambda t: t["model/ln_f/g"].__setitem__(3, np.nan), "model/ln_f/g holds 1 values"),
        (lambda t: t.update({"model/h0/attn/c_attn/w": np.ones((8, 24), np.float32)}), None),
        (lambda t: t.update({"model/h0/attn/c_attn/w": np.ones((2, 8, 24), np.float32)}), "c_attn.weight has shape"),
    ],
)
def test_every_tensor_is_accounted_for(tmp_path, rng, change, words):
    tensors = random_tensors(rng)
    change(tensors)
    write(tmp_path, dict(sorted(tensors.items())))
    if words is None:  # without the leading 1, but not in doubt
        assert load_pretrained(tmp_path).h[0].attn.c_attn.weight.sum() == 8 * 24
        return
    with pytest.raises(WeightsError, match=words):
        load_pretrained(tmp_path)


def test_what_cannot_be_read_is_named(tmp_path, rng):
    tensors = random_tensors(rng)
    with pytest.raises(WeightsError, match="Snappy"):
        read_bundle(write(tmp_path / "snappy", tensors, kind=1))
    with pytest.raises(WeightsError, match="big-endian"):
        read_bundle(write(tmp_path / "big", tensors, big=True))
    with pytest.raises(WeightsError, match="not the index of a TensorFlow checkpoint"):
        (tmp_path / "x.index").write_bytes(bytes(100))
        read_bundle(tmp_path / "x")
