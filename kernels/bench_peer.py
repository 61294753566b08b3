"""The other side of `kernels.bench --peer`: cuBLASLt's block-scaled FP8 product (1x128 by 128x128 or 1x128), by torch.

A script for a Python that has torch with CUDA, 2.9 or newer, and imports nothing of ours: `python bench_peer.py
REQUEST`, JSON: {"shapes": [[rows, columns, contraction, by_block], ...], "l2_bytes", "warmup", "sample", "samples"}.
Prints a JSON line about itself, {"missing": why} where it cannot run, then one for each shape: seconds or {"failed"}.
"""

import json
import math
import statistics
import sys
import time


def main(request: dict) -> None:
    try:
        import torch
    except ImportError:
        return answer({"missing": f"{sys.executable} has no torch"})
    if not torch.cuda.is_available():
        return answer({"missing": f"torch {torch.__version__} sees no GPU"})
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return answer({"missing": f"{torch.cuda.get_device_name()} is no Hopper GPU: only there it scales by blocks"})
    answer({"name": f"torch {torch.__version__}, CUDA {torch.version.cuda}"})
    for R, S, C, by_block in request["shapes"]:
        try:
            answer(seconds(torch, R, S, C, by_block, request))
        except RuntimeError as error:
            answer({"failed": " ".join(str(error).split())[:200]})


def answer(fields: dict) -> None:
    """One JSON line to the bench."""
    print(json.dumps(fields), flush=True)


def operands(torch, R: int, S: int, C: int, by_block: bool, device: str = "cuda") -> tuple:
    """Random a (R, C), b (C, S) in E4M3 and their scales, strided as cuBLASLt wants them."""
    a = torch.randn(R, C, device=device).to(torch.float8_e4m3fn)
    b = torch.randn(S, C, device=device).to(torch.float8_e4m3fn).t()
    chunks = -(-C // 128)
    scale_a = torch.rand(chunks, R, device=device).t()  # R runs fastest
    if not by_block:
        return a, b, scale_a, torch.rand(chunks, S, device=device)
    padded = torch.rand(-(-S // 128), -(-chunks // 4) * 4, device=device)  # silently wrong without: pytorch #166752
    return a, b, scale_a, padded[:, :chunks].t()


def seconds(torch, R: int, S: int, C: int, by_block: bool, request: dict) -> dict:
    """Of one call: the median, least and greatest of samples, each of many calls in a CUDA graph."""
    bytes_of_call = R * C + S * C + 2 * R * S
    n = max(math.ceil(2 * request["l2_bytes"] / bytes_of_call) + 1, 2)
    sets = [operands(torch, R, S, C, by_block) for _ in range(n)]

    def turn():
        return [torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=False)
                for a, b, scale_a, scale_b in sets]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # cuBLASLt's own buffers must stand before the graph is captured
        turn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        turn()

    def time_of(turns: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(turns):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / (turns * n)

    turns = max(1, math.ceil(request["sample"] / (time_of(3) * n)))
    start = time.perf_counter()
    while time.perf_counter() - start < request["warmup"]:
        time_of(turns)
    taken = [time_of(turns) for _ in range(request["samples"])]
    return {"median": statistics.median(taken), "least": min(taken), "greatest": max(taken), "samples": len(taken),
            "calls": turns * n}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
