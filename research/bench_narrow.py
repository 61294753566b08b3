"""Weights in 8 and 4 bits beside transformers in bfloat16: `python -m research.bench_narrow [--json=FILE]`.

Greedy continuations of one prompt of 64 random tokens by random weights of an experiment's shape, each side a process
of its own, in turn: tokens/s after the first token, time to the first, and resident memory. Ours makes a layer in
floats, quantises it and drops it: the model never stands in floats. Beside it the bound, bytes of weights that a token
reads over the measured speed of reading memory. The peer is transformers' Qwen2: of other shapes than
DeepSeek-R1-Distill-Qwen-1.5B's (the default) and its like there is ours alone. --part=error: of the logits behind the
first layers, in bfloat16 and each of --sides against float32, and against bfloat16.
"""

import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from absl import flags

from research import bench, bench_narrow_peer, command, experiment
from research.errors import RequestError

FLAGS = flags.FlagValues()
_PART = flags.DEFINE_enum("part", "speed", ("speed", "error"), "What is measured.", FLAGS)
_CONFIG = flags.DEFINE_string("config", "experiments/r1_distill_qwen_1_5b.py", "The experiment of that shape.", FLAGS)
_SIDES = flags.DEFINE_list("sides", ["int8", "int4"], "Ours: int8, int4, fp8_blocks.", FLAGS)
_NEW = flags.DEFINE_integer("new_tokens", 32, "Tokens after the prompt.", 2, None, FLAGS)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of each side.", 1, None, FLAGS)
_LAYERS = flags.DEFINE_integer("layers", None, "The first layers alone; by default all, 4 with --part=error.", 1, None,
                               FLAGS)
_PEER = flags.DEFINE_string("peer_python", None, "Python with torch and transformers (.venv-parity's).", FLAGS)
_JSON = flags.DEFINE_string("json", None, "Also writes the result here.", FLAGS)
_WORKER = flags.DEFINE_string("worker", None, "Our side's process, started by the driver: its request as JSON.", FLAGS)

PROMPT = 64  # tokens
TOKENS = 18_992  # of the vocabulary that are quantised at once: an eighth
DRAWN = 4_194_301  # random numbers of a matrix, then the same again: a prime, so that no two rows are equal
RECIPE = "float32"  # of activations: XLA:CPU's bfloat16 is slower, and they are small


def settings_of(name: str, layers: int | None):
    """An experiment's checked settings, without multi-token modules, which plain decoding does not run."""
    from research import config

    fields = ["mtp.num_nextn_predict_layers=0", *([f"model.num_hidden_layers={layers}"] if layers else [])]
    return config.check(experiment.change(experiment.load(name), fields))


def has_peer(model) -> bool:
    """Whether transformers' Qwen2 can have the shape of a config's `model`."""
    return model.attention == "gqa" and not model.n_routed_experts


def streamed(model, settings, weights: str | None):
    """What `forward.prepare` gives for random weights, made layer by layer: the whole never stands in floats."""
    import jax
    import jax.numpy as jnp

    from research import environment
    from research.decoding.forward import prepare_block
    from research.model.build import variable_shapes
    from research.tree import map_paths

    shapes, number = variable_shapes(model, settings), iter(range(10**6))

    def draw(path, leaf):
        if path.endswith("/scale"):
            return jnp.ones(leaf.shape)
        if path.endswith("bias"):
            return jnp.zeros(leaf.shape)
        generator = np.random.default_rng(next(number))
        return np.resize(generator.standard_normal(DRAWN, np.float32) * np.float32(settings.model.initializer_range),
                         leaf.shape)

    block = jax.jit(lambda tree, biases: prepare_block(tree, biases, model, weights))

    def unstacked(name):
        stacks = [shapes[kind].get(name, {}) for kind in ("params", "routing")]
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacks)
        layers = jax.tree.leaves(stacks)[0].shape[0] if stacks[0] else 0
        return [jax.block_until_ready(block(*(map_paths(draw, tree) for tree in one))) for _ in range(layers)]

    layers = unstacked("dense_layers") + unstacked("layers")
    ends = _ends(model, settings, weights, draw)
    environment.give_back_memory()
    return ends | {"layers": layers, "mtp": []}


