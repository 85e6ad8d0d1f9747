"""The fused kernels against PyTorch, in Triton's interpreter; compiled for two GPUs; what happens without Triton."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from decoding import one_by_one, pad, prompt, random_model

from minigpt_lib.generation import cuda
from minigpt_lib.generation.compiled import step_of
from minigpt_lib.generation.cuda import FusedGPT, interpreted
from minigpt_lib.generation.decode import generate, plan_decode
from minigpt_lib.generation.kv_cache import KVCache
from minigpt_lib.generation.quantized import PackedGPT
from minigpt_lib.model.gpt import GPTConfig, GPTLanguageModel

ROOT = Path(__file__).resolve().parents[1]
with_triton = pytest.mark.skipif(cuda.triton is None, reason="Triton is not installed")
in_interpreter = pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter: TRITON_INTERPRET=1")
SMALL = GPTConfig(vocab_size=71, n_ctx=64, n_embd=24, n_layer=2, n_head=3)  # no width that is a power of two
FEW_ROWS = {"qkv": 32, "join": 8, "widen": 32, "narrow": 16, "head": 16}  # several programs, the last ones half empty


@pytest.fixture
def model(seed: int) -> GPTLanguageModel:
    return random_model(SMALL)


# ---- everywhere


def test_without_triton_it_says_so(seed, monkeypatch):
    monkeypatch.setattr(cuda, "triton", None)
    with pytest.raises(RuntimeError, match=r"needs Triton.*FastGPT\(model\)"):
        FusedGPT(random_model(SMALL))


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0}, {"temperature": 0, "top_p": 0.5}, {"temperature": 0, "n_vocab": 30},
     {"temperature": 0.8, "top_k": 9}, {"min_p": 0.1}, {"top_p": 0.8, "n_vocab": 40}],
)  # fmt: skip
def test_decode_follows_the_options_whatever_the_kernels_are(seed, monkeypatch, options):
    """All that is Python, with PyTorch in the kernels' place: their noise apart, the plain model's text."""
    model, idx = random_model(SMALL), prompt(5)
    monkeypatch.setattr(cuda, "triton", SimpleNamespace(next_power_of_2=lambda n: 1 << (n - 1).bit_length()))
    monkeypatch.setattr(cuda, "interpreted", lambda: True)
    asked = []

    def token(self, inputs: tuple, temperature: float, u: torch.Tensor) -> None:
        asked.append(temperature)
        self.room["logits"].copy_(step_of(self, *inputs)[0, -1])
        self.choice.copy_(self.room["logits"].argmax())

    monkeypatch.setattr(FusedGPT, "token", token)
    fused = FusedGPT(model)
    want = generate(model, idx, 20, generator=torch.Generator().manual_seed(seed), **options)
    got = generate(fused, idx, 20, generator=torch.Generator().manual_seed(seed), **options)
    assert torch.equal(got, want) and asked == [0.0] * 20
    generate(fused, idx, 3, temperature=0.7, n_vocab=71)
    assert asked[20:] == [0.7] * 3  # a temperature alone is the kernel's business


def test_importing_changes_no_environment():
    code = "import os; before = dict(os.environ); import minigpt_lib.generation.cuda; assert dict(os.environ) == before"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@with_triton
@pytest.mark.skipif(interpreted(), reason="runs in the interpreter already")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: kernels are compiled for it")
def test_all_of_this_in_the_interpreter():
    """Another test has imported Triton without its interpreter: this file once more, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


# ---- in the interpreter


@in_interpreter
@pytest.mark.parametrize("weights", [None, "bfloat16", "int8"])
def test_steps_agree_with_the_packed_model(model, weights):
    """Every step from the 6th token to the 40th, through several blocks of the attention's loop."""
    idx = prompt(22)
    fused = FusedGPT(model, weights, splits=2, rows=FEW_ROWS)
    want, got = one_by_one(PackedGPT(model, weights), idx), one_by_one(fused, idx)
    assert want.std() > 0.3 and (got - want).abs().max() <= 5e-5
    assert fused.backend.recordings == 1  # the steps did run there


