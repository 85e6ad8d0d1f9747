"""Token ids and labels, padded batches by length and tokens, packed rows."""

import random

import pytest
import torch
from conftest import ROOT
from instructions import END, some_records, text

from minigpt_lib.training.loss import evaluate_loss, summed_loss
from minigpt_lib.tuning.batching import LengthBatches, cut_evenly, encode_record, encode_records, pad, real_share
from minigpt_lib.tuning.chat_template import build_prompt, defuse, encode_prompt, encode_reply
from minigpt_lib.tuning.cleaning import load_records
from minigpt_lib.tuning.packing import pack


def slow_labels(enc, record) -> list[int]:
    """Token by token: learnt is what lies behind the bytes of the prompt, and then the end token."""
    prompt = build_prompt(record["instruction"], record["input"])
    seen, labels = 0, []
    for token in enc.encode_ordinary(f"{prompt} {defuse(record['output'])}"):
        seen += len(enc.decode_single_token_bytes(token))
        labels.append(token if seen > len(prompt.encode()) else -100)
    return [*labels, enc.eot_token]


def test_labels_token_by_token(seed, enc):
    for record in some_records(60):
        record = {k: v.replace(END, "end") for k, v in record.items()}
        ids, labels = encode_record(enc, record, 10_000)
        assert labels == slow_labels(enc, record), f"seed {seed}: {record}"
        learnt = [label for label in labels if label != -100]
        assert enc.decode(learnt) == f" {defuse(record['output'])}{END}"
        assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))


def test_unmasked_labels_are_the_ids(seed, enc):
    for record in some_records(10):
        ids, labels = encode_record(enc, record, 10_000, mask_prompt=False)
        assert labels == ids == encode_record(enc, record, 10_000)[0]


def test_truncation_keeps_a_label_and_the_opening(seed, enc):
    opening = enc.encode_ordinary("\nAssistant:")
    for record in some_records(100):
        whole, whole_labels = encode_record(enc, record, 10_000)
        max_len = random.randint(len(opening) + 2, len(whole) + 3)
        ids, labels = encode_record(enc, record, max_len)
        assert len(ids) == len(labels) == min(max_len, len(whole))
        learnt = [n for n, label in enumerate(labels) if label != -100]
        assert learnt and learnt == list(range(learnt[0], len(ids)))
        assert ids[: learnt[0]][-len(opening) :] == opening
        assert (ids[-1] == enc.eot_token) == (max_len >= len(whole))
        if max_len >= len(whole):
            assert (ids, labels) == (whole, whole_labels)
    with pytest.raises(ValueError, match=f"max_len={len(opening) + 1} must be at least {len(opening) + 2}"):
        encode_record(enc, record, len(opening) + 1)


def test_history_is_read_but_not_learnt(seed, enc):
    plain = {"instruction": "And now?", "output": "Now rest."}
    record = plain | {"history": [["First?", "Walk."], ["Then?", "Run."]]}
    ids, labels = encode_record(enc, record, 10_000)
    assert enc.decode(ids) == (
        f"User: First?\nAssistant: Walk.{END}User: Then?\nAssistant: Run.{END}User: And now?\nAssistant: Now rest.{END}"
    )
    assert enc.decode([label for label in labels if label != -100]) == f" Now rest.{END}"
    one_turn_less = encode_record(enc, plain | {"history": record["history"][1:]}, 10_000)
    assert encode_record(enc, record, len(ids) - 1) == one_turn_less
    assert encode_record(enc, record, len(one_turn_less[0]) - 1) == encode_record(enc, plain, 10_000)


def test_chats_are_learnt_reply_by_reply(seed, enc):
    said = [text() for _ in range(6)]
    record = {"messages": [{"role": "assistant" if n % 2 else "user", "content": t} for n, t in enumerate(said)]}
    ids, labels = encode_record(enc, record, 10_000)
    assert ids == encode_prompt(enc, record["messages"][:-1]) + encode_reply(enc, said[-1])
    learnt = enc.decode([label for label in labels if label != -100])
    assert learnt == "".join(f" {defuse(t)}{END}" for t in said[1::2])
    as_history = {"instruction": said[4], "output": said[5], "history": [said[:2], said[2:4]]}
    same_ids, last_only = encode_record(enc, as_history, 10_000)
    assert same_ids == ids and sum(label != -100 for label in last_only) == len(encode_reply(enc, said[5]))
    last = encode_record(enc, {"instruction": said[4], "output": said[5]}, 10_000)
    assert encode_record(enc, record, len(last[0])) == last  # the oldest turns go first
    assert encode_record(enc, record, 10_000, mask_prompt=False) == (ids, ids)


def test_outputs_of_100_000_characters(enc):
    for output in ("word " * 20_000, "x" * 100_000, "日本" * 50_000):
        ids, labels = encode_record(enc, {"instruction": "Go on.", "output": output}, 64)
        assert len(ids) == 64 and labels[-1] == ids[-1] != enc.eot_token
    long_question, labels = encode_record(enc, {"instruction": "word " * 20_000, "output": "Yes."}, 64)
    assert len(long_question) == 64 and sum(label != -100 for label in labels) == 1


