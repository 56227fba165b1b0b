#!/usr/bin/env bash
# rank.sh COMMAND...: one rank. All it says goes into a file of its own; the job's log gets what rank 0 says, and what
# the others say on standard error, which is little as long as all is well.
rank=${OMPI_COMM_WORLD_RANK:-${PMIX_RANK:-${PMI_RANK:-${SLURM_PROCID:-0}}}}
file=$XC_LOGS/rank-$rank.log
copy() { trap '' USR1 TERM; exec tee -a "$file"; }  # outlives the signals that launchers send to all of a rank's processes
exec 2> >(copy >&2)
if [ "$rank" = 0 ]; then exec > >(copy); else exec >>"$file"; fi

trap : USR1 TERM  # which the command gets as well: this shell waits for what it makes of them
code=0
"$@" || code=$?
# srun --kill-on-bad-exit ends with the highest code of all ranks. One that it ended by TERM must not hide the code of
# the one at fault.
[ "$code" != 143 ] || code=1
exit "$code"
