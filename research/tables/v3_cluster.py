"""DeepSeek-V3 on a cluster: memory of a GPU, what it sends, and bounds of a step's time, by mesh, from shapes."""

import math

from research import plots
from research.accounting import cost, exchange, flops, memory, parameters
from research.accounting.request import refusal
from research.parallel import schedules
from research.tables.runner import Row, of_unit, published

TITLE = "DeepSeek-V3 on a cluster of H800, by mesh"
SOURCE = "DeepSeek-V3 (2412.19437) §3.1-3.2: 16-way pipeline, 64-way experts, ZeRO-1; the step of 2,048 GPUs: " \
         "Insights into DeepSeek-V3 (2505.09343) Table 4"
NOTES = (
    "Memory: the account's, of FP8 training with the up-projections computed again and one row of 4,096 tokens a "
    "micro-batch, but with the float32 weights split over all GPUs that would hold copies, which V3 does and training "
    "here does not, with a micro-batch's gradients added to their sum as they are made (training here holds them "
    "beside it, 7.0 GB on 16 stages), and with room on each GPU for 1.25 times what a balanced router sends its "
    "experts; no GPU was measured. An H800 has 80 GB. DualPipe's second copy of a stage's weights is not in it. "
    "Training here refuses these meshes: their stages do not divide the 58 layers with experts. The last row is of "
    "one that it takes, with fsdp where V3 has 16 stages, as training holds it, with room for 1.5 times.",
    "Products: the FLOPs of Insights' rule, attention at 989 TFLOP/s, all else at twice that, the peak of FP8.",
    "Sent: each token to other nodes than its own, in FP8 with its scales, back in bfloat16, and the same for the "
    "gradients, at 50 GB/s (400G InfiniBand), which hides behind the products or they behind it. On average: by V3's "
    "gate, of random affinities. No router sends more than the most; one that keeps tokens at home sends less.",
    "The bound of a step is its products, with DualPipe's bubbles at chunks of 1 forward, 2 backward; what is sent on "
    "average takes longer. V3's step takes four times the bound: kernels reach 385 TFLOP/s (causal), stages idle "
    "2.06 s, and there is the optimiser.",
)

GPU, NETWORK = cost.GPUS["H800"], 50e9  # bytes a second
ROWS, STEP = 15360, 19.926  # a step of V3, and its seconds on the first mesh
ROOM = 1.25  # for what comes to a device's experts, times a balanced router's
MESHES = ((16, 64, 2), (16, 64, 1), (8, 64, 1))  # pipeline, expert, data
HERE = {"pipeline": 2, "fsdp": 16, "expert": 64}


def settings_of(mesh: dict[str, int], *fields: str):
    """Of one row a device and micro-batch."""
    batches = ROWS // math.prod(size for axis, size in mesh.items() if axis != "pipeline")
    return published("deepseek_v3", *(f"mesh.{axis}={size}" for axis, size in mesh.items()),
                     f"training.accumulation_steps={batches}", f"training.batch_ramp_start={ROWS}",
                     "evaluation.batch_size=1024", *fields)


def of_mesh(pipeline: int, expert: int, data: int) -> list[Row]:
    s = settings_of({"pipeline": pipeline, "expert": expert, "data": data}, f"training.expert_room={ROOM}")
    gpus, batches = pipeline * expert * data, s.training.accumulation_steps
    tokens = ROWS * s.data.sequence_length / gpus
    counted = flops.by_isca_rule(s)
    attention = counted["training_full"] - counted["training_causal"]
    products = tokens * (attention / GPU.peak + (counted["training_causal"] - attention) / (2 * GPU.peak))
    sending = exchange.account(s.model)
    limited, free = ({name: tokens * size for name, size in sending["bytes"][limit].items()}
                     for limit in ("limited", "free"))
    nodes, seconds = sending["nodes"], limited["mean"] / NETWORK
    idle = schedules.idle(schedules.timed(schedules.dual(pipeline, batches)))
    bubble = idle / (batches * (schedules.COSTS.forward + schedules.COSTS.backward))
    name = f"{gpus:,} GPUs: pipeline {pipeline} x expert {expert} x data {data}"
    of, count = memory.of_device(s, gpu=True), parameters.count(s)
    held = of["total"] - of["master"] + 4 * (count["total"] + count["mtp"]) / gpus
    return [
        Row(name, "GB a GPU", None, held / 1e9, 1, said(s, held)),
        Row(f"{name}, sent", "GB a GPU and step", None, limited["mean"] / 1e9, 1,
            f"on average, to {nodes['limited']['mean']:.2f} other nodes a token"),
        Row(f"{name}, sent at most", "GB a GPU and step", None, limited["most"] / 1e9, 1,
            f"to {nodes['limited']['most']} other nodes a token"),
        Row(f"{name}, sent without a limit", "GB a GPU and step", None, free["mean"] / 1e9, 1,
            f"on average, to {nodes['free']['mean']:.2f} other nodes a token"),
        Row(f"{name}, sending", "s", None, seconds, 2,
            f"on average, at 50 GB/s; at most {limited['most'] / NETWORK:.2f}"),
        Row(f"{name}, products", "s", None, products, 2, "at the peaks"),
        Row(f"{name}, idle", "% of the work", None, 100 * bubble, 1, f"DualPipe, {batches} micro-batches"),
        Row(f"{name}, step with that", "s", None, max(products, seconds) * (1 + bubble), 2,
            "sending on average or the products, whichever is longer, and the idle time"),
        Row(f"{name}, bound of a step", "s", STEP if (pipeline, expert, data) == MESHES[0] else None,
            products * (1 + bubble), 2, "the products and the idle time",
            verdict="a bound" if (pipeline, expert, data) == MESHES[0] else ""),
    ]


def said(settings, held: float) -> str:
    """Whether that fits, and whether training here would run."""
    fits = "fits" if held < GPU.memory else "does not fit into 80 GB"
    return f"{fits}; training here {'refuses' if refusal(settings) else 'takes'} this mesh"


def of_training() -> Row:
    """A mesh that training here takes, as it holds it."""
    s = settings_of(HERE)
    held = memory.of_device(s, gpu=True)["total"]
    return Row(f"{math.prod(HERE.values()):,} GPUs: " + " x ".join(f"{axis} {size}" for axis, size in HERE.items()),
               "GB a GPU", None, held / 1e9, 1, said(s, held))


def analytic() -> list[Row]:
    return [row for mesh in MESHES for row in of_mesh(*mesh)] + [of_training()]


SCALES = {"analytic": analytic}


def draw(axes, rows: list[Row]) -> None:
    seconds = of_unit(rows, "s")  # four of each mesh
    parts = {name: [row.ours for row in seconds[i::4]]
             for i, name in enumerate(("sending on average", "products", "", "bound of a step")) if name}
    plots.bars(axes, [row.what.split(":")[0] for row in seconds[::4]],
               parts | {"V3's step": [row.paper for row in seconds[3::4]]},
               "seconds of a step of 62.9 million tokens", 1)
