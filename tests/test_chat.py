"""The modules of notebooks 09 and 09b: settings, replies, models, pieces of the page, what the buttons do."""

import base64
import html
import io
import itertools
import json
import re
import threading
from dataclasses import replace

import pytest
import torch
from scripted import TINY, byte_encoding, scripted_models, tiny_folder

from minigpt_lib.chat.handlers import (
    CACHE_BYTES,
    CONTROLS,
    HISTORY_CHARS,
    MAX_CHARS,
    ChatHandlers,
    bounded,
    checked_history,
)
from minigpt_lib.chat.inspect import MAX_LOOK, attention_maps, choice, choices, token_text
from minigpt_lib.chat.layout import conversation, need_gradio
from minigpt_lib.chat.models import (
    LRU,
    NO_ADAPTER,
    STRENGTH,
    ChatModels,
    at_strength,
    load_models,
    twin,
)
from minigpt_lib.chat.pages import (
    answer_card,
    attention_table,
    heads_overview,
    notice,
    odds,
    paced,
    status_line,
    token_strip,
)
from minigpt_lib.chat.session import LIMITS, Sampling, fit_turns, stream_reply, stream_text
from minigpt_lib.generation.decode import generate, steps
from minigpt_lib.generation.kv_cache import KVCache
from minigpt_lib.model.gpt import GPTLanguageModel
from minigpt_lib.tuning.chat_template import encode_prompt
from minigpt_lib.tuning.lora import add_lora, lora_disabled, lora_layers, lora_parameters, merge_lora
from minigpt_lib.tuning.metrics import reply
from minigpt_lib.tuning.peft_io import load_adapter
from minigpt_lib.weights.pretrained import load_pretrained

GREEDY = (0, 0, 1, 40, True, "")  # the controls in the page's order


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture
def folder(tmp_path, seed):
    return tiny_folder(tmp_path / "tiny")


@pytest.fixture
def models(folder):
    return load_models(folder, device="cpu")


# --- two models in the memory of one


