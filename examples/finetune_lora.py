"""Fine-tune with PEFT's LoRA: branches of the decoder's linear layers, and the whole adapter.

    python examples/finetune_lora.py --max-steps 40 --output runs/finetune_lora

Needs finetune_trainer.py and peft. The output folder holds only what was trained, and loads onto its base:

    model = AutoModelForImageTextToText.from_pretrained("MODEL", trust_remote_code=True, dtype=torch.float32)
    model = model.dequantize(torch.float32)  # if it is packed, as nano is
    model.load_adapter("runs/finetune_lora")

A branch can be added to a plain weight, as in V; then OUTPUT/merged is a whole checkpoint. Ternary layers (nano, M)
round their weights in every pass and would round the branch away: there it stays a branch.
"""

from pathlib import Path

import torch
from finetune_trainer import load, parse_options, train
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoProcessor, set_seed


@torch.no_grad()
def logits_of(model, batch) -> torch.Tensor:
    return model.eval()(**batch).logits


def save_and_check(trainer, output: str, base, merge_base) -> None:
    """Save and load onto `base`; save a merged `merge_base` if it is plain."""
    device, processor = trainer.model.device, trainer.processing_class
    rows = trainer.eval_dataset.select(range(min(8, len(trainer.eval_dataset))))
    batch = trainer.data_collator(list(rows)).to(device)
    logits = logits_of(trainer.model, batch)
    # the branches alone
    trainer.model.save_pretrained(output)
    processor.save_pretrained(output)
    loaded = PeftModel.from_pretrained(base, output).to(device)
    print(f"saved: {output}; loaded again, the logits are equal: {torch.equal(logits_of(loaded, batch), logits)}")
    # added to the weights
    merged = PeftModel.from_pretrained(merge_base, output).merge_and_unload().to(device)
    moved = (logits_of(merged, batch) - logits).abs().max().item()
    if merged.config.qat_config.ternary_modules:
        print(f"merged: the logits move by {moved:.2g}, not saved")
        return
    merged.save_pretrained(Path(output) / "merged")
    processor.save_pretrained(Path(output) / "merged")
    print(f"merged: the logits move by {moved:.2g}, saved: {Path(output) / 'merged'}")


def main() -> None:
    options = parse_options(__doc__, "runs/finetune_lora", learning_rate=2e-3)
    set_seed(0)
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    config = LoraConfig(
        task_type="CAUSAL_LM",  # without it adapter_config.json names a module of this machine's cache
        r=16,
        lora_alpha=32,
        target_modules=r"model\.language_model\.layers\..*_proj",
        modules_to_save=["adapter"],
    )
    model = get_peft_model(load(options.model), config)
    trainer = train(model, processor, options)
    save_and_check(trainer, options.output, load(options.model), load(options.model))


if __name__ == "__main__":
    main()
