"""Prune six networks by the methods of the library and by their rivals.

    python examples/prune_networks.py --data-dir DIR

DIR holds CIFAR-10, MNIST, SST-2 and the text of the character transformer, and below ``resnet20/``
the weights of the two pretrained networks (``--weights NAME=FILE`` names others, PyTorch's files
too). Networks without pretrained weights are trained first. MiniLM needs its package or
``--minilm``. ``--networks`` and ``--only`` choose networks and experiments.

Some experiments choose on validation data: the dampings of the rivals, the parts of the default,
and the learning rates of fine-tuning. The others use test data. The program writes every finished
run to ``results.json`` and resumes from it. Results of another version of the library are refused;
give another ``--out`` then. Trained networks are kept in ``networks/`` and compiled programs in
``compiled/`` beside the results; the latter may be deleted. ``--smoke`` runs everything with tiny
networks on made-up data.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import chita
import jax
import numpy as np
import optax
import parallel
import pruning_network
import pruning_tasks
from chita import Chita
from prune_tables import CHITA, CHITA_BLOCKS, DEFAULT, MAGNITUDE, draw, tables
from pruning_methods import AFTER_STEPS, CHOICES, IN_TRIALS, PATTERNS, setting_of
from pruning_runs import FULL, MFACW, PARTS, SMOKE, Run, Scale, filled, test_runs, validation_runs

import mfac_jax
from mfac_jax import collect_gradients, pruning
from mfac_jax.pruning import Gradients, Scope, Search

CHITA_BLOCK = 500  # its paper's
# The modules that decide what a run measures; not those that plan runs and show them.
MODULES = (
    "checkpoints",
    "chita",
    "minilm",
    "optimizer_tasks",
    "prune_networks",
    "pruning_methods",
    "pruning_network",
    "pruning_recipes",
    "pruning_tasks",
    "resnet20",
    "squeezenet",
)


class Setup(NamedTuple):
    """Where everything is, as :class:`pruning_tasks.Files`; hashable."""

    data_dir: Path | None
    weights: tuple[tuple[str, Path], ...]
    minilm: Path | None
    networks: Path
    smoke: bool

    @property
    def scales(self) -> dict[str, Scale]:
        """The sizes of the experiments by network."""
        return SMOKE if self.smoke else FULL

    @property
    def files(self) -> pruning_tasks.Files:
        """The same, for the networks."""
        return pruning_tasks.Files(*self._replace(weights=dict(self.weights)))


@functools.cache
def network_of(setup: Setup, name: str) -> pruning_tasks.Network:
    """The network, loaded once in each process, which then compiles its programs once."""
    return pruning_tasks.network(name, setup.files)


class Experiment:
    """A run with its network."""

    def __init__(self, setup: Setup, run: Run) -> None:
        self.run, self.scale = run, setup.scales[run.network]
        self.network = network_of(setup, run.network)
        self.batch = run.batch or self.network.batch
        self.part = "validation" if PARTS[run.part] is validation_runs else "test"

    def measure(self) -> dict[str, Any]:
        """What is written down of the run."""
        run, chosen = self.run, {}
        if run.damping is not None:
            chosen["damping"] = run.damping
        if not run.first_order:
            chosen["first_order"] = False
        if run.rate:
            chosen["rate"] = run.rate
        if run.part == "one_shot":
            return {f"{s:g}": self._tried(self.pruned, s) for s in self.scale.one_shot} | chosen
        if run.part in ("gradual", "rates"):
            return self._tried(self.tuned) | chosen
        return self._tried(self.pruned, run.sparsity) | chosen

    def _tried(self, measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        """What is measured; NaN if the method fails, as an overflow should not end the others."""
        try:
            return measure(*arguments)
        except FloatingPointError as error:
            failed = {"accuracy": math.nan, "failed": str(error), "step_seconds": []}
            return failed | ({"recalibrated": math.nan} if self.network.has_statistics else {})

    def pruned(self, sparsity: float) -> dict[str, Any]:
        """Prunes without fine-tuning."""
        run = self.run
        if run.method in (CHITA, CHITA_BLOCKS):
            return self._by_chita(sparsity)
        gradients, search, recalibrated = self._options()
        scope = Scope(self.network.is_pruned)
        if run.part == "patterns":
            pattern, _, path_filter = PATTERNS[run.what]
            scope = Scope(_divisible(getattr(self.network, path_filter), pattern), pattern)
        options: dict[str, Any] = {"scope": scope, "in_trials": recalibrated == IN_TRIALS}
        if recalibrated == AFTER_STEPS:
            options["fine_tune"] = lambda params, _: self.network.recalibrate(params)
        return self._prune(sparsity, run.steps, gradients, search, **options)

    def tuned(self) -> dict[str, Any]:
        """Prunes gradually, with training after each step."""
        run = self.run
        steps, training, size = self.scale.training
        tx = optax.sgd(run.rate, momentum=0.9)
        if run.what.startswith(MFACW):
            tx = mfac_jax.mfacw(run.rate, weight_decay=0.0)  # SGD has none either
        train = self.network.trainer(tx, 1, size)
        gradients, search, _ = self._options()
        schedule = pruning.sparsity_schedule(run.sparsity, steps, kind="cubic")
        if run.part == "rates":  # one step of pruning, as much training as after one
            schedule = [run.sparsity]
        found = self._prune(
            run.sparsity,
            schedule,
            gradients,
            search,
            scope=Scope(self.network.is_pruned),
            fine_tune=lambda params, mask: train(params, mask, training),
        )
        return found | {"training": len(schedule) * training * size / len(self.network.train.y)}

    def _options(self) -> tuple[dict[str, Any], dict[str, Any], str]:
        run = self.run
        if run.part == "choices":
            return CHOICES[run.method]()
        if run.method == DEFAULT:
            return {}, {}, ""
        # Only the method: no choice, no older gradients.
        setting = setting_of(run.method, run.damping)
        return {"history": 0}, {"settings": [setting], "descents": ()}, ""

    def _prune(
        self,
        sparsity: float,
        steps: int | Sequence[float],
        gradients: dict[str, Any],
        search: dict[str, Any],
        in_trials: bool = False,
        **options: Any,
    ) -> dict[str, Any]:
        network, run = self.network, self.run
        count, given = (1, None) if run.method == MAGNITUDE else (run.count, None)
        batches = network.batches(run.seed, self.batch)
        if run.method != MAGNITUDE:
            given = self._given()
        loss, held_out = network.loss, network.calibration
        if in_trials:
            loss, held_out = _with_own_statistics(network)
        pruned = pruning.prune(
            network.params,
            loss,
            batches,
            sparsity,
            steps=steps,
            gradients=Gradients(count, given=given, **gradients),
            search=Search(calibration=held_out, num_calibration=len(held_out), **search),
            progress=False,
            **options,
        )
        report = pruned.report.steps
        return self._outcome(pruned.params) | {
            "loss": report[-1].loss_after,
            "chosen": [str(step.tried[step.chosen]) for step in report],
            "step_seconds": [step.seconds - step.gradient_seconds for step in report],
            "sparsity": report[-1].sparsity,
        }

    def _by_chita(self, sparsity: float) -> dict[str, Any]:
        network, run = self.network, self.run
        assert run.damping is not None
        # The fractions after each stage, as prune has them by default.
        stages = [1 - (1 - sparsity) ** ((i + 1) / run.steps) for i in range(run.steps)]
        params, _, seconds = chita.prune(
            network.params,
            network.loss,
            network.batches(run.seed, self.batch),
            stages,
            count=run.count,
            batch=self.batch,
            config=Chita(
                run.damping,
                CHITA_BLOCK if run.method == CHITA_BLOCKS else None,
                first_order=run.first_order,
            ),
            is_pruned=network.is_pruned,
            given=self._given(),
        )
        return self._outcome(params) | {"step_seconds": seconds}

    def _given(self) -> Any:
        """The gradients of the only step, which other runs share; None for several steps."""
        run = self.run
        if run.steps > 1:
            _gradients.cache_clear()  # they may take much memory
            return None
        return _gradients(self.network, run.seed, self.batch, run.count)

    def _outcome(self, params: Any) -> dict[str, Any]:
        network = self.network
        found = {"accuracy": network.accuracy(params, self.part)}
        if network.has_statistics:
            params = network.recalibrate(params)
            found["recalibrated"] = network.accuracy(params, self.part)
        return found


def _with_own_statistics(network: Any) -> tuple[Callable[..., Any], list[Any]]:
    """A loss that gives calibration batches their own statistics, and these batches, marked."""

    def loss(params: Any, batch: Any) -> Any:
        if len(batch) == 3:
            return network.loss_of_batch(params, batch[:2])
        return network.loss(params, batch)

    return loss, [(*batch, np.float32(0)) for batch in network.calibration]


def _divisible(chosen: Callable[[str, Any], bool], pattern: pruning.Pattern) -> Any:
    """The leaves that a pattern divides. Three colours are not a multiple of four."""

    def fits(path: str, leaf: Any) -> bool:
        size = 1 if isinstance(pattern, pruning.Slices) else 4
        return chosen(path, leaf) and leaf.shape[-2] % size == 0

    return fits


@functools.lru_cache(maxsize=1)
def _gradients(network: Any, seed: int, batch: int, count: int) -> Any:
    """The gradients of one-shot pruning, the same for all methods and sparsities."""
    batches = network.batches(seed, batch)
    return collect_gradients(network.loss, network.params, batches, count, progress=False)


def measure(setup: Setup, run: Run) -> dict[str, Any]:
    """Performs a run."""
    return Experiment(setup, run).measure()


def code_hash(paths: Iterable[Path]) -> str:
    """A digest of some Python files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def environment(setup: Setup) -> dict[str, Any]:
    """The machine, the versions, and the sizes that the keys of the runs do not tell."""
    library, here = Path(mfac_jax.__file__).parent, Path(__file__).parent
    return parallel.environment() | {
        "mfac_jax": importlib.metadata.version("mfac_jax"),
        "flax": importlib.metadata.version("flax"),
        "optax": importlib.metadata.version("optax"),
        "code": code_hash(sorted(library.rglob("*.py"))),
        "experiment": code_hash(here / f"{name}.py" for name in MODULES),
        "sizes": {name: scale.sizes for name, scale in setup.scales.items()},
    }


