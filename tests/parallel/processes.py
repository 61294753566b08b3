"""Two or four real processes over loopback: what each of them runs, and how the tests start them.

    python -m tests.parallel.processes pair ADDRESS NUMBER FILE   what processes agree on, and steps over both, as JSON
    python -m tests.parallel.processes four ADDRESS NUMBER FILE   steps over four, as JSON
    python -m tests.parallel.processes signal NAME STEP FLAGS...  research.main, which at a step sends itself a signal
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from tests import tiny
from tests.parallel.meshes import FIELDS, ROWS

ROOT = Path(__file__).parents[2]
HEARTBEAT = 8  # seconds: on a busy machine a process may be silent for some
STEPS = 2
SHAPE = FIELDS | {"mtp.num_nextn_predict_layers": 0, "model.attention_implementation": "reference"}
MESHES = {  # of two devices: what they share, and what one device computes too
    "experts": ({"mesh.expert": 2}, SHAPE),
    "stages": ({"mesh.pipeline": 2, "training.pipeline_schedule": "zero_bubble"},
               SHAPE | tiny.DENSE | {"training.accumulation_steps": 2}),
}
PIPELINE = {f"{name}.{field}": value for name in ("teacher", "student") for field, value in {
    "model.attention": "gqa", "model.n_routed_experts": 0, "model.num_hidden_layers": 1, "model.hidden_size": 16,
    "model.intermediate_size": 16, "model.num_attention_heads": 2, "model.head_dim": 8, "model.num_key_value_heads": 1,
    "model.attention_implementation": "reference", "model.max_position_embeddings": 128, "model.initializer_range": 0.2,
    "mtp.num_nextn_predict_layers": 0, "data.tokenizer": "bytes", "data.sequence_length": 72, "training.steps": 3,
    "training.batch_size": 4, "evaluation.batch_size": 4, "checkpoint.every_steps": 0,
}.items()} | {
    "method": "reinforced", "task.count": 60, "task.operations": 1, "cold_start.problems": 40,
    "cold_start.student_steps": 3, "reinforcement.teacher_steps": 0, "reinforcement.student_steps": 4,
    "reinforcement.questions": 2, "reinforcement.group_size": 2, "reinforcement.max_tokens": 8,
    "reinforcement.epochs": 2, "reinforcement.reference_every": 1,
    "sampling.problems": 5, "sampling.samples": 2, "sampling.batch_size": 4, "sampling.max_tokens": 8,
    "sampling.temperature": 1.0, "sampling.top_p": 1.0, "evaluation.problems": 3, "evaluation.samples": 2,
    "evaluation.batch_size": 4, "evaluation.max_tokens": 8, "evaluation.temperature": 1.0, "evaluation.top_p": 1.0,
    "evaluation.greedy": False,
}
FOUR = {"mesh.data": 2, "mesh.expert": 2}  # of four devices, with the shape of "experts"


def start(*words, cache: Path, devices: int = 1, **variables: str) -> subprocess.Popen:
    """A process of this module, or of another that `words` begin with (`-m NAME`), on so many simulated devices.

    variables: of its environment.
    """
    environment = os.environ | variables | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    module = () if words[0] == "-m" else ("-m", "tests.parallel.processes")
    return subprocess.Popen([sys.executable, *module, *map(str, words)], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def free_address() -> str:
    """localhost and a port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return f"localhost:{listener.getsockname()[1]}"


def of_slurm(number: int, address: str) -> dict[str, str]:
    """What Slurm leaves in the environment of task `number` of two, and the port that JAX would make of the job's."""
    host, port = address.split(":")
    return {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": f"{host},elsewhere", "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(number), "SLURM_LOCALID": "0", "JAX_COORDINATOR_PORT": port}


def pair(number: int, folders: Path) -> dict:
    """What process `number` of two finds: values, refusals, steps of meshes over both, and what it reads of `folders`:
    a release as it is, and `torn`, with a NaN."""
    from research.errors import RequestError
    from research.parallel import hosts
    from research.parallel.mesh import make_mesh
    from research.training.stopping import StopRequests

    found = {"first": hosts.is_first(), "told": hosts.from_first(lambda: [number, "a"]), "all": hosts.from_all(number)}

    def wrong():
        raise RequestError("the first's own")

    def refusal(function) -> str:
        try:
            function()
        except RequestError as error:
            return str(error)
        return ""

    found["equal"] = refusal(lambda: hosts.agree({"config.a": 1, "config.b": [2]}, "command"))
    found["other"] = refusal(lambda: hosts.agree({"config.a": 1, "config.b": number}, "command"))
    found["missing"] = refusal(lambda: hosts.agree({"config.a": 1} if number else {}, "command"))
    found["wrong"] = refusal(lambda: hosts.from_first(wrong))
    found["alike"] = refusal(hosts.refused_alike()(lambda: wrong() if number else None))

    stop = StopRequests(hosts.Stops(make_mesh(tiny.settings(SHAPE | {"mesh.expert": 2}))))
    votes = []
    for code in (0, 143 if number else 0, 130):
        stop.code = code
        votes.append((stop.agreed(stop.asked()), stop.code))
    found["torn"] = refusal(lambda: read(folders / "torn"))
    found["distilled"] = distilled(folders / "distilled", 2)
    return found | {"votes": votes, "read": read(folders / "whole"),
                    "steps": {name: steps(*fields) for name, fields in MESHES.items()}}


