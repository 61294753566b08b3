"""Hugging Face folders: parity with transformers, what a config.json may say, and strict reading of the tensors."""

import json
import logging
import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from ml_collections import FrozenConfigDict
from safetensors.numpy import load_file, save_file

from experiments import base
from research import config
from research.errors import RequestError
from research.interop.huggingface import is_huggingface, read_settings
from research.interop.scoring import logits
from research.interop.variables import read_whole, stored_variables
from research.model.attention import MultiHeadLatentAttention
from research.model.build import make_model, variable_shapes
from research.tree import map_paths, paths

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = ("deepseek_v2_tiny", "deepseek_v3_tiny", "deepseek_v3_tiny_fp8", "deepseek_v3_tiny_mtp", "llama3_tiny",
           "qwen2_tiny")
V3 = "deepseek_v3_tiny"
Q_A = "model.layers.1.self_attn.q_a_proj.weight"


def read_variables(folder, settings):
    return read_whole(folder, stored_variables(folder, settings))


@cache
def read(name):
    settings = read_settings(GOLDEN / name)
    return settings, read_variables(GOLDEN / name, settings), dict(np.load(GOLDEN / name / "golden.npz"))


def copy(name, to, change=None, tensors=None):
    """A golden folder with other keys in its config.json (None: without the key) and other tensors."""
    to.mkdir(parents=True, exist_ok=True)
    raw = json.loads((GOLDEN / name / "config.json").read_text()) | (change or {})
    (to / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    if tensors is None:
        shutil.copy(GOLDEN / name / "model.safetensors", to)
    else:
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, to / "model.safetensors")
    return to


def weights(name):
    return load_file(GOLDEN / name / "model.safetensors")


def refused(folder, *expected):
    with pytest.raises(RequestError) as caught:
        read_variables(folder, read_settings(folder))
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    for part in expected:
        assert part in message
    return message


# Parity


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_are_those_of_transformers(name):
    settings, variables, golden = read(name)
    ours = logits(settings, variables, golden["input_ids"])
    np.testing.assert_allclose(ours["logits"], golden["logits"], rtol=0, atol=5e-5)
    assert ("mtp_logits" in ours) == ("mtp_logits" in golden)
    if "mtp_logits" in golden:
        assert settings.mtp.hidden == "after_norm"
        np.testing.assert_allclose(ours["mtp_logits"], golden["mtp_logits"][None], rtol=0, atol=5e-5)


def test_multi_token_logits_from_the_output_before_the_norm():
    settings, variables, golden = read("deepseek_v3_tiny_mtp")
    settings = replace(settings, mtp=FrozenConfigDict(dict(settings.mtp) | {"hidden": "before_norm"}))
    ours = logits(settings, variables, golden["input_ids"])["mtp_logits"]
    np.testing.assert_allclose(ours, golden["mtp_logits_pre_norm"][None], rtol=0, atol=5e-5)


def test_latent_norms_have_an_epsilon_of_their_own():
    """transformers and DeepSeek's own code give rms_norm_eps to every norm but the two of the latents."""
    settings, variables, _ = read(V3)
    weights = jax.tree.map(lambda leaf: leaf[0], variables["params"]["layers"]["attention"])
    x_BTD = np.random.default_rng(0).normal(size=(1, 8, settings.model.hidden_size)).astype(np.float32)
    inputs = (x_BTD, jnp.ones((1, 8), jnp.int32), jnp.arange(8)[None])
    products = make_model(settings).products
    small, large = (MultiHeadLatentAttention(FrozenConfigDict(dict(settings.model) | {"rms_norm_eps": eps}), products)
                    .apply({"params": weights}, *inputs) for eps in (1e-6, 1.0))
    np.testing.assert_array_equal(small, large)


# config.json


