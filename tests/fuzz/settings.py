"""What a run is given and writes down: metrics, files of arguments, descriptions of synthetic classes."""

import json
import shutil

from tests.fuzz.changes import INTEGERS, change_bytes, change_json, change_text
from xc import config
from xc.comm.world import World
from xc.data import loader as data
from xc.data import synthetic as synth
from xc.errors import UserError
from xc.optim import schedule
from xc.run import folder as run_folder
from xc.run import metrics


def make_metrics(folder):
    log = metrics.Metrics(folder, 0, schedule.Progress(), 9, 63)
    for step in range(1, 5):
        log.log(schedule.Progress(step, 7 * step, 7), loss=1 / step)
    log.close()
    shutil.rmtree(folder / "tensorboard")


def change_metrics(random, folder):
    path = folder / "metrics.jsonl"
    if random.randrange(2):
        random.choice((change_bytes, change_text))(random, path)
    else:
        lines = path.read_text().splitlines()
        number = random.randrange(len(lines))
        lines[number] = change_json(random, json.loads(lines[number]))
        path.write_text("\n".join(lines))


def read_metrics(folder, out):
    shutil.copy(folder / "metrics.jsonl", out)
    with metrics._open_after(out / "metrics.jsonl", 3) as lines:
        lines.write("{}\n")


def make_arguments(folder):
    cfg = config.parse(["--data", "some packs", "--out", "a run", "--schedule", "step"])
    (folder / "run.args").write_text(config.as_arguments(cfg) + "--epochs 3  # a remark\n--head knn --seed 5\n")


def change_arguments(random, folder):
    path, kind = folder / "run.args", random.randrange(8)
    if kind == 0:
        with open(path, "a") as file:
            file.write(f"@{random.choice((path, folder, '/dev/zero', 'nowhere', folder / 'other', ''))}\n")
        (folder / "other").write_text(f"@{path}\n")
    elif kind == 1:
        path.write_text("".join(f"--{random.choice(FLAGS)} {random.choice((*INTEGERS, *'0123', '1e9', 'x'))}\n"
                                for _ in range(3)), errors="surrogateescape")
    else:
        random.choice((change_bytes, change_text))(random, path)


FLAGS = [name.replace("_", "-") for name in config.Config.__dataclass_fields__]


def read_arguments(folder, out):
    cfg = config.parse([f"@{folder / 'run.args'}"])
    with World().raise_on_all_ranks():
        run_folder.check(cfg)
        schedule.Schedule.of(cfg, 1000, 1)
    (out / "again.args").write_text(config.as_arguments(cfg), errors="surrogateescape")


def make_synth(folder):
    (folder / "description").write_text("synth:classes=50,dim=16,levels=2,branching=5,spread=0.5,noise=0.1,examples=3,"
                                        "test=9,seed=7,images=1")


def change_synth(random, folder):
    path = folder / "description"
    if random.randrange(2):
        random.choice((change_text, change_bytes))(random, path)
    else:
        pairs = path.read_text().split(",")
        place = random.randrange(len(pairs))
        key = pairs[place].partition("=")[0]
        pairs[place] = f"{key}={random.choice((*INTEGERS, 0.5, 16, 100, 4096, 10**8, 1e-300, 'nan'))}"
        path.write_text(",".join(pairs))


def read_synth(folder, out):
    text = (folder / "description").read_bytes().decode(errors="surrogateescape")
    cfg = config.parse([f"--data={text}", "--out", "unused"])
    if not cfg.data.startswith(synth.PREFIX):
        raise UserError("not a description")
    for split in data.open_splits(cfg).values():
        split.examples(split.order(0).records(0, 3))
