#!/usr/bin/env bash
# Packs a data set on several nodes: one job lists the images, N write a part each, and one makes the pack of them.
# Options of sbatch stand before --, the flags of data_tools.pack after it:
#
#   bash slurm/pack.sh 16 -c 32 -- photos/ packs/
#
# What was killed or failed goes on where it stopped when the same line is given again.

set -euo pipefail

stop() { echo "error: $*" >&2; exit 2; }

parts=${1:-} usage="bash slurm/pack.sh N OPTIONS OF SBATCH -- SRC OUT FLAGS, as bash slurm/pack.sh 16 -c 32 -- photos/ packs/"
case $parts in '' | 0* | *[!0-9]* | ?????*) stop "'$parts' is no number of parts from 1 to 9999: $usage" ;; esac
shift
options=()
while [ "${1:---}" != -- ]; do options+=("$1"); shift; done
[ $# -ge 3 ] || stop "there is no -- with SRC and OUT after it: $usage"
shift

submit() { sbatch --parsable --kill-on-invalid-dep=yes "${options[@]}" "$@"; }  # a job whose dependency fails ends, too

list=$(submit slurm/pack.sbatch --part "list/$parts" "$@")
array=$(submit --dependency="afterok:${list%%;*}" --array="0-$((parts - 1))" slurm/pack.sbatch "$@")
merge=$(submit --dependency="afterok:${array%%;*}" slurm/pack.sbatch --part "merge/$parts" "$@")
echo "submitted: ${list%%;*} lists the images, ${array%%;*} writes $parts parts, ${merge%%;*} makes the pack"
