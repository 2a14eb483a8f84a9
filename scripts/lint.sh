#!/usr/bin/env bash
# Check style and types: ruff check, ruff format --check, mypy. Environment as in test.sh; torch is not needed.
set -euo pipefail

# shellcheck source=scripts/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

folder=${DDPLOG_TEST_VENV:-$root/.venv-test}
step 3 "making $folder"
make_venv "$folder"
step 3 "installing ddplog and the linters"
requirements=$(group lint)
mapfile -t requirements <<<"$requirements"
install_once lint --editable "$root" "${requirements[@]}"
step 3 "ruff and mypy"
cd "$root"
status=0
"$python" -m ruff check . || status=1
"$python" -m ruff format --check . || status=1
"$python" -m mypy || status=1
exit "$status"
