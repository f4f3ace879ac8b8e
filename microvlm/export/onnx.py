"""Export vision, embeddings and decoder of a checkpoint as ONNX graphs."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import DynamicCache

from ..files import atomic_folder, check_out
from ..model import CACHE_NAME, MicroVLMProcessor, TernaryLinear, quiet, require
from .checkpoint import head_size, load_checkpoint

# Logits of the ONNX graphs against the model's, largest difference over the largest logit. Where activations are
# rounded to 8 bits, sums in another order move a few of them to the neighbouring step.
ONNX_TOLERANCE, ONNX_ROUNDED_TOLERANCE = 1e-4, 5e-2
ONNX_OPSET = 20
EXPORTED = {".onnx", ".data", ".json", ".jinja", ".py"}  # suffixes of the files in a folder with ONNX graphs
MAX_EMBEDDED_BYTES = 1_500_000_000  # a protobuf ends at 2 GB: weights of larger graphs go into a second file


class VisionEncoder(nn.Module):
    """pixel_values (N, 3, height, width) -> image_features (N, P, D): the prefix tokens."""

    def __init__(self, model):
        super().__init__()
        self.vision_tower, self.adapter = model.model.vision_tower, model.model.adapter

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.vision_tower(
            pixel_values, output_hidden_states=False, do_pooling=False, return_dict=True
        ).last_hidden_state
        return self.adapter(features[:, self.vision_tower.num_prefix_tokens :])[0]


class Decoder(nn.Module):
    """One pass of the language model over T new positions after `past` cached ones.

    The causal mask is built from `attention_mask`: one graph serves prompts and single tokens, padded or not.
    """

    def __init__(self, model):
        super().__init__()
        self.language_model, self.lm_head = model.model.language_model, model.lm_head
        self.logits = model.logits  # of this head

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Compute logits (B, T, V) and, per layer, keys and values (B, kv_heads, past + T, head_dim).

        The inputs are (B, T, D), (B, past + T) with 0 on padding, (B, T), and keys and values of the past.
        """
        T, length = inputs_embeds.shape[1], attention_mask.shape[1]
        columns = torch.arange(length, device=inputs_embeds.device)
        rows = torch.arange(T, device=inputs_embeds.device) + past_key_values[0][0].shape[2]
        visible = (columns.view(1, 1, 1, -1) <= rows.view(1, 1, -1, 1)) & attention_mask.bool().view(-1, 1, 1, length)
        # finite, so that a row of padding, which sees nothing, does not turn into NaN; (B, 1, T, past + T)
        mask = torch.where(visible, 0.0, torch.finfo(inputs_embeds.dtype).min).to(inputs_embeds.dtype)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=True,
            **{CACHE_NAME: DynamicCache(past_key_values)},
        )
        present = [(layer.keys, layer.values) for layer in getattr(outputs, CACHE_NAME).layers]
        return self.logits(outputs.last_hidden_state), present


@torch.no_grad()
def freeze_ternary(model) -> None:
    """Round the latent weights of ternary layers in place."""
    for layer in model.modules():
        if isinstance(layer, TernaryLinear):
            layer.weight.copy_(layer.rounded_weight())
            layer.ternary_weights = False


def save_graph(path: Path, module: nn.Module, inputs: dict, dynamic: dict, **names: list[str]) -> None:
    """Export a module with example inputs, their dynamic sizes, and `input_names` and `output_names` in the file."""
    options = {"opset_version": ONNX_OPSET, "dynamo": True, "verbose": False}
    program = torch.onnx.export(module.eval(), kwargs=inputs, dynamic_shapes=dynamic, **names, **options)
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    program.save(path, external_data=size > MAX_EMBEDDED_BYTES)


def cached(prefix: str, layers: int) -> list[str]:
    """Name the keys and values of all layers."""
    return [f"{prefix}.{i}.{part}" for i in range(layers) for part in ("key", "value")]


def save_graphs(model, image_size: tuple[int, ...], folder: Path) -> None:
    """Write the three graphs; `image_size` is (3, height, width)."""
    text = model.config.text_config
    full = len(model.config.full_attention_layers) == text.num_hidden_layers
    require(full, "the graphs have layers of full attention only, the text model has others.")
    B, T, past = 2, 3, 4  # example sizes, all different
    batch, new = torch.export.Dim("batch", min=1), torch.export.Dim("sequence_length", min=1)
    ids, pixels = torch.zeros(B, T, dtype=torch.long), torch.zeros(B, *image_size)
    # pixels to prefix tokens, ids to embeddings
    vision, names = VisionEncoder(model), {"input_names": ["pixel_values"], "output_names": ["image_features"]}
    save_graph(folder / "vision_encoder.onnx", vision, {"pixel_values": pixels}, {"pixel_values": {0: batch}}, **names)
    embedding, names = model.get_input_embeddings(), {"input_names": ["input_ids"], "output_names": ["inputs_embeds"]}
    save_graph(folder / "embed_tokens.onnx", embedding, {"input": ids}, {"input": {0: batch, 1: new}}, **names)
    # one pass over new positions, with keys and values of every layer in and out
    layers, auto = text.num_hidden_layers, torch.export.Dim.DYNAMIC
    inputs = {
        "inputs_embeds": torch.zeros(B, T, text.hidden_size),
        "attention_mask": torch.ones(B, past + T, dtype=torch.long),
        "position_ids": torch.arange(past, past + T).expand(B, T),
    }
    dynamic = {name: {0: auto, 1: auto} for name in inputs}
    key = torch.zeros(B, text.num_key_value_heads, past, head_size(text))
    save_graph(
        folder / "decoder_model_merged.onnx",
        Decoder(model),
        inputs | {"past_key_values": [(key.clone(), key.clone()) for _ in range(layers)]},
        dynamic | {"past_key_values": [({0: auto, 2: auto}, {0: auto, 2: auto}) for _ in range(layers)]},
        input_names=[*inputs, *cached("past_key_values", layers)],
        output_names=["logits", *cached("present", layers)],
    )


