# Read by the templates: a job's environment, its launcher and logs, and how training goes on until it is complete.
# shellcheck shell=bash

# shellcheck source=slurm/cluster.sh
. slurm/cluster.sh

stop() { echo "error: $*" >&2; exit 2; }

# --- the environment ---
if [ -n "$XC_MODULES" ]; then
    set +u  # the module command of many sites reads variables that are not set
    # shellcheck disable=SC1091
    type module >/dev/null 2>&1 || . /etc/profile
    # shellcheck disable=SC2086
    module load $XC_MODULES || stop "module load $XC_MODULES: mend XC_MODULES in slurm/cluster.sh"
    set -u
fi
export PATH="$PWD/.venv/bin:$PATH" PYTHONUNBUFFERED=1
unset PYTHONPATH  # modules may set it, and their packages would hide the pinned ones
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}  # the one rule for threads: as many as a rank has cores
export OMPI_MCA_mpi_yield_when_idle=${OMPI_MCA_mpi_yield_when_idle:-1}
export OMPI_MCA_hwloc_base_binding_policy=${OMPI_MCA_hwloc_base_binding_policy:-none}  # a rank has more than one thread
if [ -n "$XC_INTERFACE" ]; then
    export OMPI_MCA_btl_tcp_if_include=$XC_INTERFACE OMPI_MCA_oob_tcp_if_include=$XC_INTERFACE
    export NCCL_SOCKET_IFNAME=$XC_INTERFACE
fi
[ -z "$XC_SCRATCH" ] || export TMPDIR=$XC_SCRATCH

# --- the job ---
id=${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}
export XC_LOGS=slurm/logs/$SLURM_JOB_NAME-$id  # rank-0.log and so on, by slurm/rank.sh
mkdir -p "$XC_LOGS"

# --- the launcher: as many ranks as tasks were asked for, or one on each node ---
# All GPUs of a node are visible to all of its ranks (no --gpus-per-task): train.py takes that of its local rank.
ranks=${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES}

srun_has_mpi() {
    local found='from mpi4py import MPI; raise SystemExit(MPI.COMM_WORLD.size != 2)'
    timeout 60 srun --mpi="$XC_SRUN_MPI" --nodes=1 --ntasks=2 --overcommit python -c "$found" >/dev/null 2>&1
}

choose_launcher() {
    if [ "$XC_LAUNCHER" = auto ]; then
        if srun_has_mpi; then XC_LAUNCHER=srun; else XC_LAUNCHER=mpirun; fi
    fi
    case $XC_LAUNCHER in
        srun)
            # Slurm does not hand the cores of a task on to srun by itself.
            launch=(srun --mpi="$XC_SRUN_MPI" --ntasks="$ranks" --cpus-per-task="$OMP_NUM_THREADS" --kill-on-bad-exit=1)
            [ -n "${SLURM_NTASKS:-}" ] || launch+=(--ntasks-per-node=1) ;;
        mpirun)
            launch=(mpirun -np "$ranks")
            [ -n "${SLURM_NTASKS:-}" ] || launch+=(--map-by ppr:1:node) ;;
        horovodrun)
            [ "$SLURM_JOB_NUM_NODES" = 1 ] ||
                stop "XC_LAUNCHER=horovodrun is for one node, since it goes to others by ssh: take srun or mpirun"
            # It becomes a shell that waits for mpirun and would die of USR1.
            launch=(bash -c 'trap "" USR1; exec "$@"' - horovodrun -np "$ranks" -H "localhost:$ranks") ;;
        *) stop "XC_LAUNCHER=$XC_LAUNCHER is not known: take srun, mpirun, horovodrun or auto" ;;
    esac
    launch+=(bash slurm/rank.sh)
    echo "job $id: $ranks ranks on $SLURM_JOB_NODELIST by $XC_LAUNCHER, cores of each $OMP_NUM_THREADS, logs in $XC_LOGS"
}

# --- the ranks run in the background, or this shell would hear of a signal only when they have ended ---
# Slurm sends its signal to this shell alone (--signal=B:USR1@…). mpirun and srun pass USR1 on to all ranks, which save;
# of TERM mpirun would kill them within a second.
pid='' told=0

told_to_stop() {
    told=$((told + 1))
    [ -n "$pid" ] || return 0
    if [ "$XC_LAUNCHER" = horovodrun ]; then pkill -USR1 -P "$pid" || true; else kill -USR1 "$pid" || true; fi
}
trap told_to_stop USR1 TERM

run_ranks() {  # run_ranks COMMAND...: on all ranks; sets $code
    local known=$told
    "${launch[@]}" "$@" &
    pid=$!
    if [ "$told" != "$known" ]; then kill -USR1 "$pid" || true; fi
    while
        known=$told code=0
        wait "$pid" || code=$?
        [ "$told" != "$known" ]  # then it was wait that ended, not the ranks
    do :; done
    pid=''
}

