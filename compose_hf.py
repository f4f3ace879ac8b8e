"""Compose one MicroVLM checkpoint from pretrained parts: a timm vision tower and a causal language model.

    python compose_hf.py --vision timm/deit_tiny_patch16_224.fb_in1k --text Qwen/Qwen2.5-0.5B \\
        --variant v --out runs/microvlm-v
    python compose_hf.py --vision timm/deit_tiny_patch16_224.fb_in1k --text microsoft/bitnet-b1.58-2B-4T-bf16 \\
        --variant m --out runs/microvlm-m

A part is a Hub id (pin it with --vision-revision, --text-revision) or a local folder of the same layout. Notable:

- The text model decides `text_config`; `configs/microvlm-{variant}.json` gives the sections for adapter, memory and
  alignment. Without --variant they fit the width of the text model. The adapter and the alignment are new, drawn with
  --seed: train them.
- The placeholder `<image>` takes a spare row of the embedding if there is one (Qwen2.5 has 271), else one row is added,
  the mean of the others. It is never generated (`suppress_tokens`). A tokenizer without a pad token pads with its
  end-of-text token.
- BitNet comes in three layouts, and `qat_config` follows the one found, so that the composed model computes what the
  source does: latent weights (`quantization_mode: online`) stay latent and are rounded in every pass; packed weights
  (`offline`) are unpacked to values times scale and stay so; weights without a `quantization_config` are plain.
- Nothing is trusted: the written folder is opened again, every vision and text tensor is compared with its source, and
  the logits of a text are compared with those of the plain text model. OUT appears only when all of that holds.
"""

import argparse
import copy
import json
import math
import os
import re
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_utils import PILImageResampling
from transformers.integrations.bitnet import AutoBitLinear, BitLinear, unpack_weights
from transformers.utils import logging

from microvlm.model import configuration, modeling, processing, quantization

ROOT = Path(__file__).resolve().parent
IMAGE_TOKEN = "<image>"
REQUEST = "Describe the picture."
VISION_PREFIX, TEXT_PREFIX = "model.vision_tower.timm_model.", "model.language_model."
DEFAULT_ARCHITECTURE = "deit_tiny_patch16_224"  # of a weight file without a config.json beside it: our distilled tower
TERNARY_MODULES = r"language_model\.layers\..*_proj"
# A BitNet layer computes what the source's does up to the rounding of a product, and that is checked layer by layer.
# Over 30 layers of a random model the 8-bit rounding of the activations grows it to 0.09 of the logits.
LAYER_TOLERANCE, LOGITS_TOLERANCE = 0.01, 0.25