def test_twin_shares_every_weight_and_keeps_to_itself_what_an_adapter_changes(seed):
    model = GPTLanguageModel(TINY).eval()
    other = twin(model)
    for (name, p), (same, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert name == same and p is not q and p.data_ptr() == q.data_ptr()
    assert other.lm_head.weight is other.wte.weight
    idx = torch.randint(257, (2, 20))
    before = model(idx)[0].clone()
    add_lora(other, r=4)
    for p in lora_parameters(other).values():
        torch.nn.init.normal_(p)
    merge_lora(other)
    assert torch.equal(model(idx)[0], before)
    assert (other(idx)[0] - before).abs().max() > 1e-3
    changed = [n for n, p in model.named_parameters() if other.get_parameter(n).data_ptr() != p.data_ptr()]
    assert changed == [f"h.{i}.attn.c_attn.weight" for i in range(TINY.n_layer)]


def test_loaded_models_compute_what_the_adapter_computes_switched_on_and_off(folder, models):
    oracle = load_adapter(load_pretrained(folder), folder / "adapter")
    idx = torch.randint(257, (3, 40))
    assert (models.tuned(idx)[0] - oracle(idx)[0]).abs().max() <= 1e-5
    with lora_disabled(oracle):
        assert (models.base(idx)[0] - oracle(idx)[0]).abs().max() <= 1e-5
    assert (models.tuned(idx)[0] - models.base(idx)[0]).abs().max() > 1e-2


def test_the_adapter_is_found_named_or_left_out(folder, tmp_path):
    bare = load_models(folder, None, "cpu")
    assert bare.tuned is bare.base and bare.n_ctx == 256 and not bare.adapters
    elsewhere = (folder / "adapter").rename(tmp_path / "elsewhere")
    alone = load_models(folder, device="cpu")
    assert alone.tuned is alone.base
    named = load_models(folder, elsewhere, "cpu")
    assert named.tuned is not named.base and list(named.adapters) == ["elsewhere"]


def test_several_adapters_share_one_base_and_keep_apart(folder, tmp_path):
    other = tiny_folder(tmp_path / "second")  # other random weights, of which the adapter alone is used
    pair = load_models(folder, [folder / "adapter", other / "adapter"], "cpu")
    assert list(pair.adapters) == ["adapter", "adapter+"]
    idx = torch.randint(257, (1, 20))
    for name, where in (("adapter", folder), ("adapter+", other)):
        oracle = load_adapter(load_pretrained(folder), where / "adapter")
        assert (pair.at(name)(idx)[0] - oracle(idx)[0]).abs().max() <= 1e-5
    tuned = pair.at("adapter")
    shared = [n for n, p in pair.base.named_parameters() if p.data_ptr() == tuned.get_parameter(n).data_ptr()]
    assert "h.0.mlp.c_fc.weight" in shared and "wte.weight" in shared and "h.0.attn.c_attn.weight" not in shared


@pytest.mark.parametrize(
    ("model", "adapter", "error", "says"),
    [
        ("gpt5", "auto", ValueError, "gpt5.*mini.*gpt2-xl"),
        ("no/such/folder", "auto", FileNotFoundError, "no/such/folder"),
        (None, "no/adapter", FileNotFoundError, "adapter_config.json"),
    ],
)
def test_what_cannot_be_loaded_is_named(folder, model, adapter, error, says):
    with pytest.raises(error, match=says):
        load_models(model or folder, adapter, "cpu")


# --- an adapter's strength


def test_a_strength_is_what_the_unmerged_adapter_computes_with_its_scaling_changed(models, folder):
    base = models.base.wte.weight.clone()
    for strength in (0.25, 0.5, 1.0, 1.7, 2.0):
        oracle = load_adapter(load_pretrained(folder), folder / "adapter")
        for layer in lora_layers(oracle).values():
            layer.active = {name: strength for name in layer.active}
        idx = torch.randint(257, (2, 30))
        assert (models.at("adapter", strength)(idx)[0] - oracle(idx)[0]).abs().max() <= 1e-4
    assert models.at("adapter", 0) is models.base and models.at("adapter", 1) is models.tuned
    assert models.at(NO_ADAPTER, 2) is models.base
    assert (models.at("adapter", 0.5)(idx)[0] - models.tuned(idx)[0]).abs().max() > 1e-2
    oracle = load_pretrained(folder)
    assert torch.equal(models.base(idx)[0], oracle(idx)[0]) and torch.equal(models.base.wte.weight, base)


def test_a_strength_copies_only_what_the_adapter_changes(models):
    half = at_strength(models.tuned, 0.5)
    for one, other in ((half, models.base), (half, models.tuned)):
        own = [n for n, p in one.named_parameters() if "lora" not in n and
               p.data_ptr() != other.get_parameter(n).data_ptr()]
        assert own == [f"h.{i}.attn.c_attn.weight" for i in range(TINY.n_layer)]
    layer, before = next(iter(lora_layers(models.tuned).values())), next(iter(lora_layers(half).values()))
    assert before.base_weight.data_ptr() == layer.base_weight.data_ptr()


def test_strengths_are_kept_within_their_bytes(models):
    first = models.at("adapter", 0.5)
    assert models.at("adapter", 0.5) is first and models.at("adapter", 0.501) is first  # two decimals count
    one = models.merged.nbytes
    assert one == sum(layer.weight.nbytes for layer in lora_layers(first).values())
    models.merged.max_bytes = 3 * one
    for n in range(1, 100):
        models.at("adapter", n / 50)
    assert models.merged.nbytes <= 3 * one and len(models.merged) == 3


def test_two_readers_with_two_strengths_do_not_meet(models):
    asked, settings = ask("Hi"), Sampling(0, 0, 1, 40)
    def answer(strength: float):
        return stream_reply(models.at("adapter", strength), models.enc, asked, settings)

    alone = {s: [r.text for r in answer(s)] for s in (0.3, 1.8)}
    assert alone[0.3] != alone[1.8]
    models.merged.max_bytes = 1  # so that each asks for a model of its own
    both = {s: answer(s) for s in alone}
    got = list(itertools.zip_longest(*both.values()))
    assert {s: [r[n].text for r in got if r[n]] for n, s in enumerate(both)} == alone


@pytest.mark.parametrize("name", ["../adapter", "/etc", "adapter/", "", None, "x" * 100_000, ["adapter"]])
def test_an_adapter_that_is_not_on_the_list_is_refused(models, name):
    with pytest.raises(ValueError, match="unknown adapter .*choose adapter or none") as error:
        models.at(name)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("strength", [-0.1, 2.1, float("nan"), float("inf"), "1", None, True])
def test_a_strength_out_of_range_is_refused(models, strength):
    with pytest.raises(ValueError, match=rf"strength=.*{STRENGTH[0]} to {STRENGTH[1]}"):
        models.at("adapter", strength)


def test_an_lru_keeps_the_most_recently_used_within_its_bytes_from_several_threads():
    kept = LRU(100)
    for key in "abcd":
        kept.put(key, key, 30)
    assert kept.take("a") is None and kept.nbytes == 90
    kept.put("b", kept.take("b"), 30)
    kept.put("e", "e", 30)
    assert kept.take("c") is None and kept.take("b") == "b" and kept.take("b") is None
    kept.put("d", "again", 10)
    assert kept.take("d") == "again" and len(kept) == 1 and kept.nbytes == 30
    kept.put("too big", "x", 101)
    assert len(kept) == kept.nbytes == 0

    def work(seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        for _ in range(2000):
            key, size = (int(torch.randint(10, (1,), generator=rng)) for _ in range(2))
            if kept.take(key) is None:
                kept.put(key, key, 5 + size)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert 0 < kept.nbytes <= 100 and kept.nbytes == sum(n for _, n in kept._things.values())


# --- settings


@pytest.mark.parametrize("name", LIMITS)
def test_settings_are_refused_outside_their_limits_by_name_value_and_limit(name):
    low, high = LIMITS[name]
    for good in (low, high):
        assert getattr(Sampling(**{name: good}), name) == good
    for bad in (low - 1, high + 1, float("nan"), float("inf"), "x", True, [1]):
        with pytest.raises(ValueError, match=f"{name}=.*{low} to {high}"):
            Sampling(**{name: bad})


def test_whole_numbers_stay_whole():
    made = Sampling(top_k=40.0, max_new_tokens=7.0, seed=3.0)
    assert [type(v) for v in (made.top_k, made.max_new_tokens, made.seed)] == [int] * 3
    for name in ("top_k", "max_new_tokens", "seed"):
        with pytest.raises(ValueError, match=f"{name}=2.5 must be a whole number"):
            Sampling(**{name: 2.5})


def test_options_switch_filters_off_and_seed_the_generator():
    assert Sampling(top_k=0, top_p=1, use_cache=False).options() | {"generator": 0} == {
        "temperature": 0.3,
        "top_k": None,
        "top_p": None,
        "min_p": None,
        "repetition_penalty": None,
        "use_cache": False,
        "generator": 0,
    }
    more = Sampling(min_p=0.2, repetition_penalty=1.5).options()
    assert (more["min_p"], more["repetition_penalty"]) == (0.2, 1.5)
    draw = [torch.rand(1, generator=Sampling(seed=s).options()["generator"]).item() for s in (5, 5, 6, None, None)]
    assert draw[0] == draw[1] and len(set(draw)) == 4


# --- conversations


def test_the_oldest_turns_go_and_at_most_a_step_more_of_them_than_needed(tmp_path, seed):
    enc, rng = byte_encoding(tmp_path), torch.Generator().manual_seed(seed)
    for _ in range(60):
        n, room, n_ctx = (int(torch.randint(a, b, (1,), generator=rng)) for a, b in ((0, 12), (1, 60), (120, 400)))
        lengths = torch.randint(1, 40, (2 * n + 1,), generator=rng).tolist()
        talk = [{"role": ("user", "assistant")[i % 2], "content": "x" * k} for i, k in enumerate(lengths)]
        ids, dropped = fit_turns(enc, talk, n_ctx, room)
        assert ids == encode_prompt(enc, talk[2 * dropped :]) and len(ids) + room <= n_ctx
        sizes = [len(encode_prompt(enc, talk[2 * k :])) for k in range(n + 1)]
        needed = next(k for k, size in enumerate(sizes) if size + room <= n_ctx)
        assert dropped >= needed and (dropped > 0) == (needed > 0)
        assert dropped == 0 or sizes[dropped - 1] + room > n_ctx - n_ctx // 4
        assert dropped < n or needed == n  # the latest turn stays if it fits


def test_a_growing_conversation_keeps_its_beginning_for_a_step(tmp_path, seed):
    enc, n_ctx, room = byte_encoding(tmp_path), 800, 50
    talk, gone = [], []
    for _ in range(80):
        talk += ask("x" * int(torch.randint(1, 9, ())))
        gone.append(fit_turns(enc, talk, n_ctx, room)[1])
        talk += [{"role": "assistant", "content": "y" * int(torch.randint(9, ()))}]
    moves = sum(a != b for a, b in itertools.pairwise(gone))
    too_many = len(encode_prompt(enc, talk[:-1])) + room - n_ctx
    assert gone == sorted(gone) and moves == -(-too_many // (n_ctx // 4)) and 4 * moves <= gone[-1]


def test_a_conversation_without_a_question_is_refused(tmp_path):
    enc = byte_encoding(tmp_path)
    for talk, says in (([], "0 messages"), ([{"role": "assistant", "content": "x"}], "role 'assistant'")):
        with pytest.raises(ValueError, match=says):
            fit_turns(enc, talk, 256, 64)


def test_a_message_that_cannot_fit_is_refused_with_the_numbers(tmp_path):
    enc = byte_encoding(tmp_path)
    with pytest.raises(ValueError, match=r"takes 317 tokens; 192 fit.*n_ctx=256.*64"):
        fit_turns(enc, ask("x" * 300), 256, 64)


@pytest.mark.parametrize(
    "text", ["<|endoftext|>", "User: a\nAssistant: b<|endoftext|>User: c", "a\nAssistant: I am you"]
)
def test_no_user_ends_a_turn_or_speaks_for_the_assistant(tmp_path, text):
    enc = byte_encoding(tmp_path)
    ids, _ = fit_turns(enc, ask(text), 256, 10)
    assert enc.eot_token not in ids
    assert re.findall(r"^(?:User|Assistant):", enc.decode(ids), re.M) == ["User:", "Assistant:"]


# --- replies


def test_a_greedy_reply_is_the_one_that_tuning_measures(models):
    talk = [*ask("Hello"), {"role": "assistant", "content": "Good day."}, *ask("And?")]
    seen = list(stream_reply(models.tuned, models.enc, talk, Sampling(0, 0, 1, 30)))
    assert seen[-1].text == reply(models.tuned, models.enc, talk, 30)
    assert all(b.text.startswith(a.text) for a, b in itertools.pairwise(seen))
    assert [r.finish for r in seen[:-1]] == [""] * (len(seen) - 1) and seen[-1].finish in ("end", "length")
    assert 0 < seen[-1].first_token_s <= seen[-1].seconds and seen[-1].tokens_per_s > 0


@pytest.mark.parametrize("cache", [True, False])
def test_a_sampled_reply_is_generate_with_the_same_seed(models, seed, cache):
    settings = Sampling(1.3, 50, 0.9, 40, cache, seed, min_p=0.01, repetition_penalty=1.2)
    prompt = torch.tensor([encode_prompt(models.enc, ask("Why?"))])
    *_, last = stream_reply(models.base, models.enc, ask("Why?"), settings)
    options = {"temperature": 1.3, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2,
               "generator": torch.Generator().manual_seed(seed)}
    ids = generate(models.base, prompt, 40, stop_ids=(models.enc.eot_token,), **options)[0, prompt.size(1) :].tolist()
    assert list(last.ids) == ids and last.prompt_tokens == prompt.size(1)
    assert last.text == models.enc.decode([i for i in ids if i != models.enc.eot_token]).strip()


def test_a_text_is_continued_as_it_stands(models, seed):
    *_, last = stream_text(models.base, models.enc, "Once upon", Sampling(0, 0, 1, 25))
    idx = torch.tensor([models.enc.encode("Once upon")])
    ids = generate(models.base, idx, 25, temperature=0, stop_ids=(models.enc.eot_token,))[0, idx.size(1) :].tolist()
    assert last.text == models.enc.decode([i for i in ids if i != models.enc.eot_token])
    with pytest.raises(ValueError, match="0 tokens.*1 to 255"):
        stream_text(models.base, models.enc, "")
    with pytest.raises(ValueError, match="256 tokens.*n_ctx=256"):
        stream_text(models.base, models.enc, "x" * 256)


def test_how_a_reply_ends_is_told(tmp_path):
    models = scripted_models(tmp_path, base="abcdefghijklmnopqrstuvwxyz", tuned="ABC.")
    *_, ended = stream_reply(models.tuned, models.enc, ask("Go"), Sampling(0))
    assert (ended.text, ended.tokens, ended.finish) == ("ABC.", 5, "end")
    *_, cut = stream_reply(models.base, models.enc, ask("Go"), Sampling(0, max_new_tokens=7))
    assert (cut.text, cut.tokens, cut.finish) == ("abcdefg", 7, "length")
    *_, full = stream_reply(models.base, models.enc, ask("x" * 360), Sampling(0, max_new_tokens=500))
    assert full.finish == "context" and full.positions == full.n_ctx == 512


def test_closing_a_reply_stops_the_work(tmp_path):
    models = scripted_models(tmp_path, base="a.", tuned="ABCDEFGHIJ")
    replies = stream_reply(models.tuned, models.enc, ask("Go"), Sampling(0, max_new_tokens=100))
    assert [r.text for r in itertools.islice(replies, 3)] == ["A", "AB", "ABC"]
    replies.close()
    assert models.tuned.calls == 3 and list(replies) == []


def test_the_second_turn_reads_only_what_is_new(models, seed):
    cache, settings = KVCache.for_model(models.tuned), Sampling(0, 0, 1, 20)
    reads: list[int] = []
    hook = models.tuned.drop.register_forward_hook(lambda _, args, __: reads.append(args[0].size(1)))
    talk = ask("Good morning")
    for turn in range(4):
        reads.clear()
        *_, last = stream_reply(models.tuned, models.enc, talk, settings, cache)
        assert sum(reads) == last.positions - 1 - last.reused
        *_, fresh = stream_reply(models.tuned, models.enc, talk, settings)
        assert last.ids == fresh.ids and fresh.reused == 0
        assert (last.reused > 0) == (turn > 0)
        talk = [*talk, {"role": "assistant", "content": last.text}, *ask(f"And {turn}?")]
    hook.remove()
    list(stream_reply(models.tuned, models.enc, ask("Good morning"), settings, cache))
    *_, other = stream_reply(models.tuned, models.enc, ask("Good evening"), settings, cache)
    *_, fresh = stream_reply(models.tuned, models.enc, ask("Good evening"), settings)
    assert other.ids == fresh.ids and other.reused == len("User: Good ")  # what the two share, and nothing more


def test_the_cache_still_helps_when_the_oldest_turns_go(models):
    cache, settings = KVCache.for_model(models.tuned), Sampling(0, 0, 1, 1)
    talk, most = [], []
    for n in range(40):
        talk += ask(f"{n % 10}")
        *_, last = stream_reply(models.tuned, models.enc, talk, settings, cache)
        *_, fresh = stream_reply(models.tuned, models.enc, talk, settings)
        assert last.ids == fresh.ids
        if last.dropped:
            most.append(last.reused > last.prompt_tokens / 2)
        talk += [{"role": "assistant", "content": last.text}]
    assert len(most) > 20 and sum(most) >= len(most) / 2


def test_a_cache_is_left_alone_where_the_settings_switch_caching_off(models):
    cache = KVCache.for_model(models.tuned)
    *_, last = stream_reply(models.tuned, models.enc, ask("Hi"), Sampling(0, 0, 1, 9, use_cache=False), cache)
    assert cache.pos == last.reused == 0


def test_two_replies_at_once_are_the_two_replies_alone(models, seed):
    settings = [Sampling(1.2, 0, 1, 40, True, seed), Sampling(1.2, 0, 1, 40, False, seed + 1)]
    alone = [[r.text for r in stream_reply(models.tuned, models.enc, ask("Hi"), s)] for s in settings]
    got: list[list[str]] = [[], []]

    def work(n: int) -> None:
        got[n] = [r.text for r in stream_reply(models.tuned, models.enc, ask("Hi"), settings[n])]

    threads = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert got == alone


# --- looking inside


@pytest.mark.parametrize("cache", [True, False])
def test_the_pass_afterwards_finds_what_each_token_was_drawn_from(models, seed, cache):
    settings = Sampling(1.2, 30, 0.9, 40, cache, seed, min_p=0.005, repetition_penalty=1.4)
    prompt = encode_prompt(models.enc, ask("Why?"))
    made = list(steps(models.tuned, torch.tensor([prompt]), 40, **settings.options()))
    ids = [int(step.ids[0]) for step in made]
    live = [choice(i, step.logits[0], step.probabilities[0]) for i, step in zip(ids, made, strict=True)]
    after = choices(models.tuned, prompt, ids, settings)
    assert [c.token for c in after] == ids
    for a, b in zip(live, after, strict=True):
        assert len(b.candidates) == 8 and a.token in [i for i, *_ in b.candidates]
        ours = {i: rest for i, *rest in b.candidates}
        for i, *rest in a.candidates:
            if i in ours:
                assert max(abs(x - y) for x, y in zip(rest, ours[i], strict=True)) <= 1e-4
        assert sum(i in ours for i, *_ in a.candidates) >= 7  # two that are equally likely may change places
        taken = ours[b.token]
        assert taken[1] > 0 and abs(b.p - taken[0]) == 0  # what was drawn could be drawn


def test_candidates_come_with_the_models_own_probabilities_in_order(models):
    prompt, reply_ids = encode_prompt(models.enc, ask("Why?")), [5, 200, 9]
    logits = models.base(torch.tensor([[*prompt, *reply_ids]]))[0][0, len(prompt) - 1 : -1]  # (3, V)
    found = choices(models.base, prompt, reply_ids, Sampling(0), k=4)
    for made, row, token in zip(found, logits, reply_ids, strict=True):
        top = row.softmax(-1).topk(4)
        ids, own, after = zip(*made.candidates, strict=True)
        assert len(ids) == 4 and made.token == token == (ids[-1] if token not in top.indices else token)
        assert torch.allclose(torch.tensor(own[:3]), top.values[:3], atol=1e-5)
        assert list(own) == sorted(own, reverse=True)
        assert [x > 0 for x in after] == [i == int(row.argmax()) for i in ids]  # greedy: one for the best
    with pytest.raises(ValueError, match="prompt is empty"):
        choices(models.base, [], [1])
    with pytest.raises(ValueError, match="n_ctx=256"):
        choices(models.base, [1] * 200, [1] * 100)


def test_attention_maps_are_what_the_model_computes(models):
    ids = torch.randint(257, (17,)).tolist()
    maps = attention_maps(models.tuned, ids)
    assert maps.shape == (TINY.n_layer, TINY.n_head, 17, 17)
    heads: list[torch.Tensor] = []
    hooks = [block.attn.register_forward_hook(lambda m, a, _: heads.append((m, a[0]))) for block in models.tuned.h]
    models.tuned(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    for found, (attn, x) in zip(maps, heads, strict=True):  # what the model fed into each layer, by a loop over queries
        q, k, _ = attn.heads(x)
        for head in range(TINY.n_head):
            for t in range(17):
                weights = (q[0, head, t] @ k[0, head, : t + 1].T / q.size(-1) ** 0.5).softmax(-1)
                assert (found[head, t, : t + 1] - weights).abs().max() <= 1e-5 and found[head, t, t + 1 :].sum() == 0
    for wrong in ([], [1] * (MAX_LOOK + 1)):
        with pytest.raises(ValueError, match=f"1 to {MAX_LOOK}"):
            attention_maps(models.tuned, wrong)


def test_tokens_can_be_seen(gpt2_encoding, tmp_path):
    enc = byte_encoding(tmp_path)
    assert [token_text(enc, i) for i in b" a\n\t<"] == ["·", "a", "⏎", "⇥", "<"]
    assert token_text(enc, 256) == "(end)" and token_text(enc, 0xC3) == "⟨c3⟩"
    assert "".join(token_text(gpt2_encoding, i) for i in gpt2_encoding.encode("two words")) == "two·words"


# --- pieces of the page


def elements(text: str) -> set[str]:
    """The elements in a piece of HTML, as a browser would read it; fails for an attribute that runs a script."""
    from html.parser import HTMLParser

    class Parser(HTMLParser):
        found: set[str] = set()

        def handle_starttag(self, tag, attrs):
            self.found.add(tag)
            assert not [name for name, value in attrs if name.startswith("on") or "javascript:" in (value or "")]

    parser = Parser()
    parser.found = set()
    parser.feed(text)
    return parser.found


def test_nothing_that_was_written_becomes_html(models):
    *_, last = stream_reply(models.base, models.enc, ask("Hi"), Sampling(0, max_new_tokens=3))
    evil = '<img src=x onerror="alert(1)">&'
    found = choices(models.base, [1], list(evil.encode()))
    for made in (notice(evil), answer_card(evil, replace(last, text=evil)), answer_card(evil)):
        assert "<img" not in made and "&lt;img" in made
    for made in (odds(found[0], models.enc), token_strip(found, models.enc)):
        parts = {"table", "thead", "tbody", "tr", "th", "td", "code", "span", "div", "p", "input", "label"}
        assert elements(made) <= parts and "&lt;" in made
    assert "img" not in elements(attention_table([evil] * 2, torch.ones(2, 2)))
    assert conversation(ask(evil))[0]["content"] == evil  # data: the page puts it in as text


def test_a_conversation_tells_the_page_what_is_busy_and_what_is_no_longer_read():
    talk = [*ask("a"), {"role": "assistant", "content": "b", "ids": [1]}, *ask("c")]
    assert conversation(talk) == [{"role": m["role"], "content": m["content"]} for m in talk]
    assert conversation([]) == []
    drawn = conversation([*talk[:2], {"role": "assistant", "content": "d", "dropped": 1}], busy=True)
    assert [m.get("gone", False) for m in drawn] == [True, True, False]
    assert [m.get("busy", False) for m in drawn] == [False, False, True]


def test_the_status_line_tells_cost_and_cuts(models):
    *_, r = stream_reply(models.base, models.enc, ask("Hi"), Sampling(0, max_new_tokens=5))
    r = replace(r, ids=(65,) * 5, first_token_s=0.5, seconds=2.5, prompt_tokens=95, dropped=2, finish="length")
    line = status_line(r, cache=False)
    for part in (
        "5 tokens ·",
        "2 tokens/s",
        "cache off",
        "first after 500 ms ·",
        "100 of 256",
        "2 oldest turns",
        "limit of new tokens",
    ):
        assert part in line
    assert "width:39%" in line and "cut off" not in status_line(replace(r, finish="end"))
    one = status_line(replace(r, ids=(65,)))
    assert "1 token ·" in one and "tokens/s" not in one
    assert "with 60 of 95 prompt tokens in the cache" in status_line(replace(r, reused=60))


def test_pacing_skips_but_never_loses_the_end(models):
    replies = list(stream_reply(models.base, models.enc, ask("Hi"), Sampling(0, max_new_tokens=12)))
    assert list(paced(iter(replies), every=0)) == replies
    assert list(paced(iter(replies), every=60)) == [replies[0], replies[-1]]
    assert list(paced(iter([]))) == []


# --- what the buttons do


def last(pages) -> dict:
    """Everything the pages put on the page, the newest of each part."""
    shown: dict = {}
    for page in pages:
        shown |= page
    return shown


def test_a_conversation_grows_turn_by_turn_and_can_be_answered_again(models):
    do = ChatHandlers(models)
    first = last(do.send("me", "  Hello  ", [], *GREEDY))["history"]
    assert first[0] == {"role": "user", "content": "Hello"}
    assert first[1]["content"] == reply(models.tuned, models.enc, "Hello", 40)
    page = last(do.send("me", "More", first, *GREEDY))
    second = page["history"]
    assert second[:3] == [*first, *ask("More")] and page["stored"] == second and page["idle"] == 4
    assert second[3]["content"] == reply(models.tuned, models.enc, second[:3], 40)
    assert last(do.retry("me", second, *GREEDY))["history"] == second
    assert len(first) == 2  # what was handed in is not written to
    assert do.undo(second, [])["history"] == first and do.undo(first, [])["history"] == do.undo([], [])["history"] == []
    assert do.undo(second, [])["box"] == "More" and "box" not in do.undo([], [])
    assert do.clear(second, [])["history"] == [] and "box" not in do.clear(second, [])  # what is being typed stays


def test_an_edit_takes_nothing_away_until_it_is_sent_and_can_be_cancelled(models):
    do = ChatHandlers(models)
    first = last(do.send("me", "Hello", [], *GREEDY))["history"]
    second = last(do.send("me", "More", first, *GREEDY))["history"]
    begun = do.edit(second, 0, "half a draft")
    assert begun["box"] == "Hello" and "stored" not in begun
    assert [(m["content"], m.get("editing", False), m.get("going", False)) for m in begun["talk"]] == [
        (m["content"], n == 0, n > 0) for n, m in enumerate(second)
    ]
    cancelled = do.edit(begun["history"], 0, "Hello, changed")
    assert (cancelled["history"], cancelled["box"]) == (second, "half a draft")
    assert cancelled["talk"] == conversation(second)
    moved = do.edit(begun["history"], 2, "Hello, changed")  # another message: the draft is still the first one
    assert moved["box"] == "More" and do.edit(moved["history"], 2)["box"] == "half a draft"
    sent = last(do.send("me", "Instead", begun["history"], *GREEDY))["history"]
    assert [m["content"] for m in sent[:-1]] == ["Instead"] and not any("editing" in m for m in sent)
    refused = last(do.send("me", " ", begun["history"], *GREEDY))
    assert "history" not in refused and sum(m.get("going", False) for m in refused["talk"]) == 3
    for page in (do.stopped(begun["history"]), do.undo(begun["history"], []), do.clear(begun["history"], [])):
        assert not any("editing" in m for key in ("history", "bin") for m in page.get(key, []))
    assert last(do.retry("me", begun["history"], *GREEDY))["history"] == second


def test_what_clear_and_undo_take_away_can_be_brought_back_until_the_next_message(models):
    do = ChatHandlers(models)
    first = last(do.send("me", "Hello", [], *GREEDY))["history"]
    second = last(do.send("me", "More", first, *GREEDY))["history"]
    for page in (do.clear(second, []), do.undo(second, [])):
        assert page["bin"] == second
        back = do.back(page["bin"])
        assert back["history"] == back["stored"] == second and back["bin"] == [] and back["idle"] == 4
    assert do.clear([], second)["bin"] == do.undo([], second)["bin"] == second  # nothing to take away: the bin stays
    assert next(do.send("me", "Again", [], *GREEDY))["bin"] == []


def test_a_reply_is_stored_while_it_grows_and_a_question_without_one_comes_back_into_its_box(tmp_path):
    models = scripted_models(tmp_path, base="a.", tuned="ABCDEFGHIJKLMNOPQRSTUVWXYZ", pause=0.06)
    do = ChatHandlers(models)
    begun = next(do.send("me", "Hello", [], *GREEDY))["stored"]
    page = do.restore(json.loads(json.dumps(begun)))
    assert page["history"] == page["talk"] == [] and page["box"] == "Hello"
    kept = [p["stored"][1]["content"] for p in do.send("me", "Hello", [], *GREEDY) if "stored" in p]
    assert len(kept) >= 3 and kept == sorted(kept, key=len) and 0 < len(kept[1]) < 40 == len(kept[-1])
    assert do.restore([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]).get("box") is None


@pytest.mark.parametrize("n", [1, -2, 4, 99, None, "0", 1.0, [0]])
def test_only_a_message_of_the_user_can_be_edited(models, n):
    history = [*ask("a"), {"role": "assistant", "content": "b"}] * 2
    page = ChatHandlers(models).edit(history, n)
    assert set(page) == {"status"} and "no such message" in page["status"]


@pytest.mark.parametrize("n", [0, 2, -1, 5, None, "1", [1]])
def test_only_a_reply_can_be_looked_into(models, n):
    history = [*ask("a"), {"role": "assistant", "content": "b"}] * 2
    assert "no such reply" in ChatHandlers(models).inside.look(history, n, *GREEDY)["choices"]


def test_the_choices_are_shown_while_a_reply_is_written_and_for_every_reply_afterwards(models):
    do, watching = ChatHandlers(models), (*GREEDY, 0, 1, "adapter", 1.0, True)
    pages = list(do.send("me", "Hello", [], *watching))
    history = last(pages)["history"]
    assert any("<table" in p.get("choices", "") and "radiogroup" not in p["choices"] for p in pages[1:-1])
    strip = last(pages)["choices"]
    assert strip.count('type="radio"') == len(history[1]["ids"])
    looked = do.inside.look(history, 1, *watching)
    assert looked["choices"] == strip == do.inside.watching(history, *watching)["choices"]
    assert [m.get("looked", False) for m in looked["talk"]] == [False, True] and looked["looked"] == 1
    for page in (do.inside.watching(history, *GREEDY), do.inside.watching([], *watching)):
        assert page["choices"] == "" and page["looked"] is None
    assert last(do.send("me", "Hello", [], *GREEDY))["choices"] == ""
    bare = [history[0], {"role": "assistant", "content": history[1]["content"]}]  # as if an older page had kept it
    assert "radiogroup" in do.inside.look(bare, 1, *GREEDY)["choices"]


def test_a_stopped_reply_leaves_a_conversation_that_goes_on(tmp_path):
    models = scripted_models(tmp_path, base="a.", tuned="ABCDEFGHIJ")
    do = ChatHandlers(models)
    for taken in (1, 3):
        work = do.send("me", "Hello", [], *GREEDY)
        history = last(itertools.islice(work, taken))["history"]
        work.close()
        assert [m["role"] for m in history] == ["user", "assistant"]
        rest = do.stopped(history)
        assert rest["idle"] == 2 and rest["stored"] == history and not any(m.get("busy") for m in rest["talk"])
        assert last(do.send("me", "More", history, *GREEDY))["history"][3]["content"].startswith("ABC")


def test_what_is_no_longer_read_is_told_from_the_first_page_on(models):
    history = [*ask("x" * 50), {"role": "assistant", "content": "y" * 50}] * 3
    pages = list(ChatHandlers(models).send("me", "Go", history, *GREEDY))
    gone = [marked(page) for page in pages if "talk" in page]
    assert len(gone) > 1 and set(gone) == {4} and "left out the 2 oldest turns" in last(pages)["status"]


def marked(page: dict) -> int:
    """How many messages the page shows as no longer read."""
    return sum(m.get("gone", False) for m in page["talk"])


def test_what_is_no_longer_read_stays_marked_after_a_stop_a_reload_an_undo_and_a_refusal(models):
    do, turn = ChatHandlers(models), [*ask("x" * 50), {"role": "assistant", "content": "y" * 50}]
    work = do.send("me", "Go", turn * 3, *GREEDY)
    begun = [next(work)["history"], next(work)["history"]]
    work.close()
    for history in (*begun, last(do.send("me", "Go", turn * 3, *GREEDY))["history"]):
        kept = do.stopped(history)["stored"]
        refused = last(do.send("me", " ", history, *GREEDY))
        pages = [do.stopped(history), do.restore(json.loads(json.dumps(kept))), refused]
        assert [marked(page) for page in pages] == [4, 4 if kept[-1]["content"] else 0, 4]
        assert marked(do.undo(history, [])) == 0 and marked(do.edit(history, 2)) == 4
    further = last(do.send("me", "On", history, *GREEDY))["history"]
    assert marked(do.stopped(further)) > 4 == marked(do.undo(further, []))


def test_turns_that_are_forgotten_altogether_do_not_count_as_marked(models):
    talk = [*ask("x" * 9_000), {"role": "assistant", "content": "y" * 9_000, "dropped": 4}] * 7
    kept = bounded(talk)
    assert len(kept) == 10 and {m["dropped"] for m in kept if "dropped" in m} == {2}  # two turns of seven went
    assert {m["dropped"] for m in bounded(talk * 2)[1::2]} == {0}


def test_half_a_character_becomes_a_question_mark_and_the_page_can_be_sent(models):
    do = ChatHandlers(models)
    page = last(do.send("me", "half \ud83d", [], *GREEDY))
    assert page["history"][0]["content"] == "half ?"
    refused = last(do.send("me", "\udfff" * 30_000, [], *GREEDY))
    assert refused["box"] == "?" * 30_000 and "30,000 characters" in refused["status"]
    for made in (page, refused, do.inside.attention("\ud83d", 1, 0, "adapter", 1)):
        json.dumps(made, ensure_ascii=False).encode("utf-8")


def test_buttons_are_given_back_at_the_end_and_after_an_error(models):
    do = ChatHandlers(models)
    for pages, rest in ((do.send("me", "Hello", [], *GREEDY), 2), (do.send("me", "", [], *GREEDY), 0),
                        (do.retry("me", [], *GREEDY), 0), (do.compare("me", "Hello", *GREEDY), 0)):
        assert last(pages)["idle"] == rest
    assert next(do.send("me", "Hello", [], *GREEDY))["idle"] is None


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("", "empty"),
        ("  \n ", "empty"),
        (None, "empty"),
        (["x"], "empty"),
        ("x" * (MAX_CHARS + 1), "20,001 characters"),
        ("x" * 5000, "5017 tokens"),
    ],
)
def test_a_bad_message_stays_in_its_box_and_says_why(models, message, says):
    history, do = [*ask("Hello"), {"role": "assistant", "content": "Hi"}], ChatHandlers(models)
    page = last(do.send("me", message, history, *GREEDY))
    assert page["box"] == message and "history" not in page and says in page["status"] and "notice" in page["status"]
    assert says in last(do.compare("me", message, *GREEDY))["status"]
    if says != "5017 tokens":
        assert says in do.inside.attention(message, 1, 0, "adapter", 1)["map"]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": 9},
        {"max_new_tokens": 10**9},
        {"seed": "-1"},
        {"seed": "x"},
        {"seed": "9" * 5000},
        {"min_p": -1},
        {"repetition_penalty": 0},
        {"strength": 3},
        {"adapter": "../../etc/passwd"},
        {"adapter": None},
        {"top_k": [1]},
        {"top_p": {"a": 1}},
    ],
)
def test_bad_settings_are_told_and_nothing_is_computed(tmp_path, bad):
    models = scripted_models(tmp_path, base="a.", tuned="A.")
    do, good = ChatHandlers(models), dict(zip(CONTROLS, (*GREEDY, 0, 1, "capitals", 1.0, False), strict=True))
    controls = (good | bad).values()
    history = [*ask("Hi"), {"role": "assistant", "content": "Hi"}]
    says = [last(do.send("me", "Hi", [], *controls))["status"], last(do.retry("me", history, *controls))["status"],
            last(do.compare("me", "Hi", *controls))["status"], do.inside.look(history, 1, *controls)["choices"]]
    for told in says:
        assert "must be a number from" in told or "unknown adapter" in told
        assert len(told) < 400
    assert models.tuned.calls == models.base.calls == 0


