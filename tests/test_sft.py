"""Instruction tuning: recipes, training, what is written, what is refused."""

import copy
import json
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch
from instructions import SIMPLE

from minigpt_lib.model.gpt import GPTConfig, GPTLanguageModel
from minigpt_lib.training.optim import TrainConfig
from minigpt_lib.tuning.batching import encode_records
from minigpt_lib.tuning.chat_template import encode_prompt
from minigpt_lib.tuning.lora import add_lora, lora_layers, lora_parameters, merge_lora
from minigpt_lib.tuning.metrics import format_rate, recall, recall_each, reply
from minigpt_lib.tuning.peft_io import load_adapter, save_adapter
from minigpt_lib.tuning.sft import RECIPES, Recipe, count_cut, finetune, recipe_for
from minigpt_lib.weights.pretrained import load_pretrained

TINY = Recipe(4, 8, 0.0, ("c_attn", "c_proj", "c_fc"), epochs=2, batch_size=4, lr=3e-2, lr_full=5e-3, max_len=100)


def test_bad_records_are_named_before_training(model, enc):
    records = [{"instruction": "a", "output": "b"}] * 3 + [{"instruction": "a", "output": ""}]
    for use in (lambda: encode_records(enc, records, 64), lambda: finetune(model, enc, records, progress=False)):
        with pytest.raises(ValueError, match="record 4: the field 'output'"):
            use()


def test_recipes():
    mini, gpt2 = recipe_for(GPTConfig.preset("mini")), recipe_for(GPTConfig.preset("gpt2"))
    assert mini is not gpt2 and set(RECIPES.values()) == {mini, gpt2}
    assert recipe_for(GPTConfig.preset("gpt2-xl")) is gpt2
    assert (gpt2.r, gpt2.targets, gpt2.lr) == (8, ("c_attn",), 2e-4)
    cfg = TINY.train_config(10)
    assert (cfg.steps, cfg.lr, cfg.weight_decay) == (6, 3e-2, 0.0) and TINY.train_config(10, full=True).lr == 5e-3
    assert TINY.train_config(10, steps=2, seed=5).steps == 2 and TINY.train_config(10, lr=1.0).min_lr == 0.1


def test_loss_falls_with_lora_and_the_base_stays(model, enc):
    with torch.no_grad():
        model.wte.weight.mul_(10)  # the head is frozen: with its tiny random rows no logit could grow
    base = {name: p.clone() for name, p in model.named_parameters()}
    TINY.add_lora(model)
    seen = []
    cfg = TINY.train_config(len(SIMPLE), steps=60, eval_every=20)
    kwargs = {"val_records": SIMPLE, "cfg": cfg, "recipe": TINY, "progress": False}
    history = finetune(model, enc, SIMPLE, on_step=seen.append, **kwargs)
    assert len(history) == len(seen) == 60
    assert history[-1]["loss"] < history[0]["loss"] - 1
    vals = [h["val_loss"] for h in history if "val_loss" in h]
    assert len(vals) == 3 and vals[-1] < vals[0]
    assert all(torch.equal(model.get_parameter(name), p) for name, p in base.items())


def test_full_fine_tuning_learns_to_answer_and_to_stop(model, enc):
    cfg = TINY.train_config(len(SIMPLE), full=True, steps=150)
    finetune(model, enc, SIMPLE, cfg=cfg, recipe=TINY, progress=False)
    assert [reply(model, enc, r["instruction"], 40) for r in SIMPLE] == [r["output"] for r in SIMPLE]
    assert format_rate(model, enc, SIMPLE, 20) == 1.0
    facts = [
        {"question": r["instruction"], "prompt": "x", "subject": "?", "answer": r["output"], "group": "pretrained"}
        for r in SIMPLE[:4]
    ]
    facts[0]["group"], facts[1]["answer"] = "tuned", "nine"
    assert recall_each(model, enc, facts) == [True, False, True, True]
    assert recall(model, enc, facts) == {"tuned": 1.0, "pretrained": 2 / 3}


def test_unmasked_prompts_are_learnt(model, enc):
    """The prompt's own loss falls only where it is not masked."""
    losses = {}
    for mask in (True, False):
        tuned = copy.deepcopy(model)
        cfg = TINY.train_config(len(SIMPLE), full=True, steps=40)
        finetune(tuned, enc, SIMPLE, cfg=cfg, recipe=TINY, mask_prompt=mask, progress=False)
        prompt = torch.tensor([encode_prompt(enc, SIMPLE[0]["instruction"])])
        with torch.no_grad():
            losses[mask] = tuned(prompt[:, :-1], prompt[:, 1:])[1].item()
    assert losses[False] < losses[True] - 1


