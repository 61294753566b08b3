"""Weights alone, out of either kind of checkpoint."""

import json
from pathlib import Path

import jax
import numpy as np

from kernels.weight_only import Blocks
from research import config
from research.errors import RequestError
from research.interop import blocks, huggingface
from research.interop.variables import read_variables
from research.model.build import make_model, variable_shapes
from research.training.checkpoint import Checkpoints, differences
from research.tree import map_paths, paths


def read_settings(folder: Path) -> config.Settings:
    """Of a workdir or a Hugging Face folder."""
    return config.read(folder) if (folder / "checkpoints").is_dir() else huggingface.read_settings(folder)


def read_weights(folder: Path, stored: bool = False) -> tuple[config.Settings, dict]:
    """Settings and {`params`, `routing`} of a workdir (its newest intact checkpoint) or a Hugging Face folder.

    In float32, whatever they are stored in: FP8 blocks are dequantised, and a recipe that quantises finds the same
    bytes and scales again. stored: as they are stored, FP8 blocks as `Blocks`; of a folder nothing is read before it is
    asked for (variables.Stored).
    """
    settings = read_settings(folder)
    if not (folder / "checkpoints").is_dir():
        return settings, read_variables(folder, settings, stored)
    checkpoints = Checkpoints(folder / "checkpoints", settings.checkpoint.keep_last, settings.checkpoint.keep_best)
    step = checkpoints.newest_intact()
    if step is None:
        raise RequestError(f"{folder / 'checkpoints'} holds no intact checkpoint")
    return settings, _floats(checkpoints.restore_weights(step), stored)


def _floats(saved: dict, stored: bool) -> dict:
    """{`params`, `routing`} in float32, or as they are stored."""
    scales = {f"params/{path}": leaf for path, leaf in paths(saved.get("scales", {})).items()}

    def as_asked(path, leaf):
        if path in scales:
            block = np.asarray(leaf), np.asarray(scales[path])
            return Blocks(*block) if stored else blocks.dequantize(*block)
        return leaf if stored or leaf.dtype == np.float32 else np.asarray(leaf, np.float32)

    return map_paths(as_asked, {name: saved[name] for name in ("params", "routing")})


def weights_alone(folder: Path) -> bool:
    """Whether a folder holds weights and no run: a Hugging Face folder, or what research.convert made of one."""
    if not (folder / "checkpoints").is_dir():
        return huggingface.is_huggingface(folder)
    try:
        return "weights_of" in json.loads((folder / "checkpoints/0/record/metadata").read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def variables_of(saved: dict, model, settings) -> tuple[dict, str]:
    """{`params`, `routing`} of what was saved, and in one line how they differ from the model's (empty: not at all)."""
    variables, shapes = ({name: tree[name] for name in ("params", "routing")}
                         for tree in (saved, variable_shapes(model, settings)))
    return variables, differences(variables, shapes)


def checked_weights(folder: Path, stored: bool = False):
    """(settings, model, {`params`, `routing`}) of either kind of checkpoint, every array checked to be the model's.

    stored: see `read_weights`.
    """
    settings, saved = read_weights(folder, stored)
    if settings.model.vocab_size is None:
        raise RequestError(f"{folder / 'config.json'}: config.model.vocab_size=None must be a whole number")
    model = make_model(settings)
    variables = {name: saved[name] for name in ("params", "routing")}
    floats = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), variables,
                          is_leaf=lambda x: isinstance(x, Blocks))
    _, wrong = variables_of(floats, model, settings)
    if wrong:
        raise RequestError(f"{folder}: its checkpoint is not of the model in its config.json: {wrong}")
    return settings, model, variables


def initial_variables(model, settings) -> dict:
    """The weights of `checkpoint.initialize_from`, checked against the model that is to start from them.

    A head of the model's own begins as the embedding where the weights tie the two, as R1-Distill-Qwen-1.5B's did.
    """
    folder = Path(settings.checkpoint.initialize_from).expanduser()
    try:
        _, saved = read_weights(folder)
    except RequestError as error:
        raise RequestError.field("checkpoint.initialize_from", str(folder), f"cannot be used: {error}") from None
    if not settings.model.tie_word_embeddings and "lm_head" not in saved["params"]:
        head_DV = np.ascontiguousarray(np.asarray(saved["params"]["embed_tokens"]).T)
        saved = saved | {"params": saved["params"] | {"lm_head": head_DV}}
    variables, wrong = variables_of(saved, model, settings)
    if wrong:
        raise RequestError.field("checkpoint.initialize_from", str(folder), f"is of another model: {wrong}")
    return variables
