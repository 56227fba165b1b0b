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
import io
import json
import logging
import multiprocessing
import os
import random
import re
import resource
import secrets
import shutil
import signal
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import PIL
from fontTools.ttLib import TTCollection, TTFont
from PIL import Image, ImageDraw, ImageFont, features
from tqdm import tqdm

SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
SIZES = range(8, 513)
OVERSAMPLING = 4  # glyphs are drawn this much larger, which makes hinting and the place on the pixel grid not matter
JOB_GLYPHS = 500  # what a worker is given at once
FONT_BYTES = 2**29  # of memory that reading the names and code points of a font may take
MOST_EMS = 50  # width or height of a glyph; the widest ligatures of Arabic have 20
MISSING = "\U0010ffff"  # never a character, so a face draws its box for a missing glyph

# Faces whose code points do not show the character: Computer Modern in TeX's own encodings, symbols in the private
# area, mathematical delimiters and operators in further sizes.
NOT_CHARACTERS = re.compile(r"cm(b|ex|mi|r|ss|sy|ti|tt)\d+$|STIXNonUni|STIXSiz|DejaVu\w+Display", re.IGNORECASE)
MANY_TO_ONE = 13  # the cmap format of last-resort fonts: one box for each block of Unicode

SHEET_ROWS = 48
SUMMARY = ("{classes} classes, {train_images} train images, {test_images} test images of {tested_classes} classes, "
           "{faces} faces, {test_faces} of them for test")


class GlyphError(Exception):
    """What was given, what is allowed, what to do; in one line."""


@dataclass(frozen=True, order=True)
class Face:
    """One face of a font file."""

    name: str  # PostScript name in characters that are safe in a file name; unique
    family: str
    path: str
    index: int  # of the face in its file
    code_points: tuple  # sorted; those that can be a class


# Faces


def font_folders(named, system):
    """Folders to search for fonts: matplotlib's, the named ones, the system's."""
    from matplotlib import get_data_path  # here, because workers need not wait for matplotlib

    for folder in named:
        if not os.path.isdir(folder):
            raise GlyphError(f"--fonts {folder}: no such folder; name folders that hold {' '.join(SUFFIXES)} files")
    data_dirs = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share"
    shares = ["/usr/share", "~/.local/share", *data_dirs.split(":")] if system else []
    usual = [f"{share}/fonts" for share in shares] + ["~/.fonts"] * system
    return [f"{get_data_path()}/fonts/ttf", *named, *map(os.path.expanduser, usual)]


def find_faces(folders):
    """(faces sorted by name, number of faces that cannot be used); of several of one name the first counts."""
    faces, skipped = {}, 0
    for path in (path for folder in folders for path in sorted(Path(folder).rglob("*"))):
        if path.suffix.lower() not in SUFFIXES or not path.is_file():  # reading a pipe or a device may never end
            continue
        try:
            content = path.read_bytes()
            kind = TTCollection if content.startswith(b"ttcf") else TTFont
            font = kind(io.BytesIO(content), lazy=True)
        except Exception:  # fontTools raises whatever a broken file leads it to
            skipped += 1
            continue
        for index, member in enumerate(getattr(font, "fonts", [font])):
            with at_most(FONT_BYTES):
                face = read_face(member, str(path), index)
            if face is None:
                skipped += 1
            else:
                faces.setdefault(face.name, face)
    return sorted(faces.values()), skipped


