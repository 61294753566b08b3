"""Continues text: `python -m research.generate --checkpoint=DIR --prompt=TEXT [--speculative]`.

DIR is a workdir of ours or a Hugging Face folder. With --chat a prompt is what a user says, and goes through the
template that the checkpoint carries. The continuation of one prompt is streamed to stdout; those of
several (--prompt given again, or a line each of --prompts_file) come as JSON lines, {"prompt", "text", "tokens"}, batch
by batch. Statistics go to stderr.
"""

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from absl import flags

from research import command
from research.decoding.texts import STEPS_AT_ONCE, Growing
from research.errors import RequestError, nearest

FLAGS = flags.FlagValues()
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A workdir, or a Hugging Face folder.", FLAGS)
_PROMPTS = flags.DEFINE_multi_string(
    "prompt", [], "The text to continue; - reads all of stdin. Given more than once: a batch.", FLAGS)
_CHAT = flags.DEFINE_bool(
    "chat", False, "Prompts are messages of a user: put them through the checkpoint's chat template.", FLAGS)
_SYSTEM = flags.DEFINE_string("system", None, "With --chat, the system's message before each of them.", FLAGS)
_FILE = flags.DEFINE_string("prompts_file", None, "A text file with a prompt on each line, instead of --prompt.", FLAGS)
_BATCH = flags.DEFINE_integer("batch_size", 8, "Prompts that are decoded together.", flag_values=FLAGS)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 256, "New tokens of each prompt at the most.", flag_values=FLAGS)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.6, "0: always the likeliest token.", flag_values=FLAGS)
_TOP_P = flags.DEFINE_float(
    "top_p", 0.95, "Draw from the fewest tokens whose probabilities reach this. 1: all.", flag_values=FLAGS)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from so many likeliest tokens. 0: all.", flag_values=FLAGS)
_MIN_P = flags.DEFINE_float(
    "min_p", 0.0, "Draw from tokens at least so likely relative to the likeliest.", flag_values=FLAGS)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.", flag_values=FLAGS)
_STOP = flags.DEFINE_multi_string("stop", [], "End a continuation before this text. May be given again.", FLAGS)
_SPECULATIVE = flags.DEFINE_bool(
    "speculative", False, "Let the multi-token modules draft, and the model verify: the same text, faster.", FLAGS)
_DRAFTS = flags.DEFINE_integer(
    "draft_tokens", None, "Tokens drafted at a time with --speculative; by default one a module. More than there are "
    "modules: the last one again, on its own output.", flag_values=FLAGS)
_RECIPE = flags.DEFINE_string(
    "recipe", None, "float32 or bfloat16. By default a run's own (bfloat16 for FP8 ones), float32 for a Hugging Face "
    "folder.", FLAGS)
_WEIGHTS = flags.DEFINE_string(
    "weights", None, "How matrices are kept: int8 or int4, embedding and head too, or fp8_blocks, as DeepSeek-V3 is "
    "released. By default as --recipe.", FLAGS)
_CACHE = flags.DEFINE_string("cache_dtype", None, "float32, bfloat16 or fp8; by default as the recipe.", FLAGS)
_FIELDS = flags.DEFINE_multi_string(
    "config.", [], "--config.mesh.tensor=2 splits the model over devices, as in training; likewise data, fsdp, expert.",
    FLAGS)


