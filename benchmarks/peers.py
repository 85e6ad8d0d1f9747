"""The other decoders that decode.py measures, each made from the same weights: Transformers, CTranslate2, llama.cpp.

Every function writes what its decoder needs into a folder and returns a function of one prompt, ids -> new ids, greedy.
"""

import ctypes
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from minigpt_lib.model.gpt import GPTLanguageModel
from minigpt_lib.weights.pretrained import save_pretrained

Decode = Callable[[list[int], int], list[int]]
HAVE_CT2, HAVE_LLAMA = (find_spec(name) is not None for name in ("ctranslate2", "llama_cpp"))


def transformers_model(model: GPTLanguageModel, folder: Path):
    """Hugging Face's GPT2LMHeadModel with the same weights, float32."""
    from transformers import GPT2LMHeadModel

    save_pretrained(model, folder / "transformers")
    return GPT2LMHeadModel.from_pretrained(folder / "transformers").eval()


def transformers_generate(theirs, idx: torch.Tensor, new: int) -> torch.Tensor:
    """Their cached greedy generate: idx (B, T) -> (B, T + new)."""
    keep_going = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        return theirs.generate(idx, attention_mask=torch.ones_like(idx), **keep_going)


def _own(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy().copy()  # CTranslate2 quantises in place


def _linear(spec, layer: torch.nn.Linear) -> None:
    spec.weight, spec.bias = _own(layer.weight), _own(layer.bias)


def _norm(spec, layer) -> None:
    spec.gamma, spec.beta = _own(layer.weight), _own(layer.bias)


def ctranslate2_decoder(model: GPTLanguageModel, folder: Path, compute_type: str, threads: int) -> Decode:
    """CTranslate2 ("float32" or "int8"), its model specification filled by hand."""
    import ctranslate2
    from ctranslate2.specs import Activation, TransformerDecoderModelSpec

    config, words = model.config, [f"t{i}" for i in range(model.config.vocab_size)]
    spec = TransformerDecoderModelSpec.from_config(
        config.n_layer, config.n_head, pre_norm=True, activation=Activation.GELUTanh
    )
    spec.decoder.embeddings.weight = _own(model.wte.weight)
    spec.decoder.position_encodings.encodings = _own(model.wpe.weight)
    spec.decoder.scale_embeddings = False
    spec.decoder.projection.weight = _own(model.lm_head.weight)
    _norm(spec.decoder.layer_norm, model.ln_f)
    for theirs, ours in zip(spec.decoder.layer, model.h, strict=True):
        _norm(theirs.self_attention.layer_norm, ours.ln_1)
        _linear(theirs.self_attention.linear[0], ours.attn.c_attn)
        _linear(theirs.self_attention.linear[1], ours.attn.c_proj)
        _norm(theirs.ffn.layer_norm, ours.ln_2)
        _linear(theirs.ffn.linear_0, ours.mlp.c_fc)
        _linear(theirs.ffn.linear_1, ours.mlp.c_proj)
    spec.register_vocabulary(words)
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = words[-1]
    spec.validate()
    spec.optimize(quantization=compute_type)
    path = folder / f"ctranslate2_{compute_type}"
    path.mkdir()
    spec.save(str(path))
    generator = ctranslate2.Generator(str(path), compute_type=compute_type, inter_threads=1, intra_threads=threads)

    def decode(prompt: list[int], new: int) -> list[int]:
        tokens = [[words[i] for i in prompt]]
        options = {"max_length": new, "min_length": new, "sampling_topk": 1, "include_prompt_in_result": False}
        return generator.generate_batch(tokens, **options)[0].sequences_ids[0]

    return decode


def write_gguf(model: GPTLanguageModel, path: Path, kind: str) -> None:
    """The weights in llama.cpp's file format; kind is "f32", "bf16" or "q8_0" and applies to the matrices."""
    import gguf

    config = model.config
    out = gguf.GGUFWriter(path, "gpt2")
    out.add_block_count(config.n_layer)
    out.add_context_length(config.n_ctx)
    out.add_embedding_length(config.n_embd)
    out.add_feed_forward_length(4 * config.n_embd)
    out.add_head_count(config.n_head)
    out.add_layer_norm_eps(config.layer_norm_epsilon)
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("no_vocab")
    names = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
    inside = {"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm"}
    inside |= {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    stored = gguf.GGMLQuantizationType[kind.upper()]
    for name, p in model.named_parameters():
        module, _, part = name.rpartition(".")
        if module.startswith("h."):
            layer, _, rest = module[2:].partition(".")
            theirs = f"blk.{layer}.{inside[rest]}.{part}"
        else:
            theirs = f"{names[module]}.{part}"
        data = p.detach().numpy()
        if p.dim() == 2 and module != "wpe" and kind != "f32":
            out.add_tensor(theirs, gguf.quants.quantize(data, stored), raw_dtype=stored)
        else:
            out.add_tensor(theirs, data)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def llama_decoder(model: GPTLanguageModel, folder: Path, kind: str, threads: int) -> Decode:
    """llama.cpp through the C functions of its Python binding: prefill in one batch, then one token at a time."""
    import llama_cpp as lc

    path = folder / f"gpt2_{kind}.gguf"
    write_gguf(model, path, kind)
    quiet = lc.llama_log_callback(lambda level, text, user: None)
    lc.llama_log_set(quiet, None)
    weights = lc.llama_model_load_from_file(str(path).encode(), lc.llama_model_default_params())
    params = lc.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = model.config.n_ctx, 512, threads, threads
    context, V = lc.llama_init_from_model(weights, params), model.config.vocab_size

    def feed(tokens: list[int]) -> int:
        array = (ctypes.c_int32 * len(tokens))(*tokens)  # must outlive the batch, which points to it
        batch = lc.llama_batch_get_one(array, len(tokens))
        if lc.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        return int(np.ctypeslib.as_array(lc.llama_get_logits_ith(context, -1), (V,)).argmax())

    def decode(prompt: list[int], new: int) -> list[int]:
        lc.llama_memory_clear(lc.llama_get_memory(context), True)
        out = [feed(prompt)]
        while len(out) < new:
            out.append(feed(out[-1:]))
        return out

    decode.keep = (quiet, weights)  # C code holds on to these
    return decode
