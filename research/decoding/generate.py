"""Continuing token sequences: chunked prefill, then a compiled loop of drafting and verifying; plain is zero drafts."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from research.decoding import speculative
from research.decoding.cache import empty_cache, write_rows
from research.decoding.forward import decoding_model, forward, head, mtp_forward, prepare
from research.decoding.sampling import Sampling
from research.environment import give_back_memory
from research.errors import RequestError
from research.parallel.rules import BATCH, of_decoding, of_generation, over_cache

CHUNK = 256  # prompt tokens of one pass at the most
SMALLEST_BUCKET = 64  # prompts and caches are rounded up to powers of two from here, each compiled once
MOST_DRAFTS = 16  # each is unrolled: 200 of them compile for a quarter of an hour

GREEDY = Sampling()


@dataclass
class Generation:
    """Token ids of each prompt's continuation, without the prompt; an end-of-text token that ended it is the last.

    steps: passes of the main model after the prompts', summed over prompts; accepted: in how many of them the draft at
    each position stood (drafts beyond the end of a text count too). Seconds are without compilation.
    """

    tokens: list[list[int]]
    steps: int
    accepted: list[int]
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float = field(compare=False, default=0.0)

    @property
    def acceptance_rate(self) -> list[float]:
        """Share of the steps in which the draft at each position was accepted (so all before it were)."""
        return [number / max(self.steps, 1) for number in self.accepted]

    @property
    def drafted(self) -> int:
        """How many drafts the main model has read."""
        return self.steps * len(self.accepted)

    @property
    def tokens_per_step(self) -> float:
        """Of one prompt; the first token comes from its prefill."""
        return (sum(map(len, self.tokens)) - len(self.tokens)) / max(self.steps, 1)

    @property
    def tokens_per_second(self) -> float:
        """Of all prompts together, after their first token."""
        return (sum(map(len, self.tokens)) - len(self.tokens)) / max(self.decode_seconds, 1e-9)


def joined(parts: Sequence[Generation]) -> Generation:
    """Several decodings, one after another, as one; time to the first token is the first's."""
    return Generation(
        [row for part in parts for row in part.tokens], sum(part.steps for part in parts),
        [sum(numbers) for numbers in zip(*(part.accepted for part in parts), strict=True)], parts[0].prefill_seconds,
        sum(part.decode_seconds for part in parts), sum(part.compile_seconds for part in parts))


