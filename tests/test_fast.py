"""The fast paths against the plain model: packed layers, the compiled step, smaller weights, CUDA graphs."""

import contextlib
import gc
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from decoding import greedy_slow, one_by_one, pad, prompt, random_model, rounded

from minigpt_lib.generation.compiled import (
    FastGPT,
    RecordedSteps,
    bucket,
    choose,
    cpp_compiler,
    record,
    step_inputs,
    windows,
)
from minigpt_lib.generation.decode import generate, plan_decode, stream
from minigpt_lib.generation.kv_cache import KVCache
from minigpt_lib.generation.options import check_options
from minigpt_lib.generation.prompt_lookup import generate_lookup
from minigpt_lib.generation.quantized import BLOCK, PackedGPT, PackedLinear, quantize_int8
from minigpt_lib.generation.sampling import draw, filter_logits
from minigpt_lib.model.gpt import GPTConfig, GPTLanguageModel
from minigpt_lib.tuning.lora import add_lora, lora_disabled, merge_lora

compiling = pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler for torch.compile was found")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA GPU")
FORMS = [None, "bfloat16", "int8"]
SMALL = GPTConfig(vocab_size=71, n_ctx=64, n_embd=32, n_layer=2, n_head=4, dropout=0.3)


@pytest.fixture
def model(seed: int) -> GPTLanguageModel:
    return random_model()


@pytest.fixture(scope="module")
def fast() -> tuple[GPTLanguageModel, dict[str | None, FastGPT]]:
    """A random model and its compiled copies: compiling takes seconds, so it is done once."""
    torch.manual_seed(torch.seed() % 2**31)
    model = random_model(SMALL)
    return model, {weights: FastGPT(model, weights, rows=(1,) if weights else (1, 4)) for weights in FORMS}


# ---- layers


def test_int8_is_within_half_a_step_and_uses_the_range(seed):
    w = torch.randn(40, 90) * torch.logspace(-6, 3, 40)[:, None]
    w[3] = 0
    q, scale = quantize_int8(w)
    assert q.dtype == torch.int8 and q.abs().max() == 127 and scale.shape == (40,)
    assert ((w - scale[:, None] * q).abs() <= 0.5001 * scale[:, None]).all()
    others = [i for i in range(40) if i != 3]
    assert (q[others].abs().amax(1) == 127).all() and (q[3] == 0).all()  # each row has a scale of its own


@pytest.mark.parametrize("weights", FORMS)
@pytest.mark.parametrize(("n_in", "n_out"), [(24, 56), (56, 24), (24, 24)])
@pytest.mark.parametrize("rows", [(1,), (3,), (1, 1), (2, 5), (1, 20)])
def test_packed_linear_is_the_layer_with_the_rounded_weights(seed, weights, n_in, n_out, rows):
    layer = nn.Linear(n_in, n_out)
    x = torch.randn(*rows, n_in)
    w = layer.weight.detach()
    if weights == "bfloat16":
        w = w.bfloat16().float()
    if weights == "int8":
        step = w.abs().amax(1, keepdim=True) / 127
        w = (w / step).round() * step
    got = PackedLinear(layer, weights)(x)
    assert got.shape == (*rows, n_out)
    assert (got - F.linear(x, w, layer.bias)).abs().max() <= 2e-6


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_blocks_of_a_tall_matrix_lose_no_row(seed, weights):
    """More rows than two blocks that are widened at a time, and not a multiple of them."""
    layer, x = nn.Linear(16, 2 * BLOCK + 5), torch.randn(3, 16)
    small = PackedLinear(layer, weights)
    w = small.weight.float() if small.scale is None else small.weight * small.scale[:, None]
    assert small(x).shape == (3, 2 * BLOCK + 5)
    assert (small(x) - F.linear(x, w, layer.bias)).abs().max() <= 2e-6


def test_packed_for_many_rows(seed):
    layer, x = nn.Linear(24, 56), torch.randn(16, 24)
    with torch.no_grad():
        assert (PackedLinear(layer, packed=True)(x) - layer(x)).abs().max() <= 2e-6


