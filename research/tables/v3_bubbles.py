"""DeepSeek-V3's Table 2: the time that pipeline stages idle, by schedule, from the formulae and from simulation."""

from research import plots
from research.tables.runner import Row

TITLE = "Bubbles of pipeline schedules"
SOURCE = "DeepSeek-V3 (2412.19437) Table 2, evaluated for a forward chunk F = 1, a full backward chunk B = 2, its " \
         "weight-gradient part W = 1 and an overlapped pair F&B = 3 (no gain from overlap)"
NOTES = (
    "1F1B and ZB1P are simulated chunk by chunk with 2P micro-batches: bubbles as the formulae say.",
    "DualPipe and DualPipeV: the formula alone; their schedules are not simulated yet. They hold parameters twice and "
    "activations of P + 1 micro-batches, where 1F1B and ZB1P hold them once and of P.",
)

F, B, W, PAIR = 1.0, 2.0, 1.0, 3.0
STAGES = (4, 8, 16)
FORMULAE = {
    "1F1B": lambda P: (P - 1) * (F + B),
    "ZB1P": lambda P: (P - 1) * (F + B - 2 * W),
    "DualPipe": lambda P: (P / 2 - 1) * (PAIR + B - 3 * W),
}


def simulate(stages: int, batches: int, delayed: bool) -> tuple[float, int]:
    """Idle time of a stage under 1F1B, and the most micro-batches whose activations one stage holds.

    delayed: weight gradients are chunks of their own (ZB1P), and a stage lets as many of them wait as stages come
    before it.
    """
    orders = []
    for stage in range(stages):
        ahead = min(stages - stage - 1, batches)
        order = [("F", i) for i in range(ahead)]
        for i in range(batches - ahead):
            order += [("F", ahead + i), ("B", i)]
        orders.append(order + [("B", i) for i in range(batches - ahead, batches)])
    backward = B - W if delayed else B
    done, now, waiting, held, most = {}, [0.0] * stages, [0] * stages, [0] * stages, 0
    while any(orders):
        start, stage = min((begin, stage) for stage in range(stages)
                           if (begin := _start(orders, stage, stages, done, now)) is not None)
        kind, batch = orders[stage].pop(0)
        now[stage] = start + (F if kind == "F" else backward)
        done[kind, batch, stage] = now[stage]
        held[stage] += 1 if kind == "F" else -1
        most = max(most, held[stage])
        if kind == "B" and delayed:
            waiting[stage] += 1
        while waiting[stage] > stage or (waiting[stage] and not orders[stage]):
            waiting[stage], now[stage] = waiting[stage] - 1, now[stage] + W
    return max(now) - batches * (F + B), most  # every stage has the same to do


def _start(orders, stage: int, stages: int, done: dict, now: list[float]) -> float | None:
    """When a stage's next chunk can begin; None while what it waits for is not done, or nothing is left."""
    if not orders[stage]:
        return None
    kind, batch = orders[stage][0]
    needed = [("F", batch, stage - 1)] if kind == "F" and stage else []
    if kind == "B":
        needed = [("F", batch, stage)] + ([("B", batch, stage + 1)] if stage < stages - 1 else [])
    return max([now[stage], *(done[each] for each in needed)]) if all(each in done for each in needed) else None


def analytic() -> list[Row]:
    rows = []
    for name, formula in FORMULAE.items():
        for P in STAGES:
            idle, most = (None, None) if name == "DualPipe" else simulate(P, 2 * P, delayed=name == "ZB1P")
            rows.append(Row(f"{name}, P = {P}", "forward chunks", formula(P), idle, 1,
                            "not simulated" if idle is None else "simulated"))
            if idle is not None:
                rows.append(Row(f"{name}, P = {P}: activations", "micro-batches", P, most, 0, "simulated"))
    return rows


SCALES = {"analytic": analytic}


def draw(axes, rows: list[Row]) -> None:
    for line, name in zip(plots.LINES, FORMULAE, strict=False):
        chosen = [row for row in rows if row.what.startswith(f"{name}, ") and row.unit == "forward chunks"]
        axes.plot(STAGES, [row.paper for row in chosen], color="black", fillstyle="none", label=name, **line)
        if chosen[0].ours is not None:
            axes.plot(STAGES, [row.ours for row in chosen], "x", color="black", markersize=9,
                      label="simulated" if name == "1F1B" else None)
    axes.set(xlabel="pipeline stages P", ylabel="idle time of a stage (forward chunks)", xticks=STAGES)
    axes.legend()
