"""What each axis of a mesh costs a training step: `python -m research.bench_scaling [--axes=data,fsdp] [--json=FILE]`.

Weak scaling: with n devices on one axis a step takes n times the rows (`--rows` a device), real text and real router.
On a machine with GPUs or TPUs their step, over that of one of them with its own rows, says how far it scales: 1 is
perfect. On a CPU the devices are simulated, and share the cores: n of them do n times the work. There a step stands
beside that of one device with the same whole batch: what splitting the program costs, 1 is nothing. That counts copies
from device to device, smaller products, what every device computes alike, and threads that wait for one another; of a
pipeline also what stages compute in vain, where real ones would be idle. It says nothing of speed on several machines:
there is no network, and no device has a memory of its own.

Beside it stand the bytes that a device exchanges, by the compiled program and by the account. Each program runs in a
process of its own: how many devices are simulated is settled when it starts.

    python -m research.bench_scaling --config=experiments/ladder.py:1b --axes=fsdp --devices=1,2,4,8 --rows=8
"""

import json
import os
import statistics
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

from absl import flags

from research import bench, bench_peer, command, experiment, plots
from research.bench_decoding import numbers, spread
from research.errors import RequestError
from research.files import write_whole

FLAGS = flags.FlagValues()
AXES = ("data", "fsdp", "expert", "tensor", "pipeline")
_AXES = flags.DEFINE_list("axes", list(AXES), "Axes of the mesh, each measured alone.", FLAGS)
_DEVICES = flags.DEFINE_list("devices", ["1", "2", "4", "8"], "Numbers of devices.", FLAGS)
_ROWS = flags.DEFINE_integer("rows", 2, "Sequences of a device; a pipeline's micro-batches have one.", 1, None, FLAGS)
_CONFIG = flags.DEFINE_string("config", None, "The experiment; by default nano's, in 9 layers of 8 heads.", FLAGS)
_FIELDS = flags.DEFINE_multi_string("config.", [], "--config.group.field=value changes a field of it.", FLAGS)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each program.", 1, None, FLAGS)
_STEPS = flags.DEFINE_integer("steps", 2, "Steps in a turn.", 1, None, FLAGS)
_JSON = flags.DEFINE_string("json", None, "Also writes the result here.", FLAGS)
_PLOT = flags.DEFINE_string("plot", None, "Also draws the result here, a PNG.", FLAGS)
_WORKER = flags.DEFINE_string("worker", None, "One program's process, started by the driver: its request.", FLAGS)

NANO = "experiments/nano.py"
EIGHTHS = (  # nano's widths, for eight stages and eight shares of heads
    "model.num_hidden_layers=9", "model.num_attention_heads=8", "model.qk_nope_head_dim=24", "model.qk_rope_head_dim=8",
    "model.v_head_dim=24", "data.sequence_length=128",
    "model.scan_unroll=1")  # layers in a loop, as on a GPU: compiled in a third of the time
WARMUPS = 2  # steps


class Program(NamedTuple):
    """A training step of the rows of so many devices: over one axis of the mesh, or (None) on one device."""

    axis: str | None
    devices: int

    def request(self) -> dict:
        """The experiment, and the fields that are changed of it."""
        rows, given = self.devices * _ROWS.value, [] if _CONFIG.value else EIGHTHS
        fields = [f"training.batch_size={rows}", "training.batch_ramp_start=0", f"evaluation.batch_size={rows}"]
        if self.axis == "pipeline":
            fields.append(f"training.accumulation_steps={rows}")
        if self.axis:
            fields.append(f"mesh.{self.axis}={self.devices}")
        return {"config": _CONFIG.value or NANO, "fields": [*given, *_FIELDS.value, *fields]}


