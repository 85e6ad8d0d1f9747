"""Sampling against slow explicit versions, decoding against Transformers, the cache against no cache."""

import gc
import math
import warnings

import pytest
import tiktoken
import torch
import torch.nn.functional as F
import transformers
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from minigpt_lib.generation import KVCache, decode_stream, filter_logits, generate, sample, stream
from minigpt_lib.model import GPTConfig, GPTLanguageModel
from minigpt_lib.weights import config_to_hf, to_hf_state

transformers.utils.logging.set_verbosity_error()

CONFIG = GPTConfig(vocab_size=71, n_ctx=64, n_embd=32, n_layer=3, n_head=4, dropout=0.3)
GPT2_SMALL = GPTConfig.preset("gpt2")


@pytest.fixture
def model(seed: int) -> GPTLanguageModel:
    """Fresh random weights in every tensor; strong positions, so that greedy text does not repeat one token."""
    model = GPTLanguageModel(CONFIG).eval()
    for name, p in model.named_parameters():
        p.data.normal_(0, 1.0 if name == "wpe.weight" else 0.3 if p.dim() == 2 else 0.1)
        if ".ln_" in name or name == "ln_f.weight":
            p.data += name.endswith("weight")
    return model


@pytest.fixture
def oracle(model) -> GPT2LMHeadModel:
    oracle = GPT2LMHeadModel(GPT2Config(**config_to_hf(CONFIG))).eval()
    oracle.transformer.load_state_dict(to_hf_state(model.state_dict()))
    oracle.tie_weights()
    return oracle


def prompt(T: int, B: int = 1) -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, (B, T))  # (B, T)


