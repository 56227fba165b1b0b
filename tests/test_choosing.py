"""What is packed of what is listed: what is kept and what is left out make the whole, as a brute-force count has it."""

import hashlib
import itertools
import json
from collections import Counter, defaultdict

import numpy as np
import pytest

from tests.test_pack import fails, file_hashes, picture, png, run, write_tree
from tests.test_sources import write_tar
from xc.data.pack import Pack, open_splits

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


def write(folder, rows, kind):
    """A source with these images, and {(split, path of the report): (label, bytes)}."""
    if kind == "folder":
        for split, label, name, data in rows:
            path = folder / split / label / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return folder, {(split, "/".join(filter(None, (split, label, name)))): (label, data)
                        for split, label, name, data in rows}
    folder.mkdir()
    found = {}
    for split in {split for split, *_ in rows}:
        path, members = folder / f"{split or 'x'}-0.tar", []
        for split_of, label, name, data in rows:
            if split_of == split:
                members += [(name, data), (name.replace("png", "cls"), label.encode())]
                found[split, f"{path}: {name[:-4]}"] = label, data
        write_tar(path, members)
    return folder, found


def records(out):
    """Counter of (split, label, bytes) of a pack or a folder of packs."""
    packs = open_splits(out)
    names = {split: split if (out / split).exists() else "" for split in packs}
    found = Counter()
    for split, pack in packs.items():
        images, labels = pack.read(np.arange(len(pack)))
        found.update((names[split], pack.class_name(label), image) for image, label in zip(images, labels, strict=True))
    return found


def listed(rows):
    return Counter((split, label, data) for split, label, _, data in rows)


