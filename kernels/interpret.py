"""Pallas Mosaic GPU kernels interpreted on a CPU: for tests, which see every barrier and every unordered access."""

import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu


def interpret_params(detect_races: bool = False) -> plgpu.InterpretGPUParams:
    """What a kernel takes as `interpret=`. Forgets what earlier kernels left: one that raised leaves its state."""
    gpu_callbacks.reset_gpu_interpret_mode_state()
    return plgpu.InterpretGPUParams(detect_races=detect_races)


def races_found(results) -> bool:
    """Whether the kernel that gave `results`, the last one interpreted, had accesses in no order (it prints which)."""
    jax.block_until_ready(results)
    return gpu_callbacks.get_races().races_found
