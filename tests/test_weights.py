"""Loading and saving: against Transformers in both directions, and everything that must be refused."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import tiktoken
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from minigpt_lib.download import FetchError
from minigpt_lib.model.gpt import GPTConfig, GPTLanguageModel
from minigpt_lib.paths import MODEL_NAMES, ModelChoice, choose_model, data_dir
from minigpt_lib.text.tokenizer import load_tokenizer
from minigpt_lib.weights import pretrained as weights
from minigpt_lib.weights.convert import (
    TRANSPOSED,
    WeightsError,
    config_from_hf,
    config_to_hf,
    from_hf_state,
    parameter_shapes,
    to_hf_state,
)
from minigpt_lib.weights.hub import HUB, fetch, short_name
from minigpt_lib.weights.pretrained import (
    empty_model,
    load_course_model,
    load_pretrained,
    model_folder,
    save_pretrained,
)
from minigpt_lib.weights.stored import read_safetensors
from minigpt_lib.weights.verify import GOLDENS

ROOT = Path(__file__).resolve().parents[1]
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

CONFIG = GPTConfig(vocab_size=83, n_ctx=24, n_embd=20, n_layer=2, n_head=5, dropout=0.1)


def random_model(config: GPTConfig = CONFIG) -> GPTLanguageModel:
    """Every tensor random, biases and norms too, so that no tensor may be lost without being noticed."""
    model = GPTLanguageModel(config).eval()
    for p in model.parameters():
        p.data.normal_(0, 0.3)
    return model


def random_oracle(config: GPTConfig = CONFIG) -> GPT2LMHeadModel:
    oracle = GPT2LMHeadModel(GPT2Config(**config_to_hf(config))).eval()
    for p in oracle.parameters():
        p.data.normal_(0, 0.3)
    return oracle


def tokens(config: GPTConfig = CONFIG) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (3, config.n_ctx))  # (B, T)


@torch.no_grad()
def largest_difference(model: GPTLanguageModel, oracle: GPT2LMHeadModel) -> float:
    idx = tokens(model.config)
    ours, theirs = model(idx)[0], oracle(idx).logits  # (B, T, vocab_size)
    assert theirs.std() > 0.1  # logits that say something
    return (ours - theirs).abs().max().item()


@pytest.fixture
def folder(tmp_path: Path, seed: int) -> Path:
    """A loadable folder with a random model."""
    return save_pretrained(random_model(), tmp_path / "model")


def edit(folder: Path, change) -> None:
    """Rewrite the folder's tensors after change(dict)."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


# ---- round trips with Transformers


@pytest.mark.parametrize("shape", [(83, 24, 20, 2, 5), (50, 7, 12, 1, 1), (131, 40, 32, 3, 8)])
def test_transformers_folder_loads_with_equal_logits(tmp_path, seed, shape):
    config = GPTConfig(*shape)
    oracle = random_oracle(config)
    oracle.save_pretrained(tmp_path)
    model = load_pretrained(tmp_path)
    assert model.config == config
    assert largest_difference(model, oracle) <= 1e-5


def test_saved_folder_opens_in_transformers_with_equal_logits(folder):
    model = load_pretrained(folder)
    oracle, info = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert largest_difference(model, oracle.eval()) <= 1e-5


def test_round_trip_is_bit_exact(tmp_path, seed):
    model = random_model()
    again = load_pretrained(save_pretrained(model, tmp_path))
    assert again.config == model.config
    want = model.state_dict()
    assert all(torch.equal(t, want[name]) for name, t in again.state_dict().items())
    first = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).digest()
    save_pretrained(again, tmp_path)
    assert hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).digest() == first


def test_trained_further_in_transformers_and_back(tmp_path, seed):
    """The other direction of trust: what Transformers writes after reading ours is ours again."""
    model = random_model()
    save_pretrained(model, tmp_path / "a")
    GPT2LMHeadModel.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    again = load_pretrained(tmp_path / "b").state_dict()
    assert all(torch.equal(again[name], t) for name, t in model.state_dict().items())


def test_file_layout_is_the_hubs(folder):
    state = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in state and not any(name.startswith("transformer.") for name in state)
    assert len(state) == 12 * CONFIG.n_layer + 4
    assert state["h.1.attn.c_attn.weight"].shape == (20, 60)
    assert state["h.1.mlp.c_fc.weight"].shape == (20, 80)
    assert state["h.1.mlp.c_proj.weight"].shape == (80, 20)
    hf = json.loads((folder / "config.json").read_text())
    assert hf["activation_function"] == "gelu_new" and hf["n_positions"] == hf["n_ctx"] == 24


def test_124m_names_and_count():
    shapes = parameter_shapes(GPTConfig.preset("gpt2"))
    assert len(shapes) == 148
    assert sum(torch.Size(s).numel() for s in shapes.values()) == 124_439_808


