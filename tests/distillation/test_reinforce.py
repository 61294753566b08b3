"""Rollouts as batches: which tokens are learned from, whose log-probabilities, and the loss that reads them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.data.tokenizer import Tokenizer, _bytes
from research.decoding.generate import Generation
from research.distillation import grpo, reinforce, rollouts
from research.distillation.tasks import Problem
from research.distillation.template import TEMPLATES
from research.distillation.verify import Checker
from research.errors import RequestError
from tests import tiny

TOKENIZER = Tokenizer(_bytes())
PROBLEMS = [Problem(f"{n}+{n}", str(2 * n), "", "numeric", f"sum:{n}") for n in range(9)]
CONFIG = SimpleNamespace(questions=2, group_size=3, minibatches=2, epochs=2, max_tokens=24, temperature=0.5,
                         form="token", clip=0.2, kl_weight=0.1, reference_every=0, draft_tokens=0)


class Scripted:
    """A decoder that answers by its script: for each row a text, and whether it ends."""

    def __init__(self, script):
        self.script, self.policies, self.prompts = script, [], []

    def take(self, variables):
        self.policies.append(variables)

    def generate(self, prompts, max_tokens, sampling=None, draft_tokens=0, seed=0, ends=()):
        self.prompts += [(TOKENIZER.decode(prompt), seed) for prompt in prompts]
        rows = [[*TOKENIZER.encode(text).tolist(), *(ends if ended else ())] for text, ended in self.script]
        steps = 20 if draft_tokens else sum(len(row) - 1 for row in rows)
        return Generation(rows, steps, [15, 9][:draft_tokens], 0.0, 1.0)


def drawing(config=CONFIG, folder=None, scoring=None, make=rollouts.Rollouts, **changes):
    """(settings, rollouts of `PROBLEMS`, as `make` makes them); scoring: None is by rewards."""
    s = tiny.settings(tiny.DENSE | {"model.vocab_size": 320, "model.max_position_embeddings": 64,
                                    "data.validation_fraction": 0.1} | changes)
    return s, make(PROBLEMS, TOKENIZER, TEMPLATES["plain"], Checker(1.0), config, s,
                   scoring or reinforce.Rewards(config, s, folder))


def state_of(mark: float) -> dict:
    return {"params": {"w": mark}, "routing": {}, "ema": None}


@pytest.fixture
def scripted(monkeypatch):
    """A decoder by its script; scores are the weights' mark, of the first ones -7."""
    monkeypatch.setattr(rollouts, "initial_variables", lambda model, settings: {"params": {"w": -7.0}, "routing": {}})
    monkeypatch.setattr(rollouts, "Decoder", lambda *_: Scripted([
        ("t</think>\\boxed{0}", True), ("t</think>\\boxed{1}", True), ("t</think>\\boxed{0}", False),
        ("?", True), ("?", True), ("?", False)]))
    monkeypatch.setattr(reinforce, "token_logp", lambda variables, batch, **_: jnp.full(
        batch["tokens_BT"].shape, variables["params"]["w"]))


@pytest.fixture
def drawn(scripted):
    """(rollouts, their batches, a state of marked weights)."""
    s, found = drawing()
    found.problems = [PROBLEMS[0], PROBLEMS[0]]  # two questions of the answer 0
    return found, found.train_batches(s), state_of(-1.0)


def test_a_batch_by_hand(drawn):
    found, batches, state = drawn
    parts = [batches.take(state_of(-1.0 - step)) for step in range(4)]
    whole = {name: np.concatenate([parts[0][name], parts[1][name]]) for name in parts[0]}
    # right and formed; formed; right, but it does not end; then a group in which all are alike
    expected = np.concatenate([np.asarray(grpo.group_advantages([[2.0, 1, 1]]))[0], np.zeros(3)])
    np.testing.assert_allclose(whole["advantage_B"], expected, rtol=1e-6)
    assert whole["right_B"].tolist() == [True, False, True, False, False, False]
    assert whole["formed_B"].tolist() == [True, True, False, False, False, False]
    for row, (text, ended) in enumerate(found.decoder.script):
        targets = whole["targets_BT"][row][whole["mask_BT"][row]].tolist()
        assert targets == [*TOKENIZER.encode(text).tolist(), *([TOKENIZER.eos_id] if ended else [])]
        size = int(whole["segments_BT"][row].sum())
        tokens = [*whole["tokens_BT"][row][:size].tolist(), targets[-1]]
        assert tokens == [*found.prompts[PROBLEMS[0].digest], *targets]
        assert whole["positions_BT"][row][:size].tolist() == list(range(size))
    assert np.all(whole["old_logp_BT"] == -1) and np.all(whole["reference_logp_BT"] == -7)
    for first, second in ((parts[0], parts[2]), (parts[1], parts[3])):  # the second epoch reads the same
        assert all(np.array_equal(first[name], second[name]) for name in first)
    assert len(found.decoder.policies) == 1  # four updates of one batch


