#!/usr/bin/env bash
# Run a grid of trainings, and score each:
#     scripts/sweep.sh GRID --output_dir DIR [--jobs N | --gpus LIST] [--dry_run]
#
# GRID is a YAML file (configs/sweeps/, explained in studies/grid.py). Each of its cells is an ordinary run folder in DIR.
# Cells that are done are not run again, and those that were cut off continue: after a crash, or to add cells, start the
# same command again. It may be started several times for one DIR, on several machines too: no cell is run twice at once.
# A grid may have a second round, which follows from the first (studies/rounds.py): the same command runs both.
#
# --jobs N        N cells at a time; default: 1
# --gpus 0,1,2    a cell on each of these GPUs;  --gpus 0,1:2,3   on two GPUs each
# --dry_run       print the cells, how many parameters each trains, and their commands
#
# Ctrl-C or SIGTERM stops all cells after their steps, with a checkpoint (exit code 75). Exit code 1: a cell failed;
# DIR/CELL/sweep.log says why, and the next start tries it again; or a setting had no second round, as the output says.
set -euo pipefail

arguments=() jobs=1 gpus=
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" && exit 0 ;;
    --jobs | --gpus)
        [ $# -gt 1 ] || { echo "error: $1 needs a value" >&2 && exit 2; }
        if [ "$1" = --jobs ]; then jobs="$2"; else gpus="$2"; fi
        shift
        ;;
    --config_file) echo "error: $1: cells are started by python alone; see --gpus" >&2 && exit 2 ;;
    *) arguments+=("$1") ;;
    esac
    shift
done
case "$jobs" in '' | *[!0-9]* | 0) echo "error: --jobs $jobs: it must be a number, 1 or more" >&2 && exit 2 ;; esac
root="$(cd "$(dirname "$0")/.." && pwd)"
worker=(python "$root/studies/sweep.py" "${arguments[@]}")
plan="$("${worker[@]}" --dry_run)" || exit 2 # what is wrong with the grid is said once
case " ${arguments[*]} " in *" --dry_run "*) echo "$plan" && exit 0 ;; esac
echo "${plan##*$'\n'}"

export SWEEP_BEGAN="$(python -c 'import time; print(time.time())')"
workers=()
if [ -n "$gpus" ]; then
    case "$gpus" in *:*) IFS=: read -ra groups <<<"$gpus" ;; *) IFS=, read -ra groups <<<"$gpus" ;; esac
    for group in "${groups[@]}"; do
        commas="${group//[!,]/}"
        CUDA_VISIBLE_DEVICES="$group" "${worker[@]}" --processes $((${#commas} + 1)) &
        workers+=($!)
    done
else
    for _ in $(seq "$jobs"); do
        "${worker[@]}" &
        workers+=($!)
    done
fi
trap 'kill -TERM "${workers[@]}" 2>/dev/null' TERM INT
code=0
for worker in "${workers[@]}"; do
    while kill -0 "$worker" 2>/dev/null; do wait "$worker" && status=0 || status=$?; done
    if [ "${status:=0}" -gt "$code" ]; then code="$status"; fi
done
exit "$code"
