"""Tables that read more off their models: arms that start from others' weights, what is read, when it is read anew."""

import dataclasses
import json
import re
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import bench_acceptance, config
from research.data.packing import Tokens
from research.data.sources import Document
from research.data.tokenizer import Tokenizer, _bytes
from research.errors import RunError
from research.model.build import make_model
from research.model.moe import Gate
from research.precision.products import Products
from research.precision.recipe import RECIPES
from research.tables import judgement, moe_architecture, mtp_decode, runner, study, v3_specialisation, yarn_needle
from research.tables.quantities import QUANTITIES, Pictured
from research.tables.readings import Reading
from research.tables.study import Study
from research.training import evaluation, step
from research.training.checkpoint import Checkpoints
from research.training.evaluation import evaluate
from research.tree import map_paths
from tests import tiny
from tests.tables.test_study import FIELDS, recorded
from tests.tables.test_tables import PNG
from tests.tables.test_tables import run as answer

READ = {name: runner.load(name) for name in ("moe_architecture", "mtp_decode", "v3_specialisation", "yarn_needle")}
PAIR = Study("yarn", ("base", "untrained"), ("bits per byte",), (), starts={"untrained": "base"},
             untrained=("untrained",))
FOUND = {  # what a reading leaves, by its name
    "needles": {"found": {"1": [1.0, 0.5], "2": [0.75, 0.25], "3": [0.5, 0.0], "4": [0.25, 0.0]}},
    "domains": {"all": [[1.0, 1.0], [1.5, 0.5]],
                "domains": {"json": [[1.0, 1.0], [0.5, 1.5]], "turtle": [[2.0, 0.0], [1.5, 0.5]]}},
    "drafting": {"rows": [{"temperature": t, "k": k, "tokens_per_step": [1.5, 1.25, 1.75], "speedup": [0.5 + k, 9, 0],
                           "acceptance": [[0.5, 0.25][:k], [0.75, 0.5][:k], [0.25, 0.0][:k]]}
                          for t in (0.0, 0.6) for k in (0, 1, 2)]},
    "masked": {"loss": {"1": 4.25, "2": 4.5, "3": 4.75, "4": 5.0}},
}


@pytest.fixture(scope="module")
def fields(tmp_path_factory) -> list[str]:
    """Of test_study's models, on texts of their own: six are held out."""
    folder = tmp_path_factory.mktemp("texts")
    texts = [" ".join(str(n * m) for m in range(n % 40, 90)) for n in range(80)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [*FIELDS, f"data.cache={folder / 'cache'}", "data.source=files", f"data.files={folder / 'text.jsonl'}",
            "data.max_documents=0", "data.fim_rate=0"]


@pytest.fixture(scope="module")
def pair(fields, tmp_path_factory):
    """A dense base, trained for two steps on rows with needles, and its weights under YaRN with a factor of 1."""
    planned = study.plan(PAIR, ["micro"], [5], [*fields, "model.rope_scaling.factor=1.0"], tmp_path_factory.mktemp("a"))
    study.train(planned)
    return planned


@pytest.fixture(scope="module")
def mixture(fields, tmp_path_factory):
    """Random weights of one layer with experts, saved as a run's."""
    one = Study("yarn", ("base",), (), ())
    run, = study.plan(one, ["micro"], [5], [*fields, "model.n_routed_experts=8", "model.first_k_dense_replace=0"],
                      tmp_path_factory.mktemp("b"))
    settings = run.settings.with_vocabulary(320)
    _, variables = tiny.model(settings)
    checkpoints = Checkpoints(run.workdir / "checkpoints", 1, 0)
    checkpoints.save(2, jax.tree.map(np.asarray, variables) | {"optimizer": {}, "ema": None, "step": np.int32(2)}, {})
    checkpoints.wait()
    (run.workdir / "config.json").write_text(settings.to_json())
    Tokenizer(_bytes()).save(run.workdir / "tokenizer.json")
    return run


def changed(run: study.Run, **fields) -> study.Run:
    """The run under other settings."""
    c = run.settings.to_config()
    c.update_from_flattened_dict(fields)
    return dataclasses.replace(run, settings=config.check(c))


def test_an_untrained_arm_is_its_starts_weights_under_its_own_settings(pair, monkeypatch):
    base, untrained = pair
    assert (untrained.start, untrained.trained, base.start, base.trained) == (base, False, None, True)
    assert untrained.settings.model.rope_scaling.type == "yarn" and not (untrained.workdir / "checkpoints").exists()
    ours, theirs = (run[-1] for run in map(study.lines_of, (untrained, base)))
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)  # a factor of 1 is no YaRN
    assert ours["targets"] == theirs["targets"] and ours["step"] == 2
    assert config.read(untrained.workdir).model.rope_scaling.type == "yarn"
    assert "packages" in json.loads((untrained.workdir / "environment.json").read_text())
    monkeypatch.setattr(study, "_evaluate", lambda run: pytest.fail(f"{run} is finished"))
    study.train(pair)
    other = changed(untrained, **{"model.rope_scaling.factor": 4.0})
    assert study.lines_of(other) is None and study.weights_of(other)[1].config.rope_scaling.factor == 4