def pad(rows: list[torch.Tensor], value: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (1, T_i) -> left-padded (B, T) and the mask (B, T)."""
    T = max(row.size(1) for row in rows)
    idx = torch.cat([F.pad(row, (T - row.size(1), 0), value=value) for row in rows])  # (B, T)
    return idx, torch.stack([torch.arange(T) >= T - row.size(1) for row in rows]).long()


@torch.no_grad()
def greedy_slow(model: GPTLanguageModel, idx: torch.Tensor, n: int) -> torch.Tensor:
    for _ in range(n):
        idx = torch.cat([idx, model(idx)[0][:, -1:].argmax(-1)], dim=1)  # (B, T + 1)
    return idx


# ---- the cache inside the model


@pytest.mark.parametrize("cuts", [[20], [1] * 20, [5, 1, 14], [1, 19], [19, 1], [7, 7, 6]])
def test_any_chunking_of_the_prefill_gives_the_uncached_logits(model, cuts):
    idx = prompt(20, B=3)
    cache = KVCache.for_model(model, batch_size=3)
    with torch.no_grad():
        chunks = [model(part, kv_cache=cache)[0] for part in idx.split(cuts, dim=1)]
        want = model(idx)[0]
    assert cache.pos == 20
    assert want.std() > 0.3
    assert (torch.cat(chunks, dim=1) - want).abs().max() <= 2e-5


def test_chunked_prefill_of_a_ragged_batch(model):
    idx, mask = pad([prompt(20), prompt(3), prompt(11)])
    cache = KVCache.for_model(model, batch_size=3)
    with torch.no_grad():
        want = model(idx, attention_mask=mask)[0]
        first = model(idx[:, :12], kv_cache=cache, attention_mask=mask[:, :12])[0]
        second = model(idx[:, 12:], kv_cache=cache, attention_mask=mask)[0]
    real = mask.bool()
    assert (torch.cat([first, second], dim=1) - want)[real].abs().max() <= 2e-5


def test_truncate_forgets_exactly_the_rest(model):
    idx, other = prompt(20), prompt(9)
    cache = KVCache.for_model(model)
    with torch.no_grad():
        model(idx, kv_cache=cache)
        cache.truncate(12)
        got = model(other, kv_cache=cache)[0]
        want = model(torch.cat([idx[:, :12], other], dim=1))[0][:, 12:]
    assert cache.pos == 21 and (got - want).abs().max() <= 2e-5


def test_reset_cache_is_as_good_as_new(model):
    cache = KVCache.for_model(model, batch_size=2)
    idx = prompt(15, B=2)
    with torch.no_grad():
        model(prompt(40, B=2), kv_cache=cache)
        cache.reset()
        got = model(idx, kv_cache=cache)[0]
        assert cache.pos == 15 and (got - model(idx)[0]).abs().max() <= 2e-5


def test_copies_are_independent(model):
    cache = KVCache.for_model(model)
    idx, a, b = prompt(10), prompt(5), prompt(7)
    with torch.no_grad():
        model(idx, kv_cache=cache)
        branch = cache.copy()
        got_a, got_b = model(a, kv_cache=branch)[0], model(b, kv_cache=cache)[0]
        want_a = model(torch.cat([idx, a], dim=1))[0][:, 10:]
        want_b = model(torch.cat([idx, b], dim=1))[0][:, 10:]
    assert (branch.pos, cache.pos) == (15, 17)
    assert (got_a - want_a).abs().max() <= 2e-5 and (got_b - want_b).abs().max() <= 2e-5


def test_the_models_uncached_calls_know_nothing_of_a_cache(model):
    idx = prompt(12)
    with torch.no_grad():
        want = model(idx)[0]
        model(prompt(30), kv_cache=KVCache.for_model(model))
        assert torch.equal(model(idx)[0], want)


def test_memory():
    one = KVCache(GPT2_SMALL, max_len=1)
    assert one.nbytes == 73_728
    full = KVCache(GPT2_SMALL, device="meta")
    assert full.max_len == 1024 and full.nbytes == 75_497_472
    assert KVCache(GPT2_SMALL, 3, 10, dtype=torch.bfloat16, device="meta").nbytes == 3 * 10 * 73_728 // 2


def test_for_model_follows_dtype_and_device(model):
    cache = KVCache.for_model(model.to(torch.bfloat16), 2, 7)
    assert cache.keys.dtype == cache.values.dtype == torch.bfloat16
    assert cache.keys.shape == (3, 2, 4, 7, 8)


def test_cache_errors(model):
    with pytest.raises(ValueError, match="max_len=65 .*n_ctx=64"):
        KVCache(CONFIG, max_len=65)
    with pytest.raises(ValueError, match="max_len=0"):
        KVCache(CONFIG, max_len=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        KVCache(CONFIG, 0)
    cache = KVCache(CONFIG, 2, 8)
    with pytest.raises(ValueError, match="9 positions .*2 × 8"):
        model(prompt(9, B=2), kv_cache=cache)
    with pytest.raises(ValueError, match="batch 3 .*2 × 8"):
        model(prompt(3, B=3), kv_cache=cache)
    with pytest.raises(ValueError, match="pos=5 .*0"):
        cache.truncate(5)
    with pytest.raises(ValueError, match="pos=-1"):
        cache.truncate(-1)
    full = KVCache.for_model(model)
    with torch.no_grad():
        model(prompt(64), kv_cache=full)
    with pytest.raises(ValueError, match="65 .*n_ctx=64"):
        model(prompt(1), kv_cache=full)


# ---- greedy decoding


@pytest.mark.parametrize("T", [1, 2, 31])
def test_greedy_cached_uncached_and_transformers_agree(model, oracle, T):
    idx = prompt(T, B=2)
    cached = generate(model, idx, 30, temperature=0)
    assert cached.shape == (2, T + 30) and cached.dtype == torch.int64
    assert torch.equal(cached[:, :T], idx)
    assert torch.equal(cached, generate(model, idx, 30, temperature=0, use_cache=False))
    assert torch.equal(cached, greedy_slow(model, idx, 30))
    theirs = oracle.generate(
        idx, attention_mask=torch.ones_like(idx), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(cached, theirs)
    assert len(set(cached[:, T:].flatten().tolist())) > 1  # not one token over and over


@pytest.mark.parametrize("use_cache", [True, False])
def test_ragged_batch_equals_each_row_alone_and_transformers(model, oracle, use_cache):
    rows = [prompt(9), prompt(1), prompt(30), prompt(17)]
    idx, mask = pad(rows)
    out = generate(model, idx, 25, temperature=0, attention_mask=mask, use_cache=use_cache)
    for row, alone in zip(out, rows, strict=True):
        want = generate(model, alone, 25, temperature=0)[0, alone.size(1) :]
        assert torch.equal(row[30:], want)
    theirs = oracle.generate(
        idx, attention_mask=mask, max_new_tokens=25, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(out, theirs)


def test_what_stands_in_the_padding_does_not_matter(model):
    rows = [prompt(9), prompt(4)]
    idx, mask = pad(rows)
    other, _ = pad(rows, value=70)
    assert not torch.equal(idx, other)
    a = generate(model, idx, 20, temperature=0, attention_mask=mask)
    b = generate(model, other, 20, temperature=0, attention_mask=mask)
    assert torch.equal(a[:, 9:], b[:, 9:])
    assert torch.equal(
        generate(model, idx, 5, temperature=0, attention_mask=torch.ones_like(idx)), greedy_slow(model, idx, 5)
    )


def test_boolean_and_integer_masks_mean_the_same(model):
    idx, mask = pad([prompt(9), prompt(4)])
    a = generate(model, idx, 10, temperature=0, attention_mask=mask)
    assert torch.equal(a, generate(model, idx, 10, temperature=0, attention_mask=mask.bool()))


def test_the_callers_tensors_are_left_alone(model):
    idx, mask = pad([prompt(9), prompt(4)])
    before = idx.clone(), mask.clone()
    out = generate(model, idx, 5, attention_mask=mask)
    out.zero_()
    assert torch.equal(idx, before[0]) and torch.equal(mask, before[1])


def test_zero_new_tokens(model):
    idx = prompt(6, B=2)
    assert torch.equal(generate(model, idx, 0), idx)
    assert list(stream(model, idx[:1], 0)) == []


def test_result_can_be_trained_on(model):
    """Tensors made in inference mode can't enter autograd; the result must not be one."""
    out = generate(model, prompt(4), 10)
    model(out[:, :-1], out[:, 1:])[1].backward()
    assert model.wte.weight.grad.abs().sum() > 0


# ---- stop tokens


@pytest.mark.parametrize("use_cache", [True, False])
def test_finished_rows_are_filled_while_others_go_on(model, oracle, use_cache):
    rows = [prompt(8), prompt(5), prompt(8)]
    idx, mask = pad(rows)
    free = generate(model, idx, 30, temperature=0, attention_mask=mask)
    stop = int(free[0, 8 + 4])
    out = generate(model, idx, 30, temperature=0, attention_mask=mask, stop_ids=[stop], use_cache=use_cache)
    theirs = oracle.generate(
        idx, attention_mask=mask, max_new_tokens=30, do_sample=False, eos_token_id=stop, pad_token_id=stop
    )
    assert torch.equal(out, theirs)
    for row, unstopped in zip(out, free, strict=True):
        new = row[8:].tolist()
        length = new.index(stop) + 1 if stop in new else len(new)
        assert torch.equal(row[: 8 + length], unstopped[: 8 + length])
        assert set(new[length:]) <= {stop}


def test_each_row_is_filled_with_the_stop_token_that_ended_it(model, seed):
    def run(stop_ids) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed)  # hot, so that the rows differ; the same draws in both runs
        return generate(model, idx, 30, temperature=3.0, generator=g, stop_ids=stop_ids)[:, 6:]

    idx = prompt(6, B=6)
    free = run(())
    stops = {int(row[3 * i]) for i, row in enumerate(free)}
    out = run(stops)
    for row, unstopped in zip(out.tolist(), free.tolist(), strict=True):
        length = next(n for n, token in enumerate(unstopped, start=1) if token in stops)
        assert row[:length] == unstopped[:length]
        assert set(row[length:]) <= {row[length - 1]}


