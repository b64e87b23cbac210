#!/usr/bin/env bash
# Start a training on TPU slices of a Kubernetes cluster (GKE) with JobSet, without xpk.
#
#   launch/jobset.sh --name=run1 --accelerator=tpu-v6e-slice --topology=4x4 --image=IMAGE \
#       --claim=shared -- --config=configs/ar_diffusion.py:size=xl --workdir=/data/run1
#
# --name=           of the JobSet
# --accelerator=    label of GKE: tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice,
#                   tpu-v6e-slice or tpu7x
# --topology=       of a slice: 4x4, 2x2x4
# --image=          Docker image of launch/Dockerfile, in a registry that the cluster reads
# --slices=1        how many slices
# --chips=4         chips of a host
# --claim=          persistent volume claim that all hosts may write, mounted at /data
# --queue=          local queue of Kueue; left out if empty
# --restarts=100    how often all slices may start again after a preemption or a failure
# --libtpu=none     a set of launch/libtpu_flags.txt
# --dry-run         only print the manifest

# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
name='' accelerator='' topology='' image='' slices=1 chips=4 claim='' queue='' restarts=100 libtpu=none
options "name accelerator topology image slices chips claim queue restarts libtpu" "$@"
need name accelerator topology image claim
need_training
whole slices chips restarts
one_of accelerator tpu-v4-podslice tpu-v5-lite-podslice tpu-v5p-slice tpu-v6e-slice tpu7x
dns_name name
[[ $topology =~ ^[1-9][0-9]?(x[1-9][0-9]?){1,2}$ ]] || die "--topology=$topology: write it as 4x4 or 2x2x4"
total=$((${topology//x/*}))
((total % chips == 0)) || die "--chips=$chips: does not divide the $total chips of --topology=$topology"
hosts=$((total / chips))

# JSON strings are YAML strings too.
json() { python3 -c 'import json, sys; print(json.dumps(sys.argv[1], ensure_ascii=False))' "$1"; }

labels=
[[ -z $queue ]] || labels="
  labels:
    kueue.x-k8s.io/queue-name: $(json "$queue")"
flags=$(libtpu_flags "$libtpu")
environment=
[[ -z $flags ]] || environment="
                  env:
                    - {name: LIBTPU_INIT_ARGS, value: $(json "$flags")}"

manifest=$(
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name$labels
  annotations:
    # One slice per node pool, and one node pool per slice.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  # All slices start again together and go on from the last checkpoint.
  failurePolicy: {maxRestarts: $restarts}
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              terminationGracePeriodSeconds: 300
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $topology
              containers:
                - name: train
                  image: $(json "$image")
                  command: [bash, -c, $(json "exec $(train_command python)")]$environment
                  resources:
                    requests: {google.com/tpu: $chips}
                    limits: {google.com/tpu: $chips}
                  volumeMounts: [{name: data, mountPath: /data}]
              volumes:
                - {name: data, persistentVolumeClaim: {claimName: $(json "$claim")}}
YAML
)
if $dry_run; then
  printf '%s\n' "$manifest"
else
  kubectl apply -f - <<<"$manifest"
fi
