"""Benchmarks by EleutherAI's lm-evaluation-harness: `python -m research.harness --checkpoint=DIR --tasks=NAME,...`.

DIR is a workdir of ours or a Hugging Face folder. A task is a name that the harness knows or that stands in a YAML file
of --include_path, or the path of a YAML file. Needs requirements-eval.txt. The table of results goes to stdout.
"""

import json
import logging
from pathlib import Path

from absl import flags

from research import command
from research.errors import RequestError, nearest
from research.files import write_whole
from research.generate import check_folder

FLAGS = flags.FlagValues()
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A workdir, or a Hugging Face folder.", FLAGS)
_TASKS = flags.DEFINE_list("tasks", [], "Names of tasks or groups, or YAML files, separated by commas.", FLAGS)
_INCLUDE = flags.DEFINE_string("include_path", None, "A folder with YAML files of further tasks.", FLAGS)
_FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "Examples before a question; by default the task's.",
                                flag_values=FLAGS)
_LIMIT = flags.DEFINE_float("limit", None, "Only so many questions of a task; below 1: so large a share.",
                            flag_values=FLAGS)
_BATCH = flags.DEFINE_integer("batch_size", 8, "Rows that the model reads together.", flag_values=FLAGS)
_LENGTH = flags.DEFINE_integer("max_length", None, "Tokens that the model reads at once; by default all its positions.",
                               flag_values=FLAGS)
_CHAT = flags.DEFINE_bool(
    "chat", False, "Put questions through the checkpoint's chat template, examples as turns before them.", FLAGS)
_SYSTEM = flags.DEFINE_string("system", None, "With --chat, the system's message before each question.", FLAGS)
_RECIPE = flags.DEFINE_string("recipe", None, "float32 or bfloat16; by default as research.generate.", FLAGS)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws of tasks that sample.", flag_values=FLAGS)
_OUTPUT = flags.DEFINE_string("output", None, "A JSON file for the results, and with --samples every answer.", FLAGS)
_SAMPLES = flags.DEFINE_bool("samples", False, "Write every question and answer to --output too.", FLAGS)


def main() -> None:
    check_flags()
    with command.stops_held():
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager
            from lm_eval.utils import handle_non_serializable, make_table
        except ImportError as error:
            raise RequestError(f"lm-evaluation-harness cannot be imported ({error}): pip install -r "
                               "requirements-eval.txt") from None
        from research.environment import pin_threads
        from research.interop.lm_eval import ParsimonyLM

    logging.getLogger("huggingface_hub").handlers.clear()  # its lines come by ours
    manager = TaskManager(include_path=_INCLUDE.value and Path(_INCLUDE.value).expanduser())
    tasks = find_tasks(manager)
    loaded = load_tasks(manager, tasks)
    manager.load = lambda _: loaded  # the harness would read all of their data again
    model = ParsimonyLM(_CHECKPOINT.value, _BATCH.value, _LENGTH.value, _RECIPE.value, _SEED.value,
                         _CHAT.value)
    pin_threads()
    limit = _LIMIT.value if _LIMIT.value is None or _LIMIT.value < 1 else int(_LIMIT.value)
    results = lm_eval.simple_evaluate(model, tasks=tasks, num_fewshot=_FEWSHOT.value, limit=limit,
                                      batch_size=_BATCH.value, task_manager=manager, log_samples=_SAMPLES.value,
                                      apply_chat_template=_CHAT.value, system_instruction=_SYSTEM.value,
                                      fewshot_as_multiturn=_CHAT.value)
    results["config"]["model_args"] = {"checkpoint": _CHECKPOINT.value, "max_length": model.evaluator.max_length,
                                       "recipe": model.evaluator.decoder.model.products.recipe.name}
    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))
    if _OUTPUT.value:
        write_whole(Path(_OUTPUT.value).expanduser(), json.dumps(
            results, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n")


def check_flags() -> None:
    """RequestError for the first flag that cannot be meant."""
    if not _CHECKPOINT.value:
        raise RequestError("--checkpoint is required: a workdir, or a Hugging Face folder")
    if not any(_TASKS.value):
        raise RequestError("--tasks is required: names of tasks or YAML files, separated by commas")
    if _INCLUDE.value is not None and not Path(_INCLUDE.value).expanduser().is_dir():
        raise RequestError(f"--include_path={_INCLUDE.value!r} is not a folder")
    for flag, least in ((_FEWSHOT, 0), (_BATCH, 1), (_LENGTH, 1)):
        if flag.value is not None and flag.value < least:
            raise RequestError(f"--{flag.name}={flag.value} must be at least {least}")
    if _LIMIT.value is not None and not _LIMIT.value > 0:
        raise RequestError(f"--limit={_LIMIT.value} must be above 0")
    if _RECIPE.value not in (None, "float32", "bfloat16"):
        raise RequestError(f"--recipe={_RECIPE.value!r} must be one of float32, bfloat16")
    if _SYSTEM.value is not None and not _CHAT.value:
        raise RequestError("--system needs --chat")
    if _SAMPLES.value and not _OUTPUT.value:
        raise RequestError("--samples needs --output, the file to write them to")
    if _OUTPUT.value and not Path(_OUTPUT.value).expanduser().absolute().parent.is_dir():
        raise RequestError(f"--output={_OUTPUT.value!r} is in a folder that does not exist")
    check_folder(Path(_CHECKPOINT.value).expanduser())  # before a task's data are fetched


def find_tasks(manager) -> list:
    """What the harness is to run: names that it knows, and the contents of YAML files."""
    from lm_eval.tasks._yaml_loader import load_yaml

    found = []
    for name in filter(None, _TASKS.value):
        if not name.endswith(".yaml"):
            matching = manager.match_tasks([name])
            if not matching:
                raise RequestError(f"--tasks: {name!r} is no task of the harness{nearest(name, manager.all_tasks)}")
            found += matching
            continue
        path = Path(name).expanduser()
        if not path.is_file():
            raise RequestError(f"--tasks: {name!r} " + ("is not a file" if path.exists() else "does not exist"))
        try:
            found.append(load_yaml(str(path), resolve_func=True))
        except Exception as error:  # a file may hold anything
            raise RequestError(f"--tasks: {name!r} cannot be read: {error}") from None
    return found


def load_tasks(manager, tasks: list):
    """The tasks with their data, as the harness's manager gives them."""
    try:
        return manager.load(tasks)
    except Exception as error:  # of a file's contents, of a data set that is not there
        said = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(f"--tasks: {','.join(_TASKS.value)} cannot be loaded: {said[:300]}") from None


if __name__ == "__main__":
    command.run(main, FLAGS)
