"""The values of the run key `precision`: what the weights are kept in, and what matrices are multiplied in."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Precision:
    """One value; formats are `fp32`, `tf32`, `fp16`, `bf16`."""

    weights: str
    """Of the model's weights and of the gradients that come out of a backward pass."""
    products: str
    """Of the matrices that are multiplied: the weights' own, or what torch.autocast or the GPU makes of them."""

    @property
    def autocast(self) -> bool:
        """Whether torch.autocast computes: products and attention in 16 bits, norms, sums and the loss in fp32."""
        return self.products in ("fp16", "bf16") and self.weights == "fp32"

    @property
    def scaled(self) -> bool:
        """Whether the loss is scaled: gradients pass through fp16, whose range they leave."""
        return self.products == "fp16"

    @property
    def half_weights(self) -> bool:
        """Whether the model's weights are a 16-bit copy of fp32 masters."""
        return self.weights != "fp32"


PRECISIONS = {
    "fp32": Precision(weights="fp32", products="fp32"),
    "tf32": Precision(weights="fp32", products="tf32"),
    "fp16": Precision(weights="fp16", products="fp16"),
    "bf16": Precision(weights="bf16", products="bf16"),
    "fp16-autocast": Precision(weights="fp32", products="fp16"),
    "bf16-autocast": Precision(weights="fp32", products="bf16"),
}
"""By the run key's value."""


def of(name: str) -> Precision:
    """Return what a value of the run key stands for."""
    return PRECISIONS[name]
