"""What is read off a run of a table: each figure's name and unit, how it comes about, and its decimals."""

import json
import statistics

TEMPERATURES = (0.0, 0.6)  # of drafting
MASKED = (1, 2, 3, 4)  # sixteenths of the routed experts


def last(name: str):
    """A figure of a run's last evaluation, which read all held-out text."""
    return lambda run, lines: [line for line in lines if line["split"] == "validation"][-1][name]


def cache_bytes(run, lines: list[dict]) -> float:
    """Of a decoded token, in bfloat16."""
    from research.decoding.cache import bytes_per_token
    from research.model.build import make_model

    return bytes_per_token(make_model(vocabulary(run.settings)), "bfloat16")


def vocabulary(settings):
    """The settings with the tokenizer's size, as training has them."""
    return settings.with_vocabulary(settings.data.bpe_vocab_size)


def of_batches(run, lines: list[dict]) -> float:
    """MaxVio of a training batch, averaged over layers and the last half of the steps."""
    found = [line["load_violation"] for line in lines if line["split"] == "train"]
    return statistics.fmean(found[len(found) // 2:])


class Pictured(float):
    """A figure with what it is a mean of, which the picture alone shows.

    alike: the places of two seeds' parts mean the same, so that their mean says something; or else the first seed's
    are shown.
    """

    def __new__(cls, value: float, parts, alike: bool = True):
        made = super().__new__(cls, value)
        made.parts, made.alike = parts, alike
        return made


def line_of(split: str, read):
    """A figure of what readings.py has found: read(the line of this name)."""
    return lambda run, lines: read(next(line for line in lines if line["split"] == split))


def share_found(times: int):
    """Of needles in contexts of so many trained lengths, over all depths, in %."""
    def figure(found: dict) -> Pictured:
        shares = [100 * share for share in found["found"][str(times)]]
        return Pictured(statistics.fmean(shares), shares)

    return line_of("needles", figure)


def of_drafting(k: int, temperature: float, read):
    """The median over rounds of what drafting k tokens a step at this temperature gave: read(row)."""
    def figure(found: dict) -> float:
        row = next(row for row in found["rows"] if (row["k"], row["temperature"]) == (k, temperature))
        return statistics.median(read(row))

    return line_of("drafting", figure)


def accepted(position: int, temperature: float):
    """Share of steps in which the draft at this position stood, with two a step, in %."""
    return of_drafting(2, temperature, lambda row: [100 * shares[position - 1] for shares in row["acceptance"]])


def moved(found: dict) -> Pictured:
    """What share of a domain's load lies on other experts than that of all text; parts: {domain: loads of a layer}."""
    shares = [sum(abs(one - whole) for one, whole in zip(layer, all_text, strict=True)) / len(layer) / 2
              for layers in found["domains"].values()
              for layer, all_text in zip(layers, found["all"], strict=True)]
    return Pictured(100 * statistics.fmean(shares), {name: layers[-1] for name, layers in found["domains"].items()},
                    alike=False)


def rise(sixteenths: int):
    """Of the loss, with so many sixteenths of the routed experts masked, each token's best; None for an arm of which
    this is not read."""
    def figure(run, lines: list[dict]) -> float | None:
        losses = next(line for line in lines if line["split"] == "masked")["loss"]
        return losses[str(sixteenths)] - last("loss")(run, lines) if losses else None

    return figure


def half_interval(run, found: dict) -> float:
    """Of pass@1, of one run, in %."""
    return 50 * (found["pass_at_1"]["high"] - found["pass_at_1"]["low"])


def taught(run, found: dict) -> float | None:
    """Samples that a distilled student learns from; None for other models."""
    path = run.workdir.parent / "verification.json"
    return json.loads(path.read_bytes())["counts"]["kept"] if run.workdir.name == "distilled" else None


QUANTITIES = {  # name and unit of a figure: what reads it off a run and its metrics, and its decimals
    "bits per byte": (last("bits_per_byte"), 4),
    "validation loss": (last("loss"), 4),
    "MaxVio": (last("load_violation"), 3),
    "MaxVio of a batch": (of_batches, 3),
    "bytes of cache a token": (cache_bytes, 0),
    "pass@1, %": (lambda run, found: 100 * found["pass_at_1"]["value"], 1),  # these of pipelines.py's runs
    "± of one seed's pass@1 (95%), %": (half_interval, 1),
    "pass@k, %": (lambda run, found: 100 * found["pass_at_k"], 1),
    "cons@k, %": (lambda run, found: 100 * found["cons_at_k"], 1),
    "k": (lambda run, found: found["k"] if run.workdir.name == "teacher" else None, 0),  # all have the teacher's
    "tokens of a response": (lambda run, found: found["tokens"], 1),
    "training, TFLOP": (lambda run, found: found["flops"] / 1e12, 2),
    "samples taught": (taught, 0),
    **{f"found at {times} T, %": (share_found(times), 1) for times in (1, 2, 3, 4)},
    **{f"draft {position} stands at temperature {t:g}, %": (accepted(position, t), 1)
       for t in TEMPERATURES for position in (1, 2)},
    **{f"tokens a step, {k} drafted, temperature {t:g}": (of_drafting(k, t, lambda row: row["tokens_per_step"]), 2)
       for t in TEMPERATURES for k in (1, 2)},
    **{f"times plain speed, {k} drafted, temperature {t:g}": (of_drafting(k, t, lambda row: row["speedup"]), 2)
       for t in TEMPERATURES for k in (1, 2)},
    "load that domains move, %": (line_of("domains", moved), 1),
    **{f"rise of the loss, best {n}/16 masked": (rise(n), 4) for n in MASKED},
}