def distilled(workdir: Path, data: int) -> str:
    """What research.distill says of all stages, over so many devices; to a policy what has an even sum is right."""
    from unittest import mock

    from experiments import base
    from research.distill import STAGES
    from research.distillation import evaluate, rollouts, settings, stages

    c = base.get_distillation_config()
    c.update_from_flattened_dict(PIPELINE | {"teacher.mesh.data": data, "student.mesh.data": data})
    with (mock.patch.object(rollouts.Rollouts, "_judged", lambda _, problem, row: (sum(row) % 2 == 0, True)),
          mock.patch.object(evaluate, "_pictures", lambda *_: [])):
        said = stages.run(settings.check(c), workdir, STAGES)
    return re.sub(r"[\d,]+ tokens/s", "", said.replace(str(workdir), "DIR"))


def read(folder: Path) -> dict:
    """The experts of a release whose weights this process reads onto the mesh of two, and what it holds of them."""
    from unittest import mock

    import numpy as np

    from research.config import check
    from research.interop import variables
    from research.interop.weights import read_settings, weights_for
    from research.model.build import make_model
    from research.parallel.mesh import make_mesh

    c = read_settings(folder).to_config()
    c.mesh.expert = 2
    s, names, pour = check(c), [], variables.Stored._pour

    def noted(self, place, parts, infinite):
        names.extend([place.name] if parts else [])
        pour(self, place, parts, infinite)

    with mock.patch.object(variables.Stored, "_pour", noted):
        found, _ = weights_for(make_model(s, make_mesh(s)), s, folder)
    up = found["params"]["layers"]["mlp"]["up_proj"].addressable_data(0)
    return {"experts": sorted({int(name.split(".experts.")[1].split(".")[0]) for name in names if ".experts." in name}),
            "names": len(names), "held": np.asarray(up).tolist()}


def steps(sizes: dict, shape: dict) -> dict:
    """This process's share of a batch, a device's of some weights, and metrics and state of steps of a mesh."""
    import jax
    import numpy as np

    from research.parallel import hosts
    from research.parallel.mesh import make_mesh
    from research.training.step import init_state, make_train_step, shardings_of
    from research.tree import paths

    s = tiny.settings(shape | sizes)
    model, variables = tiny.model(s)
    model = model.clone(products=replace(model.products, mesh=make_mesh(s), expert_room=s.training.expert_room))
    share = hosts.Share(shardings_of(model, s).batch)
    rows = share.rows(np.arange(len(ROWS)))
    batches = [{name: x[rows] for name, x in tiny.batch(ROWS, seed=number).items()} for number in range(STEPS)]
    state = init_state(model, s, jax.tree.map(np.asarray, variables))
    step, metrics = make_train_step(model, s), []
    for batch in batches:
        state, told = step(state, share.whole(batch))
        metrics.append({name: np.asarray(value).tolist() for name, value in told.items()})
    kept = hosts.whole({"params": state["params"], "routing": state["routing"]}, model.products.mesh)
    held = {path: x.addressable_shards[0].data.shape for path, x in paths(state["params"]).items()}
    return {"rows": rows.tolist(), "metrics": metrics, "held": held,
            "state": {path: x.tolist() for path, x in tiny.leaves(kept).items()}}


def sends_itself(name: str, at: int) -> None:
    """From now on this process gets a signal once step `at` of a run is written."""
    from research.training.metrics import Progress

    update = Progress.update

    def updated(self, step: int, text: str) -> None:
        update(self, step, text)
        if step == at:
            os.kill(os.getpid(), signal.Signals[name])

    Progress.update = updated


if __name__ == "__main__":
    if sys.argv[1] == "pair":
        from research.parallel import hosts

        hosts.join(sys.argv[2], 2, int(sys.argv[3]), HEARTBEAT)
        Path(sys.argv[4]).write_text(json.dumps(pair(int(sys.argv[3]), Path(sys.argv[4]).parent)))
        hosts.last_words(lambda: "the last checkpoint is here")
        if not hosts.is_first():
            os.kill(os.getpid(), signal.SIGSTOP)  # connected, and says nothing any more
        hosts.from_all("never")
    elif sys.argv[1] == "four":
        from research.parallel import hosts

        hosts.join(sys.argv[2], 4, int(sys.argv[3]), 60)
        Path(sys.argv[4]).write_text(json.dumps(steps(FOUR, SHAPE)))
    else:
        from research import command, main

        sends_itself(sys.argv[2], int(sys.argv[3]))
        sys.argv = ["research.main", *sys.argv[4:]]
        command.run(main.main, main.FLAGS, command.KEPT_PAGES, main.hosts.leave)
