"""Property tests of what comes from outside: images, processor inputs, configs, packed checkpoints, memory files.

`tests/fuzz` has the mutations and the judgement. Here they run on a small budget; hypothesis chooses the
cases. Round trips, and every bug of that kind, have cases of their own.
"""

import copy
import ctypes
import faulthandler
import json
import os
import random
import signal

import numpy as np
import pytest
import torch
from conftest import MicroVLMForConditionalGeneration, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as arrays
from microvlm.configuration_microvlm import LARGEST_SIZE
from microvlm.memory_state_microvlm import MemoryState
from microvlm.processing_microvlm import open_image, scale_to_8_bit, to_rgb
from PIL import Image
from safetensors.torch import load_file, save_file
from toy_data import toy_processor

from microvlm import packing_microvlm as packing, quantization_microvlm as quantization
from tests.fuzz.kinds import KINDS, attempt
from tests.fuzz.material import small_memory, small_packed
from tests.fuzz.mutations import ico_around, mutate_bytes, mutate_json, png_bomb
from tests.fuzz.run import main
from tests.fuzz.soak import memory_now, reset_peak
from tests.fuzz.stress import guarded_tensor, stress

small = settings(deadline=None, derandomize=True, max_examples=100, database=None)
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Every kind of case, made once."""
    made = {}

    def get(name: str):
        if name not in made:
            made[name] = KINDS[name](tmp_path_factory.mktemp(name))
        return made[name]

    return get


def check(kind, seed: int) -> None:
    outcome, what = attempt(kind, f"test-{seed}")
    assert outcome != "other", what


@pytest.fixture(scope="module")
def processor():
    return toy_processor()


# ---- mutated files and inputs


@pytest.mark.parametrize(
    "name,examples", [("images", 100), ("processor", 60), ("memory", 60), ("configs", 20), ("packed", 8)]
)
def test_mutations_are_accepted_or_refused(name, examples, kinds):
    @settings(small, max_examples=examples)
    @given(SEEDS)
    def run(seed):
        check(kinds(name), seed)

    run()


@pytest.mark.parametrize("place", [-1, 24])
def test_a_byte_outside_a_guarded_tensor_ends_the_process(place):
    tensor = guarded_tensor(1024, 3, dtype=torch.float64)  # as long as its pages
    assert tensor.is_contiguous() and tensor.fill_(1).sum() == 3072
    if (child := os.fork()) == 0:
        faulthandler.disable()
        ctypes.memset(tensor.data_ptr() + (place if place < 0 else tensor.nbytes), 0, 1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] & 127 == signal.SIGSEGV


def test_threads_between_guard_pages():
    """Eight threads that load, ask, stream, cancel, fork and change torch's defaults; a wrong byte ends the process."""
    result = stress(8, guarded=True)
    assert result["errors"] == [] and result["counts"]["ask"] > 0


@pytest.mark.slow
def test_ten_times_as_many(tmp_path):
    options = "--cases 1000 --soak 60 --seed 1 --slope 1000 --stress 0".split()
    assert main([*options, "--json", str(tmp_path / "out.json")]) == 0
    results = {r["kind"]: r for r in json.loads((tmp_path / "out.json").read_text())}
    assert results.keys() == {*KINDS, "soak"}
    for name, kind in KINDS.items():
        r = results[name]
        assert r["cases"] == round(1000 * kind.share) == r["accepted"] + sum(r["refused"].values())
        assert r["accepted"] and r["refused"]
    assert results["soak"]["captions"] == 60 and results["soak"]["writes"] == 6


def test_the_judge_tells_a_refusal_from_a_fall(kinds):
    class Falls:
        types = (ValueError,)

        def __init__(self, action):
            self.case = lambda rng: action()

        def explain(self, error):
            return None

    def refuse():
        raise ValueError("no.")

    assert attempt(Falls(refuse), "0") == ("refused", "ValueError")
    for action in (lambda: int("x"), lambda: {}["x"], lambda: [][0]):
        assert attempt(Falls(action), "0")[0] == "other"
    assert attempt(Falls(lambda: None), "0") == ("accepted", "")


VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
)
OWN = ("adapter_config", "memory_config", "alignment_config", "qat_config")
FIELDS = [(s, f) for s in OWN for f in type(getattr(tiny_config(), s)).__annotations__]