@in_interpreter
def test_a_bfloat16_model_within_its_rounding(seed):
    model = random_model(SMALL).bfloat16()
    idx = prompt(12)
    exact = random_model(SMALL)
    exact.load_state_dict({name: p.float() for name, p in model.state_dict().items()})
    with torch.no_grad():
        want = exact(idx)[0]
    got = one_by_one(FusedGPT(model, splits=2), idx)
    plain = one_by_one(PackedGPT(model), idx)
    assert got.dtype == torch.float32
    error, usual = ((t.float() - want).norm() / want.norm() for t in (got, plain))
    assert error <= 1.2 * usual + 1e-3  # sums and the residual stream are float32: no worse than PyTorch's


@in_interpreter
@pytest.mark.parametrize(("splits", "block"), [(1, 8), (2, 8), (8, 8), (4, 64)])
@pytest.mark.parametrize("end", [1, 8, 9, 40])
def test_attention_in_shares_is_attention(seed, splits, block, end):
    nh, hs, S = 3, 8, 40
    q, cache = torch.randn(nh * hs), torch.randn(2, nh, S, hs)
    tops, sums, parts = torch.zeros(nh, splits), torch.zeros(nh, splits), torch.zeros(nh, splits, hs)
    cuda.attend_kernel[(nh, splits)](
        q, *cache, torch.tensor([end - 1]), tops, sums, parts, S * hs, hs**-0.5,
        HS=hs, SPLITS=splits, BLOCK=block, PDL=False)  # fmt: skip
    factor = torch.exp2(tops - tops.amax(1, keepdim=True))  # (nh, splits)
    got = (factor[..., None] * parts).sum(1) / (factor * sums).sum(1)[:, None]
    want = F.scaled_dot_product_attention(q.view(nh, 1, hs), cache[0, :, :end], cache[1, :, :end])[:, 0]
    assert (got - want).abs().max() <= 1e-5


@in_interpreter
def test_decode_writes_greedy_text_and_the_cache_goes_on(model):
    fused, idx = FusedGPT(model, splits=2), prompt(9)
    want = generate(model, idx, 12, temperature=0)
    cache = fused.new_cache(1, 21)
    plan = plan_decode(fused, idx, 5, temperature=0, kv_cache=cache)
    assert [part.size(1) for part in fused.decode(plan, first=1)] == [1, 2, 2]
    assert torch.equal(plan.ids, want[:, :14]) and cache.pos == 13
    again = plan_decode(fused, plan.ids, 7, temperature=0, kv_cache=cache)
    list(fused.decode(again))
    assert torch.equal(again.ids, want)


@in_interpreter
def test_draws_follow_the_probabilities_and_the_seed(model):
    fused, n = FusedGPT(model), 300
    logits = 0.2 * torch.randn(71)  # LayerNorm makes about 8 times as much of it, over the temperature
    best, best_at, choice = torch.zeros(5), torch.zeros(5, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    w, x, one, room = torch.zeros(71, 32), torch.zeros(32), torch.ones(32), torch.zeros(71)
    x[0], w[:, 0] = 1.0, logits  # LayerNorm of a unit vector is a known multiple of it
    unit = F.layer_norm(x, (32,))
    p = (w @ unit / 0.7).softmax(-1)

    def drawn(u: float) -> int:
        cuda.head_kernel[(5,)](
            x, one, torch.zeros(32), w, fused.nothing, room, best, best_at, torch.tensor([u]), 1e-5, 0.7, 71,
            K=32, INT8=False, DRAW=True, ROWS=16, BLOCK=32, PDL=False)  # fmt: skip
        cuda.pick_kernel[(1,)](best, best_at, choice, 5, BLOCK=8, PDL=False)
        return int(choice)

    u = torch.rand(n).tolist()
    ids = [drawn(v) for v in u]
    assert ids[:5] == [drawn(v) for v in u[:5]]  # the same number, the same token
    share = torch.bincount(torch.tensor(ids), minlength=71) / n
    assert (share - p).abs().max() < 5 * (0.25 / n) ** 0.5 and share.count_nonzero() > 5


@in_interpreter
def test_a_seed_repeats_and_filters_go_through_choose(model):
    fused, idx = FusedGPT(model), prompt(5)
    for options in ({"temperature": 1.0}, {"temperature": 0.8, "top_k": 3}):
        texts = []
        for seed in (1, 1, 2):
            generator = torch.Generator().manual_seed(seed)
            plan = plan_decode(fused, idx, 8, kv_cache=fused.new_cache(1, 13), generator=generator, **options)
            list(fused.decode(plan))
            texts.append(plan.ids)
        assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    with torch.no_grad():
        top = model(plan.ids)[0][0, 4:-1].topk(3).indices  # (8, 3)
    assert (top == plan.ids[0, 5:, None]).any(-1).all()


@in_interpreter
def test_padding_and_batches_go_through_pytorch(model):
    rows = [prompt(7), prompt(3)]
    idx, mask = pad(rows)
    fused = FusedGPT(model)
    out = generate(fused, idx, 6, temperature=0, attention_mask=mask)
    for row, alone in zip(out, rows, strict=True):
        assert torch.equal(row[7:], generate(model, alone, 6, temperature=0)[0, alone.size(1) :])
    one = generate(fused, idx[1:], 6, temperature=0, attention_mask=mask[1:])
    assert torch.equal(one[0, 7:], out[1, 7:])
    plan = plan_decode(fused, idx, 6, temperature=0, attention_mask=mask)
    assert fused.decode(plan) is None


@in_interpreter
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0}, {"top_k": 5}])
def test_logits_of_nan_end_it_and_name_no_token_that_is_not_there(model, options):
    fused = FusedGPT(model)
    fused.wpe.weight[8] = float("nan")
    with pytest.raises(FloatingPointError, match="before token 10"):
        generate(fused, prompt(5), 10, **options)
    assert 0 <= int(fused.choice) < 71


