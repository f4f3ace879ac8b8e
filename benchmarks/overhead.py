"""What the wrapper costs beside the bare language model: first token and decoding through `generate()`.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --config configs/microvlm-nano.json --repeats 3 --new-tokens 16

Builds the config with random weights in bf16 (default: V at full size), saves it, opens it with `from_pretrained`,
saves its language model alone, opens that with plain transformers, and times both by turns, A B A B. The checkpoint
in this repo is measured too when there is one. Notable:

- Both sides get the same token ids (25 placeholders, then text), the same number of new tokens and the same weights:
  before anything is timed, the logits of a text must be equal bit by bit. To the bare model a placeholder is a token
  like any other.
- Layers that plain transformers does not have (ternary rounding) are lent to the bare model, so that the difference
  is the wrapper's.
- The vision tower is work, not overhead: its own time is taken off the first token and shown on its own line. The
  adapter stays in.
- Where overhead could come from. Once a call: the placeholder mask, its count `int(mask.sum())` (a synchronisation on
  an accelerator) and `masked_scatter` over (B, T, D). `generate()` encodes pictures before the first step and passes
  them to that step only, so a decoding step does none of it. Every step: one more module call and one more output
  class than the bare model, the `suppress_tokens` processor over the vocabulary, and one look at the signature of
  `forward` that transformers takes for remote code. These are fixed costs, so they weigh most on small models.
- Run it on an idle machine: one busy neighbour makes the medians of either side useless.
"""

import argparse
import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

import timm
import torch
import transformers
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from benchmarks.parameters import ROOT, MicroVLMConfig, MicroVLMForConditionalGeneration, load_config, markdown_table
from microvlm.evaluate.speed import time_generate
from microvlm.model import MicroVLMImageProcessor

TEXT_TOKENS = 16  # of the prompt, behind the placeholders
PICTURE = (640, 480)  # pixels, what the image processor is given


def seconds(call: Callable) -> tuple[float, object]:
    """Time of one call, and what it returned."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def write_random(config: MicroVLMConfig, folder: str | Path) -> None:
    """A checkpoint of random weights in bf16, as `microvlm compose` leaves one: the placeholder is never generated."""
    torch.manual_seed(0)
    model = MicroVLMForConditionalGeneration(config).to(torch.bfloat16)
    model.generation_config.suppress_tokens = [config.image_token_id]
    model.save_pretrained(folder)


def load(folder: str | Path) -> PreTrainedModel:
    """A checkpoint as its users open it, in the dtype it is stored in."""
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()


def write_text_model(model: PreTrainedModel, folder: str | Path) -> None:
    """The language model and the head alone, as a checkpoint of plain transformers."""
    with torch.device("meta"):
        text_model = AutoModelForCausalLM.from_config(model.config.text_config)
    setattr(text_model, text_model.base_model_prefix, model.model.language_model)
    text_model.set_output_embeddings(model.lm_head)
    text_model.save_pretrained(folder)


def load_text_model(folder: str | Path) -> PreTrainedModel:
    """The bare language model, opened by plain transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@torch.no_grad()