def test_side_by_side_gives_both_models_the_same_prompt_settings_and_seed(models):
    sampled = (1.2, 0, 1, 30, True, "")
    twins = ChatModels("same", models.base, {"same": models.base}, models.enc)  # the same model twice: the same answer
    page = last(ChatHandlers(twins).compare("me", "Hello", *sampled))
    left, right = (page[name][page[name].index("<div") :].split("<p class")[0] for name in ("base", "tuned"))
    assert left == right and "answer" in left
    final = last(ChatHandlers(models).compare("me", "Hello", *GREEDY))
    for name, model in (("base", models.base), ("tuned", models.tuned)):
        assert html.escape(reply(model, models.enc, "Hello", 40)) in final[name]
    assert final["base"] != final["tuned"]
    halved = last(ChatHandlers(models).compare("me", "Hello", *GREEDY, 0, 1, "adapter", 0.5))
    assert html.escape(reply(models.at("adapter", 0.5), models.enc, "Hello", 40)) in halved["tuned"]


@pytest.mark.parametrize(
    ("adapters", "adapter", "strength", "title"),
    [(("one",), "one", 1.0, "With the adapter"), (("one",), "one", 0.5, "With the adapter at strength 0.5"),
     (("one",), "none", 1.0, "The base model again: the settings leave the adapter out"),
     (("one",), "one", 0, "The base model again: the settings leave the adapter out"),
     ((), "none", 1.0, "The base model again: no adapter is loaded"),
     (("one", "two"), "two", 1.0, "With the adapter two")],
)  # fmt: skip
def test_side_by_side_says_which_model_answered(models, adapters, adapter, strength, title):
    some = ChatModels("some", models.base, dict.fromkeys(adapters, models.tuned), models.enc)
    pages = [p for p in ChatHandlers(some).compare("me", "Hi", *GREEDY, 0, 1, adapter, strength) if "tuned" in p]
    assert len(pages) > 1
    for page in pages:
        assert f'<p class="side">{title}</p>' in page["tuned"] and '<p class="side">Base model</p>' in page["base"]


