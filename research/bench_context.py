"""What decoding costs by context and by memory: one attention layer over a long cache; V2-Lite's shape on a GPU."""

import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp

from kernels import timing
from kernels.attention import cached_attention
from kernels.choice import gpu_refusal
from kernels.mla_decode import mla_decode
from research import config, experiment
from research.decoding.cache import bytes_per_token
from research.decoding.forward import decoding_model, prepare
from research.decoding.generate import Decoder
from research.environment import pin_threads
from research.model.attention import by_head
from research.model.build import make_model, variable_shapes

HEADS, LATENT, KEY, ROTARY, VALUE = 16, 512, 128, 64, 128  # V2-Lite's N, R, H, P, J
SCALE = (KEY + ROTARY) ** -0.5
SAMPLE_SECONDS = 0.2  # of calls in one sample

SHAPES = {  # experiment and what is changed in it
    "V2-Lite": ("experiments/deepseek_v2_lite.py", (
        "mtp.num_nextn_predict_layers=0", "precision.recipe=bfloat16")),
    "smoke": ("experiments/nano.py:smoke", (
        "model.vocab_size=512", "model.num_hidden_layers=2", "mtp.num_nextn_predict_layers=0",
        "precision.recipe=bfloat16")),
}
BANDWIDTH = {  # bytes a second by the data sheet, by JAX's name of the device
    "NVIDIA H200": 4.8e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H100 PCIe": 2.0e12,
}


def absorbed(q_BTNH, q_rope_BTNP, latent_BSR, rope_key_BSP, k_NHR, v_NRJ):
    """Values o_BTNJ of new tokens at the end of the cache, in the space of latents."""
    q_latent_BTNR = by_head(q_BTNH, k_NHR)
    (B, T), S = q_BTNH.shape[:2], latent_BSR.shape[1]
    o_BTNR = mla_decode(q_latent_BTNR, q_rope_BTNP, latent_BSR, rope_key_BSP, jnp.full(B, S - T, jnp.int32), SCALE)
    return by_head(o_BTNR, v_NRJ)


def expanded(q_BTNH, q_rope_BTNP, latent_BSR, rope_key_BSP, k_NHR, v_NRJ):
    """The same with every latent made keys and values of all heads, at each step anew."""
    (B, T, N), S = q_BTNH.shape[:3], latent_BSR.shape[1]
    k_BSNH = jnp.einsum("BSR,NHR->BSNH", latent_BSR, k_NHR)
    k_rope_BSNP = jnp.broadcast_to(rope_key_BSP[:, :, None], (B, S, N, rope_key_BSP.shape[-1]))
    return cached_attention(jnp.concatenate([q_BTNH, q_rope_BTNP], axis=-1),
                            jnp.concatenate([k_BSNH, k_rope_BSNP], axis=-1),
                            jnp.einsum("BSR,NRJ->BSNJ", latent_BSR, v_NRJ),
                            jnp.broadcast_to(S - T + jnp.arange(T), (B, T)), SCALE)


PATHS = {"absorbed": absorbed, "expanded": expanded}


def attention_arguments(slots: int) -> tuple:
    """One token's queries, a full cache of so many slots and the two factors of the up-projection, float32."""
    N, R, H, P, J = HEADS, LATENT, KEY, ROTARY, VALUE
    shapes = (1, 1, N, H), (1, 1, N, P), (1, slots, R), (1, slots, P), (N, H, R), (N, R, J)
    scales = (1, 1, 1, 1, R**-0.5, R**-0.5)
    keys = jax.random.split(jax.random.key(slots), len(shapes))
    return tuple(scale * jax.random.normal(key, shape) for key, shape, scale in zip(keys, shapes, scales, strict=True))


def seconds_of(run, arguments: tuple) -> float:
    """Seconds of a call, over as many as fill a sample."""
    calls, start = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < SAMPLE_SECONDS:
        jax.block_until_ready(run(*arguments))
        calls += 1
    return (time.perf_counter() - start) / calls


