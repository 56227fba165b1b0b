"""Damaged and hostile packs: what is wrong is found and named, the rest is read."""

import os

import h5py
import numpy as np
import pytest
from PIL import Image

import data_tools.pack
import data_tools.show
from tests.support.packs import add_weights, edit, link, put, replace
from xc.data.pack import Pack, PackError, open_splits


@pytest.mark.parametrize("kind", ["external", "soft", "virtual", "stored elsewhere", "chunked"])
@pytest.mark.parametrize("file, name", [("shard-00000.h5", "labels"), ("shard-00000.h5", "bytes"),
                                        ("index.h5", "class_names")])
def test_data_from_elsewhere_is_refused(copy, kind, file, name):
    edit(copy, file, replace(name, link(kind)))
    with pytest.raises(PackError, match=f"{file}: {name} is (missing or a link|not stored in one piece)"):
        Pack(copy).read([0])


SHARD_DAMAGE = {
    "offsets fall": (put("offsets", 2, 1), "offsets"),
    "offsets negative": (put("offsets", 0, -5), "offsets"),
    "offsets not from 0": (put("offsets", 0, 1), "offsets"),
    "offsets beyond the end": (put("offsets", -1, 10**6), "offsets"),
    "offsets huge": (put("offsets", 1, 2**62), "offsets"),
    "bytes of no record": (replace("bytes", lambda f, n, v: f.create_dataset(n, data=np.append(v, v))), "offsets"),
    "label negative": (put("labels", 1, -1), "record 1: label -1"),
    "label too large": (put("labels", 1, 5), "record 1: label 5"),
    "wrong checksum": (put("crc32", 1, 7), "record 1: wrong checksum"),
    "wrong type": (replace("labels", lambda f, n, v: f.create_dataset(n, data=v.astype(np.int32))), "labels"),
    "wrong byte order": (replace("labels", lambda f, n, v: f.create_dataset(n, data=v.astype(">i8"))), "labels"),
    "wrong shape": (replace("labels", lambda f, n, v: f.create_dataset(n, data=v[:, None])), "labels"),
    "a label too many": (replace("labels", lambda f, n, v: f.create_dataset(n, data=np.append(v, 0))), "records"),
    "group": (replace("labels", lambda f, n, v: f.create_group(n)), "labels"),
    "missing": (lambda f: f.__delitem__("crc32"), "crc32 is missing"),
    "huge and empty": (replace("bytes", lambda f, n, v: f.create_dataset(n, (2**50,), np.uint8)), "claims"),
    "another version": (lambda f: f.attrs.__setitem__("version", 3), "version 3"),
    "another shard": (lambda f: f.attrs.__setitem__("shard", 1), "not the shard 0"),
    "another format": (lambda f: f.attrs.__setitem__("format", np.bytes_("x")), "not a pack"),
}


@pytest.mark.parametrize("name", SHARD_DAMAGE)
def test_damaged_shard(copy, name):
    change, message = SHARD_DAMAGE[name]
    edit(copy, "shard-00000.h5", change)
    with h5py.File(copy / "index.h5") as index:
        num_records = index["shard_records"][0]
    assert num_records > 4
    for use in (lambda pack: pack.read(np.arange(num_records)), lambda pack: pack.verify()):
        with pytest.raises(PackError, match=f"shard-00000.h5: .*{message}"):
            use(Pack(copy))
    assert len(Pack(copy).read([num_records])[0]) == 1  # the other shards are as they were


@pytest.mark.parametrize("place, value", [(2, -5), (3, 10**6), (3, 2**62)])
def test_bad_offsets_of_one_record(copy, place, value):
    edit(copy, "shard-00000.h5", put("offsets", place, value))
    with pytest.raises(PackError, match="shard-00000.h5: offsets"):
        Pack(copy).read([2])


@pytest.mark.parametrize("name, place, value", [("labels", 1, -1), ("offsets", 2, -5)])
def test_neighbours_of_a_damaged_record_are_read(copy, name, place, value):
    whole = Pack(copy).read([0, 3])
    edit(copy, "shard-00000.h5", put(name, place, value))
    pack = Pack(copy)
    assert all(pack.read([record]) == ([whole[0][i]], [whole[1][i]]) for i, record in enumerate([0, 3]))
    with pytest.raises(PackError, match=name.removesuffix("s")):
        pack.read([1])


