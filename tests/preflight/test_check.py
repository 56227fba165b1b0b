"""The preflight check: a line for every finding, a remedy and an exit code for faults; no rank waits."""

import sys
import threading
import time

import pytest

from tests.support.facts import facts_of
from tests.support.launch import ROOT, run
from tests.support.worlds import run_ranks
from xc.config import Config, as_arguments, parse
from xc.data.pack import open_splits
from xc.errors import UserError
from xc.preflight import hosts, network
from xc.preflight.check import check
from xc.preflight.report import Report, on_all_ranks

DATA = ["--data", "synth:classes=300,dim=16,test=50", "--feature-dim", 16, "--global-batch", 30]


def states(report):
    return [(name, state) for state, name, *_ in report.findings]


@pytest.mark.parametrize("arguments", [["--check"], ["--check", "--seed", "0"], ["--no-check", "--check"]])
def test_forms_of_the_flag(arguments, tmp_path):
    cfg = parse(arguments)
    assert cfg == Config(check=True)
    (tmp_path / "check.args").write_text(as_arguments(cfg))
    assert parse([f"@{tmp_path / 'check.args'}"]) == cfg
    (tmp_path / "check.args").write_text("--data d --out o\n--check")
    assert parse([f"@{tmp_path / 'check.args'}"]) == Config(data="d", out="o", check=True)


def checked(ranks, *arguments):
    """({name: [(state, text), …]}, exit code, last line) of the check by so many ranks, which are threads."""
    def body(world):
        return check(parse([str(argument) for argument in [*arguments, "--check"]]), world)

    return run_ranks(ranks, body)[0]


def found_wrong(capsys):
    """{name: text} of the printed findings that are wrong."""
    lines = capsys.readouterr().out.splitlines()
    return {line[9:23].strip(): line[24:] for line in lines if line.startswith("wrong ")}


@pytest.mark.parametrize("arguments, name, text", [
    (["--data", "nowhere"], "data", "nowhere"),
    (["--out", ROOT / "README.md" / "run"], "run folder", "README.md is not a folder"),
    (["--out", ROOT / "README.md"], "run folder", "is not a folder"),
    (["--out", "/proc/run"], "run folder", "cannot be written to"),
    (["--global-batch", 2], "data", "--global-batch 2 is less than the 3 ranks"),
    (["--backbone", "small"], "memory", "--backbone small takes images"),
    (["--micro-batches", 10, "--data", "synth:classes=300,dim=16,test=50,images=1", "--image-size", 8, "--channels", 1,
      "--backbone", "resnet18"], "memory", "--backbone resnet18 has batch norm, which needs two values"),
    (["--global-batch", 3, "--micro-batches", 3], "data", "is more than the 1 examples of a rank"),
])
def test_a_mistake_is_a_line_among_the_others(arguments, name, text, tmp_path, capsys):
    code, last = checked(3, *DATA, "--out", tmp_path / "run", *arguments)
    wrong = found_wrong(capsys)
    assert code == 2 and "1 wrong" in last
    assert wrong.keys() == {name} and text in wrong[name]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [[], ["--head", "selective"], ["--head-momentum", 0.9, "--row-dtype", "bfloat16"]])
def test_a_plan_that_does_not_fit(flags, tmp_path, capsys):
    """3 TiB of class rows: known at once."""
    code, _ = checked(1, "--data", "synth:classes=100000000,dim=16,test=0", "--feature-dim", 8192, *flags, "--out",
                      tmp_path / "run")
    text = found_wrong(capsys)["memory"]
    assert code == 2 and "does not fit" in text and " ranks, with no more on a host than now" in text
    assert "class rows" in text and not list(tmp_path.iterdir())


@pytest.mark.parametrize("splits, state, texts", [
    ("test=50", "ok", ["on test while training, 50 examples; and at the end, with the last weights"]),
    ("test=0,val=70", "ok", ["on val while training, 70 examples; and at the end, with the last weights"]),
    ("test=50,val=70", "ok", ["on val while training, 70 examples; at the end on test, 50 examples, with the best",
                              "train has images of all classes of val and test"]),
    ("test=0", "warning", ["none: ", "has neither val nor test", "give it test= or val= above 0"])])
@pytest.mark.parametrize("ranks", [1, 3])
def test_what_will_be_evaluated(splits, state, texts, ranks, capsys):
    code, _ = checked(ranks, "--data", f"synth:classes=31,dim=16,{splits}", *DATA[2:])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line[9:23].strip() == "evaluation"]
    assert code == 0 and line.startswith(state) and all(text in line for text in texts)


@pytest.mark.parametrize("shares, named", [
    ({"val": 0.3}, {"val": 3}), ({"val": 0.5, "test": 0.2}, {"val": 5, "test": 2})])
def test_classes_that_train_has_no_image_of_are_named(shares, named, tiny_packs, tmp_path, capsys):
    flags = [part for name, share in shares.items() for part in (f"--{name}", share)]
    run(sys.executable, "-m", "data_tools.split", tiny_packs / "train", tmp_path / "packs", "--by", "class", *flags)
    code, _ = checked(2, "--data", tmp_path / "packs", "--global-batch", 12)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line[9:23].strip() == "evaluation"]
    assert code == 0 and line.startswith("warning ")
    packs = open_splits(tmp_path / "packs")
    for name, number in named.items():
        classes = [packs[name].class_name(label) for label, count in enumerate(packs[name].class_counts) if count]
        assert len(classes) == number  # whole classes, so train has none of them
        more = f" and {number - 4} more" if number > 4 else ""
        assert f"{number} classes of {name} have no image in train: {', '.join(classes[:4])}{more}" in line


