"""The features of images by a trained run: python -m xc.embed RUN SRC --out FILE

    python -m xc.embed runs/photos photos/test --out features.parquet
    mpirun -np 4 python -m xc.embed runs/photos packs/test --out features.npy

Features are those that the classifier compares with its rows: of length 1 for cosine logits, as the backbone gives them
for --logits inner. Parquet has path, features, reason. A .npy has float32 (N, D), with NaN where an image cannot be
used. A .txt beside it has the names, one a line; where there is a reason, it stands after a tab.
"""

import numpy as np

from data_tools.common.command import stop_on_signals
from xc.comm.launch import run
from xc.comm.world import open_world
from xc.use.features import passes
from xc.use.job import Job, make_parser
from xc.use.tables import FeatureArray, FeatureParquet, text

_ROW_GROUP = 4096  # images


def parser():
    """The flags."""
    return make_parser("xc.embed", __doc__.partition("\n")[0])


def rows(images, features):
    """(names, features (n, D), reasons) of n Images; features (good, D) are those of the Images without a reason."""
    good = np.array([image.reason is None for image in images], bool)
    every = np.full((len(images), features.shape[1]), np.nan, np.float32)
    every[good] = features.cpu().numpy()
    return [text(image.name) for image in images], every, [image.reason for image in images]


def main(argv=None):
    """The command, top to bottom. Collective."""
    args = parser().parse_args(argv)
    world = open_world(args.device)
    job = Job(args, (".parquet", ".npy"), world, beside={".npy": ".txt"})
    trained, width = job.trained, job.trained.cfg.feature_dim
    of_suffix = {".parquet": FeatureParquet, ".npy": FeatureArray}[job.suffix]
    with job.writing(lambda *paths: of_suffix(*paths, width)) as write:
        for images, features in passes(job.batches("embedding"), _ROW_GROUP):
            write(rows, images, trained.directions(features))
    job.report()


if __name__ == "__main__":
    stop_on_signals()
    run(main)
