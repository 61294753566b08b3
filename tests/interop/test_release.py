"""Our settings as the config.json of a release, and the plan of the largest."""

import json
import math
import re

import pytest

from research import config, experiment
from research.errors import RequestError
from research.interop import shards
from research.interop.huggingface import read_settings
from research.interop.names import SCALE
from research.interop.plan import plan, released
from research.interop.release import config_json
from research.interop.variables import arrays_of
from tests.interop.test_huggingface import FOLDERS, GOLDEN


def without(settings, group, **fields):
    values = json.loads(settings.to_json())
    values[group] |= fields
    return config.check(values)


@pytest.mark.parametrize("name, group, fields, expected", [
    ("deepseek_v3_tiny_fp8", "model", {"scoring_func": "softmax"}, "config.model.topk_method='noaux_tc' has no"),
    ("deepseek_v3_tiny_fp8", "model", {"bias_form": "multiplicative"}, "config.model.bias_form='multiplicative'"),
    ("deepseek_v3_tiny_fp8", "mtp", {"hidden": "before_norm"}, "config.mtp.hidden='before_norm' must be 'after_norm'"),
    ("deepseek_v3_tiny_fp8", "model", {"n_routed_experts": 0}, "config.model.n_routed_experts=0 has no released"),
    ("deepseek_v2_tiny", "mtp", {"num_nextn_predict_layers": 1}, "config.mtp.num_nextn_predict_layers=1 must be 0"),
    ("deepseek_v2_tiny", "model", {"norm_topk_prob": True}, "norm_topk_prob"),
    ("qwen2_tiny", "model", {"n_routed_experts": 4}, "config.model.n_routed_experts=4 has no released counterpart"),
])
def test_a_model_that_nobody_released(name, group, fields, expected):
    settings = without(read_settings(GOLDEN / name), group, **fields)
    with pytest.raises(RequestError) as caught:
        config_json(settings, "F32", False, None, None)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FOLDERS)
def test_config_json_has_the_keys_of_the_release(name):
    settings = read_settings(GOLDEN / name)
    theirs = json.loads((GOLDEN / name / "config.json").read_text())
    ours = config_json(settings, "BF16", "quantization_config" in theirs, 0, 1)
    for key in ours.keys() & theirs.keys() - {"rope_scaling", "torch_dtype", "bos_token_id", "eos_token_id"}:
        if key != "num_nextn_predict_layers" or name != "deepseek_v3_tiny":  # it announces what it does not hold
            assert ours[key] == theirs[key], key
    assert ours["architectures"] == theirs["architectures"] and ours["torch_dtype"] == "bfloat16"


def test_the_plan_of_the_release_counts_its_weights():
    """685B with the multi-token layer and its copies, as published, and 41.5M scales."""
    lines = plan(GOLDEN.parents[1] / "experiments" / "deepseek_v3.py", None, None).splitlines()
    assert lines[0].startswith("read: 91,991 tensors of 684,489,845,504 weights")
    read, written = (int(re.search(r"([\d,]+) bytes$", line)[1].replace(",", "")) for line in (lines[0], lines[2]))
    arrays = arrays_of(config.check(experiment.load("experiments/deepseek_v3.py")))
    scales = [entry for entry in shards.entries_of(arrays, released(arrays), {}) if entry.name.endswith(SCALE)]
    assert sum(math.prod(entry.shape) for entry in scales) == 41_540_496
    assert written == read - 2 * 129280 * 7168 * 2  # copies of the embedding and the head
    assert "at 1,000 MB/s: 11.5 minutes" in lines[5]
    share = [4 * weights for weights in (684_489_845_504 - 2 * 129280 * 7168, 59 * 256 * 3 * 7168 * 2048)]
    assert lines[-1].endswith(f"holds {(share[0] - share[1] * 255 / 256) / 1e9:.1f} GB in float32")


