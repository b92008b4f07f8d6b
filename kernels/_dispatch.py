"""Which implementation of a scan runs, chosen when a program is lowered for a platform.

A traced program holds one primitive a scan. Lowering it for a platform that has a kernel
gives the kernel, and the plain form elsewhere, so no device is needed, and a program for
a CPU never looks at Pallas. JAX cannot look into a kernel, hence three rules: derivatives
are those of the plain form; so is what ``vmap`` makes of a scan, unless a kernel is asked
for by name (then it runs once an element); and where XLA spreads a program over devices
by itself it gets the plain form, which it knows how to spread.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.interpreters import mlir
from jaxtyping import Array

# Entries below which a scan is plain XLA by default: 16 MiB of float32 stay in the second-level
# cache of a GPU from one step to the next, so there is no bandwidth to be gained. Not
# measured; for TPUs it is the same number for want of a better one.
MIN_ENTRIES = 2**22

# Compute capabilities, from and below, with the asynchronous copies and the 200 KiB of
# shared memory that the kernels use. Blackwell for workstations, 12.0, has half of that.
_CAPABILITIES = (9.0, 11.0)


_SCANS = ("dots", "write_row", "combine")
_BLOCKS = ("block_inverse_diagonal", "block_ihvp")


class _Backend(NamedTuple):
    """Kernels for one platform; ``modules`` says where those for an operation are."""

    platform: str
    needs: str
    modules: dict[str, str]


_BACKENDS = {
    "mosaic_gpu": _Backend(
        "cuda",
        "an NVIDIA GPU of compute capability 9 or 10, such as H100 or B200",
        dict.fromkeys(_SCANS, "_mosaic_gpu"),
    ),
    "mosaic_tpu": _Backend(
        "tpu", "a TPU", dict.fromkeys(_SCANS, "_tpu") | dict.fromkeys(_BLOCKS, "_tpu_blocks")
    ),
}
IMPLEMENTATIONS = ("xla", *_BACKENDS)


def check_implementation(implementation: Any) -> None:
    """``implementation`` is ``None`` or the name of one.

    Raises:
        ValueError: it is not.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        names = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"implementation must be None or one of {names}; got {implementation!r}.")


class _Call(NamedTuple):
    """One scan as a function of its arrays, in a row.

    Attributes:
        operation: the name of the function in every module of kernels.
        plain_form: the function that any platform runs.
        implementation: which one, by name; ``None`` for the best on each platform.
        names: of its arrays, the block first.
        static: its other arguments.
    """

    operation: str
    plain_form: Callable[..., Any]
    implementation: str | None
    names: tuple[str, ...]
    static: tuple[tuple[str, Any], ...]

    def plain(self, *values: Array) -> Any:
        operands = dict(zip(self.names, values, strict=True))
        return self.plain_form(**operands, **dict(self.static))

    def kernel(self, backend: _Backend, *values: Array) -> Any:
        """The kernel; those for scans know rows of one axis, and get rows of any shape."""
        operands = dict(zip(self.names, values, strict=True))
        function = getattr(_module(backend, self.operation), self.operation)
        if self.operation in _BLOCKS:
            return function(**operands, **dict(self.static))
        count, rows, *shape = operands["block"].shape
        size = math.prod(shape)
        matrices = {"block": (count, rows, size), "vector": (count, size), "mask": (count, size)}
        out = function(
            **{name: x.reshape(matrices.get(name, x.shape)) for name, x in operands.items()},
            **dict(self.static),
        )
        wide = {(count, rows, size): (count, rows, *shape), (count, size): (count, *shape)}
        return jax.tree.map(lambda part: part.reshape(wide.get(part.shape, part.shape)), out)


def run(
    operation: str,
    implementation: str | None,
    plain_form: Callable[..., Any],
    operands: dict[str, Array | None],
    **static: Any,
) -> Any:
    """Runs one scan.

    Args:
        operation: the name of the function in every module of kernels.
        implementation: which one, by name; ``None`` for the best on each platform.
        plain_form: the function that any platform runs; one object for each operation,
            since programs are cached by it.
        operands: its arrays by name, the block first; ``None`` for one left out.
        static: its other arguments.

    Raises:
        ValueError: there is no such implementation, or it cannot work on such a block.
        NotImplementedError: the program is lowered for a platform that it is not for.
    """
    check_implementation(implementation)
    given = {name: value for name, value in operands.items() if value is not None}
    call = _Call(operation, plain_form, implementation, tuple(given), tuple(static.items()))
    block = given["block"]
    is_small = operation in _SCANS and block.size < MIN_ENTRIES
    if implementation == "xla" or (implementation is None and is_small):
        return call.plain(*given.values())
    if implementation is not None:
        reason = _why_not(_BACKENDS[implementation], call, jax.typeof(block))
        if reason is not None:
            raise ValueError(f"implementation={implementation!r} cannot run: {reason}.")
    return _traced(call, *given.values())


