"""Exercises of 05, loading weights."""

import math
import re

import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor

from exercises.checking import Exercise, Mistake
from minigpt_lib.model.gpt import GPTConfig, GPTLanguageModel
from minigpt_lib.weights.convert import WeightsError

MODULE = "minigpt_lib.weights.convert"
CONFIG = GPTConfig(vocab_size=7, n_ctx=5, n_embd=4, n_layer=2, n_head=2)
FOUR = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # in files: (in, out)


def model_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """What the model of 03 itself says."""
    return {name: tuple(p.shape) for name, p in GPTLanguageModel(config).named_parameters()}


def file_tensors() -> dict[str, Tensor]:
    """Random tensors of CONFIG, named and shaped as in the hub's files, in an order that is not the model's."""
    shapes = model_shapes(CONFIG)
    names = [*reversed(shapes)]
    return {n: torch.randn(shapes[n][::-1] if n.endswith(FOUR) else shapes[n]) for n in names}


def old_file(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As older files have it: a prefix, the masks of all blocks, and the head beside the embedding."""
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 5, 5).tril() for i in range(CONFIG.n_layer)}
    masks |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(CONFIG.n_layer)}
    prefixed = {f"transformer.{name}": t for name, t in (tensors | masks).items()}
    return prefixed | {"lm_head.weight": tensors["wte.weight"].clone()}


def head_alone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("wte", "lm_head"): t for name, t in tensors.items()}


def listed(tensors: dict[str, Tensor]) -> list:
    """Names in their order, types and values."""
    return [[name, str(t.dtype), t] for name, t in tensors.items()]


def refusal(f, culprit: str) -> list[object]:
    """How something is refused: by a WeightsError that names the tensor?"""
    try:
        f()
    except WeightsError as error:
        return ["WeightsError", culprit in str(error)]
    return ["accepted", False]


REFUSED = ["WeightsError", True]


# --- names and shapes


def configs(seed: int) -> list[GPTConfig]:
    """Two configs whose sizes all differ."""
    return [
        GPTConfig(vocab_size=17 + seed % 10, n_ctx=9, n_embd=6, n_layer=2, n_head=2),
        GPTConfig(vocab_size=5, n_ctx=3, n_embd=2, n_layer=11 + seed % 3, n_head=1),
    ]


# --- a strict choice


def odd_files(tensors: dict[str, Tensor]) -> list[tuple[dict[str, Tensor], bool, str]]:
    """Files that have to be refused, whether several dtypes are allowed, and what the refusal has to name."""
    matrix, bias, wte = "h.1.attn.c_attn.weight", "h.0.attn.c_attn.bias", tensors["wte.weight"]
    return [
        ({n: t for n, t in tensors.items() if n != bias}, False, f"missing: {bias}"),
        (tensors | {"h.2.ln_1.bias": torch.zeros(4)}, False, "unknown: h.2.ln_1.bias"),
        (tensors | {matrix: tensors[matrix].t()}, False, matrix),
        (tensors | {bias: torch.zeros(1)}, False, bias),
        (tensors | {bias: tensors[bias].half()}, False, bias),
        (tensors | {bias: torch.ones(12, dtype=torch.int64)}, True, bias),
        (tensors | {"lm_head.weight": wte + 1}, False, "lm_head.weight"),
        (tensors | {"lm_head.weight": wte.double()}, True, "lm_head.weight"),
        (tensors | {"lm_head.weight": wte[:-1]}, False, "lm_head.weight"),
    ]


def select_run(f, seed: int) -> list:
    tensors, shapes = file_tensors(), model_shapes(CONFIG)
    mixed = tensors | {"ln_f.bias": tensors["ln_f.bias"].half()}
    results = [listed(f(given, shapes)) for given in (tensors, old_file(tensors), head_alone(tensors))]
    results.append(listed(f(mixed, shapes, any_dtype=True)))
    odd = odd_files(tensors)
    return results + [refusal(lambda g=g, a=a: f(g, shapes, any_dtype=a), culprit) for g, a, culprit in odd]


def select_oracle(seed: int) -> list:
    tensors = file_tensors()
    plain = [[name, "torch.float32", tensors[name]] for name in model_shapes(CONFIG)]
    assert plain[-1][0] == "ln_f.bias"
    mixed = [*plain[:-1], ["ln_f.bias", "torch.float16", tensors["ln_f.bias"].half()]]
    return [plain, plain, plain, mixed, *[REFUSED] * len(odd_files(tensors))]


# --- the mapping: logits, by the formulas on the tensors as the file has them


def asked() -> Tensor:
    return torch.randint(CONFIG.vocab_size, (2, CONFIG.n_ctx))


def logits_by_hand(t: dict[str, Tensor], idx: Tensor) -> Tensor:
    """GPT-2 with y = xW + b."""
    C, heads = CONFIG.n_embd, CONFIG.n_head

    def conv(name: str, x: Tensor) -> Tensor:
        return x @ t[f"{name}.weight"] + t[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (C,), t[f"{name}.weight"], t[f"{name}.bias"], 1e-5)

    x = t["wte.weight"][idx] + t["wpe.weight"][: idx.size(1)]
    for i in range(CONFIG.n_layer):
        qkv = conv(f"h.{i}.attn.c_attn", norm(f"h.{i}.ln_1", x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (heads, C // heads)).transpose(1, 2) for part in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + conv(f"h.{i}.attn.c_proj", y)
        hidden = F.gelu(conv(f"h.{i}.mlp.c_fc", norm(f"h.{i}.ln_2", x)), approximate="tanh")
        x = x + conv(f"h.{i}.mlp.c_proj", hidden)
    return norm("ln_f", x) @ t["wte.weight"].t()


def model_logits(state: dict[str, Tensor], idx: Tensor) -> Tensor | str:
    model = GPTLanguageModel(CONFIG).eval()
    if {name: tuple(t.shape) for name, t in state.items()} != model_shapes(CONFIG):
        return "does not fit into the model"
    model.load_state_dict(state | {"lm_head.weight": state["wte.weight"]})
    with torch.no_grad():
        return model(idx)[0]


def hf_run(f, seed: int) -> dict[str, object]:
    """A plain file and an old one; mixed types; what happens to the file's tensors afterwards; a NaN."""
    tensors, idx = file_tensors(), asked()
    states = {"plain": f(tensors, CONFIG), "old": f(old_file(tensors), CONFIG)}
    results: dict[str, object] = {}
    for name, state in states.items():
        results[f"shapes, {name}"] = {n: tuple(t.shape) for n, t in state.items()}
        results[f"logits, {name}"] = model_logits(state, idx)
    mixed = tensors | {"ln_f.bias": tensors["ln_f.bias"].double()}
    results["types"] = [str(t.dtype) for t in f(mixed, CONFIG, dtype=torch.float64).values()]
    given = {name: t.clone() for name, t in tensors.items()}
    state = f(given, CONFIG)
    for t in given.values():
        t.zero_()
    results["logits, after the file's tensors are gone"] = model_logits(state, idx)
    bad = tensors["h.1.mlp.c_fc.bias"].clone()
    bad[3] = math.nan
    results["NaN"] = refusal(lambda: f(tensors | {"h.1.mlp.c_fc.bias": bad}, CONFIG), "h.1.mlp.c_fc.bias")
    return results


def hf_oracle(seed: int) -> dict[str, object]:
    tensors, idx = file_tensors(), asked()
    shapes = model_shapes(CONFIG)
    logits = logits_by_hand(tensors, idx)
    return {
        "shapes, plain": shapes,
        "logits, plain": logits,
        "shapes, old": shapes,
        "logits, old": logits,
        "types": ["torch.float64"] * len(shapes),
        "logits, after the file's tensors are gone": logits,
        "NaN": REFUSED,
    }


# --- OpenAI's names: a table that is written both ways


def both_names() -> list[tuple[str, str, Tensor, Tensor]]:
    """OpenAI's name, the hub's, the tensor as OpenAI has it and as the hub has it: 12 layers, in OpenAI's order."""

    def same(theirs: str, hub: str, *shape: int) -> tuple[str, str, Tensor, Tensor]:
        t = torch.randn(shape)
        return theirs, hub, t, t

    table = [
        same("model/wte", "wte.weight", 5, 2),
        same("model/wpe", "wpe.weight", 1, 2),
        same("model/ln_f/g", "ln_f.weight", 2),
        same("model/ln_f/b", "ln_f.bias", 2),
        same("global_step", "global_step", 1),
        same("optimizer/h0/attn/c_attn/w", "optimizer/h0/attn/c_attn/w", 1, 2, 6),
    ]
    for i in range(12):
        for norm in ("ln_1", "ln_2"):
            table.append(same(f"model/h{i}/{norm}/g", f"h.{i}.{norm}.weight", 2))
            table.append(same(f"model/h{i}/{norm}/b", f"h.{i}.{norm}.bias", 2))
        for branch, layer, n_in, n_out in (
            ("attn", "c_attn", 2, 6),
            ("attn", "c_proj", 2, 2),
            ("mlp", "c_fc", 2, 8),
            ("mlp", "c_proj", 8, 2),
        ):
            w, theirs, hub = torch.randn(n_in, n_out), f"model/h{i}/{branch}/{layer}", f"h.{i}.{branch}.{layer}"
            table.append((f"{theirs}/w", f"{hub}.weight", w[None], w))
            table.append(same(f"{theirs}/b", f"{hub}.bias", n_out))
    table.append(same("model/h12/mlp/c_fc/w", "h.12.mlp.c_fc.weight", 3, 2, 8))  # three matrices: refused later
    table.append(same("model/h13/mlp/c_fc/w", "h.13.mlp.c_fc.weight", 1, 8))  # no leading 1: a matrix of one row
    return table


# --- the way back, through a file


def model_state(seed: int) -> dict[str, Tensor]:
    """A model's state dict, its tied head included."""
    model, gen = GPTLanguageModel(CONFIG), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=gen))
    return model.state_dict()


