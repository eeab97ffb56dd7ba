"""Free text beside reference answers, and how repetitive it is."""

import math
import re
import string
from collections import Counter
from collections.abc import Iterable

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORDS = re.compile(r"\w+(?:'\w+)?|[^\w\s]")
NGRAM_WEIGHTS = {2: 2 / 3, 3: 4 / 3}


def normalised(text: str) -> str:
    """Returns a text as SQuAD compares it: lower case, without punctuation, articles and extra spaces."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def exact_match(text: str, references: Iterable[str]) -> float:
    """Returns 1.0 if the text is one of the references, normalised; else 0.0."""
    return float(any(normalised(text) == normalised(reference) for reference in references))


def f1(text: str, references: Iterable[str]) -> float:
    """Returns the best F1 of the words that the text shares with a reference, normalised."""
    return max(_f1(normalised(text).split(), normalised(reference).split()) for reference in references)


def _f1(words: list[str], reference: list[str]) -> float:
    if not words or not reference:
        return float(words == reference)
    shared = sum((Counter(words) & Counter(reference)).values())
    return 2 * shared / (len(words) + len(reference))


def generation_entropy(text: str) -> float:
    """Returns ``100 (H₂ + 2 H₃) / 3``, with H_n the entropy in bits of the text's word n-grams: ROME's measure.

    Repetition lowers it. 0 for a text of fewer than two words.
    """
    words = _WORDS.findall(text)
    entropies = [weight * _entropy(words, size) for size, weight in NGRAM_WEIGHTS.items()]
    return 100 * sum(entropies) / len(entropies)


def _entropy(words: list[str], size: int) -> float:
    counts = Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))
    total = sum(counts.values())
    return sum((count / total * math.log2(total / count) for count in counts.values()), start=0.0)
