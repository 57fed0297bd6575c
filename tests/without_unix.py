"""Run programs, one after the other in one process, where this project finds nothing that only Unix has.

python tests/without_unix.py "scripts/generate.py --help" "train_dreambooth_kronecker.py --output_dir ..."
"""

import builtins
import os
import runpy
import shlex
import signal
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HIDDEN = {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"}
found = builtins.__import__


def without_unix(name, globals=None, *rest, **named):
    file = os.path.abspath((globals or {}).get("__file__") or "/")
    if name in HIDDEN and file.startswith(ROOT) and "site-packages" not in file:
        raise ImportError(f"No module named {name}")
    return found(name, globals, *rest, **named)


if __name__ == "__main__":
    sys.path[0] = ROOT
    builtins.__import__ = without_unix
    del signal.SIGUSR1, signal.SIGUSR2, time.tzset
    del os.pread, os.fork, os.geteuid, os.O_DIRECTORY
    for line in sys.argv[1:]:
        sys.argv = shlex.split(line)
        try:
            runpy.run_path(os.path.join(ROOT, sys.argv[0]), run_name="__main__")
        except SystemExit as end:
            assert not end.code, line
        if "accelerate" in sys.modules:
            from accelerate.state import AcceleratorState, GradientState

            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
