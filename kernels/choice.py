"""Which implementation of an operation runs: `mosaic` (Pallas, Hopper GPUs), `xla` (anywhere), `reference`."""

import jax
from absl import logging

from kernels.tuned import TARGET

H200 = jax.sharding.AbstractDevice(device_kind=TARGET, platform="gpu", num_cores=132)
IMPLEMENTATIONS = ("auto", "mosaic", "xla", "reference")


class Unavailable(ValueError):
    """An implementation that was asked for by name cannot run on this device, or on these arguments."""

    def __init__(self, operation: str, implementation: str, reason: str):
        super().__init__(f"{operation}: implementation={implementation!r} cannot run: {reason}")
        self.operation, self.implementation, self.reason = operation, implementation, reason


def meant_for_h200():
    """A context in which functions are traced as for an H200, wherever they are."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=H200))


def platform() -> str:
    """`cpu` or `gpu`: of the device that is compiled for, see `meant_for_h200`, or of ours."""
    meant = jax.sharding.get_abstract_mesh().abstract_device
    return meant.platform if meant else jax.default_backend()


def gpu_refusal() -> str | None:
    """Why the device cannot run a Hopper kernel; None when it can."""
    meant = jax.sharding.get_abstract_mesh().abstract_device
    if meant and meant.device_kind == TARGET:
        return None
    device = jax.devices()[0]
    if device.platform != "gpu":
        return f"the default device is a {device.platform}, not a GPU"
    capability = getattr(device, "compute_capability", "unknown")
    if capability != "9.0":
        return f"{device.device_kind} has compute capability {capability}, the kernels are for 9.0 (Hopper)"
    return None


def choose(operation: str, implementation: str, refusal: str | None) -> str:
    """The implementation that runs. refusal: what about the arguments the Mosaic kernel does not take, or None.

    `auto` is `mosaic` on a Hopper GPU where the kernel takes the arguments, otherwise `xla`; a GPU that is left with
    `xla` says so once for each reason. ValueError for an unknown name, Unavailable for a `mosaic` that cannot run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{operation}: implementation={implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
    if implementation not in ("auto", "mosaic"):
        return implementation
    reason = gpu_refusal() or refusal
    if reason is None:
        return "mosaic"
    if implementation == "mosaic":
        raise Unavailable(operation, implementation, reason)
    if platform() == jax.default_backend() == "gpu":  # traced for one elsewhere, nothing runs
        say_once(f"{operation}: plain XLA instead of the Pallas kernel: {reason}")
    return "xla"


_said = set()


def say_once(line: str) -> None:
    """A warning, but not the same one again."""
    if line not in _said:
        _said.add(line)
        logging.warning("%s", line)
