"""JAX on the CPU; a rank that our own code promotes without saying so is an error."""

import os
import signal

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# An interpreted warpgroup that waits may hold a thread of XLA's pool: in a pool of two all may wait, for ever.
os.environ.setdefault("PJRT_NPROC", "16")

import hypothesis
import jax

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("parsimony", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("parsimony")
