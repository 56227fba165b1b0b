"""The best classes of images by a trained run: python -m xc.predict RUN SRC --out FILE

    python -m xc.predict runs/photos photos/test --top 5 --out best.csv
    mpirun -np 4 python -m xc.predict runs/photos packs/test --out best.parquet

Rows have path, rank (from 1), class, probability over all classes, reason. An image that cannot be used is one row with
its reason and nothing else.
"""

from data_tools.common.command import between, stop_on_signals
from xc.comm.launch import run
from xc.comm.world import open_world
from xc.data.class_names import names_of
from xc.use.features import passes
from xc.use.job import Job, make_parser
from xc.use.scores import best_classes
from xc.use.tables import prediction_table, text


def parser():
    """The flags."""
    parser = make_parser("xc.predict", __doc__.partition("\n")[0])
    add = parser.add_argument
    add("--top", type=between(1, 1000), default=5, help="classes of each image (%(default)s)")
    add("--classes", default="", metavar="PACK", help="pack with the names of the classes (the --data of the run)")
    add("--images-per-pass", type=between(1, 2**20), default=4096, help="images that are scored each time the class "
        "rows are read (%(default)s)")
    return parser


def rows(images, classes, probabilities, table):
    """(columns of the rows of these images,)

    images                  list of n Images
    classes, probabilities  (good, k)  of the Images without a reason
    table                   ClassNames
    """
    columns = {name: [] for name in ("path", "rank", "class", "probability", "reason")}
    names, found = names_of(classes, table), iter(zip(classes.tolist(), probabilities.tolist(), strict=True))
    for image in images:
        best = zip(*next(found), strict=True) if image.reason is None else [(None, None)]
        for rank, (number, probability) in enumerate(best, 1):
            row = (text(image.name), None if number is None else rank, names.get(number), probability, image.reason)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
    return (columns,)


def main(argv=None):
    """The command, top to bottom. Collective."""
    args = parser().parse_args(argv)
    world = open_world(args.device)
    job = Job(args, (".parquet", ".csv", ".jsonl"), world)
    with world.raise_on_all_ranks():
        table = job.trained.class_table(args.classes)
    write(job, table, world)
    job.report()


def write(job, table, world):
    """Write the rows of all images of a Job; table: ClassNames. Collective."""
    args, k = job.args, min(job.args.top, job.trained.num_classes)
    with job.writing(lambda path: prediction_table(path, job.suffix)) as write_rows:
        for images, features in passes(job.batches("predicting"), args.images_per_pass):
            best = best_classes(features, job.trained, k, world)
            write_rows(rows, images, *best, table)


if __name__ == "__main__":
    stop_on_signals()
    run(main)
