"""Mutate bytes, PNG files, JSON objects and tensors."""

import copy
import functools
import json
import math
import random
import struct
import zlib

import torch

SIDES = (0, 1, 63, 7999, 8001, 30000, 100_000, 2**31 - 1, 2**32 - 1)
STRANGE = [None, True, False, 0, -1, 1, 3, 7, 2**31, 2**63, 10**12, -(10**9), 0.5, -0.5, 1e308, math.nan, math.inf]
STRANGE += ["", "x", "qwen2", "gelu", "bfloat16", "cuda:7", "../..", [], [1], [[1, 0.5]], [None], {}, {"a": 1}]
STRANGE += [{"model_type": "bert"}]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool)
WORDS = (b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\1\0")
CHUNKS = (b"tRNS", b"PLTE", b"iCCP", b"zTXt", b"iTXt", b"eXIf", b"gAMA", b"acTL", b"fcTL", b"IDAT", b"IEND")


def mutate_bytes(data: bytes, rng: random.Random, others: list[bytes] = ()) -> bytes:
    """Damage bytes in one to four ways."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        size = max(1, len(data))
        at = rng.randrange(min(size, 64)) if rng.random() < 0.4 else rng.randrange(size)
        match rng.randrange(9):
            case 0:
                for _ in range(rng.choice((1, 1, 4, 32))):
                    if data:
                        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1:
                data[at:at] = rng.randbytes(rng.choice((1, 4, 100)))
            case 2:
                del data[at : at + rng.choice((1, 4, 100))]
            case 3:
                del data[rng.randrange(size) :]
            case 4:
                data[at : at + 1] = bytes([rng.choice((0, 1, 127, 128, 254, 255))])
            case 5:
                data[at : at + 4] = rng.choice(WORDS)
            case 6:
                data[at:at] = data[(start := rng.randrange(size)) : start + rng.randrange(200)]
            case 7 if others:
                data[at:] = (other := rng.choice(others))[rng.randrange(max(1, len(other))) :]
            case _:
                data[at : at + 16] = rng.randbytes(16)
    return bytes(data)


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Split a whole PNG file into chunks of type and body."""
    chunks, at = [], 8
    while at < len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    return chunks


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """Join chunks to a PNG file whose check sums are right."""
    parts = [struct.pack(">I", len(b)) + kind + b + struct.pack(">I", zlib.crc32(kind + b)) for kind, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_header(width: int, height: int, bits: int = 8, kind: int = 2, interlace: int = 0) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, interlace)


def mutate_png(data: bytes, rng: random.Random) -> bytes:
    """Damage a PNG and make its check sums right: header, order of chunks, bodies."""
    chunks = png_chunks(data)
    match rng.randrange(5):
        case 0:
            width, height = (rng.choice(SIDES) for _ in range(2))
            chunks[0] = png_header(width, height, rng.choice((1, 2, 4, 8, 16)), rng.choice((0, 2, 3, 4, 6)))
        case 1:
            chunks[0] = (b"IHDR", mutate_bytes(chunks[0][1], rng))
        case 2:
            at = rng.randrange(len(chunks))
            chunks[at] = (chunks[at][0], mutate_bytes(chunks[at][1], rng))
        case 3:
            at = rng.randrange(1, len(chunks))
            kind = rng.choice(CHUNKS)
            body = rng.choice((b"", rng.randbytes(rng.randrange(64)), b"a\0\0" + zlib.compress(bytes(4_000_000))))
            chunks.insert(at, (kind, body))
        case _:
            rng.shuffle(chunks)
    return png_of(chunks)


@functools.cache
def png_bomb(side: int, kind: int, bits: int) -> bytes:
    """Write a whole PNG of side x side zeros, a small file."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    squeeze, row = zlib.compressobj(1), bytes(1 + -(-side * channels * bits // 8))
    body = b"".join(squeeze.compress(row * 64) for _ in range(-(-side // 64))) + squeeze.flush()
    palette = [(b"PLTE", bytes(3))] if kind == 3 else []
    return png_of([png_header(side, side, bits, kind), *palette, (b"IDAT", body), (b"IEND", b"")])


def ico_around(png: bytes, kind: str = "ICO") -> bytes:
    """Write an icon file that claims 16 x 16 for the PNG inside."""
    if kind == "ICNS":
        return b"icns" + struct.pack(">I", 16 + len(png)) + b"icp4" + struct.pack(">I", 8 + len(png)) + png
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22) + png


def mutate_json(value, rng: random.Random):
    """Swap, drop or add one to three entries somewhere in a JSON object."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = []

        def walk(node, places=places):
            for key in node if isinstance(node, dict) else range(len(node)):
                places.append((node, key))
                if isinstance(node[key], (dict, list)):
                    walk(node[key])

        walk(value)
        if not places:
            break
        node, key = rng.choice(places)
        roll = rng.random()
        if roll < 0.15:
            del node[key]
        elif roll < 0.2 and isinstance(node, dict):
            node[rng.choice(("unknown", "num_labels", "dtype", "hidden_size", "num_slots", ""))] = strange(rng)
        elif roll < 0.5 and isinstance(node[key], (int, float)):
            number = node[key]
            node[key] = rng.choice(
                (-number, number + 1, number * 2, number // 2, number * 10**6, float(number), str(number))
            )
        else:
            node[key] = strange(rng)
    return value


def strange(rng: random.Random):
    """Choose a value that is hardly ever right."""
    return copy.deepcopy(rng.choice(STRANGE))


def mutate_tensors(tensors: dict[str, torch.Tensor], rng: random.Random) -> dict[str, torch.Tensor]:
    """Change values, bytes, shapes or dtypes of tensors, or drop or add one."""
    tensors = dict(tensors)
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(sorted(tensors))
        t = tensors[name]
        match rng.randrange(9):
            case 0 | 1 if t.numel():
                raw = bytearray(t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
                for _ in range(rng.choice((1, 8, 64))):
                    raw[rng.randrange(len(raw))] = rng.randrange(256)
                tensors[name] = torch.frombuffer(raw, dtype=t.dtype).view(t.shape)
            case 2 if t.is_floating_point() and t.numel():
                t = t.clone()
                t.view(-1)[rng.randrange(t.numel())] = rng.choice((float("nan"), float("inf"), -1e30, 0.0, 1e30))
                tensors[name] = t
            case 3:
                tensors[name] = t.new_zeros([max(0, n + rng.choice((-1, 0, 0, 1))) for n in t.shape])
            case 4:
                tensors[name] = t.to(rng.choice(DTYPES))
            case 5 if len(tensors) > 1:
                del tensors[name]
            case 6:
                tensors[rng.choice(("another", "mean", f"{name}.x", "lm_head.weight"))] = t.clone()
            case 7:
                tensors[name] = rng.choice((t.flatten(), t.unsqueeze(0), t.new_zeros(0), t.new_zeros(())))
            case _:
                tensors[name] = (t.flip(0) if t.ndim else t).clone()
    return {name: t.contiguous().clone() for name, t in tensors.items()}


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Damage a file in its header, or anywhere."""
    if rng.random() < 0.4:
        return mutate_bytes(data, rng)
    size = struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.1:
        return struct.pack("<Q", rng.choice((0, 1, size - 1, size + 1, 2**31, 2**40, 2**64 - 1))) + data[8:]
    header, body = data[8 : 8 + size], data[8 + size :]
    if rng.random() < 0.5:
        header = json.dumps(mutate_json(json.loads(header), rng)).encode()
    else:
        header = mutate_bytes(header, rng)
    return struct.pack("<Q", len(header)) + header + body