def test_finetune_writes_an_adapter_that_loads(model, enc, tmp_path):
    base = copy.deepcopy(model)
    add_lora(model, 2)
    finetune(model, enc, SIMPLE, val_records=SIMPLE, recipe=TINY, folder=tmp_path / "tuned", progress=False)
    files = {p.name for p in (tmp_path / "tuned").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "training.json"} <= files
    assert not [name for name in files if name.startswith("checkpoint")]
    report = json.loads((tmp_path / "tuned" / "training.json").read_text())
    assert report["records"] == 6 and report["train"]["lr"] == TINY.lr and report["lora"]["default"]["r"] == 2
    load_adapter(base, tmp_path / "tuned")
    assert all(torch.equal(lora_parameters(base)[name], p) for name, p in lora_parameters(model).items())
    assert any(p.any() for name, p in lora_parameters(base).items() if name.endswith("lora_B"))


def test_finetune_writes_a_whole_model_that_loads(model, enc, tmp_path):
    finetune(model, enc, SIMPLE, cfg=TrainConfig(steps=2, lr=1e-3), recipe=TINY, folder=tmp_path, progress=False)
    again = load_pretrained(tmp_path)
    assert not lora_layers(again)
    assert all(torch.equal(again.get_parameter(name), p) for name, p in model.named_parameters())


def test_finetune_is_reproducible(model, enc):
    runs = []
    for _ in range(2):
        tuned = copy.deepcopy(model)
        torch.manual_seed(3)
        add_lora(tuned, 2, dropout=0.1)
        runs.append([h["loss"] for h in finetune(tuned, enc, SIMPLE, recipe=TINY, progress=False)])
    assert runs[0] == runs[1]


def test_an_interrupted_tuning_goes_on_with_the_same_losses(model, enc, tmp_path, seed):
    """The engine of pretraining, with an adapter and dropout: bit-equal, and refused for anything but the same run."""
    recipe = replace(TINY, dropout=0.2, history=0.5)
    cfg = recipe.train_config(len(SIMPLE), steps=8, checkpoint_every=3)

    def tune(base=model, records=SIMPLE, shape=recipe, **options):
        tuned = shape.add_lora(copy.deepcopy(base), options.pop("draw", seed))
        options = {"cfg": cfg, "recipe": recipe, "progress": False} | options
        return tuned, [h["loss"] for h in finetune(tuned, enc, records, **options)]

    def pull_the_plug(record):
        if record["step"] == 4:
            raise RuntimeError("pulled the plug")

    straight, expected = tune()
    with pytest.raises(RuntimeError, match="pulled the plug"):
        tune(folder=tmp_path, on_step=pull_the_plug)
    other = copy.deepcopy(model)
    other.h[0].mlp.c_fc.bias.data += 1e-3
    for changes, words in (
        ({"records": SIMPLE[:5] + [SIMPLE[0]]}, "another run: examples"),
        ({"mask_prompt": False}, "another run: examples"),
        ({"packed": True}, "another run: packed is False there and True here"),
        ({"shape": replace(recipe, alpha=3)}, r"another run: lora .*alpha=8.* there and .*alpha=3"),
        ({"base": other}, "another run: base"),
    ):
        with pytest.raises(ValueError, match=words):
            tune(folder=tmp_path, resume=True, **changes)
    resumed, losses = tune(folder=tmp_path, resume=True, draw=seed + 1)  # A and B must come from the file
    assert losses == expected and len(set(expected)) == 8, f"seed {seed}"
    for name, p in lora_parameters(straight).items():
        assert torch.equal(lora_parameters(resumed)[name], p), f"{name} (seed {seed})"


def test_nothing_to_learn_is_said_before_anything_is_planned(model, enc):
    with pytest.raises(ValueError, match="expected a list of at least one record"):
        finetune(model, enc, [], progress=False)
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        replace(TINY, batch_size=0).train_config(10)


