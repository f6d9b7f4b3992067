#!/usr/bin/env bash
# Pre-trains under Open MPI:
#   RANKS=16 MPIRUN_ARGS="--hostfile hosts" launch/mpi/pretrain.sh --config eve_ds/configs/pretrain_base.yaml \
#       --deepspeed_config ds_configs/zero1.json --data.path DATA --output_dir RUN
# All arguments go to eve_ds.pretrain as they are. Type it in the checkout, which all hosts see at the same path.
#
# RANKS            number of ranks (required)
# MPIRUN_ARGS      more options for mpirun: hosts, binding, "--allow-run-as-root" in a container
# MASTER_ADDR, MASTER_PORT   where the ranks meet; unset, rank 0 picks both and tells the others through MPI (mpi4py)
# EVE_DS_PYTHON    interpreter, at the same path on all hosts (default: .venv/bin/python)
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ -z "${RANKS:-}" ]; then
    echo "error: RANKS is not set; give the number of ranks, as in RANKS=16 $0 ..." >&2
    exit 2
fi
python=${EVE_DS_PYTHON:-.venv/bin/python}
exported=(-x PATH)
for name in MASTER_ADDR MASTER_PORT OMP_NUM_THREADS; do
    if [ -n "${!name:-}" ]; then exported+=(-x "$name"); fi
done
# mpirun KILLs a second after TERM: the guard hands signals to the ranks itself, and mpirun is given ten.
export OMPI_MCA_odls_base_sigkill_timeout=${OMPI_MCA_odls_base_sigkill_timeout:-10}
# shellcheck disable=SC2086
exec "$python" -u -m eve_ds.launching mpirun -n "$RANKS" "${exported[@]}" ${MPIRUN_ARGS:-} "$python" -u -m eve_ds.pretrain "$@"
