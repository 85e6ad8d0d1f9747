"""LoRA against PEFT, against the written-out formula, and against bad input."""

import copy
import json
import math
import os
import random
import warnings

import peft
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from minigpt_lib.generation import FastGPT
from minigpt_lib.model.gpt import GPTConfig, GPTLanguageModel
from minigpt_lib.tuning.adapters import use_adapters
from minigpt_lib.tuning.lora import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    count_trainable,
    lora_configs,
    lora_disabled,
    lora_layers,
    lora_parameters,
    merge_lora,
    remove_lora,
    target_layers,
    unmerge_lora,
)
from minigpt_lib.tuning.peft_io import load_adapter, read_adapter_config, save_adapter
from minigpt_lib.weights.convert import to_hf_state
from minigpt_lib.weights.pretrained import load_pretrained, save_pretrained

SHAPE = {"vocab_size": 61, "n_ctx": 24, "n_embd": 24, "n_layer": 2, "n_head": 3}
TARGETS = [("c_attn",), ("c_attn", "mlp.c_proj"), ("c_attn", "c_proj", "c_fc"), ("attn.c_proj", "c_fc")]
transformers.logging.set_verbosity_error()


@pytest.fixture
def model(seed) -> GPTLanguageModel:
    return GPTLanguageModel(GPTConfig(**SHAPE)).eval()


@pytest.fixture
def idx(seed) -> torch.Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (3, 11))


@pytest.fixture
def exact(model) -> GPTLanguageModel:
    """The model in float64. With random adapters attention's scores can be in the hundreds, and softmax then makes
    much of float32's rounding; in float64 two ways to compute the same agree to 1e-10 for all of them.
    """
    return model.double()


def shake(model: nn.Module, std: float = 0.3) -> nn.Module:
    """Fill every A and B, of this library or of PEFT, so that no update is zero by accident.

    With float32 numbers, whatever the type of the model: that is what adapter files hold.
    """
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(std * torch.randn(p.shape))
    return model


@torch.no_grad()
def logits(model: nn.Module, idx: torch.Tensor) -> torch.Tensor:
    out = model(idx)
    return out[0] if isinstance(out, tuple) else out.logits


