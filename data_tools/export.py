"""Writes a pack as files that other programs read: python -m data_tools.export PACK OUT --to folder|webdataset

The bytes of the images do not change. OUT appears complete or not at all. data_tools.pack makes a pack of OUT with the
same records. Its labels are the same, too, if every class has an image and the class names are in the order that
data_tools.pack gives them; otherwise use --classes PACK. (data_tools.pack takes a tree of val or test alone for one
without splits.)

folder      OUT/<class name>/<record number>.<suffix by content>; for a folder of packs OUT/<split>/<class name>/….
            OUT/list.csv has path, label (the class name), split and weight, and data_tools.pack reads it, too.
            A / in a class name makes folders. A class whose name is not a safe path gets the folder %<label>, and
            list.csv has its name. Such names have a part that is empty, longer than 200 bytes, begins with a dot, or
            is called like a file here or __MACOSX; they have a control character, begin with %, or are longer than
            3,000 bytes or 100 folders; or they begin with train, val or test where all classes of a pack do.
            White space at the ends of a class name is in OUT, but data_tools.pack strips it in list.csv.
webdataset  OUT/<split>-000000.tar … (images-… for a pack without splits), each of at most --shard-mb. Every record has
            NNNNNNNNN.<suffix by content> and NNNNNNNNN.cls, its label in digits. Where the class name is not its label,
            NNNNNNNNN.json has it, which data_tools.pack prefers: {"label": 0, "xc_class_name": "cat"}. Line n + 1 of
            OUT/classes.txt is the name of label n (with \\\\ \\n \\r for backslashes and ends of lines). The same pack
            gives the same bytes: all times are 0. Weights are left out.
"""

import json

from data_tools.common.command import Parser, between, printing, stop_on_signals
from data_tools.exports.job import export
from xc.pack import SPLITS


def main(argv=None):
    parser = Parser(prog="data_tools.export", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("src", metavar="PACK", help="a pack, or a folder with packs train, val, test")
    add("out", metavar="OUT", help="the folder to make")
    add("--to", choices=("folder", "webdataset"), required=True, help="a tree of images, or tar files")
    add("--split", choices=SPLITS, help="only this one (all)")
    add("--classes", metavar="LIST", help="only these labels, as 5-9,17,@file; a file has labels on any lines (all)")
    add("--shard-mb", type=between(1e-6, 2**20, float), default=1000, help="most of one tar file (%(default)s)")
    add("--json", action="store_true", help="print one JSON object instead of text")
    args = vars(parser.parse_args(argv))
    as_json = args.pop("json")
    try:
        facts = export(**args)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{args['out']}: {error}; nothing was kept")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; nothing was kept\n")
    with printing(parser):
        if as_json:
            print(json.dumps(facts))
        else:
            print(f"{args['out']}: {facts['records']} images of {facts['classes']} classes, "
                  f"{facts['bytes'] / 1e6:.1f} MB")


if __name__ == "__main__":
    stop_on_signals()
    main()
