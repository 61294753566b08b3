"""Hugging Face folders: their config.json as our settings.

Read are deepseek_v2, deepseek_v3, qwen2 and llama with float32, bfloat16 or float16 weights, or FP8 blocks. Where a key
is absent the default of transformers' class stands; what this model cannot express is refused by name.
"""

import re
from pathlib import Path

from absl import logging

from experiments import base
from research.config import Settings, check, flatten, nearest
from research.errors import RequestError
from research.interop import blocks
from research.interop.tensors import FP8, Tensor, list_tensors, read_json

REQUIRED = object()
COMMON = {key: REQUIRED for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                    "num_attention_heads", "max_position_embeddings")} | {
    "rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False}
DEEPSEEK = COMMON | {key: REQUIRED for key in (
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "first_k_dense_replace",
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "routed_scaling_factor")}
MODELS = {  # key: default
    "deepseek_v2": DEEPSEEK | {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False,
                               "n_group": None, "topk_group": None},
    "deepseek_v3": DEEPSEEK | {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True,
                               "n_group": REQUIRED, "topk_group": REQUIRED},
    "qwen2": COMMON | {"num_key_value_heads": REQUIRED, "head_dim": None},
    "llama": COMMON | {"num_key_value_heads": None, "head_dim": None},
}
FIXED = {  # key: its one value that this model expresses, also the default where the key is absent or null
    "hidden_act": "silu", "mlp_bias": False, "attention_bias": False, "use_sliding_window": False,
    "use_mrope": False, "moe_layer_freq": 1, "rope_interleave": True, "partial_rotary_factor": 1.0}
ROPE_TYPES = {  # type: {key: default}
    "default": {},
    "yarn": {"factor": REQUIRED, "original_max_position_embeddings": REQUIRED, "beta_fast": 32.0, "beta_slow": 1.0},
    "llama3": {key: REQUIRED for key in ("factor", "original_max_position_embeddings", "low_freq_factor",
                                         "high_freq_factor")},
}
COUNTS = ("vocab_size", "num_hidden_layers", "num_attention_heads", "hidden_size", "max_position_embeddings")
LARGEST = 2**31 - 1  # of any number: beyond it shapes and angles overflow


def is_huggingface(folder: Path) -> bool:
    """Whether a directory is a Hugging Face folder: it holds *.safetensors."""
    return any(Path(folder).glob("*.safetensors"))


def read_settings(folder: Path) -> Settings:
    """The settings of a folder's model, with `model.vocab_size` resolved and the rest of `experiments/base.py`.

    A multi-token module that is announced and wholly absent is left out, with one warning. Raises RequestError with
    file, key, value and expectation for what is missing, wrong or not supported.
    """
    folder = Path(folder)
    tensors, path = list_weights(folder), folder / "config.json"
    raw = read_json(path)
    _check_blocks(path, raw, tensors)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in MODELS:
        raise _wrong(path, "model_type", family, f"must be one of {', '.join(MODELS)}{nearest(str(family), MODELS)}")
    _check_fixed(path, raw, family)
    model, announced = model_fields(path, raw, family)
    if announced and not any(_layer(name) >= model["num_hidden_layers"] for name in tensors):
        logging.warning("%s announces num_nextn_predict_layers=%d and the weights hold none of it: the model is read "
                        "without multi-token prediction", path, announced)
        announced = 0
    check_counts(path, model, announced, len(tensors))
    config = base.get_config().to_dict()
    config["model"] |= model
    config["mtp"]["num_nextn_predict_layers"] = announced
    config["data"]["validation_fraction"] = 1.0  # nothing of what a user gives was trained on here
    config["data"]["sequence_length"] = min(config["data"]["sequence_length"], model["max_position_embeddings"])
    try:
        return check(config)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None


def list_weights(folder: Path) -> dict[str, Tensor]:
    """The folder's tensors without buffers that are computed anew."""
    if not is_huggingface(folder):
        pickled = sorted(path.name for suffix in ("bin", "pt", "pth") for path in folder.glob(f"*.{suffix}"))
        if pickled:
            raise RequestError(f"{folder} holds its weights as {pickled[0]} only: pickles are never loaded; "
                               "weights must be in *.safetensors")
        raise RequestError(f"{folder} " + ("holds neither checkpoints/ nor *.safetensors" if folder.is_dir()
                                           else "is not a directory" if folder.exists() else "does not exist"))
    return {name: tensor for name, tensor in list_tensors(folder).items()
            if not name.endswith(".rotary_emb.inv_freq")}


def model_fields(path: Path, raw: dict, family: str) -> tuple[dict, int]:
    """The fields of `config.model` that a config.json gives, and the number of multi-token modules it announces."""
    model, latent = _take(path, raw, MODELS[family]), family in ("deepseek_v2", "deepseek_v3")
    announced = _take(path, raw, {"num_nextn_predict_layers": 0})["num_nextn_predict_layers"] if latent else 0
    for key, value, least in (*((key, model[key], 1) for key in COUNTS), ("num_nextn_predict_layers", announced, 0)):
        if type(value) is not int or value < least:
            raise _wrong(path, key, value, f"must be a whole number, at least {least}")
    width, heads = model["hidden_size"], model["num_attention_heads"]
    if latent:
        absent = {"n_group": 1, "topk_group": 1, "n_routed_experts": 0, "n_shared_experts": 0}
        model |= {"attention": "mla", "num_key_value_heads": heads}
    else:
        if model["head_dim"] is None and width % heads:
            raise _wrong(path, "num_attention_heads", heads, f"does not divide hidden_size={width}; give head_dim")
        absent = {"head_dim": width // heads, "num_key_value_heads": heads}
        model |= {"attention": "gqa", "attention_bias": family == "qwen2", "n_routed_experts": 0}
    model |= {key: value for key, value in absent.items() if model[key] is None} | _rope(path, raw, latent)
    for key, value in flatten(model | {"num_nextn_predict_layers": announced}).items():
        if isinstance(value, int | float) and not value <= LARGEST:  # also NaN
            raise _wrong(path, key, value, f"must be at most {LARGEST}")
    return model, announced


def _layer(name: str) -> int:
    """The number of a tensor's layer; -1 for one of no layer."""
    match = re.match(r"model\.layers\.(\d{1,9})\.", name)
    return int(match[1]) if match else -1


def check_counts(path: Path, model, announced: int, tensors: int) -> None:
    """Refuses counts that the files cannot bear out, before anything is built of that many parts."""
    for key, value in (("num_hidden_layers", model["num_hidden_layers"]), ("num_nextn_predict_layers", announced),
                       ("n_routed_experts", model["n_routed_experts"])):
        if type(value) is not int or value > tensors:
            raise _wrong(path, key, value, f"must be a whole number, and the weights are only {tensors} tensors")


def _check_blocks(path: Path, raw: dict, tensors: dict[str, Tensor]) -> None:
    """Refuses FP8 weights that config.json does not announce."""
    announced, held = blocks.check_config(path, raw), sorted(n for n, tensor in tensors.items() if tensor.dtype == FP8)
    if held and not announced:
        raise RequestError(f"{path} lacks quantization_config, and {held[0]} and {len(held) - 1} other tensors "
                           f"are {FP8}")
    if announced and not held:
        logging.warning("%s announces FP8 blocks and no weight is %s: they are read as they are", path, FP8)


def _check_fixed(path: Path, raw: dict, family: str) -> None:
    for key, expected in FIXED.items():
        value = raw.get(key)
        if value is not None and value != expected and not (key == "attention_bias" and family == "qwen2"):
            raise _wrong(path, key, value, f"is not supported: it must be {expected!r}")
    layers = raw.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or any(kind != "full_attention" for kind in layers)):
        raise _wrong(path, "layer_types", layers, "is not supported: every layer must be 'full_attention'")
    if family == "deepseek_v2" and raw.get("norm_topk_prob"):
        raise _wrong(path, "norm_topk_prob", raw["norm_topk_prob"], "must be false for deepseek_v2, whose "
                     "implementations do not agree on it")


def _rope(path: Path, raw: dict, latent: bool) -> dict:
    """`rope_theta` and `rope_scaling` from either spelling."""
    spelled = {key: raw[key] for key in ("rope_parameters", "rope_scaling") if raw.get(key) is not None}
    for key, value in spelled.items():
        if not isinstance(value, dict):
            raise _wrong(path, key, value, "must be an object, or null")
    if len(spelled) == 2 and spelled["rope_parameters"] != spelled["rope_scaling"]:
        raise RequestError(f"{path}: rope_parameters and rope_scaling are both given and differ")
    key, given = next(iter(spelled.items()), ("rope_scaling", {}))
    kind = next((given[name] for name in ("rope_type", "type") if given.get(name) is not None), "default")
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise _wrong(path, f"{key}.rope_type", kind, f"must be one of {', '.join(ROPE_TYPES)}")
    for name, expected in (("attention_factor", None), ("truncate", True), ("partial_rotary_factor", 1.0)):
        if given.get(name) not in (None, expected):
            raise _wrong(path, f"{key}.{name}", given[name], f"is not supported: it must be {expected}, or absent")
    scaling = base.get_config().model.rope_scaling.to_dict() | _take(path, given, ROPE_TYPES[kind], f"{key}.")
    scaling["type"] = kind
    if kind == "yarn":
        scaling["mscale"], scaling["mscale_all_dim"] = _mscale(path, key, given, latent)
    theta = next((values["rope_theta"] for values in (given, raw) if values.get("rope_theta") is not None), 10000.0)
    if isinstance(theta, int | float) and theta <= 1:
        raise _wrong(path, "rope_theta", theta, "must be above 1")
    return {"rope_theta": theta, "rope_scaling": scaling}


def _mscale(path: Path, key: str, given: dict, latent: bool) -> tuple[float, float]:
    """YaRN's two multipliers. Without them all of the factor is in cos and sin, none in the softmax scale."""
    pair = tuple(given.get(name) or 0.0 for name in ("mscale", "mscale_all_dim"))
    if pair in ((0, 0), (1, 0)):
        return 1.0, 0.0
    if not latent:
        raise _wrong(path, f"{key}.mscale", list(pair), "must be absent without latent attention")
    if not all(pair):
        raise _wrong(path, f"{key}.mscale", pair[0], f"and mscale_all_dim={pair[1]} must come together: "
                     "implementations do not agree on one without the other")
    return pair


def _take(path: Path, raw: dict, keys: dict, prefix: str = "") -> dict:
    """The values of `keys`, their defaults where absent or null."""
    missing = [prefix + key for key, default in keys.items() if default is REQUIRED and key not in raw]
    if missing:
        raise RequestError(f"{path} lacks {', '.join(missing)}")
    return {key: raw[key] if default is REQUIRED or raw.get(key) is not None else default
            for key, default in keys.items()}


def _wrong(path: Path, key: str, value, expected: str) -> RequestError:
    return RequestError(f"{path}: {key}={value!r} {expected}")
