"""Does anything fall over? Files and inputs are mutated, and a packed model captions for as long as one likes.

    python benchmarks/robustness.py                             10,000 pictures, 2,000 of each other kind, a soak of 10,000 captions
    python benchmarks/robustness.py --cases 1000 --soak 0       a tenth of it, without the soak
    python benchmarks/robustness.py --only memory,soak          only these kinds
    python benchmarks/robustness.py --only configs --replay 17  one case again, with its traceback

Kinds: `pictures`, mutated files through `open_image` and the processor to `pixel_values`; `processor`, odd combinations of pictures and
texts; `configs`, mutated config.json, built on the meta device; `packed`, mutated packed checkpoints, opened and run; `memory`, mutated
memory files, opened and used; `soak`, captions with memory writes and forgets mixed in. `--cases` is the number of pictures and of
processor inputs; the other kinds take a fifth of it.

A case may be accepted, and what comes out is checked, or refused: with a documented type of error, raised on purpose, by a `raise` in
Python code, with a message (that of a picture names its file). Everything else is `other`: an error of another type or one that some
operation fell over, a check that fails, a dead process. A case that takes longer than `--seconds` is a hang. Each kind runs in its own
process, and the peak memory of every case is read from the kernel (Linux).

Exit code: 0; 1, when there was any `other`, a hang, a case above `--memory` MB, or a soak that grew or changed its answers.
"""

import argparse
import base64
import copy
import faulthandler
import functools
import gc
import io
import json
import linecache
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor
from transformers.utils import logging

from microvlm import model as microvlm_model
from microvlm.model import MicroVLMConfig, MicroVLMForConditionalGeneration, PackedConfig, open_image
from microvlm.pack import load_pack_recipe, pack

ROOT = Path(__file__).resolve().parents[1]

MemoryState = microvlm_model.MemoryState
PROMPT = "<|user|><image><|assistant|>"
REFUSALS = (ValueError, TypeError, OSError, SafetensorError)
LIMIT = 6 << 30  # bytes that a process may take before it gets a MemoryError, which counts as other
STACK = "stack.txt"
RAISES = ("raise", "reraise")  # how the line of an error raised on purpose begins


# ---------------------------------------------------------------------------------------------------------------- mutations


