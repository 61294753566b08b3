"""Commands in this process."""

from types import ModuleType

import grain  # noqa: F401  it has flags, which the first command here would take away with its own
from absl.testing import flagsaver


def exit_code(module: ModuleType, *words) -> int:
    """Of the command that a module is, with these words behind its name; flags are afterwards what they were."""
    saved = flagsaver.save_flag_values(module.FLAGS)
    with flagsaver.flagsaver():  # absl's own
        try:
            return module.command.execute(module.main, [module.__name__, *map(str, words)], module.FLAGS)
        finally:
            flagsaver.restore_flag_values(saved, module.FLAGS)
