"""What an export of a backbone costs, and how fast its graphs are: python benchmarks/graphs.py

A graph of --backbone with random weights and without class rows is captured, written as ONNX and as .pt2, and compared
with PyTorch, as xc.export does. Then the features of --batch images are computed with --threads threads

pytorch  by the backbone, from pixels that are prepared as for xc.predict
onnx     by onnxruntime
pt2      by torch.export.load

in turns. Milliseconds of wall and CPU time for an image are medians of --repeats.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tqdm import tqdm

from benchmarks.measure import cpu_seconds, report
from xc.comm.world import World
from xc.config import Config
from xc.data.augment import norm_of, prepared
from xc.model import backbone as backbones
from xc.use.agreement import largest_differences, samples_of
from xc.use.graph import Graph, captured
from xc.use.graph_files import GRAPH_FILES
from xc.use.trained import Trained


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cfg = Config(data="none", out="none", backbone=args.backbone, image_size=args.image_size, channels=3,
                 input_norm="imagenet")
    shape = 3, cfg.image_size, cfg.image_size
    trained = Trained(cfg, None, {}, backbones.build(cfg.backbone, shape, cfg.feature_dim, 0, World()).eval())
    values, arms = vars(args).copy(), {"pytorch": by_pytorch(trained)}
    with tempfile.TemporaryDirectory() as folder:
        begin, graph = time.perf_counter(), Graph(trained)
        program, samples = captured(graph, cfg), samples_of(graph, trained, None)
        values["capture_seconds"] = time.perf_counter() - begin
        for name, kind in GRAPH_FILES.items():
            path, begin = f"{folder}/{kind.name}", time.perf_counter()
            kind.write(program, ["features"], "{}", path)
            arms[name] = kind.open(path)
            found = largest_differences(name, arms[name], samples, 1.0)["features"]
            values[f"{name}_difference"] = f"{found['difference']:.1e} of {found['of']:.1e}"
            values[f"{name}_seconds"] = time.perf_counter() - begin
            values[f"{name}_mb"] = Path(path).stat().st_size / 1e6
        pixels, seconds = torch.randint(0, 256, (args.batch, *shape), dtype=torch.uint8), {name: [] for name in arms}
        for _ in tqdm(range(args.repeats + 1), "rounds", disable=not sys.stderr.isatty()):
            for name, run in arms.items():
                begin = time.perf_counter(), cpu_seconds()
                run(pixels)
                seconds[name].append((time.perf_counter() - begin[0], cpu_seconds() - begin[1]))
    for name, found in seconds.items():
        for clock, times in zip(("", "cpu_"), zip(*found[1:], strict=True), strict=True):  # the first one warms up
            values[f"{name}_{clock}ms"] = 1e3 * statistics.median(times) / args.batch
    report("an exported graph beside PyTorch", values)


def by_pytorch(trained):
    norm = norm_of(trained.cfg.input_norm, trained.cfg.channels)
    return torch.no_grad()(lambda pixels: trained.backbone(prepared(pixels.clone(), norm=norm)))


if __name__ == "__main__":
    main()
