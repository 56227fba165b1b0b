"""Packs a data set of images into a few large files: python -m data_tools.pack SRC OUT

SRC  a tree of images; the class of an image is the path of its folder below SRC (letters/a/1.png has class letters/a).
     Or a table (CSV, JSON Lines or Parquet with the columns path, label and, if wanted, split and weight), a list of
     paths and labels, tar files, MXNet RecordIO, or a pack: data_tools/sources. Several become one pack.
OUT  the pack, a new folder; xc/data/pack.py documents its layout.

OUT is a folder of packs with one class table, that of train, if the source says the splits of its images: by folders
train, val and test at the top, by a column split, or by names of shards or sources (data_tools/sources/splits.py). A
label is the position of the class name in sorted order. If all names are numbers, they are sorted as numbers, so the
labels 0 … C − 1 of a CSV keep their values.

Three flags choose what is packed, in this order. --duplicates compares the bytes of the images as they come
(data_tools/packing/duplicates.py); images in files of their own are read once more for it. --min-images counts the
images that are left. --max-images-per-class takes the first of each class in the order of the shuffle, which the seed
fixes. Images that do not decode are found after that and are not replaced.

Every image is decoded once as a check, or checked as --check says (data_tools/packing/validate.py). Its bytes are kept
unless --resize, --format or --quality asks for others. Images that fail are left out, counted and listed in
OUT/skipped.tsv. Images that a flag leaves out are listed in OUT/left_out.tsv.

OUT appears only when everything is done. Until then the work is in a folder .OUT.partial-pack beside it, which no
reader accepts. After an interruption the same command resumes from that folder: after the last complete shard, or with
the list of images if there is no shard yet. Several processes, on any nodes that share the folder, make one pack by
--part: list/N lists the images, 0/N and so on write the parts at the same time, and merge/N makes the pack of them. The
order of its records is that of one process. The same SRC, seed and number of parts give the same bytes whatever the
number of workers, the memory and interruptions.

Memory holds what --memory-mb allows, one shard, and for each worker some megabytes of images and one decoded image. The
list of images is a SQLite file in that folder; beside it is a file with the images that did not come in files of their
own.
"""

import argparse
import codecs
import json
import os
import re

from data_tools.common.command import Parser, between, printing, stop_on_signals
from data_tools.packing.duplicates import RULES
from data_tools.packing.encode import FORMATS
from data_tools.packing.job import Options, pack
from data_tools.packing.validate import CHECKS
from data_tools.packing.workdir import what_is_kept
from data_tools.sources.columns import USUAL
from data_tools.sources.detect import KINDS
from xc.data import images
from xc.data import pack as layout
from xc.data.pack import PackError


def share_or_count(text):
    if not re.fullmatch(r"\d+|\d+(\.\d+)?%", text):
        raise argparse.ArgumentTypeError(f"{text} is neither a number like 100 nor a share like 1%")
    return text


def split_share(text):
    name, _, share = text.partition("=")
    if name not in layout.SPLITS[1:] or not re.fullmatch(r"0?\.\d*[1-9]\d*", share):
        raise argparse.ArgumentTypeError(f"{text} is not like test=0.01: val or test, and a share between 0 and 1")
    return name, float(share)


def renamed_split(text):
    name, _, split = text.partition("=")
    if not name or split not in layout.SPLITS:
        raise argparse.ArgumentTypeError(f"{text} is not like dev=val: a name in the source, and train, val or test")
    return name, split


def encoding_of(text):
    try:
        "a".encode(text)  # a codec of bytes, as base64, takes no text
        return codecs.lookup(text).name
    except (LookupError, UnicodeError) as error:
        raise argparse.ArgumentTypeError(f"{text} is no encoding of Python, as utf-8, cp1252 or utf-16") from error


def part_of(text):
    match = re.fullmatch(r"(list|merge|\d{1,4})/(\d{1,4})", text)
    number = match and (int(match[1]) if match[1].isdigit() else match[1])
    if not match or not (number if isinstance(number, int) else 0) < int(match[2]):
        raise argparse.ArgumentTypeError(f"{text} is not list/16, merge/16 or like 0/16: a part from 0 up, and how "
                                         "many there are")
    return number, int(match[2])


def add_source_flags(parser):
    add = parser.add_argument_group("source").add_argument
    add("--from", dest="kind", choices=KINDS, help="the format of SRC, if its content does not tell")
    add("--root", metavar="DIR", help="folder in which the paths of a manifest start (the folder of the manifest)")
    add("--path-column", metavar="NAME", help=f"the column of a table with the paths, or with the images; without it "
        f"{', '.join(USUAL['path'])} are tried")
    add("--label-column", metavar="NAME", help=f"the column with the classes; without it "
        f"{', '.join(USUAL['label'])} are tried")
    add("--split-column", metavar="NAME", help="the column with the splits (split); '': there is none")
    add("--weight-column", metavar="NAME", help="the column with the weights (weight); '': there is none")
    add("--no-header", dest="header", action="store_false", help="the first line of a CSV is an image already. Its "
        "columns are called 1, 2, … and are path, label, split and weight")
    add("--encoding", dest="text_encoding", type=encoding_of, default="utf-8", metavar="NAME", help="of the text of a "
        "table (%(default)s)")
    add("--rename-split", type=renamed_split, action="append", default=[], metavar="NAME=SPLIT", help="what a split in "
        "the source is called here, as dev=val; may be given several times")
    add("--without", action="append", default=[], metavar="SPLIT", help="leave out a split, or a folder at the top of "
        "a tree; may be given several times")
    add("--normalize", choices=("nfc", "none"), default="none", help="the form of Unicode of class names; none: as "
        "they come, so that two spellings of é are two classes (%(default)s)")


