"""Exercises of 07, LoRA."""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from exercises.checking import Exercise, Mistake
from minigpt_lib.model.gpt import GPTConfig, GPTLanguageModel

MODULE = "minigpt_lib.tuning.lora"
CONFIG = GPTConfig(vocab_size=29, n_ctx=12, n_embd=12, n_layer=2, n_head=3)


class Branch(nn.Module):
    """The notebook's draft of the thin branch: random A, zero B."""

    def __init__(self, n_in: int, n_out: int, r: int, alpha: float):
        super().__init__()
        self.scaling = alpha / r
        self.lora_A = nn.Parameter((torch.rand(r, n_in) * 2 - 1) / n_in**0.5)
        self.lora_B = nn.Parameter(torch.zeros(n_out, r))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling


class LoRALinear_v1(nn.Module):
    """The notebook's draft of the layer."""

    def __init__(self, base: nn.Linear, r: int = 8, alpha: float = 16):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.branch = Branch(base.in_features, base.out_features, r, alpha)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.branch(x)


def filled(module: nn.Module, seed: int, only: str = "") -> nn.Module:
    """Parameters whose names hold `only` become random and large enough to matter; the same for the same seed."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if only in name:
                p.copy_(torch.randn(p.shape, generator=gen) / 3)
    return module.eval()


def model_of(seed: int) -> GPTLanguageModel:
    return filled(GPTLanguageModel(CONFIG), seed)


def ids_of(seed: int) -> Tensor:
    return torch.randint(29, (2, 6), generator=torch.Generator().manual_seed(seed + 1))


def dense(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """scaling * B A as a sum of r matrices of rank one."""
    return scaling * sum(torch.outer(column, row) for column, row in zip(B.T, A, strict=True))


# --- the thin branch


def branch_run(cls: type, seed: int) -> list[Tensor]:
    branch = filled(cls(10, 7, 3, 5.0), seed)
    return [branch(torch.randn(10)), branch(torch.randn(2, 4, 10)), branch(torch.randn(7, 10))]


def branch_oracle(seed: int) -> list[Tensor]:
    branch = filled(Branch(10, 7, 3, 5.0), seed)
    W = dense(branch.lora_A, branch.lora_B, 5 / 3)
    return [F.linear(torch.randn(*shape, 10), W) for shape in ((), (2, 4), (7,))]


# --- the layer


def layer_parts(seed: int) -> tuple[nn.Linear, list[tuple[str, str, int, float, Tensor, Tensor]]]:
    """A layer 8 -> 18 and the branches (adapter, part, r, alpha, A, B) beside it."""
    base, branches = filled(nn.Linear(8, 18), seed), []
    for adapter, part, r, alpha in (("one", "", 3, 7.0), ("two", "q", 2, 5.0), ("two", "v", 2, 5.0)):
        branches.append((adapter, part, r, alpha, torch.randn(r, 8) / 2, torch.randn(6 if part else 18, r) / 2))
    return base, branches


ACTIVE = ({}, {"one": 1.0}, {"two": 1.0}, {"one": 0.5, "two": -2.0})


@torch.no_grad()
def layer_run(cls: type, seed: int) -> list:
    from minigpt_lib.tuning.lora import LoRAConfig

    base, branches = layer_parts(seed)
    layer, x, results = cls(base), torch.randn(2, 4, 8), []
    for adapter, part, r, alpha, A, B in branches:
        layer.add(adapter, LoRAConfig(r, alpha), part)
        own = layer.adapters[f"{adapter}:{part}" if part else adapter]
        own.lora_A.copy_(A)
        own.lora_B.copy_(B)
    for active in ACTIVE:
        layer.active = active
        results.append(layer(x))
    layer.enabled = False
    results.append(layer(x))
    layer.enabled, layer.base_weight = True, layer.weight.clone()  # as if its weight held the updates
    results.append(layer(x))
    layer.base_weight, layer.bias = None, None
    results.append(layer(x))
    layer.weight = nn.Parameter(layer.weight.bfloat16())
    return [*results, str(layer(x.bfloat16()).dtype)]


def layer_oracle(seed: int) -> list:
    base, branches = layer_parts(seed)
    x, results = torch.randn(2, 4, 8), []
    for active in ACTIVE:
        W = base.weight.clone()
        for adapter, part, r, alpha, A, B in branches:
            start = {"": 0, "q": 0, "v": 12}[part]
            W[start : start + len(B)] += active.get(adapter, 0) * dense(A, B, alpha / r)
        results.append(F.linear(x, W, base.bias))
    plain = F.linear(x, base.weight, base.bias)
    return [*results, plain, plain, results[-1] - base.bias, "torch.bfloat16"]


# --- into the model


def inject_run(f: Callable, seed: int) -> dict:
    with torch.device("meta"):
        gpt2 = f(GPTLanguageModel(GPTConfig.preset("gpt2")))
    count = sum(p.numel() for p in gpt2.parameters() if p.requires_grad)
    given = model_of(seed)
    model, idx = f(given, 3), ids_of(seed)
    told = {"trained in GPT-2": count, "at the start": model(idx)[0], "the same model": model is given}
    told["with B"] = filled(model, seed + 2, "lora_")(idx)[0]
    model(idx, idx)[1].backward()
    told["learned"] = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    return told


def inject_oracle(seed: int) -> dict:
    """c_attn's matrices with B A added to them; 12 layers of 8 * (768 + 2304) numbers."""
    model, idx, gen = model_of(seed), ids_of(seed), torch.Generator().manual_seed(seed + 2)
    told = {"trained in GPT-2": 12 * 8 * (768 + 2304), "at the start": model(idx)[0], "the same model": True}
    model.requires_grad_(False)
    pairs = {}
    for i in range(2):
        A, B = (torch.randn(shape, generator=gen) / 3 for shape in ((3, 12), (36, 3)))
        pairs |= {f"h.{i}.attn.c_attn.branch.lora_{n}": p.requires_grad_() for n, p in (("A", A), ("B", B))}
    weights = {}
    for i in range(2):
        at = f"h.{i}.attn.c_attn"
        update = dense(pairs[f"{at}.branch.lora_A"], pairs[f"{at}.branch.lora_B"], 16 / 3)
        weights[f"{at}.weight"] = model.get_parameter(f"{at}.weight") + update
    logits, loss = torch.func.functional_call(model, weights, (idx, idx))
    loss.backward()
    return told | {"with B": logits, "learned": {name: p.grad.norm() for name, p in pairs.items()}}


