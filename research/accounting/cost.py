"""From FLOPs and bytes to hours and dollars: what a GPU does, what it costs, and what bounds it."""

from dataclasses import dataclass

from research.accounting import flops
from research.accounting.parameters import is_routed_expert, shapes

SECONDS_PER_HOUR, SECONDS_PER_DAY = 3600, 86400
ACTIVE_BYTES = 2  # of a weight that is read in decoding: bfloat16


@dataclass(frozen=True)
class Gpu:
    """By the data sheets."""

    peak: float  # FLOP/s of dense bfloat16 products
    memory: float  # bytes
    bandwidth: float  # bytes a second


GPUS = {  # Hopper, which the kernels are for; 989 TFLOP/s is the peak that gives the utilisation that DeepSeek prints
    "H20": Gpu(148e12, 96e9, 4.0e12),
    "H100": Gpu(989e12, 80e9, 3.35e12),
    "H200": Gpu(989e12, 141e9, 4.8e12),
    "H800": Gpu(989e12, 80e9, 3.35e12),
}


def tokens_per_second(flops_per_token: float, peak: float, utilization: float) -> float:
    """Of one GPU."""
    return utilization * peak / flops_per_token


def utilization(flops_per_token: float, peak: float, speed: float) -> float:
    """The share of the peak that `speed` tokens a second of one GPU are."""
    return speed * flops_per_token / peak


def gpu_hours(tokens: float, speed: float) -> float:
    """Of `tokens` at `speed` tokens a second and GPU."""
    return tokens / speed / SECONDS_PER_HOUR


def dollars_per_million_tokens(price_per_hour: float, speed: float) -> float:
    """At `speed` tokens a second of what `price_per_hour` rents."""
    return price_per_hour / SECONDS_PER_HOUR / speed * 1e6


def decode_intensity(settings, kv_bytes_per_token: int, batch: int) -> float:
    """FLOPs of a decoding step over the bytes that it reads: each row at a cache of T tokens.

    Weights are read once for all rows, experts only where a row chose them (choices uniform and independent).
    """
    m, T = settings.model, settings.data.sequence_length
    read = 0.0
    for path, leaf in shapes(settings).items():
        if is_routed_expert(path) and not path.startswith("mtp_"):
            read += leaf.size * (1 - (1 - m.num_experts_per_tok / m.n_routed_experts) ** batch)
        elif path.endswith("/kernel") and not path.startswith("mtp_") or path == "lm_head":
            read += leaf.size
    read += shapes(settings)["embed_tokens"].size if m.tie_word_embeddings else 0
    return batch * flops.inference(settings)["decode"] / (ACTIVE_BYTES * read + batch * T * kv_bytes_per_token)
