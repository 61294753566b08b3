"""Every experiment: it builds, its arms build, overrides reach it, and its smoke trains."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import base
from research import config, experiment
from research.accounting import flops, parameters
from research.errors import RequestError
from research.model.build import make_model
from research.training.step import abstract_state, make_train_step
from tests import tiny
from tests.training import runs

FILES = sorted(path.relative_to(runs.ROOT).as_posix() for path in (runs.ROOT / "experiments").glob("[!_]*.py")
               if path.stem not in runs.PIPELINES | {"base"})


def arms_of(file: str) -> list[str]:
    """The arms that a file says it has."""
    with pytest.raises(RequestError) as caught:
        experiment.load(f"{runs.ROOT / file}:?")
    return re.search("it has (.*)$", str(caught.value))[1].split(", ")


ARMS = [(file, arm) for file in FILES for arm in ("", *arms_of(file))]


def load(file: str, arms: str):
    return experiment.load(f"{runs.ROOT / file}:{arms}")


def code_paths(file: str) -> tuple:
    """What decides which code a smoke of the file runs; tests/model has all routers, tests/training all optimisers.

    Without FP8, 16 bits change the types of products alone: any file with them will do.
    """
    c = load(file, "smoke")
    quantised = c.precision.recipe if c.precision.recipe.startswith("fp8") else ""
    return c.model.attention, bool(c.model.n_routed_experts), quantised


FIRST = {}  # the file that trains for all whose smokes run the same code
for _file in ("experiments/nano.py", *FILES):
    FIRST.setdefault(code_paths(_file), _file)


def test_there_are_experiments():
    assert {"experiments/nano.py", "experiments/deepseek_v3.py"} <= set(FILES)
    assert all("smoke" in arms_of(file) for file in FILES)


@pytest.mark.parametrize("file, arm", ARMS)
def test_every_arm_builds_and_shrinks(file, arm):
    chosen = load(file, arm)
    assert chosen.is_locked
    settings = config.check(chosen)
    assert set(experiment.flatten(settings.to_config().to_dict())) == set(experiment.flatten(base.get_config()))
    small = config.check(load(file, f"{arm}:smoke" if arm else "smoke"))
    assert small.training.steps >= 20 and small.training.batch_size % 8 == 0
    assert small.mtp.num_nextn_predict_layers >= 1 and small.model.n_routed_experts % 8 == 0
    for name in ("attention", "scoring_func", "topk_method", "bias_update", "balance_loss"):
        assert small.model[name] == settings.model[name]
    assert (small.model.q_lora_rank is None) == (settings.model.q_lora_rank is None)
    assert small.precision == settings.precision and small.data.fim_rate == settings.data.fim_rate


def test_the_ladder_is_what_its_page_says():
    """Every number of its table, by shape evaluation; sizes by their names; V3's proportions; 20 tokens a parameter."""
    page = (runs.ROOT / "experiments/ladder.py").read_text()
    rows = {row[0]: row[1:] for row in re.findall(r"^ +(\d+[mb]) +(\S+)M +(\S+)M +(\d+) +(\S+)B +(\S+)$", page, re.M)}
    assert [*rows] == [arm for arm in arms_of("experiments/ladder.py") if arm != "smoke"]
    v3 = load("experiments/deepseek_v3.py", "").model
    for arm, row in rows.items():
        settings = config.check(load("experiments/ladder.py", arm))
        m, counted, steps = settings.model, parameters.count(settings), settings.training.steps
        tokens = steps * settings.training.batch_size * settings.data.sequence_length
        assert row == (f"{counted['total'] / 1e6:.2f}", f"{counted['active'] / 1e6:.2f}", str(steps),
                       f"{tokens / 1e9:.3f}", f"{tokens * flops.training_per_token(settings):.1e}")
        assert counted["total"] == pytest.approx(float(arm[:-1]) * {"m": 1e6, "b": 1e9}[arm[-1]], rel=0.1)
        assert tokens / counted["active"] == pytest.approx(20, rel=1e-3)
        for name in ("intermediate_size", "moe_intermediate_size", "q_lora_rank"):
            assert m[name] / m.hidden_size == v3[name] / v3.hidden_size, name
        for name in ("qk_rope_head_dim", "v_head_dim", "kv_lora_rank"):
            assert m[name] / m.qk_nope_head_dim == v3[name] / v3.qk_nope_head_dim, name
        assert m.num_attention_heads * m.v_head_dim / m.hidden_size == 128 * 128 / 7168
        for name in ("attention", "scoring_func", "topk_method", "n_group", "topk_group", "num_experts_per_tok",
                     "n_shared_experts", "bias_update", "bias_update_speed", "balance_loss", "aux_loss_alpha"):
            assert m[name] == v3[name], name


