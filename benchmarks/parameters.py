"""Shapes, parameters and bytes of every variant in `configs/`, from models on the meta device: nothing is allocated.

    python -m benchmarks.parameters

Prints two markdown tables; the first is the one in docs/architecture.md. Notable:

- A tied weight counts once, with the embeddings. Buffers (two vectors of the adapter's input width) are not
  parameters and not counted.
- Bytes in float32 and bf16 are parameters times 4 and times 2: what a checkpoint of one dtype holds beside its
  header.
- The last column is arithmetic, not a measurement: the matrices inside the decoder layers at 1.6 bits (five ternary
  values a byte, rounded up per matrix, their scales not counted), everything else, the embeddings too, in bf16.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from microvlm.model import MicroVLMConfig, MicroVLMForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]

EMBEDDINGS = "language model embeddings"
LAYERS = "language model layers"
PARTS = {  # prefix of a parameter's name -> part
    "model.vision_tower.": "vision tower",
    "model.adapter.": "adapter",
    "model.language_model.": LAYERS,
    "model.alignment.": "alignment",
    "model.fusion.": "alignment",
    "model.memory.": "memory",
    "model.memory_projection.": "memory",
    "model.scope.": "memory",
}
TRITS_PER_BYTE = 5  # 3^5 = 243 <= 256


@dataclass
class Size:
    """Of a part: its parameters, and the bytes of them with ternary matrices packed and the rest in bf16."""

    parameters: int = 0
    packed_bytes: int = 0

    def __add__(self, other: "Size") -> "Size":
        return Size(self.parameters + other.parameters, self.packed_bytes + other.packed_bytes)


def load_config(path: str | Path) -> MicroVLMConfig:
    """The configuration in a JSON file."""
    return MicroVLMConfig.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def build_on_meta(config: MicroVLMConfig) -> PreTrainedModel:
    """A model without storage."""
    with torch.device("meta"):
        return MicroVLMForConditionalGeneration(config).eval()


def sizes(model: PreTrainedModel) -> dict[str, Size]:
    """Size of every part, `total` last.

    Raises:
        ValueError: a parameter that belongs to no part.
    """
    embeddings = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    result = {part: Size() for part in ("vision tower", "adapter", EMBEDDINGS, LAYERS, "alignment", "memory")}
    for name, parameter in model.named_parameters():  # gives a tied weight once
        part = next((part for prefix, part in PARTS.items() if name.startswith(prefix)), None)
        if id(parameter) in embeddings:
            part = EMBEDDINGS
        if part is None:
            raise ValueError(f"{name} belongs to none of {', '.join(PARTS)}: name its part in PARTS.")
        n = parameter.numel()
        packed = math.ceil(n / TRITS_PER_BYTE) if part == LAYERS and parameter.ndim == 2 else 2 * n
        result[part] += Size(n, packed)
    result["total"] = sum(result.values(), Size())
    return result


@torch.no_grad()
def shapes(model: PreTrainedModel) -> dict[str, str]:
    """What flows through the model, one entry per row of the table; N pictures, B rows, T positions."""
    config, core = model.config, model.model
    text, adapter, memory = config.text_config, config.adapter_config, config.memory_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    pixels = torch.empty(1, 3, *core.vision_tower.timm_model.patch_embed.img_size, device="meta")
    image = model.get_image_features(pixels, return_dict=True)
    _, features, width = image.last_hidden_state.shape
    P, D = image.pooler_output[0].shape
    heads = adapter.num_attention_heads
    kv_numbers = memory.num_memory_tokens * text.num_key_value_heads * head_dim * 2 * text.num_hidden_layers
    return {
        "picture": f"(N, {', '.join(map(str, pixels.shape[1:]))})",
        "vision features, class token first": f"(N, {features}, {width})",
        "adapter, hidden": f"(N, {adapter.num_patches}, {adapter.mlp_hidden_size})",
        "adapter, keys and values": f"(N, {heads}, {adapter.num_patches}, {D // heads})",
        "prefix tokens": f"(N, {P}, {D})",
        "sequence": f"(B, T, {D})",
        "text model": text.model_type,
        "decoder layers": f"{text.num_hidden_layers}",
        "query / KV heads x width": f"{text.num_attention_heads} / {text.num_key_value_heads} x {head_dim}",
        "feed-forward": f"{text.intermediate_size}",
        "text keys, per layer": f"(B, {text.num_key_value_heads}, T, {head_dim})",
        "logits": f"(B, T, {text.vocab_size})",
        "tied embeddings": "yes" if config.tie_word_embeddings else "no",
        "shared space": f"(R, {config.alignment_config.projection_size})",
        "reference memory": f"({memory.num_slots}, {memory.code_size})",
        "memory mean": f"(R, {memory.num_slots}, {memory.num_content_slots} x {memory.code_size})",
        "memory covariance": f"(R, {memory.num_slots}, {memory.num_slots})",
        "memory keys, per layer": f"(B, {text.num_key_value_heads}, {memory.num_memory_tokens}, {head_dim})",
        "memory KV numbers, all layers": f"{kv_numbers:,}",
    }


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]], left: int = 1) -> str:
    """The first `left` columns to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * left + ["---:"] * (len(lines[0]) - left))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def shape_table(models: dict[str, PreTrainedModel]) -> str:
    """Markdown table with a column per model."""
    columns = {name: shapes(model) for name, model in models.items()}
    rows = [[row, *(column[row] for column in columns.values())] for row in next(iter(columns.values()))]
    return markdown_table(["shape of", *columns], rows)


def parameter_table(models: dict[str, PreTrainedModel]) -> str:
    """Markdown table with a row per part of every model; MB are 10^6 bytes."""
    rows = [
        [
            name if part == "vision tower" else "",
            part,
            f"{size.parameters:,}",
            *(f"{n / 1e6:,.2f}" for n in (4 * size.parameters, 2 * size.parameters, size.packed_bytes)),
        ]
        for name, model in models.items()
        for part, size in sizes(model).items()
    ]
    header = ["variant", "part", "parameters", "float32, MB", "bf16, MB", "ternary 1.6 bits + bf16, MB (arithmetic)"]
    return markdown_table(header, rows, left=2)


def main() -> None:
    files = {"M": "microvlm-m.json", "V": "microvlm-v.json", "nano": "microvlm-nano.json"}
    models = {name: build_on_meta(load_config(ROOT / "configs" / file)) for name, file in files.items()}
    print(shape_table(models))
    print()
    print(parameter_table(models))


if __name__ == "__main__":
    main()
