"""Models to decode with, and what they should say: the training forward pass, without a cache."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from research.decoding.cache import empty_cache
from research.decoding.forward import decoding_model, forward, prepare
from research.decoding.generate import Decoder
from research.model.mtp import MultiTokenModule
from research.model.transformer import Block
from research.tree import map_paths
from tests import tiny

CHOOSY = {"model.num_hidden_layers": 1, "model.vocab_size": 5, "model.first_k_dense_replace": 0}  # drafts often stand
PLAIN = {"model.n_routed_experts": 0}  # compiles in half the time
CLOSE = 1e-4  # of two best logits: less decides nothing in float32


@functools.cache
def built(changes: tuple = ()):
    """(settings, model, a function of a seed to variables) of the tiny model with these (`group.field`, value)."""
    s = tiny.settings(dict(changes))
    model, variables = tiny.model(s)
    shapes = jax.eval_shape(lambda: variables)
    return s, model, lambda seed: tiny.filled(shapes, seed)


@functools.cache
def apply_of(model):
    return jax.jit(model.apply)


@functools.cache
def prepare_of(model):
    return jax.jit(partial(prepare, model=decoding_model(model)))


@functools.cache
def decoder_of(changes: tuple = (), cache_dtype=None) -> Decoder:
    """One for each model: a test swaps its weights, and nothing is compiled again."""
    _, model, weights = built(changes)
    return Decoder(model, weights(0), cache_dtype=cache_dtype)


def decoder_with(changes: tuple, variables) -> Decoder:
    decoder = decoder_of(changes)
    decoder.weights = prepare_of(built(changes)[1])(variables)
    return decoder


def full_forward(model, variables, rows, length: int = 96):
    """(logits (B, length, V), those of the multi-token modules) of token lists; what is past a list's end is noise."""
    tokens_BT = np.zeros((len(rows), length), np.int32)
    for row, tokens in zip(tokens_BT, rows, strict=True):
        row[:len(tokens)] = tokens
    ones_BT = np.ones_like(tokens_BT)
    logits, out = apply_of(model)(variables, tokens_BT, ones_BT, np.cumsum(ones_BT, axis=1, dtype=np.int32) - 1)
    return np.asarray(logits), [np.asarray(x) for x in out["mtp_logits"]]


def gap(logits_V) -> float:
    return float(-np.diff(np.sort(logits_V)[-2:][::-1])[0])


def close_calls(model, variables, prompts, continuations, length: int = 96) -> int:
    """How many of the continuations leave the likeliest token, all of them at a tie in float32; fails at any other.

    What follows such a token is judged with it in the text.
    """
    logits, _ = full_forward(model, variables, [p + c for p, c in zip(prompts, continuations, strict=True)], length)
    left = 0
    for logits_TV, prompt, continuation in zip(logits, prompts, continuations, strict=True):
        for number, token in enumerate(continuation):
            logits_V = logits_TV[len(prompt) + number - 1]
            if token != np.argmax(logits_V):
                assert gap(logits_V) < CLOSE, (prompt, continuation, number, logits_V)
                left += 1
    return left


@functools.cache
def module_of(model, depth: int):
    """Jitted: a module without a cache, to (the logits of what its head reads, what it hands on)."""
    def run(variables, hidden_BTD, tokens_BT):
        inner = {name: tree[f"mtp_{depth}"] for name, tree in variables.items() if f"mtp_{depth}" in tree}
        ones_BT = jnp.ones_like(tokens_BT)
        before, after, _ = MultiTokenModule(model.config, model.products, Block).apply(
            inner, hidden_BTD, variables["params"]["embed_tokens"][tokens_BT], None,
            jnp.cumsum(ones_BT, axis=1) - 1, ones_BT > 0)
        return after @ variables["params"]["lm_head"], after if model.mtp.hidden == "after_norm" else before

    return jax.jit(run)


@functools.cache
def states_of(model):
    """Jitted: the hidden states that the first module reads, from one pass over an empty cache."""
    decoding = decoding_model(model)

    def run(weights, tokens_BT):
        B, T = tokens_BT.shape
        rows = empty_cache(decoding, B, T, "float32")["layers"]
        after, before, _ = forward(decoding, weights, rows, tokens_BT, jnp.broadcast_to(jnp.arange(T), (B, T)))
        return after if model.mtp.hidden == "after_norm" else before

    return jax.jit(run)


def draft_logits(model, variables, known, drafts, length: int = 48):
    """(k, B, V): the logits that each draft of a row should be the best of, given the tokens before it.

    Depth m is the training forward's. Beyond M the last module reads its own output, a position further each time.
    """
    M, k, B = model.mtp.num_nextn_predict_layers, len(drafts[0]), len(known)
    row_B, newest_B = np.arange(B), np.array([len(text) - 2 for text in known])  # whose next token is the last known
    texts = [text + more for text, more in zip(known, drafts, strict=True)]
    _, mtp_logits = full_forward(model, variables, texts, length)
    expected = [mtp_logits[number][row_B, newest_B] for number in range(min(M, k))]
    if k > M:
        tokens_BT = np.zeros((B, length + M), np.int32)
        for row, text in zip(tokens_BT, texts, strict=True):
            row[:len(text)] = text
        hidden = states_of(model)(prepare_of(model)(variables), tokens_BT[:, :length])
        for depth in range(1, M):
            hidden = module_of(model, depth)(variables, hidden, tokens_BT[:, depth:depth + length])[1]
        hidden = np.array(hidden)
        for number in range(M - 1, k):
            at_B = newest_B + number - M + 1
            logits, handed_on = module_of(model, M)(variables, hidden, tokens_BT[:, M:])
            if number >= M:
                expected.append(np.asarray(logits)[row_B, at_B])
            hidden[row_B, at_B + 1] = np.asarray(handed_on)[row_B, at_B]
    return np.stack(expected)


def agreeing(variables, share: float):
    """Weights moved towards ones whose next token is a function of the last one alone, in the modules as in the model.

    share 1: every draft stands; less: most do.
    """
    norm_D = variables["params"]["norm"]["scale"]

    def move(path, x):
        name = path.split("/", 1)[-1]
        if path.endswith(("o_proj/kernel", "down_proj/kernel", "down_proj")):
            return (1 - share) * x
        if path.startswith("mtp_") and name in ("eh_proj/kernel", "enorm/scale", "norm/scale"):
            target = {"eh_proj/kernel": jnp.eye(*x.shape) if x.ndim > 1 else None, "enorm/scale": jnp.ones_like(x),
                      "norm/scale": norm_D}[name]
            return (1 - share) * x + share * target
        return x

    return variables | {"params": map_paths(move, variables["params"])}
