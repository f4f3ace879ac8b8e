"""Callbacks of a training run: stop signals, epochs, bad gradients, progress."""

import logging
import signal

from transformers import (
    ProgressCallback,
    TrainerCallback,
)

from ..data.collators import CaptionCollator

logger = logging.getLogger(__name__)


class StopOnSignal(TrainerCallback):
    """On SIGTERM finishes the step at hand, saves a checkpoint and stops. `MicroVLMTrainer` lets all ranks agree on the step."""

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


class StreamEpoch(TrainerCallback):
    """For data without an end the share of the run counts as the epoch; `Trainer` would begin at 0 again after a resume."""

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step / state.max_steps


class LossBar(ProgressCallback):
    """Progress bar that shows the newest loss and its parts."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            shown = {k.removesuffix("_loss"): f"{v:.3g}" for k, v in logs.items() if k.endswith("loss")}
            if "data_wait" in logs:
                shown["wait"] = f"{logs['data_wait']:.0%}"
            self.training_bar.set_postfix(shown, refresh=False)
        elif state.is_world_process_zero and self.training_bar is not None and logs:
            self.training_bar.write(str({k: round(v, 4) if isinstance(v, float) else v for k, v in logs.items()}))


class EpochCallback(TrainerCallback):
    """Tells the collator the epoch, for its augmentation."""

    def __init__(self, collator: CaptionCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.set_epoch(int(state.epoch))


class StepGuard(TrainerCallback):
    """Before every optimizer step, ranks agree on whether loss and gradient were finite and whether to stop."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.agree()
