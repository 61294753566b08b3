"""Teaches reasoning and hands it on: `python -m research.distill --config=FILE --stage=all --workdir=DIR`.

Stages: teacher (worked solutions, then reinforcement), sample, verify, student, evaluate. Each goes on where a killed
one has stopped, and can be run alone. The config of a model alone, such as experiments/r1_distill_qwen_1_5b.py, is a
student's.
"""

from pathlib import Path

from absl import flags

from experiments import base
from research import command, experiment
from research.errors import RequestError

STAGES = ("teacher", "sample", "verify", "student", "evaluate")
FLAGS = flags.FlagValues()
_CONFIG = flags.DEFINE_string("config", None, "An experiment: FILE.py, FILE.py:arm or FILE.py:arm:smoke.", FLAGS)
_FIELDS = flags.DEFINE_multi_string(
    "config.", [], "--config.group.field=value changes a field; experiments/base.py lists them.", FLAGS)
_STAGE = flags.DEFINE_enum("stage", None, [*STAGES, "all"], "What to do.", FLAGS)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written, and continued.", FLAGS)


def main() -> None:
    for flag in (_CONFIG, _STAGE, _WORKDIR):
        if not flag.value:
            raise RequestError(f"--{flag.name} is required: --config=FILE --stage={'|'.join((*STAGES, 'all'))} "
                               "--workdir=DIR")
    with command.stops_held():
        from research import environment
        from research.distillation import settings, stages
    environment.compute_in_this_thread()
    chosen = settings.complete(experiment.load(_CONFIG.value))
    changed = experiment.change(chosen, _FIELDS.value, base.get_distillation_config())
    wanted = STAGES if _STAGE.value == "all" else (_STAGE.value,)
    print(stages.run(settings.check(changed), Path(_WORKDIR.value).expanduser(), wanted))


if __name__ == "__main__":
    command.run(main, FLAGS, command.KEPT_PAGES, fields=base.get_distillation_config)
