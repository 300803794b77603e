"""ROUGE scores of generated responses on held-out rows."""

from collections.abc import Sequence

from utils.report.curves import ROUGE_NAMES


def rouge_of_texts(responses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The mean F1 of ROUGE-1, 2 and L, 0 to 1, with words reduced to their stems."""
    from rouge_score.rouge_scorer import RougeScorer  # optional, and imports nltk

    scorer = RougeScorer(list(ROUGE_NAMES), use_stemmer=True)
    scores = [scorer.score(reference, response) for response, reference in zip(responses, references, strict=True)]
    return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in ROUGE_NAMES}


def rouge_text(scores: dict[str, float]) -> str:
    """Scores as a part of a log line."""
    return ", ".join(f"{shown} {scores[name]:.4f}" for name, shown in ROUGE_NAMES.items())