def test_bucket():
    assert [bucket(n, 1024) for n in (1, 64, 65, 128, 129, 1024)] == [64, 64, 128, 128, 256, 1024]
    assert bucket(70, 100) == 100 and bucket(5, 40) == 40 and bucket(9, 1000, shortest=8) == 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_int8_of_a_model_in_half_precision_is_as_exact(seed, dtype):
    """In bfloat16, the largest weight of a row over its scale comes out as 128, which int8 turns into -128."""
    w = torch.randn(2000, 60).to(dtype)
    q, scale = quantize_int8(w)
    assert scale.dtype == torch.float32 and (q.abs().amax(1) == 127).all() and q.min() >= -127
    assert ((w.float() - scale[:, None] * q).abs() <= 0.5001 * scale[:, None]).all()
    layer = nn.Linear(60, 2000).to(dtype)
    x = torch.randn(3, 60).to(dtype)
    small = PackedLinear(layer, "int8")
    want = x.double() @ (small.weight.double() * small.scale.double()[:, None]).T + layer.bias.double()
    assert small.scale.dtype == torch.float32 and small(x).dtype == dtype
    assert (small(x).double() - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()


def test_logits_of_a_bfloat16_model_are_not_rounded_to_bfloat16(seed):
    """Near -95, where GPT-2's lie, a bfloat16 has steps of half a nat."""
    model = random_model(SMALL).bfloat16()
    idx = prompt(12)
    for weights in FORMS:
        fast = FastGPT(model, weights, compile=False)
        logits = fast(idx)[0]
        assert logits.dtype == torch.float32 and (logits != logits.bfloat16().float()).float().mean() > 0.9


# ---- the model


@pytest.mark.parametrize("weights", FORMS)
def test_uncompiled_copy_is_the_plain_model_with_rounded_weights(model, weights):
    idx = prompt(20, B=2)
    eager = FastGPT(model, weights, compile=False)
    want = rounded(model, weights)
    with torch.no_grad():
        assert (eager(idx)[0] - want(idx)[0]).abs().max() <= 3e-5
    assert (one_by_one(eager, idx) - one_by_one(want, idx)).abs().max() <= 3e-5
    if weights is None:
        assert torch.equal(generate(eager, idx, 30, temperature=0), greedy_slow(model, idx, 30))
    else:
        with torch.no_grad():
            assert (eager(idx)[0] - model(idx)[0]).abs().max() > 1e-4  # it was rounded at all


def test_making_a_fast_copy_leaves_the_model_alone(model):
    before = {name: p.clone() for name, p in model.state_dict().items()}
    model.train()
    idx = prompt(8)
    FastGPT(model, "int8", compile=False).eval()
    generate(FastGPT(model, compile=False), idx, 3)
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_sizes(model):
    full, table = 4 * model.num_parameters(), 4 * model.wte.weight.numel()
    twice = table if torch.backends.mkldnn.is_available() else 0  # in oneDNN's order no row can be looked up
    assert FastGPT(model, compile=False).nbytes == full + twice
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and not n.startswith("wpe"))
    assert FastGPT(model, "bfloat16", compile=False).nbytes == full - 2 * matrices
    rows = sum(m.out_features for m in model.modules() if isinstance(m, nn.Linear))
    assert FastGPT(model, "int8", compile=False).nbytes == full - 3 * matrices + 4 * rows


def test_bad_requests(model):
    with pytest.raises(ValueError, match="weights='int4'.*'int8'"):
        FastGPT(model, "int4", compile=False)
    with pytest.raises(ValueError, match="batch_size=0 .*at least 1"):
        FastGPT(model, compile=False, batch_size=0)
    for rows in ((1, 0), (65,)):
        with pytest.raises(ValueError, match=r"rows=\(.*between 1 and n_ctx=64"):
            FastGPT(model, rows=rows)
    add_lora(model, r=2)
    with pytest.raises(ValueError, match="merge_lora"):
        FastGPT(model, compile=False)


