"""What a smaller cache costs on a trained model: loss of held-out text read token by token, and greedy text."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from research.bench_acceptance import held_out, load
from research.decoding.cache import STORAGE, bytes_per_token, empty_cache
from research.decoding.forward import forward, head
from research.decoding.generate import Decoder, check_request
from research.decoding.sampling import likeliest

EXACT = "float32"


def read(decoder: Decoder, tokens_BT) -> tuple[np.ndarray, np.ndarray]:
    """Reads texts as decoding does, one token a pass over the stored cache: nats of each token after the first, and the
    likeliest one in its place, both (B, T - 1)."""
    model, (B, T) = decoder.model, tokens_BT.shape

    @jax.jit
    def run(weights, tokens_TB):
        def one_pass(rows, step):
            position, token_B, next_B = step
            after, _, rows = forward(model, weights, rows, token_B[:, None], jnp.broadcast_to(position, (B, 1)))
            logits_BV = head(model, weights, after)[:, 0]
            log_p_BV = jax.nn.log_softmax(logits_BV)
            return rows, (-jnp.take_along_axis(log_p_BV, next_B[:, None], axis=1)[:, 0], likeliest(logits_BV))

        rows = empty_cache(model, B, T, decoder.cache_dtype)["layers"]
        return jax.lax.scan(one_pass, rows, (jnp.arange(T - 1), tokens_TB[:-1], tokens_TB[1:]))[1]

    return tuple(np.asarray(x).T for x in run(decoder.weights, tokens_BT.T))


def parted(tokens: list[int], exact: list[int]) -> int:
    """How many tokens two texts begin with together."""
    return next((place for place, (a, b) in enumerate(zip(tokens, exact, strict=False)) if a != b), len(exact))


def measure_cache(workdir: Path, number: int, prompt: int, new: int) -> dict:
    """Prints a line for each way to store the cache. number: held-out documents; prompt, new: tokens of each."""
    model, variables, corpus, _ = load(workdir)
    texts = held_out(corpus, number, prompt, new)
    check_request(model, [text[:prompt] for text in texts], new, 0)
    tokens_BT, seen_BT = (np.zeros((number, max(map(len, texts))), np.int32) for _ in range(2))
    for row, text in enumerate(texts):
        tokens_BT[row, :len(text)], seen_BT[row, prompt:len(text)] = text, 1
    seen_BT, count = seen_BT[:, 1:], int(seen_BT.sum())
    exact = Decoder(model, variables, EXACT, EXACT)
    print(f"{workdir.name}: weights and products in float32, the cache as named; {number} held-out documents, the "
          f"{count:,} tokens after their first {prompt}; then greedy texts of up to {new} tokens")
    print("loss: nats a token; likeliest: positions with float32's likeliest token; texts: those that are float32's, "
          "and how many of its tokens a text has before they part, the equal ones all")
    print(f"{'cache':<8} {'bytes/token':>11} {'loss':>8} {'difference':>22} {'likeliest':>9} {'texts':>7} "
          f"{'tokens':>7}", flush=True)
    rows, of = [], {}
    generate = partial(Decoder.generate, prompts=[text[:prompt] for text in texts], max_tokens=new,
                       ends=corpus.tokenizer.end_ids)
    for storage in STORAGE:
        decoder = Decoder(model, exact.weights, EXACT, storage)
        of[storage] = (*read(decoder, tokens_BT), generate(decoder).tokens)
        loss_BT, best_BT, made = of[storage]
        difference_B = np.sum((loss_BT - of[EXACT][0]) * seen_BT, axis=1)  # of each document, in nats
        difference = difference_B.sum() / count
        together = [parted(*pair) for pair in zip(made, of[EXACT][2], strict=True)]
        rows.append({
            "storage": storage, "bytes_per_token": bytes_per_token(model, storage),
            "loss": float(np.sum(loss_BT * seen_BT) / count), "difference": float(difference),
            "standard_error": float(np.linalg.norm(difference_B - seen_BT.sum(axis=1) * difference) / count),
            "same_likeliest": float(np.sum((best_BT == of[EXACT][1]) * seen_BT) / count),
            "same_texts": sum(a == b for a, b in zip(made, of[EXACT][2], strict=True)), "tokens_together": together})
        row = rows[-1]
        print(f"{storage:<8} {row['bytes_per_token']:>11,} {row['loss']:>8.4f} {difference:>+11.6f} "
              f"± {row['standard_error']:.6f}{row['same_likeliest']:>10.2%} {row['same_texts']:>3}/{number:<3} "
              f"{np.mean(together):>7.1f}", flush=True)
    return {"documents": number, "prompt": prompt, "tokens": count, "new_tokens": new, "rows": rows}
