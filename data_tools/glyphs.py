"""Makes a data set of images of characters from typefaces: python -m data_tools.glyphs OUT

A class is a code point. An image of it is its glyph in one face, that is one style of a typeface, as DejaVu Serif Bold.
The faces are those of matplotlib, of the system's font folders and of the folders of --fonts. OUT is a new folder with
train/<class>/<face>.png and test/<class>/<face>.png (8-bit grey, ink 0, paper 255), classes.tsv and README.txt. It
appears complete or not at all. The same fonts and flags, with the same versions of Python (its Unicode tables) and
Pillow, give the same bytes, whatever the number of workers.

Images. One em of the face is the side of the image without its margin (1/16 of the side, at least 1 pixel), so a comma
stays small and c differs from C. A glyph is shrunk only if its ink is larger than that, by one factor for both sides.
The box of the ink is in the middle. Its position on the line is lost: an acute and a low acute accent look alike.

Classes. Code points are left out that are unassigned, private, controls, spaces or combining marks. Of a face, glyphs
are left out that are blank or the face's box for a missing glyph. Then code points are left out that fewer than
--min-faces faces have. The remaining code points are taken in order. Each joins the first class whose first code point
has the same image in every face that has both, if there is such a face; otherwise it founds a class. The founder gives
the class its name and its images.

Test. Faces of one family are one typeface. So are faces that draw more than half of their common code points
identically, as the regional versions of a CJK design. Whole typefaces are held out until there are --test-faces faces.
Each time it is the typeface with the largest number of tested classes minus lost classes, as long as at most half of
all faces are held out. A class is lost, and left out, if fewer than half of --min-faces faces of it stay in train. An
image of a held-out face that equals an image of its class in train would test memory only. It is left out, so not
every class is tested.
"""

import json
import logging
import os
from concurrent.futures.process import BrokenProcessPool

from data_tools.common.command import Parser, add_switch, printing, stop_on_signals
from data_tools.fonts.dataset import SUMMARY, make_glyphs
from data_tools.fonts.faces import GlyphError


def main(argv=None):
    parser = Parser(prog="data_tools.glyphs", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("out", metavar="OUT", help="the data set, a new folder")
    add("--size", type=int, default=32, help="side of the images in pixels (%(default)s)")
    add("--min-faces", type=int, default=6, metavar="N", help="faces that must have a code point (%(default)s)")
    add("--classes", type=int, metavar="N", help="keep this many classes, drawn by the seed (all)")
    add("--fonts", nargs="+", default=[], metavar="DIR", help="folders with further fonts")
    add_switch(parser, "--system-fonts", True, "use the fonts installed on this machine (yes)")
    add("--test-faces", type=int, default=4, metavar="N",
        help="hold out whole typefaces until there are this many faces (%(default)s)")
    add("--seed", type=int, default=0, help="of --classes (%(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N",
        help="processes; the result is the same (%(default)s)")
    add("--sheet", metavar="PNG", help="write a picture of some classes")
    args = parser.parse_args(argv)
    logging.getLogger("fontTools").setLevel(logging.CRITICAL)  # it warns about odd tables of fonts that draw well
    try:
        counts = make_glyphs(args)
    except (GlyphError, OSError, BrokenProcessPool) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; nothing was kept\n")
    with printing(parser):
        print(f"{args.out}: {SUMMARY.format(**counts)}")
        print(json.dumps(counts))


if __name__ == "__main__":
    stop_on_signals()
    main()
