"""Export vision, embeddings and decoder of a checkpoint as ONNX graphs."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import DynamicCache

from ..files import check_out, put_folder
from ..model import CACHE_NAME, MicroVLMProcessor, TernaryLinear
from .checkpoint import load_checkpoint, quiet

# Logits of the ONNX graphs against the model's, largest difference over the largest logit. Where activations are rounded to 8 bits,
# sums in another order move a few of them to the neighbouring step.
ONNX_TOLERANCE, ONNX_ROUNDED_TOLERANCE = 1e-4, 5e-2
ONNX_OPSET = 20
EXPORTED = {".onnx", ".data", ".json", ".jinja", ".py"}  # suffixes of the files in a folder with ONNX graphs
MAX_EMBEDDED_BYTES = 1_500_000_000  # a protobuf ends at 2 GB: weights of larger graphs go into a file beside it


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


class EmbedTokens(nn.Module):
    """input_ids (B, T) -> inputs_embeds (B, T, D)."""

    def __init__(self, model):
        super().__init__()
        self.embed_tokens = model.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)


class Decoder(nn.Module):
    """One pass of the language model over T new positions behind `past` cached ones.

    The causal mask is spelled out from `attention_mask`, so that one graph serves prompts and single tokens, padded or not.
    """

    def __init__(self, model):
        super().__init__()
        self.language_model, self.lm_head = model.model.language_model, model.lm_head

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Logits (B, T, V) and, per layer, keys and values (B, kv_heads, past + T, head_dim).

        Args:
            inputs_embeds: (B, T, D).
            attention_mask: (B, past + T), 0 on padding.
            position_ids: (B, T).
            past_key_values: per layer, keys and values (B, kv_heads, past, head_dim).
        """
        T, length = inputs_embeds.shape[1], attention_mask.shape[1]
        columns = torch.arange(length, device=inputs_embeds.device)
        rows = torch.arange(T, device=inputs_embeds.device) + past_key_values[0][0].shape[2]
        seen = (columns.view(1, 1, 1, -1) <= rows.view(1, 1, -1, 1)) & attention_mask.bool().view(-1, 1, 1, length)
        # finite, so that a row of padding, which sees nothing, does not turn into NaN
        mask = torch.where(seen, 0.0, torch.finfo(inputs_embeds.dtype).min).to(
            inputs_embeds.dtype
        )  # (B, 1, T, past + T)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=True,
            **{CACHE_NAME: DynamicCache(past_key_values)},
        )
        present = [(layer.keys, layer.values) for layer in getattr(outputs, CACHE_NAME).layers]
        return self.lm_head(outputs.last_hidden_state), present


@torch.no_grad()
def freeze_ternary(model) -> int:
    """Replace latent weights of ternary layers by what they are rounded to, in place; returns how many layers there are."""
    layers = [m for m in model.modules() if isinstance(m, TernaryLinear)]
    for layer in layers:
        layer.weight.copy_(layer.rounded_weight())
        layer.ternary_weights = False
    return len(layers)


def export_graph(
    module: nn.Module, inputs: dict, dynamic_shapes: dict, input_names: list[str], output_names: list[str], path: Path
) -> None:
    """Write one module as an ONNX graph; its names are given flat, in order."""
    program = torch.onnx.export(
        module.eval(),
        kwargs=inputs,
        dynamic_shapes=dynamic_shapes,
        input_names=input_names,
        output_names=output_names,
        opset_version=ONNX_OPSET,
        dynamo=True,
        verbose=False,
    )
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    program.save(path, external_data=size > MAX_EMBEDDED_BYTES)