def bucket(length: int) -> int:
    """The power of two that a length is rounded up to."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


class Decoder:
    """A model's weights as decoding reads them, and what was compiled for them."""

    def __init__(self, model, variables, recipe: str | None = None, cache_dtype: str | None = None,
                 weights: str | None = None):
        """model: a Transformer; variables: its {`params`, `routing`}, or what `prepare` makes of them; recipe: None is
        the model's own, or bfloat16 where that is in FP8; cache_dtype: one of `cache.STORAGE`, None: the activations';
        weights: None, int8 or int4, see `forward.storage`. ValueError for routed experts in int8 or int4. Over the
        model's mesh, if it has one, weights and cache lie as `parallel.rules` says; RequestError where they cannot."""
        self.model = decoding_model(model, recipe)
        if self.model.products.mesh is not None:
            check_mesh(self.model.config, self.model.products.mesh.shape, weights)
        self.cache_dtype = cache_dtype or self.model.products.recipe.name
        self._prepare = partial(prepare, model=self.model, weights=weights)
        self._prepare_at_once, self._compiled = None, {}
        self.take(variables)

    def take(self, variables) -> None:
        """Goes on with other weights of the same model, as `__init__` has them; what is compiled stays."""
        if "layers" not in variables:
            variables = self._prepared(variables)
        self.weights = variables

    def _prepared(self, variables):
        mesh, on_device = self.model.products.mesh, all(isinstance(x, jax.Array) for x in jax.tree.leaves(variables))
        if mesh is None and not on_device:
            return self._prepare(variables)
        if self._prepare_at_once is None:
            placing = {}
            if mesh is not None:
                placing = {"out_shardings": of_decoding(mesh, jax.eval_shape(self._prepare, variables))}
            self._prepare_at_once = jax.jit(self._prepare, **placing)
        return self._prepare_at_once(variables)

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int, sampling: Sampling = GREEDY,
                 draft_tokens: int = 0, seed: int = 0, ends: Sequence[int] = (), steps_at_once: int = 0,
                 watch: Callable[[list[list[int]]], Sequence[bool]] | None = None) -> Generation:
        """`max_tokens` more tokens for each prompt, or fewer where one of `ends` comes.

        draft_tokens: k of speculative decoding, 0: plain. watch: called with all tokens so far after every
        `steps_at_once` steps (0: at the end alone); returns for each prompt whether it is to stop. RequestError, a
        ValueError, for an empty prompt, more positions than the model has, drafts without a multi-token module, or
        sampling out of its range. Over a mesh the last prompt fills the batch up to a multiple of those who share it.
        """
        check_request(self.model, prompts, max_tokens, draft_tokens)
        if problem := sampling.problem():
            raise RequestError(problem)
        mesh, number = self.model.products.mesh, len(prompts)
        shards = math.prod(mesh.shape[axis] for axis in BATCH) if mesh else 1
        prompts = [*prompts, *prompts[-1:] * (-number % shards)]
        B, k, longest = len(prompts), draft_tokens, max(map(len, prompts))
        T = bucket(longest)
        S = bucket(max(T, longest + max_tokens + k + self.model.mtp.num_nextn_predict_layers))
        tokens_BT = np.zeros((B, T), np.int32)
        for row, prompt in zip(tokens_BT, prompts, strict=True):
            row[:len(prompt)] = prompt
        length_B = np.array([len(prompt) for prompt in prompts], np.int32)
        static = {"model": self.model, "sampling": sampling, "k": k}
        shape = (B, T, S, sampling, k, bucket(max_tokens), len(ends))
        ends_E = np.array(ends, np.int32)
        start = time.perf_counter()
        arguments = self.weights, tokens_BT, length_B, jax.random.key(seed), ends_E, np.int32(max_tokens)
        more = {"slots": S, "storage": self.cache_dtype, "room": bucket(max_tokens)}
        began = self._compile(("prefill", *shape), prefill, static | more, arguments)
        compile_seconds = time.perf_counter() - start
        start = time.perf_counter()
        state = jax.block_until_ready(began(*arguments))
        prefill_seconds = time.perf_counter() - start
        if number < B:
            _stop(state, np.arange(B) >= number)
        start = time.perf_counter()
        step = self._compile(("decode", *shape), decode, static,
                             (self.weights, state, ends_E, np.int32(max_tokens), np.int32(0)), 1)
        compile_seconds += time.perf_counter() - start
        decode_seconds, at_once = 0.0, np.int32(steps_at_once or 2**30)
        while True:
            if watch:
                _stop(state, np.pad(np.asarray(watch(tokens_of(state)[:number]), bool), (0, B - number)))
            if np.all(state["done_B"]):
                break
            start = time.perf_counter()
            state = jax.block_until_ready(step(self.weights, state, ends_E, np.int32(max_tokens), at_once))
            decode_seconds += time.perf_counter() - start
        return Generation(tokens_of(state)[:number], int(state["steps"]), np.asarray(state["accepted_k"]).tolist(),
                          prefill_seconds, decode_seconds, compile_seconds)

    def _compile(self, name, function, static: dict, arguments, donated=()):
        if name not in self._compiled:
            function, mesh, placing = partial(function, **static), self.model.products.mesh, {}
            if mesh is not None:
                placing = {"out_shardings": of_generation(mesh, jax.eval_shape(function, *arguments))}
            jitted = jax.jit(function, donate_argnums=donated, **placing)
            self._compiled[name] = jitted.lower(*arguments).compile()
            give_back_memory()
        return self._compiled[name]


def check_mesh(config, sizes, weights: str | None) -> None:
    """RequestError for what decoding over a mesh of these sizes, by axis, cannot do. config: the model's."""
    if sizes["pipeline"] > 1:
        raise RequestError.field("mesh.pipeline", sizes["pipeline"], "must be 1: decoding has no stages")
    if weights is not None:
        raise RequestError(f"--weights={weights}: over a mesh they are as the recipe has them")
    if config.attention == "gqa" and config.num_key_value_heads % sizes["tensor"]:
        raise RequestError.field("mesh.tensor", sizes["tensor"], "does not divide config.model.num_key_value_heads="
                                 f"{config.num_key_value_heads}")


def _stop(state, rows_B) -> None:
    """Ends these rows too."""
    done_B = state["done_B"]
    state["done_B"] = jax.device_put(np.asarray(done_B) | rows_B, done_B.sharding)