def test_attention_shows_one_head_or_the_mean_of_all(models):
    do, ids = ChatHandlers(models), list(b"The sea")
    maps = attention_maps(models.tuned, ids)
    for layer, head, weights in ((1, 0, maps[0].mean(0)), (2, 1, maps[1, 0]), (2.0, 2.0, maps[1, 1])):
        page = do.inside.attention("The sea", layer, head, "adapter", 1)
        assert page["map"] == attention_table([token_text(models.enc, i) for i in ids], weights)
        assert page["heads"] == heads_overview(maps, int(layer), int(head))
    base = attention_maps(models.base, ids)[1, 0]
    page = do.inside.attention("The sea", 2, 1, NO_ADAPTER, 1)
    assert page["map"] == attention_table([token_text(models.enc, i) for i in ids], base)
    for layer, head in ((0, 0), (3, 0), (1, 3), (1, -1), (1.5, 0), (None, 0), ("1", 0), (1, [2])):
        assert "must be a whole number from" in do.inside.attention("The sea", layer, head, "adapter", 1)["map"]
    refused = do.inside.attention("x" * 100, 1, 0, "adapter", 1)
    assert f"1 to {MAX_LOOK}" in refused["map"] and refused["heads"] == ""


def test_a_head_is_chosen_by_two_numbers_or_not_at_all(models):
    do = ChatHandlers(models)
    assert do.inside.head(2, 1) == {"layer": 2, "head": 1}
    for layer, head in ((None, 1), (1, None), ("1", 1), (1, [1])):
        assert do.inside.head(layer, head) == {}


