#!/usr/bin/env bash
# Train with several processes on this machine, each with CPU devices of its own: a pod in miniature.
#
#   launch/local.sh --processes=2 -- --config=configs/ar_diffusion.py --workdir=runs/two
#
# --processes=2    how many processes
# --devices=1      CPU devices of each
# --python=python  the interpreter
# --dry-run        only print what would run
# Every line of output begins with the number of its process. When a process fails, the others are
# stopped, and its status is that of the script. Ctrl-C and SIGTERM reach all processes, which save.

# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
processes=2 devices=1 python=python
options "processes devices python" "$@"
need_training
whole processes devices

cd "$ROOT"
export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
free_port='import portpicker; print(portpicker.pick_unused_port())'
port=PORT
$dry_run || port=$("$python" -c "$free_port")

pids=()
stop() { kill "-$1" "${pids[@]}" 2>/dev/null || true; }
for ((i = 0; i < processes; i++)); do
  command=("$python" -m jaxvid.train "--coordinator=localhost:$port" "--num_processes=$processes"
    "--process_id=$i" "${arguments[@]}")
  if $dry_run; then
    run env "JAX_PLATFORMS=$JAX_PLATFORMS" "XLA_FLAGS=$XLA_FLAGS" "${command[@]}"
  else
    PYTHONUNBUFFERED=1 "${command[@]}" > >(sed -u "s/^/[$i] /") 2>&1 &
    pids+=($!)
  fi
done
! $dry_run || exit 0

trap 'stop TERM' INT TERM
failed=0
while ((${#pids[@]})); do
  status=0 ended=
  wait -n -p ended "${pids[@]}" || status=$?
  [[ -n ${ended:-} ]] || continue # a signal: the processes save and end by themselves
  for i in "${!pids[@]}"; do
    [[ ${pids[i]} != "$ended" ]] || unset "pids[i]"
  done
  if ((status && !failed)); then
    failed=$status
    stop TERM
    # A process that waits for the one that failed never comes to the end of its step.
    (sleep 20 && stop KILL) &>/dev/null &
    killer=$!
  fi
done
[[ -z ${killer:-} ]] || kill "$killer" 2>/dev/null || true
exit "$failed"
