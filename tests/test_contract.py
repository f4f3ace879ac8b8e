"""transformers' own test mixins on this model, for three decoders, without and with a memory: `make contract`."""

import functools
import os
import unittest

import pytest
import torch
from conftest import CHAT_TEMPLATE, ROOT, VOCAB, MicroVLMConfig, MicroVLMForConditionalGeneration, tiny_config
from microvlm.modeling_microvlm import MicroVLMModel
from microvlm.processing_microvlm import MicroVLMImageProcessor, MicroVLMProcessor
from transformers import AutoTokenizer, GenerationMixin
from transformers.models.auto import modeling_auto

if "TRANSFORMERS_TESTS" not in os.environ:
    pytest.skip("TRANSFORMERS_TESTS names no tests/ folder of transformers: make contract", allow_module_level=True)

from mixins import MISSING, mixin

ModelTesterMixin = mixin("test_modeling_common", "ModelTesterMixin")
GenerationTesterMixin = mixin("generation.test_utils", "GenerationTesterMixin")
ConfigTester = mixin("test_configuration_common", "ConfigTester")
ProcessorTesterMixin = mixin("test_processing_common", "ProcessorTesterMixin")
ImageProcessingTester = mixin("test_image_processing_common", "ImageProcessingTester")
ImageProcessingTestMixin = mixin("test_image_processing_common", "ImageProcessingTestMixin")

# the mixins find a model's kind by these tables of the library's own models
modeling_auto.MODEL_MAPPING_NAMES.setdefault("microvlm", "MicroVLMModel")
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.setdefault("microvlm", "MicroVLMForConditionalGeneration")

pytestmark = pytest.mark.slow
P, SIDE, WORDS, IMAGE = 5, 32, 7, 5  # the mixins fill rows with tokens below 5, and shrink the vocabulary
MEMORY = {"num_slots": 16, "code_size": 32, "num_content_slots": 4, "num_memory_tokens": 4}
MEMORY |= {"max_content_tokens": 16, "key_hidden_size": 32, "scope_hidden_size": 16}


@pytest.mark.skipif(not MISSING, reason="a checkout of transformers holds all mixins")
def test_all_mixins_are_there():
    pytest.skip(f"the source archive lacks {', '.join(MISSING)}: give a checkout, see docs/contributing.md")


# ----------------------------------------------------------------------------------------------------------- the models


class Remembering(MicroVLMForConditionalGeneration, GenerationMixin):
    """Reads a memory that holds one fact in every pass and every caption."""

    _auto_class, generating = None, False

    def read(self, rows: int | None) -> dict:
        """What reads the memory: arguments of `generate`, or of a pass of some rows without an image of their own."""
        was_training, image = self.training, torch.linspace(-1, 1, 3 * SIDE * SIDE).view(1, 3, SIDE, SIDE)
        image, ids = image.to(self.device, self.dtype), torch.tensor([[IMAGE] * P + [9, 10, 11]], device=self.device)
        with torch.no_grad():
            memory = self.eval().write_memory(input_ids=ids, pixel_values=image)
            features = self.get_image_features(image.expand(rows or 1, -1, -1, -1), return_dict=True)
        self.train(was_training)
        if rows is None:
            return {"memory": memory, "memory_gate": "on"}
        return {"memory_readout": self.ask_memory(memory, "on", ids.expand(rows, -1), None, features)}

    @functools.wraps(MicroVLMForConditionalGeneration.forward)
    def forward(self, input_ids=None, **kwargs):
        if not (self.generating or self.device.type == "meta"):
            own = input_ids is not None and kwargs.get("pixel_values") is not None
            kwargs |= self.read(None if own else len(kwargs["inputs_embeds"] if input_ids is None else input_ids))
        return super().forward(input_ids, **kwargs)

    @functools.wraps(MicroVLMForConditionalGeneration.generate)
    def generate(self, inputs=None, *args, **kwargs):
        ids, was_generating = kwargs.get("input_ids") if inputs is None else inputs, self.generating
        rows = len(kwargs.get("inputs_embeds", [0]) if ids is None else ids)
        has_images = ids is not None and kwargs.get("pixel_values") is not None
        own = {} if was_generating else self.read(None if has_images else rows)
        self.generating = True
        try:
            return super().generate(inputs, *args, **kwargs, **own)
        finally:
            self.generating = was_generating


Remembering.__name__ = MicroVLMForConditionalGeneration.__name__  # for those tables