def test_the_overview_shows_every_head_of_every_layer_and_their_means(models, seed):
    from PIL import Image

    maps = attention_maps(models.tuned, torch.randint(256, (9,)).tolist())  # (2, 2, 9, 9)
    made = heads_overview(maps, 2, 1)
    pictures = re.findall(r"--map:url\(data:image/png;base64,([A-Za-z0-9+/=]+)\)", made)
    named = re.findall(r'id="head-(\d+)-(\d+)" aria-label="([^"]+)"( checked)?', made)
    assert len(pictures) == len(named) == 2 * (2 + 1)
    for data, (layer, head, name, chosen) in zip(pictures, named, strict=True):
        n, h = int(layer), int(head)
        weights = maps[n - 1, h - 1] if h else (maps[n - 1, 0] + maps[n - 1, 1]) / 2
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert picture.mode == "LA" and picture.size == (9, 9)
        opacity = torch.tensor(list(picture.getchannel("A").tobytes())).view(9, 9)  # (T, T)
        assert (opacity / 255 - weights.sqrt()).abs().max() <= 1 / 30 + 1e-6
        assert opacity.triu(1).max() == 0
        assert name == (f"layer {n}, head {h}" if h else f"layer {n}, mean of all heads")
        assert bool(chosen) == ((n, h) == (2, 1))


