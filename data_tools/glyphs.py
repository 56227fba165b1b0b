"""Makes a data set of images of characters from typefaces: python -m data_tools.glyphs OUT

A class is a code point, an image of it is its glyph in one face (one style of a typeface: DejaVu Serif Bold). The
faces are those that matplotlib carries, those found in the system's font folders and in the folders of --fonts. OUT
is a new folder with train/<class>/<face>.png and test/<class>/<face>.png (8 bit grey, ink 0, paper 255), classes.tsv
and README.txt; it appears only when everything is done. The same fonts and options, under the same versions of Python
(its Unicode tables) and Pillow, give the same bytes, whatever the number of workers.

Images. One em of the face is the image's side without its margin (1/16 of the side, at least 1 pixel), so a comma
stays small and c differs from C. Only a glyph whose ink is larger than that is shrunk until it fits, both ways alike.
The ink's box is in the middle: place on the line is lost, so an acute accent and a low acute accent look alike.

Classes. Left out are code points that are unassigned, private, controls, spaces or marks combined with a letter;
in a face, glyphs that are blank or the face's box for a missing glyph; then code points that fewer than --min-faces
faces have. In the order of code points, each joins the first class whose first code point has the same image in
every face that both have, at least one; else it founds a class. Its founder names a class and gives it its images.

Test. Faces of one family are one typeface, and so are faces that draw more than half of their common code points
identically (the regional versions of a CJK design). Typefaces are held out whole until --test-faces faces are out:
each time the one, with half of all faces out at most, for which most classes are tested less those lost. A class is
lost, and left out, if train keeps less than half of --min-faces faces of it. An image of a held-out face that equals
one of its class in train would test memory only and is left out, so not every class is tested.
"""

import argparse
import json
import logging
import os
import sys
from concurrent.futures.process import BrokenProcessPool

from data_tools.fonts.dataset import SUMMARY, make_glyphs
from data_tools.fonts.faces import GlyphError


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise GlyphError(f"{message}; see --help")


def parse(argv):
    parser = Parser(prog="python -m data_tools.glyphs", description="Makes a data set of images of characters.")
    parser.add_argument("out", metavar="OUT", help="the data set, a new folder")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels (%(default)s)")
    parser.add_argument("--min-faces", type=int, default=6, metavar="N",
                        help="faces that must have a code point (%(default)s)")
    parser.add_argument("--classes", type=int, metavar="N", help="keep this many classes, drawn by the seed (all)")
    parser.add_argument("--fonts", nargs="+", default=[], metavar="DIR", help="folders with further fonts")
    parser.add_argument("--no-system-fonts", dest="system_fonts", action="store_false",
                        help="leave out the fonts installed on this machine")
    parser.add_argument("--test-faces", type=int, default=4, metavar="N",
                        help="hold out whole typefaces until this many faces are out (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of --classes (%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N",
                        help="processes (%(default)s); the result is the same")
    parser.add_argument("--sheet", metavar="PNG", help="write a sheet of some classes to look at")
    return parser.parse_args(argv)


def main(argv=None):
    logging.getLogger("fontTools").setLevel(logging.CRITICAL)  # it mentions odd tables of fonts that draw well
    try:
        args = parse(argv)
        counts = make_glyphs(args)
    except (GlyphError, OSError, BrokenProcessPool) as error:
        print(f"glyphs: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("glyphs: interrupted; nothing was kept", file=sys.stderr)
        return 130
    print(f"{args.out}: {SUMMARY.format(**counts)}")
    print(json.dumps(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