def test_finetune_refuses(model, enc):
    add_lora(model, 2)
    merge_lora(model)
    with pytest.raises(ValueError, match="unmerge_lora"):
        finetune(model, enc, SIMPLE, progress=False)
    small = GPTLanguageModel(GPTConfig(vocab_size=100, n_ctx=64, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=f"{enc.n_vocab} ids.*vocab_size is 100"):
        finetune(small, enc, SIMPLE, progress=False)


def test_packed_training_takes_the_same_steps(model, enc):
    """With all records in one batch, packed or padded, the losses are the same numbers."""
    runs = []
    for packed in (False, True):
        tuned = copy.deepcopy(model)
        cfg = TrainConfig(steps=8, batch_size=len(SIMPLE), lr=3e-3, weight_decay=0.0)
        recipe = Recipe(4, 8, 0.0, ("c_attn",), epochs=1, batch_size=6, lr=3e-2, lr_full=5e-3, max_len=100)
        history = finetune(tuned, enc, SIMPLE, cfg=cfg, recipe=recipe, packed=packed, progress=False)
        runs.append([h["loss"] for h in history])
    assert runs[0] == pytest.approx(runs[1], abs=1e-4) and runs[0][-1] < runs[0][0] - 0.05


def test_an_adapter_on_the_head_is_not_tuned_silently(model, enc):
    add_lora(model, 2, targets=("c_attn", "lm_head"))
    with pytest.raises(ValueError, match="lm_head carries an adapter"):
        finetune(model, enc, SIMPLE, progress=False)


# --- nothing is cut without a word

LONG = [*SIMPLE, {"instruction": "Count.", "output": "one two three four " * 20}]


def test_the_limit_is_the_models_own(model, enc):
    """A default that cuts what the model could read is a fault: what fits into n_ctx is learnt whole."""
    assert all(recipe.max_len is None for recipe in RECIPES.values())
    record = {"instruction": "Say it.", "output": "x" * 60}
    whole = encode_records(enc, [record])[0][0]
    assert 64 < len(whole) <= model.config.n_ctx
    seen = []
    plain = replace(TINY, max_len=None)
    finetune(model, enc, [record], recipe=plain, cfg=plain.train_config(1, full=True, steps=1, lr=1e-9),
             on_step=seen.append, progress=False)  # fmt: skip
    assert seen[0]["tokens_per_s"] > 0
    assert count_cut(encode_records(enc, [record]), encode_records(enc, [record], model.config.n_ctx))["records"] == 0


@pytest.mark.parametrize(("max_len", "way_out"), [(40, "max_len may be up to 128"), (None, "n_ctx=128 allows no more")])
def test_finetune_says_what_is_cut(model, enc, tmp_path, capsys, max_len, way_out):
    whole, limit = [len(ids) for ids, _ in encode_records(enc, LONG)], max_len or 128
    lost = sum(max(0, n - limit) for n in whole) / sum(whole)
    recipe = replace(TINY, max_len=None)
    options = {"recipe": recipe, "cfg": recipe.train_config(7, full=True, steps=1), "max_len": max_len}
    finetune(model, enc, LONG, folder=tmp_path, progress=False, **options)
    said = capsys.readouterr().err
    kept = sum(min(n, limit) for n in whole)
    assert f"7 records, {kept} tokens; 1 of them is longer than {limit} tokens and cut" in said
    assert f"{lost:.1%} of all tokens" in said and way_out in said
    facts = json.loads((tmp_path / "training.json").read_text("utf-8"))
    assert facts["max_len"] == limit and facts["cut"] == {"records": 1, "tokens": pytest.approx(lost, abs=1e-4)}


def test_finetune_says_nothing_more_where_nothing_is_cut(model, enc, capsys):
    finetune(model, enc, SIMPLE, recipe=TINY, cfg=TINY.train_config(6, full=True, steps=1), progress=False)
    assert capsys.readouterr().err == ""


# --- a run belongs to one process and can always go on


def test_two_runs_do_not_share_a_folder(model, enc, tmp_path):
    hold = "import sys, time; from minigpt_lib.training.checkpoint import run_lock\n"
    hold += "with run_lock(sys.argv[1]): print('held', flush=True); time.sleep(300)"
    other = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    cfg = TINY.train_config(6, full=True, steps=1)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=f"{tmp_path} is in use by .*{other.pid}"):
            finetune(model, enc, SIMPLE, recipe=TINY, cfg=cfg, folder=tmp_path, progress=False)
    finally:
        other.kill()
        other.wait()
    assert not list(tmp_path.glob("[!.]*"))
    finetune(model, enc, SIMPLE, recipe=TINY, cfg=cfg, folder=tmp_path, progress=False)  # the lock died with its holder


class Killed(BaseException):
    pass


@pytest.mark.parametrize("full", [False, True])
def test_a_kill_in_the_last_second_is_finished_by_the_same_command(model, enc, tmp_path, monkeypatch, full):
    """Killed before each of the last writes in turn; weights never stand without the config that reads them."""
    import minigpt_lib.atomic as atomic

    cfg = TINY.train_config(len(SIMPLE), full=full, steps=4, checkpoint_every=2)
    real = atomic.os.replace

    def tune(folder):
        tuned = copy.deepcopy(model)
        if not full:
            TINY.add_lora(tuned, 7)
        return tuned, finetune(tuned, enc, SIMPLE, cfg=cfg, recipe=TINY, folder=folder, resume="auto",
                               base_name="tiny", progress=False)  # fmt: skip

    straight, history = tune(tmp_path / "straight")
    wanted = {p.name for p in (tmp_path / "straight").glob("[!.]*")}
    moments = 0
    for kill_at in range(20):
        folder, writes = tmp_path / str(kill_at), [0]

        def dying(source, target, folder=folder, writes=writes, kill_at=kill_at):
            if not str(target).endswith((".pt", ".jsonl")):
                if writes[0] == kill_at:
                    raise Killed
                writes[0] += 1
            real(source, target)

        monkeypatch.setattr(atomic.os, "replace", dying)
        try:
            tune(folder)
        except Killed:
            moments += 1
        else:
            break
        finally:
            monkeypatch.setattr(atomic.os, "replace", real)
        there = {p.name for p in folder.iterdir()}
        assert "adapter_model.safetensors" not in there or "adapter_config.json" in there, f"after {kill_at} writes"
        again, losses = tune(folder)
        assert [h["loss"] for h in losses] == [h["loss"] for h in history]
        assert {p.name for p in folder.glob("[!.]*")} == wanted
        for name, p in straight.named_parameters():
            assert torch.equal(again.get_parameter(name), p), name
    assert moments >= 3


