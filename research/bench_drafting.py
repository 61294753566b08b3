"""What a step with drafts costs beside a plain one, by shape: from which acceptance on drafts pay here."""

import statistics

import jax

from research import config, experiment
from research.bench_context import bytes_of_step
from research.decoding.generate import Decoder
from research.environment import pin_threads
from research.model.build import init_variables, make_model

VOCABULARY = "model.vocab_size=8192"  # the ladder's; nano's own comes with its text
SHAPES = {  # experiment and what is changed in it
    "nano": ("experiments/nano.py", (VOCABULARY,)),
    "30m": ("experiments/ladder.py:30m", (VOCABULARY,)),
    "100m": ("experiments/ladder.py:100m", (VOCABULARY,)),
    "100m, dense": ("experiments/ladder.py:100m", (VOCABULARY, "model.n_routed_experts=0")),
    "300m, dense": ("experiments/ladder.py:300m", (VOCABULARY, "model.n_routed_experts=0")),
}
PAPER = 0.875  # V3 §5.4.3: 85 to 90% of the second tokens accepted


def tokens_of_step(acceptance: float, k: int) -> float:
    """Tokens that a step with k drafts gives on average; each stands with this probability if those before it do."""
    return sum(acceptance**number for number in range(k + 1))


def pays_from(cost: float, k: int) -> float | None:
    """The acceptance at which a step of k drafts gives as many tokens as its `cost` in plain steps; None: beyond 1."""
    if cost > k + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if tokens_of_step(middle, k) < cost else (low, middle)
    return high


def measure_drafting(shapes: dict, prompt: int, new: int, drafts: int, rounds: int) -> dict:
    """Prints a line for each shape and number of drafts. Random weights: what stands of their drafts says nothing, what
    a step costs does, in float32, one sequence at a time."""
    print(f"random weights in float32, one multi-token module; {prompt} tokens, then {new} greedy ones, one sequence; "
          f"{rounds} rounds in turn: median and range")
    print(f"pays from: the acceptance that makes up for the cost; at {PAPER:.1%}: tokens/s beside plain ones")
    print(f"{'shape':<12} {'MB/token':>8} {'k':>2} {'ms/step':>8} {'range':>15} {'cost':>5} {'range':>9} "
          f"{'pays from':>9} {f'at {PAPER:.1%}':>8}", flush=True)
    rows = []
    for name, (file, fields) in shapes.items():
        settings = config.check(experiment.change(
            experiment.load(file), ["precision.recipe=float32", "mtp.num_nextn_predict_layers=1", *fields]))
        model = make_model(settings)
        decoder = Decoder(model, init_variables(model, settings, 0))
        megabytes = bytes_of_step(decoder, 1, 0) / 1e6
        tokens = jax.random.randint(jax.random.key(0), (1, prompt), 0, settings.model.vocab_size).tolist()
        for k in range(drafts + 1):
            decoder.generate(tokens, new, draft_tokens=k)  # compiles
        pin_threads()
        ms = {k: [] for k in range(drafts + 1)}
        for turn in range(rounds):
            for k in ms if turn % 2 == 0 else reversed(ms):  # none is always the one that goes first
                made = decoder.generate(tokens, new, draft_tokens=k)
                ms[k].append(1e3 * made.decode_seconds / made.steps)
        for k, taken in ms.items():
            costs = [one / plain for one, plain in zip(taken, ms[0], strict=True)]
            cost = statistics.median(costs)
            needed = pays_from(cost, k) if k else None
            rows.append({"shape": name, "megabytes": megabytes, "k": k, "ms": taken, "cost": costs, "pays_from": needed,
                         "at_paper": tokens_of_step(PAPER, k) / cost})
            shown = "" if not k else "never" if needed is None else f"{needed:.0%}"
            print(f"{name:<12} {megabytes:>8,.1f} {k:>2} {statistics.median(taken):>8.3f} "
                  f"{min(taken):>7.3f}-{max(taken):<7.3f} {cost:>5.2f} {min(costs):>4.2f}-{max(costs):<4.2f} "
                  f"{shown:>9} {f'{tokens_of_step(PAPER, k) / cost:.2f}x' if k else '':>8}".rstrip(), flush=True)
    return {"prompt": prompt, "new_tokens": new, "rows": rows}
