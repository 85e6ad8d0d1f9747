"""The step in C++ against the plain model: all forms of weights, padding, chunks, bad input, and how it is compiled."""

import ctypes
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from decoding import greedy_slow, one_by_one, pad, prompt, random_model, rounded, twin_of

from minigpt_lib.generation import native
from minigpt_lib.generation.compiled import cpp_compiler
from minigpt_lib.generation.decode import generate, stream
from minigpt_lib.generation.kv_cache import KVCache, prefill
from minigpt_lib.generation.native import MOST, NativeGPT, compile_step
from minigpt_lib.generation.prompt_lookup import generate_lookup
from minigpt_lib.model.gpt import GPTConfig, GPTLanguageModel
from minigpt_lib.tuning.lora import add_lora, lora_disabled, merge_lora

pytestmark = pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler was found")
FORMS = [None, "bfloat16", "int8"]
CLOSE = {None: 5e-5, "bfloat16": 5e-5, "int8": 1e-2}  # with int8, the numbers between the layers have 16 bits
ODD = GPTConfig(vocab_size=71, n_ctx=64, n_embd=39, n_layer=2, n_head=3)  # no size that is a multiple of a register's


@pytest.fixture
def model(seed: int) -> GPTLanguageModel:
    return random_model()


def counted(fast: NativeGPT, monkeypatch) -> list[tuple[int, int, int]]:
    """(B, T, wanted) of each call into C++ from here on."""
    calls, call = [], fast._call
    monkeypatch.setattr(fast, "_call", lambda text: calls.append((text.B, text.T, text.wanted)) or call(text))
    return calls


@pytest.mark.parametrize("weights", FORMS)
@pytest.mark.parametrize("T", [1, 2, 3, 7])
@pytest.mark.parametrize("config", [None, ODD])
def test_steps_agree_with_the_plain_model(seed, weights, T, config):
    model = random_model() if config is None else random_model(config)
    idx = prompt(61, B=2)
    want = one_by_one(rounded(model, weights), idx)
    got = one_by_one(NativeGPT(model, weights), idx, T)
    assert want.std() > 0.3 and (got - want).abs().max() <= CLOSE[weights]
    if weights is not None:
        with torch.no_grad():
            assert (got - model(idx)[0]).abs().max() > 3 * CLOSE[weights]  # it was rounded at all


@pytest.mark.parametrize("weights", FORMS)
def test_weights_that_lie_transposed_in_memory(model, weights):
    """As those of a checkpoint in Conv1D's layout do: the C++ reads memory, not strides."""
    for p in model.parameters():
        if p.dim() == 2:
            p.data = p.data.t().contiguous().t()
    idx = prompt(30)
    want, got = one_by_one(rounded(model, weights), idx), one_by_one(NativeGPT(model, weights), idx)
    assert (got - want).abs().max() <= CLOSE[weights]


def test_a_head_with_a_bias_and_without(model, seed):
    """c_attn has one, the head has none: a wrong address would take another tensor's numbers."""
    for layer in (m for m in model.modules() if isinstance(m, nn.Linear) and m.bias is not None):
        layer.bias.data.normal_(0, 2)
    idx = prompt(30)
    want, got = one_by_one(model, idx), one_by_one(NativeGPT(model), idx)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_greedy_text_is_that_of_the_slow_way_and_of_transformers(model):
    fast, twin = NativeGPT(model), twin_of(model)
    twin.generation_config.eos_token_id = None  # every id is a token like the others
    for T, new in ((1, 60), (2, 30), (31, 33), (60, 4)):
        idx = prompt(T)
        want = greedy_slow(model, idx, new)
        assert torch.equal(generate(fast, idx, new, temperature=0), want)
        with torch.no_grad():
            theirs = twin.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=new, do_sample=False)
        assert torch.equal(theirs, want)


@pytest.mark.parametrize("weights", FORMS)
def test_gpt2_shape(seed, weights):
    """Four layers of GPT-2's width, a prompt of 1,000 tokens in chunks, then steps."""
    config = GPTConfig(vocab_size=5003, n_ctx=1024, n_embd=768, n_layer=4, n_head=12)
    torch.manual_seed(torch.seed() % 2**31)
    model = GPTLanguageModel(config).eval()
    model.wpe.weight.data *= 20
    idx = torch.randint(0, config.vocab_size, (1, 1008))
    plain, fast = rounded(model, weights), NativeGPT(model, weights)
    caches = KVCache.for_model(model), KVCache.for_model(fast)
    with torch.inference_mode():
        for m, cache in zip((plain, fast), caches, strict=True):
            prefill(m, idx[:, :1000], cache, chunk=300 if m is plain else MOST)
        assert (caches[0].keys - caches[1].keys).abs().max() <= (1e-2 if weights == "int8" else 1e-4)
        for t in range(1000, 1008):
            want, got = (m(idx[:, t : t + 1], kv_cache=c)[0] for m, c in zip((plain, fast), caches, strict=True))
            assert want.std() > 0.3 and (got - want).abs().max() <= (2e-3 if weights == "int8" else 1e-4)


