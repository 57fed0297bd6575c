#!/usr/bin/env bash
# Linter, types, then all tests:    scripts/test.sh [PYTEST ARGUMENTS]
set -euo pipefail
source "$(dirname "$0")/venv.sh" requirements.txt tests/requirements.txt
ruff check
ruff format --check
basedpyright
export OMP_NUM_THREADS=1  # each test process has one thread, and there is one process per core
exec python -m pytest --numprocesses logical --dist load --maxschedchunk 1 "$@"
