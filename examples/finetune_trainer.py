"""Fine-tune MicroVLM on images and captions with the plain Trainer of transformers.

    python examples/finetune_trainer.py --max-steps 40 --output runs/finetune_trainer

Needs nothing of this repository but the checkpoint: pip install "transformers[torch]" datasets timm torchvision

nano knows the captions of data/mini, so it learns a new habit: to name the style of an image after its caption.
Adapter and decoder layers train. Vision tower and embeddings stay, so the model can still read its memories.
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

ROOT = Path(__file__).resolve().parents[1]


class CaptionCollator:
    """Make batches of prompt, image, answer and end token; the loss is on answer and end token only."""

    def __init__(self, processor, prompt: str, answer: str):
        self.processor, self.prompt, self.answer = processor, prompt, answer

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        # prompts are padded on the left, answers on the right
        answers = [self.answer.format(**row) + tokenizer.eos_token for row in rows]
        answers = tokenizer(answers, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
        images = [[row["image"]] for row in rows]
        batch = self.processor(images=images, text=[self.prompt] * len(rows), return_tensors="pt")
        # joined, with labels for the answers only
        labels = answers["input_ids"].masked_fill(answers["attention_mask"] == 0, -100)
        batch["labels"] = torch.cat([torch.full_like(batch["input_ids"], -100), labels], 1)  # (B, prompt + answer)
        for name in ("input_ids", "attention_mask"):
            batch[name] = torch.cat([batch[name], answers[name]], 1)
        return batch


def parse_options(description: str, output: str, learning_rate: float) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT), help="MicroVLM checkpoint, a folder or Hub id")
    parser.add_argument("--data", default=str(ROOT / "data/mini"), help="folder or Hub id: splits train, validation")
    parser.add_argument("--answer", default="{caption} Style: {style}.", help="what to say, with the data's columns")
    parser.add_argument("--output", default=output)
    parser.add_argument("--max-steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--limit", type=int, help="use only the first LIMIT rows of each split")
    return parser.parse_args()


def load_splits(options: argparse.Namespace):
    """Load rows to train on and rows held out, with `image` and the columns of `--answer`."""
    splits = [load_dataset(options.data, split=name) for name in ("train", "validation")]
    return [rows.select(range(min(options.limit or len(rows), len(rows)))) for rows in splits]


@torch.no_grad()
def describe(model, processor, prompt: str, image) -> str:
    """Caption one image."""
    model.eval()
    inputs = processor(images=image, text=prompt, return_tensors="pt").to(model.device)
    out = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def load(name: str):
    """Open the model in float32, which rounds no small step away, and unpack it."""
    model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True, dtype=torch.float32)
    return model.dequantize(torch.float32) if getattr(model, "is_quantized", False) else model


def run(trainer, prompt: str) -> None:
    """Train all that `requires_grad`; print loss and a caption of held-out rows, before and after."""
    model, processor, held_out = trainer.model, trainer.processing_class, trainer.eval_dataset
    before = trainer.evaluate()["eval_loss"], describe(model, processor, prompt, held_out[0]["image"])
    seconds = trainer.train().metrics["train_runtime"]
    after = trainer.evaluate()["eval_loss"], describe(model, processor, prompt, held_out[0]["image"])
    trains, steps = sum(p.numel() for p in model.parameters() if p.requires_grad), trainer.state.global_step
    print(f"trained {trains:,} of {model.num_parameters():,} parameters, {steps} steps in {seconds:.0f} s")
    print(f"loss on {len(held_out)} held-out rows: {before[0]:.4f} before, {after[0]:.4f} after")
    print(f"before: {before[1]}\nafter: {after[1]}")


def train(model, processor, options: argparse.Namespace) -> Trainer:
    """Train with the plain Trainer."""
    rows, held_out = load_splits(options)
    prompt = processor.decode(model.config.default_prompt_ids)  # the one of generate(pixel_values=...)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output,
            max_steps=options.max_steps,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            logging_steps=10,
            save_strategy="no",
            remove_unused_columns=False,  # the collator reads the data's own columns
            label_names=["labels"],
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=CaptionCollator(processor, prompt, options.answer),
        processing_class=processor,  # saved with the model
    )
    run(trainer, prompt)
    return trainer


def main() -> None:
    options = parse_options(__doc__, "runs/finetune_trainer", learning_rate=3e-4)
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    model = load(options.model)
    model.requires_grad_(False)
    model.model.adapter.requires_grad_(True)
    model.model.language_model.layers.requires_grad_(True)
    train(model, processor, options).save_model()
    print(f"saved: {options.output}")


if __name__ == "__main__":
    main()
