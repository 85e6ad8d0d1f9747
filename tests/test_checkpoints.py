"""minigpt_lib.training.checkpoint and minigpt_lib.atomic: real kills, damaged files, full disks, Ctrl-C."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import build, flat, losses, windows_of

from minigpt_lib import atomic as files
from minigpt_lib.atomic import write_atomically
from minigpt_lib.training.checkpoint import (
    checkpoints,
    delete_checkpoints,
    find_checkpoint,
    load_checkpoint,
    run_lock,
    save_checkpoint,
)
from minigpt_lib.training.optim import TrainConfig, configure_optimizer
from minigpt_lib.training.run import interrupt_flag, train

ROOT = Path(__file__).resolve().parents[1]
RUN = TrainConfig(steps=12, lr=3e-3, warmup=3, accumulate=2, checkpoint_every=3)


def whole_run(seed):
    return train(build(seed, dropout=0.1), windows_of(seed).batch, RUN, progress=False)


# ---- kills ----------------------------------------------------------------------------------------------------------

ZYGOTE = """
import os, sys
sys.path.insert(0, "tests")
import torch
import torch._dynamo  # which every optimizer wants, and which takes seconds to import
import test_checkpoints as t
folder, seed, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for line in sys.stdin:  # before any arithmetic, so that every child starts its own threads
    child = os.fork()
    if child == 0:
        torch.set_num_threads(threads)
        t.long_run(folder, seed)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


def long_run(folder, seed, **options):
    """What is killed again and again: always the same call."""
    cfg = replace(RUN, steps=10_000, checkpoint_every=1)
    options = {"folder": folder, "resume": "auto", "progress": False} | options
    return train(build(seed, dropout=0.1), windows_of(seed).batch, cfg, **options)


def newest_step(folder) -> int:
    found = checkpoints(folder)[:1]
    return int(found[0].stem.split("-")[1]) if found else 0


def wait_until(condition: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


def test_twenty_kills_at_random_moments_change_nothing(tmp_path, seed):
    """kill -9, the same call again, twenty times and more; then every loss is that of a run that was never killed.

    Two of three times the kill waits for a checkpoint of the new process, however slow the machine is, and comes a
    random part of a step later; else it comes as early as it can.
    """
    rng, log = random.Random(seed), tmp_path / "history.jsonl"
    command = [sys.executable, "-c", ZYGOTE, str(tmp_path), str(seed), str(torch.get_num_threads())]
    zygote = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    progress, in_a_write = [], 0
    try:
        for number in range(24):
            zygote.stdin.write("go\n")
            pid, before = int(zygote.stdout.readline()), newest_step(tmp_path)
            if number % 3 != 1:
                wait_until(lambda before=before: newest_step(tmp_path) > before)
            time.sleep(rng.uniform(0, 0.05))
            os.kill(pid, signal.SIGKILL)
            assert zygote.stdout.readline() == "ended\n"
            in_a_write += any(tmp_path.glob(".checkpoint-*"))
            progress.append(newest_step(tmp_path))
    finally:
        zygote.stdin.close()
        zygote.wait(timeout=60)
    print(f"{len(progress)} kills, {in_a_write} of them in a write, after these steps: {progress}")
    assert progress == sorted(progress) and len(set(progress)) >= 16, "the run went on between the kills"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing was torn
        newest = torch.load(find_checkpoint(tmp_path), weights_only=True)
    done = newest["step"]

    def stop_after(record):
        if record["step"] == done + 2:
            raise RuntimeError("enough")

    runs = []
    for folder in (tmp_path, None):
        seen = []
        with pytest.raises(RuntimeError, match="enough"):
            watch = lambda r, seen=seen: seen.append(r["loss"]) or stop_after(r)  # noqa: E731
            long_run(folder, seed, on_step=watch, resume="auto" if folder else False)
        runs.append(seen)
    resumed, straight = runs
    assert len(resumed) == 3 and resumed == straight[done:], f"killed after {done} steps (seed {seed})"
    assert losses(newest["history"]) == straight[:done], f"seed {seed}"
    assert [json.loads(line)["loss"] for line in log.read_text().splitlines()] == straight


STOPS = """
import sys, time
import minigpt_lib.training.run as run
save, stop_at = run.save_checkpoint, int(sys.argv.pop(1))
def save_and_wait(folder, model, optimizer, step, *rest, **more):
    save(folder, model, optimizer, step, *rest, **more)
    if step == stop_at:
        print("saved", flush=True)
        time.sleep(600)
run.save_checkpoint = save_and_wait
sys.exit(run.run_training(sys.argv[1:]))
"""


def test_the_same_command_goes_on_after_kills(tmp_path, seed):
    """Killed after two of its checkpoints and after its last one, then left alone: as if never killed."""
    rng = random.Random(seed)
    (tmp_path / "text.txt").write_text(" ".join(rng.choices(["one", "two", "red", "blue", "bird.", "stone"], k=3000)))
    words = [str(tmp_path / "text.txt"), "--window", "16", "--steps", "12", "--batch-size", "2", "--seed", str(seed)]
    words += ["--device", "cpu", "--precision", "fp32", "--eval-every", "12", "--checkpoint-every", "1", "--out"]
    options = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "text": True}
    stops = [rng.randint(1, 5), rng.randint(6, 11), 12]
    for stop in stops:
        command = [sys.executable, "-c", STOPS, str(stop), *words, str(tmp_path / "killed")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **options)
        assert process.stdout.readline() == "saved\n"
        process.kill()
        assert process.wait(60) == -signal.SIGKILL and newest_step(tmp_path / "killed") == stop
    for name in ("killed", "straight"):
        command = [sys.executable, "-m", "minigpt_lib.training.run", *words, str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, timeout=300, **options)
        assert done.returncode == 0, done.stderr
    killed, straight = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "history.jsonl").read_text().splitlines()]
        for name in ("killed", "straight")
    )
    assert killed == straight and len(set(straight)) == 12, f"killed after {stops} steps (seed {seed})"


