"""Pictures of a pack for data_tools.show: images by class, and a contact sheet."""

import io
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from xc.data.images import decode
from xc.errors import one_line

SIDE, IMAGE, TEXT = 8, 96, 14  # images in a row and a column of a sheet; pixels of each, and of the line below it
POINTS = 1000  # most points of a curve


def contact_sheet(images, names, columns=SIDE):
    """A PNG, as bytes, of images in rows of so many, with a name below each.

    images  [(IMAGE, IMAGE, 3) uint8]
    """
    import matplotlib  # here, because it is slow to import; it has a font

    font = ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), TEXT - 4,
                              layout_engine=ImageFont.Layout.BASIC)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * IMAGE, rows * (IMAGE + TEXT)))
    draw = ImageDraw.Draw(sheet)
    for place, (image, name) in enumerate(zip(images, names, strict=True)):
        row, column = divmod(place, columns)
        left, top = column * IMAGE, row * (IMAGE + TEXT)
        sheet.paste(Image.fromarray(image), (left, top))
        text = one_line(name)[:IMAGE]  # before it is measured: it may have any length
        while draw.textlength(text, font) > IMAGE - 4:
            text = text[:-1]
        draw.text((left + 2, top + IMAGE), text, font=font, fill="white")
    return _png(sheet.save)


def square(data):
    """(IMAGE, IMAGE, 3) uint8 of the image in data (bytes); ValueError as for xc.data.images.decode."""
    return decode(data, IMAGE, 3).transpose(1, 2, 0)


def rank_frequency(counts):
    """A PNG, as bytes: the number of images by class, the most frequent first, of {split: (C,) counts}."""
    from matplotlib.figure import Figure  # here, because it is slow to import; Figure needs no display

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for split, of_split in counts.items():
        ordered = np.sort(of_split[of_split > 0])[::-1]
        ranks = np.unique(np.geomspace(1, len(ordered), POINTS).astype(np.int64))
        axes.loglog(ranks, ordered[ranks - 1], marker="." if len(ranks) < 50 else None,
                    label=f"{split}: {of_split.sum():,} images of {len(ordered):,} classes")
    axes.set_xlabel("class, the most frequent is 1")
    axes.set_ylabel("images")
    axes.grid(alpha=0.3)
    axes.legend()
    return _png(lambda file, format: figure.savefig(file, format=format, dpi=130))


def _png(save):
    file = io.BytesIO()
    save(file, format="png")
    return file.getvalue()
