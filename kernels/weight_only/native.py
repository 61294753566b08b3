"""The product in C++ (native.cc), on a CPU. The user's compiler makes it once; XLA calls it through its FFI.

The library is kept in FOLDER, under a name that holds what it depends on (the source, the compiler and the processor as
its macros tell them, jaxlib's version) and a digest of its bytes: one that is cut off or altered is made again.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib

from kernels.choice import platform
from kernels.weight_only.reference import Narrow

COMPILERS = ("c++", "g++", "clang++")
OPTIONS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")
SOURCE = Path(__file__).with_name("native.cc")
FOLDER = "~/.cache/parsimony/native"
_LOCK = threading.Lock()


def product(x_XD, w: Narrow):
    """See the reference. Needs that `refusal` is None; has no gradient."""
    G, F, _ = w.values_GFY.shape
    x_XD = jnp.pad(x_XD.astype(jnp.float32), ((0, 0), (0, G * w.group - w.inputs)))
    call = jax.ffi.ffi_call(_target(), jax.ShapeDtypeStruct((x_XD.shape[0], F), jnp.float32), vmap_method="sequential")
    return call(x_XD, w.values_GFY, w.scales_GF)


def refusal() -> str | None:
    """Why the C++ product cannot run; None when it can. The first call compiles it, in seconds, or loads it."""
    if platform() != "cpu":
        return f"it is for CPUs, the device is a {platform()}"
    with _LOCK:
        return _register()


@functools.cache
def _register() -> str | None:
    try:
        library = ctypes.CDLL(str(_library()))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"code {error.returncode}"]
        return f"{error.cmd[0]}: {next((line for line in lines if 'error' in line), lines[-1])}"
    except OSError as error:
        return str(error)
    jax.ffi.register_ffi_target(_target(), jax.ffi.pycapsule(library.Product), platform="cpu")
    return None


def _target() -> str:
    """The handler's name in compiled programs, which JAX may keep longer than this source."""
    return f"parsimony_weight_only_{_digest(SOURCE.read_bytes())}"


def _library() -> Path:
    """The compiled library. Raises OSError, CalledProcessError."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise OSError(f"none of {', '.join(COMPILERS)} is on PATH")
    macros = _run(compiler, *OPTIONS, "-x", "c++", "-dM", "-E", os.devnull)
    name = _digest("\n".join((SOURCE.read_text(), *OPTIONS, macros, jaxlib.__version__)).encode())
    folder = Path(FOLDER).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"{name}-*.so"):
        if path.stem == f"{name}-{_digest(path.read_bytes())}":
            return path
    with tempfile.TemporaryDirectory(dir=folder) as own:  # processes that compile at once do not meet
        made = Path(own) / "made.so"
        _run(compiler, *OPTIONS, "-isystem", jax.ffi.include_dir(), str(SOURCE), "-o", str(made))
        path = folder / f"{name}-{_digest(made.read_bytes())}.so"
        made.replace(path)
    return path


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
