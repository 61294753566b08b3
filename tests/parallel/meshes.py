"""Steps of the tiny model on meshes of 8 simulated devices, as JSON: run in a process of its own by the tests."""

import json
import os
import sys

DEVICES = 8
FIELDS = {
    "model.num_hidden_layers": 2, "model.moe_intermediate_size": 40, "model.intermediate_size": 48,
    "mtp.num_nextn_predict_layers": 1, "training.batch_size": 8, "training.ema_decay": 0.75,
    "optimizer.clip_norm": 0, "model.num_attention_heads": 2, "model.bias_update_until": 1.0,
}
MESHES = {
    "one": {},
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "expert": {"expert": 8},
    "tensor and expert": {"tensor": 2, "expert": 4},
    "all": {"fsdp": 2, "expert": 2, "tensor": 2},
}
ROWS = ((7, 5), (4, 3, 3), (12,), (5, 6), (2, 2, 2), (9, 1), (11,), ())
STEPS = 3


def run(name: str) -> dict:
    """Metrics of every step; the first step's gradients (Adam's first moments); the state after the last step."""
    from dataclasses import replace

    import numpy as np

    from research.parallel.mesh import make_mesh
    from research.training.step import init_state, make_train_step
    from research.tree import paths
    from tests import tiny

    s = tiny.settings(FIELDS | {f"mesh.{axis}": size for axis, size in MESHES[name].items()})
    model, variables = tiny.model(s, experts="auto")
    mesh = make_mesh(s, paths(variables["params"]))
    model = model.clone(products=replace(model.products, mesh=mesh))
    state = init_state(model, s, variables)
    step = make_train_step(model, s).lower(state, tiny.batch(ROWS)).compile()
    metrics, gradients = [], None
    for number in range(STEPS):
        state, found = step(state, tiny.batch(ROWS, seed=number))
        metrics.append({key: np.asarray(value).tolist() for key, value in found.items()})
        if gradients is None:
            gradients = {path: np.asarray(x).tolist() for path, x in paths(state["optimizer"][0].mu).items()}
    return {
        "metrics": metrics,
        "gradients": gradients,
        "state": {part: {path: np.asarray(x).tolist() for path, x in paths(state[part]).items()}
                  for part in ("params", "routing", "ema")},
        "program": step.as_text(),
        "held": {path: x.addressable_shards[0].data.shape for path, x in paths(state["params"]).items()},
    }


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    import jax

    jax.config.update("jax_numpy_rank_promotion", "raise")
    found = {}
    for name in sys.argv[1:] or MESHES:
        found[name] = run(name)
        import time; print(name, time.process_time(), file=sys.stderr, flush=True)
    json.dump(found, sys.stdout)
