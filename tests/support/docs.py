"""Reads the fenced blocks of README and docs, and runs the commands of a page.

    python -m tests.support.docs README.md docs/data.md     runs the blocks of these pages and shows what they print

A block marked `sh` is run, unless the line above it is a comment `<!-- not run: reason -->`. The blocks of a page run
in their order, in one shell, in a clone of the checkout that has its .venv.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.support.checkout import clone_checkout
from tests.support.launch import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ENVIRONMENT = ["export PATH=$PWD/.venv/bin:$PATH OMP_NUM_THREADS=1",
               "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1",
               "export OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_hwloc_base_binding_policy=none",
               "export OMPI_MCA_rmaps_base_oversubscribe=1"]  # two ranks on a machine of one core
_FENCE = re.compile(r" *```(\S*)")
_NOT_RUN = re.compile(r"<!-- not run: (.+) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block: where its first line stands, the text after the fence, its lines, and why it is not run (None: it
    is)."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}, line {self.line}"


def blocks(page):
    """All fenced blocks of a page."""
    found, start, language = [], None, ""
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines):
        fence = _FENCE.match(line)
        if fence and start is None:
            start, language = number + 1, fence[1]
        elif fence:
            reason = _NOT_RUN.fullmatch(lines[start - 2]) if start > 1 else None
            text = "\n".join(lines[start:number])
            found.append(Block(page, start + 1, language, text, reason and reason[1]))
            start = None
    assert start is None, f"{page}: the block at line {start} has no end"
    return found


def run_blocks(page):
    """Those blocks of a page that are run."""
    return [block for block in blocks(page) if block.language == "sh" and block.not_run is None]


def run_page(page, folder, seconds):
    """Run the blocks of a page in a new folder. Returns exit code and output; the last line that begins with `==` names
    the block that failed."""
    clone_checkout(folder)
    script = ["set -euo pipefail", *ENVIRONMENT]
    for block in run_blocks(page):
        script += [f"echo '== {block}'", block.text]
    done = subprocess.run(["timeout", "-k", "5", str(seconds), "bash", "-c", "\n".join(script)], cwd=folder, text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout


def main():
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            code, output = run_page((ROOT / name).resolve(), Path(folder) / "checkout", 3600)
            print(output)
            if code:
                raise SystemExit(f"{name}: exit code {code}")


if __name__ == "__main__":
    main()