# --- what is kept between turns


def test_the_second_turn_finds_the_first_in_its_sessions_cache_and_no_other_session_does(models):
    do = ChatHandlers(models)
    status = last(do.send("one", "Good morning", [], *GREEDY))
    assert "in the cache" not in status["status"]
    history = status["history"]
    assert "prompt tokens in the cache" in last(do.send("one", "And then?", history, *GREEDY))["status"]
    assert "in the cache" not in last(do.send("two", "Good morning", [], *GREEDY))["status"]  # word for word the same
    other = (*GREEDY, 0, 1, "adapter", 0.5)
    assert "in the cache" not in last(do.send("one", "Good morning", [], *other))["status"]  # another model
    assert len(do.caches.kept) == 3


def test_an_edited_question_is_answered_as_if_the_old_one_had_never_been_asked(models):
    do = ChatHandlers(models)
    first = last(do.send("me", "Good morning", [], *GREEDY))["history"]
    second = last(do.send("me", "What is it?", first, *GREEDY))["history"]
    page = last(do.send("me", "What was it?", do.edit(second, 2)["history"], *GREEDY))
    assert page["history"][3]["content"] == reply(models.tuned, models.enc, [*first, *ask("What was it?")], 40)
    assert "prompt tokens in the cache" in page["status"]


