"""Evaluate during a run: the terms of the loss, perplexity, retrieval, the memory, and captions."""

import math
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers.trainer_utils import has_length

from ..evaluate.captions import caption_rows
from ..files import write_json
from ..metrics import retrieval_recalls, scope_metrics, score
from .gradcache import gather_rows
from .losses import EPISODE_LOSSES


class Means:
    """Means of named values over batches and ranks."""

    def __init__(self):
        self.sums = defaultdict(lambda: [0.0, 0])

    def add(self, name: str, mean: float, count: int) -> None:
        """Add the mean of `count` values; with 0 the name alone."""
        total = self.sums[name]  # every rank must reduce the same names
        if count:
            total[0] += mean * count
            total[1] += count

    def take(self, accelerator) -> dict[str, float]:
        """Means over all ranks, as NAME_loss; the sums start again."""
        sums = {name: torch.tensor(x, dtype=torch.float64, device=accelerator.device) for name, x in self.sums.items()}
        self.sums.clear()
        totals = {name: total.tolist() for name, total in accelerator.reduce(sums, "sum").items()}
        return {f"{name}_loss": total / count for name, (total, count) in totals.items() if count}


@dataclass
class Evaluation:
    """What an evaluation has seen."""

    means: Means = field(default_factory=Means)  # of the terms
    pairs: list[torch.Tensor] = field(default_factory=list)  # embedded images and texts (R, 2, C) of each batch
    batches: int = 0
    repeated: bool = False  # this rank has the rows at hand a second time, to fill up its last batch


class EvaluationMixin:
    """The part of `MicroVLMTrainer` that evaluates."""

    def prediction_step(self, model, inputs, *args, **kwargs):
        """Evaluate a batch without repeated rows, which fill up the ranks' last batches."""
        ranks, size = self.accelerator.num_processes, self.args.per_device_eval_batch_size
        first = (self.evaluation.batches * ranks + self.accelerator.process_index) * size  # of this rank's rows
        self.evaluation.batches += 1
        if ranks > 1 and has_length(self.callback_handler.eval_dataloader.dataset):
            new = len(self.callback_handler.eval_dataloader.dataset) - first
            self.evaluation.repeated = new <= 0
            inputs = {k: v[: max(1, new)] for k, v in inputs.items()}
        try:
            return super().prediction_step(model, inputs, *args, **kwargs)
        finally:
            self.evaluation.repeated = False

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Evaluate like `super()`, with the metrics of this module."""
        start, self.evaluation = time.perf_counter(), Evaluation()
        with torch.random.fork_rng():  # training goes on with the numbers it would have drawn
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            metrics = self.evaluation.means.take(self.accelerator)
            weights = {term.name: term.weight for term in self.terms}
            metrics["loss"] = sum(weights.get(k.removesuffix("_loss"), 0.0) * v for k, v in metrics.items())
            if "lm_loss" in metrics:
                metrics["perplexity"] = math.exp(min(metrics["lm_loss"], 700.0))
            # retrieval among the rows of all ranks
            if self.evaluation.pairs:
                pairs = torch.cat(gather_rows(self.accelerator, torch.cat(self.evaluation.pairs)))
                metrics |= retrieval_recalls(pairs[:, 0], pairs[:, 1]) if len(pairs) else {}
            if self.options.memory_batches:
                metrics |= self.evaluate_memory()
            if self.options.caption_rows is not None:
                metrics |= self.evaluate_captions()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        self.clock.skip(time.perf_counter() - start)
        return output

    @torch.no_grad()
    def evaluate_memory(self) -> dict[str, float]:
        """Measure the memory on fixed episodes: its losses, captions, and ScopeNet's decisions."""
        model, probability, known, self.evaluation = self.model_wrapped, [], [], Evaluation()
        model.eval()
        with torch.random.fork_rng():  # the same at every evaluation
            torch.manual_seed(self.args.seed)
            for batch in self.options.memory_batches:
                batch = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    _, outputs = self.compute_loss(model, batch, return_outputs=True)
                probability.append(outputs.scope_probability.float().cpu())
                known.append(batch["known"].cpu())
        means = self.evaluation.means.take(self.accelerator)
        metrics = {name: value for name, value in means.items() if name.removesuffix("_loss") in EPISODE_LOSSES}
        metrics["episode_lm_loss"] = means["lm_loss"]
        return metrics | scope_metrics(torch.cat(probability), torch.cat(known))

    def evaluate_captions(self) -> dict[str, float]:
        """Score greedy captions of fixed images, and write them to `captions/step_N.json`."""
        model = self.accelerator.unwrap_model(self.model_wrapped)
        model.eval()
        with self.compute_loss_context_manager():
            captions, references = caption_rows(model, self.processing_class, self.options.caption_rows)
        if self.is_world_process_zero():
            file = Path(self.args.output_dir) / "captions" / f"step_{self.state.global_step}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, [{"caption": c, "reference": r} for c, r in zip(captions, references, strict=True)])
        return {f"caption_{name}": value for name, value in score(captions, references).items()}
