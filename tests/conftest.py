"""JAX on the CPU; a rank that our own code promotes without saying so is an error."""

import os
import signal

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("parsimony", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("parsimony")
