"""One model, many forms: every verb of the memory on every form of the weights works, or one sentence refuses it."""

import accelerate
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import outspoken_model, text_section, tiny_config, tiny_inputs
from microvlm.cache_microvlm import CACHE_NAME
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from transformers import BitsAndBytesConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from microvlm import quantization_microvlm as quantization
from microvlm.pack import pack

# widths that bitsandbytes packs in 4 bits on a CPU: blocks of 32 rows and 64 columns
MEMORY = {"num_slots": 16, "code_size": 64, "num_memory_tokens": 16, "max_content_tokens": 16}
MEMORY |= {"key_hidden_size": 128, "scope_hidden_size": 32}
TEXT = text_section("qwen2", hidden_size=64)
CONVNET = {"architecture": "test_resnet", "model_args": {"output_stride": 8}, "do_pooling": False}  # with BatchNorm
PACKED = {
    r"model\.language_model\.layers\..*_proj": {"format": "ternary"},
    r"model\.language_model\.embed_tokens": {"format": "int8", "group_size": "row", "scale_type": "float16"},
    r"model\.(vision_tower|memory)\..*": {"format": "int4", "group_size": "row"},
}
WHOLE = ["model.adapter", "model.alignment", "model.scope", "model.vision_tower", "lm_head"]  # what stays, in 4 bits

FACTS = tiny_inputs(2, 8, seed=1)
PICTURES = {"pixel_values": FACTS["pixel_values"], "input_ids": tiny_inputs(2, 4, seed=2)["input_ids"]}
WORDS = {"input_ids": FACTS["input_ids"][:, 8:]}


def build(**kwargs):
    return outspoken_model("qwen2", **({"use_memory": True, "text_config": TEXT, "memory_config": MEMORY} | kwargs))


def convnet():
    adapter = tiny_config().adapter_config.to_dict() | {"vision_hidden_size": 96}
    return build(vision_config={"model_type": "timm_wrapper", **CONVNET}, adapter_config=adapter)


def packed():
    model = build()
    pack(model, quantization.PackedConfig(PACKED))
    return model.eval()


def reopened(model, folder, **kwargs):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, **kwargs).eval()


def in_bits(folder, **kwargs):
    return reopened(build(), folder, quantization_config=BitsAndBytesConfig(**kwargs))


def in_4_bits(folder, **kwargs):
    return in_bits(folder, load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=WHOLE, **kwargs)


def dispatched(model, folder):
    """With less memory than the model needs: the rest lies on the disk."""
    small = {"max_memory": {"cpu": 60_000}, "offload_folder": folder / "offload"}
    return reopened(model, folder, device_map="auto", **small)


def second_copy(folder):
    """A model of another copy of the code: the one that a saved folder brings."""
    build().save_pretrained(folder)
    name = "modeling_microvlm.MicroVLMForConditionalGeneration"
    return get_class_from_dynamic_module(name, folder).from_pretrained(folder).eval()


# a form -> how it is made, in a folder of its own
SAME = {  # with the weights of `build`
    "float32": lambda folder: build(),
    "second copy": second_copy,
    "cpu_offload": lambda folder: accelerate.cpu_offload(build()),
    "cpu_offload with buffers": lambda folder: accelerate.cpu_offload(build(), offload_buffers=True),
    "disk_offload": lambda folder: accelerate.disk_offload(build(), folder / "offload"),
    "dispatched": lambda folder: dispatched(build(), folder),
}
OTHER = {
    "bfloat16": lambda folder: build().bfloat16(),
    "float16": lambda folder: build().half(),
    "packed": lambda folder: packed(),
    "dequantized": lambda folder: packed().dequantize(torch.float32),
    "8 bits": lambda folder: in_bits(folder, load_in_8bit=True),
    "4 bits": in_4_bits,
    "4 bits twice": lambda folder: in_4_bits(folder, bnb_4bit_use_double_quant=True),
    "BatchNorm": lambda folder: convnet(),
    "BatchNorm, 8 bits": lambda folder: reopened(
        convnet(), folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    ),
    "cpu_offload, bfloat16": lambda folder: accelerate.cpu_offload(build().bfloat16()),
    "cpu_offload, packed": lambda folder: accelerate.cpu_offload(packed()),
    "cpu_offload with buffers, packed": lambda folder: accelerate.cpu_offload(packed(), offload_buffers=True),
    "cpu_offload, BatchNorm": lambda folder: accelerate.cpu_offload(convnet()),
    "dispatched, packed": lambda folder: dispatched(packed(), folder),
    "disk_offload, an LSTM": lambda folder: accelerate.disk_offload(
        build(memory_config=MEMORY | {"ordering": "lstm"}), folder / "offload"
    ),
}


