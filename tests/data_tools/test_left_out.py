"""Images that a flag leaves out are listed, each once, with the reason."""

from collections import Counter

import pytest

from tests.data_tools.test_duplicates import brute_force, noisy
from tests.support.commands import run_pack
from tests.support.images import write_tree
from tests.support.pack_jobs import run_parts, stages
from tests.support.rows import facts, write_rows
from xc.data.pack import Pack, open_splits

REASONS = {"repeat": "repeats another image", "leak": "is in val or test too", "conflict": "has several labels",
           "few": "its class has fewer images than --min-images", "many": "beyond --max-images-per-class"}


def lines_of(out):
    head, *lines = (out / "left_out.tsv").read_text().splitlines()
    assert head == "path\treason"
    return [tuple(line.split("\t")) for line in lines]


@pytest.mark.parametrize("memory", [1e-3, 64])
@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("rule", ["drop", "drop-conflicting"])
def test_each_image_is_packed_or_listed(tmp_path, capsys, rule, kind, memory):
    rows = noisy(7, ("train", "val", "test"), count=600, contents=400)
    source, _ = write_rows(tmp_path / "source", rows, kind)
    run_pack(source, tmp_path / "pack", "--duplicates", rule, "--min-images", 3, "--max-images-per-class", 3,
             "--memory-mb", memory)
    left_out, lines = facts(capsys)["left_out"], lines_of(tmp_path / "pack")
    assert left_out.keys() >= {"few", "many", "repeat", "leak"}
    assert Counter(text for _, text in lines) == {REASONS[reason]: count for reason, count in left_out.items()}
    packed = sum(map(len, open_splits(tmp_path / "pack").values()))
    assert len(lines) == len({path for path, _ in lines}) == len(rows) - packed
    by_duplicates = brute_force(rows, rule)[1]
    assert {reason: left_out[reason] for reason in by_duplicates} == by_duplicates


def test_the_line_names_what_skipped_would_name(tmp_path):
    for name in "one", "two":
        write_tree(tmp_path / name, {"a\tb": 2, "\udcff".encode(errors="surrogateescape").hex(): 1}, first=5)
    run_pack(tmp_path / "one", tmp_path / "two", tmp_path / "pack", "--duplicates", "drop")
    assert all(path.startswith(f"{tmp_path}/two/") and "\t" not in path for path, _ in lines_of(tmp_path / "pack"))
    run_pack(tmp_path / "one", tmp_path / "alone", "--max-images-per-class", 1)
    assert [(path.rpartition("/")[0], reason) for path, reason in lines_of(tmp_path / "alone")] == [
        ("a\\tb", REASONS["many"])]


def test_there_is_no_list_of_nothing(tmp_path):
    write_tree(tmp_path / "src", {"a": 3, "b": 2})
    flags = ["--duplicates", "drop", "--min-images", 2, "--max-images-per-class", 3]
    run_pack(tmp_path / "src", tmp_path / "pack", *flags)
    assert not (tmp_path / "pack" / "left_out.tsv").exists()
    run_parts(2, tmp_path / "src", tmp_path / "parts", *flags)
    assert not (tmp_path / "parts" / "left_out.tsv").exists()


def test_steps_that_are_repeated_repeat_no_line(tmp_path):
    write_tree(tmp_path / "src", {"a": 9, "b": 5, "c": 1})
    flags = ["--min-images", 2, "--max-images-per-class", 4, "--shard-mb", 1e-6]
    run_pack(tmp_path / "src", tmp_path / "whole", *flags)
    for part in sorted(stages(3)[:-1] * 2, key=stages(3).index) + stages(3)[-1:]:
        run_pack(tmp_path / "src", tmp_path / "pack", *flags, "--part", part)
    lines = lines_of(tmp_path / "pack")
    assert lines == lines_of(tmp_path / "whole") and len(lines) == len(set(lines)) == 5 + 1 + 1
    assert len(Pack(tmp_path / "pack")) == 8
