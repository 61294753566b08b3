"""The account of a model as one nested object, and as text to read at one glance."""

import math
import textwrap
from dataclasses import dataclass

from research.accounting import cost, exchange, flops, memory, parameters
from research.accounting.published import NOTES
from research.accounting.request import refusal
from research.decoding.cache import bytes_per_token
from research.model.build import make_model

BATCHES = (1, 32, 256)  # of decoding, whose arithmetic intensity is given


@dataclass(frozen=True)
class Terms:
    """What hours and dollars depend on besides the model; None: not given."""

    gpu: str | None = None  # a name in cost.GPUS
    price_per_hour: float | None = None  # dollars
    mfu: float | None = None  # share of the GPU's bfloat16 peak in training, attention counted causal
    tokens_per_second: float | None = None  # measured, of one GPU
    tokens: float | None = None  # of training; None: training.steps whole batches


def account(settings, name: str, terms: Terms) -> dict:
    """The contract's names (README), and what they were computed from. name: the experiment's, as it was asked for."""
    t, on_gpu, gpu = settings.training, terms.gpu is not None, cost.GPUS.get(terms.gpu)
    counted, per_token = parameters.count(settings), flops.by_isca_rule(settings)
    cache, causal = bytes_per_token(make_model(settings), "bfloat16"), per_token["training_causal"]
    executed, held = flops.executed(settings, on_gpu), memory.of_device(settings, on_gpu)
    step_tokens, devices = t.batch_size * settings.data.sequence_length, math.prod(settings.mesh.values())
    speed = terms.tokens_per_second if terms.mfu is None else cost.tokens_per_second(causal, gpu.peak, terms.mfu)
    tokens = terms.tokens or float(t.steps * step_tokens)
    hours, price = speed and cost.gpu_hours(tokens, speed), terms.price_per_hour
    inference = None not in (price, terms.tokens_per_second)
    return {
        "config": name,
        "sequence_length": settings.data.sequence_length,
        "parameters": counted,
        "flops_per_token": per_token | {"executed": executed} | flops.inference(settings),
        "kv_bytes_per_token": cache,
        "exchange_per_token": exchange.account(settings.model),
        "mesh_exchange_per_token": exchange.of_mesh(settings),
        "memory_per_device": held,
        "device": terms.gpu or "this machine's",
        "device_memory": gpu and gpu.memory,
        "devices": devices,
        "pieces": t.accumulation_steps,  # of a step's batch, one after another
        "rows_at_once": t.batch_size // t.accumulation_steps // (
            settings.mesh.data * settings.mesh.fsdp * settings.mesh.expert),
        "mesh": dict(settings.mesh),
        "refused": refusal(settings),
        "recipe": settings.precision.recipe,
        "arithmetic_intensity": {  # FLOPs a byte; in training all that is held is written and read once for each piece
            **{f"decode_batch_{batch}": cost.decode_intensity(settings, cache, batch) for batch in BATCHES},
            "training_piece": executed * step_tokens / devices / t.accumulation_steps / (2 * held["total"]),
            "device": gpu and gpu.peak / gpu.bandwidth,
        },
        "tokens": tokens,
        "tokens_per_second": speed,
        "mfu": gpu and speed and cost.utilization(causal, gpu.peak, speed),
        "gpu_hours": hours,
        "days": hours and hours / 24 / devices,
        "dollars": None if price is None or hours is None else hours * price,
        "dollars_per_million_tokens":
            cost.dollars_per_million_tokens(price, terms.tokens_per_second) if inference else None,
        "notes": list(NOTES.get(counted["total"], ("", ()))[1]),
    }


