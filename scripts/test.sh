#!/usr/bin/env bash
# Run the tests: scripts/test.sh [--nightly] [pytest's arguments]
#
# Makes its environment first: DDPLOG_TEST_VENV (default: .venv-test in the checkout). PYTHON and DDPLOG_TORCH as in
# launch_ddp.sh. --nightly includes the tests that take minutes.
#
# Horovod is built for it, which takes four minutes the first time on a machine: scripts/install_horovod.sh. Where that
# fails, or with DDPLOG_HOROVOD=0, the tests that need it are skipped.
set -euo pipefail

# shellcheck source=scripts/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

selection=(-m "not nightly")
if [[ ${1:-} == --nightly ]]; then
    selection=()
    shift
fi
folder=${DDPLOG_TEST_VENV:-$root/.venv-test}
step 5 "making $folder"
make_venv "$folder"
step 5 "installing ${DDPLOG_TORCH:-torch==2.13.0}, if torch is missing"
install_torch
step 5 "installing ddplog and what the tests need"
requirements=$(group test)
mapfile -t requirements <<<"$requirements"
install_once test --editable "$root" "${requirements[@]}"
if [[ ${DDPLOG_HOROVOD:-1} == 0 ]]; then
    step 5 "leaving Horovod out"
else
    step 5 "installing Horovod, if it is missing"
    "$root/scripts/install_horovod.sh" "$folder" || printf 'going on without Horovod\n' >&2
fi
step 5 "running the tests"
cd "$root"
exec "$python" -m pytest -n 2 --dist loadfile ${selection[@]+"${selection[@]}"} "$@"
