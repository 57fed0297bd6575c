#!/usr/bin/env bash
# Train on a spot instance. Start this at every boot, with the output on a disk that outlives the instance:
#     scripts/spot.sh train_dreambooth_kronecker.py --config configs/sd15.yaml --output_dir /mnt/disk/dog
#
# A reclaimed instance ends its services with SIGTERM: training saves a checkpoint after its step, and the next boot
# continues. A run that fails is retried at most RETRIES times in a row (default 3), PAUSE seconds apart (default 10),
# unless somebody has to fix something (exit code 2). Python is started without `accelerate launch`, which would end at
# the signal without passing it on.
set -uo pipefail

stopping= failures=0
trap 'stopping=yes; kill -TERM "$training"' TERM INT
while true; do
    python "$@" --resume_from_checkpoint latest &
    training=$!
    wait "$training"
    code=$?
    if [ -n "$stopping" ]; then # the signal interrupted that `wait`; training is about to end
        wait "$training"
        code=$?
    fi
    case $code in
    0 | 2) exit "$code" ;;
    75) failures=0 ;; # stopped and saved
    *) failures=$((failures + 1)) ;;
    esac
    if [ -n "$stopping" ] || [ "$failures" -gt "${RETRIES:-3}" ]; then
        exit "$code"
    fi
    if [ "$failures" -gt 0 ]; then
        sleep "${PAUSE:-10}"
    fi
done
