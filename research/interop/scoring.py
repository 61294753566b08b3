"""Logits of a checkpoint, ours or Hugging Face's, for the token ids of a file, into a file."""

import os
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from research import config
from research.environment import runnable
from research.errors import RequestError, RunError
from research.interop.weights import checked_weights
from research.model.build import make_model
from research.precision.recipe import RECIPES

LOGITS_AT_ONCE = 2**26  # of one call of the model: 256 MiB in float32


def score(checkpoint: Path, tokens: Path, output: Path, recipe: str | None = None) -> None:
    """Writes the logits of the token ids in `tokens` to `output`, whole or not at all.

    recipe: None is float32 for a Hugging Face folder and the run's own for a workdir. Raises RequestError for
    whatever is wrong with the request, before anything is compiled.
    """
    if recipe is not None and recipe not in RECIPES:
        raise RequestError(f"--recipe={recipe!r} must be one of {', '.join(RECIPES)}{config.nearest(recipe, RECIPES)}")
    input_ids_BT = read_tokens(tokens)
    with _Output(output) as file, runnable():
        settings, _, variables = checked_weights(checkpoint)
        if recipe is not None:
            settings = replace(settings, precision=FrozenConfigDict({**settings.precision, "recipe": recipe}))
        check_tokens(tokens, input_ids_BT, settings)
        np.savez(file, **logits(settings, variables, input_ids_BT))


def read_tokens(path: Path) -> np.ndarray:
    """`input_ids` (B, T) of an .npz file; nothing is unpickled."""
    try:
        if not path.is_file():
            raise RequestError(f"--tokens={str(path)!r} " + ("is not a file" if path.exists() else "does not exist"))
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise RequestError(f"--tokens={str(path)!r} is an .npy array, not an .npz with input_ids")
        with archive:
            if "input_ids" not in archive.files:
                raise RequestError(f"--tokens={str(path)!r} lacks input_ids; it holds "
                                   f"{', '.join(map(repr, archive.files)) or 'nothing'}")
            input_ids_BT = archive["input_ids"]
    except RequestError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy's header parser each fail in ways of their own
        why = " ".join(str(error).split()) or type(error).__name__
        why = why if zipfile.is_zipfile(path) else "it is no zip archive"
        raise RequestError(f"--tokens={str(path)!r} cannot be read as an .npz of plain arrays: {why}") from None
    if not isinstance(input_ids_BT, np.ndarray) or input_ids_BT.dtype.kind not in "iu":
        kind = getattr(input_ids_BT, "dtype", "raw bytes")
        raise RequestError(f"--tokens={str(path)!r}: input_ids must be whole numbers, not {kind}")
    if input_ids_BT.ndim != 2 or 0 in input_ids_BT.shape:
        raise RequestError(f"--tokens={str(path)!r}: input_ids has the shape {input_ids_BT.shape} and must be (B, T), "
                           "both at least 1")
    return input_ids_BT


def check_tokens(path: Path, input_ids_BT: np.ndarray, settings) -> None:
    """Refuses ids outside the model's vocabulary and rows beyond its positions."""
    size, length = settings.model.vocab_size, settings.model.max_position_embeddings
    wrong = np.argwhere((input_ids_BT < 0) | (input_ids_BT >= size))
    if len(wrong):
        row, column = map(int, wrong[0])
        raise RequestError(f"--tokens={str(path)!r}: input_ids[{row}, {column}]={input_ids_BT[row, column]} must be "
                           f"from 0 to {size - 1}, the model's vocabulary")
    if input_ids_BT.shape[1] > length:
        raise RequestError(f"--tokens={str(path)!r}: rows of {input_ids_BT.shape[1]} tokens must be at most "
                           f"max_position_embeddings={length}")


def logits(settings, variables, input_ids_BT: np.ndarray) -> dict[str, np.ndarray]:
    """`logits` (B, T, V) and, where the model has them, `mtp_logits` (M, B, T-1, V), float32.

    Rows go through one compiled shape, as many at a time as LOGITS_AT_ONCE allows.
    """
    B, T = input_ids_BT.shape
    V, M = settings.model.vocab_size, settings.mtp.num_nextn_predict_layers
    rows = max(1, min(B, LOGITS_AT_ONCE // (T * V * (1 + M))))
    model = make_model(settings)
    segments, positions = jnp.ones((rows, T), jnp.int32), jnp.tile(jnp.arange(T, dtype=jnp.int32), (rows, 1))

    try:
        result = {"logits": np.empty((B, T, V), np.float32)}
        if M:
            result["mtp_logits"] = np.full((M, B, T - 1, V), np.nan, np.float32)
    except MemoryError:
        raise RequestError(f"the logits of {B} rows of {T} tokens over {V} ids do not fit in memory: score fewer "
                           "rows at a time") from None
    variables = jax.device_put(variables)
    for start in range(0, B, rows):
        taken = min(rows, B - start)
        padded = np.zeros((rows, T), np.int32)
        padded[:taken] = input_ids_BT[start:start + taken]
        main, further = _forward(model, variables, padded, segments, positions)
        result["logits"][start:start + taken] = main[:taken]
        for depth, predicted in enumerate(further, start=1):
            known = max(T - depth, 0)
            result["mtp_logits"][depth - 1, start:start + taken, :known] = predicted[:taken, :known]
    return result


@partial(jax.jit, static_argnums=0)
def _forward(model, variables, tokens_BT, segments_BT, positions_BT):
    logits_BTV, out = model.apply(variables, tokens_BT, segments_BT, positions_BT)
    return logits_BTV, out["mtp_logits"]


class _Output:
    """A file that appears under its name when the block ends without an error, and not at all otherwise."""

    def __init__(self, path: Path):
        self.path, self.partial = path, path.with_name(f".{path.name}.{os.getpid()}.partial")

    def __enter__(self):
        if self.path.exists() and not self.path.is_file():
            raise RequestError(f"--output={str(self.path)!r} exists and is not a file")
        try:
            self.file = self.partial.open("xb")
        except OSError as error:
            raise RequestError(f"--output={str(self.path)!r} cannot be written: {error.strerror}") from None
        return self.file

    def __exit__(self, kind, error, _):
        try:
            self.file.close()
            if kind is None:
                os.replace(self.partial, self.path)
        except OSError as failure:
            error = error or failure
        self.partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise RunError(f"writing {self.path} failed: {error.strerror}; it is left as it was") from None
