"""What a step costs as the number of classes grows and the number of active ones does not.

    mpirun -np 2 python benchmarks/cost_curve.py --active 10000 --plot cost_curve.png

KNN and sampled softmax with M active classes, and full softmax as far as it goes (--full-classes), at the numbers of
classes of --classes. step_ms, and bytes_per_class: resident memory over idle of all ranks together after the steps, by
class; by_sum: the bytes of rows and graph that account for it (momentum: none, train.py's default). growth: KNN's
step at the last number of classes over that at the second.

Every point is a process of its own per rank, so that none finds the memory of the one before.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.measure import report

ROOT = Path(__file__).parent.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--full-classes", type=int, default=10**6, help="full softmax up to here")
    parser.add_argument("--active", type=int, default=5000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch-per-rank", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--plot", help="a PNG of both curves")
    args = parser.parse_args()

    points = {head: {} for head in ("knn", "sampled", "full")}
    for classes in args.classes:
        for head, found in points.items():
            if head != "full" or classes <= args.full_classes:
                found[classes] = point(args, head, classes)
                print(f"{head:8} {classes:>11,} classes  {found[classes]['step_ms']:9.1f} ms  "
                      f"{found[classes]['bytes_per_class']:8.1f} bytes a class, "
                      f"{found[classes]['by_sum']:.1f} accounted for", flush=True)
    if args.plot:
        draw(points, args.plot)
    knn = [found["step_ms"] for found in points["knn"].values()]
    result = {f"{key}.{head}": {str(c): round(found[key], 2) for c, found in of_head.items()}
              for key in ("step_ms", "bytes_per_class", "by_sum", "resident_mb") for head, of_head in points.items()}
    report(f"{args.active:,} active classes, D = {args.dim}, {args.ranks} ranks", result | {
        "active": args.active, "growth": knn[-1] / knn[1 if len(knn) > 1 else 0]})


def point(args, head, classes):
    flags = ["--head", head, "--classes", classes, "--dim", args.dim, "--batch-per-rank", args.batch_per_rank,
             "--active", min(args.active, classes), "--head-momentum", 0, "--repeats", args.repeats]
    command = ["mpirun", "--oversubscribe", "-np", args.ranks, sys.executable, ROOT / "benchmarks/head_step.py", *flags]
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{head} at {classes} classes failed:\n{run.stderr}")
    found = json.loads(run.stdout.splitlines()[-1])
    return {"step_ms": found["step_ms"], "resident_mb": found["resident_mb"],
            "bytes_per_class": found["resident_mb"] * args.ranks * 2**20 / classes,
            "by_sum": found["kept_mb"] * args.ranks * 2**20 / classes}


def draw(points, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for head, found in points.items():
        axes[0].plot(list(found), [p["step_ms"] for p in found.values()], marker="o", label=head)
        axes[1].plot(list(found), [p["resident_mb"] for p in found.values()], marker="o", label=head)
    for axis, title in zip(axes, ("milliseconds a step", "MiB over idle, of a rank"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="classes", title=title)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