# ---- one process a folder -------------------------------------------------------------------------------------------

HOLDER = """
import sys
from minigpt_lib.training.checkpoint import run_lock
try:
    with run_lock(sys.argv[1]):
        print("holds", flush=True)
        sys.stdin.readline()
except BlockingIOError as error:
    print(error, flush=True)
"""


def holder(folder) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLDER, str(folder)]
    options = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "text": True}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)


def test_two_processes_at_once_do_not_share_a_folder(tmp_path, seed):
    processes = [holder(tmp_path / "run") for _ in range(2)]  # at the same time
    said = [process.stdout.readline().strip() for process in processes]
    assert sorted(line == "holds" for line in said) == [False, True], said
    winner, refused = sorted(zip(processes, said, strict=True), key=lambda pair: pair[1] != "holds")
    assert f"is in use by process {winner[0].pid} on " in refused[1] and "choose another folder" in refused[1]
    with pytest.raises(BlockingIOError, match=f"is in use by process {winner[0].pid} on "):
        train(build(seed), windows_of(seed).batch, RUN, folder=tmp_path / "run", progress=False)
    winner[0].kill()  # a kill leaves nothing that has to be cleared away
    winner[0].wait(60)
    assert len(train(build(seed), windows_of(seed).batch, RUN, folder=tmp_path / "run", progress=False)) == 12
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_lock_is_for_one_thread_and_may_be_taken_again_inside(tmp_path):
    refused = []

    def other():
        try:
            with run_lock(tmp_path):
                refused.append(False)
        except BlockingIOError:
            refused.append(True)

    with run_lock(tmp_path), run_lock(str(tmp_path)):
        for _ in range(2):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        child = os.fork()
        if child == 0:  # a process that was forked while the lock was held does not hold it
            other()
            os._exit(0 if refused[-1] else 1)
        assert os.waitpid(child, 0)[1] == 0
    other()
    assert refused == [True, True, False]


