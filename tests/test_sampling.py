"""Sampling against slow explicit versions and against Transformers."""

import math

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minigpt_lib.generation import sampling
from minigpt_lib.generation.options import check_sampling
from minigpt_lib.generation.sampling import draw, filter_logits, keep_top_p, penalize_repeats, sample, uniform


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


def test_bad_sampling_arguments_of_the_parts(seed):
    with pytest.raises(ValueError, match="temperature=0 is greedy"):
        filter_logits(torch.randn(1, 5), 0)
    with pytest.raises(ValueError, match="temperature=-1"):
        sample(torch.randn(1, 5), -1)
    with pytest.raises(ValueError, match="top_k=-3"):
        filter_logits(torch.randn(1, 5), 1.0, -3)


@pytest.mark.parametrize("min_p", [1e-4, 0.05, 0.4, 1.0])
def test_min_p_agrees_with_transformers_and_the_definition(seed, min_p):
    logits = torch.randn(8, 300, dtype=torch.float64) * 3
    got = filter_logits(logits, 0.7, min_p=min_p).softmax(-1)
    p = (logits / 0.7).softmax(-1)
    want = torch.where(p >= min_p * p.amax(-1, keepdim=True), p, 0)
    assert torch.allclose(got, (want / want.sum(-1, keepdim=True)).float(), atol=1e-6)
    theirs = MinPLogitsWarper(min_p)(None, (logits / 0.7).float())
    assert torch.equal(got > 0, theirs.isfinite())
    assert (min_p == 1.0) == ((got > 0).sum(-1) == 1).all().item()


def test_all_filters_together_agree_with_transformers(seed):
    logits = torch.randn(8, 300) * 3
    want = logits / 1.3
    for warper in (TopKLogitsWarper(60), TopPLogitsWarper(0.95), MinPLogitsWarper(0.02)):
        want = warper(None, want)
    got = filter_logits(logits, 1.3, 60, 0.95, 0.02)
    assert torch.equal(got.isfinite(), want.isfinite()) and torch.allclose(got.softmax(-1), want.softmax(-1), atol=1e-6)


def test_min_p_switched_off_changes_nothing(seed):
    logits = torch.randn(5, 30)
    assert torch.equal(filter_logits(logits, min_p=0.0), logits)
    assert torch.equal(filter_logits(logits, min_p=None), logits)


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3, 4.0])
def test_repetition_penalty_agrees_with_transformers(seed, penalty):
    logits, idx = torch.randn(6, 50) * 3, torch.randint(0, 50, (6, 20))
    seen = torch.zeros(6, 50, dtype=torch.bool).scatter(1, idx, True)
    before = logits.clone()
    got = penalize_repeats(logits, seen, penalty)
    assert torch.allclose(got, RepetitionPenaltyLogitsProcessor(penalty)(idx, logits.clone()), atol=1e-6)
    assert torch.equal(logits, before)
    assert torch.equal(got, logits) == (penalty == 1.0)


