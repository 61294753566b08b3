"""Distillation from logits: a divergence between the next-token distributions of a teacher and of a student.

Letters besides the project's: k kept tokens of the teacher at each position, C classes that are compared.
"""

import jax
import jax.numpy as jnp

DIRECTIONS = ("forward", "reverse", "jensen_shannon")


def divergence(student_BTV, teacher_BTV, mask_BT, *, direction: str, beta: float, temperature: float):
    """Mean nats over the masked positions of two arrays of logits, float32; 0 where none is masked.

    direction: `forward` is KL(teacher || student), which covers all that the teacher may say; `reverse` is
    KL(student || teacher), which keeps to what it would; `jensen_shannon` is between them (2306.13649 Eq. 1):
    beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student; divided by beta it
    tends to `forward` as beta falls to 0, by 1 - beta to `reverse` as it rises to 1. temperature: divides the logits
    of both; the result is multiplied by its square, so that gradients keep their size (Hinton et al. 2015). No gradient
    reaches the teacher.
    """
    student, teacher = (jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (student_BTV, teacher_BTV))
    return _mean(student, teacher, mask_BT, direction, beta) * temperature**2


def keep_top(teacher_BTV, k: int, temperature: float):
    """What is stored of a teacher: {`ids_BTk` int32, `logp_BTk`, `rest_BT`}, logarithms of probabilities, float32.

    The k likeliest tokens at this temperature, and how likely all others are together: -inf where k is V.
    """
    logp_BTV = jax.nn.log_softmax(teacher_BTV.astype(jnp.float32) / temperature)
    logp_BTk, ids_BTk = jax.lax.top_k(logp_BTV, k)
    return {"ids_BTk": ids_BTk.astype(jnp.int32), "logp_BTk": logp_BTk, "rest_BT": _rest(logp_BTV, ids_BTk)}


def divergence_from_top(student_BTV, kept, mask_BT, *, direction: str, beta: float, temperature: float):
    """As `divergence`, from what `keep_top` kept at the same temperature; all other tokens count as one class.

    Never more than the divergence of the whole distributions, equal at k = V, and zero where these are equal: unlike
    the divergence from a teacher that is renormalised over its k tokens, which pushes the student off the others.
    """
    logp_BTV = jax.nn.log_softmax(student_BTV.astype(jnp.float32) / temperature)
    picked_BTk = jnp.take_along_axis(logp_BTV, kept["ids_BTk"], axis=-1)
    student, teacher = picked_BTk, kept["logp_BTk"]
    if kept["ids_BTk"].shape[-1] < student_BTV.shape[-1]:
        student = jnp.concatenate([student, _rest(logp_BTV, kept["ids_BTk"])[..., None]], axis=-1)
        teacher = jnp.concatenate([teacher, kept["rest_BT"][..., None]], axis=-1)
    return _mean(student, teacher, mask_BT, direction, beta) * temperature**2


def _rest(logp_BTV, ids_BTk):
    """Logarithm of what the tokens besides these have together."""
    outside_BTV = jnp.put_along_axis(jnp.ones_like(logp_BTV, bool), ids_BTk, False, axis=-1, inplace=False)
    return jax.nn.logsumexp(logp_BTV, axis=-1, where=outside_BTV)


def _mean(student_BTC, teacher_BTC, mask_BT, direction: str, beta: float):
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r} is none of {', '.join(DIRECTIONS)}")
    teacher_BTC = jax.lax.stop_gradient(teacher_BTC)
    if direction == "forward":
        nats_BT = _relative_entropy(teacher_BTC, student_BTC)
    elif direction == "reverse":
        nats_BT = _relative_entropy(student_BTC, teacher_BTC)
    else:
        mixture_BTC = jnp.logaddexp(jnp.log(beta) + teacher_BTC, jnp.log1p(-beta) + student_BTC)
        nats_BT = (beta * _relative_entropy(teacher_BTC, mixture_BTC)
                   + (1 - beta) * _relative_entropy(student_BTC, mixture_BTC))
    return jnp.sum(jnp.where(mask_BT, nats_BT, 0)) / jnp.maximum(jnp.sum(mask_BT), 1)


def _relative_entropy(p_BTC, q_BTC):
    """KL(p || q) of each position, of logarithms of probabilities."""
    possible = p_BTC > -jnp.inf  # what p never says costs nothing, and 0 * inf would be NaN
    ratio = jnp.where(possible, p_BTC, 0) - jnp.where(possible, q_BTC, 0)
    return jnp.sum(jnp.exp(p_BTC) * ratio, axis=-1)
