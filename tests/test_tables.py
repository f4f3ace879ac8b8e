"""The tables of docs/architecture.md: which vision towers and text models compose, and which carry a memory."""

from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT
from huggingface_hub.errors import StrictDataclassError
from microvlm.configuration_microvlm import MicroVLMConfig
from microvlm.modeling_microvlm import MicroVLMForConditionalGeneration
from microvlm.processing_microvlm import MicroVLMProcessor
from PIL import Image
from test_compose import SMALL_SWIN, write_text
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from microvlm.compose.compose import compose

TOKENS = {"depth": 1, "embed_dim": 16, "num_heads": 1}  # of a plain vision transformer
TOWERS = {  # family -> a timm model of it, and what makes it small
    "DeiT": ("deit_tiny_patch16_224", TOKENS),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", TOKENS),
    "ViT": ("vit_tiny_patch16_224", TOKENS),
    "CLIP": ("vit_base_patch32_clip_224", TOKENS),
    "SigLIP": ("vit_base_patch16_siglip_224", TOKENS),
    "DINOv2": ("vit_small_patch14_reg4_dinov2", TOKENS | {"img_size": 56}),
    "EVA-02": ("eva02_tiny_patch14_224", TOKENS),
    "BEiT": ("beit_base_patch16_224", TOKENS),
    "Swin": ("swin_tiny_patch4_window7_224", SMALL_SWIN),
    "Hiera": ("hiera_tiny_224", {"embed_dim": 8, "num_heads": 1, "stages": (1,) * 4}),
    "EfficientNet": ("test_efficientnet", {}),
    "MobileNetV3": ("mobilenetv3_small_050", {}),
    "MobileNetV4": ("mobilenetv4_conv_small_035", {}),
    "FastViT": ("fastvit_t8", {}),
    "RepViT": ("repvit_m0_9", {}),
    "ResNet": ("resnet10t", {}),
    "RegNet": ("regnetx_002", {}),
    "ConvNeXt": ("test_convnext", {}),
    "EfficientViT": ("efficientvit_b0", {}),
    "MobileViT": ("mobilevit_xxs", {}),
    "EdgeNeXt": ("edgenext_xx_small", {}),
    "PVT v2": ("pvt_v2_b0", {"depths": (1,) * 4}),
    "MaxViT": ("maxvit_rmlp_pico_rw_256", {}),
    "PiT": ("pit_ti_224", {}),
    "LeViT": ("levit_128s", {}),
    "CaiT": ("cait_xxs24_224", TOKENS),
    "XCiT": ("xcit_nano_12_p16_224", TOKENS),
}


REASONS = {  # what the refusal says -> what the table says
    "it is neither a vision transformer nor a convnet, whose features have places": "no, its features have no places",
    "has tensors that are not laid out as": "no, other tensors",
    "the logits differ from the text model's": "no, other logits",
    "needs a text model with full attention in a layer": "no, no layer of full attention",
}


def reason(error: Exception) -> str:
    """Say why something is refused; what is not in `REASONS` is said in full."""
    text = f"{error} {error.__cause__}"
    return next((words for sentence, words in REASONS.items() if sentence in text), text)


def read_table(header: str) -> list[list[str]]:
    """Read the cells of the table under a header line of docs/architecture.md."""
    text = (ROOT / "docs/architecture.md").read_text()
    lines = text[text.index(header) :].splitlines()[2:]
    lines = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), None)]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def remembers(folder: Path) -> str:
    """Give a composed checkpoint a memory; write, read and forget a fact."""
    config = MicroVLMConfig.from_pretrained(folder)
    try:
        config = MicroVLMConfig.from_dict(config.to_dict() | {"use_memory": True})
    except StrictDataclassError as error:
        return reason(error)
    torch.manual_seed(0)
    model = MicroVLMForConditionalGeneration.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    processor = MicroVLMProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(images=Image.new("RGB", (40, 30), "red"), text="<image>a red circle", return_tensors="pt")
    memory = model.write_memory(**inputs)
    model.generate(pixel_values=inputs["pixel_values"], memory=memory, max_new_tokens=2)
    model.forget(memory, 0)
    return "yes"