@pytest.mark.parametrize("name", ("deepseek_v2_tiny", V3, "llama3_tiny"))
@pytest.mark.parametrize("kind", ("type", "rope_type"))
def test_both_spellings_of_the_rope_settings_are_equal(name, kind, tmp_path):
    rope = json.loads((GOLDEN / name / "config.json").read_text())["rope_parameters"]
    theta, scaling = rope.pop("rope_theta"), {kind: rope.pop("rope_type")} | rope
    old = {"rope_parameters": None, "rope_theta": theta, "rope_scaling": scaling if rope else None}
    assert read_settings(copy(name, tmp_path, old)) == read(name)[0]


@pytest.mark.parametrize("name, keys", [
    ("deepseek_v3_tiny", ("norm_topk_prob", "tie_word_embeddings", "rms_norm_eps", "hidden_act", "initializer_range",
                          "rope_parameters", "num_nextn_predict_layers", "attention_bias", "rope_interleave")),
    ("deepseek_v2_tiny", ("scoring_func", "norm_topk_prob", "tie_word_embeddings")),
    ("llama3_tiny", ("head_dim", "attention_bias", "mlp_bias")),
    ("qwen2_tiny", ("use_sliding_window", "layer_types", "rope_parameters")),
])
def test_absent_keys_take_the_defaults_of_the_classes(name, keys, tmp_path):
    assert read_settings(copy(name, tmp_path, dict.fromkeys(keys))) == read(name)[0]


def test_what_the_families_mean():
    v2, v3, llama, qwen = (read(name)[0].model for name in ("deepseek_v2_tiny", V3, "llama3_tiny", "qwen2_tiny"))
    assert (v3.attention, v3.scoring_func, v3.topk_method, v3.norm_topk_prob) == ("mla", "sigmoid", "noaux_tc", True)
    assert (v2.scoring_func, v2.topk_method, v2.norm_topk_prob) == ("softmax", "group_limited_greedy", False)
    assert (qwen.attention, qwen.attention_bias, qwen.head_dim, qwen.tie_word_embeddings) == ("gqa", True, 16, True)
    assert (llama.attention, llama.attention_bias, llama.rope_scaling.type) == ("gqa", False, "llama3")
    assert v2.rope_scaling.mscale_all_dim == 0.707 and v2.vocab_size == 384