def test_classes_that_train_has_no_image_of_are_what_retrieval_is_for(tiny_packs, tmp_path, capsys):
    flags = "--by", "class", "--val", 0.3
    run(sys.executable, "-m", "data_tools.split", tiny_packs / "train", tmp_path / "packs", *flags)
    code, _ = checked(2, "--data", tmp_path / "packs", "--global-batch", 12, "--eval", "retrieval")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line[9:23].strip() == "evaluation"]
    assert code == 0 and line.startswith("ok ") and "retrieval on val while training, 36 examples" in line


def test_a_pack_without_splits_is_told_how_to_get_some(tiny_packs, capsys):
    checked(1, "--data", tiny_packs / "train", "--global-batch", 12)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line[9:23].strip() == "evaluation"]
    assert line.startswith("warning ") and f"python -m data_tools.split {tiny_packs / 'train'} " in line


def test_other_code_on_one_rank_is_named(monkeypatch):
    here = threading.local()
    monkeypatch.setattr(hosts, "_code_digest", lambda: "new" if here.rank == 2 else "old")

    def body(world):
        here.rank = world.rank
        report = Report()
        hosts.report_software(report, world)
        return report

    for report in run_ranks(3, body):
        (state, _, value, remedy), = report.findings
        assert state == "wrong" and value.endswith("rank 2 has code new, rank 0 old") and remedy
        assert report.conclusion() == (2, "1 wrong, 0 with a warning")


@pytest.mark.parametrize("error", [RuntimeError("out of\nluck"), OSError(5, "Input/output error"), KeyError()])
def test_what_goes_wrong_on_one_rank_is_heard_by_all(error):
    def body(world):
        def look():
            if world.rank == 1:
                raise error
            return world.rank

        with pytest.raises(UserError, match="rank 1: ") as raised:
            on_all_ranks(world, look)
        return str(raised.value), on_all_ranks(world, lambda: world.rank)

    texts, found = zip(*run_ranks(3, body), strict=True)
    assert len(set(texts)) == 1 and "\n" not in texts[0] and found == ([0, 1, 2],) * 3


@pytest.mark.parametrize("ahead", [0.0, 0.5, 1.5, -3600.0])
def test_clocks(ahead):
    def body(world):
        def clock():
            return time.time() + (ahead if world.rank == 2 else 0.0)

        report = Report()
        network.report_clocks(report, world, clock)
        return network.clock_offsets(world, clock), report

    for offsets, report in run_ranks(3, body):
        assert all(low <= true <= high for (low, high), true in zip(offsets, (0.0, 0.0, ahead), strict=True))
        assert states(report) == [("clocks", "warning" if abs(ahead) > 1.2 else "ok")]
        assert not ahead or report.findings[0][2].startswith("rank 2 ")


@pytest.mark.parametrize("finding, facts, state, text", [
    (hosts.report_threads, [facts_of(), facts_of()], "ok", "2 of 2 rank(s) on 2 core(s)"),
    (hosts.report_threads, [facts_of(), facts_of(threads=2)], "warning", "OMP_NUM_THREADS=1"),
    (hosts.report_threads, [facts_of(cores=[0]), facts_of(cores=[0])], "warning", "binding_policy=none"),
    (hosts.report_threads, [facts_of(cores=[0]), facts_of(cores=[1])], "ok", ""),
    (hosts.report_shared_memory, [facts_of(shared_memory=2**23)], "ok", ""),
    (hosts.report_shared_memory, [facts_of(shared_memory=2**23)] * 2, "warning", "--shm-size"),
    (hosts.report_interfaces, [facts_of(), facts_of(host="b", addresses=[("eth0", "10.0.0.2")])], "ok", ""),
    (hosts.report_interfaces, [facts_of(), facts_of(host="b")], "warning", "10.0.0.1 on a, b"),
    (hosts.report_interfaces, 2 * [facts_of(settings={"OMPI_MCA_btl_tcp_if_include": "10.0.0.0/8"})], "ok",
     "if_include"),
    (hosts.report_interfaces, [facts_of(settings={"OMPI_MCA_btl_tcp_if_include": "ib0"})], "wrong", "ib0 is not on a"),
    (hosts.report_interfaces, [facts_of(settings={"OMPI_MCA_btl_tcp_if_include": "10.1.0.0/16"})], "wrong",
     "is not on a"),
    (hosts.report_interfaces, [facts_of(settings={"OMPI_MCA_btl_tcp_if_include": "10.1/x"})], "wrong", "10.1/x"),
])
def test_what_follows_from_facts(finding, facts, state, text):
    report = Report()
    report.run("interfaces", finding, facts)
    (found, _, value, remedy), = report.findings
    assert found == state and text in value + remedy


def test_gpus():
    """By facts alone: there need not be one here."""
    gpu = {"count": 2, "name": "G", "free": 2**34, "index": 0}
    for num_ranks, state in (1, "warning"), (2, "ok"), (3, "wrong"):
        report = Report()
        hosts.report_gpus(report, [facts_of(device="cuda", gpu=gpu)] * num_ranks)
        assert states(report) == [("GPUs", state)]
