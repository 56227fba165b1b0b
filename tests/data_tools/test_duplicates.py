"""Images that are there more than once: what is kept and what is left out is what a brute-force count says."""

import hashlib
import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest

from tests.support.commands import run_pack
from tests.support.images import picture, png, write_tree
from tests.support.pack_jobs import run_parts
from tests.support.packs import file_hashes
from tests.support.rows import count_records, facts, write_rows
from xc.data.pack import open_splits

ORDER = ("test", "val", "train", "")  # whose image stays


def noisy(seed, splits, count=230, contents=90, labels=17):
    """[(split, label, name, bytes)] of images that often are there again, under the same label or others."""
    random = np.random.default_rng(seed)
    images = [png(1, 1, 2, (b"teXt", b"x\0%d" % i)) for i in range(contents)]
    rows = []
    for i in range(count):
        content = min(random.integers(0, contents, 2))  # some more often than others
        label = content % labels if random.random() < 0.8 else random.integers(0, labels)
        split = splits[0] if i < 2 * labels else splits[random.integers(0, len(splits))]
        rows.append((split, f"c{i % labels if i < labels else label}", f"{i:03}.png", images[content]))
    return rows


def brute_force(rows, rule):
    """Records that stay, numbers by reason, and of every group (labels, [(split, label, what, done)])."""
    groups = defaultdict(list)
    for split, label, _, data in rows:
        groups[data].append((split, label))
    stay, left_out, report = Counter(), Counter(), {}
    for data, group in groups.items():
        labels, lines = len({label for _, label in group}), []
        tested = any(split in ("val", "test") for split, _ in group)
        for place, (split, label) in enumerate(group):
            first = min((ORDER.index(one[0]), i) for i, one in enumerate(group) if one[1] == label)
            what = "leak" if split == "train" and tested else "first" if first[1] == place else "repeat"
            reason = {"leak": "leak", "repeat": "repeat"}.get(what)
            if rule == "drop-conflicting" and labels > 1:
                reason = "conflict"
            if rule == "report" or reason is None:
                stay[split, label, data] += 1
                lines.append((split, label, what, "kept"))
            else:
                left_out[reason] += 1
                lines.append((split, label, what, "dropped"))
        if len(group) > 1:
            report[hashlib.blake2b(data, digest_size=16).hexdigest()] = labels, sorted(lines)
    return stay, left_out, report


def read_report(out):
    """{hash: (labels, sorted [(split, label, what, done)])}, and [(split, path)]."""
    head, *lines = (out / "duplicates.tsv").read_text().splitlines()
    assert head.split("\t") == ["hash", "labels", "split", "label", "path", "image", "done"]
    groups, paths = {}, []
    for (image, labels), group in itertools.groupby((line.split("\t") for line in lines), lambda cells: cells[:2]):
        assert image not in groups, "a group is in one piece"
        group = [cells[2:] for cells in group]
        paths += [(split, path) for split, _, path, _, _ in group]
        groups[image] = int(labels), sorted((split, label, what, done) for split, label, _, what, done in group)
    return groups, paths


ONE, TWO, THREE = ("",), ("train", "test"), ("train", "val", "test")


@pytest.mark.parametrize("splits, rule, kind", [
    (ONE, "report", "folder"), (ONE, "drop", "tar"), (ONE, "drop-conflicting", "folder"), (TWO, "report", "tar"),
    (TWO, "drop", "folder"), (TWO, "drop-conflicting", "tar"), (THREE, "report", "folder"), (THREE, "drop", "tar"),
    (THREE, "drop-conflicting", "folder")])
def test_duplicates_are_those_of_brute_force(tmp_path, capsys, splits, rule, kind):
    rows = noisy(len(splits), splits)
    source, paths = write_rows(tmp_path / "source", rows, kind)
    stay, left_out, groups = brute_force(rows, rule)
    assert len(groups) > 20 and (rule == "report" or left_out.total() > 50)
    run_pack(source, tmp_path / "pack", "--duplicates", rule)
    said = facts(capsys)
    assert count_records(tmp_path / "pack") == stay and said["left_out"] == left_out
    assert said["records"] + sum(said["left_out"].values()) == len(rows)
    report, named = read_report(tmp_path / "pack")
    assert report == groups and len(set(named)) == len(named)
    assert all(hashlib.blake2b(paths[one][1], digest_size=16).hexdigest() in groups for one in named)
    args = ["--memory-mb", 1e-3, *(["--workers", 2] if rule == "drop" else [])]
    run_pack(source, tmp_path / "spilled", "--duplicates", rule, *args)
    assert file_hashes(tmp_path / "spilled") == file_hashes(tmp_path / "pack")
    run_pack(source, tmp_path / "seed", "--duplicates", rule, "--seed", 3)
    assert count_records(tmp_path / "seed") == stay
    assert (tmp_path / "seed" / "duplicates.tsv").read_bytes() == (tmp_path / "pack" / "duplicates.tsv").read_bytes()


def test_nothing_is_left_to_drop(tmp_path, capsys):
    source, _ = write_rows(tmp_path / "source", noisy(5, ("",)), "folder")
    run_pack(source, tmp_path / "once", "--duplicates", "drop-conflicting")
    capsys.readouterr()
    run_pack(tmp_path / "once", tmp_path / "twice", "--duplicates", "drop-conflicting")
    assert facts(capsys)["left_out"] == {}
    assert (tmp_path / "twice" / "duplicates.tsv").read_text().count("\n") == 1
    assert count_records(tmp_path / "twice") == count_records(tmp_path / "once")


