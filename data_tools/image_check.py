"""What is looked at of an image before its bytes are packed: --check of data_tools.pack."""

from xc.pack import open_header, open_image

CHECKS = ("full", "header", "none")


def check_image(data, max_pixels, check):
    """ValueError where the image in data (bytes) cannot be packed.

    full    It decodes: its reader will, too.
    header  Its type is known, its size allowed, and it ends as its format says: JPEG, WebP and GIF at their end mark or
            length, PNG with all checksums right. That finds cut files and other files, but not damage inside of a JPEG,
            WebP or GIF, nor data that does not make as many pixels as announced. Whatever has no such end is decoded.
    none    It is not empty.

    What a reader meets then that does not decode has a right checksum, and an error that names the record.
    """
    if check == "none":
        if not data:
            raise ValueError("empty")
    elif check == "full" or not _is_whole(open_header(data, max_pixels), data):
        open_image(data, max_pixels, only_check=True)


def _is_whole(image, data):
    """Whether a Pillow image of these bytes ends as it should; False where that is not known."""
    match image.format:
        case "PNG":
            try:
                image.verify()
            except Exception:  # decoding says it better
                return False
            return True
        case "JPEG":
            return data.endswith(b"\xff\xd9")
        case "WEBP":
            return int.from_bytes(data[4:8], "little") + 8 == len(data)
        case "GIF":
            return data.endswith(b";")
    return False