def test_decoding_ends_when_all_rows_are_finished(model):
    out = generate(model, prompt(5, B=3), 30, temperature=0, stop_ids=range(CONFIG.vocab_size))
    assert out.size(1) == 6
    assert len(list(stream(model, prompt(5), 30, stop_ids=range(CONFIG.vocab_size)))) == 1


def test_a_stop_token_in_the_prompt_stops_nothing(model):
    idx = prompt(8)
    free = generate(model, idx, 10, temperature=0)
    unused = next(i for i in range(CONFIG.vocab_size) if i not in free[0, 8:].tolist())
    idx[0, 3] = unused
    free = generate(model, idx, 10, temperature=0)
    stop = [unused] if unused not in free[0, 8:].tolist() else []
    assert torch.equal(generate(model, idx, 10, temperature=0, stop_ids=stop), free)


# ---- the end of the context


def slide_slow(model: GPTLanguageModel, idx: torch.Tensor, n: int) -> torch.Tensor:
    """The rule in words: when the window is full and another token must be read, keep its last half."""
    n_ctx, start = model.config.n_ctx, 0
    for _ in range(n):
        if idx.size(1) - start > n_ctx:
            start = idx.size(1) - n_ctx // 2
        with torch.no_grad():
            idx = torch.cat([idx, model(idx[:, start:])[0][:, -1:].argmax(-1)], dim=1)  # (B, T + 1)
    return idx