def back_oracle(seed: int) -> dict[str, Tensor]:
    """Row by row: what is at [i][j] in the model is at [j][i] in the file."""
    out = {}
    for name, t in model_state(seed).items():
        if name != "lm_head.weight":
            rows = t.tolist()
            turned = re.fullmatch(r"h\.\d+\.(attn|mlp)\.c_\w+\.weight", name)
            out[name] = torch.tensor([[row[j] for row in rows] for j in range(t.size(1))] if turned else rows)
    return out


EXERCISES = (
    Exercise(
        name="05.shapes",
        title="the inventory: every tensor of GPT-2, from its config alone",
        target="parameter_shapes",
        minutes=10,
        level=1,
        module=MODULE,
        against="the parameters of GPTLanguageModel, two configs",
        run=lambda f, seed: [[[name, list(shape)] for name, shape in f(config).items()] for config in configs(seed)],
        expected=lambda seed: [[[n, list(shape)] for n, shape in model_shapes(c).items()] for c in configs(seed)],
        mistakes=(
            Mistake(
                "c_attn as (in, out) gives: that is the file's way. nn.Linear has (out, in).",
                '"attn.c_attn": (3 * C, C)',
                '"attn.c_attn": (C, 3 * C)',
            ),
            Mistake(
                "mlp.c_proj as (in, out) gives: it leads back from 4C to C, so (out, in) is (C, 4C).",
                '"mlp.c_proj": (C, 4 * C)',
                '"mlp.c_proj": (4 * C, C)',
            ),
            Mistake(
                "counting the head gives: lm_head.weight is wte.weight, and is not listed a second time.",
                'return shapes | {"ln_f.weight": (C,), "ln_f.bias": (C,)}',
                'return shapes | {"ln_f.weight": (C,), "ln_f.bias": (C,), "lm_head.weight": (config.vocab_size, C)}',
            ),
            Mistake(
                "a bias of its matrix's shape gives: it has one number for each output.",
                '.bias": shape[:1]',
                '.bias": shape',
            ),
            Mistake("a block with one norm gives: it has two, ln_1 and ln_2.", '"ln_2": (C,), ', ""),
            Mistake(
                "counting blocks from 1 gives: the first one is h.0.",
                "range(config.n_layer)",
                "range(1, config.n_layer + 1)",
            ),
        ),
        hints=(
            "Two tables, then n_layer blocks of six layers with a weight and a bias each, then the last norm.",
            "The dictionary of the six weights' shapes is enough: a bias is as long as its weight's first dimension.",
        ),
    ),
    Exercise(
        name="05.select",
        title="a file's tensors under their short names, and nothing that does not belong",
        target="select_parameters",
        minutes=15,
        level=3,
        module=MODULE,
        against="a list of 4 files that fit and 9 that have to be refused",
        run=select_run,
        expected=select_oracle,
        mistakes=(
            Mistake(
                "refusing a head alone gives: a file that holds the tied tensor once may choose either of its names.",
                '        given.setdefault("wte.weight", head)',
                "        pass",
            ),
            Mistake(
                "a head in the place of the embedding gives: where both are there, they have to be compared.",
                'given.setdefault("wte.weight", head)',
                'given["wte.weight"] = head',
            ),
            Mistake(
                "expecting nn.Linear's shapes gives: `shapes` are the model's, and files hold the four as (in, out).",
                "shape[::-1] if name.endswith(TRANSPOSED) else shape",
                "shape",
            ),
            Mistake(
                "keeping the file's order gives: the result follows `shapes`.",
                "return {name: given[name] for name in shapes}",
                "return given",
            ),
            Mistake(
                "letting unknown tensors pass gives: nothing may be left over. `_check_names` compares both sets.",
                "_check_names(set(given), set(shapes))",
                "_check_names(set(given) & set(shapes), set(shapes))",
            ),
            Mistake(
                "several dtypes in one file give: without `any_dtype` all have wte's.",
                "None if any_dtype else wte.dtype",
                "None",
            ),
        ),
        hints=(
            "`_short_names` takes care of prefix and masks. Take the head out (`pop`), and put it in wte's place only "
            "if that one is empty.",
            "Then `_check_names` on two sets, `_check_kind(name, tensor, shape, dtype or None)` for each name with the "
            "shape that the file should have, and at last the head: dtype, shape and values equal to wte's.",
        ),
    ),
    Exercise(
        name="05.mapping",
        title="from the hub's tensors to the model's",
        target="from_hf_state",
        minutes=10,
        level=2,
        module=MODULE,
        against="GPT-2's logits by y = xW + b on the tensors as the file has them",
        run=hf_run,
        expected=hf_oracle,
        tolerance=1e-4,
        mistakes=(
            Mistake(
                "a square matrix that goes in as it is gives: c_proj fits either way, and has to be turned, too.",
                "name.endswith(TRANSPOSED)",
                "name.endswith(TRANSPOSED) and t.size(0) != t.size(1)",
            ),
            Mistake(
                "tensors as they lie in the file give: the four are (in, out) there, and nn.Linear has (out, in).",
                "t.t() if name.endswith(TRANSPOSED) else t",
                "t",
            ),
            Mistake(
                "turning every matrix gives: the two embeddings are stored as they are used.",
                "name.endswith(TRANSPOSED)",
                "t.dim() == 2",
            ),
            Mistake("sharing memory with the file's tensors gives: the result is a copy.", "copy=True", "copy=False"),
            Mistake(
                "leaving `check_finite` out gives: one NaN spreads through every layer. Refuse it.",
                "        check_finite(name, out[name])\n",
                "",
            ),
            Mistake(
                "refusing several dtypes gives: with `dtype` all are cast, whatever they were.",
                "any_dtype=dtype is not None",
                "any_dtype=False",
            ),
        ),
        hints=(
            "`select_parameters` and `parameter_shapes` answer all questions but one; the rest is `load_v1`'s loop.",
            "`t.to(device=…, dtype=…, copy=True)` takes None, too: as it is. `check_finite` looks at the result.",
        ),
    ),
    Exercise(
        name="05.openai",
        title="OpenAI's names",
        target="from_openai_names",
        minutes=12,
        level=2,
        module=MODULE,
        against="a table of both names, 12 layers, and some that nobody knows",
        run=lambda f, seed: listed(f({theirs: t for theirs, _, t, _ in both_names()})),
        expected=lambda seed: listed({hub: t for _, hub, _, t in both_names()}),
        mistakes=(
            Mistake("keeping the leading 1 gives: OpenAI's (1, in, out) are the hub's (in, out).", "t.squeeze(0)", "t"),
            Mistake(
                "turning the matrices gives: the hub has (in, out), too. `from_hf_state` turns them.",
                "t.squeeze(0)",
                "t.squeeze(0).t()",
            ),
            Mistake("h0 for the hub's h.0 gives: a dot stands between.", "[h, layer] if h", "[h + layer] if h"),
            Mistake(
                "a gain as a bias gives: g is a norm's weight, and so is what has no letter.",
                '"bias" if part == "b" else "weight"',
                '"weight" if part == "w" else "bias"',
            ),
            Mistake(
                "dropping what is not understood gives: it keeps its name, so that the mapping can refuse it.",
                "        out[name] = t",
                "            out[name] = t",
            ),
            Mistake("slashes in a name give: the hub has dots.", '*kind.split("/")', "kind"),
        ),
        hints=(
            "`_OPENAI.fullmatch(name)` gives None, or four groups: h, the layer, what lies between, the last letter. "
            "The tables and ln_f have no h and no layer; the tables have no letter either.",
            "Collect the parts in a list and join them with dots. Only a w of three dimensions is squeezed.",
        ),
    ),
    Exercise(
        name="05.back",
        title="the way back",
        target="to_hf_state",
        minutes=5,
        level=1,
        module=MODULE,
        against="a loop over rows and columns, through a safetensors file",
        run=lambda f, seed: load(save(f(model_state(seed)))),
        expected=back_oracle,
        mistakes=(
            Mistake(
                "a head beside the embedding gives: they are one tensor, which is written once, as wte.weight.",
                ' if name != "lm_head.weight"',
                "",
            ),
            Mistake(
                "matrices as nn.Linear has them give: the file wants the four as (in, out).",
                "(t.t() if name.endswith(TRANSPOSED) else t)",
                "t",
            ),
            Mistake(
                "turning every matrix gives: the two embeddings stay as they are.",
                "name.endswith(TRANSPOSED)",
                "t.dim() == 2",
            ),
            Mistake(
                "views give: `t()` moves no number, and a file wants them in order. `contiguous()` does that.",
                ".contiguous()",
                "",
            ),
        ),
        hints=(
            "A transpose undoes itself: TRANSPOSED names the same four.",
            "The model's state dict has the tied tensor under two names; the file has it under one.",
        ),
    ),
)
