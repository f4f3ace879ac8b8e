"""Score captions, retrieval and scope decisions."""

import re
from collections import Counter
from collections.abc import Iterable

import torch

ARTICLES = {"a", "an", "the"}


def normalise(caption: str, articles: bool = False) -> str:
    """Lower the case, keep letters and digits only, and drop articles unless `articles`."""
    words = re.sub(r"[^\w\s]", " ", caption.lower()).split()
    return " ".join(w for w in words if articles or w not in ARTICLES)


def word_f1(candidate: str, reference: str) -> float:
    """Compute the F1 of two normalised captions' words, as multisets."""
    a, b = candidate.split(), reference.split()
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if common else 0.0


def cider(candidates: list[str], references: list[str]) -> float:
    """Compute CIDEr-D of normalised captions with one reference each, by pycocoevalcap."""
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer(n=4, sigma=6.0)
    for candidate, reference in zip(candidates, references):
        scorer += (candidate, [reference])
    return float(scorer.compute_score()[0])


def score(candidates: list[str], references: list[str]) -> dict[str, float]:
    """Compute exact, word_f1, cider and the share of distinct captions from raw captions."""
    whole = [[normalise(c, articles=True) for c in captions] for captions in (candidates, references)]
    candidates, references = [normalise(c) for c in candidates], [normalise(r) for r in references]
    n = len(references)
    return {
        "exact": sum(c == r for c, r in zip(candidates, references)) / n,
        "word_f1": sum(map(word_f1, candidates, references)) / n,
        "cider": cider(*whole),
        "distinct": len(set(candidates)) / n,
    }


def ngram_scores(candidates: list[str], references: list[str]) -> dict[str, float]:
    """Compute bleu_1 to bleu_4 of the corpus and the mean rouge_l (beta 1.2); articles count."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.rouge.rouge import Rouge

    answers, truth = (
        {i: [normalise(c, articles=True)] for i, c in enumerate(captions)} for captions in (candidates, references)
    )
    bleu, _ = Bleu(4).compute_score(truth, answers, verbose=0)
    scores = {f"bleu_{n}": float(value) for n, value in enumerate(bleu, 1)}
    return scores | {"rouge_l": float(Rouge().compute_score(truth, answers)[0])}


def retrieval_recalls(image_embeds: torch.Tensor, text_embeds: torch.Tensor, ranks: Iterable[int] = (1, 5, 10)) -> dict:
    """Compute how often an image's own text is among the k nearest, and the reverse, for each k of `ranks`.

    Of R pairs the embeddings are unit vectors (R, C); equal texts count as each other's own.
    """
    similarity = image_embeds.double() @ text_embeds.double().mT
    text = torch.unique(text_embeds, dim=0, return_inverse=True)[1]
    same = text.unsqueeze(1) == text.unsqueeze(0)  # pairs of one text
    # the place of the best own text
    recalls = {}
    for name, scores in (("image_to_text", similarity), ("text_to_image", similarity.mT)):
        best = scores.masked_fill(~same, -torch.inf).amax(1, keepdim=True)
        place = ((scores > best) & ~same).sum(1)  # number of others that come before
        for k in ranks:
            recalls[f"{name}_recall_at_{k}"] = (place < k).float().mean().item()
    return recalls


def auroc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """Compute the probability that a positive score beats a negative one; a tie counts half."""
    difference = positive.double().unsqueeze(1) - negative.double().unsqueeze(0)
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def share_passing(scores: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Compute the share of scores (N,) at or above each of T thresholds, (T,)."""
    return (len(scores) - torch.searchsorted(scores.sort().values, thresholds)) / len(scores)


def roc(positive: torch.Tensor, negative: torch.Tensor) -> tuple[list[float], list[float]]:
    """Compute the shares of negatives and positives that pass each threshold, highest first."""
    thresholds = torch.cat([positive, negative]).unique().flip(0)
    return tuple([0.0, *share_passing(scores, thresholds).tolist()] for scores in (negative, positive))


def equal_error_rate(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """Compute the error rate at the threshold where misses and false alarms are closest."""
    thresholds = torch.cat([positive, negative])
    misses, alarms = 1 - share_passing(positive, thresholds), share_passing(negative, thresholds)
    best = (misses - alarms).abs().argmin()
    return float((misses[best] + alarms[best]) / 2)


def scope_metrics(probability: torch.Tensor, known: torch.Tensor) -> dict[str, float]:
    """Compute ScopeNet's AUROC and its accuracy at 0.5, balanced over known and unknown queries, both (N,)."""
    on, off = probability[known].double(), probability[~known].double()
    if not len(on) or not len(off):
        counts = f"got {len(on)} and {len(off)}."
        raise ValueError(f"scope metrics need queries that were written and such that were not, {counts}")
    accuracy = ((on >= 0.5).double().mean() + (off < 0.5).double().mean()) / 2
    return {"scope_accuracy": accuracy.item(), "scope_auroc": auroc(on, off)}
