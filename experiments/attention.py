"""Kinds of attention at equal size: quality against the bytes that a cached token takes (V2 Tables 8 and 9).

Question: does latent attention keep the quality of one key and value head a query head, with how much less cache, and
what do groups of heads and a single one lose?
Command, for each arm and seed, or all of them with their table:
    python -m research.main --config=experiments/attention.py:micro:mqa --workdir=runs/attention/mqa-0
    python -m research.tables --table=v2_attention --scale=cpu
Equal size: what key and value heads save is given to query heads, 6 beside 2 and 7 beside 1 where there were 4 and 4;
latent attention has 2% less at these widths.
Cost: as mtp.py. Result: results/v2_attention.md (micro; larger ones not yet run).
"""

from experiments import base, nano


def get_config(arms: str = ""):
    c, arms = nano.sized(arms)
    heads = c.model.num_attention_heads
    grouped = {name: {"model.attention": "gqa", "model.num_key_value_heads": few, "model.head_dim": c.model.v_head_dim,
                      "model.num_attention_heads": 2 * heads - few}
               for name, few in (("mha", heads), ("gqa", heads // 2), ("mqa", 1))}
    return base.select(c, arms, {"mla": {}, **grouped})
