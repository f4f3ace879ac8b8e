"""Build chat template, default prompt, processor and generation config of a checkpoint."""

import copy

import torch
from PIL import Image
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.image_utils import PILImageResampling

from ..model import MicroVLMImageProcessor, MicroVLMProcessor, require
from ..tables import TEMPLATES
from .text import IMAGE_TOKEN, TextPart
from .vision import VisionPart

REQUEST = "Describe the picture."
# the first one joins images and texts of a message; it ends with printing nothing, which protects the first newline of
# the template that follows
FLATTEN_MESSAGES, PLAIN_CHAT_TEMPLATE = (
    (TEMPLATES / f"chat_{name}.jinja").read_text().removesuffix("\n") for name in ("flatten", "plain")
)


def chat_template_for(tokenizer: PreTrainedTokenizerBase) -> str:
    """Put a prelude that joins images and texts before the tokenizer's template."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        require("default" in template, f"--text: of the chat templates {sorted(template)} none is called 'default'.")
        template = template["default"]
    if template and IMAGE_TOKEN in template:
        return template  # it knows images already
    return FLATTEN_MESSAGES + (template or PLAIN_CHAT_TEMPLATE)


def build_processor(vision: VisionPart, tokenizer: PreTrainedTokenizerBase, num_prefix_tokens: int):
    """Join the tokenizer with an image processor as the vision tower was trained."""
    height, width = vision.image_size
    image_processor = MicroVLMImageProcessor(
        size={"height": height, "width": width},
        image_mean=vision.mean,
        image_std=vision.std,
        resample=PILImageResampling[vision.interpolation.upper()],
    )
    tokenizer.chat_template = chat_template_for(tokenizer)
    return MicroVLMProcessor(
        image_processor,
        tokenizer,
        chat_template=tokenizer.chat_template,
        image_token=IMAGE_TOKEN,
        num_image_tokens=num_prefix_tokens,
    )


def default_prompt(processor, chat: bool) -> list[int]:
    """Make the prompt for an image alone, with one placeholder."""
    image = Image.new("RGB", (8, 8))
    if chat:
        content = [{"type": "image", "image": image}, {"type": "text", "text": REQUEST}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
        )
    else:
        inputs = processor(text=IMAGE_TOKEN, images=image)
    ids = [int(i) for i in torch.as_tensor(inputs["input_ids"]).flatten()]
    return [t for i, t in enumerate(ids) if t != processor.image_token_id or i == 0 or ids[i - 1] != t]


def build_generation_config(text: TextPart, image_token_id: int) -> GenerationConfig:
    """Extend the text model's config: no placeholder is generated; it stops and pads."""
    generation = copy.deepcopy(text.model.generation_config)
    generation._from_model_config = False
    generation.suppress_tokens = sorted({*(generation.suppress_tokens or []), image_token_id})
    generation.pad_token_id = text.tokenizer.pad_token_id
    for name in ("eos_token_id", "bos_token_id"):
        if getattr(generation, name) is None:
            setattr(generation, name, getattr(text.tokenizer, name))
    return generation
