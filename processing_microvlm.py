"""Image processor and processor of MicroVLM.

Images come in every shape people have: EXIF-rotated, palette, CMYK, 16-bit, animated, transparent, 1 x 1. All end as
RGB on white, resized to 224 x 224 and normalised as the vision tower wants it. An image whose header claims more than
`pixel_limit` is refused before its pixels are decoded, wherever it comes from.
"""

import base64
import os
import re
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from http.client import HTTPException
from io import BytesIO
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import PILImageResampling, is_valid_image
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessorMixin

from .configuration_microvlm import require

PIXEL_LIMIT = 64_000_000  # 8000 x 8000
MAX_BYTES = 8 * PIXEL_LIMIT  # of a file: four channels of 16 bits
DOWNLOAD_TIMEOUT = 60  # seconds for all of it
# decoders of pixels alone; Pillow has others, such as EPS, which runs the file as a program
FORMATS = "PNG JPEG WEBP GIF BMP TIFF AVIF JPEG2000 PPM ICO ICNS QOI DDS PCX TGA".split()
TAKEN = "Pillow images, arrays, tensors, paths, URLs, base64, bytes, binary files, and {'bytes', 'path' or 'url': one}"
T = Image.Transpose
# EXIF orientations from 2 on: how to turn the stored pixels
TURNS = (T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM, T.TRANSPOSE, T.ROTATE_270, T.TRANSVERSE, T.ROTATE_90)
TURNS = dict(enumerate(TURNS, start=2))
PNG_HEADER = re.compile(rb"\x89PNG\r\n\x1a\n....IHDR(....)(....)", re.DOTALL)
AUTO_MAP = {
    "AutoImageProcessor": "processing_microvlm.MicroVLMImageProcessor",
    "AutoProcessor": "processing_microvlm.MicroVLMProcessor",
}


# ---------------------------------------------------------------------------------------------------------- image files


