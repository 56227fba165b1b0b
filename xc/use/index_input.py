"""What goes into an index: vectors, and the table of their names."""

import os
from contextlib import ExitStack, closing

import numpy as np

from data_tools.common.progress import Progress
from xc.data.pack import NAMES
from xc.use.index_folder import NAMES as NAMES_FILE
from xc.use.index_folder import NamesWriter
from xc.use.tables import text
from xc.use.vectors import ClassRows, FeatureRows


def class_rows(trained, table, folder, world):
    """The class rows of a Trained; their names, of a ClassNames, go into the folder. Collective."""
    with world.raise_on_all_ranks():
        if world.rank == 0:
            with (closing(NamesWriter(os.path.join(folder, NAMES_FILE))) as names,
                  Progress("writing names", trained.num_classes, "classes") as progress):
                for start in range(0, trained.num_classes, NAMES):
                    stop = min(start + NAMES, trained.num_classes)
                    names.add(table.class_names(start, stop), list(range(start, stop)))
                    progress.add(stop - start)
    return ClassRows(trained)


def feature_rows(job, folder, world):
    """The features of the images of an ImageJob, in a file in the folder, and their names beside it.

    Images without features are left out; `job.report` names them. UserError where none has any. Collective.
    """
    path, count, place = os.path.join(folder, "features"), 0, 0
    with ExitStack() as stack:
        with world.raise_on_all_ranks():
            if world.rank == 0:
                names = stack.enter_context(closing(NamesWriter(os.path.join(folder, NAMES_FILE))))
                file = stack.enter_context(open(path, "wb"))
        for images, features in job.batches("computing features"):
            vectors = job.trained.directions(features).cpu().numpy()
            with world.raise_on_all_ranks():
                if world.rank == 0:
                    file.write(np.ascontiguousarray(vectors, "<f4"))
                    good = [i for i, image in enumerate(images) if image.reason is None]
                    names.add([text(images[i].name) for i in good], [place + i for i in good])
            count, place = count + len(features), place + len(images)
        job.check_any_result()
        with world.raise_on_all_ranks():
            stack.close()
    return FeatureRows(path, count, job.trained.feature_dim)
