"""Every experiment: it builds, its arms build, overrides reach it, and its smoke trains."""

import re
import sys

import pytest

from experiments import base
from research import config, experiment
from research.errors import RequestError
from tests.training import runs

FILES = sorted(path.relative_to(runs.ROOT).as_posix() for path in (runs.ROOT / "experiments").glob("[!_]*.py")
               if path.name != "base.py")


def arms_of(file: str) -> list[str]:
    """The arms that a file says it has."""
    with pytest.raises(RequestError) as caught:
        experiment.load(f"{runs.ROOT / file}:?")
    return re.search("it has (.*)$", str(caught.value))[1].split(", ")


ARMS = [(file, arm) for file in FILES for arm in ("", *arms_of(file))]


def load(file: str, arms: str):
    return experiment.load(f"{runs.ROOT / file}:{arms}")


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


@pytest.mark.parametrize("file", FILES)
def test_the_smoke_trains(file, tmp_path):
    steps = 20 if file == "experiments/nano.py" else 1
    workdir = tmp_path / "run"
    code, out, err = runs.finish(runs.start([
        sys.executable, "-m", "research.main", f"--config={file}:smoke", f"--workdir={workdir}",
        f"--config.data.cache={tmp_path}/cache", f"--config.training.steps={steps}", "--config.data.max_documents=60",
        "--config.data.validation_fraction=0.03", "--config.evaluation.samples=0"], tmp_path / "cache",
        XLA_FLAGS="--xla_backend_optimization_level=0"))  # compiles in half the time
    assert code == 0, err
    assert "bits per byte" in out and "Traceback" not in err
    losses = [line["next_token_loss"] for line in runs.lines(workdir, "train")]
    validation, = runs.lines(workdir, "validation")
    assert len(losses) == steps and validation["step"] == steps and validation["mtp_accuracy"]
    if steps == 20:
        assert max(losses[-3:]) < losses[0] - 1, losses
        assert validation["loss"] < losses[0] - 1
