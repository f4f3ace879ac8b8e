"""Measure what the wrapper costs over the bare language model, through `generate()`.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --config configs/microvlm-nano.json --repeats 3 --new-tokens 16

A checkpoint of random weights in bf16 (default: V), and the one in this repo if there is one, take turns with their
own language model in plain transformers. Notable:

- Both sides get the same token ids, the same number of new tokens and the same weights: the logits of a text must be
  equal to the bit. A placeholder is a token like any other to the bare model.
- Layers that plain transformers does not have (ternary rounding) are lent to the bare model.
- The vision tower is work, not overhead: its time is taken off the first token.
- Run it on an idle machine.
"""

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch
import transformers
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from benchmarks.machine import describe_machine, seconds
from benchmarks.models import CONFIGS, load_config, write_random
from microvlm.evaluate.speed import time_generate
from microvlm.files import ROOT
from microvlm.model import MicroVLMImageProcessor
from microvlm.tables import markdown_table

TEXT_TOKENS = 16  # of the prompt, after the placeholders
IMAGE_SIZE = (640, 480)  # pixels, what the image processor gets


def load(folder: str | Path) -> PreTrainedModel:
    """Open a checkpoint in the dtype it is stored in; it needs no processor."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()


def make_image_processor(model: PreTrainedModel) -> MicroVLMImageProcessor:
    """Make the image processor for the model's image size."""
    height, width = model.model.vision_tower.timm_model.patch_embed.img_size
    return MicroVLMImageProcessor(size={"height": height, "width": width})


def write_text_model(model: PreTrainedModel, folder: str | Path) -> None:
    """Write language model and head as a checkpoint of plain transformers."""
    with torch.device("meta"):
        text_model = AutoModelForCausalLM.from_config(model.config.text_config)
    setattr(text_model, text_model.base_model_prefix, model.model.language_model)
    text_model.set_output_embeddings(model.lm_head)
    text_model.save_pretrained(folder)


