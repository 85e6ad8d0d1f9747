"""Speculative decoding by prompt lookup: the tokens of greedy decoding, with fewer passes."""

import pytest
import torch
from decoding import CONFIG, prompt, random_model

from minigpt_lib.generation.decode import generate
from minigpt_lib.generation.kv_cache import KVCache
from minigpt_lib.generation.prompt_lookup import generate_lookup, propose
from minigpt_lib.model.gpt import GPTLanguageModel


@pytest.fixture
def model(seed: int) -> GPTLanguageModel:
    return random_model()


@pytest.fixture
def parrot(model) -> GPTLanguageModel:
    """Positions count for nothing, so that greedy text runs into a loop and guesses come true."""
    model.wpe.weight.data.zero_()
    return model


def propose_slow(ids: list[int], draft: int, ngram: int) -> list[int]:
    for n in range(min(ngram, len(ids) - 1), 0, -1):
        for start in range(len(ids) - n - 1, -1, -1):
            if ids[start : start + n] == ids[len(ids) - n :]:
                return ids[start + n : start + n + draft]
    return []


def test_propose_is_the_definition(seed):
    for _ in range(300):
        ids = torch.randint(0, 4, (int(torch.randint(1, 15, ())),))
        draft, ngram = int(torch.randint(1, 6, ())), int(torch.randint(1, 5, ()))
        assert propose(ids, draft, ngram).tolist() == propose_slow(ids.tolist(), draft, ngram)


@pytest.mark.parametrize("T", [1, 2, 31, 60])
@pytest.mark.parametrize("draft", [1, 3, 7])
def test_tokens_are_those_of_greedy_decoding(model, parrot, T, draft):
    for m in (model, parrot):
        idx = prompt(T)
        idx[:, T // 2 :] = idx[:, : T - T // 2].clone()  # something to find
        new = min(40, 64 - T)
        got = generate_lookup(m, idx, new, draft=draft)
        assert torch.equal(got.ids, generate(m, idx, new, temperature=0)) and got.new == new
        assert got.accepted <= got.proposed and got.accepted + got.passes == got.new


def test_guesses_that_come_true_save_passes(parrot):
    idx, fed = prompt(3), []
    free = generate(parrot, idx, 61, temperature=0)
    parrot.h[0].register_forward_pre_hook(lambda module, args: fed.append(args[0].size(1)))
    got = generate_lookup(parrot, idx, 61, draft=5)
    assert torch.equal(got.ids, free)
    assert got.passes == len(fed) - 1 < 61 and got.acceptance > 0
    assert got.proposed == sum(fed[1:]) - got.passes and got.accepted == 61 - got.passes
    assert got.tokens_per_pass == 61 / got.passes and max(fed) <= 6


@pytest.mark.parametrize("place", [0, 3, 10])
def test_a_stop_token_ends_it_also_inside_a_guess(parrot, place):
    idx = prompt(4)
    free = generate(parrot, idx, 30, temperature=0)
    stop = int(free[0, 4 + place])
    want = generate(parrot, idx, 30, temperature=0, stop_ids=[stop])
    assert torch.equal(generate_lookup(parrot, idx, 30, stop_ids=[stop]).ids, want)


def test_guesses_behind_the_stop_token_are_not_counted(model, monkeypatch):
    idx = prompt(4)
    free = generate(model, idx, 30, temperature=0)
    monkeypatch.setattr(
        "minigpt_lib.generation.prompt_lookup.propose", lambda ids, draft, ngram: free[0, len(ids) : len(ids) + draft]
    )
    stop = int(free[0, 6])
    new = free[0, 4:].tolist().index(stop) + 1  # 3, or less if it came before
    got = generate_lookup(model, idx, 30, stop_ids=[stop])
    assert (got.new, got.passes, got.proposed, got.accepted) == (new, 1, 7, new)


def test_own_cache_goes_on_in_the_next_turn(parrot):
    cache, idx = KVCache.for_model(parrot), prompt(10)
    first = generate_lookup(parrot, idx, 10, kv_cache=cache)
    assert cache.pos == 19 and torch.equal(cache.ids[:, :19], first.ids[:, :19])
    longer = torch.cat([first.ids, prompt(4)], dim=1)
    got = generate_lookup(parrot, longer, 12, kv_cache=cache)
    assert torch.equal(got.ids, generate(parrot, longer, 12, temperature=0))


def test_the_end_of_the_context_and_nothing_to_do(model):
    with pytest.warns(UserWarning, match="n_ctx=64"):
        got = generate_lookup(model, prompt(60), 10)
    assert got.ids.shape == (1, 64)
    idx = prompt(5)
    nothing = generate_lookup(model, idx, 0)
    assert torch.equal(nothing.ids, idx) and nothing.passes == nothing.new == 0 and nothing.acceptance == 0


def test_bad_requests(model):
    with pytest.raises(ValueError, match=r"one row.*\(2, 3\)"):
        generate_lookup(model, prompt(3, B=2), 5)
    with pytest.raises(ValueError, match="draft=0"):
        generate_lookup(model, prompt(3), 5, draft=0)
    with pytest.raises(ValueError, match="prompt is empty"):
        generate_lookup(model, prompt(3)[:, :0], 5)
    with pytest.raises(ValueError, match="token id 71"):
        generate_lookup(model, torch.tensor([[CONFIG.vocab_size]]), 5)