@contextmanager
def naming_image(name: str, problem: str, unknown: Exception | None = None) -> Iterator[None]:
    """Raise what Pillow raises on broken data, which can be anything, as a ValueError that names the image.

    Data in no format that Pillow knows raises `unknown` instead.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        broken = ValueError(f"{name} {problem}: {str(error) or type(error).__name__}")
        raise (unknown if unknown and isinstance(error, UnidentifiedImageError) else broken) from error


def open_image(source, pixel_limit: int = PIXEL_LIMIT) -> Image.Image:
    """Open an image as upright RGB, its size checked before its pixels are decoded; see `fetch_image` and `to_rgb`."""
    return to_rgb(fetch_image(source, pixel_limit), pixel_limit)


def fetch_image(source, pixel_limit: int = PIXEL_LIMIT) -> Image.Image:
    """Read the bytes and the header of an image; decode nothing, leave nothing open.

    Args:
        source: a path, a `file:`, `http:`, `https:` or `data:` URL, the bare base64 text of an image, its bytes, a
            binary file, or a dictionary with one of these as `bytes`, `path` or `url`, as in rows of `datasets`.
        pixel_limit: the limit for images in an icon file, where Pillow decodes one as it opens the file.
    """
    given = source if isinstance(source, Mapping) else {}
    source = next((given[key] for key in ("bytes", "path", "url") if given.get(key)), source)
    source = BytesIO(source) if isinstance(source, (bytes, bytearray)) else source
    is_file = hasattr(source, "readinto")
    if not is_file and not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"images are {TAKEN}; got {type(source).__name__}.")
    source = source if is_file else os.fspath(source)
    name = str(given.get("path") or getattr(source, "name", "The image")) if is_file else source
    name = name if len(name) <= 200 else f"{name[:60]}... ({len(name)} characters)"
    # bytes
    unknown = ValueError(f"{name} is not an image that Pillow can read as {', '.join(FORMATS)}.")
    try:
        if is_file:
            if source.seekable():
                source.seek(0)
            data = read(source)
        elif source.startswith(("http://", "https://", "file://", "data:")):
            data = download(source)
        elif os.path.isfile(source):
            with open(source, "rb") as file:
                data = read(file)
        else:  # base64, or the path of a missing file, which may look like it
            data, unknown = b"", FileNotFoundError(f"{name} is not a file.")
            with suppress(ValueError):
                data = base64.b64decode("".join(source.split()), validate=True)
    except (OSError, HTTPException, ValueError) as error:
        why = str(error) or f"it took more than {DOWNLOAD_TIMEOUT} seconds."
        raise OSError(f"{name} cannot be opened: {why}") from error
    # sizes in an icon
    for match in PNG_HEADER.finditer(data) if data.startswith((b"\0\0\1\0", b"icns")) else ():
        check_size(name, [struct.unpack(">I", side)[0] for side in match.groups()], pixel_limit)
    # header
    with naming_image(name, "cannot be opened", unknown):
        image = Image.open(BytesIO(data), formats=FORMATS)
    image.source = name
    return image


def read(file, deadline: float = float("inf")) -> bytes:
    """Read a binary file to its end, at most `MAX_BYTES` until a time of `time.monotonic`."""
    data, take = bytearray(), getattr(file, "read1", file.read)  # what has come, without waiting for more
    while chunk := take(2**20):
        data += chunk
        require(len(data) <= MAX_BYTES, f"it has more than {MAX_BYTES} bytes, the limit of an image file.")
        require(time.monotonic() < deadline, f"it took more than {DOWNLOAD_TIMEOUT} seconds.")
    return bytes(data)


def download(url: str) -> bytes:
    """Read a URL, in a thread: a server that sends its headers byte by byte would hold this one for ever."""
    result, deadline = Future(), time.monotonic() + DOWNLOAD_TIMEOUT

    def work() -> None:
        try:
            # some sites refuse Python's own agent
            with urlopen(Request(url, headers={"User-Agent": "MicroVLM"}), timeout=DOWNLOAD_TIMEOUT) as response:
                result.set_result(read(response, deadline))
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return result.result(DOWNLOAD_TIMEOUT)


def name_of(image: Image.Image) -> str:
    """Name an image by its source."""
    return getattr(image, "source", None) or getattr(image, "filename", None) or "The image"


def check_size(name: str, size: Sequence[int], pixel_limit: int) -> None:
    """Raise a ValueError when a header claims no pixels or more than `pixel_limit`."""
    limit = f"the limit is {pixel_limit} in all: `pixel_limit` of the image processor."
    require(0 < size[0] * size[1] <= pixel_limit, f"{name} has {size[0]} x {size[1]} pixels, {limit}")


def turn_upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says; one whose orientation cannot be read stays as it is stored.

    `ImageOps.exif_transpose` also writes all other tags, and falls over damaged ones with the image not turned.
    """
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except MemoryError:
        raise
    except Exception:  # broken EXIF: Pillow raises whatever it hits; the pixels are fine
        turn = None
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image, pixel_limit: int = PIXEL_LIMIT) -> Image.Image:
    """Convert a Pillow image to RGB: upright, on white, at 8 bits; of an animation, the current frame."""
    check_size(name_of(image), image.size, pixel_limit)
    with naming_image(name_of(image), "cannot be decoded"):
        image = turn_upright(image)
        # 16 and 32 bits to 8
        if image.mode == "F" or image.mode.startswith("I"):
            image = Image.fromarray(scale_to_8_bit(np.asarray(image)))
        # white shows through
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")  # a new image, RGB too
        image.info = {}  # with the orientation, which would turn it once more
        return image


# --------------------------------------------------------------------------------------------------- arrays and tensors


def white_of(largest: float, real: bool) -> float:
    """Tell which value is white, by the largest of an image.

    Integers are 16-bit; real numbers are in [0, 1], [0, 255] or 16-bit; of what is larger still, it is the largest.
    """
    return next((top for top in ((1, 255, 65535) if real else (65535,)) if largest <= top), largest)


def scale_to_8_bit(values: np.ndarray) -> np.ndarray:
    """Scale values of any shape to uint8, white as by `white_of`."""
    # the scale is that of the whole array
    largest, smallest = np.float64(values.max()), np.float64(values.min())
    require(np.isfinite([smallest, largest]).all(), "it holds values that are not finite numbers.")
    top = white_of(largest, values.dtype.kind == "f")
    # part by part: in float64 a value takes eight bytes
    flat, out = values.reshape(-1), np.empty(values.size, np.uint8)
    for start in range(0, flat.size, 2**20):
        part = slice(start, start + 2**20)
        out[part] = (flat[part].astype(np.float64).clip(0) / top * 255).round()
    return out.reshape(values.shape)