def load_text_model(folder: str | Path) -> PreTrainedModel:
    """Open the bare language model with plain transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@torch.no_grad()
def lend_layers(model: PreTrainedModel, text_model: PreTrainedModel) -> None:
    """Put layers that plain transformers lacks into the bare model; check that both agree.

    Raises:
        ValueError: the logits of a text differ.
    """
    for name, module in model.model.language_model.named_modules():
        if name and type(module) is not type(text_model.base_model.get_submodule(name)):
            text_model.base_model.set_submodule(name, module)
    ids = prompt(model)[:, model.config.num_prefix_tokens :]
    ours, theirs = model(input_ids=ids).logits, text_model(input_ids=ids).logits
    if not torch.equal(ours, theirs):
        raise ValueError(
            f"the two sides compute different logits (largest difference {(ours - theirs).abs().max():.1e}); "
            "their times cannot be compared."
        )


def prompt(model: PreTrainedModel) -> torch.Tensor:
    """Make token ids (1, P + TEXT_TOKENS): the placeholders of one image, then text."""
    token, vocab_size = model.config.image_token_id, model.config.text_config.vocab_size
    g = torch.Generator().manual_seed(0)
    text = torch.randint(vocab_size - 1, (1, TEXT_TOKENS), generator=g)
    text += text >= token  # every id but the placeholder
    return torch.cat([torch.full((1, model.config.num_prefix_tokens), token), text], dim=1)


@torch.inference_mode()
def measure(
    model: PreTrainedModel, text_model: PreTrainedModel, repeats: int, new_tokens: int
) -> dict[str, list[float]]:
    """Time both in turn, after one round that does not count.

    Returns:
        Per quantity one value per round: seconds, or tokens per second for `decode` and `text_decode`.
    """
    image_processor = make_image_processor(model)
    image = Image.effect_noise(IMAGE_SIZE, 64).convert("RGB")
    tower, adapter = model.model.vision_tower, model.model.adapter
    skip = tower.timm_model.num_prefix_tokens
    ids = prompt(model)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    values = defaultdict(list)
    for i in range(repeats + 1):
        row = {}
        # the parts of the first token
        row["image_processor"], batch = seconds(lambda: image_processor(image, return_tensors="pt"))
        pixel_values = batch["pixel_values"].to(model.dtype)
        row["vision_tower"], vision = seconds(lambda p=pixel_values: tower(p, do_pooling=False, return_dict=True))
        row["adapter"], _ = seconds(lambda v=vision: adapter(v.last_hidden_state[:, skip:]))
        # both models through generate()
        row["first"], row["decode"] = time_generate(model, new_tokens, **inputs, pixel_values=pixel_values)
        row["text_first"], row["text_decode"] = time_generate(text_model, new_tokens, **inputs)
        for name, value in row.items() if i else ():
            values[name].append(value)
    return dict(values)


def table(values: dict[str, list[float]], text_name: str) -> str:
    """Write medians (smallest to largest); overhead is the wrapper's time over the bare model's, less one."""
    medians = {name: median(v) for name, v in values.items()}

    def cell(name: str, scale: float = 1e3) -> str:
        v = values[name]
        return f"{medians[name] * scale:.2f} ({min(v) * scale:.2f} to {max(v) * scale:.2f})"

    rest, text_first = medians["first"] - medians["vision_tower"], medians["text_first"]
    times = f"{rest * 1e3:.2f}", f"{text_first * 1e3:.2f}", f"{rest / text_first - 1:+.1%}"
    slower = f"{medians['text_decode'] / medians['decode'] - 1:+.1%}"
    rows = [
        ["image to first token, ms", cell("first"), cell("text_first"), ""],
        ["of it the vision tower, ms", cell("vision_tower"), "", ""],
        ["first token without the vision tower, ms", *times],
        ["of it the adapter, ms", cell("adapter"), "", ""],
        ["greedy decoding, tokens/s", cell("decode", 1), cell("text_decode", 1), slower],
        ["before all that, image processor, ms", cell("image_processor"), "", ""],
    ]
    return markdown_table(["median (smallest to largest)", "MicroVLM", text_name, "overhead"], rows)


def benchmark(name: str, folder: str | Path, repeats: int, new_tokens: int) -> str:
    """Measure a checkpoint against its own language model: a heading, load times and the table."""
    with tempfile.TemporaryDirectory() as text_folder:
        load_seconds, model = seconds(lambda: load(folder))
        if getattr(model, "is_quantized", False):  # packed: the bare model's weights are plain
            model = model.dequantize(torch.float32).eval()
        write_text_model(model, text_folder)
        text_load_seconds, text_model = seconds(lambda: load_text_model(text_folder))
    lend_layers(model, text_model)
    values = measure(model, text_model, repeats, new_tokens)
    text_name = f"bare {type(text_model).__name__}"
    return (
        f"## {name}: {model.num_parameters():,} parameters, {model.dtype}, "
        f"prompt {prompt(model).shape[1]} positions, {new_tokens} new tokens, {repeats} rounds\n\n"
        f"`from_pretrained`, once: MicroVLM {load_seconds:.2f} s, {text_name} {text_load_seconds:.2f} s\n\n"
        f"{table(values, text_name)}\n"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=CONFIGS / "microvlm-v.json", type=Path, help="default: V")
    parser.add_argument("--repeats", default=9, type=int, help="rounds that count, default 9")
    parser.add_argument("--new-tokens", default=64, type=int, help="tokens to generate, default 64")
    options = parser.parse_args(argv)
    if options.repeats < 1 or options.new_tokens < 2:
        parser.error("--repeats must be 1 or more and --new-tokens 2 or more.")
    transformers.utils.logging.disable_progress_bar()
    print(f"{describe_machine()}\n", flush=True)
    # random weights
    with tempfile.TemporaryDirectory() as folder:
        write_random(load_config(options.config), folder)
        name = f"{options.config.stem} with random weights"
        print(benchmark(name, folder, options.repeats, options.new_tokens), flush=True)
    # this repo's checkpoint
    if (ROOT / "model.safetensors").exists():
        print(benchmark("the checkpoint in this repo", ROOT, options.repeats, options.new_tokens), flush=True)


if __name__ == "__main__":
    main()