def test_draw_takes_probabilities_and_keeps_the_device_of_its_input(seed):
    probability = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]).repeat(500, 1)
    ids = draw(probability, torch.Generator().manual_seed(seed))
    assert ids.dtype == torch.int64 and ids.shape == (1000,)
    assert (ids[::2] == 1).all() and set(ids[1::2].tolist()) == {0, 2}
    assert torch.equal(ids, draw(probability, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_p": -0.1}, r"min_p=-0.1 .*\[0, 1\]"),
        ({"min_p": 1.2}, r"min_p=1.2 .*\[0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 .*above 0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty=nan"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        check_sampling(1.0, **options)


# ---- the draw: one number a row


def frequencies(ids: torch.Tensor, V: int) -> torch.Tensor:
    return torch.bincount(ids, minlength=V) / len(ids)


def test_draws_have_the_distribution_of_the_softmax_and_of_multinomial(seed):
    V, n = 40, 60_000
    p = (torch.randn(V) * 2).softmax(-1)
    p[torch.randperm(V)[:10]] = 0
    p = p / p.sum()
    ours = frequencies(draw(p.expand(n, V), torch.Generator().manual_seed(seed)), V)
    theirs = frequencies(torch.multinomial(p, n, replacement=True), V)
    sigma = (p * (1 - p) / n).sqrt()
    assert ((ours - p).abs() <= 6 * sigma).all() and (ours[p == 0] == 0).all()
    assert ((ours - theirs).abs() <= 6 * sigma * 2**0.5).all()


def dart(monkeypatch, value: float) -> None:
    monkeypatch.setattr(sampling, "uniform", lambda rows, generator, device: torch.full((rows, 1), value))


@pytest.mark.parametrize("V", [3, 257, 50_257])
def test_the_ends_of_the_bar_give_the_first_and_the_last_possible_id(seed, monkeypatch, V):
    p = (torch.randn(8, V) * 3).softmax(-1)
    p[:, 0] = p[:, -1] = 0  # neither end may be drawn
    p[0] = 0
    p[0, 1] = 1.0
    first, last = (p > 0).int().argmax(-1), V - 1 - (p > 0).flip(-1).int().argmax(-1)
    dart(monkeypatch, 0.0)
    assert torch.equal(draw(p), first)
    dart(monkeypatch, 1.0)  # what rounding may make of the largest number
    for q in (p, p * 0.999, p * 1.001):  # and a sum that is not quite 1
        assert torch.equal(draw(q), last)
    dart(monkeypatch, 1 - 2**-24)  # the largest that torch.rand gives
    ids = draw(p)
    behind = p.double().flip(-1).cumsum(-1).flip(-1).gather(1, ids[:, None])[:, 0] - p.gather(1, ids[:, None])[:, 0]
    assert (p.gather(1, ids[:, None]) > 0).all() and (behind < 1e-6).all()


def test_an_id_without_probability_is_never_drawn_wherever_the_dart_lands(seed, monkeypatch):
    p = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.0, 0.25, 0.0]])
    for value, want in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 5), (0.9999, 5)):
        dart(monkeypatch, value)
        assert draw(p).tolist() == [want]


def test_the_sum_of_a_gpu_may_go_down_by_rounding(monkeypatch):
    """A parallel sum of floats is not monotone to the last bit: an id of probability 0 may seem to hold a sliver."""
    p = torch.tensor([[0.5, 0.0, 0.5]])
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda self, dim: torch.tensor([[0.5, 0.5000001, 1.0]]))
    dart(monkeypatch, 0.5)
    assert draw(p).tolist() == [2]


def test_a_draw_takes_one_number_a_row_from_the_generator_whatever_the_vocabulary(seed):
    g, other = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    for V in (5, 1000):
        draw(torch.rand(4, V), g)
        torch.rand(4, 1, generator=other)
        assert torch.equal(g.get_state(), other.get_state())
    assert torch.equal(uniform(4, g, torch.device("cpu")), torch.rand(4, 1, generator=other))


def test_the_global_generator_is_used_where_none_is_given(seed):
    p = torch.rand(50, 30)
    torch.manual_seed(seed)
    first = draw(p)
    torch.manual_seed(seed)
    assert torch.equal(draw(p), first)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_row_from_which_nothing_can_be_drawn_is_refused(seed, bad):
    logits = torch.randn(3, 9)
    logits[1] = bad
    with pytest.raises(ValueError, match="finite"):
        sample(logits)


def test_none_is_off_everywhere_and_top_k_above_the_vocabulary_keeps_all(seed):
    logits = torch.randn(4, 30)
    assert torch.equal(filter_logits(logits, None, None, None, None), logits)
    for k in (30, 31, 10**9):
        assert torch.equal(filter_logits(logits, top_k=k), logits)


@pytest.mark.parametrize("p", [0, -0.1, 1.5])
def test_top_p_out_of_range(p):
    for function in (keep_top_p, lambda logits, p: filter_logits(logits, top_p=p)):
        with pytest.raises(ValueError, match=rf"top_p={p} .*\(0, 1\]"):
            function(torch.zeros(1, 5), p)
