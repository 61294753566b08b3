"""Latent attention: what a cache costs, and that absorbed and expanded attention are one function at two prices."""

import statistics

import jax
import numpy as np

from research import plots
from research.bench_context import PATHS, attention_arguments, seconds_of
from research.decoding.cache import bytes_per_token
from research.model.build import make_model
from research.tables.runner import Row, of_unit, published
from research.tables.v2_attention import BPB, BYTES

MODELS = {"DeepSeek-V3": "deepseek_v3", "DeepSeek-V2-Lite": "deepseek_v2_lite", "Qwen2.5-72B": "qwen2_5:72b",
          "Llama-3.1-405B": "llama_3_1:405b"}


def cache_bytes() -> dict[str, tuple[int, str]]:
    """{model: (bytes a token in bfloat16, attention)} of published shapes."""
    found = {}
    for name, experiment in MODELS.items():
        settings = published(experiment)
        found[name] = bytes_per_token(make_model(settings), "bfloat16"), settings.model.attention
    return found


def elements_by_mechanism(heads: int, width: int, groups: int, latent: int, rotary: int) -> dict[str, int]:
    """Numbers that one layer keeps of a token (V2 Table 1)."""
    return {"MHA: all heads": 2 * heads * width, f"GQA: {groups} groups": 2 * groups * width, "MQA: one": 2 * width,
            "MLA": latent + rotary}


def draw_cache(axes, found: dict[str, tuple[int, str]]) -> None:
    """Kilobytes of each model's token."""
    plots.bars(axes, [f"{name} ({kind.upper()})" for name, (_, kind) in found.items()],
               {"cache": [size / 1000 for size, _ in found.values()]}, "kB a token, bfloat16", 1)


def draw_quality(axes, rows: list[Row]) -> None:
    """Bits per byte of each kind of attention in v2_attention's rows, the largest size's, by the bytes of its cache."""
    size = rows[-1].what.split(": ")[0]
    trained = {unit: {row.what: row for row in of_unit(rows, unit) if row.what.startswith(size) and not row.verdict}
               for unit in (BPB, BYTES)}
    ticks = {}
    for what, row in trained[BPB].items():
        held = trained[BYTES][what].ours
        axes.vlines(held, row.least, row.greatest, color="black", linewidth=1.1)
        axes.plot(held, row.ours, color="black", marker="o", markerfacecolor="white")
        ticks[held] = f"{what.split(': ')[1].upper()}\n{held:,.0f}"
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlabel(f"{BYTES}, logarithmic ({size})")
    axes.set_ylabel(f"{BPB}: mean and range")


def compare(slots: int, rounds: int = 3) -> dict:
    """Both paths over a cache of `slots` tokens, V2-Lite's width: ms of each round, and the largest difference.

    The reference of `difference` is the expanded path in float64, on this machine's CPU.
    """
    arguments = jax.block_until_ready(jax.jit(attention_arguments, static_argnums=0)(slots))
    runs = {name: jax.jit(path).lower(*arguments).compile() for name, path in PATHS.items()}
    exact = in_float64(*map(np.asarray, arguments))
    difference = {name: float(np.max(np.abs(np.asarray(run(*arguments)) - exact)) / np.max(np.abs(exact)))
                  for name, run in runs.items()}
    ms = {name: [] for name in runs}
    for turn in range(rounds):
        for name in runs if turn % 2 == 0 else reversed(runs):
            ms[name].append(1e3 * seconds_of(runs[name], arguments))
    return {"slots": slots, "ms": ms, "difference": difference}


def in_float64(q_BTNH, q_rope_BTNP, latent_BSR, rope_key_BSP, k_NHR, v_NRJ):
    """The definition in NumPy: keys and values of all heads, one softmax."""
    q, rope, latent, key, up_k, up_v = (np.asarray(x, np.float64) for x in (
        q_BTNH, q_rope_BTNP, latent_BSR, rope_key_BSP, k_NHR, v_NRJ))
    k_BSNH = np.einsum("BSR,NHR->BSNH", latent, up_k, optimize=True)  # a product, not loops
    score = np.einsum("BTNH,BSNH->BNTS", q, k_BSNH) + np.einsum("BTNP,BSP->BNTS", rope, key)
    score *= (q.shape[-1] + rope.shape[-1]) ** -0.5
    weight = np.exp(score - score.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    return np.einsum("BNTS,BSNJ->BTNJ", weight, np.einsum("BSR,NRJ->BSNJ", latent, up_v, optimize=True))


def draw_times(axes, results: list[dict]) -> None:
    """Milliseconds of each path by cached tokens: median and range."""
    slots = [one["slots"] for one in results]
    plots.lines(axes, {name: (slots, *zip(*[(statistics.median(one["ms"][name]), min(one["ms"][name]),
                                             max(one["ms"][name])) for one in results], strict=True))
                       for name in PATHS}, "cached tokens", "ms a token and layer, logarithmic")
    axes.set_xscale("log", base=2)
    axes.set_xticks(slots, [f"{slot:,}" for slot in slots])
    axes.set_yscale("log")

