"""JAX on the CPU; a rank that our own code promotes without saying so is an error."""

import gc
import os
import signal

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# An interpreted warpgroup that waits may hold a thread of XLA's pool: in a pool of two all may wait, for ever.
os.environ.setdefault("PJRT_NPROC", "16")

# Programs here run once and are small: what counts is how long they take to compile.
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
                           " --xla_cpu_parallel_codegen_split_count=1")
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # its threads wait by spinning, and the other worker has that processor

import hypothesis
import jax

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("parsimony", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("parsimony")
gc.set_threshold(100_000, 20, 100)  # tracing makes many objects and few cycles
