"""TensorFlow checkpoints written from the definition of the format, to compare its reader with."""

import json
import struct
from pathlib import Path

import numpy as np
from make_tf_checkpoint import HPARAMS, shapes


def slow_crc(data: bytes, crc: int = 0) -> int:
    """CRC-32C bit by bit, from its definition."""
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    crc = slow_crc(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(n: int) -> bytes:
    return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])


def block(pairs: list[tuple[bytes, bytes]], every: int) -> bytes:
    """A block with a full key every `every` entries."""
    out, restarts, last = b"", [], b""
    for i, (key, value) in enumerate(pairs):
        shared = 0
        if i % every:
            while shared < min(len(last), len(key)) and last[shared] == key[shared]:
                shared += 1
        else:
            restarts.append(len(out))
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    return out + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def table(pairs: dict[bytes, bytes], *, per_block: int = 5, every: int = 3, kind: int = 0) -> bytes:
    """A sorted table of several blocks."""
    out, index, ordered = b"", [], sorted(pairs.items())

    def add(content: bytes) -> bytes:
        nonlocal out
        handle = varint(len(out)) + varint(len(content))
        content += bytes([kind])
        out += content + struct.pack("<I", masked(content))
        return handle

    for i in range(0, len(ordered), per_block):
        part = ordered[i : i + per_block]
        index.append((part[-1][0], add(block(part, every))))
    handles = add(struct.pack("<II", 0, 1)) + add(block(index, 1))
    return out + handles.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


KINDS = {"<f4": 1, "<f8": 2, "<i8": 9, "<f2": 19}


def write(folder: Path, tensors: dict[str, np.ndarray], *, shards: int = 1, big: bool = False, **options) -> Path:
    """A checkpoint in TensorFlow's layout; returns its prefix."""
    folder.mkdir(exist_ok=True)
    files = [(folder / f"model.ckpt.data-{i:05}-of-{shards:05}").open("wb") for i in range(shards)]
    pairs = {b"": field(1, shards) + (field(2, 1) if big else b"") + field(3, field(1, 1))}
    for i, (name, t) in enumerate(tensors.items()):
        raw, shard = t.tobytes(), i % shards
        shape = b"".join(field(2, field(1, n)) for n in t.shape)
        entry = field(1, KINDS[t.dtype.newbyteorder("<").str]) + field(2, shape)
        entry += field(3, shard) if shard else b""
        entry += field(4, files[shard].tell()) if files[shard].tell() else b""
        entry += field(5, len(raw)) + varint(6 << 3 | 5) + struct.pack("<I", masked(raw))
        pairs[name.encode()] = entry
        files[shard].write(raw)
    for file in files:
        file.close()
    (folder / "model.ckpt.index").write_bytes(table(pairs, **options))
    (folder / "hparams.json").write_text(json.dumps(HPARAMS))
    return folder / "model.ckpt"


def random_tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in sorted(shapes(**HPARAMS).items())}
