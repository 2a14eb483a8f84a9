# Functions for the scripts beside this one, which source it: a virtual environment, and what goes into it.
# Each is idempotent: a stamp in the environment says what was installed, and for which pyproject.toml.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
step_now=0

# step TOTAL TEXT...: say what comes next.
step() {
    step_now=$((step_now + 1))
    printf '[%d/%d] %s\n' "$step_now" "$1" "${*:2}" >&2
}

fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 2
}

# make_venv FOLDER: make it with $PYTHON (default python3) unless it is there and whole; sets $python.
make_venv() {
    local folder=$1 base=${PYTHON:-python3}
    python=$folder/bin/python
    if "$python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    command -v "$base" >/dev/null || fail "there is no $base; name a Python 3.10 or newer with PYTHON=..."
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$("$base" --version 2>&1) is too old: name a Python 3.10 or newer with PYTHON=..."
    "$base" -m venv --clear "$folder" ||
        fail "$base cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"
}

# has_modules MODULE...: whether $python can import them; torch takes seconds to import, so nothing is imported.
has_modules() {
    "$python" -c 'import sys; from importlib.util import find_spec; sys.exit(None in map(find_spec, sys.argv[1:]))' "$@"
}

# install_torch: torch comes first and by its exact version, so that nothing that needs torch chooses one.
install_torch() {
    has_modules torch || pip_install "${DDPLOG_TORCH:-torch==2.13.0}"
}

# install_once NAME REQUIREMENT...: install, unless the same was installed for the same pyproject.toml.
install_once() {
    local stamp
    stamp=$(dirname "$(dirname "$python")")/.ddplog-$1
    shift
    local wanted
    wanted=$(printf '%s\n' "$root" "$@" | cat - "$root/pyproject.toml" | cksum)
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        return
    fi
    rm -f "$stamp"
    pip_install "$@"
    printf '%s\n' "$wanted" >"$stamp"
}

# group NAME: print the requirements of a dependency group of pyproject.toml, one a line. Not pip's --group:
# that needs pip 25.1, and a new environment has the pip of its Python.
group() {
    "$python" - "$root/pyproject.toml" "$1" <<'PYTHON'
import sys

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

with open(sys.argv[1], "rb") as file:
    print(*tomllib.load(file)["dependency-groups"][sys.argv[2]], sep="\n")
PYTHON
}

# pip_install REQUIREMENT...: one at a time in an environment: .ci/run builds Horovod while it lints.
pip_install() {
    local lock=()
    if command -v flock >/dev/null; then
        lock=(flock "$(dirname "$(dirname "$python")")/.ddplog-lock")
    fi
    ${lock[@]+"${lock[@]}"} "$python" -m pip install --quiet --disable-pip-version-check "$@" ||
        fail "pip could not install: $*"
}
