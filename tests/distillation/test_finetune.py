import jax
import numpy as np
import pytest

from research.data.tokenizer import Tokenizer, _bytes
from research.distillation.finetune import Examples, Rows, held_out_of
from research.errors import RequestError
from research.training.losses import token_losses
from tests import tiny

TOKENIZER = Tokenizer(_bytes())
PAIRS = [(f"Question: {'?' * (n % 5)}<think>\n", f"{n}" * (1 + n % 3) + "</think>\\boxed{1}") for n in range(13)]
T = 96


def rows_of(pairs=PAIRS, length=T, seed=0) -> Rows:
    return Rows(pairs, TOKENIZER, sequence_length=length, seed=seed)


def segments(batch):
    """(tokens and last target, masked targets, positions) of every example of a batch."""
    for row in range(len(batch["tokens_BT"])):
        for segment in range(1, batch["segments_BT"][row].max() + 1):
            here = batch["segments_BT"][row] == segment
            tokens, targets, mask = (batch[f"{name}_BT"][row][here] for name in ("tokens", "targets", "mask"))
            assert np.array_equal(tokens[1:], targets[:-1]) and targets[-1] == TOKENIZER.eos_id
            yield [*tokens, targets[-1]], targets[mask].tolist(), batch["positions_BT"][row][here]


def test_an_epoch_holds_every_example_once_with_a_loss_on_its_response():
    rows = rows_of()
    batch = rows.batch(1, rows.rows)
    found = {}
    for tokens, taught, positions in segments(batch):
        text = TOKENIZER.decode(tokens)
        found[text] = TOKENIZER.decode(taught)
        assert tokens[0] == TOKENIZER.bos_id and taught[-1] == TOKENIZER.eos_id
        assert positions.tolist() == list(range(len(positions)))
    assert found == {prompt + response: response for prompt, response in PAIRS}
    padding = batch["segments_BT"] == 0
    assert not batch["mask_BT"][padding].any() and np.all(batch["tokens_BT"][padding] == TOKENIZER.pad_id)
    assert rows.examples == 13 and rows.rows == 7  # a row holds two


def test_rows_are_filled_up():
    rows = rows_of([("p", "x" * (size - 2)) for size in (36, 50, 46, 60)])
    assert rows.rows == 2 and np.all(rows.batch(1, 2)["segments_BT"] > 0)


def test_batches_follow_the_seed_and_the_step_alone():
    rows = rows_of()
    epochs = [rows.batch(step, rows.rows)["tokens_BT"] for step in (1, 2)]
    assert not np.array_equal(*epochs) and sorted(map(bytes, epochs[0])) == sorted(map(bytes, epochs[1]))
    singles = [rows.batch(step, 1)["tokens_BT"][0] for step in range(1, 2 * rows.rows + 1)]
    assert np.array_equal(np.stack(singles), np.concatenate(epochs))  # whatever the batch's size, the order is one
    assert np.array_equal(rows_of().batch(7, 4)["tokens_BT"], rows.batch(7, 4)["tokens_BT"])
    assert not np.array_equal(rows_of(seed=1).batch(1, rows.rows)["tokens_BT"], epochs[0])


def test_what_no_row_holds_is_counted_and_left_out():
    longest = max(len(TOKENIZER.encode(prompt + response)) for prompt, response in PAIRS) + 1  # and the end is a target
    assert rows_of(length=longest).too_long == 0
    rows = rows_of(length=longest - 1)
    assert 0 < rows.too_long == 13 - rows.examples
    for pairs, message in ((PAIRS, "config.data.sequence_length=5 holds none of 13"), ([], "has no example to hold")):
        with pytest.raises(RequestError, match=message):
            rows_of(pairs, length=5)


