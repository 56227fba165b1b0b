"""What the page shows of the answers of one run: confused pairs, surest mistakes, neighbours of class rows."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from xc.data.class_names import names_of
from xc.data.evaluated import blocks_of, split_while_training
from xc.data.pack import Pack, open_splits
from xc.data.synthetic import PREFIX
from xc.errors import UserError
from xc.reporting.answers import Answers
from xc.reporting.mistakes import confused_pairs, surest, worst_classes
from xc.reporting.neighbours import nearest_rows
from xc.reporting.pictures import records_of
from xc.use.trained import Trained, open_run

PAIRS, WRONG, NEIGHBOURS = 20, 40, 6  # that are shown
_OF_PAIRS, _WORST, _RANDOM = 4, 4, 6  # pairs, worst classes and random classes whose neighbours are shown
_PICTURES = 3  # of each class of a pair; of its mistakes one less


@dataclass(frozen=True)
class Model:
    """What answers are made of: the trained run, the Pack train, the name of the split, the Pack of that split."""

    trained: Trained
    train: Pack
    split: str
    pack: Pack


def open_model(run, data, world):
    """(Model, "") of a Run, or (None, why it has none). Collective; alike on all ranks.

    data  path of the packs; "": those of the run

    UserError where `data` was given and does not fit the run, or the ranks see different checkpoints.
    """
    with world.raise_on_all_ranks():
        model, reason = _opened(run, data, world)
    told = world.all_ranks.all_gather_object((reason, model and model.trained.folder.name))
    reason = next((one for one, _ in told if one), "")  # the ranks share the checksums
    if reason:
        return None, reason
    if len({name for _, name in told}) > 1:
        raise UserError(f"{run.folder} saves a checkpoint while it is read: give the command again")
    return model, ""


def _opened(run, data, world):
    path = str(data or run.settings.get("data", ""))
    if not data and path.startswith(PREFIX):
        return None, f"The run was trained on synthetic classes ({path}), of which there are no images."
    if run.checkpoint is None and not run.fault:
        return None, "The run has no checkpoint."
    try:
        splits = open_splits(path)
    except (ValueError, OSError) as e:
        if data:
            raise UserError(f"--data {data} cannot be used ({e}): give the packs of the run") from e
        return None, f"Its data cannot be read ({e}). Give their new place with --data."
    train, name = splits["train"], split_while_training(splits)
    if name is None:
        if data:
            raise UserError(f"--data {data} has neither val nor test: give the folder with the packs of the run")
        return None, f"Its data ({path}) have neither val nor test."
    try:
        trained = open_run(run.folder, "", world)
    except (ValueError, OSError, ImportError) as e:
        return None, f"Its checkpoint cannot be used ({e})."
    if (train.num_classes, train.classes_digest) != (trained.num_classes, trained.classes_digest):
        text = f"{path} has {train.num_classes} classes that are not the {trained.num_classes} of {trained.folder}"
        if data:
            raise UserError(f"--data {text}: give the packs of the run, or report this run alone")
        return None, f"{text}. Give its data with --data."
    return Model(trained, train, name, splits[name]), ""


def neighbour_classes(pairs, worst, num_classes, seed=0):
    """{class: why} of the classes whose neighbours are shown: of the first pairs, the worst, and random ones."""
    found = {}
    for pair in pairs[:_OF_PAIRS]:
        for one in pair.first, pair.second:
            found.setdefault(one, "of a confused pair")
    rest = [(one, f"{wrong} of {examples} wrong") for one, wrong, examples in worst if one not in found]
    found |= dict(rest[:_WORST])
    for one in np.random.default_rng(seed).integers(num_classes, size=_RANDOM).tolist():
        found.setdefault(one, "random")
    return found


class Look:
    """The sections of one run. Collective to make; rank 0 alone adds pictures.

    pairs       Pairs of classes
    wrong       places of the surest mistakes in the Answers
    neighbours  [(class, why, [(class, cosine)])]
    """

    def __init__(self, model: Model, answers: Answers, world):
        self.model, self.answers = model, answers
        self.pairs, self.wrong = confused_pairs(answers, PAIRS), surest(answers, WRONG)
        chosen = neighbour_classes(self.pairs, worst_classes(answers, _WORST + 2 * _OF_PAIRS),
                                   model.trained.num_classes)
        k = min(NEIGHBOURS, model.trained.num_classes - 1)
        nearest = nearest_rows(list(chosen), model.trained, k, world)
        self.neighbours = [(one, why, list(zip(*near, strict=True))) for (one, why), *near in zip(
            chosen.items(), *(part.tolist() for part in nearest), strict=True)]

    def shown(self, pictures):
        """The sections as the template takes them; only rank 0 calls this. ValueError where names cannot be read.

        pictures  Pictures
        """
        names, records = self._names, self._records
        train, pack, answers = self.model.train, self.model.pack, self.answers

        def of_class(number, most):
            return {"name": names[number], "number": number,
                    "pictures": [pictures.of(train, record) for record in records[number][:most]]}

        def of_mistake(place):
            return {"picture": pictures.of(pack, int(answers.record[place])), "record": int(answers.record[place]),
                    "label": names[int(answers.label[place])], "answer": names[int(answers.answer[place])],
                    "probability": float(answers.probability[place]),
                    "label_probability": float(answers.label_probability[place])}

        pairs = [{"first": of_class(pair.first, _PICTURES), "second": of_class(pair.second, _PICTURES),
                  "there": pair.there, "back": pair.back, "of_first": pair.of_first, "of_second": pair.of_second,
                  "mistakes": [of_mistake(place) for place in pair.places[: _PICTURES - 1]]} for pair in self.pairs]
        wrong = [of_mistake(place) | {"of_label": of_class(int(answers.label[place]), 1),
                                      "of_answer": of_class(int(answers.answer[place]), 1)} for place in self.wrong]
        neighbours = [{"own": of_class(one, 1), "why": why,
                       "near": [of_class(other, 1) | {"cosine": cosine} for other, cosine in near]}
                      for one, why, near in self.neighbours]
        return {"pairs": pairs, "wrong": wrong, "neighbours": neighbours, "answers": answers, "split": self.model.split,
                "checkpoint": self.model.trained.folder.name, "classes": self.model.trained.num_classes,
                "mistakes": len(answers.record),
                "nearest": min(NEIGHBOURS, self.model.trained.num_classes - 1) or 1, "over": pictures.over,
                "damaged": pictures.damaged, "untrained": self._untrained}

    def _classes(self):
        """Every class that is shown."""
        found = {one for pair in self.pairs for one in (pair.first, pair.second)}
        found |= {int(one) for place in self.wrong for one in (self.answers.label[place], self.answers.answer[place])}
        return sorted(found | {one for own, _, near in self.neighbours for one in (own, *(other for other, _ in near))})

    @cached_property
    def _untrained(self):
        """Number of examples whose class has no image in train."""
        train, labels, found = self.model.train, self.answers.labels, 0
        for first, last in blocks_of(0, train.num_classes):
            here = labels[(labels >= first) & (labels < last)] - first
            found += int((train.counts(first, last)[here] == 0).sum())
        return found

    @cached_property
    def _names(self):
        return names_of(torch.tensor(self._classes(), dtype=torch.int64), self.model.train)

    @cached_property
    def _records(self):
        return records_of(self.model.train, self._classes(), _PICTURES)