def measure_context(cached: list[int], rounds: int, plot: str | None) -> dict:
    """Prints milliseconds a token by the cache's length and path, the paths in turn."""
    print(f"attention of one token, one layer, batch 1, float32: {HEADS} heads, R={LATENT}, H={KEY}, P={ROTARY}, "
          f"J={VALUE}; {rounds} rounds in turn: median and range")
    print(f"{'cached':>7} {'path':<9} {'ms':>9} {'range':>19} {'x expanded':>11} {'difference':>11}", flush=True)
    rows = []
    for slots in cached:
        arguments = jax.block_until_ready(jax.jit(attention_arguments, static_argnums=0)(slots))
        runs = {name: jax.jit(path).lower(*arguments).compile() for name, path in PATHS.items()}
        results = {name: jax.block_until_ready(run(*arguments)) for name, run in runs.items()}
        scale = jnp.max(jnp.abs(results["expanded"]))
        difference = float(jnp.max(jnp.abs(results["absorbed"] - results["expanded"])) / scale)
        pin_threads()
        taken = {name: [] for name in runs}
        for turn in range(rounds):
            for name in runs if turn % 2 == 0 else reversed(runs):  # none is always the one that goes first
                taken[name].append(1e3 * seconds_of(runs[name], arguments))
        for name, ms in taken.items():
            times = [other / one for other, one in zip(taken["expanded"], ms, strict=True)]
            rows.append({"cached": slots, "path": name, "ms": ms, "times_expanded": times, "difference": difference})
            print(f"{slots:>7,} {name:<9} {statistics.median(ms):>9.3f} {min(ms):>9.3f}-{max(ms):<9.3f} "
                  f"{statistics.median(times):>11.1f} {difference if name == 'absorbed' else 0:>11.1e}", flush=True)
    if plot is not None:
        draw(rows, plot)
    return {"heads": HEADS, "latent": LATENT, "key": KEY, "rotary": ROTARY, "value": VALUE, "rows": rows}


def draw(rows: list[dict], path: str) -> None:
    """A PNG of milliseconds over cached tokens, both logarithmic; marks and lines tell the paths apart, not colours."""
    import matplotlib  # here: requirements-dev.txt has it, runs do without

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, mark, line in (("absorbed", "o", "-"), ("expanded", "s", "--")):
        chosen = sorted((row for row in rows if row["path"] == name), key=lambda row: row["cached"])
        median = [statistics.median(row["ms"]) for row in chosen]
        ranges = [[m - min(row["ms"]) for m, row in zip(median, chosen, strict=True)],
                  [max(row["ms"]) - m for m, row in zip(median, chosen, strict=True)]]
        axes.errorbar([row["cached"] for row in chosen], median, ranges, marker=mark, linestyle=line, color="black",
                      fillstyle="full" if mark == "o" else "none", capsize=3, label=name)
    axes.set(xscale="log", yscale="log", xlabel="cached tokens", ylabel="attention of one token, one layer (ms)")
    axes.set_xticks(sorted({row["cached"] for row in rows}))
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.grid(True, color="0.85")
    axes.legend()
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)


class RandomDecoder(Decoder):
    """A Decoder whose weights are drawn as decoding reads them: V2-Lite's would not fit twice beside one another."""

    def __init__(self, model, settings):
        self.model, self.cache_dtype, self._compiled = decoding_model(model), "bfloat16", {}
        shapes = jax.eval_shape(partial(prepare, model=self.model), variable_shapes(model, settings))
        made = jax.jit(_random, static_argnums=(1, 2))
        leaves, tree = jax.tree.flatten_with_path(shapes)
        self.weights = jax.tree.unflatten(tree, [
            jnp.ones(leaf.shape, leaf.dtype) if jax.tree_util.keystr(path).endswith(("['scale']", "['norm']")) else
            made(jax.random.key(number, impl="rbg"), leaf.shape, leaf.dtype) for number, (path, leaf) in
            enumerate(leaves)])


