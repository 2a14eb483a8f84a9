#!/usr/bin/env bash
# Build Horovod for torch on the CPU (Gloo), and install it: scripts/install_horovod.sh [FOLDER]
#
# FOLDER is the virtual environment (default: the tests', DDPLOG_TEST_VENV or .venv-test in the checkout); it is made
# where it is missing. Four minutes the first time and 2.3 GB of memory; the wheel is kept, and a second time is one
# import. Needs cmake and a C++ compiler, which root gets from apt.
#   DDPLOG_WHEELS    where wheels are kept (default: ~/.cache/ddplog/wheels); one folder for each Python, torch, machine
#   PYTHON, DDPLOG_TORCH   as in launch_ddp.sh
set -euo pipefail

# shellcheck source=scripts/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

version=0.28.1
checksum=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0

# works: whether $python has a Horovod whose library loads; the import alone goes through without it.
works() {
    "$python" -c 'import horovod.torch as hvd; hvd.is_initialized()' >/dev/null 2>&1
}

# key: print what a wheel is tied to.
key() {
    "$python" - <<'PYTHON'
import platform, sys
from importlib.metadata import version

print(f"{sys.implementation.cache_tag}-torch{version('torch')}-{platform.machine()}-{platform.libc_ver()[0] or 'libc'}")
PYTHON
}

install_tools() {
    if command -v cmake >/dev/null && command -v make >/dev/null && command -v c++ >/dev/null; then
        return
    fi
    [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null ||
        fail "building Horovod needs cmake and a C++ compiler; on Debian and Ubuntu: apt-get install cmake g++"
    apt-get update -q >&2 && apt-get install -qy --no-install-recommends cmake g++ make >&2 ||
        fail "apt-get could not install cmake and g++"
}

# build FOLDER: build the wheel, and put it into FOLDER in one step: whoever finds it there finds it whole.
build() (
    local wheels=$1 work
    work=$(mktemp -d)
    # shellcheck disable=SC2064 # $work is this one
    trap "rm -rf '$work'" EXIT
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-binary horovod \
        --dest "$work" "horovod==$version" || fail "pip could not download horovod==$version"
    printf '%s  %s\n' "$checksum" "$work/horovod-$version.tar.gz" | sha256sum --check --quiet ||
        fail "horovod-$version.tar.gz is not the one that this recipe is for"
    mkdir "$work/source" "$work/wheels"
    tar xzf "$work/horovod-$version.tar.gz" -C "$work/source" --strip-components=1
    # torch's headers need C++17, and both parts the same: with only torch's changed, it does not link.
    sed -i 's/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD 20)/' \
        "$work/source/CMakeLists.txt" "$work/source/horovod/torch/CMakeLists.txt"
    export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_GLOO=1
    export HOROVOD_WITHOUT_MPI=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
    export MAKEFLAGS=${MAKEFLAGS:--j2} # unset, its setup.py takes 8 compilers of 2 GB each
    export LDFLAGS=-Wl,-s              # stripped: 1 MB instead of 30
    export CMAKE_POLICY_VERSION_MINIMUM=3.5
    # Where python is not on PATH, its build asks another one for torch's flags.
    PATH=$(dirname "$python"):$PATH "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps \
        --no-build-isolation --no-cache-dir --wheel-dir "$work/wheels" "$work/source" >"$work/log" 2>&1 || {
        tail -n 60 "$work/log" >&2
        fail "Horovod could not be built"
    }
    mkdir -p "$(dirname "$wheels")"
    mv -T "$work/wheels" "$wheels.$$"
    mv -T "$wheels.$$" "$wheels" 2>/dev/null || rm -rf "$wheels.$$" # another build was first
)

folder=${1:-${DDPLOG_TEST_VENV:-$root/.venv-test}}
make_venv "$folder"
install_torch
works && exit
wheels=${DDPLOG_WHEELS:-${XDG_CACHE_HOME:-$HOME/.cache}/ddplog/wheels}/horovod-$version-$(key)
step 2 "building Horovod $version, unless $wheels has it"
pip_install numpy packaging cffi cloudpickle psutil pyyaml # what it needs at run time
if ! compgen -G "$wheels/horovod-*.whl" >/dev/null; then
    install_tools
    pip_install setuptools wheel
    build "$wheels"
fi
step 2 "installing it into $folder"
pip_install --no-deps --force-reinstall "$wheels"/horovod-*.whl
works || fail "Horovod is installed and does not load; remove $wheels to build it again: $(
    "$python" -c 'import horovod.torch as hvd; hvd.is_initialized()' 2>&1 | tail -n 1
)"