@pytest.mark.parametrize("T", [1, 40, 63, 64])
def test_slide(model, T):
    idx = prompt(T, B=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = generate(model, idx, 130, temperature=0, beyond="slide")
        assert torch.equal(out, slide_slow(model, idx, 130))
        assert torch.equal(out, generate(model, idx, 130, temperature=0, beyond="slide", use_cache=False))


def test_slide_of_a_ragged_batch(model):
    idx, mask = pad([prompt(50), prompt(7)])
    cached = generate(model, idx, 90, temperature=0, beyond="slide", attention_mask=mask)
    assert torch.equal(
        cached, generate(model, idx, 90, temperature=0, beyond="slide", attention_mask=mask, use_cache=False)
    )
    assert cached.shape == (2, 140)


@pytest.mark.parametrize(("T", "left"), [(60, 4), (64, 0)])
def test_stop_at_n_ctx_warns_up_front(model, T, left):
    idx = prompt(T)
    with pytest.warns(UserWarning, match=rf"{T} prompt tokens \+ 50 new .*n_ctx=64.* {left} new.*slide"):
        out = generate(model, idx, 50, temperature=0)
    assert out.size(1) == 64
    assert torch.equal(out, greedy_slow(model, idx, left))
    with pytest.warns(UserWarning, match="n_ctx=64"):
        tokens = stream(model, idx, 50, temperature=0)  # before the first token is asked for
    assert list(tokens) == out[0, T:].tolist()


def test_no_warning_when_all_fits(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(model, prompt(60), 4).size(1) == 64


def test_warning_points_at_the_callers_line(model):
    with pytest.warns(UserWarning, match="n_ctx") as caught:
        generate(model, prompt(60), 10)
        stream(model, prompt(60), 10)
    assert {w.filename for w in caught} == {__file__}


# ---- the model's state


def test_training_flags_come_back_and_dropout_is_off(model):
    idx = prompt(10)
    want = generate(model, idx, 20, temperature=0)
    model.train()
    model.h[1].eval()
    flags = [m.training for m in model.modules()]
    assert torch.equal(generate(model, idx, 20, temperature=0), want)  # dropout 0.3 would change it
    assert [m.training for m in model.modules()] == flags
    tokens = stream(model, idx, 20, temperature=0)
    next(tokens)
    del tokens  # abandoned half-way
    gc.collect()
    assert [m.training for m in model.modules()] == flags
    with pytest.raises(RuntimeError, match="boom"):
        model.h[2].register_forward_pre_hook(lambda module, args: (_ for _ in ()).throw(RuntimeError("boom")))
        generate(model, idx, 3)
    assert [m.training for m in model.modules()] == flags


def test_no_mode_leaks_between_streamed_tokens(model):
    tokens = stream(model, prompt(3), 5)
    next(tokens)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    list(tokens)
    assert torch.is_grad_enabled()


def test_the_head_is_computed_for_the_last_position_only(model):
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].numel() // args[0].size(-1)))
    generate(model, prompt(30), 4)
    assert seen == [1] * 4


def test_the_cache_feeds_each_position_once(model):
    fed = []
    model.h[0].register_forward_pre_hook(lambda module, args: fed.append(args[0].size(1)))
    generate(model, prompt(30), 4)
    assert fed == [30, 1, 1, 1]
    fed.clear()
    generate(model, prompt(30), 4, use_cache=False)
    assert fed == [30, 31, 32, 33]


def test_two_requests_at_once_do_not_touch_each_other(model):
    a, b = prompt(10), prompt(20)
    want = [generate(model, x, 15, temperature=0)[0, x.size(1) :].tolist() for x in (a, b)]
    streams = [stream(model, x, 15, temperature=0) for x in (a, b)]
    got: list[list[int]] = [[], []]
    for _ in range(15):
        for tokens, s in zip(got, streams, strict=True):
            tokens.append(next(s))
    assert got == want


# ---- sampling


def kept_slow(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> dict[int, float]:
    """Token -> probability by the definitions, one token at a time in double precision."""
    weight = [math.exp((z - max(logits)) / temperature) for z in logits]
    order = sorted(range(len(logits)), key=lambda i: -weight[i])[:top_k]
    total = sum(weight[i] for i in order)
    if top_p is not None:
        kept, running = [], 0.0
        for i in order:
            kept.append(i)
            running += weight[i] / total
            if running >= top_p:
                break
        order = kept
    total = sum(weight[i] for i in order)
    return {i: weight[i] / total for i in order}


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [None, 1, 5, 40, 1000])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.4, 0.9])
def test_filtered_distribution_is_the_definition(seed, temperature, top_k, top_p):
    logits = torch.randn(4, 60, dtype=torch.float64).float() * 3
    got = filter_logits(logits, temperature, top_k, top_p).softmax(-1)  # (B, V)
    for row, z in zip(got, logits.tolist(), strict=True):
        want = kept_slow(z, temperature, top_k, top_p)
        assert set(row.nonzero()[:, 0].tolist()) == set(want)
        assert all(abs(row[i].item() - p) < 1e-5 for i, p in want.items())


