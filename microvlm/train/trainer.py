"""Train MicroVLM with all its losses."""

import json
import logging
import math
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm.optim
import torch
import torch.nn.functional as F
from transformers import (
    ProgressCallback,
    Trainer,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.trainer_utils import has_length

from ..data.augment import gray_copy
from ..data.rows import caption_length
from ..data.stream import CaptionStream
from ..evaluate.captions import caption_rows
from ..files import write_json
from ..hub import TAGS, TrainingStatus, check_repo, push_folder, write_card
from ..metrics import retrieval_recalls, scope_metrics, score
from .callbacks import LossBar, StepGuard, StopOnSignal, StreamEpoch
from .checkpoints import mark_complete, remove_checkpoint, rotate_checkpoints
from .gradcache import drawn_again, embedded_pairs, random_state
from .loading import SeededLengthGroupedSampler, TrackedCollator
from .losses import Episodes, match_loss, memory_losses
from .recipe import MEMORY_LOSSES
from .setup import check_patterns, parameter_count

ALIGNMENT_INPUTS = {"input_ids", "attention_mask", "labels", "pixel_values", "mm_encoder_outputs"}
EPISODE_INPUTS = (
    "support_features",
    "support_tokens",
    "support_active",
    "target_tokens",
    "known",
    "key_features",
)
logger = logging.getLogger("train_hf")


def labelled_logits(labels: torch.Tensor) -> dict[str, Any]:
    """Arguments of `forward` that spare the logits before the first position with a label, in labels (B, T)."""
    labelled = torch.nonzero((labels != -100).any(0)).flatten()
    if not len(labelled) or labelled[0] == 0:
        return {}
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    keep = labels.shape[1] - int(labelled[0]) + 1
    return {"logits_to_keep": keep, "shift_labels": shifted[:, -keep:].contiguous()}


class MicroVLMTrainer(Trainer):
    """`Trainer` whose loss is a weighted sum of the model's named parts, each logged apart.

    Of one step's rows, whether one process sees them in one batch, in accumulated micro-batches or on several ranks, the loss is the same:
    `lm` is a mean over the step's tokens, `align` the InfoNCE of all the step's pairs, where a pair's negatives are all other pairs of
    the step, of all ranks and micro-batches. Embeddings of the other micro-batches come from a pass without gradient before the step
    (GradCache, Gao et al., arXiv 2101.06983), those of other ranks are gathered; each process takes the gradient of the whole loss by
    its own embeddings, and these add up to the whole gradient. The other parts are means over micro-batches and ranks: the hardest
    picture of `match` and the negatives of `key` are looked for in the micro-batch.

    Args:
        loss_weights: weight per part; a part with weight 0 is not computed.
        learning_rates: regular expression on parameter names -> learning rate; the first that matches counts.
        eval_collator: collator of the evaluation data (no augmentation); default: the training one.
        muon: Muon (timm's) on the weights of linear layers, AdamW on the rest, instead of `args.optim`.
        max_nonfinite_steps: so many steps in a row whose loss or gradient is not finite end the run. None of them changes a weight
            or saves a checkpoint. With an fp16 scaler or DeepSpeed the loss alone is looked at.
        caption_rows: pictures that are captioned at every evaluation, rows of `load_rows`.
        memory_batches: episodes that the memory is evaluated on.
        teacher: a model of the same vocabulary and prompt for the `distill` loss, the mean over the step's tokens of
            KL(teacher || model) temperature^2 (Hinton et al., arXiv 1503.02531).
        temperature: both sides' logits are divided by it.
        status: what the model cards of the checkpoints say beside step, date and metrics; default: no cards.

    Raises:
        ValueError: a pattern of `learning_rates` that matches no parameter; the memory's losses with FSDP or DeepSpeed; label smoothing;
            a weight of `match` for a model without the fusion block.
        RuntimeError: too many steps without a finite loss and gradient; the message names their rows.
    """

    def __init__(
        self,
        *args,
        loss_weights: dict[str, float],
        learning_rates: dict[str, float] | None = None,
        eval_collator=None,
        muon: bool = False,
        max_nonfinite_steps: int = 3,
        caption_rows=None,
        memory_batches: list[dict] | None = None,
        teacher: torch.nn.Module | None = None,
        temperature: float = 1.0,
        status: dict[str, Any] | None = None,
        **kwargs,
    ):
        self.stream = kwargs["train_dataset"] if isinstance(kwargs.get("train_dataset"), CaptionStream) else None
        model = kwargs.get("model", args[0] if args else None)
        quantized = getattr(model, "is_quantized", False)
        if quantized and any(p.requires_grad for p in model.parameters()):
            model.is_quantized = (
                False  # Trainer asks for adapters on a quantised model; here whole modules train beside it
            )
        super().__init__(*args, **kwargs)
        if quantized:
            model.is_quantized = True
        if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and any(map(loss_weights.get, MEMORY_LOSSES)):
            raise ValueError(
                "the memory's losses are not for FSDP or DeepSpeed, which gather weights for the model's own forward alone: use DDP."
            )
        if self.args.label_smoothing_factor:
            raise ValueError("training.label_smoothing_factor does not reach the losses here: leave it out.")
        if loss_weights.get("match") and not self.model.config.use_fusion:
            raise ValueError("loss_weights: match needs a model with config.use_fusion.")
        self.eval_collator = eval_collator or self.data_collator
        self.loss_weights = loss_weights
        self.learning_rates = learning_rates or {}
        self.muon = muon
        self.teacher, self.temperature = teacher, temperature
        if teacher is not None:
            self.teacher = teacher.to(self.args.device).requires_grad_(False).eval()
        check_patterns("learning_rates", self.learning_rates, self.model)
        self.max_nonfinite_steps = max_nonfinite_steps
        self.caption_rows, self.memory_batches, self.status = caption_rows, memory_batches, status
        self.parts = defaultdict(lambda: [0.0, 0])  # sum and count since the last log, per training or evaluation part
        self.eval_prefix, self.eval_pairs, self.eval_batches, self.eval_repeats = "eval_", [], 0, False
        self.waited, self.logged_at, self.total_wait, self.total_time = 0.0, None, 0.0, 0.0
        self.nonfinite_rows, self.nonfinite_steps = [], 0
        self.batches, self.cursors = (
            0,
            {},
        )  # of a stream: batches so far, and where each worker stood behind its last one
        self.stop = StopOnSignal()
        for callback in (self.stop, StepGuard(self), *([StreamEpoch()] if self.stream else [])):
            self.add_callback(callback)
        if self.pop_callback(ProgressCallback):
            self.add_callback(LossBar())

    # ---- data

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        plain = self.data_collator
        self.data_collator = TrackedCollator(plain if is_training else self.eval_collator)
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

    def get_train_dataloader(self):
        if self.stream is None:
            return super().get_train_dataloader()
        self.stream.check_readers(self.args.dataloader_num_workers)
        return torch.utils.data.DataLoader(  # a stream shares its rows among ranks by itself
            self.stream,
            batch_size=self._train_batch_size,
            collate_fn=TrackedCollator(self.data_collator),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            prefetch_factor=self.args.dataloader_prefetch_factor,
            generator=torch.Generator().manual_seed(
                self.args.seed
            ),  # not training's numbers, which a resumed run has again
        )

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        batches, num_items = super().get_batch_samples(self._timed(epoch_iterator), num_batches, device)
        self.logged_at = self.logged_at or time.perf_counter()
        for batch in batches:
            self.batches += 1
            if (cursor := batch.pop("cursor", None)) is not None:
                self.cursors[cursor[0]] = cursor
        self.micro_batches = batches
        return batches, num_items

    def _timed(self, iterator: Iterator) -> Iterator:
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            if self.logged_at is not None:  # what comes before the first step is starting up, not waiting
                self.waited += time.perf_counter() - start
            yield batch

    # ---- loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.loss_weights.get("align") and len(self.micro_batches) > 1:
            index = next(i for i, batch in enumerate(self.micro_batches) if batch is inputs)
            if index == 0:  # not when the batches are fetched: a resumed run has its random numbers only after that
                self.step_pairs = self._embed_step(self.micro_batches)
            pairs, state = self.step_pairs[index]
            inputs, self.drawn = inputs | {"step_pairs": pairs}, state
        return super().training_step(model, inputs, num_items_in_batch)

    @torch.no_grad()
    def _embed_step(self, batches: list[dict]) -> list[tuple[tuple[torch.Tensor, int], tuple[torch.Tensor, ...]]]:
        """For each micro-batch of a step the embeddings of all the step's pairs, of all ranks, and the place of its own among them; and the
        state of the random numbers they were drawn with."""
        self.model_wrapped.train()
        own, states = [], []
        for batch in batches:
            inputs, _ = self._model_inputs(self._prepare_inputs(batch))
            inputs = {k: v for k, v in inputs.items() if k in ALIGNMENT_INPUTS}
            states.append(random_state(self.args.device))
            with self.compute_loss_context_manager():
                own.append(embedded_pairs(self.model_wrapped(**inputs, return_alignment="only", use_fusion=False)))
        ranks = self._gather_rows(torch.cat(own))
        everything, place, out = torch.cat(ranks), sum(map(len, ranks[: self.accelerator.process_index])), []
        for pairs, state in zip(own, states):
            out.append(((everything, place), state))
            place += len(pairs)
        return out

    def _gather_rows(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Tensors (R, ...) of all ranks, whose R may differ."""
        if self.accelerator.num_processes == 1:
            return [x]
        counts = self.accelerator.gather(torch.tensor([len(x)], device=x.device)).tolist()
        padded = torch.zeros(max(counts), *x.shape[1:], dtype=x.dtype, device=x.device)
        padded[: len(x)] = x
        return [part[:n] for part, n in zip(self.accelerator.gather(padded).split(max(counts)), counts)]

    def _model_inputs(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments of `forward` for a batch, and those of `memory_losses` for its episodes, if any."""
        inputs = {k: v for k, v in inputs.items() if k not in ("row_names", "cursor", "step_pairs")}
        episode = {k: inputs.pop(k) for k in EPISODE_INPUTS if k in inputs}
        inner = self.accelerator.unwrap_model(self.model_wrapped)
        if (
            support := inputs.pop("support_pixel_values", None)
        ) is not None:  # episodes of pictures: their features, now
            pictures = [inputs.pop("pixel_values"), support]
            if inner.config.memory_config.gray_weight:
                pictures.append(gray_copy(support))
            hidden = inner.model.vision_tower(torch.cat(pictures), do_pooling=False).last_hidden_state
            skip, pool = inner.model.vision_tower.num_prefix_tokens, inner.model.memory.key_encoder.pool
            query, *written = (pool(part, skip) for part in hidden.split(len(support)))
            inputs["vision_features"] = hidden[: len(support)]
            size = episode["support_active"].shape
            episode["support_features"] = torch.stack(written, 1).unflatten(0, size)
            episode["key_features"] = torch.stack([written[0], query, *written[1:]])
        if episode:
            episode |= {"vision_features": inputs["vision_features"], "input_ids": inputs["input_ids"]}
            episode["attention_mask"] = inputs["attention_mask"] * (
                inputs["labels"] == -100
            )  # the answer is no question
        if (features := inputs.pop("vision_features", None)) is not None and len(features):
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(last_hidden_state=features)}
        return inputs, episode

    def _alignment(self, model, outputs, step_pairs) -> torch.Tensor | None:
        """InfoNCE of the pairs of the whole step, with gradients to those at hand; evaluation takes the batch's own."""
        live = embedded_pairs(outputs)
        pairs, place = step_pairs or (live.detach(), 0)
        if step_pairs is None and model.training:
            ranks = self._gather_rows(live.detach())
            pairs, place = torch.cat(ranks), sum(map(len, ranks[: self.accelerator.process_index]))
        if not model.training and not self.eval_repeats:
            self.eval_pairs.append(live)
        pairs = torch.cat([pairs[:place], live, pairs[place + len(live) :]])
        if not len(pairs):
            return None
        return self.accelerator.unwrap_model(model).contrastive_loss(pairs[:, 0], pairs[:, 1])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        names, step_pairs = inputs.get("row_names", []), inputs.get("step_pairs")
        inputs, episode = self._model_inputs(inputs)
        align, match = (self.loss_weights.get(name, 0.0) for name in ("align", "match"))
        kwargs = {"return_alignment": True} if align or match else {}
        if not match:
            kwargs["use_fusion"] = False
        extra = {}
        if episode:
            kwargs["memory_readout"], extra = memory_losses(self.accelerator.unwrap_model(model), Episodes(**episode))
        if not model.training:
            num_items_in_batch = None  # Trainer's counts the rows of all ranks, repeated ones too
        if num_items_in_batch is not None:
            kwargs["num_items_in_batch"] = num_items_in_batch
        if model.training:
            kwargs |= {"use_cache": False} | labelled_logits(inputs["labels"])
        # else the memory's own losses alone; several ranks meet in the wrapped forward, so there it always runs
        weights = (align, match, self.loss_weights.get("lm", 1.0), self.loss_weights.get("distill"))
        speaks = not model.training or any(weights) or model is not self.model
        with drawn_again(None if step_pairs is None else self.drawn, self.args.device):
            outputs = model(**inputs, **kwargs) if speaks else None
        # With num_items_in_batch the LM term is this micro-batch's share of a mean over all tokens of the step, on all
        # ranks. Shares add up over micro-batches, but gradients are averaged over ranks: hence the factor. A term that
        # is a mean over its own micro-batch has to be divided by their number, or it would count that often. The
        # alignment is the whole step's on every micro-batch and rank, its gradient only that by the pairs at hand.
        shared = num_items_in_batch is not None
        steps = self.current_gradient_accumulation_steps if model.training and shared else 1
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices and shared else 1
        parts, loss = {}, 0.0
        if speaks:
            parts["lm"] = outputs.loss * ranks
            loss = self.loss_weights.get("lm", 1.0) * parts["lm"]
            if self.teacher is not None:
                parts["distill"] = self._distill(inputs, kwargs, outputs.logits) * ranks
                loss = loss + self.loss_weights["distill"] * parts["distill"]
        if align and outputs.image_embeds is not None:
            value = self._alignment(model, outputs, step_pairs)
            if value is not None:
                parts["align"] = value
                gradient = self.accelerator.num_processes * (value - value.detach()) if model.training else 0.0
                loss = loss + align * (value.detach() / steps + gradient)
        if match:
            extra["match"] = match_loss(outputs.match_logits)
        for name, value in extra.items():
            if value is None:  # a single pair has no other picture
                continue
            parts[name] = value
            if weight := self.loss_weights.get(name, 0.0):
                loss = loss + weight * value / steps
        if model.training and not bool(torch.isfinite(loss)):
            self.nonfinite_rows += names or ["rows without a name"]
            parts = dict.fromkeys(parts)  # counted nowhere, but known: ranks add up the same parts
        # in the log, a mean over training steps, or over evaluated rows
        weight = 1 if model.training else len(inputs["input_ids"]) * (not self.eval_repeats)
        for name, value in parts.items():
            scale = steps if name in ("lm", "distill") else 1  # a share back to a mean
            entry = self.parts[("" if model.training else self.eval_prefix) + name]
            counts = weight
            if name in ("lm", "distill") and not model.training:  # a mean over tokens, however they are batched
                counts = int((inputs["labels"][:, 1:] != -100).sum()) * (not self.eval_repeats)
            if value is not None:
                entry[0] += value.detach().item() * scale * counts
                entry[1] += counts
        return (loss, outputs) if return_outputs else loss

    def _distill(self, inputs: dict, kwargs: dict, logits: torch.Tensor) -> torch.Tensor:
        """KL from the teacher's distribution at every labelled token: its sum over the step's tokens' number, or its mean."""
        keep = {k: v for k, v in kwargs.items() if k == "logits_to_keep"}
        with torch.no_grad():
            passed = {k: v for k, v in inputs.items() if k != "labels"}
            target = self.teacher(**passed, **keep, use_cache=False).logits
        labels = kwargs.get("shift_labels")
        labels = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:] if labels is None else labels
        on = labels != -100
        log_p, log_q = (x[on].float().div(self.temperature).log_softmax(-1) for x in (target, logits))
        total = F.kl_div(log_q, log_p, reduction="sum", log_target=True) * self.temperature**2
        items = kwargs.get("num_items_in_batch")
        return total / (on.sum() if items is None else items)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.grad_norm = grad_norm.item() if isinstance(grad_norm, torch.Tensor) else grad_norm
        return grad_norm

    def agree(self) -> None:
        """What the ranks have to know of each other before a step: a loss or gradient that is not finite, a request to stop."""
        # with a scaler or DeepSpeed the gradient may overflow: they skip that step by themselves
        wrong = self.accelerator.scaler is None and not self.is_deepspeed_enabled and not math.isfinite(self.grad_norm)
        flags = torch.tensor([len(self.nonfinite_rows), int(wrong), int(self.stop.requested)], device=self.args.device)
        bad, wrong, stop = self.accelerator.reduce(flags, "sum").tolist()
        if not bad and not wrong:
            self.nonfinite_steps, self.stop.agreed = 0, bool(stop)
            return
        self.stop.agreed = False  # there is nothing to save
        names, self.nonfinite_rows = self.nonfinite_rows, []
        if not bad:  # any of the step's rows
            names = [name for batch in self.micro_batches for name in batch.get("row_names", [])]
        self.nonfinite_steps += 1
        step = self.state.global_step + 1
        message = f"the {'loss' if bad else 'gradient'} of step {step} is not finite"
        if names:
            logger.warning("%s: rows %s", message, ", ".join(names))
        if self.nonfinite_steps >= self.max_nonfinite_steps or self.is_deepspeed_enabled:
            raise RuntimeError(
                f"{message}, nor were those of the {self.nonfinite_steps - 1} steps before it: stopped. "
                f"Rows: {', '.join(names) or 'on other ranks'}."
            )
        if self.accelerator.scaler is None:  # a scaler skips the step by itself
            self.optimizer.zero_grad(set_to_none=True)

    # ---- logs, evaluation

    def _means(self, prefix: str) -> dict[str, float]:
        """Means of the parts under a prefix, over all ranks; their sums begin anew."""
        out = {}
        for key in [k for k in self.parts if k.startswith("eval_") == bool(prefix) and k.startswith(prefix)]:
            mean = torch.tensor(self.parts.pop(key), dtype=torch.float64, device=self.args.device)
            total, count = self.accelerator.reduce(mean, "sum").tolist()
            if count:
                out[f"{key}_loss"] = total / count
        return out

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._means("")
            now = time.perf_counter()
            elapsed = now - (self.logged_at or now)
            self.total_wait, self.total_time = self.total_wait + self.waited, self.total_time + elapsed
            if elapsed:
                logs["data_wait"] = self.waited / elapsed
            self.waited, self.logged_at = 0.0, now
        super().log(logs, start_time)

    def prediction_step(self, model, inputs, *args, **kwargs):
        """As the parent, without the rows that ranks are given a second time to fill up their last batches."""
        ranks, size = self.accelerator.num_processes, self.args.per_device_eval_batch_size
        before = (
            self.eval_batches * ranks + self.accelerator.process_index
        ) * size  # rows of earlier batches, of all ranks
        self.eval_batches += 1
        if ranks > 1 and has_length(self.callback_handler.eval_dataloader.dataset):
            new = len(self.callback_handler.eval_dataloader.dataset) - before
            self.eval_repeats = new <= 0
            inputs = {k: v[: max(1, new)] for k, v in inputs.items()}
        try:
            return super().prediction_step(model, inputs, *args, **kwargs)
        finally:
            self.eval_repeats = False

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs):
        """As the parent; more metrics: the parts of the loss, perplexity, retrieval, the memory's, and captions."""
        self.eval_prefix, self.eval_pairs = "eval_", []
        start = time.perf_counter()
        with torch.random.fork_rng():  # training goes on with the numbers it would have drawn
            return self._evaluation_loop(
                start, dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )

    def _evaluation_loop(self, start, dataloader, description, *args, metric_key_prefix, **kwargs):
        self.eval_batches = 0
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        found = {key.removeprefix("eval_"): value for key, value in self._means("eval_").items()}
        weights = {"lm": 1.0, "align": 0.0} | self.loss_weights
        found["loss"] = sum(weights.get(key.removesuffix("_loss"), 0.0) * value for key, value in found.items())
        if "lm_loss" in found:
            found["perplexity"] = math.exp(min(found["lm_loss"], 700.0))
        if self.eval_pairs:
            pairs = torch.cat(self._gather_rows(torch.cat(self.eval_pairs)))
            if len(pairs):
                found |= retrieval_recalls(pairs[:, 0], pairs[:, 1])
        self.eval_pairs = []
        if self.memory_batches:
            found |= self._evaluate_memory()
        if self.caption_rows is not None:
            found |= self._evaluate_captions()
        output.metrics.update({f"{metric_key_prefix}_{key}": value for key, value in found.items()})
        if self.logged_at is not None:  # evaluation is no part of the time that training waits in
            self.logged_at += time.perf_counter() - start
        return output

    @torch.no_grad()
    def _evaluate_memory(self) -> dict[str, float]:
        """Losses of the memory on fixed episodes, of the captions read with it, and how well ScopeNet decides."""
        model, probability, known = self.model_wrapped, [], []
        model.eval()
        self.eval_prefix = "eval_episode_"
        with torch.random.fork_rng():  # the same at every evaluation
            torch.manual_seed(self.args.seed)
            for batch in self.memory_batches:
                batch = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    _, outputs = self.compute_loss(model, batch, return_outputs=True)
                probability.append(outputs.scope_probability.float().cpu())
                known.append(batch["known"].cpu())
        self.eval_prefix, self.eval_pairs = "eval_", []
        means = {key.removeprefix("eval_episode_"): value for key, value in self._means("eval_episode_").items()}
        out = {key: value for key, value in means.items() if key.removesuffix("_loss") in MEMORY_LOSSES}
        out["episode_lm_loss"] = means["lm_loss"]
        return out | scope_metrics(torch.cat(probability), torch.cat(known))

    def _evaluate_captions(self) -> dict[str, float]:
        """Scores of free greedy captions of fixed pictures, which are also kept in `captions/step_N.json`."""
        model = self.accelerator.unwrap_model(self.model_wrapped)
        model.eval()
        with self.compute_loss_context_manager():
            said, references = caption_rows(model, self.processing_class, self.caption_rows)
        if self.is_world_process_zero():
            file = Path(self.args.output_dir) / "captions" / f"step_{self.state.global_step}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            pairs = [{"caption": c, "reference": r} for c, r in zip(said, references, strict=True)]
            write_json(file, pairs)
        return {f"caption_{name}": value for name, value in score(said, references).items()}

    # ---- checkpoints

    def _save_checkpoint(self, model, trial) -> None:
        """As the parent, with a marker written last: what was interrupted is told from what is complete, and only then old ones go.

        Behind a step that was not finite nothing is saved: the weights may be why.
        """
        if self.nonfinite_steps:
            logger.warning("no checkpoint at step %d, which was not finite", self.state.global_step)
            return
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            remove_checkpoint(folder)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.stream is not None:
            write_json(folder / f"data_rank{self.args.process_index}.json", self._data_state())
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder)
            rotate_checkpoints(folder.parent, limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _data_state(self) -> dict[str, Any]:
        readers = [self.accelerator.num_processes, self.args.dataloader_num_workers]
        names = ("shuffle_buffer", "seed", "limit", "group_size", "num_shards")
        order = {name: getattr(self.stream, name) for name in names}
        order["sources"] = None if self.status is None else self.status["data"]
        return {"readers": readers, "order": order, "batches": self.batches, "cursors": list(self.cursors.values())}

    def resume_stream(self, checkpoint: Path) -> None:
        """Let the stream go on behind the rows that this rank had seen.

        Raises:
            ValueError: the run had other ranks or workers, among which its shards were shared, or its rows came in another order.
        """
        own = checkpoint / f"data_rank{self.args.process_index}.json"
        state = json.loads((own if own.exists() else checkpoint / "data_rank0.json").read_text())
        now = self._data_state()
        readers = now["readers"]
        for name, value in state.get("order", {}).items():  # checkpoints of earlier versions do not say
            if value != now["order"][name]:
                raise ValueError(
                    f"{checkpoint} was written with {name} {value!r}; a stream goes on exactly with the same only, not with "
                    f"{now['order'][name]!r}."
                )
        if state["readers"] != readers:
            raise ValueError(
                f"{checkpoint} was written with {state['readers'][0]} ranks of {state['readers'][1]} data loader workers; a stream "
                f"goes on exactly with the same only, not with {readers[0]} of {readers[1]}."
            )
        self.batches, self.cursors = state["batches"], {c[0]: c for c in state["cursors"]}
        self.stream.go_on(self.batches, state["cursors"], self.args.dataloader_num_workers)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        wrapped = type(self.model)
        if self.is_fsdp_enabled:  # FSDP makes it a class of torch's, whose file would be copied, and unties its weights
            name = wrapped.__name__.removeprefix("FSDP")
            self.model.__class__ = next(cls for cls in wrapped.__mro__ if cls.__name__ == name)
            state_dict = {k: v for k, v in state_dict.items() if k not in self.model.all_tied_weights_keys}
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.model.__class__ = wrapped
        if self.status is not None and self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            write_card(folder, self._training_status())
            check_repo(folder)

    def _training_status(self) -> TrainingStatus:
        metrics = {}
        for entry in self.state.log_history:  # the newest of each
            metrics |= {k: v for k, v in entry.items() if k.startswith("eval_")}
        model = self.accelerator.unwrap_model(self.model)
        counts = {"parameters": 0, "trainable_parameters": 0}
        for parameter in model.parameters():
            counts["parameters"] += parameter_count(parameter)
            counts["trainable_parameters"] += parameter_count(parameter) * parameter.requires_grad
        text = model.config.text_config.model_type
        return TrainingStatus(
            **self.status,
            **counts,
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

    def create_model_card(self, **kwargs) -> None:
        """Write the card of `status`, not the parent's."""
        if self.status is None:
            super().create_model_card(**kwargs)
        elif self.is_world_process_zero():
            write_card(self.args.output_dir, self._training_status())

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero() and self.args.hub_strategy != "end":
            self._push(checkpoint_folder, f"Training in progress, step {self.state.global_step}")

    def push_to_hub(self, commit_message: str | None = "End of training", **kwargs):
        """Push the complete repo of `output_dir`."""
        self.save_model(_internal_call=True)
        if self.is_world_process_zero():
            return self._push(self.args.output_dir, commit_message, **kwargs)

    def _push(self, folder, message, private=None, token=None, revision=None):
        private = self.args.hub_private_repo if private is None else private
        repo_id = self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).name
        token, revision = token or self.args.hub_token, revision or self.args.hub_revision
        return push_folder(folder, repo_id, private, message, revision, token)

    # ---- optimizer

    def create_optimizer(self, model=None):
        if self.optimizer is None and (self.learning_rates or self.muon):
            decay = set(self.get_decay_parameter_names(self.model))
            head = self.model.get_output_embeddings()
            linear = {m.weight for m in self.model.modules() if isinstance(m, torch.nn.Linear) and m is not head}
            groups = defaultdict(list)
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    rate = next(
                        (r for p, r in self.learning_rates.items() if re.search(p, name)), self.args.learning_rate
                    )
                    groups[rate, name in decay, self.muon and parameter in linear].append(parameter)
            if self.muon:
                betas = (self.args.adam_beta1, self.args.adam_beta2)
                cls, kwargs = timm.optim.Muon, {"lr": self.args.learning_rate, "betas": betas, "nesterov": True}
            else:
                cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = cls(
                [
                    {"params": p, "lr": rate, "weight_decay": self.args.weight_decay if decays else 0.0}
                    | ({"use_fallback": not muon} if self.muon else {})
                    for (rate, decays, muon), p in groups.items()
                ],
                **kwargs,
            )
        return super().create_optimizer(model)
