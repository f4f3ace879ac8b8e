"""Score captions, retrieval and scope decisions."""

import re
import shutil
from collections import Counter
from collections.abc import Iterable
from functools import cache
from io import BytesIO

import torch

ARTICLES = {"a", "an", "the"}


def normalise(caption: str, articles: bool = False) -> str:
    """Lower case, letters and digits only, without articles or with them."""
    words = re.sub(r"[^\w\s]", " ", caption.lower()).split()
    return " ".join(w for w in words if articles or w not in ARTICLES)


def word_f1(candidate: str, reference: str) -> float:
    """F1 of the two normalised captions' words, as multisets."""
    a, b = candidate.split(), reference.split()
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if common else 0.0


def cider(candidates: list[str], references: list[str]) -> float:
    """CIDEr-D of normalised captions, one reference each; pycocoevalcap's scorer."""
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer(n=4, sigma=6.0)
    for candidate, reference in zip(candidates, references):
        scorer += (candidate, [reference])
    return float(scorer.compute_score()[0])


def score(candidates: list[str], references: list[str]) -> dict[str, float]:
    """exact, word_f1, cider and the share of distinct captions of raw captions."""
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
    """bleu_1 to bleu_4 (of the corpus) and rouge_l (mean, beta 1.2) of raw captions, normalised with articles; one reference each."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.rouge.rouge import Rouge

    said, wanted = ([normalise(c, articles=True) for c in captions] for captions in (candidates, references))
    said, wanted = ({i: [c] for i, c in enumerate(captions)} for captions in (said, wanted))
    bleu, _ = Bleu(4).compute_score(wanted, said, verbose=0)
    out = {f"bleu_{n}": float(value) for n, value in enumerate(bleu, 1)}
    return out | {"rouge_l": float(Rouge().compute_score(wanted, said)[0])}


@cache
def meteor_scorer():
    """pycocoevalcap's METEOR, one Java process."""
    from pycocoevalcap.meteor.meteor import Meteor

    return Meteor()


def meteor(candidates: list[str], references: list[str]) -> float:
    """METEOR 1.5 of raw captions, normalised with articles; one reference each.

    Raises:
        RuntimeError: no Java, or the program fails.
    """
    if shutil.which("java") is None:
        raise RuntimeError("METEOR is a Java program, and there is no java here")
    scorer = meteor_scorer()
    said, wanted = ([normalise(c, articles=True) for c in captions] for captions in (candidates, references))
    said, wanted = ({i: [c] for i, c in enumerate(captions)} for captions in (said, wanted))
    try:
        return float(scorer.compute_score(wanted, said)[0])
    except (ValueError, OSError, KeyboardInterrupt) as error:  # no number came, the pipe is closed, or Ctrl-C
        meteor_scorer.cache_clear()
        if scorer.lock.locked():  # its end would wait for it
            scorer.lock.release()
        scorer.meteor_p.kill()
        scorer.meteor_p.stdin = BytesIO()  # closed again when the scorer goes
        if isinstance(error, KeyboardInterrupt):
            raise
        lines = scorer.meteor_p.stderr.read().decode(errors="replace").strip().splitlines()
        raise RuntimeError(f"METEOR's Java program failed: {lines[-1] if lines else error}") from error


def roc(known: torch.Tensor, unrelated: torch.Tensor) -> tuple[list[float], list[float]]:
    """Share of unrelated and of known pictures let through at every threshold, from (0, 0) to (1, 1)."""
    at = torch.cat([known, unrelated]).unique().flip(0)
    share = lambda x: [0.0, *(float((x >= t).double().mean()) for t in at)]  # noqa: E731
    return share(unrelated), share(known)


def retrieval_recalls(image_embeds: torch.Tensor, text_embeds: torch.Tensor, ranks: Iterable[int] = (1, 5, 10)) -> dict:
    """Share of pictures whose own text is among the k nearest of all R texts, and of texts likewise.

    Args:
        image_embeds: unit vectors (R, C).
        text_embeds: unit vectors (R, C); equal texts count as each other's own.
        ranks: the k.

    Returns:
        `image_to_text_recall_at_k` and `text_to_image_recall_at_k`.
    """
    similarity = image_embeds.double() @ text_embeds.double().mT
    text = torch.unique(text_embeds, dim=0, return_inverse=True)[1]
    same = text.unsqueeze(1) == text.unsqueeze(0)  # pairs of one text
    out = {}
    for name, scores in (("image_to_text", similarity), ("text_to_image", similarity.mT)):
        best = scores.masked_fill(~same, -torch.inf).amax(1, keepdim=True)
        place = ((scores > best) & ~same).sum(1)  # how many others come before
        for k in ranks:
            out[f"{name}_recall_at_{k}"] = (place < k).float().mean().item()
    return out


def scope_metrics(probability: torch.Tensor, known: torch.Tensor) -> dict[str, float]:
    """How well ScopeNet tells written from unwritten: accuracy balanced over both at 0.5, and AUROC.

    Args:
        probability: (N,).
        known: whether the query was written, (N,) bool.
    """
    on, off = probability[known].double(), probability[~known].double()
    if not len(on) or not len(off):
        raise ValueError(
            f"scope metrics need queries that were written and such that were not, got {len(on)} and {len(off)}."
        )
    wins = (on.unsqueeze(1) > off).double() + 0.5 * (on.unsqueeze(1) == off).double()
    accuracy = ((on >= 0.5).double().mean() + (off < 0.5).double().mean()) / 2
    return {"scope_accuracy": accuracy.item(), "scope_auroc": wins.mean().item()}


def auroc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    difference = positive.unsqueeze(1) - negative.unsqueeze(0)
    return float(((difference > 0).float() + 0.5 * (difference == 0).float()).mean())


def equal_error_rate(positive: torch.Tensor, negative: torch.Tensor) -> float:
    scores = torch.cat([positive, negative])
    misses = torch.stack([(positive < t).float().mean() for t in scores])
    alarms = torch.stack([(negative >= t).float().mean() for t in scores])
    best = (misses - alarms).abs().argmin()
    return float((misses[best] + alarms[best]) / 2)