def load(setup: Setup, names: Sequence[str], results: dict[str, Any]) -> None:
    """Loads the networks, trains those that need it, and notes their accuracies.

    Raises:
        FileNotFoundError: data or weights are missing; before anything is trained.
        ValueError: the results are those of other weights.
        FloatingPointError: the loss of a network is not finite.
    """
    for name in names:
        pruning_tasks.CLASSES[name](setup.files)
    for name in names:
        network = network_of(setup, name)
        losses = [float(network.loss(network.params, batch)) for batch in network.calibration]
        if not all(map(math.isfinite, losses)):
            raise FloatingPointError(f"the loss of {name} on calibration batches is {losses}.")
        leaves = jax.tree_util.tree_flatten_with_path(network.params)[0]
        digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for _, leaf in leaves))
        known = results.setdefault("dense", {}).get(name)
        if known is not None and known["digest"] != digest.hexdigest()[:16]:
            raise ValueError(
                f"the results are those of other weights of {name}: use another --out."
            )
        if known is None:
            results["dense"][name] = {
                part: network.accuracy(network.params, part) for part in pruning_network.PARTS
            } | {
                "digest": digest.hexdigest()[:16],
                "processor_seconds": network.training_seconds or 0.0,
                "weights": sum(
                    leaf.size
                    for path, leaf in leaves
                    if network.is_pruned(
                        jax.tree_util.keystr(path, simple=True, separator="/"), leaf
                    )
                ),
            }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Reads the command line, runs all experiments and writes the results."""
    names = pruning_tasks.NETWORKS
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", type=Path, help="folder with the data and the weights")
    parser.add_argument(
        "--weights", nargs="+", default=[], metavar="NAME=FILE", help="files of pretrained weights"
    )
    parser.add_argument("--minilm", type=Path, help="folder of MiniLM's weights and tokenizer")
    parser.add_argument("--out", type=Path, default=Path("prune_networks"), help="for the results")
    parser.add_argument("--smoke", action="store_true", help="a quick try on made-up data")
    parser.add_argument("--networks", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS], metavar="PART")
    options = parser.parse_args(arguments)
    pairs = dict(pair.partition("=")[::2] for pair in options.weights)
    known = pruning_tasks.PRETRAINED
    wrong = [name for name, file in pairs.items() if name not in known or not file]
    if wrong:
        parser.error(f"--weights takes NAME=FILE with a NAME of {', '.join(known)}; got {wrong}")
    setup = Setup(
        options.data_dir,
        tuple((name, Path(file)) for name, file in sorted(pairs.items())),
        options.minilm,
        options.out / "networks",
        options.smoke,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("smoke.json" if options.smoke else "results.json")
    results = parallel.open_results(path, environment(setup))
    try:
        load(setup, options.networks, results)
    except (OSError, ImportError, ValueError, FloatingPointError) as error:
        sys.exit(str(error))
    workers = 1 if options.smoke else parallel.num_workers()

    def perform(kind: Callable[[str, Scale], list[Run]]) -> list[str]:
        """Performs the runs, and returns what the others wait for."""
        todo, waiting = [], []
        for name, scale in ((name, setup.scales[name]) for name in options.networks):
            for run in kind(name, scale):
                if run.part in options.only:
                    try:
                        todo.append(filled(run, results["runs"], setup.scales))
                    except LookupError as error:
                        waiting.append(str(error))
        for run in todo:
            if not run.is_choice_of(results["runs"].get(run.key, {})):
                results["runs"].pop(run.key, None)
        todo.sort(key=lambda run: list(PARTS).index(run.part))
        arguments = {run.key: (setup, run) for run in todo}
        parallel.perform(measure, arguments, results, path, workers=workers)
        return waiting

    perform(validation_runs)
    waiting = perform(test_runs)
    for message in dict.fromkeys(waiting):
        print(message)
    parallel.write_up(results, path, tables, draw, "accuracy.png")
    return results


if __name__ == "__main__":
    main()
