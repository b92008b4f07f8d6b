"""The record of a pruning run, from which it goes on after an interruption.

The record is a folder. ``run.json`` says which run it is of. ``step.npz`` holds the weights, the
mask and the report after the last step; it is replaced whole. A folder for each step holds the
step's gradients, of which finished ones are not computed again.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from mfac_jax._durable import claim, write_whole
from mfac_jax._layout import PyTree
from mfac_jax.pruning._blocks import FisherBlocks
from mfac_jax.pruning._gradients import Gradients
from mfac_jax.pruning._report import StepReport
from mfac_jax.pruning._search import Descent, Setting, Trial
from mfac_jax.rows import FileRows, Files

_VERSION = 2
_RUN, _STEP, _GRADIENTS = "run.json", "step.npz", "gradients-"


class State(NamedTuple):
    """A run after some steps.

    Attributes:
        params: the parameters.
        alive: the mask of the prunable leaves.
        loss: the loss on the calibration batches.
        reports: the reports of the steps.
        batches: the number of batches that were read.
    """

    params: PyTree
    alive: PyTree
    loss: float
    reports: list[StepReport]
    batches: int


class Record:
    """The folder of a run.

    Attributes:
        folder: the folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        origin: Mapping[str, str | float],
        params: PyTree,
        gradients: Gradients,
        settings: Sequence[tuple[Setting, FisherBlocks]],
        descents: Sequence[Descent],
    ) -> None:
        """Opens the record of a run, or makes it.

        Args:
            folder: the folder.
            origin: what the run depends on, by name.
            params: the parameters.
            gradients: how many gradients each step takes.
            settings: the settings that the run tries, with their blocks.
            descents: the descents that it tries.

        Raises:
            ValueError: the folder holds something else, or the record of another run.
            OSError: the folder cannot be made or read.
        """
        self.folder = Path(folder)
        self._params, self._count = params, cast(int, gradients.count)
        self._settings, self._descents = [s for s, _ in settings], list(descents)
        manifest = {"version": _VERSION, **origin}
        self._claim = claim(self.folder, _RUN, manifest)

    def load(self, start: State) -> State:
        """The state after the last step; ``start`` if there is none."""
        path = self.folder / _STEP
        if not path.exists():
            return start
        trees = start.params, start.alive
        leaves, treedef = jax.tree.flatten(trees)
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                about = json.loads(file["about"].tobytes())
                arrays = [
                    np.frombuffer(file[f"leaf{i}"].tobytes(), leaf.dtype).reshape(leaf.shape)
                    for i, leaf in enumerate(leaves)
                ]
        except (ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} cannot be read: {error}. Use another folder, or empty it."
            ) from error
        # A mask is on no device in particular, so that it follows the parameters.
        placed = [
            jax.device_put(array, leaf.sharding if leaf.committed else None)
            for array, leaf in zip(arrays, leaves, strict=True)
        ]
        params, alive = jax.tree.unflatten(treedef, placed)
        reports = [self._report(step) for step in about["steps"]]
        return State(params, alive, about["loss"], reports, about["batches"])

    def save(self, state: State, num_kept: int) -> None:
        """Keeps a state, and the gradients of the last ``num_kept`` steps."""
        leaves = jax.tree.leaves((state.params, state.alive))
        arrays: dict[str, Any] = {
            f"leaf{i}": np.frombuffer(np.asarray(leaf).tobytes(), np.uint8)
            for i, leaf in enumerate(leaves)
        }
        steps = [self._described(step) for step in state.reports]
        about = {"steps": steps, "loss": state.loss, "batches": state.batches}
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        content = io.BytesIO()
        np.savez(content, **arrays)
        write_whole(self.folder / _STEP, content.getvalue())
        for path in self.folder.glob(_GRADIENTS + "*"):
            if int(path.name.removeprefix(_GRADIENTS)) < len(steps) - num_kept:
                shutil.rmtree(path)

    def gradients(self, step: int) -> FileRows:
        """The gradients of a step as far as they are finished."""
        files = Files(self.folder / f"{_GRADIENTS}{step}")
        return files.resume(self._params, self._count, dict)[0]

    def _described(self, report: StepReport) -> dict[str, Any]:
        names = [field.name for field in dataclasses.fields(report) if field.name != "tried"]
        trials = [
            (
                self._settings.index(trial.setting),
                trial.scale,
                trial.loss,
                None if trial.descent is None else self._descents.index(trial.descent),
                trial.num_batches,
            )
            for trial in report.tried
        ]
        return {"tried": trials, **{name: getattr(report, name) for name in names}}

    def _report(self, described: dict[str, Any]) -> StepReport:
        trials = tuple(
            Trial(
                self._settings[setting],
                scale,
                loss,
                None if descent is None else self._descents[descent],
                num_batches,
            )
            for setting, scale, loss, descent, num_batches in described.pop("tried")
        )
        return StepReport(tried=trials, **described)