def export_onnx(source: str, out: str | Path, revision: str | None = None, force: bool = False) -> Path:
    """Write a folder of ONNX graphs, config and processor; arguments as on the command line."""
    # refuse before the work
    out = Path(out)
    require(out.suffix != ".gguf", f"OUT {out} ends in .gguf, expected a folder.")
    check_out(out, force, [source], marker="onnx")
    for path in sorted(out.rglob("*")):
        is_exported = path.is_dir() or path.suffix in EXPORTED
        require(is_exported, f"OUT {out} holds {path.name}, which no export wrote: choose another folder.")
    model, _ = load_checkpoint(source, revision)
    freeze_ternary(model)
    processor = MicroVLMProcessor.from_pretrained(source, revision=revision)
    image = processor.image_processor([Image.new("RGB", (8, 8))], return_tensors="pt")["pixel_values"]

    # write, compare with the model, rename
    with atomic_folder(out) as folder:
        (folder / "onnx").mkdir()
        save_graphs(model, image.shape[1:], folder / "onnx")
        lines = verify_onnx(model, folder)
        for part in (processor, model.config, model.generation_config):
            part.save_pretrained(folder)
        print("\n".join(f"ok: {line}" for line in lines))
    for path in sorted((out / "onnx").iterdir()):
        print(f"wrote {path}, {path.stat().st_size:,} bytes")
    return out


def compare(what: str, result: np.ndarray, expected: torch.Tensor, tolerance: float) -> str:
    """Describe how far a result is off; refuse more than the tolerance."""
    scale = expected.abs().max().item()
    error = float(np.abs(result - expected.numpy()).max()) / scale
    message = f"verification: {what} of onnxruntime differ by {error:.1e} of the largest, allowed is {tolerance}."
    require(error <= tolerance, message)
    return f"{what} {result.shape} as the model's, to {error:.1e} of the largest ({scale:.3g})"


def draw_prompts(model, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw two prompts with an image and words around it, the first padded on the left; ids and mask (2, T)."""
    words = torch.randint(model.config.text_config.vocab_size, (2, 4), generator=generator)
    image_token = model.config.image_token_id
    words[words == image_token] = (image_token + 1) % model.config.text_config.vocab_size
    ids = torch.cat([words[:, :2], model.default_prompt(2), words[:, 2:]], 1)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return ids, mask


@torch.inference_mode()
def verify_onnx(model, folder: Path) -> list[str]:
    """Compare the graphs in onnxruntime with the model, on two prompts and three tokens; returns lines about it."""
    import onnxruntime

    sessions = {
        path.stem: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for path in sorted((folder / "onnx").glob("*.onnx"))
    }
    rounded = any(isinstance(m, TernaryLinear) and m.activation_bits is not None for m in model.modules())
    tolerance = ONNX_ROUNDED_TOLERANCE if rounded else ONNX_TOLERANCE
    generator = torch.Generator().manual_seed(0)
    # images to prefix tokens
    size = sessions["vision_encoder"].get_inputs()[0].shape[1:]
    pixel_values = torch.randn(2, *size, generator=generator)
    features = sessions["vision_encoder"].run(None, {"pixel_values": pixel_values.numpy()})[0]
    prefix = torch.stack(model.get_image_features(pixel_values).pooler_output)
    lines = [compare("prefix tokens", features, prefix, ONNX_TOLERANCE)]
    # prompts, then three greedy tokens, each graph with its own cache
    ids, mask = draw_prompts(model, generator)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    runtime = Runtime(sessions, model.config, features)
    inputs, step = {"pixel_values": pixel_values, "use_cache": True}, "the prompt"
    for token in range(1, 5):
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, **inputs)
        logits, real = runtime.step(ids, mask, positions), mask[:, -ids.shape[1] :].bool()
        lines.append(compare(f"logits of {step}", logits[real.numpy()], out.logits[real], tolerance))
        step, inputs = f"token {token}", {"use_cache": True, CACHE_NAME: getattr(out, CACHE_NAME)}
        ids = out.logits[:, -1].argmax(-1, keepdim=True)
        mask, positions = torch.cat([mask, torch.ones_like(ids)], 1), positions[:, -1:] + 1
    return lines


class Runtime:
    """The graphs as a generator of logits: embedding, images at their placeholders, decoder with its cache."""

    def __init__(self, sessions: dict, config, features: np.ndarray):
        self.embed, self.decoder = sessions["embed_tokens"], sessions["decoder_model_merged"]
        self.image_token_id, self.features = config.image_token_id, features.reshape(-1, features.shape[-1])
        text = config.text_config
        empty = np.zeros((len(features), text.num_key_value_heads, 0, head_size(text)), np.float32)
        self.cache = dict.fromkeys(cached("past_key_values", text.num_hidden_layers), empty)

    def step(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> np.ndarray:
        """Compute logits (B, T, V) of the next tokens (B, T)."""
        embeds = self.embed.run(None, {"input_ids": ids.numpy()})[0]
        if ids.shape[1] > 1:  # the prompt
            embeds[(ids == self.image_token_id).numpy()] = self.features
        inputs = {"inputs_embeds": embeds, "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
        logits, *present = self.decoder.run(None, inputs | self.cache)
        self.cache = dict(zip(self.cache, present))
        return logits


def main(**options) -> None:
    quiet()
    export_onnx(**options)
