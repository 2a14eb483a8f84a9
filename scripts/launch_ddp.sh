#!/usr/bin/env bash
# Train with DDP and ddplog.
#
#   scripts/launch_ddp.sh                                  the example: 2 processes, a summary and a report
#   scripts/launch_ddp.sh [options] train.py [arguments]   your job: options of `ddplog run` and of torchrun
#   scripts/launch_ddp.sh [options] -- COMMAND ...         your job under any other launcher
#
# Without arguments, it makes a virtual environment where ddplog, torch or scikit-learn is missing:
#   DDPLOG_VENV    where (default: .venv in the checkout); if set, it is used in any case
#   PYTHON         the Python to make it with (default: python3)
#   DDPLOG_TORCH   what to install if torch is missing (default: torch==2.13.0)
#
# Under SLURM, started once per node, it takes these options from the allocation where they are not given:
# --nnodes, --node-rank, --master-addr, --master-port, and --nproc-per-node from the node's GPUs. In a batch script:
#   srun --ntasks-per-node=1 scripts/launch_ddp.sh train.py
set -euo pipefail

# shellcheck source=scripts/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

run_example() {
    python=python3
    if [[ -n ${DDPLOG_VENV:-} ]] || ! has_modules ddplog torch sklearn 2>/dev/null; then
        local folder=${DDPLOG_VENV:-$root/.venv}
        step 4 "making $folder"
        make_venv "$folder"
        step 4 "installing ${DDPLOG_TORCH:-torch==2.13.0}, if torch is missing"
        install_torch
        step 4 "installing ddplog and scikit-learn"
        install_once example --editable "${root}[tensorboard]" scikit-learn
    else
        step_now=3
    fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun would choose the same, with a warning of six lines.
    step 4 "training examples/train_digits.py with 2 processes"
    "$python" -m ddplog.cli.main run --nproc-per-node 2 "$root/examples/train_digits.py"
    [[ $python == python3 ]] || printf 'next: source %s/bin/activate, then: ddplog show, ddplog report --open\n' "$(dirname "$(dirname "$python")")" >&2
}

# is_given NAME ARGUMENT...: whether an option of torchrun stands before the script, as --a-b, --a_b or --a-b=x, or
# in the environment, as PET_A_B, which torchrun reads.
is_given() {
    local wanted=$1 argument variable
    variable=${wanted#--}
    variable=PET_${variable//-/_}
    variable=${variable^^}
    [[ -n ${!variable:-} ]] && return
    shift
    for argument in "$@"; do
        [[ $argument == *.py ]] && return 1
        argument=${argument%%=*}
        [[ ${argument//_/-} == "$wanted" ]] && return
    done
    return 1
}

# slurm_options ARGUMENT...: set $options to what the allocation says and the arguments do not.
slurm_options() {
    local gpus=${SLURM_GPUS_ON_NODE:-} nodes=${SLURM_NNODES:-1}
    [[ $gpus =~ ^[1-9][0-9]*$ ]] || gpus=1
    [[ ${SLURM_LOCALID:-0} == 0 ]] ||
        fail "started more than once on this node; torchrun starts the ranks: srun --ntasks-per-node=1"
    is_given --nproc-per-node "$@" || options+=(--nproc-per-node "$gpus")
    is_given --standalone "$@" && return
    if ! is_given --nnodes "$@"; then
        [[ $nodes == 1 || -n ${SLURM_STEP_ID:-${SLURM_STEPID:-}} ]] ||
            fail "this batch script has $nodes nodes and runs on one: srun --ntasks-per-node=1 $0 ..."
        options+=(--nnodes "$nodes")
    fi
    if is_given --rdzv-backend "$@" || is_given --rdzv-endpoint "$@"; then
        return
    fi
    is_given --node-rank "$@" || options+=(--node-rank "${SLURM_NODEID:-0}")
    if ! is_given --master-addr "$@"; then
        local host
        host=$(first_host) || exit 2
        options+=(--master-addr "$host")
    fi
    is_given --master-port "$@" || options+=(--master-port $((20000 + SLURM_JOB_ID % 20000)))
}

first_host() {
    local hosts
    hosts=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?}") || fail "scontrol cannot name the hosts of $SLURM_JOB_NODELIST"
    printf '%s\n' "${hosts%%$'\n'*}"
}

run_job() {
    local ddplog=(ddplog)
    if ! command -v ddplog >/dev/null; then
        python=${PYTHON:-python3}
        has_modules ddplog 2>/dev/null || fail "ddplog is not installed in this environment: pip install '$root'"
        ddplog=("$python" -m ddplog.cli.main)
    fi
    options=()
    if [[ -n ${SLURM_JOB_ID:-} && -z ${RANK:-} ]] && ! runs_command "$@"; then
        slurm_options "$@"
    fi
    exec "${ddplog[@]}" run ${options[@]+"${options[@]}"} "$@"
}

# runs_command ARGUMENT...: whether this is `-- COMMAND`, whose launcher knows SLURM itself, or a request for help.
runs_command() {
    local argument
    for argument in "$@"; do
        case $argument in
            *.py) return 1 ;;
            -- | -h | --help) return 0 ;;
        esac
    done
    return 1
}

if (($# == 0)); then
    run_example
else
    run_job "$@"
fi
