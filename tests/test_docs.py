"""README and docs: every command runs, every flag, file and link exists, every worked example does what it says."""

import argparse
import ast
import base64
import io
import re
import shutil
from argparse import Namespace

import pytest
import torch
from PIL import Image

import data_tools.pack
from data_tools.sources import detect
from tests.support.docs import PAGES, blocks, run_blocks, run_page
from tests.support.launch import ROOT
from tests.support.worlds import run_ranks
from xc import config
from xc.gradients import exchanges
from xc.model import margin
from xc.model.sampled import SampledHead
from xc.optim import schedule

PAGE_SECONDS = 550  # a page takes up to 90 s on two quiet cores
# Of sbatch, srun, mpirun, horovodrun, pip, pytest, py-spy and .ci/horovod_wheel.sh.
FOREIGN_FLAGS = set("""
    --account --array --batch --gpus-per-node --mpi --nodes --ntasks --ntasks-per-node --partition --signal
    --oversubscribe --check-build --gloo --no-deps --key --durations --pdb --pid""".split())
PROGRAM = re.compile(r"train\.py|xc\.(?:predict|embed|index|export|report)\b|"
                     r"data_tools\.\w+|tests\.support\.\w+|benchmarks/\w+\.py|slurm/\w+\.sbatch(?: \w+)?")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
PATH = re.compile(r"(?<![\w/.{-])(?:xc|data_tools|benchmarks|recipes|tests|slurm|docs|\.ci)/(?!logs)[\w/.-]*\w/?")


def code_of(page):
    """The commands of a page, one a line, and its code spans."""
    text = page.read_text()
    found = [block.text.replace("\\\n", " ") for block in blocks(page) if block.language == "sh"]
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    found += [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose)]
    return "\n".join(found)


def flags_of(program):
    """The flags of a program, old names left out; None: any, or the program is a placeholder."""
    if program.startswith("slurm/"):
        template, _, benchmark = program.removeprefix("slurm/").partition(".sbatch")
        program = {"train": "train.py", "sweep": "train.py", "pack": "data_tools.pack", "test": "NAME",
                   "bench": f"benchmarks/{benchmark.strip() or 'NAME'}.py"}[template]
    if program == "train.py":
        return {name for action in config._parser()._actions if action.help != argparse.SUPPRESS
                for name in action.option_strings}
    if "NAME" in program:
        return None
    path = ROOT / (program if program.endswith(".py") else program.replace(".", "/") + ".py")
    assert path.is_file(), f"{program}: there is no such program"
    shared = [ROOT / f"benchmarks/{name}.py" for name in ("hosts", "image_sets", "measure")]
    shared += [ROOT / "xc/use/job.py"] * program.startswith("xc.")
    of_training = flags_of("train.py") if "config.parse([*" in path.read_text() else set()
    return {"--help"} | of_training | {name for file in [path, *shared] for name in flags_in(file)}


def flags_in(file):
    """The flags that a file gives to argparse."""
    for node in ast.walk(ast.parse(file.read_text())):
        name = ast.unparse(node.func).split(".")[-1] if isinstance(node, ast.Call) else ""
        if name in ("add", "add_argument", "add_switch"):
            for argument in node.args:
                if isinstance(argument, ast.Constant) and str(argument.value).startswith("--"):
                    yield argument.value
                    if name == "add_switch" or "BooleanOptionalAction" in ast.unparse(node):
                        yield argument.value.replace("--", "--no-", 1)


def commands(code):
    """(program, its flags) of all commands in the code of a page."""
    for line in re.split(r"[\n|;&]", code):
        found = PROGRAM.search(line)
        if found:
            own, _, of_training = line[found.end() :].partition(" -- ")  # softmax_table.py gives these to train.py
            yield found[0], FLAG.findall(own)
            yield "train.py", FLAG.findall(of_training)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_is(page):
    for block in blocks(page):
        assert block.language in ("sh", "text", "python"), f"{block}: marked {block.language!r}"
        assert block.not_run is None or block.language == "sh", f"{block}: nothing runs such a block"
    comments = re.findall("^<!--", page.read_text(), re.MULTILINE)
    assert len(comments) == sum(block.not_run is not None for block in blocks(page)), "a comment that is above no block"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_flag_exists(page):
    for program, flags in commands(code_of(page)):
        known = flags_of(program)
        assert known is None or set(flags) <= known, f"{program} has no {sorted(set(flags) - known)}"


