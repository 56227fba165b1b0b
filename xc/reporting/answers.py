"""The answers of a run to examples of the split that it was evaluated on. All ranks share the work and get all of
them."""

from dataclasses import dataclass, field

import numpy as np

from xc.use.features import features_of, passes
from xc.use.scores import best_classes
from xc.use.source import of_records

_PASS = 4096  # images that are scored each time the class rows are read
_BLOCK = 2**20  # labels that are read at once
_BEST = 5
_NAMED = 3  # images without an answer that are named


@dataclass
class Answers:
    """N examples, of which the wrong ones are kept.

    of                number of records of the split
    examples          that have an answer
    top1, top5        shares of those
    without           examples without an answer, because they cannot be decoded; and `reasons`, [(name, reason)] of the
                      first of them
    labels            (examples)  their classes
    record, label, answer, probability
                      (wrong)  of the wrong answers: number of the record, its class, the best class, and the
                      probability of that over all classes
    label_probability (wrong)  of the label; nan where it is not among the five best classes
    """

    of: int
    examples: int = 0
    top1: float = 0.0
    top5: float = 0.0
    without: int = 0
    reasons: list = field(default_factory=list)
    labels: np.ndarray = None
    record: np.ndarray = None
    label: np.ndarray = None
    answer: np.ndarray = None
    probability: np.ndarray = None
    label_probability: np.ndarray = None


def evenly(total, count):
    """(n,) int64: min(count, total) numbers from 0 to total - 1, evenly spread. Packs are shuffled, so records at even
    distances are a random sample."""
    count = min(count, total)
    return np.arange(count, dtype=np.int64) * total // max(1, count)


def answers_of(trained, pack, most, world, *, batch, threads, progress):
    """Answers to at most `most` examples of a Pack by a Trained. Collective; alike on all ranks and at any W.

    batch, threads, progress  as in `features_of`

    UserError where the ranks see different images; where labels or class rows are damaged.
    """
    numbers = evenly(len(pack), most)
    with world.raise_on_all_ranks():
        labels = _labels(pack, numbers)
    answers, place, hits, parts = Answers(len(pack)), 0, np.zeros(2, np.int64), []
    batches = features_of(of_records(pack, numbers), trained, world, batch=batch, threads=threads, progress=progress)
    for images, features in passes(batches, _PASS):
        bad = [image for image in images if image.reason is not None]
        answers.reasons += [(image.name, image.reason) for image in bad[: _NAMED - len(answers.reasons)]]
        answers.without += len(bad)
        best = best_classes(features, trained, min(_BEST, trained.num_classes), world)
        good = np.array([image.reason is None for image in images])
        here = slice(place, place + len(images))
        parts.append(_wrong(numbers[here][good], labels[here][good], *(one.cpu().numpy() for one in best), hits))
        labels[here][~good] = -1
        place += len(images)
    answers.labels = labels[labels >= 0]
    answers.examples = len(answers.labels)
    answers.top1, answers.top5 = (hits / max(1, answers.examples)).tolist()
    (answers.record, answers.label, answers.answer, answers.probability, answers.label_probability) = (
        np.concatenate(columns) for columns in zip(*parts, strict=True))
    return answers


def _wrong(numbers, labels, classes, probabilities, hits):
    """Columns of the wrong answers among n examples; adds the hits of the best class and of the five best.

    numbers, labels          (n)
    classes, probabilities   (n, k)  best first
    """
    at = classes == labels[:, None]
    hits += [at[:, 0].sum(), at.any(1).sum()]
    wrong = ~at[:, 0]
    of_label = np.where(at.any(1), (probabilities * at).sum(1), np.nan)
    return numbers[wrong], labels[wrong], classes[wrong, 0], probabilities[wrong, 0], of_label[wrong]


def _labels(pack, numbers):
    """(n,) int64: labels of ascending record numbers."""
    found = np.empty(len(numbers), np.int64)
    for start in range(0, len(pack), _BLOCK):
        stop = min(start + _BLOCK, len(pack))
        first, last = np.searchsorted(numbers, [start, stop])
        if first < last:
            found[first:last] = pack.labels(start, stop)[numbers[first:last] - start]
    return found
