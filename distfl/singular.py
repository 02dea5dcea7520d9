"""The largest singular values of a matrix, for methods whose server splits matrices into factors."""

from __future__ import annotations

import torch
from torch import Tensor


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (outputs, r), S (r), falling, and V^T (r, inputs) of a matrix (outputs, inputs), float64; r is at most its smaller side.

    Columns of U and rows of V^T are orthonormal, also where S is 0.
    """
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u[:, :rank], s[:rank], v[:rank]
