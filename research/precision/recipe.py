"""Recipes: in which format each product of a linear layer is computed, as data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Formats of one training run. Every product accumulates in float32; weights are kept in float32."""

    name: str
    activations: str  # what one layer hands to the next, and what is kept for the backward pass
    forward: str  # operands of y = x w
    input_gradient: str  # operands of dx = dy w^T
    weight_gradient: str  # operands of dw = x^T dy

    @property
    def formats(self) -> tuple[str, str, str]:
        return self.forward, self.input_gradient, self.weight_gradient


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("float32", "float32", "float32", "float32", "float32"),
        Recipe("bfloat16", "bfloat16", "bfloat16", "bfloat16", "bfloat16"),
    )
}
