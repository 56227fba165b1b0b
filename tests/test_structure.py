"""Imports of the library run one way."""

import ast
from pathlib import Path

XC = Path(__file__).parent.parent / "xc"
FLOORS = [
    {"disk", "keyed", "loss_scale", "losses", "margin", "message", "noise_scale", "schedule", "shard", "stop",
     "tensor_file", "topk", "watchdog"},
    {"order", "pack", "schedule_plot", "traffic"},
    {"config"},
    {"world", "run_folder", "synth", "knn_graph"},
    {"collective", "data", "metrics", "ring_search", "timeline"},
    {"neighbors"},
    {"backbone", "exchange", "heads", "optim"},
    {"checkpoint", "evaluate", "memory_plan", "pipeline"},
    {"doctor", "rollback", "saver"},
]


def imports_of(path):
    """First parts of all that a file imports, those of xc by module."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"xc.{alias.name}" for alias in node.names] if node.module == "xc" else [node.module]
        yield from names


def test_imports_run_one_way():
    height = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
    files = [path for path in XC.rglob("*.py") if path != XC / "__init__.py"]
    for path in files:
        module = path.relative_to(XC).parts[0].removesuffix(".py")
        for name in imports_of(path):
            if name.startswith("xc."):
                other = name.split(".")[1]
                assert other == module or height[other] < height[module], f"{path} imports {name}"
    assert {path.relative_to(XC).parts[0].removesuffix(".py") for path in files} == set(height)


def test_only_world_knows_the_launcher():
    for path in [*XC.rglob("*.py"), XC.parent / "train.py"]:
        used = {name.split(".")[0] for name in imports_of(path)}
        if path.name != "world.py":
            assert not used & {"mpi4py", "horovod"} and "environ" not in path.read_text(), path
