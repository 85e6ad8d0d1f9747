"""The `minigpt` command: what it prints, what it writes, and that every error takes one line and gives exit code 2."""

import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scripted import TINY, byte_encoding, tiny_folder

from minigpt_lib.api import LLM
from minigpt_lib.chat.app import build_app, launch
from minigpt_lib.chat.models import load_models
from minigpt_lib.cli import build_parser, main
from minigpt_lib.generation.compiled import cpp_compiler
from minigpt_lib.generation.decode import generate
from minigpt_lib.generation.native import NativeGPT
from minigpt_lib.model.gpt import GPTConfig, GPTLanguageModel
from minigpt_lib.text.tokenizer import load_tokenizer
from minigpt_lib.tuning.lora import add_lora, lora_layers, lora_parameters
from minigpt_lib.tuning.metrics import reply
from minigpt_lib.tuning.peft_io import load_adapter, save_adapter
from minigpt_lib.weights.pretrained import load_pretrained, save_pretrained

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ["chat", "generate", "tokenizer", "pretrain", "finetune", "evaluate", "export", "verify"]


@pytest.fixture
def folder(tmp_path, seed, monkeypatch):
    monkeypatch.setenv("MINIGPT_DEVICE", "cpu")
    monkeypatch.chdir(tmp_path)
    return tiny_folder(tmp_path / "tiny")


def run(*words: object) -> int:
    """The exit code of `minigpt WORDS`, in this process."""
    try:
        return main([str(w) for w in words])
    except SystemExit as stop:
        return stop.code


# --- help


