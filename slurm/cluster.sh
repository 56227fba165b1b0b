# This site's facts: the one file here to change. What the environment of sbatch sets already, wins.
# shellcheck shell=bash

: "${XC_MODULES=}"         # to load, the ones that were loaded for `make setup`: gcc openmpi cuda
: "${XC_INTERFACE=}"       # network between the nodes, as ib0; empty: MPI and NCCL choose
: "${XC_SCRATCH=}"         # a fast folder of every node, for temporary files; empty: TMPDIR as it is
: "${XC_LAUNCHER=auto}"    # srun, mpirun, or horovodrun, which needs ssh between nodes; auto: srun if its tasks find each
                           # other by MPI, else mpirun
: "${XC_SRUN_MPI=pmix}"    # what srun offers MPI; srun --mpi=list
: "${XC_CHECK=1}"          # 1: check ranks, devices and folders (train.py --check) before training
: "${XC_MAX_RESTARTS=3}"   # restarts in a row without a new checkpoint, after which a job gives up
