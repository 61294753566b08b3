"""Continuations of held-out text, for people to read."""

from pathlib import Path

from absl import logging

from research.decoding.generate import Decoder, Generation, joined
from research.decoding.sampling import Sampling
from research.files import write_whole


def write(model, state, corpus, settings, path: Path) -> None:
    """Writes `evaluation.samples` continuations of the starts of held-out documents as Markdown."""
    e, tokenizer = settings.evaluation, corpus.tokenizer
    width = cut("sample_tokens", e.sample_tokens, settings.data.sequence_length // 2) if e.samples else 0
    names, starts = starts_of(corpus, e.samples, width)
    if not starts:
        return
    sampling = Sampling(e.sample_temperature)
    new = Decoder(model, weights_of(state)).generate(
        starts, width, sampling, seed=settings.training.seed, ends=tokenizer.end_ids).tokens
    text = [f"# Samples after step {int(state['step'])}, temperature {e.sample_temperature}\n"]
    for name, prompt, continuation in zip(names, starts, new, strict=True):
        text += [f"## {name}\n", "Given:\n", fenced(tokenizer.decode(prompt[1:])), "Written by the model:\n",
                 fenced(tokenizer.decode(continuation))]
    write_whole(path, "\n".join(text))


def weights_of(state) -> dict:
    """{`params`, `routing`} of a state: the average of the weights where there is one."""
    return {"params": state["params"] if state["ema"] is None else state["ema"], "routing": state["routing"]}


def starts_of(corpus, number: int, width: int, further: int = 0) -> tuple[list[str], list[list[int]]]:
    """Names and first `width` tokens, the beginning's included, of the first so many held-out documents that have them.

    further: up to so many of the tokens that follow come along.
    """
    starts, names = [], []
    for place, document in enumerate(corpus.validation_documents):
        tokens = corpus.validation.flat[corpus.validation.offsets[place]:corpus.validation.offsets[place + 1]]
        if len(tokens) >= width and len(starts) < number:
            starts.append([corpus.tokenizer.bos_id, *tokens[: width - 1 + further].tolist()])
            names.append(document.name)
    return names, starts


def time_decoding(model, state, corpus, settings) -> dict[str, Generation]:
    """Greedy continuations of held-out starts, one prompt after another: {`plain`, `drafted`: of all together}.

    `evaluation.decode_prompts` of `decode_tokens` tokens; `drafted` is absent without multi-token modules, both where
    there is no such start.
    """
    e, found = settings.evaluation, {}
    width = min(e.sample_tokens, settings.data.sequence_length // 2)
    _, starts = starts_of(corpus, e.decode_prompts, width)
    tokens = cut("decode_tokens", e.decode_tokens, settings.model.max_position_embeddings - width) if starts else 0
    decoder = Decoder(model, weights_of(state)) if starts else None
    for name, drafts in (("plain", 0), ("drafted", settings.mtp.num_nextn_predict_layers)):
        if decoder and (drafts or name == "plain"):
            found[name] = joined([decoder.generate([start], tokens, draft_tokens=drafts) for start in starts])
    return found


def cut(name: str, asked: int, room: int) -> int:
    """The number of tokens of a field of `evaluation`, or how many there is room for, with a warning."""
    if asked > room:
        logging.warning("config.evaluation.%s=%d is cut to the %d tokens that there is room for", name, asked, room)
    return min(asked, room)


def fenced(text: str) -> str:
    """A Markdown block that the text's own back-quotes cannot end."""
    fence = "`" * max(3, 1 + max((len(run) for run in text.split() if set(run) == {"`"}), default=0))
    return f"{fence}\n{text}\n{fence}\n"
