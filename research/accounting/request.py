"""What an account is asked about: an experiment, its vocabulary known without its corpus, on any mesh."""

from research import config, experiment
from research.data import tokenizer
from research.errors import RequestError
from research.parallel.mesh import abstract_mesh


def settings_of(argument: str, assignments) -> config.Settings:
    """The checked settings of `FILE.py:arm` with `group.field=value` set, and with the mesh that they name.

    Training refuses the meshes that it cannot run (`refusal`); here they are only counted. RequestError for what is
    wrong.
    """
    settings = config.check(experiment.change(experiment.load(argument), assignments))
    if settings.model.vocab_size is None:
        settings = settings.with_vocabulary(_vocabulary(settings.data))
    return settings


def refusal(settings) -> str | None:
    """Why training would not run on the settings' mesh, however many devices there are; None where it would."""
    try:
        abstract_mesh(settings)
    except RequestError as error:
        return str(error)
    return None


def _vocabulary(data) -> int:
    """The size that the tokenizer will have; one that is trained on the corpus is taken at its largest."""
    if data.tokenizer == "bytes":
        return 256 + len(tokenizer.SPECIALS)
    return data.bpe_vocab_size if data.tokenizer == "bpe" else tokenizer.Tokenizer.load(data.tokenizer).vocab_size
