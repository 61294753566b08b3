"""A student on its own samples: its divergence from the teacher by hand, of the tokens drawn and of no others; fixed
samples in their place."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.accounting import flops
from research.distillation import on_policy, rollouts
from research.distillation.finetune import Rows
from research.distillation.logits import DIRECTIONS
from research.distillation.template import TEMPLATES
from research.errors import RequestError
from tests import tiny
from tests.distillation.test_reinforce import CONFIG, PROBLEMS, TOKENIZER, Scripted, drawing, state_of

BETA, TEMPERATURE = 0.3, 0.5
V = 320


@pytest.fixture
def looked_up(monkeypatch):
    """Models whose logits are looked up by the last token, with a balance loss of 0.25: (student's, teacher's)."""
    monkeypatch.setattr(on_policy, "apply_model", lambda model, settings, params, routing, batch, amax=None: (
        params[batch["tokens_BT"]], tiny.balanced(0.25)))
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(V, V)), jnp.float32) for _ in range(2)]


@pytest.fixture
def batch(looked_up):
    """Four rows with their teacher's logits; the last one has drawn nothing."""
    found = tiny.batch(((9,), (7,), (12,), (5,)))
    found["mask_BT"][:, :2] = False  # the prompt
    found["mask_BT"][3] = False
    return found | {"right_B": np.array([1, 0, 1, 0], bool), "formed_B": np.array([1, 1, 1, 0], bool),
                    "teacher_BTV": looked_up[1][found["tokens_BT"]]}


def ours(params, batch, direction="reverse", pieces=1, total=None):
    total = jnp.maximum(batch["mask_BT"].sum(), 1) if total is None else total
    return on_policy.on_policy_loss(
        {"params": params, "amax": {}}, {}, batch, total, pieces, 0.0, None, None, reinforcement=CONFIG,
        on_policy=SimpleNamespace(direction=direction, beta=BETA), teacher_flops=10.0)


