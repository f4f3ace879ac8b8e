"""Eight pictures with captions, a tokenizer that knows their words, and the tiny model around both."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import torch
from conftest import CHAT_TEMPLATE, IMAGE_ID, VOCAB, tiny_model
from datasets import Dataset, Features, Image, Value
from microvlm.processing_microvlm import MicroVLMImageProcessor, MicroVLMProcessor
from PIL import Image as PILImage, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>", "<image>"]  # ids 0 to 4
CAPTIONS = [
    "a red square",
    "a blue circle on white",
    "a green square",
    "two black bars",
    "a large yellow circle",
    "a small red circle on green",
    "blue",
    "a purple square on black ground",
]
SHAPES = [  # ground, colour, shape, box in 32 x 32
    ("white", "red", "rectangle", (8, 8, 24, 24)),
    ("white", "blue", "ellipse", (8, 8, 24, 24)),
    ("white", "green", "rectangle", (8, 8, 24, 24)),
    ("white", "black", "rectangle", (0, 12, 31, 20)),
    ("white", "yellow", "ellipse", (1, 1, 31, 31)),
    ("green", "red", "ellipse", (12, 12, 20, 20)),
    ("blue", "blue", "rectangle", (0, 0, 31, 31)),
    ("black", "purple", "rectangle", (8, 8, 24, 24)),
]


def png(i: int) -> bytes:
    """Picture i, 32 x 32; PNG, so that every format holds the same pixels."""
    ground, color, shape, box = SHAPES[i]
    picture = PILImage.new("RGB", (32, 32), ground)
    getattr(ImageDraw.Draw(picture), shape)(box, fill=color)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def pairs(n: int = 8, **columns) -> list[dict]:
    """Rows of a parquet file: image, caption, id, and further columns given as lists."""
    rows = [{"image": {"bytes": png(i), "path": None}, "caption": CAPTIONS[i], "id": f"toy-{i}"} for i in range(n)]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return rows


def write_parquet(path: Path, rows: list[dict], image: str = "image") -> Path:
    """Rows as parquet in the Image convention of `datasets`."""
    features = {name: Value("string") for name in rows[0]} | {image: Image()}
    Dataset.from_list(rows, features=Features(features)).to_parquet(str(path))
    return path


def write_folder(folder: Path, rows: list[dict], caption: str = "caption") -> Path:
    """Rows as a folder of pictures with metadata.jsonl."""
    folder.mkdir()
    lines = []
    for row in rows:
        (folder / f"{row['id']}.png").write_bytes(row["image"]["bytes"])
        lines.append(json.dumps({"file_name": f"{row['id']}.png", caption: row["caption"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def write_files(folder: Path, rows: list[dict]) -> Path:
    """Rows as img2dataset's `files` output: numbered folders, a text file beside every picture."""
    for i, row in enumerate(rows):
        path = folder / f"{i // 4:05d}" / f"{row['id']}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["image"]["bytes"])
        path.with_suffix(".txt").write_text(row["caption"])
    return folder


def write_tar(path: Path, rows: list[dict], image: str = "png", caption: str = "txt") -> Path:
    """Rows as a webdataset shard."""
    with tarfile.open(path, "w") as tar:
        for row in rows:
            for suffix, content in ((image, row["image"]["bytes"]), (caption, row["caption"].encode())):
                info = tarfile.TarInfo(f"{row['id']}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def toy_processor() -> MicroVLMProcessor:
    """A BPE tokenizer of fewer than 128 tokens trained on the captions, and 32 x 32 pictures."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=SPECIAL_TOKENS, show_progress=False)
    backend.train_from_iterator([*CAPTIONS, "<image>"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        extra_special_tokens=SPECIAL_TOKENS[2:],
        padding_side="left",
    )
    image_processor = MicroVLMImageProcessor(size={"height": 32, "width": 32})
    return MicroVLMProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE, num_image_tokens=5)


def toy_model(text: str = "qwen2", **kwargs):
    """The tiny model whose default prompt is a user's turn with one picture."""
    return tiny_model(text, default_prompt_ids=[2, IMAGE_ID, 3], **kwargs)


def toy_checkpoint(folder: Path, **kwargs) -> Path:
    """Model, processor and their code, as a Hub repo has them."""
    toy_model(**kwargs).save_pretrained(folder)
    toy_processor().save_pretrained(folder)
    return folder


def use_cache(monkeypatch, folder: Path) -> None:
    """Let `datasets` keep its files in `folder`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))


def same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
