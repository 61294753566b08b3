"""What evaluation harnesses ask of a model, on text: log-likelihoods of continuations and of whole texts, and text.

The conventions are those of lm-evaluation-harness's own Hugging Face backend, so that figures can be compared: what is
cut off where a text is too long, what an empty context becomes, where a continuation's first token begins, and that the
token which a tokenizer puts before every text counts in the log-likelihood of a whole text.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from research.decoding.cache import empty_cache
from research.decoding.forward import forward, head
from research.decoding.generate import CHUNK, Decoder, bucket
from research.decoding.sampling import Sampling, likeliest
from research.decoding.texts import STEPS_AT_ONCE, Growing
from research.errors import RequestError, nearest

# names of one thing; the first that is given counts
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DEFAULT_NEW_TOKENS = 256
KNOWN = ("until", "do_sample", "temperature", "top_k", "top_p", "min_p", *LENGTHS)


class Evaluator:
    """A checkpoint's answers. Rows of like lengths go together, in shapes rounded up to powers of two."""

    def __init__(self, decoder: Decoder, tokenizer, first: Sequence[int], batch_size: int,
                 max_length: int | None = None, seed: int = 0, special: bool = False):
        """first: the ids that every text begins with. max_length: tokens that the model reads at once, None: all of
        its positions. seed: of what is sampled. special: what spells a special token is that token, as in the text of
        a chat template. Raises RequestError."""
        positions = decoder.model.config.max_position_embeddings
        if batch_size < 1:
            raise RequestError(f"--batch_size={batch_size} must be at least 1")
        if max_length is not None and not 1 <= max_length <= positions:
            raise RequestError(f"--max_length={max_length} must be from 1 to max_position_embeddings={positions}")
        self.decoder, self.tokenizer, self.first = decoder, tokenizer, list(first)
        self.batch_size, self.max_length, self.seed = batch_size, max_length or positions, seed
        self.special = special

    def loglikelihood(self, pairs: Sequence[tuple[str, str]],
                      done: Callable[[int, tuple[float, bool]], object] | None = None) -> list[tuple[float, bool]]:
        """(log p of the continuation in nats, whether greedy decoding writes it) of each (context, continuation).

        done: called with the number of a pair and its answer as soon as there is one.
        """
        return self._score([self._split(*pair) for pair in pairs], "log-likelihoods", done)

    def loglikelihood_rolling(self, texts: Sequence[str],
                              done: Callable[[int, float], object] | None = None) -> list[float]:
        """log p of each whole text in nats: every token once, in windows of `max_length` that only just overlap."""
        rows, owners = [], []
        for number, text in enumerate(texts):
            for window in windows(self._encode(text), self.tokenizer.bos_id, self.max_length):
                rows.append(window)
                owners.append(number)
        sums, left = [0.0] * len(texts), [owners.count(number) for number in range(len(texts))]

        def add(row: int, answer: tuple[float, bool]) -> None:
            number = owners[row]
            sums[number] += answer[0]
            left[number] -= 1
            if done and not left[number]:
                done(number, sums[number])

        self._score(rows, "log-likelihoods of windows", add)
        return sums

    def generate_until(self, requests: Sequence[tuple[str, dict]],
                       done: Callable[[int, str], object] | None = None) -> list[str]:
        """The continuation of each (context, generation arguments), cut before the first text of its `until`.

        Arguments, all optional: `until`, `max_gen_toks` (256), `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`.
        A context is cut off at its beginning where it and the new tokens are more than `max_length`.
        """
        groups, texts = {}, [""] * len(requests)
        for number, (context, arguments) in enumerate(requests):
            until, max_tokens, sampling = read_arguments(arguments)
            if max_tokens >= self.max_length:
                raise RequestError(f"generation_kwargs: max_gen_toks={max_tokens} must be below max_length="
                                   f"{self.max_length}")
            ids = (self._encode(context) or [self.tokenizer.bos_id])[-(self.max_length - max_tokens):]
            groups.setdefault((max_tokens, sampling), []).append((ids, number, until))
        with tqdm(total=len(requests), desc="continuations", disable=None) as bar:
            for (max_tokens, sampling), group in groups.items():
                group.sort(key=lambda row: -len(row[0]))
                size = min(self.batch_size, len(group))
                for start in range(0, len(group), size):
                    rows = group[start:start + size]
                    prompts = [ids for ids, _, _ in rows]
                    prompts += [prompts[-1]] * (size - len(rows))  # another number of rows would be compiled anew
                    ends = [Growing(self.tokenizer, until) for _, _, until in rows]

                    def watch(tokens, ends=ends):
                        known = [end(row) for end, row in zip(ends, tokens, strict=False)]
                        return known + [True] * (len(tokens) - len(ends))

                    self.decoder.generate(prompts, max_tokens, sampling, seed=self.seed + start, watch=watch,
                                          ends=self.tokenizer.end_ids, steps_at_once=STEPS_AT_ONCE)
                    for (_, number, _), end in zip(rows, ends, strict=True):
                        texts[number] = end.text
                        if done:
                            done(number, end.text)
                    bar.update(len(rows))
        return texts

    def _encode(self, text: str) -> list[int]:
        return self.first + self.tokenizer.encode(text, self.special).tolist()

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids before and of a continuation, to which spaces at the context's end belong: tokens take them along."""
        if not context:
            return [self.tokenizer.bos_id], self.tokenizer.encode(continuation, self.special).tolist()
        before = self._encode(context.rstrip())
        return before or [self.tokenizer.bos_id], self._encode(context + continuation)[len(before):]

    def _score(self, rows: Sequence[tuple[list[int], list[int]]], name: str, done) -> list[tuple[float, bool]]:
        """log p of the second list after the first, and whether each of its tokens is the likeliest."""
        longest = max((len(after) for _, after in rows), default=0)
        if longest > self.max_length:
            raise RequestError(f"a continuation of {longest} tokens is longer than max_length={self.max_length}")
        order = sorted(range(len(rows)), key=lambda number: -sum(map(len, rows[number])))
        B, answers = min(self.batch_size, len(rows)), [(0.0, True)] * len(rows)
        with tqdm(total=len(rows), desc=name, disable=None) as bar:
            for start in range(0, len(rows), self.batch_size):
                numbers = order[start:start + self.batch_size]
                cut = [(before + after)[-(self.max_length + 1):] for before, after in (rows[n] for n in numbers)]
                T = bucket(len(cut[0]) - 1)
                tokens_BT, targets_BT, mask_BT = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32), np.zeros(
                    (B, T), bool)
                for place, (number, ids) in enumerate(zip(numbers, cut, strict=True)):
                    tokens_BT[place, :len(ids) - 1], targets_BT[place, :len(ids) - 1] = ids[:-1], ids[1:]
                    mask_BT[place, len(ids) - 1 - len(rows[number][1]):len(ids) - 1] = True
                log_p_BT, likeliest_BT = map(np.asarray, token_scores(
                    self.decoder.weights, tokens_BT, targets_BT, mask_BT, np.int32(len(cut[0]) - 1),
                    model=self.decoder.model, storage=self.decoder.cache_dtype))
                for place, number in enumerate(numbers):
                    mask_T = mask_BT[place]
                    answers[number] = (float(log_p_BT[place, mask_T].sum(dtype=np.float64)),
                                       bool(likeliest_BT[place, mask_T].all()))
                    if done:
                        done(number, answers[number])
                bar.update(len(numbers))
        return answers


