"""Every operation, by the library and by the alternatives."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import alternatives
import jax
import jax.numpy as jnp
import optax
import timing
import workloads
from workloads import DAMPING, Data, DoesNotFit, Workload

from mfac_jax import algebra, fisher_inverse, mfac_precondition, rows, window
from mfac_jax.optimizer import MfacState

STEPS = ("dots", "push", "combine", "push + direction")
PRECOMPUTATIONS = ("gram", "whiten", "diagonal", "static")
SCANS = STEPS  # operations that kernels may run; XLA runs on the same rows for comparison

HAS_TORCH = importlib.util.find_spec("torch") is not None

# Alternatives that would run longer are left out.
LONGEST = 30.0

# The copies of the gradients that plain programs make on a CPU, found by watching the memory of
# the process: XLA's own figures omit the memory of a matrix product.
_HIDDEN_COPIES = {"gram": 1, "diagonal": 2}

State = Any
Program = Callable[..., Any]


class LeftOut(Exception):
    """A program is not run, for the reason given."""


def of(w: Workload) -> tuple[str, ...]:
    """The operations to measure on a workload."""
    if w.block is not None:
        return ("diagonal", "static")
    return STEPS if w.only_steps else (*STEPS, *PRECOMPUTATIONS)


class OptimizerStates(Sequence):
    """States of the optimizer around the windows of a workload."""

    def __init__(self, windows: list[window.Window]):
        self.windows = windows
        empty = jax.eval_shape(optimizer_of(windows[0]).init, _like(windows[0])).inverse
        self.inverses = [jax.tree.map(jnp.zeros_like, empty) for _ in windows]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, k: int) -> MfacState:
        return MfacState(jnp.zeros((), jnp.int32), self.windows[k], self.inverses[k])

    def __setitem__(self, k: int, state: MfacState) -> None:
        self.windows[k], self.inverses[k] = state.window, state.inverse


def optimizer_of(held: window.Window) -> optax.GradientTransformationExtraArgs:
    """The optimizer with a window of this size."""
    return mfac_precondition(held.rows.num_rows, DAMPING)


def _like(held: window.Window) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((held.rows.layout.size,), jnp.float32)


def push_direction(state: MfacState, gradient: jax.Array) -> tuple[MfacState, jax.Array]:
    """A step of the optimizer."""
    direction, state = optimizer_of(state.window).update(gradient, state)
    return state, direction


def library(operation: str, w: Workload) -> Program:
    """The library's program: takes a window, returns the result or the new window and it."""

    def static(held: window.Window) -> Any:
        inverse = fisher_inverse(held.rows, DAMPING, blocks=w.block).whiten()
        return (inverse.whitened, inverse.factor) if inverse.is_whole else inverse.inverted

    return {
        "dots": lambda held, v: held.rows.dots(v),
        "push": window.push,
        "combine": lambda held, c: held.rows.combine(c),
        "push + direction": push_direction,
        "gram": lambda held: held.rows.gram(),
        "whiten": lambda held, matrix: held.rows.transform(matrix, lower=True),
        "diagonal": lambda held: fisher_inverse(held.rows, DAMPING, blocks=w.block).diagonal(),
        "static": static,
    }[operation]


def plain(operation: str, w: Workload) -> Program:
    """The program that a user writes in JAX without the library, on gradients, dots and slot."""

    def moved(state: State, gradients: jax.Array) -> State:
        return gradients, state[1], (state[2] + 1) % w.m

    def push(state: State, v: jax.Array) -> tuple[State, jax.Array]:
        gradients, row = alternatives.plain_push(state[0], state[2], v)
        return moved(state, gradients), row

    def two_products(state: State, v: jax.Array) -> tuple[State, Any]:
        dots = alternatives.plain_dots(state[0], v)
        return state, (dots, alternatives.plain_combine(state[0], dots))

    if w.block is not None:
        function = {
            "diagonal": alternatives.plain_block_diagonal,
            "static": alternatives.plain_block_static,
        }[operation]
        return lambda state: function(state[0], DAMPING, w.block)
    return {
        "dots": lambda state, v: alternatives.plain_dots(state[0], v),
        "push": push,
        "combine": lambda state, c: alternatives.plain_combine(state[0], c),
        "push + direction": two_products,
        "gram": lambda state: alternatives.plain_gram(state[0]),
        "whiten": lambda state, matrix: alternatives.plain_whiten(state[0], matrix),
        "diagonal": lambda state: alternatives.plain_diagonal(state[0], DAMPING),
        "static": lambda state: alternatives.plain_static(state[0], DAMPING),
    }[operation]


def sequential(operation: str, w: Workload) -> dict[str, Program]:
    """The paper's sequential recursions, for the operations that have one."""

    def push_direction(state: State, v: jax.Array) -> tuple[State, jax.Array]:
        gradients, dots, direction = alternatives.sequential_push_direction(*state, v, DAMPING)
        return (gradients, dots, (state[2] + 1) % w.m), direction

    if operation == "push + direction":
        return {"sequential": push_direction}
    if operation != "static":
        return {}
    if w.block is None:
        return {"sequential": lambda s: alternatives.sequential_static(s[0], DAMPING)}
    b = w.block
    return {
        "sequential": lambda s: alternatives.sequential_blocks(s[0], DAMPING, b),
        "block by block": lambda s: alternatives.sequential_block_by_block(s[0], DAMPING, b),
    }