def test_a_merged_adapter_is_part_of_the_weights(model):
    add_lora(model, r=2)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.normal_(0, 0.3)
    idx = prompt(20)
    with torch.no_grad():
        want = model(idx)[0]
        with lora_disabled(model):
            base = model(idx)[0]
        fast = FastGPT(merge_lora(model), compile=False)
        assert (fast(idx)[0] - want).abs().max() <= 5e-4  # such factors make attention sharp, and rounding matters
        assert (fast(idx)[0] - base).abs().max() >= 0.1


def test_inside_lora_disabled_it_is_made_of_the_base(model):
    idx = prompt(12)
    with torch.no_grad():
        base = model(idx)[0]
        add_lora(model, r=2)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.normal_(0, 0.3)
        with lora_disabled(model):  # not merged
            assert (FastGPT(model, compile=False)(idx)[0] - base).abs().max() <= 3e-5
        merge_lora(model)
        with lora_disabled(model):
            fast = FastGPT(model, compile=False)
            assert (fast(idx)[0] - base).abs().max() <= 3e-5
        assert (FastGPT(model, compile=False)(idx)[0] - base).abs().max() >= 0.1


@pytest.mark.parametrize("weights", FORMS)
def test_the_weights_are_its_own_in_both_directions(model, weights):
    idx = prompt(12)
    fast = FastGPT(model, weights, compile=False)
    pointers = {t.data_ptr() for t in (*fast.parameters(), *fast.buffers()) if not t.is_mkldnn}
    assert not pointers & {p.data_ptr() for p in model.parameters()}
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with torch.no_grad():
        want = fast(idx)[0]
        for p in model.parameters():
            p.add_(1)
        assert torch.equal(fast(idx)[0], want)
        for p in model.parameters():
            p.sub_(1)
    plain = PackedGPT(model, weights)
    plain.load_state_dict({name: torch.zeros_like(t) for name, t in plain.state_dict().items()})
    plain.half()
    for name, p in model.state_dict().items():
        assert p.dtype == torch.float32 and (p - before[name]).abs().max() <= 1e-6, name


def test_it_has_no_dropout_whatever_happens(model):
    idx, fast = prompt(9), FastGPT(model, compile=False)
    with torch.no_grad():
        want = fast(idx)[0]
        assert torch.equal(fast.train()(idx)[0], want) and not fast.training


