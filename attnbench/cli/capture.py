"""`attnbench capture`."""

from pathlib import Path
from typing import Annotated

import typer

from attnbench.cli._options import DeviceOption, Json
from attnbench.cli._output import complain, emit_json


def capture(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A checkpoint, a folder with a config.json, transformers:NAME or timm:NAME."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder that receives a .safetensors a layer.")],
    data: Annotated[Path | None, typer.Option("--data", metavar="PATH", help="A text file, or a folder of images, for it to read.")] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Tokens of a text. Default: what the model allows, up to 512.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Examples.")] = 1,
    device: DeviceOption = None,
    json: Json = False,
) -> None:
    """Save q, k, v of every attention layer of a model on real inputs, for `--axis profile=file:PATH`; print the files."""
    from attnbench.capture import capture as captured
    from attnbench.capture import save
    from attnbench.environment import pick_device
    from attnbench.files import hold_folder
    from attnbench.pretrained import open_model

    hold_folder(out)
    opened = open_model(model, data=data, batch=batch, n=n, device=pick_device(device))
    layers = captured(opened.model, opened.run)
    paths = save(layers, out, opened.source)
    complain(f"{len(layers)} layers of {opened.source}")
    if any(layer.masked for layer in layers):
        complain("some layers had a mask or a bias that the files do not hold")
    if json:
        emit_json([{"path": str(path), **layer.facts()} for path, layer in zip(paths, layers, strict=True)])
    else:
        print("\n".join(map(str, paths)))
