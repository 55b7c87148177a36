"""timm's vision transformer as a model that the trainer trains: its modules, its initialisation, a method in place of its attention."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from attnbench.errors import UserError
from attnbench.integrations.timm import swap_attention
from attnbench.nn import TinyTransformer

if TYPE_CHECKING:
    from attnbench.nn import Architecture

_CHANNELS = 3


class TimmTransformer(TinyTransformer):
    """`timm.models.VisionTransformer` of an architecture, read and trained as a `TinyTransformer` is: patches `[B, N, 3 P P]` to scores.

    DeiT-T and DeiT-S of `attnbench.integrations.timm.PRESETS` are those of `heads` 3 and 6, `dim` 64 each and 12 blocks: the same
    names and shapes of weights, with the classes of the task. Raises `UserError` for what timm has no model of, and where it is missing.
    """

    def __init__(self, architecture: Architecture) -> None:
        nn.Module.__init__(self)
        a = self.architecture = architecture
        side, patch = self._sizes()
        try:
            vit = import_module("timm.models.vision_transformer").VisionTransformer
        except ImportError as error:
            raise UserError(f"timm cannot be imported ({error}): pip install 'attnbench[timm]', or take model = vit") from None
        self.side, self.patch = side, patch
        sizes = {"embed_dim": a.dim, "depth": a.depth, "num_heads": a.heads, "num_classes": a.classes, "drop_path_rate": a.drop_path}
        self.model: Any = vit(img_size=side * patch, patch_size=patch, **sizes)
        swap_attention(self.model, a.method, **a.own_params)

    def _sizes(self) -> tuple[int, int]:
        """Patches of the image and pixels of a patch, a side."""
        a = self.architecture
        patch = round((a.features / _CHANNELS) ** 0.5)
        if a.grid is None or a.grid[0] != a.grid[1] or _CHANNELS * patch**2 != a.features:
            raise UserError("timm's model reads square images in patches of three colours: train it on the task images")
        if a.positions != "learned":
            raise UserError(f"timm's model learns its positions, it has none that are {a.positions}: set positions to learned")
        if a.short_conv:
            raise UserError("timm's model has no short convolution: set short_conv to 0")
        return a.grid[0], patch

    @property
    def operators(self) -> list[nn.Module]:
        """The method's module in each block."""
        return [block.attn.operator for block in self.model.blocks]

    def forward(self, inputs: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Class scores `[B, classes]`."""
        del positions, mask  # of tasks that are no images
        scores: Tensor = self.model(self.pixels(inputs))
        return scores

    def features(self, inputs: Tensor) -> Tensor:
        """`[B, 1 + N, C]` after the last norm."""
        out: Tensor = self.model.forward_features(self.pixels(inputs))
        return out

    def pixels(self, inputs: Tensor) -> Tensor:
        """Patches `[B, N, 3 P P]` as the images `[B, 3, S, S]` that they were cut from."""
        x = inputs.unflatten(2, (_CHANNELS, self.patch, self.patch)).unflatten(1, (self.side, self.side))
        images: Tensor = x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        return images
