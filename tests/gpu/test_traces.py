"""Traces as torch.profiler writes them: what counts as a wait within a step. Needs no GPU."""

import json

import pytest

from tests.gpu.traces import STEP, read_events, steps_in, waits_in


def event(cat, name, ts, dur=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": 1, "args": args}


QUIET = [
    event("user_annotation", STEP, 100, 50),
    event("gpu_user_annotation", STEP, 0, 500),  # the GPU's own time of the step
    event("cuda_runtime", "cudaLaunchKernel", 110, correlation=1),
    event("cuda_runtime", "cudaMemcpyAsync", 111, correlation=2),
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 190, correlation=2),
    event("cuda_runtime", "cudaEventQuery", 112, correlation=3),
    event("cuda_runtime", "cudaDeviceSynchronize", 160, correlation=4),  # after the step
    event("cuda_runtime", "cudaMemcpyAsync", 165, correlation=5),
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 120, correlation=5),  # while it runs, but not its own
    {"ph": "i", "name": "Iteration Start", "ts": 100},
]


def events_of(tmp_path, *more):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": [*QUIET, *more]}))
    return read_events(path)


def test_a_step_without_waits(tmp_path):
    events = events_of(tmp_path)
    assert steps_in(events) == [(100, 150)] and waits_in(events) == []


@pytest.mark.parametrize(
    "wait",
    [
        [event("cuda_runtime", "cudaStreamSynchronize", 120)],
        [event("cuda_driver", "cuStreamSynchronize", 120)],
        [event("cuda_runtime", "cudaEventSynchronize", 149)],
        [event("cuda_runtime", "cudaMemcpy", 120)],
        [
            event("cuda_runtime", "cudaMemcpyAsync", 120, correlation=9),
            event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 300, correlation=9),
        ],
        [
            event("cuda_runtime", "cudaMemcpyAsync", 120, correlation=9),
            event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 300, correlation=9),
        ],
    ],
    ids=lambda events: events[-1]["name"],
)
def test_a_wait_within_a_step(wait, tmp_path):
    assert waits_in(events_of(tmp_path, *wait)) == [wait[-1]["name"]]