def loss_of(settings, model, variables, corpus) -> float:
    return evaluate(step.make_eval_step(model, settings), variables | {"ema": None}, corpus, settings)["loss"]


def test_a_disabled_shared_expert_is_one_that_adds_nothing(mixture):
    """Beside the same model with the shared expert's last matrix at zero, whose tokens choose one more."""
    assert mixture.settings.model.n_shared_experts == 1
    fields = {"model.num_experts_per_tok": 3}
    disabled = dataclasses.replace(changed(mixture, **fields | {"model.n_shared_experts": 0}), start=mixture,
                                   trained=False)
    settings, _, variables, corpus = study.weights_of(changed(mixture, **fields))
    silent = map_paths(lambda path, x: 0 * x if "shared_experts/down_proj" in path else x, variables)
    assert sum(not leaf.any() for leaf in jax.tree.leaves(silent["params"])) == 1
    ours, theirs = loss_of(*study.weights_of(disabled)), loss_of(settings, make_model(settings), silent, corpus)
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_the_disabled_arm_is_fine_4_less_its_shared_expert_and_others_choose_fewer(tmp_path):
    by_arm = {run.arm: run for run in study.plan(moe_architecture.STUDY, ["micro"], [0], (), tmp_path)}
    fine = by_arm["fine_4"]
    theirs = fine.settings.model
    changes = {"fine_4_disabled": {"n_shared_experts": 0, "num_experts_per_tok": theirs.num_experts_per_tok + 1}} | {
        f"fine_4_active_{k}": {"num_experts_per_tok": k} for k in (4, 5, 6)}
    assert {arm for arm, run in by_arm.items() if run.start} == changes.keys() and theirs.num_experts_per_tok == 7
    for arm, changed_to in changes.items():
        run, ours = by_arm[arm], by_arm[arm].settings.model
        assert run.start == fine and not run.trained
        assert {name: ours[name] for name in ours if ours[name] != theirs[name]} == changed_to
        assert run.settings.checkpoint == fine.settings.checkpoint