# Jitted for callers that are not: what is bound here is compiled once.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _traced(call: _Call, *values: Array) -> Any:
    """The primitive, with rules for ``vmap`` and differentiation."""

    @custom_vmap
    def choose(*values: Array) -> Any:
        plain, out = jax.make_jaxpr(call.plain, return_shape=True)(*values)
        return jax.tree.unflatten(
            jax.tree.structure(out), _scan_p.bind(*values, call=call, plain=plain)
        )

    @choose.def_vmap
    def _(size: int, is_batched: Any, *values: Array) -> tuple[Any, Any]:
        if call.implementation is None:
            out = jax.vmap(call.plain, [0 if b else None for b in is_batched])(*values)
        else:

            def element(i: Array) -> Any:
                picked = [v[i] if b else v for v, b in zip(values, is_batched, strict=True)]
                return choose(*picked)

            out = lax.map(element, jnp.arange(size))
        return out, jax.tree.map(lambda _: True, out)

    differentiable = jax.custom_jvp(choose)
    differentiable.defjvp(
        lambda primals, tangents: (
            differentiable(*primals),
            jax.jvp(call.plain, primals, tangents)[1],
        )
    )
    return differentiable(*values)


_scan_p = jax.extend.core.Primitive("mfac_scan")
_scan_p.multiple_results = True


@functools.lru_cache(maxsize=256)
def _program(call: _Call, plain: Any) -> Callable[..., Any]:
    return jax.jit(functools.partial(_scan_p.bind, call=call, plain=plain))


@_scan_p.def_impl  # type: ignore[untyped-decorator]
def _(*values: Any, call: _Call, plain: Any) -> Any:
    # Where jit is off, or a program is run operation by operation.
    with jax.disable_jit(False):
        return _program(call, plain)(*values)


@_scan_p.def_abstract_eval  # type: ignore[untyped-decorator]
def _(*_: Any, plain: Any, **__: Any) -> Any:
    return plain.out_avals


def _lowering(backend: _Backend | None, ctx: Any, *values: Any, call: _Call, plain: Any) -> Any:
    """Lowers a scan for the platform of ``backend``, or for one that has no kernels."""
    wanted = None if call.implementation is None else _BACKENDS[call.implementation]
    function = jax.extend.core.jaxpr_as_fun(plain)
    if wanted in (None, backend) and backend is not None:
        reason = _why_not(backend, call, ctx.avals_in[0])
        if reason is None and _is_spread_by_xla(ctx):
            reason = "XLA spreads this program over devices; call it inside jax.shard_map"
        if reason is None:
            function = functools.partial(call.kernel, backend)
        elif wanted is not None:
            raise NotImplementedError(
                f"implementation={call.implementation!r} cannot run: {reason}."
            )
    elif wanted is not None:
        platforms = ", ".join(ctx.platforms or ctx.module_context.platforms)
        raise NotImplementedError(
            f"implementation={call.implementation!r} needs {wanted.needs}; this program is "
            f"compiled for {platforms}."
        )
    return mlir.lower_fun(
        lambda *arrays: jax.tree.leaves(function(*arrays)), multiple_results=True
    )(ctx, *values)


mlir.register_lowering(_scan_p, functools.partial(_lowering, None))
for _backend in _BACKENDS.values():
    mlir.register_lowering(
        _scan_p, functools.partial(_lowering, _backend), platform=_backend.platform
    )


def _module(backend: _Backend, operation: str) -> Any:
    """Imported on first use: a program for a CPU needs none of Pallas."""
    return importlib.import_module(f"mfac_jax.kernels.{backend.modules[operation]}")


def _why_not(backend: _Backend, call: _Call, block: Any) -> str | None:
    """Why a backend cannot work on a block of this type, or ``None`` if it can."""
    if call.operation not in backend.modules:
        return f"it has no kernel for {call.operation}"
    if any(part is not None for part in block.sharding.spec):
        return "the gradients are sharded over explicit mesh axes; call it inside jax.shard_map"
    if backend.platform == "cuda":
        try:
            found = [float(d.compute_capability) for d in jax.local_devices(backend="cuda")]
        except RuntimeError:  # None is attached: compiled for one that has what it takes.
            found = []
        for capability in found:
            if not _CAPABILITIES[0] <= capability < _CAPABILITIES[1]:
                return f"it needs {backend.needs}, got compute capability {capability}"
    module, shape = _module(backend, call.operation), block.shape
    if call.operation in _BLOCKS:
        return module.unsupported_blocks(shape, block.dtype, dict(call.static)["size"])
    if backend.platform == "cuda":  # where the axes of a parameter are one in memory
        shape = (*shape[:2], math.prod(shape[2:]))
    return module.unsupported(shape, block.dtype)


def _is_spread_by_xla(ctx: Any) -> bool:
    """Whether a program is for several devices outside of ``shard_map``."""
    context = ctx.module_context.axis_context
    if hasattr(context, "manual_axes"):
        return set(context.manual_axes) != set(context.mesh.axis_names)
    return getattr(context, "num_devices", 1) not in (None, 1)