@pytest.mark.parametrize("shape", [(83, 24, 20, 2, 5), (50, 7, 12, 1, 1), (131, 40, 32, 11, 8)])
def test_what_is_expected_without_building_is_what_a_built_model_has(shape):
    """The list of names and shapes, and the model on the meta device, against a model with numbers."""
    config = GPTConfig(*shape, dropout=0.1)
    built, empty = GPTLanguageModel(config), empty_model(config)
    want = [(name, tuple(p.shape)) for name, p in built.named_parameters()]
    assert list(parameter_shapes(config).items()) == want
    assert [(name, tuple(p.shape)) for name, p in empty.named_parameters()] == want
    assert str(empty) == str(built) and empty.config == config and empty.lm_head.weight is empty.wte.weight
    assert all(p.is_meta for p in empty.parameters())
    empty.h[0].mlp.c_fc.register_forward_hook(print)  # no module stands for two
    assert sum(len(block.mlp.c_fc._forward_hooks) for block in empty.h) == 1


def test_a_model_without_numbers_costs_neither_the_compiler_nor_random_numbers():
    code = (
        "import sys, torch\nfrom minigpt_lib.model.gpt import GPTConfig\n"
        "from minigpt_lib.weights.pretrained import empty_model\nbefore = torch.get_rng_state()\n"
        "empty_model(GPTConfig.preset('gpt2'))\n"
        "print('torch._dynamo' in sys.modules, torch.equal(before, torch.get_rng_state()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False True\n", done.stderr


KINDS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [0, 1])
def test_each_transpose_matters(seed, kind, layer):
    """A matrix the wrong way round is refused when its shape tells, and seen in the logits when it is square."""
    assert set(TRANSPOSED) == set(KINDS)
    oracle = random_oracle()
    name = f"transformer.h.{layer}.{kind}"
    state = oracle.state_dict()
    state[name] = state[name].t()
    if kind != "attn.c_proj.weight":
        with pytest.raises(WeightsError, match="nn.Linear"):
            from_hf_state(state, CONFIG)
        return
    model = GPTLanguageModel(CONFIG).eval()
    model.load_state_dict(from_hf_state(state, CONFIG), strict=False)
    assert largest_difference(model, oracle) > 0.01
    model.load_state_dict(from_hf_state(oracle.state_dict(), CONFIG), strict=False)
    assert largest_difference(model, oracle) <= 1e-5


def test_mapping_is_its_own_inverse_and_copies(seed):
    oracle = random_oracle()
    state = from_hf_state(oracle.state_dict(), CONFIG)
    assert all(t.is_contiguous() for t in state.values())
    back = to_hf_state(state)
    given = {name.removeprefix("transformer."): t for name, t in oracle.state_dict().items() if "lm_head" not in name}
    assert set(back) == set(given) and all(torch.equal(back[name], given[name]) for name in given)
    before = given["wte.weight"].clone()
    state["wte.weight"].zero_()
    assert torch.equal(given["wte.weight"], before)  # the caller's tensors are left alone


# ---- what the loaded model is


def test_loaded_model_is_tied_real_trainable_and_in_eval_mode(folder):
    model = load_pretrained(folder)
    assert model.lm_head.weight is model.wte.weight
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert all(p.requires_grad for p in model.parameters()) and not any(m.training for m in model.modules())
    idx = tokens()
    model.train()(idx, idx)[1].backward()
    assert model.wte.weight.grad.abs().sum() > 0