def random_examples(n: int) -> list:
    out = []
    for k in range(n):
        length = random.randint(2, 60)
        ids = [k] + [random.randrange(1, 200) for _ in range(length - 1)]  # the first id names the example
        cut = random.randint(1, length - 1)
        out.append((ids, [-100] * cut + ids[cut:]))
    return out


def test_batches_cover_every_example_once_an_epoch(seed):
    examples, size = random_examples(random.randint(1, 150)), random.randint(1, 9)
    batches = LengthBatches(examples, size, seed, chunk=random.randint(1, 5))
    for epoch in range(3):
        numbers = range(epoch * len(batches), (epoch + 1) * len(batches))
        seen = [int(row[0]) for i in numbers for row in batches.batch(i)[0]]
        assert sorted(seen) == list(range(len(examples)))


def test_batches_are_a_pure_function_of_the_index(seed):
    examples = random_examples(70)
    one, other = LengthBatches(examples, 8, seed), LengthBatches(examples, 8, seed)
    order = list(range(3 * len(one)))
    wanted = {i: one.batch(i) for i in order}
    random.shuffle(order)
    for i in order:
        assert all(torch.equal(a, b) for a, b in zip(other.batch(i), wanted[i], strict=True))
    epochs = [[tuple(one.members(i)) for i in range(e * len(one), (e + 1) * len(one))] for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    another = LengthBatches(examples, 8, seed + 1)
    assert [tuple(another.members(i)) for i in range(len(another))] != epochs[0], "another seed, another order"


@pytest.mark.parametrize("chunk", [1, 64])
def test_batches_are_shuffled(seed, chunk):
    """Neither the records of a chunk nor the batches of an epoch come in their order: of lengths, or in the file."""
    examples = random_examples(600)
    batches = LengthBatches(examples, 8, seed, chunk=chunk)
    longest = [batches.batch(i)[0].size(1) for i in range(len(batches))]
    some = longest[:60]  # batches of one chunk: sorted they were, and must be no more
    falls = [x > y for i, x in enumerate(some) for y in some[i + 1 :] if x != y]
    assert 0.25 < sum(falls) / len(falls) < 0.75, f"seed {seed}: short to long, or long to short"
    members = [batches.members(i) for i in range(len(batches))]
    beside = sum(b == a + 1 for part in members for a, b in zip(part, part[1:], strict=False))
    assert beside < 60, f"seed {seed}: neighbours in the file stay neighbours"
    first = {n for part in members[: len(members) // 2] for n in part}
    assert 0.3 < sum(n < 300 for n in first) / len(first) < 0.7, f"seed {seed}: the file's first half comes first"


def test_batches_row_by_row(seed):
    examples = random_examples(40)
    batches = LengthBatches(examples, 6, seed)
    real, positions = 0, 0
    for i in range(len(batches)):
        idx, targets = batches.batch(i)
        assert idx.dtype == targets.dtype == torch.int64 and idx.shape == targets.shape
        positions += idx.numel()
        for row, n in enumerate(batches.members(i)):
            ids, labels = examples[n]
            for t in range(idx.size(1)):  # the explicit version
                assert idx[row, t] == (ids[t] if t < len(ids) - 1 else 0)
                assert targets[row, t] == (labels[t + 1] if t + 1 < len(ids) else -100)
            real += len(ids) - 1
    assert real_share(batches) == pytest.approx(real / positions)


def test_sorting_saves_padding(seed):
    examples = random_examples(400)
    assert real_share(LengthBatches(examples, 8, seed)) > 0.9
    assert real_share(LengthBatches(examples, 8, seed, chunk=1)) < 0.7


@pytest.mark.parametrize("arguments", [([], 4), ([([1, 2], [1, 2])], 0)])
def test_bad_batches(arguments):
    with pytest.raises(ValueError, match="=0 must be at least 1"):
        LengthBatches(*arguments)


def test_pad_a_single_token():
    idx, targets = pad([([5], [5]), ([6, 7], [-100, 7])])
    assert idx.tolist() == [[0], [6]] and targets.tolist() == [[-100], [7]]


def test_padding_changes_nothing(model, enc):
    """The padded batch's loss is the token-weighted mean over the records alone."""
    examples = encode_records(enc, some_records(5), 100)
    idx, targets = LengthBatches(examples, 5).batch(0)
    with torch.no_grad():
        together = model(idx, targets)[1].item()
        total, n = 0.0, 0
        for ids, labels in examples:
            log_p = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)[0]
            for t, label in enumerate(labels[1:]):
                if label != -100:
                    total, n = total - log_p[t, label].item(), n + 1
    assert abs(together - total / n) < 1e-4


@pytest.mark.parametrize("count", [1, 2, 7, 39, 40])
def test_cutting_evenly(seed, count):
    """As many groups as asked for, none empty, the largest within a step of the smallest; against every budget."""
    for _ in range(20):
        uneven = sorted(random.choice([1, 5, 30, 400]) for _ in range(40))
        sizes = cut_evenly(uneven, count)
        assert len(sizes) == count and sum(sizes) == 40 and min(sizes) >= 1, f"seed {seed}: {uneven}"
    lengths = sorted(random.randint(1, 30) for _ in range(40))
    sizes = cut_evenly(lengths, count)
    assert len(sizes) == count and sum(sizes) == 40 and min(sizes) >= 1

    def largest(sizes):
        ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
        return max(size * lengths[end - 1] for size, end in zip(sizes, ends, strict=True))

    def batches_needed(budget):
        rows, n = 0, 1
        for length in lengths:
            if rows and (rows + 1) * length > budget:
                rows, n = 0, n + 1
            rows += 1
        return n

    best = next(b for b in range(lengths[-1], 1201) if batches_needed(b) <= count)
    assert largest(sizes) <= 1.01 * best + 1, f"seed {seed}"


def test_batches_are_alike_in_tokens(seed):
    examples = random_examples(600)
    sizes = [LengthBatches(examples, 8, seed).batch(i)[0].numel() for i in range(75)]
    assert max(sizes) < 1.6 * sorted(sizes)[37]
    at_random = LengthBatches(examples, 8, seed, chunk=1)
    assert {len(at_random.members(i)) for i in range(75)} == {8}


def test_packed_rows_one_by_one(seed):
    examples = random_examples(random.randint(1, 30))
    width = random.randint(20, 200)
    idx, targets, numbers = pack(examples, width)
    assert idx.shape == targets.shape == numbers.shape
    assert numbers.size(1) <= max(width, 59) + 59  # a row is over-full by less than one example
    found = []
    for row in range(len(idx)):
        real = numbers[row][numbers[row] > 0].tolist()
        assert numbers[row].tolist() == sorted(real) + [0] * (numbers.size(1) - len(real))
        for n in range(1, int(numbers[row].max()) + 1):
            at = numbers[row] == n
            found.append((idx[row][at].tolist(), targets[row][at].tolist()))
        assert (targets[row][numbers[row] == 0] == -100).all()
    assert sorted(found) == sorted((ids[:-1], labels[1:]) for ids, labels in examples)


def test_packing_fills_rows_evenly(seed):
    examples = random_examples(64)
    batches = LengthBatches(examples, 64, seed, chunk=1, collate=lambda few: pack(few, 128))
    assert real_share(batches) > 0.9 > real_share(LengthBatches(examples, 64, seed, chunk=1))


def test_packed_equals_unpacked(model, enc, seed):
    """The same loss and the same gradients, and logits that do not know their neighbours."""
    examples = [(ids, labels) for ids, labels in encode_records(enc, some_records(9), 60)]
    packed, padded = pack(examples, 120), pad(examples)
    assert packed[2].max() > 1
    grads = []
    for batch in (packed, padded):
        model.zero_grad()
        loss = summed_loss(model, *batch)
        loss.backward()
        grads.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-5)
    for a, b in zip(grads[0][1], grads[1][1], strict=True):
        assert (a - b).abs().max() <= 1e-3 * b.abs().max()
    assert evaluate_loss(model, [packed]) == pytest.approx(evaluate_loss(model, [padded]), abs=1e-5)
    leaking = summed_loss(model, *packed[:2]).item()
    assert abs(leaking - grads[1][0]) > 1e-3  # without the numbers the records see each other


def test_a_packed_record_does_not_see_its_neighbours(model, seed):
    ids, other = (torch.randint(0, 200, (n,)).tolist() for n in (17, 23))
    idx, _, numbers = pack([(other, other), (ids, ids)], 200)
    at = numbers[0] == 2
    with torch.no_grad():
        beside = model(idx, attention_mask=numbers)[0][0][at]  # (16, V)
        alone = model(torch.tensor([ids[:-1]]))[0][0]  # (16, V)
    assert torch.allclose(beside, alone, atol=1e-5)


def test_one_record_wider_than_the_width():
    idx, targets, numbers = pack([([1, 2, 3, 4, 5], [-100, 2, 3, 4, 5]), ([6, 7], [6, 7])], 2)
    assert idx.tolist() == [[1, 2, 3, 4], [6, 0, 0, 0]] and numbers.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert targets.tolist() == [[2, 3, 4, 5], [7, -100, -100, -100]]


def test_real_alpaca_records(gpt2_encoding, seed):
    path = ROOT.parent / "shared" / "alpaca" / "alpaca_en_demo.json"
    if not path.is_file():
        pytest.skip(f"needs Alpaca records in {path}")
    examples = encode_records(gpt2_encoding, load_records(path), 1024)
    for chunk in (64, 1000):
        assert real_share(LengthBatches(examples, 8, seed, chunk=chunk)) >= 0.95
    packed = LengthBatches(examples, 16, seed, chunk=1, collate=lambda few: pack(few, 1024))
    assert real_share(packed) >= 0.95
    assert real_share(LengthBatches(examples, 8, seed, chunk=1)) < 0.6
    assert all(labels[-1] == gpt2_encoding.eot_token for _, labels in examples)
    learnt = sum(label != -100 for _, labels in examples for label in labels)
    assert 0.8 < learnt / sum(len(ids) for ids, _ in examples) < 0.92
