"""`LLM` against the plain model and Transformers: what is written, what is scored, and what is refused."""

import math

import pytest
import torch
from scripted import TINY, byte_encoding, tiny_folder

from minigpt_lib.api import LLM, GenerateOptions, Score, best_decoder, fast_decoder, sampling_from, token_nats
from minigpt_lib.chat.models import load_models
from minigpt_lib.chat.session import Sampling
from minigpt_lib.generation.compiled import cpp_compiler
from minigpt_lib.generation.decode import generate
from minigpt_lib.generation.native import NativeGPT
from minigpt_lib.model.gpt import GPTConfig, GPTLanguageModel
from minigpt_lib.tuning.metrics import reply
from minigpt_lib.weights.pretrained import save_pretrained

needs_compiler = pytest.mark.skipif(cpp_compiler() is None, reason="a step in C++ needs a compiler")


@pytest.fixture
def folder(tmp_path, seed, monkeypatch):
    monkeypatch.setenv("MINIGPT_DEVICE", "cpu")
    return tiny_folder(tmp_path / "tiny")


@pytest.fixture
def llm(folder) -> LLM:
    return LLM.load(folder)


def written(model: GPTLanguageModel, enc, text: str, new: int) -> str:
    """Greedy, by the plain model."""
    idx = torch.tensor([enc.encode_ordinary(text)])
    ids = generate(model, idx, new, temperature=0, stop_ids=(enc.eot_token,))[0, idx.size(1) :].tolist()
    return enc.decode(ids[: ids.index(enc.eot_token)] if enc.eot_token in ids else ids)


# --- text


def test_writes_what_the_plain_model_writes(llm):
    for text in ("Once", "A longer beginning of a text"):
        assert llm.generate(text, temperature=0, max_new_tokens=40) == written(llm.models.base, llm.enc, text, 40)


def test_the_pieces_of_a_stream_are_the_text(llm, seed):
    several = 0
    for text in ("Once", "Two", "Three", "Four", "Five", "Six"):  # a random model may end a text at once
        pieces = list(llm.stream(text, seed=seed, max_new_tokens=40, temperature=1.0))
        assert "".join(pieces) == llm.generate(text, seed=seed, max_new_tokens=40, temperature=1.0)
        assert all(pieces)
        several += len(pieces) > 1
    assert several


def test_the_base_writes_and_the_adapter_answers_unless_it_is_named(folder, llm):
    models = load_models(folder, "auto", "cpu")
    assert llm.generate("Who?", temperature=0, max_new_tokens=20) == written(models.base, llm.enc, "Who?", 20)
    assert llm.chat("Who?", temperature=0, max_new_tokens=20) == reply(models.tuned, llm.enc, "Who?", 20)
    named = LLM.load(folder, adapter=folder / "adapter")
    assert named.generate("Who?", temperature=0, max_new_tokens=20) == written(models.tuned, llm.enc, "Who?", 20)
    alone = LLM.load(folder, adapter=None)
    assert alone.chat("Who?", temperature=0, max_new_tokens=20) == reply(models.base, llm.enc, "Who?", 20)
    assert alone.generate("Who?", temperature=0, max_new_tokens=20) != named.generate(
        "Who?", temperature=0, max_new_tokens=20
    )


def test_a_conversation_is_more_than_its_last_question(llm):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    talk += [{"role": "user", "content": "Who?"}]
    answer = llm.chat(talk, temperature=0, max_new_tokens=30)
    assert answer != llm.chat("Who?", temperature=0, max_new_tokens=30)
    assert "".join(llm.stream(talk, temperature=0, max_new_tokens=30)) == answer


def test_a_batch_writes_each_text_as_if_it_were_alone(llm):
    texts = ["One", "Two and three", "Four, five, six, seven"]
    alone = [llm.generate(text, temperature=0, max_new_tokens=25) for text in texts]
    assert llm.generate_all(texts, temperature=0, max_new_tokens=25) == alone
    assert llm.generate_all([]) == []


def test_a_batch_ends_at_the_end_token(tmp_path, seed):
    model = GPTLanguageModel(TINY)
    enc = byte_encoding(tmp_path)
    with torch.no_grad():  # after any text the end token, nothing else
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(model.wte.weight[enc.eot_token] * 50)
    save_pretrained(model, tmp_path, enc)
    llm = LLM.load(tmp_path, device="cpu")
    assert llm.generate_all(["a", "bb"], temperature=0) == ["", ""] and llm.generate("a", temperature=0) == ""


# --- decoders


@needs_compiler
def test_the_fastest_exact_way_is_the_default_on_a_cpu(llm, monkeypatch):
    called = []
    call = NativeGPT._call
    monkeypatch.setattr(NativeGPT, "_call", lambda self, text: called.append(1) or call(self, text))
    llm.generate("Once", temperature=0, max_new_tokens=5)
    assert llm.decoder == "C++" and called and "C++" in repr(llm)


def test_without_a_compiler_the_plain_model_writes(folder, monkeypatch):
    monkeypatch.setattr("minigpt_lib.api.cpp_compiler", lambda: None)
    llm = LLM.load(folder)
    assert llm.decoder == "plain"
    assert llm.generate("Hi", temperature=0, max_new_tokens=9) == written(llm.models.base, llm.enc, "Hi", 9)
    with pytest.raises(ValueError, match="int8.*compiler"):
        llm.fast("int8")


