"""Speed of decoding: `python -m research.bench_decoding --part=peer|acceptance|drafting|cache|context|gpu
[--json=FILE]`.

peer: greedy continuations of 64 random tokens by random weights of an experiment's shape, ours plain beside
transformers' `generate` on the same CPU in turn; tokens/s of the whole call, prompt included, without compilation.
acceptance: drafting on a trained workdir (--checkpoint=DIR), after the first 64 tokens of held-out documents, one
prompt at a time; beside it teacher-forced agreement, which is no acceptance: nothing is drafted there.
drafting: what a step with drafts costs beside a plain one, by shape, random weights: from which acceptance on it pays.
cache: held-out text read token by token, and continued greedily, by a trained workdir (--checkpoint=DIR) whose cache is
kept in bfloat16 and in FP8, beside float32.
context: one token's attention over 1k to 16k cached ones, V2-Lite's width, absorbed beside expanded; --plot=FILE.png.
gpu: V2-Lite's shape in bfloat16: tokens/s and the share of the memory's bandwidth; elsewhere a small shape.
    Not yet run on a GPU.
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from absl import flags

from research import bench, bench_peer, command, experiment
from research.errors import RequestError

FLAGS = flags.FlagValues()
PARTS = ("peer", "acceptance", "drafting", "cache", "context", "gpu")
_PART = flags.DEFINE_enum("part", None, PARTS, "What is measured.", FLAGS)
_JSON = flags.DEFINE_string("json", None, "Also writes the result here.", FLAGS)
_PLOT = flags.DEFINE_string("plot", None, "context: also draws the result here, a PNG.", FLAGS)
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "acceptance, cache: the workdir of a trained model.", FLAGS)
_CONFIG = flags.DEFINE_string("config", "experiments/nano.py", "peer: the experiment whose shape it is.", FLAGS)
_PEER = flags.DEFINE_string("peer_python", None, "peer: Python with torch and transformers (.venv-parity's).", FLAGS)
_EXPERTS = flags.DEFINE_enum("peer_experts", "grouped_mm", ("grouped_mm", "batched_mm", "eager"),
                             "peer: transformers' implementation of experts.", FLAGS)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of everything that is compared.", 1, None, FLAGS)
_NEW = flags.DEFINE_integer("new_tokens", 128, "Tokens after each prompt.", 3, None, FLAGS)
_BATCHES = flags.DEFINE_list("batches", None, "Sequences at once (peer: 1,8; gpu: 1,32,128).", FLAGS)
_PROMPTS = flags.DEFINE_integer("prompts", 32, "acceptance, cache: held-out documents.", 1, None, FLAGS)
_TEMPERATURES = flags.DEFINE_list("temperatures", ["0", "0.6"], "acceptance: of sampling.", FLAGS)
_DRAFTS = flags.DEFINE_integer("drafts", 3, "acceptance, drafting: drafts a step, from 0 to so many.", 1, None, FLAGS)
_CACHED = flags.DEFINE_list("cached", ["1024", "4096", "16384"], "context: tokens in the cache.", FLAGS)
_WORKER = flags.DEFINE_string("worker", None, "One side's process, started by the driver: its request as JSON.", FLAGS)

PROMPT = 64  # tokens
SETS = 8  # of prompts, before the first comes again
VOCABULARY = 4096
WARMUPS = 2
CALLS = 4  # of a turn: one of ours is over before the caches hold its weights again


def numbers(flag, of: type, least: float) -> list:
    """The numbers of a list flag; RequestError for what is none or is below the least."""
    try:
        values = [of(text) for text in flag.value]
    except ValueError:
        values = []
    if not values or not all(least <= value < float("inf") for value in values):
        kind = "whole numbers" if of is int else "numbers"
        raise RequestError(f"--{flag.name}={','.join(flag.value)!r} is no list of {kind} of at least {least}")
    return values


def spread(values, form: str = ",.0f") -> str:
    """`least-greatest`."""
    return f"{min(values):{form}}-{max(values):{form}}"


def peer_settings(name: str):
    """An experiment's settings with VOCABULARY tokens and no multi-token module: plain decoding runs none."""
    from research import config

    fields = [f"model.vocab_size={VOCABULARY}", "mtp.num_nextn_predict_layers=0", "precision.recipe=float32"]
    return config.check(experiment.change(experiment.load(name), fields))