def test_every_flag_that_is_mentioned_exists():
    known = FOREIGN_FLAGS | flags_of("train.py")
    for folder in "data_tools", "benchmarks", "tests/support", "xc", "xc/use":
        known |= {flag for file in (ROOT / folder).glob("*.py") for flag in flags_in(file)}
    for page in PAGES:
        assert set(FLAG.findall(code_of(page))) <= known, page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_link_exists(page):
    for name in PATH.findall(code_of(page)):
        assert (ROOT / name).exists() or (ROOT / f"{name}.py").exists(), name
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("https://"):
            path, _, heading = target.partition("#")
            linked = page.parent / path if path else page
            assert linked.exists(), target
            slugs = [re.sub(r"[^\w -]", "", line.lower()).strip().replace(" ", "-")
                     for line in linked.read_text().splitlines() if line.startswith("#")] if heading else [""]
            assert heading in slugs, target


def test_readme_fits_three_screens():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 180
    assert [line for line in lines if len(line) > 100] == []


def test_results_name_every_benchmark():
    text = (ROOT / "docs/results.md").read_text()
    assert [path for path in (ROOT / "benchmarks").glob("*.py") if f"`benchmarks/{path.name}`" not in text] == []


def test_readme_names_every_page():
    assert [page for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in (ROOT / "README.md").read_text()
            ] == []


@pytest.mark.parametrize("folder, row", [
    ("xc", r"^\| (`[^|]+) \|[^|]+\|$"), ("data_tools", r"^\| (`\w+/`) \|[^|]+\| ([^|]+) \|$")])
def test_architecture_names_every_file(folder, row):
    named = set()
    for cells in re.findall(row, (ROOT / "docs/architecture.md").read_text(), re.MULTILINE):
        room, names = ("", cells) if isinstance(cells, str) else (cells[0].strip("`"), cells[1])
        named |= {room + name.removeprefix("xc/") for name in re.findall(r"`([\w/]+)`", names)}
    files = {str(path.relative_to(ROOT / folder).with_suffix("")) for path in (ROOT / folder).rglob("*.py")}
    files = {name for name in files if not name.endswith("__init__") and (folder == "xc" or "/" in name)}
    assert files == named


@pytest.fixture(scope="module")
def examples():
    """The names that the worked examples of architecture.md define, in the modules they are for."""
    names = {"torch": torch, "SampledHead": SampledHead} | vars(margin) | vars(schedule) | vars(exchanges)
    for block in blocks(ROOT / "docs/architecture.md"):
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), names)
    return names


def test_the_example_of_a_margin(examples):
    assert examples["MARGINS"]["halved"](torch.tensor(0.5), 0.2).item() == pytest.approx(0.4)


def test_the_example_of_a_schedule(examples):
    assert examples["DECAYS"]["linear"](Namespace(warmup=10, length=110), 60) == 0.5


def test_the_example_of_a_head(examples):
    def body(world):
        head = examples["NextHead"](20, 4, world, active_classes=6, near_share=1.0)
        head.select(torch.tensor([3, 18]), step=0)
        return head.selection.active + head.shard.first

    active = torch.cat(run_ranks(2, body)).tolist()
    assert {3, 4, 18, 19} <= set(active) and len(active) == 6


def test_the_example_of_an_exchange(examples):
    def body(world):
        net = torch.nn.Linear(3, 2)
        exchange = examples["EXCHANGES"]["clipped"](net, world, config.Config(data="d", out="o"))
        exchange.before_last_backward(schedule.StepPlan(0.1, 2, 1, 1.0))
        (100 * net(torch.ones(1, 3)).sum()).backward()
        exchange.reduce()
        return torch.cat([p.grad.flatten() for p in net.parameters()]).norm().item()

    assert run_ranks(2, body) == pytest.approx([1.0, 1.0])


def test_the_example_of_a_source(examples, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(detect.KINDS, "base64", examples["FORMAT"])
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "png")
    (tmp_path / "list.b64").write_text(f"cat\t{base64.b64encode(buffer.getvalue()).decode()}\n" * 3)
    data_tools.pack.main([str(tmp_path / "list.b64"), str(tmp_path / "pack"), "--workers", "0"])
    assert "3 images of 1 classes" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.mpi
@pytest.mark.timeout(PAGE_SECONDS + 50)
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a page runs in a git clone of the checkout")
@pytest.mark.parametrize("page", [page for page in PAGES if run_blocks(page)], ids=lambda page: page.name)
def test_every_command_runs(page, tmp_path):
    code, output = run_page(page, tmp_path / "checkout", PAGE_SECONDS)
    shutil.rmtree(tmp_path / "checkout")
    assert code == 0, output[-6000:]