def _ends(model, settings, weights: str | None, draw):
    """Embedding, head and norm, TOKENS of the vocabulary at a time: each matrix is 0.9 GB in float32."""
    import jax
    import jax.numpy as jnp

    from kernels.weight_only import Narrow
    from research.decoding.forward import prepare_ends

    m, parts = settings.model, []
    prepare = jax.jit(partial(prepare_ends, model=model, weights=weights))
    for first in range(0, m.vocab_size, TOKENS):
        number = min(TOKENS, m.vocab_size - first)
        shapes = {"embed_tokens": (number, m.hidden_size)} | (
            {} if m.tie_word_embeddings else {"lm_head": (m.hidden_size, number)})
        drawn = {name: draw(name, jax.ShapeDtypeStruct(shape, np.float32)) for name, shape in shapes.items()}
        parts.append(jax.block_until_ready(prepare(drawn | {"norm": {"scale": np.ones(m.hidden_size, np.float32)}})))
    axes = {"embed_tokens": 1 if isinstance(parts[0]["embed_tokens"], Narrow) else 0, "lm_head": 1}
    joined = {name: jax.tree.map(lambda *x, axis=axis: jnp.concatenate(x, axis), *(part[name] for part in parts))
              for name, axis in axes.items() if name in parts[0]}
    return jax.block_until_ready(joined) | {"norm": parts[0]["norm"]}


def bytes_a_token(weights, model) -> float:
    """Of matrices that a token reads: all but the embedding, of which it reads a row, and the experts that are not its
    own. model: a config's."""
    import jax

    from research.precision.products import FEED_FORWARD

    def nbytes(tree):
        return sum(x.nbytes for x in jax.tree.leaves(tree))

    mlps = [layer["params"]["mlp"] for layer in weights["layers"]]
    routed = nbytes([mlp[name] for mlp in mlps if "gate" in mlp for name in FEED_FORWARD])
    embedding = nbytes(weights["embed_tokens"]) if "lm_head" in weights else 0
    others = 1 - model.num_experts_per_tok / model.n_routed_experts if routed else 0
    return nbytes(weights) - embedding - routed * others


def bandwidth() -> float:
    """Bytes/s of reading 1 GB of float32 in a sum, all threads: the best of five."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((1024, 1 << 18))
    total = jax.jit(lambda x: jnp.sum(x, axis=1)).lower(x).compile()
    total(x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        total(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return x.nbytes / best


def work(request: dict) -> None:
    """Our side: the worker's loop."""
    import jax

    from research import environment
    from research.decoding.forward import decoding_model
    from research.decoding.generate import Decoder
    from research.model.build import make_model

    settings = settings_of(request["config"], request["layers"])
    model = make_model(settings)
    decoder = Decoder(model, streamed(decoding_model(model, RECIPE), settings, request["side"]), RECIPE)
    environment.pin_threads()

    def generate(number: int) -> None:
        decoder.generate([request["prompt"]], number)

    kept = sum(x.nbytes for x in jax.tree.leaves(decoder.weights))
    read = bytes_a_token(decoder.weights, settings.model)
    bench_narrow_peer.serve(generate, {"name": f"parsimony, {request['side']}", "weights": kept, "read": read},
                            request["new_tokens"])


def start(side: str, folder: Path, peer_python: str | None) -> bench.Worker:
    """The process of one side."""
    m = settings_of(_CONFIG.value, _LAYERS.value).model
    prompt = np.random.default_rng(0).integers(1, m.vocab_size, PROMPT).tolist()
    told = {"side": side, "config": _CONFIG.value, "layers": _LAYERS.value, "prompt": prompt, "new_tokens": _NEW.value}
    if side != "peer":
        module = [sys.executable, "-m", "research.bench_narrow", f"--worker={json.dumps(told)}"]
        return bench.Worker(module, {"JAX_PLATFORMS": "cpu"}, folder)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    told["model"] = {name: m[name] for name in names} | {
        "rope_parameters": {"rope_type": "default", "rope_theta": m.rope_theta}, "dtype": "bfloat16"}
    script = str(bench.ROOT / "research/bench_narrow_peer.py")
    return bench.Worker([peer_python, "-I", script, json.dumps(told)], {}, folder)


