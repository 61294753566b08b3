"""DeepSeek-V3's Table 2: the time that pipeline stages idle, by schedule, from the formulae and from simulation."""

from research import plots
from research.parallel import schedules
from research.tables.runner import Row

TITLE = "Bubbles of pipeline schedules"
SOURCE = "DeepSeek-V3 (2412.19437) Table 2, evaluated for a forward chunk F = 1, a full backward chunk B = 2, its " \
         "weight-gradient part W = 1 and an overlapped pair F&B = 3 (no gain from overlap)"
NOTES = (
    "Simulated chunk by chunk with 2P micro-batches, communication taking no time: bubbles as the formulae say.",
    "DualPipe: the order of DeepSeek's own implementation. It holds the parameters of two stages on each device, where "
    "1F1B and ZB1P hold those of one. Activations are micro-batches that have gone forward and not yet backward.",
    "The picture: 4 devices, 8 micro-batches. DualPipe's that begin at the last device have a prime; of an overlapped "
    "pair the forward chunk stands above the backward one.",
)
HEIGHT = 4.2  # of the picture, inches

F, B, W, PAIR = schedules.COSTS
STAGES = (4, 8, 16)
SCHEDULES = {  # and the paper's idle time and activations
    "1F1B": (schedules.one_forward_one_backward, lambda P: (P - 1) * (F + B), lambda P: P),
    "ZB1P": (schedules.zero_bubble, lambda P: (P - 1) * (F + B - 2 * W), lambda P: P),
    "DualPipe": (schedules.dual, lambda P: (P / 2 - 1) * (PAIR + B - 3 * W), lambda P: P + 1),
}
LOOKS = {"F": "forward", "B": "backward", "I": "backward, of the input", "W": "backward, of the weights"}


def analytic() -> list[Row]:
    rows = []
    for name, (schedule, bubble, held) in SCHEDULES.items():
        for P in STAGES:
            timeline = schedules.timed(schedule(P, 2 * P))
            rows.append(Row(f"{name}, P = {P}", "forward chunks", bubble(P), schedules.idle(timeline), 1,
                            "simulated"))
            rows.append(Row(f"{name}, P = {P}: activations", "micro-batches", held(P), schedules.most_held(timeline),
                            0, "simulated"))
    return rows


SCALES = {"analytic": analytic}


def draw(axes, rows: list[Row]) -> None:
    """The timelines of the fewest stages; what is idle is blank."""
    P, groups = STAGES[0], {}
    for name, (schedule, *_) in SCHEDULES.items():
        (idle,) = (row.ours for row in rows if row.what == f"{name}, P = {P}")
        groups[f"{name}: {idle:g} idle"] = [
            [(done.start, done.end, [(LOOKS[chunk.kind], f"{chunk.batch}{'′' * chunk.way}") for chunk in done.chunks])
             for done in device] for device in schedules.timed(schedule(P, 2 * P))]
    plots.timeline(axes, groups, "device", "time (forward chunks)")