def test_a_session_that_ends_takes_its_caches_along_and_no_others(models):
    do = ChatHandlers(models)
    for who, strength in (("one", 1.0), ("one", 0.5), ("two", 1.0)):
        last(do.send(who, "Hi", [], *GREEDY, 0, 1, "adapter", strength))
    do.caches.leave("nobody")
    assert len(do.caches.kept) == 3
    do.caches.leave("one")
    assert list(do.caches.kept._things) == [("two", "adapter", 1.0)]
    assert do.caches.kept.nbytes == KVCache.for_model(models.base).nbytes


def test_caches_are_bounded_however_many_sessions_come(models):
    one = KVCache.for_model(models.base).nbytes
    do = ChatHandlers(models, cache_bytes=3 * one)
    for n in range(20):
        work = do.send(f"session {n}", "Hi", [], *GREEDY)
        next(work), next(work)
        work.close() if n % 2 else last(work)  # stopped or finished
        assert do.caches.kept.nbytes <= 3 * one
    assert len(do.caches.kept) == 3
    small = ChatHandlers(models, cache_bytes=1)  # not even one fits: slower, but the same
    history = last(small.send("me", "Hello", [], *GREEDY))["history"]
    page = last(small.send("me", "More", history, *GREEDY))
    assert page["history"][3]["content"] == reply(models.tuned, models.enc, page["history"][:3], 40)
    assert "in the cache" not in page["status"] and len(small.caches.kept) == 0