def mutate_bytes(data: bytes, rng: random.Random, others: list[bytes] = ()) -> bytes:
    """`data` with one to four kinds of damage."""
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
                data[at : at + 4] = rng.choice(
                    (b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\1\0")
                )
            case 6:
                data[at:at] = data[(start := rng.randrange(size)) : start + rng.randrange(200)]
            case 7 if others:
                data[at:] = (other := rng.choice(others))[rng.randrange(max(1, len(other))) :]
            case _:
                data[at : at + 16] = rng.randbytes(16)
    return bytes(data)


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """The chunks of a whole PNG file, type and body."""
    chunks, at = [], 8
    while at < len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    return chunks


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """A PNG file whose check sums are right, whatever the chunks say."""
    parts = [struct.pack(">I", len(b)) + kind + b + struct.pack(">I", zlib.crc32(kind + b)) for kind, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_header(width: int, height: int, bits: int = 8, kind: int = 2, interlace: int = 0) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, interlace)


def mutate_png(data: bytes, rng: random.Random) -> bytes:
    """A PNG with damage behind its check sums: header, order of chunks, bodies."""
    chunks = png_chunks(data)
    match rng.randrange(5):
        case 0:
            side = lambda: rng.choice((0, 1, 63, 7999, 8001, 30000, 100_000, 2**31 - 1, 2**32 - 1))  # noqa: E731
            chunks[0] = png_header(side(), side(), rng.choice((1, 2, 4, 8, 16)), rng.choice((0, 2, 3, 4, 6)))
        case 1:
            chunks[0] = (b"IHDR", mutate_bytes(chunks[0][1], rng))
        case 2:
            at = rng.randrange(len(chunks))
            chunks[at] = (chunks[at][0], mutate_bytes(chunks[at][1], rng))
        case 3:
            at = rng.randrange(1, len(chunks))
            kind = rng.choice(
                (b"tRNS", b"PLTE", b"iCCP", b"zTXt", b"iTXt", b"eXIf", b"gAMA", b"acTL", b"fcTL", b"IDAT", b"IEND")
            )
            body = rng.choice((b"", rng.randbytes(rng.randrange(64)), b"a\0\0" + zlib.compress(bytes(4_000_000))))
            chunks.insert(at, (kind, body))
        case _:
            rng.shuffle(chunks)
    return png_of(chunks)


@functools.cache
def png_bomb(side: int, kind: int, bits: int) -> bytes:
    """A whole PNG of side x side zeros, in a small file."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    squeeze, row = zlib.compressobj(1), bytes(1 + -(-side * channels * bits // 8))
    body = b"".join(squeeze.compress(row * 64) for _ in range(-(-side // 64))) + squeeze.flush()
    palette = [(b"PLTE", bytes(3))] if kind == 3 else []
    return png_of([png_header(side, side, bits, kind), *palette, (b"IDAT", body), (b"IEND", b"")])


def ico_around(png: bytes, kind: str = "ICO") -> bytes:
    """An icon file that says 16 x 16 about the PNG inside."""
    if kind == "ICNS":
        return b"icns" + struct.pack(">I", 16 + len(png)) + b"icp4" + struct.pack(">I", 8 + len(png)) + png
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22) + png


def mutate_json(value, rng: random.Random):
    """A JSON object with one to three entries, somewhere inside, swapped, dropped or added."""
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
    """A value that is hardly ever right."""
    return rng.choice(
        (
            None,
            True,
            False,
            0,
            -1,
            1,
            3,
            7,
            2**31,
            2**63,
            10**12,
            -(10**9),
            0.5,
            -0.5,
            1e308,
            float("nan"),
            float("inf"),
        )
        + (
            "",
            "x",
            "qwen2",
            "gelu",
            "bfloat16",
            "cuda:7",
            "../..",
            [],
            [1],
            [[1, 0.5]],
            [None],
            {},
            {"a": 1},
            {"model_type": "bert"},
        )
    )


def mutate_tensors(tensors: dict[str, torch.Tensor], rng: random.Random) -> dict[str, torch.Tensor]:
    """Tensors with changed values, bytes, shapes, dtypes, or one missing or too many."""
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
                other = rng.choice(
                    (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool)
                )
                tensors[name] = t.to(other)
            case 5 if len(tensors) > 1:
                del tensors[name]
            case 6:
                tensors[rng.choice(("extra", "mean", f"{name}.x", "lm_head.weight"))] = t.clone()
            case 7:
                tensors[name] = rng.choice((t.flatten(), t.unsqueeze(0), t.new_zeros(0), t.new_zeros(())))
            case _:
                tensors[name] = (t.flip(0) if t.ndim else t).clone()
    return {name: t.contiguous().clone() for name, t in tensors.items()}


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The bytes of a file with damage in its header, or anywhere."""
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


# ---------------------------------------------------------------------------------------------------------------- kinds


class Pictures:
    """Mutated picture files, through `open_image` and the processor to `pixel_values`."""

    share = 1.0
    types = (OSError, ValueError)

    def __init__(self, folder: Path):
        self.folder = folder
        self.processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
        self.seeds = picture_files(random.Random(0))
        self.pngs = [data for suffix, data in self.seeds if suffix == "png"]

    def case(self, rng: random.Random) -> None:
        suffix, data = rng.choice(self.seeds)
        roll = rng.random()
        if roll < 0.03:
            # mostly above the limit of 8000 x 8000, at times right below it
            side = 9400 if rng.random() < 0.95 else 7990
            data = png_bomb(side, *rng.choice(((0, 8), (0, 16), (3, 8), (6, 8))))
            data = rng.choice((data, ico_around(data), ico_around(data, "ICNS")))
        elif roll < 0.2:
            data = mutate_png(rng.choice(self.pngs), rng)
        elif roll < 0.97:
            data = mutate_bytes(data, rng, [other for _, other in self.seeds])
        path = self.folder / f"case.{suffix}"
        path.write_bytes(data)
        self.last = str(path)
        limit = self.processor.image_processor.max_pixels
        picture = str(path)
        if rng.random() < 0.5:
            picture = open_image(path, limit)
            assert picture.width * picture.height <= limit, f"a picture of {picture.size}"
        inputs = self.processor(images=picture, text=PROMPT, return_tensors="pt")
        check_pixels(inputs["pixel_values"], 1)

    def explain(self, error: BaseException) -> str | None:
        """Why this is no good refusal; None if it is one."""
        return None if self.last in str(error) else "the message does not name the picture"


class ProcessorInputs:
    """Odd combinations of pictures, texts and options."""

    share = 1.0
    types = (ValueError, TypeError, OSError)

    def __init__(self, folder: Path):
        self.processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
        self.pictures = [str(path) for path in sorted((ROOT / "examples").glob("*.png"))]

    def case(self, rng: random.Random) -> None:
        kwargs = {}
        if rng.random() < 0.9:
            kwargs["images"] = odd_images(rng, self.pictures)
        if rng.random() < 0.9:
            kwargs["text"] = odd_texts(rng)
        if rng.random() < 0.9:
            kwargs["return_tensors"] = rng.choice(("pt", "pt", "pt", "pt", "np", None))
        if rng.random() < 0.6:
            kwargs["padding"] = rng.choice((True, True, "max_length", False))
        if rng.random() < 0.1:
            kwargs |= {"truncation": True, "max_length": rng.choice((1, 10, 40))}
        self.run(kwargs)

    def run(self, kwargs: dict) -> None:
        inputs = self.processor(**kwargs)
        if kwargs.get("return_tensors") != "pt":
            return
        pictures = 0
        if "pixel_values" in inputs:
            pictures = len(inputs["pixel_values"])
            check_pixels(inputs["pixel_values"], pictures)
        if "input_ids" in inputs:
            tokens, places = self.processor.image_token_id, self.processor.num_image_tokens
            found = int((inputs["input_ids"] == tokens).sum())
            # a picture that no text mentions, or the other way round, would end in the model
            assert found == pictures * places, f"{found} placeholders for {pictures} pictures"

    def explain(self, error: BaseException) -> str | None:
        return None


class Configs:
    """Mutated config.json, built on the meta device."""

    share = 0.2
    types = (
        ValueError,
        TypeError,
        OSError,
        StrictDataclassError,
        ImportError,
    )  # the last two: of the library's own checks

    def __init__(self, folder: Path):
        names = [ROOT / "config.json", ROOT / "configs/microvlm-nano.json", ROOT / "configs/microvlm-v.json"]
        self.bases = [json.loads(name.read_text()) for name in names]
        self.bases[2].setdefault("text_config", {})["num_hidden_layers"] = 2
        self.bases.append(self.bases[1] | {"use_fusion": True, "use_memory": True})

    def case(self, rng: random.Random) -> None:
        self.build(mutate_json(rng.choice(self.bases), rng))

    def build(self, dictionary: dict) -> None:
        config = MicroVLMConfig.from_dict(copy.deepcopy(dictionary))
        json.dumps(config.to_dict())
        with torch.device("meta"):
            MicroVLMForConditionalGeneration(config)

    def explain(self, error: BaseException) -> str | None:
        return None


class Packed:
    """Mutated packed checkpoints: a small one with every format in it, at times the packed nano."""

    share = 0.2
    types = (
        ValueError,
        TypeError,
        OSError,
        SafetensorError,
        RuntimeError,
    )  # transformers' own for shapes is a RuntimeError

    def __init__(self, folder: Path, nano: Path | None = None):
        self.folder = folder / "packed"
        self.small = small_packed(folder / "small")
        self.nano = nano
        self.state = {path: load_file(path / "model.safetensors") for path in (self.small, nano) if path}
        self.model_class = MicroVLMForConditionalGeneration
        for path in self.state:
            self.open(path)

    def case(self, rng: random.Random) -> None:
        source = self.nano if self.nano and rng.random() < 0.1 else self.small
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        shutil.copy(source / "config.json", self.folder)
        target = self.folder / "model.safetensors"
        if rng.random() < 0.6:
            save_file(mutate_tensors(self.state[source], rng), target, {"format": "pt"})
        else:
            target.write_bytes(mutate_safetensors((source / "model.safetensors").read_bytes(), rng))
        self.open(self.folder)

    def open(self, folder: Path) -> None:
        model = self.model_class.from_pretrained(folder).eval()
        side = model.config.vision_config.model_args.get("img_size", 224)
        with torch.inference_mode():
            out = model.generate(pixel_values=torch.zeros(1, 3, side, side, dtype=model.dtype), max_new_tokens=3)
        assert int(out.min()) >= 0 and int(out.max()) < model.config.text_config.vocab_size

    def explain(self, error: BaseException) -> str | None:
        return None


class MemoryFiles:
    """Mutated memory files: refused, or a state that can be described, read, forgotten and saved."""

    share = 0.2
    types = (ValueError, SafetensorError, OSError)

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "memory.safetensors"
        self.expected = MemoryState.new(1, 8, 12, 0.01, 6, 5, "fingerprint")
        self.files = []
        for rows, items in ((1, 0), (1, 1), (1, 3), (2, 2)):
            state = small_memory(rows, items)
            state.save(folder / "seed.safetensors")
            self.files.append((folder / "seed.safetensors").read_bytes())

    def case(self, rng: random.Random) -> None:
        data = rng.choice(self.files)
        if rng.random() < 0.5:
            data = mutate_safetensors(data, rng)
        else:
            (self.folder / "plain.safetensors").write_bytes(data)
            tensors = load_file(self.folder / "plain.safetensors")
            metadata = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]
            if rng.random() < 0.7:
                tensors = mutate_tensors(tensors, rng)
            else:
                key = rng.choice(sorted(metadata))
                odd = (
                    "",
                    "nan",
                    "-1",
                    "1" * 5000,
                    "[]",
                    "[[]]",
                    '[["\\ud800"]]',
                    "[" * 10_000,
                    "null",
                    metadata[key] + " ",
                    "2",
                )
                metadata[key] = rng.choice(odd)
            save_file(tensors, self.folder / "changed.safetensors", metadata)
            data = (self.folder / "changed.safetensors").read_bytes()
        self.path.write_bytes(data)
        self.open(self.path, rng)

    def open(self, path: Path, rng: random.Random) -> None:
        state = MemoryState.load(path, self.expected)
        assert 0 < state.num_rows <= 2 and int(state.counts.max()) <= state.max_items == 6
        assert state.describe()
        R, K = state.num_rows, 8
        query = torch.nn.functional.normalize(torch.randn(R, 2, K, generator=torch.Generator().manual_seed(0)), dim=-1)
        read = state.read(query, sharpness=40.0)
        assert all(torch.isfinite(t).all() for t in vars(read).values()), "a read that is not finite"
        state.merge(state)
        state.save(self.folder / "again.safetensors")
        again = MemoryState.load(self.folder / "again.safetensors", self.expected)
        for row in range(R):
            while int(again.counts[row]):
                again = again.forget(0, row)
        fresh = MemoryState.new(R, 8, 12, 0.01, 6, 5, "fingerprint")
        for name in ("mean", "covariance"):  # a file may be off by as little as what is checked against its receipts
            torch.testing.assert_close(getattr(again, name), getattr(fresh, name), rtol=0, atol=2e-6)

    def explain(self, error: BaseException) -> str | None:
        return None