def test_file_and_model_do_not_touch_each_other(folder):
    """The parameters may be a mapping of the file: training must not write to it, nor a new file change the model."""
    content = (folder / "model.safetensors").read_bytes()
    model, other = load_pretrained(folder), load_pretrained(folder)
    want = {name: t.clone() for name, t in other.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2).add_(1)
    assert (folder / "model.safetensors").read_bytes() == content
    assert all(torch.equal(t, want[name]) for name, t in other.state_dict().items())
    assert all(torch.equal(t, want[name]) for name, t in load_pretrained(folder).state_dict().items())
    save_pretrained(model, folder)  # replaces the file that both are mapped from
    assert all(torch.equal(t, want[name]) for name, t in other.state_dict().items())
    assert torch.equal(load_pretrained(folder).wpe.weight, model.wpe.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_cast_on_request_and_kept_otherwise(folder, dtype):
    want = load_pretrained(folder).state_dict()
    model = load_pretrained(folder, dtype=dtype)
    assert all(torch.equal(t, want[name].to(dtype)) for name, t in model.state_dict().items())
    save_pretrained(model, folder)
    assert {t.dtype for t in load_pretrained(folder).state_dict().values()} == {dtype}


def test_prefix_mask_buffers_and_equal_head_are_accepted(folder):
    want = load_pretrained(folder).state_dict()

    def old_style(state: dict) -> None:
        for name in list(state):
            state["transformer." + name] = state.pop(name)
        for i in range(CONFIG.n_layer):
            state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
            state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        state["lm_head.weight"] = state["transformer.wte.weight"].clone()

    edit(folder, old_style)
    assert all(torch.equal(t, want[name]) for name, t in load_pretrained(folder).state_dict().items())


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_head_alone_is_the_embedding_too(folder, prefix):
    """Whoever writes a shared tensor once may choose either name."""
    want = load_pretrained(folder).state_dict()

    def rename(state: dict) -> None:
        for name in list(state):
            state[prefix + name] = state.pop(name)
        state["lm_head.weight"] = state.pop(prefix + "wte.weight")

    edit(folder, rename)
    model = load_pretrained(folder)
    assert model.lm_head.weight is model.wte.weight
    assert all(torch.equal(t, want[name]) for name, t in model.state_dict().items())
    state = from_hf_state(load_file(folder / "model.safetensors"), CONFIG)
    assert torch.equal(state["wte.weight"], want["wte.weight"]) and "lm_head.weight" not in state


def test_values_whose_sum_is_not_finite_load_all_the_same(folder):
    """Large numbers are allowed, and the mask buffers may hold minus infinity."""

    def large(state: dict) -> None:
        state["wpe.weight"].fill_(torch.finfo(torch.float32).max)
        state["h.0.attn.masked_bias"] = torch.tensor(-float("inf"))

    edit(folder, large)
    assert load_pretrained(folder).wpe.weight.min() == torch.finfo(torch.float32).max


# ---- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="loading onto a GPU needs CUDA")
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("plain", [True, False])
def test_weights_go_straight_to_the_gpu(folder, dtype, plain):
    """From a file with checksums and from one without: the same numbers as a cast of those that the CPU loads."""
    want = load_pretrained(folder).state_dict()
    if plain:
        edit(folder, lambda state: None)
    model = load_pretrained(folder, device="cuda", dtype=dtype)
    assert all(p.is_cuda for p in model.parameters()) and model.lm_head.weight is model.wte.weight
    for name, t in model.state_dict().items():
        assert t.dtype == (dtype or torch.float32) and torch.equal(t.cpu(), want[name].to(t.dtype)), name
    with torch.inference_mode():
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]], device="cuda"))[0]).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="loading onto a GPU needs CUDA")
@pytest.mark.parametrize("bad", [float("nan"), 1e6])
def test_values_that_are_not_finite_on_the_gpu_are_refused(folder, bad):
    """1e6 is a number in the file, and infinite in float16."""
    edit(folder, poke("h.1.attn.c_proj.weight", bad))
    with pytest.raises(WeightsError, match="h.1.attn.c_proj.weight holds 1 values"):
        load_pretrained(folder, device="cuda", dtype=torch.float16)


# ---- what must be refused: tensors


def put(name: str, t: torch.Tensor):
    return lambda state: state.__setitem__(name, t)


def poke(name: str, value: float):
    return lambda state: state[name].view(-1).__setitem__(-1, value)


def eight_bits(state: dict) -> None:
    for name in ("wte.weight", "lm_head.weight"):
        state[name] = torch.ones(83, 20).to(torch.float8_e4m3fn)