def by_hand(student_NV, teacher_NV, direction):
    """Of the logits at N positions, probabilities themselves."""
    p, q = (jnp.exp(x / TEMPERATURE) / jnp.exp(x / TEMPERATURE).sum(axis=-1, keepdims=True)
            for x in (teacher_NV, student_NV))
    m = BETA * p + (1 - BETA) * q
    nats_NV = {"forward": p * jnp.log(p / q), "reverse": q * jnp.log(q / p),
               "jensen_shannon": BETA * p * jnp.log(p / m) + (1 - BETA) * q * jnp.log(q / m)}[direction]
    return TEMPERATURE**2 * nats_NV.sum(axis=-1).mean()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_loss_is_the_divergence_of_the_tokens_drawn(looked_up, batch, direction):
    student, teacher = looked_up
    (value, metrics), gradient = jax.value_and_grad(ours, has_aux=True)(student, batch, direction)
    states = batch["tokens_BT"][batch["mask_BT"]]
    wanted, wanted_gradient = jax.value_and_grad(lambda x: by_hand(x[states], teacher[states], direction))(student)
    np.testing.assert_allclose(value, wanted + 0.25, rtol=1e-5)
    np.testing.assert_allclose(metrics["divergence"], wanted, rtol=1e-5)
    tiny.assert_close(gradient, wanted_gradient)
    assert metrics["accuracy"] == 0.5 and metrics["reward"] == 1.25 and metrics["balance_loss"] == 0.25
    assert metrics["tokens_a_sample"] == batch["mask_BT"].sum() / 4
    # two updates share what was read and drawn, 33 tokens of rows, and the teacher's pass over 48 positions
    assert metrics["forward_tokens"] == 33 / 2 and metrics["teacher_flops"] == 480 / 2
    halves = [ours(student, jax.tree.map(lambda x, i=i: x[2 * i:2 * i + 2], batch), direction, 2, len(states))
              for i in (0, 1)]
    np.testing.assert_allclose(sum(value for value, _ in halves), value, rtol=1e-5)
    for name in ("reward", "forward_tokens", "teacher_flops", "divergence"):
        np.testing.assert_allclose(sum(found[name] for _, found in halves), metrics[name], rtol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_teacher_itself_has_nothing_to_learn(looked_up, batch, direction):
    (_, metrics), gradient = jax.value_and_grad(ours, has_aux=True)(looked_up[1], batch, direction)
    assert abs(metrics["divergence"]) < 1e-6 and float(jnp.abs(gradient).max()) < 1e-7


def test_where_nothing_was_drawn_nothing_is_learned(looked_up, batch):
    batch["mask_BT"][:] = False
    (value, metrics), gradient = jax.value_and_grad(ours, has_aux=True)(looked_up[0], batch)
    assert value == 0.25 and metrics["divergence"] == 0 and not np.asarray(gradient).any()


@pytest.fixture
def drawn(looked_up, monkeypatch):
    """(settings, rollouts of a teacher's, their script): a text that ends, one that ends at once, one that is cut."""
    script = [("ab", True), ("", True), ("abcdefgh"[:CONFIG.max_tokens], False)] * 2
    monkeypatch.setattr(rollouts, "initial_variables", lambda model, settings: None)
    monkeypatch.setattr(rollouts, "Decoder", lambda *_: Scripted(script))
    s, _ = drawing()
    teacher = on_policy.Teacher(None, s, {"params": looked_up[1], "routing": {}}, CONFIG.minibatches)
    return *drawing(scoring=teacher), script


def test_each_token_drawn_is_compared_after_the_tokens_before_it(looked_up, drawn):
    """From the texts to the loss: two updates of three rows each."""
    student, teacher = looked_up
    s, found, script = drawn
    found.problems = [PROBLEMS[0], PROBLEMS[0]]
    batches = found.train_batches(s)
    batch = batches.take(state_of(-1.0))
    assert batch["teacher_BTV"].shape == (3, found.length, V)
    rows = [[*TOKENIZER.encode(text).tolist(), *([TOKENIZER.eos_id] if ended else [])] for text, ended in script[:3]]
    last = found.prompts[PROBLEMS[0].digest][-1]
    states = np.array([before for row in rows for before in [last, *row[:-1]]])
    assert batch["mask_BT"].sum() == len(states) == 3 + 1 + 8
    np.testing.assert_allclose(ours(student, batch)[1]["divergence"],
                               by_hand(student[states], teacher[states], "reverse"), rtol=1e-5)
    record = batches.get_state()
    with pytest.raises(RequestError, match="has learned from another teacher"):
        batches.set_state(record | {"teacher": "another"})


PROMPTS = [TEMPLATES["plain"].prompt(problem.question) for problem in PROBLEMS]
PAIRS = [(prompt, f"so</think>\\boxed{{{n}}}") for n, prompt in enumerate(PROMPTS) for _ in range(2)]
ROWS = {"rows": 4, "pairs": PAIRS}
LONG = {"data.sequence_length": 64, "training.seed": 3}


def mixed(looked_up, monkeypatch, make, changes=LONG):
    """(rollouts, what gives their batches) of a scripted student, with a teacher that is looked up."""
    monkeypatch.setattr(rollouts, "initial_variables", lambda model, settings: None)
    monkeypatch.setattr(rollouts, "Decoder", lambda *_: Scripted([("ab", True), ("", True), ("abc", False)] * 2))
    s, _ = drawing(**changes)
    teacher = on_policy.Teacher(None, s, {"params": looked_up[1], "routing": {}}, CONFIG.minibatches)
    _, found = drawing(scoring=teacher, make=make, **changes)
    return found, found.train_batches(s)


def assert_same(one: dict, other: dict):
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def test_without_the_students_own_batches_all_are_fine_tunings_rows(looked_up, monkeypatch):
    """Held-out problems, by which checkpoints are ranked, are in none of them."""
    found, batches = mixed(looked_up, monkeypatch, partial(on_policy.Mixture, fraction=0.0, **ROWS))
    held_out = {problem.question for problem in found.held_out}
    pairs = [pair for pair, problem in zip(PAIRS[::2], PROBLEMS, strict=True) if problem.question not in held_out]
    assert 0 < len(pairs) < len(PROBLEMS)
    rows = Rows([pair for pair in pairs for _ in range(2)], TOKENIZER, sequence_length=64, seed=3)
    for step in range(1, 6):
        batch = batches.take(state_of(-1.0))
        wanted = rows.batch(step, 4)
        assert_same(batch, wanted | {"teacher_BTV": looked_up[1][wanted["tokens_BT"]]})
    assert not found.decoder.prompts
    with pytest.raises(RequestError, match="has learned from another corpus"):
        mixed(looked_up, monkeypatch, partial(on_policy.Mixture, fraction=0.0, rows=4, pairs=PAIRS[1:]))[1].set_state(
            batches.get_state())


def test_with_all_of_them_its_own_nothing_else_is_read(looked_up, monkeypatch):
    mixture = partial(on_policy.Mixture, fraction=1.0, **ROWS)
    ours, theirs = (mixed(looked_up, monkeypatch, make)[1] for make in (mixture, rollouts.Rollouts))
    for _ in range(6):
        assert_same(ours.take(state_of(-1.0)), theirs.take(state_of(-1.0)))


def test_whose_a_batch_is_depends_on_seed_and_number_alone(looked_up, monkeypatch):
    """And is the same for the four updates of a batch, wherever a run begins again."""
    make = partial(on_policy.Mixture, fraction=0.5, **ROWS)
    found, batches = mixed(looked_up, monkeypatch, make)
    whose = [found.drawn(number) for number in range(1000)]
    assert 450 < sum(whose) < 550 and whose[:6] != [True] * 6 and whose[:6] != [False] * 6
    other, _ = mixed(looked_up, monkeypatch, make, LONG | {"training.seed": 4})
    assert sum(one == two for one, two in zip(whose, map(other.drawn, range(1000)), strict=True)) < 550
    taken = [batches.take(state_of(-1.0)) for _ in range(24)]
    assert ["right_B" in batch for batch in taken] == [one for one in whose[:6] for _ in range(4)]
    _, again = mixed(looked_up, monkeypatch, make)
    again.set_state({name: value for name, value in batches.get_state().items()} | {"step": 8})
    for batch in taken[8:]:
        assert_same(again.take(state_of(-1.0)), batch)


def test_of_fixed_samples_nothing_was_drawn_and_the_teacher_reads_for_one_update(looked_up, batch):
    del batch["right_B"], batch["formed_B"]
    student, teacher = looked_up
    value, metrics = ours(student, batch, "forward")
    states = batch["tokens_BT"][batch["mask_BT"]]
    np.testing.assert_allclose(value, by_hand(student[states], teacher[states], "forward") + 0.25, rtol=1e-5)
    assert metrics.keys() == {"loss", "divergence", "balance_loss", "teacher_flops", "loads"}
    assert metrics["teacher_flops"] == 480


def test_a_teacher_that_cannot_read_the_rows_is_refused(drawn):
    short, _ = tiny.model(tiny.settings(tiny.DENSE | {"model.max_position_embeddings": 32}))
    with pytest.raises(RequestError, match=r"config\.reinforcement: for the teacher, prompt 1 .*_embeddings=32"):
        drawn[1].check(short, 0, "for the teacher, ")


def test_a_teacher_scores_as_its_model_does_in_parts_as_in_one():
    s = tiny.settings(tiny.DENSE | {"model.num_hidden_layers": 1})
    model, variables = tiny.model(s)
    batch = tiny.batch()
    one, two = (on_policy.Teacher(model, s, variables, parts) for parts in (1, 2))
    wanted, _ = model.apply(variables, batch["tokens_BT"], batch["segments_BT"], batch["positions_BT"], False)
    for teacher in (one, two):
        np.testing.assert_allclose(teacher.scored(0, {}, batch)["teacher_BTV"], wanted, rtol=1e-5, atol=1e-5)
    other = jax.tree.map(lambda x: x + 1, variables)
    assert one.source == two.source != on_policy.Teacher(model, s, other, 1).source
    assert one.flops_per_token < flops.training_per_token(s) / 2.9