# ---- damaged files and full disks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", [0.0, 0.3, 0.9, 0.999, "bit", "text"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, harm, seed):
    cfg = replace(RUN, steps=6)
    expected = train(build(seed), windows_of(seed).batch, cfg, folder=tmp_path, progress=False)
    newest, older = checkpoints(tmp_path)
    assert find_checkpoint(tmp_path) == newest and older.name == "checkpoint-00000003.pt"
    data = bytearray(newest.read_bytes())
    if harm == "bit":
        at = data.find(b"ln_f.weight") if random.Random(seed).random() < 0.5 else len(data) // 2
        data[at] ^= 4
    elif harm == "text":
        data = bytearray(b"not a checkpoint at all")
    else:
        data = data[: int(len(data) * harm)]
    newest.write_bytes(data)
    with pytest.warns(UserWarning, match=r"checkpoint-00000006\.pt is damaged: it is skipped"):
        again = train(build(seed + 1), windows_of(seed).batch, cfg, folder=tmp_path, resume=True, progress=False)
    assert losses(again) == losses(expected), f"seed {seed}"
    assert find_checkpoint(tmp_path) == newest, "written anew"
    for path in checkpoints(tmp_path):
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="every checkpoint in .* is damaged"), pytest.warns(UserWarning):
        train(build(seed), windows_of(seed).batch, cfg, folder=tmp_path, resume=True, progress=False)


def test_a_file_of_another_kind_is_refused(tmp_path, seed):
    torch.save({"something": "else"}, tmp_path / "checkpoint-00000001.pt")
    model = build(seed)
    with pytest.raises(ValueError, match="is not a checkpoint of this library"):
        load_checkpoint(tmp_path, model, configure_optimizer(model, RUN), RUN)


