"""The processor keeps the contracts of transformers, and no picture, however broken, ends in anything but pixels or a
clear error."""

import base64
import contextlib
import io
import itertools
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from dataclasses import dataclass
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import IMAGE_ID, ROOT, VOCAB, tiny_config, tiny_model
from microvlm.processing_microvlm import (
    PIXEL_LIMIT,
    MicroVLMImageProcessor,
    MicroVLMProcessor,
    fetch_image,
    open_image,
    scale_to_8_bit,
    to_rgb,
)
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoProcessor, PreTrainedTokenizerFast, ProcessorMixin

from microvlm import processing_microvlm
from microvlm.model import CACHE_NAME

P = 5  # placeholders per picture, as in conftest.tiny_config
SPECIAL = ["<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>", "<image>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    """BPE with the 128 tokens of `conftest.tiny_model`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    letters = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?:-'")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(
        ["a red square on a blue ground, describe the picture of the lower circle and yellow triangles"] * 4, trainer
    )
    assert tokenizer.get_vocab_size() == VOCAB and tokenizer.token_to_id("<image>") == IMAGE_ID
    names = {"eos_token": SPECIAL[0], "pad_token": SPECIAL[1], "additional_special_tokens": SPECIAL[2:]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names, **kwargs)


def tiny_processor(tokenizer=None, **kwargs) -> MicroVLMProcessor:
    image_processor = MicroVLMImageProcessor(size={"height": 32, "width": 32}, **kwargs)
    tokenizer = tokenizer or tiny_tokenizer()
    return MicroVLMProcessor(image_processor, tokenizer, chat_template=TEMPLATE, num_image_tokens=P)


def save_checkpoint(folder) -> None:
    """A folder that loads as a Hub repo does: tiny model, tokenizer, processor, code."""
    # a tied vocabulary makes a random decoder repeat itself whatever the picture
    text_config = tiny_config().text_config.to_dict() | {"tie_word_embeddings": False}
    tiny_model(text_config=text_config, default_prompt_ids=[2, IMAGE_ID, 60, 61, 3]).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)


def picture(width: int = 20, height: int = 10, mode: str = "RGB", seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def png_bytes(image: Image.Image, **kwargs) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG", **kwargs)
    return data.getvalue()


@pytest.fixture
def processor() -> MicroVLMProcessor:
    return tiny_processor()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder)
    return folder


# --- the processor: what transformers expects of one