def work(request: dict) -> None:
    """A program's process: says what it is, then takes as many steps as each line of stdin says."""
    from research import config, environment
    from research.accounting import exchange
    from research.bench_precision import Stepper
    from research.data.pipeline import load_corpus
    from research.parallel import overlap

    environment.compute_in_this_thread()
    settings = config.check(experiment.change(experiment.load(request["config"]), request["fields"]))
    corpus = load_corpus(settings)
    settings = settings.with_vocabulary(corpus.tokenizer.vocab_size)
    stepper, exchanged = Stepper(settings, corpus), Counter()
    stepper.seconds(1)
    environment.pin_threads()
    for each in overlap.exchanges(stepper.step.as_text()):
        exchanged[each.kind] += each.bytes * each.times
    bench_peer.answer({"environment": environment.describe(), "exchanged": exchanged,
                       "account": exchange.of_step(settings)})
    for line in sys.stdin:
        bench_peer.answer({"seconds": stepper.seconds(int(line)),
                           "load_violation": float(stepper.metrics.get("load_violation", 0))})


def start(program: Program, folder: Path) -> bench.Worker:
    """Its process, on as many devices as it takes where they are simulated."""
    devices = program.devices if program.axis else 1
    simulated = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
    module = [sys.executable, "-m", "research.bench_scaling", f"--worker={json.dumps(program.request())}"]
    return bench.Worker(module, bench.KEPT_PAGES | {"XLA_FLAGS": simulated}, folder)


def measure(group: list[Program], folder: Path) -> dict[Program, dict]:
    """Of each program what its process says, and `ms` of a step, a number a round, in turn."""
    workers, ms = {}, {program: [] for program in group}
    try:
        for program in group:
            workers[program] = start(program, folder)
            workers[program].seconds(WARMUPS)
        for turn in range(_ROUNDS.value):
            for program in group if turn % 2 == 0 else reversed(group):  # none is always the one that goes first
                said = workers[program].turn(_STEPS.value)
                ms[program].append(1e3 * said.pop("seconds"))
                workers[program].about |= said
        return {program: workers[program].about | {"ms": ms[program]} for program in group}
    finally:
        for worker in workers.values():
            worker.close()


def rows_of(axis: str, sizes: list[int], found: dict[Program, dict], simulated: bool) -> list[dict]:
    """The table's rows of an axis; `times`: in each round, as many times as long as on one device (see above)."""
    rows = []
    for size in sizes:
        one = found[Program(None, size if simulated else 1)]
        own = found[Program(axis, size)] if size > 1 else found[Program(None, 1)]
        rows.append({"axis": axis, "devices": size, "ms": own["ms"], "one_device_ms": one["ms"],
                     "times": [ours / theirs for ours, theirs in zip(own["ms"], one["ms"], strict=True)],
                     "exchanged": own["exchanged"], "account": own["account"],
                     "load_violation": own["load_violation"]})
    return rows


def line_of(row: dict, simulated: bool) -> str:
    """A row as a line. Milliseconds: a device's share of them where devices share the cores."""
    share = row["devices"] if simulated else 1
    own, one = (statistics.median(row[name]) / share for name in ("ms", "one_device_ms"))
    return (f"{row['axis']:<9}{row['devices']:>7}{own:>10.1f}{one:>11.1f}{statistics.median(row['times']):>8.2f}"
            f"{spread(row['times'], '.2f'):>13}{sum(row['exchanged'].values()) / 1e6:>12.2f}"
            f"{row['account'] / 1e6:>9.2f}{row['load_violation']:>8.2f}")


def checked() -> tuple[list[str], list[int]]:
    """Axes and numbers of devices; RequestError for what no process could run."""
    sizes = sorted(set(numbers(_DEVICES, int, 1)))
    for axis in _AXES.value:
        if axis not in AXES:
            raise RequestError(f"--axes={axis!r} must be one of {', '.join(AXES)}")
    if not _AXES.value:
        raise RequestError(f"--axes is empty: give some of {', '.join(AXES)}")
    bench.check_json(_JSON.value)
    bench.check_json(_PLOT.value, "plot")
    if _PLOT.value is not None:
        plots.require(f"--plot={_PLOT.value!r}")
    for axis, size in experiment.change(experiment.load(_CONFIG.value or NANO), _FIELDS.value).mesh.items():
        if size != 1:
            raise RequestError.field(f"mesh.{axis}", size, "must be 1: --axes and --devices say which meshes")

    from research.accounting.request import refusal, settings_of

    for program in (Program(axis, size) for axis in _AXES.value for size in sizes):
        request = program.request()
        if said := refusal(settings_of(request["config"], request["fields"])):
            raise RequestError(said)
    return _AXES.value, sizes


