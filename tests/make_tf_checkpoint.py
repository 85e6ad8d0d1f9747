"""Write tests/tf_checkpoint.json: a small checkpoint in the layout of OpenAI's GPT-2 release, made by TensorFlow.

    pip install tensorflow-cpu && python tests/make_tf_checkpoint.py

TensorFlow is needed for this script alone. Its own `Saver` writes the two files of the checkpoint, which are stored as
text. The numbers follow from a tensor's name (`number`), so that a test can tell what each must be.
"""

import base64
import json
import tempfile
import zlib
from pathlib import Path

import numpy as np

HPARAMS = {"n_vocab": 21, "n_ctx": 7, "n_embd": 8, "n_head": 2, "n_layer": 2}


def shapes(n_vocab: int, n_ctx: int, n_embd: int, n_layer: int, **_: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the variables of OpenAI's gpt-2/src/model.py."""
    C = n_embd
    found = {"wte": (n_vocab, C), "wpe": (n_ctx, C), "ln_f/g": (C,), "ln_f/b": (C,)}
    for i in range(n_layer):
        found |= {f"h{i}/{norm}/{part}": (C,) for norm in ("ln_1", "ln_2") for part in "gb"}
        for kind, n_in, n_out in (
            ("attn/c_attn", C, 3 * C),
            ("attn/c_proj", C, C),
            ("mlp/c_fc", C, 4 * C),
            ("mlp/c_proj", 4 * C, C),
        ):
            found |= {f"h{i}/{kind}/w": (1, n_in, n_out), f"h{i}/{kind}/b": (n_out,)}
    return {f"model/{name}": shape for name, shape in found.items()}


def number(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers between -0.5 and 0.5 that float32 holds exactly, different for every name."""
    i = np.arange(np.prod(shape), dtype=np.uint64)
    mixed = (i * np.uint64(2654435761) + np.uint64(zlib.crc32(name.encode()))) % np.uint64(65521)
    return ((mixed.astype(np.float64) - 32760) / 65536).astype(np.float32).reshape(shape)


def main() -> None:
    import tensorflow as tf

    v1 = tf.compat.v1
    with tempfile.TemporaryDirectory() as folder, tf.Graph().as_default(), v1.Session() as session:
        variables = [v1.Variable(number(n, s), name=n, use_resource=False) for n, s in shapes(**HPARAMS).items()]
        session.run(v1.global_variables_initializer())
        v1.train.Saver(variables).save(session, f"{folder}/model.ckpt", write_meta_graph=False)
        files = {p.name: base64.b64encode(p.read_bytes()).decode() for p in sorted(Path(folder).glob("model.ckpt.*"))}
    made = {"made by": f"tests/make_tf_checkpoint.py, TensorFlow {tf.__version__}", "hparams": HPARAMS, "files": files}
    Path(__file__).with_name("tf_checkpoint.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
