"""Names of files: which claim to be images, which hold other data, and which are never data."""

import os
import stat

from xc.data.image_types import HEAD_BYTES, image_type

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
                  ".avif", ".heic", ".heif", ".jp2", ".jxl")
_IMAGE_ENDINGS = frozenset(suffix[1:] for suffix in IMAGE_SUFFIXES)
ARCHIVE_SUFFIXES = (".tar", ".rec", ".parquet", ".zip", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".h5",
                    ".hdf5", ".arrow", ".tfrecord", ".mdb", ".npz")
# At the top of a tree, where no class is, and beside shards: lists, indexes, descriptions. An image is none of them.
TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".md", ".yaml", ".yml", ".xml", ".mat", ".lst", ".idx",
                  ".lock", "property")
# Beside an image of the same name. What it says about the image is not kept.
COMPANION_SUFFIXES = (".json", ".txt", ".xml", ".cls", ".npy", ".md5", ".sha256")
# What systems, editors and publishers put beside data. A class may be called license or notice, a folder of it, too.
_FOLDERS = frozenset(".appledouble .spotlight-v100 .fseventsd .trashes __macosx $recycle.bin @eadir lost+found "
                     ".ipynb_checkpoints __pycache__ .git .svn .hg .idea .vscode".split())
_FILES = frozenset(
    ".ds_store .localized thumbs.db ehthumbs.db desktop.ini .directory .gitignore .gitattributes .gitkeep .keep".split()
    + ["icon\r"] + [word + suffix for suffix in ("", ".txt", ".md", ".rst", ".html", ".pdf", ".cff", ".bib")
                    for word in "readme license licence copying notice citation authors changelog".split()])


def is_never_data(name, is_folder=False):
    """Whether a file, or a folder, of this name holds no images, whatever its content."""
    name = name.lower()
    return name in _FOLDERS if is_folder else name in _FILES or name.startswith(("._", ".nfs"))


def claims_image(name):
    """Whether the name ends as that of an image."""
    return name[name.rfind(".") + 1 :].lower() in _IMAGE_ENDINGS


def content_is_image(path):
    """Whether a file begins as images do; False where it is no file or cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # else a pipe waits for its writer
        try:
            is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
            return is_file and image_type(os.read(descriptor, HEAD_BYTES)) is not None
        finally:
            os.close(descriptor)
    except OSError:
        return False
