"""Image processor and processor of MicroVLM.

Pictures come in every shape people have: EXIF-rotated, palette, CMYK, 16-bit, animated, transparent, 1 x 1. All end as
RGB on white, resized to 224 x 224 and normalised as the vision tower wants it. A picture whose header claims more than
`max_pixels` is refused before its pixels are decoded, wherever it comes from.
"""

import base64
import os
import re
import struct
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessorMixin, Unpack

DEFAULT_MAX_PIXELS = 64_000_000  # 8000 x 8000
LARGEST_VALUE = 1e30  # of a pixel in an array of floats; beyond it float32 overflows on the way
DOWNLOAD_TIMEOUT = 60  # seconds
# how the picture is turned back, by its EXIF orientation
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
AUTO_MAP = {
    "AutoImageProcessor": "processing_microvlm.MicroVLMImageProcessor",
    "AutoProcessor": "processing_microvlm.MicroVLMProcessor",
}


def open_image(source: str | os.PathLike, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Picture as upright RGB, its size checked before its pixels are decoded. See `fetch_picture` and `to_rgb`."""
    return to_rgb(fetch_picture(source, max_pixels), max_pixels)


def fetch_picture(source: str | os.PathLike, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Read the bytes and the header of a picture; decode nothing, leave nothing open.

    Args:
        source: a path, a `file:`, `http:`, `https:` or `data:` URL, or the bare base64 text of a picture.
        max_pixels: the limit for the pictures inside an icon file, of which Pillow decodes one as it opens the file.

    Raises:
        FileNotFoundError: no such file.
        OSError: a file or a URL that cannot be read.
        ValueError: not a picture that Pillow can read, or an icon that holds a picture with too many pixels.
    """
    source = os.fspath(source)
    name = source if len(source) <= 200 else f"{source[:60]}... ({len(source)} characters)"
    missing = None
    if source.startswith(("http://", "https://", "file://", "data:")):
        try:
            request = Request(source, headers={"User-Agent": "MicroVLM"})  # some sites refuse Python's own
            with urlopen(request, timeout=DOWNLOAD_TIMEOUT) as response:
                data = response.read()
        except (OSError, HTTPException, ValueError) as error:
            raise OSError(f"{name} cannot be opened: {error}") from error
    elif os.path.isfile(source):
        data = Path(source).read_bytes()
    else:
        missing = FileNotFoundError(f"{name} is not a file.")
        try:
            data = base64.b64decode("".join(source.split()), validate=True)
        except ValueError:
            raise missing from None
    if data.startswith((b"\0\0\1\0", b"icns")):
        for match in re.finditer(rb"\x89PNG\r\n\x1a\n....IHDR(....)(....)", data, re.DOTALL):
            width, height = (struct.unpack(">I", side)[0] for side in match.groups())
            if width * height > max_pixels:
                raise ValueError(
                    f"{name} holds a picture of {width} x {height} pixels, the limit is {max_pixels} in all."
                )
    try:
        picture = Image.open(BytesIO(data))
    except UnidentifiedImageError as error:
        what = "is not a picture that Pillow can read" if data else "is empty: it has 0 bytes"
        raise missing or ValueError(f"{name} {what}.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} is too large for Pillow's own limit, PIL.Image.MAX_IMAGE_PIXELS: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # on broken data Pillow raises whatever it falls over, here and while decoding
        raise ValueError(f"{name} cannot be opened: {str(error) or type(error).__name__}") from error
    picture.source = name
    return picture


def check_size(picture: Image.Image, max_pixels: int) -> None:
    """Raise ValueError when the header claims no pixels or more than `max_pixels`."""
    width, height = picture.size
    if not 0 < width * height <= max_pixels:
        raise ValueError(
            f"{name_of(picture)} has {width} x {height} pixels, the limit is {max_pixels} in all: `max_pixels` of the "
            "image processor."
        )


def name_of(picture: Image.Image) -> str:
    return getattr(picture, "source", None) or getattr(picture, "filename", None) or "The picture"


def turn_upright(picture: Image.Image) -> Image.Image:
    """`picture` as its EXIF orientation says; as it is stored where that cannot be read, which is what viewers show."""
    picture.load()
    try:
        turn = TURNS.get(picture.getexif().get(ExifTags.Base.Orientation))
    except MemoryError:
        raise
    except Exception:  # on broken EXIF Pillow raises whatever it falls over; the pixels are whole
        turn = None
    return picture if turn is None else picture.transpose(turn)


def to_rgb(picture: Image.Image, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Any Pillow picture as RGB: upright, transparency on white, more than 8 bits scaled to 8, animations at the frame
    they stand at (the first one of a file).

    Raises:
        ValueError: no or too many pixels by its header (checked before decoding), or pixel data that cannot be decoded.
    """
    check_size(picture, max_pixels)
    name = name_of(picture)
    try:
        picture = turn_upright(picture)
        if picture.mode == "F" or picture.mode.startswith("I"):
            picture = Image.fromarray(scale_to_8_bit(np.asarray(picture)))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("RGB")  # a new picture, RGB too
        picture.info = {}  # with the orientation, which would turn it once more
        return picture
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{name} cannot be decoded: {str(error) or type(error).__name__}") from error


def scale_to_8_bit(values: np.ndarray) -> np.ndarray:
    """Values of any shape as uint8: integers are 16-bit, floats in [0, 1], [0, 255] or 16-bit by their maximum; what
    is larger still is divided by its maximum.

    Raises:
        ValueError: values that are not finite.
    """
    if not values.size:
        raise ValueError("it holds no values.")
    flat, out = values.reshape(-1), np.empty(values.size, np.uint8)
    parts = [slice(start, start + 2**20) for start in range(0, flat.size, 2**20)]  # in float64, eight bytes a value
    if not all(np.isfinite(flat[part]).all() for part in parts):
        raise ValueError("it holds values that are not finite numbers.")
    largest = np.float64(flat.max())
    tops = (1, 255, 65535) if values.dtype.kind == "f" else (65535,)
    top = next((top for top in tops if largest <= top), largest)
    for part in parts:
        out[part] = (flat[part].astype(np.float64).clip(0) / top * 255).round()
    return out.reshape(values.shape)


def check_array(image: np.ndarray | torch.Tensor) -> None:
    """Raise ValueError where an array or tensor is no picture: not of numbers, without pixels, or not finite."""
    is_tensor = isinstance(image, torch.Tensor)
    numbers = not image.is_complex() if is_tensor else image.dtype.kind in "buif"
    if not numbers or image.ndim not in (2, 3) or 0 in image.shape:
        raise ValueError(
            f"an array of {image.dtype} with the shape {tuple(image.shape)} is no picture: it takes whole or real numbers, "
            "(height, width) or three axes, none of them empty."
        )
    if not (image.is_floating_point() if is_tensor else image.dtype.kind == "f"):
        return  # whole numbers are finite, and all in range
    finite = bool((torch.isfinite(image) if is_tensor else np.isfinite(image)).all())
    if not finite or abs(float(image.max())) > LARGEST_VALUE or abs(float(image.min())) > LARGEST_VALUE:
        raise ValueError("an array of pixels holds values that are not finite numbers, or out of all range.")


def as_uint8(image: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """Whole numbers of another type as uint8: 16-bit ones scaled, others where they fit, else as float32: torchvision resizes neither int32
    nor int64.
    """
    if image.dtype in (np.bool_, torch.bool):
        return image * (np.uint8(255) if isinstance(image, np.ndarray) else torch.tensor(255, dtype=torch.uint8))
    if image.dtype == np.uint16:
        return scale_to_8_bit(image)
    if image.dtype == torch.uint16:
        return torch.from_numpy(scale_to_8_bit(image.cpu().numpy()))
    if image.dtype in (torch.uint32, torch.uint64):  # torch cannot compare them
        image = image.to(torch.int64)
    if isinstance(image, torch.Tensor):
        whole = image.dtype != torch.uint8 and not image.is_floating_point()
        to = torch.uint8 if whole and 0 <= image.min() and image.max() <= 255 else torch.float32
        return image.to(to) if whole else image
    whole = image.dtype != np.uint8 and image.dtype.kind in "bui"
    return image.astype(np.uint8 if 0 <= image.min() and image.max() <= 255 else np.float32) if whole else image


class MicroVLMImageProcessorKwargs(ImagesKwargs, total=False):
    """
    max_pixels (`int`): pictures with more pixels by their header are refused.
    """

    max_pixels: int


class MicroVLMImageProcessor(TorchvisionBackend):
    """Resizes to 224 x 224, scales to [0, 1] and normalises; gives `pixel_values` (N, 3, 224, 224).

    Takes Pillow pictures, arrays and tensors (values 0 to 255, or a uint16 array; no, 1, 3 or 4 channels, first or
    last), and all that `fetch_picture` takes: paths, URLs, base64.

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
        """Pictures for paths, URLs and base64, nested as given; not decoded, as `process_image` checks their size.

        Raises:
            ValueError: pictures in one list with lists of pictures, or with arrays of several.
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            images = [self.fetch_images(x) for x in image_url_or_urls]
            kinds = {
                "lists" if isinstance(x, list) else "batches" if getattr(x, "ndim", 3) == 4 else "pictures"
                for x in images
            }
            if len(kinds) > 1:  # transformers would take the rows of a picture for pictures
                raise ValueError(
                    f"`images` has {' and '.join(sorted(kinds))} side by side: give pictures alone, one list of pictures per "
                    "text, or arrays of several pictures alone."
                )
            return images
        if isinstance(image_url_or_urls, (str, os.PathLike)):
            return fetch_picture(image_url_or_urls, self.max_pixels)
        images = super().fetch_images(image_url_or_urls)
        return images[None] if getattr(images, "ndim", 3) == 2 else images  # a gray array (height, width)

    def _prepare_images_structure(self, images, expected_ndims=3):
        images = super()._prepare_images_structure(images, expected_ndims)
        if len(images) == 0:
            raise ValueError("`images` is empty: give at least one picture.")
        return images

    def process_image(self, image, do_convert_rgb=None, max_pixels=None, **kwargs) -> torch.Tensor:
        """One picture as a tensor (channels, height, width)."""
        if isinstance(image, Image.Image):
            max_pixels = max_pixels or self.max_pixels
            check_size(image, max_pixels)
            image = to_rgb(image, max_pixels) if do_convert_rgb else image
        elif isinstance(image, (np.ndarray, torch.Tensor)):
            check_array(image)
            image = as_uint8(image)
        if isinstance(image, np.ndarray):
            image = np.require(image, requirements="CW")  # torch takes neither read-only arrays nor bgr[..., ::-1]
        return super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)

    def to_dict(self) -> dict:
        return with_auto_map(super().to_dict(), self)


class MicroVLMProcessor(ProcessorMixin):
    """Tokenizer and image processor in one: every `<image>` in a text becomes `num_image_tokens` placeholders.

    Args:
        image_processor: a `MicroVLMImageProcessor`.
        tokenizer: the text model's tokenizer, with the image token added.
        chat_template: Jinja template for `apply_chat_template`.
        image_token: the placeholder.
        num_image_tokens: placeholders per picture, the adapter's `num_prefix_tokens`.

    Raises:
        ValueError: the tokenizer does not have `image_token` as one token; or, on a call, the number of `image_token`
            in the texts is not the number of pictures.
    """

    # what a tokenizer may add and the model does not take
    unused_input_names = ["token_type_ids"]

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_image_tokens: int = 25,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = image_token
        self.num_image_tokens = num_image_tokens
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id == tokenizer.unk_token_id:  # None without an unknown token
            raise ValueError(
                f"The tokenizer has no token {image_token!r}: add it with "
                f"tokenizer.add_special_tokens({{'additional_special_tokens': [{image_token!r}]}})."
            )

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):
        """Opens pictures and wraps a single text; rows without any picture (`[]`, `[[], []]`) count as no pictures."""
        if text is not None and not isinstance(text, (str, list, tuple)):
            raise TypeError(f"`text` must be a text or a list of texts, got {type(text).__name__}.")
        images, text, *others = super().prepare_inputs_layout(images=images, text=text, **kwargs)
        if isinstance(images, list) and not any(len(row) if isinstance(row, list) else True for row in images):
            images = None
        return images, text, *others

    def validate_inputs(self, images=None, text=None, **kwargs) -> None:
        super().validate_inputs(images=images, text=text, **kwargs)
        if text is None:
            return
        for number, row in enumerate(text):
            try:
                row.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"text {number} is not valid Unicode: {error}.") from error
        if not text:
            raise ValueError("`text` is an empty list: give one text or a list with at least one.")
        if isinstance(images, list) and all(isinstance(row, list) for row in images):
            wanted, given = [row.count(self.image_token) for row in text], [len(row) for row in images]
            if wanted != given:
                raise ValueError(
                    f"The texts have {wanted} {self.image_token} placeholders, but the rows of `images` hold {given} "
                    "pictures: give one row of pictures per text and one placeholder per picture."
                )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )

    def to_dict(self) -> dict:
        return with_auto_map(super().to_dict(), self)


def with_auto_map(dictionary: dict, processor: MicroVLMImageProcessor | MicroVLMProcessor) -> dict:
    # both classes live in this file, which every saved folder carries; save_pretrained would write one of them
    return {**dictionary, "auto_map": {**AUTO_MAP, **getattr(processor, "auto_map", {})}}


MicroVLMImageProcessor.register_for_auto_class()
MicroVLMProcessor.register_for_auto_class()

__all__ = ["MicroVLMImageProcessor", "MicroVLMProcessor"]
