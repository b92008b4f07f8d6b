"""How XLA compiles in the tests."""

import os

import jax

# Nearly all the time of the suite is compilation, so XLA optimizes little.
CHEAP = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if jax.__version_info__ < (0, 11):  # XLA has no other way to emit fusions from there on
    CHEAP.append("--xla_cpu_use_fusion_emitters=false")

# What the user asks for. A worker finds what the process that started it has set.
GIVEN = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in CHEAP]


def as_users_compile() -> str:
    """``XLA_FLAGS`` without those of the tests."""
    return " ".join(GIVEN)


def cheap() -> str:
    """``XLA_FLAGS`` of the tests; where the user asks for something else, that holds."""
    return " ".join([*CHEAP, *GIVEN])