def test_the_next_batch_is_of_the_policy_as_it_is_then(drawn):
    found, batches, state = drawn
    for step in range(5):
        batch = batches.take(state_of(-1.0 - step))
    assert [policy["params"]["w"] for policy in found.decoder.policies] == [-1.0, -5.0]
    assert np.all(batch["old_logp_BT"] == -5) and np.all(batch["reference_logp_BT"] == -7)
    seeds = [seed for _, seed in found.decoder.prompts]
    assert len(set(seeds[:6])) == 1 and seeds[0] != seeds[6]
    record = batches.get_state()
    assert record["step"] == 5
    with pytest.raises(RequestError, match="has learned from another corpus"):
        batches.set_state(record | {"corpus": "another"})


def references(folder, steps, start=0, **changes) -> list[float]:
    """The marks of the references of updates `start` + 1 to `steps`, whose policies' marks are -1, -2, ..."""
    config = SimpleNamespace(**CONFIG.__dict__ | {"reference_every": 2, "epochs": 1})  # two updates a batch
    s, found = drawing(config, folder, **changes)
    batches = found.train_batches(s)
    if start:
        batches.set_state(batches.get_state() | {"step": start})
    return [float(batches.take(state_of(-1.0 - step))["reference_logp_BT"][0, 0]) for step in range(start, steps)]


def test_the_reference_is_renewed_and_a_run_that_goes_on_finds_it(scripted, tmp_path):
    whole = references(tmp_path / "a", 16)
    assert whole == [-7] * 4 + [-5] * 4 + [-9] * 4 + [-13] * 4
    for start in (3, 4, 6, 8, 11):
        assert references(tmp_path / "a", 16, start) == whole[start:]
    (tmp_path / "a/4.npz").unlink()
    with pytest.raises(RequestError, match=r"reference_every=2 needs .*4\.npz, the policy before batch 5"):
        references(tmp_path / "a", 16, 10)


def test_references_behind_the_checkpoints_are_removed(scripted, tmp_path):
    references(tmp_path, 40, **{"checkpoint.every_steps": 4})  # at batches 2, 4, ...: two of them reach back to 14
    assert sorted(int(path.stem) for path in tmp_path.iterdir()) == [12, 14, 16, 18]


def test_drafts_are_asked_for_and_told(scripted, policy):
    s, found = drawing(SimpleNamespace(**CONFIG.__dict__ | {"draft_tokens": 2}), **{"mtp.num_nextn_predict_layers": 1})
    batch = found.train_batches(s).take(state_of(-1.0))
    tokens = sum(len(TOKENIZER.encode(text)) + ended - 1 for text, ended in found.decoder.script)
    assert np.all(batch["acceptance_B"] == np.float32(24 / 40))
    np.testing.assert_allclose(batch["in_vain_B"], (20 + 40 - tokens) / 6, rtol=1e-6)
    assert rollouts.told(batch)["acceptance"] == np.float32(0.6) and "acceptance" not in rollouts.told(policy[1])
    assert rollouts.forward_tokens(batch) == pytest.approx(batch["segments_BT"].sum() + batch["in_vain_B"].sum())
    s, found = drawing(found.config)
    with pytest.raises(RequestError, match=r"config\.reinforcement: the checkpoint has no multi-token module"):
        found.train_batches(s)