def draw(panels, rows: list[dict], simulated: bool) -> None:
    """How many times as long as one device a step takes, by axis and devices; and the bytes of the most devices."""
    of = {}
    for row in rows:
        of.setdefault(row["axis"], []).append(row)
    plots.lines(panels[0], {axis: ([row["devices"] for row in own], *(
        [pick(row["times"]) for row in own] for pick in (statistics.median, min, max))) for axis, own in of.items()},
        "simulated devices, which share the cores" if simulated else "devices",
        "a step, over one device's of\nthe same batch" if simulated else "a step, over one device's\nof its own rows")
    panels[0].set_ylim(0)
    most = [own[-1] for own in of.values()]
    plots.bars(panels[1], list(of), {
        "the compiled program": [sum(row["exchanged"].values()) / 1e6 for row in most],
        "the account": [row["account"] / 1e6 for row in most]},
        f"MB that each of {most[0]['devices']} devices exchanges in a step", 1)


def main() -> None:
    if _WORKER.value is not None:
        work(json.loads(_WORKER.value))
        return
    import jax

    jax.config.update("jax_platforms", "cpu")  # of this process, which only counts: the devices are the others'
    axes, sizes = checked()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        probe = start(Program(None, 1), folder)
        probe.close()
        about = probe.about["environment"]
        simulated = about["device"].startswith("cpu ")
        if not simulated and sizes[-1] > about["devices"]:
            raise RequestError(f"--devices={sizes[-1]} is more than the {about['devices']} that are present: "
                               f"{about['device']}")
        print(f"{about['device']}, {about['processor']}, jax {jax.__version__}, commit {about['commit']}")
        name = " ".join([_CONFIG.value or f"{NANO} in 9 layers of 8 heads", *_FIELDS.value])
        print(f"a training step of {name}: {_ROWS.value} rows a device; {_ROUNDS.value} rounds of {_STEPS.value} "
              "steps: median and range")
        print("simulated devices share the cores; ms: of a step, over their number, beside one device's of the same "
              "batch; times: what splitting costs, no speed" if simulated else
              "ms: of a step, beside one device's of its own rows; times: 1 is perfect weak scaling")
        print("MB: that a device exchanges in a step, by the program (but further rounds of experts) and by "
              "the account")
        print(f"{'axis':<9}{'devices':>7}{'ms':>10}{'one device':>11}{'times':>8}{'range':>13}{'MB, program':>12}"
              f"{'account':>9}{'MaxVio':>8}", flush=True)
        found, rows = {}, []
        for axis in axes:
            programs = [Program(None, size) for size in (sizes if simulated else [1])]
            programs += [Program(axis, size) for size in sizes if size > 1]
            # in turn, so that all see the same machine; a GPU may have no room for the states of several
            for group in [programs] if simulated else [[each] for each in programs if each not in found]:
                found |= measure(group, folder)
            new = rows_of(axis, sizes, found, simulated)
            rows += new
            print("\n".join(line_of(row, simulated) for row in new), flush=True)
            if _JSON.value is not None:  # after each axis: what is measured is not lost with the next
                write_whole(Path(_JSON.value), json.dumps({
                    "environment": about, "request": Program(None, 1).request(), "rows_a_device": _ROWS.value,
                    "steps": _STEPS.value, "simulated": simulated, "rows": rows}, indent=1) + "\n")
            if _PLOT.value is not None:
                plots.save(Path(_PLOT.value), partial(draw, rows=rows, simulated=simulated), 2)


if __name__ == "__main__":
    command.run(main, FLAGS)
