"""The configuration: overrides reach what is derived, files are found, settings are checked and frozen."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from experiments import base
from kernels import choice
from research import config, experiment
from research.errors import RequestError, nearest

ROOT = Path(__file__).parents[1]


def changed(*assignments: str) -> config.Settings:
    return config.check(experiment.change(base.get_config(), assignments))


def refused(*assignments: str) -> str:
    with pytest.raises(RequestError) as caught:
        changed(*assignments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_field_has_a_comment_or_a_name_that_a_paper_gives_it():
    source = (ROOT / "experiments/base.py").read_text()
    for name in experiment.flatten(base.get_config().to_dict()):
        assert re.search(rf"\b\w\.{name.rsplit('.', 1)[-1]} = ", source), name


def test_every_number_has_a_rule_and_every_rule_a_field():
    defaults = experiment.flatten(base.get_config().to_dict())
    numbers = {name for name, value in defaults.items() if type(value) in (int, float)}
    bounded = {name for names in config.AT_LEAST.values() for name in names}
    ruled = bounded | {*config.POSITIVE, *config.FRACTIONS, *config.BELOW_ONE}
    assert numbers - ruled == {"data.bpe_vocab_size"}  # the tokenizer's own: it knows how many bytes and specials
    assert ruled <= set(defaults) and set(config.CHOICES) <= set(defaults)


@pytest.mark.parametrize("assignment, name, value", [
    ("training.steps=7", "training.steps", 7),
    ("model.q_lora_rank=48", "model.q_lora_rank", 48),
    ("model.q_lora_rank=None", "model.q_lora_rank", None),
    ("model.vocab_size=512", "model.vocab_size", 512),
    ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
    ("optimizer.learning_rate=3e-3", "optimizer.learning_rate", 3e-3),
    ("model.norm_topk_prob=false", "model.norm_topk_prob", False),
    ("model.norm_topk_prob=True", "model.norm_topk_prob", True),
    ("model.rope_scaling.type=yarn", "model.rope_scaling.type", "yarn"),
    ("data.files=a=b, c.txt", "data.files", "a=b, c.txt"),
    ("data.tokenizer=12", "data.tokenizer", "12"),
])
def test_an_override_has_its_fields_type(assignment, name, value):
    found = experiment.flatten(changed(assignment).to_config().to_dict())
    assert found[name] == value and type(found[name]) is type(value)
    unchanged = experiment.flatten(changed().to_config().to_dict())
    assert {other for other in found if found[other] != unchanged[other]} <= {name}


def test_the_last_override_of_a_field_counts():
    assert changed("training.steps=7", "training.steps=9").training.steps == 9


def test_what_is_derived_follows_an_override():
    chosen = base.get_config()
    chosen.unlock()
    chosen.model.intermediate_size = chosen.model.get_ref("hidden_size") * 2
    settings = config.check(experiment.change(chosen.lock(), ["model.hidden_size=48"]))
    assert settings.model.intermediate_size == 96


@pytest.mark.parametrize("tokens, rows", [(1, 64), (64, 64), (65, 128), (262, 320), (4096, 4096)])
def test_the_vocabulary_follows_the_tokenizer(tokens, rows):
    assert changed().with_vocabulary(tokens).model.vocab_size == rows
    assert changed("model.vocab_size=4100").with_vocabulary(tokens).model.vocab_size == 4100


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused():
    with pytest.raises(RequestError, match=r"^config\.model\.vocab_size=64 is smaller than the tokenizer's 65 tokens$"):
        changed("model.vocab_size=64").with_vocabulary(65)


def test_settings_cannot_be_changed_and_survive_their_file(tmp_path):
    settings = changed("model.q_lora_rank=24", "optimizer.beta2=0.9")
    with pytest.raises(AttributeError):
        settings.model.hidden_size = 3
    with pytest.raises(AttributeError):
        settings.training = None
    (tmp_path / "config.json").write_text(settings.to_json())
    assert config.read(tmp_path) == settings
    assert json.loads(settings.to_json())["model"]["q_lora_rank"] == 24


def test_whole_numbers_become_fractions_where_a_fraction_is_meant():
    plain = base.get_config().to_dict()
    plain["model"]["rope_theta"] = 500000
    theta = config.check(plain).model.rope_theta
    assert theta == 500000.0 and isinstance(theta, float)


def test_the_config_knows_the_implementations_without_jax():
    assert config.CHOICES["precision.implementation"] == choice.IMPLEMENTATIONS
    code = "import sys; from research import config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_groups_are_checked_where_they_are_used():
    groups = ("model.n_group=3", "model.topk_group=5", "model.num_experts_per_tok=6")
    assert changed("model.topk_method=greedy", *groups).model.topk_group == 5
    for method in ("noaux_tc", "group_limited_greedy"):
        assert refused(f"model.topk_method={method}", *groups).startswith("config.model.n_group=3 does not divide ")
        assert refused(f"model.topk_method={method}", "model.n_group=4", "model.topk_group=5").startswith(
            "config.model.topk_group=5 must be at most ")
        assert refused(f"model.topk_method={method}", "model.n_group=4", "model.num_experts_per_tok=6").startswith(
            "config.model.topk_group=1 is too small: ")


@pytest.mark.parametrize("fields, said", [
    ((), "redundant_experts=8 must be at most 0: "),  # one device
    (("mesh.expert=16", "training.batch_size=16"), "redundant_experts=8 must be a multiple of config.mesh.expert=16"),
    (("mesh.expert=4", "evaluation.redundant_experts=52"), "redundant_experts=52 must be at most 48: "),
    (("mesh.expert=4", "model.n_group=4", "model.topk_group=4", "evaluation.expert_nodes=2",
      "evaluation.redundant_experts=20"), "redundant_experts=20 must be at most 16: "),
    (("mesh.expert=4", "model.first_k_dense_replace=4"), "redundant_experts=8 must be at most 0: "),
    (("mesh.expert=4", "evaluation.expert_nodes=2"), "expert_nodes=2 does not divide config.model.n_group=1"),
    (("mesh.expert=4", "model.n_group=4", "model.topk_method=greedy", "evaluation.expert_nodes=2"),
     "expert_nodes=2 does not divide config.model.n_group=1"),
    (("mesh.expert=4", "evaluation.expert_nodes=8"), "expert_nodes=8 does not divide config.mesh.expert=4"),
])
def test_redundant_experts_fit_devices_and_groups(fields, said):
    assert changed("mesh.expert=4", "evaluation.redundant_experts=48").evaluation.redundant_experts == 48
    assert refused("evaluation.redundant_experts=8", *fields).startswith(f"config.evaluation.{said}")


def test_the_config_is_locked():
    with pytest.raises(AttributeError):
        base.get_config().training.step = 3
    with pytest.raises(TypeError):
        base.get_config().training.steps = "many"


@pytest.mark.parametrize("name, value", [
    *((name, bound - 1) for bound, names in config.AT_LEAST.items() for name in names),
    *((name, 0) for name in config.POSITIVE),
    *((name, wrong) for name in config.FRACTIONS for wrong in (-0.5, 1.5)),
    *((name, wrong) for name in config.BELOW_ONE for wrong in (-0.5, 1)),
    *((name, "x") for name in config.CHOICES),
    ("model.vocab_size", 0), ("model.q_lora_rank", 0), ("training.seed", 2**31),
])
def test_a_value_out_of_bounds_names_field_and_value(name, value):
    message = refused(f"{name}={value}")
    default = experiment.flatten(base.get_config().to_dict())[name]
    shown = repr(value) if isinstance(value, str) else float(value) if isinstance(default, float) else value
    assert message.startswith(f"config.{name}={shown} must be ")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_number_must_be_finite(value):
    assert refused(f"optimizer.clip_norm={value}") == f"config.optimizer.clip_norm={float(value)} must be finite"


def test_a_run_from_before_a_field_is_what_it_was(tmp_path):
    settings = config.check(base.get_config())
    plain = json.loads(settings.to_json())
    for name, value in config.LATER.items():
        group, field = name.split(".")
        assert plain[group].pop(field) == value  # the default is what runs did before
    (tmp_path / "config.json").write_text(json.dumps(plain))
    assert config.read(tmp_path) == settings
    (tmp_path / "config.json").write_text('{"training": 3}')
    with pytest.raises(RequestError, match="training"):
        config.read(tmp_path)


def test_files_from_elsewhere_are_checked_as_well():
    for group, field, value in (("training", "steps", True), ("training", "steps", 1.0), ("optimizer", "beta1", "0.9"),
                                ("data", "source", None), ("model", "norm_topk_prob", 1), ("training", "seed", [1]),
                                ("optimizer", "beta1", math.nan), ("training", "steps", {"a": 1})):
        plain = base.get_config().to_dict()
        plain[group][field] = value
        with pytest.raises(RequestError, match=rf"^config\.{group}\.{field}"):
            config.check(plain)
    plain = base.get_config().to_dict()
    del plain["model"]["n_group"]
    with pytest.raises(RequestError, match=r"^config\.model\.n_group is missing$"):
        config.check(plain)


@pytest.mark.parametrize("given, meant", [
    ("model.n_expert", "model.n_routed_experts"), ("steps", "training.steps"), ("training.step", "training.steps"),
    ("model.n_experts_per_tok", "model.num_experts_per_tok"), ("optimiser.beta1", "optimizer.beta1"),
    ("rope_scaling.type", "model.rope_scaling.type"), ("kv_lora_rank", "model.kv_lora_rank"),
])
def test_the_nearest_field_is_named(given, meant):
    assert refused(f"{given}=3") == (f"config.{given}=3 is not a field of the configuration "
                                     f"(did you mean config.{meant}?)")


def test_nothing_is_named_where_nothing_is_near():
    assert refused("zzzz=3") == "config.zzzz=3 is not a field of the configuration"
    assert nearest("x", ()) == ""


def test_an_experiment_is_loaded_without_a_trace(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from experiments import base\n\ndef get_config():\n    c = base.get_config()\n"
                    "    c.training.steps = 3\n    return c\n")
    assert experiment.load(str(path)).training.steps == 3
    assert [file.name for file in tmp_path.iterdir()] == ["mine.py"]


def test_arms_apply_in_order_and_smoke_keeps_them():
    sweep = {"few": {"training.steps": 5, "model.n_group": 2, "model.topk_group": 1}}
    assert base.select(base.get_config(), "few", sweep).training.steps == 5
    both = base.select(base.get_config(), "few:smoke", sweep)
    assert both.training.steps == 20 and both.model.n_group == 2
    assert isinstance(both, ConfigDict)
    with pytest.raises(RequestError, match=r"^has no arm 'fw' \(did you mean few\?\); it has few, smoke$"):
        base.select(base.get_config(), "fw", sweep)
