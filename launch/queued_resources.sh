#!/usr/bin/env bash
# Train on Cloud TPU VMs of a queued resource, which is made again after every preemption, until the
# run is done; then it is deleted. Keep this script running, as in tmux or on a small VM. Started
# again, it goes on where it was.
#
#   launch/queued_resources.sh --name=run1 --zone=us-east5-b --type=v6e-64 --nfs=10.0.0.2:/share -- \
#       --config=configs/ar_diffusion.py:size=xl --workdir=/mnt/jaxvid/run1
#
# --name=             of the queued resource and its TPUs
# --zone= --project=  as of gcloud; the project is left out if empty
# --type=             accelerator type of a slice: v4-32, v5litepod-64, v5p-128, v6e-64
# --runtime=          runtime version; by default that of the type
# --slices=1          how many slices
# --provisioning=spot spot, on-demand or reserved
# --nfs=              HOST:/SHARE, mounted at /mnt/jaxvid on all hosts for data and work folder
# --failures=3        failures in a row, without a preemption, after which the script gives up
# --poll=60           seconds between two looks at the state
# --libtpu=none       a set of launch/libtpu_flags.txt
# --dry-run           only print what would run
# The hosts get the committed files of this checkout, an environment in ~/jaxvid/.venv, and nothing else.

# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
name='' zone='' project='' type='' runtime='' slices=1 provisioning=spot nfs='' failures=3 poll=60 libtpu=none
options "name zone project type runtime slices provisioning nfs failures poll libtpu" "$@"
need name zone type nfs
need_training
whole slices failures poll
dns_name name
one_of provisioning spot on-demand reserved
if [[ -z $runtime ]]; then
  case $type in
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v[234]-*) runtime=tpu-ubuntu2204-base ;;
    *) die "--type=$type: its runtime version is unknown; add --runtime=" ;;
  esac
fi

place=("--zone=$zone" ${project:+"--project=$project"})
if ((slices == 1)); then
  nodes=("$name") node_options=("--node-id=$name")
else
  nodes=() node_options=("--node-count=$slices" "--node-prefix=$name")
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi
[[ $provisioning == on-demand ]] || node_options+=("--$provisioning")
archive=jaxvid.tar.gz
if ! $dry_run; then
  room=$(mktemp -d)
  trap 'rm -rf "$room"' EXIT
  archive=$room/$archive
fi
flags=$(libtpu_flags "$libtpu")
on_host="mkdir -p jaxvid && tar -xzf jaxvid.tar.gz -C jaxvid && cd jaxvid"
on_host+=" && launch/setup_host.sh $(quoted "--nfs=$nfs")"
on_host+=" && ${flags:+LIBTPU_INIT_ARGS=$(quoted "$flags") }$(train_command .venv/bin/python)"

# The state of the queued resource, nothing if there is none. What else goes wrong ends the script.
state() {
  gcloud compute tpus queued-resources list "${place[@]}" "--filter=name ~ /$name\$" \
    "--format=value(state.state)"
}

create() {
  run gcloud compute tpus queued-resources create "$name" "${place[@]}" "${node_options[@]}" \
    "--accelerator-type=$type" "--runtime-version=$runtime"
}

delete() {
  run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

# The committed files on all hosts, and the training on all of them; fails if any host does.
train() {
  local node pids=() failed=0
  run git -C "$ROOT" archive --format=tar.gz "--output=$archive" HEAD || return
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm scp "$archive" "$node:jaxvid.tar.gz" "${place[@]}" --worker=all || return
  done
  for node in "${nodes[@]}"; do
    if $dry_run; then
      run gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all "--command=$on_host"
      continue
    fi
    gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all "--command=$on_host" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || failed=1
  done
  return "$failed"
}

if $dry_run; then
  create
  train
  delete
  exit
fi

in_a_row=0
while :; do
  found=$(state)
  case $found in
    '') in_a_row=0 && create ;;
    ACTIVE)
      if train; then
        delete
        exit
      fi
      [[ $(state) == ACTIVE ]] || continue
      in_a_row=$((in_a_row + 1))
      sleep "$poll"
      if ((in_a_row == failures)); then
        delete
        die "the training failed $failures times without a preemption; its output above says why"
      fi
      ;;
    FAILED | SUSPENDED) delete ;;
    *) printf '%s: %s\n' "$name" "$found" && sleep "$poll" ;;
  esac
done