def our_generation(request: dict) -> tuple[bench_peer.Step, dict]:
    """Our side of `bench_peer.peer_generation`."""
    import jax

    from research import environment
    from research.decoding.generate import Decoder
    from research.model.build import init_variables, make_model

    settings = peer_settings(request["config"])
    model = make_model(settings)
    decoder = Decoder(model, init_variables(model, settings, 0))
    environment.pin_threads()

    def step(tokens_BT):
        return decoder.generate(tokens_BT.tolist(), request["new_tokens"]).tokens[-1][-1]

    return step, {"name": "parsimony, plain", "parameters": sum(x.size for x in jax.tree.leaves(decoder.weights))}


def start_side(side: str, folder: Path, batch: int, peer_python: str | None) -> bench.Worker:
    """The process of `ours`, or of the peer with a cache of the kind that is the side's name."""
    told = {"side": side, "tokens": str(folder / f"{batch}.npy"), "config": _CONFIG.value, "new_tokens": _NEW.value}
    if side == "ours":
        module = [sys.executable, "-m", "research.bench_decoding", f"--worker={json.dumps(told)}"]
        return bench.Worker(module, bench.HUGE_PAGES | {"JAX_PLATFORMS": "cpu"}, folder)
    m = peer_settings(_CONFIG.value).model
    told |= {"model": {name: m[name] for name in bench.MODEL} | {"n_routed_experts": m.n_routed_experts},
             "experts": _EXPERTS.value, "cache": side}
    return bench.Worker([peer_python, "-I", str(bench.ROOT / "research/bench_peer.py"), json.dumps(told)],
                        bench.HUGE_PAGES, folder)


def measure_peer(peer_python: str | None, batches: list[int]) -> dict:
    """Tokens/s of a whole call on each side, in turn, and how many times the faster peer's ours is."""
    sides = ["ours", *(("dynamic", "static") if peer_python else ())]
    print(f"{_CONFIG.value}, random weights, float32: {PROMPT} tokens, then {_NEW.value} greedy ones; {_ROUNDS.value} "
          f"rounds of {CALLS} calls in turn: median and range")
    if not peer_python:
        print("no peer: `make parity` makes one")
    print(f"{'batch':>5}  {'side':<8} {'tokens/s':>9}  {'range':>15}  ours/side (least-greatest)", flush=True)
    rows, about = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for batch in batches:
            prompts = np.random.default_rng(batch).integers(1, VOCABULARY, (SETS, batch, PROMPT), np.int32)
            np.save(folder / f"{batch}.npy", prompts)
            workers = {}
            try:
                for side in sides:
                    workers[side] = start_side(side, folder, batch, peer_python)
                    workers[side].seconds(WARMUPS)
                rates = {side: [] for side in sides}
                for turn in range(_ROUNDS.value):
                    for side in sides if turn % 2 == 0 else reversed(sides):  # none is always the first
                        rates[side].append(batch * _NEW.value / workers[side].seconds(CALLS))
                about = {side: worker.about for side, worker in workers.items()}
            finally:
                for worker in workers.values():
                    worker.close()
            row = {"batch": batch, "tokens_per_second": rates, "ratios": {
                side: [ours / peer for ours, peer in zip(rates["ours"], rates[side], strict=True)] for side in sides}}
            rows.append(row)
            for side in sides:
                median, ratios = np.median(rates[side]), row["ratios"][side]
                times = "" if side == "ours" else f"{np.median(ratios):.2f}x ({spread(ratios, '.2f')})"
                print(f"{batch:>5}  {side:<8} {median:>9,.0f}  {spread(rates[side]):>15}  {times}".rstrip(), flush=True)
            if peer_python:
                fastest = max(sides[1:], key=lambda side: np.median(rates[side]))
                row["ratio"] = float(np.median(row["ratios"][fastest]))
                print(f"{batch:>5}  {row['ratio']:.2f} times the faster peer's, {fastest}", flush=True)
    for side, made in about.items():
        print(f"{side}: {made['name']}; {made['parameters']:,} parameters; huge pages")
    return {"config": _CONFIG.value, "prompt": PROMPT, "new_tokens": _NEW.value, "sides": about, "rows": rows}


