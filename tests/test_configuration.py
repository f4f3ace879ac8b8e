"""The configuration is a composite of transformers, and refuses sizes that contradict one another."""

import copy
import json
import pickle

import pytest
from conftest import IMAGE_ID, ROOT, VOCAB, tiny_config
from huggingface_hub.errors import StrictDataclassError
from microvlm.configuration_microvlm import AUTO_MAP, MicroVLMAdapterConfig, MicroVLMConfig
from transformers import Qwen2Config, TimmWrapperConfig

SUB_CONFIGS = ["vision_config", "text_config", "adapter_config", "memory_config", "alignment_config", "qat_config"]


def test_defaults_are_deit_tiny_and_qwen2():
    config = MicroVLMConfig()
    assert isinstance(config.vision_config, TimmWrapperConfig)
    assert config.vision_config.architecture == "deit_tiny_patch16_224"
    assert isinstance(config.text_config, Qwen2Config)
    assert (config.num_prefix_tokens, config.adapter_config.num_patches) == (25, 196)
    assert config.get_text_config() is config.text_config
    assert not (config.use_memory or config.use_fusion)


@pytest.mark.parametrize("name", SUB_CONFIGS)
def test_parts_load_from_the_whole(tmp_path, name):
    config = tiny_config(default_prompt_ids=[5, IMAGE_ID, 6])
    config.save_pretrained(tmp_path)
    part = getattr(config, name)
    loaded = type(part).from_pretrained(tmp_path)
    assert {**loaded.to_dict(), "transformers_version": None} == {**part.to_dict(), "transformers_version": None}
    alone = tmp_path / "alone"
    loaded.save_pretrained(alone)
    assert type(part).from_pretrained(alone).to_dict() == loaded.to_dict()


def test_round_trips(tmp_path):
    config = tiny_config(default_prompt_ids=[5, IMAGE_ID, 6], qat_config={"ternary_modules": ["x.*"]}, num_labels=5)
    assert MicroVLMConfig(**config.to_dict()).to_dict() == config.to_dict()
    assert json.loads(config.to_json_string())["text_config"]["vocab_size"] == VOCAB
    config.to_json_file(tmp_path / "config.json")
    assert MicroVLMConfig.from_json_file(tmp_path / "config.json").to_dict() == config.to_dict()
    config.save_pretrained(tmp_path / "sub" / "folder")
    assert MicroVLMConfig.from_pretrained(tmp_path / "sub", subfolder="folder").to_dict() == config.to_dict()
    assert copy.deepcopy(config).to_dict() == pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    assert len(config.id2label) == 5


def test_overrides_keep_the_other_values(tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    loaded = MicroVLMConfig.from_pretrained(tmp_path, text_config={"vocab_size": 20}, use_fusion=True)
    assert loaded.use_fusion
    assert loaded.text_config.to_dict() == {**config.text_config.to_dict(), "vocab_size": 20}
    assert loaded.adapter_config.to_dict() == config.adapter_config.to_dict()


@pytest.mark.parametrize("heads", [(2, 4), (4, 3), (4, 0)])
def test_heads_share_keys_evenly(heads):
    values = dict(zip(("num_attention_heads", "num_key_value_heads"), heads))
    with pytest.raises(StrictDataclassError, match=f"num_attention_heads .{heads[0]}. must be a multiple of"):
        tiny_config(text_config=tiny_config().text_config.to_dict() | values)


def test_sub_configs_may_be_objects():
    config = tiny_config(adapter_config=MicroVLMAdapterConfig(num_prefix_tokens=9, num_attention_heads=4))
    assert config.num_prefix_tokens == 9


def test_takes_no_positional_arguments():
    with pytest.raises(ValueError, match="accepts only keyword arguments"):
        MicroVLMConfig({"architecture": "deit_tiny_patch16_224"})


def test_saved_configuration_names_the_code_beside_it(tmp_path):
    config = tiny_config()
    config.auto_map = {"AutoConfig": "somewhere/else--configuration_microvlm.MicroVLMConfig"}
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == AUTO_MAP
    assert all((ROOT / f"{reference.split('.')[0]}.py").exists() for reference in AUTO_MAP.values())


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_variants_load(path):
    config = MicroVLMConfig.from_json_file(path)
    assert MicroVLMConfig(**config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize("tied", [True, False])
def test_tying_follows_the_text_model_unless_given(tied):
    text = tiny_config().text_config.to_dict() | {"tie_word_embeddings": tied}
    assert tiny_config(text_config=text).tie_word_embeddings is tied
    assert tiny_config(text_config=text, tie_word_embeddings=not tied).tie_word_embeddings is not tied


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"text_config": {"model_type": "gpt9"}},
            "text_config is not valid: Unrecognized model type for subconfig: gpt9. Should contain one of ",
        ),
        (
            {"vision_config": {"model_type": "clip_vision_model"}},
            "vision_config.model_type must be 'timm_wrapper' (any timm model), got 'clip_vision_model'.",
        ),
        (
            {"adapter_config": {"num_attention_heads": 5}},
            "adapter_config.num_attention_heads (5) must divide text_config.hidden_size (32).",
        ),
        ({"image_token_id": VOCAB}, "image_token_id (128) must be inside the text vocabulary of 128 tokens."),
        ({"image_token_id": -1}, "image_token_id (-1) must be inside the text vocabulary of 128 tokens."),
        (
            {"use_fusion": True, "alignment_config": {"fusion_num_attention_heads": 5}},
            "alignment_config.fusion_num_attention_heads (5) must divide text_config.hidden_size (32).",
        ),
        (
            {"default_prompt_ids": [5, 6]},
            "default_prompt_ids must hold image_token_id (4) exactly once, got [5, 6].",
        ),
        (
            {"default_prompt_ids": [4, 4, 5]},
            "default_prompt_ids must hold image_token_id (4) exactly once, got [4, 4, 5].",
        ),
        (
            {"default_prompt_ids": [4, VOCAB]},
            "default_prompt_ids must be inside the text vocabulary of 128 tokens, got [4, 128].",
        ),
        (
            {"qat_config": {"activation_bits": 1}},
            "qat_config is not valid: Validation error for field 'activation_bits'",
        ),
        (
            {"memory_config": {"address_ridge": -0.1}},
            "memory_config is not valid: Validation error for field 'address_ridge':\n    "
            "ValueError: Value must be greater or equal to 0, got -0.1.",
        ),
        (
            {"memory_config": {"address_temperature": 0.0}},
            "memory_config is not valid: Validation error for field 'address_temperature':\n    "
            "ValueError: Value must be greater than 0, got 0.0.",
        ),
        (
            {"qat_config": {"ternary_weights": "sign"}},
            "qat_config is not valid: Validation error for field 'ternary_weights':\n    "
            "TypeError: Field 'ternary_weights' expected one of ('absmean', 'none'), got sign",
        ),
    ],
)
def test_contradictions_are_refused(change, message):
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        tiny_config(**change)
    assert message in str(error.value)


def test_heads_of_an_absent_fusion_block_do_not_matter():
    tiny_config(alignment_config={"fusion_num_attention_heads": 5})


def test_missing_configuration_is_an_os_error(tmp_path):
    with pytest.raises(OSError):
        MicroVLMConfig.from_pretrained(tmp_path / "nowhere")
