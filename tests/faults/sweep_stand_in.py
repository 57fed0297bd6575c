"""A training for tests of sweeps: it takes as long as it is told, notes when it runs, and stops as trainings do."""

import json
import os
import signal
import sys
import time
from pathlib import Path

options = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:] if "=" in word)
folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
runs, steps = folder / "runs.jsonl", folder / "steps"
stopping = []
signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))


def note(event: str) -> None:
    with runs.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": event, "time": time.time(), "process": os.getpid()}) + "\n")


note("begins")
for step in range(int(steps.read_text()) if steps.exists() else 0, int(options["steps"])):
    time.sleep(0.1)
    steps.write_text(str(step + 1))
    if stopping:
        note("stops")
        sys.exit(75)
if (
    options.get("fails") in ("always", options.get("rate", "never"))
    or options.get("fails") == "once"
    and len(runs.read_text().splitlines()) == 1
):
    note("fails")
    print("error: --fails was given\nUse --help", file=sys.stderr)
    sys.exit(2)
note("ends")
if "loss" in options:
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": abs(float(options["loss"]))}) + "\n")
summary = {"result": "result.safetensors", "seconds": abs(float(options.get("rate", 0)) - 2)}  # the best rate is 2
(folder / "summary.json").write_text(json.dumps(summary))
