"""Our settings as the config.json of a release: the reverse of `research.interop.huggingface`."""

from pathlib import Path

from research.errors import RequestError
from research.interop import blocks
from research.interop.huggingface import DEEPSEEK, MODELS, model_fields

CLASSES = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM", "qwen2": "Qwen2ForCausalLM",
           "llama": "LlamaForCausalLM"}
TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
GATES = {("sigmoid", "noaux_tc"): "deepseek_v3", ("softmax", "greedy"): "deepseek_v2",
         ("softmax", "group_limited_greedy"): "deepseek_v2"}  # what transformers' classes compute
ROPE = {"default": (), "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
        "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")}


def config_json(settings, dtype: str, fp8: bool, bos_id: int | None, eos_id: int | None) -> dict:
    """The keys of the release's own config.json.

    dtype: of most tensors that are not in FP8 blocks, in safetensors' words; fp8: whether some are. Raises
    RequestError, with field, value and expectation, for a model that no released family computes.
    """
    m, family = settings.model, _family(settings)
    keys = [key for key in MODELS[family] if not (key == "head_dim" and m.head_dim * m.num_attention_heads
                                                  == m.hidden_size and family == "qwen2")]
    raw = {"architectures": [CLASSES[family]], "model_type": family} | {key: m[key] for key in keys} | {
        "num_key_value_heads": m.num_attention_heads if m.attention == "mla" else m.num_key_value_heads,
        "hidden_act": "silu", "rope_theta": m.rope_theta, "rope_scaling": _rope_scaling(m.rope_scaling),
        "bos_token_id": bos_id, "eos_token_id": eos_id, "torch_dtype": TORCH[dtype], "use_cache": True}
    if family == "deepseek_v3":
        raw |= {"moe_layer_freq": 1, "num_nextn_predict_layers": settings.mtp.num_nextn_predict_layers}
    if MODELS[family].keys() >= DEEPSEEK.keys() or family == "llama":
        raw["attention_bias"] = False
    if fp8:
        raw["quantization_config"] = dict(blocks.QUANTIZATION)
    _check(settings, raw, family)
    return raw


def _family(settings) -> str:
    m, depth = settings.model, settings.mtp.num_nextn_predict_layers
    if m.attention == "gqa":
        if m.n_routed_experts:
            raise RequestError.field("model.n_routed_experts", m.n_routed_experts,
                                     "has no released counterpart with config.model.attention='gqa': it must be 0")
        family = "qwen2" if m.attention_bias else "llama"
    elif not m.n_routed_experts:
        raise RequestError.field("model.n_routed_experts", 0,
                                 "has no released counterpart with config.model.attention='mla'")
    else:
        family = GATES.get((m.scoring_func, m.topk_method))
        if family is None:
            raise RequestError.field("model.topk_method", m.topk_method,
                                     f"has no released counterpart with config.model.scoring_func={m.scoring_func!r}")
    if m.topk_method == "noaux_tc" and m.n_routed_experts and m.bias_form != "additive":
        raise RequestError.field("model.bias_form", m.bias_form, "has no released counterpart: it must be 'additive'")
    if family == "deepseek_v2" and m.norm_topk_prob:
        raise RequestError.field("model.norm_topk_prob", True, "must be false for a deepseek_v2, whose implementations "
                                 "do not agree on it")
    if depth and family != "deepseek_v3":
        raise RequestError.field("mtp.num_nextn_predict_layers", depth, f"must be 0 for a {family}")
    if depth and settings.mtp.hidden != "after_norm":
        raise RequestError.field("mtp.hidden", settings.mtp.hidden, "must be 'after_norm', as in the release")
    return family


def _rope_scaling(scaling) -> dict | None:
    if scaling.type == "default":
        return None
    spelled = {"rope_type" if scaling.type == "llama3" else "type": scaling.type}
    spelled |= {key: scaling[key] for key in ROPE[scaling.type]}
    if scaling.type == "yarn" and scaling.mscale_all_dim:
        spelled |= {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
    return spelled


def _check(settings, raw: dict, family: str) -> None:
    """Reads the keys back: whatever they do not say as the settings do has no counterpart."""
    read, _ = model_fields(Path("config.json"), raw, family)
    for name, value in read.items():
        given = settings.model[name]
        if name == "rope_scaling":
            keys = ("type", *ROPE[given.type], *(("mscale", "mscale_all_dim") if given.type == "yarn" else ()))
            given, value = ({key: scaling[key] for key in keys} for scaling in (given, value))
        if given != value and not (family in ("deepseek_v2", "deepseek_v3") and name == "num_key_value_heads"):
            raise RequestError.field(f"model.{name}", given, f"has no counterpart in a {family}, which has {value!r}")