def export_onnx(source: str, out: str | Path, revision: str | None = None, force: bool = False) -> Path:
    """Write vision tower with adapter, token embedding and decoder as ONNX, with config and tokenizer beside them.

    Args:
        source: folder or Hub id.
        out: folder to write: `onnx/vision_encoder.onnx`, `onnx/embed_tokens.onnx`, `onnx/decoder_model_merged.onnx`, `config.json`,
            `generation_config.json`, `tokenizer.json` and the rest of the processor.
        force: replace `out`.

    Raises:
        ValueError: something given is not what is expected, or the graphs do not compute what the model does; nothing is written then.
    """
    out = Path(out)
    if out.suffix == ".gguf":
        raise ValueError(f"OUT {out} ends in .gguf, expected a folder.")
    check_out(out, force, [source], marker="onnx")
    for path in sorted(out.rglob("*")) if out.is_dir() else ():
        if path.is_file() and path.suffix not in EXPORTED:
            raise ValueError(f"OUT {out} holds {path.relative_to(out)}, which no export wrote: choose another folder.")
    model, _ = load_checkpoint(source, revision)
    freeze_ternary(model)
    text = model.config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    L, B, T, past = text.num_hidden_layers, 2, 3, 4  # example sizes, all different
    processor = MicroVLMProcessor.from_pretrained(source, revision=revision, trust_remote_code=True)
    picture = processor.image_processor([Image.new("RGB", (8, 8))], return_tensors="pt")["pixel_values"]

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        (temporary / "onnx").mkdir()
        batch, new = torch.export.Dim("batch", min=1), torch.export.Dim("sequence_length", min=1)
        export_graph(
            VisionEncoder(model),
            {"pixel_values": torch.zeros(B, *picture.shape[1:])},
            {"pixel_values": {0: batch}},
            ["pixel_values"],
            ["image_features"],
            temporary / "onnx" / "vision_encoder.onnx",
        )
        export_graph(
            EmbedTokens(model),
            {"input_ids": torch.zeros(B, T, dtype=torch.long)},
            {"input_ids": {0: batch, 1: new}},
            ["input_ids"],
            ["inputs_embeds"],
            temporary / "onnx" / "embed_tokens.onnx",
        )
        past_shape, auto = (B, text.num_key_value_heads, past, head_dim), torch.export.Dim.DYNAMIC
        cached = lambda prefix: [f"{prefix}.{i}.{part}" for i in range(L) for part in ("key", "value")]  # noqa: E731
        export_graph(
            Decoder(model),
            {
                "inputs_embeds": torch.zeros(B, T, text.hidden_size),
                "attention_mask": torch.ones(B, past + T, dtype=torch.long),
                "position_ids": torch.arange(past, past + T).expand(B, T),
                "past_key_values": [(torch.zeros(past_shape), torch.zeros(past_shape)) for _ in range(L)],
            },
            {
                "inputs_embeds": {0: auto, 1: auto},
                "attention_mask": {0: auto, 1: auto},
                "position_ids": {0: auto, 1: auto},
                "past_key_values": [({0: auto, 2: auto}, {0: auto, 2: auto}) for _ in range(L)],
            },
            ["inputs_embeds", "attention_mask", "position_ids", *cached("past_key_values")],
            ["logits", *cached("present")],
            temporary / "onnx" / "decoder_model_merged.onnx",
        )
        differences = verify_onnx(model, temporary)
        processor.save_pretrained(temporary)
        model.config.save_pretrained(temporary)
        model.generation_config.save_pretrained(temporary)
        print("\n".join(f"ok: {line}" for line in differences))
        put_folder(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for path in sorted((out / "onnx").iterdir()):
        print(f"wrote {path}, {path.stat().st_size:,} bytes")
    return out


@torch.inference_mode()
def verify_onnx(model, folder: Path) -> list[str]:
    """Run the graphs with onnxruntime: prompts of two lengths, left-padded, with a picture each, and three tokens after them.

    Returns:
        What was compared, one line each.

    Raises:
        ValueError: a difference beyond the tolerance.
    """
    import onnxruntime

    sessions = {
        path.stem: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for path in sorted((folder / "onnx").glob("*.onnx"))
    }
    config, text = model.config, model.config.text_config
    generator = torch.Generator().manual_seed(0)
    size = sessions["vision_encoder"].get_inputs()[0].shape[1:]
    pixel_values = torch.randn(2, *size, generator=generator)
    rounded = any(isinstance(m, TernaryLinear) and m.activation_bits is not None for m in model.modules())
    tolerance = ONNX_ROUNDED_TOLERANCE if rounded else ONNX_TOLERANCE
    lines = []

    def compare(what: str, given: np.ndarray, expected: torch.Tensor, tolerance: float) -> None:
        scale = expected.abs().max().item()
        error = float(np.abs(given - expected.numpy()).max()) / scale
        if not error <= tolerance:
            raise ValueError(
                f"verification: {what} of onnxruntime differ by {error:.1e} of the largest, allowed is {tolerance}."
            )
        lines.append(f"{what} {given.shape} as the model's, to {error:.1e} of the largest ({scale:.3g})")

    features = sessions["vision_encoder"].run(None, {"pixel_values": pixel_values.numpy()})[0]
    prefix = torch.stack(model.get_image_features(pixel_values).pooler_output)
    compare("prefix tokens", features, prefix, ONNX_TOLERANCE)

    prompt = model.default_prompt(2)
    words = torch.randint(text.vocab_size, (2, 4), generator=generator)
    words[words == config.image_token_id] = (config.image_token_id + 1) % text.vocab_size
    ids = torch.cat([words[:, :2], prompt, words[:, 2:]], 1)
    attention_mask = torch.ones_like(ids)
    attention_mask[0, :2] = 0
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    out = model(
        input_ids=ids,
        pixel_values=pixel_values,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=True,
    )
    embeds = sessions["embed_tokens"].run(None, {"input_ids": ids.numpy()})[0]
    embeds[(ids == config.image_token_id).numpy()] = features.reshape(-1, features.shape[-1])
    decoder = sessions["decoder_model_merged"]
    names = [i.name for i in decoder.get_inputs()][3:]
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = dict.fromkeys(names, np.zeros((2, text.num_key_value_heads, 0, head_dim), np.float32))
    for step in range(4):
        logits, *present = decoder.run(
            None,
            {
                "inputs_embeds": embeds,
                "attention_mask": attention_mask.numpy(),
                "position_ids": position_ids.numpy(),
                **cache,
            },
        )
        real = attention_mask[:, -logits.shape[1] :].bool()
        compare(
            "logits of the prompt" if step == 0 else f"logits of token {step}",
            logits[real.numpy()],
            out.logits[real],
            tolerance,
        )
        cache = dict(zip(names, present))
        if step == 3:
            break
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        attention_mask = torch.cat([attention_mask, torch.ones_like(token)], 1)
        position_ids = position_ids[:, -1:] + 1
        out = model(
            input_ids=token,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{CACHE_NAME: getattr(out, CACHE_NAME)},
        )
        embeds = sessions["embed_tokens"].run(None, {"input_ids": token.numpy()})[0]
    return lines


def main(**options) -> None:
    quiet()
    export_onnx(**options)
