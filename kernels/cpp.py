"""Operations in C++ on a CPU: the user's compiler makes each once, and XLA calls it through its FFI.

A source file holds one handler, `Handler`, and includes cpp.h, of ours nothing else. Its library is kept in FOLDER,
under a name that holds what it depends on (both texts, the compiler and the processor as its macros tell them, jaxlib's
version) and a digest of its bytes: one that is cut off or altered is made again.
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
import jaxlib

from kernels.choice import platform, say_once

COMPILERS = ("c++", "g++", "clang++")
OPTIONS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")
HEADER = Path(__file__).with_name("cpp.h")
FOLDER = "~/.cache/parsimony/native"
_LOCK = threading.Lock()


def refusal(source: Path) -> str | None:
    """Why the operation cannot run; None when it can. The first call compiles it, in seconds, or loads it."""
    if platform() != "cpu":
        return f"it is for CPUs, the device is a {platform()}"
    with _LOCK:
        return _register(source)


def available(source: Path) -> bool:
    """Whether the operation can run; where a CPU lacks it this is said once."""
    reason = refusal(source)
    if reason and platform() == "cpu":
        say_once(f"{source.parent.name}: plain XLA instead of C++: {reason}")
    return reason is None


def call(source: Path, result: jax.ShapeDtypeStruct, *operands, **attributes):
    """The operation, where `refusal` is None; it has no gradient, and under `vmap` is called one by one.

    attributes: NumPy scalars, which the handler gets as its own.
    """
    return jax.ffi.ffi_call(_target(source), result, vmap_method="sequential")(*operands, **attributes)


def or_batched(single, batched, *operands):
    """single(*operands); under `vmap` that of batched, of which many at once are one operation of XLA's."""
    chosen = jax.custom_batching.custom_vmap(single)

    @chosen.def_vmap
    def _(axis_size, in_batched, *operands):
        return jax.vmap(batched, [0 if each else None for each in in_batched], axis_size=axis_size)(*operands), True

    return chosen(*operands)


@functools.cache
def _register(source: Path) -> str | None:
    try:
        handler = ctypes.CDLL(str(compiled(source))).Handler
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"code {error.returncode}"]
        return f"{error.cmd[0]}: {next((line for line in lines if 'error' in line), lines[-1])}"
    except (OSError, RuntimeError, AttributeError) as error:  # no home; a library of something else
        return str(error)
    jax.ffi.register_ffi_target(_target(source), jax.ffi.pycapsule(handler), platform="cpu")
    return None


@functools.cache
def _target(source: Path) -> str:
    """The handler's name in compiled programs, which JAX may keep longer than this source."""
    return f"parsimony_{source.parent.name}_{_digest(_text(source).encode())}"


def _text(source: Path) -> str:
    return HEADER.read_text() + source.read_text()


def compiled(source: Path) -> Path:
    """The compiled library. Raises OSError, CalledProcessError."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise OSError(f"none of {', '.join(COMPILERS)} is on PATH")
    macros = _run(compiler, *OPTIONS, "-x", "c++", "-dM", "-E", os.devnull)
    name = _digest("\n".join((_text(source), *OPTIONS, macros, jaxlib.__version__)).encode())
    folder = Path(FOLDER).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"{name}-*.so"):
        if path.stem == f"{name}-{_digest(path.read_bytes())}":
            return path
    with tempfile.TemporaryDirectory(dir=folder) as own:  # processes that compile at once do not meet
        made = Path(own) / "made.so"
        _run(compiler, *OPTIONS, "-isystem", jax.ffi.include_dir(), f"-I{HEADER.parent}", str(source), "-o", str(made))
        path = folder / f"{name}-{_digest(made.read_bytes())}.so"
        made.replace(path)
    return path


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=True).stdout


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
