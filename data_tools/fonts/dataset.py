"""Makes the data set of glyphs, by the rules in data_tools/glyphs.py, and writes it."""

import io
import os
import random
import time
import unicodedata
from pathlib import Path

import PIL
from PIL import Image, ImageDraw, features

from data_tools.common.atomic import atomic_folder
from data_tools.common.progress import Progress, note
from data_tools.fonts.classes import (
    check_test_faces,
    class_name,
    common_code_points,
    hold_out,
    merge,
    split_classes,
    typefaces,
)
from data_tools.fonts.faces import SIZES, GlyphError, draw_faces, find_faces, font_folders

SHEET_ROWS = 48
SUMMARY = ("{classes} classes, {train_images} train images, {test_images} test images of {tested_classes} classes, "
           "{faces} faces, {test_faces} of them for test")


def make_glyphs(args):
    """Makes args.out and returns the counts of its summary.

    args  the flags of data_tools.glyphs

    GlyphError or OSError, with nothing at args.out, for whatever the user can fix.
    """
    started, out = time.monotonic(), Path(os.path.abspath(args.out))
    check_options(args, out)
    faces, skipped = find_faces(font_folders(args.fonts, args.system_fonts))
    check_test_faces(args.test_faces, len(faces) // 2, len(faces))
    code_points = common_code_points((face.code_points for face in faces), args.min_faces)
    check_classes(len(code_points), args)
    if skipped:
        note(f"skipped {skipped} font faces that do not show Unicode characters or cannot be read")

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
    with atomic_folder(out) as partial:
        partial = Path(partial)
        write_tree(partial, splits)
        (partial / "classes.tsv").write_text(class_table(classes, splits), encoding="utf-8")
        (partial / "README.txt").write_text(readme(counts, args, faces, held_out), encoding="utf-8")
    if args.sheet:
        contact_sheet(splits, faces, held_out, args.size).save(args.sheet, "PNG")
    return {**counts, "seconds": round(time.monotonic() - started, 3)}


def check_options(args, out):
    """GlyphError for flags that cannot work with any fonts."""
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


def check_classes(num_classes, args):
    if num_classes < (args.classes or 2):
        raise GlyphError(f"{num_classes} classes found in {args.min_faces} or more faces, {args.classes or 2} needed; "
                         "lower --classes or --min-faces or name folders with more fonts by --fonts")


def write_tree(folder, splits):
    with Progress("writing", len(splits), "classes") as progress:
        for founder, of_splits in splits.items():
            for split, images in zip(("train", "test"), of_splits, strict=True):
                if images:
                    place = folder / split / class_name(founder)
                    place.mkdir(parents=True)
                    for name, image in images.items():
                        (place / f"{name}.png").write_bytes(image)
            progress.add(1)


def class_table(classes, splits):
    lines = ["class\tcharacters\tname\ttrain_faces\ttest_faces"]
    for founder, (train, test) in splits.items():
        characters = " ".join(map(chr, classes[founder]))
        name = unicodedata.name(chr(founder), "")
        lines.append(f"{class_name(founder)}\t{characters}\t{name}\t{len(train)}\t{len(test)}")
    return "\n".join(lines) + "\n"


def readme(counts, args, faces, held_out):
    """README.txt; it names no folder, so it is the same on every machine with the same fonts."""
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
