"""Kinds of cases: what is mutated, what runs on it, what counts as a good refusal."""

import copy
import json
import linecache
import random
import shutil
import struct
import traceback
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from microvlm.model import MemoryState, MicroVLMConfig, MicroVLMForConditionalGeneration, open_image

from .material import PROMPT, ROOT, image_files, odd_images, odd_texts, small_memory, small_packed
from .mutations import ico_around, mutate_bytes, mutate_json, mutate_png, mutate_safetensors, mutate_tensors, png_bomb

REFUSALS = (ValueError, TypeError, OSError, SafetensorError)
ODD_VALUES = ("", "nan", "-1", "1" * 5000, "[]", "[[]]", '[["\\ud800"]]', "[" * 10_000, "null")
RAISES = ("raise", "reraise")  # how the line of an error raised on purpose begins


def check_pixels(values: torch.Tensor, images: int) -> None:
    assert values.shape == (images, 3, 224, 224), f"pixel_values of shape {tuple(values.shape)}"
    assert values.dtype == torch.float32, f"pixel_values of {values.dtype}"
    assert bool(torch.isfinite(values).all()), "pixel_values that are not finite"


class Images:
    """Mutated image files, through `open_image` and the processor to `pixel_values`."""

    share = 1.0
    types = (OSError, ValueError)

    def __init__(self, folder: Path):
        self.folder = folder
        self.processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
        self.seeds = image_files(random.Random(0))
        self.pngs = [data for suffix, data in self.seeds if suffix == "png"]

    def case(self, rng: random.Random) -> None:
        # a file and its damage
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
        # by path, or opened
        limit = self.processor.image_processor.pixel_limit
        image = str(path)
        if rng.random() < 0.5:
            image = open_image(path, limit)
            assert image.width * image.height <= limit, f"an image of {image.size}"
        inputs = self.processor(images=image, text=PROMPT, return_tensors="pt")
        check_pixels(inputs["pixel_values"], 1)

    def explain(self, error: BaseException) -> str | None:
        """Say why this is no good refusal; None if it is one."""
        return None if self.last in str(error) else "the message does not name the image"


class ProcessorInputs:
    """Odd combinations of images, texts and options."""

    share = 1.0
    types = (ValueError, TypeError, OSError)

    def __init__(self, folder: Path):
        self.processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
        self.paths = [str(path) for path in sorted((ROOT / "examples").glob("*.png"))]

    def case(self, rng: random.Random) -> None:
        kwargs = {}
        if rng.random() < 0.9:
            kwargs["images"] = odd_images(rng, self.paths)
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
        images = 0
        if "pixel_values" in inputs:
            images = len(inputs["pixel_values"])
            check_pixels(inputs["pixel_values"], images)
        if "input_ids" in inputs:
            count = int((inputs["input_ids"] == self.processor.image_token_id).sum())
            # an image that no text mentions, or the other way round, would end in the model
            assert count == images * self.processor.num_image_tokens, f"{count} placeholders for {images} images"

    def explain(self, error: BaseException) -> str | None:
        return None


class Configs:
    """Mutated config.json, built on the meta device."""

    share = 0.2
    types = (ValueError, TypeError, OSError, StrictDataclassError, ImportError)  # the last two: the library's own

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
    types = (ValueError, TypeError, OSError, SafetensorError, RuntimeError)  # the last is transformers' for shapes

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
                metadata[key] = rng.choice((*ODD_VALUES, metadata[key] + " ", "2"))
            save_file(tensors, self.folder / "changed.safetensors", metadata)
            data = (self.folder / "changed.safetensors").read_bytes()
        self.path.write_bytes(data)
        self.open(self.path, rng)

    def open(self, path: Path, rng: random.Random) -> None:
        state = MemoryState.load(path, self.expected)
        assert 0 < state.num_rows <= 2 and int(state.counts.max()) <= state.max_items == 6
        assert state.describe()
        # read
        R, K = state.num_rows, 8
        query = torch.nn.functional.normalize(torch.randn(R, 2, K, generator=torch.Generator().manual_seed(0)), dim=-1)
        read = state.read(query, sharpness=40.0)
        assert all(torch.isfinite(t).all() for t in vars(read).values()), "a read that is not finite"
        # merge, save, open, forget all
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
    "images": Images,
    "processor": ProcessorInputs,
    "configs": Configs,
    "packed": Packed,
    "memory": MemoryFiles,
}


def judge(error: BaseException, kind) -> str | None:
    """Say why an error is no good refusal; None if it is of a documented type, raised on purpose, with a message."""
    if not isinstance(error, kind.types):
        return "another type of error"
    if not str(error).strip():
        return "no message"
    last = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(last.filename, last.lineno).strip()
    if not isinstance(error, SafetensorError) and not line.startswith(RAISES):
        return f"not raised on purpose, in {Path(last.filename).name}:{last.lineno}"
    return kind.explain(error)


def attempt(kind, seed: str) -> tuple[str, str]:
    """Run one case: `accepted`, `refused` with the type of the error, or `other` with what went wrong."""
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
