"""What is compiled ahead of time is compiled as on the device."""

import os

import xla_flags

os.environ["XLA_FLAGS"] = xla_flags.as_users_compile()