def test_without_a_compiler_it_says_so_and_how_to_go_on(model, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert cpp_compiler() is None
    with pytest.raises(RuntimeError, match=r"C\+\+ compiler.*apt install g\+\+.*compile=False"):
        FastGPT(model)
    assert generate(FastGPT(model, compile=False), prompt(3), 4).shape == (1, 7)


# ---- compiled


@compiling
@pytest.mark.parametrize("weights", FORMS)
def test_compiled_steps_agree_with_the_plain_model(fast, seed, weights):
    model, copies = fast
    idx = prompt(64)
    got, want = one_by_one(copies[weights], idx), one_by_one(rounded(model, weights), idx)
    assert copies[weights].compile_seconds > 0
    assert want.std() > 0.3 and (got - want).abs().max() <= 5e-5
    if weights is None:
        assert torch.equal(generate(copies[None], idx[:, :7], 57, temperature=0), greedy_slow(model, idx[:, :7], 57))


@compiling
def test_several_rows_at_once_are_compiled_too(fast, seed):
    model, copies = fast
    idx = prompt(61)
    assert (one_by_one(copies[None], idx, T=4) - one_by_one(model, idx)).abs().max() <= 5e-5


@compiling
def test_nothing_is_compiled_again_while_decoding(fast, seed):
    """Every length, several caches, sizes of caches, padding, other options: one compiled function each."""
    model, copies = fast
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T, new in ((1, 60), (2, 30), (31, 33), (60, 4)):
            idx = prompt(T)
            assert torch.equal(generate(copies[None], idx, new, temperature=0), greedy_slow(model, idx, new))
        small = KVCache(SMALL, max_len=20)
        idx = prompt(9)
        assert torch.equal(generate(copies[None], idx, 10, temperature=0, kv_cache=small), greedy_slow(model, idx, 10))
        mask = torch.ones(1, 12, dtype=torch.int64)
        mask[0, :5] = 0
        padded = F.pad(prompt(7), (5, 0))
        got = generate(copies[None], padded, 20, temperature=0, attention_mask=mask)
        assert torch.equal(got, generate(model, padded, 20, temperature=0, attention_mask=mask))
        long = generate(copies[None], idx, 100, temperature=0, beyond="slide")
        assert torch.equal(long, generate(model, idx, 100, temperature=0, beyond="slide"))
        list(stream(copies[None], idx, 20, top_k=9))


@compiling
def test_the_compiled_path_is_the_one_that_runs(fast, seed, monkeypatch):
    model, copies = fast
    calls, run = [], copies[None].backend.run[1]
    monkeypatch.setitem(copies[None].backend.run, 1, lambda *args: calls.append(args[0].shape) or run(*args))
    generate(copies[None], prompt(5), 6, temperature=0)
    assert calls == [(1, 1)] * 5  # the first token comes out of the prefill
    calls.clear()
    generate(copies[None], prompt(5, B=2), 6, temperature=0)  # another batch size runs uncompiled
    assert not calls


@compiling
def test_a_compiled_batch_of_unequal_prompts(seed, monkeypatch):
    model, calls = random_model(SMALL), []
    rows = [prompt(9), prompt(1), prompt(30), prompt(17)]
    batched = FastGPT(model, batch_size=4)
    run = batched.backend.run[1]
    monkeypatch.setitem(batched.backend.run, 1, lambda *args: calls.append(args[0].shape) or run(*args))
    idx, mask = pad(rows)
    with torch._dynamo.config.patch(error_on_recompile=True):
        out = generate(batched, idx, 25, temperature=0, attention_mask=mask)
    for row, alone in zip(out, rows, strict=True):
        assert torch.equal(row[30:], generate(model, alone, 25, temperature=0)[0, alone.size(1) :])
    assert calls == [(4, 1)] * 24


@compiling
def test_prompt_lookup_through_compiled_steps(fast, seed, monkeypatch):
    model, copies = fast
    calls, run = [], copies[None].backend.run[4]
    monkeypatch.setitem(copies[None].backend.run, 4, lambda *args: calls.append(args[0].shape) or run(*args))
    idx = prompt(6).repeat(1, 3)  # something to find
    got = generate_lookup(copies[None], idx, 40, draft=3)
    assert torch.equal(got.ids, greedy_slow(model, idx, 40)) and calls and set(calls) == {(1, 4)}


@compiling
def test_compiling_again_finds_the_result_on_disk_and_changes_no_setting(fast, seed):
    counters = torch._dynamo.utils.counters
    before = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    configs = torch._dynamo.config, torch._inductor.config
    settings = [config.get_config_copy() for config in configs]
    FastGPT(random_model(SMALL))
    assert [config.get_config_copy() for config in configs] == settings
    assert counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"] > before


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=compiling)])
def test_a_large_batch_of_unequal_prompts_runs_uncompiled(model, compile):
    """More than a few rows: the products go through oneDNN's packed matrices."""
    rows = [prompt(9), prompt(1), prompt(30), prompt(17)] * 3
    batched = FastGPT(model, compile=compile, batch_size=12)
    assert batched.lm_head.weight.is_mkldnn and not (batched.backend and batched.backend.run)
    idx, mask = pad(rows)
    with torch.no_grad():
        want, got = model(idx, attention_mask=mask)[0], batched(idx, attention_mask=mask)[0]
    assert (got - want)[mask.bool()].abs().max() <= 3e-5
    out = generate(batched, idx, 25, temperature=0, attention_mask=mask)
    for row, alone in zip(out, rows, strict=True):
        assert torch.equal(row[30:], generate(model, alone, 25, temperature=0)[0, alone.size(1) :])


@compiling
def test_any_number_of_copies_can_be_compiled(seed):
    """torch stops compiling one function for ever new models; each copy must count for itself."""
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(4):
            model = random_model(GPTConfig(vocab_size=71, n_ctx=64, n_embd=32, n_layer=1, n_head=4))
            idx = prompt(9)
            assert torch.equal(generate(FastGPT(model), idx, 9, temperature=0), greedy_slow(model, idx, 9))


