#!/usr/bin/env bash
# All that needs a GPU, in ten minutes: tests, step times, the recipes' memory, drawing.    benchmarks/gpu.sh --help
set -euo pipefail
"${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: Python 3.11 or later is needed; set PYTHON to one" >&2
    exit 2
}
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu.py" "$@"
