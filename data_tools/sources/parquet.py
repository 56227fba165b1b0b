"""Parquet files with a row for every image."""

import json
from collections import Counter

from data_tools.sources.base import Format, shards
from data_tools.sources.columns import MAX_PATH_BYTES, USUAL, Columns
from xc.data import pack as layout
from xc.data.pack import PackError

MOST_SPLIT_BYTES = 256  # of a row of a column that may hold the splits, on average
ROWS = 1024  # read at once, of columns that keep each value once (dictionaries)
HUGGINGFACE = b"huggingface"  # key of the description that the package datasets writes into the schema


def records(path, how, skipped):
    """Yields the rows of Parquet files, with the columns of a manifest, or with the bytes of the images instead of
    paths.

    A column of images is binary, or a struct with a binary field bytes. If the schema names the classes (ClassLabel of
    the package datasets), these are the names.
    """
    from pyarrow import ArrowException  # here, because importing it takes longer than packing a small data set

    for split, file in shards(path, ".parquet", how, skipped):
        try:
            yield from _records(split, file, how, skipped)
        except MemoryError as error:
            raise PackError(f"{file}: some of its rows do not fit into memory ({error}); write it in smaller "
                            "pages, or take a machine with more") from error
        except (ArrowException, OSError, ValueError) as error:
            if isinstance(error, PackError):
                raise
            raise PackError(f"{file}: not readable as Parquet: {error}") from error


def _records(split, file, how, skipped):
    table = _Table(file, how)
    for number, row in enumerate(_rows(file, table), 1):
        where, image = f"{file}: row {number}", row.pop("image", None)
        if image is not None and (num_bytes := image.as_buffer().size) > layout.MAX_RECORD_BYTES:
            skipped.add(split, where, f"{num_bytes} bytes, more than {layout.MAX_RECORD_BYTES}")
            continue
        texts = {what: _text(where, what, value) for what, value in row.items()}
        if image is None and "path" not in texts:
            raise PackError(f"{where}: no image")
        if table.class_names is not None and not how.leaves_out(split):
            name = table.class_names.get(texts["label"])
            if name is None:
                skipped.add(split, where, f"label {texts['label'] or 'null'} is none of the {len(table.class_names)} "
                                          "classes that the schema names")
                continue
            texts["label"] = name
        yield table.columns.record(where, texts, image and image.as_py(), split)


class _Table:
    """What the schema of a file says.

    columns      Columns
    names        {"image" or "path", "label", …: name of the column}
    fields       {name of a column: what is read of it, as image.bytes}
    coded        names of the columns that have a dictionary
    class_names  {label as a text: name} of the schema; None: it names none
    """

    def __init__(self, file, how):
        from pyarrow import types
        from pyarrow.parquet import ParquetFile

        with ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
        image = next((name for name in self._candidates(schema, how) if _image_type(schema.field(name).type)), None)
        self.columns = Columns(file, schema.names, how if image is None else
                               how.with_columns({**how.columns, "path": image}))
        names = {what: schema.names[index] for what, index in self.columns.place.items()}
        if image is not None:
            names["image"] = names.pop("path")
        for what, name in names.items():
            _check_type(file, what, name, schema.field(name).type)
        self.names = names
        self.fields = {name: name + ".bytes" * types.is_struct(schema.field(name).type) for name in names.values()}
        self.coded = {name for name in names.values() if types.is_dictionary(schema.field(name).type)}
        self.class_names = None
        if types.is_integer(schema.field(names["label"]).type):
            self.class_names = _class_names(file, schema, names["label"], how)
            (how.bare if self.class_names is None else how.named).add(file)
        self._refuse_other_splits(file, schema)

    @staticmethod
    def _candidates(schema, how):
        """Names of columns that may have the images."""
        told, lower = how.columns.get("path"), [name.strip().lower() for name in schema.names]
        wanted = USUAL["path"] if told is None else (told.strip().lower(),)
        return [schema.names[lower.index(name)] for name in wanted if lower.count(name) == 1]

    def _refuse_other_splits(self, file, schema):
        from pyarrow.parquet import ParquetFile

        for index in self.columns.others():
            field = schema.field(index)
            if not _may_be_split(field.type):
                continue
            # A dictionary is not spread over the rows: some kilobytes may hold a large value thousands of times.
            kept = [field.name] if _is_text(field.type) else None
            with ParquetFile(file, pre_buffer=False, read_dictionary=kept) as parquet:
                if _bytes_of(parquet, field.name) > MOST_SPLIT_BYTES * max(1, parquet.metadata.num_rows):
                    continue
                values = (value for batch in parquet.iter_batches(ROWS, columns=[field.name])
                          for value in batch.column(0).unique().to_pylist())
                for value in values:
                    if not self.columns.look_at(index, value):
                        break
        self.columns.end()