@settings(small, max_examples=150)
@given(st.sampled_from(FIELDS), VALUES)
def test_a_config_of_any_value_is_kept_or_refused_by_name(field, value):
    section, name = field
    try:
        config = tiny_config(use_memory=True, **{section: tiny_config().to_dict()[section] | {name: value}})
    except ValueError as error:
        assert section in str(error) and name in str(error)
    else:
        kept = getattr(getattr(config, section), name)
        assert kept == value or value is None


QUANTIZATION = {
    "modules": {
        r"model\..*_proj": {"format": "ternary", "group_size": 16},
        r"model\.embed": {"format": "int4", "group_size": "row", "scale_type": "float16", "frequent_rows": 10},
    },
    "order": [r"model\.embed", r"model\..*_proj"],
}


@settings(small, max_examples=300)
@given(SEEDS)
def test_any_quantization_config_is_taken_or_refused(seed):
    try:
        config = quantization.PackedConfig(**mutate_json(QUANTIZATION, random.Random(seed)))
    except ValueError as error:
        assert str(error)
    else:
        json.dumps(config.to_dict())


NUMBERS = st.sampled_from([np.uint8, np.uint16, np.int32, np.float32, np.float64, np.bool_])
SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple)


@small
@given(st.data())
def test_an_array_gives_pixels_or_a_refusal(processor, data):
    array = data.draw(arrays.arrays(data.draw(NUMBERS), data.draw(SHAPES)))
    as_tensor = array.dtype != np.uint16 and data.draw(st.booleans())
    try:
        pixels = processor.image_processor([torch.from_numpy(array) if as_tensor else array], return_tensors="pt")
    except ValueError as error:
        assert str(error)
    else:
        values = pixels["pixel_values"]
        images = len(array) if array.ndim == 4 else 1  # four axes are a batch
        assert values.shape == (images, 3, 32, 32) and values.dtype == torch.float32 and torch.isfinite(values).all()


# ---- round trips


@small
@given(st.integers(1, 40), st.integers(1, 40), SEEDS)
def test_trits_come_back(rows, columns, seed):
    values = torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = packing.FORMATS["ternary"].pack(values)
    assert packed.shape == (rows, -(-columns // 5))
    assert torch.equal(packing.FORMATS["ternary"].unpack(packed, columns), values)


def regression(addresses: torch.Tensor, contents: torch.Tensor, noise: float):
    """Posterior mean and covariance of all observations at once, by the textbook formula."""
    precision = torch.eye(addresses.shape[1], dtype=torch.float64) + addresses.mT @ addresses / noise
    covariance = torch.linalg.inv(precision)
    return covariance @ addresses.mT @ contents / noise, covariance


STEPS = st.lists(st.booleans() | st.integers(0, 20), min_size=1, max_size=14)


@small
@given(STEPS, SEEDS)
def test_any_writes_and_forgets_are_a_regression_on_what_is_left(steps, seed):
    draw = torch.Generator().manual_seed(seed)
    state, kept = MemoryState.new(1, 8, 12, 0.01, 50, 5), []
    for step in steps:
        if isinstance(step, bool) or not kept:
            address = torch.nn.functional.normalize(torch.randn(1, 1, 8, generator=draw), dim=-1)
            content = torch.randn(1, 1, 12, generator=draw)
            state = state.write(address, content, method="direct" if step else "sequential")
            kept.append((address[0, 0].double(), content[0, 0].double()))
        else:
            state = state.forget(step % len(kept))
            kept.pop(step % len(kept))
    empty = torch.zeros(0, 8, dtype=torch.float64), torch.zeros(0, 12, dtype=torch.float64)
    mean, covariance = regression(*(torch.stack(x) for x in zip(*kept)) if kept else empty, 0.01)
    assert (state.mean[0] - mean).abs().max() < 1e-6 and (state.covariance[0] - covariance).abs().max() < 1e-6
    for _ in kept:
        state = state.forget(0)
    fresh = MemoryState.new(1, 8, 12, 0.01, 50, 5)
    assert all(torch.equal(getattr(state, name), getattr(fresh, name)) for name in MemoryState.TENSORS)


@settings(small, max_examples=40)
@given(rows=st.integers(1, 3), items=st.integers(0, 6), seed=SEEDS)
def test_a_memory_comes_back_from_its_file(tmp_path_factory, rows, items, seed):
    state = small_memory(rows, items, seed)
    path = tmp_path_factory.mktemp("memory") / "facts.safetensors"
    state.save(path)
    back = MemoryState.load(path, MemoryState.new(1, 8, 12, 0.01, 6, 5, "fingerprint"))
    assert all(torch.equal(getattr(back, name), getattr(state, name)) for name in MemoryState.TENSORS)
    assert back.labels == state.labels


@settings(small, max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 60), st.sampled_from(["RGB", "L", "P", "RGBA"])),
        min_size=1,
        max_size=4,
    ),
    SEEDS,
)
def test_a_batch_of_images_is_its_images(processor, sizes, seed):
    noise = np.random.default_rng(seed)
    images = [Image.fromarray(noise.integers(0, 256, (h, w, 3), dtype=np.uint8)).convert(mode) for w, h, mode in sizes]
    texts = [f"<image>{'a red ' * n}square" for n in range(len(images))]
    batch = processor(images=[[image] for image in images], text=texts, padding=True, return_tensors="pt")
    for row, (image, text) in enumerate(zip(images, texts)):
        single = processor(images=image, text=text, return_tensors="pt")
        assert torch.equal(batch["pixel_values"][row], single["pixel_values"][0])
        words = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        assert torch.equal(words, single["input_ids"][0])


