"""The mesh of a run: which devices, under which axes; what it refuses, with the numbers."""

import math

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from kernels.choice import H200, platform
from research.errors import RequestError
from research.model.build import make_model, variable_shapes
from research.parallel import hosts, pipeline
from research.parallel.rules import AXES, BATCH, check_shapes
from research.precision.recipe import RECIPES
from research.tree import paths

# Auto: the compiler spreads the rules' shardings; explicit axes, the default of make_mesh, refuse code like ours
TYPES = (AxisType.Auto,) * len(AXES)


def make_mesh(settings, devices=None) -> Mesh | None:
    """The mesh of `settings.mesh` over the first of `devices` (None: all that are present); None for a mesh of one.

    Without a mesh everything is as it is on one device: no array is placed and no collective compiled. RequestError
    names what does not fit.
    """
    sizes, devices = _sizes(settings), devices or jax.devices()
    needed = math.prod(sizes.values())
    _check_all_used(sizes, devices)
    if needed == 1:
        return None
    check(settings)
    _check_widths(settings)
    check_devices(settings, devices)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=TYPES, devices=devices[:needed])


def check_devices(settings, devices) -> None:
    """RequestError where the mesh takes more than these, or, of several processes, fewer."""
    sizes = _sizes(settings)
    needed = math.prod(sizes.values())
    _check_all_used(sizes, devices)
    if needed > len(devices):
        raise RequestError(f"config.{_product(sizes)} needs {needed} devices: {len(devices)} {devices[0].platform} "
                           f"device{'s are' if len(devices) > 1 else ' is'} present")


def _check_all_used(sizes: dict[str, int], devices) -> None:
    needed = math.prod(sizes.values())
    if hosts.several() and needed != len(devices):
        raise RequestError(f"config.{_product(sizes)} takes {needed} device{'s' if needed > 1 else ''}: several "
                           f"processes use all they have, {len(devices)} {devices[0].platform} devices")


def abstract_mesh(settings) -> AbstractMesh | None:
    """The mesh of `settings.mesh` over as many H200 as it takes, which are nowhere: to trace and lower a program for
    them. None and RequestError as from `make_mesh`."""
    sizes = _sizes(settings)
    if math.prod(sizes.values()) == 1:
        return None
    check(settings)
    _check_widths(settings)
    return AbstractMesh(tuple(sizes.values()), AXES, axis_types=TYPES, abstract_device=H200)


def compiler_options(mesh: Mesh | None) -> dict | None:
    """For `jax.jit` of a step over this mesh: on GPUs XLA's scheduler lets exchanges, those of gradients among them, go
    on beside computation; by default nearly all wait, and are waited for."""
    return {"xla_gpu_enable_latency_hiding_scheduler": True} if mesh and platform() == "gpu" else None


def _sizes(settings) -> dict[str, int]:
    """{axis: its size}."""
    return {axis: settings.mesh[axis] for axis in AXES}


def _product(sizes: dict[str, int]) -> str:
    return " * ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size > 1) or "mesh.data=1"


def check(settings) -> None:
    """RequestError for what the program over a mesh cannot do, whatever the devices and the widths."""
    sizes = _sizes(settings)
    if math.prod(sizes.values()) == 1:
        return
    pipeline.check(settings)
    recipe = RECIPES[settings.precision.recipe]
    if recipe.quantized and recipe.forward.left.tile is None:
        raise RequestError.field("precision.recipe", recipe.name, "has one scale a tensor, whose parts lie on "
                                 f"{math.prod(sizes.values())} devices: a mesh needs a recipe of tiles, or of floats")
    if recipe.quantized and sizes["tensor"] > 1:
        raise RequestError.field("mesh.tensor", sizes["tensor"],
                                 f"must be 1 under {recipe.name}: devices share no tile")
    shards, rows = math.prod(sizes[axis] for axis in BATCH), settings.evaluation.batch_size
    if rows % shards:
        raise RequestError.field("evaluation.batch_size", rows,
                                 f"must be a multiple of {shards} = mesh.data * mesh.fsdp * mesh.expert")


def _check_widths(settings) -> None:
    """RequestError where the mesh does not divide what it splits; the vocabulary is known."""
    check_shapes(paths(variable_shapes(make_model(settings), settings)["params"]), _sizes(settings))
