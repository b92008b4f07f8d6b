"""Runs an operation by a kernel or by its plain form; the choice is made at lowering.

A traced program holds one primitive for each operation. When it is lowered for a platform, the
first backend of the platform that supports the operation replaces the primitive. Without such a
backend the plain form replaces it. Compilation therefore needs no device, and a program for a CPU
never imports Pallas.

JAX cannot look into a kernel, so three rules hold. Derivatives are those of the plain form.
``vmap`` runs the plain form, or, if a kernel is requested by name, the kernel once for each
element of the batch. If XLA itself spreads a program over devices, the plain form runs, because
XLA knows how to spread it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.interpreters import mlir
from jaxtyping import Array

from mfac_jax.kernels import backends


class _Call(NamedTuple):
    """One operation as a function of its arrays in order.

    Attributes:
        operation: the name of the operation, as backends know it.
        plain_form: the function that any platform runs.
        implementation: the name of the implementation to run; ``None`` for the best one on each
            platform.
        names: the names of the arrays; the gradients come first.
    """

    operation: str
    plain_form: Callable[..., Any]
    implementation: str | None
    names: tuple[str, ...]

    def plain(self, *values: Array) -> Any:
        return self.plain_form(**dict(zip(self.names, values, strict=True)))

    def kernel(self, backend: backends.Backend, *values: Array) -> Any:
        return backend.run(self.operation, dict(zip(self.names, values, strict=True)))


def run(
    operation: str,
    implementation: str | None,
    plain_form: Callable[..., Any],
    operands: Mapping[str, Array],
) -> Any:
    """Runs one operation.

    Args:
        operation: the name of the operation, as backends know it.
        implementation: the name of the implementation to run; ``None`` for the best one on each
            platform.
        plain_form: the function that any platform runs. It is a key of the cache of programs,
            so an operation always needs the same object.
        operands: the arrays of the operation by name; the gradients come first.

    Raises:
        ValueError: there is no such implementation, or it does not support such gradients.
        NotImplementedError: the program is lowered for a platform that the implementation does
            not support.
    """
    backends.check_implementation(implementation)
    call = _Call(operation, plain_form, implementation, tuple(operands))
    values = tuple(operands.values())
    if implementation == backends.PLAIN:
        return call.plain(*values)
    if implementation is not None:
        reason = _why_not(backends.named(implementation), call, jax.typeof(values[0]))
        if reason is not None:
            raise backends.cannot_run(implementation, reason)
    for platform in backends.platforms():
        _register_lowering(platform)
    return _traced(call, *values)


# Jitted for eager callers: the primitive then compiles once.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _traced(call: _Call, *values: Array) -> Any:
    """The primitive, with rules for ``vmap`` and differentiation."""

    @custom_vmap
    def choose(*values: Array) -> Any:
        plain, out = jax.make_jaxpr(call.plain, return_shape=True)(*values)
        return jax.tree.unflatten(
            jax.tree.structure(out), _operation_p.bind(*values, call=call, plain=plain)
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


_operation_p = jax.extend.core.Primitive("mfac_operation")
_operation_p.multiple_results = True


@functools.lru_cache(maxsize=256)
def _program(call: _Call, plain: Any) -> Callable[..., Any]:
    return jax.jit(functools.partial(_operation_p.bind, call=call, plain=plain))


@_operation_p.def_impl  # type: ignore[untyped-decorator]
def _(*values: Any, call: _Call, plain: Any) -> Any:
    # Runs if jit is off, or if a program runs operation by operation.
    with jax.disable_jit(False):
        return _program(call, plain)(*values)


@_operation_p.def_abstract_eval  # type: ignore[untyped-decorator]
def _(*_: Any, plain: Any, **__: Any) -> Any:
    return plain.out_avals


def _lowering(platform: str | None, ctx: Any, *values: Any, call: _Call, plain: Any) -> Any:
    """Lowers an operation for a platform with backends, or for any other platform (``None``)."""
    function = jax.extend.core.jaxpr_as_fun(plain)
    name = call.implementation
    if name is not None and backends.platform_of(name) != platform:
        compiled_for = ", ".join(ctx.platforms or ctx.module_context.platforms)
        raise NotImplementedError(
            f"implementation={name!r} needs {backends.named(name).needs}; this program is "
            f"compiled for {compiled_for}."
        )
    if name is not None:
        candidates = [backends.named(name)]
    else:
        candidates = [] if platform is None else backends.for_platform(platform)
    for backend in candidates:
        reason = _why_not(backend, call, ctx.avals_in[0])
        if reason is None and _is_spread_by_xla(ctx):
            reason = "XLA spreads this program over devices; call it inside jax.shard_map"
        if reason is None:
            function = functools.partial(call.kernel, backend)
            break
        if name is not None:
            raise NotImplementedError(f"implementation={name!r} cannot run: {reason}.")
    return mlir.lower_fun(
        lambda *arrays: jax.tree.leaves(function(*arrays)), multiple_results=True
    )(ctx, *values)


mlir.register_lowering(_operation_p, functools.partial(_lowering, None))


@functools.cache
def _register_lowering(platform: str) -> None:
    mlir.register_lowering(_operation_p, functools.partial(_lowering, platform), platform=platform)


def _why_not(backend: backends.Backend, call: _Call, block: Any) -> str | None:
    """Why a backend does not support this call; ``None`` if it does."""
    if any(part is not None for part in block.sharding.spec):
        return "the gradients are sharded over explicit mesh axes; call it inside jax.shard_map"
    return backends.why_not(backend, call.operation, block)


def _is_spread_by_xla(ctx: Any) -> bool:
    """Whether a program runs on several devices outside of ``shard_map``."""
    context = ctx.module_context.axis_context
    if hasattr(context, "manual_axes"):
        return set(context.manual_axes) != set(context.mesh.axis_names)
    return getattr(context, "num_devices", 1) not in (None, 1)