def test_questions_come_in_turn_each_epoch_in_another_order():
    found = [p.question for p in rollouts._in_turn(PROBLEMS, 0, 27, 0)]
    epochs = [found[:9], found[9:18], found[18:]]
    assert all(sorted(epoch) == sorted(p.question for p in PROBLEMS) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [p.question for p in rollouts._in_turn(PROBLEMS, 5, 9, 0)] == found[5:14]


def test_no_problem_is_learned_from_and_held_out():
    _, found = drawing(**{"data.validation_fraction": 0.4})
    sides = [{p.digest for p in side} for side in (found.problems, found.held_out)]
    assert all(sides) and not sides[0] & sides[1] and len(sides[0] | sides[1]) == 9


def test_a_response_that_has_no_room_is_refused(monkeypatch):
    monkeypatch.setattr(rollouts, "initial_variables", None)
    s, found = drawing(**{"model.max_position_embeddings": 32})
    with pytest.raises(RequestError, match=r"config\.reinforcement: prompt 1 .* more than max_position_embeddings=32"):
        found.train_batches(s)


@pytest.fixture
def policy(monkeypatch):
    """(params of a model whose logits are looked up by the last token, a batch of four rows with all that rollouts
    give); its balance loss is 0.25."""
    def apply_model(model, settings, params, routing, batch, amax=None):
        return params[batch["tokens_BT"]], tiny.balanced(0.25)

    monkeypatch.setattr(reinforce, "apply_model", apply_model)
    batch, rng = tiny.batch(((9,), (7,), (12,), (5,))), np.random.default_rng(0)
    batch["mask_BT"][:, :2] = False  # the prompt
    shape = batch["mask_BT"].shape
    batch |= {"advantage_B": np.array([1.0, -0.5, 0.3, -0.8], np.float32),
              "old_logp_BT": rng.normal(-3, 0.3, shape).astype(np.float32),
              "reference_logp_BT": rng.normal(-3, 0.3, shape).astype(np.float32),
              "right_B": np.array([1, 0, 1, 0], bool), "formed_B": np.array([1, 1, 1, 0], bool)}
    return jnp.asarray(0.5 * rng.normal(size=(tiny.VOCABULARY, tiny.VOCABULARY)), jnp.float32), batch


def ours(params, batch, pieces=1):
    return reinforce.policy_loss({"params": params, "amax": {}}, {}, batch, 1.0, pieces, 0.0, None, None,
                                 reinforcement=CONFIG)


def test_the_loss_is_the_objective_of_tempered_logits(policy):
    params, batch = policy

    def expected(params):
        logp_BTV = jax.nn.log_softmax(params[batch["tokens_BT"]] / 0.5)
        logp_BT = jnp.take_along_axis(logp_BTV, batch["targets_BT"][..., None], axis=-1)[..., 0]
        return 0.25 + grpo.loss(logp_BT, batch["old_logp_BT"], batch["reference_logp_BT"], batch["advantage_B"],
                                batch["mask_BT"], form="token", clip=0.2, kl_weight=0.1)[0]

    (value, metrics), gradient = jax.value_and_grad(ours, has_aux=True)(params, batch)
    wanted, wanted_gradient = jax.value_and_grad(expected)(params)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    tiny.assert_close(gradient, wanted_gradient)
    assert metrics["accuracy"] == 0.5 and metrics["reward"] == 1.25 and metrics["balance_loss"] == 0.25
    assert metrics["tokens_a_sample"] == batch["mask_BT"].sum() / 4
    halves = [ours(params, jax.tree.map(lambda x, i=i: x[2 * i:2 * i + 2], batch), 2) for i in (0, 1)]
    np.testing.assert_allclose(sum(value for value, _ in halves), wanted, rtol=1e-5)
    np.testing.assert_allclose(sum(m["reward"] for _, m in halves), 1.25)
    # 33 tokens of rows, and two passes over 48 positions; two updates share them
    assert metrics["forward_tokens"] == (9 + 7 + 12 + 5 + 2 * 48) / 2 == sum(m["forward_tokens"] for _, m in halves)


def test_on_policy_the_ratio_is_one_and_the_gradient_that_of_the_log_probabilities(policy):
    params, batch = policy
    plain = {name: x for name, x in batch.items() if "logp" not in name}

    def expected(params):
        logp_BT = reinforce.token_logp({"params": params, "routing": {}}, plain, model=None, settings=None,
                                       temperature=0.5)
        weight_BT = plain["mask_BT"] / plain["mask_BT"].sum(axis=1, keepdims=True)
        return -jnp.mean(jnp.sum(weight_BT * logp_BT, axis=1) * plain["advantage_B"])

    (_, metrics), gradient = jax.value_and_grad(ours, has_aux=True)(params, plain)
    tiny.assert_close(gradient, jax.grad(expected)(params))
    assert metrics["ratio"] == 1 and metrics["kl"] == 0 and metrics["clipped"] == 0
