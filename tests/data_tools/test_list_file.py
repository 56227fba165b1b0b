"""The list of images on the disk: what is written comes back, and nothing goes to another place."""

import itertools
import os
import random

import pytest

from data_tools.packing import database, image_file
from data_tools.packing.image_file import ImageFileWriter, read_image
from tests.support.commands import ended, start


@pytest.mark.parametrize("memory", [0, 10**5, 10**8])
@pytest.mark.parametrize("most", [0, 100, 2**20])
def test_images_come_back(tmp_path, monkeypatch, memory, most):
    monkeypatch.setattr(image_file, "MOST_EXTENT", most)
    chance, writer, images = random.Random(memory), ImageFileWriter(tmp_path / "images", memory), []
    for _ in range(3000):
        key, data = chance.getrandbits(64), chance.randbytes(chance.choice([0, 1, 9, 60, 700, 9000]))
        images.append((writer.add(key, data), data))
    writer.close()
    spans = sorted((offset, offset + len(data)) for offset, data in images if data)
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    with open(tmp_path / "images", "rb", buffering=0) as file:
        assert all(read_image(file, offset, len(data)) == data for offset, data in images)


def test_images_of_near_keys_lie_near_each_other(tmp_path):
    """In extents that are filled: half of the file is no gap."""
    chance, writer, size = random.Random(0), ImageFileWriter(tmp_path / "images", 10**6), 500
    found = sorted((key, writer.add(key, bytes(size))) for key in (chance.getrandbits(64) for _ in range(40_000)))
    writer.close()
    assert os.path.getsize(tmp_path / "images") < 3 * size * len(found)
    for _, group in itertools.groupby(found, lambda one: one[0] >> 64 - image_file.BITS):
        places = sorted(offset for _, offset in group)
        gaps = sum(after - offset > size for offset, after in itertools.pairwise(places))
        assert len(places) > 200 and gaps < 10  # extents, each twice as large as the last


SORT = """
import os, sys
from data_tools.packing import database
folder, seen = sys.argv[1], set()
db = database.create(os.path.join(folder, "a.sqlite"), 2**20)
database.attach(db, os.path.join(folder, "b.sqlite"), "packed")
db.execute("CREATE TABLE many AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 50000) "
           "SELECT i * 7919 % 50000 AS i, randomblob(100) AS data FROM n")
def look():
    for number in os.listdir("/proc/self/fd"):
        if os.path.exists(f"/proc/self/fd/{number}") or os.path.islink(f"/proc/self/fd/{number}"):
            seen.add(os.readlink(f"/proc/self/fd/{number}"))
db.set_progress_handler(look, 20_000)
db.execute("CREATE TABLE packed.sorted AS SELECT * FROM many ORDER BY i")
db.close()
files = {path for path in seen if "etilqs" in path}  # SQLite's, which have no name any more
assert files and all(path.startswith(folder + "/") for path in files), files
(count,) = database.open_complete(os.path.join(folder, "b.sqlite")).execute("SELECT count(*) FROM sorted").fetchone()
assert count == 50000 and sorted(os.listdir(folder)) == ["a.sqlite", "b.sqlite"]
"""


@pytest.mark.parametrize("name", ["plain", "with 'quotes'", os.fsdecode(b"caf\xe9"), "ü?#%41"])
def test_sorting_goes_to_the_folder_of_the_file(tmp_path, name):
    (tmp_path / name).mkdir()
    code, _, error = ended(start(SORT, tmp_path / name))
    assert code == 0, error


def test_no_locks_are_taken(tmp_path):
    """A file system may have none."""
    db = database.create(tmp_path / "a.sqlite", 2**20)
    database.attach(db, tmp_path / "b.sqlite", "packed")
    db.executescript("BEGIN; CREATE TABLE t (i); CREATE TABLE packed.t (i); INSERT INTO t VALUES (1); "
                     "INSERT INTO packed.t SELECT * FROM t")
    inodes = {str((tmp_path / name).stat().st_ino) for name in ("a.sqlite", "b.sqlite")}

    def locked():
        with open("/proc/locks") as file:
            return {line.split()[5].rpartition(":")[2] for line in file} & inodes

    assert not locked()
    db.execute("COMMIT")
    db.close()
    reader = database.open_complete(tmp_path / "b.sqlite").execute("SELECT * FROM t")
    assert reader.fetchone() == (1,) and not locked()


def test_a_long_statement_can_be_interrupted(tmp_path):
    db = database.create(os.path.join(tmp_path, "a.sqlite"), 2**20)

    def interrupt():
        raise KeyboardInterrupt

    db.set_progress_handler(interrupt, 1000)
    with pytest.raises(KeyboardInterrupt), database.errors():
        db.execute("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n").fetchone()
