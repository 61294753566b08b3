"""The compiled loop: greedy text is the argmax of the full forward, however it is drafted, batched and cut."""

from itertools import count

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.decoding.generate import Generation, bucket, check_request, generate
from research.decoding.sampling import Sampling
from tests import tiny
from tests.decoding.models import CHOOSY, PLAIN, agreeing, built, close_calls, decoder_of, decoder_with

MODELS = {  # modules: changes
    1: CHOOSY | {"mtp.num_nextn_predict_layers": 1},
    2: CHOOSY | {"mtp.num_nextn_predict_layers": 2, "model.attention": "gqa", "mtp.hidden": "before_norm"} | PLAIN,
    3: CHOOSY | {"mtp.num_nextn_predict_layers": 3} | PLAIN,
}
MODELS = {M: tuple(sorted(changes.items())) for M, changes in MODELS.items()}
CASES = [(1, 0), (1, 2), (2, 3), (3, 3)]  # modules, drafts
BATCHES = [(*case, 3) for case in CASES] + [(3, 2, 5)]  # and prompts
EXAMPLES = 50  # each another model with prompts of its own, through one compiled program a case
LONGEST = 34  # with 24 new tokens, three drafts and three modules it fills the smallest cache: one shape to compile
left = {batch: 0 for batch in (*BATCHES, "plain")}  # close calls, over all examples


def random_prompts(lengths, seed, V=5):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, V, length).tolist() for length in lengths]


def complete(rows, max_tokens, end):
    for row in rows:
        assert end not in row[:-1]
        assert len(row) == max_tokens or row[-1] == end and len(row) < max_tokens


@pytest.mark.parametrize(("M", "k", "B"), BATCHES)
@settings(max_examples=EXAMPLES)
@given(seed=st.integers(0, 2**31), lengths=st.tuples(*[st.integers(3, LONGEST)] * 5), max_tokens=st.integers(1, 24),
       end=st.integers(-1, 4), share=st.sampled_from([0.0, 0.0, 0.5, 0.8, 1.0]))
def test_greedy_is_the_argmax_of_the_full_forward(M, k, B, seed, lengths, max_tokens, end, share):
    """Over random models, prompts and ends; ends stand inside drafts, and max_tokens ends within accepted ones."""
    _, model, weights_of = built(MODELS[M])
    variables, prompts = agreeing(weights_of(seed), share), random_prompts(lengths[:B], seed)
    result = decoder_with(MODELS[M], variables).generate(prompts, max_tokens, draft_tokens=k, ends=[end])
    complete(result.tokens, max_tokens, end)
    left[M, k, B] += close_calls(model, variables, prompts, result.tokens)
    assert left[M, k, B] <= 2
    emitted = sum(map(len, result.tokens)) - B
    assert emitted / (k + 1) <= result.steps <= emitted and len(result.accepted) == k
    assert sorted(result.accepted, reverse=True) == result.accepted
    assert result.steps + sum(result.accepted) >= emitted  # a token beside each pass's accepted drafts


@settings(max_examples=EXAMPLES)
@given(seed=st.integers(0, 2**31), lengths=st.tuples(*[st.integers(3, LONGEST)] * 3), end=st.integers(-1, 4),
       share=st.sampled_from([0.0, 0.5, 0.8]))
def test_drafted_text_is_plain_text(seed, lengths, end, share):
    """The two paths against each other, as a user would compare them."""
    _, model, weights_of = built(MODELS[1])
    variables, prompts = agreeing(weights_of(seed), share), random_prompts(lengths, seed)
    decoder = decoder_with(MODELS[1], variables)
    plain, drafted = (decoder.generate(prompts, 24, draft_tokens=k, ends=[end]) for k in (0, 2))
    if plain.tokens != drafted.tokens:  # one of them left the likeliest token, at a tie
        left["plain"] += 1
        assert sum(close_calls(model, variables, prompts, result.tokens) for result in (plain, drafted))
    assert left["plain"] <= 2
    assert plain.steps == sum(map(len, plain.tokens)) - 3 and drafted.steps <= plain.steps
    assert plain.acceptance_rate == [] and (plain.tokens_per_step == 1 or not plain.steps)