def measure_speed(peer_python: str | None) -> dict:
    """Medians and ranges of each side, and ours over the peer's, turn by turn."""
    sides = [*_SIDES.value, *(("peer",) if peer_python else ())]
    reading = bandwidth()
    layers = f", its first {_LAYERS.value} layers" if _LAYERS.value else ""
    shape = settings_of(_CONFIG.value, _LAYERS.value).model
    peer = "" if peer_python else "; no peer: `make parity` makes one" if has_peer(shape) else "; the peer lacks it"
    print(f"{_CONFIG.value}{layers}, random weights: {PROMPT} tokens, then {_NEW.value} greedy ones; {_ROUNDS.value} "
          f"rounds in turn: median (range); memory is read at {reading / 1e9:.1f} GB/s{peer}", flush=True)
    turns, about, workers = {side: [] for side in sides}, {}, {}
    with tempfile.TemporaryDirectory() as name:
        try:
            for side in sides:
                workers[side] = start(side, Path(name), peer_python)
                about[side] = workers[side].about
            for turn in range(_ROUNDS.value):
                for side in sides if turn % 2 == 0 else reversed(sides):
                    turns[side].append(workers[side].turn(1))
        finally:
            for worker in workers.values():
                worker.close()
    rates = {side: [(_NEW.value - 1) / (t["seconds"] - t["first"]) for t in turns[side]] for side in sides}
    rows = []
    for side in sides:
        rate, last = float(np.median(rates[side])), turns[side][-1]
        row = {"side": side, "tokens_per_second": rates[side], "first": [t["first"] for t in turns[side]],
               "resident": last["resident"], "peak": last["peak"]} | about[side]
        line = (f"{side:<5} {rate:6.2f} tokens/s ({min(rates[side]):.2f}-{max(rates[side]):.2f}), first token "
                f"{np.median(row['first']):.2f} s, resident {last['resident'] / 1e9:.2f} GB, "
                f"peak {last['peak'] / 1e9:.2f}")
        if "read" in row:
            row["share_of_bound"] = rate * row["read"] / reading
            line += (f"; {row['weights'] / 1e9:.2f} GB of weights, {row['read'] / 1e9:.2f} a token: bound "
                     f"{reading / row['read']:.1f} tokens/s, {row['share_of_bound']:.0%} reached")
        if peer_python and side != "peer":
            ratios = [ours / peer for ours, peer in zip(rates[side], rates["peer"], strict=True)]
            row |= {"ratios": ratios, "memory": last["resident"] / turns["peer"][-1]["resident"],
                    "peak_memory": last["peak"] / turns["peer"][-1]["peak"]}
            line += (f"; {np.median(ratios):.2f}x the peer's speed ({min(ratios):.2f}-{max(ratios):.2f}), "
                     f"{row['memory']:.0%} of its resident memory, {row['peak_memory']:.0%} of its peak")
        rows.append(row)
        print(line, flush=True)
    return {"config": _CONFIG.value, "layers": _LAYERS.value, "bandwidth": reading, "rows": rows}


def measure_error() -> dict:
    """Relative error of the last logits, its norm over the norm, against float32 of the same first layers."""
    import jax.numpy as jnp

    from research.decoding.cache import empty_cache
    from research.decoding.forward import decoding_model, forward, head
    from research.model.build import make_model

    settings = settings_of(_CONFIG.value, _LAYERS.value or 4)
    model = make_model(settings)
    tokens_BT = np.random.default_rng(0).integers(1, settings.model.vocab_size, (1, PROMPT))
    logits = {}
    for side, recipe in (("float32", RECIPE), ("bfloat16", "bfloat16"), *((side, RECIPE) for side in _SIDES.value)):
        m = decoding_model(model, recipe)
        weights = streamed(m, settings, side if side in _SIDES.value else None)
        rows = empty_cache(m, 1, PROMPT, recipe)["layers"]
        hidden_BTD, _, _ = forward(m, weights, rows, tokens_BT, jnp.arange(PROMPT)[None])
        logits[side] = np.asarray(head(m, weights, hidden_BTD[:, -8:]), np.float64)
        del weights
    result = {}
    for side in ("bfloat16", *_SIDES.value):
        error = np.linalg.norm(logits[side] - logits["float32"]) / np.linalg.norm(logits["float32"])
        to_bfloat16 = np.linalg.norm(logits[side] - logits["bfloat16"]) / np.linalg.norm(logits["bfloat16"])
        result[side] = {"to_float32": float(error), "to_bfloat16": float(to_bfloat16)}
        print(f"{side:<8} logits' relative error {error:.4f} to float32, {to_bfloat16:.4f} to bfloat16", flush=True)
    return {"config": _CONFIG.value, "layers": settings.model.num_hidden_layers, "errors": result}


def main() -> None:
    if _WORKER.value is not None:
        work(json.loads(_WORKER.value))
        return
    bench.check_json(_JSON.value)
    peer = _PART.value == "speed" and has_peer(settings_of(_CONFIG.value, _LAYERS.value).model)
    peer_python = bench.find_peer(_PEER.value) if peer else None

    from research import environment
    from research.decoding.forward import WEIGHTS
    from research.files import write_whole

    if unknown := set(_SIDES.value) - {*WEIGHTS}:
        raise RequestError(f"--sides={','.join(_SIDES.value)!r} must be of {', '.join(WEIGHTS)}, not {min(unknown)!r}")
    about = environment.describe()
    print(f"{about['device']}, {about['processor']}, commit {about['commit']}", flush=True)
    measured = measure_speed(peer_python) if _PART.value == "speed" else measure_error()
    result = {"environment": about, _PART.value: measured}
    if _JSON.value is not None:
        write_whole(Path(_JSON.value), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    command.run(main, FLAGS)
