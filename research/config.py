"""From a ConfigDict to checked, frozen settings. Every error names the field, its value and what was expected."""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

from ml_collections import ConfigDict, FrozenConfigDict

from experiments import base
from research.errors import RequestError, nearest
from research.experiment import check_name, flatten
from research.precision.recipe import RECIPES

CHOICES = {
    "model.attention": ("mla", "gqa"),
    "model.attention_implementation": ("auto", "xla", "cudnn", "reference"),
    "model.scoring_func": ("sigmoid", "softmax"),
    "model.topk_method": ("noaux_tc", "group_limited_greedy", "greedy"),
    "model.bias_update": ("sign", "centred", "proportional", "none"),
    "model.bias_form": ("additive", "multiplicative"),
    "model.balance_loss": ("sequence", "batch", "expert", "none"),
    "model.rope_scaling.type": ("default", "yarn", "llama3"),
    "model.remat": ("none", "up_projections", "layer"),
    "mtp.hidden": ("after_norm", "before_norm"),
    "training.pipeline_schedule": ("1f1b", "zero_bubble"),
    "precision.recipe": tuple(RECIPES),
    "precision.implementation": ("auto", "mosaic", "xla", "reference"),
    "data.source": ("stdlib", "files", "huggingface"),
    "optimizer.name": ("adamw", "muon"),
    "optimizer.moment_dtype": ("float32", "bfloat16"),
}
AT_LEAST = {  # numbers with a lower bound
    1: ("model.hidden_size", "model.intermediate_size", "model.num_hidden_layers", "model.num_attention_heads",
        "model.num_key_value_heads", "model.head_dim", "model.kv_lora_rank", "model.qk_nope_head_dim",
        "model.qk_rope_head_dim", "model.v_head_dim", "model.num_experts_per_tok", "model.moe_intermediate_size",
        "model.n_group", "model.topk_group", "model.max_position_embeddings",
        "model.rope_scaling.factor", "model.rope_scaling.original_max_position_embeddings", "training.steps",
        "training.batch_size", "training.accumulation_steps", "evaluation.batches", "evaluation.batch_size",
        "evaluation.sample_tokens", "evaluation.decode_tokens", "evaluation.expert_nodes", "mesh.data", "mesh.fsdp",
        "mesh.expert", "mesh.tensor", "mesh.pipeline", "checkpoint.keep_last", "training.expert_room"),
    2: ("data.sequence_length",),
    0: ("model.scan_unroll", "model.first_k_dense_replace", "model.n_routed_experts", "model.n_shared_experts",
        "model.bias_update_speed", "model.aux_loss_alpha", "mtp.num_nextn_predict_layers", "mtp.loss_weight",
        "mtp.loss_weight_final", "data.max_documents", "data.prefetch", "training.batch_ramp_start", "training.seed",
        "optimizer.weight_decay", "optimizer.clip_norm", "evaluation.every_steps", "evaluation.samples",
        "evaluation.decode_prompts", "evaluation.redundant_experts", "evaluation.sample_temperature",
        "checkpoint.every_steps", "checkpoint.keep_best", "model.rope_scaling.mscale",
        "model.rope_scaling.mscale_all_dim"),
}
POSITIVE = ("model.rms_norm_eps", "model.initializer_range", "model.routed_scaling_factor", "model.rope_theta",
            "model.rope_scaling.beta_fast", "model.rope_scaling.beta_slow", "model.rope_scaling.low_freq_factor",
            "model.rope_scaling.high_freq_factor", "optimizer.learning_rate", "optimizer.epsilon")
FRACTIONS = ("model.bias_update_until", "mtp.loss_weight_switch", "data.needle_rate", "data.fim_rate",
             "data.validation_fraction", "training.batch_ramp_until", "optimizer.warmup_fraction",
             "optimizer.plateau_until", "optimizer.cosine_until", "optimizer.cosine_final", "optimizer.tail_from",
             "optimizer.tail_final")
PROJECTIONS = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "k_proj", "v_proj", "o_proj",
               "gate_proj", "up_proj", "down_proj", "eh_proj")
LARGEST = 2**31 - 1  # of any whole number
BELOW_ONE = ("optimizer.beta1", "optimizer.beta2", "training.ema_decay")
LATER = {  # fields younger than runs that may be continued, with what those did
    "training.expert_room": 1.5, "training.pipeline_schedule": "1f1b",
    "evaluation.redundant_experts": 0, "evaluation.expert_nodes": 1}


