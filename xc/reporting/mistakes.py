"""What the wrong answers say: pairs of classes that are confused, the surest mistakes, the worst classes."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pair:
    """Two classes; the first one is taken for the second at least as often as the other way round.

    first, second   classes
    there, back     examples of the first with the answer second, and of the second with the answer first
    of_first, of_second
                    examples of each class
    places          of all these mistakes in the Answers, the surest first
    """

    first: int
    second: int
    there: int
    back: int
    of_first: int
    of_second: int
    places: np.ndarray


def confused_pairs(answers, most):
    """At most so many Pairs with the most mistakes between them; of equal ones first those with the highest sum of
    probabilities, then those with lower classes."""
    pairs = np.sort(np.stack([answers.label, answers.answer], 1), 1)
    pairs, inverse, counts = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(-1)  # of shape (n, 1) in some versions of numpy
    sums = np.bincount(inverse, answers.probability, len(pairs))
    found = []
    for place in np.lexsort((np.arange(len(pairs)), -sums, -counts))[:most]:
        places = np.flatnonzero(inverse == place)
        places = places[np.argsort(-answers.probability[places], kind="stable")]
        first, second = pairs[place].tolist()
        there = int((answers.label[places] == first).sum())
        back = len(places) - there
        if back > there:
            first, second, there, back = second, first, back, there
        of_first, of_second = (int((answers.labels == one).sum()) for one in (first, second))
        found.append(Pair(first, second, there, back, of_first, of_second, places))
    return found


def surest(answers, most):
    """(n,) places in the Answers of the wrong answers with the highest probabilities, descending; of equal ones the
    lower record first."""
    return np.lexsort((answers.record, -answers.probability))[:most]


def worst_classes(answers, most):
    """[(class, wrong answers, examples)] of the classes with the most wrong answers; of equal ones first those with
    fewer examples, then lower ones."""
    classes, wrong = np.unique(answers.label, return_counts=True)
    examples = np.sort(answers.labels)
    examples = np.searchsorted(examples, classes, side="right") - np.searchsorted(examples, classes)
    order = np.lexsort((classes, examples, -wrong))[:most]
    return list(zip(classes[order].tolist(), wrong[order].tolist(), examples[order].tolist(), strict=True))
