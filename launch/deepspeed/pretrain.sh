#!/usr/bin/env bash
# Pre-trains over the hosts of a hostfile: DeepSpeed's launcher starts the ranks through pdsh and ssh.
#   HOSTFILE=hosts launch/deepspeed/pretrain.sh --config eve_ds/configs/pretrain_base.yaml \
#       --deepspeed_config ds_configs/zero2.json --data.path DATA --output_dir RUN
# All arguments go to eve_ds.pretrain as they are. Type it in the checkout, which all hosts see at the same path.
#
# HOSTFILE         one host a line, "NAME slots=RANKS" (default: hostfile)
# MASTER_ADDR      address of the first host, as the others reach it (default: its name in the hostfile)
# MASTER_PORT      a port that is free there (default: 29500)
# EVE_DS_PYTHON    interpreter, at the same path on all hosts (default: .venv/bin/python)
# DEEPSPEED_ARGS   more options for the launcher, as in "--include node1:0,1 --ssh_port 2222"
set -euo pipefail
cd "$(dirname "$0")/../.."

hostfile=${HOSTFILE:-hostfile}
if [ ! -s "$hostfile" ]; then
    echo "error: hostfile $hostfile is not there; write one line 'NAME slots=RANKS' for each host, or set HOSTFILE" >&2
    exit 2
fi
first_host=$(awk '$1 !~ /^#/ && NF {print $1; exit}' "$hostfile")
python=${EVE_DS_PYTHON:-.venv/bin/python}

# A hostfile with one host would make the launcher stay on this machine; --force_multi keeps it on the named one.
# shellcheck disable=SC2086
exec "$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --force_multi \
    --master_addr "${MASTER_ADDR:-$first_host}" --master_port "${MASTER_PORT:-29500}" ${DEEPSPEED_ARGS:-} \
    --module eve_ds.pretrain "$@"
