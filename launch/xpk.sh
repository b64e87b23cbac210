#!/usr/bin/env bash
# Start a training on a TPU cluster that xpk made (https://github.com/AI-Hypercomputer/xpk, 1.16).
#
#   launch/xpk.sh --cluster=C --name=run1 --type=v6e-64 --image=IMAGE -- \
#       --config=configs/ar_diffusion.py:size=xl --workdir=/data/run1
#
# --cluster=        cluster of xpk
# --name=           of the workload; the same name and work folder go on with a run
# --type=           TPU type of a slice, as xpk writes it: v5litepod-16, v6e-256, tpu7x-4x4x12
# --image=          Docker image of launch/Dockerfile, in a registry that the cluster reads
# --slices=1        how many slices
# --storage=        storage of xpk, mounted for the work folder and the data (xpk storage attach)
# --zone= --project=  as of gcloud; left out if empty
# --restarts=100    how often the job may start again after a preemption or a failure; xpk's own
#                   default is 0, which loses the job at the first preemption
# --libtpu=none     a set of launch/libtpu_flags.txt
# --dry-run         only print what would run

# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
cluster='' name='' type='' image='' slices=1 storage='' zone='' project='' restarts=100 libtpu=none
options "cluster name type image slices storage zone project restarts libtpu" "$@"
need cluster name type image
need_training
whole slices restarts
dns_name name

command=(xpk workload create "--cluster=$cluster" "--workload=$name" "--tpu-type=$type"
  "--num-slices=$slices" "--docker-image=$image" "--max-restarts=$restarts"
  # Kubernetes waits that long between SIGTERM and SIGKILL, while the run saves.
  --termination-grace-period-seconds=300)
flags=$(libtpu_flags "$libtpu")
command+=(${zone:+"--zone=$zone"} ${project:+"--project=$project"} ${storage:+"--storage=$storage"}
  ${flags:+"--env=LIBTPU_INIT_ARGS=$flags"})
run "${command[@]}" "--command=$(train_command python)"