def test_text_and_picture(processor):
    inputs = processor(images=picture(), text="a<image>b", return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(IMAGE_ID) == P and ids[ids.index(IMAGE_ID) :][:P] == [IMAGE_ID] * P
    assert inputs["pixel_values"].shape == (1, 3, 32, 32) and inputs["pixel_values"].dtype == torch.float32
    assert set(inputs) == set(processor.model_input_names) == {"input_ids", "attention_mask", "pixel_values"}


def test_token_type_ids_never_reach_the_model():
    names = ["input_ids", "token_type_ids", "attention_mask"]
    processor = tiny_processor(tiny_tokenizer(model_input_names=names))
    assert "token_type_ids" in processor.tokenizer("a")
    assert "token_type_ids" not in processor(text="a") and "token_type_ids" not in processor.model_input_names


def test_pixels_are_resized_scaled_and_normalised():
    white = Image.new("RGB", (7, 5), "white")
    pixels = tiny_processor()(images=white, return_tensors="pt")["pixel_values"]
    assert torch.allclose(pixels, torch.ones(1, 3, 32, 32), atol=1e-6)
    assert MicroVLMImageProcessor()(white, return_tensors="pt")["pixel_values"].shape == (1, 3, 224, 224)


def test_calling_options(processor):
    image = picture()

    def call(**kwargs):
        return processor(images=image, text="a<image>", return_tensors="pt", **kwargs)

    assert call(size={"height": 16, "width": 24})["pixel_values"].shape == (1, 3, 16, 24)
    assert call(images_kwargs={"size": {"height": 8, "width": 8}})["pixel_values"].shape == (1, 3, 8, 8)
    assert call(do_rescale=True, rescale_factor=-1.0)["pixel_values"].mean() < 0
    assert call(image_mean=[0.0] * 3, image_std=[1.0] * 3)["pixel_values"].min() >= 0
    assert call(do_rescale=False, do_normalize=False)["pixel_values"].max() > 1
    assert call(padding="max_length", max_length=76)["input_ids"].shape == (1, 76)
    assert call(text_kwargs={"padding": "max_length", "max_length": 77})["input_ids"].shape == (1, 77)
    types = call(return_mm_token_type_ids=True)["mm_token_type_ids"]
    assert types.sum() == P and types.eq(1).equal(call()["input_ids"].eq(IMAGE_ID))
    with pytest.raises(ValueError, match="passed two times"):
        call(do_rescale=True, images_kwargs={"do_rescale": False})
    with pytest.raises(ValueError, match="Mismatch in `image` token count"):
        call(truncation=True, max_length=3)


def test_tokenizer_options_are_kept():
    processor = tiny_processor(tiny_tokenizer())
    processor.tokenizer.init_kwargs |= {"padding": "max_length", "max_length": 40}
    processor.tokenizer.padding, processor.tokenizer.max_length = "max_length", 40
    assert processor(images=picture(), text="<image>", return_tensors="pt")["input_ids"].shape == (1, 40)


def test_several_pictures_in_every_layout(processor):
    a, b, c = (picture(seed=i) for i in range(3))
    texts = ["<image>a", "<image>b<image>"]
    flat = processor(images=[a, b, c], text=texts, padding=True, return_tensors="pt")
    nested = processor(images=[[a], [b, c]], text=texts, padding=True, return_tensors="pt")
    assert flat["pixel_values"].shape == (3, 3, 32, 32) and nested["pixel_values"].equal(flat["pixel_values"])
    assert nested["input_ids"].eq(IMAGE_ID).sum(1).tolist() == [P, 2 * P]
    assert nested["input_ids"][0, 0] == processor.tokenizer.pad_token_id  # left
    some = processor(images=[[], [b, c]], text=["a", texts[1]], padding=True, return_tensors="pt")
    assert some["pixel_values"].equal(flat["pixel_values"][1:])
    none = processor(images=[[], []], text=["a", "b"], padding=True, return_tensors="pt")
    assert set(none) == {"input_ids", "attention_mask"}
    assert set(processor(images=[], text="a")) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    "images, text, message",
    [
        (2, ["<image>"], "Found total 1 <image> tokens and 2 images"),
        (1, ["a"], "Found total 0 <image> tokens and 1 images"),
        (0, ["a <image>"], "Found 1 <image> tokens in the text but no images were passed"),
        (None, ["a <image>"], "Found 1 <image> tokens in the text but no images were passed"),
        (1, [], "Found total 0 <image> tokens and 1 images"),
        (None, [], "`text` is an empty list: give one text or a list with at least one."),
        (None, None, "You need to provide at least one input to call MicroVLMProcessor"),
        (0, None, "You need to provide at least one input to call MicroVLMProcessor"),
    ],
)
def test_text_and_pictures_that_do_not_fit(processor, images, text, message):
    with pytest.raises(ValueError) as error:
        processor(images=None if images is None else [picture()] * images, text=text)
    assert message in str(error.value)


def test_pictures_never_slip_into_another_row(processor):
    """The totals agree, the rows do not."""
    with pytest.raises(ValueError) as error:
        processor(images=[[picture()], [picture()]], text=["<image><image>", "a"])
    assert str(error.value) == (
        "The texts have [2, 0] <image> placeholders, but the rows of `images` hold [1, 1] images: give one row of "
        "images per text and one placeholder per image."
    )


def test_empty_list_of_pictures_alone(processor):
    with pytest.raises(ValueError, match="`images` is empty: give at least one image."):
        processor.image_processor([], return_tensors="pt")


@pytest.mark.parametrize("unknown", [None, "?"])
def test_tokenizer_without_the_image_token(unknown):
    with pytest.raises(ValueError, match="The tokenizer has no token '<picture>': add it with"):
        MicroVLMProcessor(MicroVLMImageProcessor(), tiny_tokenizer(unk_token=unknown), image_token="<picture>")


def test_every_kind_of_input_gives_the_same_pixels(processor, tmp_path):
    image, path = picture(), tmp_path / "a picture.png"
    image.save(path)
    data = path.read_bytes()
    text = base64.b64encode(data).decode()
    array = np.asarray(image)
    at_end = io.BytesIO(data)
    at_end.read()
    row = datasets.Dataset.from_list([{"image": {"bytes": data}}], datasets.Features({"image": datasets.Image()}))
    sources = [data, bytearray(data), at_end, {"bytes": data, "path": "gone.png"}, {"bytes": None, "path": str(path)}]
    sources += [{"url": path.as_uri()}, row["image"], row.cast_column("image", datasets.Image(decode=False))["image"]]
    with path.open("rb") as file:
        assert processor(images=file)["pixel_values"] is not None
    sources += [image, path, str(path), path.as_uri(), text, f"data:image/png;base64,{text}", array]
    sources += [
        array.transpose(2, 0, 1),
        torch.from_numpy(array.copy()),
        torch.from_numpy(array.copy()).permute(2, 0, 1),
    ]
    expected = processor(images=image, return_tensors="pt")["pixel_values"]
    for source in sources + [[image], [[image]], array[None]]:
        assert processor(images=source, return_tensors="pt")["pixel_values"].equal(expected), type(source)
    flipped = array[..., ::-1]  # negative strides
    assert processor(images=flipped, return_tensors="pt")["pixel_values"].equal(expected.flip(1))


