"""What a model costs, from its configuration alone: `python -m research.account --config=FILE [--format=text|json]`.

Parameters, FLOPs and cache bytes a token, memory of a device of the config's mesh, arithmetic intensity; with a GPU and
a utilisation, or a measured throughput, also hours and dollars. Nothing is allocated. Examples:

    python -m research.account --config=experiments/deepseek_v3.py --gpu=H800 --mfu=0.3894 --price_per_hour=2
    python -m research.account --config=experiments/nano.py --config.mesh.data=4 --format=json
"""

import json
import math

from absl import flags

from research import command
from research.errors import RequestError, nearest

FLAGS = flags.FlagValues()
_CONFIG = flags.DEFINE_string("config", None, "The experiment: FILE.py or FILE.py:arm.", FLAGS)
_FIELDS = flags.DEFINE_multi_string("config.", [], "--config.group.field=value changes a field; meshes too.", FLAGS)
_FORMAT = flags.DEFINE_enum("format", "text", ["text", "json"], "How it is printed.", FLAGS)
_GPU = flags.DEFINE_string(
    "gpu", None, "H20, H100, H200 or H800: memory is then that of a GPU, else of this machine's device.", FLAGS)


def _number(name: str, meaning: str):
    return flags.DEFINE_float(name, None, meaning, flag_values=FLAGS)


_PRICE = _number("price_per_hour", "Dollars of a GPU and hour.")
_MFU = _number("mfu", "Training's share of the GPU's bfloat16 peak, attention counted causal.")
_SPEED = _number("tokens_per_second", "Measured, of one GPU: the speed of training where there is no --mfu, and what a "
                 "million tokens of inference are priced at.")
_TOKENS = _number("tokens", "Of training; without it training.steps whole batches.")
BOUNDS = (  # flag, what it must be, whether it is
    (_PRICE, "at least 0", lambda x: x >= 0),
    (_MFU, "above 0 and at most 1", lambda x: 0 < x <= 1),
    (_SPEED, "above 0", lambda x: x > 0),
    (_TOKENS, "above 0", lambda x: x > 0),
)


def main() -> None:
    if not _CONFIG.value:
        raise RequestError("--config is missing: python -m research.account --config=experiments/FILE.py")
    for flag, expected, fits in BOUNDS:
        if flag.value is not None and not (math.isfinite(flag.value) and fits(flag.value)):
            raise RequestError(f"--{flag.name}={flag.value:g} must be {expected}")
    if _MFU.value is not None and _GPU.value is None:
        raise RequestError(f"--mfu={_MFU.value:g} needs --gpu, whose peak it is a share of")
    for flag in (_PRICE, _TOKENS):
        if flag.value is not None and _MFU.value is None and _SPEED.value is None:
            raise RequestError(f"--{flag.name}={flag.value:g} needs a speed: --gpu and --mfu, or --tokens_per_second")

    with command.stops_held():
        from research.accounting.cost import GPUS  # after the checks that need no JAX
        from research.accounting.request import settings_of
        from research.accounting.statement import Terms, account, text
        from research.environment import runnable

    if _GPU.value is not None and _GPU.value not in GPUS:
        raise RequestError(f"--gpu={_GPU.value!r} is none of {', '.join(GPUS)}{nearest(_GPU.value, GPUS)}")
    settings = settings_of(_CONFIG.value, _FIELDS.value)
    terms = Terms(_GPU.value, _PRICE.value, _MFU.value, _SPEED.value, _TOKENS.value)
    with runnable():
        found = account(settings, _CONFIG.value, terms)
    print(json.dumps(found, indent=2) if _FORMAT.value == "json" else text(found))


if __name__ == "__main__":
    command.run(main, FLAGS)