def _rows(file, table):
    """Yields {"image" or "path", "label", …: pyarrow scalar, or None} of each row.

    A file of some kilobytes can hold a value of many megabytes a thousand times, so one row is read at a time. Columns
    with a dictionary are read ROWS rows at a time, because every read brings the whole dictionary.
    """
    from pyarrow.parquet import ParquetFile

    def read(names, rows):
        with ParquetFile(file, pre_buffer=False, buffer_size=2**20) as parquet:
            fields = [table.fields[name] for name in names.values()]
            for batch in parquet.iter_batches(rows, columns=fields, use_threads=False):
                columns = {what: batch.column(batch.schema.get_field_index(name)) for what, name in names.items()}
                for number in range(batch.num_rows):
                    yield {what: _plain(column[number]) for what, column in columns.items()}

    coded = {what: name for what, name in table.names.items() if name in table.coded}
    plain = {what: name for what, name in table.names.items() if name not in table.coded}
    readers = [read(*some) for some in ((plain, 1), (coded, ROWS)) if some[0]]
    for parts in zip(*readers, strict=True):
        yield {what: value for part in parts for what, value in part.items()}


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


def _image_type(kind):
    """Whether a column of this type may have images."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_text(kind):
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _bytes_of(parquet, name):
    """Bytes of a column in a Parquet file, before they are compressed."""
    groups = (parquet.metadata.row_group(number) for number in range(parquet.metadata.num_row_groups))
    return sum(group.column(place).total_uncompressed_size for group in groups for place in range(group.num_columns)
               if group.column(place).path_in_schema == name)


def _may_be_split(kind):
    from pyarrow import types

    return _is_text(kind) or types.is_boolean(kind) or types.is_integer(kind)


def _check_type(file, what, name, kind):
    from pyarrow import types

    is_number = types.is_integer(kind) or types.is_floating(kind)
    fits = (_image_type(kind) if what == "image" else is_number if what == "weight" else
            _is_text(kind) or what == "label" and is_number or what == "split" and _may_be_split(kind))
    if not fits:
        raise PackError(f"{file}: column {name} is of type {kind}; path must be a text, split and label a text or a "
                        "whole number, weight a number, an image binary or a struct with a binary field bytes")


def _class_names(file, schema, label, how):
    """{label as a text: name} that the package datasets wrote into the schema; None where it names none."""
    try:
        features = json.loads((schema.metadata or {}).get(HUGGINGFACE, b"{}"))["info"]["features"]
        names = features[label]["names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if isinstance(names, dict):
        names = [names.get(str(number)) for number in range(len(names))]
    if not (isinstance(names, list) and names and all(isinstance(name, str) and name.strip() for name in names)):
        return None
    twice = {name for name, count in Counter(names).items() if count > 1}
    if twice:
        how.note_once(f"the schema gives several classes the name {min(twice)!r}; their numbers are added")
    return {str(number): f"{name} ({number})" if name in twice else name for number, name in enumerate(names)}


def _text(where, what, value):
    """A pyarrow scalar as a text; PackError where it is too long, or a label that is no whole number."""
    from pyarrow import BinaryScalar

    if value is None:
        return ""
    if isinstance(value, BinaryScalar) and (num_bytes := value.as_buffer().size) > MAX_PATH_BYTES:
        raise PackError(f"{where}: {what} of {num_bytes} bytes, more than {MAX_PATH_BYTES}")
    value = value.as_py()
    if what == "label" and isinstance(value, float):
        if value != value:  # what pandas makes of a missing number
            return ""
        if not value.is_integer():
            raise PackError(f"{where}: label {value} is not a whole number")
        value = int(value)
    return str(value).strip()


FORMAT = Format(records, ".parquet", lambda path, head: head[:4] == b"PAR1", names_files=True)