# ---- bugs that these tests found


@pytest.mark.parametrize("kind", ["ICO", "ICNS"])
def test_the_picture_inside_an_icon_is_measured_before_it_is_decoded(tmp_path, kind):
    path = tmp_path / "bomb.ico"
    path.write_bytes(ico_around(png_bomb(8100, 0, 8), kind))
    reset_peak()
    before = memory_now()
    with pytest.raises(
        ValueError, match="bomb.ico has 8100 x 8100 pixels, the limit is 64000000 in all: `pixel_limit` of the image"
    ):
        open_image(path)
    assert memory_now("VmHWM") - before < 20  # decoded it takes 66 MB


def test_an_icon_within_the_limit_is_opened(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.ico")
    assert open_image(tmp_path / "a.ico").getpixel((5, 5)) == (255, 0, 0)


def test_sixteen_bits_take_no_float_copy_of_the_picture():
    values = np.arange(16_000_000, dtype=np.uint32).reshape(4000, 4000).astype(np.uint16)
    reset_peak()
    before = memory_now()
    out = scale_to_8_bit(values)
    assert memory_now("VmHWM") - before < 100  # in float64 at once: 128 MB, several times
    some = values[::997]
    assert np.array_equal(out[::997], (some.astype(np.float64) / 65535 * 255).round().astype(np.uint8))


@pytest.mark.parametrize(
    "array",
    [
        np.full((8, 8, 3), np.nan, dtype=np.float32),
        np.full((3, 8, 8), np.inf),
        np.zeros((8, 8, 3), dtype=np.complex64),
        np.full((8, 8, 3), "7"),
        np.zeros((8, 0, 3)),
        np.zeros((3, 0, 0), dtype=np.uint8),
    ],
    ids=["nan", "inf", "complex", "text", "no columns", "nothing"],
)
@pytest.mark.parametrize("tensor", [False, True])
def test_arrays_that_are_no_images_are_refused(processor, array, tensor):
    if tensor and array.dtype.kind == "U":
        pytest.skip("torch has no texts")
    picture = torch.from_numpy(array) if tensor else array
    with pytest.raises(ValueError, match="is no image|not finite|empty|size 0|mean must have|channel"):
        processor.image_processor([picture], return_tensors="pt")


def with_broken_exif(folder) -> Image.Image:
    """A picture whose orientation data has no beginning, and whose pixels are whole."""
    picture = Image.new("RGB", (16, 8), "white")
    picture.paste("red", (0, 0, 8, 8))
    picture.save(folder / "a.png", exif=b"Exif\0\0H\xc7\x8d\xe6\xa5\xa0\xd9u")
    return Image.open(folder / "a.png")


def test_a_picture_whose_orientation_cannot_be_read_is_shown_as_it_is_stored(processor, tmp_path):
    picture = with_broken_exif(tmp_path)
    with pytest.raises(SyntaxError, match="not a TIFF file"):
        picture.getexif()
    for image in (with_broken_exif(tmp_path), open_image(tmp_path / "a.png"), str(tmp_path / "a.png")):
        pixels = processor(images=image, return_tensors="pt")["pixel_values"][0]  # (3, 32, 32)
        assert pixels[:, 16, 4].tolist() == [1, -1, -1] and pixels[:, 16, 28].tolist() == [1, 1, 1]


def test_an_opened_picture_is_turned_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    picture = Image.new("RGB", (16, 8), "white")
    picture.paste("red", (0, 0, 8, 8))
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    once = open_image(tmp_path / "a.jpg")
    assert np.array_equal(np.asarray(to_rgb(once)), np.asarray(once)) and once.getpixel((13, 4))[1] < 50


@pytest.mark.parametrize(
    "images,kinds",
    [
        (lambda red, batch: [batch, red], "batches and images"),
        (lambda red, batch: [batch, np.zeros((3, 8, 8), np.uint8)], "batches and images"),
        (lambda red, batch: [red, [red]], "images and lists"),
        (lambda red, batch: [[red, batch]], "batches and images"),
        (lambda red, batch: [(red,), torch.from_numpy(batch)], "batches and lists"),
    ],
)
def test_images_next_to_batches_are_refused(processor, images, kinds):
    images = images(Image.new("RGB", (8, 8), "red"), np.zeros((2, 3, 8, 8), np.uint8))
    for call in (processor, processor.image_processor):
        with pytest.raises(ValueError, match=f"^`images` has {kinds} side by side: give images alone"):
            call(images=images, return_tensors="pt")


@pytest.mark.parametrize("text", [3, 2.5, True, {"text": "a"}, object(), b"<image>"])
def test_what_is_no_text_is_refused(processor, text):
    with pytest.raises(ValueError, match="^`text` must be a string or list of strings.$"):
        processor(text=text)


def test_half_a_character_is_refused(processor):
    with pytest.raises(ValueError, match="^text 1 is not valid Unicode: "):
        processor(text=["a", "\ud800"], padding=True)


def invalid(section: str, name: str) -> str:
    return f"{section} is not valid: Validation error for field '{name}'"


OBJECT = "must be an object of names and values, got"
HUGE_TEXT = {"model_type": "qwen2", "num_hidden_layers": 2**31}
PREFIX = invalid("adapter_config", "num_prefix_tokens")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"text_config": 3}, "Field 'text_config' with value 3 doesn't match any type in"),
        ({"text_config": {"model_type": ["qwen2"]}}, "text_config is not valid: TypeError: "),
        ({"text_config": HUGE_TEXT}, "text_config.num_hidden_layers must be a whole number"),
        (
            {"vision_config": {"num_classes": 10**12}},
            "vision_config.num_classes must be a whole number of at most 100000",
        ),
        ({"vision_config": {"model_args": {"depth": 10**12}}}, "vision_config.model_args.depth must be a whole number"),
        ({"num_labels": 10**12}, "num_labels must be a whole number of at most 100000, got 1000000000000."),
        ({"adapter_config": {"num_prefix_tokens": -25}}, f"{PREFIX}:\n    ValueError: Value must be from 1"),
        ({"adapter_config": {"num_prefix_tokens": "25"}}, f"{PREFIX}:\n    TypeError: "),
        ({"memory_config": {"num_slots": LARGEST_SIZE + 1}}, invalid("memory_config", "num_slots")),
        ({"memory_config": {"gray_weight": "x"}}, invalid("memory_config", "gray_weight")),
        ({"memory_config": {"scope_threshold": [[1, "x"]]}}, invalid("memory_config", "scope_threshold")),
        ({"qat_config": {"ternary_modules": 7}}, invalid("qat_config", "ternary_modules")),
        ({"alignment_config": {"temperature": 0}}, invalid("alignment_config", "temperature")),
        ({"default_prompt_ids": 4}, "Validation error for field 'default_prompt_ids'"),
        ({"alignment_config": {"fusion_num_layers": 2_000_000}}, invalid("alignment_config", "fusion_num_layers")),
        ({"memory_config": {"ben_cohen_steps": 2**24}}, invalid("memory_config", "ben_cohen_steps")),
        ({"quantization_config": 0.5}, f"quantization_config {OBJECT} 0.5."),
        ({"quantization_config": "x"}, f"quantization_config {OBJECT} 'x'."),
        ({"text_config": {"quantization_config": []}}, f"text_config.quantization_config {OBJECT} []."),
        ({"dtype": [1]}, "dtype must be the name of one, got [1]."),
        ({"dtype": "cuda:7"}, "the configuration is not valid: AttributeError: "),
    ],
)
def test_impossible_configs_are_refused_by_name(change, message):
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        tiny_config(**change)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "section,change",
    [
        ("text_config", {"hidden_act": "no such function"}),
        ("text_config", {"intermediate_size": -5}),
        ("adapter_config", {"hidden_act": "no such function"}),
        ("qat_config", {"ternary_modules": ["("]}),
    ],
)
def test_a_section_that_builds_nothing_is_named(section, change):
    with pytest.raises(ValueError, match=f"^{section} is not valid: "):
        tiny_model(**{section: copy.deepcopy(tiny_config().to_dict()[section]) | change})


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t, name: t.pop(name), "{} is missing in the packed checkpoint."),
        (lambda t, name: t.update({name: t[name].float()}), "{} is stored as F32, expected U8."),
    ],
    ids=["missing", "dtype"],
)
def test_a_packed_tensor_that_is_missing_or_of_another_type_is_refused(tmp_path, change, message):
    folder = small_packed(tmp_path / "small")
    tensors, name = load_file(folder / "model.safetensors"), "model.language_model.layers.0.self_attn.q_proj.weight"
    change(tensors, name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError) as error:
        MicroVLMForConditionalGeneration.from_pretrained(folder)
    assert str(error.value) == message.format(name)


