"""The best accuracy that any classifier can reach on synthetic classes: the yardstick for train.py on the same --data.

    python benchmarks/best_accuracy.py --data synth:classes=100000 [--image-size 32 --channels 1] [--examples 10000]

Its last line is one JSON object with best_top1 and its standard error.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.measure import report
from xc import config
from xc.comm.launch import run
from xc.data import synthetic as synth
from xc.errors import UserError


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--examples", type=int, default=10000, help="examples to classify")
    args, flags = parser.parse_known_args()
    cfg = config.parse([*flags, "--out", "unused"])
    if not cfg.data.startswith(synth.PREFIX) or args.examples < 1:
        raise UserError("the best accuracy is known of --data synth:... alone, on --examples 1 or more")
    start = time.perf_counter()
    best, error = synth.best_accuracy(synth.open_splits(cfg)["train"], args.examples)
    report("the nearest of all prototypes", {
        "best_top1": best, "standard_error": error, "examples": args.examples, "seconds": time.perf_counter() - start})


if __name__ == "__main__":
    run(main)