def test_ungrouped_v2_without_query_compression(tmp_path):
    model = read_settings(copy("deepseek_v2_tiny", tmp_path, {"topk_method": None, "n_group": None,
                                                              "topk_group": None})).model
    assert (model.topk_method, model.n_group, model.topk_group) == ("greedy", 1, 1)
    raw = json.loads((tmp_path / "config.json").read_text()) | {"q_lora_rank": None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_settings(tmp_path).model.q_lora_rank is None


def test_yarn_without_multipliers(tmp_path):
    """All of the factor is in cos and sin, as transformers has it for Qwen2 and for DeepSeek-V3."""
    rope = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    for name in ("qwen2_tiny", V3):
        scaling = read_settings(copy(name, tmp_path / name, {"rope_parameters": rope})).model.rope_scaling
        assert (scaling.mscale, scaling.mscale_all_dim, scaling.beta_fast) == (1.0, 0.0, 32.0)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("name, change, expected", [
    (V3, {"model_type": "mixtral"}, ("model_type='mixtral'", "deepseek_v3")),
    (V3, {"model_type": None}, ("model_type=None",)),
    (V3, {"model_type": ["llama"]}, ("model_type=['llama']",)),
    (V3, {"hidden_act": "gelu"}, ("hidden_act='gelu'", "'silu'")),
    (V3, {"hidden_size": None, "kv_lora_rank": None}, ("lacks hidden_size, kv_lora_rank",)),
    (V3, {"hidden_size": "64"}, ("hidden_size='64'", "whole number")),
    (V3, {"vocab_size": 2**40}, (f"vocab_size={2**40}", "at most")),
    (V3, {"num_hidden_layers": 10**9}, ("num_hidden_layers=1000000000", "tensors")),
    (V3, {"n_routed_experts": 10**9}, ("n_routed_experts=1000000000", "tensors")),
    (V3, {"num_nextn_predict_layers": -1}, ("num_nextn_predict_layers=-1",)),
    (V3, {"n_group": 3}, ("n_group=3", "n_routed_experts=8")),
    (V3, {"scoring_func": "tanh"}, ("scoring_func='tanh'", "sigmoid")),
    (V3, {"moe_layer_freq": 2}, ("moe_layer_freq=2",)),
    (V3, {"rope_interleave": False}, ("rope_interleave=False",)),
    (V3, {"attention_bias": True}, ("attention_bias=True",)),
    (V3, {"qk_rope_head_dim": 7}, ("qk_rope_head_dim=7", "even")),
    (V3, {"rms_norm_eps": float("nan")}, ("rms_norm_eps=nan",)),
    (V3, {"rope_parameters": [1]}, ("rope_parameters=[1]", "object")),
    (V3, {"rope_scaling": YARN}, ("rope_parameters and rope_scaling",)),
    (V3, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, ("rope_type='linear'", "yarn")),
    (V3, {"rope_parameters": {"rope_type": "yarn"}}, ("lacks rope_parameters.factor",)),
    (V3, {"rope_parameters": YARN | {"mscale": 0.7}}, ("mscale=0.7", "together")),
    (V3, {"rope_parameters": YARN | {"attention_factor": 1.5}}, ("attention_factor=1.5",)),
    (V3, {"rope_parameters": YARN | {"factor": "4"}}, ("factor='4'", "number")),
    (V3, {"rope_parameters": YARN | {"beta_fast": 10**400}}, ("beta_fast",)),
    (V3, {"rope_parameters": {"rope_theta": 1}}, ("rope_theta=1", "above 1")),
    ("deepseek_v2_tiny", {"norm_topk_prob": True}, ("norm_topk_prob=True",)),
    ("qwen2_tiny", {"use_sliding_window": True}, ("use_sliding_window=True",)),
    ("qwen2_tiny", {"layer_types": ["sliding_attention"] * 2}, ("layer_types",)),
    ("qwen2_tiny", {"num_attention_heads": 5}, ("num_attention_heads=5", "hidden_size=64")),
    ("qwen2_tiny", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}, ("mscale",)),
    ("llama3_tiny", {"mlp_bias": True}, ("mlp_bias=True",)),
])
def test_a_wrong_config_is_refused_by_name(name, change, expected, tmp_path):
    assert "config.json" in refused(copy(name, tmp_path, change), *expected)


@pytest.mark.parametrize("text, expected", [
    ("", "not JSON"), ("{", "not JSON"), ("[1]", "JSON object"), ("[" * 100_000, "not JSON"),
    ('{"model_type": "llama", "model_type": "qwen2"}', "twice"), ("{}", "model_type=None")])
def test_a_config_that_is_no_config_is_refused(text, expected, tmp_path):
    copy(V3, tmp_path)
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, "config.json", expected)


def test_a_folder_without_a_config_or_with_pickles_only(tmp_path):
    (copy(V3, tmp_path / "a") / "config.json").unlink()
    refused(tmp_path / "a", "config.json does not exist")
    (copy(V3, tmp_path / "b") / "model.safetensors").rename(tmp_path / "b" / "pytorch_model.bin")
    assert not is_huggingface(tmp_path / "b")
    refused(tmp_path / "b", "pytorch_model.bin", "pickle")
    refused(tmp_path / "c", "does not exist")


# Tensors


