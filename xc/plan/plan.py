"""The plan of a run on a cluster that need not be there: `python train.py --plan FACTS` with the flags of the run."""

from dataclasses import dataclass, replace

from xc.data import loader
from xc.data.pack_split import PackSplit
from xc.errors import UserError
from xc.optim.schedule import Schedule
from xc.plan.backbone_size import BackboneSize
from xc.plan.cluster import Cluster
from xc.plan.memory import MAX_LOAD, MemoryPlan
from xc.plan.remedies import flags_of, in_micro_batches, saving_memory, sending_less
from xc.plan.sent import Sent
from xc.plan.times import Times
from xc.plan.workload import Workload

_GAIN = 0.03  # of a step, from which on another setting is worth a line


@dataclass(frozen=True)
class Data:
    """What a plan needs of the data."""

    num_classes: int
    num_records: int
    input_shape: tuple
    order_bytes: int = 0

    @classmethod
    def of(cls, cfg, cluster):
        """Of --data, or of the facts where there is none. UserError where neither tells."""
        if cfg.data:
            if cluster.classes or cluster.examples:
                raise UserError(f"--plan gives classes or examples, which --data {cfg.data} has: leave one out")
            train = loader.open_splits(cfg)["train"]
            return cls(train.num_classes, len(train), train.input_shape,
                       train.order_bytes if isinstance(train, PackSplit) else 0)
        for fact, value in ("classes", cluster.classes), ("examples", cluster.examples):
            if not value:
                raise UserError(f"--plan lacks {fact} of the data: give --data, or add {fact}, as {fact}=1000000")
        return cls(cluster.classes, cluster.examples, (cfg.channels, cfg.image_size, cfg.image_size))


@dataclass(frozen=True)
class Plan:
    """Of one rank, the first one, which no rank exceeds.

    builds  of the graph in the whole run
    """

    cfg: object
    cluster: Cluster
    work: Workload
    backbone: BackboneSize
    schedule: Schedule
    memory: MemoryPlan
    sent: Sent
    times: Times
    builds: int

    @classmethod
    def of(cls, cfg, cluster, data, backbone=None):
        """UserError where the settings contradict the data or the ranks."""
        on_cpu = cfg.device == "cpu"
        if cluster.ranks % (cfg.model_parallel_size or cluster.ranks):
            raise UserError(f"--model-parallel-size {cfg.model_parallel_size} does not divide ranks={cluster.ranks} of "
                            "--plan: take a divisor, or 0 for all")
        try:
            schedule = Schedule.of(cfg, data.num_records, cluster.ranks)
        except ValueError as e:
            raise UserError(str(e)) from e
        work = Workload.of(cfg, data.num_classes, cluster.ranks, on_cpu)
        backbone = backbone or BackboneSize.of(cfg, data.input_shape, cluster.ranks)
        memory = MemoryPlan.of(work, backbone, order_bytes=data.order_bytes,
                               max_accumulation_steps=schedule.max_accumulation_steps)
        sent = Sent.of(work, backbone, cluster.ranks_per_host)
        builds = schedule.times_due(cfg.graph_every, cfg.graph_from) if work.num_neighbors else 0
        return cls(cfg, cluster, work, backbone, schedule, memory, sent, Times.of(work, backbone, cluster), builds)

    @property
    def step_seconds(self):
        return sum(self.times.step.values())

    @property
    def build_seconds(self):
        return sum(self.times.build.values())

    @property
    def run_seconds(self):
        """Without evaluations, checkpoints and the start."""
        return self.schedule.length * self.step_seconds + self.builds * self.build_seconds

    @property
    def rank_memory(self):
        """Bytes that must fit `memory` of the cluster: on a GPU without the parts that lie on the host."""
        return self.memory.total if self.work.on_cpu else self.memory.on_gpu

    @property
    def fits(self):
        return self.rank_memory <= MAX_LOAD * self.cluster.memory

    @property
    def limit(self):
        """The phase that takes most of a step."""
        return max(self.times.step, key=self.times.step.get)


def remedies(plan, data):
    """[(flags, Plan)]: settings each of which alone makes the step shorter, or the memory fit. Best first."""
    cfg, found = plan.cfg, []
    changes = sending_less(cfg, plan.cluster.ranks, plan.cluster.ranks_per_host)
    for change in saving_memory(cfg) + in_micro_batches(cfg, 2) + changes:
        needs_sgd = change.get("exchange", "").startswith("dgc") and cfg.optimizer == "adamw"
        sgd = {"optimizer": "sgd", "lr": 0.1, "head_lr_scale": 1.0} if needs_sgd else {}
        try:
            other = Plan.of(replace(cfg, **change, **sgd), plan.cluster, data, plan.backbone)
        except UserError:  # it contradicts other settings
            continue
        quicker = other.step_seconds < (1 - _GAIN) * plan.step_seconds
        if (quicker and (other.fits or not plan.fits)) or (other.fits and not plan.fits):
            found.append(("@recipes/sgd.args " * needs_sgd + flags_of(change), other))
    return sorted(found, key=lambda one: (not one[1].fits, one[1].step_seconds))
