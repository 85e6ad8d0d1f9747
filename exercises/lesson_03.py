"""Exercises of 03, the GPT-2 model."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from exercises.checking import Exercise, Mistake
from minigpt_lib.model.gpt import GPTConfig

MODULE = "minigpt_lib.model.gpt"
CONFIG = GPTConfig(vocab_size=31, n_ctx=12, n_embd=24, n_layer=2, n_head=3)


def wide_awake(module: nn.Module, seed: int) -> nn.Module:
    """All parameters random and large enough to matter, LayerNorm's too; the same for the same seed."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=gen) / 4 + (p.dim() == 1) * 0.5)
    return module.eval()


def norm_inputs() -> tuple:
    """Rows of scale 1, 30 and 0.002 (whose variance is below eps), with a gain and a bias."""
    x = torch.randn(2, 3, 16) * torch.tensor([[1.0], [30.0], [0.002]]) + torch.randn(3, 1)
    return x.double(), torch.randn(16).double(), torch.randn(16).double()


def block_and_input(cls: type, seed: int) -> tuple[nn.Module, torch.Tensor]:
    block = wide_awake(cls(CONFIG), seed)
    return block, torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(seed + 1))


def block_oracle(seed: int) -> torch.Tensor:
    """Pre-norm, spelled out with torch's functions."""
    from minigpt_lib.model.gpt import Block

    b, x = block_and_input(Block, seed)
    normed = F.layer_norm(x, (24,), b.ln_1.weight, b.ln_1.bias, 1e-5)
    q, k, v = (t.unflatten(-1, (3, 8)).transpose(1, 2) for t in b.attn.c_attn(normed).chunk(3, -1))
    seen = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    x = x + b.attn.c_proj(seen)
    normed = F.layer_norm(x, (24,), b.ln_2.weight, b.ln_2.bias, 1e-5)
    return x + b.mlp.c_proj(F.gelu(b.mlp.c_fc(normed), approximate="tanh"))


def ids_of(seed: int) -> torch.Tensor:
    return torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(seed + 1))


def model_run(cls: type, seed: int) -> torch.Tensor:
    return wide_awake(cls(CONFIG), seed)(ids_of(seed))


def model_oracle(seed: int) -> torch.Tensor:
    """The library's model with the same weights, which 03 compares with Transformers'."""
    from minigpt_lib.model.gpt import GPTLanguageModel

    return wide_awake(GPTLanguageModel(CONFIG), seed)(ids_of(seed))[0]


