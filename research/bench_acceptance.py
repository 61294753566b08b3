"""What drafting brings on a trained model: accepted drafts and seconds in the real loop; agreement beside them."""

import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from research.data.pipeline import load_corpus
from research.data.tokenizer import Tokenizer
from research.decoding.generate import Decoder, joined
from research.decoding.sampling import Sampling
from research.environment import pin_threads
from research.errors import RequestError
from research.interop.weights import read_weights, variables_of
from research.model.build import make_model
from research.training.samples import starts_of


class Request(NamedTuple):
    """What is measured. prompt, new: tokens; drafts: k goes from 0 to so many."""

    workdir: Path
    prompts: int
    prompt: int
    new: int
    drafts: int
    temperatures: tuple[float, ...]
    rounds: int


def load(workdir: Path):
    """(model, its variables, corpus, settings) of a workdir."""
    if not (workdir / "checkpoints").is_dir():
        raise RequestError(f"--checkpoint={str(workdir)!r} holds no checkpoints: name the workdir of a run")
    settings, saved = read_weights(workdir)
    corpus = load_corpus(settings, Tokenizer.load(workdir))
    settings = settings.with_vocabulary(corpus.tokenizer.vocab_size)
    model = make_model(settings)
    variables, wrong = variables_of(saved, model, settings)
    if wrong:
        raise RequestError(f"--checkpoint={str(workdir)!r} is of another model: {wrong}")
    return model, variables, corpus, settings


def held_out(corpus, number: int, prompt: int, new: int) -> list[list[int]]:
    """Starts of `number` held-out documents that fill a prompt, each with up to `new` of the tokens that follow."""
    _, texts = starts_of(corpus, number, prompt, new)
    if len(texts) < number:
        raise RequestError(f"--prompts={number} is more than the {len(texts)} held-out documents of {prompt} tokens")
    return texts


def agreement(model, variables, texts: list[list[int]], prompt: int) -> dict:
    """Teacher-forced: where the first module's likeliest token is the main model's, which has read one more token.

    Of the tokens of each text from the prompt's second successor on, the first that is ever drafted.
    """
    length = max(map(len, texts))
    tokens_BT, segments_BT = (np.zeros((len(texts), length), np.int32) for _ in range(2))
    for row, text in enumerate(texts):
        tokens_BT[row, :len(text)], segments_BT[row, :len(text)] = text, 1
    positions_BT = np.broadcast_to(np.arange(length, dtype=np.int32), tokens_BT.shape)

    @jax.jit
    def likeliest(variables, *inputs):
        logits, out = model.apply(variables, *inputs)
        return logits.argmax(-1), out["mtp_logits"][0].argmax(-1)

    main_BT, module_BT = map(np.asarray, likeliest(variables, tokens_BT, segments_BT, positions_BT))
    # module position i and main position i + 1 predict token i + 2
    counted = (positions_BT[:, :-2] + 2 > prompt) & (segments_BT[:, 2:] > 0)
    same = (module_BT[:, :-2] == main_BT[:, 1:-1]) & counted
    return {"share": float(same.sum() / max(counted.sum(), 1)), "positions": int(counted.sum())}


def one_round(decoder: Decoder, prompts, request: Request, temperature: float, k: int, seed: int, ends) -> dict:
    """All prompts, one after another. seconds: of whole calls, prompts' passes included, without compilation."""
    parts, start = [], time.perf_counter()
    for number, prompt in enumerate(prompts):
        parts.append(decoder.generate([prompt], request.new, Sampling(temperature), k, seed + number, ends))
    made = joined(parts)
    seconds = time.perf_counter() - start - made.compile_seconds
    return {"tokens": made.tokens, "tokens_per_second": sum(map(len, made.tokens)) / seconds,
            "acceptance": made.acceptance_rate, "tokens_per_step": made.tokens_per_step}


def measure_acceptance(request: Request) -> dict:
    """Prints a line for each temperature and number of drafts, and the two agreements."""
    model, variables, corpus, settings = load(request.workdir)
    M = settings.mtp.num_nextn_predict_layers
    if not M:
        raise RequestError(f"--checkpoint={str(request.workdir)!r} has no multi-token module to draft with")
    texts = held_out(corpus, request.prompts, request.prompt, request.new)
    prompts, ends = [text[:request.prompt] for text in texts], corpus.tokenizer.end_ids
    decoder = Decoder(model, variables)
    print(f"{request.workdir.name}: {M} multi-token module(s), {settings.precision.recipe}; {len(prompts)} held-out "
          f"documents, {request.prompt} tokens, then up to {request.new}, one at a time; {request.rounds} rounds in "
          "turn: median and range")
    print("accepted: share of steps in which the draft at each position stood, and all before it")
    print(f"{'temp':>4} {'k':>2} {'tokens/s':>9} {'range':>13} {'x plain':>8} {'range':>11} {'tokens/step':>11}"
          f" {'same text':>9}  accepted at 1, 2, ... (range)", flush=True)
    rows, plain = [], None
    for temperature in request.temperatures:
        of = partial(one_round, decoder, prompts, request, temperature, ends=ends)
        drafts = range(request.drafts + 1)
        for k in drafts:
            decoder.generate(prompts[:1], request.new, Sampling(temperature), k, ends=ends)  # compiles
        pin_threads()
        rounds = {k: [] for k in drafts}
        for turn in range(request.rounds):
            for k in drafts if turn % 2 == 0 else reversed(drafts):  # none is always the one that goes first
                rounds[k].append(of(k=k, seed=1000 * turn))
        if not temperature:
            plain = rounds[0][0]["tokens"]
        for k in drafts:
            rates = [one["tokens_per_second"] for one in rounds[k]]
            speedups = [rate / one["tokens_per_second"] for rate, one in zip(rates, rounds[0], strict=True)]
            accepted = np.array([one["acceptance"] for one in rounds[k]])
            steps = [one["tokens_per_step"] for one in rounds[k]]
            same = None if temperature else sum(a == b for a, b in zip(rounds[k][0]["tokens"], plain, strict=True))
            rows.append({"temperature": temperature, "k": k, "tokens_per_second": rates, "speedup": speedups,
                         "tokens_per_step": steps, "acceptance": accepted.tolist(), "same_as_plain": same,
                         "tokens": [sum(map(len, one["tokens"])) for one in rounds[k]]})
            shown = ", ".join(f"{np.median(a):.1%} ({min(a):.1%}-{max(a):.1%})" for a in accepted.T)
            print(f"{temperature:>4g} {k:>2} {np.median(rates):>9,.0f} {min(rates):>6,.0f}-{max(rates):<6,.0f} "
                  f"{np.median(speedups):>8.2f} {min(speedups):>5.2f}-{max(speedups):<5.2f} {np.median(steps):>11.3f} "
                  f"{'' if same is None else f'{same}/{len(prompts)}':>9}  {shown}".rstrip(), flush=True)
    if plain is None:
        plain = one_round(decoder, prompts, request, 0.0, 0, 0, ends)["tokens"]
    written = [prompt + tokens for prompt, tokens in zip(prompts, plain, strict=True)]
    forced = {"held_out_text": agreement(model, variables, texts, request.prompt),
              "own_greedy_text": agreement(model, variables, written, request.prompt)}
    for name, one in forced.items():
        print(f"teacher-forced agreement of the first module with the model, {name.replace('_', ' ')}: "
              f"{one['share']:.1%} of {one['positions']:,} positions")
    return {"prompts": len(prompts), "prompt": request.prompt, "new_tokens": request.new, "modules": M, "rows": rows,
            "teacher_forced_agreement": forced}
