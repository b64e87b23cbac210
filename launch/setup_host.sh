#!/usr/bin/env bash
# Make a host ready to train from this checkout; what is ready is left as it is.
#
#   launch/setup_host.sh --nfs=10.0.0.2:/share
#
# --nfs=       HOST:/SHARE to mount at /mnt/jaxvid; nothing is mounted if empty
# --extra=tpu  what to install: tpu or cuda
# --dry-run    only print what would run
# The environment is .venv, with a Python that uv brings, since TPU hosts have 3.10. A training that an
# earlier attempt left running is ended: it would hold the chips.

# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
nfs='' extra=tpu
options "nfs extra" "$@"
one_of extra tpu cuda

cd "$ROOT"
run pkill -TERM -f 'jaxvid[.]train' || true
stamp=.venv/installed-from
wanted=$(cat pyproject.toml <(echo "$extra") | sha256sum)
if $dry_run || [[ $(cat "$stamp" 2>/dev/null) != "$wanted" ]]; then
  run python3 -m pip install --quiet --user uv
  run python3 -m uv venv --quiet --clear --python=3.12 .venv
  run python3 -m uv pip install --quiet --python=.venv --editable ".[$extra]"
  $dry_run || printf '%s\n' "$wanted" >"$stamp"
fi
if [[ -n $nfs ]] && { $dry_run || ! mountpoint -q /mnt/jaxvid; }; then
  run sudo apt-get install --yes --quiet nfs-common
  run sudo mkdir -p /mnt/jaxvid
  run sudo mount -t nfs -o hard,noresvport "$nfs" /mnt/jaxvid
fi