INDEX_DAMAGE = {
    "another version": (lambda f: f.attrs.__setitem__("version", 3), "version 3"),
    "no version": (lambda f: f.attrs.__delitem__("version"), "version"),
    "version is a text": (lambda f: f.attrs.__setitem__("version", "1"), "version"),
    "source is a number": (lambda f: f.attrs.__setitem__("source", 1), "source"),
    "no format": (lambda f: f.attrs.__delitem__("format"), "not a pack"),
    "records too many": (lambda f: f.attrs.__setitem__("num_records", 29), "num_records"),
    "records do not add up": (put("shard_records", 0, 1), "num_records"),
    "records negative": (lambda f: f["shard_records"].write_direct(
        np.array([28, 5, -5] + [0] * (len(f["shard_records"]) - 3))), "num_records"),
    "records wrap around": (lambda f: f["shard_records"].write_direct(
        np.array([2**63 - 1, 2**63 - 1, 30] + [0] * (len(f["shard_records"]) - 3))), "num_records"),
    "has_weights is a text": (lambda f: f.attrs.__setitem__("has_weights", "1"), "has_weights"),
    "empty": (lambda f: f.attrs.__setitem__("num_records", 0), "no records"),
    "classes": (lambda f: f.attrs.__setitem__("num_classes", 6), "do not fit"),
    "huge classes": (lambda f: f.attrs.__setitem__("num_classes", 2**62), "do not fit"),
    "sizes": (replace("shard_file_bytes", lambda f, n, v: f.create_dataset(n, data=v[:-1])), "do not fit"),
}


@pytest.mark.parametrize("name", INDEX_DAMAGE)
def test_damaged_index_is_seen_when_opened(copy, name):
    change, message = INDEX_DAMAGE[name]
    with h5py.File(copy / "index.h5", "r+") as file:
        change(file)
    with pytest.raises(PackError, match=f"index.h5: .*{message}"):
        Pack(copy)


@pytest.mark.parametrize("change, message", [
    (put("class_counts", 0, 10), "class_counts"),
    (put("class_names", 0, 255), "UTF-8"),
    (put("class_names", 0, ord("z")), "digest"),
    (put("class_name_offsets", 1, 10**9), "class_name_offsets"),
    (lambda f: f.attrs.__setitem__("num_bytes", 3), "num_bytes"),
    (lambda f: f["class_counts"].write_direct(f["class_counts"][...][::-1].copy()), r"class_counts\[0\]"),
])
def test_verify_checks_the_index(copy, change, message):
    with h5py.File(copy / "index.h5", "r+") as file:
        change(file)
    with pytest.raises(PackError, match=f"index.h5: .*{message}"):
        Pack(copy).verify()