def facts(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


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


@pytest.mark.parametrize("splits", [("",), ("train", "test"), ("train", "val", "test")])
@pytest.mark.parametrize("rule", ["report", "drop", "drop-conflicting"])
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_duplicates_are_those_of_brute_force(tmp_path, capsys, splits, rule, kind):
    rows = noisy(len(splits), splits)
    source, paths = write(tmp_path / "source", rows, kind)
    stay, left_out, groups = brute_force(rows, rule)
    assert len(groups) > 20 and (rule == "report" or left_out.total() > 50)
    run(source, tmp_path / "pack", "--duplicates", rule)
    said = facts(capsys)
    assert records(tmp_path / "pack") == stay and said["left_out"] == left_out
    assert said["records"] + sum(said["left_out"].values()) == len(rows)
    report, named = read_report(tmp_path / "pack")
    assert report == groups and len(set(named)) == len(named)
    assert all(hashlib.blake2b(paths[one][1], digest_size=16).hexdigest() in groups for one in named)
    args = ["--memory-mb", 1e-3, *(["--workers", 2] if rule == "drop" else [])]
    run(source, tmp_path / "spilled", "--duplicates", rule, *args)
    assert file_hashes(tmp_path / "spilled") == file_hashes(tmp_path / "pack")
    run(source, tmp_path / "seed", "--duplicates", rule, "--seed", 3)
    assert records(tmp_path / "seed") == stay
    assert (tmp_path / "seed" / "duplicates.tsv").read_bytes() == (tmp_path / "pack" / "duplicates.tsv").read_bytes()


def test_nothing_is_left_to_drop(tmp_path, capsys):
    source, _ = write(tmp_path / "source", noisy(5, ("",)), "folder")
    run(source, tmp_path / "once", "--duplicates", "drop-conflicting")
    capsys.readouterr()
    run(tmp_path / "once", tmp_path / "twice", "--duplicates", "drop-conflicting")
    assert facts(capsys)["left_out"] == {}
    assert (tmp_path / "twice" / "duplicates.tsv").read_text().count("\n") == 1
    assert records(tmp_path / "twice") == records(tmp_path / "once")


def test_an_image_that_comes_very_often(tmp_path, capsys):
    """The picture that says there is no picture."""
    (tmp_path / "src").mkdir()
    write_tree(tmp_path / "src", {"a": 3, "b": 2})
    for i in range(150):
        (tmp_path / "src" / "ab"[i % 2] / f"same{i}.png").write_bytes(picture(99))
    run(tmp_path / "src", tmp_path / "pack", "--duplicates", "drop", "--memory-mb", 1e-3)
    assert facts(capsys)["left_out"] == {"repeat": 148}
    assert records(tmp_path / "pack")["", "a", picture(99)] == records(tmp_path / "pack")["", "b", picture(99)] == 1


def test_what_cannot_be_read_is_no_duplicate(tmp_path, capsys):
    write_tree(tmp_path / "src", {"a": 5, "b": 2})
    for name in "xy":
        (tmp_path / "src" / "a" / f"{name}.png").symlink_to("nowhere")
        (tmp_path / "src" / "b" / f"{name}.png").write_bytes(b"no image")
    run(tmp_path / "src", tmp_path / "pack", "--duplicates", "drop", "--max-skipped", 3)
    said = facts(capsys)
    assert said["records"] == 7 and said["skipped"] == 3 and said["left_out"] == {"repeat": 1}


def test_odd_names_stay_in_their_cells(tmp_path):
    write_tree(tmp_path / "src", {"a\tb": 1, "ü\n": 1})
    for name in "a\tb", "ü\n":
        (tmp_path / "src" / name / "\udcff\\.png").write_bytes(picture(50))
    run(tmp_path / "src", tmp_path / "pack", "--duplicates", "report")
    lines = (tmp_path / "pack" / "duplicates.tsv").read_bytes().split(b"\n")
    assert [line.count(b"\t") for line in lines] == [6, 6, 6, 0]
    paths = sorted(line.split(b"\t")[4] for line in lines[1:3])
    assert paths == [b"a\\tb/\xff\\\\.png", b"\xc3\xbc\\n/\xff\\\\.png"]


# Classes that are too small, and too large.

COUNTS = {"1": 1, "3": 3, "4": 4, "x/5": 5, "17": 17, "b": 2}


@pytest.mark.parametrize("least", [1, 2, 4, 17])
@pytest.mark.parametrize("most", [None, 1, 4, 16])
def test_no_class_is_smaller_or_larger(tmp_path, capsys, least, most):
    files = write_tree(tmp_path / "src", COUNTS)
    flags = ["--min-images", least, *(["--max-images-per-class", most] if most else [])]
    run(tmp_path / "src", tmp_path / "pack", *flags)
    said, pack = facts(capsys), Pack(tmp_path / "pack")
    kept = {name: min(count, most or count) for name, count in COUNTS.items() if count >= least}
    assert pack.class_names(0, pack.num_classes) == sorted(kept)
    assert dict(zip(sorted(kept), pack.class_counts, strict=True)) == kept and pack.verify() == sum(kept.values())
    few = sum(count for count in COUNTS.values() if count < least)
    many = len(files) - few - len(pack)
    assert said["left_out"] == {name: count for name, count in (("few", few), ("many", many)) if count}
    args = ["--memory-mb", 1e-3, *(["--workers", 2] if (least, most) == (4, 4) else [])]
    run(tmp_path / "src", tmp_path / "spilled", *flags, *args)
    assert file_hashes(tmp_path / "spilled") == file_hashes(tmp_path / "pack")
    run(tmp_path / "src", tmp_path / "whole")
    images, labels = Pack(tmp_path / "whole").read(np.arange(len(files)))
    names = [Pack(tmp_path / "whole").class_name(label) for label in labels]
    before = [names[:i].count(name) for i, name in enumerate(names)]
    first = [image for image, name, count in zip(images, names, before, strict=True) if count < kept.get(name, 0)]
    assert pack.read(np.arange(len(pack)))[0] == first


def test_another_seed_takes_other_images(tmp_path):
    write_tree(tmp_path / "src", {"a": 100})
    taken = []
    for seed in 0, 1:
        run(tmp_path / "src", tmp_path / str(seed), "--max-images-per-class", 30, "--seed", seed)
        taken.append(set(records(tmp_path / str(seed))))
    assert len(taken[0]) == len(taken[1]) == 30 and 0 < len(taken[0] & taken[1]) < 25  # 9 ± 2


def test_images_of_train_count_and_all_splits_follow(tmp_path, capsys):
    train = write_tree(tmp_path / "src" / "train", {"a": 4, "b": 2, "c": 7})
    test = write_tree(tmp_path / "src" / "test", {"a": 9, "b": 8, "c": 3, "new": 2}, first=50)
    run(tmp_path / "src", tmp_path / "pack", "--min-images", 3, "--max-images-per-class", 5)
    assert facts(capsys)["left_out"] == {"few": 2 + 8 + 2, "many": 2}
    packs = open_splits(tmp_path / "pack")
    assert packs["train"].class_names(0, 2) == ["a", "c"] and packs["train"].class_counts.tolist() == [4, 5]
    assert packs["test"].class_counts.tolist() == [9, 3]
    for name, files in ("train", train), ("test", test):
        assert {image for split, _, image in records(tmp_path / "pack") if split == name} <= set(files.values())


def test_repeats_do_not_count(tmp_path):
    write_tree(tmp_path / "src", {"a": 3, "b": 3})
    (tmp_path / "src" / "a" / "2.png").write_bytes((tmp_path / "src" / "a" / "1.png").read_bytes())
    run(tmp_path / "src", tmp_path / "pack", "--min-images", 3)
    assert Pack(tmp_path / "pack").class_names(0, 2) == ["a", "b"]
    run(tmp_path / "src", tmp_path / "once", "--min-images", 3, "--duplicates", "drop")
    assert Pack(tmp_path / "once").class_names(0, 1) == ["b"] and Pack(tmp_path / "once").num_classes == 1


@pytest.mark.parametrize("splits", [("",), ("train", "test"), ("train", "val", "test")])
def test_all_of_it_at_once(tmp_path, capsys, splits):
    rows = noisy(7, splits, count=400, contents=300)
    source, _ = write(tmp_path / "source", rows, "folder")
    (source / splits[0] / "c1" / "bad.png").write_bytes(b"bad")
    stay = brute_force(rows, "drop")[0]
    count = Counter(label for split, label, _ in stay.elements() if split == splits[0])
    count["c1"] += 1  # the one that turns out to be bad
    least = sorted(count.values())[len(count) // 2]
    run(source, tmp_path / "pack", "--duplicates", "drop", "--min-images", least, "--max-images-per-class", least,
        "--max-skipped", 1)
    said, kept = facts(capsys), records(tmp_path / "pack")
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
def test_the_number_of_parts_chooses_nothing(tmp_path, capsys, kind):
    rows = noisy(7, ("train", "test"), count=400, contents=300)
    source, _ = write(tmp_path / "source", rows, kind)
    sizes = Counter(label for split, label, _ in brute_force(rows, "drop")[0].elements() if split == "train")
    least = sorted(sizes.values())[len(sizes) // 2]
    flags = ["--duplicates", "drop", "--min-images", least, "--max-images-per-class", least]
    run(source, tmp_path / "1", *flags)
    said, whole = facts(capsys), open_splits(tmp_path / "1")
    assert said["left_out"].keys() == {"repeat", "leak", "few", "many"}
    for parts in 2, 5:
        for part in reversed(range(parts)):
            run(source, tmp_path / str(parts), *flags, "--part", f"{part}/{parts}")
        assert facts(capsys)["left_out"] == said["left_out"]
        for split, pack in open_splits(tmp_path / str(parts)).items():
            assert pack.read(np.arange(len(pack)))[0] == whole[split].read(np.arange(len(whole[split])))[0]
            assert pack.classes_digest == whole[split].classes_digest
        reports = [tmp_path / name / "duplicates.tsv" for name in ("1", str(parts))]
        assert reports[0].read_bytes() == reports[1].read_bytes()


# Drawing a split.


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_whole_classes_are_held_out(tmp_path, capsys, kind):
    rows = [("", f"k{label}", f"{label}-{i}.png", picture(10 * label + i))
            for label in range(60) for i in range(1 + label % 4)]
    source, _ = write(tmp_path / "source", rows, kind)
    flags = ["--split", "test=0.3", "--split-by", "class"]
    for name, args in {"a": [], "b": ["--memory-mb", 1e-3, "--workers", 2], "c": ["--seed", 1]}.items():
        run(source, tmp_path / name, *flags, *args)
        assert Counter({("", *one[1:]): count for one, count in records(tmp_path / name).items()}) == listed(rows)
        packs = open_splits(tmp_path / name)
        train, test = packs["train"].class_counts > 0, packs["test"].class_counts > 0
        assert (train ^ test).all() and len(train) == 60 and 6 < test.sum() < 30  # 18 ± 3.5
    assert file_hashes(tmp_path / "a") == file_hashes(tmp_path / "b")
    assert (open_splits(tmp_path / "a")["test"].class_counts > 0).tolist() != test.tolist()
    capsys.readouterr()
    run(source, tmp_path / "large", *flags, "--min-images", 3)
    counts = sum(pack.class_counts for pack in open_splits(tmp_path / "large").values())
    assert facts(capsys)["left_out"] == {"few": 15 * 1 + 15 * 2} and sorted(counts) == [3] * 15 + [4] * 15
    assert open_splits(tmp_path / "large")["test"].class_counts.any()


# What makes no sense.


@pytest.mark.parametrize("flags, words", [
    (["--min-images", 0], "not between"), (["--max-images-per-class", 0], "not between"),
    (["--min-images", 12], "no class has that many images; the largest has 11"),
    (["--split-by", "class"], "--split-by class says how --split draws"),
    (["--split", "test=0.000001"], "draws no image"),
    (["--split", "val=0.0001", "--split-by", "class"], "draws no class"),
    (["--duplicates", "remove"], "invalid choice")])
def test_flags_that_make_no_sense(tmp_path, capsys, flags, words):
    write_tree(tmp_path / "src", {"a": 11, "b": 4})
    assert words in fails(capsys, tmp_path / "src", tmp_path / "pack", *flags)


def test_a_given_class_table_stays(tmp_path, capsys):
    write_tree(tmp_path / "src", {"a": 11, "b": 4})
    run(tmp_path / "src", tmp_path / "given")
    capsys.readouterr()
    error = fails(capsys, tmp_path / "src", tmp_path / "pack", "--classes", tmp_path / "given", "--min-images", 5)
    assert "would change the class table" in error
    run(tmp_path / "src", tmp_path / "pack", "--classes", tmp_path / "given", "--max-images-per-class", 5)
    assert Pack(tmp_path / "pack").class_counts.tolist() == [5, 4]


def test_a_split_that_loses_all_its_images(tmp_path, capsys):
    write_tree(tmp_path / "src" / "train", {"a": 4, "b": 2})
    write_tree(tmp_path / "src" / "test", {"b": 3}, first=50)
    error = fails(capsys, tmp_path / "src", tmp_path / "pack", "--min-images", 3).splitlines()[-1]
    assert "no image of test is left" in error


@pytest.mark.parametrize("count", [0, 1, 7])
def test_classes_that_only_a_held_out_split_has_are_counted(tmp_path, capsys, count):
    write_tree(tmp_path / "src" / "train", {"a": 3, **{f"c{i}": 1 for i in range(7)}})
    write_tree(tmp_path / "src" / "test", {"a": 1}, first=90)
    (tmp_path / "list.csv").write_text("path,label,split\n" + "".join(
        f"{path.relative_to(tmp_path)},{path.parent.name},{'test' if path.parent.name in held else 'train'}\n"
        for held in [[f"c{i}" for i in range(count)]] for path in sorted((tmp_path / "src" / "train").rglob("*.png")))
        + "".join(f"{path.relative_to(tmp_path)},a,test\n" for path in (tmp_path / "src" / "test").rglob("*.png")))
    names = tmp_path / "names"
    run(tmp_path / "src" / "train", names)  # a table of all
    capsys.readouterr()
    run(tmp_path / "list.csv", tmp_path / "pack", "--classes", names)
    assert (f"{count} classes have images in test and none in train" in capsys.readouterr().err) == (count > 0)


def test_reports_tell_which_of_several_sources(tmp_path, capsys):
    for name in "one", "two":
        write_tree(tmp_path / name, {"a": 2, "b": 2}, first=5)
        (tmp_path / name / "a" / "bad.png").write_bytes(b"bad")
    run(tmp_path / "one", tmp_path / "two", tmp_path / "pack", "--max-skipped", 2, "--duplicates", "report")
    paths = [line.split("\t")[0] for line in (tmp_path / "pack" / "skipped.tsv").read_text().splitlines()[1:]]
    assert sorted(paths) == [f"{tmp_path}/{name}/a/bad.png" for name in ("one", "two")]
    report = (tmp_path / "pack" / "duplicates.tsv").read_text()
    assert all(report.count(f"\t{tmp_path}/{name}/") >= 4 for name in ("one", "two"))
