"""Continuations of held-out text, for people to read."""

from pathlib import Path

from research.decoding.generate import Decoder
from research.decoding.sampling import Sampling
from research.files import write_whole


def write(model, state, corpus, settings, path: Path) -> None:
    """Writes `evaluation.samples` continuations of the starts of held-out documents as Markdown."""
    e, tokenizer = settings.evaluation, corpus.tokenizer
    width = min(e.sample_tokens, settings.data.sequence_length // 2)
    starts, names = [], []
    for number, document in enumerate(corpus.validation_documents):
        tokens = corpus.validation.flat[corpus.validation.offsets[number]:corpus.validation.offsets[number + 1]]
        if len(tokens) >= width and len(starts) < e.samples:
            starts.append([tokenizer.bos_id, *tokens[: width - 1].tolist()])
            names.append(document.name)
    if not starts:
        return
    params = state["params"] if state["ema"] is None else state["ema"]
    variables = {"params": params, "routing": state["routing"]}
    sampling = Sampling(e.sample_temperature)
    new = Decoder(model, variables).generate(starts, width, sampling, seed=settings.training.seed,
                                             ends=[tokenizer.eos_id]).tokens
    text = [f"# Samples after step {int(state['step'])}, temperature {e.sample_temperature}\n"]
    for name, prompt, continuation in zip(names, starts, new, strict=True):
        text += [f"## {name}\n", "Given:\n", fenced(tokenizer.decode(prompt[1:])), "Written by the model:\n",
                 fenced(tokenizer.decode(continuation))]
    write_whole(path, "\n".join(text))


def fenced(text: str) -> str:
    """A Markdown block that the text's own back-quotes cannot end."""
    fence = "`" * max(3, 1 + max((len(run) for run in text.split() if set(run) == {"`"}), default=0))
    return f"{fence}\n{text}\n{fence}\n"
