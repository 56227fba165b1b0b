"""What a run is made of: data, state, run folder. A mistake found on any rank is raised on all of them."""

import sys

from xc.checkpoint.state import State
from xc.data import loader
from xc.data.evaluated import how_to_split, split_while_training
from xc.data.pack_split import PackSplit
from xc.gradients import choice, exchanges
from xc.model import backbone as backbones
from xc.model import head_table
from xc.optim.noise_scale import NoiseScale
from xc.optim.optimizers import RowSGD, backbone_optimizer
from xc.optim.schedule import Schedule
from xc.run import folder
from xc.run.loss_meter import LossMeter


def data(cfg, world):
    """Open the data and check that the run folder can be used; writes nothing. Collective.

    returns  (the Config, with what --exchange auto takes, {"train": split, …}, the Loader of the training split, the
             Schedule)
    """
    with world.raise_on_all_ranks():
        if not cfg.schedule_plot:
            folder.check(cfg)
        splits = loader.open_splits(cfg)
        train = splits["train"]
        found = splits, loader.Loader(train, cfg, world), Schedule.of(cfg, len(train), world.size)
    if cfg.exchange != "auto" or cfg.schedule_plot:
        return cfg, *found
    cfg = choice.with_exchange(cfg, _quickest_exchange(cfg, train, world))
    with world.raise_on_all_ranks():
        return cfg, *found[:2], Schedule.of(cfg, len(train), world.size)  # its density is of the exchange


def _quickest_exchange(cfg, train, world):
    """What --exchange auto takes: what the run took before, if it resumes; else by measurement. Collective."""
    names, left_out = choice.candidates(cfg), ""
    before = world.all_ranks.all_gather_object(folder.exchange_before(cfg))[0]
    for name in names[:]:
        try:
            Schedule.of(choice.with_exchange(cfg, name), len(train), world.size)
        except ValueError as e:  # the run is shorter than its warm-up
            names.remove(name)
            left_out += f"; not {name}: {e}"
    if before in exchanges.EXCHANGES:
        found, why = before, "as the run did before"
    elif world.size == 1:
        found, why = "dense", "there is one rank"
    else:
        with world.traffic.uncounted():
            seconds = choice.measured(cfg, names, lambda: _backbone(cfg, train, world), train.input_shape, world)
        found = choice.quickest(seconds)
        why = "the backbone's part of a step takes " + ", ".join(f"{1e3 * one:.1f} ms with {name}"
                                                                 for name, one in seconds.items()) + left_out
    if world.rank == 0:
        print(f"note: --exchange auto takes {found}: {why}", flush=True)
    return found


def state(cfg, train_split, world):
    """All that training changes, at its start: the backbone on every rank, the class rows split over ranks.
    Collective."""
    with world.raise_on_all_ranks():
        backbone = _backbone(cfg, train_split, world)
        head = head_table.build(cfg, train_split.num_classes, world)
        exchange = exchanges.build(backbone, world, cfg)
    return State(backbone, backbone_optimizer(backbone, cfg, exchange.keeps_momentum), head,
                 RowSGD(head, cfg.head_momentum), exchange, NoiseScale(),
                 LossMeter(world.device))


def _backbone(cfg, train_split, world):
    examples_of_rank = cfg.global_batch // cfg.micro_batches // world.size
    return backbones.build(cfg.backbone, train_split.input_shape, cfg.feature_dim, cfg.seed, world, cfg.amp,
                           examples_of_rank, cfg.freeze)


def run_folder(cfg, train_split, resumed, world):
    """Create the run folder, or lock the one that is resumed. resumed: whether a checkpoint was loaded. Collective."""
    with world.raise_on_all_ranks():
        if world.rank == 0:
            folder.create(cfg, world.size)
            index = train_split.pack.index_path if isinstance(train_split, PackSplit) else None
            folder.keep_classes(cfg.out, index, resumed)


def warn_of_unused(cfg, train_split, schedule, world):
    """Warnings of rank 0 about flags that do nothing."""
    if world.rank != 0:
        return
    if cfg.input_norm != "half" and len(train_split.input_shape) != 3:
        print("warning: --input-norm has no effect on vectors", file=sys.stderr, flush=True)
    if cfg.init_rows != "features" and not cfg.init:
        print(f"warning: --init-rows {cfg.init_rows} has no effect without --init", file=sys.stderr, flush=True)
    if cfg.head in ("knn", "selective") and not (cfg.init or schedule.times_due(cfg.graph_every, cfg.graph_from)):
        print(f"warning: --head {cfg.head} takes random classes in the whole run, since --graph-from {cfg.graph_from} "
              f"and --graph-every {cfg.graph_every} leave no time for a graph", file=sys.stderr, flush=True)
    if cfg.freeze and not cfg.init:
        print(f"warning: --freeze {cfg.freeze} without --init keeps random weights as they are", file=sys.stderr,
              flush=True)


def say_what_is_evaluated(cfg, splits, world):
    """One line of rank 0 where the data lack a split: a warning where nothing can be evaluated, otherwise a note."""
    if world.rank != 0:
        return
    split = split_while_training(splits)
    if split is None:
        print(f"warning: nothing is evaluated, since {cfg.data} has neither val nor test: {how_to_split(cfg.data)}",
              file=sys.stderr, flush=True)
    elif split == "test" and cfg.test == "best":
        print("note: there is no val to choose the best weights by, so test is evaluated with the last ones",
              flush=True)
    elif "test" not in splits:
        print("note: there is no test, so the scores are those of val, with the last weights", flush=True)
