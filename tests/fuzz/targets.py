"""Every reader of untrusted files, and its cases."""

import shutil

from data_tools.fonts import faces as font_faces
from tests.fuzz.case import Target, attempt
from tests.fuzz.checkpoints import change_meta, change_tables, make_runs, read_run
from tests.fuzz.images import change_image, change_tree, make_images, make_tree, read_images, read_tree
from tests.fuzz.packs import change_exported, change_packs, make_exported, make_packs, read_exported, read_packs
from tests.fuzz.pictures import change_fonts, change_trace, make_fonts, make_trace, read_fonts, read_trace
from tests.fuzz.settings import (
    change_arguments,
    change_metrics,
    change_synth,
    make_arguments,
    make_metrics,
    make_synth,
    read_arguments,
    read_metrics,
    read_synth,
)
from tests.fuzz.sources import (
    change_manifest,
    change_parquet,
    change_rec,
    change_tar,
    make_manifest,
    make_parquet,
    make_rec,
    make_tars,
    read_manifest,
    read_source,
)
from xc.errors import UserError

TARGETS = {
    "packs": Target(make_packs, change_packs, read_packs, (ValueError,)),
    "exported": Target(make_exported, change_exported, read_exported, (ValueError,)),
    "images": Target(make_images, change_image, read_images, (ValueError,)),
    "tree": Target(make_tree, change_tree, read_tree, (ValueError,)),
    "manifest": Target(make_manifest, change_manifest, read_manifest, (ValueError,)),
    "webdataset": Target(make_tars, change_tar, read_source("webdataset"), (ValueError,)),
    "recordio": Target(make_rec, change_rec, read_source("recordio", "*.rec"), (ValueError,)),
    "parquet": Target(make_parquet, change_parquet, read_source("parquet", "*.parquet"), (ValueError,)),
    "repack": Target(make_packs, change_packs, read_source("pack", "packs"), (ValueError,)),
    "meta": Target(make_runs, change_meta, read_run, (ValueError,)),
    "tables": Target(make_runs, change_tables, read_run, (ValueError,)),
    "metrics": Target(make_metrics, change_metrics, read_metrics, ()),
    "arguments": Target(make_arguments, change_arguments, read_arguments, (ValueError,)),
    "synth": Target(make_synth, change_synth, read_synth, (UserError,)),
    "trace": Target(make_trace, change_trace, read_trace, (ValueError,)),
    "fonts": Target(make_fonts, change_fonts, read_fonts, (), font_faces.FONT_BYTES >> 19),
}


class Cases:
    """Cases of one target in a folder: `base` holds the files as they were made, `case` the last changed copy."""

    def __init__(self, name, folder):
        self.target, self.base, self.case = TARGETS[name], folder / "base", folder / "case"
        self.base.mkdir(parents=True)
        (self.base / "in").mkdir()
        self.target.make(self.base / "in")
        shutil.copytree(self.base, self.case, symlinks=True)
        if attempt(self.target, self.case) != "accepted":
            raise AssertionError(f"{name}: the files as they were made are not accepted")

    def run(self, random):
        """The outcome of a new case."""
        shutil.rmtree(self.case)
        shutil.copytree(self.base, self.case, symlinks=True)
        self.target.change(random, self.case / "in")
        return attempt(self.target, self.case)
