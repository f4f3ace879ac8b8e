"""Give microvlm_mini.yaml images, captions and scores, the same as those of microvlm evaluate."""

from microvlm.metrics import ngram_scores, score
from microvlm.model import to_rgb

METRICS = ("exact", "word_f1", "cider", "distinct", "bleu_4", "rouge_l")


def doc_to_visual(doc: dict) -> list:
    return [to_rgb(doc["image"])]


def doc_to_text(doc: dict) -> str:
    """Ask nothing: the checkpoint asks with its own prompt."""
    return ""


def doc_to_target(doc: dict) -> str:
    return doc["caption"].strip()


def process_results(doc: dict, results: list[str]) -> dict[str, tuple[str, str]]:
    """Give every metric the caption and its reference: CIDEr is of the whole set."""
    pair = ((results[0] if results else "").strip(), doc_to_target(doc))
    return dict.fromkeys(METRICS, pair)


def aggregate(name: str):
    """Make the function that computes a metric of all pairs."""

    def function(pairs: list[tuple[str, str]]) -> float:
        captions, references = map(list, zip(*pairs))
        scores = ngram_scores if name.startswith(("bleu", "rouge")) else score
        return scores(captions, references)[name]

    return function


exact, word_f1, cider, distinct, bleu_4, rouge_l = map(aggregate, METRICS)