def text(found: dict) -> str:
    """The account at one glance."""
    lines = []

    def row(name: str, value: str, unit: str, more: str = "") -> None:
        lines.append(f"  {name:<28}{value:>20} {unit:<14}{more}".rstrip())

    def group(title: str) -> None:
        lines.extend(["", title])

    p, f, m = found["parameters"], found["flops_per_token"], found["memory_per_device"]
    lines.append(f"{found['config']}, T = {found['sequence_length']:,}")
    group("parameters")
    row("total", f"{p['total']:,}", "", "without multi-token modules")
    for name, size in p["by_part"].items():
        row(f"  {name}", f"{size:,}", "", f"{size / p['total']:.1%}")
    row("multi-token modules", f"{p['mtp']:,}", "", "embedding and head are the main model's")
    for name, size in (("active", p["active"]), ("  without embedding", p["active_without_embedding"]),
                       ("  without embedding, head", p["active_without_both"])):
        row(name, f"{size:,}", "", f"{size / p['total']:.1%}")
    group("a token")
    row("training, causal", *_flops(f["training_causal"]), "linear layers and head; half of attention's pairs")
    row("training, full", *_flops(f["training_full"]), "all of attention's pairs")
    row("training, executed", *_flops(f["executed"]), "router and multi-token modules too; no recomputation")
    row("prefill, causal", *_flops(f["prefill_causal"]))
    row("prefill, full", *_flops(f["prefill_full"]))
    row("decode", *_flops(f["decode"]), "over a cache of T")
    row("cache", f"{found['kv_bytes_per_token']:,}", "bytes", "bfloat16")
    if sent := found["exchange_per_token"]:
        nodes, size = sent["nodes"], sent["bytes"]
        for name, limit in (("V3's exchange in training", "limited"), ("  without its limit", "free")):
            mean, most = nodes[limit]["mean"], nodes[limit]["most"]
            row(name, f"{size[limit]['mean'] / 1e6:,.3f}", "MB",
                f"to {mean:.2f} other nodes on average, to {most} at most ({size[limit]['most'] / 1e6:,.3f})")
    if sent := found["mesh_exchange_per_token"]:
        row("this mesh's exchange", f"{sent['bytes'] / 1e6:,.3f}", "MB", f"to {sent['devices']} devices at most")
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1) or "no mesh"
    group(f"memory of a device: {found['device']}, {mesh}, {found['recipe']}")
    most, (size, unit) = found["device_memory"], (1e9, "GB") if m["total"] >= 1e9 else (1e6, "MB")
    together = abs(m["total"] - sum(m.values()) / 2) < len(m)  # all of them
    for name, number in m.items():
        row(name, f"{number / size:,.3f}", unit, {
            "gradients": "of a piece" if together else "in the place of activations, as they are made",
            "accumulated": "over pieces",
            "transposed": "to be gathered",
            "activations": f"rows of T at once: {found['rows_at_once']:,}",
            "total": f"{number / most:.1%} of {most / 1e9:.0f} GB" if most else ""}.get(name, ""))
    if found["refused"]:
        lines.append(f"  training refuses this mesh: {found['refused']}")
    if not most and found["recipe"] == "bfloat16":
        lines.append("  (a CPU multiplies 16 bits through float32 copies: counted as float32)")
    elif not most and found["recipe"] != "float32":
        lines.append("  (a CPU emulates 8 bits in float32: its compiled program takes two to three times as much)")
    group("arithmetic intensity, FLOPs a byte")
    for name, value in found["arithmetic_intensity"].items():
        if value is not None:
            row(name.replace("_", " "), f"{value:,.1f}", "", "peak over bandwidth" if name == "device" else "")
    if found["tokens_per_second"]:
        group(f"training {_tokens(found['tokens'])} tokens")
        row("speed", f"{found['tokens_per_second']:,.1f}", "tokens/s", "a GPU")
        if found["mfu"]:
            row("utilisation, causal", f"{found['mfu']:.2%}", "", "of the bfloat16 peak")
        row("GPU hours", f"{found['gpu_hours']:,.0f}", "h", f"{found['days']:,.1f} days of {found['devices']:,} GPUs")
        if found["dollars"] is not None:
            row("price", f"{found['dollars']:,.0f}", "dollars")
    if found["dollars_per_million_tokens"] is not None:
        group("inference")
        row("a million tokens", f"{found['dollars_per_million_tokens']:,.4f}", "dollars", "at --tokens_per_second")
    if found["notes"]:
        group("where sources differ")
        lines.extend(textwrap.fill(note, 110, initial_indent="  ", subsequent_indent="    ") for note in found["notes"])
    return "\n".join(lines)


def _tokens(number: float) -> str:
    """As papers write them: 14.8T, 8.62B, 204,800."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:,.6g}{unit}"
    return f"{number:,.0f}"


def _flops(number: float) -> tuple[str, str]:
    """A number of FLOPs in the unit that shows its size."""
    size, unit = (1e9, "GFLOP") if number >= 1e9 else (1e6, "MFLOP")
    return f"{number / size:,.2f}", unit
