"""What a result depends on besides its config: versions, device, commit, and how fast the machine multiplies."""

import contextlib
import ctypes
import gc
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp

from kernels.choice import Unavailable
from research.errors import RequestError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")


def describe() -> dict:
    """Versions, device and commit; `commit` ends in `+` when files differ from it, and is None without git."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "device": f"{device.platform} {device.device_kind}",
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "processor": _processor(),
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit of this code."""
    def git(*arguments):
        return subprocess.run(("git", *arguments), cwd=Path(__file__).parent, capture_output=True, text=True)

    try:
        head = git("rev-parse", "HEAD")
        if head.returncode:
            return None
        return head.stdout.strip() + ("+" if git("status", "--porcelain").stdout.strip() else "")
    except OSError:
        return None


@contextlib.contextmanager
def runnable():
    """An implementation that the config names and this device cannot run, as an error of its field."""
    try:
        yield
    except Unavailable as error:
        name = "model.attention_implementation" if error.operation == "attention" else "precision.implementation"
        raise RequestError.field(name, error.implementation, f"cannot run: {error.operation}: {error.reason}") from None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def matmul_peak(size: int | None = None) -> float:
    """FLOP/s of this device's best matrix product: float32 on a CPU, bfloat16 elsewhere; the best of several."""
    cpu = jax.default_backend() == "cpu"
    size = size or (1024 if cpu else 8192)
    a = jnp.ones((size, size), jnp.float32 if cpu else jnp.bfloat16)
    product = jax.jit(jnp.dot).lower(a, a).compile()
    product(a, a).block_until_ready()
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def give_back_memory() -> None:
    """Returns freed memory to the system: what loading and compiling leave behind (glibc; elsewhere nothing happens).

    Measured at 1.8B parameters in 8 bits: 2.56 GB resident after compilation, 2.21 then.
    """
    gc.collect()  # what was traced with is held in cycles
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def compute_in_this_thread() -> None:
    """A program on one CPU device runs in the thread that calls it, to its end; before any device is known.

    Its buffers, hundreds of MB a step, then lie in the main thread's heap, which with `command.KEPT_PAGES` keeps its
    pages. Other threads' heaps cannot: they end at 64 MB, and what is larger is mapped, and its pages cleared, anew in
    every step. One heap for all of them kept pages too, but they waited for its lock, longer after a compilation.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def pin_threads() -> None:
    """Gives each of XLA's compute threads a processor of its own, among those the process may use (Linux).

    They sleep and wake thousands of times a step, and the kernel's guess may leave all of them on one processor for
    minutes: measured on two cores, 1,080 ms a step instead of 540.
    """
    tasks = Path("/proc/self/task")
    if not (hasattr(os, "sched_setaffinity") and tasks.is_dir()):
        return
    processors = sorted(os.sched_getaffinity(0))
    number = 0
    for task in sorted(tasks.iterdir(), key=lambda path: int(path.name)):
        try:
            if (task / "comm").read_text().startswith("tf_XLAEigen"):
                os.sched_setaffinity(int(task.name), {processors[number % len(processors)]})
                number += 1
        except OSError:  # the thread has ended, or the system does not allow it
            continue
