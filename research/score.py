"""Logits of a checkpoint, ours or Hugging Face's, for given token ids: `python -m research.score --checkpoint=DIR ...`.

--tokens: an .npz with `input_ids` (B, T), each row one document. --output: an .npz with `logits` (B, T, V) float32 and,
where the model predicts several tokens, `mtp_logits` (M, B, T-1, V): row i of depth 1 predicts token i + 2; the rows
of deeper ones that would predict past the end are NaN.
"""

from pathlib import Path

from absl import flags

from research import command
from research.errors import RequestError
from research.precision.recipe import RECIPES

FLAGS = flags.FlagValues()
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "a workdir, or a Hugging Face folder", FLAGS)
_TOKENS = flags.DEFINE_string("tokens", None, "an .npz file with input_ids (B, T)", FLAGS)
_OUTPUT = flags.DEFINE_string("output", None, "the .npz file to write", FLAGS)
_RECIPE = flags.DEFINE_string("recipe", None, f"the precision: {', '.join(RECIPES)}", FLAGS)


def main() -> None:
    for flag in (_CHECKPOINT, _TOKENS, _OUTPUT):
        if not flag.value:
            raise RequestError(f"--{flag.name} is required: {FLAGS[flag.name].help}")
    with command.stops_held():  # after the flags: JAX and the libraries around it take seconds to import
        from research.interop.scoring import score
    score(*(Path(flag.value).expanduser() for flag in (_CHECKPOINT, _TOKENS, _OUTPUT)), _RECIPE.value)


if __name__ == "__main__":
    command.run(main, FLAGS)
