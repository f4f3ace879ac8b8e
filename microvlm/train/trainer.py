"""Train MicroVLM: `Trainer` with a loss of several terms, summed in `MicroVLMTrainer.compute_loss`."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Trainer

from ..data.stream import CaptionStream, caption_length
from ..model import require
from .callbacks import StepGuard, StreamEpoch
from .checkpoints import CheckpointMixin, StreamPosition
from .data import SeededLengthGroupedSampler, TrackedCollator, WaitClock
from .episodes import captioned_rows, memory_losses, split_inputs
from .evaluation import Evaluation, EvaluationMixin, Means
from .gradcache import embed_step, embedded_pairs, replayed_randomness
from .losses import EPISODE_LOSSES, Step, Term, labelled_logits, loss_terms
from .setup import build_optimizer, check_patterns, muon_matrices


@dataclass(kw_only=True)
class TrainerOptions:
    """What `MicroVLMTrainer` takes besides the arguments of `Trainer`."""

    loss_weights: dict[str, float]  # per term, see `losses`
    learning_rates: dict[str, float] | None = None  # regular expression on parameter names -> rate; the first counts
    muon: bool = False  # Muon on the weights of linear layers, AdamW on the rest, instead of `args.optim`
    max_nonfinite_steps: int = 3  # as many steps in a row without a finite loss and gradient end the run
    eval_collator: Any = None  # of the evaluation data, without augmentation; default: the training one
    caption_rows: Any = None  # rows of `load_rows` whose images are captioned at every evaluation
    memory_batches: list[dict] | None = None  # episodes that the memory is evaluated on
    teacher: torch.nn.Module | None = None  # a model with the same vocabulary and prompt for `distill`
    temperature: float = 1.0  # that model's and the teacher's logits are divided by
    card: dict[str, Any] | None = None  # constant values of `TrainingStatus`; default: checkpoints have no cards


class MicroVLMTrainer(CheckpointMixin, EvaluationMixin, Trainer):
    """`Trainer` whose loss is a weighted sum of named terms, each logged on its own.

    The loss of an optimizer step is the same however its rows are spread over micro-batches and ranks: `lm` is a mean
    over the step's tokens, `align` contrasts all the step's pairs. The other terms are means over micro-batches.
    """

    def __init__(self, *args, options: TrainerOptions, **kwargs):
        model = kwargs.get("model", args[0] if args else None)
        quantized = getattr(model, "is_quantized", False)
        if quantized and any(p.requires_grad for p in model.parameters()):
            model.is_quantized = False  # `Trainer` asks for adapters; here whole modules train next to quantised ones
        super().__init__(*args, **kwargs)
        if quantized:
            model.is_quantized = True
        self.options = options
        self._check(options.loss_weights)
        # terms of the loss, and what they measure
        if options.teacher is not None:
            options.teacher.to(self.args.device).requires_grad_(False).eval()
        self.terms = loss_terms(options.loss_weights, options.teacher, options.temperature)
        self.means, self.evaluation, self.clock = Means(), Evaluation(), WaitClock()
        # the place in a stream
        self.position = None
        if isinstance(self.train_dataset, CaptionStream):
            self.position = StreamPosition(self.train_dataset, self.args)
            self.add_callback(StreamEpoch())
        # stop signals, bad steps
        self.guard = StepGuard(self, options.max_nonfinite_steps)
        self.add_callback(self.guard)

    def _check(self, weights: dict[str, float]) -> None:
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        problem = "the memory's losses are not for FSDP or DeepSpeed, which gather weights for the model's own forward"
        require(not sharded or not any(map(weights.get, EPISODE_LOSSES)), f"{problem} alone: use DDP.")
        smoothing = self.args.label_smoothing_factor
        require(not smoothing, "training.label_smoothing_factor does not reach the losses here: leave it out.")
        fuses = self.model.config.use_fusion
        require(fuses or not weights.get("match"), "loss_weights: match needs a model with config.use_fusion.")
        check_patterns("learning_rates", self.options.learning_rates or {}, self.model)

    # ---- data

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        plain = self.data_collator
        self.data_collator = TrackedCollator(plain if is_training else self.options.eval_collator or plain)
        try:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        finally:
            self.data_collator = plain

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        lengths = [caption_length({"caption": caption}) for caption in rows["caption"]]
        group = self._train_batch_size * self.args.gradient_accumulation_steps
        return SeededLengthGroupedSampler(group, lengths, self.args.seed)

    def _get_eval_sampler(self, eval_dataset):
        # in order: the library would group by lengths, which our rows do not carry
        return torch.utils.data.SequentialSampler(eval_dataset) if self.args.world_size == 1 else None

    def get_train_dataloader(self):
        """Build the training data's loader; a stream shares its rows among ranks itself."""
        if self.position is None:
            return super().get_train_dataloader()
        self.train_dataset.check_readers(self.args.dataloader_num_workers)
        return torch.utils.data.DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=TrackedCollator(self.data_collator),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            prefetch_factor=self.args.dataloader_prefetch_factor,
            # own generator, so that resuming does not change training's random numbers
            generator=torch.Generator().manual_seed(self.args.seed),
        )

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """Fetch the micro-batches of an optimizer step, and keep them for its first pass."""
        start = time.perf_counter()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.clock.wait(time.perf_counter() - start)
        if self.position is not None:
            self.position.advance(batches)
        self.micro_batches = batches
        return batches, num_items

    # ---- loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Train on a micro-batch; first embed the pairs of the whole step."""
        if self.options.loss_weights.get("align") and len(self.micro_batches) > 1:
            index = next(i for i, batch in enumerate(self.micro_batches) if batch is inputs)
            if index == 0:  # not when they are fetched: a resumed run restores its random state only after that
                self.step_pairs = embed_step(self, map(self._forward_inputs, self.micro_batches))
            inputs = inputs | {"pairs": self.step_pairs[index]}
        return super().training_step(model, inputs, num_items_in_batch)

    def _forward_inputs(self, batch: dict[str, Any]) -> tuple[dict[str, Any], torch.BoolTensor | None]:
        model = self.accelerator.unwrap_model(self.model_wrapped)
        inputs, episodes = split_inputs(model, self._prepare_inputs(batch))
        return inputs, episodes and captioned_rows(model, inputs, episodes)

    def start_step(self, model, batch: dict[str, Any], num_items: torch.Tensor | int | None) -> Step:
        """Prepare a forward pass: arguments, episodes, and its part of the optimizer step."""
        inner, weights = self.accelerator.unwrap_model(model), self.options.loss_weights
        inputs, episodes = split_inputs(inner, batch)
        # write the episodes: the forward reads them
        losses, options = {}, {}
        if episodes is not None:
            options["memory_readout"], losses = memory_losses(inner, episodes)
        if weights.get("align") or weights.get("match"):
            options["return_alignment"] = True
        if not weights.get("match"):
            options["use_fusion"] = False
        if model.training:
            options |= {"use_cache": False} | labelled_logits(inputs["labels"])
        # in evaluation the number is of all ranks' rows, repeated ones too
        items = num_items if model.training else None
        summed = items is not None
        if summed:
            options["num_items_in_batch"] = items
        return Step(
            model=inner,
            inputs=inputs,
            options=options,
            accelerator=self.accelerator,
            items=items,
            micro_batches=self.current_gradient_accumulation_steps if summed else 1,
            ranks=self.accelerator.num_processes if summed and self.args.average_tokens_across_devices else 1,
            pairs=batch.get("pairs"),
            episode_losses=losses,
            captioned=episodes and captioned_rows(inner, inputs, episodes),
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum the weighted terms of the loss."""
        step = self.start_step(model, inputs, num_items_in_batch)
        # the forward pass, with the dropout of the step's first pass if it had one
        if not model.training or any(t.weight for t in self.terms if t.needs_forward) or model is not self.model:
            with replayed_randomness(step.pairs and step.pairs.random_state, self.args.device):
                step.outputs = model(**step.inputs, **step.options)
        # the terms: without a weight the memory's are only measured
        loss, values = 0.0, {}
        for term in self.terms:
            measurable = step.outputs is not None or not term.needs_forward
            if measurable and (value := term(step)) is not None:
                values[term] = value.detach()
                if term.weight or term.needs_forward:
                    loss = loss + term.share(term.weight * value, step)
        finite = not model.training or bool(torch.isfinite(loss))
        if not finite:
            self.guard.rows += inputs.get("row_names", ["rows without a name"])
        self._measure(step, values, finite)
        return (loss, step.outputs) if return_outputs else loss

    def _measure(self, step: Step, values: dict[Term, torch.Tensor], finite: bool) -> None:
        """Keep the terms for the log, or for the evaluation at hand."""
        seen = self.evaluation
        for term, value in values.items():
            if step.model.training:
                self.means.add(term.name, term.mean(value, step), int(finite))
            else:
                seen.means.add(term.name, term.mean(value, step), 0 if seen.repeated else term.count(step))
        if not step.model.training and not seen.repeated and self.options.loss_weights.get("align"):
            seen.pairs.append(embedded_pairs(step.outputs, step.captioned).detach())

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.guard.grad_norm = grad_norm.item() if isinstance(grad_norm, torch.Tensor) else grad_norm
        return grad_norm

    # ---- logs, optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log like `super()`, with the terms and the time spent waiting for data."""
        if "loss" in logs:
            logs |= self.means.take(self.accelerator) | self.clock.take()
        super().log(logs, start_time)

    def create_optimizer(self, model=None):
        """Build the optimizer, with a group per learning rate."""
        if self.optimizer is None and (self.options.learning_rates or self.options.muon):
            matrices = muon_matrices(self.model) if self.options.muon else set()
            self.optimizer = build_optimizer(self, self.options.learning_rates or {}, matrices)
        return super().create_optimizer(model)