@contextmanager
def small_disk() -> Iterator[Callable[[int], None]]:
    """As on a disk that fills up: once the function is called, no file may grow beyond so many bytes.

    The limit is this process's own and ends with the block, since pytest writes its report to a file too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_clear_error_and_the_last_checkpoint_stays(tmp_path, seed):
    model, folder = build(seed), tmp_path / "run"
    optimizer = configure_optimizer(model, RUN)
    save_checkpoint(folder, model, optimizer, 1, [], RUN)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    no_room = r"no room to write .*checkpoint-00000002\.pt .*make room and try again"
    with small_disk() as fill, pytest.raises(OSError, match=no_room):
        fill(20_000)
        save_checkpoint(folder, model, optimizer, 2, [], RUN)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert load_checkpoint(folder, model, optimizer, RUN)[0] == 1


def test_a_disk_that_fills_up_stops_a_run_that_can_go_on(tmp_path, seed):
    with small_disk() as fill, pytest.raises(OSError, match="no room to write"):
        late = lambda record: fill(20_000) if record["step"] == 4 else None  # noqa: E731
        train(build(seed), windows_of(seed).batch, RUN, folder=tmp_path, on_step=late, progress=False)
    resumed = train(build(seed), windows_of(seed).batch, RUN, folder=tmp_path, resume=True, progress=False)
    assert losses(resumed) == losses(train(build(seed), windows_of(seed).batch, RUN, progress=False)), f"seed {seed}"


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, seed, monkeypatch):
    model = build(seed)
    optimizer = configure_optimizer(model, RUN)
    save_checkpoint(tmp_path, model, optimizer, 1, [], RUN)

    def torn(state, file):
        file.write(b"half")
        raise OSError("the cable is loose")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="the cable is loose"):
        save_checkpoint(tmp_path, model, optimizer, 2, [], RUN)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000001.pt"]


def test_two_checkpoints_are_kept_and_leftovers_of_kills_removed(tmp_path, seed):
    model = build(seed)
    optimizer = configure_optimizer(model, RUN)
    (tmp_path / ".checkpoint-00000001.pt.tmp").write_bytes(b"half of")
    for step in (1, 2, 10, 9):
        save_checkpoint(tmp_path, model, optimizer, step, [], RUN)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-00000010.pt", "checkpoint-00000009.pt"]
    assert len(list(tmp_path.iterdir())) == 2
    delete_checkpoints(tmp_path)
    assert not list(tmp_path.iterdir()) and find_checkpoint(tmp_path) is None


def test_files_are_flushed_before_they_are_renamed(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(files.os, name)
        monkeypatch.setattr(files.os, name, lambda *a, name=name, real=real: calls.append(name) or real(*a))
    write_atomically(tmp_path / "new" / "a.txt", lambda p: p.write_text("x"))
    assert calls == ["fsync", "replace", "fsync"] and (tmp_path / "new" / "a.txt").read_text() == "x"


# ---- what is in a checkpoint, and for whom --------------------------------------------------------------------------


def test_another_corpus_is_refused(tmp_path, seed):
    train(build(seed), windows_of(seed).batch, RUN, folder=tmp_path, data={"tokens": "abc"}, progress=False)
    options = {"folder": tmp_path, "resume": True, "progress": False}
    with pytest.raises(ValueError, match="another run: tokens is abc there and xyz here"):
        train(build(seed), windows_of(seed).batch, RUN, data={"tokens": "xyz"}, **options)
    assert len(train(build(seed), windows_of(seed).batch, RUN, data={"tokens": "abc"}, **options)) == 12


def test_auto_starts_or_goes_on(tmp_path, seed):
    options = {"folder": tmp_path, "resume": "auto", "progress": False}
    first = train(build(seed), windows_of(seed).batch, RUN, **options)
    again = train(build(seed + 1), windows_of(seed).batch, RUN, **options)
    assert again == first and len(first) == 12, "the finished run was found"
    with pytest.raises(ValueError, match="resume='maybe' must be True or False"):
        train(build(seed), windows_of(seed).batch, RUN, **(options | {"resume": "maybe"}))


def test_the_scaler_of_fp16_is_stored(tmp_path, seed):
    cfg = replace(RUN, precision="fp16")

    def fail(record):
        if record["step"] == 7:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError):
        train(build(seed), windows_of(seed).batch, cfg, folder=tmp_path, on_step=fail, progress=False)
    stored = torch.load(find_checkpoint(tmp_path), weights_only=True)["scaler"]
    assert stored["scale"] >= 1 and stored["_growth_tracker"] > 0
    resumed = train(build(seed), windows_of(seed).batch, cfg, folder=tmp_path, resume=True, progress=False)
    whole = train(build(seed), windows_of(seed).batch, cfg, folder=tmp_path / "whole", progress=False)
    assert losses(resumed) == losses(whole), f"seed {seed}"
    ends = [torch.load(find_checkpoint(at), weights_only=True)["scaler"] for at in (tmp_path, tmp_path / "whole")]
    assert ends[0] == ends[1], "the scaler went on counting where it had stopped"


# ---- resuming, and Ctrl-C -------------------------------------------------------------------------------------------


def test_frozen_parameters_stay_and_are_not_stored(tmp_path, seed):
    model = build(seed)
    for name, p in model.named_parameters():
        p.requires_grad_("c_attn" in name)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, windows_of(seed).batch, TrainConfig(steps=3), folder=tmp_path, progress=False)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) is ("c_attn" not in name), name
    stored = torch.load(find_checkpoint(tmp_path), weights_only=True)["model"]
    assert stored and all("c_attn" in name for name in stored)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        train(model, windows_of(seed).batch, TrainConfig(steps=1), progress=False)


@pytest.mark.parametrize("at", [2, 3, 7])
def test_resume_is_bit_equal(tmp_path, at, seed):
    def fail(record):
        if record["step"] == at:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError):
        options = {"on_step": fail, "folder": tmp_path, "progress": False}
        train(build(seed, dropout=0.1), windows_of(seed).batch, RUN, **options)
    if at == 2:  # killed before the first checkpoint: the same call starts
        options = {"folder": tmp_path, "resume": True, "progress": False}
        again = train(build(seed, dropout=0.1), windows_of(seed).batch, RUN, **options)
        assert losses(again) == losses(whole_run(seed)), f"seed {seed}"
        return
    model, seen = build(seed + 1, dropout=0.1), []  # other weights: all must come from the file
    resumed = train(
        model, windows_of(seed).batch, RUN, folder=tmp_path, resume=True, on_step=seen.append, progress=False
    )
    assert seen[0]["step"] == at // 3 * 3, "goes on after the last checkpoint"
    straight = build(seed, dropout=0.1)
    expected = train(straight, windows_of(seed).batch, RUN, progress=False)
    assert losses(resumed) == losses(expected) and [r["step"] for r in resumed] == list(range(12)), f"seed {seed}"
    assert torch.equal(flat(model), flat(straight)), f"seed {seed}"
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 12
    again = train(build(seed, dropout=0.1), windows_of(seed).batch, RUN, folder=tmp_path, resume=True, progress=False)
    assert losses(again) == losses(expected), "a finished run is not run again"


def test_a_checkpoint_of_something_else_is_refused_and_changes_nothing(tmp_path, seed):
    train(build(seed), windows_of(seed).batch, RUN, folder=tmp_path, progress=False)

    def refuse(model, cfg, message):
        before = flat(model)
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path, model, configure_optimizer(model, cfg), cfg)
        assert torch.equal(flat(model), before)

    refuse(build(seed, n_layer=1), RUN, "another model: n_layer is 2 there and 1 here")
    refuse(build(seed, n_head=2), RUN, "another model: n_head is 3 there and 2 here")
    refuse(build(seed), replace(RUN, lr=1e-3), "another TrainConfig: lr is 0.003 there and 0.001 here")
    refuse(build(seed), replace(RUN, steps=11), "has 12 steps behind it, more than steps=11")
    frozen = build(seed)
    frozen.wpe.weight.requires_grad_(False)
    refuse(frozen, RUN, r"another set of trained parameters: wpe\.weight")
    model = build(seed + 1)
    loose = replace(RUN, eval_every=5, checkpoint_every=0, checkpoint_minutes=1.0)  # these change no weight
    step, history = load_checkpoint(tmp_path, model, configure_optimizer(model, loose), loose)
    assert step == 12 and len(history) == 12
    with pytest.raises(ValueError, match="resume=True needs folder"):
        train(build(seed), windows_of(seed).batch, RUN, resume=True, progress=False)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, sent, seed):
    def press(record):
        if record["step"] == 4:
            signal.raise_signal(sent)

    handler = signal.getsignal(sent)
    options = {"on_step": press, "progress": False}
    with pytest.raises(KeyboardInterrupt, match=r"stopped after 5 of 12 steps: .*resume=True"):
        train(build(seed, dropout=0.1), windows_of(seed).batch, RUN, folder=tmp_path, **options)
    with pytest.raises(KeyboardInterrupt, match="stopped after 5 of 12 steps: nothing is saved"):
        train(build(seed, dropout=0.1), windows_of(seed).batch, RUN, **options)
    assert signal.getsignal(sent) is handler
    resumed = train(build(seed, dropout=0.1), windows_of(seed).batch, RUN, folder=tmp_path, resume=True, progress=False)
    assert losses(resumed) == losses(whole_run(seed)), f"seed {seed}"


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupt_flag() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.is_set() and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_checkpoints_come_by_the_clock_too(tmp_path, seed, monkeypatch):
    import minigpt_lib.training.run as module

    saved, now, real = [], [0.0], module.save_checkpoint
    monkeypatch.setattr(module, "time", type("Clock", (), {"monotonic": staticmethod(lambda: now[0])}))
    monkeypatch.setattr(module, "save_checkpoint", lambda *a, **k: saved.append(a[3]) or real(*a, **k))

    def later(record):
        now[0] += 25.0

    cfg = replace(RUN, checkpoint_every=0, checkpoint_minutes=1.0)
    train(build(seed), windows_of(seed).batch, cfg, folder=tmp_path / "a", on_step=later, progress=False)
    assert saved == [3, 6, 9, 12], "after 75 s each, the first moment that a minute has passed"
    saved.clear()
    cfg = replace(cfg, checkpoint_minutes=0.0)
    train(build(seed), windows_of(seed).batch, cfg, folder=tmp_path / "b", on_step=later, progress=False)
    assert saved == [12]


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path, seed):
    """Its checkpoints would be removed as the older ones, since they have fewer steps."""
    train(build(seed), windows_of(seed).batch, RUN, folder=tmp_path, progress=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"holds the checkpoints of a run: resume=True goes on with it"):
        train(build(seed), windows_of(seed).batch, RUN, folder=tmp_path, progress=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_second_ctrl_c_stops_at_once_and_threads_may_train(seed):
    with pytest.raises(KeyboardInterrupt), interrupt_flag() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        signal.raise_signal(signal.SIGINT)
    out = []
    worker = threading.Thread(target=lambda: out.append(whole_run(seed)))
    worker.start()
    worker.join()
    assert len(out[0]) == 12