def test_a_kill_before_the_checkpoints_are_deleted(model, enc, tmp_path, monkeypatch):
    import minigpt_lib.tuning.sft as sft

    TINY.add_lora(model)
    before = copy.deepcopy(model)
    options = {"cfg": TINY.train_config(6, steps=2), "recipe": TINY, "folder": tmp_path, "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(sft, "delete_checkpoints", lambda folder: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            finetune(model, enc, SIMPLE, **options)
    assert list(tmp_path.glob("checkpoint-*")) and (tmp_path / "training.json").is_file()
    finetune(before, enc, SIMPLE, resume=True, **options)
    assert not list(tmp_path.glob("checkpoint-*"))
    assert all(torch.equal(lora_parameters(before)[name], p) for name, p in lora_parameters(model).items())


def test_the_adapter_names_its_base(model, enc, tmp_path):
    TINY.add_lora(model)
    finetune(model, enc, SIMPLE, cfg=TINY.train_config(6, steps=1), recipe=TINY, folder=tmp_path, base_name="a/b",
             progress=False)  # fmt: skip
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "a/b"


def test_an_adapter_can_be_trained_on(model, enc, tmp_path):
    """Loaded, it starts where the other ended, and keeps its shape; the base stays as it was."""
    with torch.no_grad():
        model.wte.weight.mul_(10)
    base = copy.deepcopy(model)
    options = {"cfg": TINY.train_config(len(SIMPLE), steps=30), "recipe": TINY, "progress": False}
    first = finetune(TINY.add_lora(model), enc, SIMPLE, **options)
    save_adapter(model, tmp_path / "first")
    again = load_adapter(copy.deepcopy(base), tmp_path / "first")
    more = finetune(again, enc, SIMPLE, folder=tmp_path / "second", **options)
    assert more[0]["loss"] < first[0]["loss"] - 1, "it began anew"
    raw = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("first", "second")]
    assert [(r["r"], r["lora_alpha"]) for r in raw] == [(4, 8)] * 2
    assert all(torch.equal(again.get_parameter(name), p) for name, p in base.named_parameters())


# --- options


@pytest.mark.parametrize("change", [{"r": 4}, {"alpha": 2.0}, {"targets": ("c_attn",)}, {"dropout": 0.1}])
def test_what_shapes_an_adapter_is_refused_without_one(change):
    config = GPTConfig.preset("mini")
    with pytest.raises(ValueError, match=f"{next(iter(change))}=.* shapes an adapter, full fine-tuning has none"):
        recipe_for(config, full=True, **change)
    (name, value), = change.items()
    assert getattr(recipe_for(config, **change), name) == value
    assert recipe_for(config, full=True, epochs=3).epochs == 3 and recipe_for(config).epochs == 8


def test_precision_by_device():
    for kind, want in (("cuda", "auto"), ("cpu", "fp32"), ("mps", "fp32")):
        assert TINY.train_config(6, device=torch.device(kind)).precision == want
    assert TINY.train_config(6).precision == "fp32"
    assert TINY.train_config(6, device=torch.device("cuda"), precision="fp32").precision == "fp32"


def test_drawing_an_adapter_leaves_every_random_state(model, monkeypatch):
    """On a CUDA device its generator is covered too: the seed given for A must not stay behind in it."""
    import minigpt_lib.tuning.sft as sft

    before = torch.get_rng_state()
    TINY.add_lora(copy.deepcopy(model), 5)
    assert torch.equal(torch.get_rng_state(), before)
    covered, real = [], torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: covered.append(devices) or real([]))
    monkeypatch.setattr(sft, "add_lora", lambda model, *shape, **options: model)
    device = torch.device("cuda", 1)
    TINY.add_lora(types.SimpleNamespace(wte=types.SimpleNamespace(weight=types.SimpleNamespace(device=device))))
    TINY.add_lora(model)
    assert covered == [[device], []]
