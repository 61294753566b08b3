"""The other side of `research.bench_narrow`: transformers' Qwen2 in bfloat16, torch on a CPU.

A script for the Python of the comparison's own environment that imports nothing of ours: see `bench_peer.py`.
Its weights are made in bfloat16, in place, so that its peak memory is that of its own weights.
"""

import json
import os
import sys
import time

PART = 4_194_301  # random numbers, then the same again: a prime, so that no two rows are equal


def made(config: dict):
    """transformers' model of random weights: gains 1, biases 0, all else N(0, 0.02)."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    settings = transformers.Qwen2Config(**config)
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(settings)
    model = model.to_empty(device="cpu").eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(settings)  # its table is no parameter
    drawn = torch.empty(PART).normal_(0, 0.02)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1 if name.endswith("norm.weight") else 0)
            else:
                for part in parameter.view(-1).split(PART):
                    part.copy_(drawn[:len(part)])
    return model


def memory() -> dict:
    """Resident bytes of this process, now and at the most (Linux)."""
    with open("/proc/self/status") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return {"resident": int(fields["VmRSS"].split()[0]) * 1024, "peak": int(fields["VmHWM"].split()[0]) * 1024}


def serve(generate, about: dict, new_tokens: int) -> None:
    """A JSON line of `about`, then for each line of stdin a turn: seconds of 1 token and of all of them, and memory.

    generate: of a number of tokens.
    """
    generate(1)
    generate(new_tokens)
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        generate(1)
        first = time.perf_counter() - start
        start = time.perf_counter()
        generate(new_tokens)
        print(json.dumps({"first": first, "seconds": time.perf_counter() - start} | memory()), flush=True)


def main(request: dict) -> None:
    import torch
    import transformers

    model = made(request["model"])
    tokens = torch.tensor([request["prompt"]])

    def generate(number: int) -> None:
        with torch.inference_mode():
            longer = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, pad_token_id=0,
                                    eos_token_id=None, max_new_tokens=number)
        if longer.shape[1] != tokens.shape[1] + number:
            raise RuntimeError(f"generate made {longer.shape[1] - tokens.shape[1]} tokens")

    serve(generate, {"name": f"transformers {transformers.__version__}, torch {torch.__version__}, bfloat16",
                     "parameters": sum(parameter.numel() for parameter in model.parameters())}, request["new_tokens"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