def main() -> None:
    check_flags()
    prompts = read_prompts()
    decoder, tokenizer, first = load(Path(_CHECKPOINT.value).expanduser(), _RECIPE.value, _CACHE.value,
                                     _WEIGHTS.value, tuple(_FIELDS.value))
    drafts = 0
    if _SPECULATIVE.value:
        drafts = decoder.model.mtp.num_nextn_predict_layers if _DRAFTS.value is None else _DRAFTS.value
        if not decoder.model.mtp.num_nextn_predict_layers:
            raise RequestError(f"--speculative: {_CHECKPOINT.value} has no multi-token module to draft with")
    ids = [chat_ids(tokenizer, prompt) if _CHAT.value else first + tokenizer.encode(prompt).tolist()
           for prompt in prompts]
    from research.decoding.generate import check_request, joined
    from research.environment import pin_threads

    try:
        check_request(decoder.model, ids, _MAX_TOKENS.value, drafts)
    except ValueError as error:
        raise RequestError(f"--prompt: {error}") from None
    pin_threads()
    results = []
    for start in range(0, len(ids), _BATCH.value):
        batch = ids[start:start + _BATCH.value]
        writers = [Writer(tokenizer, sys.stdout.write if len(ids) == 1 else None) for _ in batch]
        results.append(decoder.generate(
            batch, _MAX_TOKENS.value, sampling(), drafts, _SEED.value, tokenizer.end_ids, STEPS_AT_ONCE,
            lambda rows, writers=writers: [writer(row) for writer, row in zip(writers, rows, strict=True)]))
        for prompt, writer, row in zip(prompts[start:], writers, results[-1].tokens, strict=False):
            text = writer.finish()
            if len(ids) > 1:
                print(json.dumps({"prompt": prompt, "text": text, "tokens": len(row)}, ensure_ascii=False))
        sys.stdout.flush()
    if len(ids) == 1:
        print()
    print(report(joined(results)), file=sys.stderr)


def chat_ids(tokenizer, prompt: str) -> list[int]:
    """Ids of a user's message, after --system's, up to where the model's answer begins."""
    from research.data.chat import prompt_ids

    system = [] if _SYSTEM.value is None else [{"role": "system", "content": _SYSTEM.value}]
    try:
        return prompt_ids(tokenizer, [*system, {"role": "user", "content": prompt}])
    except RequestError as error:
        raise RequestError(f"--chat: {error}") from None


class Writer:
    """The text of one row as it grows, written on as far as it is certain, and cut before the first --stop."""

    def __init__(self, tokenizer, write: Callable[[str], object] | None):
        self._row, self._write, self._written = Growing(tokenizer, _STOP.value), write, 0

    def __call__(self, tokens: list[int]) -> bool:
        """Takes all tokens so far; returns whether the row is to stop."""
        if not self._row.over:
            # a character may be cut between tokens, and the text may end in the beginning of a stop
            held = 0 if self._row(tokens) else max([len(stop) - 1 for stop in _STOP.value], default=0)
            self._show(len(self._row.text.rstrip("\ufffd")) - held)
        return self._row.over

    def finish(self) -> str:
        """Writes what was held back; the whole text."""
        self._show(len(self._row.text))
        return self._row.text

    def _show(self, end: int) -> None:
        if self._write and end > self._written:
            self._write(self._row.text[self._written:end])
            sys.stdout.flush()
            self._written = end


def check_flags() -> None:
    """RequestError for the first flag that cannot be meant."""
    from research.config import LARGEST
    from research.decoding.cache import STORAGE
    from research.decoding.forward import WEIGHTS
    from research.decoding.generate import MOST_DRAFTS

    if not _CHECKPOINT.value:
        raise RequestError("--checkpoint is required: a workdir, or a Hugging Face folder")
    if bool(_PROMPTS.value) == bool(_FILE.value):
        raise RequestError("one of --prompt and --prompts_file is required, not both")
    for flag in (_BATCH, _MAX_TOKENS, _DRAFTS):
        if flag.value is not None and flag.value < 1:
            raise RequestError(f"--{flag.name}={flag.value} must be at least 1")
    if _DRAFTS.value is not None and not _SPECULATIVE.value:
        raise RequestError(f"--draft_tokens={_DRAFTS.value} needs --speculative")
    if _DRAFTS.value is not None and _DRAFTS.value > MOST_DRAFTS:
        raise RequestError(f"--draft_tokens={_DRAFTS.value} must be at most {MOST_DRAFTS}")
    if not 0 <= _SEED.value <= LARGEST:
        raise RequestError(f"--seed={_SEED.value} must be from 0 to {LARGEST}")
    if _SYSTEM.value is not None and not _CHAT.value:
        raise RequestError("--system needs --chat")
    if "" in _STOP.value:
        raise RequestError("--stop='' would end every continuation before it begins")
    for flag in (_STOP, _SYSTEM):
        check_text(f"--{flag.name}", flag.value or "")
    for field in _FIELDS.value:
        if not field.startswith("mesh."):
            raise RequestError(f"--config.{field} is no field of config.mesh: those alone are changed here")
    if problem := sampling().problem():
        raise RequestError(f"--{problem}")
    for flag, known in ((_RECIPE, ("float32", "bfloat16")), (_CACHE, STORAGE), (_WEIGHTS, WEIGHTS)):
        if flag.value is not None and flag.value not in known:
            raise RequestError(f"--{flag.name}={flag.value!r} must be one of {', '.join(known)}"
                               f"{nearest(flag.value, known)}")