# --- merged


def tuned(seed: int, dtype: torch.dtype = torch.float32, **options) -> GPTLanguageModel:
    """A model with an adapter that is not zero, on layers of different shapes; B A is a sum without rounding."""
    from minigpt_lib.tuning.lora import add_lora

    options = {"r": 3, "alpha": 6, "targets": ("c_attn.q", "mlp.c_proj")} | options
    model = filled(add_lora(model_of(seed).to(dtype), **options), seed + 2, "lora_")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_((64 * p).round() / 64)
    return model


def targets_of(model: GPTLanguageModel) -> dict[str, nn.Linear]:
    names = [f"h.{i}.{name}" for i in range(2) for name in ("attn.c_attn", "mlp.c_proj")]
    return {name: model.get_submodule(name) for name in names}


def refusal(f: Callable, model: GPTLanguageModel) -> str:
    try:
        f(model)
        return "done"
    except ValueError:
        return "ValueError"


@torch.no_grad()
def merge_run(f: Callable, seed: int) -> dict:
    model, idx = tuned(seed), ids_of(seed)
    told: dict = {"the same model": f(model) is model, "logits": model(idx)[0]}
    told["weights"] = {at: layer.weight.clone() for at, layer in targets_of(model).items()}
    told["kept"] = {at: layer.base_weight for at, layer in targets_of(model).items()}
    told["again"] = refusal(f, model)
    rounded = f(tuned(seed, torch.bfloat16))
    told["bfloat16"] = {at: layer.weight.float() for at, layer in targets_of(rounded).items()}
    told["a model without LoRA"] = refusal(f, model_of(seed))
    told["the tied head"] = refusal(f, tuned(seed, targets=("c_attn", "lm_head")))
    broken = tuned(seed)
    last = list(targets_of(broken).values())[-1]
    last.adapters["default"].lora_B[1, 1] = torch.inf
    told["an infinite update"] = refusal(f, broken)
    told["then merged"] = [layer.merged for layer in targets_of(broken).values()]
    return told


