#!/usr/bin/env bash
# A hundred million classes on one machine: trained on two ranks until one is killed, resumed on one, finished on three.
#
#     bash benchmarks/hundred_million.sh RUN [CLASSES]        20 GiB of memory, 35 GB of disk, two and a half hours
#
# 50,000 classes, scattered over all, have examples; the rows of all others compete with theirs in every evaluation. The
# graph of all rows is built once, after 60 % of the run. The last line is one JSON object (benchmarks/watch_run.py):
# seconds, top-1 over all classes, and the memory of each launch against the plan.
set -euo pipefail
cd "$(dirname "$0")/.."
run=${1:?give the folder of the run}
classes=${2:-100000000}
few=$((classes / 40))
drawn=$((few < 50000 ? few : 50000))
active=$((few < 20000 ? few : 20000))
export OMP_NUM_THREADS=1 OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_hwloc_base_binding_policy=none
flags=(--data "synth:classes=$classes,dim=32,drawn=$drawn,noise=0.5,examples=40,test=500" --out "$run"
       --feature-dim 32 --row-dtype bfloat16 --head knn --active-classes "$active"
       --neighbors 8 --graph approx --graph-from 60% --global-batch 512 --epochs 1
       --eval-every 20% --save-every 20% --keep-checkpoints 1 --stall-seconds 300)

# Starts or resumes the run on so many ranks; $launcher is the process that launches them.
begin() {
    mpirun --oversubscribe --allow-run-as-root -np "$1" python train.py "${flags[@]}" --resume auto >> "$run.log" 2>&1 &
    launcher=$!
    python benchmarks/watch_run.py memory "$launcher" "$1" "$run.memory.jsonl" &
}

# Waits until the run has saved, or logged, a share of its steps, in percent. Fails where the launcher ends before.
wait_until() {
    python benchmarks/watch_run.py "$1" "$run" "$2" "$launcher" || { tail "$run.log" >&2; exit 1; }
}

[ ! -e "$run" ] || { echo "error: $run is there already: name a new folder" >&2; exit 2; }
rm -f "$run.log" "$run.memory.jsonl"
begin 2
wait_until saved 80
echo "killing rank 1 of 2" >&2
kill -9 "$(pgrep -P "$launcher" -f train.py | tail -n 1)"
wait "$launcher" || true
begin 1
wait_until logged 88
echo "stopping the one rank" >&2
kill -USR1 "$(pgrep -P "$launcher" -f train.py)"
wait "$launcher" || true
begin 3
wait "$launcher"
wait  # for the last line of memory
python benchmarks/watch_run.py report "$run" "$run.memory.jsonl" -- "${flags[@]}"