KINDS = {
    "pictures": Pictures,
    "processor": ProcessorInputs,
    "configs": Configs,
    "packed": Packed,
    "memory": MemoryFiles,
}


# ---------------------------------------------------------------------------------------------------------------- material


def check_pixels(values: torch.Tensor, pictures: int) -> None:
    assert values.shape == (pictures, 3, 224, 224), f"pixel_values of shape {tuple(values.shape)}"
    assert values.dtype == torch.float32, f"pixel_values of {values.dtype}"
    assert bool(torch.isfinite(values).all()), "pixel_values that are not finite"


def picture_files(rng: random.Random) -> list[tuple[str, bytes]]:
    """The example pictures in every format and mode that Pillow writes here: suffix and bytes."""
    formats = [("png", "PNG", mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")]
    formats += [("jpg", "JPEG", mode) for mode in ("RGB", "L", "CMYK")]
    formats += [
        ("webp", "WEBP", "RGBA"),
        ("gif", "GIF", "P"),
        ("bmp", "BMP", "RGB"),
        ("bmp", "BMP", "P"),
        ("bmp", "BMP", "1"),
    ]
    formats += [("tif", "TIFF", mode) for mode in ("RGB", "RGBA", "L", "I;16", "CMYK", "F", "1", "LAB")]
    formats += [
        ("ico", "ICO", "RGBA"),
        ("icns", "ICNS", "RGBA"),
        ("ppm", "PPM", "RGB"),
        ("tga", "TGA", "RGBA"),
        ("pcx", "PCX", "P"),
    ]
    formats += [("avif", "AVIF", "RGB"), ("jp2", "JPEG2000", "RGB"), ("qoi", "QOI", "RGB"), ("dds", "DDS", "RGBA")]
    Image.init()
    files = []
    for number, path in enumerate(sorted((ROOT / "examples").glob("*.png"))):
        plain = Image.open(path).convert("RGB")
        for place, (suffix, form, mode) in enumerate(formats):
            if form not in Image.SAVE or (number + place) % 3:  # every format with a third of the pictures
                continue
            picture = plain.resize((rng.randrange(16, 120), rng.randrange(16, 120)))
            if mode == "I;16":
                picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
            elif mode == "LAB":
                from PIL import ImageCms

                srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
                picture = ImageCms.profileToProfile(picture, srgb, lab, outputMode="LAB")
            else:
                picture = picture.convert(mode)
            options, data = {}, io.BytesIO()
            if form in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
                exif = Image.Exif()
                exif[0x0112] = rng.choice((0, 1, 3, 6, 8, 9, 65535))  # orientation
                exif[0x010E] = "x" * rng.randrange(1, 20)
                options["exif"] = exif
            if form in ("GIF", "WEBP"):
                options |= {"save_all": True, "append_images": [picture.rotate(90)], "duration": 50}
            if form == "TIFF" and mode in ("RGB", "L", "RGBA"):
                options["compression"] = rng.choice(("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"))
                if options["compression"] != "raw" and exif[0x0112] not in range(1, 9):
                    exif[0x0112] = 1  # libtiff writes neither another orientation nor an empty text
            picture.save(data, form, **options)
            files.append((suffix, data.getvalue()))
    return files


def odd_images(rng: random.Random, paths: list[str], depth: int = 0):
    """Something to hand in as `images`."""
    roll = rng.random()
    if depth < 3 and roll < 0.45:
        kind = rng.choice((list, list, list, tuple))
        return kind(odd_images(rng, paths, depth + 1) for _ in range(rng.choice((0, 1, 1, 2, 2, 3))))
    if roll < 0.75:
        mode = rng.choice(("RGB", "RGBA", "L", "P", "1", "CMYK", "I;16", "F", "LAB"))
        return Image.new(mode, (rng.choice((1, 2, 30, 500)), rng.choice((1, 3, 40))))
    if roll < 0.88:
        shape = rng.choice(
            (
                (8, 8, 3),
                (3, 8, 8),
                (8, 8),
                (8, 8, 4),
                (1, 8, 8),
                (8, 8, 1),
                (2, 3, 8, 8),
                (0, 8, 3),
                (3, 0, 0),
                (8,),
                (),
                (5, 5, 5),
                (3, 3, 3),
            )
            + ((8, 8, 2), (1, 2, 3, 8, 8), (4, 1, 1), (1, 1, 3))
        )
        dtype = rng.choice(
            (
                np.uint8,
                np.uint8,
                np.uint16,
                np.int64,
                np.float32,
                np.float64,
                np.bool_,
                np.float16,
                np.complex64,
                object,
                "U1",
            )
        )
        values = np.full(shape, rng.choice((0, 1, 7))).astype(dtype)
        if dtype in (np.float32, np.float64) and rng.random() < 0.5:
            values = np.full(shape, rng.choice((np.nan, np.inf, -1e30, 1e30)), dtype=dtype)
        if rng.random() < 0.4 and dtype not in (np.uint16, object, "U1"):
            return torch.from_numpy(np.array(values))
        return values
    return rng.choice(
        (
            None,
            3,
            2.5,
            True,
            "",
            "no such file",
            b"bytes",
            {},
            {"path": paths[0]},
            set(),
            object(),
            float("nan"),
            np.uint8(3),
        )
        + (
            rng.choice(paths),
            Path(rng.choice(paths)),
            "data:image/png;base64,AAAA",
            "data:,",
            "file:///nowhere",
            "\0",
            "x" * 5000,
        )
        + (base64.b64encode(Path(paths[0]).read_bytes()).decode(),)
    )


def odd_texts(rng: random.Random, depth: int = 0):
    """Something to hand in as `text`."""
    roll = rng.random()
    if depth < 2 and roll < (0.45 if depth == 0 else 0.1):
        return [odd_texts(rng, depth + 1) for _ in range(rng.choice((0, 1, 1, 2, 2, 3)))]
    if roll < 0.8:
        return rng.choice(
            (PROMPT, PROMPT, "<image>", "<image><image>", "<image>A cat.", "A cat.", "", "<|user|>Who?<|assistant|>")
        )
    return rng.choice(
        (
            None,
            3,
            2.5,
            True,
            b"<image>",
            {},
            {"text": "a"},
            "\ud800",
            "\0",
            "<image",
            "<IMAGE>",
            "<image>" * 40,
            "word " * 20_000,
        )
        + (
            "\u202e\u0301 \U0001f600" * 50,
            " ",
            "\n<image>\n",
            (PROMPT, PROMPT),
            np.array([PROMPT]),
            [PROMPT, None],
            object(),
        )
    )


def small_config(**kwargs) -> MicroVLMConfig:
    """A config with every part, small enough to be built a thousand times."""
    return MicroVLMConfig(
        **{
            "text_config": {
                "model_type": "qwen2",
                "vocab_size": 64,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
                "bos_token_id": 0,
                "eos_token_id": 0,
                "pad_token_id": 1,
                "tie_word_embeddings": True,
            },
            "vision_config": {
                "model_type": "timm_wrapper",
                "architecture": "deit_tiny_patch16_224",
                "do_pooling": False,
                "model_args": {"img_size": 32, "patch_size": 16, "depth": 1, "embed_dim": 24, "num_heads": 3},
            },
            "adapter_config": {
                "vision_hidden_size": 24,
                "num_patches": 4,
                "num_prefix_tokens": 3,
                "mlp_hidden_size": 16,
                "num_attention_heads": 4,
            },
            "alignment_config": {"projection_size": 16, "fusion_num_attention_heads": 4},
            "image_token_id": 4,
            **kwargs,
        }
    )


def small_packed(folder: Path) -> Path:
    """A packed checkpoint with binary, ternary, int4 and int8 weights and frequent rows."""
    torch.manual_seed(0)
    model = MicroVLMForConditionalGeneration(small_config()).eval()
    modules = {
        r"model\.language_model\.layers\..*(q|k|v|o)_proj": {"format": "ternary"},
        r"model\.language_model\.layers\..*up_proj": {"format": "ternary", "group_size": 16},
        r"model\.language_model\.layers\..*_proj": {"format": "int4", "group_size": "row"},
        r"model\.language_model\.embed_tokens": {
            "format": "ternary",
            "group_size": "row",
            "scale_type": "float16",
            "frequent_rows": 10,
        },
        r"model\.vision_tower\..*": {"format": "int8", "group_size": "row"},
        r"model\.adapter\..*": {"format": "binary", "group_size": "row"},
    }
    pack(model, PackedConfig(modules))
    model.save_pretrained(folder)
    return folder


def packed_nano(folder: Path) -> Path:
    """This repo's checkpoint, packed; a copy in `folder` if it is not."""
    if "quantization_config" in json.loads((ROOT / "config.json").read_text()):
        return ROOT
    model = MicroVLMForConditionalGeneration.from_pretrained(ROOT, dtype=torch.float32).eval()
    recipe = load_pack_recipe(str(ROOT / "recipes/pack_nano.yaml"), [])
    pack(model, PackedConfig(recipe["modules"]))
    model.to(getattr(torch, recipe["dtype"])).save_pretrained(folder / "nano")
    return folder / "nano"


def small_memory(rows: int, items: int, seed: int = 0) -> MemoryState:
    """A memory of 8 slots, content size 12, at most 6 items of 5 tokens."""
    draw = torch.Generator().manual_seed(seed)
    state = MemoryState.new(rows, 8, 12, 0.01, 6, 5, "fingerprint")
    for item in range(items):
        address = torch.nn.functional.normalize(torch.randn(rows, 1, 8, generator=draw), dim=-1)
        content = torch.randn(rows, 1, 12, generator=draw)
        ids = torch.randint(0, 50, (rows, 1, 5), generator=draw)
        state = state.write(address, content, [[f"item {item}"]] * rows, token_ids=ids)
    return state


# ---------------------------------------------------------------------------------------------------------------- running cases


def judge(error: BaseException, kind) -> str | None:
    """Why an error is no good refusal: of a documented type, raised on purpose, with a message; None if it is one."""
    if not isinstance(error, kind.types):
        return "another type of error"
    if not str(error).strip():
        return "no message"
    last = traceback.extract_tb(error.__traceback__)[-1]
    on_purpose = isinstance(error, SafetensorError) or linecache.getline(last.filename, last.lineno).strip().startswith(
        RAISES
    )
    if not on_purpose:
        return f"not raised on purpose, in {Path(last.filename).name}:{last.lineno}"
    return kind.explain(error)


def attempt(kind, seed: str) -> tuple[str, str]:
    """One case: `accepted`, `refused` with the type of the error, or `other` with what went wrong."""
    try:
        kind.case(random.Random(seed))
        return "accepted", ""
    except Exception as error:
        why = judge(error, kind)
        if why is None:
            return "refused", type(error).__name__
        last = traceback.extract_tb(error.__traceback__)[-1]
        message = str(error).replace("\n", " ")[:200]
        return "other", f"{type(error).__name__}: {message} ({why}; {Path(last.filename).name}:{last.lineno})"


def memory_now(field: str = "VmRSS") -> float:
    """Resident memory of this process in MB; `VmHWM` for its peak since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}.")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def quiet() -> None:
    warnings.simplefilter("ignore")
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    torch.set_num_threads(1)


def work(connection, name: str, folder: str, extra: dict) -> None:
    """A process that runs the cases it is sent, one after the other."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet()
    now = int(memory_now("VmSize")) << 20
    resource.setrlimit(resource.RLIMIT_AS, (now + LIMIT, now + LIMIT))
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)  # libtiff and others write there
    faulthandler.disable()
    stack = open(Path(folder) / STACK, "w")
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)  # for cases that hang
    try:
        kind = KINDS[name](Path(folder), **extra)
    except Exception:
        connection.send(traceback.format_exc())
        return
    connection.send("ready")
    while (seed := connection.recv()) is not None:
        reset_peak()
        before = memory_now()
        outcome = attempt(kind, seed)
        connection.send((*outcome, memory_now("VmHWM") - before, memory_now()))


