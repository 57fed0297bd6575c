"""The device of the GPU tests: CUDA, or, with KRON_GPU_TESTS=cpu, the CPU for what does not need CUDA itself.

pytest tests/gpu -m gpu                          # on a machine with a GPU
KRON_GPU_TESTS=cpu pytest tests/gpu -m gpu       # to see that the tests themselves are sound
"""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: cuBLAS then repeats itself exactly

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def cuda() -> torch.device:
    """For tests of what only CUDA has."""
    if not torch.cuda.is_available():
        pytest.skip("a CPU has nothing of the kind")
    return torch.device("cuda")


@pytest.fixture
def deterministic():
    """Kernels that give the same bits every time, where there are such: what differs then is this project's doing."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
