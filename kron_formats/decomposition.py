"""Singular value decompositions of base weights, computed once and kept: W = U diag(σ) V.

They are computed in fp64. In fp32, vectors of singular values that are nearly equal come out turned by another LAPACK;
in fp64, weights that are fp32 have the same u_i v_iᵀ everywhere, but for values that are equal to 12 digits.
"""

import logging
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kron_formats.changes import as_matrix
from kron_formats.kept import key_of, load_tensors, save_tensors, tensor_bytes

RESERVE = 2**30  # bytes of the disk that kept decompositions leave free
PROBES = 4

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decomposition:
    """W (m, n) = U diag(sigma) V, with r = min(m, n). All fp32."""

    U: Tensor  # (m, r)
    sigma: Tensor  # (r,), descending
    V: Tensor  # (r, n)

    def fingerprint(self, change: Tensor) -> Tensor:
        """Return what tells U diag(change) V from other matrices: p_kᵀ U diag(change) V q_k of PROBES pairs, fp64.

        p and q are fixed vectors of ±1. Two matrices that differ by E have fingerprints that differ by about |E| in
        each entry, however they differ; the signs of u_i and v_i do not matter, nor do vectors of equal changes.
        """
        p, q = (_signs(side, self.U.device) for side in (self.U.shape[0], self.V.shape[1]))
        return (p @ self.U.double() * change.double() * (q @ self.V.double().t())).sum(1)

    def to(self, device: torch.device) -> "Decomposition":
        return Decomposition(self.U.to(device), self.sigma.to(device), self.V.to(device))


def decompose(weight: Tensor) -> Decomposition:
    """Return the decomposition of a weight, computed in fp64 on the CPU, on the weight's device.

    A kernel is a matrix (c_out, c_in·k·k), a vector one of a single row.
    """
    device = weight.device if weight.is_meta else torch.device("cpu")  # on meta only the sizes are known
    matrix = torch.atleast_2d(as_matrix(weight.detach())).to(device, torch.float64)
    exact = torch.linalg.svd(matrix, full_matrices=False)
    return Decomposition(*(part.float().contiguous() for part in exact)).to(weight.device)


def digest(weight: Tensor) -> str:
    """Return a digest of a weight in fp32: its shape and its bits."""
    return key_of(str(tuple(weight.shape)).encode(), tensor_bytes(weight.float()))


def kept_decomposition(weight: Tensor, key: str) -> Decomposition:
    """Return the decomposition of a weight whose digest is `key`, from the cache if it is there.

    The cache is a folder among Hugging Face's assets, one file per weight. What does not fit on the disk, or cannot be
    written, is not kept, and a warning says so once.
    """
    if (folder := cache_folder()) is None:
        return decompose(weight)
    path = folder / f"{key}.safetensors"
    try:
        if tensors := load_tensors(path):
            return Decomposition(**tensors).to(weight.device)
    except OSError as error:
        _warn(str(error))
    parts = decompose(weight)
    tensors = {name: part.cpu() for name, part in vars(parts).items()}
    try:
        if shutil.disk_usage(folder).free < RESERVE + sum(tensor.nbytes for tensor in tensors.values()):
            _warn(f"the disk of {folder} has less than {RESERVE / 2**30:.0f} GiB free beside them")
        else:
            save_tensors(tensors, path)
    except OSError as error:
        _warn(str(error))
    return parts


def kept_sigma(key: str) -> Tensor | None:
    """Return the singular values of a weight by the beginning of its digest; None if they are not kept."""
    folder = cache_folder()
    for path in sorted(folder.glob(f"{key}*.safetensors")) if folder else ():
        try:
            with safe_open(path, "pt") as file:  # and not its vectors, which are far larger
                return file.get_tensor("sigma")
        except (OSError, SafetensorError):
            continue
    return None


def cache_folder() -> Path | None:
    """Return the folder of kept decompositions, or None without huggingface_hub, which says where it is."""
    try:
        from huggingface_hub import cached_assets_path
    except ImportError:
        return None
    return Path(cached_assets_path("kron-adapter", namespace="decompositions"))


@cache
def _warn(reason: str) -> None:
    logger.warning("singular vectors are not kept for later runs, which will take minutes to find them: %s", reason)


def _signs(n: int, device: torch.device) -> Tensor:
    """Return PROBES fixed vectors (PROBES, n) of ±1, fp64, the same on every device and with every version of torch."""
    number = torch.arange(PROBES * n, device=device).view(PROBES, n)
    for factor in (2654435761, 2246822519, 3266489917):  # a hash of the number, in 32 bits
        number = (number + 1) * factor % 2**32
        number ^= number >> 15
    return 1.0 - 2.0 * (number >> 16 & 1).double()
