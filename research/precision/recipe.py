"""Recipes: in which format each operand of the three products of a linear layer is computed, as data.

Every operand is a matrix (rows, contraction); tiles are given in that order. Beside the papers' words: activations
"1x128" are tiles of 128 along D in the forward product and, "128x1", of 128 tokens in the weight gradient: of its
contraction both times, (1, 128) here.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Format:
    """An 8-bit (or 12-bit) operand: one float32 scale for each tile of it."""

    kind: str  # e4m3 | e5m2 | e5m6
    tile: tuple[int, int] | None  # rows x contraction; None: one scale for the whole tensor
    power_of_two: bool = False  # scales rounded up to powers of two
    delayed: bool = False  # scaled by the largest magnitude of the last HISTORY steps instead of its own

    HISTORY = 16


@dataclass(frozen=True)
class Product:
    """One product: its operands, each a Format or the name of a float dtype, and how it accumulates."""

    left: Format | str
    right: Format | str
    accumulation: str = "float32"  # float32: promoted every 128 of the contraction | hopper: never, about 14 bits


@dataclass(frozen=True)
class Recipe:
    """The formats of one training run. Weights are kept in float32, and so are their gradients."""

    name: str
    activations: str  # dtype that one layer hands to the next
    forward: Product  # y = x w: of x and w
    input_gradient: Product  # dx = dy w^T: of dy and w
    weight_gradient: Product  # dw = x^T dy: of x and dy
    dispatch: Format | None = None  # x on its way to routed experts (V3 §3.3.3); None: as in `forward`
    dispatch_gradient: Format | None = None  # dy on its way to them (V3 §3.3.3); None: as in `input_gradient`
    attention_output: Format | None = None  # what the projection after attention keeps of its input (V3 §3.3.3)
    swiglu: Format | None = None  # what is kept of SwiGLU's input; its output is computed again (V3 §3.3.3)
    dispatched: bool = False  # the weight gradients of routed experts read x and dy as they are dispatched
    requantize: bool = False  # the weight gradient reads the forward product's x, dequantised, instead of x itself
    high_precision: tuple[str, ...] = ("eh_proj",)  # projections in the dtype of activations, by name

    def __post_init__(self):
        for form in (self.dispatch, self.dispatch_gradient) if self.dispatched else ():
            if not (form and form.power_of_two and form.kind in ("e4m3", "e5m2") and form.tile and form.tile[0] == 1):
                raise ValueError(f"recipe {self.name}: what is dispatched must have 8 bits and tiles of one row, whose "
                                 f"scales are powers of two, not {form}")

    @property
    def quantized(self) -> bool:
        return isinstance(self.forward.left, Format)

    @property
    def delayed(self) -> bool:
        return self.quantized and self.forward.left.delayed


def _floats(name: str) -> Recipe:
    return Recipe(name, name, *3 * [Product(name, name)])


TILE = Format("e4m3", (1, 128))
BLOCK = Format("e4m3", (128, 128))
TILE_POW2, BLOCK_POW2 = replace(TILE, power_of_two=True), replace(BLOCK, power_of_two=True)
E5M6 = Format("e5m6", (1, 128), power_of_two=True)
MX = Format("e4m3", (1, 32), power_of_two=True)
TENSOR, TENSOR_GRADIENT = Format("e4m3", None), Format("e5m2", None)
DELAYED, DELAYED_GRADIENT = replace(TENSOR, delayed=True), replace(TENSOR_GRADIENT, delayed=True)

DEEPSEEK = Recipe(
    "fp8_deepseek", "bfloat16", Product(TILE, BLOCK), Product(TILE, BLOCK), Product(TILE, TILE),
    dispatch=TILE_POW2, dispatch_gradient=TILE_POW2, attention_output=E5M6, swiglu=TILE)


def _unpromoted(product: Product) -> Product:
    return replace(product, accumulation="hopper")


RECIPES = {
    recipe.name: recipe
    for recipe in (
        _floats("float32"),
        _floats("bfloat16"),
        DEEPSEEK,
        replace(DEEPSEEK, name="fp8_deepseek_pow2", forward=Product(TILE_POW2, BLOCK_POW2),
                input_gradient=Product(TILE_POW2, BLOCK_POW2), weight_gradient=Product(TILE_POW2, TILE_POW2),
                swiglu=TILE_POW2),
        replace(DEEPSEEK, name="fp8_blockwise_gradients", input_gradient=Product(BLOCK, BLOCK),  # V3 Appendix B.2
                dispatch_gradient=BLOCK),
        replace(DEEPSEEK, name="fp8_dispatched", dispatched=True),
        replace(DEEPSEEK, name="fp8_requantized", requantize=True),
        replace(DEEPSEEK, name="fp8_unpromoted", forward=_unpromoted(DEEPSEEK.forward),
                input_gradient=_unpromoted(DEEPSEEK.input_gradient),
                weight_gradient=_unpromoted(DEEPSEEK.weight_gradient)),
        Recipe("fp8_tensor", "bfloat16", Product(TENSOR, TENSOR), Product(TENSOR_GRADIENT, TENSOR),
               Product(TENSOR, TENSOR_GRADIENT), swiglu=TENSOR),
        Recipe("fp8_delayed", "bfloat16", Product(DELAYED, DELAYED), Product(DELAYED_GRADIENT, DELAYED),
               Product(DELAYED, DELAYED_GRADIENT), swiglu=TENSOR),
        Recipe("mxfp8", "bfloat16", Product(MX, MX), Product(MX, MX), Product(MX, MX), swiglu=MX),
    )
}
