"""A model trained on rows of T tokens finds sentences in 4 T of them: YaRN and two short phases (V3 §4.3, 2309.00071).

Question: how much of what is hidden in a long text is found by the model as it is, by the same weights under YaRN, and
after training on longer rows, with YaRN and without?
Command, for the whole table, or for one arm after another:
    python -m research.tables --table=yarn_needle --scale=cpu
    python -m research.main --config=experiments/yarn.py:micro:base --workdir=runs/yarn/base
    python -m research.main --config=experiments/yarn.py:micro:half --workdir=runs/yarn/half \
        --config.checkpoint.initialize_from=runs/yarn/base
As V3: phases of as many tokens a step as before, in rows of 2 T and 4 T (there 8 T and 32 T), the learning rate that
training ended with, biases as they stand, and a factor a quarter above what it is for (there 160K over 4K for 128K).
Ours: an eighth of the training's steps a phase (V3: 0.4%); every row of every phase is text with needles in it, whose
values at the row's end are the only targets: a model that retrieves, and does not continue text.
Cost: not yet measured. Result: not yet run.
"""

from experiments import base, nano

# the arm whose weights an arm starts from
STARTS = {"untrained": "base", "half": "base", "extended": "half", "plain_half": "base", "plain": "plain_half"}


def get_config(arms: str = ""):
    c, arms = nano.sized(arms)
    c.mtp.num_nextn_predict_layers = 0  # what is asked of the main model
    c.data.sequence_length //= 2
    c.data.needle_rate = 1.0  # text as hay alone: among targets of text, answers are not learned in the time
    c.data.validation_fraction = 0.01
    c.training.batch_size = 32
    T, rows, steps = c.data.sequence_length, c.training.batch_size, c.training.steps
    c.model.max_position_embeddings = max(c.model.max_position_embeddings, 4 * T)
    # in V3's proportions: rotary waves beside T, first weights by the width, a third of a head rotary, about
    c.model.rope_theta = 10000.0 * T / 4096
    c.model.initializer_range = 0.006 * (7168 / c.model.hidden_size) ** 0.5
    c.model.qk_rope_head_dim *= 2
    yarn = {"model.rope_scaling.type": "yarn", "model.rope_scaling.factor": 5.0,
            "model.rope_scaling.original_max_position_embeddings": T}

    def phase(times: int) -> dict:
        return {"data.sequence_length": times * T, "training.batch_size": rows // times, "training.steps": steps // 8,
                "evaluation.batch_size": c.evaluation.batch_size // times,
                "optimizer.learning_rate": c.optimizer.learning_rate * c.optimizer.tail_final,
                "optimizer.warmup_fraction": 0.0, "optimizer.plateau_until": 1.0, "optimizer.cosine_until": 1.0,
                "optimizer.tail_from": 1.0, "optimizer.tail_final": 1.0, "optimizer.cosine_final": 1.0,
                "model.bias_update_speed": 0.0}

    return base.select(c, arms, {
        "base": {},
        "untrained": yarn,  # base's weights
        "half": yarn | phase(2),
        "extended": yarn | phase(4),
        "plain_half": phase(2),
        "plain": phase(4),
    })