def in_their_names(variables, settings):
    """The tensors of a DeepSeek-V3 in the release's layout, written down apart from research/interop/names.py."""
    c, params, routing = settings.model, variables["params"], variables["routing"]
    out = {"model.embed_tokens.weight": params["embed_tokens"], "lm_head.weight": params["lm_head"].T,
           "model.norm.weight": params["norm"]["scale"]}

    def block(prefix, tree, bias):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"{prefix}.{norm}.weight"] = tree[norm]["scale"]
        for name, leaf in tree["attention"].items():
            out[f"{prefix}.self_attn.{name}.weight"] = leaf["scale"] if "scale" in leaf else leaf["kernel"].T
        mlp = tree["mlp"]
        if "gate" not in mlp:
            out.update({f"{prefix}.mlp.{name}.weight": leaf["kernel"].T for name, leaf in mlp.items()})
            return
        out[f"{prefix}.mlp.gate.weight"] = mlp["gate"]["kernel"].T
        out[f"{prefix}.mlp.gate.e_score_correction_bias"] = bias
        for name in ("gate_proj", "up_proj", "down_proj"):
            out[f"{prefix}.mlp.shared_experts.{name}.weight"] = mlp["shared_experts"][name]["kernel"].T
            for expert in range(c.n_routed_experts):
                out[f"{prefix}.mlp.experts.{expert}.{name}.weight"] = mlp[name][expert].T

    def layer(tree, i):
        return jax.tree.map(lambda leaf: leaf[i], tree)

    for i in range(c.num_hidden_layers):
        if i < c.first_k_dense_replace:
            block(f"model.layers.{i}", layer(params["dense_layers"], i), None)
        else:
            j = i - c.first_k_dense_replace
            block(f"model.layers.{i}", layer(params["layers"], j),
                  routing["layers"]["mlp"]["gate"]["e_score_correction_bias"][j])
    for depth in range(1, settings.mtp.num_nextn_predict_layers + 1):
        prefix, tree = f"model.layers.{c.num_hidden_layers + depth - 1}", params[f"mtp_{depth}"]
        block(prefix, tree["block"], routing[f"mtp_{depth}"]["block"]["mlp"]["gate"]["e_score_correction_bias"])
        out |= {f"{prefix}.enorm.weight": tree["enorm"]["scale"], f"{prefix}.hnorm.weight": tree["hnorm"]["scale"],
                f"{prefix}.eh_proj.weight": tree["eh_proj"]["kernel"].T,
                f"{prefix}.shared_head.norm.weight": tree["norm"]["scale"],
                f"{prefix}.embed_tokens.weight": params["embed_tokens"],
                f"{prefix}.shared_head.head.weight": params["lm_head"].T}
    return {name: np.ascontiguousarray(value) for name, value in out.items()}


@cache
def random_model():
    """A small V3 with two dense layers and two multi-token modules; every array random, bfloat16's values."""
    c = base.get_config()
    c.model.update(dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=5, q_lora_rank=12,
                        num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=8, qk_nope_head_dim=8,
                        qk_rope_head_dim=4, v_head_dim=8, first_k_dense_replace=2, n_routed_experts=6, n_group=3,
                        topk_group=2, num_experts_per_tok=2, n_shared_experts=2, moe_intermediate_size=16,
                        max_position_embeddings=64, initializer_range=0.02))
    c.mtp.num_nextn_predict_layers = 2
    c.data.sequence_length, c.data.validation_fraction = 64, 1.0
    settings = config.check(c)
    random = np.random.default_rng(0)
    shapes = variable_shapes(make_model(settings), settings)
    variables = map_paths(lambda _, leaf: random.normal(size=leaf.shape).astype(ml_dtypes.bfloat16)
                          .astype(np.float32), shapes)
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "q_lora_rank",
            "num_attention_heads", "num_key_value_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
            "v_head_dim", "first_k_dense_replace", "n_routed_experts", "n_group", "topk_group", "num_experts_per_tok",
            "n_shared_experts", "moe_intermediate_size", "max_position_embeddings", "routed_scaling_factor")
    raw = {key: settings.model[key] for key in keys} | {"model_type": "deepseek_v3", "num_nextn_predict_layers": 2}
    return settings, variables, raw