def test_a_fast_way_that_breaks_is_left_out_unless_it_was_asked_for(folder, monkeypatch):
    def broken(*args):
        raise OSError("no place for compiled code")

    monkeypatch.setattr("minigpt_lib.api.NativeGPT", broken)
    monkeypatch.setattr("minigpt_lib.api.cpp_compiler", lambda: "g++")
    base = load_models(folder, None, "cpu").base
    assert best_decoder(base) == ("plain", base)
    with pytest.raises(OSError, match="no place"):
        fast_decoder(base, "int8")


@needs_compiler
def test_fast_takes_smaller_weights_and_leaves_the_model_alone(llm):
    small = llm.fast("int8")
    assert small.decoder == "C++" and small._decoder(small.model)[1].h[0].mlp.c_fc.weight.dtype == torch.int8
    assert isinstance(small.generate("Hi", max_new_tokens=3), str)
    assert llm.models.base.h[0].mlp.c_fc.weight.dtype == torch.float32


# --- options


def test_editors_are_told_every_setting():
    assert set(GenerateOptions.__annotations__) == set(Sampling.__dataclass_fields__)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temprature": 1}, "unknown option 'temprature': did you mean temperature"),
        ({"topk": 5}, "did you mean top_k"),
        ({"max_tokens": 5}, "did you mean max_new_tokens"),
        ({"beams": 5}, "there are .*top_p"),
    ],
)
def test_a_misspelt_option_is_an_error_that_knows_better(llm, options, says):
    for call in (llm.generate, llm.chat, llm.stream, lambda t, **o: llm.generate_all([t], **o)):
        with pytest.raises(TypeError, match=says):
            call("Hi", **options)


def test_a_value_out_of_its_limits_is_named(llm):
    with pytest.raises(ValueError, match="top_p=2 .*0.05 to 1"):
        llm.generate("Hi", top_p=2)
    assert sampling_from({}) == Sampling() and sampling_from({"top_k": 3}, {"top_k": 9, "top_p": 0.5}).top_p == 0.5


@pytest.mark.parametrize("text", ["", "x" * 256])
def test_a_text_that_cannot_be_continued_is_refused(llm, text):
    with pytest.raises(ValueError, match="256|255"):
        llm.generate(text)
    with pytest.raises(ValueError, match="255"):
        llm.generate_all(["fine", text])


# --- scores


def test_nats_are_the_loss_of_every_token_against_transformers(llm):
    transformers = pytest.importorskip("transformers", reason="Transformers is the oracle")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(llm.models.name).eval()
    text = "The quick brown fox jumps over the lazy dog, twice."
    ids = torch.tensor([[256, *llm.enc.encode_ordinary(text)]])
    with torch.no_grad():
        mean = theirs(ids, labels=ids).loss.item()
    score = llm.score(text)
    print("largest difference:", abs(score.mean - mean))
    assert abs(score.mean - mean) < 1e-5 and len(score.nats) == len(text) == len(score.tokens)
    assert math.isclose(score.total, mean * len(text), rel_tol=1e-5)
    assert math.isclose(score.perplexity, math.exp(mean), rel_tol=1e-5) and "".join(score.tokens) == text


def test_a_context_is_read_and_not_scored(llm):
    whole, end = llm.score("One two three"), llm.score(" three", context="One two")
    assert end.tokens == tuple(" three") and len(end.nats) == 6
    assert max(abs(a - b) for a, b in zip(end.nats, whole.nats[-6:], strict=True)) < 1e-5
    with pytest.raises(ValueError, match="empty"):
        llm.score("", context="One")


@pytest.mark.parametrize("first", [1, 20, 50])
@pytest.mark.parametrize("stride", [1, 7, 16])
def test_windows_score_each_token_once_with_enough_before_it(seed, first, stride):
    """Against a slow way: a pass of its own for every token."""
    model = GPTLanguageModel(GPTConfig(31, 16, 16, 1, 2)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    ids = torch.randint(31, (61,)).tolist()
    nats = token_nats(model, ids, first, stride)
    assert len(nats) == len(ids) - first
    for i, nat in zip(range(first, len(ids)), nats, strict=True):
        possible = []
        for seen in range(max(1, min(i, 16 - stride)), min(i, 16) + 1):  # how much of the past the window may have held
            row = torch.tensor([ids[i - seen : i]])
            possible.append(-torch.log_softmax(model(row)[0][0, -1], -1)[ids[i]].item())
        assert min(abs(nat - p) for p in possible) < 1e-5


def test_a_stride_of_one_gives_every_token_all_positions(seed):
    model = GPTLanguageModel(GPTConfig(31, 16, 16, 1, 2)).eval()
    ids = torch.randint(31, (40,)).tolist()
    nats = token_nats(model, ids, stride=1)
    for i in range(1, 40):
        row = torch.tensor([ids[max(0, i - 16) : i]])
        assert abs(nats[i - 1] + torch.log_softmax(model(row)[0][0, -1], -1)[ids[i]].item()) < 1e-5


@pytest.mark.parametrize(("first", "stride", "says"), [(0, 4, "first=0"), (9, 4, "first=9"), (1, 0, "stride=0"),
                                                       (1, 99, "stride=99.*n_ctx=16")])  # fmt: skip
def test_windows_out_of_range_are_refused(first, stride, says):
    model = GPTLanguageModel(GPTConfig(31, 16, 16, 1, 2)).eval()
    with pytest.raises(ValueError, match=says):
        token_nats(model, [1, 2, 3], first, stride)


def test_a_score_says_what_it_means():
    score = Score(("a", "b"), (1.0, 3.0))
    assert (score.total, score.mean) == (4.0, 2.0) and score.perplexity == math.exp(2)