BAD_TENSORS = {
    "a type that torch has and we do not": (eight_bits, ["wte.weight", "F8_E4M3"]),
    "missing": (lambda s: s.pop("h.1.ln_2.bias"), ["missing", "h.1.ln_2.bias"]),
    "missing embedding": (lambda s: s.pop("wte.weight"), ["missing", "wte.weight"]),
    "a head alone, of another shape": (
        lambda s: s.update({"lm_head.weight": s.pop("wte.weight")[:-1]}), ["wte.weight", "(82, 20)", "(83, 20)"],
    ),
    "extra layer": (put("h.2.ln_1.weight", torch.ones(20)), ["unknown", "h.2.ln_1.weight"]),
    "unknown": (put("h.0.attn.rotary", torch.ones(3)), ["unknown", "h.0.attn.rotary"]),
    "lora left over": (put("h.0.attn.c_attn.lora_A", torch.ones(3)), ["unknown", "lora_A"]),
    "shape": (put("h.0.ln_1.weight", torch.ones(21)), ["h.0.ln_1.weight", "(21,)", "(20,)"]),
    "broadcastable shape": (put("h.0.ln_1.bias", torch.ones(1)), ["h.0.ln_1.bias", "(1,)", "(20,)"]),
    "vocabulary": (put("wte.weight", torch.ones(84, 20)), ["wte.weight", "(84, 20)", "(83, 20)"]),
    "(out, in)": (put("h.0.mlp.c_fc.weight", torch.ones(80, 20)), ["h.0.mlp.c_fc.weight", "(80, 20)", "(20, 80)"]),
    "integers": (put("h.0.ln_1.bias", torch.ones(20, dtype=torch.int64)), ["h.0.ln_1.bias", "torch.int64"]),
    "mixed": (put("h.1.ln_1.bias", torch.ones(20).half()), ["h.1.ln_1.bias", "torch.float16", "dtype=torch.float32"]),
    "nan": (poke("h.1.attn.c_proj.weight", float("nan")), ["h.1.attn.c_proj.weight", "1 value", "NaN"]),
    "inf": (poke("ln_f.bias", float("inf")), ["ln_f.bias", "infinite"]),
    "untied head": (put("lm_head.weight", torch.ones(83, 20)), ["lm_head.weight", "wte.weight", "tied"]),
    "head of another shape": (put("lm_head.weight", torch.ones(80, 20)), ["lm_head.weight", "tied"]),
    "head of another dtype": (put("lm_head.weight", torch.ones(83, 20).half()), ["lm_head.weight", "tied"]),
    "twice": (put("transformer.ln_f.bias", torch.ones(20)), ["ln_f.bias", "twice"]),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused_by_name(folder, case):
    change, words = BAD_TENSORS[case]
    edit(folder, change)
    with pytest.raises(WeightsError) as caught:
        load_pretrained(folder)
    assert all(word in str(caught.value) for word in [*words, "model.safetensors"]), caught.value


def test_mixed_dtypes_load_when_a_cast_is_asked_for(folder):
    edit(folder, put("h.1.ln_1.bias", torch.ones(20).half()))
    assert {p.dtype for p in load_pretrained(folder, dtype=torch.float32).parameters()} == {torch.float32}


def test_a_file_without_a_tensor_is_refused(folder):
    save_file({}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"missing: h\.0") as caught:
        load_pretrained(folder)
    assert str(folder) in str(caught.value)


# ---- what must be refused: files


def test_missing_files(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors.*pytorch_model\.bin"):
        load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "names", [["pytorch_model.bin"], ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"]]
)
def test_a_pickle_is_named_with_the_way_to_convert_it(tmp_path, seed, names):
    """The command in the message is pasted into a shell, from a folder with a space in its name."""
    folder, oracle = tmp_path / "old model", random_oracle()
    oracle.config.save_pretrained(folder)
    state = {name: t for name, t in oracle.state_dict().items() if name != "lm_head.weight"}
    torch.save(state, folder / names[-1])
    if len(names) == 2:
        index = {"metadata": {}, "weight_map": dict.fromkeys(state, names[-1])}
        (folder / names[0]).write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="pickle") as caught:
        load_pretrained(folder)
    command = str(caught.value).partition("convert it: ")[2]
    assert shlex.split(command)[-1] == str(folder)
    if len(names) == 2:  # the same command, which takes a while
        return
    command = command.replace("python ", f"{shlex.quote(sys.executable)} ", 1)
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert largest_difference(load_pretrained(folder), oracle) <= 1e-5


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_truncated_file_says_so(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="cut off") as caught:
        load_pretrained(folder)
    assert str(path) in str(caught.value) and str(path.stat().st_size) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html>\n<html><head><title>Login</title></head></html>", "web page"),
        (b"\n  <HTML><body>Not found</body></HTML>" + bytes(5000), "web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 548105171\n", "Git LFS"),
        (b"PK\x03\x04" + bytes(4000), "not a safetensors file"),
        (b'{"error": "gated model"}' + bytes(50), "not a safetensors file"),
        ((40).to_bytes(8, "little") + b"{" + b"x" * 39 + bytes(100), "damaged"),
    ],
)
def test_other_content_under_the_right_name(folder, content, words):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=words) as caught:
        read_safetensors(folder / "model.safetensors")
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("cut", range(0, 9))
def test_any_prefix_of_a_file_is_refused_with_a_reason(folder, cut):
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[: len(raw) * cut // 9 - (cut == 9)])
    with pytest.raises(WeightsError, match="cut off"):
        read_safetensors(folder / "model.safetensors")


# ---- the config


def test_config_survives_the_round_trip(seed):
    config = GPTConfig(61, 17, 24, 3, 4, 0.25, 1e-6)
    assert config_from_hf(config_to_hf(config)) == config
    assert config_from_hf(GPT2Config(**config_to_hf(config)).to_dict()) == config


def test_config_defaults_are_transformers_own():
    assert config_from_hf(GPT2Config().to_dict()) == GPTConfig.preset("gpt2", dropout=0.1)
    hub = {"vocab_size": 50257, "n_ctx": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}  # without n_positions
    assert config_from_hf(hub) == GPTConfig.preset("gpt2", dropout=0.1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation_function": "relu"}, ["activation_function='relu'", "gelu_new"]),
        ({"activation_function": "gelu"}, ["activation_function='gelu'", "gelu_new"]),
        ({"model_type": "llama"}, ["llama", "gpt2"]),
        ({"n_inner": 99}, ["n_inner=99", "80"]),
        ({"tie_word_embeddings": False}, ["tie_word_embeddings=False"]),
        ({"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx=True"]),
        ({"scale_attn_weights": False}, ["scale_attn_weights=False"]),
        ({"n_head": 3}, ["n_embd=20", "n_head=3"]),
        ({"n_layer": None}, ["config.json"]),
        ({"n_embd": "20"}, ["config.json"]),
    ],
)
def test_configs_of_other_models_are_refused(folder, change, words):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(WeightsError) as caught:
        load_pretrained(folder)
    assert all(word in str(caught.value) for word in [*words, str(path)]), caught.value