def check_request(model, prompts, max_tokens: int, draft_tokens: int) -> None:
    """RequestError for what cannot be decoded."""
    M, most = model.mtp.num_nextn_predict_layers, model.config.max_position_embeddings
    if draft_tokens and not M:
        raise RequestError("the checkpoint has no multi-token module to draft with")
    if draft_tokens > MOST_DRAFTS:
        raise RequestError(f"draft_tokens={draft_tokens} must be at most {MOST_DRAFTS}")
    if max_tokens < 1:
        raise RequestError(f"max_tokens={max_tokens} must be at least 1")
    if not prompts:
        raise RequestError("there is no prompt")
    for number, prompt in enumerate(prompts, start=1):
        if not len(prompt):
            raise RequestError(f"prompt {number} is empty")
        if len(prompt) + max_tokens > most:
            raise RequestError(f"prompt {number} of {len(prompt)} tokens and max_tokens={max_tokens} are more than "
                               f"max_position_embeddings={most}")
        if draft_tokens and len(prompt) < M:
            raise RequestError(f"prompt {number} of {len(prompt)} tokens is shorter than the {M} multi-token modules "
                               "look back")


def tokens_of(state) -> list[list[int]]:
    """The tokens of each row so far."""
    return [row[:count].tolist() for row, count in zip(np.asarray(state["tokens"]), np.asarray(state["count_B"]),
                                                       strict=True)]