def test_filter_agrees_with_transformers(seed):
    logits = torch.randn(8, 300) * 3
    for k, p in ((3, 0.5), (50, 0.9), (300, 0.99)):
        want = TopPLogitsWarper(p)(None, TopKLogitsWarper(k)(None, logits / 0.8))
        got = filter_logits(logits, 0.8, k, p)
        assert torch.equal(got.isfinite(), want.isfinite())
        assert torch.allclose(got.softmax(-1), want.softmax(-1), atol=1e-6)


def test_filter_leaves_its_input_alone_and_keeps_at_least_one(seed):
    logits = torch.randn(5, 30)
    before = logits.clone()
    assert torch.equal(filter_logits(logits, 1.0, 1, 1e-9).isfinite().sum(-1), torch.ones(5, dtype=torch.int64))
    assert torch.equal(logits, before)
    assert torch.equal(filter_logits(logits, 1.0, None, 1.0), logits)
    ties = torch.zeros(2, 30)
    assert filter_logits(ties, top_k=4).isfinite().sum(-1).tolist() == [4, 4]
    assert filter_logits(ties, top_p=0.5).isfinite().sum(-1).tolist() == [15, 15]


def test_top_k_one_and_tiny_temperature_are_greedy(seed):
    logits = torch.randn(20, 50) * 5
    assert torch.equal(sample(logits, 1.0, top_k=1), logits.argmax(-1))
    assert torch.equal(sample(logits, 1e-30), logits.argmax(-1))
    assert torch.equal(sample(logits, 0), logits.argmax(-1))


def test_half_precision_logits_are_filtered_in_float32(seed):
    logits = (torch.randn(3, 200) * 4).to(torch.bfloat16)
    got = filter_logits(logits, 0.9, 50, 0.95)
    assert got.dtype == torch.float32
    assert torch.equal(got, filter_logits(logits.float(), 0.9, 50, 0.95))