@pytest.mark.parametrize(
    "change",
    [{"n_layer": 3_000_000}, {"n_layer": 10**9}, {"vocab_size": 10**9}, {"n_embd": 10**9}, {"n_positions": 2**30}],
)
@pytest.mark.parametrize("layout", ["hub", "openai"])
def test_sizes_beyond_any_gpt2_are_refused_before_anything_is_built(folder, monkeypatch, change, layout):
    monkeypatch.setattr(weights, "empty_model", lambda config: pytest.fail("it was built"))
    monkeypatch.setattr(weights, "parameter_shapes", lambda config: pytest.fail("its tensors were listed"))
    hf = json.loads((folder / "config.json").read_text()) | change
    if layout == "openai":
        (folder / "config.json").unlink()
        names = {"n_vocab": "vocab_size", "n_ctx": "n_positions"} | {n: n for n in ("n_embd", "n_layer", "n_head")}
        (folder / "hparams.json").write_text(json.dumps({name: hf[key] for name, key in names.items()}))
    else:
        (folder / "config.json").write_text(json.dumps(hf))
    began = time.monotonic()
    (key,) = change
    with pytest.raises(WeightsError, match=f"{key.replace('n_positions', 'n_ctx')}=[0-9,]+, and more than") as caught:
        load_pretrained(folder)
    assert time.monotonic() - began < 5 and str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh"])
def test_every_name_of_the_tanh_gelu_loads_with_transformers_logits(tmp_path, seed, name):
    oracle = GPT2LMHeadModel(GPT2Config(**config_to_hf(CONFIG) | {"activation_function": name})).eval()
    for p in oracle.parameters():
        p.data.normal_(0, 0.3)
    oracle.save_pretrained(tmp_path)
    assert largest_difference(load_pretrained(tmp_path), oracle) <= 1e-5


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "<html></html>", '{"n_embd": 20}'])
def test_config_that_is_no_gpt2_config(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=r"config\.json"):
        load_pretrained(folder)