def test_what_runs_in_cpp(model, monkeypatch):
    fast = NativeGPT(model)
    calls = counted(fast, monkeypatch)
    generate(fast, prompt(5), 4, temperature=0)
    assert calls == [(1, 5, 1)] + [(1, 1, 1)] * 3  # the prompt too, and of it only the last logits
    calls.clear()
    fast(prompt(3, B=2), kv_cache=KVCache.for_model(fast, 2))
    assert calls == [(2, 3, 3)]
    calls.clear()
    fast(prompt(5))  # without a cache
    fast(prompt(5, B=MOST // 5 + 1), kv_cache=KVCache.for_model(fast, MOST // 5 + 1))  # too many
    fast(prompt(5), prompt(5))  # with a loss
    assert not calls


@pytest.mark.parametrize("weights", FORMS)
@pytest.mark.parametrize("longest", [15, 30])
def test_unequal_prompts_in_one_batch_continue_as_each_alone(model, weights, longest, monkeypatch):
    rows = [prompt(9), prompt(1), prompt(longest), prompt(12)]
    fast = NativeGPT(model, weights)
    calls = counted(fast, monkeypatch)
    idx, mask = pad(rows, value=70)
    out = generate(fast, idx, 25, temperature=0, attention_mask=mask)
    in_cpp = 4 * longest <= MOST  # else the prompts are too many tokens, and PyTorch's float products read them
    assert calls == [(4, longest, 1)] * in_cpp + [(4, 1, 1)] * 24
    oracle = fast if weights == "int8" else rounded(model, weights)  # 16-bit integers may decide a close race otherwise
    for row, alone in zip(out, rows, strict=True):
        if in_cpp or weights != "int8":
            assert torch.equal(row[longest:], generate(oracle, alone, 25, temperature=0)[0, alone.size(1) :])


def test_padded_prompts_and_several_tokens_at_once(model):
    rows = [prompt(12), prompt(4)]
    idx, mask = pad(rows)
    fast, cache, exact = NativeGPT(model), KVCache.for_model(model, 2), KVCache.for_model(model, 2)
    cache.keys.fill_(float("nan"))  # what was never written must not matter
    cache.values.fill_(float("nan"))
    with torch.inference_mode():
        for start, end in ((0, 7), (7, 8), (8, 12)):
            part, seen = idx[:, start:end], mask[:, :end]
            got, want = fast(part, kv_cache=cache, attention_mask=seen)[0], model(part, None, exact, seen)[0]
            real = mask[:, start:end].bool()
            assert (got - want)[real].abs().max() <= 3e-5


def test_lookup_stream_truncate_reset_and_slide(model):
    fast, idx = NativeGPT(model), prompt(6).repeat(1, 3)
    found = generate_lookup(fast, idx, 40, draft=3)
    assert torch.equal(found.ids, greedy_slow(model, idx, 40))
    assert list(stream(fast, idx, 9, temperature=0)) == greedy_slow(model, idx, 9)[0, 18:].tolist()
    cache, other = KVCache.for_model(fast), prompt(9)
    first = generate(fast, idx, 9, temperature=0, kv_cache=cache)
    cache.truncate(5)
    assert torch.equal(generate(fast, idx, 9, temperature=0, kv_cache=cache), first)
    cache.reset()
    assert torch.equal(generate(fast, other, 9, temperature=0, kv_cache=cache), greedy_slow(model, other, 9))
    long = generate(fast, idx, 100, temperature=0, beyond="slide")
    assert torch.equal(long, generate(model, idx, 100, temperature=0, beyond="slide"))


def test_sampling_draws_the_same(model):
    idx, options = prompt(5), {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.2}
    draws = [generate(m, idx, 40, generator=torch.Generator().manual_seed(1), **options)
             for m in (model, NativeGPT(model))]  # fmt: skip
    assert torch.equal(*draws)


def test_any_number_of_threads_gives_the_same_text(model):
    fast, idx, before = NativeGPT(model), prompt(7), torch.get_num_threads()
    want = greedy_slow(model, idx, 30)
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            assert torch.equal(generate(fast, idx, 30, temperature=0), want)
    finally:
        torch.set_num_threads(before)


def test_two_texts_at_once_from_two_threads(model):
    """The call lets go of Python's lock, so two sessions really meet in it."""
    fast, prompts = NativeGPT(model), [prompt(5) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda idx: generate(fast, idx, 50, temperature=0), prompts))
    for idx, text in zip(prompts, texts, strict=True):
        assert torch.equal(text, greedy_slow(model, idx, 50))


def test_int32_ids_a_view_and_gradients_on(model):
    fast, idx = NativeGPT(model), prompt(20)
    cache = KVCache.for_model(model)
    wide = torch.stack([idx[0], idx[0]], dim=1)[:, 0][None]  # (1, 20), every second number in memory
    got = [fast(part, kv_cache=cache)[0] for part in (wide[:, :12], wide[:, 12:].int())]
    with torch.no_grad():
        assert (torch.cat(got, 1) - model(idx)[0]).abs().max() <= 3e-5


@pytest.mark.parametrize("weights", FORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_stay_so(model, weights, value):
    """Neither -ffast-math nor integers may hide them: a broken model has to look broken."""
    model.h[1].mlp.c_fc.bias.data[3] = value
    assert not one_by_one(NativeGPT(model, weights), prompt(9)).isfinite().any()


def test_the_model_is_left_alone_and_an_adapter_must_be_merged(model):
    model.train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    generate(NativeGPT(model, "int8"), prompt(5), 9)
    assert model.training and all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    add_lora(model, r=2)
    with pytest.raises(ValueError, match="merge_lora"):
        NativeGPT(model)
    merge_lora(model)
    idx = prompt(5)
    assert torch.equal(generate(NativeGPT(model), idx, 9, temperature=0), greedy_slow(model.eval(), idx, 9))


def test_tensors_that_it_points_to_outlive_the_model(model):
    """Replacing a model's tensors, or moving the copy, must not leave an address of memory that was freed."""
    idx = prompt(9)
    want = greedy_slow(model, idx, 20)
    fast = NativeGPT(model)
    for p in model.parameters():
        p.data = torch.full_like(p.data, float("nan"))
    fast.ln_f.weight = nn.Parameter(fast.ln_f.weight.detach().clone())
    assert torch.equal(generate(fast, idx, 20, temperature=0), want)


def test_other_types_later_do_not_reach_the_addresses(model, monkeypatch):
    fast = NativeGPT(model)
    calls = counted(fast, monkeypatch)
    idx = prompt(3)
    want = greedy_slow(model, idx, 9)
    model.bfloat16()  # the copy's weights are its own
    assert torch.equal(generate(fast, idx, 9, temperature=0), want) and calls
    calls.clear()
    fast.bfloat16()  # the copy itself: from here on PyTorch computes, in bfloat16
    cache = KVCache.for_model(fast)
    assert cache.keys.dtype == torch.bfloat16
    fast(prompt(3), kv_cache=cache)
    with pytest.raises(ValueError, match="kv_cache is torch.float32, the model torch.bfloat16"):
        fast(prompt(3), kv_cache=KVCache(model.config))
    assert not calls


def change(fast: NativeGPT, how: str) -> None:
    if how == "half":
        fast.half()
    else:
        fast.load_state_dict({name: torch.zeros_like(t) for name, t in fast.state_dict().items()})


@pytest.mark.parametrize("weights", FORMS)
@pytest.mark.parametrize("how", ["half", "load_state_dict"])
def test_what_is_done_to_the_copy_does_not_reach_the_model(model, weights, how):
    before = {name: p.clone() for name, p in model.state_dict().items()}
    change(NativeGPT(model, weights), how)
    for name, p in model.state_dict().items():
        assert p.dtype == torch.float32 and torch.equal(p, before[name]), name


def test_inside_lora_disabled_it_is_made_of_the_base(model):
    idx = prompt(12)
    base = greedy_slow(model, idx, 20)
    add_lora(model, r=2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.3)
    merge_lora(model)
    assert not torch.equal(greedy_slow(model, idx, 20), base)
    with lora_disabled(model):
        fast = NativeGPT(model)
    assert torch.equal(generate(fast, idx, 20, temperature=0), base)


def test_bad_requests(model):
    for other in (random_model().to(torch.float64), random_model().bfloat16(), random_model().to("meta")):
        weight = other.wpe.weight
        with pytest.raises(ValueError, match=f"{weight.dtype} on {weight.device}.* needs torch.float32 on the cpu"):
            NativeGPT(other)
    with pytest.raises(ValueError, match="weights='int4'"):
        NativeGPT(model, "int4")


def test_bad_input_never_reaches_the_addresses(model, monkeypatch):
    fast = NativeGPT(model)
    cache = KVCache.for_model(fast, max_len=6)
    calls = counted(fast, monkeypatch)
    wrong = [
        (torch.tensor([[71]]), cache, "token id 71"),
        (torch.tensor([[-1]]), cache, "token id -1"),
        (torch.empty(1, 0, dtype=torch.int64), cache, "at least one token"),
        (torch.tensor([[0.5]]), cache, "dtype torch.float32"),
        (prompt(7), cache, "7 positions .*1 × 6"),
        (prompt(1, B=2), cache, "does not fit a cache of 1 × 6"),
        (prompt(1), KVCache(GPTConfig(71, 64, 32, 2, 4)), "kv_cache has shape"),
    ]
    for idx, kv_cache, message in wrong:
        for run in (fast, fast.last_logits):
            with pytest.raises(ValueError, match=message):
                run(idx, kv_cache=kv_cache)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        fast(prompt(2), kv_cache=cache, attention_mask=torch.ones(1, 3))
    assert not calls and cache.pos == 0


# ---- compiling


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_it_is_compiled_once_and_found_again(elsewhere, monkeypatch):
    path = compile_step()
    made = path.stat().st_mtime_ns
    assert path.is_relative_to(elsewhere) and compile_step() == path and path.stat().st_mtime_ns == made
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing else is left there
    monkeypatch.setattr(native, "STEP_CPP", native.STEP_CPP + "// another\n")
    assert compile_step() != path  # another source, another file


def test_an_unfinished_compilation_leaves_nothing(elsewhere, monkeypatch):
    monkeypatch.setattr(native, "STEP_CPP", native.STEP_CPP + "this is no C++\n")
    with pytest.raises(RuntimeError, match=r"could not compile the step .*FastGPT\(model\)(.|\n)*error"):
        compile_step()
    assert not list((elsewhere / "cache" / "native").iterdir())


def test_compiling_at_the_same_time(elsewhere):
    with ThreadPoolExecutor(3) as pool:
        paths = set(pool.map(lambda _: compile_step(), range(3)))
    assert len(paths) == 1 and ctypes.CDLL(str(paths.pop())).step_int8


OTHERS = 1234  # a user who is neither this one nor root


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows keeps folders apart by itself")
@pytest.mark.parametrize("planted", ["folder", "library"])
@pytest.mark.parametrize("how", ["owner", "mode"])
def test_code_that_another_user_could_have_put_there_is_not_loaded(elsewhere, planted, how, model, monkeypatch):
    path = compile_step()
    place = path.parent if planted == "folder" else path
    if how == "mode":
        place.chmod(0o777)
    elif os.getuid() == 0:
        os.chown(place, OTHERS, -1)
    else:
        pytest.skip("only root can give a file away")
    loaded = []
    monkeypatch.setattr(native, "_library", loaded.append)
    with pytest.raises(RuntimeError, match=r"(belongs to another user|other users may write).*MINIGPT_CACHE"):
        NativeGPT(model)
    assert not loaded
    if how == "mode":  # the way out that it names
        place.chmod(0o700)
        assert compile_step() == path


@pytest.mark.parametrize("variable", ["MINIGPT_CACHE", "HOME"])
def test_a_cache_that_cannot_be_made_is_named(tmp_path, model, monkeypatch, variable):
    (tmp_path / "file").write_text("not a folder")
    for name in ("MINIGPT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "file" / "below"))
    with pytest.raises(RuntimeError, match="can't be made .*set MINIGPT_CACHE to a folder of your own"):
        NativeGPT(model)


def test_the_module_needs_no_hub():
    """A folder's name is no reason to import what downloads."""
    source = Path(native.__file__).read_text("utf-8")
    assert "hub" not in source and "weights" not in [word for line in source.splitlines() if "import" in line
                                                     for word in line.replace(".", " ").split()]  # fmt: skip


def test_without_a_compiler_it_says_so(model, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match=r"NativeGPT needs a C\+\+ compiler.*apt install g\+\+.*compile=False"):
        NativeGPT(model)


def test_loading_it_leaves_rounding_as_it_was(model):
    """A library linked with -ffast-math would switch the process to flushing tiny numbers to zero."""
    NativeGPT(model)
    tiny = torch.tensor(1e-40)
    assert (tiny * 0.5).item() > 0


def test_the_source_has_no_warnings(tmp_path):
    source = tmp_path / "step.cpp"
    source.write_text(native.STEP_CPP, encoding="utf-8")
    command = [cpp_compiler(), *native.FLAGS, "-Wall", "-Wextra", "-c", str(source), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
