"""Print shapes, parameters and bytes of every variant in configs/.

    python -m benchmarks.parameters

The first table is the one in docs/architecture.md. Models are on the meta device: nothing is allocated. A tied weight
counts once, with the embeddings; buffers do not count.
"""

import torch
from transformers import PreTrainedModel

from benchmarks.models import CONFIGS, build_on_meta, load_config
from microvlm.tables import markdown_table

EMBEDDINGS = "language model embeddings"
LAYERS = "language model layers"
PARTS = {"vision_tower": "vision tower", "adapter": "adapter", "language_model": LAYERS}  # module of the model -> part
PARTS |= {"alignment": "alignment", "fusion": "alignment"}
PARTS |= {"memory": "memory", "memory_projection": "memory", "memory_copy": "memory", "scope": "memory"}


def sizes(model: PreTrainedModel) -> dict[str, int]:
    """Count the parameters of every part, `total` last."""
    embeddings = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    result = dict.fromkeys(("vision tower", "adapter", EMBEDDINGS, LAYERS, "alignment", "memory"), 0)
    for name, parameter in model.named_parameters():  # gives a tied weight once
        part = EMBEDDINGS if id(parameter) in embeddings else PARTS[name.split(".")[1]]
        result[part] += parameter.numel()
    return result | {"total": sum(result.values())}


@torch.no_grad()
def shapes(model: PreTrainedModel) -> dict[str, str]:
    """Describe what flows through the model: N images, B rows, T positions."""
    config, core = model.config, model.model
    text, adapter, memory = config.text_config, config.adapter_config, config.memory_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # the shapes of a real pass
    pixels = torch.empty(1, 3, *core.vision_tower.timm_model.patch_embed.img_size, device="meta")
    image = model.get_image_features(pixels, return_dict=True)
    _, features, width = image.last_hidden_state.shape
    P, D = image.pooler_output[0].shape
    heads = adapter.num_attention_heads
    kv_numbers = memory.num_memory_tokens * text.num_key_value_heads * head_dim * 2 * text.num_hidden_layers
    return {
        "image": f"(N, {', '.join(map(str, pixels.shape[1:]))})",
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
        "memory mean": f"(R, {memory.num_slots}, {memory.num_content_slots} x {memory.content_size})",
        "memory covariance": f"(R, {memory.num_slots}, {memory.num_slots})",
        "memory keys, per layer": f"(B, {text.num_key_value_heads}, {memory.num_memory_tokens}, {head_dim})",
        "memory KV numbers, all layers": f"{kv_numbers:,}",
    }


def shape_table(models: dict[str, PreTrainedModel]) -> str:
    """Write a table with a column per model."""
    columns = {name: shapes(model) for name, model in models.items()}
    rows = [[row, *(column[row] for column in columns.values())] for row in next(iter(columns.values()))]
    return markdown_table(["shape of", *columns], rows)


def parameter_table(models: dict[str, PreTrainedModel]) -> str:
    """Write a table with a row per part of every model; MB are 10^6 bytes."""
    rows = []
    for name, model in models.items():
        for part, size in sizes(model).items():
            megabytes = [f"{n * size / 1e6:,.2f}" for n in (4, 2)]
            rows.append([name if part == "vision tower" else "", part, size, *megabytes])
    return markdown_table(["variant", "part", "parameters", "float32, MB", "bf16, MB"], rows, left=2)


def main() -> None:
    models = {
        name: build_on_meta(load_config(CONFIGS / f"microvlm-{name.lower()}.json")) for name in ("M", "V", "nano")
    }
    print(f"{shape_table(models)}\n\n{parameter_table(models)}")


if __name__ == "__main__":
    main()