def test_config_that_contradicts_the_tensors(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_positions": 32, "n_ctx": 32}))
    with pytest.raises(WeightsError, match=r"wpe\.weight has shape \(24, 20\).*\(32, 20\)"):
        load_pretrained(folder)


def test_different_dropout_rates_warn():
    with pytest.warns(UserWarning, match="dropout"):
        config = config_from_hf(config_to_hf(CONFIG) | {"attn_pdrop": 0.0})
    assert config.dropout == 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config_from_hf(config_to_hf(CONFIG))


# ---- saving


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("step", ["write", "replace"])
def test_a_crash_while_saving_leaves_the_old_model(folder, monkeypatch, step):
    before = files_in(folder)

    def half(tensors, path) -> None:
        Path(path).write_bytes(b"half a file")
        raise OSError("disk full")

    def no(*args) -> None:
        raise OSError("killed")

    if step == "write":
        monkeypatch.setattr(weights, "write_safetensors", half)
    else:
        monkeypatch.setattr(os, "replace", no)
    with pytest.raises(OSError, match="disk full|killed"):
        save_pretrained(random_model(), folder)
    monkeypatch.undo()
    assert files_in(folder) == before
    load_pretrained(folder)


@pytest.mark.parametrize("killed_at", [1, 2, 3, 4])
@pytest.mark.parametrize("new", [True, False])
def test_a_kill_at_any_rename_leaves_one_model_or_a_folder_that_is_refused(tmp_path, seed, killed_at, new):
    """Config, weights and tokenizer of two saves are never mixed; the shapes are equal, so only n_head would differ."""
    old, fresh = random_model(), random_model(replace(CONFIG, n_head=4))
    folder = tmp_path / "model"
    if not new:
        save_pretrained(old, folder)
    save_pretrained(fresh, tmp_path / "fresh")
    code = (
        "import os, sys\nfrom minigpt_lib.weights.pretrained import load_pretrained, save_pretrained\n"
        "model, count, real = load_pretrained(sys.argv[1]), [0], os.replace\n"
        "def replace(*args):\n"
        "    count[0] += 1\n"
        f"    os._exit(9) if count[0] == {killed_at} else real(*args)\n"
        "os.replace = replace\nsave_pretrained(model, sys.argv[2])\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "fresh"), str(folder)])
    assert run.returncode == (9 if killed_at < 4 else 0)  # three renames: all files together, then each of the two
    if killed_at == 1 and new:
        with pytest.raises(FileNotFoundError):
            load_pretrained(folder)
    elif killed_at in (2, 3):
        with pytest.raises(WeightsError, match="interrupted.*saved"):
            load_pretrained(folder)
        for path in (folder / ".saved").iterdir():  # what the message says
            path.rename(folder / path.name)
        (folder / ".saved").rmdir()
    if not (killed_at == 1 and new):
        want = old if killed_at == 1 else fresh
        found = load_pretrained(folder)
        assert found.config == want.config
        assert all(torch.equal(t, want.state_dict()[name]) for name, t in found.state_dict().items())


def test_the_next_save_mends_an_interrupted_one(folder):
    (folder / ".saved").mkdir()
    (folder / "config.json").rename(folder / ".saved" / "config.json")
    save_pretrained(model := random_model(), folder)
    assert torch.equal(load_pretrained(folder).wte.weight, model.wte.weight) and not (folder / ".saved").exists()


def test_a_crash_while_saving_into_a_new_folder_leaves_no_model(tmp_path, seed, monkeypatch):
    monkeypatch.setattr(weights, "write_safetensors", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(random_model(), tmp_path / "new")
    assert files_in(tmp_path) == {}


def test_both_files_have_the_same_permissions(folder):
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_other_files_in_the_folder_are_left_alone(folder):
    (folder / "training.json").write_text("{}")
    save_pretrained(random_model(), folder)
    assert set(files_in(folder)) == {"config.json", "model.safetensors", "training.json"}


def test_nothing_is_saved_that_could_not_be_loaded(tmp_path, seed):
    model = random_model()
    model.ln_f.bias.data[3] = float("nan")
    with pytest.raises(WeightsError, match=r"ln_f\.bias"):
        save_pretrained(model, tmp_path / "nan")
    model = random_model()
    model.lm_head.weight = torch.nn.Parameter(torch.randn(83, 20))
    with pytest.raises(WeightsError, match="tied"):
        save_pretrained(model, tmp_path / "untied")
    assert files_in(tmp_path) == {}


def test_unmerged_lora_is_refused_and_merged_lora_saved(tmp_path, seed):
    lora = pytest.importorskip("minigpt_lib.tuning.lora")
    model = lora.add_lora(random_model(), r=2)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.normal_(0, 0.3)
    idx = tokens()
    with torch.no_grad():
        want = model.eval()(idx)[0]
    with pytest.raises(WeightsError, match="merge_lora"):
        save_pretrained(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    save_pretrained(lora.merge_lora(model), tmp_path / "lora")
    with torch.no_grad():
        assert (load_pretrained(tmp_path / "lora")(idx)[0] - want).abs().max() <= 1e-4


@pytest.mark.parametrize("what", ["whole", "blocks", "both"])
def test_a_compiled_model_is_saved_like_the_model_in_it(tmp_path, seed, what):
    model = random_model()
    want = {name: t.clone() for name, t in model.state_dict().items()}
    if what in ("blocks", "both"):
        for i, block in enumerate(model.h):
            model.h[i] = torch.compile(block)
    save_pretrained(model if what == "blocks" else torch.compile(model), tmp_path)
    found = load_pretrained(tmp_path).state_dict()
    assert set(found) == set(want) and all(torch.equal(found[name], t) for name, t in want.items())


@pytest.mark.parametrize("merged", [True, False])
def test_inside_lora_disabled_the_base_is_saved(tmp_path, seed, merged):
    from minigpt_lib.tuning.lora import add_lora, lora_disabled, lora_parameters, merge_lora

    model = random_model()
    want = {name: t.clone() for name, t in model.state_dict().items()}
    add_lora(model, r=2)
    for p in lora_parameters(model).values():
        p.data.normal_(0, 0.3)
    if merged:
        merge_lora(model)
    with lora_disabled(model):
        save_pretrained(model, tmp_path / "base")
    found = load_pretrained(tmp_path / "base").state_dict()
    assert set(found) == set(want) and all(torch.equal(found[name], t) for name, t in want.items())
    if merged:
        tuned = load_pretrained(save_pretrained(model, tmp_path / "merged"))
        assert not torch.equal(tuned.h[0].attn.c_attn.weight, want["h.0.attn.c_attn.weight"])


# ---- saving: the tokenizer and the ids of special tokens


@pytest.mark.parametrize(
    "ids",
    [
        {"bos_token_id": 0, "eos_token_id": 2},
        {"bos_token_id": None, "eos_token_id": None},
        {"bos_token_id": 1, "eos_token_id": [5, 7]},
        {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 3},
    ],
)
def test_the_configs_special_tokens_are_kept_and_none_is_guessed(folder, ids):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ids))
    model = load_pretrained(folder)
    again = save_pretrained(model, folder.parent / "again")
    found = json.loads((again / "config.json").read_text())
    assert {key: found.get(key) for key in ids} == ids
    half = save_pretrained(load_pretrained(again, dtype=torch.bfloat16), folder.parent / "half")
    assert json.loads((half / "config.json").read_text()) == found


def test_a_new_models_end_token_is_its_tokenizers(tmp_path, seed, byte_encoding):
    model = random_model(GPTConfig(300, 8, 12, 1, 2))
    save_pretrained(model, tmp_path / "without")
    assert json.loads((tmp_path / "without" / "config.json").read_text())["eos_token_id"] is None
    save_pretrained(model, tmp_path / "with", byte_encoding)
    assert json.loads((tmp_path / "with" / "config.json").read_text())["eos_token_id"] == 256


def test_a_vocabulary_padded_beyond_its_tokens_is_saved_and_loaded_again(tmp_path, seed):
    """4,160 ids, a multiple of 64, for mini's 4,096 tokens."""
    enc, config = load_tokenizer("mini"), GPTConfig(4160, 16, 12, 1, 2)
    folder = tmp_path / "padded"
    for _ in range(2):
        model = load_pretrained(folder) if folder.exists() else random_model(config)
        save_pretrained(model, folder, enc)
        found = load_tokenizer(folder)
        assert (found.n_vocab, found.eot_token) == (4096, 4095) and load_pretrained(folder).config == config
        assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 4095
        assert found.encode("The capital of Norway is") == enc.encode("The capital of Norway is")


def test_another_tokenizer_takes_the_place_of_the_old_one(tmp_path, seed, byte_encoding):
    """mini's is written in two forms, this one in one: the second form of mini's must not stay."""
    model = random_model(GPTConfig(4160, 8, 12, 1, 2))
    for enc in (load_tokenizer("mini"), byte_encoding, load_tokenizer("mini")):
        save_pretrained(model, tmp_path, enc)
        found = load_tokenizer(tmp_path)
        assert found.encode("The capital") == enc.encode("The capital") and found.n_vocab == enc.n_vocab


def test_transformers_reads_the_tokenizer_that_is_saved_and_continues_the_same_text(tmp_path):
    from transformers import AutoTokenizer, pipeline

    enc = load_tokenizer("mini")
    save_pretrained(load_pretrained("mini"), tmp_path, enc)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["The capital of Norway is", "naïve 😀👍🏽 of", "東京は日本の首都です", "  two   spaces\n\n\ttabs ",
             "", "a<|endoftext|>b", "it's 1,024 don't", "\u00a0é\u200b"]  # fmt: skip
    for text in texts:
        assert theirs(text).input_ids == enc.encode(text, allowed_special="all"), text
        assert theirs.decode(enc.encode(text, allowed_special="all")) == text
    assert theirs.eos_token_id == enc.eot_token == 4095
    write = pipeline("text-generation", model=str(tmp_path), device="cpu")
    (out,) = write("The capital of Norway is", max_new_tokens=2, do_sample=False)
    assert out["generated_text"] == "The capital of Norway is Oslo."


def test_tokenizer_travels_with_the_model(tmp_path, seed):
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}
    enc = tiktoken.Encoding("tiny", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258})
    config = GPTConfig(259, 8, 12, 1, 2)
    save_pretrained(random_model(config), tmp_path, enc)
    again = load_tokenizer(tmp_path)
    text = "the other thing, naïve 東京"
    assert again.encode_ordinary(text) == enc.encode_ordinary(text) and again.eot_token == 258
    hf = json.loads((tmp_path / "config.json").read_text())
    assert hf["eos_token_id"] == hf["bos_token_id"] == 258
    with pytest.raises(WeightsError, match=r"259 .*vocab_size=83"):
        save_pretrained(random_model(), tmp_path / "small", enc)


