"""None"""

import argparse
import logging
import os
import re
import sys
from pathlib import Path

import torch
import yaml
from transformers import (
    AutoModelForImageTextToText,
    TrainingArguments,
    set_seed,
)

from microvlm.files import write_json, write_text
from microvlm.train.callbacks import EpochCallback
from microvlm.train.checkpoints import checkpoints, is_complete, newest_complete
from microvlm.train.curves import plot_curves
from microvlm.train.data import TrainingData, readable_rows
from microvlm.train.recipe import RECIPE_KEYS, load_recipe
from microvlm.train.setup import check_teacher, load_model, trainable_table
from microvlm.train.trainer import MicroVLMTrainer

STOPPED = 143  # exit code after SIGTERM, as a shell gives it


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file; keys:\n" + "; ".join(f"{k}: {v}" for k, v in RECIPE_KEYS.items()))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint in output_dir")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    recipe = load_recipe(options.recipe, options.set)
    defaults = {"remove_unused_columns": False, "label_names": ["labels"], "report_to": "none"}
    if recipe["data"].get("stream") is not None:
        defaults["ignore_data_skip"] = True  # the stream goes on from its own place
    args = TrainingArguments(**defaults | recipe["training"])
    if args.world_size < int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(
            f"{os.environ['WORLD_SIZE']} processes were started, but each would train alone: without a GPU set training.use_cpu: true."
        )
    output = Path(args.output_dir)
    starts = {"model": recipe["model"], "distillation.teacher": recipe.get("distillation", {}).get("teacher")}
    for key, start in starts.items():
        if start and Path(start).is_dir() and os.path.realpath(start) == os.path.realpath(output):
            raise ValueError(f"training.output_dir {output} is the folder of {key}, which the run would overwrite.")
    checkpoint = newest_complete(output) if options.resume else None
    if not options.resume and any(map(is_complete, checkpoints(output))):
        raise FileExistsError(
            f"{output} has checkpoints of a run: --resume goes on with it, or choose another output_dir."
        )
    set_seed(args.seed)

    processor, model = load_model(recipe)
    if args.process_index == 0:
        print(trainable_table(model), flush=True)
    data = TrainingData(recipe, args, processor, model)
    for name in recipe.get("compile") or []:
        model.get_submodule(name).compile()

    teacher, distillation = None, recipe.get("distillation", {})
    if distillation:
        teacher = AutoModelForImageTextToText.from_pretrained(
            distillation["teacher"], trust_remote_code=True, dtype=torch.float32
        )
        check_teacher(recipe["data"], model, teacher)
    evaluation = recipe.get("evaluation", {})
    fixed = None
    if evaluation.get("captions"):
        if data.validation is None:
            raise ValueError("evaluation.captions needs data.validation.")
        fixed = readable_rows(data.validation.shuffle(seed=args.seed), evaluation["captions"], processor)
    if args.process_index == 0:
        output.mkdir(parents=True, exist_ok=True)
        # pushed with the run: without hub_token
        training = {key: value for key, value in recipe["training"].items() if not key.endswith("_token")}
        write_text(output / "recipe.yaml", yaml.safe_dump(recipe | {"training": training}, sort_keys=False))
        write_text(output / "training_arguments.json", args.to_json_string())
    sources = recipe["data"]["train"]
    status = {
        "recipe": Path(options.recipe).stem,
        "base_model": recipe["model"],
        "stage": f"stage {match[1]}" if (match := re.search(r"stage(\d+)", Path(options.recipe).stem)) else "training",
        "data": sources if isinstance(sources, list) else [sources],
    }
    if data.validation is not None:
        path = recipe["data"]["validation"]
        status["validation_data"] = path if isinstance(path, str) else path[0]
    trainer = MicroVLMTrainer(
        model=model,
        args=args,
        train_dataset=data.rows,
        eval_dataset=data.validation,
        data_collator=data.collator,
        eval_collator=data.eval_collator,
        processing_class=processor,
        callbacks=[EpochCallback(data.collator)],
        loss_weights=recipe["loss_weights"],
        learning_rates=recipe.get("learning_rates"),
        muon=recipe.get("optimizer") == "muon",
        max_nonfinite_steps=recipe.get("max_nonfinite_steps", 3),
        caption_rows=fixed,
        memory_batches=data.memory_batches,
        teacher=teacher,
        temperature=distillation.get("temperature", 1.0),
        status=status,
    )
    if checkpoint is not None and trainer.stream is not None:
        trainer.resume_stream(checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    stopped = trainer.stop.agreed and trainer.state.global_step < trainer.state.max_steps
    if trainer.is_world_process_zero():
        if data.collator.unreadable:
            seen, bad = data.collator.seen, data.collator.unreadable
            print(f"{bad} of {seen} training rows could not be read and were skipped", flush=True)
        if trainer.total_time:
            print(f"waiting for data: {trainer.total_wait / trainer.total_time:.1%} of the training time", flush=True)
        write_json(output / "log.json", trainer.state.log_history)
        # a run that ends before its first log has no curves
        if any({"loss", "eval_loss"} & set(entry) for entry in trainer.state.log_history):
            plot_curves(trainer.state.log_history, output / "curves.png")
    if stopped:
        print(f"stopped by SIGTERM at step {trainer.state.global_step}: --resume goes on from there", flush=True)
    trainer.accelerator.wait_for_everyone()  # a launcher ends the other ranks as soon as one has ended
    if stopped:
        sys.exit(STOPPED)
    if args.push_to_hub:
        trainer.push_to_hub()  # saves first
    else:
        trainer.save_model()


if __name__ == "__main__":
    main()