def test_draws_follow_the_filtered_distribution(seed):
    logits = torch.randn(12) * 2
    want = filter_logits(logits, 0.8, 8, 0.95).softmax(-1)
    n = 40_000
    drawn = sample(logits.expand(n, 12), 0.8, 8, 0.95, torch.Generator().manual_seed(seed))
    frequency = torch.bincount(drawn, minlength=12) / n
    sigma = (want * (1 - want) / n).sqrt()
    assert (frequency[want == 0] == 0).all()
    assert ((frequency - want).abs() <= 6 * sigma + 1e-9).all(), (frequency, want)


def test_each_row_draws_from_its_own_distribution(seed):
    logits = torch.full((5, 9), -math.inf)
    wanted = torch.randint(0, 9, (5,))
    logits[torch.arange(5), wanted] = 1.0
    assert torch.equal(sample(logits, 2.0), wanted)


def test_a_seed_fixes_the_text(model, seed):
    def run(s: int, **options) -> torch.Tensor:
        return generate(model, prompt_, 40, generator=torch.Generator().manual_seed(s), **options)

    prompt_ = prompt(5, B=2)
    assert torch.equal(run(seed), run(seed))
    assert torch.equal(run(seed, top_k=9, top_p=0.8), run(seed, top_k=9, top_p=0.8, use_cache=False))
    assert not torch.equal(run(seed), run(seed + 1))
    state = torch.get_rng_state()
    run(seed)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched


def test_generated_tokens_stay_inside_the_top_k_of_the_model(model):
    idx = prompt(4, B=3)
    out = generate(model, idx, 30, top_k=3)
    with torch.no_grad():
        best = model(out[:, :-1])[0].topk(3).indices  # (B, T + 29, 3)
    assert (best[:, 3:] == out[:, 4:, None]).any(-1).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.5}, "temperature=-0.5 .*at least 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0 .*at least 1"),
        ({"top_p": 0.0}, r"top_p=0.0 .*\(0, 1\]"),
        ({"top_p": 1.01}, r"top_p=1.01 .*\(0, 1\]"),
        ({"beyond": "crop"}, "'crop'.*'stop' or 'slide'"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(model, options, words):
    model.forward = model.hidden_states = None  # neither may be called
    with pytest.raises(ValueError, match=words):
        generate(model, prompt(3), 5, **options)
    with pytest.raises(ValueError, match=words):
        stream(model, prompt(3), 5, **options)  # at once, not at the first token


def test_bad_sampling_arguments_of_the_parts(seed):
    with pytest.raises(ValueError, match="temperature=0 is greedy"):
        filter_logits(torch.randn(1, 5), 0)
    with pytest.raises(ValueError, match="temperature=-1"):
        sample(torch.randn(1, 5), -1)
    with pytest.raises(ValueError, match="top_k=-3"):
        filter_logits(torch.randn(1, 5), 1.0, -3)


@pytest.mark.parametrize(
    ("idx", "words"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), "prompt is empty.*eot_token"),
        (torch.zeros(0, 4, dtype=torch.int64), "B >= 1"),
        (torch.zeros(4, dtype=torch.int64), r"\(B, T\)"),
        (torch.zeros(1, 4), "float32"),
        (torch.tensor([[3, 71]]), "token id 71 .*0 to 70"),
        (torch.tensor([[3, -1]]), "token id -1 .*0 to 70"),
        (torch.zeros(1, 65, dtype=torch.int64), "65 tokens.*n_ctx=64"),
    ],
)
def test_bad_prompts(model, idx, words):
    with pytest.raises(ValueError, match=words):
        generate(model, idx, 5)