@compiling
def test_any_number_on_a_torch_that_counts_per_code_object(seed, monkeypatch):
    """Before 2.13 torch.compile can't be told to keep models apart: each step must be a code object of its own."""
    real, codes = torch.compile, []

    def older(model, *, fullgraph, dynamic, options):
        codes.append(model.__code__)
        return real(model, fullgraph=fullgraph, dynamic=dynamic, options=options)

    monkeypatch.setattr(torch, "compile", older)
    config = GPTConfig(vocab_size=71, n_ctx=64, n_embd=32, n_layer=1, n_head=4)
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(3):
            model, idx = random_model(config), prompt(9)
            assert torch.equal(generate(FastGPT(model), idx, 9, temperature=0), greedy_slow(model, idx, 9))
    assert len({id(code) for code in codes}) == 3


@compiling
@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows keeps folders apart by itself")
def test_a_cache_that_others_may_write_to_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o777)
    with pytest.raises(RuntimeError, match="other users may write .*chmod go-w .*TORCHINDUCTOR_CACHE_DIR"):
        FastGPT(model)


@compiling
def test_compiled_steps_check_their_input_and_the_room(fast, seed):
    model, copies = fast
    cache = KVCache(SMALL, max_len=6)
    with torch.no_grad():
        copies[None](prompt(5), kv_cache=cache)
        copies[None](prompt(1), kv_cache=cache)
        with pytest.raises(ValueError, match="7 positions .*1 × 6"):
            copies[None](prompt(1), kv_cache=cache)
        cache.truncate(3)
        with pytest.raises(ValueError, match="token id 71"):
            copies[None](torch.tensor([[71]]), kv_cache=cache)
        assert cache.pos == 3


@compiling
def test_compiled_steps_refuse_a_cache_of_another_kind(fast, seed):
    """No guard of the compiler looks at these: the step itself must."""
    model, copies = fast
    for wrong in ({"dtype": torch.bfloat16}, {"dtype": torch.float64}):
        cache = KVCache(SMALL, **wrong)
        cache.pos = 3
        with pytest.raises(ValueError, match=f"kv_cache is {wrong['dtype']}, the model torch.float32"):
            copies[None](prompt(1), kv_cache=cache)
    with pytest.raises(ValueError, match="kv_cache has shape"):
        cache = KVCache(GPTConfig(vocab_size=71, n_ctx=64, n_embd=32, n_layer=2, n_head=2))
        cache.pos = 3
        copies[None](prompt(1), kv_cache=cache)


@compiling
def test_a_cache_filled_with_gradients_on_and_int32_ids(fast, seed):
    model, copies = fast
    idx = prompt(20)
    cache = KVCache.for_model(model)
    copies[None](idx[:, :12], kv_cache=cache)  # no torch.no_grad(): the keys now hang on a graph
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = [copies[None](idx[:, t : t + 1].int(), kv_cache=cache)[0][:, 0] for t in range(12, 20)]
    with torch.no_grad():
        want = model(idx)[0][0, 12:]
    assert (torch.cat(got) - want).abs().max() <= 5e-5


# ---- windows that are longer than the text, as CUDA graphs need them


@pytest.mark.parametrize("padded", [False, True])
def test_a_longer_window_changes_nothing(model, padded):
    idx, mask = pad([prompt(20), prompt(8 if padded else 20)])
    step = FastGPT(model, compile=False)
    exact, wide = KVCache.for_model(model, 2), KVCache.for_model(model, 2)
    wide.keys.normal_()  # what stands behind the text must not matter
    wide.values.normal_()
    with torch.inference_mode():
        want = model(idx, attention_mask=mask)[0]
        for cache, S in ((exact, None), (wide, 50)):
            model(idx[:, :17], kv_cache=cache, attention_mask=mask[:, :17])
            for t in range(17, 20):
                inputs = step_inputs(idx[:, t : t + 1], t, mask[:, : t + 1], S or t + 1)
                got = step.step(*inputs, *windows(cache, S or t + 1))[:, 0]
                assert (got - want[:, t]).abs().max() <= 3e-5
                cache.advance(idx[:, t : t + 1])


# ---- recorded steps, which run unrecorded on a CPU


