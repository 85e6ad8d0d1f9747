"""Decoding against Transformers, with the cache against without, every option of the loop, streaming."""

import copy
import gc
import math
import typing
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
import transformers
from decoding import CONFIG, greedy_slow, pad, prompt, random_model, twin_of
from transformers import GPT2LMHeadModel

from minigpt_lib.generation.decode import (
    LOOK_EVERY,
    decode_stream,
    evaluating,
    generate,
    plan_decode,
    steps,
    stream,
)
from minigpt_lib.generation.kv_cache import KVCache, prefill
from minigpt_lib.generation.options import DEFAULTS, DecodeOptions, check_options
from minigpt_lib.generation.sampling import filter_logits, penalize_repeats
from minigpt_lib.model.gpt import GPTConfig, GPTLanguageModel
from minigpt_lib.training import sample_text

transformers.utils.logging.set_verbosity_error()


@pytest.fixture
def model(seed: int) -> GPTLanguageModel:
    """In float64: of fresh weights in float32, rounding decides a greedy token once in a few thousand."""
    return random_model().double()


@pytest.fixture
def oracle(model) -> GPT2LMHeadModel:
    return twin_of(model)


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


@pytest.fixture(scope="module")
def gpt2_shape() -> tuple[GPTLanguageModel, GPT2LMHeadModel]:
    """GPT-2 small with fresh random weights, positions strong enough to vary the text, and Transformers' twin."""
    torch.manual_seed(torch.seed() % 2**31)
    model = GPTLanguageModel(GPTConfig.preset("gpt2")).eval()
    model.wpe.weight.data *= 20
    return model, twin_of(model)


