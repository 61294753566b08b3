"""The other side of `research.bench` and `bench_decoding`: Hugging Face transformers' DeepSeek-V3, torch on a CPU.

A script for the Python of the comparison's own environment (requirements-parity.txt) that imports nothing of ours:
`python -I research/bench_peer.py REQUEST`, REQUEST being the JSON that `research.bench.request` builds, or that of
`research.bench_decoding`, which has a `cache`: then a step is one `generate`.

Of what was tried it trains by the fastest at 16, 64 and 256 experts: `sdpa` attention (`eager` is 2-5%
slower), `grouped_mm` experts (the `eager` loop 1.1, 1.4 and 5-10 times as long), fused AdamW (`foreach` 920 ms against
658 a step at 256 experts); one exploration on a machine with other work. `torch.compile` was not tried.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

# Trains on tokens_BS (S = T + 1 ids a row) and returns the loss, or continues prompts and returns a token.
Step = Callable[[np.ndarray], Any]


def serve(step: Step, about: dict, tokens_file: str) -> None:
    """Takes one step, then as many as each line of stdin says, over the file's batches; each answer is a JSON line.

    The first line is `about` with the first step's loss; the others hold the seconds a step and the last loss.
    """
    tokens_NBS = np.load(tokens_file)
    answer(about | {"loss": float(step(tokens_NBS[0]))})
    done = 1
    for line in sys.stdin:
        start = time.perf_counter()
        for n in range(done, done + int(line)):
            loss = step(tokens_NBS[n % len(tokens_NBS)])
        loss = float(loss)  # waits for the last step
        done += int(line)
        answer({"seconds": (time.perf_counter() - start) / int(line), "loss": loss})


def answer(fields: dict) -> None:
    """One JSON line to the driver."""
    print(json.dumps(fields), flush=True)


def peer_model(config: dict, experts: str):
    """transformers' model of random float32 weights on all processors; `experts`: their implementation."""
    import torch  # here: our own worker imports this module for `serve`, where there is no torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**config)).float()
    model.set_attn_implementation("sdpa")
    model.set_experts_implementation(experts)
    return model


def peer_steps(request: dict) -> tuple[Step, dict]:
    """The training step of transformers' model and what it is made of: dropless, no routing bias update, no MTP."""
    import torch
    import transformers

    model = peer_model(request["model"], "grouped_mm").train()
    rate = request["optimizer"]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=rate["learning_rate"],
        betas=(rate["beta1"], rate["beta2"]),
        eps=rate["epsilon"],
        weight_decay=rate["weight_decay"],
        fused=True,
    )

    def step(tokens_BS: np.ndarray) -> float:
        tokens = torch.from_numpy(tokens_BS.astype(np.int64))
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        loss = model(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), rate["clip_norm"])
        optimizer.step()
        return loss.item()

    return step, {
        "name": f"transformers {transformers.__version__}, torch {torch.__version__}: sdpa, grouped_mm, fused AdamW",
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def peer_generation(request: dict) -> tuple[Step, dict]:
    """One greedy `generate` of `new_tokens` tokens a prompt, that no end of text cuts short, and what it is made of."""
    import torch
    import transformers

    model = peer_model(request["model"] | {"eos_token_id": None}, request["experts"]).eval()
    cache = None if request["cache"] == "dynamic" else request["cache"]

    def step(tokens_BT: np.ndarray) -> float:
        tokens = torch.from_numpy(tokens_BT.astype(np.int64))
        with torch.inference_mode():
            longer = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, pad_token_id=0,
                                    max_new_tokens=request["new_tokens"], cache_implementation=cache)
        if longer.shape[1] != tokens.shape[1] + request["new_tokens"]:
            raise RuntimeError(f"generate made {longer.shape[1] - tokens.shape[1]} tokens")
        return float(longer[-1, -1])

    return step, {
        "name": f"transformers {transformers.__version__}, torch {torch.__version__}: generate, sdpa, "
                f"{request['experts']}, {request['cache']} cache",
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


if __name__ == "__main__":
    the_request = json.loads(sys.argv[1])
    make = peer_generation if "cache" in the_request else peer_steps
    serve(*make(the_request), the_request["tokens"])