@pytest.mark.parametrize("changes", [
    ("model.hidden_size=448", "model.num_hidden_layers=5", "model.n_routed_experts=128", "data.bpe_vocab_size=1024",
     "model.qk_nope_head_dim=64", "training.batch_size=8", "data.sequence_length=1024"),
    ("model.first_k_dense_replace=2", "model.num_experts_per_tok=4", "model.n_shared_experts=2", "model.v_head_dim=48",
     "model.q_lora_rank=64", "model.kv_lora_rank=64", "model.qk_rope_head_dim=8", "model.moe_intermediate_size=128",
     "model.intermediate_size=600", "model.num_attention_heads=10", "model.vocab_size=9000")])
def test_the_steps_of_a_rung_follow_what_is_changed(changes):
    settings = config.check(experiment.change(load("experiments/ladder.py", "10m"), changes))
    tokens = settings.training.steps * settings.training.batch_size * settings.data.sequence_length
    assert tokens / parameters.count(settings)["active"] == pytest.approx(20, rel=1e-3)
    fixed = experiment.change(load("experiments/ladder.py", "10m"), [*changes, "training.steps=7"])
    assert config.check(fixed).training.steps == 7


@pytest.mark.parametrize("file", FILES)
def test_overrides_reach_an_experiment(file):
    settings = config.check(experiment.change(load(file, "smoke"), [
        "training.steps=37", "model.vocab_size=None", "model.hidden_size=72", "mtp.num_nextn_predict_layers=0"]))
    assert settings.training.steps == 37 and settings.model.hidden_size == 72
    assert settings.with_vocabulary(300).model.vocab_size == 320
    with pytest.raises(RequestError, match=r"^config\.training\.step=3 is not a field .*config\.training\.steps"):
        experiment.change(load(file, ""), ["training.step=3"])


@pytest.mark.parametrize("file", FILES)
def test_an_experiment_says_its_command(file):
    text = (runs.ROOT / file).read_text()
    assert text.startswith('"""') and "--config=" + file in text


def equal_layers(file: str) -> list[str]:
    """Fields with which all layers of a smoke are equal, and compiled once.

    A network of a dense layer is what the shared experts are, a multi-token module's block what the layers are.
    """
    fields = load(file, "smoke")
    dense = 0 if fields.model.n_shared_experts else fields.model.first_k_dense_replace
    modules = fields.mtp.num_nextn_predict_layers if fields.precision.recipe.startswith("fp8") else 0
    return [f"model.first_k_dense_replace={dense}", f"mtp.num_nextn_predict_layers={modules}", "model.scan_unroll=1",
            "data.sequence_length=32"]


@pytest.mark.parametrize("file", [file for file in FILES if file not in FIRST.values()])
def test_the_smoke_takes_a_step(file):
    """The step alone, of drawn weights and tokens; the file of the same code paths trains from the command line."""
    settings = config.check(experiment.change(load(file, "smoke"), equal_layers(file))).with_vocabulary(262)
    model = make_model(settings)
    shapes = abstract_state(model, settings)
    params = tiny.filled(shapes["params"], seed=0)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes) | {"params": params}
    rows, length = settings.training.batch_size, settings.data.sequence_length
    batch = tiny.batch(((length // 2, length - length // 2),) * rows, length)
    after, metrics = jax.jit(make_train_step(model, settings))(state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    assert after["step"] == 1 and all(jnp.isfinite(x).all() for x in jax.tree.leaves((after, metrics)))
    before = tiny.leaves(params)
    unchanged = [name for name, x in tiny.leaves(after["params"]).items() if (x == before[name]).all()]
    assert not unchanged


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Of tokens and compiled programs, for all smokes."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("file", FIRST.values())
def test_the_smoke_trains(file, tmp_path, cache):
    """From the command line: the default one 20 steps, as it is but for shorter rows, the others one."""
    default = file == "experiments/nano.py"
    steps = 20 if default else 1
    fields = ["model.scan_unroll=1", "data.sequence_length=32"] if default else equal_layers(file)
    workdir = tmp_path / "run"
    code, out, err = runs.finish(runs.start([
        sys.executable, "-m", "research.main", f"--config={file}:smoke", f"--workdir={workdir}",
        f"--config.data.cache={cache}", f"--config.training.steps={steps}", "--config.data.max_documents=60",
        "--config.data.validation_fraction=0.03", "--config.evaluation.samples=0",
        *(f"--config.{field}" for field in fields)], cache))
    assert code == 0, err
    assert "bits per byte" in out and "Traceback" not in err
    losses = [line["next_token_loss"] for line in runs.lines(workdir, "train")]
    validation, = runs.lines(workdir, "validation")
    assert len(losses) == steps and validation["step"] == steps
    modules = experiment.change(load(file, "smoke"), fields).mtp.num_nextn_predict_layers
    assert len(validation["mtp_accuracy"]) == modules
    if default:
        assert max(losses[-3:]) < losses[0] - 1, losses
        assert validation["loss"] < losses[0] - 1
