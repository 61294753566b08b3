"""The program of a training step for GPUs that are not here: `python -m research.lowering --config=FILE`.

The step of the config's mesh is traced and lowered for CUDA as it would be for so many H200: nothing is allocated, and
neither a GPU nor its packages are needed. Printed: how long that takes, the program's lines, our own kernels in its
text and how many of them differ, the exchanges that the model itself asks for (XLA adds those of the shardings when it
compiles), and the bytes of a device beside the account's. --compile also compiles it, in the environment of `make aot`,
and says which of all exchanges go on beside computation; what XLA chooses by trial is left to the GPU. Attention is
plain XLA's: cuDNN's asks for the library.

    python -m research.lowering --config=experiments/deepseek_v3.py --config.mesh.expert=64 \\
        --config.training.batch_size=64 --config.training.batch_ramp_start=64 --config.evaluation.batch_size=64
"""

import math
import re
import time
from collections import Counter

from absl import flags

from research import command
from research.errors import RequestError

FLAGS = flags.FlagValues()
_CONFIG = flags.DEFINE_string("config", None, "The experiment: FILE.py or FILE.py:arm.", FLAGS)
_FIELDS = flags.DEFINE_multi_string("config.", [], "--config.group.field=value changes a field; meshes too.", FLAGS)
_COMPILE = flags.DEFINE_boolean("compile", False, "Compiles the program too: in `make aot`'s environment.", FLAGS)

EXCHANGE = re.compile(r"stablehlo\.(all_to_all|all_gather|all_reduce|reduce_scatter|collective_permute)\b"
                      r"|@(ragged_all_to_all)\b")
KERNEL = re.compile(r'kernel_hash = "((?:\\.|[^"\\])*)"')


def lowered(settings, compiles: bool = False) -> dict:
    """What `main` prints, as data: seconds, counts, and bytes of a device by part of the state.

    compiles: RequestError without the packages of requirements-gpu.txt.
    """
    import jax

    from kernels import aot
    from kernels.choice import meant_for_h200
    from research.accounting import memory
    from research.model.build import make_model
    from research.parallel import overlap
    from research.parallel.mesh import abstract_mesh, make_mesh
    from research.training.step import abstract_batch, abstract_state, make_train_step

    mesh, plain = abstract_mesh(settings), memory.with_plain_attention(settings)
    placed, platforms = mesh, ("cuda",)
    if compiles:
        try:
            devices, platforms = aot.h200s(mesh.size if mesh else 1), None  # the devices' own
        except aot.Unavailable as error:
            raise RequestError(f"--compile: {error}") from None
        placed = make_mesh(settings, devices)
    model = make_model(plain, placed)
    start, state = time.perf_counter(), abstract_state(model, plain)
    arguments = state, abstract_batch(plain.training.batch_size, plain.data.sequence_length)
    if compiles and not mesh:
        arguments = aot.on_h200(arguments)
    seconds, taken, meanwhile = {}, None, None
    with jax.sharding.use_abstract_mesh(mesh) if mesh else meant_for_h200():
        traced = make_train_step(model, plain).trace(*arguments)
        seconds["traced"], start = time.perf_counter() - start, time.perf_counter()
        program = traced.lower(lowering_platforms=platforms)
        seconds["lowered"], start = time.perf_counter() - start, time.perf_counter()
        if compiles:
            compiled = program.compile()
            seconds["compiled"], taken = time.perf_counter() - start, compiled.memory_analysis()
            meanwhile = overlap.summary(compiled.as_text()) if mesh else None
    lines = program.as_text()

    def bytes_of(leaf):
        held = leaf.sharding.shard_shape(leaf.shape) if mesh else leaf.shape
        return math.prod(held) * leaf.dtype.itemsize

    kernels = KERNEL.findall(lines)
    return {
        "devices": mesh.size if mesh else 1,
        "mesh": dict(mesh.shape) if mesh else {},
        "seconds": seconds,
        "lines": lines.count("\n"),
        "kernels": {"in_text": len(kernels), "different": len(set(kernels))},
        "exchanges": dict(Counter("".join(found) for found in EXCHANGE.findall(lines))),
        "held": {name: sum(map(bytes_of, jax.tree.leaves(part))) for name, part in state.items()},
        "taken": taken and (taken.argument_size_in_bytes + taken.output_size_in_bytes - taken.alias_size_in_bytes
                            + taken.temp_size_in_bytes),
        "meanwhile": meanwhile,
        "account": memory.of_device(settings, gpu=True)["total"],
    }


def text(found: dict) -> str:
    """The lines of the command."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1)
    held = {name: size for name, size in found["held"].items() if size > 1e-3 * max(found["held"].values())}
    one, unit = (1e9, "GB") if sum(found["held"].values()) >= 1e9 else (1e6, "MB")
    return "\n".join((
        f"{found['devices']:,} H200{f': {mesh}' if mesh else ''}",
        f"program     {found['lines']:,} lines of StableHLO, "
        + ", ".join(f"{name} in {seconds:.0f} s" for name, seconds in found["seconds"].items()),
        f"kernels     {found['kernels']['in_text']} of our own in it, {found['kernels']['different']} different",
        "exchanges   " + (", ".join(f"{n} {name}" for name, n in sorted(found["exchanges"].items())) or "none"),
        "a device    " + ", ".join(f"{name} {size / one:,.1f} {unit}" for name, size in held.items())
        + f": {sum(found['held'].values()) / one:,.1f} {unit} of the state",
        f"            {found['account'] / one:,.1f} {unit} in training, by the account"
        + (f"; {found['taken'] / one:,.1f} {unit} by the compiler" if found["taken"] else ""),
        *([f"meanwhile   {found['meanwhile']}"] if found["meanwhile"] else []),
    ))


def main() -> None:
    if not _CONFIG.value:
        raise RequestError("--config is missing: python -m research.lowering --config=experiments/FILE.py")
    with command.stops_held():
        from research.accounting.request import settings_of
        from research.environment import runnable

    settings = settings_of(_CONFIG.value, _FIELDS.value)
    with runnable():
        print(text(lowered(settings, _COMPILE.value)))


if __name__ == "__main__":
    command.run(main, FLAGS)