@pytest.fixture
def recorded(model) -> FastGPT:
    fast = FastGPT(model, compile=False)
    fast.backend = RecordedSteps(fast)  # what it has on a GPU
    return fast


def decoded(fast: FastGPT, idx: torch.Tensor, new: int, first: int | None = None, **options) -> tuple:
    """The text and the sizes of the replays that wrote it."""
    cache = options.pop("kv_cache", None) or fast.new_cache(idx.size(0), min(idx.size(1) + new, 64))
    plan = plan_decode(fast, idx, new, kv_cache=cache, **options)
    sizes = [part.size(1) for part in fast.decode(plan, first)]
    return plan.ids[:, : idx.size(1) + sum(sizes)], sizes


@pytest.mark.parametrize(("T", "new"), [(1, 60), (2, 17), (31, 33), (9, 1)])
@pytest.mark.parametrize("B", [1, 3])
def test_several_tokens_a_replay_are_the_same_tokens(model, recorded, T, new, B):
    idx = prompt(T, B)
    want = greedy_slow(model, idx, new)
    text, sizes = decoded(recorded, idx, new, temperature=0)
    assert torch.equal(text, want) and sum(sizes) == new and sizes[0] == max(k for k in (1, 2, 4, 8, 16) if k <= new)
    text, sizes = decoded(recorded, idx, new, first=1, temperature=0)
    assert torch.equal(text, want)
    if new >= 15:
        assert sizes[:4] == [1, 2, 4, 8]


def test_the_memory_and_its_recordings_stay_with_the_model(recorded):
    idx = prompt(5)
    first = decoded(recorded, idx, 40, temperature=0)[0]
    gc.collect()
    made = recorded.backend.recordings
    places = {memory.cache.keys.data_ptr() for kept in recorded.backend.free.values() for memory in kept}
    for _ in range(3):
        cache = recorded.new_cache(1, 45)
        assert cache.keys.data_ptr() in places and cache.pos == 0
        assert torch.equal(decoded(recorded, idx, 40, temperature=0, kv_cache=cache)[0], first)
        del cache
        gc.collect()
    assert made > 0 and recorded.backend.recordings == made


def test_two_texts_at_once_have_a_cache_each(model, recorded):
    one, two = recorded.new_cache(1, 30), recorded.new_cache(1, 30)
    assert one.keys.data_ptr() != two.keys.data_ptr()
    prompts = [prompt(6), prompt(6)]
    plans = [plan_decode(recorded, idx, 20, temperature=0, kv_cache=cache)
             for idx, cache in zip(prompts, (one, two), strict=True)]  # fmt: skip
    running = [recorded.decode(plan, 1) for plan in plans]
    for parts in zip(*running, strict=True):  # in turn
        assert len(parts) == 2
    for plan, idx in zip(plans, prompts, strict=True):
        assert torch.equal(plan.ids, greedy_slow(model, idx, 20))


def test_one_step_at_a_time_through_the_same_recordings(model, recorded):
    idx = prompt(30, 2)
    cache = recorded.new_cache(2, 30)
    with torch.inference_mode():
        rows = [recorded(part, kv_cache=cache)[0] for part in (idx[:, :5], *idx[:, 5:].split(1, dim=1))]
        want = model(idx)[0]
    assert (torch.cat(rows, 1) - want).abs().max() <= 3e-5
    assert recorded.backend.recordings == 1  # one bucket, one shape


def test_a_step_follows_padding_and_a_longer_window(model, recorded):
    rows = [prompt(9), prompt(1), prompt(20)]
    idx, mask = pad(rows)
    cache = recorded.new_cache(3, 60)
    cache.keys.normal_()  # what stands behind the text must not matter
    plan = plan_decode(recorded, idx, 30, temperature=0, attention_mask=mask)
    plan.cache = cache
    list(recorded.decode(plan))
    for row, alone in zip(plan.ids, rows, strict=True):
        assert torch.equal(row[20:], generate(model, alone, 30, temperature=0)[0, alone.size(1) :])