@pytest.mark.parametrize("command", [[], *[[c] for c in COMMANDS]])
def test_help_lists_every_option_with_its_default(command, capsys):
    assert run(*command, "--help") == 0
    text = capsys.readouterr().out
    assert all(c in text for c in (COMMANDS if not command else ["--model", "--device", "--debug"]))
    assert "None" not in text and "SUPPRESS" not in text


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_help_says_what_becomes_of_a_run_that_is_killed(command, capsys):
    assert run(command, "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "The same command goes on with an unfinished run, also after a kill" in shown
    assert "updates between checkpoints (default: " in shown


def test_help_and_errors_do_not_wait_for_torch():
    loaded = "print([m for m in ('torch', 'gradio', 'numpy') if m in sys.modules])"
    code = f"import sys, minigpt_lib.cli as c\ntry: c.main(sys.argv[1:])\nfinally: {loaded}"
    for words in (["--help"], ["generate", "--help"], ["nonsense"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.stdout.rstrip().endswith("[]"), done.stdout + done.stderr


def test_runs_as_a_module_and_without_a_command_shows_help():
    done = subprocess.run(
        [sys.executable, "-m", "minigpt_lib.cli"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and all(c in done.stdout for c in COMMANDS)


def test_every_command_takes_a_model():
    commands = next(a for a in build_parser()._actions if a.choices).choices
    assert list(commands) == COMMANDS
    for p in commands.values():
        assert any("--model" in a.option_strings and a.default == "mini" for a in p._actions)
    chat = build_parser().parse_args(["chat"])
    assert (chat.port, chat.adapter, chat.browser) == (7860, "auto", False)


# --- errors


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("generate Hi --model gpt5", "gpt5.*mini, gpt2"),
        ("generate Hi --model no/such", "no/such"),
        ("generate Hi --model {tiny} --top-p 2", r"top_p=2.0.*0.05 to 1"),
        ("generate Hi --model {tiny} --temperature nan", "temperature=nan.*0 to 2"),
        ("generate Hi --model {tiny} --max-new-tokens 0", "max_new_tokens=0.*1 to 1024"),
        ("generate Hi --model {tiny} --max-new-tokens many", "invalid int value: 'many'"),
        ("generate Hi --model {tiny} --device tpu", "tpu"),
        ("generate {long} --model {tiny}", "300 tokens.*n_ctx=256"),
        ("generate {blank} --model {tiny}", "prompt is empty"),
        ("generate {blank} --chat --model {tiny}", "prompt is empty"),
        ("generate Hi --model {tiny} --adapter nowhere", "nowhere"),
        ("chat --port 70000", "port=70000.*65535"),
        ("chat --port {busy}", "port {busy} .*--port"),
        ("pretrain --model {tiny} --data nowhere.txt --out new", "nowhere.txt"),
        ("pretrain --model {tiny} --data {text} --out {tiny}", "holds a model already"),
        ("pretrain --model {tiny} --data {text} --out new --window 999", "window=999.*n_ctx=256"),
        ("pretrain --model {tiny} --data {text} --out new --lr -1", "lr=-1.0"),
        ("finetune --model {tiny} --data nowhere.json", "nowhere.json"),
        ("finetune --model {tiny} --data {text}", "not JSON"),
        ("finetune --model {tiny} --data {bad} --out new", "record 2.*output"),
        ("finetune --model {tiny} --data {good} --r 999 --out new", "r=999.*32"),
        ("finetune --model {tiny} --data {good} --limit 0 --out new", "--limit 0 must be at least 1"),
        ("finetune --model {tiny} --data {good} --batch-size 0 --out new", "batch_size=0 must be at least 1"),
        ("finetune --model {tiny} --data {good} --lr -1 --out new", "lr=-1.0"),
        ("export --model {tiny} --merge --out new", "--merge needs the adapter"),
        ("export --model {tiny} --out {tiny}", "holds a model already"),
        ("export --model {tiny}", "required: --out"),
        ("nonsense", "nonsense"),
        ("generate Hi --nonsense", "--nonsense"),
    ],
)
def test_an_error_is_one_line_that_names_value_and_way_out(folder, tmp_path, capsys, words, says):
    import re
    import socket

    (tmp_path / "text.txt").write_text("Some words to learn. " * 100)
    records = [{"instruction": "Hi", "output": "Hello"}, {"instruction": "Bye"}]
    (tmp_path / "bad.json").write_text(json.dumps(records))
    (tmp_path / "good.json").write_text(json.dumps(records[:1]))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {
            "tiny": folder,
            "text": "text.txt",
            "bad": "bad.json",
            "good": "good.json",
            "busy": taken.getsockname()[1],
        }
        line = [w.format(**names, long="x" * 300, blank="  ") for w in words.split()]
        assert run(*line) == 2
    err = capsys.readouterr().err
    assert err.startswith("minigpt: ") and err.count("\n") == 1 and "Traceback" not in err
    assert re.search(says.format(**names) if "{busy}" in says else says, err), err
    assert not (tmp_path / "new" / "model.safetensors").exists()


def test_debug_shows_the_traceback(folder):
    with pytest.raises(ValueError, match="top_p=2"):
        main(["generate", "Hi", "--model", str(folder), "--top-p", "2", "--debug"])


def test_ctrl_c_is_not_a_traceback(folder, capsys, monkeypatch):
    import minigpt_lib.cli as cli

    def interrupted(args):
        raise KeyboardInterrupt("stopped after 3 of 9 steps: go on with folder='runs/base', resume=True")

    monkeypatch.setattr(cli, "run_generate", interrupted)
    assert run("generate", "Hi") == 130
    shown = capsys.readouterr().err
    assert shown == "\nminigpt: stopped after 3 of 9 steps: the same command goes on\n"


# --- generate


def test_generate_prints_the_prompt_and_what_the_library_generates(folder, capsys):
    assert run("generate", "Once upon", "--model", folder, "--temperature", 0, "--max-new-tokens", 30) == 0
    out = capsys.readouterr()
    models = load_models(folder, None, "cpu")
    idx = torch.tensor([models.enc.encode("Once upon")])
    ids = generate(models.base, idx, 30, temperature=0, stop_ids=(models.enc.eot_token,))[0].tolist()
    assert out.out == models.enc.decode([i for i in ids if i != models.enc.eot_token]) + "\n" and out.err == ""


def test_generate_answers_with_the_adapter_in_the_folder(folder, capsys):
    assert run("generate", "Who are you?", "--chat", "--model", folder, "--temperature", 0, "--max-new-tokens", 20) == 0
    tuned = load_models(folder, device="cpu")
    assert capsys.readouterr().out == reply(tuned.tuned, tuned.enc, "Who are you?", 20) + "\n"
    assert (
        run(
            "generate",
            "Who are you?",
            "--chat",
            "--adapter",
            "none",
            "--model",
            folder,
            "--temperature",
            0,
            "--max-new-tokens",
            20,
        )
        == 0
    )
    assert capsys.readouterr().out == reply(tuned.base, tuned.enc, "Who are you?", 20) + "\n"


def test_a_seed_repeats_and_the_cache_changes_nothing_but_the_time(folder, capsys, seed):
    texts = []
    for more in (["--seed", seed], ["--seed", seed], ["--seed", seed, "--no-cache"], ["--seed", seed + 1], []):
        assert run("generate", "Hi", "--model", folder, "--temperature", 1.5, "--top-k", 0, "--top-p", 1, *more) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2] and len(set(texts)) == 3


@pytest.mark.skipif(cpp_compiler() is None, reason="a step in C++ needs a compiler")
def test_the_fastest_exact_way_is_taken_unasked(folder, capsys, monkeypatch):
    called, call = [], NativeGPT._call
    monkeypatch.setattr(NativeGPT, "_call", lambda self, text: called.append(1) or call(self, text))
    texts = []
    for more in ([], ["--fast", "off"]):
        assert run("generate", "Hi", "--model", folder, "--temperature", 0, "--max-new-tokens", 20, *more) == 0
        texts.append((capsys.readouterr().out, len(called)))
    assert texts[0][0] == texts[1][0] and 0 < texts[0][1] == texts[1][1]


class Pipe:
    """Standard input as the system gives it: bytes below, text above."""

    def __init__(self, raw: bytes):
        self.buffer = io.BytesIO(raw)


def test_a_byte_that_is_no_utf8_costs_its_own_line_only(folder, capsys, monkeypatch):
    words = ["generate", "--lines", "--json", "--model", folder, "--max-new-tokens", 3]
    monkeypatch.setattr(sys, "stdin", Pipe(b"\xef\xbb\xbfone\r\ncaf\xe9\ntwo \xe4\xb8\xad\n"))
    assert run(*words) == 1
    out = capsys.readouterr()
    told = [json.loads(line) for line in out.out.splitlines()]
    assert [t["prompt"] for t in told] == ["one", "caf\ufffd", "two \u4e2d"]
    assert "line 2 is not UTF-8: byte 0xe9 at place 3" in told[1]["error"] and "error" not in told[2]
    out.out.encode()  # valid UTF-8


@pytest.mark.parametrize("raw", [b"caf\xe9", "Hi".encode("utf-16"), b"\xf0\x28\x8c\x28"])
def test_a_text_on_stdin_that_is_no_utf8_is_refused_with_its_place(folder, capsys, monkeypatch, raw):
    monkeypatch.setattr(sys, "stdin", Pipe(raw))
    assert run("generate", "--model", folder) == 2
    assert "standard input is not UTF-8: byte 0x" in capsys.readouterr().err


def test_a_prompt_with_stray_bytes_is_refused(folder, capsys):
    assert run("generate", "caf\udce9", "--model", folder) == 2
    assert "not UTF-8" in capsys.readouterr().err


def test_text_goes_out_as_utf8_in_any_locale(folder):
    command = [sys.executable, "-m", "minigpt_lib.cli", "generate", "--lines", "--device", "cpu"]
    command += ["--model", str(folder)]
    env = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    prompt = "caf\u00e9 \u4e2d\n".encode()
    done = subprocess.run(command, input=prompt, capture_output=True, cwd=ROOT, env=env, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith(prompt[:-1]), done.stderr


@pytest.mark.skipif(cpp_compiler() is None, reason="a step in C++ needs a compiler")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_fast_decodes_in_cpp_with_these_weights(folder, capsys, monkeypatch, kind):
    made, called = [], []

    class Spied(NativeGPT):
        def __init__(self, model, weights=None):
            super().__init__(model, weights)
            made.append((weights or "float32", self))

        def _call(self, text):
            called.append(text)
            return super()._call(text)

    monkeypatch.setattr("minigpt_lib.api.NativeGPT", Spied)
    words = ["generate", "Hi", "--model", folder, "--temperature", 0, "--max-new-tokens", 20]
    assert run(*words, "--fast", kind) == 0
    text, [(weights, fast)] = capsys.readouterr().out, made
    assert called and weights == kind and fast.h[0].mlp.c_fc.weight.dtype == getattr(torch, kind)
    models = load_models(folder, None, "cpu")
    idx = torch.tensor([models.enc.encode_ordinary("Hi")])
    wanted = generate(fast, idx, 20, temperature=0, stop_ids=[models.enc.eot_token])[0].tolist()
    assert text == models.enc.decode([i for i in wanted if i != models.enc.eot_token]) + "\n"
    if kind == "float32":
        assert run(*words) == 0 and capsys.readouterr().out == text


def test_fast_needs_a_compiler_and_says_so(folder, capsys, monkeypatch):
    words = ["generate", "Hi", "--model", folder, "--max-new-tokens", 3, "--fast"]
    assert run(*words, "int4") == 2 and "bfloat16" in capsys.readouterr().err
    for name in ("CXX", "PATH"):
        monkeypatch.setenv(name, "")
    assert run(*words, "int8") == 2
    assert "need a C++ compiler" in capsys.readouterr().err
    assert run(*words, "auto") == 0 and run(*words, "off") == 0  # nobody asked for C++


def test_the_prompt_may_come_from_stdin(folder, capsys, monkeypatch):
    for words in ([], ["-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("From a pipe\n"))
        assert run("generate", *words, "--model", folder, "--max-new-tokens", 3) == 0
        assert capsys.readouterr().out.startswith("From a pipe")


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_json_tells_what_was_written_and_what_it_cost(folder, capsys):
    words = ["--model", folder, "--temperature", 0, "--max-new-tokens", 9]
    assert run("generate", "Once <b>\u00e9\u4e2d", *words, "--json", "--seed", 3) == 0
    (told,) = lines(capsys)
    assert run("generate", "Once <b>\u00e9\u4e2d", *words) == 0
    assert told["prompt"] + told["text"] + "\n" == capsys.readouterr().out
    assert told["finish"] in ("length", "end") and told["tokens"] == 9 and told["prompt_tokens"] == 13
    assert told["seed"] == 3 and told["model"] == str(folder) and told["first_token_s"] > 0 and told["tokens_per_s"] > 0


def test_every_line_of_stdin_can_be_a_prompt_of_its_own(folder, capsys, monkeypatch):
    words = ["--model", folder, "--temperature", 0, "--max-new-tokens", 5, "--chat"]
    asked = ["Who?", "What is 2 < 3?", "  spaced"]
    alone = []
    for text in asked:
        assert run("generate", text, *words) == 0
        alone.append(capsys.readouterr().out)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([asked[0], "", *asked[1:]])))
    assert run("generate", "--lines", *words) == 1  # an answer for every line, an empty one for the empty line
    told = capsys.readouterr()
    assert told.out == "".join([alone[0], "\n", *alone[1:]]) and "line 2 is empty" in told.err
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(asked)))
    assert run("generate", "--lines", "--json", *words) == 0
    told = lines(capsys)
    assert [t["prompt"] for t in told] == asked and [t["text"] + "\n" for t in told] == alone


def test_a_line_that_cannot_be_answered_is_told_and_the_others_are_answered(folder, capsys, monkeypatch):
    text = "\n".join(["one", "x" * 300, "two"])
    for more, kind in (([], str), (["--json"], dict)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert run("generate", "--lines", "--model", folder, "--max-new-tokens", 3, *more) == 1
        out = capsys.readouterr()
        assert out.err.startswith("minigpt: 'xxx") and out.err.count("\n") == 1 and "300 tokens" in out.err
        if kind is dict:
            told = [json.loads(line) for line in out.out.splitlines()]
            assert [("error" in t, t["prompt"][:3]) for t in told] == [(False, "one"), (True, "xxx"), (False, "two")]
        else:
            assert out.out.startswith("one") and "\ntwo" in out.out and "xxx" not in out.out


def test_lines_are_answered_as_they_come(folder):
    """A script may hold the pipe open, ask, and read the answer before it asks again."""
    words = ["--lines", "--json", "--model", str(folder), "--max-new-tokens", "3", "--device", "cpu"]
    command, pipe = [sys.executable, "-m", "minigpt_lib.cli", "generate", *words], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True, bufsize=1) as process:
        for question in ("first", "second"):
            process.stdin.write(question + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["prompt"] == question
        process.stdin.close()
        assert process.wait(60) == 0


def test_the_adapters_strength_can_be_given(folder, capsys):
    texts, words = {}, ["--chat", "--model", folder, "--temperature", 0, "--max-new-tokens", 20]
    for strength in (0, 0.5, 1):
        assert run("generate", "Who are you?", *words, "--strength", strength) == 0
        texts[strength] = capsys.readouterr().out
    models = load_models(folder, device="cpu")
    for strength, text in texts.items():
        assert text == reply(models.at("adapter", strength), models.enc, "Who are you?", 20) + "\n"
    assert texts[0] != texts[1]


def test_a_generation_is_interrupted_with_exit_code_130(folder):
    import signal

    command = [sys.executable, "-u", "-m", "minigpt_lib.cli", "generate", "--lines", "--model", str(folder)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdin.write("Hi\n")
        process.stdin.flush()
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "Traceback" not in process.stderr.read()


def test_stats_and_a_full_context_are_told_on_stderr(folder, capsys):
    assert run("generate", "x" * 250, "--model", folder, "--top-k", 5, "--stats") == 0
    err = capsys.readouterr().err
    assert "stopped after 6 tokens, as all 256 positions are used" in err and "6 tokens, " in err and "tokens/s" in err


def test_a_closed_pipe_is_no_error(folder):
    command = [sys.executable, "-m", "minigpt_lib.cli", "generate", "Hi", "--model", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        err = process.stderr.read().decode()
        assert process.wait(120) == 0 and err == ""


# --- pretrain, finetune, export


def test_pretrain_writes_a_model_its_record_and_its_curve(folder, tmp_path, capsys):
    shape = tmp_path / "shape"
    shape.mkdir()
    byte_encoding(shape)
    (shape / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "train.txt").write_text("<|endoftext|>\n".join(f"{n} and {n} make {2 * n}.\n" for n in range(300)))
    (tmp_path / "heldout.txt").write_text("7 and 8 make 15. " * 40)
    words = [
        "pretrain",
        "--model",
        shape,
        "--data",
        "train.txt",
        "--out",
        "new",
        "--steps",
        12,
        "--batch-size",
        4,
        "--window",
        32,
    ]
    assert run(*words, "--lr", 0.01, "--seed", 5) == 0
    assert "new holds the model, held-out loss" in capsys.readouterr().out
    new = load_pretrained("new")
    assert new.config == TINY
    facts = json.loads(Path("new/training.json").read_text())
    assert set(facts) >= {
        "command",
        "seed",
        "config",
        "train",
        "history",
        "heldout_loss",
        "facts",
        "minutes",
        "machine",
    }
    assert (
        facts["command"].startswith("minigpt pretrain --model")
        and "--seed 5" in facts["command"]
        and facts["seed"] == 5
    )
    assert facts["config"]["n_embd"] == 32 and facts["train"]["steps"] == 12 and facts["facts"] is None
    losses = [step["loss"] for step in facts["history"]]
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert 0 < facts["heldout_loss"] < losses[0] + 1
    assert Path("new/loss.png").read_bytes().startswith(b"\x89PNG") and not list(Path("new").glob("checkpoint-*"))
    assert {p.name for p in Path("new").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.tiktoken"}
    assert run("generate", "7 and 8", "--model", "new", "--max-new-tokens", 3) == 0
    assert run(*words) == 2 and "already" in capsys.readouterr().err


def test_pretrain_builds_the_model_that_the_options_describe(folder, tmp_path, capsys):
    (tmp_path / "train.txt").write_text("one two three " * 400)
    assert run("tokenizer", "--data", "train.txt", "--vocab-size", 265, "--out", "voc") == 0
    words = ["pretrain", "--data", "train.txt", "--steps", 1, "--batch-size", 1, "--window", 8, "--tokenizer", "voc"]
    assert run(*words, "--n-layer", 1, "--n-head", 2, "--n-embd", 8, "--n-ctx", 32, "--out", "new") == 0
    new = load_pretrained("new")
    assert new.config == GPTConfig(vocab_size=265, n_ctx=32, n_embd=8, n_layer=1, n_head=2)
    assert load_tokenizer("new").encode("one two") == load_tokenizer("voc").encode("one two")
    capsys.readouterr()
    assert run(*words, "--init", folder, "--out", "other") == 2
    assert "--init goes on with a model as it is" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_and_ends_as_if_nothing_had_been(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "train.txt").write_text("One two three four five. " * 300)
    words = ["pretrain", "--model", folder, "--data", "train.txt", "--steps", 8, "--batch-size", 2, "--window", 16]
    assert run(*words, "--out", "whole") == 0
    import minigpt_lib.training.loop as training

    step, done = training.train_step, []

    def stopping(*args, **kwargs):
        done.append(1)
        if len(done) == 4:  # as Ctrl-C would, in the middle of the run
            import signal

            signal.raise_signal(signal.SIGINT)
        return step(*args, **kwargs)

    monkeypatch.setattr(training, "train_step", stopping)
    assert run(*words, "--out", "parts") == 130
    shown = capsys.readouterr().err
    assert "the same command goes on" in shown and "folder=" not in shown
    assert list(Path("parts").glob("checkpoint-*.pt")) and not Path("parts/model.safetensors").exists()
    monkeypatch.setattr(training, "train_step", step)
    assert run(*words, "--out", "parts") == 0
    whole, parts = (load_file(f"{name}/model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


@pytest.mark.parametrize("last", ["save_pretrained", "delete_checkpoints"])
def test_a_run_that_dies_in_its_last_moment_is_finished_by_the_same_command(folder, tmp_path, monkeypatch, last):
    (tmp_path / "train.txt").write_text("One two three four five. " * 300)
    words = ["pretrain", "--model", folder, "--data", "train.txt", "--steps", 4, "--batch-size", 2, "--window", 16]
    assert run(*words, "--out", "whole") == 0
    home = {"save_pretrained": "weights.pretrained", "delete_checkpoints": "training.checkpoint"}[last]

    def dies(*args, **kwargs):
        raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr(f"minigpt_lib.{home}.{last}", dies)
        assert run(*words, "--out", "parts") == 137
    assert run(*words, "--out", "parts") == 0
    whole, parts = (load_file(f"{name}/model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    assert not list(Path("parts").glob("checkpoint-*")) and Path("parts/training.json").is_file()


def test_finetune_writes_an_adapter_that_chat_and_peft_find(folder, tmp_path, capsys):
    records = [{"instruction": f"Say {w}.", "output": w} for w in ("yes", "no", "one", "two", "red", "blue")]
    for name in ("train", "val"):
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    words = ["finetune", "--model", folder, "--data", "train.json", "--epochs", 4, "--batch-size", 3, "--r", 2]
    assert run(*words, "--out", "adapter") == 0
    assert f"minigpt chat --model {folder} --adapter adapter" in capsys.readouterr().out
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert config["r"] == 2 and config["base_model_name_or_path"] == str(folder)
    facts = json.loads(Path("adapter/training.json").read_text())
    assert facts["records"] == 6 and facts["heldout_loss"] > 0 and len(facts["history"]) == 8
    tuned = load_adapter(load_pretrained(folder), "adapter")
    assert lora_layers(tuned) and load_models(folder, "adapter", "cpu").tuned is not None
    assert run(*words[:-2], "--full", "--steps", 3, "--out", "full") == 0
    assert not lora_layers(load_pretrained("full"))
    before, after = load_file(folder / "model.safetensors"), load_file("full/model.safetensors")
    assert any(not torch.equal(before[k], after[k]) for k in before)


def test_finetune_chooses_where_to_write_by_the_models_name(folder, tmp_path):
    (tmp_path / "train.json").write_text(json.dumps([{"instruction": "Hi", "output": "Hello"}]))
    assert run("finetune", "--model", folder, "--data", "train.json", "--steps", 1) == 0
    assert (tmp_path / "runs" / "tiny-adapter" / "adapter_model.safetensors").is_file()


def test_finetune_cleans_limits_and_packs(folder, tmp_path, capsys):
    records = [{"instruction": f"Say {n}.", "output": f"{n}."} for n in range(40)]
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    messy = [*records, chat, {"instruction": "Say nothing.", "output": ""}, records[3], None]
    (tmp_path / "messy.jsonl").write_text("\n".join(map(json.dumps, messy)))
    words = ["finetune", "--model", folder, "--data", "messy.jsonl", "--steps", 2, "--out", "tuned"]
    assert run(*words) == 2 and "record 42" in capsys.readouterr().err
    assert run(*words, "--clean", "--limit", 20, "--pack") == 0
    said = capsys.readouterr().err
    assert "kept 41 records, dropped 3" in said and "dropped record 42: the field 'output'" in said
    assert "dropped record 43: duplicate of record 4" in said and "dropped record 44: expected an object" in said
    facts = json.loads(Path("tuned/training.json").read_text())
    assert facts["records"] == 20 and facts["heldout_loss"] > 0


def test_cleaning_that_leaves_nothing_says_so(folder, tmp_path, capsys):
    (tmp_path / "bad.json").write_text(json.dumps([{"instruction": "Hi", "output": ""}] * 3))
    assert run("finetune", "--model", folder, "--data", "bad.json", "--clean", "--out", "tuned") == 2
    said = capsys.readouterr().err
    assert "kept 0 records, dropped 3" in said and "bad.json holds no record that can be learnt" in said


def test_an_interrupted_tuning_goes_on(folder, tmp_path, capsys, monkeypatch):
    import signal

    import minigpt_lib.training.loop as training

    records = [{"instruction": f"Say {n}.", "output": f"{n}."} for n in range(12)]
    (tmp_path / "train.json").write_text(json.dumps(records))
    words = ["finetune", "--model", folder, "--data", "train.json", "--steps", 6, "--batch-size", 3, "--seed", 4]
    assert run(*words, "--out", "whole") == 0
    step, done = training.train_step, []

    def press(*args, **kwargs):
        done.append(1)
        if len(done) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(*args, **kwargs)

    monkeypatch.setattr(training, "train_step", press)
    assert run(*words, "--out", "parts") == 130 and "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(training, "train_step", step)
    assert run(*words, "--out", "parts", "--resume", "--gradient-checkpointing") == 0  # this changes no result
    whole, parts = (load_file(f"{name}/adapter_model.safetensors") for name in ("whole", "parts"))
    assert all(torch.allclose(whole[k], parts[k], atol=1e-6) for k in whole) and any(t.any() for t in whole.values())


def test_the_recipe_for_gpt2_runs_through_without_official_weights(gpt2_encoding, tmp_path, monkeypatch, capsys):
    """The command of the course's recipe, on random weights; the preset is narrow in depth here, not in width."""
    import minigpt_lib.model.gpt as model
    import minigpt_lib.tuning.cleaning as records

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIGPT_DEVICE", "cpu")
    monkeypatch.setitem(model.PRESETS, "gpt2", (50257, 64, 768, 1, 12))
    said = [{"instruction": f"Say {n}.", "input": "", "output": f"{n} it is."} for n in range(60)]
    (tmp_path / "alpaca.json").write_text(json.dumps(said))
    monkeypatch.setattr(records, "fetch_alpaca", lambda place: tmp_path / "alpaca.json")
    words = ["finetune", "--model", "gpt2", "--data", "alpaca", "--limit", 8, "--untrained", "--out", "tuned"]
    assert run(*words) == 0 and "minigpt chat --model gpt2 --adapter tuned" in capsys.readouterr().out
    facts, config = (json.loads(Path("tuned", name).read_text()) for name in ("training.json", "adapter_config.json"))
    assert facts["records"] == 8 and facts["train"]["steps"] == 3 and facts["train"]["lr"] == 2e-4
    assert facts["heldout_loss"] > 0 and Path("tuned/loss.png").read_bytes().startswith(b"\x89PNG")
    assert (config["r"], config["target_modules"]) == (8, ["c_attn"])
    assert config["base_model_name_or_path"] == "openai-community/gpt2"
    assert any(t.any() for name, t in load_file("tuned/adapter_model.safetensors").items() if "lora_B" in name)


def test_finetune_fetches_alpaca_when_asked(folder, tmp_path, monkeypatch, capsys):
    import minigpt_lib.tuning.cleaning as records

    file = tmp_path / "alpaca.json"
    file.write_text(json.dumps([{"instruction": f"Say {n}.", "input": "", "output": f"{n}."} for n in range(60)]))
    asked = []
    monkeypatch.setattr(records, "fetch_alpaca", lambda place: asked.append(place) or file)
    assert run("finetune", "--model", folder, "--data", "alpaca", "--limit", 12, "--steps", 1, "--out", "tuned") == 0
    assert asked == ["runs/alpaca"] and "kept 60 records, dropped 0" in capsys.readouterr().err
    assert json.loads(Path("tuned/training.json").read_text())["records"] == 12


def test_export_merges_what_transformers_then_computes(folder, seed):
    transformers = pytest.importorskip("transformers", reason="the oracle is Transformers")
    assert run("export", "--model", folder, "--adapter", folder / "adapter", "--merge", "--out", "merged") == 0
    oracle = transformers.AutoModelForCausalLM.from_pretrained("merged").eval()
    tuned = load_models(folder, device="cpu").tuned
    idx = torch.randint(256, (2, 30))
    with torch.no_grad():
        gap = (oracle(idx).logits - tuned(idx)[0]).abs().max().item()
    assert gap <= 1e-4, gap
    alone = load_models("merged", device="cpu")
    assert alone.tuned is alone.base


def test_export_without_merging_keeps_base_and_adapter_apart(folder, seed, capsys):
    assert run("export", "--model", folder, "--adapter", folder / "adapter", "--out", "pair") == 0
    before, after = load_file(folder / "model.safetensors"), load_file("pair/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    ours, theirs = load_models("pair", device="cpu"), load_models(folder, device="cpu")
    idx = torch.randint(257, (1, 20))
    assert ours.tuned is not ours.base and torch.equal(ours.tuned(idx)[0], theirs.tuned(idx)[0])


def test_export_of_a_model_alone_round_trips(folder):
    assert run("export", "--model", folder, "--out", "copy") == 0
    again = save_pretrained(load_pretrained("copy"), "again", byte_encoding(folder))
    for name in ("config.json", "model.safetensors", "tokenizer.tiktoken"):
        assert Path("copy", name).read_bytes() == (again / name).read_bytes()


# --- tokenizer, evaluate, version


def test_a_tokenizer_is_learnt_and_serves_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("one two three one two three " * 50)
    (tmp_path / "b c.txt").write_bytes(b"\xef\xbb\xbfvier f\xc3\xbcnf " * 9)
    assert run("tokenizer", "--data", "a.txt", "b c.txt", "--vocab-size", 270, "--out", "new voc") == 0
    told = capsys.readouterr().out
    assert "--tokenizer 'new voc'" in told
    enc = load_tokenizer("new voc")
    assert enc.n_vocab == 270 and enc.eot_token == 269 and len(enc.encode(" three")) < 6
    assert run("tokenizer", "--data", "a.txt", "--vocab-size", 270, "--out", "new voc") == 2
    assert "holds a tokenizer already" in capsys.readouterr().err
    (tmp_path / "bad.txt").write_bytes(b"ok \xff")
    assert run("tokenizer", "--data", "bad.txt", "--out", "other") == 2
    assert "bad.txt is not UTF-8: byte 0xff at place 3" in capsys.readouterr().err and not Path("other").exists()


def test_evaluate_measures_texts_and_questions(folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("Some words, more than the model has positions. " * 9)
    question = {"prompt": "Say", "choices": [" yes", " no"], "answer": 0}
    llm = LLM.load(folder, adapter=None)
    nats = [llm.score(c, context="Say").total / len(c) for c in question["choices"]]
    best = nats.index(min(nats))
    lines = [question | {"answer": a} for a in (best, best, 1 - best)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["evaluate", "--model", folder, "--data", "text.txt", "--choices", "q.jsonl"]
    assert run(*words, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    score = llm.score((tmp_path / "text.txt").read_text())
    assert told["text.txt"]["tokens"] == len(score.nats) == 423
    assert told["text.txt"]["nats_per_token"] == round(score.mean, 4)
    assert told["text.txt"]["perplexity"] == round(score.perplexity, 3)
    assert abs(told["text.txt"]["bits_per_byte"] - score.total / 423 / 0.6931472) < 1e-4  # here a token is a byte
    assert told["q.jsonl"] == {"questions": 3, "right": 2, "share": 0.6667}
    assert run(*words, "--stride", 1) == 0
    assert "text.txt: tokens 423, nats per token" in capsys.readouterr().out
    assert run(*words[:3], "--adapter", folder / "adapter", "--data", "text.txt", "--json") == 0
    assert json.loads(capsys.readouterr().out)["text.txt"] != told["text.txt"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2: expected"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "line 2"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "line 2"),
        ('{"prompt": "a", "choices": ["b", ""], "answer": 0}', "line 2"),
    ],
)
def test_a_question_that_is_none_is_named(folder, tmp_path, capsys, line, says):
    good = json.dumps({"prompt": "a", "choices": ["b", "c"], "answer": 1})
    (tmp_path / "q.jsonl").write_text(f"{good}\n{line}\n")
    assert run("evaluate", "--model", folder, "--choices", "q.jsonl") == 2
    assert says in capsys.readouterr().err


def test_evaluate_wants_something_to_measure(folder, capsys):
    assert run("evaluate", "--model", folder) == 2 and "--data TEXT" in capsys.readouterr().err
    (folder.parent / "none.jsonl").write_text("\n")
    assert run("evaluate", "--model", folder, "--choices", "none.jsonl") == 2
    assert "no question" in capsys.readouterr().err


def test_the_version_can_be_asked_for(capsys):
    import minigpt_lib

    assert run("--version") == 0 and capsys.readouterr().out == f"minigpt {minigpt_lib.__version__}\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("finetune --full --r 4", "belong to LoRA: leave them out, or leave --full out"),
        ("finetune --adapter some --alpha 4", "--adapter goes on with an adapter as it is"),
        ("verify mini --openai --update", "leave --openai out"),
        ("verify mini --model gpt2", "two models are named, mini and --model gpt2"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(folder, capsys, words, says):
    assert run(*words.split()) == 2 and says in capsys.readouterr().err


# --- chat


def test_chat_serves_the_page_until_it_is_interrupted(folder):
    import signal
    import urllib.request

    pytest.importorskip("gradio", reason="the chat app needs Gradio")
    command = [sys.executable, "-u", "-m", "minigpt_lib.cli", "chat", "--model", str(folder), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        address = line.split()[3]
        assert line.startswith("MiniGPT is at http://127.0.0.1:") and "Ctrl-C" in line
        with urllib.request.urlopen(address, timeout=60) as page:
            assert page.status == 200 and "MiniGPT" in page.read().decode()
        process.send_signal(signal.SIGINT)
        guard = threading.Timer(60, process.kill)  # without an end, leaving the block would wait for ever
        guard.start()
        assert process.wait() in (0, 130) and "Traceback" not in process.stderr.read()
        guard.cancel()


def test_chat_and_generate_take_gpt2s_vocabulary_and_an_adapter_from_elsewhere(gpt2_encoding, tmp_path, capsys):
    """The way of `--model gpt2 --adapter FOLDER`, with a small random model in the place of OpenAI's weights."""
    pytest.importorskip("gradio", reason="the chat app needs Gradio")
    config = GPTConfig(vocab_size=50257, n_ctx=64, n_embd=16, n_layer=1, n_head=2)
    model = GPTLanguageModel(config)
    save_pretrained(model, tmp_path / "model", gpt2_encoding)
    add_lora(model, r=2)
    with torch.no_grad():
        for p in lora_parameters(model).values():
            p.normal_()
    save_adapter(model, tmp_path / "mine", "gpt2")
    words = ["--model", str(tmp_path / "model"), "--adapter", str(tmp_path / "mine")]
    assert main(["generate", "Hello", "--chat", "--json", "--max-new-tokens", "4", *words]) == 0
    assert 1 <= json.loads(capsys.readouterr().out)["tokens"] <= 4
    app = build_app(tmp_path / "model", tmp_path / "mine", "cpu")
    address = launch(app, 0, block=False)
    try:
        from gradio_client import Client

        ours = Client(address, verbose=False, analytics_enabled=False)
        chat = ours.view_api(return_format="dict", print_info=False)["named_endpoints"]["/chat"]["parameters"]
        assert {p["parameter_name"]: p["parameter_default"] for p in chat}["adapter"] == "mine"
        page = ours.predict(message="Hi", max_new_tokens=4, api_name="/chat")[1]
        assert [m["role"] for m in page] == ["user", "assistant"]
    finally:
        app.close(verbose=False)


@pytest.mark.parametrize("command", ["chat --port 0", "generate Hi"])
def test_gpt2_without_its_weights_is_one_line_with_ways_out_and_exit_code_2(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(*command.split(), "--model", "gpt2") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "gpt2" in told and "HF_HOME" in told and "local folder" in told