def main() -> None:
    if _WORKER.value is not None:
        told = json.loads(_WORKER.value)
        bench_peer.serve(*our_generation(told), told["tokens"])
        return
    if _PART.value is None:
        raise RequestError(f"--part is required: one of {', '.join(PARTS)}")
    bench.check_json(_JSON.value)
    bench.check_json(_PLOT.value, "plot")
    part, batches = _PART.value, None
    if _PLOT.value is not None and part != "context":
        raise RequestError(f"--plot={_PLOT.value!r} is for --part=context alone")
    if _PLOT.value and not importlib.util.find_spec("matplotlib"):
        raise RequestError(f"--plot={_PLOT.value!r} needs matplotlib: pip install -r requirements-dev.txt")
    if _BATCHES.value is not None:
        batches = numbers(_BATCHES, int, 1)
    if part in ("acceptance", "drafting"):
        from research.decoding.generate import MOST_DRAFTS
        if _DRAFTS.value > MOST_DRAFTS:
            raise RequestError(f"--drafts={_DRAFTS.value} must be at most {MOST_DRAFTS}")
    if part == "peer":
        most = peer_settings(_CONFIG.value).model.max_position_embeddings
        if PROMPT + _NEW.value > most:
            raise RequestError(f"--new_tokens={_NEW.value} after {PROMPT} is more than "
                               f"config.model.max_position_embeddings={most}")
        measure = measure_peer, bench.find_peer(_PEER.value), batches or [1, 8]
    elif part in ("acceptance", "cache") and _CHECKPOINT.value is None:
        raise RequestError(f"--part={part} needs --checkpoint: the workdir of a trained model")
    elif part == "acceptance":
        temperatures = numbers(_TEMPERATURES, float, 0)
        from research.bench_acceptance import Request, measure_acceptance
        measure = measure_acceptance, Request(
            Path(_CHECKPOINT.value).expanduser(), _PROMPTS.value, PROMPT, _NEW.value, _DRAFTS.value,
            tuple(temperatures), _ROUNDS.value)
    elif part == "cache":
        from research.bench_cache import measure_cache
        measure = measure_cache, Path(_CHECKPOINT.value).expanduser(), _PROMPTS.value, PROMPT, _NEW.value
    elif part == "drafting":
        from research.bench_drafting import SHAPES, measure_drafting
        measure = measure_drafting, SHAPES, PROMPT, _NEW.value, _DRAFTS.value, _ROUNDS.value
    elif part == "context":
        cached = numbers(_CACHED, int, 1)
        from research.bench_context import measure_context
        measure = measure_context, cached, _ROUNDS.value, _PLOT.value
    else:
        from research.bench_context import measure_shape
        measure = measure_shape, batches, PROMPT, _NEW.value, _ROUNDS.value

    import jax

    from research import environment
    from research.files import write_whole

    about = environment.describe()
    print(f"{about['device']}, {about['processor']}, jax {jax.__version__}, commit {about['commit']}", flush=True)
    function, *arguments = measure
    result = {"environment": about, part: function(*arguments)}
    if _JSON.value is not None:
        write_whole(Path(_JSON.value), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    command.run(main, FLAGS)