@pytest.fixture(scope="module")
def plain():
    return build()


@pytest.fixture(scope="module", params=[*SAME, *OTHER])
def form(request, tmp_path_factory):
    model = (SAME | OTHER)[request.param](tmp_path_factory.mktemp("form"))
    model.is_same = request.param in SAME
    return model


def answer(model, question: dict, **kwargs) -> torch.Tensor:
    tokens = model.generate(**question, do_sample=False, max_new_tokens=4, **kwargs)
    return tokens[:, question["input_ids"].shape[1] :]


def logits(model, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**PICTURES, **kwargs).logits


class TestEveryVerbOnEveryForm:
    def test_write_and_ask(self, form, plain):
        own = form.memory_fingerprint()
        memory = form.write_memory(**FACTS)
        for question in (PICTURES, WORDS):
            on, off = (answer(form, question, memory=memory, memory_gate=gate) for gate in ("on", "off"))
            assert (on != off).any() and off.equal(answer(form, question))
            if form.is_same:
                assert on.equal(answer(plain, question, memory=memory, memory_gate="on"))
        assert (logits(form, memory=memory, memory_gate="on") != logits(form)).any()
        assert form.memory_fingerprint() == own == memory.fingerprint
        assert (own == plain.memory_fingerprint()) or not form.is_same

    def test_change_save_and_load(self, form, tmp_path):
        answer(form, PICTURES)  # a pass must not change the form
        memory = form.write_memory(form.write_memory(**FACTS), **FACTS)
        memory = form.edit_memory(form.forget(memory, 0), 0, FACTS["input_ids"][:1, 8:])
        memory.save(tmp_path / "memory")
        loaded = form.load_memory(tmp_path / "memory")
        assert loaded.counts.tolist() == [3]
        assert logits(form, memory=loaded, memory_gate="on").equal(logits(form, memory=memory, memory_gate="on"))


class TestCopies:
    """Two folders bring two copies of the code, with classes of their own."""

    @pytest.fixture(scope="class")
    def copy(self, tmp_path_factory):
        return second_copy(tmp_path_factory.mktemp("copy"))

    def test_memories(self, copy, plain, tmp_path):
        for writer, reader in ((plain, copy), (copy, plain)):
            memory = writer.write_memory(**FACTS)
            more = reader.write_memory(memory, **FACTS)
            assert more.counts.tolist() == [4] and reader.forget(more, 3).counts.tolist() == [3]
            assert more.merge(reader.write_memory(**FACTS)).counts.tolist() == [6]
            assert more.stack([more, reader.write_memory(**FACTS)]).counts.tolist() == [4, 2]
            memory.save(tmp_path / "memory")
            reader.load_memory(tmp_path / "memory")
        with pytest.raises(
            TypeError, match=r"^memory must be a MemoryState, got dict: load_memory\(\) opens a file\.$"
        ):
            copy.forget({}, 0)

    @torch.no_grad()
    def test_caches_and_readouts(self, copy, plain):
        """A text goes on from the cache of the other copy, memory included; and takes its read-out."""
        assert type(copy.write_memory(**FACTS)) is not type(plain.write_memory(**FACTS))
        memory, more = copy.write_memory(**FACTS), {"input_ids": torch.tensor([[9, 17], [23, 5]])}
        for first, second in ((plain, copy), (copy, plain)):
            caches = [first(**PICTURES, memory=memory, memory_gate="on", use_cache=True)[CACHE_NAME] for _ in range(2)]
            on, own = (model(**more, **{CACHE_NAME: cache}).logits for model, cache in zip((second, first), caches))
            torch.testing.assert_close(on, own)
            again = second(**PICTURES, memory=memory, memory_gate="off", **{CACHE_NAME: caches[0]})[CACHE_NAME]
            assert again is caches[0] and not again.num_memory_tokens


