"""A tiny model folder, and a model that writes a known text slowly: for the tests of chat, commands and page."""

import time
from pathlib import Path

import tiktoken
import torch
from torch import Tensor

from minigpt_lib.chat.models import ChatModels
from minigpt_lib.model.gpt import GPTConfig, GPTLanguageModel
from minigpt_lib.text.tokenizer import load_tokenizer, save_ranks
from minigpt_lib.tuning.lora import add_lora, lora_parameters
from minigpt_lib.tuning.peft_io import save_adapter
from minigpt_lib.weights.pretrained import save_pretrained

BYTES = {bytes([i]): i for i in range(256)}  # a vocabulary without a single merge: one token a byte
TINY = GPTConfig(vocab_size=257, n_ctx=256, n_embd=32, n_layer=2, n_head=2)


def byte_encoding(folder: Path) -> tiktoken.Encoding:
    """The encoding of BYTES, with <|endoftext|> as id 256."""
    save_ranks(BYTES, folder / "tokenizer.tiktoken")
    return load_tokenizer(folder)


def tiny_folder(folder: Path, *, adapter: bool = True, config: GPTConfig = TINY) -> Path:
    """A random model, wide awake (its logits differ), in the Hugging Face layout, with an adapter in adapter/."""
    folder.mkdir(parents=True, exist_ok=True)
    enc, model = byte_encoding(folder), GPTLanguageModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    save_pretrained(model, folder, enc)
    if adapter:
        add_lora(model, r=4)
        with torch.no_grad():
            for p in lora_parameters(model).values():
                p.copy_(0.15 * torch.randn_like(p))
        save_adapter(model, folder / "adapter", "tiny")
    return folder


class _Choose(torch.nn.Module):
    """A head that turns the last token's id (B, 1) into logits (B, V) for the one that follows it."""

    def __init__(self, following: dict[int, int]):
        super().__init__()
        self.following = following

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.zeros(len(x), 257)  # (B, V)
        for row, i in enumerate(x[:, 0].long().tolist()):
            logits[row, self.following.get(i, ord("?"))] = 100.0
        return logits


class Scripted(GPTLanguageModel):
    """Writes `text` (every character in it once) after any prompt, `pause` seconds a token, and starts over at its end.

    With a "." in it the text ends there. The last token alone decides which is next, so nothing is kept between calls.
    `calls` counts the tokens computed: it stands still once nobody asks for more.
    """

    def __init__(self, text: str, pause: float = 0.0):
        super().__init__(GPTConfig(vocab_size=257, n_ctx=512, n_embd=2, n_layer=1, n_head=1))
        ids = list(text.encode())
        assert len(set(ids)) == len(ids) and ord(":") not in ids
        following = dict(zip([ord(":"), *ids], [*ids, ids[0]], strict=True)) | {ord("."): 256}
        self.pause, self.calls, self.lm_head = pause, 0, _Choose(following)
        self.eval()

    def hidden_states(self, idx: Tensor, kv_cache=None, attention_mask=None) -> Tensor:
        time.sleep(self.pause)
        self.calls += 1
        if kv_cache is not None:
            kv_cache.advance(idx)
        return idx[..., None].float()  # (B, T, 1): what the head needs to know


def scripted_models(folder: Path, *, base: str, tuned: str, pause: float = 0.0) -> ChatModels:
    """ChatModels whose base and tuned model write the two texts."""
    folder.mkdir(parents=True, exist_ok=True)
    return ChatModels("scripted", Scripted(base, pause), {"capitals": Scripted(tuned, pause)}, byte_encoding(folder))
