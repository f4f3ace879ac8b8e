"""Callbacks of a run: stop signals, steps that are not finite, epochs."""

import logging
import math
import signal

import torch
from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class StepGuard(TrainerCallback):
    """Let the ranks agree before a step whether it is finite and whether to stop.

    Of the steps that are not finite none changes a weight; `limit` in a row end the run. After SIGTERM the step is
    finished, a checkpoint saved, and the run stopped.
    """

    def __init__(self, trainer, limit: int):
        self.trainer, self.limit = trainer, limit
        self.rows = []  # names of the rows of this rank's micro-batches without a finite loss
        self.bad_steps, self.grad_norm = 0, 0.0  # steps in a row that were not finite
        self.stop_requested = self.stop_agreed = False
        self.previous_handler = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous_handler = signal.signal(signal.SIGTERM, self._handle)

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self.previous_handler)

    def _handle(self, signum, frame):
        self.stop_requested = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.stop_agreed and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        return control

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        accelerator, deepspeed = self.trainer.accelerator, self.trainer.is_deepspeed_enabled
        parameters = [] if deepspeed or state.global_step else self.trainer.model.named_parameters()
        if idle := [name for name, p in parameters if p.requires_grad and p.grad is None]:
            advice = "leave them out of `trainable`, or give the loss that trains them a weight in `loss_weights`"
            logger.warning("%d trainable tensors get no gradient, such as %s: %s", len(idle), idle[0], advice)
        # with a scaler or DeepSpeed the gradient may overflow: they skip that step by themselves
        overflow = accelerator.scaler is None and not deepspeed and not math.isfinite(self.grad_norm)
        flags = torch.tensor([len(self.rows), int(overflow), int(self.stop_requested)], device=args.device)
        bad_rows, overflow, stop = accelerator.reduce(flags, "sum").tolist()
        if not bad_rows and not overflow:
            self.bad_steps, self.stop_agreed = 0, bool(stop)
            return
        # after such a step nothing is saved: the weights may be why
        self.stop_agreed = False
        self.bad_steps += 1
        rows, self.rows = self.rows, []
        if not bad_rows:  # any of the step's rows
            rows = [name for batch in self.trainer.micro_batches for name in batch.get("row_names", [])]
        message = f"the {'loss' if bad_rows else 'gradient'} of step {state.global_step + 1} is not finite"
        if rows:
            logger.warning("%s: rows %s", message, ", ".join(rows))
        if self.bad_steps >= self.limit or deepspeed:
            before = f"nor were those of the {self.bad_steps - 1} steps before it"
            raise RuntimeError(f"{message}, {before}: stopped. Rows: {', '.join(rows) or 'on other ranks'}.")
        if accelerator.scaler is None:  # a scaler skips the step by itself
            self.trainer.optimizer.zero_grad(set_to_none=True)


class StreamEpoch(TrainerCallback):
    """Count the share of the run as the epoch of a stream."""

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step / state.max_steps


class EpochCallback(TrainerCallback):
    """Give the collator the epoch, for its augmentation."""

    def __init__(self, collator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.set_epoch(int(state.epoch))