def test_other_bad_requests(model):
    with pytest.raises(ValueError, match="max_new_tokens=-1"):
        generate(model, prompt(3), -1)
    with pytest.raises(ValueError, match=r"one row.*\(2, 3\)"):
        stream(model, prompt(3, B=2), 5)
    with pytest.raises(ValueError, match="n_ctx=64"):
        generate(model, prompt(65), 5, beyond="slide")


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([[1, 1, 1]], r"\(1, 3\).*\(2, 4\)"),
        ([[1, 1, 1], [1, 1, 1]], r"\(2, 3\).*\(2, 4\)"),
        ([[1, 1, 1, 1], [1, 1, 0, 0]], "row 1.*left"),
        ([[0, 1, 0, 1], [1, 1, 1, 1]], "row 0.*left"),
        ([[1, 1, 1, 1], [0, 0, 0, 0]], "row 1.*at least one 1"),
        ([[1, 1, 1, 1], [2, 2, 2, 2]], "row 1"),
    ],
)
def test_bad_masks(model, mask, words):
    with pytest.raises(ValueError, match=words):
        generate(model, prompt(4, B=2), 5, attention_mask=torch.tensor(mask))


# ---- streaming


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 10}, {"use_cache": False}, {"beyond": "slide"}])
def test_stream_is_generate_one_by_one(model, seed, options):
    idx = prompt(7)

    def run(f):
        return f(model, idx, 50, generator=torch.Generator().manual_seed(seed), **options)

    tokens = list(run(stream))
    assert tokens == run(generate)[0, 7:].tolist() and all(type(t) is int for t in tokens)


def test_stream_includes_the_stop_token_and_ends(model):
    idx = prompt(7)
    free = list(stream(model, idx, 20, temperature=0))
    stop = free[6]
    assert list(stream(model, idx, 20, temperature=0, stop_ids=[stop])) == free[: free.index(stop) + 1]


def test_stream_computes_only_what_is_asked_for(model):
    calls = []
    model.lm_head.register_forward_pre_hook(lambda module, args: calls.append(1))
    tokens = stream(model, prompt(7), 20)
    assert not calls
    next(tokens)
    next(tokens)
    assert len(calls) == 2
    tokens.close()
    assert len(calls) == 2


TEXTS = [
    "plain words, nothing more",
    "naïve café, Ærøskøbing, Łódź",
    "東京は日本の首都です。",
    "🙂 family: 👩‍👩‍👧‍👦, flags 🇳🇴🇯🇵, math 𝔸∑∞",
    "mixed\n\n\ttabs \u00a0 nbsp, e\u0301 combining, \u202eright to left\u202c, \x00 nul",
]


@pytest.fixture(scope="module")
def bytes_encoding() -> tiktoken.Encoding:
    """A vocabulary of single bytes: every character outside ASCII is split."""
    ranks = {bytes([i]): i for i in range(256)}
    return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})


@pytest.mark.parametrize("text", TEXTS)
def test_decode_stream_never_splits_a_character(bytes_encoding, text):
    pieces = list(decode_stream(bytes_encoding, bytes_encoding.encode_ordinary(text)))
    assert pieces == list(text)  # one piece a character, as early as possible


@pytest.mark.parametrize("text", TEXTS)
def test_decode_stream_with_gpt2s_vocabulary(gpt2_encoding, text):
    ids = [*gpt2_encoding.encode_ordinary(text), gpt2_encoding.eot_token]
    pieces = list(decode_stream(gpt2_encoding, ids))
    assert "".join(pieces) == text + "<|endoftext|>" and not any("\ufffd" in piece for piece in pieces)


def test_decode_stream_equals_decode_on_any_bytes(bytes_encoding, seed):
    for _ in range(200):
        ids = torch.randint(0, 257, (30,)).tolist()  # mostly not UTF-8 at all
        assert "".join(decode_stream(bytes_encoding, ids)) == bytes_encoding.decode(ids, errors="replace")


def test_decode_stream_is_lazy_and_flushes_an_unfinished_character(bytes_encoding):
    ids = iter(bytes_encoding.encode_ordinary("aé")[:-1])
    pieces = decode_stream(bytes_encoding, ids)
    assert next(pieces) == "a" and next(ids, None) is not None  # é's first byte was not taken yet
    assert list(decode_stream(bytes_encoding, bytes_encoding.encode_ordinary("aé")[:-1])) == ["a", "\ufffd"]
    assert list(decode_stream(bytes_encoding, [])) == []


def test_decode_stream_names_an_unknown_id(bytes_encoding):
    with pytest.raises(ValueError, match="token id 999 .*257"):
        list(decode_stream(bytes_encoding, [65, 999]))