@contextmanager
def at_most(num_bytes):
    """MemoryError for what takes more than so much memory: the entries of a font's tables can all mean the same bytes,
    and fontTools copies them for every entry."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (min(n for n in (used + num_bytes, soft, hard) if n >= 0), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def read_face(font, path, index):
    """The Face of a font opened by fontTools; None if its code points show other things or it cannot be read."""
    try:
        names, best = font["name"], font["cmap"].getBestCmap() or {}
        name = re.sub(r"[^A-Za-z0-9._-]", "_", names.getDebugName(6) or f"{Path(path).stem}-{index}")
        last_resort = any(table.format == MANY_TO_ONE for table in font["cmap"].tables)
        code_points = tuple(sorted(code for code in best if unicodedata.category(chr(code))[0] not in "CZM"))
        if last_resort or NOT_CHARACTERS.match(name) or not code_points:
            return None
        open_face(path, index, SIZES[0]).getbbox(MISSING)  # fails for a font that has bitmaps only
        return Face(name, names.getDebugName(16) or names.getDebugName(1) or name, path, index, code_points)
    except Exception:  # as above
        return None


def open_face(path, index, em):
    return ImageFont.truetype(path, em, index=index, layout_engine=ImageFont.Layout.BASIC)


# Images


def draw(font, character, size):
    """PNG bytes of one glyph, b"" if it has no ink or is larger than a writing system's glyph is.

    font  opened at OVERSAMPLING · inner_side(size) pixels per em
    size  side of the image in pixels
    """
    try:
        left, top, right, bottom = font.getbbox(character)
    except OSError:  # a broken outline
        return b""
    if right <= left or bottom <= top or max(right - left, bottom - top) > MOST_EMS * font.size:
        return b""
    glyph = Image.new("L", (right - left, bottom - top))
    try:
        ImageDraw.Draw(glyph).text((-left, -top), character, fill=255, font=font)
    except OSError:
        return b""
    glyph = glyph.crop(glyph.getbbox())
    inner = OVERSAMPLING * inner_side(size)
    if max(glyph.size) > inner:
        shrunk = [max(1, round(side * inner / max(glyph.size))) for side in glyph.size]
        glyph = glyph.resize(shrunk, Image.Resampling.HAMMING)
    large = Image.new("L", (OVERSAMPLING * size, OVERSAMPLING * size))
    large.paste(glyph, ((large.width - glyph.width) // 2, (large.height - glyph.height) // 2))
    image = large.reduce(OVERSAMPLING)
    if image.getbbox() is None:
        return b""
    png = io.BytesIO()
    image.point(lambda ink: 255 - ink).save(png, "PNG")
    return png.getvalue()


def inner_side(size):
    return size - 2 * max(1, size // 16)


def draw_glyphs(job):
    """{code point: PNG bytes} of what a face really has; job is (path and index of the face, code points, size)."""
    path, index, code_points, size = job
    font = open_face(path, index, OVERSAMPLING * inner_side(size))
    missing = draw(font, MISSING, size)
    images = {code: draw(font, chr(code), size) for code in code_points}
    return {code: image for code, image in images.items() if image not in (b"", missing)}


def draw_faces(faces, code_points, size, workers):
    """{face name: {code point: PNG bytes}}; code_points are those to draw where a face has them."""
    wanted, names, jobs = set(code_points), [], []
    for face in faces:
        own = [code for code in face.code_points if code in wanted]
        for start in range(0, len(own), JOB_GLYPHS):
            names.append(face.name)
            jobs.append((face.path, face.index, own[start : start + JOB_GLYPHS], size))
    images = {face.name: {} for face in faces}
    # Ctrl-C reaches every process of a terminal; workers leave it to the main one.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), signal.signal,
                               (signal.SIGINT, signal.SIG_IGN))
    try:
        for name, drawn in zip(names, progress(pool.map(draw_glyphs, jobs), len(jobs), "drawing"), strict=True):
            images[name].update(drawn)
    finally:
        pool.shutdown(cancel_futures=True)
    return images


def progress(items, total, what):
    """Passes items through and shows how many: a bar on a terminal, else at most ten lines."""
    if sys.stderr.isatty():
        yield from tqdm(items, what, total)
        return
    for count, item in enumerate(items, 1):
        if count == total or count % -(-total // 10) == 0:
            print(f"{what}: {count} of {total}", file=sys.stderr, flush=True)
        yield item


# Classes


def common_code_points(owned, min_faces):
    """Sorted code points that at least min_faces of the collections in owned have."""
    counts = Counter(code for code_points in owned for code in code_points)
    return sorted(code for code, count in counts.items() if count >= min_faces)


def merge(images, code_points):
    """{founder: [its code points]} of classes, by the rule in the head of this file.

    images       {face name: {code point: PNG bytes}}
    code_points  sorted
    """
    classes, founders = {}, defaultdict(list)  # founders by (face, image)
    for code in code_points:
        own = {name: of_face[code] for name, of_face in images.items() if code in of_face}
        alike = sorted({founder for look in own.items() for founder in founders[look]})
        same = (f for f in alike if all(images[name].get(f, image) == image for name, image in own.items()))
        founder = next(same, None)
        if founder is not None:
            classes[founder].append(code)
            continue
        classes[code] = [code]
        for look in own.items():
            founders[look].append(code)
    return classes


def class_name(code):
    return f"U+{code:05X}"  # five digits: the planes that need six are private


# Test faces


def typefaces(faces, images):
    """Sets of names of faces that are one design, by the rule in the head of this file."""
    groups = []
    for face in faces:
        joined = {face.name}
        for group in list(groups):
            if any(other.name in group and one_design(face, other, images) for other in faces):
                joined |= group
                groups.remove(group)
        groups.append(joined)
    return groups


def one_design(face, other, images):
    if face.family == other.family:
        return True
    common = images[face.name].keys() & images[other.name].keys()
    return 2 * sum(images[face.name][code] == images[other.name][code] for code in common) > len(common)


def split_class(founder, images, held_out):
    """({face: image}, {face: image}) of one class, for train and for test."""
    train, test = {}, {}
    for name, of_face in images.items():
        if founder in of_face:
            (test if name in held_out else train)[name] = of_face[founder]
    known = set(train.values())
    return train, {name: image for name, image in test.items() if image not in known}


def split_classes(classes, images, held_out, min_faces):
    """{founder: split_class} of the classes that keep at least half of min_faces faces in train."""
    splits = {founder: split_class(founder, images, held_out) for founder in classes}
    return {founder: split for founder, split in splits.items() if 2 * len(split[0]) >= min_faces}


def hold_out(groups, classes, images, num_faces, min_faces):
    """Names of at least num_faces faces, whole typefaces; groups is typefaces(…)."""
    def worth(group):
        splits = split_classes(classes, images, held_out | group, min_faces)
        lost, tested = len(classes) - len(splits), sum(bool(test) for _, test in splits.values())
        return tested - lost, -len(group), min(group)

    held_out = set()
    while len(held_out) < num_faces:
        room = [group for group in groups if not group & held_out and 2 * len(group | held_out) <= len(images)]
        if not room:
            check_test_faces(num_faces, len(held_out), len(images))
        held_out |= max(room, key=worth)
    return held_out


# Output


def write_tree(folder, splits):
    for founder, (train, test) in progress(splits.items(), len(splits), "writing"):
        for split, images in (("train", train), ("test", test)):
            if images:
                place = folder / split / class_name(founder)
                place.mkdir(parents=True)
                for name, image in images.items():
                    (place / f"{name}.png").write_bytes(image)


def class_table(classes, splits):
    lines = ["class\tcharacters\tname\ttrain_faces\ttest_faces"]
    for founder, (train, test) in splits.items():
        characters = " ".join(map(chr, classes[founder]))
        name = unicodedata.name(chr(founder), "")
        lines.append(f"{class_name(founder)}\t{characters}\t{name}\t{len(train)}\t{len(test)}")
    return "\n".join(lines) + "\n"


def readme(counts, args, faces, held_out):
    """Names no folder, so it is the same on every machine with the same fonts."""
    flags = f"--size {args.size} --min-faces {args.min_faces} --test-faces {args.test_faces} --seed {args.seed}"
    flags += f" --classes {args.classes}" * bool(args.classes) + " --fonts DIR" * bool(args.fonts)
    flags += "" if args.system_fonts else " --no-system-fonts"
    lines = ["Images of characters. No typeface of test is in train.", "",
             SUMMARY.format(**counts), f"python -m data_tools.glyphs OUT {flags}",
             f"Pillow {PIL.__version__}, FreeType {features.version('freetype2')}, "
             f"Unicode {unicodedata.unidata_version}", ""]
    lines += [f"{'test ' if face.name in held_out else 'train'}  {face.name}, {face.family}" for face in faces]
    return "\n".join(lines) + "\n"


def contact_sheet(splits, faces, held_out, size):
    """Image of up to SHEET_ROWS classes, evenly spaced: a class a row, a face a column, test faces last on grey."""
    rows = list(splits.items())[::-(-len(splits) // SHEET_ROWS)]
    columns = sorted((face.name in held_out, face.name) for face in faces)
    label, step = 60, size + 2
    sheet = Image.new("L", (label + step * len(columns), step * len(rows)), 255)
    first_test = label + step * (len(columns) - len(held_out))
    sheet.paste(160, (first_test, 0, *sheet.size))
    for row, (founder, (train, test)) in enumerate(rows):
        ImageDraw.Draw(sheet).text((2, row * step + step // 2 - 6), class_name(founder), fill=0)
        for column, (_, name) in enumerate(columns):
            image = train.get(name) or test.get(name)
            if image:
                sheet.paste(Image.open(io.BytesIO(image)), (label + column * step + 1, row * step + 1))
    return sheet


# The command


def make_glyphs(args):
    """Makes args.out and returns the counts of its summary; args as parsed by main."""
    started, out = time.monotonic(), Path(os.path.abspath(args.out))
    check_options(args, out)
    faces, skipped = find_faces(font_folders(args.fonts, args.system_fonts))
    check_test_faces(args.test_faces, len(faces) // 2, len(faces))
    code_points = common_code_points((face.code_points for face in faces), args.min_faces)
    check_classes(len(code_points), args)
    if skipped:
        print(f"skipped {skipped} font faces that do not show Unicode characters or cannot be read", file=sys.stderr)

    images = draw_faces(faces, code_points, args.size, args.workers)
    classes = merge(images, common_code_points(images.values(), args.min_faces))
    held_out = hold_out(typefaces(faces, images), classes, images, args.test_faces, args.min_faces)
    splits = split_classes(classes, images, held_out, args.min_faces)
    check_classes(len(splits), args)
    if args.classes:
        chosen = random.Random(args.seed).sample(sorted(splits), args.classes)
        splits = {founder: splits[founder] for founder in sorted(chosen)}

    counts = {"classes": len(splits), "tested_classes": sum(bool(test) for _, test in splits.values()),
              "train_images": sum(len(train) for train, _ in splits.values()),
              "test_images": sum(len(test) for _, test in splits.values()),
              "faces": len(faces), "test_faces": len(held_out)}
    partial = out.parent / f".{out.name}.partial-{secrets.token_hex(4)}"
    try:
        write_tree(partial, splits)
        (partial / "classes.tsv").write_text(class_table(classes, splits), encoding="utf-8")
        (partial / "README.txt").write_text(readme(counts, args, faces, held_out), encoding="utf-8")
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if args.sheet:
        contact_sheet(splits, faces, held_out, args.size).save(args.sheet, "PNG")
    return {**counts, "seconds": round(time.monotonic() - started, 3)}


def check_options(args, out):
    """Raises GlyphError for options that no font could make right."""
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise GlyphError(f"{args.out} exists; name a new folder or an empty one")
    if not out.parent.is_dir():
        raise GlyphError(f"{args.out}: there is no folder {out.parent} to make it in; make that first")
    sheet = args.sheet and Path(os.path.abspath(args.sheet))
    if sheet and (os.path.lexists(sheet) or not sheet.parent.is_dir()):
        raise GlyphError(f"--sheet {args.sheet}: exists, or its folder does not; name a new file, such as sheet.png")
    for option, value, least in (("--min-faces", args.min_faces, 2), ("--test-faces", args.test_faces, 1),
                                 ("--workers", args.workers, 1), ("--classes", args.classes, 2)):
        if value is not None and value < least:
            raise GlyphError(f"{option} {value}: must be at least {least}")
    if args.size not in SIZES:
        raise GlyphError(f"--size {args.size}: must be from {SIZES[0]} to {SIZES[-1]} pixels")


def check_test_faces(num_faces, most, all_faces):
    if num_faces > most:
        raise GlyphError(f"--test-faces {num_faces}: of the {all_faces} faces found, at most {most} can be held out as "
                         "whole typefaces; ask for fewer or name folders with more fonts by --fonts")


def check_classes(num_classes, args):
    if num_classes < (args.classes or 2):
        raise GlyphError(f"{num_classes} classes found in {args.min_faces} or more faces, {args.classes or 2} needed; "
                         "lower --classes or --min-faces or name folders with more fonts by --fonts")


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
