"""The products of the model in the formats of a recipe: all that `model/` knows of precision."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kernels import few_rows
from kernels.experts import experts
from kernels.weight_only import Narrow
from kernels.weight_only import product as narrow_product
from research.parallel.experts import over_mesh
from research.parallel.rules import looked_up, on_own_rows, over_heads, over_rows, placed
from research.precision.experts import swiglu
from research.precision.later import Later, put_off
from research.precision.matmul import linear, matmul
from research.precision.quantize import Packing
from research.precision.recipe import Format, Recipe
from research.tree import map_paths

FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


@partial(jax.checkpoint, prevent_cse=False)
def silu_product(g, u):
    """silu(g) * u, which keeps nothing but g and u for the backward pass."""
    return jax.nn.silu(g) * u


@dataclass(frozen=True)
class Products:
    """The products that a recipe quantises. Hashable: it is part of the model's definition.

    Embedding, gate, norms and the attention operators (scores, softmax, value product) never come here: they stay in
    the dtype of activations or in float32 in every recipe (V3 §3.3.1).
    """

    recipe: Recipe
    high_precision: tuple[str, ...] = ()  # projections in the dtype of activations, beside the recipe's own
    implementation: str = "auto"  # of quantised products: see kernels/choice.py
    experts_implementation: str = "auto"  # of float experts: see kernels/experts; `inference`: nothing has a gradient
    mesh: Mesh | None = None  # of the devices that share the model; None: one device
    expert_room: float | None = None  # on a device of the mesh: see `parallel.experts`
    redundant_experts: int = 0  # slots of routed experts beside one for each, in inference: see `parallel.placement`

    @property
    def dtype(self):
        """dtype of activations between layers."""
        return jnp.dtype(self.recipe.activations)

    @property
    def history(self) -> int:
        """How many steps delayed scaling looks back; 0: the recipe does not."""
        return Format.HISTORY if self.recipe.delayed else 0

    @property
    def _floats(self) -> tuple[str, str, str]:
        """Operand dtypes of the three products that are not quantised."""
        r = self.recipe
        return 3 * (r.activations,) if r.quantized else (r.forward.left, r.input_gradient.left, r.weight_gradient.left)

    @property
    def packings(self) -> tuple[Packing | None, Packing | None]:
        """How tokens, and gradients, travel to experts on other devices; None: in the dtype of activations."""
        if not (self.recipe.dispatched and self.quantizes(*FEED_FORWARD)):
            return None, None
        return (Packing(self.recipe.dispatch, self.implementation),
                Packing(self.recipe.dispatch_gradient, self.implementation))

    def quantizes(self, *names: str) -> bool:
        """Whether the recipe quantises the projections of these names; a feed-forward network's three go together."""
        return self.recipe.quantized and not set(names) & {*self.recipe.high_precision, *self.high_precision}

    def placed(self, x):
        """x (B, ...) where the mesh has it, see `parallel.rules`; x itself on one device."""
        return placed(self.mesh, x)

    def looked_up(self, embed_VD, tokens_BT):
        """x_BTD in the dtype of activations, see `parallel.rules`."""
        return looked_up(self.mesh, embed_VD, tokens_BT, self.dtype)

    def on_own_rows(self, function, x, *whole):
        """See `parallel.rules`."""
        return on_own_rows(self.mesh, function, x, *whole)

    def over_heads(self, function, *arrays):
        """See `parallel.rules`."""
        return over_heads(self.mesh, function, *arrays)

    def linear(self, x, w_DF, name: str, histories):
        """x (..., D) times w_DF, in the dtype of activations. name: the projection's; histories: of `matmul.linear`."""
        if not self.quantizes(name):
            return self._float_linear(x, w_DF)
        if isinstance(w_DF, Later):
            return put_off(partial(self.linear, name=name, histories=histories), x, w_DF)

        def compute(x_XD, w_DF, histories):
            return linear(x_XD, w_DF, histories, self.recipe, name == "o_proj", self.implementation)

        y_XF = over_rows(self.mesh, compute, x.reshape(-1, x.shape[-1]), w_DF, histories)
        return y_XF.reshape(*x.shape[:-1], w_DF.shape[1])

    def _float_linear(self, x, w_DF):
        if isinstance(w_DF, Later):
            return put_off(self._float_linear, x, w_DF)
        x_XD = x.reshape(-1, x.shape[-1])
        if isinstance(w_DF, Narrow):
            y_XF = narrow_product(x_XD, w_DF)
        elif self.experts_implementation == "inference":
            y_XF = few_rows.product(x_XD, w_DF)
        else:
            y_XF = matmul(x_XD, w_DF, self._floats)
        y_XF = y_XF.astype(self.dtype)
        return y_XF.reshape(*x.shape[:-1], w_DF.shape[1])

    def puts_off(self, path: str) -> bool:
        """Whether the gradient of the parameter at this path can wait: a projection's can.

        Those of embedding, head, norms and gate are not of the recipe's products; those of routed experts, and of an
        8-bit feed-forward network, share what they compute with the gradient of the input.
        """
        if not path.endswith("/kernel") or path.endswith("/gate/kernel"):
            return False
        return not (path.split("/")[-2] in FEED_FORWARD and self.quantizes(*FEED_FORWARD))

    def with_later(self, params, B: int, T: int):
        """The parameters with `Later` in place of those whose gradients can wait, for a pass of (B, T) positions."""
        def waiting(path, w):
            if not self.puts_off(path):
                return w
            return Later(w, *(jnp.zeros((*w.shape[:-2], B, T, width), self.dtype) for width in w.shape[-2:]))

        return map_paths(waiting, params)

    def weight_gradient(self, path: str, w, operands, at):
        """Of the parameter w at this path, alone or stacked by layers (L, D, F), as one pass has it.

        operands: x and dy, of several passes and, in a stack, of all layers (passes, L, B, T, ...); at: of which pass.
        """
        name = path.split("/")[-2]
        product = self._float_linear if name in FEED_FORWARD else partial(self.linear, name=name, histories={})

        def multiplied(w_DF, *place):
            x, dy = (operand[place] for operand in operands)
            return jax.vjp(lambda w_DF: product(x, w_DF), w_DF)[1](dy)[0]

        if w.ndim == 2:
            return multiplied(w, at)
        return jax.lax.map(lambda layer: multiplied(w[layer], at, layer), jnp.arange(w.shape[0]))

    def feed_forward(self, x, gate_DF, up_DF, down_FD, histories):
        """(silu(x gate) * (x up)) down for x (..., D), in the dtype of activations."""
        if self.quantizes(*FEED_FORWARD):
            def compute(x_XD, gate_DF, up_DF, down_FD, histories):
                return swiglu(x_XD, gate_DF, up_DF, down_FD, None, None, histories, self.recipe, self.implementation)

            x_XD = x.reshape(-1, x.shape[-1])
            return over_rows(self.mesh, compute, x_XD, gate_DF, up_DF, down_FD, histories).reshape(x.shape)
        hidden = silu_product(self._float_linear(x, gate_DF), self._float_linear(x, up_DF))
        return self._float_linear(hidden, down_FD)

    def experts(self, x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK, histories):
        """The routed experts, in the dtype of activations; see `kernels.experts.experts`."""
        if self.quantizes(*FEED_FORWARD):
            def compute(*operands, pairs=None):
                return swiglu(*operands, histories, self.recipe, self.implementation, pairs and pairs[1])
        else:
            def compute(*operands, pairs=None):
                return experts(*operands, formats=self._floats, implementation=self.experts_implementation,
                               pairs=pairs).astype(self.dtype)

        operands = x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK
        if self.mesh is None:
            return compute(*operands)
        return over_mesh(compute, self.mesh, self.expert_room, self.packings, *operands)