def run_kind(name: str, cases: int, seed: int, seconds: float, **extra) -> dict:
    """All cases of a kind: counts, errors, peak memory growth of a case and growth of the process over all, in MB."""
    refused, other = Counter(), Counter()
    result = {
        "kind": name,
        "cases": cases,
        "accepted": 0,
        "hangs": 0,
        "peak_mb": 0.0,
        "growth_mb": 0.0,
        "slowest_s": 0.0,
    }
    started, worker, first = time.perf_counter(), None, None
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(cases):
            if worker is None:
                ours, theirs = spawn.Pipe()
                worker = spawn.Process(target=work, args=(theirs, name, folder, extra), daemon=True)
                worker.start()
                theirs.close()
                if not ours.poll(300):
                    raise TimeoutError(f"the process for {name} does not start.")
                if (answer := ours.recv()) != "ready":
                    raise RuntimeError(f"{name} fell over before its first case:\n{answer}")
            begun = time.perf_counter()
            ours.send(f"{name}-{seed}-{number}")
            try:
                if not ours.poll(seconds):
                    result["hangs"] += 1
                    print(f"{name}: case {number} takes longer than {seconds} s", file=sys.stderr)
                    os.kill(worker.pid, signal.SIGUSR1)
                    time.sleep(1)  # it writes where it is
                    print((Path(folder) / STACK).read_text(), file=sys.stderr)
                    worker.kill()
                    worker.join()
                    worker = first = None
                    continue
                outcome, what, peak, resident = ours.recv()
            except EOFError:
                worker.join()
                outcome, what, peak, resident = "other", f"the process died with {worker.exitcode}", 0.0, None
                worker = first = None
            result["slowest_s"] = max(result["slowest_s"], time.perf_counter() - begun)
            if outcome == "accepted":
                result["accepted"] += 1
            elif outcome == "refused":
                refused[what] += 1
            else:
                other[what] += 1
                print(f"{name}: case {number}: {what}", file=sys.stderr)
            if peak > result["peak_mb"]:
                result["peak_mb"], result["peak_case"] = peak, number
            if worker is not None and number >= cases // 5:  # the first cases fill caches
                first = resident if first is None else first
                result["growth_mb"] = max(result["growth_mb"], resident - first)
        if worker is not None:
            ours.send(None)
            worker.join(30)
    return result | {"refused": dict(refused), "other": dict(other), "seconds": time.perf_counter() - started}