def check_text(name: str, parts: str | list[str]) -> None:
    """RequestError for other bytes of a command line or of stdin, which Python reads as lone surrogates."""
    try:
        "".join(parts).encode()
    except UnicodeEncodeError:
        raise RequestError(f"{name} is not UTF-8 text") from None


def sampling():
    from research.decoding.sampling import Sampling

    return Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _MIN_P.value)


def read_prompts() -> list[str]:
    """The texts to continue; none is empty."""
    name = "--prompt"
    try:
        prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in _PROMPTS.value]
    except UnicodeDecodeError:
        raise RequestError(f"{name} is not UTF-8 text") from None
    check_text(name, prompts)
    if _FILE.value:
        name = f"--prompts_file={_FILE.value!r}"
        try:
            text = Path(_FILE.value).expanduser().read_text("utf-8-sig")
            prompts = text.removesuffix("\n").split("\n") if text else []  # code has other ends of lines within a line
        except OSError as error:
            raise RequestError(f"{name} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise RequestError(f"{name} is not UTF-8 text") from None
        if not prompts:
            raise RequestError(f"{name} holds no prompt")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise RequestError(f"{name}: prompt {number} is empty")
    return prompts


def check_folder(folder: Path) -> None:
    """RequestError for a --checkpoint that is no folder."""
    if not folder.is_dir():
        raise RequestError(f"--checkpoint={str(folder)!r} is not a directory" if folder.exists() else
                           f"--checkpoint={str(folder)!r} does not exist")


def load(folder: Path, recipe: str | None, cache_dtype: str | None, weights: str | None = None,
         mesh: Sequence[str] = ()):
    """(Decoder, tokenizer, the ids that every text begins with) of a checkpoint; the names are the flags'. mesh: fields
    of the config."""
    check_folder(folder)
    from research.data.tokenizer import Tokenizer  # after the checks: JAX takes a second to import

    with command.stops_held():
        from research.decoding.generate import Decoder, check_mesh
        from research.interop.weights import checked_weights, weights_over
    tokenizer = Tokenizer.load(folder)
    if mesh:
        settings, model, variables = weights_over(folder, mesh, partial(check_mesh, weights=weights))
    else:
        settings, model, variables = checked_weights(folder, stored=True)
    if settings.model.vocab_size < tokenizer.vocab_size:
        raise RequestError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
                           f"{settings.model.vocab_size}")
    return Decoder(model, variables, recipe, cache_dtype, weights), tokenizer, tokenizer.start_ids


def report(result) -> str:
    """Lines of what was decoded, how fast, and what the drafts were worth."""
    lines = [f"{sum(map(len, result.tokens)):,} tokens; {result.tokens_per_second:,.0f} tokens/s after the first",
             f"time to first token {result.prefill_seconds * 1e3:,.0f} ms; compiled in {result.compile_seconds:.1f} s"]
    if result.accepted:
        rates = ", ".join(f"{rate:.1%}" for rate in result.acceptance_rate)
        lines.append(f"acceptance rate by draft position {rates}; {result.tokens_per_step:.2f} tokens a step")
    return "\n".join(lines)


def mesh_fields():
    """The config that has the fields which a flag may be meant for."""
    from ml_collections import ConfigDict

    from experiments import base

    return ConfigDict({"mesh": base.get_config().mesh})


if __name__ == "__main__":
    command.run(main, FLAGS, fields=mesh_fields)
