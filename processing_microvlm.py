"""Image processor and processor of MicroVLM.

Pictures come in every shape people have: EXIF-rotated, palette, CMYK, 16-bit, animated, transparent, 1 x 1. All end as RGB on white,
resized to 224 x 224 and normalised as the vision tower wants it. A picture whose header claims more than `max_pixels` is refused
before its pixels are decoded.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import PILImageResampling, load_image
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessorMixin, Unpack

DEFAULT_MAX_PIXELS = 64_000_000  # 8000 x 8000


def open_picture(path: str | Path, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Open a picture file, check its header, decode it to RGB.

    Raises:
        ValueError: not a picture, more than `max_pixels` pixels by its header, or broken pixel data; the message names the file.
        FileNotFoundError: no such file.
    """
    try:
        with Image.open(path) as picture:
            return to_rgb(picture, max_pixels)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a picture that Pillow can read.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def to_rgb(picture: Image.Image, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """First frame of any Pillow picture as RGB: upright, transparency on white, 16-bit scaled to 8.

    Raises:
        ValueError: too many pixels by its header (checked before decoding), or pixel data that cannot be decoded.
    """
    width, height = picture.size
    if width * height > max_pixels:
        raise ValueError(f"picture of {width} x {height} pixels is over the limit of {max_pixels} pixels.")
    try:
        if getattr(picture, "is_animated", False):
            picture.seek(0)
        picture.load()
    except (OSError, SyntaxError, EOFError, ValueError) as error:
        raise ValueError(f"picture data cannot be decoded: {error}") from error
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N", "F"):
        values = np.asarray(picture, dtype=np.float64)
        top = 65535.0 if picture.mode != "F" or values.max() > 1 else 1.0
        picture = Image.fromarray((np.clip(values / top, 0, 1) * 255).round().astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(ground, picture)
    return picture.convert("RGB")


class MicroVLMImageProcessorKwargs(ImagesKwargs, total=False):
    """
    max_pixels (`int`): pictures with more pixels by their header are refused.
    """

    max_pixels: int


class MicroVLMImageProcessor(TorchvisionBackend):
    """Resizes to 224 x 224, scales to [0, 1] and normalises; gives `pixel_values` (N, 3, 224, 224).

    Args:
        max_pixels: pictures with more pixels by their header are refused before decoding (ValueError).
    """

    valid_kwargs = MicroVLMImageProcessorKwargs
    model_input_names = ["pixel_values"]

    resample = PILImageResampling.BICUBIC
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    size = {"height": 224, "width": 224}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    max_pixels = DEFAULT_MAX_PIXELS

    def __init__(self, **kwargs: Unpack[MicroVLMImageProcessorKwargs]):
        super().__init__(**kwargs)

    def fetch_images(self, image_url_or_urls):
        """Open paths with the header check; URLs and base64 through transformers."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(x) for x in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, Path)):
            name = str(image_url_or_urls)
            if name.startswith(("http://", "https://", "data:")):
                return load_image(name)
            return open_picture(name, self.max_pixels)
        return super().fetch_images(image_url_or_urls)

    def process_image(self, image, do_convert_rgb=None, max_pixels=None, **kwargs) -> torch.Tensor:
        if isinstance(image, Image.Image) and do_convert_rgb:
            image = to_rgb(image, max_pixels or self.max_pixels)
        return super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)


class MicroVLMProcessor(ProcessorMixin):
    """Tokenizer and image processor in one: every `<image>` in a text becomes `num_image_tokens` placeholders.

    Args:
        image_processor: a `MicroVLMImageProcessor`.
        tokenizer: the text model's tokenizer, with the image token added.
        chat_template: Jinja template for `apply_chat_template`.
        image_token: the placeholder.
        num_image_tokens: placeholders per picture, the adapter's `num_prefix_tokens`.

    Raises:
        ValueError: the tokenizer does not have `image_token` as one token; or, on a call, the number of `image_token` in
            the texts is not the number of pictures.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_image_tokens: int = 25,
        **kwargs,
    ):
        self.image_token = image_token
        self.num_image_tokens = num_image_tokens
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"The tokenizer has no token {image_token!r}: add it with "
                f"tokenizer.add_special_tokens({{'additional_special_tokens': [{image_token!r}]}})."
            )
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )


MicroVLMImageProcessor.register_for_auto_class()
MicroVLMProcessor.register_for_auto_class()

__all__ = ["MicroVLMImageProcessor", "MicroVLMProcessor"]