@dataclass(frozen=True)
class Settings:
    """The groups of `experiments/base.py`, checked and frozen."""

    model: FrozenConfigDict
    mtp: FrozenConfigDict
    precision: FrozenConfigDict
    data: FrozenConfigDict
    training: FrozenConfigDict
    optimizer: FrozenConfigDict
    evaluation: FrozenConfigDict
    mesh: FrozenConfigDict
    checkpoint: FrozenConfigDict

    def to_json(self) -> str:
        """The whole resolved config, as `config.json` holds it."""
        return json.dumps(self.to_config().to_dict(), indent=2) + "\n"

    def to_config(self) -> ConfigDict:
        """The config to change and check again."""
        return ConfigDict({f.name: getattr(self, f.name).to_dict() for f in fields(self)})

    def with_vocabulary(self, size: int) -> "Settings":
        """The settings with `model.vocab_size` resolved for a tokenizer of `size` tokens.

        None becomes the size rounded up to a multiple of 64; a smaller number is refused.
        """
        rows = self.model.vocab_size
        if rows is None:
            rows = -(-size // 64) * 64
        if rows < size:
            raise RequestError.field("model.vocab_size", rows, f"is smaller than the tokenizer's {size} tokens")
        model = ConfigDict(self.model)
        model.vocab_size = rows
        return Settings(**{f.name: getattr(self, f.name) for f in fields(self) if f.name != "model"},
                        model=FrozenConfigDict(model))


def check(config) -> Settings:
    """Checks every field and how they fit together. Raises RequestError with one line for the first that is wrong."""
    if "teacher" in config and "student" in config:
        raise RequestError("the config is one of research.distill, of a teacher and a student: this takes one model's")
    groups = checked_fields(config, base.get_config())
    given = flatten(groups)
    _check_values(given)
    _check_model(given)
    _check_training(given)
    _check_mesh(given)
    return Settings(**{f.name: FrozenConfigDict(groups[f.name]) for f in fields(Settings)})


def checked_fields(config, default: ConfigDict) -> dict:
    """The config as nested dicts with exactly the fields of `default`, each of its type; 3 becomes 3.0 where that is
    meant. Raises RequestError."""
    plain = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    known, given = flatten(default.to_dict()), flatten(plain)
    for name, value in given.items():
        check_name(name, value, known)
    for name in known:
        if name not in given:
            raise RequestError(f"config.{name} is missing")
        _check_type(name, given[name], known[name])
        if isinstance(known[name], float):
            *path, leaf = name.split(".")
            node = plain
            for part in path:
                node = node[part]
            node[leaf] = float(given[name])
    return plain


def _check_type(name: str, value, default) -> None:
    optional = default is None  # the optional fields are whole numbers
    expected = int if optional else type(default)
    if optional and value is None:
        return
    fits = isinstance(value, expected) or (expected is float and isinstance(value, int))
    if not fits or (isinstance(value, bool) and expected is not bool):
        what = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[expected]
        raise RequestError.field(name, value, f"must be {what}, not {type(value).__name__}")
    if expected is float and not math.isfinite(value):
        raise RequestError.field(name, value, "must be finite")
    if expected is int and abs(value) > LARGEST:
        raise RequestError.field(name, value, f"must be at most {LARGEST}")


def _check_values(c: dict) -> None:
    for name, choices in CHOICES.items():
        if c[name] not in choices:
            raise RequestError.field(name, c[name], f"must be one of {', '.join(choices)}{nearest(c[name], choices)}")
    for bound, names in AT_LEAST.items():
        for name in names:
            if c[name] < bound:
                raise RequestError.field(name, c[name], f"must be at least {bound}")
    for name in ("model.vocab_size", "model.q_lora_rank"):
        if c[name] is not None and c[name] < 1:
            raise RequestError.field(name, c[name], "must be at least 1, or None")
    for name in POSITIVE:
        if c[name] <= 0:
            raise RequestError.field(name, c[name], "must be above 0")
    for name in FRACTIONS:
        if not 0 <= c[name] <= 1:
            raise RequestError.field(name, c[name], "must be between 0 and 1")
    for name in BELOW_ONE:
        if not 0 <= c[name] < 1:
            raise RequestError.field(name, c[name], "must be at least 0 and below 1")


def _check_model(c: dict) -> None:
    if c["model.attention"] == "mla":
        if c["model.qk_rope_head_dim"] % 2:
            raise RequestError.field("model.qk_rope_head_dim", c["model.qk_rope_head_dim"],
                                     "must be even: rotary channels turn in pairs")
    else:
        if c["model.head_dim"] % 2:
            raise RequestError.field("model.head_dim", c["model.head_dim"],
                                     "must be even: rotary channels turn in pairs")
        if c["model.num_attention_heads"] % c["model.num_key_value_heads"]:
            raise RequestError.field("model.num_key_value_heads", c["model.num_key_value_heads"],
                                     f"does not divide config.model.num_attention_heads="
                                     f"{c['model.num_attention_heads']}")
    scaling = {k.rsplit(".", 1)[1]: v for k, v in c.items() if k.startswith("model.rope_scaling.")}
    if scaling["type"] == "yarn" and scaling["beta_fast"] <= scaling["beta_slow"]:
        raise RequestError.field("model.rope_scaling.beta_fast", scaling["beta_fast"],
                                 f"must be above config.model.rope_scaling.beta_slow={scaling['beta_slow']}")
    if scaling["type"] == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise RequestError.field("model.rope_scaling.high_freq_factor", scaling["high_freq_factor"],
                                 "must be above config.model.rope_scaling.low_freq_factor="
                                 f"{scaling['low_freq_factor']}")
    if c["model.attention_implementation"] == "cudnn" and c["data.mask_documents"]:
        raise RequestError.field("model.attention_implementation", "cudnn",
                                 "masks no documents: it needs config.data.mask_documents=False")
    experts = c["model.n_routed_experts"]
    if experts:
        _check_experts(c, experts)


def _check_experts(c: dict, experts: int) -> None:
    chosen, groups, kept = c["model.num_experts_per_tok"], c["model.n_group"], c["model.topk_group"]
    if chosen > experts:
        raise RequestError.field("model.num_experts_per_tok", chosen,
                                 f"must be at most config.model.n_routed_experts={experts}")
    if c["model.topk_method"] != "greedy":  # which looks at no groups
        if experts % groups:
            raise RequestError.field("model.n_group", groups,
                                     f"does not divide config.model.n_routed_experts={experts}")
        if kept > groups:
            raise RequestError.field("model.topk_group", kept, f"must be at most config.model.n_group={groups}")
        if kept * (experts // groups) < chosen:
            raise RequestError.field("model.topk_group", kept,
                                     f"is too small: {kept} groups of {experts // groups} experts hold fewer than "
                                     f"config.model.num_experts_per_tok={chosen}")
    if c["model.first_k_dense_replace"] > c["model.num_hidden_layers"]:
        raise RequestError.field("model.first_k_dense_replace", c["model.first_k_dense_replace"],
                                 f"must be at most config.model.num_hidden_layers={c['model.num_hidden_layers']}")


def _check_training(c: dict) -> None:
    batch, pieces, start = c["training.batch_size"], c["training.accumulation_steps"], c["training.batch_ramp_start"]
    if batch % pieces:
        raise RequestError.field("training.accumulation_steps", pieces,
                                 f"does not divide config.training.batch_size={batch}")
    if start > batch or start % pieces:
        raise RequestError.field("training.batch_ramp_start", start,
                                 f"must be a multiple of config.training.accumulation_steps={pieces} and at most "
                                 f"config.training.batch_size={batch}")
    if c["model.balance_loss"] == "batch" and pieces > 1 and c["model.aux_loss_alpha"] > 0:
        raise RequestError.field("training.accumulation_steps", pieces,
                                 "must be 1 with config.model.balance_loss='batch', whose product of means over the "
                                 "batch does not split into pieces")
    if RECIPES[c["precision.recipe"]].delayed and pieces > 1:
        raise RequestError.field("training.accumulation_steps", pieces,
                                 f"must be 1 with config.precision.recipe={c['precision.recipe']!r}, whose histories "
                                 f"advance once a step")
    for name in filter(None, c["precision.high_precision"].split(",")):
        if name not in PROJECTIONS:
            raise RequestError.field("precision.high_precision", c["precision.high_precision"],
                                     f"has {name!r}{nearest(name, PROJECTIONS)}; the projections are "
                                     f"{', '.join(PROJECTIONS)}")
    length = c["data.sequence_length"]
    if length > c["model.max_position_embeddings"]:
        raise RequestError.field("data.sequence_length", length,
                                 f"must be at most config.model.max_position_embeddings="
                                 f"{c['model.max_position_embeddings']}")
    if c["mtp.num_nextn_predict_layers"] >= length:
        raise RequestError.field("mtp.num_nextn_predict_layers", c["mtp.num_nextn_predict_layers"],
                                 f"must be below config.data.sequence_length={length}")
    if c["data.source"] == "files" and not c["data.files"]:
        raise RequestError.field("data.files", "", "must name files or globs with config.data.source='files'")
    if c["data.source"] == "huggingface" and not c["data.huggingface_dataset"]:
        raise RequestError.field("data.huggingface_dataset", "",
                                 "must name a dataset with config.data.source='huggingface'")
    if not c["data.validation_fraction"]:
        raise RequestError.field("data.validation_fraction", c["data.validation_fraction"],
                                 "must be above 0: every run ends with an evaluation")
    boundaries = ("optimizer.warmup_fraction", "optimizer.plateau_until", "optimizer.cosine_until",
                  "optimizer.tail_from")
    for earlier, later in zip(boundaries, boundaries[1:], strict=False):
        if c[earlier] > c[later]:
            raise RequestError.field(later, c[later], f"must be at least config.{earlier}={c[earlier]}")


def _check_mesh(c: dict) -> None:
    """What any mesh must divide; `parallel/mesh.py` refuses what training cannot run."""
    shards = c["mesh.data"] * c["mesh.fsdp"] * c["mesh.expert"]
    pieces = shards * c["training.accumulation_steps"]
    for name in ("training.batch_size", "training.batch_ramp_start"):
        if c[name] % pieces:
            raise RequestError.field(name, c[name], f"must be a multiple of {pieces} = mesh.data * mesh.fsdp * "
                                     "mesh.expert * training.accumulation_steps")
    experts = c["model.n_routed_experts"]
    if c["mesh.expert"] > 1 and not experts:
        raise RequestError.field("mesh.expert", c["mesh.expert"], "must be 1: the model has no experts")
    for axis, name in (("expert", "model.n_routed_experts"), ("tensor", "model.num_attention_heads")):
        if c[name] % c[f"mesh.{axis}"]:
            raise RequestError.field(f"mesh.{axis}", c[f"mesh.{axis}"], f"does not divide config.{name}={c[name]}")
    if c["training.pipeline_schedule"] != "1f1b" and c["mesh.pipeline"] == 1:
        raise RequestError.field("training.pipeline_schedule", c["training.pipeline_schedule"],
                                 "must be '1f1b' with config.mesh.pipeline=1: there are no stages")
    if c["mesh.pipeline"] > c["model.num_hidden_layers"]:
        raise RequestError.field("mesh.pipeline", c["mesh.pipeline"], "must be at most config.model.num_hidden_layers="
                                 f"{c['model.num_hidden_layers']}")
    _check_placement(c)


def _check_placement(c: dict) -> None:
    """What `parallel/placement.py` needs."""
    nodes, devices, groups = c["evaluation.expert_nodes"], c["mesh.expert"], c["model.n_group"]
    groups = 1 if c["model.topk_method"] == "greedy" else groups
    for name, number in (("mesh.expert", devices), ("model.n_group", groups)):
        if number % nodes:
            raise RequestError.field("evaluation.expert_nodes", nodes, f"does not divide config.{name}={number}")
    redundant, experts = c["evaluation.redundant_experts"], c["model.n_routed_experts"]
    if redundant % devices:
        raise RequestError.field("evaluation.redundant_experts", redundant,
                                 f"must be a multiple of config.mesh.expert={devices}: devices have as many each")
    most = experts * (devices // nodes - 1) if c["model.first_k_dense_replace"] < c["model.num_hidden_layers"] else 0
    if redundant > most:
        raise RequestError.field("evaluation.redundant_experts", redundant,
                                 f"must be at most {most}: a device has use for one copy of an expert")


def read(workdir: Path) -> Settings:
    """The settings that a run left in its workdir."""
    path = workdir / "config.json"
    try:
        plain = json.loads(path.read_bytes())
        if not isinstance(plain, dict):
            raise RequestError(f"must be a JSON object, not {type(plain).__name__}")
        for group, field, value in ((*name.split("."), value) for name, value in LATER.items()):
            if isinstance(plain.get(group), dict):
                plain[group].setdefault(field, value)
        return check(plain)
    except (FileNotFoundError, NotADirectoryError):
        raise RequestError(f"{path} does not exist: {workdir} is not the workdir of a run") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not JSON: {error}") from None
