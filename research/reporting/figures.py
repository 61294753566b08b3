"""The curves of a run: what each shows, in words and as a picture."""

from dataclasses import dataclass

import numpy as np

from research import plots
from research.reporting.run import Run, column, depth, table
from research.training.metrics import PHASES

POINTS = 120  # of a curve: longer ones are drawn as means and ranges of neighbouring steps


@dataclass(frozen=True)
class Figure:
    title: str
    note: str
    svg: str


def windows(steps: list[int], values: list[float]) -> tuple:
    """(step, mean, least, greatest) of at most POINTS runs of neighbouring steps; the step is a run's last."""
    size = -(-len(steps) // POINTS)
    cuts = range(0, len(steps), size or 1)
    parts = [values[cut:cut + size] for cut in cuts]
    return ([steps[min(cut + size, len(steps)) - 1] for cut in cuts], [float(np.mean(part)) for part in parts],
            [min(part) for part in parts], [max(part) for part in parts])


def short(value: float) -> str:
    """Four digits, or all those before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def figures(run: Run) -> list[Figure]:
    """Those for which the run has numbers."""
    made = [_curve(*curves) for curves in _curves(run)]
    return [figure for figure in (*made, _layers(run), _experts(run), _timing(run)) if figure]


def _curves(run: Run):
    """(name, title, axis, {series: (steps, values)}) of everything that is drawn over steps, and a range if it has."""
    modules = range(depth(run.train, "mtp_loss"))
    yield "loss", "Loss", "nats a token", {
        "all parts": column(run.train, "loss"),
        "next token": column(run.train, "next_token_loss"),
        **{f"multi-token, depth {k + 1}": column(run.train, "mtp_loss", k) for k in modules},
        "next token, held out": column(run.validation, "loss")}
    yield "bits", "Bits per byte, held out", "bits a byte", {"": column(run.validation, "bits_per_byte")}
    accuracy = range(depth(run.validation, "mtp_accuracy"))
    yield "accuracy", "Multi-token accuracy, held out, the text before given", "share of targets", {
        f"depth {k + 1}": column(run.validation, "mtp_accuracy", k) for k in accuracy}
    yield "violation", "Load of experts: MaxVio", "(greatest - mean) / mean", {
        "mean of layers": column(run.train, "load_violation"),
        **{f"multi-token, depth {k + 1}": column(run.train, "mtp_load_violation", k) for k in modules}}, \
        _layers_apart(run)
    yield "speed", "Training speed", "tokens a second", {"": column(run.train, "tokens_per_second")}
    yield "gradient", "Gradient norm, before clipping", "norm", {"": column(run.train, "grad_norm")}
    yield "rate", "Learning rate", "learning rate", {"": column(run.train, "learning_rate")}


def _curve(name: str, title: str, quantity: str, series: dict[str, tuple], band: tuple = ()) -> Figure | None:
    """band: the range of the first series, in place of that over neighbouring steps."""
    series = {label: found for label, found in series.items() if found[0]}
    if not series:
        return None
    drawn = {label: windows(*found) for label, found in series.items()}
    first = next(iter(series))
    if band and len(band[0]) == len(drawn[first][0]):
        drawn[first] = (*drawn[first][:2], *band)
    steps, values = series[first]
    if len(series) > 1:
        note = "Last " + "; ".join(f"{label} = {short(its[-1])}" for label, (_, its) in series.items())
    elif len(values) > 1:
        note = f"Last {short(values[-1])}, least {short(min(values))}, greatest {short(max(values))}"
    else:
        note = f"{short(values[0])} at step {steps[0]:,}"
    return Figure(title, f"{note}.", plots.svg(
        lambda axes: plots.lines(axes, drawn, "step", quantity), name, f"{title}. {note}"))


def _layers_apart(run: Run) -> tuple:
    """(least, greatest) MaxVio of a layer, as `windows` has it; nothing without layers."""
    layers = [windows(*column(run.train, "load_violation_by_layer", layer))[1]
              for layer in range(depth(run.train, "load_violation_by_layer"))]
    if not layers or len({len(layer) for layer in layers}) > 1:
        return ()
    return tuple(bound(layers, axis=0).tolist() for bound in (np.min, np.max))


def _layers(run: Run) -> Figure | None:
    """Which layers are uneven: MaxVio of each in the first and in the last tenth of the steps."""
    count = depth(run.train, "load_violation_by_layer")
    tenth = max(1, len(run.train) // 10)
    parts = {"first tenth of the steps": run.train[:tenth], "last tenth": run.train[-tenth:]}
    series = {name: [column(lines, "load_violation_by_layer", layer)[1] for layer in range(count)]
              for name, lines in parts.items()}
    if count < 2 or not all(values for layers in series.values() for values in layers):
        return None
    dense = run.fields.get("model.num_hidden_layers", count) - count
    numbers = [dense + layer for layer in range(count)]
    means = {name: (numbers, [float(np.mean(values)) for values in layers]) for name, layers in series.items()}
    worst = int(np.argmax(means["last tenth"][1]))
    note = (f"Most uneven at the end: layer {numbers[worst]}, MaxVio {short(means['last tenth'][1][worst])}. "
            "Layers count from 0; dense ones have no experts.")
    return Figure("Load of experts by layer", note, plots.svg(
        lambda axes: plots.lines(axes, means, "layer", "MaxVio, mean over steps"), "layers",
        f"MaxVio of each layer, in the first and the last tenth of the steps. {note}"))


def _experts(run: Run) -> Figure | None:
    """Which experts are chosen: the load of each on held-out text, in the last evaluation that tells it."""
    for line in reversed(run.validation):
        if layers := [*table(line, "expert_load"), *table(line, "mtp_expert_load")]:
            break
    else:
        return None
    main = len(table(line, "expert_load"))
    dense = run.fields.get("model.num_hidden_layers", main) - main
    names = [str(dense + layer) for layer in range(main)] + [f"MTP {k + 1}" for k in range(len(layers) - main)]
    largest = max(range(len(layers)), key=lambda layer: max(layers[layer]))
    idle = sum(load < 0.01 for layer in layers for load in layer)
    note = (f"Step {line['step']:,}, held-out text; 1 is the mean of a layer. Greatest {short(max(layers[largest]))}: "
            f"layer {names[largest]}, expert {layers[largest].index(max(layers[largest]))}. "
            f"{idle:,} of {sum(map(len, layers)):,} experts below 0.01.")
    height = 1.6 + 0.28 * min(len(layers), 16)
    return Figure("Load of each expert", note, plots.svg(
        lambda axes: plots.ink(axes, layers, names, [str(expert) for expert in range(len(layers[0]))], "layer",
                               "expert", "load / mean"), "experts", f"Load of each expert by layer. {note}", height))


def _timing(run: Run) -> Figure | None:
    """Where the seconds went."""
    if not any(run.seconds.values()):
        return None
    whole = sum(run.seconds.values())
    shares = ", ".join(f"{phase} {run.seconds[phase] / whole:.0%}" for phase in PHASES)
    return Figure("Where the time went", f"{shares} of {whole:,.1f} s, restarts included, until the checkpoint of step "
                  f"{run.checkpoints[-1]:,}. Data: what steps waited for batches.", plots.svg(
                      lambda axes: plots.bars(axes, list(PHASES), {"seconds": [run.seconds[p] for p in PHASES]},
                                              quantity="seconds", digits=1), "timing", f"Seconds by phase: {shares}"))
