#!/usr/bin/env bash
# Installs the browser that tests/reporting/test_browser.py opens a report with, where that can be done: as root, with apt.
# It never fails: without a browser that test is skipped, and says why.
set -uo pipefail

skip() { echo "no browser for the tests: $*" >&2; exit 0; }

for name in chromium chromium-browser google-chrome google-chrome-stable; do
    if command -v "$name" >/dev/null; then exit 0; fi
done
command -v apt-get >/dev/null || skip "there is no apt-get here"
[ "$(id -u)" = 0 ] || skip "apt-get needs root"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
{ apt-get -q update && apt-get -q install -y --no-install-recommends chromium fonts-dejavu-core; } >"$log" 2>&1 ||
    skip "apt-get failed ($(tail -n 1 "$log")); the whole log: $log"
rm "$log"