def test_what_is_white_in_arrays_of_real_numbers(processor):
    """The same rule as for Pillow's mode F; ToTensor's arrays are in [0, 1]."""

    def pixels(image, **kwargs):
        return processor(images=image, return_tensors="pt", do_resize=False, **kwargs)["pixel_values"]

    image = np.asarray(picture())
    real, expected = torch.from_numpy(image / np.float32(image.max())).permute(2, 0, 1), pixels(image)
    assert image.max() == 255
    for top in (1, 255, 65535, 1e6):
        for array in (real * top, (real * top).numpy().transpose(1, 2, 0), [real * top]):
            assert torch.allclose(pixels(array), expected, atol=1e-5), top
    for kwargs in ({"do_rescale": False}, {"rescale_factor": 1.0}):
        assert torch.allclose(pixels(real, **kwargs), expected, atol=1e-5)
    gray = Image.fromarray(np.array([[-1, 0, 0.5, 1]], dtype=np.float32))
    assert torch.allclose(pixels(gray), pixels(np.asarray(gray)), atol=0.01)


def test_arrays_of_other_shapes_and_widths(processor):
    def pixels(array):
        return processor.image_processor(array, return_tensors="pt", do_normalize=False)["pixel_values"]

    half = np.full((6, 8), 128, dtype=np.uint8)
    expected = torch.full((1, 3, 32, 32), 128 / 255)
    transparent = np.dstack([half] * 3 + [np.zeros_like(half)])
    for array in (
        half,
        half[..., None],
        half[None],
        np.dstack([half] * 3).astype(np.float32),
        half.astype(np.uint16) * 257,
    ):
        assert torch.allclose(pixels(array), expected, atol=1e-6), array.shape
        assert torch.allclose(pixels([array]), expected, atol=1e-6), array.shape
    assert pixels(transparent).eq(1).all()  # white shows through
    for mask in (half > 0, torch.from_numpy(half > 0), Image.fromarray(half > 0)):
        assert pixels(mask).eq(1).all()


def test_chat_template(processor, tmp_path):
    path = tmp_path / "a.png"
    picture(seed=1).save(path)
    one = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "describe"}]}]
    two = [
        {"role": "user", "content": [{"type": "image", "path": str(path)}, {"type": "image", "url": path.as_uri()}]},
        {"role": "assistant", "content": "a red circle"},
        {"role": "user", "content": "describe"},
    ]
    assert processor.apply_chat_template(one, add_generation_prompt=True) == "<|user|><image>describe<|assistant|>"
    assert processor.apply_chat_template(two[1:]) == "<|assistant|>a red circle<|user|>describe"
    inputs = processor.apply_chat_template(one, tokenize=True, return_dict=True, return_tensors="pt")
    assert inputs["pixel_values"].equal(processor(images=picture(), return_tensors="pt")["pixel_values"])
    assert inputs["input_ids"].tolist() == [processor.tokenizer("<|user|>" + "<image>" * P + "describe").input_ids]
    kwargs = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": {"padding": True}}
    batch = processor.apply_chat_template([one, two, two[1:]], add_generation_prompt=True, **kwargs)
    assert batch["pixel_values"].shape[0] == 3 and batch["input_ids"].eq(IMAGE_ID).sum(1).tolist() == [P, 2 * P, 0]
    assert processor.apply_chat_template(two[1:], tokenize=True)[0][0] == SPECIAL.index("<|assistant|>")


def test_chat_template_takes_a_system_message_and_marks_answers():
    processor = AutoProcessor.from_pretrained(ROOT)
    path = {"type": "image", "image": picture()}
    chat = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": [path, {"type": "text", "text": " a "}]},
        {"role": "assistant", "content": [{"type": "text", "text": " red"}]},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "circle"},
    ]
    text = "<|user|><image>a<|assistant|>red<|endoftext|><|user|>b<|assistant|>circle<|endoftext|>"
    assert processor.apply_chat_template(chat) == text
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    out = processor.apply_chat_template(chat, **options)
    (ids,), (mask,) = out["input_ids"], out["assistant_masks"]
    assert processor.decode([i for i, on in zip(ids, mask) if on]) == "red<|endoftext|>circle<|endoftext|>"
    with pytest.raises(Exception, match="^The roles are 'system', 'user' and 'assistant', got tool"):
        processor.apply_chat_template([{"role": "tool", "content": "a"}])


