#!/usr/bin/env bash
# Pre-trains over the hosts of a hostfile: DeepSpeed's launcher starts the ranks through pdsh and ssh.
#   HOSTFILE=hosts launch/deepspeed/pretrain.sh --config eve_ds/configs/pretrain_base.yaml \
#       --deepspeed_config ds_configs/zero1.json --data.path DATA --output_dir RUN
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

# The launcher joins all words to one command line, which pdsh (%h is the host there) and the shell of each host read
# again: a path with $(...) would be run there, one with a space be cut in two. The launcher itself puts double quotes
# around words with a space, and a backslash before a double quote in them.
quoted=()
for word in "$@"; do
    word=${word//%/%%}
    if [[ $word == *" "* ]]; then
        word=${word//\\/\\\\}
        word=${word//\$/\\\$}
        word=${word//\`/\\\`}
    elif [[ -z $word || $word == *[!A-Za-z0-9_@%+=:,./-]* ]]; then
        word="'${word//\'/\'\\\'\'}'"
    fi
    quoted+=("$word")
done
# What the launcher adds itself it does not quote: this folder, and variables that it passes on.
if [[ $PWD == *[!A-Za-z0-9_@+=:,./-]* ]]; then
    echo "error: $PWD: the launcher cannot be started from a folder with such a name; letters, digits and _@+=:,./- work" >&2
    exit 2
fi
while IFS='=' read -r -d '' name value; do
    if [[ $name =~ ^(NCCL|PYTHON|MV2|UCX) && $value == *[\`\$\"\\%]* ]]; then
        echo "error: \$$name: the launcher would have the shells of the hosts read \", \\, \$, % or \` in it; unset it" >&2
        exit 2
    fi
done < <(env -0)

# A hostfile with one host would make the launcher stay on this machine; --force_multi keeps it on the named one.
# shellcheck disable=SC2086
exec "$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --force_multi \
    --master_addr "${MASTER_ADDR:-$first_host}" --master_port "${MASTER_PORT:-29500}" ${DEEPSPEED_ARGS:-} \
    --module eve_ds.pretrain "${quoted[@]}"
