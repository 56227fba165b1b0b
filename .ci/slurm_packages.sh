#!/usr/bin/env bash
# Installs what tests/slurm/test_jobs.py starts its own Slurm from, where that can be done: as root, with apt. It never fails:
# without the packages those tests are skipped, and say why.
set -uo pipefail

# libpmix-dev: Slurm's pmix plugin opens libpmix.so by the name that only this package has.
packages=(slurmctld slurmd slurm-client munge libpmix-dev iproute2 shellcheck)

skip() { echo "no Slurm for the tests: $*" >&2; exit 0; }

if dpkg-query -W "${packages[@]}" >/dev/null 2>&1; then exit 0; fi
command -v apt-get >/dev/null || skip "there is no apt-get here"
[ "$(id -u)" = 0 ] || skip "apt-get needs root"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
{ apt-get -q update && apt-get -q install -y --no-install-recommends "${packages[@]}"; } >"$log" 2>&1 ||
    skip "apt-get failed ($(tail -n 1 "$log")); the whole log: $log"
rm "$log"
