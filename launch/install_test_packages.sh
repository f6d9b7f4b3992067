#!/usr/bin/env bash
# Installs the Debian packages that tests start for real: Slurm, munge, Open MPI, pdsh and an ssh server for the launch
# tests, and Chromium for those of web pages. Training itself needs none of them. Does nothing, and needs no network, when
# they are all there.
set -euo pipefail

packages=(slurm-wlm munge openmpi-bin pdsh openssh-server openssh-client iproute2 chromium)

missing=()
for package in "${packages[@]}"; do
    state=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
    echo "launch/install_test_packages.sh: all there: ${packages[*]}"
    exit 0
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || {
        echo "launch/install_test_packages.sh: run as root to install ${missing[*]}" >&2
        exit 2
    }
    as_root=(sudo)
fi

# The tests start their own daemons on free ports with keys of their own. The packages must not start the system's: an
# ssh server that appears because somebody ran the tests would be a bad surprise.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap '"${as_root[@]}" rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
    "${as_root[@]}" chmod 755 "$policy"
fi

echo "launch/install_test_packages.sh: installing ${missing[*]} (one to three minutes)"
quiet=(-qq -o Dpkg::Use-Pty=0 -o Acquire::Retries=3)
"${as_root[@]}" apt-get update "${quiet[@]}"
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install --yes --no-install-recommends "${quiet[@]}" "${missing[@]}" >/dev/null
echo "launch/install_test_packages.sh: installed"