FLATTEN_MESSAGES = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- if message.content is defined and message.content is sequence and message.content is not string -%}
        {%- set content = namespace(text='') -%}
        {%- for item in message.content -%}
            {%- if item.type == 'image' -%}
                {%- set content.text = content.text + '<image>' -%}
            {%- elif item.type == 'text' -%}
                {%- set content.text = content.text + item.text -%}
            {%- else -%}
                {{- raise_exception("Content is made of 'image' and 'text' items, got " ~ item.type) -}}
            {%- endif -%}
        {%- endfor -%}
        {%- set flat.messages = flat.messages + [dict(message, content=content.text)] -%}
    {%- else -%}
        {%- set flat.messages = flat.messages + [message] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
{{- '' }}"""  # printing nothing protects the first newline of the template that follows

PLAIN_CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- message.role | capitalize + ': ' + message.content | trim -}}
    {{- eos_token + '\\n' if message.role == 'assistant' else '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'Assistant:' -}}
{%- endif -%}"""


@dataclass
class VisionPart:
    """A timm model: its weights under timm's names without the classifier, and how its pictures are prepared."""

    architecture: str
    model_args: dict | None
    weights: dict[str, torch.Tensor]
    width: int
    num_patches: int
    image_size: tuple[int, int]
    mean: list[float]
    std: list[float]
    interpolation: str


@dataclass
class TextPart:
    """A causal language model of transformers.

    Args:
        model: computes the logits that the composed model has to match.
        weights: what the composed model stores, under the names of the text model; without `lm_head.weight` when tied.
        dtype: of the composed checkpoint.
        qat: the entries of `qat_config` with which `weights` compute what `model` does.
        layout: what was found, for people.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights: dict[str, torch.Tensor]
    dtype: torch.dtype
    qat: dict
    layout: str


def is_local(source: str, flag: str) -> bool:
    """Whether `source` is on disk; if not it must look like a Hub id.

    Raises:
        ValueError: it is neither.
    """
    if os.path.exists(source):
        return True
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        return False
    raise ValueError(f"{flag} {source!r} is neither a folder on this machine nor a Hub id (owner/name).")


def fetch(source: str, name: str, revision: str | None) -> Path | None:
    """One file of a local folder or of a Hub repo, None when the repo does not have it.

    Raises:
        ValueError: the repo cannot be reached and is not cached.
    """
    if is_local(source, "--vision"):
        path = Path(source, name)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, name, revision=revision))
    except (OSError, EntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, FileNotFoundError):
            return None
        at = f" at revision {revision}" if revision else ""
        raise ValueError(
            f"--vision {source!r}{at} is no local folder and cannot be had from the Hub: {error}"
        ) from error


def load_vision(source: str, revision: str | None = None) -> VisionPart:
    """Read a vision transformer or a convnet in timm's Hub layout.

    Args:
        source: a folder or Hub repo with `config.json` ({"architecture", "num_classes", "pretrained_cfg"}) and
            `model.safetensors` or `pytorch_model.bin`; or a bare weight file, which without a `config.json` beside it
            is taken for a DeiT-Tiny of `scripts/distill_vision.py` (mean and std 0.5).
        revision: of the Hub repo.

    Raises:
        ValueError: not that layout, an architecture that timm does not know or whose features have no places, or
            weights that are not those of the architecture.
    """
    if os.path.isfile(source):
        weight_file = Path(source)
        config_file = weight_file.with_name("config.json")
        config_file = config_file if config_file.is_file() else None
        config = {"architecture": DEFAULT_ARCHITECTURE, "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    else:
        config_file = fetch(source, "config.json", revision)
        weight_file = fetch(source, "model.safetensors", revision) or fetch(source, "pytorch_model.bin", revision)
        if config_file is None:
            raise ValueError(f"--vision {source!r} has no config.json: expected a timm model in its Hub layout.")
        if weight_file is None:
            raise ValueError(f"--vision {source!r} has neither model.safetensors nor pytorch_model.bin.")
    if config_file is not None:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    architecture = config.get("architecture")
    if not architecture:
        raise ValueError(
            f"--vision {source!r}: config.json has no 'architecture', so this is no timm model. "
            'Expected {"architecture": "deit_tiny_patch16_224", "num_classes": 1000, "pretrained_cfg": {...}}.'
        )
    if not timm.is_model(architecture):
        raise ValueError(f"--vision {source!r}: timm {timm.__version__} has no architecture {architecture!r}.")

    skeleton = timm.create_model(architecture, num_classes=0, **(config.get("model_args") or {}))
    pretrained = {**skeleton.default_cfg, **config.get("pretrained_cfg", {})}
    patch_embed = getattr(skeleton, "patch_embed", None)
    if hasattr(skeleton, "num_prefix_tokens") and hasattr(patch_embed, "num_patches"):
        image_size, num_patches = tuple(patch_embed.img_size), patch_embed.num_patches
    else:  # a convnet: every place of its last map is a patch
        image_size = tuple(pretrained["input_size"][1:])
        with torch.inference_mode():
            features = skeleton.eval().forward_features(torch.zeros(1, 3, *image_size))
        if features.ndim != 4 or features.shape[1] != skeleton.num_features:
            raise ValueError(
                f"--vision {source!r}: {architecture!r} is neither a vision transformer nor a convnet, whose features have places."
            )
        num_patches = features[0, 0].numel()
    if pretrained["interpolation"].upper() not in PILImageResampling.__members__:
        raise ValueError(f"--vision {source!r}: unknown interpolation {pretrained['interpolation']!r}.")

    weights = load_weights(weight_file)
    classifier = pretrained.get("classifier") or ()
    classifier = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(classifier)}
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != expected:
        shapes = [
            f"{n} is {found[n]}, expected {expected[n]}" for n in expected if n in found and found[n] != expected[n]
        ]
        raise ValueError(
            f"--vision {source!r}: the weights are not those of {architecture!r}: "
            + "; ".join(
                f"{len(names)} {what} (such as {names[0]})"
                for what, names in (
                    ("tensors are missing", sorted(expected.keys() - found)),
                    ("tensors do not belong there", sorted(found.keys() - expected)),
                    ("tensors have another shape", shapes),
                )
                if names
            )
        )
    return VisionPart(
        architecture=architecture,
        model_args=config.get("model_args"),
        weights=weights,
        width=skeleton.num_features,
        num_patches=num_patches,
        image_size=image_size,
        mean=list(pretrained["mean"]),
        std=list(pretrained["std"]),
        interpolation=pretrained["interpolation"],
    )


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def load_text(
    source: str, revision: str | None = None, gguf_file: str | None = None, dtype: torch.dtype | None = None
) -> TextPart:
    """Read a causal language model and its tokenizer.

    Args:
        source: a folder or Hub repo of transformers.
        revision: of the Hub repo.
        gguf_file: name of a GGUF file in `source`, which is dequantised.
        dtype: of the weights; None keeps the checkpoint's.

    Raises:
        ValueError: cannot be read, incomplete, not a decoder that MicroVLM can hold, or stored in a quantisation other
            than BitNet's.
    """
    is_local(source, "--text")
    where = {"revision": revision or "main", "trust_remote_code": False}
    if gguf_file is not None:
        where["gguf_file"] = gguf_file
    try:
        config = AutoConfig.from_pretrained(source, **where)
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **where)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--text {source!r} cannot be read as a text model of transformers: {error}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"--text {source!r} is of the family {config.model_type!r}, which is no causal language model. "
            "Expected one such as 'qwen2', 'bitnet' or 'llama'."
        )
    stored = getattr(config, "quantization_config", None) or {}
    method = (stored if isinstance(stored, dict) else stored.to_dict()).get("quant_method")
    if gguf_file is not None:
        where["quantization_config"] = GgufConfig(dequantize=True)
    elif method not in (None, "bitnet"):
        raise ValueError(
            f"--text {source!r} is stored with quant_method {method!r}. Expected plain weights or BitNet's; "
            "quantise the composed checkpoint instead."
        )
    # packed layers compute in the dtype of their scales only
    load_dtype = "auto" if dtype is None or method == "bitnet" else dtype
    with torch.compiler.set_stance("force_eager"):  # BitNet's layers in transformers need a C++ compiler otherwise
        model, info = AutoModelForCausalLM.from_pretrained(source, dtype=load_dtype, output_loading_info=True, **where)
    incomplete = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if incomplete:
        raise ValueError(
            f"--text {source!r} lacks {len(incomplete)} of its tensors, such as {incomplete[0]}: "
            "is the download complete?"
        )
    dtype = dtype or model.dtype
    weights = dict(model.state_dict())
    qat, layout = unpack_bitnet(model, weights, source)
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    check_names(model, weights, source)
    layout = f"{config.model_type}, {layout}" + (f" ({gguf_file}, dequantised)" if gguf_file else "")
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    return TextPart(model.eval(), tokenizer, weights, dtype, qat, layout)


def unpack_bitnet(model: PreTrainedModel, weights: dict[str, torch.Tensor], source: str) -> tuple[dict, str]:
    """Replace packed BitNet weights in `weights` by plain ones, float32.

    Returns:
        The `qat_config` entries, and the layout found.

    Raises:
        ValueError: a layout that `TernaryLinear` cannot compute.
    """
    bit_linears = {n: m for n, m in model.named_modules() if isinstance(m, (AutoBitLinear, BitLinear))}
    if not bit_linears:
        return {"ternary_modules": None}, "plain weights"
    linears = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, BitLinear))}
    projections = {n for n in linears if re.fullmatch(TERNARY_MODULES, n.replace("model.", "language_model.", 1))}
    if projections != set(bit_linears):
        raise ValueError(
            f"--text {source!r}: BitNet's quantisation is expected on all projections of the decoder layers and on "
            f"nothing else, but {min(projections ^ set(bit_linears))} is an exception."
        )
    if any(m.rms_norm is not None for m in bit_linears.values()):
        raise ValueError(f"--text {source!r} has use_rms_norm set in its quantization_config, which is not supported.")
    online = getattr(next(iter(bit_linears.values())), "online_quant", False)
    generator = torch.Generator().manual_seed(0)
    for name, module in bit_linears.items():
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            if isinstance(module, BitLinear):  # y = (x W) / scale
                weight = unpack_weights(module.weight, dtype=torch.float32) / module.weight_scale.float()
            elif online:  # y = x round(W)
                weight = module.weight.float()
            else:  # y = (x W) scale
                weight = module.weight.float() * module.weight_scale.float()
            dtype = module.dtype if isinstance(module, BitLinear) else module.weight.dtype
            x = torch.randn(4, module.in_features, generator=generator).to(dtype)
            expected = module(x)
            used = quantization.fake_ternary(weight.to(dtype)) if online else weight.to(dtype)
            given = nn.functional.linear(quantization.fake_quantize_activation(x, 8), used, module.bias)
        error = ((given - expected).float().norm() / expected.float().norm()).item()
        if not error <= LAYER_TOLERANCE:
            raise ValueError(
                f"--text {source!r}: {name} computes something else once unpacked, by {error:.2e} of its norm."
            )
        weights[f"{name}.weight"] = weight
        weights.pop(f"{name}.weight_scale", None)
    qat = {
        "ternary_modules": [TERNARY_MODULES],
        "ternary_weights": "absmean" if online else "none",
        "activation_bits": 8,
    }
    return qat, "latent weights, rounded online" if online else "packed ternary weights, unpacked"


def check_names(model: PreTrainedModel, weights: dict[str, torch.Tensor], source: str) -> None:
    """Raise ValueError unless the weights are a decoder `model.*` and one linear head, in floating point."""
    foreign = [n for n in weights if not n.startswith("model.") and n != "lm_head.weight"]
    head = model.get_output_embeddings()
    if "model.embed_tokens.weight" not in weights or foreign or type(head) is not nn.Linear:
        raise ValueError(
            f"--text {source!r} is of the family {model.config.model_type!r}, whose tensors are not laid out as "
            f"'model.embed_tokens', 'model.layers' and 'lm_head'{f' (found {foreign[0]!r})' if foreign else ''}. "
            "Expected a text model such as 'qwen2', 'bitnet' or 'llama'."
        )
    odd = [n for n, t in weights.items() if not t.is_floating_point()]
    if odd:
        raise ValueError(f"--text {source!r}: {odd[0]} is stored as {weights[odd[0]].dtype}, expected floating point.")


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> int:
    """Add `<image>`; pad with the end-of-text token if there is no pad token. Returns the id of `<image>`."""
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError("--text: the tokenizer has neither a pad token nor an end-of-text token.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


def grow_vocabulary(weights: dict[str, torch.Tensor], rows: int) -> None:
    """Give embedding and (when not tied) head `rows` rows, in place; new rows are the mean of the old ones."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights and len(weights[name]) < rows:
            old = weights[name]
            mean = old.float().mean(0, keepdim=True).to(old.dtype)
            weights[name] = torch.cat([old, mean.expand(rows - len(old), -1)])


def chat_template_for(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's own template, or a plain one, behind a prelude that flattens pictures and texts into strings."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise ValueError(f"--text: of the chat templates {sorted(template)} none is called 'default'.")
        template = template["default"]
    if template and IMAGE_TOKEN in template:
        return template  # it knows pictures already
    return FLATTEN_MESSAGES + (template or PLAIN_CHAT_TEMPLATE)


def load_sections(variant: str | None, vision: VisionPart, text_config: PreTrainedConfig) -> dict:
    """Sections of the config beside `text_config`: of the variant's file, or as they fit the text model.

    Raises:
        ValueError: no such variant, or one made for other parts.
    """
    hidden_size = text_config.hidden_size
    if variant is None:
        heads = math.gcd(hidden_size, 8)
        sections = {
            "adapter_config": {"num_attention_heads": heads},
            "memory_config": {"code_size": hidden_size},
            "alignment_config": {"fusion_num_attention_heads": heads},
            "qat_config": {},
        }
    else:
        path = ROOT / "configs" / f"microvlm-{variant}.json"
        if not path.is_file():
            known = ", ".join(sorted(p.stem.removeprefix("microvlm-") for p in path.parent.glob("microvlm-*.json")))
            raise ValueError(f"--variant {variant!r}: there is no configs/{path.name}. Variants: {known}.")
        sections = json.loads(path.read_text(encoding="utf-8"))
        vision_args = sections.pop("vision_config")
        wanted = sections.pop("text_config")["hidden_size"], vision_args["architecture"]
        sections["model_args"] = vision_args.get("model_args")
        given = hidden_size, vision.architecture
        for what, want, have in zip(("a text model of width", "the vision tower"), wanted, given):
            if want != have:
                raise ValueError(
                    f"--variant {variant!r} is made for {what} {want}, got {have}. "
                    "Leave --variant out for sizes that fit."
                )
    sections["adapter_config"] |= {"vision_hidden_size": vision.width, "num_patches": vision.num_patches}
    return sections


def build_config(variant: str | None, vision: VisionPart, text: TextPart, image_token_id: int, rows: int):
    """The configuration of the composed model; its default prompt is the variant's, if that has one."""
    sections = load_sections(variant, vision, text.model.config)
    model_args = sections.pop("model_args", None) or vision.model_args
    dropped = ("architectures", "auto_map", "quantization_config", "transformers_version")
    text_config = {k: v for k, v in text.model.config.to_dict().items() if k[0] != "_" and k not in dropped}
    return configuration.MicroVLMConfig.from_dict(
        sections
        | {
            "text_config": text_config | {"vocab_size": rows},
            "vision_config": {
                "model_type": "timm_wrapper",
                "architecture": vision.architecture,
                "model_args": model_args,
                "do_pooling": False,
            },
            "qat_config": sections["qat_config"] | text.qat,
            "image_token_id": image_token_id,
            "tie_word_embeddings": text.model.config.tie_word_embeddings,
        }
    )


def build_processor(vision: VisionPart, tokenizer: PreTrainedTokenizerBase, num_prefix_tokens: int):
    """Image processor as the vision tower was trained, and the tokenizer, with the chat template in both."""
    height, width = vision.image_size
    image_processor = processing.MicroVLMImageProcessor(
        size={"height": height, "width": width},
        image_mean=vision.mean,
        image_std=vision.std,
        resample=PILImageResampling[vision.interpolation.upper()],
    )
    tokenizer.chat_template = chat_template_for(tokenizer)
    return processing.MicroVLMProcessor(
        image_processor,
        tokenizer,
        chat_template=tokenizer.chat_template,
        image_token=IMAGE_TOKEN,
        num_image_tokens=num_prefix_tokens,
    )


def default_prompt(processor, chat: bool) -> list[int]:
    """Ids of the prompt for a picture alone, its placeholders as one: a request in the chat format, or the picture."""
    picture = Image.new("RGB", (8, 8))
    if chat:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": REQUEST}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
        )
    else:
        inputs = processor(text=IMAGE_TOKEN, images=picture)
    ids = [int(i) for i in torch.as_tensor(inputs["input_ids"]).flatten()]
    return [t for i, t in enumerate(ids) if t != processor.image_token_id or i == 0 or ids[i - 1] != t]


def build_generation_config(text: TextPart, image_token_id: int) -> GenerationConfig:
    """The text model's, which never generates the placeholder and knows how to stop and to pad."""
    generation = copy.deepcopy(text.model.generation_config)
    generation._from_model_config = False
    generation.suppress_tokens = sorted({*(generation.suppress_tokens or []), image_token_id})
    generation.pad_token_id = text.tokenizer.pad_token_id
    if generation.eos_token_id is None:
        generation.eos_token_id = text.tokenizer.eos_token_id
    if generation.bos_token_id is None:
        generation.bos_token_id = text.tokenizer.bos_token_id
    return generation


@torch.inference_mode()
def text_logits(model: PreTrainedModel, vocab_size: int) -> torch.Tensor:
    """Logits of two rows of random tokens."""
    ids = torch.randint(vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.compiler.set_stance("force_eager"):
        return model(input_ids=ids, use_cache=False).logits.float()


def verify(folder: Path, weights: dict[str, torch.Tensor], logits: torch.Tensor, exact: bool) -> list[str]:
    """Open the written folder and compare it with its sources.

    Args:
        folder: the written checkpoint.
        weights: what it must hold beside new modules, by full name, in its dtype.
        logits: of `text_logits` on the plain text model (2, T, V).
        exact: whether the logits must be equal bit by bit.

    Returns:
        What was checked, one line each.

    Raises:
        ValueError: a difference.
    """
    missing = dict.fromkeys(weights)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if name in missing:
                    if not torch.equal(file.get_tensor(name), weights[name]):
                        raise ValueError(f"verification: {name} in the written checkpoint is not equal to its source.")
                    del missing[name]
    if missing:
        raise ValueError(f"verification: {len(missing)} tensors were not written, such as {next(iter(missing))}.")
    counts = Counter("vision" if name.startswith(VISION_PREFIX) else "text" for name in weights)
    lines = [f"{part}: {n} tensors equal to the source" for part, n in sorted(counts.items(), reverse=True)]

    model, info = modeling.MicroVLMForConditionalGeneration.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    if any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise ValueError(f"verification: the written checkpoint does not fit its own config: {info}")
    lines.append("the folder loads without missing or unexpected keys")
    vocab_size = logits.shape[-1]
    difference = text_logits(model, vocab_size)[..., :vocab_size] - logits
    error = (difference.norm() / logits.norm()).item()
    if not error <= (0 if exact else LOGITS_TOLERANCE):
        allowed = "they must be equal bit by bit" if exact else f"allowed is {LOGITS_TOLERANCE}"
        raise ValueError(
            f"verification: the logits differ from the text model's by {error:.2e} of their norm; {allowed}."
        )
    verdict = "equal bit by bit" if error == 0 else f"differ by {error:.1e} of their norm"
    lines.append(f"text logits {tuple(logits.shape)}: {verdict}")
    return lines


def table(folder: Path) -> str:
    """Tensors, parameters and bytes of every part, as written."""
    parts: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                part = name.removeprefix("model.").split(".")[0]
                size = (1, tensor.numel(), tensor.nbytes)
                parts[part] = [a + b for a, b in zip(parts.get(part, (0, 0, 0)), size)]
    parts["total"] = [sum(column) for column in zip(*parts.values())]
    rows = [f"{'part':<16}{'tensors':>9}{'parameters':>16}{'bytes':>16}"]
    return "\n".join(rows + [f"{part:<16}{n:>9,}{p:>16,}{b:>16,}" for part, (n, p, b) in parts.items()])


def check_out(out: Path, force: bool, sources: list[str], made: str = "config.json") -> None:
    """Refuse to overwrite what should not be.

    Args:
        out: folder to write.
        force: whether it may replace one of its kind.
        sources: folders or files it is made of; what does not exist is a Hub id.
        made: what a folder of its kind has.

    Raises:
        ValueError: `out` is a file, is or contains a source or this repository, or is a folder that is not empty and
            either not `force`d or without `made`.
    """
    kept = [Path(source).resolve() for source in sources if os.path.exists(source)] + [ROOT]
    for path in kept:
        if path.is_relative_to(out.resolve()):
            raise ValueError(f"OUT {out} would overwrite {path}: choose another folder.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"OUT {out} is a file, expected a folder.")
    if out.is_dir() and any(out.iterdir()):
        if not force:
            raise ValueError(f"OUT {out} exists and is not empty: choose another folder, or replace it with --force.")
        if not (out / made).exists():
            raise ValueError(f"OUT {out} has no {made}, so --force does not replace it: choose another folder.")


def publish(temporary: Path, out: Path) -> None:
    """Rename a finished folder to `out`, replacing what is there; readable again (safetensors writes private files)."""
    mask = os.umask(0)
    os.umask(mask)
    temporary.chmod(0o777 & ~mask)
    for path in temporary.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
    if not out.exists():
        temporary.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    out.rename(old)  # a rename replaces an empty folder
    temporary.rename(out)
    shutil.rmtree(old)


def compose(
    vision_source: str,
    text_source: str,
    out: str | Path,
    variant: str | None = None,
    vision_revision: str | None = None,
    text_revision: str | None = None,
    text_gguf: str | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    force: bool = False,
) -> Path:
    """Write a MicroVLM checkpoint; arguments as on the command line, `dtype=None` keeps the text model's.

    Raises:
        ValueError: something given is not what is expected, or the result does not verify; nothing is written then.
    """
    out = Path(out)
    check_out(out, force, [vision_source, text_source])
    vision = load_vision(vision_source, vision_revision)
    text = load_text(text_source, text_revision, text_gguf, dtype)
    print(f"vision: {vision.architecture}, {vision.num_patches} patches of width {vision.width}")
    print(f"text: {text.layout}, width {text.model.config.hidden_size}, {text.dtype}")

    source_rows = len(text.weights["model.embed_tokens.weight"])
    image_token_id = prepare_tokenizer(text.tokenizer)
    rows = max(source_rows, image_token_id + 1)
    place = "a spare row" if rows == source_rows else f"{rows - source_rows} added row(s)"
    print(f"{IMAGE_TOKEN} is token {image_token_id}, {place} of the embedding of {source_rows} rows")
    config = build_config(variant, vision, text, image_token_id, rows)
    has_chat = text.tokenizer.chat_template is not None
    processor = build_processor(vision, text.tokenizer, config.num_prefix_tokens)
    if config.default_prompt_ids is None:
        config.default_prompt_ids = default_prompt(processor, has_chat)

    grow_vocabulary(text.weights, rows)
    head = text.weights.get("lm_head.weight", text.weights["model.embed_tokens.weight"])
    text.model.get_output_embeddings().weight = nn.Parameter(
        head.to(text.model.dtype)
    )  # of the same shape, so that sums have the same order
    logits = text_logits(text.model, source_rows)[..., :source_rows]
    weights = {VISION_PREFIX + n: t.to(text.dtype) if t.is_floating_point() else t for n, t in vision.weights.items()}
    weights |= {re.sub("^model[.]", TEXT_PREFIX, n): t for n, t in text.weights.items()}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, info = modeling.MicroVLMForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=dict(weights), dtype=text.dtype, output_loading_info=True
        )
    unfilled = [n for n in info["missing_keys"] if n.startswith((VISION_PREFIX, TEXT_PREFIX, "lm_head"))]
    if unfilled or info["unexpected_keys"] or info["mismatched_keys"]:
        raise ValueError(f"the parts do not fit the composed model: not filled {unfilled}, {info}")
    model.generation_config = build_generation_config(text, image_token_id)

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        exact = text.qat["ternary_modules"] is None
        del model, text
        checks = verify(temporary, weights, logits, exact)
        print(table(temporary))
        print("\n".join(f"ok: {line}" for line in checks))
        publish(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"wrote {out}")
    return out


def main() -> None:
    """Parse, compose, and end with a one-line message when something given is wrong."""
    parser = argparse.ArgumentParser(
        description="Compose one MicroVLM checkpoint from pretrained parts.",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "--vision", required=True, help="timm model: Hub id, folder, or bare weight file of our DeiT-Tiny"
    )
    parser.add_argument("--text", required=True, help="causal language model: Hub id or folder")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument(
        "--variant", help="sizes from configs/microvlm-VARIANT.json; default: as they fit the text model"
    )
    parser.add_argument("--vision-revision", help="branch, tag or commit of a Hub --vision")
    parser.add_argument("--text-revision", help="branch, tag or commit of a Hub --text")
    parser.add_argument(
        "--text-gguf", metavar="FILE", help="name of a GGUF file in --text to read instead of safetensors"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: the text model's")
    parser.add_argument("--seed", type=int, default=0, help="of the new modules: adapter and alignment")
    parser.add_argument("--force", action="store_true", help="replace the checkpoint at OUT")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        compose(
            args.vision,
            args.text,
            args.out,
            variant=args.variant,
            vision_revision=args.vision_revision,
            text_revision=args.text_revision,
            text_gguf=args.text_gguf,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            seed=args.seed,
            force=args.force,
        )
    except ValueError as error:
        raise SystemExit(f"compose_hf.py: {error}") from error


if __name__ == "__main__":
    main()
