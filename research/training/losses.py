"""Next-token and multi-token cross-entropy over packed rows."""

import jax
import jax.numpy as jnp

from research.model.mtp import shift_left


@jax.custom_vjp
def cross_entropy(logits_BTV, targets_BT):
    """-log softmax(logits)[target] of each position, nats. Returns float32 (B, T).

    By hand because the transpose of picking the target is a scatter into a whole array of zeros.
    """
    return _forward(logits_BTV, targets_BT)[0]


def _forward(logits_BTV, targets_BT):
    lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return lse_BT - picked_BT, (logits_BTV, targets_BT, lse_BT)


def _backward(residuals, d_BT):
    logits_BTV, targets_BT, lse_BT = residuals
    target_BTV = jnp.arange(logits_BTV.shape[-1])[None, None] == targets_BT[..., None]
    return (jnp.exp(logits_BTV - lse_BT[..., None]) - target_BTV) * d_BT[..., None], None


cross_entropy.defvjp(_forward, _backward)


def mtp_targets(batch, k: int):
    """Targets of depth k and where they count: position i predicts token i + k + 1 from tokens up to i + k.

    batch: as `data.packing` makes it. A target counts where the tokens i, i + k and i + k + 1 are of
    one document (documents are contiguous, so all between are too). Returns (targets_BT, mask_BT).
    """
    same_BT = shift_left(batch["segments_BT"], k) == batch["segments_BT"]
    return shift_left(batch["targets_BT"], k), same_BT & shift_left(batch["mask_BT"], k) & batch["mask_BT"]


def token_losses(logits, batch):
    """Summed cross-entropy of the main head and of each depth: (sum, (M,) sums), nats, float32.

    logits: (B, T, V) of the main head and each depth in turn, of several of them in one array behind one another.
    """
    B, T = batch["targets_BT"].shape
    sums = []
    for logits_BXV in logits:
        depths = range(len(sums), len(sums) + logits_BXV.shape[1] // T)
        targets_BX, mask_BX = (jnp.concatenate(parts, axis=1) for parts in zip(
            *(mtp_targets(batch, k) for k in depths), strict=True))
        nats_BX = jnp.where(mask_BX, cross_entropy(logits_BXV, targets_BX), 0)
        sums.extend(jnp.sum(nats_BX.reshape(B, -1, T), axis=(0, 2)))
    # no depths: an array made of no values ends XLA's compiler with a fault where stages alone are split (JAX 0.11.2)
    return sums[0], jnp.stack(sums[1:]) if sums[1:] else jnp.zeros(0, jnp.float32)