class ModelTester:
    """What the mixins ask of a model's own tester: sizes, a config and inputs."""

    batch_size, is_training = 3, True
    seq_length = encoder_seq_length = P + WORDS
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, VOCAB
    image_token_id = IMAGE

    def __init__(self, text: str, **config):
        self.text, self.config = text, config

    def get_config(self) -> MicroVLMConfig:
        return tiny_config(self.text, image_token_id=IMAGE, **self.config)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(IMAGE + 1, VOCAB, (self.batch_size, self.seq_length))
        ids[:, :P] = IMAGE
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return self.get_config(), {"pixel_values": torch.rand(self.batch_size, 3, SIDE, SIDE), **inputs}


class ModelContract(ModelTesterMixin, GenerationTesterMixin):
    text, config, all_model_classes = "qwen2", {}, (MicroVLMModel, MicroVLMForConditionalGeneration)
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True  # the files have no year
    test_all_params_have_gradient = False  # the alignment head is trained by `return_alignment` alone

    def setUp(self):
        self.model_tester = ModelTester(self.text, **self.config)
        self.config_tester = ConfigTester(self, config_class=MicroVLMConfig, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()

    def _image_features_get_expected_num_attentions(self, model_tester=None):
        return 1  # of the pooling: timm gives none

    def _image_features_get_expected_num_hidden_states(self, model_tester=None):
        return 2  # of timm's layers, without the embeddings before them

    def test_mismatching_num_image_tokens(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config).eval()
            model(**inputs)
            ids, pixels = inputs["input_ids"][:1], inputs["pixel_values"][:1]
            for wrong in (inputs | {"pixel_values": pixels}, {"input_ids": ids.repeat(2, 1), "pixel_values": pixels}):
                with self.assertRaises(ValueError):
                    model(**wrong)
            model(input_ids=ids.repeat(2, 1), pixel_values=pixels.repeat(2, 1, 1, 1))


class MemoryContract(ModelContract):
    config, all_model_classes = {"use_memory": True, "memory_config": MEMORY}, (MicroVLMModel, Remembering)

    def test_attention_outputs(self):
        """A read-out adds its S columns; the base model reads none by itself."""
        for model_class, columns in ((MicroVLMModel, 0), (Remembering, MEMORY["num_memory_tokens"])):
            self.all_model_classes, self.model_tester.key_length = (model_class,), P + WORDS + columns
            super().test_attention_outputs()

    def _check_attentions_for_generate(self, batch_size, attentions, *args, **kwargs):
        S = MEMORY["num_memory_tokens"]
        if attentions[0][0].shape[-1] > attentions[0][0].shape[-2]:  # assisted generation leaves the text's alone
            attentions = tuple(tuple(layer[..., :-S] for layer in step) for step in attentions)
        super()._check_attentions_for_generate(batch_size, attentions, *args, **kwargs)

    def test_training_gradient_checkpointing_use_reentrant_true(self):
        model = Remembering(self.model_tester.get_config()).train()
        model.gradient_checkpointing_enable({"use_reentrant": True})
        _, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        with self.assertRaisesRegex(ValueError, "gradient checkpointing with a memory needs use_reentrant=False"):
            model(**inputs, labels=inputs["input_ids"])


class Qwen2Test(ModelContract, unittest.TestCase):
    pass


class LlamaTest(ModelContract, unittest.TestCase):
    text = "llama"


class BitNetTest(ModelContract, unittest.TestCase):
    text = "bitnet"


class Qwen2MemoryTest(MemoryContract, unittest.TestCase):
    pass


class LlamaMemoryTest(MemoryContract, unittest.TestCase):
    text = "llama"


class BitNetMemoryTest(MemoryContract, unittest.TestCase):
    text = "bitnet"


# ------------------------------------------------------------------------------------------------------- the processors


class ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = MicroVLMProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return AutoTokenizer.from_pretrained(ROOT)

    @classmethod
    def _setup_image_processor(cls):
        return MicroVLMImageProcessor(size={"height": SIDE, "width": SIDE})

    @staticmethod
    def prepare_processor_dict():
        return {"chat_template": CHAT_TEMPLATE, "num_image_tokens": P}


class OwnImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent):
        super().__init__(
            parent, size={"height": 20, "width": 18}, image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.6, 0.7]
        )

    def _get_image_processing_classes(self):
        return {"torchvision": MicroVLMImageProcessor}


class ImageProcessorTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = OwnImageProcessingTester