def test_an_example_costs_the_same_alone_as_packed_among_others():
    s = tiny.settings(tiny.DENSE | {"model.vocab_size": 320, "model.num_hidden_layers": 1, "data.sequence_length": T})
    model, variables = tiny.model(s)

    @jax.jit
    def cost(batch):
        logits, _ = model.apply(variables, batch["tokens_BT"], batch["segments_BT"], batch["positions_BT"])
        return token_losses((logits,), batch)[0]

    packed = rows_of(PAIRS[:3])
    assert packed.rows == 2
    together = cost(packed.batch(1, 2))
    alone = [rows_of([pair]).batch(1, 1) for pair in PAIRS[:3]]
    pairs = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in ((alone[0], alone[1]),
                                                                                  (alone[2], alone[2]))]
    np.testing.assert_allclose(together, cost(pairs[0]) + cost(pairs[1]) / 2, rtol=1e-5)


def examples_of(pairs=PAIRS, **changes) -> Examples:
    return Examples(pairs, TOKENIZER, tiny.settings({
        "model.vocab_size": 320, "data.sequence_length": T, "data.validation_fraction": 0.3, "training.batch_size": 3,
        "evaluation.batch_size": 2} | changes))


def test_held_out_are_prompts_not_pairs_and_at_least_one():
    prompts = [f"prompt {n}" for n in range(200)]
    found = held_out_of(prompts, 0.3)
    assert 40 < len(found) < 80 and held_out_of(prompts[::-1], 0.3) == found
    assert len(held_out_of(prompts[:3], 1e-9)) == 1 and held_out_of([], 0.5) == set()
    examples = examples_of([pair for pair in PAIRS for _ in range(3)])
    sides = [{text for text, *_ in map(decoded, segments(rows.of(range(rows.rows))))}
             for rows in (examples.rows, examples._held_out)]
    assert all(sides) and not {prompt_of(text) for text in sides[0]} & {prompt_of(text) for text in sides[1]}


def decoded(example):
    return TOKENIZER.decode(example[0]), TOKENIZER.decode(example[1])


def prompt_of(text: str) -> str:
    return text.partition("<think>")[0]


def test_every_held_out_example_is_evaluated_once():
    examples = examples_of()
    settings = tiny.settings({"evaluation.batch_size": 2})
    batches = list(examples.validation_batches(settings))
    taught = [TOKENIZER.decode(targets) for batch in batches for _, targets, _ in segments(batch)]
    held_out = held_out_of([prompt for prompt, _ in PAIRS], 0.3)
    assert sorted(taught) == sorted(response for prompt, response in PAIRS if prompt in held_out)
    assert all(len(batch["tokens_BT"]) == 2 for batch in batches) and len(batches) > 1
    assert sum(batch["mask_BT"].sum() for batch in batches) == examples.validation.targets
    assert examples.validation_bytes == sum(map(len, taught))
    assert len(list(examples.validation_batches(settings, 1))) == 1


def test_what_is_kept_beside_the_rows_comes_with_them():
    examples = examples_of()
    plain = examples.train_batches(tiny.settings({"training.batch_size": 3}))
    examples.kept = {"first_BT": examples.rows.of(range(examples.rows.rows))["tokens_BT"]}
    batches = examples.train_batches(tiny.settings({"training.batch_size": 3}))
    for _ in range(4):
        batch = batches.take(None)
        assert np.array_equal(batch["first_BT"], batch["tokens_BT"])
        assert np.array_equal(plain.take(None)["tokens_BT"], batch["tokens_BT"])
    later = examples.train_batches(tiny.settings({"training.batch_size": 3}))
    later.set_state(batches.get_state())
    assert np.array_equal(later.take(None)["tokens_BT"], batches.take(None)["tokens_BT"])
    other = examples_of(PAIRS[:-1]).train_batches(tiny.settings())
    with pytest.raises(RequestError, match="has learned from another corpus"):
        other.set_state(batches.get_state())


def test_one_prompt_cannot_be_parted():
    with pytest.raises(RequestError, match=r"config\.data\.validation_fraction=0\.3 leaves 0 of 4 examples to learn"):
        examples_of([("one", response) for _, response in PAIRS[:4]])
