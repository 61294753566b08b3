"""Weights alone, out of either kind of checkpoint."""

from pathlib import Path

from research import config
from research.errors import RequestError
from research.interop import huggingface
from research.model.build import variable_shapes
from research.training.checkpoint import Checkpoints
from research.tree import paths


def read_weights(folder: Path) -> tuple[config.Settings, dict]:
    """Settings and {`params`, `routing`} of a workdir (its newest intact checkpoint) or a Hugging Face folder."""
    if not (folder / "checkpoints").is_dir():
        settings = huggingface.read_settings(folder)
        return settings, huggingface.read_variables(folder, settings)
    settings = config.read(folder)
    checkpoints = Checkpoints(folder / "checkpoints", settings.checkpoint.keep_last, settings.checkpoint.keep_best)
    step = checkpoints.newest_intact()
    if step is None:
        raise RequestError(f"{folder / 'checkpoints'} holds no intact checkpoint")
    return settings, checkpoints.restore_weights(step)


def initial_variables(model, settings) -> dict:
    """The weights of `checkpoint.initialize_from`, checked against the model that is to start from them."""
    folder = Path(settings.checkpoint.initialize_from).expanduser()
    try:
        _, saved = read_weights(folder)
    except RequestError as error:
        raise RequestError.field("checkpoint.initialize_from", str(folder), f"cannot be used: {error}") from None
    expected = paths(variable_shapes(model, settings))
    found = paths({"params": saved["params"], "routing": saved["routing"]})
    wrong = [f"{name} is {found[name].shape} there and {leaf.shape} here" if name in found else f"it lacks {name}"
             for name, leaf in expected.items() if name not in found or found[name].shape != leaf.shape]
    wrong += [f"the model lacks {name}" for name in found if name not in expected]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise RequestError.field("checkpoint.initialize_from", str(folder),
                                 f"is of another model: {'; '.join(wrong[:3])}{more}")
    return {"params": saved["params"], "routing": saved["routing"]}