def test_an_interrupted_reply_leaves_a_cache_that_can_be_used(models):
    do = ChatHandlers(models)
    work = do.send("me", "Hello", [], *GREEDY)
    history = last(itertools.islice(work, 3))["history"]
    work.close()
    page = last(do.send("me", "More", history, *GREEDY))
    assert page["history"][3]["content"] == reply(models.tuned, models.enc, page["history"][:3], 40)


def test_what_the_browser_kept_comes_back_only_if_it_is_a_conversation(models):
    do = ChatHandlers(models)
    talk = last(do.send("me", "Hello", [], *GREEDY))["history"]
    kept = json.loads(json.dumps(talk))  # as the browser has it
    page = do.restore(kept)
    assert page["history"] == talk and page["idle"] == 2 and page["talk"] == conversation(talk)
    user, said = talk
    forged = [
        None, "x", 7, {"role": "user"}, [None], ["x"], [[user, said]], talk[::-1], [user, user], [said, said],
        [user, said | {"content": None}], [user | {"content": ["x"]}, said], [user | {"role": "system"}, said],
        [user, said | {"ids": [257]}], [user, said | {"ids": [-1]}], [user, said | {"ids": [True]}],
        [user, said | {"ids": [1] * 1025}], [user, said | {"dropped": 1}], [user, said | {"dropped": -1}],
        [user, said, user, said | {"dropped": True}], [user, said, user, said | {"dropped": "1"}],
        [user, said | {"by": "adapter"}], [user, said | {"by": ["adapter"]}], [user, said | {"by": [["x"], 1]}],
        [user, said | {"by": ["adapter", "1"]}], [user | {"content": "x" * (MAX_CHARS + 1)}, said],
        [user, said | {"content": "x" * (HISTORY_CHARS + 1)}],
        [user, said | {"ids": "abc"}], [user, said | {"ids": {"a": 1}}], [user | {"content": "  "}, said],
    ]  # fmt: skip
    for bad in forged:
        assert do.restore(bad)["history"] == [], bad
    assert do.restore([user, said, user])["history"] == talk  # reloaded before the reply began
    extra = [user | {"html": "<b>"}, said | {"busy": True}]
    assert do.restore(extra)["history"] == talk
    long = [user | {"content": "x" * 9_999}, said] * 50
    restored = do.restore(long)["history"]
    assert restored == bounded(long) == long[-len(restored):] and len(restored) % 2 == 0
    assert sum(len(m["content"]) for m in restored) <= HISTORY_CHARS < sum(len(m["content"]) for m in long)
    assert bounded([user | {"content": "x" * 10**6}, said])  # the last turn stays, whatever it is
    assert checked_history(talk, 257) == talk and checked_history(talk, 1) == []


def test_half_a_character_in_a_stored_conversation_becomes_a_question_mark(models):
    stored = [{"role": "user", "content": "half \ud83d"}, {"role": "assistant", "content": "\udc00!"}]
    page = ChatHandlers(models).restore(stored)
    assert [m["content"] for m in page["history"]] == ["half ?", "?!"]
    json.dumps(page["talk"], ensure_ascii=False).encode("utf-8")


def test_a_reply_looked_at_with_another_model_says_so(models):
    do, tuned, base = ChatHandlers(models), (*GREEDY, 0, 1, "adapter", 1.0), (*GREEDY, 0, 1, "none", 1.0)
    half = (*GREEDY, 0, 1, "adapter", 0.5)
    said = last(do.send("me", "Hello", [], *tuned))["history"]
    assert said[1]["by"] == ["adapter", 1.0]
    wrote = {name: do.inside.look(said, 1, *controls)["choices"] for name, controls in
             (("same", tuned), ("base", base), ("half", half))}
    assert "Written by" not in wrote["same"]
    assert "Written by adapter at strength 1. The probabilities are those of the base model" in wrote["base"]
    assert "those of adapter at strength 0.5" in wrote["half"]
    plain = last(do.send("me", "Hello", [], *base))["history"]
    zero = (*GREEDY, 0, 1, "adapter", 0)  # the base under another name
    assert "Written by" not in do.inside.look(plain, 1, *zero)["choices"]


def test_the_tokens_follow_the_settings(models):
    do, hot = ChatHandlers(models), (1.5, 0, 1, 40, True, "")
    said = last(do.send("me", "Hello", [], *GREEDY))["history"]
    greedy, warm = do.inside.look(said, 1, *GREEDY), do.inside.again(said, 1, *hot)
    assert warm["choices"] != greedy["choices"] and warm["choices"] == do.inside.look(said, 1, *hot)["choices"]
    assert do.inside.again(said, None, *hot) == {}


def test_caches_have_room_for_four_conversations_at_least(models):
    one = KVCache.for_model(models.base).nbytes
    assert ChatHandlers(models).caches.kept.max_bytes == CACHE_BYTES > 4 * one
    large = ChatModels("large", GPTLanguageModel(replace(TINY, n_ctx=8192, n_embd=256)), {}, models.enc)
    one = KVCache.for_model(large.base).nbytes
    assert ChatHandlers(large).caches.kept.max_bytes == max(CACHE_BYTES, 4 * one)
    assert 4 * one > CACHE_BYTES or one < CACHE_BYTES


@pytest.mark.parametrize("spare", [0, 1, -1])
def test_a_conversation_that_fits_exactly_loses_no_turn(tmp_path, seed, spare):
    enc, rng = byte_encoding(tmp_path), torch.Generator().manual_seed(seed)
    talk = []
    for n in torch.randint(1, 30, (6,), generator=rng).tolist():
        talk += [{"role": "user", "content": "x" * n}, {"role": "assistant", "content": "y" * n}]
    talk, room = talk[:-1], 20
    n_ctx = len(encode_prompt(enc, talk)) + room + spare
    ids, dropped = fit_turns(enc, talk, n_ctx, room)
    assert (dropped > 0) == (spare < 0) and ids == encode_prompt(enc, talk[2 * dropped :])


def test_models_are_loaded_in_the_dtype_that_is_asked_for(folder):
    assert load_models(folder, device="cpu").base.wte.weight.dtype == torch.float32
    half = load_models(folder, device="cpu", dtype=torch.bfloat16)
    assert half.base.wte.weight.dtype == half.tuned.h[0].attn.c_attn.weight.dtype == torch.bfloat16
    maps = attention_maps(half.tuned, [1, 2, 3])
    assert maps.dtype == torch.float32 and (maps.sum(-1) - 1).abs().max() <= 1e-5


def test_an_error_inside_gradio_is_not_called_missing(monkeypatch, tmp_path):
    import sys

    (tmp_path / "gradio").mkdir()
    (tmp_path / "gradio" / "__init__.py").write_text("import no_such_thing_here")
    for name in [name for name in sys.modules if name.split(".")[0] == "gradio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_thing_here"):
        need_gradio()