@pytest.mark.parametrize("first", [1, 16])
@pytest.mark.parametrize("place", [0, 3, 10])
def test_stop_ids_end_it_in_the_middle_of_a_replay(model, recorded, place, first):
    idx = prompt(6, 2)
    free = greedy_slow(model, idx, 30)
    stops = [int(free[0, 6 + place]), int(free[1, 8])]
    want = generate(model, idx, 30, temperature=0, stop_ids=stops)
    cache = recorded.new_cache(2, 36)
    text, _ = decoded(recorded, idx, 30, first, temperature=0, stop_ids=stops, kv_cache=cache)
    assert torch.equal(text, want)
    assert cache.pos == text.size(1) - 1 and torch.equal(cache.ids[:, : cache.pos], text[:, : cache.pos])


def test_draws_are_those_of_the_uniform_numbers(model, recorded):
    """Each token is the first whose summed probability exceeds the generator's number: computed here one by one."""
    idx, options = prompt(5), {"temperature": 0.8, "top_k": 9}
    text, _ = decoded(recorded, idx, 16, generator=torch.Generator().manual_seed(3), **options)
    u = torch.rand(16, 1, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = model(text)[0][0, 4:-1] / 0.8  # (16, V)
    kept = logits.masked_fill(logits < logits.topk(9).values[:, -1:], -torch.inf).softmax(-1)
    want = (kept.cumsum(-1) <= u).sum(-1)
    assert torch.equal(text[0, 5:], want)
    again, _ = decoded(recorded, idx, 16, generator=torch.Generator().manual_seed(3), **options)
    other, _ = decoded(recorded, idx, 16, generator=torch.Generator().manual_seed(4), **options)
    assert torch.equal(again, text) and not torch.equal(other, text)


def test_what_it_does_not_know_goes_step_by_step(model, recorded):
    idx = prompt(5)
    for options in ({"repetition_penalty": 1.3}, {"use_cache": False}, {"stop_ids": range(9)}):
        assert recorded.decode(plan_decode(recorded, idx, 9, temperature=0, **options)) is None
    long = plan_decode(recorded, idx, 80, temperature=0, beyond="slide")
    assert recorded.decode(long) is None


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 9},
        {"top_p": 0.7, "n_vocab": 40},
        {"temperature": 0, "n_vocab": 30, "prefill_chunk": 2},
        {"temperature": 0.9, "min_p": 0.05, "beyond": "slide"},
    ],
)
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("stopping", [False, True])
def test_generate_and_stream_write_the_plain_text_through_replays(model, recorded, seed, options, B, stopping):
    """For the same seed; afterwards cache and generator are where plain decoding leaves them."""
    idx, calls = prompt(7, B), []
    decode = recorded.backend.decode
    recorded.backend.decode = lambda plan, first: calls.append(first) or decode(plan, first)
    free = generate(model, idx, 40, generator=torch.Generator().manual_seed(seed), **options)
    stops = {"stop_ids": [int(row[7 + 9 + i]) for i, row in enumerate(free)]} if stopping else {}

    def run(m: GPTLanguageModel, follow: bool) -> tuple:
        generator, cache = torch.Generator().manual_seed(seed), KVCache.for_model(m, B)
        given = options | stops | {"generator": generator, "kv_cache": cache}
        text = list(stream(m, idx, 40, **given)) if follow else generate(m, idx, 40, **given).tolist()
        return text, cache.pos, cache.ids[:, : cache.pos].tolist(), torch.rand(3, generator=generator).tolist()

    for follow in (False, True)[: 1 + (B == 1)]:
        assert run(recorded, follow) == run(model, follow)
    assert calls == [None, 1][: 1 + (B == 1)]  # it went that way


@pytest.mark.parametrize("taken", [0, 1, 2, 5, 20])
def test_a_stream_that_is_closed_early_forgets_what_was_ahead(model, recorded, seed, taken):
    idx = prompt(6)

    def run(m: GPTLanguageModel) -> tuple:
        generator, cache = torch.Generator().manual_seed(seed), KVCache.for_model(m)
        ids = stream(m, idx, 40, top_k=20, generator=generator, kv_cache=cache)
        text = [next(ids) for _ in range(taken)]
        ids.close()
        return text, cache.pos, cache.ids[:, : cache.pos].tolist(), torch.rand(3, generator=generator).tolist()

    assert run(recorded) == run(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0}])
