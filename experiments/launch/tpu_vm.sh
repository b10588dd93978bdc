#!/bin/bash
# Trains on all hosts of the TPU {{name}}, and starts again where that helps. Where gcloud is: bash THIS_FILE
set -u
tpu=({{tpu}})
command={{command}}

restarts=0
while true; do
  state='' hosts=''
  read -r state hosts < <(gcloud compute tpus tpu-vm describe "${tpu[@]}" --format='value(state,networkEndpoints.len())')
  case $state in
    READY) ;;
    CREATING | STARTING | RESTARTING | REPAIRING)
      sleep 30
      continue
      ;;
    '')
      echo "gcloud does not tell the state of {{name}}" >&2
      exit 1
      ;;
    *)
      echo "{{name}} is $state: create it again, then run this script again" >&2
      exit 75
      ;;
  esac
  if [ "$hosts" != {{hosts}} ]; then
    echo "{{name}} has $hosts hosts, not {{hosts}}" >&2
    exit 2
  fi

  # the status of gcloud is that of the first host, in order, that did not end with 0
  gcloud compute tpus tpu-vm ssh "${tpu[@]}" --worker=all --command="$command" </dev/null
  status=$?
  case $status in
    0 | 2 | 130) exit "$status" ;; # done, bad input, interrupted
  esac
  if [ "$restarts" -ge {{max_restarts}} ]; then
    echo "status $status after {{max_restarts}} restarts: not started again" >&2
    exit "$status"
  fi
  restarts=$((restarts + 1))
  echo "status $status: restart $restarts" >&2
  sleep 30
done