def measure(
    w: Workload, data: Data, read_bandwidth: float, seconds: float
) -> Iterator[dict[str, Any]]:
    """Yields the record of each operation of a workload."""
    for operation in of(w):
        runs, cells = {}, {}
        for name, make in _contenders(operation, w, data, read_bandwidth):
            try:
                runs[name] = make()
            except (DoesNotFit, LeftOut) as reason:
                cells[name] = {"left_out": str(reason)}
        if runs:
            cells |= timing.interleave(runs, seconds)
        floor = workloads.floor(operation, w)
        yield {
            "workload": w.name,
            "operation": operation,
            "d": w.d,
            "m": w.m,
            "dtype": w.dtype,
            "block": w.block,
            "bytes": floor.bytes,
            "flops": floor.flops,
            "times": cells,
        }


def _contenders(
    operation: str, w: Workload, data: Data, read_bandwidth: float
) -> Iterator[tuple[str, Callable[[], timing.Run]]]:
    donates = operation.startswith("push")
    inputs = _inputs(operation, data)

    def of_library(name: str | None) -> timing.Run:
        program = _with_implementation(library(operation, w), name, donates)
        is_step = operation == "push + direction"
        states = OptimizerStates(data.windows) if is_step else data.windows
        try:
            return _runner(program, states, inputs, donates)
        except DoesNotFit:
            if not data.plain:
                raise
        data.drop_plain()  # the alternatives go first
        return _runner(program, states, inputs, donates)

    def of_plain(program: Program) -> timing.Run:
        data.make_plain()
        return _runner(program, data.plain, inputs, donates)

    def of_sequential(program: Program) -> timing.Run:
        if operation == "static":
            _require_time(w, read_bandwidth)
        return of_plain(program)

    def of_torch() -> timing.Run:
        if not HAS_TORCH:
            raise LeftOut("not installed")
        if operation == "static":
            _require_time(w, read_bandwidth)
        data.make_plain()
        return _torch_runner(operation, w, data)

    yield "library", lambda: of_library(None)
    if operation in SCANS and w.block is None:
        for name in workloads.implementations():
            yield f"library, {name}", lambda name=name: of_library(name)

    def of_plain_xla() -> timing.Run:
        data.make_plain()
        if jax.default_backend() == "cpu" and w.block is None:
            workloads.require(1.05 * w.nbytes * _HIDDEN_COPIES.get(operation, 0))
        return of_plain(plain(operation, w))

    yield "plain", of_plain_xla
    if w.dtype != "float32":
        return
    steps = sequential(operation, w)
    for name, program in steps.items():
        yield name, lambda program=program: of_sequential(program)
    if steps:
        yield "PyTorch", of_torch


def _inputs(operation: str, data: Data) -> Sequence[tuple[jax.Array, ...]]:
    if operation in ("dots", "push", "push + direction"):
        return [(vector,) for vector in data.vectors]
    if operation == "combine":
        return [(data.coefficients,)]
    if operation == "whiten":
        gram = data.windows[0].gram
        shift = jnp.asarray(data.workload.m * DAMPING, gram.dtype)
        return [(algebra.inverse_lower(algebra.factor(gram, shift)),)]
    return [()]


def _with_implementation(program: Program, name: str | None, donates: bool) -> Program:
    """The program with one implementation for the scans of the rows."""
    if name is None:
        return program

    def with_rows_by(state: State, implementation: str | None) -> State:
        return jax.tree.map(
            lambda x: dataclasses.replace(x, implementation=implementation) if _is_rows(x) else x,
            state,
            is_leaf=_is_rows,
        )

    def changed(state: State, *inputs: jax.Array) -> Any:
        out = program(with_rows_by(state, name), *inputs)
        if not donates:
            return out
        return with_rows_by(out[0], None), out[1]

    return changed


def _is_rows(x: Any) -> bool:
    return isinstance(x, rows.DenseRows)


def _runner(
    function: Program, states: list[State], inputs: Sequence[tuple[jax.Array, ...]], donates: bool
) -> timing.Run:
    donated = (0,) if donates else ()
    program = workloads.compile_program(function, (states[0], *inputs[0]), donated)
    return timing.in_turn(program, states, inputs, donates)


def _require_time(w: Workload, read_bandwidth: float) -> None:
    # Computing h_i reads the i earlier vectors twice.
    if w.m**2 * w.d * 4 / read_bandwidth > LONGEST:
        raise LeftOut(f"not run: more than {LONGEST:.0f} s")


def _torch_runner(operation: str, w: Workload, data: Data) -> timing.Run:
    import torch_recursions

    # The vectors h_i and their copies, in sizes that leave holes; for blocks, the padded gradients
    # cut into blocks.
    workloads.require(3 * 1.1 * w.nbytes * (operation == "static"))
    turn = itertools.count()
    dots = [torch_recursions.view(state[1]).clone() for state in data.plain]

    def run() -> None:
        i = next(turn)
        k = i % len(data.plain)
        gradients = torch_recursions.view(data.plain[k][0])
        if operation == "push + direction":
            vector = torch_recursions.view(data.vectors[i % len(data.vectors)])
            slot = i // len(data.plain) % w.m
            out = torch_recursions.push_direction(gradients, dots[k], slot, vector, DAMPING)
        elif w.block is None:
            out, _ = torch_recursions.static(gradients, DAMPING)
        else:
            out, _ = torch_recursions.blocks(gradients, DAMPING, w.block)
        torch_recursions.wait(out)

    return run
