"""Callbacks of a run: stop signals, steps that are not finite, epochs, progress."""

import logging
import math
import signal

import torch
from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class StopOnSignal(TrainerCallback):
    """On SIGTERM finish the step, save a checkpoint and stop; `StepGuard` agrees with other ranks."""

    def __init__(self):
        self.requested = self.agreed = False
        self.previous = None

    def _handle(self, signum, frame):
        self.requested = True

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous = signal.signal(signal.SIGTERM, self._handle)

    def on_step_end(self, args, state, control, **kwargs):
        if self.agreed and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self.previous)


class StepGuard(TrainerCallback):
    """Let the ranks agree before a step whether it is finite and whether to stop.

    As many steps in a row as `limit` that are not finite end the run. None of them changes a weight.
    """

    def __init__(self, trainer, stop: StopOnSignal, limit: int):
        self.trainer, self.stop, self.limit = trainer, stop, limit
        self.rows = []  # names of the rows of this rank's micro-batches without a finite loss
        self.bad_steps, self.grad_norm = 0, 0.0  # steps in a row that were not finite

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        accelerator, deepspeed = self.trainer.accelerator, self.trainer.is_deepspeed_enabled
        # with a scaler or DeepSpeed the gradient may overflow: they skip that step by themselves
        overflow = accelerator.scaler is None and not deepspeed and not math.isfinite(self.grad_norm)
        flags = torch.tensor([len(self.rows), int(overflow), int(self.stop.requested)], device=args.device)
        bad_rows, overflow, stop = accelerator.reduce(flags, "sum").tolist()
        if not bad_rows and not overflow:
            self.bad_steps, self.stop.agreed = 0, bool(stop)
            return
        # after such a step nothing is saved: the weights may be why
        self.stop.agreed = False
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