@pytest.mark.parametrize("token", SPECIAL)
def test_control_tokens_in_messages_are_text(token):
    processor, P = AutoProcessor.from_pretrained(ROOT), 25
    image = {"type": "image", "image": picture()}
    chat = [{"role": "user", "content": [image, {"type": "text", "text": f"a{token}circle"}]}]
    for content in (chat, [chat, chat]):
        rows = processor.apply_chat_template(content, tokenize=True)
        for ids in rows:
            assert [i for i in ids if i < len(SPECIAL)] == [2] + [IMAGE_ID] * P
            assert processor.decode(ids[1 + P :]) == f"a{token}circle"
    for wrong in ({}, {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}):
        with pytest.raises(ValueError) as error:
            processor.apply_chat_template([{"role": "user", "content": f"a{token}b"}], **wrong)
        assert str(error.value).startswith(f"a message holds {token}, which a string cannot tell from the template's")


@dataclass
class Message:
    """What the clients of servers hand on instead of a dictionary."""

    role: str
    content: str | list
    tool_calls: list | None = None


@dataclass
class Part:
    text: str
    type: str = "text"


@pytest.mark.skipif(CACHE_NAME != "cache", reason="transformers 5.24 and later")
def test_messages_as_objects():
    processor = AutoProcessor.from_pretrained(ROOT)
    for content in ("a red circle", [Part("a red circle")], [{"type": "text", "text": "a red circle"}]):
        expected = processor.apply_chat_template([{"role": "user", "content": "a red circle"}])
        assert processor.apply_chat_template([Message("user", content)]) == expected
        assert processor.apply_chat_template([[Message("user", content)]]) == [expected]
        assert processor.apply_chat_template(SimpleNamespace(messages=[Message("user", content)])) == expected
    for content in ("a<|assistant|>b", [Part("a<|assistant|>b")]):
        with pytest.raises(ValueError, match=r"^a message holds <\|assistant\|>, which a string cannot tell"):
            processor.apply_chat_template([Message("user", content)])
        (ids,) = processor.apply_chat_template([Message("user", content)], tokenize=True)
        assert [i for i in ids if i < len(SPECIAL)] == [2] and processor.decode(ids[1:]) == "a<|assistant|>b"


def test_text_is_the_first_input(processor):
    """`Trainer` takes the lengths of rows from the first."""
    names = processor.model_input_names
    assert names[0] == "input_ids" and sorted(names) == ["attention_mask", "input_ids", "pixel_values"]


def test_decoding(processor):
    ids = processor.tokenizer("a red circle").input_ids
    assert processor.decode(ids) == processor.batch_decode([ids])[0] == "a red circle"
    output = torch.tensor([[IMAGE_ID] * P + ids + [0]])
    assert processor.post_process_image_text_to_text(output) == ["a red circle"]
    assert processor.post_process_image_text_to_text(output, skip_special_tokens=False) != ["a red circle"]


def test_placeholders_are_known_before_the_call(processor):
    sizes = [(100, 100), (300, 100), (1, 1)]
    inputs = processor(images=[picture(w, h) for h, w in sizes], text=["<image>"] * 3, return_mm_token_type_ids=True)
    counted = processor._get_num_multimodal_tokens(image_sizes=sizes)
    assert counted["num_image_tokens"] == [sum(row) for row in inputs["mm_token_type_ids"]] == [P] * 3
    assert counted["num_image_patches"] == [1, 1, 1]


# --- saving and loading


def test_dictionaries_and_json(processor, tmp_path):
    image_processor = MicroVLMImageProcessor(size={"height": 8, "width": 16}, do_normalize=None, pixel_limit=99)
    image_processor.to_json_file(tmp_path / "a.json")
    again = MicroVLMImageProcessor.from_json_file(tmp_path / "a.json")
    assert again.to_dict() == image_processor.to_dict() and repr(again) == repr(image_processor)
    assert again.pixel_limit == 99 and again.do_normalize is None and again.to_dict()["do_normalize"] is None
    obj = json.loads(processor.to_json_string())
    assert obj["image_token"] == "<image>" and obj["num_image_tokens"] == P and "tokenizer" not in obj


