"""What microvlm_mini.yaml calls: pictures and captions of a row, and the scores, those of microvlm evaluate."""

from microvlm.metrics import ngram_scores, score
from microvlm.model import to_rgb


def doc_to_visual(doc: dict) -> list:
    return [to_rgb(doc["image"])]


def doc_to_text(doc: dict) -> str:
    """Nothing: the checkpoint asks with its own prompt."""
    return ""


def doc_to_target(doc: dict) -> str:
    return doc["caption"].strip()


def process_results(doc: dict, results: list[str]) -> dict[str, tuple[str, str]]:
    """Every metric gets the pair of caption and reference: CIDEr and BLEU are of the whole set."""
    pair = ((results[0] if results else "").strip(), doc_to_target(doc))
    return dict.fromkeys(("exact", "word_f1", "cider", "distinct", "bleu_4", "rouge_l"), pair)


def aggregate(name: str):
    """The mean, or corpus score, `name` of all pairs."""

    def function(pairs: list[tuple[str, str]]) -> float:
        captions, references = map(list, zip(*pairs))
        scores = ngram_scores if name.startswith(("bleu", "rouge")) else score
        return scores(captions, references)[name]

    return function


exact, word_f1, cider, distinct, bleu_4, rouge_l = map(
    aggregate, ("exact", "word_f1", "cider", "distinct", "bleu_4", "rouge_l")
)
