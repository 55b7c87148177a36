"""What a picture's palette may not drop."""

import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from attnbench import figures
from attnbench.figures import _style


def test_pixels_keep_the_colours_of_all_families(tmp_path):
    """Beside the shades of a picture with many: a palette may drop what is rare."""
    figure = Figure(figsize=(7, 5))
    axes = figure.subplots()
    axes.imshow(np.linspace(0, 1, 400).reshape(20, 20), cmap="viridis")
    for i, colour in enumerate(_style.COLOURS.values()):
        axes.plot([2 * i], [-3], marker="o", markersize=4, color=colour)
    axes.set_ylim(20, -5)
    (path,) = figures.write(figure, pd.DataFrame(), tmp_path / "x", (".png",))
    seen = np.asarray(Image.open(path).convert("RGB"), dtype=int).reshape(-1, 3)
    for family, colour in _style.COLOURS.items():
        off = np.abs(seen - np.round(255 * np.array(to_rgb(colour)))).max(1).min()
        assert off <= 8, (family, off)
