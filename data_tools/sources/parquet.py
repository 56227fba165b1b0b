"""Parquet files with a row for every image."""

import os

from data_tools.sources.base import Format, shards
from data_tools.sources.manifest import MAX_PATH_BYTES, check_row, weight_of
from xc import pack as layout
from xc.pack import PackError

ROWS = 1024  # read at once, of columns that keep each value once (dictionaries)


def records(path, skipped):
    """Yields the rows of Parquet files, with the columns of a manifest, or `image` with the bytes instead of `path`.

    image  binary, or a struct with a binary field bytes
    """
    from pyarrow import ArrowException  # here, because importing it takes longer than packing a small data set

    for split, file in shards(path, ".parquet"):
        try:
            for number, row in enumerate(_parquet_rows(file), 1):
                where, image = f"{file}: row {number}", row.pop("image", None)
                if image is None:
                    yield _parquet_record(where, split, row)
                elif (num_bytes := image.as_buffer().size) > layout.MAX_RECORD_BYTES:
                    skipped.add(split, where, f"{num_bytes} bytes, more than {layout.MAX_RECORD_BYTES}")
                else:
                    yield _parquet_record(where, split, row, image.as_py())
        except MemoryError as error:
            raise PackError(f"{file}: some of its rows do not fit into memory ({error}); write it in smaller "
                            "pages, or take a machine with more") from error
        except (ArrowException, OSError, ValueError) as error:
            if isinstance(error, PackError):
                raise
            raise PackError(f"{file}: not readable as Parquet: {error}") from error


def _parquet_rows(file):
    """Yields {column: pyarrow scalar, or None} of each row.

    A file of some kilobytes can hold a value of many megabytes a thousand times, so one row is read at a time. Columns
    with a dictionary are read ROWS rows at a time, because every read brings the whole dictionary.
    """
    from pyarrow.parquet import ParquetFile
    from pyarrow.types import is_dictionary

    def read(columns, rows):
        with ParquetFile(file, pre_buffer=False, buffer_size=2**20) as table:
            for batch in table.iter_batches(rows, columns=columns, use_threads=False):
                for number in range(batch.num_rows):
                    yield {name: _plain(column[number])
                           for name, column in zip(batch.schema.names, batch.columns, strict=True)}

    with ParquetFile(file) as table:
        schema = table.schema_arrow
    columns = _parquet_columns(file, schema)
    coded = [name for name in columns if name in schema.names and is_dictionary(schema.field(name).type)]
    plain = [name for name in columns if name not in coded]
    readers = [read(*some) for some in ((plain, 1), (coded, ROWS)) if some[0]]
    for parts in zip(*readers, strict=True):
        yield {name: value for part in parts for name, value in part.items()}


def _plain(value):
    """The inner scalar of a struct or dictionary scalar, without a copy; None where it is null."""
    from pyarrow import DictionaryScalar, StructScalar

    while value is not None and value.is_valid:
        if isinstance(value, StructScalar):
            value = value["bytes"]
        elif isinstance(value, DictionaryScalar):
            value = value.value
        else:
            return value
    return None


def _parquet_columns(file, schema):
    from pyarrow import types

    kinds = dict(zip(schema.names, schema.types, strict=True))
    if len(kinds) != len(schema.names) or "label" not in kinds or not kinds.keys() & {"path", "image"}:
        raise PackError(f"{file}: must have the columns label, path or image and, if wanted, split and weight once "
                        f"each; it has {', '.join(map(repr, schema.names))}")
    names = [name for name in ("path", "label", "split", "weight", "image") if name in kinds]
    columns = list(names)
    for name in names:
        kind = kinds[name]
        if types.is_dictionary(kind):
            kind = kind.value_type
        if name == "image":
            if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                kind, columns[-1] = kind.field("bytes").type, "image.bytes"
            fits = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
        elif name == "weight":
            fits = types.is_floating(kind) or types.is_integer(kind)
        else:
            fits = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
            fits = fits or (name == "label" and types.is_integer(kind))
        if not fits:
            raise PackError(f"{file}: column {name} is of type {kind}; path and split must be texts, label a text or "
                            "an integer, weight a number, image binary")
    return columns


def _parquet_record(where, split, row, image=None):
    if image is not None:
        row.pop("path", None)
    texts = {name: _text(where, name, value) for name, value in row.items()}
    if image is None and "path" not in texts:
        raise PackError(f"{where}: no image")
    check_row(where, texts)
    # The path of an image that comes as bytes is only a name for messages.
    path = where if image is not None else os.path.normpath(texts["path"])
    return texts.get("split", split), path, texts["label"], image, *weight_of(where, texts)


def _text(where, name, value):
    """A pyarrow scalar as a text; PackError where it is too long."""
    from pyarrow import BinaryScalar

    if value is None:
        return ""
    if isinstance(value, BinaryScalar) and (num_bytes := value.as_buffer().size) > MAX_PATH_BYTES:
        raise PackError(f"{where}: {name} of {num_bytes} bytes, more than {MAX_PATH_BYTES}")
    return str(value.as_py())


FORMAT = Format(records, ".parquet", lambda path, head: head[:4] == b"PAR1", names_files=True)
