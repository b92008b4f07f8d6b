"""The report of a pruning run, as tables and as a figure."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax

from mfac_jax.pruning._search import Trial


@dataclass(frozen=True)
class StepReport:
    """The report of one pruning step.

    Attributes:
        num_pruned: the number of pruned weights after the step.
        num_weights: the number of prunable weights.
        tried: all trials of the step.
        chosen: the index of the chosen trial.
        loss_before: the loss on the calibration batches before the step.
        loss_after: the loss after the step.
        loss_tuned: the loss after fine-tuning; None without fine-tuning.
        predicted_loss_increase: ``1/2 delta^T F delta`` of the update before it is scaled, with
            the Fisher of the chosen setting, whole or in blocks.
        damping: ``lambda`` of the chosen update.
        update_norm: ``|delta_S|``, the norm of the change of the weights that stay, before
            scaling.
        removed_norm: ``|w_Q|``, the norm of the pruned weights.
        degrees_of_freedom: ``sum k_i / (k_i + n lambda)``, the number of directions in which the
            whole Fisher outweighs the damping. If it is near n, an update by the whole Fisher
            fits every gradient and may overstep. For an update in blocks it says less. With
            ``Gradients(in_blocks=True)`` it is that of the Fisher in blocks.
        gradient_seconds: the time for the gradients.
        seconds: the time for the whole step.
        peak_memory: the largest memory that this process (on a CPU) or the device has used so
            far, in bytes; None if it is unknown.
    """

    num_pruned: int
    num_weights: int
    tried: tuple[Trial, ...]
    chosen: int
    loss_before: float
    loss_after: float
    loss_tuned: float | None
    predicted_loss_increase: float
    damping: float
    update_norm: float
    removed_norm: float
    degrees_of_freedom: float
    gradient_seconds: float
    seconds: float
    peak_memory: int | None

    @property
    def sparsity(self) -> float:
        """The fraction that is pruned after the step."""
        return self.num_pruned / max(self.num_weights, 1)


class LayerReport(NamedTuple):
    """A prunable leaf: its path, its number of weights, and how many of them are pruned."""

    path: str
    num_weights: int
    num_pruned: int


@dataclass(frozen=True)
class PruneReport:
    """All steps and layers; ``print`` shows two tables, :meth:`plot` draws a figure.

    Attributes:
        steps: the steps in their order.
        layers: the prunable leaves at the end.
    """

    steps: tuple[StepReport, ...]
    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        head = ("sparsity", "loss", "before", "predicted", "|update|", "freedom", "s", "chosen")
        rows = [
            (
                f"{step.sparsity:.2%}",
                f"{step.loss_after:.4g}" + _tuned(step.loss_tuned),
                f"{step.loss_before:.4g}",
                f"{step.predicted_loss_increase:+.3g}",
                f"{step.update_norm:.3g}",
                f"{step.degrees_of_freedom:.1f}",
                f"{step.seconds:.1f}",
                str(step.tried[step.chosen]),
            )
            for step in self.steps
        ]
        layers = [
            (layer.path, str(layer.num_weights), f"{_share(layer):.2%}") for layer in self.layers
        ]
        peak = max((step.peak_memory or 0 for step in self.steps), default=0)
        tables = _table(head, rows), _table(("layer", "weights", "pruned"), layers)
        return "\n\n".join(tables) + (f"\n\npeak memory {peak / 2**20:.0f} MiB" if peak else "")

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the steps and the layers into a PNG file.

        Args:
            path: the file to write.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        sparsities = [100 * step.sparsity for step in self.steps]
        left.plot(sparsities, [step.loss_after for step in self.steps], "o-", label="after a step")
        predicted = [step.loss_before + step.predicted_loss_increase for step in self.steps]
        left.plot(sparsities, predicted, "x--", label="predicted")
        tuned = [(x, s.loss_tuned) for x, s in zip(sparsities, self.steps, strict=True)]
        if any(loss is not None for _, loss in tuned):
            left.plot(*zip(*tuned, strict=True), "s-", label="fine-tuned")
        left.set(xlabel="sparsity (%)", ylabel="loss on calibration batches")
        left.legend()
        names = [layer.path for layer in self.layers]
        right.barh(names, [100 * _share(layer) for layer in self.layers])
        right.invert_yaxis()
        right.tick_params(axis="y", labelsize=max(4, min(9, 160 // max(len(names), 1))))
        right.set(xlabel="pruned (%)", xlim=(0, 100))
        figure.savefig(path, dpi=150)


def peak_memory() -> int | None:
    """The largest memory in use so far, in bytes: of the device, or of this process on a CPU."""
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats is not None and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    if device.platform != "cpu" or sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _share(layer: LayerReport) -> float:
    return layer.num_pruned / max(layer.num_weights, 1)


def _tuned(loss: float | None) -> str:
    return "" if loss is None else f" -> {loss:.4g}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    lines = [head, tuple("-" * width for width in widths), *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