def windows(ids: list[int], prefix: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """(before, predicted) ids: every id is predicted once, from at most `length` ones, as many as there are."""
    end = min(length, len(ids))
    if ids:
        yield [prefix], ids[:end]
    while end < len(ids):
        begin, end = end, min(end + length, len(ids))
        yield ids[end - length - 1:begin], ids[begin:end]


def read_arguments(arguments: dict) -> tuple[tuple[str, ...], int, Sampling]:
    """(texts that end a row, new tokens at the most, sampling) of a task's generation arguments. RequestError."""
    given = {name: value for name, value in arguments.items() if value is not None}
    for name in given:
        if name not in KNOWN:
            raise RequestError(f"generation_kwargs: {name}={given[name]!r} is not supported{nearest(name, KNOWN)}; "
                               f"they are {', '.join(KNOWN)}")
    until = given.get("until", [])
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list) or not all(isinstance(end, str) for end in until):
        raise RequestError(f"generation_kwargs: until={until!r} must be a text or a list of texts")
    try:
        max_tokens = int(next((given[name] for name in LENGTHS if name in given), DEFAULT_NEW_TOKENS))
        temperature = float(given.get("temperature", 1.0 if given.get("do_sample") else 0.0))
        sampling = Sampling()
        if given.get("do_sample", True) and temperature:
            sampling = Sampling(temperature, int(given.get("top_k", 0)), float(given.get("top_p", 1.0)),
                                float(given.get("min_p", 0.0)))
    except (TypeError, ValueError) as error:
        raise RequestError(f"generation_kwargs: {error}") from None
    if max_tokens < 1:
        raise RequestError(f"generation_kwargs: max_gen_toks={max_tokens} must be at least 1")
    if problem := sampling.problem():
        raise RequestError(f"generation_kwargs: {problem}")
    return tuple(filter(None, until)), max_tokens, sampling


@partial(jax.jit, static_argnames=("model", "storage"))
def token_scores(weights, tokens_BT, targets_BT, mask_BT, longest, *, model, storage: str):
    """(log p of each target (B, T) float32, whether it is the likeliest), 0 and false outside `mask_BT`.

    Through the decoder's weights, a chunk of positions at a time; logits are made of rows that have a target alone.
    longest: positions that are filled.
    """
    B, T = tokens_BT.shape
    chunk = min(T, CHUNK)

    def of_row(row):
        hidden_TD, targets_T, mask_T = row

        def scored():
            logits_TV = head(model, weights, hidden_TD[None])[0]
            picked_T = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=1)[:, 0]
            return (jnp.where(mask_T, picked_T - jax.nn.logsumexp(logits_TV, axis=1), 0),
                    (likeliest(logits_TV) == targets_T) & mask_T)

        return jax.lax.cond(jnp.any(mask_T), scored, lambda: (jnp.zeros(chunk), jnp.zeros(chunk, bool)))

    def pass_chunk(number, carry):
        rows, log_p_BT, likeliest_BT = carry
        first = number * chunk
        tokens, targets, mask = (jax.lax.dynamic_slice_in_dim(x_BT, first, chunk, axis=1)
                                 for x_BT in (tokens_BT, targets_BT, mask_BT))
        positions = jnp.broadcast_to(first + jnp.arange(chunk), (B, chunk))
        hidden_BTD, _, rows = forward(model, weights, rows, tokens, positions)
        log_p, hits = jax.lax.map(of_row, (hidden_BTD, targets, mask))
        return (rows, jax.lax.dynamic_update_slice(log_p_BT, log_p, (0, first)),
                jax.lax.dynamic_update_slice(likeliest_BT, hits, (0, first)))

    carry = empty_cache(model, B, T, storage)["layers"], jnp.zeros((B, T)), jnp.zeros((B, T), bool)
    return jax.lax.fori_loop(0, -(-longest // chunk), pass_chunk, carry)[1:]