# ---------------------------------------------------------------------------------------------------------------- soak


def soak(captions: int, seed: int = 0, checkpoint: Path | None = None, every: int = 500) -> dict:
    """Captions of the example pictures in batches of 1 to 4 with a memory that is written and forgotten on the way.

    Every tenth caption a fact is written, and one is forgotten as soon as 32 are stored; every 25th, a question in words.

    Returns:
        resident memory at the samples and its slope over the last 80 %, MB per 1,000 captions; whether the captions of the example
        pictures are the same at the end; how far the memory is from a fresh one when one fact is left, and when none is.
    """
    every = min(every, max(1, captions // 10))  # a slope needs more than one sample
    rng = random.Random(seed)
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    paths = sorted((ROOT / "examples").glob("*.png"))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = checkpoint or packed_nano(Path(folder))
        model = MicroVLMForConditionalGeneration.from_pretrained(checkpoint).eval()

    @torch.inference_mode()
    def caption(pictures: list, memory=None) -> list[str]:
        inputs = processor(
            images=[[p] for p in pictures], text=[PROMPT] * len(pictures), padding=True, return_tensors="pt"
        )
        out = model.generate(**inputs.to(model.device, model.dtype), memory=memory, max_new_tokens=32, do_sample=False)
        return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def write(memory, path, sentence: str):
        inputs = processor(images=open_image(path), text=f"<image>{sentence}", return_tensors="pt")
        return model.write_memory(memory, **inputs.to(model.device, model.dtype))

    before = caption([open_image(path) for path in paths])
    memory, done, writes, forgets, questions, samples = model.new_memory(), 0, 0, 0, 0, []
    started = time.perf_counter()
    while done < captions:
        size = min(rng.randint(1, 4), captions - done)
        caption([open_image(rng.choice(paths)) for _ in range(size)], memory if rng.random() < 0.7 else None)
        for number in range(done + 1, done + size + 1):
            if number % 10 == 0:
                memory, writes = write(memory, rng.choice(paths), f"This is number {number} the thing."), writes + 1
                if int(memory.counts[0]) >= 32:
                    memory, forgets = model.forget(memory, rng.randrange(int(memory.counts[0]))), forgets + 1
            if number % 25 == 0:
                question = processor(
                    text=f"<|user|>Who is number {rng.randrange(number)}?<|assistant|>", return_tensors="pt"
                )
                with torch.inference_mode():
                    model.generate(**question.to(model.device), memory=memory, max_new_tokens=16, do_sample=False)
                questions += 1
            if number % every == 0 or number == captions:
                samples.append((number, memory_now()))
        done += size
    seconds = time.perf_counter() - started

    last = int(memory.counts[0]) - 1  # one fact left, the last written: as if the others had never been
    while int(memory.counts[0]) > 1:
        memory, forgets = model.forget(memory, 0), forgets + 1
    fresh = model.new_memory()
    one = fresh.write(memory.addresses, memory.contents) if last >= 0 else fresh
    one_left = distance(memory, one)
    if last >= 0:
        memory, forgets = model.forget(memory, 0), forgets + 1
    gc.collect()
    tail = [s for s in samples if s[0] > captions * 0.2]
    slope = float(np.polyfit(*zip(*tail), 1)[0] * 1000) if len(tail) > 1 else float("nan")
    return {
        "kind": "soak",
        "captions": done,
        "writes": writes,
        "forgets": forgets,
        "questions": questions,
        "seconds": seconds,
        "start_mb": samples[0][1],
        "end_mb": samples[-1][1],
        "slope_mb_per_1000": slope,
        "same_captions": caption([open_image(path) for path in paths]) == before,
        "one_left": one_left,
        "none_left": distance(memory, fresh),
        "samples": samples,
    }


def distance(a: MemoryState, b: MemoryState) -> float:
    """The largest difference of any number of two posteriors."""
    return max(float((getattr(a, n) - getattr(b, n)).abs().max()) for n in ("mean", "covariance", "log_det"))


def run_soak(connection, captions: int, seed: int) -> None:
    quiet()
    try:
        connection.send(soak(captions, seed))
    except Exception:
        connection.send(traceback.format_exc())


# ---------------------------------------------------------------------------------------------------------------- table


def table(results: list[dict]) -> str:
    """Markdown."""
    lines = []
    if rows := [r for r in results if r["kind"] != "soak"]:
        lines += [
            "| kind | cases | accepted | refused | other | hangs | peak of a case, MB | growth over all, MB | slowest, s | seconds |",
            "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for r in rows:
            types = ", ".join(f"{count:,} {name}" for name, count in sorted(r["refused"].items(), key=lambda x: -x[1]))
            lines.append(
                f"| {r['kind']} | {r['cases']:,} | {r['accepted']:,} | {types or 0} | {sum(r['other'].values())} | {r['hangs']} "
                f"| {r['peak_mb']:.0f} | {r['growth_mb']:.0f} | {r['slowest_s']:.1f} | {r['seconds']:.0f} |"
            )
    for r in (r for r in results if r["kind"] == "soak"):
        lines += [
            "",
            "| captions | writes | forgets | questions | start, MB | end, MB | slope, MB per 1,000 | same captions | one fact left | none left | seconds |",
            "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
            f"| {r['captions']:,} | {r['writes']:,} | {r['forgets']:,} | {r['questions']:,} | {r['start_mb']:.1f} | {r['end_mb']:.1f} "
            f"| {r['slope_mb_per_1000']:.2f} | {'yes' if r['same_captions'] else 'no'} | {r['one_left']:.1e} | {r['none_left']:.1e} "
            f"| {r['seconds']:.0f} |",
        ]
    return "\n".join(lines).strip()


def failed(r: dict, memory: float, slope: float) -> bool:
    if r["kind"] == "soak":
        return not (
            r["same_captions"] and r["none_left"] < 1e-6 and r["one_left"] < 1e-6 and not r["slope_mb_per_1000"] > slope
        )
    return bool(r["other"]) or r["hangs"] > 0 or r["peak_mb"] > memory


def replay(name: str, number: int, seed: int, extra: dict) -> None:
    """One case in this process, with its traceback."""
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        kind = KINDS[name](Path(folder), **extra)
        try:
            kind.case(random.Random(f"{name}-{seed}-{number}"))
            print("accepted")
        except Exception as error:
            traceback.print_exc()
            print(f"refused with {type(error).__name__}" if (why := judge(error, kind)) is None else f"other: {why}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--cases",
        type=int,
        default=10_000,
        help="pictures, and processor inputs; of other kinds a fifth (default: %(default)s)",
    )
    add("--soak", type=int, default=10_000, help="captions of the soak, 0: none (default: %(default)s)")
    add("--only", default=",".join([*KINDS, "soak"]), help="kinds, with commas (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--seconds", type=float, default=30.0, help="a case that takes longer is a hang (default: %(default)s)")
    add("--memory", type=float, default=1536.0, help="MB that a case may take (default: %(default)s)")
    add("--slope", type=float, default=1.0, help="MB per 1,000 captions that the soak may grow (default: %(default)s)")
    add("--replay", type=int, metavar="CASE", help="run this case of the one kind in --only here, with its traceback")
    add("--json", help="also write everything to this file")
    options = parser.parse_args(arguments)
    names = options.only.split(",")
    if unknown := set(names) - {*KINDS, "soak"}:
        parser.error(f"unknown kind {', '.join(sorted(unknown))}: choose from {', '.join([*KINDS, 'soak'])}")
    quiet()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        extra = {"packed": {"nano": packed_nano(Path(folder))}} if "packed" in names else {}
        if options.replay is not None:
            if len(names) != 1 or names[0] not in KINDS:
                parser.error("--replay takes one kind in --only")
            replay(names[0], options.replay, options.seed, extra.get(names[0], {}))
            return 0
        for name in [n for n in names if n in KINDS]:
            cases = max(1, round(options.cases * KINDS[name].share))
            results.append(run_kind(name, cases, options.seed, options.seconds, **extra.get(name, {})))
            print(f"{name}: {results[-1]['seconds']:.0f} s", file=sys.stderr, flush=True)
    if "soak" in names and options.soak:
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=run_soak, args=(theirs, options.soak, options.seed))
        process.start()
        theirs.close()
        result = ours.recv()
        process.join()
        if isinstance(result, str):
            raise RuntimeError(f"the soak fell over:\n{result}")
        results.append(result)
    print(table(results))
    if options.json:
        temporary = Path(options.json).with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1))
        temporary.replace(options.json)
    return int(any(failed(r, options.memory, options.slope) for r in results))


if __name__ == "__main__":
    sys.exit(main())
