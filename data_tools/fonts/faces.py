"""Finds the faces of fonts and draws their glyphs, by the rules in data_tools/glyphs.py."""

import io
import multiprocessing
import os
import re
import resource
import signal
import unicodedata
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fontTools.ttLib import TTCollection, TTFont
from PIL import Image, ImageDraw, ImageFont

from data_tools.common.progress import Progress

SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
SIZES = range(8, 513)
OVERSAMPLING = 4  # glyphs are drawn this much larger, so that hinting and the position on the pixel grid do not matter
JOB_GLYPHS = 500  # glyphs that a worker gets at once
FONT_BYTES = 2**29  # most memory for reading the names and code points of a font
MOST_EMS = 50  # width or height of a glyph; the widest ligatures of Arabic have 20
MISSING = "\U0010ffff"  # never a character, so a face draws its box for a missing glyph

# Faces whose code points do not show the character: Computer Modern in TeX's own encodings, symbols in the private
# area, mathematical delimiters and operators in further sizes.
NOT_CHARACTERS = re.compile(r"cm(b|ex|mi|r|ss|sy|ti|tt)\d+$|STIXNonUni|STIXSiz|DejaVu\w+Display", re.IGNORECASE)
MANY_TO_ONE = 13  # the cmap format of last-resort fonts: one box for each block of Unicode


class GlyphError(Exception):
    """A mistake of the user: what was given, what is allowed, what to do, in one line."""


@dataclass(frozen=True, order=True)
class Face:
    """One face of a font file."""

    name: str  # PostScript name in characters that are safe in a file name; unique
    family: str
    path: str
    index: int  # of the face in its file
    code_points: tuple  # sorted; only those that can be a class


def font_folders(named, system):
    """Folders to search for fonts: matplotlib's, the named ones, the system's."""
    from matplotlib import get_data_path  # here, so that workers do not import matplotlib

    for folder in named:
        if not os.path.isdir(folder):
            raise GlyphError(f"--fonts {folder}: no such folder; name folders that hold {' '.join(SUFFIXES)} files")
    data_dirs = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share"
    shares = ["/usr/share", "~/.local/share", *data_dirs.split(":")] if system else []
    usual = [f"{share}/fonts" for share in shares] + ["~/.fonts"] * system
    return [f"{get_data_path()}/fonts/ttf", *named, *map(os.path.expanduser, usual)]


def find_faces(folders):
    """(faces sorted by name, number of faces that cannot be used); if several have the same name, the first counts."""
    faces, skipped = {}, 0
    for path in (path for folder in folders for path in sorted(Path(folder).rglob("*"))):
        if path.suffix.lower() not in SUFFIXES or not path.is_file():  # reading a pipe or a device may never end
            continue
        try:
            content = path.read_bytes()
            kind = TTCollection if content.startswith(b"ttcf") else TTFont
            font = kind(io.BytesIO(content), lazy=True)
        except Exception:  # a broken file can make fontTools raise anything
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
    """MemoryError in this block where it takes more than this memory.

    All entries of a font's tables can refer to the same bytes, and fontTools copies these for every entry.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (min(n for n in (used + num_bytes, soft, hard) if n >= 0), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def read_face(font, path, index):
    """The Face of a font opened by fontTools; None if it cannot be read or its code points do not show characters."""
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


def draw(font, character, size):
    """PNG bytes of one glyph, b"" if it has no ink or is larger than glyphs of writing systems are.

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
    """{code point: PNG bytes} of the glyphs that a face has; job is (path, index of the face, code points, size)."""
    path, index, code_points, size = job
    font = open_face(path, index, OVERSAMPLING * inner_side(size))
    missing = draw(font, MISSING, size)
    images = {code: draw(font, chr(code), size) for code in code_points}
    return {code: image for code, image in images.items() if image not in (b"", missing)}


def draw_faces(faces, code_points, size, workers):
    """{face name: {code point: PNG bytes}} of those of the code points that a face has."""
    wanted, names, jobs = set(code_points), [], []
    for face in faces:
        own = [code for code in face.code_points if code in wanted]
        for start in range(0, len(own), JOB_GLYPHS):
            names.append(face.name)
            jobs.append((face.path, face.index, own[start : start + JOB_GLYPHS], size))
    images = {face.name: {} for face in faces}
    # Ctrl-C reaches every process of a terminal; only the main process handles it.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), signal.signal,
                               (signal.SIGINT, signal.SIG_IGN))
    try:
        with Progress("drawing", sum(len(code_points) for _, _, code_points, _ in jobs), "glyphs") as progress:
            for name, job, drawn in zip(names, jobs, pool.map(draw_glyphs, jobs), strict=True):
                images[name].update(drawn)
                progress.add(len(job[2]))
    finally:
        pool.shutdown(cancel_futures=True)
    return images
