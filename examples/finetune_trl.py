"""Fine-tune with TRL's SFTTrainer and its collator for images.

    python examples/finetune_trl.py --max-steps 40 --output runs/finetune_trl

Needs finetune_trainer.py and trl. A row has `prompt`, `completion` (messages) and `image`, so the loss is on the
completion only. With one list of `messages` TRL would train on the whole sequence, image placeholders included.
"""

import torch
from finetune_trainer import load, load_splits, parse_options, run
from transformers import AutoProcessor
from trl import SFTConfig, SFTTrainer

QUESTION = None  # words next to the image; V: "Describe the picture."


def to_messages(row: dict, answer: str) -> dict:
    """Write a row as a chat of one question and one answer."""
    content = [{"type": "image"}] + ([{"type": "text", "text": QUESTION}] if QUESTION else [])
    return {
        "prompt": [{"role": "user", "content": content}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": answer.format(**row)}]}],
    }


def main() -> None:
    options = parse_options(__doc__, "runs/finetune_trl", learning_rate=3e-4)
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    model = load(options.model)
    model.requires_grad_(False)
    model.model.adapter.requires_grad_(True)
    model.model.language_model.layers.requires_grad_(True)
    # chats with images
    rows, held_out = (
        split.map(to_messages, fn_kwargs={"answer": options.answer}).select_columns(["image", "prompt", "completion"])
        for split in load_splits(options)
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=options.output,
            max_steps=options.max_steps,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            bf16=torch.cuda.is_available(),  # SFTConfig's default is True
            activation_checkpointing=False,  # likewise: saves memory, costs time
            max_length=None,  # a cut sequence could lose image placeholders
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=processor,
    )
    run(trainer, processor.apply_chat_template(held_out[0]["prompt"], add_generation_prompt=True))
    trainer.save_model()
    print(f"saved: {options.output}")


if __name__ == "__main__":
    main()