# --- training ---
# The checkpoint that --resume auto takes, and when it was written: one of the same name may have taken its place.
newest() { stat -c '%n %Y' "$run"/checkpoints/step-*/meta.json 2>/dev/null | sort -V | tail -n 1 || true; }

# Prints the run folder; train.py reads its flags the same way, @FILE and all.
out_of_flags='
import sys
from xc import config
try:
    print(config.parse().out)
except config.UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
'

# train_until_complete FLAGS...: train.py with these flags; what is not complete then goes back into the queue, with
# the same number, and goes on from its newest checkpoint. Exits with train.py's code: 0 complete, 2 a user's mistake.
train_until_complete() {
    local flags
    case $XC_CHECK in 0 | 1) ;; *) stop "XC_CHECK=$XC_CHECK is not allowed: 0 or 1" ;; esac
    case $XC_MAX_RESTARTS in
        '' | *[!0-9]*) stop "XC_MAX_RESTARTS=$XC_MAX_RESTARTS is not allowed: a number, 0 or more" ;;
    esac
    flags=(--out "runs/$SLURM_JOB_NAME-$id" --resume auto "$@")  # of a flag given twice the last one counts
    run=$(python -c "$out_of_flags" "${flags[@]}") || exit
    before=$(newest)
    # The user may have named a checkpoint to begin with. That is done once there is a newer one than there was.
    if [ -e "$XC_LOGS/begun-from" ]; then
        if [ -n "$before" ] && [ "$(cat "$XC_LOGS/begun-from")" != "$before" ]; then flags+=(--resume auto); fi
    else
        echo "$before" >"$XC_LOGS/begun-from"
    fi

    trap 'told_to_stop; watch_the_end' USR1 TERM
    trap 'back_into_the_queue 124 "the job ends before the ranks do, what is not saved is lost"' ALRM
    choose_launcher
    code=0
    # What is wrong at a restart may pass by itself, and the run has shown that it can be: there is no check then, and
    # code 2 is a failure like others.
    if [ "$XC_CHECK" = 1 ] && [ -z "${SLURM_RESTART_COUNT:-}" ]; then run_ranks python train.py "${flags[@]}" --check; fi
    if [ "$code" = 0 ] && [ "$told" -gt 0 ]; then code=75; fi
    if [ "$code" = 0 ]; then run_ranks python train.py "${flags[@]}"; fi
    trap '' USR1 TERM ALRM  # there is nobody to tell or to watch any more
    [ -z "$watch" ] || kill "$watch" 2>/dev/null || true
    case $code in 0) exit 0 ;; 2) [ -n "${SLURM_RESTART_COUNT:-}" ] || exit 2 ;; esac
    back_into_the_queue "$code" "exit code $code"
}

# Ranks that were told to stop go on to the end of a step, and save. ALRM tells this shell when that takes until shortly
# before the job's own end, which would be for good.
watch='' shortly=20  # seconds
watch_the_end() {
    local end left
    [ -z "$watch" ] || return 0
    {
        end=$(SLURM_TIME_FORMAT=standard patiently scontrol show job -o "$id" | grep -o ' EndTime=[^ ]*')
        end=$(date -d "${end#*=}" +%s 2>/dev/null) || exit 0  # Unknown: the job has no limit
        left=$((end - $(date +%s)))
        end=$((end - (left < 2 * shortly ? left / 2 : shortly)))
        # One long sleep would outlive this process, and that must not outlive the shell.
        while [ "$(date +%s)" -lt "$end" ]; do sleep 1; kill -0 $$ 2>/dev/null || exit 0; done
        kill -ALRM $$
    } &
    watch=$!
    disown "$watch" || true  # or bash would say that it was killed
}

# back_into_the_queue CODE WHY: exits with that code; without a new checkpoint again and again, it gives up.
back_into_the_queue() {
    local found restarts=0
    # A job that scancel ended is still here for a moment, but must not come back.
    if [ "$(patiently squeue -h -j "$id" -o %T)" = RUNNING ]; then
        found=$(newest)
        if [ "$found" = "$before" ]; then restarts=$(($(cat "$XC_LOGS/restarts" 2>/dev/null || echo 0) + 1)); fi
        if [ "$restarts" -gt "$XC_MAX_RESTARTS" ]; then
            echo "error: $2, and $XC_MAX_RESTARTS restarts in a row brought no new checkpoint: look into" \
                "$XC_LOGS, mend the cause, submit again" >&2
        else
            echo "$restarts" >"$XC_LOGS/restarts"
            echo "job $id: $2, back into the queue; goes on from: ${found%/meta.json *}"
            patiently scontrol requeue "$id" || true
        fi
    fi
    # Slurm ends ranks that are still there; as children of this shell, or it might not find those of horovodrun.
    while [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
    exit "$1"
}

# patiently COMMAND...: again and again for ten minutes, as Slurm's controller may be away for a moment.
patiently() {
    local try
    for try in {1..60}; do
        if "$@"; then return 0; fi
        sleep 10
    done
    echo "error: $* has failed $try times" >&2
    return 1
}
