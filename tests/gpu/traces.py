"""What a step has the host wait for, by the trace of torch.profiler."""

import json
from pathlib import Path
from typing import Any

STEP = "step"  # what a step is called in the trace: record_function(STEP)
OF_HOST = ("cuda_runtime", "cuda_driver")


def read_events(trace: Path) -> list[dict[str, Any]]:
    """Return the events of a Chrome trace that have a duration."""
    return [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("ph") == "X"]


def steps_in(events: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Return when each step began and ended on the host, us."""
    found = [event for event in events if event.get("cat") == "user_annotation" and event["name"] == STEP]
    return [(event["ts"], event["ts"] + event["dur"]) for event in found]


def waits_in(events: list[dict[str, Any]]) -> list[str]:
    """Return what the host waits for within steps, in any of its threads.

    Calls that synchronise; copies to the host; and copies to the device from memory that is not pinned.
    """
    steps = steps_in(events)
    calls = [event for event in events if event.get("cat") in OF_HOST and _is_within(event, steps)]
    waits = [event["name"] for event in calls if _synchronises(event["name"])]
    issued = {event.get("args", {}).get("correlation") for event in calls}
    copies = [event for event in events if event.get("cat") == "gpu_memcpy"]
    within = [event["name"] for event in copies if event["args"]["correlation"] in issued]
    return waits + [name for name in within if "DtoH" in name or "Pageable" in name]


def _is_within(event: dict[str, Any], steps: list[tuple[float, float]]) -> bool:
    return any(begin <= event["ts"] <= end for begin, end in steps)


def _synchronises(call: str) -> bool:
    return call.endswith("Synchronize") or call in ("cudaMemcpy", "cudaFree", "cuMemFree_v2")
