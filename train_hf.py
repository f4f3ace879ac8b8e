"""Train MicroVLM: one recipe, one run.

    python train_hf.py recipes/finetune.yaml
    python train_hf.py recipes/finetune.yaml --set training.max_steps=20 --set training.output_dir=runs/try
    torchrun --nproc_per_node 8 train_hf.py recipes/finetune.yaml --resume

The keys of a recipe are the dataclasses of `microvlm/train/recipe.py`. The terms of the loss are in
`microvlm/train/losses.py`, their sum is `MicroVLMTrainer.compute_loss`. A stage is a recipe; the next stage names the
output of this one in `model`.
"""

import argparse
import logging
import sys
from contextlib import nullcontext
from pathlib import Path

from transformers import TrainingArguments, set_seed

from microvlm.cli import app
from microvlm.files import locked, write_json
from microvlm.model import require
from microvlm.recipes import check_types, read_recipe
from microvlm.train import distill_vision, pretrain_text
from microvlm.train.callbacks import EpochCallback
from microvlm.train.checkpoints import card_values
from microvlm.train.data import TrainingData
from microvlm.train.recipe import Recipe, check_recipe
from microvlm.train.setup import (
    calibrate,
    check_output,
    load_model,
    load_teacher,
    trainable_table,
    training_arguments,
    write_settings,
)
from microvlm.train.trainer import MicroVLMTrainer, TrainerOptions

STOPPED = 143  # exit code after SIGTERM, as a shell gives it
KINDS = {"distill": distill_vision, "text": pretrain_text}  # recipes of the parts, by `kind`


def main(arguments: list[str] | None = None) -> None:
    """Train one recipe from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint in output_dir")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    # recipe
    values = read_recipe(options.recipe, options.set)
    if part := KINDS.get(str(values.get("kind"))):
        values = check_types(options.recipe, values, part.KEYS)
        with locked(Path(part.check(values))):
            return part.main(values)
    recipe = check_recipe(values, options.recipe)
    args = training_arguments(recipe)
    checkpoint = check_output(recipe, args, options.resume)
    with locked(Path(args.output_dir)) if args.process_index == 0 else nullcontext():
        train(recipe, args, checkpoint, Path(options.recipe).stem)


def train(recipe: Recipe, args: TrainingArguments, checkpoint: Path | None, name: str) -> None:
    """Train a recipe called `name`, from a checkpoint of its run if there is one."""
    set_seed(args.seed)
    # model
    processor, model = load_model(recipe)
    if args.process_index == 0:
        print(trainable_table(model), flush=True)
    # data
    data = TrainingData(recipe, args, processor, model)
    calibrate(model, data, recipe.calibration_rows)
    for module in recipe.compile:
        require(module in dict(model.named_modules()), f"compile: the model has no module {module!r}.")
        model.get_submodule(module).compile()
    # trainer
    trainer = MicroVLMTrainer(
        model=model,
        args=args,
        train_dataset=data.rows,
        eval_dataset=data.validation,
        data_collator=data.collator,
        processing_class=processor,
        callbacks=[EpochCallback(data.collator)],
        options=TrainerOptions(
            loss_weights=recipe.loss_weights,
            learning_rates=recipe.learning_rates,
            muon=recipe.optimizer == "muon",
            max_nonfinite_steps=recipe.max_nonfinite_steps,
            eval_collator=data.eval_collator,
            caption_rows=data.caption_rows,
            memory_batches=data.memory_batches,
            teacher=load_teacher(recipe, model),
            temperature=recipe.distillation.temperature if recipe.distillation else 1.0,
            card=card_values(recipe, name),
        ),
    )
    # train
    if checkpoint is not None and trainer.position is not None:
        trainer.position.resume(checkpoint)
    if args.process_index == 0:
        write_settings(recipe, args)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    # save
    finish(trainer)


def finish(trainer: MicroVLMTrainer) -> None:
    """Write the log, then save or push the model; exit 143 after SIGTERM."""
    state, collator, clock, output = trainer.state, trainer.data_collator, trainer.clock, Path(trainer.args.output_dir)
    stopped = trainer.guard.stop_agreed and state.global_step < state.max_steps
    if trainer.is_world_process_zero():
        if collator.unreadable:
            rows = f"{collator.unreadable} of {collator.seen} training rows"
            print(f"{rows} could not be read and were skipped", flush=True)
        if clock.total_time:
            print(f"waiting for data: {clock.total_wait / clock.total_time:.1%} of the training time", flush=True)
        write_json(output / "log.json", state.log_history)
    if stopped:
        print(f"stopped by SIGTERM at step {state.global_step}: --resume goes on from there", flush=True)
    trainer.accelerator.wait_for_everyone()  # a launcher ends the other ranks as soon as one has ended
    if stopped:
        sys.exit(STOPPED)
    # pushing saves first
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.save_model()


if __name__ == "__main__":
    app(["train", *sys.argv[1:]])  # one line and an exit code for what a recipe gets wrong
