"""Names of files: which claim to be images, which hold other data, and which are never data."""

import os
import stat

from xc.data.image_types import HEAD_BYTES, image_type

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
                  ".avif", ".heic", ".heif", ".jp2", ".jxl")
_IMAGE_ENDINGS = frozenset(suffix[1:] for suffix in IMAGE_SUFFIXES)
ARCHIVE_SUFFIXES = (".tar", ".rec", ".parquet", ".zip", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".h5",
                    ".hdf5", ".arrow", ".tfrecord", ".mdb", ".npz")
# Beside an image of the same name. What it says about the image is not kept.
COMPANION_SUFFIXES = (".json", ".txt", ".xml", ".cls", ".npy", ".md5", ".sha256")
# What systems, editors and publishers put beside data; ._ and .nfs begin names of files of macOS and of NFS.
_NEVER_DATA = frozenset(
    (".ds_store .appledouble .localized .spotlight-v100 .fseventsd .trashes __macosx thumbs.db ehthumbs.db desktop.ini "
     "$recycle.bin @eadir lost+found .directory .ipynb_checkpoints __pycache__ .git .gitignore .gitattributes .gitkeep "
     ".keep .svn .hg .idea .vscode").split()
    + ["icon\r"] + [word + suffix for suffix in ("", ".txt", ".md", ".rst", ".html", ".pdf", ".cff", ".bib")
                    for word in "readme license licence copying notice citation authors changelog".split()])


def is_never_data(name):
    """Whether a file or folder of this name holds no images, whatever its content."""
    name = name.lower()
    return name in _NEVER_DATA or name.startswith(("._", ".nfs"))


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