@torch.no_grad()
def merge_oracle(seed: int) -> dict:
    model, plain, idx = tuned(seed), model_of(seed), ids_of(seed)
    kept = {at: layer.weight.clone() for at, layer in targets_of(plain).items()}
    updates = {at: torch.zeros_like(weight) for at, weight in kept.items()}
    for at, layer in targets_of(model).items():
        (branch,) = layer.adapters.values()
        part = dense(branch.lora_A, branch.lora_B, 6 / 3)
        updates[at][: len(part)] += part
    told: dict = {"the same model": True, "weights": {at: kept[at] + updates[at] for at in kept}, "kept": kept}
    for at, weight in told["weights"].items():
        plain.get_submodule(at).weight.copy_(weight)
    told |= {"logits": plain(idx)[0], "again": "ValueError"}
    told["bfloat16"] = {at: (kept[at].bfloat16() + updates[at]).bfloat16().float() for at in kept}
    told |= {what: "ValueError" for what in ("a model without LoRA", "the tied head", "an infinite update")}
    return told | {"then merged": [False] * 4}


# --- switched off


@torch.no_grad()
def disabled_run(f: Callable, seed: int) -> list:
    """Beside the weights and merged: before, in a block, in a block inside it, behind them, and behind an error."""
    from minigpt_lib.tuning.lora import merge_lora

    idx, told = ids_of(seed), []

    def look(model: GPTLanguageModel) -> None:
        told.append([model(idx)[0], targets_of(model)["h.0.attn.c_attn"].weight[:3].clone()])

    for model in (tuned(seed), merge_lora(tuned(seed))):
        look(model)
        with f(model) as inside:
            look(model)
            with f(model):
                look(model)
            look(model)
        told.append(inside is model)
        look(model)
        try:
            with f(model):
                raise KeyError("something went wrong in the block")
        except KeyError as error:
            told.append(str(error))
        look(model)
    try:
        with f(model_of(seed)):
            return [*told, "done"]
    except ValueError:
        return [*told, "ValueError"]


@torch.no_grad()
def disabled_oracle(seed: int) -> list:
    """The base model itself, and models that nobody switches off."""
    from minigpt_lib.tuning.lora import merge_lora

    idx, told = ids_of(seed), []
    plain = model_of(seed)
    off = [plain(idx)[0], plain.h[0].attn.c_attn.weight[:3]]
    for model in (tuned(seed), merge_lora(tuned(seed))):
        on = [model(idx)[0], model.h[0].attn.c_attn.weight[:3]]
        told += [on, off, off, off, True, on, "'something went wrong in the block'", on]
    return [*told, "ValueError"]


