"""What an account is asked about: an experiment, its vocabulary known without its corpus, on any mesh."""

from dataclasses import replace

from ml_collections import FrozenConfigDict

from research import config, experiment
from research.data import tokenizer
from research.errors import RequestError

AXES = ("data", "fsdp", "expert", "tensor", "pipeline")


def settings_of(argument: str, assignments) -> config.Settings:
    """The checked settings of `FILE.py:arm` with `group.field=value` set, and with the mesh that they name.

    Training refuses the meshes that it cannot run; here they are only counted. RequestError for what is wrong.
    """
    chosen = experiment.change(experiment.load(argument), assignments)
    mesh = chosen.mesh.to_dict()
    for axis, size in mesh.items():
        if type(size) is not int or size < 1:
            raise RequestError.field(f"mesh.{axis}", size, "must be a whole number, at least 1")
    chosen.mesh.update(dict.fromkeys(mesh, 1))
    settings = replace(config.check(chosen), mesh=FrozenConfigDict(mesh))
    _check_mesh(settings)
    if settings.model.vocab_size is None:
        settings = settings.with_vocabulary(_vocabulary(settings.data))
    return settings


def _check_mesh(settings) -> None:
    m, mesh, t = settings.model, settings.mesh, settings.training
    pieces = mesh.data * mesh.fsdp * mesh.expert * t.accumulation_steps
    if t.batch_size % pieces:
        raise RequestError.field("training.batch_size", t.batch_size, f"must be a multiple of {pieces} = mesh.data * "
                                 "mesh.fsdp * mesh.expert * training.accumulation_steps")
    for axis, name, size in (("expert", "model.n_routed_experts", m.n_routed_experts),
                             ("tensor", "model.num_attention_heads", m.num_attention_heads)):
        if size % mesh[axis]:
            raise RequestError.field(f"mesh.{axis}", mesh[axis], f"does not divide config.{name}={size}")
    if mesh.expert > 1 and not m.n_routed_experts:
        raise RequestError.field("mesh.expert", mesh.expert, "must be 1: the model has no experts")
    if mesh.pipeline > m.num_hidden_layers:
        raise RequestError.field("mesh.pipeline", mesh.pipeline,
                                 f"must be at most config.model.num_hidden_layers={m.num_hidden_layers}")


def _vocabulary(data) -> int:
    """The size that the tokenizer will have; one that is trained on the corpus is taken at its largest."""
    if data.tokenizer == "bytes":
        return 256 + len(tokenizer.SPECIALS)
    return data.bpe_vocab_size if data.tokenizer == "bpe" else tokenizer.Tokenizer.load(data.tokenizer).vocab_size