@in_interpreter
def test_heads_of_an_odd_size_are_refused(seed):
    with pytest.raises(ValueError, match="heads of 13 numbers: the kernels need a power of two"):
        FusedGPT(random_model(GPTConfig(vocab_size=71, n_ctx=64, n_embd=39, n_layer=2, n_head=3)))


@in_interpreter
def test_bad_input_never_reaches_the_kernels(model):
    fused = FusedGPT(model)
    cache = KVCache.for_model(fused, max_len=6)
    fused(prompt(3), kv_cache=cache)
    with pytest.raises(ValueError, match="token id 71"):
        fused(torch.tensor([[71]]), kv_cache=cache)
    with pytest.raises(ValueError, match="kv_cache has shape"):
        wrong = KVCache(GPTConfig(71, 64, 24, 2, 6))
        wrong.pos = 3
        fused(prompt(1), kv_cache=wrong)
    assert cache.pos == 3


# ---- compiled for a GPU, without one


COMPILE = """
import triton, warnings
warnings.simplefilter("ignore")
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from minigpt_lib.generation import cuda
assert not cuda.interpreted()
sizes = dict(K=768, HS=64, SPLITS=8, ROWS=4, BLOCK=1024, DRAW=True, C=768, BIAS=True)
whole = dict(pos="*i64", idx="*i64", choice="*i64", best_at="*i32", room="i32", N="i32", blocks="i32")
real = dict(eps="fp32", scale="*fp32", temperature="fp32")
for kernel in (cuda.{kernel},):
    early = any(p.name == "PDL" for p in kernel.params)  # the notebook's first knows nothing of early starts
    for stored, int8 in (("*bf16", False), ("*i8", True)):
        for target in (80, 90):
            for pdl in (False, True)[: 1 + (early and target >= 90)]:
                signature, constants = {{}}, {{}}
                for p in kernel.params:
                    if p.is_constexpr:
                        signature[p.name] = "constexpr"
                        constants[p.name] = sizes.get(p.name, int8 if p.name == "INT8" else pdl)
                    elif p.name in ("w", "wte"):
                        signature[p.name] = stored
                    elif p.name in ("keys", "values", "wpe", "gain", "shift", "bias"):
                        signature[p.name] = "*bf16"
                    else:
                        signature[p.name] = whole.get(p.name) or real.get(p.name, "*fp32")
                if kernel is cuda.attend_kernel:
                    signature["scale"], constants["BLOCK"] = "fp32", 64
                made = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants),
                                      target=GPUTarget("cuda", target, 32))
                assert len(made.asm["cubin"]) > 500
                assert ("griddepcontrol" in made.asm["ptx"]) == pdl
                if pdl and "w" in signature:  # weights are asked for before the wait
                    ptx = made.asm["ptx"]
                    assert "ld.global" in ptx[: ptx.index("griddepcontrol.wait")], "weights come after the wait"
"""


@with_triton
@pytest.mark.parametrize("kernel", ["product", "qkv", "attend", "join", "widen", "narrow", "head", "pick", "embed"])
def test_kernels_compile_for_two_generations_of_gpus(kernel, tmp_path):
    code = COMPILE.format(kernel=f"{kernel}_kernel")
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