# ---- names, downloads, fallback


@pytest.mark.parametrize("name", list(HUB))
def test_the_hubs_names_are_the_official_models(folder, monkeypatch, name):
    asked = []
    monkeypatch.setattr(weights, "fetch", lambda name: asked.append(name) or folder)
    repo = HUB[name][0]
    assert load_pretrained(repo).config == load_pretrained(name).config == CONFIG
    assert asked == [name, name] and short_name(repo) == name and short_name("other/gpt2") == "other/gpt2"
    with pytest.raises(FileNotFoundError, match="no folder other/gpt2"):
        load_pretrained("other/gpt2")


def test_a_folder_called_like_an_official_model_is_meant_by_its_path(folder, monkeypatch):
    monkeypatch.setattr(weights, "fetch", lambda name: pytest.fail("the official model was fetched"))
    folder.rename(folder.parent / "gpt2")
    monkeypatch.chdir(folder.parent)
    assert load_pretrained("./gpt2").config == load_pretrained(Path("gpt2")).config == CONFIG
    assert model_folder("mini") == data_dir() / "mini" and model_folder(Path("gpt2")) == Path("gpt2")
    with pytest.raises(FileNotFoundError, match="no folder gpt2-xl"):
        model_folder(Path("gpt2-xl"))


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="gpt3") as caught:
        load_pretrained("gpt3")
    assert all(name in str(caught.value) for name in MODEL_NAMES)
    with pytest.raises(ValueError, match="mini") as caught:
        fetch("mini")
    assert "gpt2-xl" in str(caught.value)


