"""Trains or evaluates: `python -m research.main --config=experiments/nano.py --workdir=runs/nano [--config.a.b=c]`.

Several processes of one command are one run: Slurm, Open MPI or Kubernetes says which each is, or three flags do.
"""

from pathlib import Path

from absl import flags

from research import command, config, experiment
from research.errors import RequestError
from research.parallel import hosts

FLAGS = flags.FlagValues()
_CONFIG = flags.DEFINE_string(
    "config", None, "An experiment: FILE.py, FILE.py:arm or FILE.py:arm:smoke. --mode=eval takes the workdir's own "
    "config.json without it.", FLAGS)
_FIELDS = flags.DEFINE_multi_string(
    "config.", [], "--config.group.field=value changes a field; experiments/base.py lists them.", FLAGS)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run is written, and continued when it is there already; --mode=eval also takes a "
    "Hugging Face folder.", FLAGS)
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "eval"], "train, or evaluate the newest checkpoint on all held-out text.", FLAGS)
_PROFILE = flags.DEFINE_bool(
    "profile", False, "Write a trace of three steps, or of what is left, to WORKDIR/profile, for xprof.", FLAGS)
_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, where all processes of the run meet.", FLAGS)
_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes the run has; 1: no others, whatever a "
                                  "launcher says.", flag_values=FLAGS)
_PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.", flag_values=FLAGS)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_timeout_seconds", 30, "A process that gives no sign of life for so long is lost, and the run ends.",
    flag_values=FLAGS)


def main() -> None:
    if not _WORKDIR.value:
        raise RequestError("--workdir is required: the directory of the run")
    workdir = Path(_WORKDIR.value).expanduser()
    foreign = not (workdir / "checkpoints").is_dir() and any(workdir.glob("*.safetensors"))
    if foreign and (_MODE.value == "train" or _CONFIG.value):
        raise RequestError(f"--workdir={workdir} is a Hugging Face folder: it is evaluated without --config, and a run "
                           "starts from it with --config.checkpoint.initialize_from")
    if _PROFILE.value and _MODE.value == "eval":
        raise RequestError("--profile traces steps of training: --mode=eval has none")
    if _CONFIG.value:
        chosen = experiment.load(_CONFIG.value)
    elif _MODE.value == "eval":
        chosen = config_of_folder(workdir) if foreign else config.read(workdir).to_config()
    else:
        raise RequestError("--config is required: an experiment such as experiments/nano.py")
    settings = config.check(experiment.change(chosen, _FIELDS.value))

    hosts.join(_ADDRESS.value, _PROCESSES.value, _PROCESS.value, _HEARTBEAT.value)
    with command.stops_held():
        from research import environment, summary  # after the checks that need no JAX: they are answered at once
        from research.interop.weights import weights_alone
        from research.training import loop

    environment.compute_in_this_thread()
    hosts.agree({f"--{name}": FLAGS[name].value for name in ("workdir", "mode", "profile", "heartbeat_timeout_seconds")}
                | experiment.flatten(settings.to_config(), "config."), "command")
    if _MODE.value == "train":
        told = summary.of_training(loop.train(settings, workdir, profile=_PROFILE.value))
    else:
        evaluate = loop.evaluate_weights if weights_alone(workdir) else loop.evaluate_newest
        told = summary.of_evaluation(evaluate(settings, workdir))
    if hosts.is_first():
        print(told)


def config_of_folder(folder: Path):
    """The config of a Hugging Face folder."""
    with command.stops_held():
        from research.interop.huggingface import read_settings  # it imports NumPy
    return read_settings(folder).to_config()


if __name__ == "__main__":
    command.run(main, FLAGS, command.KEPT_PAGES, hosts.leave)