def test_saved_files_name_both_auto_classes(processor, tmp_path):
    assert MicroVLMProcessor.__mro__[1] is ProcessorMixin  # where transformers' tests look for what is overridden
    before = processor.to_dict()
    processor.save_pretrained(tmp_path)
    assert processor.to_dict() == before
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    expected = {
        "AutoProcessor": "processing_microvlm.MicroVLMProcessor",
        "AutoImageProcessor": "processing_microvlm.MicroVLMImageProcessor",
    }
    assert saved["auto_map"] == saved["image_processor"]["auto_map"] == expected
    assert (tmp_path / "processing_microvlm.py").read_text() == open(processing_microvlm.__file__).read()
    assert (tmp_path / "chat_template.jinja").read_text() == TEMPLATE
    processor.image_processor.save_pretrained(tmp_path / "alone")
    assert json.loads((tmp_path / "alone" / "preprocessor_config.json").read_text())["auto_map"] == expected
    assert (tmp_path / "alone" / "processing_microvlm.py").exists()


IN_A_FRESH_PROCESS = """
import json, sys
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline

folder, again, image = sys.argv[1:]
code = {"trust_remote_code": True}
processor = AutoProcessor.from_pretrained(folder, **code)
alone = AutoImageProcessor.from_pretrained(folder, **code)
tokenizer = AutoTokenizer.from_pretrained(folder, **code)
assert type(processor).__name__ == "MicroVLMProcessor", type(processor)
assert type(alone).__name__ == type(processor.image_processor).__name__ == "MicroVLMImageProcessor", type(alone)
assert repr(alone) == repr(processor.image_processor)
assert json.loads(processor.to_json_string()) == json.load(open(folder + "/processor_config.json"))
assert tokenizer.get_vocab() == processor.tokenizer.get_vocab()
assert processor.chat_template == processor.tokenizer.chat_template == open(folder + "/chat_template.jinja").read()
processor.save_pretrained(again)
second = AutoProcessor.from_pretrained(again, **code)
assert second.to_dict() == processor.to_dict() and type(second) is not type(processor)
other = AutoProcessor.from_pretrained(folder, do_normalize=False, pixel_limit=77, num_image_tokens=6, **code)
assert not other.image_processor.do_normalize and other.image_processor.pixel_limit == 77 and other.num_image_tokens == 6

model = AutoModelForImageTextToText.from_pretrained(folder, **code)
chat = [{"role": "user", "content": [{"type": "image", "path": image}, {"type": "text", "text": "describe"}]}]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens=6)
expected = processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
pipe = pipeline("image-text-to-text", model=folder, **code)
result = pipe(text=chat, max_new_tokens=6, return_full_text=False)
assert result[0]["generated_text"].strip() == expected, (result, expected)
results = pipe(text=[chat, chat], max_new_tokens=6, return_full_text=False, batch_size=2)
assert [r[0]["generated_text"].strip() for r in results] == [expected] * 2, results
assert pipe(images=image, text="<image>", max_new_tokens=2)[0]["generated_text"].startswith("<image>")
print("all is well")
"""