def check_array(image: np.ndarray | torch.Tensor) -> None:
    """Raise a ValueError for an array or tensor that is no image: not of numbers, or without pixels."""
    numbers = not image.is_complex() if isinstance(image, torch.Tensor) else image.dtype.kind in "buif"
    require(
        numbers and image.ndim in (2, 3) and 0 not in image.shape,
        f"an array of {image.dtype} with the shape {tuple(image.shape)} is no image: it takes whole or real "
        "numbers, (height, width) or three axes, none of them empty.",
    )


def as_uint8(image: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """Convert whole numbers of another type to uint8: booleans and 16-bit ones scaled, others where they fit.

    What does not fit becomes float32: torchvision resizes neither int32 nor int64.
    """
    if isinstance(image, torch.Tensor):
        if image.is_floating_point() or image.dtype == torch.uint8:
            return image
        return torch.from_numpy(as_uint8(image.cpu().numpy())).to(image.device)
    if image.dtype == np.bool_:
        return image * np.uint8(255)
    if image.dtype == np.uint16:
        return scale_to_8_bit(image)
    if image.dtype.kind == "f" or image.dtype == np.uint8:
        return image
    return image.astype(np.uint8 if 0 <= image.min() and image.max() <= 255 else np.float32)


# ----------------------------------------------------------------------------------------------------------- processors


def naming_both(to_dict):
    def with_both(self) -> dict:  # both live in this file, which folders carry; save_pretrained would write one of them
        return {**to_dict(self), "auto_map": {**AUTO_MAP, **getattr(self, "auto_map", {})}}

    return with_both


class MicroVLMImageProcessorKwargs(ImagesKwargs, total=False):
    """pixel_limit (`int`): images with more pixels by their header are refused."""

    pixel_limit: int


class MicroVLMImageProcessor(TorchvisionBackend):
    """Resize to 224 x 224, scale to [0, 1] and normalise, to `pixel_values` (N, 3, 224, 224).

    Takes Pillow images, arrays and tensors (values 0 to 255, a uint16 array, or real numbers with white as `white_of`
    says, unless `do_rescale=False`; no, 1, 3 or 4 channels, first or last), and what `fetch_image` takes.

    Args:
        pixel_limit: images with more pixels by their header are refused before decoding (ValueError).
    """

    valid_kwargs = MicroVLMImageProcessorKwargs
    model_input_names = ["pixel_values"]

    resample = PILImageResampling.BICUBIC
    image_mean = image_std = [0.5, 0.5, 0.5]
    size = {"height": 224, "width": 224}
    do_resize = do_rescale = do_normalize = do_convert_rgb = True
    pixel_limit = PIXEL_LIMIT
    to_dict = naming_both(TorchvisionBackend.to_dict)

    def fetch_images(self, image_url_or_urls):
        """Open paths, URLs and base64, nested as they are; nothing is decoded before `process_image` checks sizes."""
        if is_valid_image(image_url_or_urls):
            gray = getattr(image_url_or_urls, "ndim", 3) == 2  # an array (height, width)
            return image_url_or_urls[None] if gray else image_url_or_urls
        if isinstance(image_url_or_urls, Sequence) and not isinstance(image_url_or_urls, (str, bytes, bytearray)):
            images = [self.fetch_images(x) for x in image_url_or_urls]
            # of one kind: transformers would take the rows of an image for images
            batches = ("batches" if getattr(x, "ndim", 3) == 4 else "images" for x in images)
            kinds = {"lists" if isinstance(x, list) else kind for x, kind in zip(images, batches)}
            require(
                len(kinds) < 2,
                f"`images` has {' and '.join(sorted(kinds))} side by side: give images alone, one list of images "
                "per text, or arrays of several images alone.",
            )
            return images
        return fetch_image(image_url_or_urls, self.pixel_limit)

    def _prepare_images_structure(self, images, expected_ndims=3):
        images = super()._prepare_images_structure(images, expected_ndims)
        require(len(images) > 0, "`images` is empty: give at least one image.")
        return images

    def process_image(self, image, do_convert_rgb=None, pixel_limit=None, **kwargs) -> torch.Tensor:
        """Convert one image to a tensor (channels, height, width)."""
        # to 8 bits, or to floats that torchvision resizes
        if isinstance(image, Image.Image):
            pixel_limit = pixel_limit or self.pixel_limit
            check_size(name_of(image), image.size, pixel_limit)
            image = to_rgb(image, pixel_limit) if do_convert_rgb else image
        elif isinstance(image, (np.ndarray, torch.Tensor)):
            check_array(image)
            image = as_uint8(image)
        if isinstance(image, np.ndarray):
            image = np.require(image, requirements="CW")  # torch takes neither read-only arrays nor bgr[..., ::-1]
        image = super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)
        # white is 255 for the rescaling that follows
        if image.is_floating_point() and kwargs.get("do_rescale") and kwargs.get("rescale_factor") == 1 / 255:
            image = image.clamp(min=0) * (255 / white_of(float(image.max()), True))
        return image

    def rescale_and_normalize(self, images: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Rescale and normalise like `super()`; refuse what is not finite in float32."""
        pixels = super().rescale_and_normalize(images, *args, **kwargs)
        finite = bool(torch.isfinite(pixels).all())
        require(finite, "an array of pixels holds values that are not finite numbers, or out of all range.")
        return pixels


class MicroVLMProcessor(ProcessorMixin):
    """Tokenizer and image processor in one; an `<image>` becomes `num_image_tokens` placeholders.

    The tokenizer has the `image_token`; `num_image_tokens` is the adapter's `num_prefix_tokens`.
    """

    # what a tokenizer may add and the model does not take
    unused_input_names = ["token_type_ids"]
    to_dict = naming_both(ProcessorMixin.to_dict)

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
        require(
            self.image_token_id != tokenizer.unk_token_id,  # None without an unknown token
            f"The tokenizer has no token {image_token!r}: add it with "
            f"tokenizer.add_special_tokens({{'additional_special_tokens': [{image_token!r}]}}).",
        )

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):
        """Open images and wrap a single text; rows without any image (`[]`, `[[], []]`) count as no images."""
        if text is not None and not isinstance(text, (str, list, tuple)):
            text = [text]  # not the keys of a dictionary: `validate_inputs` of `super()` refuses it
        images, text, *others = super().prepare_inputs_layout(images=images, text=text, **kwargs)
        if isinstance(images, list) and not any(len(row) if isinstance(row, list) else True for row in images):
            images = None
        return images, text, *others

    def validate_inputs(self, images=None, text=None, **kwargs) -> None:
        super().validate_inputs(images=images, text=text, **kwargs)
        require(text is None or len(text) > 0, "`text` is an empty list: give one text or a list with at least one.")
        for number, row in enumerate(text or []):
            try:
                row.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"text {number} is not valid Unicode: {error}.") from error
        # of the rows of images
        if text and isinstance(images, list) and all(isinstance(row, list) for row in images):
            placeholders, counts = [row.count(self.image_token) for row in text], [len(row) for row in images]
            require(
                placeholders == counts,
                f"The texts have {placeholders} {self.image_token} placeholders, but the rows of `images` hold "
                f"{counts} images: give one row of images per text and one placeholder per image.",
            )

    @property
    def model_input_names(self) -> list[str]:
        """Names of what the model takes, text first: `Trainer` groups rows by the length of the first."""
        return sorted(super().model_input_names, key="pixel_values".__eq__)

    def control_tokens(self, written) -> list[str]:
        """List the control tokens that people have written into a text, a message or a conversation."""
        if isinstance(written, str):
            return [token for token in (*self.tokenizer.all_special_tokens, self.image_token) if token in written]
        if not isinstance(written, (list, tuple)):  # a message, as a dictionary or an object
            read = Mapping.get if isinstance(written, Mapping) else getattr
            written = [read(written, name, None) for name in ("messages", "content", "text")]
        return [token for part in written if part is not None for token in self.control_tokens(part)]

    def apply_chat_template(self, conversation, *args, tokenize: bool = False, **kwargs):
        """Apply it like `super()`; control tokens in a message become text, and are refused in a mere string."""
        if tokens := self.control_tokens(conversation):
            safe = tokenize and not kwargs.get("return_assistant_tokens_mask")
            wrong = f"a message holds {tokens[0]}, which a string cannot tell from the template's own"
            require(safe, f"{wrong}: leave it out, or take token ids with tokenize=True and without a mask.")
            kwargs.setdefault("sanitize_control_tokens", True)
        return super().apply_chat_template(conversation, *args, tokenize=tokenize, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        images = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * images, num_image_patches=[1] * images)


MicroVLMImageProcessor.register_for_auto_class()
MicroVLMProcessor.register_for_auto_class()