def composed(vision: str, text: str, out: Path) -> list[str]:
    """Say whether two parts compose, and whether the result carries a memory."""
    try:
        compose(vision, text, out)
    except ValueError as error:
        return [reason(error), "–"]
    return ["yes", remembers(out)]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return str(write_text(tmp_path_factory.mktemp("text") / "qwen2", "qwen2"))


@pytest.mark.slow
def test_vision_towers(text, tmp_path):
    rows = []
    for i, (family, (architecture, sizes)) in enumerate(TOWERS.items()):
        torch.manual_seed(0)
        timm.models.save_for_hf(timm.create_model(architecture, **sizes), tmp_path / f"vision{i}", model_args=sizes)
        rows.append([family, f"`{architecture}`", *composed(str(tmp_path / f"vision{i}"), text, tmp_path / f"out{i}")])
        print(rows[-1], flush=True)
    assert read_table("| tower | tried with | composes | carries memory |") == rows


SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_chunk_size": 8}
MAMBA |= {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 32}
LINEAR = {f"linear_{name}": size for name, size in (("key_head_dim", 16), ("value_head_dim", 16))}
LINEAR |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
TEXTS = {  # family -> `model_type`, and sizes other than those above
    "Qwen2, Qwen2.5": ("qwen2", {}),
    "Qwen3": ("qwen3", {}),
    "Qwen3.5": ("qwen3_5_text", LINEAR | {"layer_types": ["linear_attention", "full_attention"]}),
    "Llama, SmolLM2": ("llama", {}),
    "SmolLM3": ("smollm3", {}),
    "Mistral": ("mistral", {"sliding_window": None}),
    "Mistral with windows": ("mistral", {"sliding_window": 8}),
    "Ministral 3": ("ministral3", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", MIXED),
    "Phi-3, Phi-4": ("phi3", {}),
    "Gemma": ("gemma", {}),
    "Gemma 2": ("gemma2", MIXED),
    "Gemma 3": ("gemma3_text", MIXED),
    "Granite": ("granite", {"logits_scaling": 8.0}),
    "Granite 4 H": ("granitemoehybrid", MAMBA | {"layer_types": ["mamba", "attention"]}),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "Cohere": ("cohere", {"logit_scale": 0.5}),
    "Cohere 2": ("cohere2", MIXED),
    "Falcon-H1": ("falcon_h1", MAMBA | {"mamba_d_ssm": 128}),
    "BitNet": ("bitnet", {}),
    "Helium": ("helium", {}),
    "EXAONE 4": ("exaone4", MIXED),
    "ERNIE 4.5": ("ernie4_5", {}),
    "Seed-OSS": ("seed_oss", {}),
    "GLM-4": ("glm4", {"partial_rotary_factor": 0.5}),
    "StableLM": ("stablelm", {}),
    "StarCoder2": ("starcoder2", {}),
    "Mamba 2": ("mamba2", {"num_heads": 4, "head_dim": 32, "state_size": 8, "n_groups": 1}),
    "GPT-2": ("gpt2", {}),
    "GPT-NeoX, Pythia": ("gpt_neox", {}),
    "OPT": ("opt", {}),
}


def write_family(folder: Path, source: str, model_type: str, sizes: dict) -> str:
    """Write a text model with random weights and the tokenizer of `source`."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES | sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_text_models(text, tmp_path):
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model("test_vit"), tmp_path / "vision")
    rows = []
    with torch.compiler.set_stance("force_eager"):  # BitNet's layers in transformers are compiled functions
        for i, (family, (model_type, sizes)) in enumerate(TEXTS.items()):
            source = write_family(tmp_path / f"text{i}", text, model_type, sizes)
            rows.append([family, f"`{model_type}`", *composed(str(tmp_path / "vision"), source, tmp_path / f"out{i}")])
            print(rows[-1], flush=True)
    assert read_table("| text model | `model_type` | composes | carries memory |") == rows