def test_a_flipped_bit_is_found_and_named(copy, capsys):
    with h5py.File(copy / "shard-00001.h5") as shard:
        place = shard["bytes"].id.get_offset() + int(shard["offsets"][3]) + 20
        first = len(h5py.File(copy / "shard-00000.h5")["labels"])
    with open(copy / "shard-00001.h5", "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 4]))
    pack = Pack(copy)
    named = f"shard-00001.h5: record {first + 3}: wrong checksum"
    assert len(pack.read([first + 2, first + 4])[0]) == 2
    for use in (lambda: pack.read([0, first + 3]), pack.verify):
        with pytest.raises(PackError, match=named):
            use()
    with pytest.raises(SystemExit) as exit:
        data_tools.show.main([str(copy), "--verify"])
    error = capsys.readouterr().err
    assert exit.value.code == 1 and named in error and error.count("\n") == 1


@pytest.mark.parametrize("change, message", [
    (put("weights", 1, np.nan), "record 1: weight nan"), (put("weights", 2, np.inf), "record 2: weight inf"),
    (put("weights", 3, -0.5), "record 3: weight -0.5"),
    (replace("weights", lambda f, n, v: f.create_dataset(n, data=v.astype(np.float64))), "weights"),
    (replace("weights", lambda f, n, v: f.create_dataset(n, data=v[:-1])), "records"),
    (replace("weights", link("external")), "weights is missing or a link"),
    (lambda f: f.__delitem__("weights"), "weights is missing"),
])
def test_damaged_weights(copy, change, message):
    num_records = add_weights(copy)
    edit(copy, "shard-00000.h5", change)
    for use in (lambda pack: pack.weights(0, num_records), lambda pack: pack.verify()):
        with pytest.raises(PackError, match=f"shard-00000.h5: .*{message}"):
            use(Pack(copy))


def test_cut_and_missing_files(copy, tmp_path):
    shard = copy / "shard-00000.h5"
    os.truncate(shard, os.path.getsize(shard) - 1)
    with pytest.raises(PackError, match=r"shard-00000.h5: \d+ bytes, not \d+"):
        Pack(copy)
    edit(copy, "index.h5", lambda f: None)  # the index now lists the new size
    with pytest.raises(PackError, match="shard-00000.h5: "):
        Pack(copy).read([0])
    shard.unlink()
    with pytest.raises(PackError, match="shard-00000.h5: no such file"):
        Pack(copy)
    os.mkfifo(shard)  # must not block
    with pytest.raises(PackError, match="shard-00000.h5: no such file"):
        Pack(copy)
    (copy / "index.h5").write_bytes(b"not HDF5")
    with pytest.raises(PackError, match="index.h5: not readable as HDF5"):
        Pack(copy)
    (copy / "index.h5").unlink()
    os.mkfifo(copy / "index.h5")
    with pytest.raises(PackError, match="index.h5: no such file"):
        Pack(copy)
    (copy / "index.h5").unlink()
    for use in (Pack, open_splits):
        with pytest.raises(PackError, match="not a pack"):
            use(copy)
        with pytest.raises(PackError, match="no such folder|not a pack"):
            use(tmp_path / "nowhere")


def test_a_file_cut_while_open(copy):
    pack = Pack(copy)
    pack.read([0])
    os.truncate(copy / "shard-00000.h5", 3000)
    with pytest.raises(PackError, match="shard-00000.h5: .*cut while open"):
        pack.verify()


@pytest.fixture
def a_pack(tmp_path):
    """A pack of 3 records in one shard, and a file of it as h5py opens it to write."""
    for number in range(3):
        (tmp_path / "tree" / "c").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), number, np.uint8)).save(tmp_path / "tree" / "c" / f"{number}.png")
    data_tools.pack.main([str(tmp_path / "tree"), str(tmp_path / "pack"), "--workers", "0"])
    return tmp_path / "pack"


def test_attributes_that_are_no_scalars_of_fixed_length_are_not_read(a_pack):
    """HDF5 loops for ever on a damaged heap of texts of variable length; an array of them can outgrow the file."""
    for value in "xc-pack", np.array(["xc-pack"] * 1000, object), np.full(1000, b"xc-pack"), h5py.Empty("S7"):
        with h5py.File(a_pack / "index.h5", "r+") as index:
            del index.attrs["format"]
            index.attrs["format"] = value
        with pytest.raises(PackError, match="attribute format must be a text of fixed length, not None"):
            Pack(a_pack)


def test_a_pack_has_no_text_of_variable_length(a_pack):
    for path in a_pack.glob("*.h5"):
        with h5py.File(path) as file:
            assert {file.attrs.get_id(name).dtype.kind for name in file.attrs} == {"i", "S"}
        assert b"GCOL" not in path.read_bytes()  # the heap's signature


def test_no_more_records_than_a_file_can_hold(a_pack):
    """Who orders the records makes a permutation of them: its memory must not go by a number alone."""
    with h5py.File(a_pack / "index.h5", "r+") as index:
        index.attrs["num_records"] = np.int64(2**40)
        index["shard_records"][0] = 2**40
    with pytest.raises(PackError, match="shard_records"):
        Pack(a_pack)
