"""Gradient noise scale, almost for free from local and global norms. Pure Python.

McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", appendix A.1, with the two batch sizes that data
parallelism has anyway: b for one rank, B = N b for all. With g_r the gradient of rank r and g their mean,

    |G|^2 = (B |g|^2 - b mean_r |g_r|^2) / (B - b)            S = (mean_r |g_r|^2 - |g|^2) / (1/b - 1/B)

estimate the true gradient's square and the trace of the noise's covariance; B_noise = S / |G|^2, each smoothed first,
because their quotient is biased. Given relative to B it needs no b: above 1 a larger batch still pays.
"""

from __future__ import annotations

import math

_SMOOTHING = 0.99
#: With fewer steps the estimate says nothing yet.
_LEAST = 20


class NoiseScale:
    """Smoothed estimate of one run."""

    def __init__(self) -> None:
        self._gradient = self._noise = 0.0
        self._count = 0

    def update(self, mean_local_square: float, global_square: float, ranks: int) -> float | None:
        """Take in a healthy step.

        Args:
            mean_local_square: mean over the ranks of their squared gradient norms, unscaled.
            global_square: squared norm of the mean gradient, before clipping, unscaled.
            ranks: how many gradients were averaged.

        Returns:
            B_noise / B; None while unknown (few steps, one rank, or an estimate of the gradient below 0).
        """
        if ranks < 2 or not (math.isfinite(mean_local_square) and math.isfinite(global_square)):
            return None
        gradient = (ranks * global_square - mean_local_square) / (ranks - 1)
        noise = (mean_local_square - global_square) / (1 - 1 / ranks)
        self._gradient += (1 - _SMOOTHING) * (gradient - self._gradient)
        self._noise += (1 - _SMOOTHING) * (noise - self._noise)  # both start at 0: their quotient is not biased by that
        self._count += 1
        if self._count < _LEAST or self._gradient <= 0:
            return None
        return max(0.0, self._noise) / self._gradient / ranks