def prefill(weights, tokens_BT, length_B, key, ends, max_tokens, *, model, sampling, k: int, slots: int, storage: str,
            room: int):
    """The state after the prompts: their rows in a new cache, the first token of each, and its drafts."""
    B, T = tokens_BT.shape
    cache = empty_cache(model, B, slots, storage)
    key_B = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(B))
    M, D = model.mtp.num_nextn_predict_layers, model.config.hidden_size
    chunk, kept = min(T, CHUNK), max(M, 1)  # hidden states of the last positions: of the head and of the first window
    dtype = weights["embed_tokens"].dtype
    padded = jnp.pad(tokens_BT, ((0, 0), (0, M)))
    wanted = length_B[:, None] - kept + jnp.arange(kept)[None]  # positions of these hidden states

    def pass_chunk(number, carry):
        cache, tail_BMD, last_BD = carry
        first = number * chunk
        positions = jnp.broadcast_to(first + jnp.arange(chunk), (B, chunk))
        chosen = jax.lax.dynamic_slice_in_dim(padded, first, chunk, axis=1)
        after, before, layers = forward(model, weights, cache["layers"], chosen, positions)
        hidden = after if model.mtp.hidden == "after_norm" else before
        here = (wanted >= first) & (wanted < first + chunk)
        at = jnp.clip(wanted - first, 0, chunk - 1)
        tail_BMD = jnp.where(here[..., None], jnp.take_along_axis(hidden, at[..., None], axis=1), tail_BMD)
        last_BD = jnp.where(here[:, -1:], jnp.take_along_axis(after, at[:, -1:, None], axis=1)[:, 0], last_BD)
        mtp = list(cache["mtp"])
        for depth in range(1, M + 1 if k else 1):
            further = jax.lax.dynamic_slice_in_dim(padded, first + depth, chunk, axis=1)
            _, hidden, mtp[depth - 1] = mtp_forward(
                model, weights, depth, mtp[depth - 1], hidden, further, positions)
        return {"layers": layers, "mtp": mtp}, tail_BMD, last_BD

    carry = cache, jnp.zeros((B, kept, D), dtype), jnp.zeros((B, D), dtype)
    cache, tail_BMD, last_BD = jax.lax.fori_loop(0, -(-jnp.max(length_B) // chunk), pass_chunk, carry)
    no_drafts = jnp.zeros((B, 0), jnp.int32)
    _, next_B = speculative.verify(head(model, weights, last_BD[:, None]), no_drafts, None, sampling, key_B, length_B)
    state = {
        "cache": cache, "key_B": key_B, "length_B": length_B, "last_B": next_B,
        "tokens": jnp.zeros((B, room + k + 1), jnp.int32).at[:, 0].set(next_B), "count_B": jnp.ones(B, jnp.int32),
        "done_B": is_end(next_B[:, None], ends)[:, 0] | (max_tokens <= 1),
        "steps": jnp.zeros((), jnp.int32), "accepted_k": jnp.zeros(k, jnp.int32),
    }
    if k:
        # the window of the first drafts ends with the prompt's last position, as if a pass had just accepted nothing
        before = jnp.stack([tokens_BT[jnp.arange(B), jnp.maximum(length_B - M + m, 0)] for m in range(1, M)],
                           axis=1) if M > 1 else jnp.zeros((B, 0), jnp.int32)
        state |= {"tail_BMD": tail_BMD[:, :M - 1], "before_BM": before}
        hidden = jnp.pad(tail_BMD[:, M - 1:], ((0, 0), (0, k), (0, 0)))
        return drafted(model, weights, state, hidden, jnp.tile(next_B[:, None], (1, k + 1)),
                       jnp.zeros(B, jnp.int32), length_B - 1, k, sampling)
    return state


def drafted(model, weights, state, hidden_BTD, emitted_BT, accepted_B, first_B, k: int, sampling):
    """The state with new drafts, after a pass over positions first_B, ... whose tokens of after them are emitted_BT.

    The window begins M - 1 positions earlier: the deeper modules read drafts there that may have fallen since.
    """
    M = model.mtp.num_nextn_predict_layers
    hidden_BWD = jnp.concatenate([state["tail_BMD"], hidden_BTD], axis=1)
    known_BW = jnp.concatenate([state["before_BM"], emitted_BT], axis=1)
    drafts, q, mtp = speculative.draft(model, weights, state["cache"]["mtp"], hidden_BWD, known_BW,
                                       first_B - (M - 1), accepted_B + M - 1, k, sampling, state["key_B"])
    take = accepted_B[:, None] + 1 + jnp.arange(M - 1)[None]
    return state | {
        "cache": state["cache"] | {"mtp": mtp}, "drafts_Bk": drafts,
        "tail_BMD": jnp.take_along_axis(hidden_BWD, take[..., None], axis=1),
        "before_BM": jnp.take_along_axis(known_BW, take, axis=1),
    } | ({"q_BkV": q} if q is not None else {})


def is_end(tokens_BT, ends):
    return jnp.any(tokens_BT[..., None] == ends[None, None], axis=-1)


def decode(weights, state, ends, max_tokens, steps, *, model, sampling, k: int):
    """At most `steps` passes of the main model, until every row is done."""
    B = state["last_B"].shape[0]
    column = jnp.arange(k + 1)[None]

    def go_on(carry):
        number, state = carry
        return (number < steps) & ~jnp.all(state["done_B"])

    def one_pass(carry):
        number, state = carry
        active_B, first_B = ~state["done_B"], state["length_B"]
        drafts_Bk = state["drafts_Bk"] if k else jnp.zeros((B, 0), jnp.int32)
        read_BT = jnp.concatenate([state["last_B"][:, None], drafts_Bk], axis=1)
        after, before, layers = forward(model, weights, state["cache"]["layers"], read_BT, first_B[:, None] + column)
        accepted_B, next_B = speculative.verify(head(model, weights, after), drafts_Bk, state.get("q_BkV"), sampling,
                                                state["key_B"], first_B + 1)
        emitted_BT = speculative.emitted(drafts_Bk, accepted_B, next_B)
        ended_BT = is_end(emitted_BT, ends) & (column <= accepted_B[:, None])
        room_B = max_tokens - state["count_B"]
        count_B = jnp.where(jnp.any(ended_BT, axis=1), jnp.argmax(ended_BT, axis=1), accepted_B) + 1
        count_B = jnp.where(active_B, jnp.minimum(count_B, room_B), 0)
        tokens = over_cache(model.products.mesh, "tokens", write_rows, state["tokens"], emitted_BT, state["count_B"])
        hidden = after if model.mtp.hidden == "after_norm" else before
        state = state | {"cache": state["cache"] | {"layers": layers}, "tokens": tokens}
        if k:  # a row that is done passes over the same positions again
            state = drafted(model, weights, state, hidden, emitted_BT, accepted_B, first_B, k, sampling)
        stood_Bk = (jnp.arange(k)[None] < accepted_B[:, None]) & active_B[:, None]
        return number + 1, state | {
            "length_B": jnp.where(active_B, first_B + accepted_B + 1, first_B),
            "last_B": jnp.where(active_B, next_B, state["last_B"]),
            "count_B": state["count_B"] + count_B,
            "done_B": state["done_B"] | jnp.any(ended_BT, axis=1) | (count_B >= room_B),
            "steps": state["steps"] + jnp.sum(active_B),
            "accepted_k": state["accepted_k"] + jnp.sum(stood_Bk, axis=0),
        }

    return jax.lax.while_loop(go_on, one_pass, (jnp.int32(0), state))[1]


def generate(model, variables, prompts, max_tokens: int, sampling: Sampling = GREEDY, **more) -> Generation:
    """Once, what `Decoder.generate` does: a Decoder of one's own compiles once for many calls."""
    return Decoder(model, variables).generate(prompts, max_tokens, sampling, **more)