def test_an_image_that_comes_very_often(tmp_path, capsys):
    """The picture that says there is no picture."""
    (tmp_path / "src").mkdir()
    write_tree(tmp_path / "src", {"a": 3, "b": 2})
    for i in range(150):
        (tmp_path / "src" / "ab"[i % 2] / f"same{i}.png").write_bytes(picture(99))
    run_pack(tmp_path / "src", tmp_path / "pack", "--duplicates", "drop", "--memory-mb", 1e-3)
    assert facts(capsys)["left_out"] == {"repeat": 148}
    found = count_records(tmp_path / "pack")
    assert found["", "a", picture(99)] == found["", "b", picture(99)] == 1


def test_unreadable_images_are_no_duplicates(tmp_path, capsys):
    write_tree(tmp_path / "src", {"a": 5, "b": 2})
    for name in "xy":
        (tmp_path / "src" / "a" / f"{name}.png").symlink_to("nowhere")
        (tmp_path / "src" / "b" / f"{name}.png").write_bytes(b"no image")
    run_pack(tmp_path / "src", tmp_path / "pack", "--duplicates", "drop", "--max-skipped", 3)
    said = facts(capsys)
    assert said["records"] == 7 and said["skipped"] == 3 and said["left_out"] == {"repeat": 1}


def test_odd_names_stay_in_their_cells(tmp_path):
    write_tree(tmp_path / "src", {"a\tb": 1, "ü\n": 1})
    for name in "a\tb", "ü\n":
        (tmp_path / "src" / name / "\udcff\\.png").write_bytes(picture(50))
    run_pack(tmp_path / "src", tmp_path / "pack", "--duplicates", "report")
    lines = (tmp_path / "pack" / "duplicates.tsv").read_bytes().split(b"\n")
    assert [line.count(b"\t") for line in lines] == [6, 6, 6, 0]
    paths = sorted(line.split(b"\t")[4] for line in lines[1:3])
    assert paths == [b"a\\tb/\xff\\\\.png", b"\xc3\xbc\\n/\xff\\\\.png"]


@pytest.mark.parametrize("splits", [ONE, TWO, THREE])
def test_duplicates_and_class_sizes_together(tmp_path, capsys, splits):
    rows = noisy(7, splits, count=400, contents=300)
    source, _ = write_rows(tmp_path / "source", rows, "folder")
    (source / splits[0] / "c1" / "bad.png").write_bytes(b"bad")
    stay = brute_force(rows, "drop")[0]
    count = Counter(label for split, label, _ in stay.elements() if split == splits[0])
    count["c1"] += 1  # the one that turns out to be bad
    least = sorted(count.values())[len(count) // 2]
    run_pack(source, tmp_path / "pack", "--duplicates", "drop", "--min-images", least, "--max-images-per-class", least,
        "--max-skipped", 1)
    said, kept = facts(capsys), count_records(tmp_path / "pack")
    assert said["records"] + said["skipped"] + sum(said["left_out"].values()) == len(rows) + 1
    assert said["left_out"].keys() == {"few", "many", "repeat"} | ({"leak"} if splits[1:] else set())
    assert not kept - stay
    of_train = Counter(label for split, label, _ in kept.elements() if split == splits[0])
    assert of_train.keys() == {label for label, number in count.items() if number >= least}
    for label, number in of_train.items():
        assert number == min(least, count[label]) or (label == "c1" and number == min(least, count[label]) - 1)
    for split in splits[1:]:
        assert {one: n for one, n in kept.items() if one[0] == split} == {
            one: n for one, n in stay.items() if one[0] == split and one[1] in of_train}


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_the_number_of_parts_changes_no_choice(tmp_path, capsys, kind):
    rows = noisy(7, ("train", "test"), count=400, contents=300)
    source, _ = write_rows(tmp_path / "source", rows, kind)
    sizes = Counter(label for split, label, _ in brute_force(rows, "drop")[0].elements() if split == "train")
    least = sorted(sizes.values())[len(sizes) // 2]
    flags = ["--duplicates", "drop", "--min-images", least, "--max-images-per-class", least]
    run_pack(source, tmp_path / "1", *flags)
    said, whole = facts(capsys), open_splits(tmp_path / "1")
    assert said["left_out"].keys() == {"repeat", "leak", "few", "many"}
    for parts in 2, 5:
        run_parts(parts, source, tmp_path / str(parts), *flags)
        assert facts(capsys)["left_out"] == said["left_out"]
        for split, pack in open_splits(tmp_path / str(parts)).items():
            assert pack.read(np.arange(len(pack)))[0] == whole[split].read(np.arange(len(whole[split])))[0]
            assert pack.classes_digest == whole[split].classes_digest
        for report in "duplicates.tsv", "left_out.tsv":
            assert (tmp_path / str(parts) / report).read_bytes() == (tmp_path / "1" / report).read_bytes()


def test_reports_tell_which_of_several_sources(tmp_path, capsys):
    for name in "one", "two":
        write_tree(tmp_path / name, {"a": 2, "b": 2}, first=5)
        (tmp_path / name / "a" / "bad.png").write_bytes(b"bad")
    run_pack(tmp_path / "one", tmp_path / "two", tmp_path / "pack", "--max-skipped", 2, "--duplicates", "report")
    paths = [line.split("\t")[0] for line in (tmp_path / "pack" / "skipped.tsv").read_text().splitlines()[1:]]
    assert sorted(paths) == [f"{tmp_path}/{name}/a/bad.png" for name in ("one", "two")]
    report = (tmp_path / "pack" / "duplicates.tsv").read_text()
    assert all(report.count(f"\t{tmp_path}/{name}/") >= 4 for name in ("one", "two"))