def make_parser():
    parser = Parser(prog="data_tools.pack", description=__doc__.partition("\n")[0])
    parser.add_argument("src", metavar="SRC", nargs="+", help="a data set: a tree of images, a manifest, tar shards, "
                        "RecordIO or a pack; several become one pack. SPLIT=PATH: all its images are of this split")
    parser.add_argument("out", metavar="OUT", help="the folder to make")

    add_source_flags(parser)
    add = parser.add_argument_group("classes and splits").add_argument
    add("--classes", metavar="PACK", help="use the class table of this pack; an unknown class is an error. Or a text "
        "file with a class name on each line: take only images of these classes")
    add("--split", type=split_share, metavar="NAME=SHARE", help="draw this share of the images for the split val or "
        "test, as in test=0.01, if the source has no splits")
    add("--split-by", choices=("image", "class"), default="image", help="class: draw whole classes, which keep their "
        "labels, but train has no image of them: for features, as those of retrieval (%(default)s)")

    add = parser.add_argument_group("selection of images").add_argument
    add("--duplicates", choices=RULES, default="keep", help="images of the same bytes: report lists them in "
        "OUT/duplicates.tsv; drop also keeps only one of those with the same label, and none in train of those that "
        "are in val or test; drop-conflicting also keeps none of those with several labels (%(default)s)")
    add("--min-images", type=between(1, 2**62), metavar="K", help="give no label to classes with fewer images in train "
        "(with --split-by class: anywhere), and leave out their images; 1: to those that lose all by --duplicates")
    add("--max-images-per-class", type=between(1, 2**62), metavar="M", help="take at most M images of each class for "
        "train, drawn at random")

    add = parser.add_argument_group("images").add_argument
    add("--resize", type=between(1, 2**14), metavar="PIXELS", help="shrink larger images until the shorter side has "
        "this length; PNG, JPEG and WebP keep their format, others become PNG")
    add("--format", choices=FORMATS, help="convert images that have another format (bytes are kept); raw: "
        "uncompressed, for fast reading")
    add("--quality", type=between(1, 100), help="encode all images again, JPEG and WebP with this quality; without it, "
        "images that must be encoded get 90")
    add("--check", choices=CHECKS, default="full", help="how images whose bytes are kept are checked: full, each is "
        "decoded; header, its type, size and end (data_tools/packing/validate.py); none (%(default)s)")
    add("--max-pixels", type=between(1, images.MAX_PIXELS), default=50_000_000,
        help=f"skip images with more (%(default)s); at most {images.MAX_PIXELS}, the limit of readers")
    add("--max-skipped", type=share_or_count, default="1%", metavar="LIMIT",
        help="fail if more images cannot be used, a number or a share (%(default)s)")

    add = parser.add_argument_group("output and processes").add_argument
    add("--seed", type=between(0, 2**63 - 1), default=0, help="of the shuffle (%(default)s)")
    add("--shard-mb", type=between(1e-6, 2**20, float), default=256, help="most image data in one file (%(default)s)")
    add("--memory-mb", type=between(1e-3, 2**20, float), default=1024,
        help="memory for shuffling and sorting; more goes through files beside OUT (%(default)s)")
    add("--workers", type=between(0, 4096), default=os.cpu_count(),
        help="worker processes; 0: only this process (%(default)s)")
    add("--part", type=part_of, metavar="I/N", help="make a pack by several processes with the same flags: list/N "
        "lists the images, then 0/N, 1/N … write a part each, then merge/N makes the pack of them")
    add("--restart", action="store_true", help="remove what an interrupted pack has left, and begin again")
    add("--json", action="store_true", help="print only the JSON object")
    return parser


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    flags = vars(args).copy()
    src, out, as_json = flags.pop("src"), flags.pop("out"), flags.pop("json")
    try:
        facts = pack(src, out, Options(**flags))
    except PackError as error:
        parser.error(str(error))
    except (OSError, RuntimeError) as error:  # h5py raises either for a full or broken disk
        parser.error(f"{out}: {error}; {what_is_kept(out)}")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; {what_is_kept(out)}\n")
    with printing(parser):
        for split, of_split in {} if as_json else facts.get("splits", {}).items():
            print(f"{os.path.join(out, split).rstrip('/')}: {of_split['records']} images of {of_split['classes']} "
                  f"classes, {of_split['bytes'] / 1e6:.1f} MB in {of_split['shards']} shards")
        print(json.dumps(facts))


if __name__ == "__main__":
    stop_on_signals()
    main()
