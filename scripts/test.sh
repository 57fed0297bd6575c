#!/usr/bin/env bash
# Linter, types, then all tests:    scripts/test.sh [PYTEST ARGUMENTS]
set -euo pipefail
source "$(dirname "$0")/venv.sh" requirements.txt tests/requirements.txt
ruff check
ruff format --check
basedpyright
exec python -m pytest "$@"