@pytest.mark.parametrize(("M", "k"), [case for case in CASES if case[1]])
@pytest.mark.parametrize("max_tokens", [1, 2, 9, 12])
def test_where_every_draft_stands(M, k, max_tokens):
    """As few passes as there can be, and exactly max_tokens, whatever of them the last pass would give."""
    variables, prompts = agreeing(built(MODELS[M])[2](4), 1.0), random_prompts((3, 7, 30), 0)
    result = decoder_with(MODELS[M], variables).generate(prompts, max_tokens, draft_tokens=k, ends=[-1])
    assert [len(row) for row in result.tokens] == [max_tokens] * 3
    passes = 3 * -(-(max_tokens - 1) // (k + 1))
    assert result.steps == passes and result.accepted == [passes] * k


def test_an_end_inside_a_draft_ends_the_text_there():
    """Models that say one token after another, each as the end."""
    prompts, places = random_prompts((3, 7, 30), 0), set()
    for seed in range(12):
        decoder = decoder_with(MODELS[3], agreeing(built(MODELS[3])[2](seed), 1.0))
        endless = decoder.generate(prompts, 24, draft_tokens=3, ends=[-1]).tokens
        for end in range(5):
            expected = [row[:row.index(end) + 1] if end in row else row for row in endless]
            assert decoder.generate(prompts, 24, draft_tokens=3, ends=[end]).tokens == expected
            places |= {len(row) - 1 for row in expected if row[-1] == end}
    assert places >= {0, 1, 2}, places  # the prompt's own token, and the first and second of a draft


@pytest.mark.parametrize(("sampling", "k"), [(Sampling(), 3), (Sampling(1.0, top_p=0.9), 2)], ids=["greedy", "sampled"])
def test_a_batch_is_its_rows_one_by_one_and_cut_into_steps_is_whole(sampling, k):
    """Rows finish at different times; a sampled row depends on the seed and its number."""
    decoder = decoder_with(MODELS[2], built(MODELS[2])[2](11))
    prompts = random_prompts((3, 25, LONGEST), 2)
    arguments = {"max_tokens": 20, "sampling": sampling, "draft_tokens": k, "seed": 5}
    endless = decoder.generate(prompts, **arguments, ends=[-1]).tokens
    arguments["ends"] = [next(end for end in range(5) if len({(row + [end]).index(end) for row in endless}) > 1)]
    whole = decoder.generate(prompts, **arguments)
    assert len({len(row) for row in whole.tokens}) > 1
    seen = []
    cut = decoder.generate(prompts, **arguments, steps_at_once=1, watch=lambda rows: seen.append(rows) or [False] * 3)
    assert (cut.tokens, cut.steps, cut.accepted) == (whole.tokens, whole.steps, whole.accepted)
    assert all(new[:len(old)] == old for before, after in zip(seen, seen[1:], strict=False)
               for old, new in zip(before, after, strict=True))
    if sampling.temperature:
        assert decoder.generate(prompts, **arguments).tokens == whole.tokens
        assert decoder.generate(prompts, **arguments | {"seed": 6}).tokens != whole.tokens
        assert decoder.generate(prompts[:1], **arguments).tokens == whole.tokens[:1]
    else:
        assert [decoder.generate([prompt], **arguments).tokens[0] for prompt in prompts] == whole.tokens


def test_a_watched_row_stops_and_the_others_go_on():
    decoder, prompts = decoder_of(MODELS[2]), random_prompts((3, 25, LONGEST), 2)
    whole = decoder.generate(prompts, 20, draft_tokens=3, ends=[-1])
    stopped = decoder.generate(prompts, 20, draft_tokens=3, ends=[-1], steps_at_once=1,
                               watch=lambda rows: [False, len(rows[1]) > 4, False])
    assert [stopped.tokens[0], stopped.tokens[2]] == [whole.tokens[0], whole.tokens[2]]
    assert 4 < len(stopped.tokens[1]) <= 8 and whole.tokens[1][:len(stopped.tokens[1])] == stopped.tokens[1]


@pytest.mark.parametrize("lengths", [(255, 256, 257, 63, 64, 65, 512, 3), (63, 64, 3, 62)])
def test_prompts_at_the_borders_of_chunks_and_buckets(lengths):
    _, model, weights_of = built(MODELS[2])
    variables, prompts = weights_of(7), random_prompts(lengths, 1)
    result = decoder_with(MODELS[2], variables).generate(prompts, 8, draft_tokens=2)
    texts = [prompt + row for prompt, row in zip(prompts, result.tokens, strict=True)]
    assert [len(text) for text in texts] == [length + 8 for length in lengths]
    assert close_calls(model, variables, prompts, result.tokens, 528) == 0


def test_nothing_is_compiled_again_within_a_bucket():
    compiled, number = [], count()
    decoder = decoder_of(MODELS[2])

    def ask(length, max_tokens, prompts=3):
        return decoder.generate(random_prompts((length,) * prompts, next(number)), max_tokens, draft_tokens=3, ends=[1])

    ask(10, 20)
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    before = len(decoder._compiled)
    for length, max_tokens in ((2, 1), (33, 24), (40, 3), (56, 3)):
        assert ask(length, max_tokens).compile_seconds < 0.5
    assert len(decoder._compiled) == before
    assert not [name for name in compiled if "backend_compile" in name]
    ask(65, 20)
    assert len(decoder._compiled) == before + 2  # the prompt's pass and the loop
    assert [name for name in compiled if "backend_compile" in name]  # the listener hears


def test_the_loop_writes_into_the_state_that_it_is_given():
    """The cache above all, which would stand twice."""
    decoder = decoder_of(MODELS[2])
    decoder.generate(random_prompts((3, 25, LONGEST), 2), 20, draft_tokens=3, ends=[-1])
    loops = [program.memory_analysis() for name, program in decoder._compiled.items() if name[0] == "decode"]
    assert loops and all(loop.alias_size_in_bytes > 0.95 * loop.output_size_in_bytes for loop in loops)


def test_buckets():
    assert [bucket(n) for n in (1, 63, 64, 65, 128, 129, 256, 257)] == [64, 64, 64, 128, 128, 256, 256, 512]


@pytest.mark.parametrize(("changes", "prompts", "max_tokens", "k", "message"), [
    ({"mtp.num_nextn_predict_layers": 0}, [[1]], 5, 1, "no multi-token module"),
    ({}, [], 5, 0, "there is no prompt"),
    ({}, [[1], []], 5, 0, "prompt 2 is empty"),
    ({}, [[1]], 0, 0, "max_tokens=0 must be at least 1"),
    ({}, [[1, 2, 3]], 62, 0, "prompt 1 of 3 tokens and max_tokens=62 are more than max_position_embeddings=64"),
    ({}, [[1, 2], [1]], 5, 1, "prompt 2 of 1 tokens is shorter than the 2 multi-token modules"),
])
def test_what_cannot_be_decoded_is_refused_in_words(changes, prompts, max_tokens, k, message):
    model = built(tuple((changes | {"model.max_position_embeddings": 64}).items()))[1]
    with pytest.raises(ValueError, match=message):
        check_request(model, prompts, max_tokens, k)
    check_request(model, [[1, 2]], 62, 0)


def test_generate_once():
    _, model, weights_of = built(tuple(tiny.DENSE.items()))
    variables = weights_of(0)
    result = generate(model, variables, [[1, 2, 3], [4]], 5)
    assert isinstance(result, Generation)
    assert close_calls(model, variables, [[1, 2, 3], [4]], result.tokens) == 0
    with pytest.raises(ValueError, match="top_p=0.0 must be above 0"):
        generate(model, variables, [[1]], 5, Sampling(1.0, top_p=0.0))
    assert [len(row) for row in result.tokens] == [5, 5] and result.steps == 8 and result.tokens_per_second > 0
