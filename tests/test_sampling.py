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

from minigpt_lib.generation.options import check_sampling
from minigpt_lib.generation.sampling import draw, filter_logits, penalize_repeats, sample


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
