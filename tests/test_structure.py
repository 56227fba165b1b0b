"""The layout: imports run one way, launchers stay in xc/comm, data_tools knows file layouts only, nothing grows
huge."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
XC = ROOT / "xc"
# A folder or file of xc/ imports only what stands in lines above it.
FLOORS = [
    {"errors", "files", "intervals"},
    {"config"},
    {"run"},
    {"comm"},
    {"data", "knn", "optim"},
    {"gradients", "model"},
    {"checkpoint"},
    {"plan"},
    {"preflight", "train", "use"},
    {"reporting"},
    {"predict", "embed", "index", "export", "report"},
]
# These read images as data_tools does, from any source. Nothing that trains depends on it.
WITH_DATA_TOOLS = {"use", "predict", "embed", "index", "export", "report"}
# What of the trainer the commands may use: how packs and checkpoints lie in files.
FOR_DATA_TOOLS = {"xc.errors", "xc.files", "xc.data.pack", "xc.data.images", "xc.data.image_types",
                  "xc.data.hdf5_tables", "xc.data.class_names",
                  "xc.checkpoint.layout", "xc.checkpoint.tensor_file", "xc.comm.shard", "xc.knn.graph_file"}
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 350, 60
LONG_FUNCTIONS = {("train.py", "main")}  # a page that reads top to bottom


def sources(*places):
    """Python files in these folders, or these files."""
    return [path for place in places for path in (sorted(place.rglob("*.py")) if place.is_dir() else [place])]


def imports_of(path):
    """Modules that a file imports, by their full names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = (ROOT / whole.replace(".", "/")).with_suffix(".py").exists()
                yield whole if is_module else node.module


def room_of(path):
    return path.relative_to(XC).parts[0].removesuffix(".py")


def test_imports_run_one_way():
    height = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    files = [path for path in sources(XC) if path != XC / "__init__.py"]
    assert {room_of(path) for path in files} == set(height)
    for path in files:
        for name in imports_of(path):
            if name.startswith("xc."):
                other, own = name.split(".")[1], room_of(path)
                assert other == own or height[other] < height[own], f"{path} imports {name}"
            allowed = room_of(path) in WITH_DATA_TOOLS and name.split(".")[0] == "data_tools"
            assert allowed or name.split(".")[0] not in ("data_tools", "tests", "train"), f"{path} imports {name}"


def test_only_comm_knows_the_launcher():
    for path in sources(XC, ROOT / "train.py"):
        used = {name.split(".")[0] for name in imports_of(path)}
        if XC / "comm" not in path.parents:
            assert not used & {"mpi4py", "horovod"} and "environ" not in path.read_text(), path


def test_commands_know_only_how_files_lie():
    for path in sources(ROOT / "data_tools"):
        found = {name for name in imports_of(path) if name.split(".")[0] in ("xc", "train", "tests")}
        assert found <= FOR_DATA_TOOLS, f"{path} imports {found - FOR_DATA_TOOLS}"


def test_packages_do_nothing_when_imported():
    for path in sources(XC, ROOT / "data_tools"):
        assert path.name != "__init__.py" or not path.read_text(), path


def test_nothing_grows_huge():
    """A file that must says so at its head: "Longer than 350 lines: …"."""
    for path in sources(XC, ROOT / "data_tools", ROOT / "train.py"):
        text = path.read_text()
        tree = ast.parse(text)
        reason = f"Longer than {MOST_LINES} lines" in (ast.get_docstring(tree) or "")
        assert reason or text.count("\n") <= MOST_LINES, path
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                long = (str(path.relative_to(ROOT)), node.name) in LONG_FUNCTIONS
                assert long or lines <= MOST_LINES_OF_A_FUNCTION, f"{path}: {node.name} has {lines} lines"