def test_logits_that_are_not_finite_end_a_replay(model, recorded, value, options):
    idx = prompt(6)
    ok = generate(recorded, idx, 12, **options)
    assert ok.shape == (1, 18)
    recorded.wpe.weight[10] = value  # the position of the eleventh token
    with pytest.raises(FloatingPointError, match="row 0, before token 12"):
        generate(recorded, idx, 12, **options)
    assert generate(recorded, idx, 5, **options).shape == (1, 11)  # it does not come so far


def test_a_stop_id_hides_what_was_computed_behind_it(model, recorded):
    idx = prompt(6)
    stop = int(greedy_slow(model, idx, 1)[0, -1])
    recorded.wpe.weight[10] = float("nan")
    assert generate(recorded, idx, 16, temperature=0, stop_ids=stop).tolist() == [[*idx[0].tolist(), stop]]


def test_choose_takes_the_ids_of_draw(seed):
    """Also at the ends of the range, where an id of probability 0 must not come out."""
    logits, n = 2 * torch.randn(500, 40), 500
    options = check_options({"temperature": 0.7, "top_p": 0.9, "n_vocab": 33})
    p = filter_logits(logits[:, :33], 0.7, top_p=0.9).softmax(-1)
    u = torch.rand(n, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    assert torch.equal(choose(logits, options, u), draw(p, torch.Generator().manual_seed(seed)))
    for extreme in (0.0, 1 - 2**-24, 1.0):
        ids = choose(logits, options, torch.full((n,), extreme))
        assert (p.gather(1, ids[:, None]) > 0).all()


class FakeGraph:
    """CUDA's graphs as far as `record` uses them; it notes who records and refuses two at once."""

    def __init__(self):
        self.recording, self.log = threading.Lock(), []

    def graph(self, graph, *, pool=None, capture_error_mode="global"):
        @contextlib.contextmanager
        def capture():
            assert self.recording.acquire(blocking=False), "operation not permitted when stream is capturing"
            self.log.append((torch.device("cuda", self.device), pool, capture_error_mode))
            time.sleep(0.01)
            yield
            self.recording.release()

        return capture()

    @contextlib.contextmanager
    def guard(self, device):
        self.device = torch.device(device).index
        yield

    def install(self, monkeypatch):
        nothing = SimpleNamespace(wait_stream=lambda other: None, replay=lambda: None)
        fakes = {"graph": self.graph, "device": self.guard, "CUDAGraph": lambda: nothing, "Stream": lambda: nothing,
                 "current_stream": lambda: nothing, "stream": lambda s: contextlib.nullcontext()}  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


def test_recordings_wait_for_each_other_and_name_their_device(monkeypatch):
    """Two at once end both with an error, and so does one on another device than the current one."""
    fake, state, runs = FakeGraph(), torch.zeros(1), []
    fake.install(monkeypatch)

    def run() -> None:
        runs.append(1)
        state.add_(1)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: record(run, [state], torch.device("cuda", 1), pool="memory"), range(8)))
    assert fake.log == [(torch.device("cuda", 1), "memory", "thread_local")] * 8 and len(runs) == 24
    assert state.item() == 8  # each put back what its first runs had changed; recording itself computes nothing


@on_gpu
@pytest.mark.parametrize("padded", [False, True])
def test_cuda_graphs_agree_with_the_plain_model(seed, padded):
    config = GPTConfig(vocab_size=71, n_ctx=256, n_embd=64, n_layer=2, n_head=4)
    model = random_model(config).cuda()
    idx, mask = pad([prompt(20), prompt(8 if padded else 20)])
    fast = FastGPT(model, batch_size=2)
    options = {"temperature": 0, "attention_mask": mask.cuda() if padded else None}
    for _ in range(2):  # through three buckets, and again
        want = generate(model, idx.cuda(), 230, **options)
        assert torch.equal(generate(fast, idx.cuda(), 230, **options), want)
    gc.collect()
    assert len(fast.backend.owners) == 0  # a graph goes with its cache