def write(folder, tensors, raw, shards=1):
    """A folder as transformers writes it: one file, or shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    place = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(place.values()):
        save_file({name: tensors[name] for name in tensors if place[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return folder


@pytest.mark.parametrize("dtype, shards", [(np.float32, 1), (ml_dtypes.bfloat16, 3)])
def test_every_array_comes_back(dtype, shards, tmp_path):
    settings, variables, raw = random_model()
    tensors = {name: value.astype(dtype) for name, value in in_their_names(variables, settings).items()}
    write(tmp_path, tensors, raw, shards)
    assert read_settings(tmp_path) == settings
    back = read_variables(tmp_path, settings)
    assert jax.tree.structure(back | {"amax": {}}) == jax.tree.structure(variables)
    for path, leaf in paths(back).items():
        assert leaf.dtype == np.float32, path
        np.testing.assert_array_equal(leaf, paths(variables)[path], err_msg=path)


def test_float16_and_computed_buffers(tmp_path):
    tensors = {name: value.astype(np.float16) for name, value in weights("qwen2_tiny").items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    folder = copy("qwen2_tiny", tmp_path, tensors=tensors)
    back = read_variables(folder, read_settings(folder))
    np.testing.assert_array_equal(back["params"]["embed_tokens"], tensors["model.embed_tokens.weight"])


def test_an_absent_multi_token_layer_is_warned_of_once(caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        settings = read_settings(GOLDEN / V3)
        read_variables(GOLDEN / V3, settings)
    assert settings.mtp.num_nextn_predict_layers == 0
    assert [("num_nextn_predict_layers=1" in record.getMessage()) for record in caplog.records] == [True]


def test_some_of_a_multi_token_layer_is_an_error_that_lists_the_rest(tmp_path):
    name = "deepseek_v3_tiny_mtp"
    tensors = weights(name)
    kept = "model.layers.3.enorm.weight"
    gone = [key for key in tensors if key.startswith("model.layers.3.") and key != kept]
    message = refused(copy(name, tmp_path, tensors={k: v for k, v in tensors.items() if k not in gone}),
                      f"{len(gone)} missing", *gone)
    assert kept not in message


def test_an_unannounced_multi_token_layer_is_left_over(tmp_path):
    refused(copy("deepseek_v3_tiny_mtp", tmp_path, {"num_nextn_predict_layers": None}),
            "left over", "model.layers.3.eh_proj.weight")


def test_one_error_lists_everything_that_is_wrong(tmp_path):
    tensors = weights(V3)
    tensors["model.layers.2.self_attn.o_proj.bias"] = np.zeros(64, np.float32)
    tensors["odd\nname"] = np.zeros(1, np.float32)
    tensors[Q_A] = tensors[Q_A].T
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64)
    gone = ("lm_head.weight", "model.layers.1.mlp.experts.7.up_proj.weight",
            "model.layers.2.mlp.gate.e_score_correction_bias")
    for name in gone:
        del tensors[name]
    refused(copy(V3, tmp_path, tensors=tensors), *gone, "3 missing", "2 left over", "o_proj.bias", r"odd\nname",
            f"{Q_A} is [64, 24] and must be [24, 64]", "model.norm.weight is F64")


@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
def test_values_that_are_not_finite_are_named(value, tmp_path):
    tensors = weights(V3)
    tensors[Q_A] = tensors[Q_A].copy()
    tensors[Q_A][3, 5] = value
    message = refused(copy(V3, tmp_path, tensors=tensors), "not finite", Q_A)
    assert len(re.findall(r"model\.layers", message)) == 1


@pytest.mark.parametrize("copied", ("embed_tokens", "shared_head.head"))
def test_a_copy_that_differs_from_its_original_is_refused(copied, tmp_path):
    name, tensors = f"model.layers.3.{copied}.weight", weights("deepseek_v3_tiny_mtp")
    tensors[name] = tensors[name] + 1e-3
    refused(copy("deepseek_v3_tiny_mtp", tmp_path, tensors=tensors), "different", name)


def test_a_tied_head_may_be_stored_and_must_then_be_the_embedding(tmp_path):
    tensors = weights("qwen2_tiny")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    folder = copy("qwen2_tiny", tmp_path / "same", tensors=tensors)
    read_variables(folder, read_settings(folder))
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 2
    refused(copy("qwen2_tiny", tmp_path / "other", tensors=tensors), "lm_head.weight", "different")
