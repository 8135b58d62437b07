#!/usr/bin/env bash
# Format, lint, types, unit tests, the MPI tests on 1 to 5 ranks, then job scripts on a Slurm of its own. Needs Python >= 3.11 and nothing else;
# a second run reuses the environment of the first. See environment.sh for HPCNN_MPI and HPCNN_PYTHON.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/environment.sh
. scripts/environment.sh

started=$SECONDS
setup_environment onednn,images,tensorboard,plots,report,test
say "environment ready after $((SECONDS - started)) s: $(python --version), $(command -v mpiexec)"

logs=.ci-logs
rm -rf "$logs"
mkdir -p "$logs"
if [ -n "${CI:-}" ]; then
    export PYTHONUNBUFFERED=1 HYPOTHESIS_STORAGE_DIRECTORY="$PWD/$logs/hypothesis"
fi

[ -t 1 ] || export PY_COLORS=0
# With it, each of the hundreds of processes that tests start would compile all modules anew.
unset PYTHONDONTWRITEBYTECODE

passed=() failed=()
# check NAME COMMAND...: run it whatever came before, and remember how it went.
check() {
    local name=$1 since=$SECONDS
    shift
    say "== $name"
    if "$@"; then passed+=("$name"); else failed+=("$name"); fi
    say "   $((SECONDS - since)) s"
}

# Every rank runs the tests; rank 0 reports, the others write a file that is shown when they fail.
mpi_tests() {
    local ranks=$1 log
    export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
    # shellcheck disable=SC2016
    if timeout --kill-after=10 600 mpiexec -n "$ranks" bash -c '
        rank=${PMI_RANK:-${PMIX_RANK:-${OMPI_COMM_WORLD_RANK:-0}}}
        [ "$rank" = 0 ] || exec >"$1/mpi-$2-rank-$rank.log" 2>&1
        exec python -m mpi4py -m pytest -x -q -p no:cacheprovider tests/mpi' _ "$logs" "$ranks"; then
        return 0
    fi
    for log in "$logs/mpi-$ranks"-rank-*.log; do
        [ -s "$log" ] || continue
        say "--- the end of $log"
        tail -n 40 "$log"
    done
    return 1
}

check "ruff format" ruff format --check .
check "ruff check" ruff check .
check "mypy" mypy
check "shellcheck" shellcheck -x scripts/*.sh slurm/*.sbatch .ci/run
# Three at a time on two cores: some tests wait for watchdogs.
check "unit tests" env OMP_NUM_THREADS=1 python -m pytest -q -n 3 --dist loadfile -o faulthandler_timeout=300 -m "not gpu" tests/unit
# Ranks outlive others under Open MPI only, which has an environment of its own; there it is among the unit tests. It runs
# beside the tests on one rank, which leave a core.
outlive=
if [ "${HPCNN_MPI:-mpich}" = mpich ]; then
    # shellcheck disable=SC2016
    env HPCNN_MPI=openmpi bash -euc '
        . scripts/environment.sh
        setup_environment
        timeout 120 python scripts/chaos_ranks.py --runs 1 --kills 2 --spares 1' >"$logs/outlive.log" 2>&1 &
    outlive=$!
fi
# ended PID LOG: wait for a command that was left to itself, and show what it said.
ended() {
    local rc=0
    wait "$1" || rc=$?
    cat "$2"
    return "$rc"
}
for ranks in 1 2 3 4 5; do
    check "mpi tests on $ranks" mpi_tests "$ranks"
    if [ -n "$outlive" ]; then
        check "ranks that die" ended "$outlive" "$logs/outlive.log"
        outlive=
    fi
done
# The job scripts, by a real Slurm; as root it is installed where it is missing.
if [ "${HPCNN_MPI:-mpich}" != mpich ]; then
    say "== slurm tests: skipped, they start ranks of MPICH (HPCNN_MPI=$HPCNN_MPI)"
elif ! why=$(python scripts/virtual_slurm.py install 2>&1 && python scripts/virtual_slurm.py check); then
    say "== slurm tests: skipped, $why"
else
    check "slurm tests" timeout --kill-after=30 600 python -m pytest -q -o faulthandler_timeout=300 tests/slurm
fi
# The same tests of kernels that the emulation has passed, where there is a GPU.
if ! nvidia-smi -L >/dev/null 2>&1; then
    say "== gpu tests: skipped, nvidia-smi finds no GPU here"
elif ! python -c 'import cupy' 2>/dev/null; then
    say "== gpu tests: skipped, CuPy is not installed (pip install 'hpcnn[cuda13]')"
else
    check "gpu tests" python -m pytest -q -m gpu tests/unit/kernels tests/gpu
fi

say ""
if [ ${#failed[@]} -gt 0 ]; then
    printf -v list '%s, ' "${failed[@]}"
    say "FAILED after $((SECONDS - started)) s: ${list%, }"
    exit 1
fi
printf -v list '%s, ' "${passed[@]}"
say "passed in $((SECONDS - started)) s: ${list%, }"
