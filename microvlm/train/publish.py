"""Write the model card of a run and push the run to the Hub."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..data.rows import list_paths
from ..hub import TAGS, TrainingStatus, push_folder
from .recipe import Recipe


def card_values(recipe: Recipe, name: str) -> dict[str, Any]:
    """Collect the values of `TrainingStatus` that stay the same during a run."""
    stage, validation = re.search(r"stage(\d+)", name), recipe.data.validation
    return {
        "recipe": name,
        "base_model": recipe.model,
        "stage": f"stage {stage[1]}" if stage else "training",
        "data": list_paths(recipe.data.train),
        "validation_data": list_paths(validation)[0] if validation else None,
    }


class PublishMixin:
    """The part of `MicroVLMTrainer` that describes the run and pushes it."""

    def training_status(self) -> TrainingStatus:
        """Describe the run as it is now, with its newest metrics."""
        metrics = {}
        for entry in self.state.log_history:
            metrics |= {k: v for k, v in entry.items() if k.startswith("eval_")}
        model = self.accelerator.unwrap_model(self.model)
        text = model.config.text_config.model_type
        return TrainingStatus(
            **self.options.card,
            parameters=model.num_parameters(),
            trainable_parameters=model.num_parameters(only_trainable=True),
            tags=[text if tag == "bitnet" else tag for tag in TAGS],
            global_step=self.state.global_step,
            max_steps=self.state.max_steps,
            finished=self.state.global_step >= self.state.max_steps,
            validation_loss=metrics.get("eval_loss"),
            date=datetime.now(UTC).isoformat(timespec="minutes"),
            metrics=metrics,
            effective_batch_size=self.get_total_train_batch_size(self.args),
            repo_id=self.args.hub_model_id,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero() and self.args.hub_strategy != "end":
            self._push(checkpoint_folder, f"Training in progress, step {self.state.global_step}")

    def push_to_hub(self, commit_message: str | None = "End of training", **kwargs):
        """Save and push the complete repo of `output_dir`."""
        self.save_model(_internal_call=True)
        if self.is_world_process_zero():
            return self._push(self.args.output_dir, commit_message, **kwargs)

    def _push(self, folder, message, private=None, token=None, revision=None):
        private = self.args.hub_private_repo if private is None else private
        repo_id = self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).name
        token, revision = token or self.args.hub_token, revision or self.args.hub_revision
        return push_folder(folder, repo_id, private, message, revision, token)
