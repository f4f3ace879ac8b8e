"""Group parameters by learning rate and weight decay, for Muon or an optimizer of `TrainingArguments`."""

import re
from collections import defaultdict

import timm.optim
import torch


def build_optimizer(trainer, learning_rates: dict[str, float], muon: bool) -> torch.optim.Optimizer:
    """Build the optimizer of a trainer's model; the first pattern of `learning_rates` that matches counts."""
    model, args = trainer.model, trainer.args
    # what timm's Muon takes: matrices, but no table of words; AdamW takes the rest
    head = model.get_output_embeddings()
    linear = {m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head}
    # parameters that share rate, weight decay and rule
    decay, groups = set(trainer.get_decay_parameter_names(model)), defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = next((rate for p, rate in learning_rates.items() if re.search(p, name)), args.learning_rate)
            groups[rate, name in decay, muon and parameter in linear].append(parameter)
    if muon:
        betas = (args.adam_beta1, args.adam_beta2)
        kind, kwargs = timm.optim.Muon, {"lr": args.learning_rate, "betas": betas, "nesterov": True}
    else:
        kind, kwargs = trainer.get_optimizer_cls_and_kwargs(args)
    return kind(
        [
            {"params": parameters, "lr": rate, "weight_decay": args.weight_decay if decays else 0.0}
            | ({"use_fallback": not by_muon} if muon else {})
            for (rate, decays, by_muon), parameters in groups.items()
        ],
        **kwargs,
    )