def absent(monkeypatch) -> None:
    """As on a machine that has neither the hub's cache nor a network."""

    def fetch(name):
        raise FetchError(f"{name} is not here")

    monkeypatch.setattr(weights, "fetch", fetch)


@pytest.fixture
def mini_data(tmp_path, seed, monkeypatch) -> Path:
    """A data folder with a small stand-in for mini."""
    ranks = {bytes([i]): i for i in range(256)}
    enc = tiktoken.Encoding("mini", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
    save_pretrained(random_model(GPTConfig(257, 8, 12, 1, 2)), tmp_path / "data" / "mini", enc)
    monkeypatch.setenv("MINIGPT_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def test_course_model_falls_back_to_mini_with_one_line(mini_data, monkeypatch, capsys):
    absent(monkeypatch)
    model, enc, loaded = load_course_model(ModelChoice("gpt2", asked=False))
    assert loaded.name == "mini"
    assert (model.config.vocab_size, enc.n_vocab) == (257, 257)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "gpt2" in printed and "mini" in printed
    with pytest.raises(FetchError):
        load_course_model(ModelChoice("gpt2", asked=True))


@pytest.mark.parametrize("error", [FetchError("no network"), ImportError("no huggingface_hub"), OSError("timed out")])
def test_what_the_fallback_returns_is_what_it_loaded(mini_data, monkeypatch, error):
    """The notebook's MODEL names it, and device and dtype are those asked for."""

    def fetch(name):
        raise error

    monkeypatch.setattr(weights, "fetch", fetch)
    model, enc, choice = load_course_model(ModelChoice("gpt2-xl", asked=False), "cpu", dtype=torch.bfloat16)
    assert choice.name == str(choice) == "mini" and model.wte.weight.dtype == torch.bfloat16
    assert model.config.vocab_size == enc.n_vocab == 257


def test_damaged_official_weights_are_no_reason_to_fall_back(folder, mini_data, monkeypatch):
    (folder / "model.safetensors").write_bytes(b"<html>")
    monkeypatch.setattr(weights, "fetch", lambda name: folder)
    with pytest.raises(WeightsError, match="web page"):
        load_course_model(ModelChoice("gpt2", asked=False))


def test_an_official_model_comes_with_the_choice_that_asked_for_it(folder, monkeypatch, byte_encoding):
    monkeypatch.setattr(weights, "fetch", lambda name: folder)
    monkeypatch.setattr(weights, "load_tokenizer", lambda name: {"gpt2": byte_encoding}[name])
    for name in ("gpt2", "openai-community/gpt2"):
        model, enc, choice = load_course_model(ModelChoice(name, asked=True), "cpu")
        assert choice == ModelChoice(name, asked=True) and enc is byte_encoding and model.config == CONFIG


def test_course_model_from_a_folder_by_its_name(mini_data, capsys):
    """MINIGPT_MODEL=FOLDER: what save_pretrained wrote, tokenizer included, serves wherever a name does."""
    choice = choose_model("cpu", str(mini_data / "mini"))
    model, enc, loaded = load_course_model(choice)
    assert choice.asked and model.config == GPTConfig(257, 8, 12, 1, 2) and enc.n_vocab == 257
    for file in (mini_data / "mini").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        load_course_model(choice)
    assert capsys.readouterr().out == ""


def test_course_model_loads_mini_silently_and_a_damaged_one_not_at_all(mini_data, capsys):
    model, enc, loaded = load_course_model(ModelChoice("mini", asked=False))
    assert enc.eot_token == 256 and not model.training and capsys.readouterr().out == ""
    (mini_data / "mini" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        load_course_model(ModelChoice("mini", asked=False))
    assert capsys.readouterr().out == ""


def test_shipped_mini_loads_and_is_gpt2_shaped():
    try:
        model = load_pretrained("mini")
    except FileNotFoundError as error:
        pytest.skip(f"mini is not here: {error}")
    assert model.config.vocab_size == 4096 and model.lm_head.weight is model.wte.weight


# ---- the lesson


def test_the_lessons_published_text_is_that_of_the_golden_ids(gpt2_encoding):
    cells = json.loads((ROOT / "notebooks" / "05_loading_weights.ipynb").read_text("utf-8"))["cells"]
    (source,) = ["".join(c["source"]) for c in cells if re.match("PROMPT = ", "".join(c["source"]))]
    told: dict[str, str] = {}
    exec(source, told)
    (case,) = [case for case in GOLDENS["gpt2"]["greedy"] if case["from"] == "picoGPT"]
    assert told["PROMPT"] == gpt2_encoding.decode(case["ids"])
    assert told["GPT2_SAYS"] == gpt2_encoding.decode(case["next"]) and len(case["next"]) == 38
