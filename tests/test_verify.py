"""`verify`: it passes what is right, fails what is wrong, says what it cannot know; its command says the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scripted import tiny_folder
from transformers import GPT2LMHeadModel

from minigpt_lib.cli import main
from minigpt_lib.download import FetchError
from minigpt_lib.model.gpt import GPTConfig
from minigpt_lib.weights.convert import WeightsError, parameter_shapes
from minigpt_lib.weights.hub import HUB
from minigpt_lib.weights.pretrained import load_pretrained, model_folder
from minigpt_lib.weights.verify import (
    GOLDENS,
    continue_rows,
    format_checks,
    known_goldens,
    verify,
    write_goldens,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path, seed) -> Path:
    """A tiny model with a tokenizer and stored goldens."""
    found = tiny_folder(tmp_path / "tiny")
    write_goldens(found)
    return found


def results(checks) -> dict[str, bool | None]:
    return {check.name: check.passed for check in checks}


def edit(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


# --- goldens that are published


def test_published_numbers_of_parameters_are_those_of_the_presets():
    assert list(GOLDENS) == list(HUB)
    counts = [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]
    for name, count in zip(HUB, counts, strict=True):
        shapes = parameter_shapes(GPTConfig.preset(name))
        assert GOLDENS[name]["parameters"] == count == sum(torch.Size(s).numel() for s in shapes.values())
    assert known_goldens("gpt2")["sha256"] == HUB["gpt2"][2] and len(HUB["gpt2"][2]) == 64


def test_goldens_of_gpt2_are_texts_of_their_sources(gpt2_encoding):
    """A slip in copying the ids would show in the text."""
    decode = gpt2_encoding.decode
    texts = {case["from"]: decode(case["ids"] + case["next"]) for case in GOLDENS["gpt2"]["greedy"]}
    assert texts["Transformers' tests"].startswith("The dog was found in a field near the intersection of West")
    assert texts["picoGPT"].startswith("Alan Turing theorized that computers would one day become the most powerful")
    assert texts["picoGPT"].endswith("is very similar to the human brain")
    assert texts["ARENA"] == "Jingle bells, jingle bells, jingle all the way up to the top of the mountain."
    assert texts["float64"].startswith("Hello, I'm a language model,")
    first, second = (decode(row["ids"] + row["next"]) for row in GOLDENS["gpt2"]["padded"])
    assert first == "Hello, my dog is a little bit of a mess. I'm not sure if he's going"
    assert second == "Today, I'm going to be doing a lot of research on this. I"
    assert decode(GOLDENS["gpt2"]["probabilities"]["ids"]) == "John and Mary went to the"


def test_official_weights_pass():
    """Only where gpt2 is in the cache; nothing is downloaded for a test."""
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(HUB["gpt2"][0], "model.safetensors", revision=HUB["gpt2"][1]), str):
        pytest.skip("the official weights are not in the hub's cache")
    checks = verify("gpt2")
    assert all(check.passed for check in checks), format_checks(checks)


# --- goldens of one's own


def test_a_model_passes_its_own_goldens(folder):
    checks = verify(folder)
    assert len(checks) == 10 and all(check.passed is True for check in checks)
    assert "10 passed, 0 failed, 0 not pinned" in format_checks(checks)


def test_goldens_are_what_transformers_computes(folder):
    """Not only what we computed ourselves."""
    known = json.loads((folder / "goldens.json").read_text())
    oracle = GPT2LMHeadModel.from_pretrained(folder).eval()
    assert known["parameters"] == sum(p.numel() for p in oracle.parameters())
    for case in known["greedy"]:
        idx = torch.tensor([case["ids"]])
        out = oracle.generate(idx, attention_mask=torch.ones_like(idx), do_sample=False, pad_token_id=0,
                              max_new_tokens=len(case["next"]), eos_token_id=-1)  # fmt: skip
        assert out[0, idx.size(1) :].tolist() == case["next"]
    with torch.no_grad():
        z = oracle(torch.tensor([known["logits"]["ids"]])).logits[0, -1]
    assert all(abs(z[int(i)].item() - value) <= 1e-4 for i, value in known["logits"]["values"].items())
    assert len({tuple(case["next"]) for case in known["greedy"]}) > 1 and len(known["padded"]) == 2


def test_left_padded_rows_continue_as_alone(folder):
    model = load_pretrained(folder)
    rows = [[5, 6, 7, 8, 9, 1], [3], [4, 4, 2]]
    assert continue_rows(model, rows, 7) == [continue_rows(model, [row], 7)[0] for row in rows]
    assert continue_rows(model, [rows[0]], 1)[0][0] == model.last_logits(torch.tensor([rows[0]])).argmax().item()


@pytest.mark.parametrize("kind", ["attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.bias", "ln_2.weight"])
def test_a_changed_tensor_fails(folder, kind):
    def change(state):
        t = state[f"h.0.{kind}"]
        state[f"h.0.{kind}"] = t.t().contiguous() if kind == "attn.c_proj.weight" else t * 1.5 + 0.1

    edit(folder, change)
    found = results(verify(folder))
    assert found["SHA-256 of the file"] is False and found["logits"] is False
    assert found["parameters"] is True and found["loads strictly"] is True


def test_the_tolerance_has_two_sides(folder):
    path = folder / "goldens.json"
    known = json.loads(path.read_text())
    first = next(iter(known["logits"]["values"]))
    for step, passed in ((9e-4, True), (-9e-4, True), (2e-3, False), (-2e-3, False), (float("nan"), False)):
        values = known["logits"]["values"] | {first: known["logits"]["values"][first] + step}
        path.write_text(json.dumps(known | {"logits": known["logits"] | {"values": values}}))
        assert results(verify(folder))["logits"] is passed, step


def test_weights_that_do_not_load_are_a_failed_check(folder):
    edit(folder, lambda state: state.pop("ln_f.bias"))
    (check,) = verify(folder)
    assert check.passed is False and "ln_f.bias" in check.got


def test_what_is_not_known_is_said_and_not_passed(folder):
    (folder / "goldens.json").unlink()
    found = verify(folder)
    assert results(found)["parameters"] is None and results(found)["SHA-256 of the file"] is None
    assert "2 passed, 0 failed, 2 not pinned" in format_checks(found)
    assert "not pinned" in format_checks(found)


def test_wrong_padding_is_noticed(folder, monkeypatch):
    import minigpt_lib.model.gpt as module

    original = module.padding_mask

    def unmasked(attention_mask, T):
        mask, positions = original(attention_mask, T)
        return mask | torch.ones_like(mask).tril(), positions

    monkeypatch.setattr(module, "padding_mask", unmasked)
    assert results(verify(folder))["row alone = row left-padded"] is False


def test_goldens_that_are_published_cannot_be_overwritten(folder):
    with pytest.raises(ValueError, match="published"):
        write_goldens("gpt2")
    (folder / "goldens.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        verify(folder)


def test_goldens_are_only_replaced_by_such_as_the_model_passes(folder, monkeypatch):
    import minigpt_lib.model.gpt as module

    before = (folder / "goldens.json").read_bytes()
    edit(folder, lambda state: state["wpe.weight"].mul_(1.5))
    with pytest.raises((RuntimeError, ValueError), match="nonsense"):
        write_goldens(folder, device="nonsense")
    assert (folder / "goldens.json").read_bytes() == before
    original = module.padding_mask

    def unmasked(attention_mask, T):
        mask, positions = original(attention_mask, T)
        return mask | torch.ones_like(mask).tril(), positions

    with monkeypatch.context() as patch:
        patch.setattr(module, "padding_mask", unmasked)
        with pytest.raises(WeightsError, match="no goldens are written.*row alone"):
            write_goldens(folder)
    assert (folder / "goldens.json").read_bytes() == before
    write_goldens(folder)
    assert (folder / "goldens.json").read_bytes() != before and all(check.passed for check in verify(folder))


def test_the_hubs_names_have_the_official_goldens():
    for name, (repo, _, _) in HUB.items():
        assert known_goldens(repo) is GOLDENS[name]
        with pytest.raises(ValueError, match="published"):
            write_goldens(repo)


def test_a_folder_without_a_tokenizer_gets_goldens_of_plain_ids(folder):
    (folder / "tokenizer.tiktoken").unlink()
    write_goldens(folder, n=3)
    assert all(check.passed for check in verify(folder))
    assert [len(case["next"]) for case in known_goldens(folder)["greedy"]] == [3, 3, 3]


# --- the command


def test_mini_passes_on_this_machine(capsys):
    if not (model_folder("mini") / "goldens.json").is_file():
        pytest.skip("mini has no goldens.json here")
    assert main(["verify", "mini", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "10 passed, 0 failed, 0 not pinned" in out and "SHA-256" in out


def test_the_exit_code_says_pass_fail_and_absent(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MINIGPT_DEVICE", "cpu")
    assert main(["verify", str(folder)]) == 0 == main(["verify", "--model", str(folder)])
    other = shutil.copytree(folder, tmp_path / "other")
    edit(other, lambda state: state["wpe.weight"].mul_(1.5))
    assert main(["verify", str(other)]) == 1
    assert "FAIL" in capsys.readouterr().out
    assert main(["verify", str(other), "--update"]) == 0 == main(["verify", str(other)])
    assert main(["verify", "gpt5"]) == 2

    def absent(name):
        raise FetchError("not in the cache")

    monkeypatch.setattr("minigpt_lib.weights.pretrained.fetch", absent)
    capsys.readouterr()
    assert main(["verify", "gpt2"]) == 3
    err = capsys.readouterr().err
    assert "gpt2 is not verified" in err and err.count("\n") == 1