@pytest.mark.parametrize(("T", "new"), [(1, 6), (2, 6), (31, 6), (1000, 3)])
def test_greedy_tokens_at_gpt2s_shape(gpt2_shape, T, new):
    model, oracle = gpt2_shape
    idx = torch.randint(0, 50257, (1, T))
    cached = generate(model, idx, new, temperature=0)
    assert torch.equal(cached, generate(model, idx, new, temperature=0, prefill_chunk=400))
    assert torch.equal(cached, generate(model, idx, new, temperature=0, use_cache=False))
    theirs = oracle.generate(
        idx, attention_mask=torch.ones_like(idx), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(cached, theirs) and len(set(cached[0, T:].tolist())) > 1


def test_ragged_reset_and_truncated_at_gpt2s_shape(gpt2_shape):
    """One batch of unequal prompts; then each row alone, through one cache that is reset and cut back in between."""
    model, oracle = gpt2_shape
    rows = [torch.randint(0, 50257, (1, T)) for T in (31, 1, 12)]
    idx, mask = pad(rows)
    batch = generate(model, idx, 4, temperature=0, attention_mask=mask)
    theirs = oracle.generate(
        idx, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(batch, theirs)
    cache = KVCache.for_model(model, max_len=40)
    for row, together in zip(rows, batch, strict=True):
        T = row.size(1)
        cache.reset()
        alone = generate(model, row, 4, temperature=0, kv_cache=cache)
        assert torch.equal(alone[0, T:], together[31:])
        cache.truncate(T // 2)
        assert torch.equal(generate(model, row, 4, temperature=0, kv_cache=cache), alone)


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


def slide_slow(model: GPTLanguageModel, idx: torch.Tensor, n: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The rule in words: when the window is full and another token must be read, keep its last half."""
    n_ctx, start = model.config.n_ctx, 0
    mask = torch.ones_like(idx) if mask is None else mask
    for _ in range(n):
        if idx.size(1) - start > n_ctx:
            start = idx.size(1) - n_ctx // 2
        with torch.no_grad():
            logits, _ = model(idx[:, start:], attention_mask=mask[:, start:])  # (B, S, V)
        idx = torch.cat([idx, logits[:, -1:].argmax(-1)], dim=1)  # (B, T + 1)
        mask = F.pad(mask, (0, 1), value=1)
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
    assert cached.shape == (2, 140) and torch.equal(cached, slide_slow(model, idx, 90, mask))


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


def test_streams_that_overlap_on_a_model_in_training_all_decode_without_dropout(model):
    """The first to finish must not switch dropout on under the others, whoever started first."""
    idx = prompt(10)
    want = list(stream(model, idx, 30, temperature=0))
    model.train()
    model.h[1].eval()
    flags = [m.training for m in model.modules()]
    first, second, third = (stream(model, idx, 30, temperature=0) for _ in range(3))
    heads = [next(first), next(second)]
    assert [*heads[:1], *first] == want  # the first is through
    got = [heads[1], *(next(second) for _ in range(5))]
    model.train()  # somebody else's training goes on meanwhile; whoever comes next decodes without dropout
    model.h[1].eval()
    assert list(third) == want
    assert [*got, *second] == want
    assert [m.training for m in model.modules()] == flags


def test_many_threads_on_a_model_in_training(model):
    prompts = [prompt(T) for T in (5, 9, 14, 20)] * 6
    want = [generate(model, p, 15, temperature=0) for p in prompts]
    model.train()
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda p: generate(model, p, 15, temperature=0), prompts))
    assert sum(not torch.equal(a, b) for a, b in zip(got, want, strict=True)) == 0
    assert all(m.training for m in model.modules())


def test_a_model_in_eval_mode_is_not_touched(model, monkeypatch):
    monkeypatch.setattr(type(model), "eval", None)
    monkeypatch.setattr(type(model), "train", None)
    generate(model, prompt(5), 3)
    with evaluating(model), evaluating(model):
        assert not model.training


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
        ({"min_p": 1.5}, r"min_p=1.5 .*\[0, 1\]"),
        ({"repetition_penalty": -1.0}, "repetition_penalty=-1.0 .*above 0"),
        ({"prefill_chunk": 0}, "prefill_chunk=0 .*at least 1"),
        ({"beyond": "crop"}, "'crop'.*'stop' or 'slide'"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(model, options, words):
    model.forward = model.hidden_states = None  # neither may be called
    with pytest.raises(ValueError, match=words):
        generate(model, prompt(3), 5, **options)
    with pytest.raises(ValueError, match=words):
        stream(model, prompt(3), 5, **options)  # at once, not at the first token


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
        ([[1, 1, 1, 1], [0.5, 1, 1, 1]], "row 1"),  # neither padding nor a token, and no 0 either
        ([[float("-inf"), 0, 0, 0], [0, 0, 0, 0]], "row 0"),  # what others add to the scores
    ],
)
def test_bad_masks(model, mask, words):
    with pytest.raises(ValueError, match=words):
        generate(model, prompt(4, B=2), 5, attention_mask=torch.tensor(mask))


# ---- penalties and min-p inside the loop


@pytest.mark.parametrize("penalty", [0.8, 1.4])
def test_repetition_penalty_greedy_agrees_with_transformers(model, oracle, penalty):
    idx, mask = pad([prompt(9), prompt(9), prompt(9)])
    got = generate(model, idx, 30, temperature=0, repetition_penalty=penalty)
    want = oracle.generate(
        idx, attention_mask=mask, max_new_tokens=30, do_sample=False, repetition_penalty=penalty, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(got, want)
    free = generate(model, idx, 30, temperature=0)
    assert not torch.equal(got, free)
    assert torch.equal(generate(model, idx, 30, temperature=0, repetition_penalty=1.0), free)


def test_padding_is_not_penalized_as_a_repeated_token(model):
    rows = [prompt(12), prompt(3)]
    idx, mask = pad(rows, value=int(generate(model, rows[1], 1, temperature=0)[0, -1]))
    out = generate(model, idx, 25, temperature=0, attention_mask=mask, repetition_penalty=1.5)
    for row, alone in zip(out, rows, strict=True):
        want = generate(model, alone, 25, temperature=0, repetition_penalty=1.5)[0, alone.size(1) :]
        assert torch.equal(row[12:], want)


def test_drawn_tokens_are_within_min_p(model):
    idx = prompt(4, B=3)
    out = generate(model, idx, 30, min_p=0.3)
    with torch.no_grad():
        p = model(out[:, :-1])[0][:, 3:].softmax(-1)  # (B, 30, V)
    drawn = p.gather(-1, out[:, 4:, None])[..., 0]
    assert (drawn >= 0.3 * p.amax(-1) * (1 - 1e-3)).all() and (drawn < 0.999 * p.amax(-1)).any()


# ---- a cache of the caller's own


def test_a_conversation_reuses_what_it_shares(model):
    cache, fed = KVCache.for_model(model), []
    idx = prompt(10)
    first = generate(model, idx, 8, temperature=0, kv_cache=cache)
    assert torch.equal(first, generate(model, idx, 8, temperature=0))
    assert cache.pos == 17 and torch.equal(cache.ids[:, :17], first[:, :17])  # all but the last new token
    second = torch.cat([first, prompt(5)], dim=1)  # (1, 23)
    want = generate(model, second, 8, temperature=0)
    model.h[0].register_forward_pre_hook(lambda module, args: fed.append(args[0].size(1)))
    assert list(stream(model, second, 8, temperature=0, kv_cache=cache)) == want[0, 23:].tolist()
    assert fed == [6] + [1] * 7
    fed.clear()
    again = generate(model, second, 8, temperature=0, kv_cache=cache)  # the same prompt: only its last token is read
    assert torch.equal(again, want) and fed == [1] * 8


def test_a_changed_history_is_read_again_from_the_change_on(model):
    cache, fed = KVCache.for_model(model, batch_size=2), []
    idx = prompt(20, B=2)
    generate(model, idx, 8, kv_cache=cache)
    other = idx.clone()
    other[1, 6] = (other[1, 6] + 1) % 71
    want = generate(model, other, 8, temperature=0)
    model.h[0].register_forward_pre_hook(lambda module, args: fed.append(args[0].size(1)))
    assert torch.equal(generate(model, other, 8, temperature=0, kv_cache=cache), want)
    assert fed == [14] + [1] * 7


def test_a_stream_left_early_leaves_a_cache_that_can_go_on(model):
    cache = KVCache.for_model(model)
    idx = prompt(10)
    tokens = stream(model, idx, 20, temperature=0, kv_cache=cache)
    said = [next(tokens), next(tokens), next(tokens)]
    tokens.close()
    assert cache.pos == 12
    longer = torch.cat([idx, torch.tensor([said]), prompt(4)], dim=1)
    assert torch.equal(
        generate(model, longer, 8, temperature=0, kv_cache=cache), generate(model, longer, 8, temperature=0)
    )


def test_an_error_inside_the_model_leaves_a_cache_that_can_go_on(model):
    cache, idx = KVCache.for_model(model), prompt(10)
    generate(model, idx, 5, temperature=0, kv_cache=cache)
    hook = model.h[2].register_forward_pre_hook(lambda module, args: (_ for _ in ()).throw(RuntimeError("boom")))
    longer = torch.cat([idx, prompt(6)], dim=1)
    with pytest.raises(RuntimeError, match="boom"):
        generate(model, longer, 5, temperature=0, kv_cache=cache)
    hook.remove()
    assert torch.equal(
        generate(model, longer, 5, temperature=0, kv_cache=cache), generate(model, longer, 5, temperature=0)
    )


def test_own_cache_and_sliding(model):
    cache, idx = KVCache.for_model(model), prompt(50)
    for _ in range(2):
        got = generate(model, idx, 60, temperature=0, beyond="slide", kv_cache=cache)
        assert torch.equal(got, slide_slow(model, idx, 60))


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_prefill_chunk_changes_nothing_but_the_passes(model, chunk):
    idx, fed = prompt(12, B=2), []
    want = generate(model, idx, 10, temperature=0)
    model.h[0].register_forward_pre_hook(lambda module, args: fed.append(args[0].size(1)))
    assert torch.equal(generate(model, idx, 10, temperature=0, prefill_chunk=chunk), want)
    assert max(fed) == min(chunk, 12)


def test_caches_that_do_not_fit_are_refused(model):
    idx = prompt(10)
    for cache, words in (
        (KVCache(CONFIG, 2), r"shape \(3, 2, .*need \(3, 1, "),
        (KVCache(CONFIG, dtype=torch.bfloat16), "bfloat16.*float64"),
        (KVCache(CONFIG, device="meta"), "on meta, the model on cpu"),
        (KVCache(CONFIG, max_len=14, dtype=torch.float64), "room for 14 positions.* 15"),
    ):
        with pytest.raises(ValueError, match=words):
            generate(model, idx, 5, kv_cache=cache)
    with pytest.raises(ValueError, match="use_cache=False contradicts"):
        generate(model, idx, 5, kv_cache=KVCache(CONFIG), use_cache=False)
    padded, mask = pad([prompt(5), prompt(3)])
    with pytest.raises(ValueError, match="knows no padding"):
        generate(model, padded, 5, kv_cache=KVCache(CONFIG, 2, dtype=torch.float64), attention_mask=mask)


# ---- steps


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"top_k": 9}, {"top_p": 0.7, "min_p": 0.05, "repetition_penalty": 1.3}]
)
def test_steps_hand_out_what_generate_drew_from(model, seed, options):
    def run(f):
        return f(model, idx, 12, generator=torch.Generator().manual_seed(seed), **options)

    idx = prompt(6, B=3)
    out, seen = run(generate), list(run(steps))
    assert torch.equal(torch.stack([step.ids for step in seen], dim=1), out[:, 6:])
    with torch.no_grad():
        logits = model(out[:, :-1])[0][:, 5:]  # (B, 12, V)
    for t, step in enumerate(seen):
        assert (step.logits - logits[:, t]).abs().max() <= 2e-5
        assert step.probabilities.shape == (3, 71) and torch.allclose(step.probabilities.sum(-1), torch.ones(3))
        assert (step.probabilities.gather(1, step.ids[:, None]) > 0).all()


def test_the_distribution_of_a_step_is_the_filtered_one(model):
    idx = prompt(6, B=2)
    step = next(steps(model, idx, 1, temperature=0.7, top_k=9, repetition_penalty=1.5))
    seen = torch.zeros(2, 71, dtype=torch.bool).scatter(1, idx, True)
    want = filter_logits(penalize_repeats(step.logits, seen, 1.5), 0.7, 9).softmax(-1)
    assert torch.allclose(step.probabilities, want, atol=1e-6)
    greedy = next(steps(model, idx, 1, temperature=0))
    assert torch.equal(greedy.probabilities, torch.eye(71)[greedy.logits.argmax(-1)])


@pytest.mark.parametrize("function", [generate, stream, steps, plan_decode])
def test_editors_and_type_checkers_are_told_every_option(function):
    hint = typing.get_type_hints(function)["options"]
    assert typing.get_origin(hint) is typing.Unpack and typing.get_args(hint) == (DecodeOptions,)
    assert set(DEFAULTS) == set(typing.get_type_hints(DecodeOptions))
    assert not [name for name in DEFAULTS if name not in generate.__doc__]  # what `help(generate)` shows


@pytest.mark.parametrize("function", [generate, stream, steps])
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("tempratur", "did you mean temperature\\?"),
        ("temp", "did you mean temperature\\?"),
        ("topk", "did you mean top_k\\?"),
        ("stop_id", "did you mean stop_ids\\?"),
        ("use_kv_cache", "did you mean (use_cache|kv_cache)\\?"),
        ("eos_token_id", "did you mean stop_ids\\?"),  # Transformers' name
        ("zzz", "the options are temperature, top_k, "),
    ],
)
def test_unknown_options_are_refused_with_the_nearest_one(model, function, wrong, words):
    model.forward = model.hidden_states = None
    with pytest.raises(TypeError, match=f"'{wrong}'.*{words}"):
        function(model, prompt(3), 5, **{wrong: 1.0})


@pytest.mark.parametrize("idx", ["Once upon a time", [1, 2, 3], None])
def test_what_is_not_a_tensor_is_refused_with_the_right_call(model, idx):
    for function in (generate, stream, steps):
        with pytest.raises(TypeError, match=rf"{type(idx).__name__}.*LLM\.load.*generate\(text\).*enc\.encode"):
            function(model, idx, 5)


@pytest.mark.parametrize("five", [5, 5.0, np.int64(5), np.float32(5), torch.tensor(5)])
def test_whole_numbers_are_taken_in_any_form(model, five):
    idx = prompt(4)
    want = generate(model, idx, 5, temperature=0)
    assert torch.equal(generate(model, idx, five, temperature=0), want)
    options = check_options({"top_k": five, "prefill_chunk": five, "n_vocab": five, "stop_ids": five})
    assert [options[k] for k in ("top_k", "prefill_chunk", "n_vocab", "stop_ids")] == [5, 5, 5, (5,)]
    assert type(options["top_k"]) is int


@pytest.mark.parametrize("wrong", [2.5, "3", True, float("nan"), float("inf"), [3]])
@pytest.mark.parametrize("name", ["max_new_tokens", "top_k", "prefill_chunk", "n_vocab"])
def test_other_values_are_refused_where_whole_numbers_belong(model, name, wrong):
    request = {"max_new_tokens": 5} | {name: wrong}
    with pytest.raises(ValueError, match=f"{name}=.* must be a (whole )?number"):
        generate(model, prompt(3), **request)


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_texts_and_truth_values_are_no_numbers(model, name):
    for wrong in ("0.7", False, [0.5]):
        with pytest.raises(ValueError, match=f"{name}=.* must be a number"):
            generate(model, prompt(3), 5, **{name: wrong})
    with pytest.raises(TypeError, match="generator=7.*manual_seed"):
        generate(model, prompt(3), 5, generator=7)


def test_none_switches_every_option_off(model, seed):
    off = {"temperature": None, "top_k": None, "top_p": None, "min_p": None, "repetition_penalty": None,
           "stop_ids": None, "n_vocab": None, "prefill_chunk": None, "attention_mask": None}  # fmt: skip
    also = {"temperature": 1, "top_k": 10**6, "top_p": 1, "min_p": 0, "repetition_penalty": 1, "stop_ids": ()}
    idx = prompt(5, B=2)
    runs = [
        generate(model, idx, 20, generator=torch.Generator().manual_seed(seed), **o) for o in ({}, off, also)
    ]  # fmt: skip
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_stop_ids_in_any_form(model):
    idx = prompt(7)
    free = generate(model, idx, 20, temperature=0)[0, 7:].tolist()
    stop = free[6]
    want = idx[0].tolist() + free[: free.index(stop) + 1]
    for form in (stop, [stop], {stop}, np.array([stop]), torch.tensor([stop]), torch.tensor(stop), float(stop)):
        assert generate(model, idx, 20, temperature=0, stop_ids=form)[0].tolist() == want
    with pytest.raises(ValueError, match="a stop id=2.5 must be a whole"):
        generate(model, idx, 5, stop_ids=[2.5])
    for never in (71, -1):
        with pytest.raises(ValueError, match=f"stop id {never} can never be produced.* 0 to 70"):
            generate(model, idx, 5, stop_ids=[3, never])


# ---- logits that are not finite


def ruin(model: GPTLanguageModel, value: float, row: int | None = None) -> None:
    """From the third token on, `value` among the logits of all rows, or of one."""
    calls = []

    def hook(module, args, output):
        calls.append(1)
        if len(calls) >= 3:
            output[slice(None) if row is None else row, ..., 5] = value
        return output

    model.lm_head.register_forward_hook(hook)


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 5, "top_p": 0.9}, {"use_cache": False}])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("every", [1, 16])
def test_logits_that_are_not_finite_end_decoding(model, monkeypatch, options, value, every):
    monkeypatch.setitem(LOOK_EVERY, "cpu", every)
    ruin(model, value, row=1)
    with pytest.raises((FloatingPointError, ValueError), match="finite|NaN") as caught:
        generate(model, prompt(4, B=3), 40, **options)
    if every == 1 or options == {"temperature": 0}:
        assert caught.type is FloatingPointError and "row 1," in str(caught.value)


def test_a_stream_hands_out_nothing_that_came_from_nan(model):
    ruin(model, math.nan)
    got = []
    with pytest.raises(FloatingPointError, match="before token 7"):
        for token in stream(model, prompt(4), 40, temperature=0):
            got.append(token)
    assert len(got) == 2


def test_weights_of_nan_do_not_write_token_0_for_ever(model):
    model.h[1].mlp.c_fc.weight.data[3, 2] = math.nan
    flags = [m.training for m in model.train().modules()]
    with pytest.raises(FloatingPointError):
        generate(model, prompt(4), 40, temperature=0)
    assert [m.training for m in model.modules()] == flags


def test_a_model_may_forbid_tokens_with_minus_infinity(model):
    ruin(model, -math.inf)
    assert 5 not in generate(model, prompt(4, B=4), 40, temperature=2.0)[:, 6:]


# ---- a look at every 16th token only


@pytest.mark.parametrize("every", [2, 16, 100])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 2.5}, {"beyond": "slide", "use_cache": False}])
def test_looking_seldom_changes_neither_text_nor_cache_nor_generator(model, seed, monkeypatch, every, options):
    idx = prompt(6, B=3)
    free = generate(model, idx, 45, generator=torch.Generator().manual_seed(seed), **options)[:, 6:]
    stops = {int(row[n]) for row, n in zip(free, (3, 11, 19), strict=True)}

    def run(every: int):
        monkeypatch.setitem(LOOK_EVERY, "cpu", every)
        g, cache = torch.Generator().manual_seed(seed), KVCache.for_model(model, 3)
        own = {} if "use_cache" in options else {"kv_cache": cache}
        out = generate(model, idx, 45, stop_ids=stops, generator=g, **options, **own)
        return out, cache.pos, cache.ids[:, : cache.pos], torch.rand(4, generator=g)

    (a, pos_a, ids_a, next_a), (b, pos_b, ids_b, next_b) = run(1), run(every)
    assert torch.equal(a, b) and a.size(1) < 6 + 45
    assert pos_a == pos_b and torch.equal(ids_a, ids_b)
    if options.get("temperature") != 0:
        assert torch.equal(next_a, next_b)


def test_the_last_token_is_looked_at_too(model, monkeypatch):
    monkeypatch.setitem(LOOK_EVERY, "cpu", 16)
    ruin(model, math.nan)
    with pytest.raises(FloatingPointError):
        generate(model, prompt(4), 5, temperature=0)
    assert generate(model, prompt(4), 0).size(1) == 4


# ---- models that decode several tokens at once


class Ahead(GPTLanguageModel):
    """Writes up to four tokens at a time, beginning with `first`, from numbers that it draws beforehand."""

    def decode(self, plan, first=None):
        self.asked.append(first)
        return None if plan.options["repetition_penalty"] else self.parts(plan, first or 4)

    @torch.inference_mode()
    def parts(self, plan, size: int):
        assert not self.training
        o, g, B = plan.options, plan.options["generator"], len(plan.ids)
        t, done = plan.T, torch.zeros(B, dtype=torch.bool)
        plan.cache.reuse(plan.ids[:, :t])
        while t < plan.ids.size(1) and not done.all():
            begin, size = t, min(size, 4, plan.ids.size(1) - t)
            u = torch.rand(size, B, 1, generator=g) if o["temperature"] else None
            while t < begin + size and not done.all():
                logits = prefill(self, plan.ids[:, plan.cache.pos : t], plan.cache)
                if u is None:
                    new = logits.argmax(-1)
                else:
                    p = filter_logits(logits, o["temperature"], o["top_k"]).softmax(-1)
                    new = (p.cumsum(-1) <= u[t - begin]).sum(-1)
                plan.ids[:, t] = torch.where(done, plan.ids[:, t - 1], new)
                done = done | torch.isin(plan.ids[:, t], plan.stop_ids)
                t += 1
            yield plan.ids[:, begin:t]
            size *= 2


@pytest.fixture
def ahead(model) -> Ahead:
    other = copy.deepcopy(model)
    other.__class__, other.asked = Ahead, []
    return other.train()


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"temperature": 0.8, "top_k": 9}])
@pytest.mark.parametrize("stopping", [False, True])
@pytest.mark.parametrize("B", [1, 3])
def test_a_model_that_decodes_by_itself_writes_the_same_text(model, ahead, seed, options, stopping, B):
    idx = prompt(6, B)
    free = generate(model, idx, 30, generator=torch.Generator().manual_seed(seed), **options)[:, 6:]
    stops = {"stop_ids": {int(row[5 + i]) for i, row in enumerate(free)}} if stopping else {}

    def run(m: GPTLanguageModel, follow: bool) -> tuple:
        g, cache = torch.Generator().manual_seed(seed), KVCache.for_model(m, B)
        given = {"generator": g, "kv_cache": cache, **options, **stops}
        text = list(stream(m, idx, 30, **given)) if follow else generate(m, idx, 30, **given).tolist()
        assert all(part.training for part in ahead.modules())
        return text, cache.pos, cache.ids[:, : cache.pos].tolist(), torch.rand(3, generator=g).tolist()

    for follow in (False, True)[: 1 + (B == 1)]:
        assert run(ahead, follow) == run(model, follow)
    assert ahead.asked == [None, 1][: 1 + (B == 1)]


def test_what_such_a_model_declines_goes_step_by_step(model, ahead):
    idx, options = prompt(6), {"temperature": 0, "repetition_penalty": 1.3}
    want = generate(model, idx, 20, **options)
    assert torch.equal(generate(ahead, idx, 20, **options), want)
    assert list(stream(ahead, idx, 20, **options)) == want[0, 6:].tolist() and ahead.asked == [None, 1]
    assert [int(step.ids) for step in steps(ahead, idx, 20, **options)] == want[0, 6:].tolist()
    assert ahead.asked == [None, 1]  # steps shows every step


@pytest.mark.parametrize("taken", [0, 1, 2, 3, 9, 30])
def test_closing_such_a_stream_forgets_what_was_ahead(model, ahead, seed, taken):
    idx = prompt(6)

    def run(m: GPTLanguageModel) -> tuple:
        g, cache = torch.Generator().manual_seed(seed), KVCache.for_model(m)
        ids = stream(m, idx, 30, generator=g, kv_cache=cache)
        text = [next(ids) for _ in range(taken)]
        ids.close()
        assert all(part.training for part in ahead.modules())
        return text, cache.pos, cache.ids[:, : cache.pos].tolist(), torch.rand(3, generator=g).tolist()

    assert run(ahead) == run(model)


# ---- padded vocabularies


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 5.0}, {"repetition_penalty": 1.3}])
def test_ids_beyond_the_tokenizer_are_never_chosen(model, options):
    model.lm_head.weight.data[60:] *= 9  # the rows of the padding are the likeliest of all
    idx = prompt(5, B=4)
    assert (generate(model, idx, 30, **options)[:, 5:] >= 60).any()
    out = generate(model, idx, 30, n_vocab=60, **options)
    assert (out[:, 5:] < 60).all()
    step = next(steps(model, idx, 1, n_vocab=60, **options))
    assert step.logits.shape == step.probabilities.shape == (4, 71) and (step.probabilities[:, 60:] == 0).all()
    assert torch.equal(generate(model, idx, 5, temperature=0, n_vocab=71), generate(model, idx, 5, temperature=0))


def test_the_sample_of_a_training_run_stays_inside_the_tokenizer_too(seed, bytes_encoding):
    model = random_model(GPTConfig(vocab_size=320, n_ctx=64, n_embd=32, n_layer=2, n_head=4))
    model.wte.weight.data[257:] *= 30
    text = sample_text(model, bytes_encoding, "ab", n=40)  # an id beyond 256 could not be decoded
    assert text.startswith("ab")


# ---- caches that generation makes for itself


@pytest.mark.parametrize(
    ("T", "new", "beyond", "length"), [(5, 7, "stop", 12), (60, 100, "slide", 64), (3, 0, "stop", 3)]
)
def test_a_cache_is_as_long_as_the_request(model, T, new, beyond, length):
    job = plan_decode(model, prompt(T, B=2), new, beyond=beyond)
    assert job.cache.max_len == length and job.cache.keys.size(1) == 2


def test_a_model_with_caches_of_its_own_is_asked_for_one(model):
    asked, idx = [], prompt(9, B=2)
    want = generate(model, idx, 20, temperature=0)
    kept = KVCache.for_model(model, 2)

    def new_cache(batch_size: int, length: int) -> KVCache:
        asked.append((batch_size, length))
        return kept

    model.new_cache = new_cache
    for _ in range(2):  # the second time it holds what the first left behind
        assert torch.equal(generate(model, idx, 20, temperature=0), want)
    other = prompt(11, B=2)
    got = generate(model, other, 20, temperature=0)
    assert asked == [(2, 29), (2, 29), (2, 31)] and kept.pos == 30
    generate(model, idx, 3, use_cache=False)
    generate(model, idx, 3, kv_cache=KVCache.for_model(model, 2))
    assert len(asked) == 3
    del model.new_cache
    assert torch.equal(got, generate(model, other, 20, temperature=0))


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