EXERCISES = (
    Exercise(
        name="07.branch",
        title="the thin branch: through A, then through B",
        target="LowRank_v1.forward",
        minutes=5,
        level=1,
        module=MODULE,
        against="one matrix, the sum of r outer products, 10 -> 7 at r = 3",
        run=branch_run,
        expected=branch_oracle,
        mistakes=(
            Mistake("leaving the scaling out gives: the update counts α/r times.", "self.scaling * (", "("),
            Mistake(
                "dividing by the scaling gives: α/r is a factor.",
                "self.scaling * (x @ self.lora_A.T @ self.lora_B.T)",
                "(x @ self.lora_A.T @ self.lora_B.T) / self.scaling",
            ),
            Mistake(
                "the paper's order for columns gives: here a row of x is one position, so both are transposed.",
                "x @ self.lora_A.T @ self.lora_B.T",
                "self.lora_B @ self.lora_A @ x",
            ),
            Mistake(
                "A and B without transposing give: a row of x meets the rows of A, x @ A.T.",
                "x @ self.lora_A.T @ self.lora_B.T",
                "x @ self.lora_A @ self.lora_B",
            ),
            Mistake(
                "B before A gives: A reads the input, B writes the output.",
                "x @ self.lora_A.T @ self.lora_B.T",
                "x @ self.lora_B @ self.lora_A",
            ),
        ),
        hints=(
            "Write the shapes: (..., in) -> (..., r) -> (..., out). A is (r, in), B is (out, r).",
            "Transpose both, and never build B A: through the thin middle it is less work.",
        ),
    ),
    Exercise(
        name="07.inject",
        title="into the whole model: freeze it, and wrap c_attn in every block",
        target="add_lora_v1",
        minutes=8,
        level=2,
        module=MODULE,
        against="294,912 parameters in GPT-2, and a model whose matrices have B A added to them",
        run=inject_run,
        expected=inject_oracle,
        tolerance=1e-3,
        mistakes=(
            Mistake(
                "leaving the rest of the model trainable gives: freeze all of it first.",
                "    model.requires_grad_(False)\n",
                "",
            ),
            Mistake(
                "freezing afterwards gives: then A and B are frozen, too.",
                "    return model",
                "    return model.requires_grad_(False)",
            ),
            Mistake(
                "a single block gives: every block has a c_attn of its own.",
                "for block in model.h:",
                "for block in model.h[:1]:",
            ),
            Mistake(
                "wrapping c_proj gives: it is c_attn that gets the branch.",
                "block.attn.c_attn = LoRALinear_v1(block.attn.c_attn, r)",
                "block.attn.c_proj = LoRALinear_v1(block.attn.c_proj, r)",
            ),
            Mistake(
                "a rank of 8 whatever was asked for gives: hand r on.",
                "(block.attn.c_attn, r)",
                "(block.attn.c_attn)",
            ),
        ),
        given={"LoRALinear_v1": LoRALinear_v1},
        hints=(
            "`requires_grad_(False)` on a module freezes all that is in it; parameters made later are trainable.",
            "`model.h` holds the blocks, and `block.attn.c_attn` can be assigned to.",
        ),
    ),
    Exercise(
        name="07.layer",
        title="the layer with several branches, some of them for a third of its outputs",
        target="LoRALinear.forward",
        minutes=12,
        level=2,
        module=MODULE,
        against="torch's linear with one matrix, 8 -> 18, for four mixtures of two adapters",
        run=layer_run,
        expected=layer_oracle,
        tolerance=1e-4,
        mistakes=(
            Mistake(
                "leaving the adapters' weights out gives: `branch(x, weight)` says how much each counts.",
                "branch(x, weight)",
                "branch(x)",
            ),
            Mistake(
                "only the last branch gives: all of them are added up.",
                "y = y + (",
                "y = F.linear(x, self.weight, self.bias) + (",
            ),
            Mistake(
                "adding updates to a layer that is merged or switched off gives: `pending` says whether any are due.",
                "self.branches() if self.pending else []",
                "self.branches()",
            ),
            Mistake(
                "zeros on the wrong sides give: before a third come `rows.start` outputs, behind it the rest.",
                "(branch.rows.start, rest)",
                "(rest, branch.rows.start)",
            ),
            Mistake(
                "leaving the bias out gives: the frozen layer has one.",
                "F.linear(x, self.weight, self.bias)",
                "F.linear(x, self.weight)",
            ),
            Mistake(
                "an update in float32 beside a layer in bfloat16 gives: the output has the frozen layer's type.",
                ".to(y.dtype)",
                "",
            ),
        ),
        hints=(
            "The frozen layer first, `F.linear(x, self.weight, self.bias)`, then each branch on top of it.",
            "`F.pad(update, (before, behind))` puts zeros around the last dimension; `branch.rows` is a slice.",
        ),
    ),
    Exercise(
        name="07.merge",
        title="the update into the weights, and the original kept",
        target="merge_lora",
        minutes=15,
        level=3,
        module=MODULE,
        against="a plain model whose matrices have the sums of outer products added to them",
        run=merge_run,
        expected=merge_oracle,
        tolerance=1e-4,
        mistakes=(
            Mistake(
                "forgetting the original gives: without `base_weight` the update counts twice, and can't be undone.",
                "layer.base_weight, layer.weight.data = layer.weight.data, new[name]",
                "layer.weight.data = new[name]",
            ),
            Mistake(
                "writing into the original gives: `base_weight` shows the sum, too. The sum is a tensor of its own.",
                "layer.base_weight, layer.weight.data = layer.weight.data, new[name]",
                "layer.base_weight = layer.weight.data.copy_(new[name])",
            ),
            Mistake(
                "keeping the update instead of the original gives: W + delta − delta is not W to the last bit.",
                "layer.base_weight, layer.weight.data = layer.weight.data, new[name]",
                "layer.base_weight, layer.weight.data = layer.delta(), new[name]",
            ),
            Mistake(
                "merging a second time gives: the update would count twice. Refuse it.",
                "if any(layer.merged for layer in layers.values()):",
                "if False:",
            ),
            Mistake(
                "rounding the update first gives: sum in float32, and round once.",
                "(layer.weight + layer.delta()).to(layer.weight.dtype)",
                "layer.weight + layer.delta().to(layer.weight.dtype)",
            ),
            Mistake(
                "weights that are not finite give: look at all of them before any is replaced.",
                " if not weight.isfinite().all()]",
                " if False]",
            ),
            Mistake(
                "merging into the tied head gives: the token embedding would change with it. Refuse it.",
                "if tied := tied_layers(model) & set(layers):",
                "if False:",
            ),
        ),
        hints=(
            "First make all new weights, W + `layer.delta()`; then check them; then put them in place.",
            "`layer.weight.data = …` exchanges the tensor behind the parameter; the old one goes to `base_weight`.",
        ),
    ),
    Exercise(
        name="07.disabled",
        title="the base model for the length of a with block",
        target="lora_disabled",
        minutes=15,
        level=3,
        module=MODULE,
        against="the base model, and a merged one with the same adapter",
        run=disabled_run,
        expected=disabled_oracle,
        mistakes=(
            Mistake(
                "switching the branches off alone gives: a merged weight still holds the update. Lend the original.",
                "for layer, _ in merged:\n            layer.weight.data = cast(Tensor, layer.base_weight)",
                "pass",
            ),
            Mistake(
                "a merged layer that keeps the original gives: put the sum back afterwards.",
                "for layer, weight in merged:\n            layer.weight.data = weight",
                "pass",
            ),
            Mistake(
                "leaving LoRA off afterwards gives: switch on again what was on.",
                "layer.enabled = True",
                "layer.enabled = False",
            ),
            Mistake(
                "an error in the block gives, when LoRA then stays off: clean up under `finally`.",
                "    finally:",
                "    except KeyError:\n        raise\n    else:",
            ),
            Mistake(
                "a block inside a block gives, when its end switches all on: only what it found on is its own.",
                "[layer for layer in layers.values() if layer.enabled]",
                "list(layers.values())",
            ),
        ),
        hints=(
            "Before the `yield`: note which layers are on, and what the merged ones weigh; then switch off.",
            "`try: … yield model … finally:` undoes it, whatever happens in the block.",
        ),
    ),
)
