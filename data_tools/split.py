"""Splits a pack into training, validation and test data: python -m data_tools.split PACK OUT --test 0.01

OUT is a folder of packs: OUT/train, and OUT/test, OUT/val or both. Each has its records of PACK in their order and the
class table of PACK, so labels do not change. OUT appears complete or not at all. The same PACK, shares and seed give
the same bytes. Memory holds a shard of each split and some numbers for each class.

--by image  Every class gives its share of images, rounded down or up so that the share of all images is right. At least
            one image of every class stays in train, so a class of one image is not tested.
--by class  A share of the classes that have images goes there whole. All splits have the same class table, because
            evaluation goes over all of it, but train has no image of these classes. A classifier cannot learn them:
            such a split is for features, as those of retrieval, not for top-1.
"""

import json
import os

from data_tools.common.command import Parser, between, printing, stop_on_signals
from data_tools.packing.split import split
from xc.pack import SPLITS, PackError


def main(argv=None):
    parser = Parser(prog="data_tools.split", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("src", metavar="PACK", help="a pack without splits")
    add("out", metavar="OUT", help="the folder of packs to make")
    add("--test", type=between(0, 1, float), default=0, help="share that goes to test, as 0.01 (none)")
    add("--val", type=between(0, 1, float), default=0, help="share that goes to val (none)")
    add("--by", choices=("image", "class"), default="image",
        help="image: every class gives its share; class: whole classes, which train then lacks (%(default)s)")
    add("--seed", type=between(0, 2**63 - 1), default=0, help="of the random choice (%(default)s)")
    add("--shard-mb", type=between(1e-6, 2**20, float), default=256, help="most image data in one file (%(default)s)")
    add("--json", action="store_true", help="print one JSON object instead of text")
    args = vars(parser.parse_args(argv))
    as_json = args.pop("json")
    try:
        facts = split(**args)
    except PackError as error:
        parser.error(str(error))
    except (OSError, RuntimeError) as error:  # h5py raises either for a full or broken disk
        parser.error(f"{args['out']}: {error}; nothing was kept")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; nothing was kept\n")
    with printing(parser):
        if as_json:
            print(json.dumps(facts))
            return
        for name in SPLITS:
            if name in facts:
                of_split = facts[name]
                print(f"{os.path.join(args['out'], name)}: {of_split['records']} images of {of_split['classes']} "
                      f"classes, {of_split['bytes'] / 1e6:.1f} MB in {of_split['shards']} shards")


if __name__ == "__main__":
    stop_on_signals()
    main()