def _random(key, shape, dtype):
    return (0.02 * jax.random.normal(key, shape, dtype)).astype(dtype)


def bytes_of_step(decoder: Decoder, batch: int, context: float) -> float:
    """What a plain step must read: weights once, of the routed experts those that the batch chooses, and the cache.

    Experts: as many as are expected where each token chooses uniformly and alone, exact for one token. Of the embedding
    one row a token. context: cached tokens of a sequence.
    """
    m = decoder.model.config
    routed = m.n_routed_experts and 1 - (1 - m.num_experts_per_tok / m.n_routed_experts) ** batch
    total = 0.0
    for path, leaf in jax.tree.leaves_with_path(decoder.weights):
        name, size = jax.tree_util.keystr(path), leaf.size * leaf.dtype.itemsize
        if name.startswith("['mtp']"):
            size = 0
        elif name == "['embed_tokens']":
            size = size / leaf.shape[0] * batch
        elif leaf.ndim == 3 and "['mlp']" in name:
            size *= routed
        total += size
    return total + batch * context * bytes_per_token(decoder.model, decoder.cache_dtype)


def measure_shape(batches: list[int] | None, prompt: int, new: int, rounds: int) -> dict:
    """Prints tokens/s and the share of the bandwidth by batch, of V2-Lite's shape on a Hopper GPU, else a small one."""
    refusal = gpu_refusal()
    name = "smoke" if refusal else "V2-Lite"
    file, fields = SHAPES[name]
    settings = config.check(experiment.change(experiment.load(file), fields))
    device = jax.devices()[0].device_kind
    copied = timing.copy_bandwidth(2**26 if refusal else 2**30, timing.ROUGH if refusal else timing.CAREFUL)
    peak, kind = (BANDWIDTH[device], "data sheet's") if device in BANDWIDTH else (copied, "of a copy")
    decoder = RandomDecoder(make_model(settings), settings)
    count = sum(leaf.size for leaf in jax.tree.leaves(decoder.weights))
    print(f"{name}'s shape, {count / 1e9:,.3f}B random weights in bfloat16: {prompt} tokens, then {new} greedy ones; "
          f"{rounds} rounds: median and range; {peak / 1e9:,.0f} GB/s ({kind}; a copy: {copied / 1e9:,.0f})"
          + (f"; a small shape, which says nothing about a GPU: {refusal}" if refusal else ""))
    print(f"{'batch':>5} {'tokens/s':>9} {'range':>15} {'ms/step':>8} {'GB/step':>8} {'bandwidth':>9}", flush=True)
    rows = []
    for batch in batches or [1, 32, 128]:
        prompts = jax.random.randint(jax.random.key(batch), (batch, prompt), 0, settings.model.vocab_size).tolist()
        decoder.generate(prompts, new)  # compiles
        made = [decoder.generate(prompts, new) for _ in range(rounds)]
        rates = [one.tokens_per_second for one in made]
        seconds = statistics.median(one.decode_seconds for one in made) / (new - 1)
        read = bytes_of_step(decoder, batch, prompt + new / 2)
        rows.append({"batch": batch, "tokens_per_second": rates, "step_seconds": seconds, "step_bytes": read,
                     "bandwidth_share": read / seconds / peak})
        print(f"{batch:>5} {statistics.median(rates):>9,.0f} {min(rates):>7,.0f}-{max(rates):<7,.0f} "
              f"{1e3 * seconds:>8.3f} {read / 1e9:>8.3f} {read / seconds / peak:>9.1%}", flush=True)
    return {"shape": name, "parameters": count, "prompt": prompt, "new_tokens": new, "bandwidth": peak,
            "bandwidth_is": kind, "copy_bandwidth": copied, "rows": rows}
