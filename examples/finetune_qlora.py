"""Fine-tune in QLoRA's way: the frozen base in 4 bits (NF4), LoRA branches and adapter in float32.

    python examples/finetune_qlora.py --max-steps 40 --output runs/finetune_qlora
    python examples/finetune_qlora.py --model runs/v/stage2 --data my/captions --answer "{caption}"

Needs finetune_trainer.py, finetune_lora.py, peft and bitsandbytes; it also runs on a CPU. Made for V, whose decoder of
plain linear layers goes to 4 bits. The vision tower stays: its features are the memory's addresses. bitsandbytes leaves
ternary layers: with nano only the vision tower goes to 4 bits, which saves little.

The branches belong to the *rounded* base: load OUTPUT onto the same base in 4 bits. OUTPUT/merged (V) is the rounded
base in float32 with the branches added, a whole checkpoint. Merged in 4 bits they would be rounded away: they are
smaller than a step of NF4.
"""

import tempfile

import finetune_trainer
import torch
from bitsandbytes.nn import Linear4bit
from finetune_lora import save_and_check
from finetune_trainer import parse_options, train
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, set_seed


def load(name: str):
    """Open the model with one part in NF4, unless it is in 4 bits already."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=True)
    stored, source = config.to_dict().get("quantization_config") or {}, {}
    if not stored.get("load_in_4bit"):
        # a packed model: unpack, save, open again
        if stored:
            with tempfile.TemporaryDirectory() as folder:
                finetune_trainer.load(name).save_pretrained(folder)
                return load(folder)
        part = "vision_tower" if config.qat_config.ternary_modules else "language_model"
        source["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
            llm_int8_skip_modules=["lm_head", rf"model\.(?!{part}\.).*"],  # matched from the start of the whole name
        )
    model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True, dtype=torch.float32, **source)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # an evaluation on a CPU with AVX512-BF16 would repack the weights for a kernel without gradients
            module.support_avx512bf16_for_cpu = False
    return model


def add_lora(model):
    """Freeze all but the adapter and new branches of decoder layers and 4-bit layers."""
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
        or (name.startswith("model.language_model.layers.") and isinstance(module, nn.Linear))
    ]
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=targets, modules_to_save=["adapter"])
    return get_peft_model(model, config)


def main() -> None:
    options = parse_options(__doc__, "runs/finetune_qlora", learning_rate=2e-3)
    set_seed(0)
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    base = load(options.model)
    layers = sum(isinstance(module, Linear4bit) for module in base.modules())
    print(f"{layers} layers in 4 bits, the base takes {base.get_memory_footprint() / 1e6:.1f} MB")
    model = add_lora(base)
    trainer = train(model, processor, options)
    save_and_check(trainer, options.output, load(options.model), load(options.model).dequantize())


if __name__ == "__main__":
    main()
