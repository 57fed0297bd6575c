#!/usr/bin/env bash
# Train on a spot instance; start this at every boot, with OUTPUT_DIR on a disk that outlives the instance:
#     scripts/spot.sh train_dreambooth_kronecker.py --config configs/sd15.yaml --output_dir /mnt/disk/dog
#
# An instance that is taken back ends its services with SIGTERM: training saves after its step, and the next boot goes
# on. What fails is tried again, at most RETRIES times in a row (3) with PAUSE seconds (10) between; what somebody has to
# mend (exit code 2) is not. Python is started without `accelerate launch`, which would end at the signal and not pass it
# on.
set -uo pipefail

stopping= failures=0
trap 'stopping=yes; kill -TERM "$training"' TERM INT
while true; do
    python "$@" --resume_from_checkpoint latest &
    training=$!
    wait "$training"
    code=$?
    if [ -n "$stopping" ]; then # the signal has ended that `wait`, and the training is about to end
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