def hf_twin(model: GPTLanguageModel) -> transformers.GPT2LMHeadModel:
    config = transformers.GPT2Config(
        vocab_size=SHAPE["vocab_size"], n_positions=SHAPE["n_ctx"], n_embd=SHAPE["n_embd"], n_layer=SHAPE["n_layer"],
        n_head=SHAPE["n_head"], bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    twin = transformers.GPT2LMHeadModel(config).eval()
    twin = twin.to(model.wte.weight.dtype)
    twin.transformer.load_state_dict(to_hf_state(model.state_dict()))
    return twin


def assert_close_but_moved(a: torch.Tensor, b: torch.Tensor, base: torch.Tensor, tol: float | None = None) -> None:
    """`tol` (float32: 1e-5, float64: 1e-10) holds for numbers up to 1 and grows with them: digits are what is exact."""
    assert a.dtype == b.dtype
    tol = tol or {torch.float32: 1e-5, torch.float64: 1e-10}[a.dtype]
    tol *= max(1.0, b.abs().max().item())
    worst, moved = (a - b).abs().max().item(), (a - base).abs().max().item()
    assert worst <= tol, f"largest difference {worst:.1e}"
    assert moved > 100 * tol, f"the adapter changed nothing: {moved:.1e}"


def peft_name(name: str) -> str:
    """`h.0.attn.c_attn.adapters.default.lora_A` as PEFT calls it in memory."""
    layer, _, rest = name.partition(".adapters.")
    adapter, matrix = rest.split(".")
    return f"base_model.model.transformer.{layer}.{matrix}.{adapter}.weight"


# ---- the layer


def test_layer_is_the_formula(seed):
    n_in, n_out, r, alpha = random.randint(5, 30), random.randint(5, 30), random.randint(2, 5), random.uniform(1, 40)
    linear = nn.Linear(n_in, n_out)
    layer = shake(LoRALinear(linear, LoRAConfig(r, alpha)))
    branch = layer.adapters["default"]
    x = torch.randn(2, 4, n_in)
    rows = []
    for v in x.view(-1, n_in):  # one vector at a time, in double precision
        a = branch.lora_A.detach().double() @ v.double()  # (r,)
        update = alpha / r * (branch.lora_B.detach().double() @ a)  # (out,)
        rows.append(linear.weight.detach().double() @ v.double() + linear.bias.detach().double() + update)
    want = torch.stack(rows).view(2, 4, n_out).float()
    assert_close_but_moved(layer(x).detach(), want, linear(x).detach(), tol=2e-5)
    assert branch.lora_A.shape == (r, n_in) and branch.lora_B.shape == (n_out, r)
    by_delta = F.linear(x, linear.weight + layer.delta(), linear.bias)
    assert torch.allclose(layer(x), by_delta, atol=2e-5)


def test_layer_starts_as_the_base_and_shares_its_tensors(seed):
    linear = nn.Linear(7, 9, bias=bool(seed % 2))
    layer = LoRALinear(linear, LoRAConfig(3, 6, dropout=0.4))
    x = torch.randn(5, 7)
    assert torch.equal(layer(x), linear(x))  # in training mode too
    assert layer.weight is linear.weight and layer.bias is linear.bias
    bound, branch = 1 / math.sqrt(7), layer.adapters["default"]
    assert 0 < branch.lora_A.abs().max() <= bound and not branch.lora_B.any()


def test_a_is_drawn_as_peft_draws_it(seed):
    A = LoRALinear(nn.Linear(400, 100), LoRAConfig(64)).adapters["default"].lora_A
    bound = 1 / math.sqrt(400)
    assert A.abs().max() <= bound and A.abs().max() > 0.98 * bound
    assert abs(A.std().item() / (bound / math.sqrt(3)) - 1) < 0.03


def test_a_seed_gives_the_same_adapter_on_every_device(seed, monkeypatch):
    """A is drawn on the CPU and then moved; a CUDA generator would give other numbers. No GPU needed: fake tensors."""
    drawn, kaiming = [], nn.init.kaiming_uniform_

    def noted(t: torch.Tensor, **options) -> torch.Tensor:
        drawn.extend([t.device.type] * (len(t) == 3))  # A, and not the layers' own weights
        return kaiming(t, **options)

    monkeypatch.setattr(nn.init, "kaiming_uniform_", noted)
    LoRALinear(nn.Linear(7, 9), LoRAConfig(3))
    layer = nn.Linear(7, 9, device="meta")
    assert LoRALinear(layer, LoRAConfig(3)).adapters["default"].lora_A.is_meta
    with FakeTensorMode():
        layer.weight = nn.Parameter(torch.empty(9, 7, device="cuda"))
        branch = LoRALinear(layer, LoRAConfig(3)).adapters["default"]
        assert (branch.lora_A.device.type, branch.lora_B.device.type) == ("cuda", "cuda")
    assert drawn == ["cpu", "meta", "cpu"]


def test_dropout_only_on_the_branch(seed):
    linear = nn.Linear(16, 12)
    layer = LoRALinear(linear, LoRAConfig(4, 4, dropout=0.5)).train()
    x = torch.randn(6, 16)
    for _ in range(5):  # with an empty branch nothing random is left
        assert torch.equal(layer(x), linear(x))
    shake(layer)
    with torch.no_grad():
        torch.manual_seed(seed)
        got = layer(x)
        torch.manual_seed(seed)
        dropped = F.dropout(x, 0.5)
        branch = layer.adapters["default"]
        want = linear(x) + branch.scaling * (dropped @ branch.lora_A.T @ branch.lora_B.T)
    assert torch.allclose(got, want, atol=1e-5)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_branch_is_kept_in_float32_beside_half_precision(seed):
    linear = nn.Linear(16, 12).to(torch.bfloat16)
    layer = shake(LoRALinear(linear, LoRAConfig(4)))
    assert {p.dtype for p in layer.adapters.parameters()} == {torch.float32}
    assert layer(torch.randn(3, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


# ---- the model


@pytest.mark.parametrize("targets", TARGETS)
def test_added_adapter_changes_nothing_yet(model, idx, targets):
    before, names = logits(model, idx), dict(model.named_parameters())
    assert add_lora(model, r=3, alpha=5, dropout=0.3, targets=targets) is model
    assert torch.equal(logits(model, idx), before)
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in names.items())  # base names and tensors stay
    assert set(after) - set(names) == set(lora_parameters(model))


def test_only_a_and_b_are_trained(model, idx):
    add_lora(model, r=4, targets=("c_attn", "c_fc"))
    shake(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(idx, idx)[1].backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.any()) == ("lora_" in name), name
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != ("lora_" in name), name


def test_gradients_equal_pefts(model, idx):
    add_lora(model, r=3, alpha=11, targets=("c_attn", "c_fc"))
    shake(model)
    wanted = peft.LoraConfig(r=3, lora_alpha=11, target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM")
    twin = hf_twin(remove_lora(copy.deepcopy(model)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(twin, wanted)
    mine = lora_parameters(model)
    pairs = {name: theirs.get_parameter(peft_name(name)) for name in mine}
    with torch.no_grad():
        for name, p in pairs.items():
            p.copy_(mine[name])
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    theirs(idx, labels=idx).loss.backward()
    for name, p in pairs.items():
        assert torch.allclose(mine[name].grad, p.grad, atol=1e-5), name
        assert mine[name].grad.abs().max() > 1e-4, name


def test_gpt2_counts():
    with torch.device("meta"):
        gpt2 = GPTLanguageModel(GPTConfig.preset("gpt2"))
        untied = gpt2.num_parameters(tied=False)
        trained, total = count_trainable(add_lora(gpt2, r=8))
    assert (trained, total, untied) == (294_912, 124_734_720, 163_037_184)
    assert f"{trained / total:.4%}" == "0.2364%" and f"{trained / untied:.3%}" == "0.181%"


@pytest.mark.parametrize("targets", TARGETS)
def test_counts_are_r_times_in_plus_out(model, seed, targets):
    r = random.randint(1, 24)
    base = model.num_parameters()
    add_lora(model, r=r, targets=targets)
    want = sum(r * (m.in_features + m.out_features) for m in lora_layers(model).values())
    assert count_trainable(model) == (want, base + want)


def test_suffixes_match_as_in_peft(model):
    for targets in TARGETS:
        mine = set(lora_layers(add_lora(copy.deepcopy(model), r=2, targets=targets)))
        wanted = peft.LoraConfig(r=2, target_modules=list(targets), task_type="CAUSAL_LM")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.get_peft_model(hf_twin(model), wanted)
        names = {name for name, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
        assert mine == {name.removeprefix("base_model.model.transformer.") for name in names}


def test_one_target_as_a_string(model):
    assert set(lora_layers(add_lora(model, 2, targets="c_fc"))) == {"h.0.mlp.c_fc", "h.1.mlp.c_fc"}


# ---- thirds of the fused matrix, wildcards, the tied head, scales


@pytest.mark.parametrize("parts", ["q", "v", "qv", "kv", "qkv"])
def test_thirds_move_only_their_heads(model, idx, parts):
    """Queries, keys or values change where they are named; the others are the base's, bit for bit."""
    base = model.h[0].attn
    x = torch.randn(2, 7, SHAPE["n_embd"])
    with torch.no_grad():
        before = dict(zip("qkv", base.heads(x), strict=True))
        shake(add_lora(model, r=3, alpha=5, targets=[f"c_attn.{p}" for p in parts]))
        after = dict(zip("qkv", model.h[0].attn.heads(x), strict=True))
    for part in "qkv":
        assert torch.equal(before[part], after[part]) == (part not in parts), part
    want = len(parts) * 3 * (SHAPE["n_embd"] + SHAPE["n_embd"]) * SHAPE["n_layer"]
    assert count_trainable(model)[0] == want


def test_a_third_is_the_formula(model, seed):
    C = SHAPE["n_embd"]
    shake(add_lora(model, r=2, alpha=3, targets=("c_attn.k",)))
    layer, x = model.h[1].attn.c_attn, torch.randn(5, C)
    branch = layer.adapters["default:k"]
    with torch.no_grad():
        want = F.linear(x, layer.weight, layer.bias)
        want[:, C : 2 * C] += 1.5 * x @ branch.lora_A.T @ branch.lora_B.T
        assert torch.allclose(layer(x), want, atol=1e-5)
        assert torch.allclose(F.linear(x, layer.weight + layer.delta(), layer.bias), want, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("h.0.*", ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj"]),
        ("h.[1].mlp.c_*", ["h.1.mlp.c_fc", "h.1.mlp.c_proj"]),
        ("h.?.attn.c_proj", ["h.0.attn.c_proj", "h.1.attn.c_proj"]),
        ("lm_head", ["lm_head"]),
    ],
)
def test_wildcards(model, targets, names):
    assert list(lora_layers(add_lora(model, r=2, targets=targets))) == names


def test_all_linear_is_pefts_all_linear_and_leaves_the_head(model):
    mine = set(lora_layers(add_lora(copy.deepcopy(model), r=2, targets="all-linear")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        theirs = peft.get_peft_model(hf_twin(model), wanted)
    names = {name for name, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert mine == {name.removeprefix("base_model.model.transformer.") for name in names}
    assert set(target_layers(model, LoRAConfig(targets=("*",)))) == mine


def test_the_tied_head_only_when_asked_and_never_merged(exact, idx, tmp_path):
    base, twin = logits(exact, idx), hf_twin(exact)
    shake(add_lora(exact, r=3, targets=("c_attn", "lm_head")))
    weight = exact.wte.weight.clone()
    with_head = logits(exact, idx)
    with pytest.raises(ValueError, match="lm_head shares its matrix with the token embedding"):
        merge_lora(exact)
    assert torch.equal(logits(exact, idx), with_head) and torch.equal(exact.wte.weight, weight)
    save_adapter(exact, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(twin, tmp_path).eval()
    assert_close_but_moved(with_head, logits(theirs, idx), base)
    plain = remove_lora(exact)
    assert torch.equal(logits(plain, idx), base) and plain.lm_head.weight is plain.wte.weight


@pytest.mark.parametrize("r", [1, 4, 9])
def test_scales(model, idx, r):
    plain, stable = LoRAConfig(r, 6), LoRAConfig(r, 6, rslora=True)
    assert plain.scaling == 6 / r and stable.scaling == pytest.approx(6 / math.sqrt(r))
    twins = [copy.deepcopy(model) for _ in range(2)]
    for twin, rslora in zip(twins, (False, True), strict=True):
        add_lora(twin, r, 6, rslora=rslora)
        torch.manual_seed(r)
        shake(twin)
    deltas = [twin.h[0].attn.c_attn.delta() for twin in twins]
    assert torch.allclose(deltas[1], math.sqrt(r) * deltas[0], rtol=1e-5) and deltas[0].abs().max() > 1e-2


def test_float32_adapter_over_a_bfloat16_base_learns_small_steps(model, idx):
    """One small step moves A and B although bfloat16 could not hold the change; the base keeps its bits."""
    model.to(torch.bfloat16)
    shake(add_lora(model, r=3))
    base = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
    before = {name: p.clone() for name, p in lora_parameters(model).items()}
    optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=1e-5, weight_decay=0.0)
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    optimizer.step()
    for name, p in lora_parameters(model).items():
        assert p.dtype == torch.float32 and not torch.equal(p, before[name]), name
        large = before[name].abs() > 0.1
        assert torch.equal(before[name][large].bfloat16(), p[large].bfloat16()) or (p - before[name]).abs().max() < 2e-5
    assert all(torch.equal(model.get_parameter(name), p) and p.dtype == torch.bfloat16 for name, p in base.items())


# ---- several adapters


@pytest.fixture
def duo(exact):
    """Two shaken adapters of different shape on one base: "one" on c_attn, "two" on thirds of it and on c_fc."""
    shake(add_lora(exact, r=3, alpha=5, name="one"))
    return shake(add_lora(exact, r=2, alpha=4, targets=("c_attn.v", "c_fc"), rslora=True, name="two"))


def alone(base, duo, name):
    """The base with only one of duo's adapters, built anew."""
    c = lora_configs(duo)[name]
    model = add_lora(copy.deepcopy(base), c.r, c.alpha, c.dropout, c.targets, rslora=c.rslora, name=name)
    with torch.no_grad():
        for key, p in lora_parameters(model).items():
            p.copy_(duo.get_parameter(key))
    return model


def test_switching(seed, idx):
    base = GPTLanguageModel(GPTConfig(**SHAPE)).eval()
    duo = copy.deepcopy(base)
    shake(add_lora(duo, r=3, name="one"))
    assert torch.equal(logits(duo, idx), logits(alone(base, duo, "one"), idx))
    shake(add_lora(duo, r=2, targets=("c_attn.v", "c_fc"), name="two"))
    for name in ("two", "one", "two"):
        want = logits(alone(base, duo, name), idx)
        assert torch.equal(logits(use_adapters(duo, name), idx), want)
        assert not torch.equal(want, logits(base, idx))
        trained = {key for key, p in duo.named_parameters() if p.requires_grad}
        assert trained == set(lora_parameters(alone(base, duo, name)))
    with lora_disabled(duo):
        assert torch.equal(logits(duo, idx), logits(base, idx))
    assert torch.equal(logits(remove_lora(duo), idx), logits(base, idx)) and lora_configs(duo) == {}


def test_weighted_stack_equals_pefts(duo, idx, tmp_path):
    base = remove_lora(copy.deepcopy(duo))
    weights = {"one": random.uniform(0.2, 2), "two": random.uniform(-2, -0.2)}
    save_adapter(duo, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(hf_twin(base), tmp_path / "one", adapter_name="one").eval()
        theirs.load_adapter(tmp_path / "two", adapter_name="two")
        theirs.base_model.set_adapter(["one", "two"])
    for m in theirs.modules():
        if isinstance(m, peft.tuners.lora.LoraLayer):
            for name, weight in weights.items():
                if name in m.scaling:
                    m.scaling[name] *= weight
    mine = logits(use_adapters(duo, weights), idx)
    assert_close_but_moved(mine, logits(theirs, idx), logits(base, idx))


def test_merging_a_stack_and_coming_back(duo, idx):
    base = remove_lora(copy.deepcopy(duo))
    use_adapters(duo, {"one": 0.5, "two": 1.5})
    mixed = logits(duo, idx)
    for _ in range(10):  # no drift, however often
        assert_close_but_moved(logits(merge_lora(duo), idx), mixed, logits(base, idx))
        with pytest.raises(ValueError, match="merged"):
            use_adapters(duo, "one")
        with pytest.raises(ValueError, match="merged"):
            add_lora(duo, r=2, name="three")
        unmerge_lora(duo)
    assert all(torch.equal(duo.get_parameter(name), p) for name, p in base.named_parameters())
    assert torch.equal(logits(duo, idx), mixed)
    for name in ("one", "two"):  # merging dropped none of them
        assert not torch.equal(logits(use_adapters(duo, name), idx), logits(base, idx))


def test_only_active_adapters_learn(duo, idx):
    use_adapters(duo, "one")
    duo(idx, idx)[1].backward()
    for name, p in lora_parameters(duo).items():
        assert (p.grad is not None and p.grad.any()) == (".one." in name), name


@pytest.mark.parametrize("which", ["three", {}, {"one": 1, "x": 2}, []])
def test_unknown_adapters(duo, idx, which):
    before = logits(duo, idx)
    with pytest.raises((ValueError, AttributeError), match="this model has one, two" if which != [] else "items"):
        use_adapters(duo, which)
    assert torch.equal(logits(duo, idx), before)


def test_named_adapters_on_disk(duo, idx, tmp_path):
    base = remove_lora(copy.deepcopy(duo))
    save_adapter(duo, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]
    again = load_adapter(load_adapter(copy.deepcopy(base), tmp_path / "one", "a"), tmp_path / "two", "b")
    for mine, theirs in (("one", "a"), ("two", "b"), ({"one": 2, "two": -1}, {"a": 2, "b": -1})):
        want, got = logits(use_adapters(duo, mine), idx), logits(use_adapters(again, theirs), idx)
        assert_close_but_moved(got, want, logits(base, idx))
    with pytest.raises(ValueError, match="already has LoRA layers named 'a'"):
        load_adapter(again, tmp_path / "one", "a")


# ---- merge, unmerge, switch off


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("dtype, std", [(torch.float64, 0.3), (torch.float32, 0.05)])
def test_merge_and_unmerge(model, idx, targets, dtype, std):
    base = logits(model.to(dtype), idx)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    add_lora(model, r=3, alpha=random.uniform(3, 20), targets=targets)
    with_lora = logits(shake(model, std), idx)
    merged = logits(merge_lora(model), idx)
    assert_close_but_moved(merged, with_lora, base)
    with pytest.raises(ValueError, match="merged already"):
        merge_lora(model)
    assert torch.equal(logits(model, idx), merged), "the refused merge has changed something"
    with lora_disabled(model):
        assert torch.equal(logits(model, idx), base)
    unmerge_lora(model)
    assert torch.equal(logits(model, idx), with_lora)
    assert all(torch.equal(model.get_parameter(name), p) for name, p in weights.items())


def test_merge_equals_pefts_merge(exact, idx, tmp_path):
    base = logits(exact, idx)
    twin = hf_twin(exact)
    shake(add_lora(exact, r=4, alpha=9, targets=("c_attn", "c_proj")))
    save_adapter(exact, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(twin, tmp_path).merge_and_unload().eval()
    assert_close_but_moved(logits(merge_lora(exact), idx), logits(theirs, idx), base)


def test_merge_in_half_precision_rounds_once(model):
    model.to(torch.bfloat16)
    base = {name: p.clone() for name, p in model.named_parameters()}
    shake(add_lora(model, r=4))
    for layer in lora_layers(model).values():
        want = (layer.weight.double() + layer.delta().double()).to(torch.bfloat16)
        layer.want = want
    merge_lora(model)
    for layer in lora_layers(model).values():
        assert (layer.weight == layer.want).float().mean() > 0.999  # float32 and float64 sums round alike but for ties
    unmerge_lora(model)
    assert all(torch.equal(model.get_parameter(name), p) for name, p in base.items())


def test_inside_disabled_a_merged_model_shows_its_base(model, idx, tmp_path):
    """Whoever looks at the weights inside the block sees the base: a copy on disk, a fast version, a state dict."""
    base, weights = logits(model, idx), {name: p.clone() for name, p in model.named_parameters()}
    merge_lora(shake(add_lora(model, r=3)))
    tuned = logits(model, idx)
    layer = model.h[0].attn.c_attn
    kept = layer.weight.clone()
    with lora_disabled(model), lora_disabled(model):
        assert torch.equal(layer.weight, weights["h.0.attn.c_attn.weight"])
        assert torch.equal(layer.effective_weight(), layer.weight) and not layer.pending
        save_pretrained(model, tmp_path)
        fast = FastGPT(model, compile=False)
        for call in (merge_lora, unmerge_lora, remove_lora, lambda m: add_lora(m, name="other")):
            with pytest.raises(ValueError, match="inside lora_disabled"):
                call(model)
    assert torch.equal(logits(load_pretrained(tmp_path), idx), base) and not torch.equal(tuned, base)
    assert torch.allclose(logits(fast, idx), base, atol=1e-4)
    assert torch.equal(layer.weight, kept) and torch.equal(logits(model, idx), tuned)
    unmerge_lora(model)
    assert all(torch.equal(model.get_parameter(name), p) for name, p in weights.items())


def test_effective_weight(model, idx):
    shake(add_lora(model, r=3))
    layer, x = model.h[0].attn.c_attn, torch.randn(4, SHAPE["n_embd"])
    before = layer.weight.clone()
    assert layer.pending and torch.allclose(F.linear(x, layer.effective_weight(), layer.bias), layer(x), atol=1e-5)
    assert not torch.equal(layer.effective_weight(), before)
    with lora_disabled(model):
        assert not layer.pending and torch.equal(layer.effective_weight(), before)
    unmerged = layer.effective_weight()
    merge_lora(model)
    assert not layer.pending and torch.equal(layer.effective_weight(), unmerged) and torch.equal(layer.weight, unmerged)


def test_disabled_comes_back_also_after_an_error(model, idx):
    base = logits(model, idx)
    shake(add_lora(model, r=2))
    tuned = logits(model, idx)
    with pytest.raises(RuntimeError), lora_disabled(model), lora_disabled(model):
        assert torch.equal(logits(model, idx), base)
        raise RuntimeError
    assert torch.equal(logits(model, idx), tuned) and not torch.equal(tuned, base)


def test_remove(model, idx):
    base, weights = logits(model, idx), {name: p.clone() for name, p in model.named_parameters()}
    shake(add_lora(model, r=2))
    merged = logits(merge_lora(copy.deepcopy(model)), idx)
    baked = remove_lora(merge_lora(copy.deepcopy(model)), keep_merged=True)
    assert torch.equal(logits(baked, idx), merged) and not torch.equal(merged, base)
    for plain in (remove_lora(copy.deepcopy(model)), remove_lora(merge_lora(model))):
        assert not lora_layers(plain) and torch.equal(logits(plain, idx), base)
        assert all(torch.equal(plain.get_parameter(name), p) for name, p in weights.items())
        assert all(p.requires_grad for p in plain.parameters())
        assert plain.lm_head.weight is plain.wte.weight
        add_lora(plain, r=2)  # a fresh adapter is possible again


# ---- the file format


THIRDS = [("c_attn.q", "c_attn.v"), ("c_attn.k", "c_fc"), ("all-linear",), ("h.1.*",)]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", TARGETS + THIRDS)
def test_peft_reads_ours(exact, idx, tmp_path, targets, rslora):
    base, twin = logits(exact, idx), hf_twin(exact)
    r, alpha = random.randint(1, 8), random.uniform(1, 30)
    shake(add_lora(exact, r=r, alpha=alpha, dropout=0.1, targets=targets, rslora=rslora))
    save_adapter(exact, tmp_path, base_name="openai-community/gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(twin, tmp_path).eval()
    assert_close_but_moved(logits(exact, idx), logits(theirs, idx), base)
    assert theirs.peft_config["default"].base_model_name_or_path == "openai-community/gpt2"
    assert theirs.peft_config["default"].fan_in_fan_out is True and theirs.peft_config["default"].use_rslora is rslora


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", TARGETS)
def test_we_read_pefts(exact, idx, tmp_path, targets, rslora):
    wanted = peft.LoraConfig(
        r=random.randint(1, 8), lora_alpha=random.randint(1, 30), target_modules=list(targets), task_type="CAUSAL_LM",
        use_rslora=rslora,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = shake(peft.get_peft_model(hf_twin(exact), wanted)).eval()
        theirs.save_pretrained(tmp_path)
    base = logits(exact, idx)
    load_adapter(exact, tmp_path)
    assert_close_but_moved(logits(exact, idx), logits(theirs, idx), base)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"]},
        {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"h.1.attn.c_attn": 2, "c_fc": 5}},
        {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 1}, "alpha_pattern": {"h.0.attn.c_attn": 9}},
        {"target_modules": ["c_attn", "c_fc"], "init_lora_weights": "pissa"},
        {"target_modules": ["c_attn"], "init_lora_weights": "pissa", "rank_pattern": {"h.0.attn.c_attn": 5}},
        {"target_modules": ["c_attn"], "init_lora_weights": "gaussian"},
        {"target_modules": ["c_attn"], "init_lora_weights": False},
    ],
    ids=lambda o: "-".join(str(v) for v in o.values()),
)
def test_we_read_pefts_variants(model, idx, tmp_path, options, rslora):
    wanted = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", use_rslora=rslora, **options)
    base = logits(model, idx)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = shake(peft.get_peft_model(hf_twin(model), wanted), 0.05).eval()
        theirs.save_pretrained(tmp_path)
    ours = load_adapter(copy.deepcopy(model), tmp_path)
    want = logits(theirs, idx)
    assert_close_but_moved(logits(ours, idx), want, base, 2e-5)
    save_adapter(ours, tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(hf_twin(model), tmp_path / "again").eval()
    assert_close_but_moved(logits(back, idx), want, base, 2e-5)
    assert_close_but_moved(logits(merge_lora(ours), idx), want, base, 2e-5)


def test_files_get_the_permissions_of_any_new_file(model, tmp_path):
    if os.name != "posix":
        pytest.skip("permissions are POSIX's")
    before = os.umask(0o027)
    try:
        save_adapter(shake(add_lora(model, r=2)), tmp_path)
    finally:
        os.umask(before)
    assert {p.name: oct(p.stat().st_mode & 0o777) for p in tmp_path.iterdir()} == {
        "adapter_config.json": "0o640", "adapter_model.safetensors": "0o640",
    }  # fmt: skip


def test_ranks_of_their_own_there_and_back(exact, idx, tmp_path):
    base, twin = logits(exact, idx), hf_twin(exact)
    own = {"ranks": {"c_fc": 6}, "alphas": {"h.1.mlp.c_fc": 2}}
    add_lora(exact, r=3, alpha=5, targets=("c_attn.q", "c_attn.v", "c_fc"), **own)
    shake(exact)
    assert len(exact.h[0].mlp.c_fc.adapters["default"].lora_A) == 6
    assert exact.h[1].mlp.c_fc.adapters["default"].scaling == 2 / 6
    save_adapter(exact, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(twin, tmp_path).eval()
    assert_close_but_moved(logits(exact, idx), logits(theirs, idx), base)
    with pytest.raises(ValueError, match="r=3"):
        LoRAConfig(r=3, ranks=(("c_fc", 0),))


def test_file_layout_and_round_trip(model, idx, tmp_path):
    plain = copy.deepcopy(model)
    shake(add_lora(model, r=3, alpha=7, dropout=0.25, targets=("c_attn", "attn.c_proj")))
    assert save_adapter(model, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    files = sorted(p.name for p in (tmp_path / "new" / "folder").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(tmp_path / "new" / "folder" / "adapter_model.safetensors")
    C = SHAPE["n_embd"]
    key = "base_model.model.transformer.h.1.attn.c_attn.lora_{}.weight"
    assert tensors[key.format("A")].shape == (3, C) and tensors[key.format("B")].shape == (3 * C, 3)
    assert len(tensors) == 8
    again = load_adapter(plain, tmp_path / "new" / "folder")
    assert torch.equal(logits(again, idx), logits(model, idx)) and lora_configs(again) == lora_configs(model)
    assert set(lora_parameters(again)) == {name for name, p in again.named_parameters() if p.requires_grad}


def test_saving_while_merged_gives_the_same_file(model, tmp_path):
    shake(add_lora(model, r=3))
    save_adapter(model, tmp_path / "a")
    save_adapter(merge_lora(model), tmp_path / "b")
    a, b = ((tmp_path / x / "adapter_model.safetensors").read_bytes() for x in "ab")
    assert a == b


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"r": 0}, "r=0"),
        ({"r": -3}, "r=-3"),
        ({"r": 2.5}, "r=2.5"),
        ({"r": 25}, r"r=25 .*min\(in, out\)=24"),
        ({"r": 25, "targets": ("c_fc", "c_attn.v")}, r"r=25 .*min\(in, out\)=24"),
        ({"alpha": 0}, "alpha=0"),
        ({"alpha": math.inf}, "alpha=inf"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"targets": ()}, "targets is empty"),
        ({"targets": ("c_attn", "q_proj")}, "'q_proj' matches no linear layer.*c_attn"),
        ({"targets": ("attn",)}, "'attn' matches no linear layer"),
        ({"targets": ("*head",)}, r"'\*head' matches no linear layer"),
        ({"targets": ("c_proj.q",)}, "'c_proj.q' matches no linear layer"),
        ({"targets": ("c_attn.x",)}, "'c_attn.x' matches no linear layer"),
        ({"name": ""}, "name=''"),
        ({"name": "a.b"}, "name='a.b'"),
        ({"name": "../up"}, "name='../up'"),
    ],
)
def test_bad_arguments_leave_the_model_alone(model, idx, arguments, words):
    before = logits(model, idx)
    with pytest.raises(ValueError, match=words):
        add_lora(model, **arguments)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model, idx), before)


def test_wrong_order_of_calls(model, idx):
    for call in (merge_lora, unmerge_lora, remove_lora, lambda m: save_adapter(m, "nowhere")):
        with pytest.raises(ValueError, match="no LoRA layers"):
            call(model)
    with pytest.raises(ValueError, match="no LoRA layers"), lora_disabled(model):
        pass
    shake(add_lora(model, r=2))
    with pytest.raises(ValueError, match="already has LoRA layers named 'default'"):
        add_lora(model, r=2)
    for call in (unmerge_lora, lambda m: remove_lora(m, keep_merged=True)):
        with pytest.raises(ValueError, match="merge"):
            call(model)
    merged = logits(merge_lora(model), idx)
    with pytest.raises(ValueError, match="merged already"):
        merge_lora(model)
    assert torch.equal(logits(model, idx), merged)


def test_merging_numbers_that_are_not_finite_is_refused(model, idx):
    shake(add_lora(model, r=2))
    before = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
    with torch.no_grad():
        model.h[1].attn.c_attn.adapters["default"].lora_B[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"h\.1\.attn\.c_attn .*not finite"):
        merge_lora(model)
    assert all(torch.equal(model.get_parameter(name), p) for name, p in before.items())
    assert not any(layer.merged for layer in lora_layers(model).values())


@pytest.fixture
def adapter(model, tmp_path):
    """A folder with a sound adapter, and the plain model that it fits."""
    save_adapter(shake(add_lora(copy.deepcopy(model), r=3)), tmp_path)
    return tmp_path


def change_config(folder, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {r"h\\.0.*": 2}}, "rank_pattern holds the regular expression"),
        ({"rank_pattern": {"c_attn": 2}}, r"shape \(3, 24\).*needs \(2, 24\)"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"init_lora_weights": "eva"}, "init_lora_weights='eva'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"alora_invocation_tokens": [3, 4]}, r"alora_invocation_tokens=\[3, 4\]"),
        ({"corda_config": {"a": 1}}, "corda_config="),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"a_variant_of_next_year": "on"}, "a_variant_of_next_year='on'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["wte"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"target_modules": "c_.*"}, "target_modules is 'c_.*'"),
        ({"target_modules": ["q_proj"]}, "'q_proj' matches no linear layer"),
        ({"r": 0}, "r=0"),
        ({"r": 4}, r"shape \(3, 24\).*needs \(4, 24\)"),
        ({"target_modules": ["c_attn", "c_fc"]}, "4 tensors missing.*c_fc"),
    ],
)
def test_adapters_that_do_not_fit(model, adapter, changes, words):
    change_config(adapter, **changes)
    with pytest.raises(ValueError, match=words):
        load_adapter(model, adapter)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"n_embd": 36}, r"h\.0\.attn\.c_attn\.lora_A\.weight has shape \(3, 24\), this model needs \(3, 36\)"),
        ({"n_layer": 1}, "0 tensors missing .*2 unexpected .*h.1.attn"),
        ({"n_layer": 3}, "2 tensors missing .*h.2.attn.* 0 unexpected"),
    ],
)
def test_an_adapter_for_another_base_is_refused(adapter, shape, words):
    other = GPTLanguageModel(GPTConfig(**(SHAPE | shape)))
    with pytest.raises(ValueError, match=words):
        load_adapter(other, adapter)
    assert not lora_layers(other) and all(p.requires_grad for p in other.parameters())


