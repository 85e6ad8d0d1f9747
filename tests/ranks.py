"""What two ranks do in test_distributed.py: `torchrun … tests/ranks.py FOLDER SEED` writes FOLDER/losses.json."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tiny import batch_of, build, flat, losses, windows_of

from minigpt_lib.training.distributed import current_ranks, process_group, whole_model
from minigpt_lib.training.loss import evaluate_loss
from minigpt_lib.training.optim import TrainConfig
from minigpt_lib.training.run import train

CFG = TrainConfig(steps=8, batch_size=4, accumulate=3, lr=3e-3, warmup=2, eval_every=3, checkpoint_every=4)


def unequal(seed: int):
    """Micro-batches of 4 or, every third time, of a single row, with different numbers of labels."""
    return lambda i: batch_of(seed + i, 1 if i % 3 == 2 else 4, share=(1.0, 0.3, 0.6)[i % 3])


def runs(folder: Path, seed: int) -> dict[str, object]:
    """The same few runs, in one process or in several; with fsdp only where there are several.

    In float64: Adam moves a weight fully even where its gradient is all but zero, so that in float32 the order of a
    sum may decide on a step; here nothing but a wrong division of the work can.
    """
    out: dict[str, object] = {}
    several = current_ranks().world > 1
    for name, fsdp, batches in (
        ("ddp", False, windows_of(seed).batch),
        ("unequal", False, unequal(seed)),
        ("fsdp", True, windows_of(seed).batch),
        ("fsdp unequal", True, unequal(seed)),
    ):
        model = build(seed).double()
        cfg = replace(CFG, fsdp=fsdp and several, gradient_checkpointing=name == "fsdp unequal")
        evaluate = lambda model=model: evaluate_loss(model, [batch_of(seed, 5, 0.5)])  # noqa: E731
        history = train(model, batches, cfg, evaluate=evaluate, folder=folder / name, progress=False)
        out[name] = losses(history)
        out[name + " val"] = [r["val_loss"] for r in history if "val_loss" in r]
        out[name + " weights"] = flat(whole_model(model)).tolist()
    return out


def resumed(folder: Path, seed: int) -> dict[str, object]:
    """Go on in the middle, from a checkpoint that the other kind of run wrote."""
    out = {}
    for name, other, fsdp in (("from ddp to fsdp", "ddp", True), ("from fsdp to ddp", "fsdp", False)):
        if current_ranks().main:
            (folder / other / "checkpoint-00000008.pt").unlink(missing_ok=True)
        torch.distributed.barrier()
        options = {"folder": folder / other, "resume": True, "progress": False}
        history = train(build(seed + 1).double(), windows_of(seed).batch, replace(CFG, fsdp=fsdp), **options)
        out[name] = losses(history)
    return out


def main(folder: str, seed: str) -> None:
    with process_group(torch.device("cpu")) as device:
        assert device.type == "cpu" and current_ranks().world == 2
        out = runs(Path(folder), int(seed)) | resumed(Path(folder), int(seed))
        try:
            train(build(1).double(), windows_of(1).batch, replace(CFG, batch_size=3), progress=False)
        except ValueError as error:
            out["error"] = str(error)
        own = Path(folder, f"own{current_ranks().rank}")  # as on two machines without a common disk
        if current_ranks().main:
            shutil.copytree(Path(folder, "ddp"), own)
        try:
            train(build(1).double(), windows_of(int(seed)).batch, CFG, folder=own, resume="auto", progress=False)
        except ValueError as error:
            out["alone"] = str(error)
        if current_ranks().main:
            Path(folder, "losses.json").write_text(json.dumps(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
