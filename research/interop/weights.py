"""Weights alone, out of either kind of checkpoint."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from research import config, experiment
from research.errors import RequestError
from research.interop import blocks, huggingface, storage
from research.interop.names import SCALE, in_blocks, scales_path
from research.interop.tensors import DTYPES, FP8
from research.interop.variables import (
    NOT_FINITE,
    Array,
    Stored,
    arrays_of,
    read_whole,
    refuse,
    stored_variables,
    tree_of,
)
from research.model.build import make_model, variable_shapes
from research.parallel import hosts
from research.parallel.mesh import make_mesh
from research.parallel.rules import shardings
from research.precision.recipe import RECIPES
from research.training.checkpoint import Checkpoints, differences, saved_tree, weights_of
from research.tree import map_paths, paths


def read_settings(folder: Path) -> config.Settings:
    """Of a workdir or a Hugging Face folder."""
    return config.read(folder) if (folder / "checkpoints").is_dir() else huggingface.read_settings(folder)


def read_weights(folder: Path, stored: bool = False) -> tuple[config.Settings, dict]:
    """Settings and {`params`, `routing`} of a workdir (its newest intact checkpoint) or a Hugging Face folder.

    In float32, whatever they are stored in: FP8 blocks are dequantised, and a recipe that quantises finds the same
    bytes and scales again. stored: of a folder, or what a conversion made of one, nothing is read before it is asked
    for (variables.Stored), and it comes as it is stored, FP8 blocks as `Blocks`.
    """
    settings = read_settings(folder)
    checkpoints, step = _newest(folder, settings)
    if not weights_alone(folder):
        return settings, checkpoints.restore_weights(step)
    found = _stored(folder, settings, step)
    return settings, found if stored else read_whole(folder, found)


def weights_for(model, settings, folder: Path, untie: bool = False) -> tuple[dict, str]:
    """{`params`, `routing`} of either kind of checkpoint in float32, and in one line how they differ from the model's
    (empty: not at all).

    Over a mesh each array lies as the rules say, and each process reads what its own devices hold of it: no host has
    the whole. untie: a model's own head begins as the embedding where the weights tie the two.
    """
    shapes = variable_shapes(model, settings)
    mesh, wanted = model.products.mesh, {name: dict(shapes[name]) for name in ("params", "routing")}
    theirs, alone = read_settings(folder), weights_alone(folder)
    checkpoints, step = _newest(folder, theirs)
    with hosts.refused_alike():
        found = _stored(folder, theirs, step) if alone else checkpoints.weights(step)
    untie = untie and "lm_head" in wanted["params"] and "lm_head" not in found["params"]
    over, head = None if mesh is None else shardings(mesh, wanted).state, None
    if untie:
        del wanted["params"]["lm_head"]
        head = over and over["params"].pop("lm_head")
    floats = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), found)
    if wrong := differences(floats, wanted):
        return {}, wrong
    if not alone:
        variables = checkpoints.restore_weights(step, over)
    else:
        variables = read_whole(folder, found) if mesh is None else _split(folder, found, over)
    if untie:
        variables["params"]["lm_head"] = jax.jit(jnp.transpose, out_shardings=head)(variables["params"]["embed_tokens"])
    return variables, ""


def _split(folder: Path, stored: dict, over: dict) -> dict:
    """`Stored` arrays in float32 as `over` lays them out; RequestError on all processes for what any does not read."""
    places, infinite = paths(over), []
    with hosts.refused_alike():
        variables = map_paths(lambda path, array: array.split(places[path], infinite), stored)
    refuse(folder, {NOT_FINITE: sorted({name for names in hosts.from_all(infinite) for name in names})})
    return variables


def _stored(folder: Path, settings, step: int | None) -> dict:
    """{`params`, `routing`} as `Stored` arrays of a Hugging Face folder, or of what research.convert made of one."""
    if step is None:
        return stored_variables(folder, settings)
    path, arrays = folder / "checkpoints" / str(step), arrays_of(settings)
    dtypes, state = stored_dtypes(folder, saved_tree(path), arrays), path / "state"
    tensors = {place.name + ending: way.tensor(state, place.index) for path, array in arrays.items()
               for ending, way in zip(("", SCALE), storage.stored(array, dtypes[path]), strict=True) if way
               for place in array.places}
    return tree_of({path: Stored(folder, array, tensors) for path, array in arrays.items()})


def stored_dtypes(source: Path, saved: dict, arrays: dict[str, Array]) -> dict[str, str]:
    """{path: dtype} of a checkpoint's weights, checked to be the model's arrays, and the scales of those in FP8."""
    weights = weights_of(saved)
    scales = paths(saved.get("scales", {}))
    expected = {path: array.shape for path, array in arrays.items()}
    found = {path: tuple(leaf.shape) for path, leaf in paths(weights).items()}
    dtypes = {path: np.dtype(leaf.dtype) for path, leaf in paths(weights).items()}
    narrow = [path for path, dtype in dtypes.items() if dtype == DTYPES[FP8]]
    expected |= {scales_path(path): blocks.scale_shape(found[path]) for path in narrow}
    found |= {f"scales/{path}": tuple(leaf.shape) for path, leaf in scales.items()}
    refuse(source, {
        "missing": sorted(expected.keys() - found.keys()),
        "left over": sorted(found.keys() - expected.keys()),
        "of another shape": [f"{path} is {list(found[path])} and must be {list(expected[path])}"
                             for path in sorted(expected.keys() & found.keys()) if found[path] != expected[path]],
        "of a dtype that is not read": [f"{path} is {dtype}" for path, dtype in sorted(dtypes.items())
                                        if dtype not in DTYPES.values() or (path in narrow and not in_blocks(path))],
    })
    return {path: next(word for word, known in DTYPES.items() if known == dtype) for path, dtype in dtypes.items()}


def _newest(folder: Path, settings) -> tuple[Checkpoints, int] | tuple[None, None]:
    """A workdir's checkpoints, and the newest step that is intact, of several processes as the first says; of a Hugging
    Face folder None."""
    if not (folder / "checkpoints").is_dir():
        return None, None
    checkpoints = Checkpoints(folder / "checkpoints", settings.checkpoint.keep_last, settings.checkpoint.keep_best)
    step = checkpoints.agreed()
    if step is None:
        raise RequestError(f"{folder / 'checkpoints'} holds no intact checkpoint")
    return checkpoints, step


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
    floats = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), variables)
    _, wrong = variables_of(floats, model, settings)
    if wrong:
        raise RequestError(f"{folder}: its checkpoint is not of the model in its config.json: {wrong}")
    return settings, model, variables


def weights_over(folder: Path, fields, check) -> tuple:
    """As `checked_weights`, over the mesh that `mesh.axis=size` of `fields` say: nothing of it is trained, so that
    what a mesh asks of training is not asked. check: (the config's `model`, its `mesh`), before anything is read."""
    chosen = experiment.change(read_settings(folder).to_config(), fields)
    for axis, size in chosen.mesh.items():
        if size < 1:
            raise RequestError.field(f"mesh.{axis}", size, "must be at least 1")
    check(chosen.model, chosen.mesh)
    shards = chosen.mesh.data * chosen.mesh.fsdp * chosen.mesh.expert
    chosen.training.update(batch_size=shards, batch_ramp_start=0, accumulation_steps=1, pipeline_schedule="1f1b")
    chosen.evaluation.update(batch_size=shards, redundant_experts=0, expert_nodes=1)
    chosen.precision.recipe = RECIPES[chosen.precision.recipe].activations
    settings = config.check(chosen)
    model = make_model(settings, make_mesh(settings))
    variables, wrong = weights_for(model, settings, folder)
    if wrong:
        raise RequestError(f"{folder}: its checkpoint is not of the model in its config.json: {wrong}")
    return settings, model, variables


def initial_variables(model, settings) -> dict:
    """The weights of `checkpoint.initialize_from`, checked against the model that is to start from them.

    A head of the model's own begins as the embedding where the weights tie the two, as R1-Distill-Qwen-1.5B's did.
    """
    folder = Path(settings.checkpoint.initialize_from).expanduser()
    try:
        variables, wrong = weights_for(model, settings, folder, untie=True)
    except RequestError as error:
        raise RequestError.field("checkpoint.initialize_from", str(folder), f"cannot be used: {error}") from None
    if wrong:
        raise RequestError.field("checkpoint.initialize_from", str(folder), f"is of another model: {wrong}")
    return variables
