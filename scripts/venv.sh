# Sourced by the other scripts: make .venv in the project's root and install the requirements files given as arguments.
# PYTHON chooses the interpreter (default: python3).
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=.venv/bin
if [ "${OS:-}" = Windows_NT ]; then bin=.venv/Scripts; fi
if [ ! -x "$bin/python" ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: Python 3.11 or later is needed; set PYTHON to one" >&2
        exit 1
    }
    "${PYTHON:-python3}" -m venv .venv
fi
for requirements in "$@"; do
    "$bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$requirements"
done
export PATH="$PWD/$bin:$PATH"
