#!/usr/bin/env bash
# Run the tests: scripts/test.sh [--nightly] [pytest's arguments]
#
# Makes its environment first: DDPLOG_TEST_VENV (default: .venv-test in the checkout). PYTHON and DDPLOG_TORCH as in
# launch_ddp.sh. --nightly includes the tests that take minutes.
set -euo pipefail

# shellcheck source=scripts/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

selection=(-m "not nightly")
if [[ ${1:-} == --nightly ]]; then
    selection=()
    shift
fi
folder=${DDPLOG_TEST_VENV:-$root/.venv-test}
step 4 "making $folder"
make_venv "$folder"
step 4 "installing ${DDPLOG_TORCH:-torch==2.13.0}, if torch is missing"
install_torch
step 4 "installing ddplog and what the tests need"
requirements=$(group test)
mapfile -t requirements <<<"$requirements"
install_once test --editable "$root" "${requirements[@]}"
step 4 "running the tests"
cd "$root"
exec "$python" -m pytest -n 2 --dist loadfile ${selection[@]+"${selection[@]}"} "$@"