def test_auto_classes_and_pipeline_in_a_fresh_process(checkpoint, tmp_path):
    """On a copy of the folder, from another directory, without the repo on the path."""
    shutil.copytree(checkpoint, tmp_path / "copy")
    picture().save(tmp_path / "a.png")
    result = subprocess.run(
        [sys.executable, "-c", IN_A_FRESH_PROCESS, *(str(tmp_path / name) for name in ("copy", "again", "a.png"))],
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and "all is well" in result.stdout, result.stderr[-3000:]


# --- pictures of every kind


def upright(image: Image.Image) -> np.ndarray:
    return np.asarray(to_rgb(image))


MODES = ["1", "L", "P", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA", "I", "F"]


@pytest.mark.parametrize("mode", [*MODES, "I;16", "I;16B"])
def test_every_mode_of_pillow_becomes_rgb(mode):
    image = to_rgb(Image.new(mode, (3, 2)))
    assert image.mode == "RGB" and image.size == (3, 2)


def test_cmyk():
    assert upright(Image.new("CMYK", (2, 2), (0, 255, 255, 0))).reshape(-1, 3).tolist() == [[255, 0, 0]] * 4


@pytest.mark.parametrize("mode, colour", [("RGBA", (10, 20, 30, 0)), ("LA", (10, 0)), ("PA", (10, 0))])
def test_transparency_shows_white(mode, colour):
    image = (
        Image.new("RGBA", (2, 2), (10, 20, 30, 0)).convert(mode) if mode == "PA" else Image.new(mode, (2, 2), colour)
    )
    assert (upright(image) == 255).all()


def test_half_transparency_is_mixed_with_white():
    assert upright(Image.new("RGBA", (1, 1), (0, 0, 0, 128))).tolist() == [[[127] * 3]]


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "transparent.png", transparency=1)
    assert np.asarray(open_image(tmp_path / "opaque.png")).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    assert np.asarray(open_image(tmp_path / "transparent.png")).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_16_bit_gray_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "a.tif")
    for name in ("a.png", "a.tif"):
        assert fetch_image(tmp_path / name).mode == "I;16"
        assert np.asarray(open_image(tmp_path / name))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert upright(Image.fromarray(values.astype(np.int32)))[0, :, 1].tolist() == [0, 1, 128, 255]
    array = np.ascontiguousarray(np.broadcast_to(values[:, :, None], (1, 4, 3)))
    image_processor = MicroVLMImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)
    for image in (array, torch.from_numpy(array)):
        got = image_processor(image, return_tensors="pt", input_data_format="channels_last").pixel_values
        assert got[0, 0, 0].tolist() == [0, 1, 128, 255]
    wide = Image.fromarray(np.array([[-5, 0, 10**6, 2 * 10**6]], dtype=np.int32))
    assert upright(wide)[0, :, 0].tolist() == [0, 0, 128, 255]


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0, 1e9])
def test_float_pictures(top, tmp_path):
    Image.fromarray(np.array([[0, top / 2, top]], dtype=np.float32)).save(tmp_path / "a.tif")
    assert np.asarray(open_image(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 128, 255]


def test_float_picture_with_nan():
    with pytest.raises(ValueError, match="The image cannot be decoded: it holds values that are not finite numbers."):
        to_rgb(Image.fromarray(np.array([[0, np.nan]], dtype=np.float32)))
    with pytest.raises(ValueError, match="not finite"):
        scale_to_8_bit(np.array([np.inf, 1]))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animations_give_the_first_frame(suffix, tmp_path):
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(tmp_path / f"a.{suffix}").n_frames == 3
    assert np.abs(np.asarray(open_image(tmp_path / f"a.{suffix}")).astype(int) - [255, 0, 0]).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation, tmp_path):
    """The pixels are stored turned, the tag says how to turn them back."""
    image, T = Image.new("RGB", (16, 8), "white"), Image.Transpose
    image.paste("red", (0, 0, 8, 8))
    turns = [
        None,
        T.FLIP_LEFT_RIGHT,
        T.ROTATE_180,
        T.FLIP_TOP_BOTTOM,
        T.TRANSPOSE,
        T.ROTATE_90,
        T.TRANSVERSE,
        T.ROTATE_270,
    ]
    stored = image if turns[orientation - 1] is None else image.transpose(turns[orientation - 1])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    result = open_image(tmp_path / "a.png")
    assert result.size == (16, 8) and result.getpixel((2, 4)) == (255, 0, 0) and result.getpixel((13, 4)) == (255,) * 3


def test_smallest_picture(processor):
    red = Image.new("RGB", (1, 1), "red")
    pixels = processor(images=red, return_tensors="pt")["pixel_values"]
    assert torch.allclose(pixels, torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32))
    assert processor(images=Image.new("RGB", (3000, 1)), return_tensors="pt")["pixel_values"].isfinite().all()


# --- pictures that are refused


def with_header(width: int, height: int) -> bytes:
    """A small PNG whose header claims another size, checksum included."""
    data = bytearray(png_bytes(Image.new("L", (4, 4))))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.fixture
def never_decodes(monkeypatch):
    def load(self):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)


@pytest.mark.parametrize("kind", ["path", "file URL", "data URL", "base64", "Pillow"])
def test_too_many_pixels_are_refused_before_decoding(kind, processor, tmp_path, never_decodes):
    (tmp_path / "a.png").write_bytes(with_header(9000, 8000))
    text = base64.b64encode(with_header(9000, 8000)).decode()
    path = tmp_path / "a.png"
    sources = {"path": path, "file URL": path.as_uri(), "data URL": f"data:image/png;base64,{text}", "base64": text}
    source = Image.open(path) if kind == "Pillow" else sources[kind]
    name = str(source) if "URL" in kind or kind == "base64" else str(path)
    with pytest.raises(ValueError) as error:
        processor(images=source, text="<image>")
    message = "{} has 9000 x 8000 pixels, the limit is 64000000 in all: `pixel_limit` of the image processor."
    assert str(error.value) == message.format(name)
    if kind == "path":
        with pytest.raises(ValueError, match="the limit is 64000000"):
            open_image(path)


def test_decompression_bomb_is_refused_before_decoding(processor, tmp_path, never_decodes):
    """Beyond Pillow's own limit, which it checks first."""
    (tmp_path / "a.png").write_bytes(with_header(60000, 60000))
    with pytest.raises(ValueError) as error:
        processor(images=tmp_path / "a.png")
    start = f"{tmp_path / 'a.png'} cannot be opened: Image size (3600000000 pixels) exceeds limit of "
    assert str(error.value).startswith(start)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="100000000 pixels. exceeds limit of"):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        (tmp_path / "a.png").write_bytes(with_header(10000, 10000))
        open_image(tmp_path / "a.png")


