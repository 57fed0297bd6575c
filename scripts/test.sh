#!/usr/bin/env bash
# Run all tests:    scripts/test.sh [PYTEST ARGUMENTS]
set -euo pipefail
source "$(dirname "$0")/venv.sh" requirements.txt tests/requirements.txt
exec python -m pytest "$@"
