"""The paper's sequential recursions in PyTorch, written from its formulas.

``F_i^-1 = F_{i-1}^-1 - h_i h_i^T / (n + g_i . h_i)`` with ``h_i = F_{i-1}^-1 g_i`` and
``F_0 = lambda I``: sections 3.1 (static) and 3.2 (dynamic) of Frantar, Kurtic,
Alistarh, NeurIPS 2021. :mod:`mfac_jax.reference` has them in JAX. PyTorch is not a dependency of
the library; this module is imported only if PyTorch is installed.
"""

from __future__ import annotations

import jax
import torch

# Products in float32 on every device, as in the library.
torch.set_float32_matmul_precision("highest")


def view(array: jax.Array) -> torch.Tensor:
    """The same memory as a tensor; release it before JAX donates the array."""
    return torch.from_dlpack(array)


def wait(tensor: torch.Tensor) -> None:
    """Waits until the device is done."""
    if tensor.is_cuda:
        torch.cuda.synchronize()


def static(gradients: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """All ``h_i`` (n, d) and ``n + g_i . h_i`` (n,)."""
    n = len(gradients)
    vectors, scales = torch.empty_like(gradients), gradients.new_empty(n)
    for i, gradient in enumerate(gradients):
        vector = gradient / damping
        if i:
            dots = torch.mv(vectors[:i], gradient) / scales[:i]
            vector.addmv_(vectors[:i].T, dots, alpha=-1)
        vectors[i] = vector
        scales[i] = n + torch.dot(gradient, vector)
    return vectors, scales


def blocks(gradients: torch.Tensor, damping: float, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The recursion of every block; each step handles all blocks. (b, n, B) and (b, n)."""
    n, d = gradients.shape
    padded = torch.nn.functional.pad(gradients, (0, -d % size))
    cut = padded.reshape(n, -1, size).transpose(0, 1).contiguous()
    vectors, scales = torch.empty_like(cut), cut.new_empty(cut.shape[:2])
    for i in range(n):
        gradient = cut[:, i]
        vector = gradient / damping
        if i:
            dots = torch.bmm(vectors[:, :i], gradient[:, :, None]) / scales[:, :i, None]
            vector -= torch.bmm(dots.transpose(1, 2), vectors[:, :i])[:, 0]
        vectors[:, i] = vector
        scales[:, i] = n + (gradient * vector).sum(1)
    return vectors, scales


def push_direction(
    gradients: torch.Tensor, dots: torch.Tensor, slot: int, vector: torch.Tensor, damping: float
) -> torch.Tensor:
    """Writes a gradient and its dot products in place; ``F^-1 g`` for it.

    ``D_ij = g_i . g_j / lambda - sum_(k<i) D_ki D_kj / (n + D_kk)`` with ``h_i . g_j =
    D_ij``, and ``h_i = sum_j B_ij g_j`` with the same recursion for ``B``.
    """
    n = len(gradients)
    gradients[slot] = vector
    row = torch.mv(gradients, vector)
    dots[slot] = row
    dots[:, slot] = row

    d_matrix = dots / damping
    b_matrix = torch.eye(n, dtype=dots.dtype, device=dots.device) / damping
    for k in range(n - 1):
        ratio = d_matrix[k, k + 1 :] / (n + d_matrix[k, k])
        d_matrix[k + 1 :, k + 1 :].addr_(ratio, d_matrix[k, k + 1 :], alpha=-1)
        b_matrix[k + 1 :, : k + 1].addr_(ratio, b_matrix[k, : k + 1], alpha=-1)
    scales = n + d_matrix.diagonal()
    weights = -(b_matrix.T @ ((b_matrix @ row) / scales))
    weights[slot] += 1 / damping
    return torch.mv(gradients.T, weights)
