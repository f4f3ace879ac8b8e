"""Build what is mutated: image files, odd inputs, small checkpoints and memories."""

import base64
import io
import json
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms

from microvlm.files import ROOT
from microvlm.model import MemoryState, MicroVLMConfig, MicroVLMForConditionalGeneration, PackedConfig
from microvlm.pack import load_pack_recipe, pack

PROMPT = "<|user|><image><|assistant|>"
PACK_RECIPE = ROOT / "recipes/nano/pack.yaml"
FORMATS = [("png", "PNG", mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")]
FORMATS += [("jpg", "JPEG", mode) for mode in ("RGB", "L", "CMYK")]
FORMATS += [("webp", "WEBP", "RGBA"), ("gif", "GIF", "P")]
FORMATS += [("bmp", "BMP", mode) for mode in ("RGB", "P", "1")]
FORMATS += [("tif", "TIFF", mode) for mode in ("RGB", "RGBA", "L", "I;16", "CMYK", "F", "1", "LAB")]
FORMATS += [("ico", "ICO", "RGBA"), ("icns", "ICNS", "RGBA"), ("ppm", "PPM", "RGB"), ("tga", "TGA", "RGBA")]
FORMATS += [("pcx", "PCX", "P"), ("avif", "AVIF", "RGB"), ("jp2", "JPEG2000", "RGB"), ("qoi", "QOI", "RGB")]
FORMATS += [("dds", "DDS", "RGBA")]
# what to hand in as images, next to Pillow's
ARRAY_SHAPES = [
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
]
ARRAY_SHAPES += [(5, 5, 5), (3, 3, 3), (8, 8, 2), (1, 2, 3, 8, 8), (4, 1, 1), (1, 1, 3)]
ARRAY_TYPES = [np.uint8, np.uint8, np.uint16, np.int64, np.float32, np.float64, np.bool_, np.float16, np.complex64]
ARRAY_TYPES += [object, "U1"]
NO_IMAGES = [None, 3, 2.5, True, "", "no such file", b"bytes", {}, set(), object(), float("nan"), np.uint8(3)]
NO_IMAGES += ["data:image/png;base64,AAAA", "data:,", "file:///nowhere", "\0", "x" * 5000]
TEXTS = [PROMPT, PROMPT, "<image>", "<image><image>", "<image>A cat.", "A cat.", "", "<|user|>Who?<|assistant|>"]
NO_TEXTS = [None, 3, 2.5, True, b"<image>", {}, {"text": "a"}, "\ud800", "\0", "<image", "<IMAGE>", "<image>" * 40]
NO_TEXTS += ["word " * 20_000, "\u202e\u0301 \U0001f600" * 50, " ", "\n<image>\n", (PROMPT, PROMPT), np.array([PROMPT])]
NO_TEXTS += [[PROMPT, None], object()]


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an RGB image, also to the modes that Pillow's `convert` lacks."""
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
    return image.convert(mode)


def save_options(image: Image.Image, form: str, mode: str, rng: random.Random) -> dict:
    """Choose options for `save`: orientation, frames, compression."""
    options = {}
    if form in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
        options["exif"] = exif = Image.Exif()
        exif[0x0112] = rng.choice((0, 1, 3, 6, 8, 9, 65535))  # orientation
        exif[0x010E] = "x" * rng.randrange(1, 20)
    if form in ("GIF", "WEBP"):
        options |= {"save_all": True, "append_images": [image.rotate(90)], "duration": 50}
    if form == "TIFF" and mode in ("RGB", "L", "RGBA"):
        options["compression"] = rng.choice(("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"))
        if options["compression"] != "raw" and exif[0x0112] not in range(1, 9):
            exif[0x0112] = 1  # libtiff writes neither another orientation nor an empty text
    return options


def image_files(rng: random.Random) -> list[tuple[str, bytes]]:
    """Write the example images in every format and mode that Pillow writes here: suffix and bytes."""
    Image.init()
    files = []
    for number, path in enumerate(sorted((ROOT / "examples").glob("*.png"))):
        plain = Image.open(path).convert("RGB")
        for place, (suffix, form, mode) in enumerate(FORMATS):
            if form not in Image.SAVE or (number + place) % 3:  # every format with a third of the images
                continue
            image = in_mode(plain.resize((rng.randrange(16, 120), rng.randrange(16, 120))), mode)
            data = io.BytesIO()
            image.save(data, form, **save_options(image, form, mode, rng))
            files.append((suffix, data.getvalue()))
    return files


def odd_array(rng: random.Random):
    """Make an array or tensor, seldom an image."""
    dtype = rng.choice(ARRAY_TYPES)
    values = np.full(rng.choice(ARRAY_SHAPES), rng.choice((0, 1, 7))).astype(dtype)
    if dtype in (np.float32, np.float64) and rng.random() < 0.5:
        values = np.full(values.shape, rng.choice((np.nan, np.inf, -1e30, 1e30)), dtype=dtype)
    if rng.random() < 0.4 and dtype not in (np.uint16, object, "U1"):
        return torch.from_numpy(np.array(values))
    return values


def odd_images(rng: random.Random, paths: list[str], depth: int = 0):
    """Make something to hand in as `images`."""
    roll = rng.random()
    if depth < 3 and roll < 0.45:
        kind = rng.choice((list, list, list, tuple))
        return kind(odd_images(rng, paths, depth + 1) for _ in range(rng.choice((0, 1, 1, 2, 2, 3))))
    if roll < 0.75:
        mode = rng.choice(("RGB", "RGBA", "L", "P", "1", "CMYK", "I;16", "F", "LAB"))
        return Image.new(mode, (rng.choice((1, 2, 30, 500)), rng.choice((1, 3, 40))))
    if roll < 0.88:
        return odd_array(rng)
    encoded = base64.b64encode(Path(paths[0]).read_bytes()).decode()
    return rng.choice([*NO_IMAGES, {"path": paths[0]}, rng.choice(paths), Path(rng.choice(paths)), encoded])


def odd_texts(rng: random.Random, depth: int = 0):
    """Make something to hand in as `text`."""
    roll = rng.random()
    if depth < 2 and roll < (0.45 if depth == 0 else 0.1):
        return [odd_texts(rng, depth + 1) for _ in range(rng.choice((0, 1, 1, 2, 2, 3)))]
    return rng.choice(TEXTS if roll < 0.8 else NO_TEXTS)


def small_config(**kwargs) -> MicroVLMConfig:
    """Configure a model with every part, small enough to be built a thousand times."""
    text = {"model_type": "qwen2", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    text |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "tie_word_embeddings": True}
    tower = {"img_size": 32, "patch_size": 16, "depth": 1, "embed_dim": 24, "num_heads": 3}
    vision = {"model_type": "timm_wrapper", "architecture": "deit_tiny_patch16_224", "do_pooling": False}
    adapter = {"vision_hidden_size": 24, "num_patches": 4, "num_prefix_tokens": 3, "mlp_hidden_size": 16}
    values = {
        "text_config": text,
        "vision_config": vision | {"model_args": tower},
        "adapter_config": adapter | {"num_attention_heads": 4},
        "alignment_config": {"projection_size": 16, "fusion_num_attention_heads": 4},
        "image_token_id": 4,
    }
    return MicroVLMConfig(**values | kwargs)


def small_packed(folder: Path) -> Path:
    """Write a packed checkpoint with binary, ternary, int4 and int8 weights and frequent rows."""
    torch.manual_seed(0)
    model = MicroVLMForConditionalGeneration(small_config()).eval()
    embedding = {"format": "ternary", "group_size": "row", "scale_type": "float16", "frequent_rows": 10}
    modules = {
        r"model\.language_model\.layers\..*(q|k|v|o)_proj": {"format": "ternary"},
        r"model\.language_model\.layers\..*up_proj": {"format": "ternary", "group_size": 16},
        r"model\.language_model\.layers\..*_proj": {"format": "int4", "group_size": "row"},
        r"model\.language_model\.embed_tokens": embedding,
        r"model\.vision_tower\..*": {"format": "int8", "group_size": "row"},
        r"model\.adapter\..*": {"format": "binary", "group_size": "row"},
    }
    pack(model, PackedConfig(modules))
    model.save_pretrained(folder)
    return folder


def packed_nano(folder: Path) -> Path:
    """Find this repo's checkpoint, or write a packed copy to `folder` if it is not packed."""
    if "quantization_config" in json.loads((ROOT / "config.json").read_text()):
        return ROOT
    model = MicroVLMForConditionalGeneration.from_pretrained(ROOT, dtype=torch.float32).eval()
    recipe = load_pack_recipe(str(PACK_RECIPE), [])
    pack(model, PackedConfig(recipe["modules"]))
    model.to(getattr(torch, recipe["dtype"])).save_pretrained(folder / "nano")
    return folder / "nano"


def small_memory(rows: int, items: int, seed: int = 0) -> MemoryState:
    """Make a memory of 8 slots, content size 12, at most 6 items of 5 tokens."""
    draw = torch.Generator().manual_seed(seed)
    state = MemoryState.new(rows, 8, 12, 0.01, 6, 5, "fingerprint")
    for item in range(items):
        address = torch.nn.functional.normalize(torch.randn(rows, 1, 8, generator=draw), dim=-1)
        content = torch.randn(rows, 1, 12, generator=draw)
        ids = torch.randint(0, 50, (rows, 1, 5), generator=draw)
        state = state.write(address, content, [[f"item {item}"]] * rows, token_ids=ids)
    return state