def loss_inputs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Some targets that count, one, and none; the last in bfloat16."""
    logits, targets = 3 * torch.randn(2, 5, 31), torch.randint(31, (2, 5))
    targets[0, :3] = -100
    one = torch.full_like(targets, -100)
    one[1, 2] = 7
    return [(logits, targets), (logits, one), (logits, torch.full_like(targets, -100)), (logits.bfloat16(), targets)]


def loss_oracle(seed: int) -> list[torch.Tensor]:
    losses = [F.cross_entropy(x.float().flatten(0, 1), t.flatten(), ignore_index=-100) for x, t in loss_inputs()]
    return [losses[0], losses[1], torch.tensor(0.0), losses[3]]  # nothing counts: no loss, where torch says NaN


def block_run(cls: type, seed: int) -> torch.Tensor:
    block, x = block_and_input(cls, seed)
    return block(x)


EXERCISES = (
    Exercise(
        name="03.layer_norm",
        title="LayerNorm from its formula",
        target="layer_norm_v1",
        minutes=8,
        level=1,
        module=MODULE,
        against="torch's layer_norm, rows of scale 1, 30 and 0.002",
        run=lambda f, seed: f(*norm_inputs()),
        expected=lambda seed: (lambda x, w, b: F.layer_norm(x, (16,), w, b, 1e-5))(*norm_inputs()),
        mistakes=(
            Mistake("dividing by C − 1 gives: LayerNorm's variance divides by C.", "unbiased=False", "unbiased=True"),
            Mistake(
                "eps outside the root gives: it is added to the variance. The small row shows it.",
                "torch.sqrt(var + eps)",
                "(torch.sqrt(var) + eps)",
            ),
            Mistake("leaving eps out gives: beside 0.002² it is not small.", "var + eps", "var"),
            Mistake("dividing by the variance gives: divide by its root.", "torch.sqrt(var + eps)", "(var + eps)"),
            Mistake("a mean that is not taken off gives: subtract it first.", "(x - mean)", "x"),
        ),
        hints=(
            "Mean and variance run over the last dimension alone; `keepdim=True` keeps them beside x.",
            "Is 1e-5 small beside 0.002²?",
        ),
    ),
    Exercise(
        name="03.gelu",
        title="GPT-2's GELU",
        target="gelu_v1",
        minutes=5,
        level=1,
        module=MODULE,
        against="torch's gelu with approximate='tanh'",
        run=lambda f, seed: f(3 * torch.randn(50)),
        expected=lambda seed: F.gelu(3 * torch.randn(50), approximate="tanh"),
        mistakes=(
            Mistake("x² gives: the small term is 0.044715 x³.", "x**3", "x**2"),
            Mistake(
                "leaving out the 1 gives: tanh runs from −1 to 1, and the gate from 0 to 1.",
                "(1 + torch.tanh(",
                "(torch.tanh(",
            ),
            Mistake("leaving out the half gives: for large x GELU is x, not 2x.", "0.5 * x * (1", "x * (1"),
            Mistake("√(π/2) gives: the factor is √(2/π).", "2 / math.pi", "math.pi / 2"),
        ),
        hints=("0.5 · x · (1 + tanh(√(2/π) · (x + 0.044715 x³))).",),
    ),
    Exercise(
        name="03.block",
        title="a block: two branches beside a grey line",
        target="Block.forward",
        minutes=8,
        level=2,
        module=MODULE,
        against="the formula in torch's functions, with random norms",
        run=block_run,
        expected=block_oracle,
        mistakes=(
            Mistake(
                "post-norm gives, as in the first Transformer: GPT-2 normalises what a branch reads.",
                "x = x + self.attn(self.ln_1(x), mask, kv_cache, layer)",
                "x = self.ln_1(x + self.attn(x, mask, kv_cache, layer))",
            ),
            Mistake(
                "adding the normalised x gives: the stream itself goes on untouched.",
                "x = x + self.attn(",
                "x = self.ln_1(x) + self.attn(",
            ),
            Mistake("an MLP that reads the stream without ln_2 gives.", "self.mlp(self.ln_2(x))", "self.mlp(x)"),
            Mistake(
                "leaving out the second residual gives: the MLP's output is added, too.",
                "return x + self.mlp(",
                "return self.mlp(",
            ),
        ),
        hints=(
            "Draw the grey line first: nothing on it but two plus signs.",
            "Each branch reads a normalised copy and adds what it found.",
        ),
    ),
    Exercise(
        name="03.forward",
        title="from ids to logits: the whole forward pass",
        target="GPT_v1.forward",
        minutes=12,
        level=2,
        module=MODULE,
        against="GPTLanguageModel with the same weights",
        run=model_run,
        expected=model_oracle,
        tolerance=1e-4,
        mistakes=(
            Mistake(
                "leaving out the positions gives: every token is wte + wpe.",
                " + self.wpe(torch.arange(idx.size(1)))",
                "",
            ),
            Mistake(
                "positions that start at 1 give: the first token stands at 0.",
                "torch.arange(idx.size(1))",
                "torch.arange(idx.size(1)) + 1",
            ),
            Mistake("leaving out ln_f gives: the head reads a normalised stream.", "self.ln_f(x) @", "x @"),
            Mistake(
                "a single block gives: the loop goes on from its own x, through all of them.",
                "for block in self.h:",
                "for block in self.h[:1]:",
            ),
        ),
        hints=(
            "Embed, add positions, go through the blocks, normalise, compare with every token's embedding.",
            "The head is wte itself: (B, T, C) @ (C, vocab_size).",
        ),
    ),
    Exercise(
        name="03.loss",
        title="the mean surprise over the targets that count",
        target="next_token_loss",
        minutes=8,
        level=2,
        module=MODULE,
        against="torch's cross_entropy with ignore_index=-100",
        run=lambda f, seed: [f(*inputs) for inputs in loss_inputs()],
        expected=loss_oracle,
        mistakes=(
            Mistake(
                "dividing by all positions gives: only the targets that count are counted.",
                "counts.sum().clamp(min=1)",
                "targets.numel()",
            ),
            Mistake(
                "a sum gives: the loss is a mean, so that it does not grow with the batch.",
                "return total / counts.sum().clamp(min=1)",
                "return total",
            ),
            Mistake(
                "bits give: the natural logarithm makes nats.",
                "return total / counts.sum().clamp(min=1)",
                "return total / counts.sum().clamp(min=1) / math.log(2)",
            ),
        ),
        given={"math": math},
        hints=(
            "`F.cross_entropy` wants (N, V) and (N,); -100 is what it leaves out by itself.",
            "A sum over the targets, divided by how many are not -100.",
        ),
    ),
)
