"""What a model of V3's kind costs to train, by shape, mesh, GPU and price: the account's numbers as pictures."""

import functools

from research import plots
from research.accounting import cost, flops, memory
from research.accounting.parameters import count
from research.accounting.statement import Terms, account
from research.tables.runner import published
from research.tables.v3_cost import analytic

BATCH = 15360  # V3's sequences of a step


def published_stages() -> list:
    """V3's Table 1: rows of the paper's figure and ours."""
    return analytic()


def bill(experiment: str, tokens: float, gpu: str, mfu: float, price: float, fields: tuple[str, ...] = ()) -> dict:
    """The account of `experiments/NAME` with fields changed: `research.account`'s own nested object."""
    settings = published(experiment, *fields)
    return account(settings, experiment, Terms(gpu, price, mfu, None, tokens))


def line(found: dict) -> str:
    """The bill at one glance."""
    p = found["parameters"]
    return (f"{p['total'] / 1e9:,.1f}B parameters, {p['active'] / 1e9:,.1f}B active; "
            f"{found['flops_per_token']['training_causal'] / 1e9:,.1f} GFLOP a token; "
            f"{found['gpu_hours'] / 1e3:,.0f}K hours on {found['device']}, {found['dollars'] / 1e6:,.2f}M dollars")


@functools.cache
def shape(layers: int, experts: int, chosen: int) -> dict:
    """Parameters and FLOPs a token of DeepSeek-V3 with so many layers and experts."""
    settings = published("deepseek_v3", f"model.num_hidden_layers={layers}", f"model.n_routed_experts={experts}",
                         f"model.num_experts_per_tok={chosen}")
    counted = count(settings)
    return {"total": counted["total"], "active": counted["active"],
            "flops": flops.by_isca_rule(settings)["training_causal"]}


def hours(flops_per_token: float, gpu: str, mfu: float, tokens: float) -> float:
    """GPU hours: tokens x FLOPs a token / (peak x utilisation), in hours."""
    speed = cost.tokens_per_second(flops_per_token, cost.GPUS[gpu].peak, mfu)
    return cost.gpu_hours(tokens, speed)


def device(data: int, expert: int, pipeline: int, recipe: str = "fp8_deepseek") -> dict[str, float]:
    """Bytes of one device, by part, that trains DeepSeek-V3 on such a mesh: V3's batch, one row at a time."""
    pieces = BATCH // (data * expert)
    settings = published("deepseek_v3", f"mesh.data={data}", f"mesh.expert={expert}", f"mesh.pipeline={pipeline}",
                         f"training.batch_size={BATCH}", f"training.accumulation_steps={pieces}",
                         "training.batch_ramp_start=0", f"precision.recipe={recipe}")
    return memory.of_device(settings, True)


def draw_device(axes, found: dict[str, float]) -> None:
    """Gigabytes of each part, and of all, beside what an H800 has."""
    _beside_an_h800(axes, found, "a device", 1)


def _beside_an_h800(axes, sizes: dict[str, float], name: str, digits: int) -> None:
    """Bars of bytes, and a line at what one has."""
    plots.bars(axes, list(sizes), {name: [size / 1e9 for size in sizes.values()]},
               "GB a device (logarithmic; an H800 has 80)", digits, log=True)
    axes.axvline(80, color="black", linestyle="--", linewidth=1)


def draw_price(axes, hours_of: dict[str, float], gpu: str) -> None:
    """A few models' hours."""
    plots.bars(axes, list(hours_of), {f"{gpu} hours": [found / 1e3 for found in hours_of.values()]},
               f"thousand {gpu} hours", 0)


def draw_stages(axes, rows) -> None:
    """Hours of each stage, the paper's and ours."""
    chosen = [row for row in rows if row.unit == "thousand H800 hours"][:4]
    plots.bars(axes, [row.what for row in chosen],
               {"paper": [row.paper for row in chosen], "ours": [row.ours for row in chosen]}, "thousand H800 hours", 0)


def draw_mesh(axes, meshes: dict[str, tuple[str, ...]], recipe: str) -> None:
    """Gigabytes of a device by mesh: DeepSeek-V3, beside what an H800 has."""
    totals = {}
    for name, fields in meshes.items():
        settings = published("deepseek_v3", *fields, f"precision.recipe={recipe}")
        totals[name] = memory.of_device(settings, True)["total"]
    _beside_an_h800(axes, totals, recipe, 0)


def draw_sparsity(axes, gpu: str, mfu: float, tokens: float) -> None:
    """Hours of training over the number of experts a token chooses of 256, and what a dense model of all would take."""
    chosen = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    least, eight = (shape(61, 256, k)["flops"] for k in (1, 8))  # FLOPs are linear in the number of experts
    spent = [hours(least + (k - 1) * (eight - least) / 7, gpu, mfu, tokens) / 1e6 for k in chosen]
    axes.loglog(chosen, spent, color="black", marker="o", markerfacecolor="white", linewidth=1.1)
    axes.axhline(spent[-1], color="black", linestyle=":", linewidth=1)
    for k, value in zip(chosen, spent, strict=True):
        if k in (8, 256):
            axes.annotate(f"{k} of 256: {value:,.1f}M hours", (k, value), (8 if k == 8 else -8, -4 if k == 8 else 5),
                          textcoords="offset points", ha="left" if k == 8 else "right")
    axes.set_xticks(chosen, [str(k) for k in chosen])
    axes.set_yticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.set_xlabel("experts that a token chooses, of 256")
    axes.set_ylabel(f"million {gpu} hours")
    axes.set_xlim(0.9, 2 * chosen[-1])
