"""A page in a headless browser: what is there of it, what its console says, a picture of it."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.support.launch import run

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_CONSOLE = re.compile(r"CONSOLE[:(]\d+[\])]+ (.*)")


def browser():
    """Path of a Chromium or Chrome; None where there is none (.ci/browser_package.sh installs one)."""
    return next((path for path in map(shutil.which, _NAMES) if path), None)


@dataclass(frozen=True)
class Visit:
    """document: the page as the browser has understood it; console: its lines; picture: path of a screenshot"""

    document: str
    console: list
    picture: Path


def visit(page, folder, width=1280, height=2400):
    """Open a file in the browser, whose own files lie in `folder`."""
    picture = folder / f"{page.name}.png"
    options = ["--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-dev-shm-usage",
               "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]
    options += ["--no-sandbox"] * (os.geteuid() == 0)  # which root cannot have
    done = run(browser(), *options, "--dump-dom", f"--screenshot={picture}", page.resolve().as_uri(), seconds=120)
    return Visit(done.stdout, _CONSOLE.findall(done.stderr), picture)
