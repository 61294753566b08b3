"""What launch/ starts is research.main with flags and a config that it takes, in as many processes as it needs."""

import math
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from absl.testing import flagsaver

from research import command, config, experiment, main
from research.model.build import make_model, variable_shapes
from research.parallel.rules import AXES, check_shapes
from research.tree import paths

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "launch" / "slurm.sh"


def fits(words: list[str], devices: int) -> dict:
    """The values of research.main's flags; the config, checked, is one of a mesh of so many devices."""
    saved = flagsaver.save_flag_values(main.FLAGS)
    try:
        command.parse_flags(["research.main", *words], main.FLAGS)
        values = {name: main.FLAGS[name].value for name in main.FLAGS}
    finally:
        flagsaver.restore_flag_values(saved, main.FLAGS)
    settings = config.check(experiment.change(experiment.load(str(ROOT / values["config"])), values["config."]))
    sizes = {axis: settings.mesh[axis] for axis in AXES}
    assert math.prod(sizes.values()) == devices and settings.evaluation.batch_size % devices == 0
    settings = settings.with_vocabulary(settings.model.vocab_size)
    check_shapes(paths(variable_shapes(make_model(settings), settings)["params"]), sizes)
    return values


def test_the_jobset_is_one_run():
    jobset = yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "research.main"]
    index = container["args"].index("--process_id=$(JOB_COMPLETION_INDEX)")
    words = [*container["args"][:index], "--process_id=1", *container["args"][index + 1:]]
    values = fits(words, spec["parallelism"] * container["resources"]["limits"]["nvidia.com/gpu"])
    assert values["num_processes"] == spec["parallelism"] == spec["completions"]
    assert spec["completionMode"] == "Indexed" and job["replicas"] == 1 and spec["backoffLimit"] == 0
    name, port = jobset["metadata"]["name"], container["ports"][0]["containerPort"]
    assert values["coordinator_address"] == f"{name}-{job['name']}-0-0.{name}:{port}"
    assert values["workdir"].startswith(container["volumeMounts"][0]["mountPath"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in spec["template"]["spec"]["volumes"]}


def test_the_example_of_slurm_is_one_run():
    text = SLURM.read_text()
    example = re.search(r"#     sbatch launch/slurm.sh ((?:.*\\\n)*.*)\n", text).group(1)
    words = example.replace("\\\n", " ").replace(" #", " ").split()
    nodes, gpus, tasks = (int(re.search(rf"#SBATCH --{name}=(\d+)", text).group(1))
                          for name in ("nodes", "gpus-per-node", "ntasks-per-node"))
    assert tasks == gpus  # JAX gives each task one
    fits(words, nodes * gpus)


@pytest.mark.parametrize("code, requeued", [(0, ""), (1, ""), (2, ""), (143, "requeue 7\n")])
def test_slurm_gives_a_stopped_job_more_time(tmp_path, code, requeued):
    """With stand-ins for srun and scontrol, which say what they were given."""
    for name, text in (("srun", f'printf "%s|" "$@"; exit {code}'), ("scontrol", f'echo "$@" > {tmp_path}/asked')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "PYTHON": "some python"}
    done = subprocess.run([SLURM, "--workdir=a b", "--mode=eval"], env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout == "--kill-on-bad-exit=0|some python|-m|research.main|--workdir=a b|--mode=eval|"
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == requeued
