"""JAX on the CPU; a rank that our own code promotes without saying so is an error."""

import gc
import os
import signal

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# An interpreted warpgroup that waits may hold a thread of XLA's pool: in a pool of two all may wait, for ever.
os.environ.setdefault("PJRT_NPROC", "16")

# Programs here run once and are small: what counts is how long they take to compile. Of that, fusions through MLIR are
# a quarter: XLA's older way to LLVM gives the same values (a run outside the tests compiles the newer one). A sixth is
# the verifier, which reads the whole program again after each pass that has changed it.
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
                           " --xla_cpu_parallel_codegen_split_count=1 --xla_disable_hlo_passes=hlo-verifier"
                           " --xla_backend_extra_options="
                           "xla_cpu_disable_new_fusion_emitters,xla_cpu_optimize_for_size,"
                           "xla_cpu_disable_loop_unrolling,xla_cpu_disable_slp_vectorizer")
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # nobody reads of an operation which line has asked for it
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # its threads wait by spinning, and the other worker has that processor

import hypothesis
import jax

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("parsimony", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("parsimony")
gc.set_threshold(100_000, 20, 100)  # tracing makes many objects and few cycles


def pytest_runtest_teardown():
    """What outlives a test (traced and compiled functions, most of it) is not looked through again by the collector."""
    gc.collect()
    gc.freeze()