@pytest.mark.parametrize("masked", [0, 1, 10])  # 10: all that are left are chosen
@pytest.mark.parametrize("method", ["noaux_tc", "greedy"])
def test_a_gate_without_a_tokens_best_experts(method, masked):
    """Beside a loop over tokens: the bias has no say in which experts are gone, and weights are shares of the rest."""
    c = tiny.settings({"model.n_routed_experts": 12, "model.n_group": 1, "model.topk_group": 1,
                       "model.topk_method": method}).model
    gate = Gate(c, Products(RECIPES["float32"]))
    x_XD = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
    variables = tiny.filled(jax.eval_shape(gate.init, jax.random.key(0), x_XD), 1)
    if "routing" in variables:  # a bias that an affinity of 0 could not make up for
        variables["routing"] = jax.tree.map(lambda bias_E: 10 * bias_E, variables["routing"])
    bias_E = variables["routing"]["e_score_correction_bias"] if method == "noaux_tc" else np.zeros(12)
    plain = gate.apply(variables, x_XD)
    with nn.intercept_methods(moe_architecture.without_best(masked)):
        affinity_XE, indices_XK, weights_XK = found = gate.apply(variables, x_XD)
    np.testing.assert_array_equal(affinity_XE, plain[0])
    for affinity_E, indices_K, weights_K in zip(*map(np.asarray, found), strict=True):
        rest = np.argsort(-affinity_E)[masked:]
        expected = rest[np.argsort(-(affinity_E + bias_E)[rest])][:2]
        np.testing.assert_array_equal(indices_K, expected)
        np.testing.assert_allclose(weights_K, 2.5 * affinity_E[expected] / affinity_E[expected].sum(), rtol=1e-6)
    if not masked:
        for ours, theirs in zip(found, plain, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_masking_experts_moves_the_loss_and_masking_none_is_the_plain_evaluation(mixture, monkeypatch):
    monkeypatch.setattr(moe_architecture, "MASKED", (0, 4))
    found = moe_architecture.read(dataclasses.replace(mixture, arm="fine_4"))["loss"]
    plain = loss_of(*study.weights_of(mixture))
    assert found[0] == plain and abs(found[4] - plain) > 1e-3  # 2 of 8 experts
    assert moe_architecture.read(mixture) == {"loss": {}}


def test_sixteenths_are_experts_of_the_two_arms_that_figure_4_shows(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(study, "weights_of", lambda run: (run.settings, None, {}, None))
    monkeypatch.setattr(step, "make_eval_step", lambda *_: None)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: {"loss": 0.0})
    monkeypatch.setattr(moe_architecture, "without_best", lambda masked: asked.append(masked))
    read = {}
    for run in study.plan(moe_architecture.STUDY, ["micro"], [0], (), tmp_path):
        asked.clear()
        moe_architecture.read(run)
        read |= {run.arm: [*asked]} if asked else {}
    assert read == {"fine_4": [4, 8, 12, 16], "top_2_wide": [1, 2, 3, 4]}


def test_phases_start_from_one_another_and_read_as_many_tokens(tmp_path):
    by_arm = {run.arm: run for run in study.plan(yarn_needle.STUDY, ["micro", "mini", "gpu"], [0], (), tmp_path)
              if run.size == "mini"}
    base = by_arm["base"].settings
    T, tokens = base.data.sequence_length, base.data.sequence_length * base.training.batch_size
    for arm, times in (("half", 2), ("plain_half", 2), ("extended", 4), ("plain", 4)):
        run, s = by_arm[arm], by_arm[arm].settings
        assert run.start.arm == yarn_needle.STUDY.starts[arm] and run.trained
        assert s.checkpoint.initialize_from == str(run.start.workdir) == str(tmp_path / f"yarn/mini/{run.start.arm}-0")
        assert s.data.sequence_length == times * T and s.data.sequence_length * s.training.batch_size == tokens
        assert s.optimizer.learning_rate == pytest.approx(base.optimizer.learning_rate * base.optimizer.tail_final)
        assert (s.model.rope_scaling.type == "yarn") == (not arm.startswith("plain"))
        assert s.model.rope_scaling.original_max_position_embeddings == (4096 if arm.startswith("plain") else T)
    assert not base.checkpoint.initialize_from and not by_arm["untrained"].settings.checkpoint.initialize_from
    assert [run.arm for run in study.starts_of(by_arm["extended"])] == ["half", "base"]


def test_what_starts_from_a_run_that_is_trained_again_is_made_again(tmp_path, monkeypatch):
    def plan(*fields):
        return study.plan(yarn_needle.STUDY, ["micro"], [0], fields, tmp_path)

    for run in plan():
        recorded(run, 2.0)
    assert all(study.lines_of(run) for run in plan())
    shorter = plan("data.prefetch=2")  # as another base would be: the runs after it have no field that differs
    others = {run.arm: run for run in plan()}
    mixed = [run if run.arm == "base" else dataclasses.replace(others[run.arm], start=shorter[0])
             for run in shorter if run.arm in ("base", "half")]
    assert [study.lines_of(run) for run in mixed] == [None, None]
    calls = []

    def train(run):
        calls.append((run.arm, sorted(path.name for path in others["half"].workdir.iterdir() if path.name != ".lock")))

    monkeypatch.setattr(study, "_train", train)
    study.train(mixed)
    assert calls == [("base", []), ("half", [])]


def test_a_reading_is_made_once_and_again_after_another_training(tmp_path, monkeypatch):
    calls = []
    kind = Reading("needles", lambda run: calls.append(run.arm) or FOUND["needles"])
    planned = study.plan(PAIR, ["micro"], [0], (), tmp_path)
    for run in planned:
        recorded(run, 2.0)
    assert [kind.lines_of(run) for run in planned] == [None, None]
    kind.train(planned)
    kind.train(planned)
    assert calls == ["base", "untrained"]
    assert kind.lines_of(planned[0])[-1] == {"split": "needles"} | FOUND["needles"]
    monkeypatch.setattr(study, "_train", lambda run: recorded(run, 3.0))
    monkeypatch.setattr(study, "_evaluate", lambda run: recorded(run, 3.0))
    study._empty(planned[0].workdir)
    kind.train(planned)
    assert calls == ["base", "untrained"] * 2
    with (planned[1].workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "split": "diverged"}\n')
    (planned[1].workdir / "needles.json").unlink()
    kind.train(planned)  # there is nothing to read off it
    assert calls == ["base", "untrained"] * 2 and kind.lines_of(planned[1]) == study.lines_of(planned[1])


def test_what_would_start_from_a_diverged_run_is_named(tmp_path):
    planned = study.plan(PAIR, ["micro"], [0], (), tmp_path)
    recorded(planned[0], 2.0)
    with (planned[0].workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "split": "diverged"}\n')
    with pytest.raises(RunError, match=r"^untrained-0 \(micro\): it starts from base-0 \(micro\), which diverged$"):
        study.train(planned)


def test_figures_of_readings():
    def figure(quantity, name):
        return QUANTITIES[quantity][0](None, [{"split": "train"}, {"split": name} | FOUND[name]])

    assert figure("found at 2 T, %", "needles") == 50 and figure("found at 2 T, %", "needles").parts == [75, 25]
    assert figure("draft 1 stands at temperature 0.6, %", "drafting") == 50
    assert figure("draft 2 stands at temperature 0, %", "drafting") == 25
    assert figure("tokens a step, 2 drafted, temperature 0", "drafting") == 1.5
    assert figure("times plain speed, 1 drafted, temperature 0.6", "drafting") == 1.5
    lines = [{"split": "validation", "loss": 4.0}, {"split": "masked"} | FOUND["masked"]]
    assert [QUANTITIES[name][0](None, lines) for name in moe_architecture.RISES] == [0.25, 0.5, 0.75, 1.0]
    assert QUANTITIES[moe_architecture.RISES[0]][0](None, [lines[0], {"split": "masked", "loss": {}}]) is None
    moved = figure("load that domains move, %", "domains")
    assert moved == pytest.approx(100 * (0 + 0.5 + 0.5 + 0) / 4)  # json: layers 0 and 1, turtle: layers 0 and 1
    assert moved.parts == {"json": [0.5, 1.5], "turtle": [1.5, 0.5]} and not moved.alike


def test_parts_are_means_over_seeds_where_places_mean_the_same():
    spread = judgement._spread([Pictured(1.0, [0.0, 2.0]), Pictured(3.0, [4.0, 2.0])], "found at 1 T, %")
    assert spread == {"ours": 2.0, "digits": 1, "parts": [2.0, 2.0], "least": 1.0, "greatest": 3.0}
    first = judgement._spread([Pictured(1.0, {"a": [1]}, False), Pictured(3.0, {"a": [9]}, False)], "found at 1 T, %")
    assert first["parts"] == {"a": [1]} and judgement._spread([1.0], "MaxVio")["parts"] is None


def test_needles_are_found_where_a_model_looks(pair, monkeypatch):
    """A model that sees the last 32 tokens and knows what they hold; and a real one, whose shares are shares."""
    for name, value in (("CONTEXTS", 4), ("AT_ONCE", 2), ("TIMES", (1, 2))):
        monkeypatch.setattr(yarn_needle, name, value)
    real = yarn_needle.read(pair[1])
    assert real["found"].keys() == {1, 2} and all(len(shares) == 5 for shares in real["found"].values())
    assert {share for shares in real["found"].values() for share in shares} <= {0, 0.25, 0.5, 0.75, 1}
    asked = np.frombuffer(b"\n# key ", np.uint8)

    def sees(model, settings, params, routing, batch):
        tokens_BT = batch["tokens_BT"]
        B, T = tokens_BT.shape
        begins_BT = jnp.all(jnp.stack([jnp.roll(tokens_BT, -i, 1) == byte for i, byte in enumerate(asked)]), axis=0)
        near_B = T - jnp.argmax(begins_BT, axis=1) <= 32
        logits_BTV = jax.nn.one_hot(jnp.where(near_B[:, None], batch["targets_BT"], 0), 320)
        return logits_BTV, {"mtp_logits": ()}

    monkeypatch.setattr(step, "apply_model", sees)
    assert yarn_needle.read(pair[0])["found"] == {1: [1, 1, 1, 1, 1], 2: [0, 0, 0, 1, 1]}


def test_domains_are_packages_and_lone_modules():
    names = ["json/decoder.py", "turtle.py", "json/tool/a.py", "abc.py"]
    lengths = [1000, 1600, 600, 9]
    tokens = Tokens(np.arange(sum(lengths)), np.cumsum([0, *lengths]))
    corpus = SimpleNamespace(validation=tokens, validation_documents=[Document(name, name) for name in names])
    assert v3_specialisation.domains(corpus) == {"json": [0, 2], "turtle": [1]}


def test_loads_of_domains(mixture, monkeypatch):
    _, _, _, corpus = study.weights_of(mixture)
    places = range(len(corpus.validation_documents))
    monkeypatch.setattr(v3_specialisation, "domains", lambda _: {"one": places[:2], "other": places[2:]})
    parts = {name: v3_specialisation.part_of(corpus, its) for name, its in v3_specialisation.domains(corpus).items()}
    assert len(places) > 2 and parts["one"].validation.documents == 2
    assert sum(part.validation.targets for part in parts.values()) == corpus.validation.targets
    assert sum(part.validation_bytes for part in parts.values()) == corpus.validation_bytes
    found = v3_specialisation.read(mixture)
    assert found["domains"].keys() == parts.keys() and found["domains"]["one"] != found["domains"]["other"]
    assert all(np.shape(loads) == (1, 8) and np.mean(loads) == pytest.approx(1, abs=1e-3)
               for loads in [found["all"], *found["domains"].values()])
    assert QUANTITIES["load that domains move, %"][0](None, [{"split": "domains"} | found]) > 0
    monkeypatch.undo()
    with pytest.raises(RunError, match=r"base-5 \(micro\): the held-out text has 1 domains of 1500 tokens"):
        v3_specialisation.read(mixture)


def test_drafts_are_measured_by_the_bench(pair, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(bench_acceptance, "measure_acceptance",
                        lambda request: asked.append(request) or print("a line") or FOUND["drafting"])
    assert mtp_decode.read(pair[0]) == FOUND["drafting"]
    assert asked == [bench_acceptance.Request(pair[0].workdir, 8, 8, 16, 2, (0.0, 0.6), 3)]
    said = capsys.readouterr()
    assert said.out == "" and "a line" in said.err


@pytest.mark.parametrize("name", READ)
def test_every_table_that_reads_can_be_judged_and_shown(name, tmp_path, monkeypatch, capsys):
    """From recorded runs and readings, as the neighbours' test has it; a table without one size's readings says so."""
    table = READ[name]
    kind, arms, seeds = runner.kind(table), table.STUDY.arms, table.STUDY.seeds
    assert len(kind.plan(table.STUDY, kind.SIZES["gpu"], seeds, (), tmp_path)) == len(arms) * len(seeds) >= 3
    for number, run in enumerate(kind.plan(table.STUDY, ["micro"], [0, 1], (), tmp_path)):
        recorded(run, 2 + number % 5 / 10)
        (run.workdir / f"{kind.name}.json").write_text(json.dumps(FOUND[kind.name]))
    assert {claim.quantity for claim in table.STUDY.claims} <= set(table.STUDY.quantities)
    assert {arm for claim in table.STUDY.claims for arm in (claim.arm, claim.than)} <= set(arms)
    assert set(table.STUDY.paper) <= {(quantity, arm) for quantity in table.STUDY.quantities for arm in arms}
    for part in ("_train", "_evaluate"):
        monkeypatch.setattr(study, part, lambda run: pytest.fail(f"{run} is finished"))
    folder = tmp_path / "results"
    assert answer(f"--table={name}", "--scale=cpu", "--sizes=micro", "--seeds=0,1", f"--runs={tmp_path}",
                  f"--folder={folder}") == 0
    assert re.match(rf"{name} +\d+ (reproduced|not|within|higher|lower)", capsys.readouterr().out)
    page = (folder / f"{name}.md").read_text()
    assert "Not yet run at this scale: the size mini" in page and "mini: " not in page
    found = json.loads((folder / f"{name}.json").read_text())["rows"]["cpu"]
    assert any("parts" in row for row in found) == (name in ("v3_specialisation", "yarn_needle"))
    assert (folder / f"{name}.png").read_bytes().startswith(PNG)

    for path in tmp_path.glob("*/micro/*/metrics.jsonl"):
        path.write_text(path.read_text() + '{"step": 3, "split": "diverged"}\n')
    assert answer(f"--table={name}", "--scale=cpu", "--sizes=micro", "--seeds=0,1", f"--runs={tmp_path}",
                  f"--folder={folder}") == 0
    assert re.match(rf"{name} +\d+ diverged: ", capsys.readouterr().out)
    assert "no seed; it diverged in seeds 0, 1" in (folder / f"{name}.md").read_text()
