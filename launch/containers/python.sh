#!/usr/bin/env bash
# Python of an Apptainer image, as EVE_DS_PYTHON of the launch scripts; the code is the checkout's on the host.
# EVE_DS_IMAGE: the image. APPTAINER_ARGS: more options, as in "--bind /scratch" (this folder is bound by itself).
set -euo pipefail
image=${EVE_DS_IMAGE:?set it to the image, as in EVE_DS_IMAGE=eve-ds.sif}
gpus=()
if [ -e /dev/nvidiactl ]; then gpus=(--nv); fi
# exec: signals of the launcher are Python's.
# shellcheck disable=SC2086
exec apptainer exec --bind "$PWD" --pwd "$PWD" "${gpus[@]}" ${APPTAINER_ARGS:-} "$image" python "$@"
