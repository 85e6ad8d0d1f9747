"""The cache inside the model: any cutting of a text gives the uncached logits; what it keeps, forgets and refuses."""

import pytest
import torch
from decoding import CONFIG, pad, prompt, random_model

from minigpt_lib.generation.kv_cache import KVCache, prefill
from minigpt_lib.model.gpt import GPTConfig, GPTLanguageModel

GPT2_SMALL = GPTConfig.preset("gpt2")


@pytest.fixture
def model(seed: int) -> GPTLanguageModel:
    return random_model()


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
        got_a2 = model(b, kv_cache=branch)[0]  # after the other one has written behind its own ten
        want_a2 = model(torch.cat([idx, a, b], dim=1))[0][:, 15:]
        want_a = model(torch.cat([idx, a], dim=1))[0][:, 10:]
        want_b = model(torch.cat([idx, b], dim=1))[0][:, 10:]
    assert (branch.pos, cache.pos) == (22, 17) and (got_a2 - want_a2).abs().max() <= 2e-5
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


# ---- prefill and what the cache remembers


@pytest.mark.parametrize("chunk", [None, 1, 7, 20, 100])
def test_prefill_gives_the_last_logits_whatever_the_chunk(model, chunk):
    idx = prompt(20, B=2)
    cache, fed = KVCache.for_model(model, batch_size=2), []
    model.h[0].register_forward_pre_hook(lambda module, args: fed.append(args[0].size(1)))
    with torch.no_grad():
        got = prefill(model, idx, cache, chunk=chunk)
        want = model(idx)[0][:, -1]
    size = min(chunk or 20, 20)
    assert fed[:-1] == [len(part) for part in torch.arange(20).split(size)]
    assert got.shape == (2, 71) and (got - want).abs().max() <= 2e-5
    assert cache.pos == 20 and torch.equal(cache.ids[:, :20], idx)


def test_chunked_prefill_of_padded_rows(model):
    idx, mask = pad([prompt(20), prompt(3), prompt(11)])
    cache = KVCache.for_model(model, batch_size=3)
    with torch.no_grad():
        got = prefill(model, idx, cache, attention_mask=mask, chunk=6)
        assert (got - model(idx, attention_mask=mask)[0][:, -1]).abs().max() <= 2e-5


@pytest.mark.parametrize("chunk", [0, -4])
def test_prefill_refuses_a_chunk_below_one(model, chunk):
    with pytest.raises(ValueError, match=f"chunk={chunk} .*at least 1"):
        prefill(model, prompt(5), KVCache.for_model(model), chunk=chunk)


@pytest.mark.parametrize(("shared", "length"), [(0, 12), (1, 12), (7, 12), (12, 12), (20, 30), (12, 1), (5, 5)])
def test_reuse_keeps_the_longest_common_beginning(model, shared, length):
    first = prompt(20, B=2)
    second = prompt(length, B=2)
    n = min(shared, length)
    second[:, :n] = first[:, :n]
    if n < min(length, 20):
        second[1, n] = (first[1, n] + 1) % 71  # one row differs: no row may go on
    cache = KVCache.for_model(model, batch_size=2)
    with torch.no_grad():
        prefill(model, first, cache)
        kept = cache.reuse(second)
        assert kept == cache.pos == min(n, length - 1)
        got = prefill(model, second[:, kept:], cache)
        assert (got - model(second)[0][:, -1]).abs().max() <= 2e-5


def test_what_the_model_reads_by_itself_is_noted_too(model):
    first, second = prompt(10), prompt(10)
    second[0, [0, 4]] = (first[0, [0, 4]] + 1) % 71
    cache = KVCache.for_model(model)
    with torch.no_grad():
        prefill(model, first, cache)
        cache.reset()
        model(second, kv_cache=cache)  # the ids of `first` must not stand for these keys
        assert cache.reuse(first) == 0
        model(second, kv_cache=cache)
        assert cache.reuse(torch.cat([second, first], dim=1)) == 10
        cache.reset()
        prefill(model, first, cache)
        cache.truncate(4)
        model(second[:, 4:8], kv_cache=cache)
        assert cache.reuse(first) == 4


def test_a_copy_remembers_for_itself(model):
    cache = KVCache.for_model(model)
    idx = prompt(10)
    with torch.no_grad():
        prefill(model, idx, cache)
        branch = cache.copy()
        branch.truncate(5)
        prefill(model, (idx[:, 5:] + 1) % 71, branch)
    assert cache.reuse(torch.cat([idx, idx], dim=1)) == 10
    assert branch.reuse(torch.cat([idx, idx], dim=1)) == 5


def test_a_cache_made_in_inference_mode_works_outside(model):
    with torch.inference_mode():
        cache = KVCache.for_model(model)
        branch = cache.copy()
    with torch.no_grad():
        for c in (cache, branch):
            prefill(model, prompt(5), c)
            assert c.pos == 5 and not c.keys.is_inference()