def test_the_limit_can_be_set_and_given(processor, tmp_path):
    picture(20, 10).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", picture(20, 10)):
        assert processor(images=source, pixel_limit=200)["pixel_values"] is not None
        with pytest.raises(ValueError, match="has 20 x 10 pixels, the limit is 199 in all"):
            processor(images=source, pixel_limit=199)
        with pytest.raises(ValueError, match="the limit is 199"):
            processor(images=source, pixel_limit=199, do_convert_rgb=False)
        with pytest.raises(ValueError, match="the limit is 50"):
            tiny_processor(pixel_limit=50)(images=source)
        assert tiny_processor(pixel_limit=50)(images=source, pixel_limit=200)["pixel_values"] is not None
        # elsewhere in transformers this one bounds a resize: it refuses nothing
        assert processor(images=source, max_pixels=1)["pixel_values"] is not None
    assert PIXEL_LIMIT == MicroVLMImageProcessor().pixel_limit == 64_000_000


def test_picture_without_pixels(processor):
    with pytest.raises(ValueError, match="The image has 0 x 5 pixels"):
        processor(images=Image.new("RGB", (0, 5)))


def broken(kind: str) -> bytes:
    whole = {name: io.BytesIO() for name in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")}
    if kind.removeprefix("half ") in whole:
        picture(64, 48).save(whole[kind.removeprefix("half ")], kind.removeprefix("half "))
        data = whole[kind.removeprefix("half ")].getvalue()
        return data[: len(data) // 2]
    bad_pixels = bytearray(png_bytes(picture()))
    bad_pixels[60:90] = bytes(30)
    return {"nothing": b"", "text": b"not a picture", "bad pixels": bytes(bad_pixels)}[kind]


@pytest.mark.parametrize(
    "kind, message",
    [
        ("nothing", "{} is not an image that Pillow can read as PNG, JPEG, "),
        ("text", "{} is not an image that Pillow can read as PNG, JPEG, "),
        ("half JPEG", "{} cannot be decoded: image file is truncated"),
        ("half PNG", "{} cannot be decoded: image file is truncated"),
        ("half GIF", "{} cannot be decoded: image file is truncated"),
        ("half BMP", "{} cannot be decoded: image file is truncated"),
        ("half WEBP", "{} c"),
        ("half TIFF", "{} "),
        ("bad pixels", "{} cannot be decoded: "),
    ],
)
def test_broken_files(processor, kind, message, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(broken(kind))
    for call in (open_image, lambda p: processor(images=p), lambda p: processor(images=[[p]], text="<image>")):
        with pytest.raises(ValueError) as error:
            call(path)
        assert str(error.value).startswith(message.format(path)), str(error.value)


@pytest.mark.parametrize("source", ["missing.png", "photos/cats1", "/", "", "x" * 5000])
def test_missing_files(processor, source):
    with pytest.raises(FileNotFoundError) as error:
        processor(images=source)
    assert str(error.value).endswith(" is not a file.") and len(str(error.value)) < 200


@pytest.mark.parametrize("source", ["file:///nowhere/a.png", "http://127.0.0.1:9/a.png", "http://[bad", "data:x"])
def test_urls_that_cannot_be_opened(processor, source):
    with pytest.raises(OSError) as error:
        processor(images=source)
    assert str(error.value).startswith(f"{source} cannot be opened: ")


@pytest.mark.parametrize("suffix", ["EPS", "PDF", "PSD", "WMF", "FITS", "SUN"])
def test_formats_that_are_not_promised_are_not_opened(processor, suffix, tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: pytest.fail("a program was started"))
    heads = {"EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{ } loop\n%%EOF\n"}
    heads |= {"PSD": b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\4\0\0\0\4\0\10\0\3" + bytes(12) + b"\0\0" + bytes(48)}
    (tmp_path / "a.png").write_bytes(heads.get(suffix, suffix.encode() + bytes(400)))
    for source in (tmp_path / "a.png", (tmp_path / "a.png").as_uri(), (tmp_path / "a.png").read_bytes()):
        with pytest.raises(ValueError, match="is not an image that Pillow can read as PNG, JPEG, .*, TGA.$"):
            processor(images=source)


@contextlib.contextmanager
def http_server(answer):
    """Give the address of a server that answers with the pieces of a generator, each when it comes."""

    def serve(connection):
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            for piece in answer():
                connection.sendall(piece)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=server.accept()[:1], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/a.png"
        server.shutdown(socket.SHUT_RDWR)


def slowly(data):
    for place in range(len(data)):
        yield data[place : place + 1]
        time.sleep(0.1)


def test_bytes_of_a_file_are_bounded(processor, tmp_path, monkeypatch):
    monkeypatch.setattr(processing_microvlm, "MAX_BYTES", 5_000_000)
    path = tmp_path / "sparse.png"
    with path.open("wb") as file:
        file.truncate(60 * 10**9)
    head = b"HTTP/1.0 200 OK\r\n\r\n"
    with http_server(lambda: itertools.chain([head], itertools.repeat(bytes(10**6)))) as url, path.open("rb") as file:
        for source in (str(path), path.as_uri(), url, file):
            with pytest.raises(OSError, match="cannot be opened: it has more than 5000000 bytes, the limit of"):
                processor(images=source)


@pytest.mark.parametrize("head", [b"", b"HTTP/1.0 200 OK\r\n\r\n"], ids=["headers", "body"])
def test_time_of_a_download_is_bounded(processor, head, monkeypatch):
    monkeypatch.setattr(processing_microvlm, "DOWNLOAD_TIMEOUT", 0.5)
    rest = b"HTTP/1.0 200 OK\r\n" if not head else bytes(100)
    with http_server(lambda: itertools.chain([head], slowly(rest))) as url:
        start = time.monotonic()
        with pytest.raises(OSError, match=f"{url} cannot be opened: it took more than 0.5 seconds."):
            processor(images=url)
        assert time.monotonic() - start < 3


def test_things_that_are_no_pictures(processor):
    for source in (3, None, [None], [picture(), object()], {}, {"bytes": None}, io.StringIO("a")):
        with pytest.raises(TypeError, match="images are Pillow images, .*; got (int|NoneType|object|dict|StringIO)."):
            processor.image_processor(source)
    with pytest.raises(ValueError, match="data:image/png;base64,AAAA is not an image that Pillow can read as PNG, "):
        processor(images="data:image/png;base64,AAAA")


@pytest.mark.parametrize(
    "raised", [struct.error("a"), SyntaxError("a"), EOFError("a"), zlib.error("a"), RuntimeError("a"), KeyError("a")]
)
@pytest.mark.parametrize("place", ["PIL.Image.open", "PIL.ImageFile.ImageFile.load"])
def test_whatever_pillow_raises_becomes_a_value_error(raised, place, tmp_path, monkeypatch):
    picture().save(tmp_path / "a.png")

    def fall(*args, **kwargs):
        raise raised

    monkeypatch.setattr(place, fall)
    with pytest.raises(ValueError, match="a.png cannot be (opened|decoded): ") as error:
        open_image(tmp_path / "a.png")
    assert error.value.__cause__ is raised


@pytest.mark.parametrize("place", ["PIL.Image.open", "PIL.ImageFile.ImageFile.load"])
def test_running_out_of_memory_is_not_the_pictures_fault(place, tmp_path, monkeypatch):
    picture().save(tmp_path / "a.png")

    def fall(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(place, fall)
    with pytest.raises(MemoryError):
        open_image(tmp_path / "a.png")


def test_random_damage_never_escapes():
    """Bytes of valid files changed and cut at random: pixels or ValueError."""
    rng = np.random.default_rng(0)
    files = []
    for suffix in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "ICO", "TGA", "PPM", "QOI"):
        file = io.BytesIO()
        picture(24, 24).save(file, suffix)
        files.append(np.frombuffer(file.getvalue(), dtype=np.uint8))
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for trial in range(400):
            data = files[trial % len(files)].copy()
            data[rng.integers(0, min(len(data), 200), rng.integers(1, 8))] = rng.integers(0, 256)
            data = data[: rng.integers(1, len(data))] if trial % 3 == 0 else data
            try:
                open_image("data:image/png;base64," + base64.b64encode(data.tobytes()).decode())
            except ValueError:
                refused += 1
    assert 50 < refused < 400


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files through /proc")
def test_no_file_stays_open(processor, tmp_path):
    picture().save(tmp_path / "good.png")
    (tmp_path / "half.png").write_bytes(broken("half PNG"))
    (tmp_path / "text.png").write_bytes(b"text")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        before, kept = len(os.listdir("/proc/self/fd")), []
        for name in ("good.png", "half.png", "text.png", "missing.png"):
            for source in (tmp_path / name, (tmp_path / name).as_uri()):
                try:
                    kept += [fetch_image(source), open_image(source), processor(images=source)]
                except (OSError, ValueError) as error:
                    kept.append(error)
        assert len(os.listdir("/proc/self/fd")) == before
