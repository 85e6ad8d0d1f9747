"""Exercises of 04, pretraining."""

import io
import math
import pickle
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from exercises.checking import Exercise, Mistake
from minigpt_lib.model.gpt import GPTConfig, GPTLanguageModel
from minigpt_lib.training.data import TokenWindows
from minigpt_lib.training.optim import TrainConfig

CONFIG = GPTConfig(vocab_size=31, n_ctx=8, n_embd=12, n_layer=1, n_head=3)
T = 5  # ids in a window


def tiny_model(seed: int, **changes) -> GPTLanguageModel:
    """Parameters large enough to matter, the same for the same seed."""
    model, gen = GPTLanguageModel(replace(CONFIG, **changes)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=gen) / 3 + (p.dim() == 1) * 0.5)
    return model


def some_ids(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# --- saving: six steps in one go, and three, a restart, and three more


def run_of(seed: int, model: GPTLanguageModel, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """The losses of steps with dropout, each of which draws by its number."""
    losses = []
    for step in steps:
        torch.manual_seed(seed + step)
        loss = model(some_ids(seed + step, 2, T), some_ids(seed + step + 100, 2, T))[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def new_run(seed: int) -> tuple[GPTLanguageModel, torch.optim.Optimizer]:
    model = tiny_model(seed, dropout=0.2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.05)


def resumed(save, seed: int) -> dict[str, object]:
    """Three steps, saved; then a model built anew goes on with what the file holds."""
    model, optimizer = new_run(seed)
    first = run_of(seed, model, optimizer, range(3))
    file = io.BytesIO()
    save(file, model, optimizer, 3)
    run_of(seed, model, optimizer, range(3, 5))  # what happens after saving does not change the file
    try:
        state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    except pickle.UnpicklingError:
        raise TypeError("torch.load(…, weights_only=True) refuses a file that holds objects") from None
    model, optimizer = new_run(seed + 1)
    model.load_state_dict(state["model"])
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    again = run_of(seed, model, optimizer, range(state["step"], 6))
    return {"step": state["step"], "losses": [*first, *again]}


# --- windows: by a loop over every id


def numbers(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(60_000, size=size).astype(np.uint16)


def windows_run(cls: type, seed: int) -> list:
    """Three epochs of 7 windows in batches of 3, from 35 ids (nothing sits out) and from 37; dtypes beside."""
    results = []
    for size in (35, 37):
        windows = cls(numbers(size, seed), window=T, batch_size=3, seed=seed % 1000)
        for i in range(7):
            idx, targets = windows.batch(i)
            results += [idx, targets, f"{idx.dtype} {targets.dtype}"]
    return results


def windows_oracle(seed: int) -> list:
    results = []
    for size in (35, 37):
        ids = numbers(size, seed).tolist()
        windows = TokenWindows(np.array(ids), window=T, batch_size=3, seed=seed % 1000)
        starts = [int(s) for epoch in range(3) for s in windows.starts(epoch)]
        for i in range(7):
            rows = [[ids[(starts[3 * i + b] + t) % size] for t in range(T + 1)] for b in range(3)]
            results += [torch.tensor([row[:-1] for row in rows]), torch.tensor([row[1:] for row in rows])]
            results.append("torch.int64 torch.int64")
    return results


# --- the schedule: by torch's schedulers


def schedules() -> list[TrainConfig]:
    """With and without warm-up, both ways down, and runs that end with or just after their warm-up."""
    lr = 1 + torch.rand(1).item()
    common = {"lr": lr, "min_lr": lr / 5}
    return [
        TrainConfig(steps=12, warmup=4, **common),
        TrainConfig(steps=9, warmup=0, **common),
        TrainConfig(steps=11, warmup=3, decay="linear", **common),
        TrainConfig(steps=6, warmup=4, **common),
        TrainConfig(steps=5, warmup=4, **common),
    ]


def rates(make, steps: int, lr: float) -> list[float]:
    """The rates of so many steps by one of torch's schedulers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def schedule_oracle(seed: int) -> list[list[float]]:
    results = []
    for cfg in schedules():
        up, down = cfg.warmup, cfg.steps - 1 - cfg.warmup
        rising = rates(lambda o, n=up: LinearLR(o, 1 / (n + 1), 1.0, total_iters=n), up, cfg.lr) if up else []
        if cfg.decay == "linear":
            falling = rates(lambda o, c=cfg, n=down: LinearLR(o, 1.0, c.min_lr / c.lr, total_iters=n), down + 1, cfg.lr)
        else:
            falling = rates(lambda o, c=cfg, n=down: CosineAnnealingLR(o, max(1, n), c.min_lr), down + 1, cfg.lr)
        results.append(rising + falling)
    return results


# --- AdamW: by torch's


def adamw_inputs() -> tuple[torch.Tensor, list[torch.Tensor], list[dict]]:
    """Weights, gradients of very different sizes for 6 steps, and two sets of knobs."""
    size = torch.tensor([1e-3, 0.1, 1.0, 10.0])
    knobs = [{"lr": 0.1}, {"lr": 0.2, "betas": (0.7, 0.9), "decay": 0.5, "eps": 1e-2}]
    return torch.randn(3, 4).double(), [(torch.randn(3, 4) * size).double() for _ in range(6)], knobs


def adamw_run(f, seed: int) -> list[torch.Tensor]:
    """w, m and v after each step."""
    start, gradients, knobs = adamw_inputs()
    results = []
    for kwargs in knobs:
        w, m, v = start, 0, 0
        for t, g in enumerate(gradients, 1):
            w, m, v = f(w, g, m, v, t, **kwargs)
            results += [w, m, v]
    return results


def adamw_oracle(seed: int) -> list[torch.Tensor]:
    start, gradients, knobs = adamw_inputs()
    results = []
    for kwargs in knobs:
        defaults = {"betas": (0.9, 0.95), "decay": 0.1, "eps": 1e-8} | kwargs
        w = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([w], weight_decay=defaults.pop("decay"), **defaults)
        for g in gradients:
            w.grad = g.clone()
            optimizer.step()
            state = optimizer.state[w]
            results += [t.detach().clone() for t in (w, state["exp_avg"], state["exp_avg_sq"])]
    return results


# --- the step: one big batch, clipped and moved by hand


RATES = (0.3, 0.2, 0.1)
CLIPS = (0.0, 0.1, 1e6)  # never, below the norm, far above it


def micro_batches(seed: int) -> list[list[tuple[torch.Tensor, ...]]]:
    """Three steps: micro-batches of 10 and 2 targets, of 8, 1 and 10, and of two texts in a row beside a whole one."""
    draw = [(some_ids(seed + i, 2, T), some_ids(seed + i + 50, 2, T)) for i in range(7)]
    draw[1][1].view(-1)[2:] = -100
    draw[2][1][0, :2] = -100
    draw[3][1].view(-1)[:-1] = -100
    draw[5][1][:, 1] = -100  # where a text ends, nothing is asked
    packed = torch.tensor([[1, 1, 2, 2, 2], [1, 1, 1, 1, 2]])
    return [draw[:2], draw[2:5], [(*draw[5], packed), draw[6]]]


def watched(model: GPTLanguageModel) -> list[torch.Tensor]:
    """Some of the weights: embeddings, a bias of the block, a norm."""
    picked = (model.wpe.weight, model.wte.weight[:4], model.h[0].mlp.c_fc.bias, model.ln_f.weight)
    return [p.detach().clone() for p in picked]


class Engine:
    """Stands for 04b's: hands back what it was given."""

    def add_gradients(self, batches, n):
        return ["gradients", len(batches), n]

    def update(self, optimizer, gradients, grad_clip):
        left = sum(p.grad is not None for group in optimizer.param_groups for p in group["params"])
        return [*gradients, grad_clip, optimizer.param_groups[0]["lr"], left]


def step_run(f, seed: int) -> list:
    """Three steps of gradient descent; one by an engine; and one whose loss is not a number."""
    model, results = tiny_model(seed), []
    optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=99.0)
    for batches, lr, clip in zip(micro_batches(seed), RATES, CLIPS, strict=True):
        results += [*f(model, optimizer, batches, lr, TrainConfig(grad_clip=clip)), *watched(model)]
    results += f(model, optimizer, micro_batches(seed)[1], 0.4, TrainConfig(grad_clip=0.7), engine=Engine())
    with torch.no_grad():
        model.ln_f.bias[0] = math.nan
    before = watched(model)
    try:
        f(model, optimizer, micro_batches(seed)[0], 0.1, TrainConfig())
        results.append("goes on")
    except FloatingPointError:
        results.append("FloatingPointError")
    return [*results, *(torch.equal(a, b) for a, b in zip(before, watched(model), strict=True))]


def step_oracle(seed: int) -> list:
    model, results = tiny_model(seed), []
    for batches, lr, clip in zip(micro_batches(seed), RATES, CLIPS, strict=True):
        logits = [model(b[0], attention_mask=b[2] if len(b) == 3 else None)[0].flatten(0, 1) for b in batches]
        loss = F.cross_entropy(torch.cat(logits), torch.cat([b[1].flatten() for b in batches]))
        params = list(model.parameters())
        gradients = torch.autograd.grad(loss, params)
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        with torch.no_grad():
            for p, g in zip(params, gradients, strict=True):
                p -= lr * g * (min(1.0, clip / norm) if clip else 1.0)
        results += [loss.item(), norm, *watched(model)]
    n = sum(int((b[1] != -100).sum()) for b in micro_batches(seed)[1])
    return [*results, "gradients", 3, n, 0.7, 0.4, 0, "FloatingPointError", True, True, True, True]


EXERCISES = (
    Exercise(
        name="04.windows",
        title="batch number i, cut out of a ring of ids",
        target="TokenWindows.batch",
        minutes=12,
        level=2,
        module="minigpt_lib.training.data",
        against="a loop over every id, three epochs of a row of 35 and one of 37",
        run=windows_run,
        expected=windows_oracle,
        mistakes=(
            Mistake(
                "targets equal to the inputs give: a model would only learn to copy. They lie one place on.",
                "ids[:, 1:].contiguous()",
                "ids[:, :-1].contiguous()",
            ),
            Mistake(
                "batches that overlap give: batch i begins with window i · batch_size, where the last one ended.",
                "range(i * self.batch_size, (i + 1) * self.batch_size)",
                "range(i, i + self.batch_size)",
            ),
            Mistake(
                "a row with an end gives: the ids are a ring, and behind the last one comes the first.",
                "np.arange(self.window + 1)) % len(self.tokens)",
                "np.arange(self.window + 1))",
            ),
            Mistake(
                "using the first epoch's order again gives: window n belongs to epoch n // per_epoch.",
                "self.starts(n // self.per_epoch)",
                "self.starts(0)",
            ),
            Mistake("16-bit ids give: PyTorch's embeddings want int64.", ".astype(np.int64)", ""),
        ),
        hints=(
            "Windows are numbered through all epochs: window n is number n % per_epoch of epoch n // per_epoch.",
            "Take T + 1 ids from each start: `starts[:, None] + np.arange(T + 1)` are their places, (B, T + 1), "
            "before the ring closes them.",
        ),
    ),
    Exercise(
        name="04.adamw",
        title="AdamW from its formula",
        target="adamw_v1",
        minutes=8,
        level=1,
        module="minigpt_lib.training.optim",
        against="torch's AdamW, 6 steps, gradients from 0.001 to 10",
        run=adamw_run,
        expected=adamw_oracle,
        mistakes=(
            Mistake(
                "running means without their correction give: they start at zero, and 1 − β^t undoes that.",
                "(m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)",
                "m / (v.sqrt() + eps)",
            ),
            Mistake(
                "adding λw to the gradient gives, as in Adam with weight decay: AdamW keeps the pull out of m and v.",
                "    m = betas[0] * m + (1 - betas[0]) * g\n    v = betas[1] * v + (1 - betas[1]) * g**2\n"
                "    w = w - lr * decay * w\n",
                "    g = g + decay * w\n    m = betas[0] * m + (1 - betas[0]) * g\n"
                "    v = betas[1] * v + (1 - betas[1]) * g**2\n",
            ),
            Mistake(
                "a pull without the learning rate gives: w moves by ηλw towards zero.", "lr * decay * w", "decay * w"
            ),
            Mistake(
                "ε inside the root gives: it is added after the root has been taken.",
                "(v / (1 - betas[1] ** t)).sqrt() + eps",
                "(v / (1 - betas[1] ** t) + eps).sqrt()",
            ),
            Mistake("dividing by v itself gives: divide by its root.", ".sqrt()", ""),
            Mistake(
                "means that give the new gradient the weight β give: the old mean keeps β, g comes with 1 − β.",
                "m = betas[0] * m + (1 - betas[0]) * g",
                "m = (1 - betas[0]) * m + betas[0] * g",
            ),
        ),
        hints=(
            "One line for each arrow of the formula; the pull towards zero comes before the move.",
            "β^t is a power: `betas[0] ** t`. Return w, m and v, of which the next step needs all three.",
        ),
    ),
    Exercise(
        name="04.schedule",
        title="the learning rate: up, then down along a cosine",
        target="lr_at",
        minutes=8,
        level=2,
        module="minigpt_lib.training.optim",
        against="torch's LinearLR and CosineAnnealingLR",
        run=lambda f, seed: [[f(step, cfg) for step in range(cfg.steps)] for cfg in schedules()],
        expected=schedule_oracle,
        mistakes=(
            Mistake(
                "a first step of rate 0 gives: it would learn nothing. Step s < warmup has (s + 1) / (warmup + 1).",
                "(step + 1) / (cfg.warmup + 1)",
                "step / cfg.warmup",
            ),
            Mistake(
                "falling to 0 gives: the last step has min_lr.",
                "cfg.min_lr + (cfg.lr - cfg.min_lr) * share",
                "cfg.lr * share",
            ),
            Mistake(
                "adding min_lr on top gives: what shrinks is lr − min_lr.",
                "(cfg.lr - cfg.min_lr) * share",
                "cfg.lr * share",
            ),
            Mistake(
                "a fall that takes one step more gives: the last step is steps − 1, and it has min_lr.",
                "max(1, cfg.steps - 1 - cfg.warmup)",
                "max(1, cfg.steps - cfg.warmup)",
            ),
            Mistake(
                "counting the fall from step 0 gives: it begins after the warm-up.", "(step - cfg.warmup) /", "step /"
            ),
            Mistake(
                "a cosine in every case gives: decay='linear' is a straight line.",
                '1 - progress if cfg.decay == "linear" else ',
                "",
            ),
        ),
        hints=(
            "Two cases. In the second, find how far the fall has come first: 0 at step warmup, 1 at step steps − 1.",
            "steps = warmup + 1 is allowed: what would you divide by then?",
        ),
    ),
    Exercise(
        name="04.step",
        title="one update from several micro-batches",
        target="train_step",
        minutes=20,
        level=3,
        module="minigpt_lib.training.loop",
        against="all rows in one mean, clipped and moved by hand: three steps with uneven micro-batches",
        run=step_run,
        expected=step_oracle,
        mistakes=(
            Mistake(
                "a mean of means gives: 2 targets would weigh as much as 10. Divide by those of the whole step.",
                "precision=cfg.precision) / n",
                "precision=cfg.precision) / count_targets(batch[1]) / len(batches)",
            ),
            Mistake(
                "gradients that are never forgotten give: those of the last step are still there. The first is right.",
                "    optimizer.zero_grad(set_to_none=True)\n",
                "",
            ),
            Mistake(
                "forgetting before every micro-batch gives: only the last one moves the weights.",
                "        loss.backward()",
                "        optimizer.zero_grad()\n        loss.backward()",
            ),
            Mistake(
                "moving after every micro-batch gives: they belong to one step, and it moves once.",
                "        loss.backward()",
                "        loss.backward()\n        optimizer.step()",
            ),
            Mistake(
                "leaving lr where it was gives: the step's rate goes into every group of the optimizer.",
                'group["lr"] = lr',
                'group["lr"]',
            ),
            Mistake(
                "gradients that are never clipped give: grad_clip bounds their norm.",
                "cfg.grad_clip or math.inf",
                "math.inf",
            ),
            Mistake(
                "clipping to 0 gives: grad_clip=0 means never, a limit of math.inf.",
                "cfg.grad_clip or math.inf",
                "cfg.grad_clip",
            ),
            Mistake(
                "looking at the loss after the move gives: once the weights are not numbers, it is too late.",
                "    if not (math.isfinite(total) and math.isfinite(norm)):\n"
                '        raise FloatingPointError(f"the loss is {total} and the norm of the gradient {norm}")\n'
                "    optimizer.step()\n",
                "    optimizer.step()\n    if not (math.isfinite(total) and math.isfinite(norm)):\n"
                '        raise FloatingPointError(f"the loss is {total} and the norm of the gradient {norm}")\n',
            ),
        ),
        hints=(
            "Which n belongs to the step? Count the targets of all its micro-batches before the first pass.",
            "`summed_loss(model, *batch, precision=cfg.precision)` takes batches of two and of three tensors, and "
            "`clip_grad_norm_` returns the norm before clipping. If there is an engine, all that is left to do behind "
            "`zero_grad` is `return engine.update(optimizer, engine.add_gradients(batches, n), cfg.grad_clip)`.",
        ),
    ),
    Exercise(
        name="04.resume",
        title="what has to be on disk to go on as if nothing had happened",
        target="save_v1",
        minutes=5,
        level=1,
        module="minigpt_lib.training.loop",
        against="the same six steps in one go, with dropout",
        run=resumed,
        expected=lambda seed: {"step": 3, "losses": run_of(seed, *new_run(seed), range(6))},
        mistakes=(
            Mistake(
                "leaving the optimizer out gives: its running means are lost, and the first steps go astray.",
                '"optimizer": optimizer.state_dict(), ',
                "",
            ),
            Mistake(
                "the number of the last step gives: step says how many are done, and it would be done twice.",
                '"step": step',
                '"step": step - 1',
            ),
            Mistake(
                "saving the model itself gives: that is code in the file. Its `state_dict()` holds numbers only.",
                "model.state_dict()",
                "model",
            ),
            Mistake(
                "the parameters alone give: the tied head's second name is missing. `state_dict()` has all names.",
                "model.state_dict()",
                "dict(model.named_parameters())",
            ),
        ),
        hints=(
            "`load_v1` shows which names the file has; a `state_dict()` is what may go under two of them.",
            "`torch.save` takes the dictionary first, then the file.",
        ),
    ),
)