@pytest.mark.parametrize(
    "name,dtype,stored",
    [
        ("model.language_model.norm.weight", torch.int64, "I64"),
        ("model.vision_tower.timm_model.patch_embed.proj.bias", torch.uint8, "U8"),
        ("model.language_model.layers.0.self_attn.q_proj.bias", torch.bool, "BOOL"),  # of a packed layer
    ],
)
def test_a_weight_that_is_not_packed_is_stored_in_floating_point(tmp_path, name, dtype, stored):
    folder = small_packed(tmp_path / "small")
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError) as error:
        MicroVLMForConditionalGeneration.from_pretrained(folder)
    assert str(error.value) == f"{name} is stored as {stored}, expected a floating point type."


def test_floating_point_weights_of_another_type_are_cast(tmp_path):
    folder = small_packed(tmp_path / "small")
    tensors, name = load_file(folder / "model.safetensors"), "model.language_model.norm.weight"
    tensors[name] = tensors[name].double()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = MicroVLMForConditionalGeneration.from_pretrained(folder)
    assert model.model.language_model.norm.weight.dtype == torch.float32


def test_patterns_keep_their_order_in_config_json(tmp_path):
    folder = small_packed(tmp_path / "small")  # up_proj comes before the .*_proj that would match it too
    saved = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert list(saved["modules"]) != saved["order"] and sorted(saved["modules"]) == sorted(saved["order"])
    model = MicroVLMForConditionalGeneration.from_pretrained(folder)
    assert model.model.language_model.layers[0].mlp.up_proj.scheme.group_size == 16
    assert model.model.language_model.layers[0].mlp.down_proj.scheme.format == "int4"
    with pytest.raises(ValueError, match="^quantization_config.order must hold every expression"):
        quantization.PackedConfig({"a": {}}, order=["b"])
    assert not hasattr(quantization.PackedConfig({"a": {}, "b": {}}), "order")  # sorted already: nothing to keep


MODULES = "quantization_config.modules must be an object of expressions with an object each, got"
ORDER = "quantization_config.order must hold every expression"


@pytest.mark.parametrize(
    "change,message",
    [
        ({"modules": 3}, f"{MODULES} 3."),
        ({"modules": {"a": None}}, MODULES),
        ({}, f"{MODULES} None."),
        ({"modules": {"(": {}}}, "quantization_config.modules: '(' is not a regular expression: "),
        ({"modules": {"a": {"format": []}}}, "format must be one of "),
        ({"modules": {"a": {"frequent_rows": "10"}}}, "frequent_rows must be a whole number, got '10'."),
        ({"modules": {"a": {}}, "order": [1]}, ORDER),
        ({"modules": {"a": {}}, "order": 7}, ORDER),
    ],
)
def test_an_impossible_quantization_config_is_refused_by_name(change, message):
    with pytest.raises(ValueError) as error:
        quantization.PackedConfig(**change)
    assert str(error.value).startswith(message)


def test_mutations_are_the_same_for_the_same_seed():
    data = bytes(range(256)) * 4
    assert mutate_bytes(data, random.Random("a")) == mutate_bytes(data, random.Random("a")) != data