def lend_layers(model: PreTrainedModel, text_model: PreTrainedModel) -> None:
    """Put layers of which plain transformers has another class into the bare model, then check that both agree.

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
    """Token ids (1, P + TEXT_TOKENS): the placeholders of one picture, then text."""
    token, vocab_size = model.config.image_token_id, model.config.text_config.vocab_size
    g = torch.Generator().manual_seed(0)
    text = torch.randint(vocab_size - 1, (1, TEXT_TOKENS), generator=g)
    text += text >= token  # every id but the placeholder
    return torch.cat([torch.full((1, model.config.num_prefix_tokens), token), text], dim=1)


@torch.inference_mode()
def measure(
    model: PreTrainedModel, text_model: PreTrainedModel, repeats: int, new_tokens: int
) -> dict[str, list[float]]:
    """Times of both by turns, after one round that does not count.

    Returns:
        Per quantity one value per round: seconds, or tokens per second for `decode` and `text_decode`.
    """
    size = model.model.vision_tower.timm_model.patch_embed.img_size
    image_processor = MicroVLMImageProcessor(size={"height": size[0], "width": size[1]})
    picture = Image.effect_noise(PICTURE, 64).convert("RGB")
    tower, adapter = model.model.vision_tower, model.model.adapter
    skip = tower.timm_model.num_prefix_tokens
    ids = prompt(model)
    mask = torch.ones_like(ids)
    values = defaultdict(list)
    for i in range(repeats + 1):
        row = {}
        row["image_processor"], batch = seconds(lambda: image_processor(picture, return_tensors="pt"))
        pixel_values = batch["pixel_values"].to(model.dtype)
        row["vision_tower"], vision = seconds(lambda p=pixel_values: tower(p, do_pooling=False, return_dict=True))
        row["adapter"], _ = seconds(lambda v=vision: adapter(v.last_hidden_state[:, skip:]))
        row["first"], row["decode"] = time_generate(
            model, new_tokens, input_ids=ids, attention_mask=mask, pixel_values=pixel_values
        )
        row["text_first"], row["text_decode"] = time_generate(
            text_model, new_tokens, input_ids=ids, attention_mask=mask
        )
        for name, value in row.items():
            if i:
                values[name].append(value)
    return dict(values)


def table(values: dict[str, list[float]], text_name: str) -> str:
    """Markdown table of medians (smallest to largest); overhead is the wrapper's time by the bare model's, less one."""
    medians = {name: median(v) for name, v in values.items()}

    def show(name: str, scale: float = 1e3) -> str:
        v = values[name]
        return f"{medians[name] * scale:.2f} ({min(v) * scale:.2f} to {max(v) * scale:.2f})"

    rest = medians["first"] - medians["vision_tower"]
    rows = [
        ["picture to first token, ms", show("first"), show("text_first"), ""],
        ["of it the vision tower, ms", show("vision_tower"), "", ""],
        [
            "first token without the vision tower, ms",
            f"{rest * 1e3:.2f}",
            f"{medians['text_first'] * 1e3:.2f}",
            f"{rest / medians['text_first'] - 1:+.1%}",
        ],
        ["of it the adapter, ms", show("adapter"), "", ""],
        [
            "greedy decoding, tokens/s",
            show("decode", 1),
            show("text_decode", 1),
            f"{medians['text_decode'] / medians['decode'] - 1:+.1%}",
        ],
        ["before all that, image processor, ms", show("image_processor"), "", ""],
    ]
    return markdown_table(["median (smallest to largest)", "MicroVLM", text_name, "overhead"], rows)


def benchmark(name: str, folder: str | Path, repeats: int, new_tokens: int) -> str:
    """Measure the checkpoint in `folder` against its own language model: a heading, load times and the table."""
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


def machine() -> str:
    """One line about where this runs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{cores} cores ({platform.machine()}), {torch.get_num_threads()} torch threads, "
        f"load average {os.getloadavg()[0]:.1f} at the start; Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, timm {timm.__version__}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=ROOT / "configs" / "microvlm-v.json", type=Path, help="default: V")
    parser.add_argument("--repeats", default=9, type=int, help="rounds that count, default 9")
    parser.add_argument("--new-tokens", default=64, type=int, help="tokens to generate, default 64")
    options = parser.parse_args(argv)
    if options.repeats < 1 or options.new_tokens < 2:
        parser.error("--repeats must be 1 or more and --new-tokens 2 or more.")
    transformers.utils.logging.disable_progress_bar()
    print(f"{machine()}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        build_seconds, _ = seconds(lambda: write_random(load_config(options.config), folder))
        print(f"{options.config.stem} with random weights built and saved in {build_seconds:.1f} s\n", flush=True)
        print(benchmark(options.config.stem, folder, options.repeats, options.new_tokens), flush=True)
    if (ROOT / "model.safetensors").exists():
        print(benchmark("the checkpoint in this repo", ROOT, options.repeats, options.new_tokens), flush=True)


if __name__ == "__main__":
    main()
