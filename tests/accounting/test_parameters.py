"""DeepSeek-V3's published sizes, by shape evaluation."""

import resource

import jax
import numpy as np
import pytest

from experiments import deepseek_v3
from research import experiment
from research.accounting.parameters import count, shapes
from research.config import check
from tests import tiny


def test_deepseek_v3_to_the_last_digit_without_allocating():
    settings = check(deepseek_v3.get_config())
    before = len(jax.live_arrays()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counted = count(settings)
    assert counted["total"] == 671_026_419_200
    assert round(counted["active"] / 1e9, 3) == 37.552
    assert round(counted["active_without_embedding"] / 1e9, 3) == 36.626  # the sheet cuts 36.6255 and 35.6987 so
    assert round(counted["active_without_both"] / 1e9, 3) == 35.699
    assert counted["mtp"] == 11_610_068_224  # the checkpoint's without its copies of embedding and head
    assert sum(counted["by_part"].values()) == counted["total"]
    assert len(jax.live_arrays()) == before[0]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before[1] < 1e6  # kB


@pytest.mark.parametrize("argument, digits, total, active, without_embedding, without_both", [
    ("deepseek_v2", 3, 235.741, 21.376, 20.852, 20.327), ("deepseek_v2_lite", 3, 15.706, 2.661, 2.451, 2.242),
    ("moonlight", 3, 15.960, 2.915, 2.579, 2.244), ("deepseek_moe", 3, 16.376, 2.829, 2.619, 2.409),
    ("qwen2_5", 4, 1.5437, 1.5437, 1.3103, 1.3103), ("qwen2_5:math_1_5b", 4, 1.5437, 1.5437, 1.3103, 1.3103),
    ("r1_distill_qwen_1_5b", 4, 1.7771, 1.7771, 1.5437, 1.3103),
    ("r1_distill_qwen", 2, 7.62, 7.62, 7.07, 6.53), ("r1_distill_qwen:14b", 2, 14.77, 14.77, 13.99, 13.21),
    ("r1_distill_qwen:32b", 2, 32.76, 32.76, 31.99, 31.21), ("qwen2_5:72b", 2, 72.71, 72.71, 71.46, 70.21),
    ("r1_distill_llama", 4, 8.0303, 8.0303, 7.5049, 6.9796), ("r1_distill_llama:70b", 2, 70.55, 70.55, 69.50, 68.45),
    ("llama_3_1:405b", 2, 405.85, 405.85, 403.75, 401.65)])
def test_published_totals(argument, digits, total, active, without_embedding, without_both):
    """Billions, as the releases and papers print them."""
    file, _, arm = argument.partition(":")
    counted = count(check(experiment.load(f"experiments/{file}.py:{arm}")))
    assert [round(counted[name] / 1e9, digits) for name in (
        "total", "active", "active_without_embedding", "active_without_both")] == [
        total, active, without_embedding, without_both]


def test_parts_of_deepseek_v3():
    """Formulae of the paper, a part at a time: attention, dense feed-forward, expert, router, embedding."""
    sizes = {path: leaf.size for path, leaf in shapes(check(deepseek_v3.get_config())).items()}

    def under(prefix):
        return sum(size for path, size in sizes.items() if path.startswith(prefix))

    attention = 7168 * 1536 + 1536 * 128 * 192 + 1536 + 7168 * 576 + 512 + 512 * 128 * 256 + 128 * 128 * 7168
    assert under("dense_layers/attention/") == 3 * attention
    assert under("layers/attention/") == 58 * attention
    assert under("dense_layers/mlp/") == 3 * 3 * 7168 * 18432
    assert under("layers/mlp/") == 58 * (257 * 3 * 7168 * 2048 + 256 * 7168)
    assert sizes["embed_tokens"] == sizes["lm_head"] == 129280 * 7168
    assert under("mtp_1/block/attention/") == attention
    assert sizes["mtp_1/eh_proj/kernel"] == 2 * 7168 * 7168


def test_a_dense_tied_model():
    """Two layers of grouped attention with biases: counted by hand, all of it active."""
    s = tiny.settings(tiny.DENSE | {"model.attention_bias": True, "model.tie_word_embeddings": True})
    attention = 16 * 16 + 16 + 2 * (16 * 8 + 8) + 16 * 16
    total = 32 * 16 + 2 * (attention + 3 * 16 * 24 + 2 * 16) + 16
    counted = count(s)
    assert counted["total"] == counted["active"] == total
    assert counted["mtp"] == 0
    assert counted["active_without_embedding"] == counted["active_without_both"] == total - 32 * 16


def test_the_counts_are_those_of_real_arrays():
    s = tiny.settings()
    variables = tiny.model(s)[1]
    main = {k: v for k, v in variables["params"].items() if not k.startswith("mtp_")}
    biases = np.asarray(variables["routing"]["layers"]["mlp"]["gate"]["e_score_correction_bias"]).size
    counted = count(s)
    assert counted["total"] == sum(x.size for x in jax.tree.leaves(main)) + biases
    idle = sum(main["layers"]["mlp"][name].size for name in ("gate_proj", "up_proj", "down_proj")) * 6 // 8
    assert counted["active"] == counted["total"] - idle
