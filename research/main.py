"""Trains or evaluates: `python -m research.main --config=experiments/nano.py --workdir=runs/nano [--config.a.b=c]`."""

from absl import flags
from ml_collections import config_flags

from research import command

_CONFIG = config_flags.DEFINE_config_file("config", None, "An experiment: FILE.py, FILE.py:arm or FILE.py:arm:smoke.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is written, and continued when it is there already.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "train, or evaluate the newest checkpoint on all "
                          "held-out text.")
_PROFILE = flags.DEFINE_bool("profile", False, "Write a trace of three steps to WORKDIR/profile, for xprof.")


def main() -> None:
    from pathlib import Path

    from research import config, summary
    from research.training import loop

    if not _WORKDIR.value:
        raise command.RequestError("--workdir is required: the directory of the run")
    workdir = Path(_WORKDIR.value).expanduser()
    if _CONFIG.value is None and _MODE.value == "train":
        raise command.RequestError("--config is required: an experiment such as experiments/nano.py")
    settings = config.check(_CONFIG.value) if _CONFIG.value is not None else config.read(workdir)
    if _MODE.value == "train":
        print(summary.of_training(loop.train(settings, workdir, profile=_PROFILE.value)))
    else:
        print(summary.of_evaluation(loop.evaluate_newest(settings, workdir)))


if __name__ == "__main__":
    command.run(main)
