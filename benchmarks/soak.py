"""Long searches for failures, which must find none: a table, one JSON line, exit code 1 on findings.

    python benchmarks/soak.py fuzz --minutes 10          every reader of untrusted files (tests/fuzz), fresh seeds
    python benchmarks/soak.py kill --kills 200 --ranks 4 a run whose ranks are killed at random moments

Where a case of fuzz fails, its files stay in --findings, with a line that reads them again; of kill, the run stays.
"""

import argparse
import json
import secrets
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.fuzz.targets import TARGETS
from tests.support.kills import kill_again_and_again

CASE_SECONDS = 60  # of silence, after which a child hangs; its first line comes after its imports
MOST_FINDINGS = 5  # of one target: the rest of its time would tell little more


def watch(command, silence):
    """Run a command to its end. Returns its lines of output, and how it failed: "" for exit code 0, a hang after so
    many seconds without a line, or its exit code or signal with the end of what it wrote on stderr."""
    lines, last = [], time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                                   text=True)

        def listen():
            nonlocal last
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                last = time.monotonic()

        listener = threading.Thread(target=listen)
        listener.start()
        failure = None
        while process.poll() is None and failure is None:
            time.sleep(0.1)
            if time.monotonic() - last > silence:
                process.kill()
                failure = f"hangs: no answer for {silence} s"
        listener.join()
        code = process.wait()
        if failure is None and code:
            errors.seek(0)
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            failure = f"{name} {errors.read()[-2000:]}".strip()
    return lines, failure or ""


def fuzz(args):
    """The rows of the table, by target, and what there is to say of all of them."""
    rows, findings = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.targets:
            rows[name] = count = Counter(cases=0, refused=0, accepted=0, findings=0)
            end = time.monotonic() + 60 * args.minutes / len(args.targets)
            while (left := end - time.monotonic()) > 0 and count["findings"] < MOST_FINDINGS:
                work, seed = Path(scratch) / secrets.token_hex(4), secrets.randbits(62)
                child = [sys.executable, "-X", "faulthandler", "-m", "tests.fuzz", name]
                options = {"--seed": seed, "--seconds": left, "--work": work}
                child += [str(part) for pair in options.items() for part in pair]
                lines, failure = watch(child, CASE_SECONDS)
                told = Counter(line.split(" ")[0] for line in lines)
                count.update({"cases": told["case"], "refused": told["refused"], "accepted": told["accepted"]})
                found = next((line.partition(" ")[2] for line in lines if line.startswith("finding ")), failure)
                if found:
                    count["findings"] += 1
                    findings.append(_saved(name, found, seed + max(0, told["case"] - 1), work / "case", args.findings))
                    print(f"{name}: {found}\n  {findings[-1]}", flush=True)
                shutil.rmtree(work, ignore_errors=True)
    return rows, {**sum(map(Counter, rows.values()), Counter()), "findings": len(findings), "targets": len(rows)}


def kill(args):
    """The same by the moments that ranks were killed in."""
    work, kills, finding = Path(tempfile.mkdtemp(prefix="kill-")), [], None

    def progress(one):
        kills.append(one)
        print(f"kill {len(kills)} of {args.kills} ({one.moment}): over in {one.seconds:.1f} s, {one.lost} steps lost",
              flush=True)

    try:
        kill_again_and_again(work, args.kills, args.ranks, args.seed, progress)
        shutil.rmtree(work)
    except AssertionError as error:
        finding = str(error)
        print(f"after {len(kills)} kills, in {work}: {finding}", flush=True)
    rows = {}
    for moment in dict.fromkeys(one.moment for one in kills):
        some = [one for one in kills if one.moment == moment]
        rows[moment] = {"kills": len(some), "median_s": statistics.median(one.seconds for one in some),
                        "longest_s": max(one.seconds for one in some), "most_lost": max(one.lost for one in some)}
    return rows, {"kills": len(kills), "ranks": args.ranks, "seed": args.seed, "findings": int(finding is not None),
                  "longest_s": round(max((one.seconds for one in kills), default=0), 2),
                  "most_lost": max((one.lost for one in kills), default=0)}


def _saved(name, found, number, case, folder):
    """Keep the files of a case; returns the command that reads them again."""
    kept = folder.resolve() / f"{name}-{number}"
    kept.mkdir(parents=True)
    if (case / "in").exists():
        subprocess.run(["cp", "-a", case / "in", kept], check=True)  # pipes and links too
    line = shlex.join(["python", "-m", "tests.fuzz", name, "--case", str(kept)])
    (kept / "finding.txt").write_text(f"{line}\n{found}\n")
    return line


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("fuzz", help="readers of untrusted files")
    one.add_argument("--minutes", type=float, default=10, help="of all targets together (%(default)s)")
    one.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="NAME",
                     help=f"of {', '.join(TARGETS)}; all")
    one.add_argument("--findings", type=Path, default=Path("findings"), help="folder for what fails (%(default)s)")
    one.set_defaults(run=fuzz)
    one = commands.add_parser("kill", help="ranks that are killed")
    one.add_argument("--kills", type=int, default=200, help="%(default)s")
    one.add_argument("--ranks", type=int, default=4, help="%(default)s")
    one.add_argument("--seed", type=int, default=secrets.randbits(31), help="of the moments; a fresh one")
    one.set_defaults(run=kill)
    args = parser.parse_args()
    started = time.monotonic()
    rows, result = args.run(args)
    columns = list(next(iter(rows.values()), ()))
    print("".join(f"{text:>12}" for text in (args.command, *columns)))
    for name, row in rows.items():
        shown = (f"{row[column]:,.1f}" if isinstance(row[column], float) else f"{row[column]:,}" for column in columns)
        print("".join(f"{text:>12}" for text in (name, *shown)))
    print(json.dumps(result | {"seconds": round(time.monotonic() - started)}))
    sys.exit(bool(result["findings"]))


if __name__ == "__main__":
    main()