class TestFingerprint:
    def test_counters_do_not_count(self):
        model = convnet()
        own, key = model.memory_fingerprint(), "model.vision_tower.timm_model.bn1."
        model.load_state_dict({key + "num_batches_tracked": torch.tensor(7)}, strict=False)
        assert model.train().eval().memory_fingerprint() == own
        model.load_state_dict({key + "running_mean": torch.ones(32)}, strict=False)
        assert model.memory_fingerprint() != own

    def test_four_bits_keep_their_form(self, tmp_path):
        """Those of the decoder may change to what this processor multiplies faster."""
        model = in_4_bits(tmp_path)
        packs = {name.split(".")[1]: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
        assert set(packs) == {"language_model", "memory", "memory_projection"}
        assert not packs["memory"].support_avx512bf16_for_cpu
        decoder = packs["language_model"].support_avx512bf16_for_cpu
        assert decoder == Linear4bit(64, 64).support_avx512bf16_for_cpu

    def test_sharded_weights(self, plain):
        init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        try:
            model, mesh = build(), init_device_mesh("cpu", (1,))
            for module in (model.get_input_embeddings(), model.model.memory.key_encoder.image_fc1):
                weight = distribute_tensor(module.weight.detach(), mesh, [Shard(0)])
                module.weight = torch.nn.Parameter(weight)
            assert model.memory_fingerprint() == plain.memory_fingerprint()
        finally:
            destroy_process_group()

    def test_fully_sharded(self, plain):
        """FSDP2 has the weights together in a pass only, and the verbs are none."""
        init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        try:
            model, mesh, memory = build(), init_device_mesh("cpu", (1,)), plain.write_memory(**FACTS)
            for part in (*model.model.language_model.layers, model):
                fully_shard(part, mesh=mesh)
            for verb in (
                lambda: model.new_memory(),
                lambda: model.write_memory(**FACTS),
                lambda: model.forget(memory, 0),
                lambda: answer(model, PICTURES, memory=memory),
                lambda: model(**PICTURES, memory=memory),
            ):
                with pytest.raises(
                    ValueError, match="^a model that fully_shard.. split has no memory: .* Open it whole.$"
                ):
                    verb()
            assert logits(model).equal(logits(plain)) and answer(model, PICTURES).equal(answer(plain, PICTURES))
        finally:
            destroy_process_group()

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("form", ["meta", "dynamic"])
    def test_forms_without_a_memory(self, form, plain):
        if form == "meta":
            model, name = build().to("meta"), "embeddings.weight"
        else:
            model = torch.ao.quantization.quantize_dynamic(build(), {torch.nn.Linear}, dtype=torch.qint8)
            name = "memory.content_encoder.v_proj._packed_params._packed_params"
        memory = plain.write_memory(**FACTS)
        for verb in (
            lambda: model.new_memory(),
            lambda: model.write_memory(**FACTS),
            lambda: model.forget(memory, 0),
            lambda: model.load_memory("any"),
        ):
            with pytest.raises(ValueError) as error:
                verb()
            assert str(error.value) == (
                f"this form of the model has no memory, {name} is no tensor of numbers: "
                "open memory, vision tower and token embeddings as ordinary weights."
            )

    @pytest.mark.parametrize("start", [torch.float32, torch.bfloat16])
    def test_a_float16_copy_is_another_model(self, start, plain):
        """Small weights lose digits in float16, also those of bfloat16."""
        model = build().to(start)
        assert model.memory_fingerprint() == plain.memory_fingerprint()
        copy = model.half()
        assert copy.memory_fingerprint() != plain.memory_fingerprint() == build().double().memory_fingerprint()
        with pytest.raises(ValueError, match=r"^the memory was written by another model: its fingerprint is"):
            copy.forget(plain.write_memory(**FACTS), 0)


class TestOffloaded:
    def test_captions(self, plain, tmp_path):
        """Without a memory, too: the tower's class token and positions lie in timm's model itself."""
        for model in (accelerate.cpu_offload(build()), dispatched(build(), tmp_path)):
            torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=0)
            assert all(p.is_meta for p in model.model.vision_tower.timm_model.parameters(recurse=False))

    def test_alignment(self):
        model = build(use_fusion=True)
        wanted = model(**FACTS, return_alignment=True)
        found = accelerate.cpu_offload(model)(**FACTS, return_alignment=True)
        assert found.match_logits.equal(wanted.match_logits) and len(wanted.match_logits) == 2

    def test_back(self, plain):
        model = accelerate.cpu_offload(build())
        memory = model.write_memory(**FACTS)
        accelerate.hooks.remove_hook_from_submodules(model)
        assert logits(model, memory=memory, memory_gate="on").equal(logits(plain, memory=memory, memory_gate="on"))
        assert not any(p.is_meta for p in model.parameters())

    def test_an_error_takes_the_weights_away_again(self):
        model = accelerate.cpu_offload(build())
        with pytest.raises(Exception, match="Input height"):
            model.get_image_features(torch.zeros(1, 3, 8, 8))
        assert all(p.is_meta for p in model.parameters())
        answer(model, PICTURES)