def test_damaged_adapter_files(model, adapter):
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_adapter(model, adapter)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors does not exist"):
        load_adapter(model, adapter)
    config.write_text('{"peft_type": ')
    with pytest.raises(ValueError, match="not JSON"):
        load_adapter(model, adapter)
    config.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_config.json does not exist"):
        load_adapter(model, adapter)
    assert not lora_layers(model)


def test_wrong_tensors(model, adapter):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    first = sorted(tensors)[0]
    save_file(tensors | {"base_model.model.extra.lora_A.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="1 unexpected.*extra"):
        load_adapter(model, adapter)
    save_file({k: v for k, v in tensors.items() if k != first}, path)
    with pytest.raises(ValueError, match="1 tensors missing"):
        load_adapter(model, adapter)
    save_file(tensors | {first: torch.full_like(tensors[first], math.nan)}, path)
    with pytest.raises(ValueError, match="not finite"):
        load_adapter(model, adapter)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="already has LoRA layers named 'default'"):
        load_adapter(load_adapter(model, adapter), adapter)


def test_a_failed_save_leaves_the_old_files(model, adapter, monkeypatch):
    before = {p.name: p.read_bytes() for p in adapter.iterdir()}
    other = shake(add_lora(copy.deepcopy(model), r=3))

    def full_disk(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("minigpt_lib.tuning.peft_io.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_adapter(other, adapter)
    assert {name: (adapter / name).read_bytes() for name in before} == before


def test_reading_defaults(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["c_attn"]}')
    assert read_adapter_config(tmp_path) == LoRAConfig(8, 8, 0.0, ("c_attn",))
