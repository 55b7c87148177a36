"""Trained models and real inputs for them, from checkpoints of attnbench and from the folders of transformers and timm."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attnbench import checkpoint
from attnbench.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from attnbench.nn import TinyTransformer
    from attnbench.tasks.trained import TrainedTask

LIBRARIES = ("transformers", "timm")
_N = 512
"""tokens of a text where the model allows as many and none are asked for"""


@dataclass(frozen=True)
class Opened:
    """A model and what runs it once on real inputs."""

    model: nn.Module
    run: Callable[[], object]
    source: str
    """what was opened and what it reads"""


def open_model(name: str, *, data: Path | None = None, batch: int = 1, n: int | None = None, device: str = "cpu") -> Opened:
    """A model by `CHECKPOINT.pt`, `FOLDER` with a config.json, `transformers:NAME` or `timm:NAME`, where NAME may be a folder too.

    Args:
        name: a checkpoint of attnbench reads the test split of the task that it was trained on.
        data: the text that a language model reads, or the folder of images that a vision model reads.
        batch: examples.
        n: tokens of a text, at most what the model allows, 512 where it allows as many; otherwise the model says how many.
        device: where it runs.

    Raises:
        UserError: where nothing is there, a package is missing, or the data do not suffice.
    """
    library, colon, rest = name.partition(":")
    if not (colon and library in LIBRARIES):
        path = Path(name)
        if path.is_file():
            return _checkpoint(path, data, batch, n, device)
        library, rest = _library(path), name
    return (_transformers if library == "transformers" else _timm)(rest, data, batch, n, device)


def _library(path: Path) -> str:
    """Whose folder it is, by its config.json."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is no checkpoint and no folder with a config.json: give one, or transformers:NAME or timm:NAME") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path / 'config.json'}: {error}") from None
    if "model_type" in config:
        return "transformers"
    if "architecture" in config:
        return "timm"
    raise UserError(f"{path / 'config.json'} names no model_type (transformers) and no architecture (timm)")


def open_checkpoint(path: Path, data: Path | None = None) -> tuple[TinyTransformer, TrainedTask]:
    """The model of a checkpoint that training wrote, ready to be evaluated, and its task, on the folder `data` where that reads one.

    Raises `UserError` where it is none.
    """
    from attnbench.nn import Architecture, built
    from attnbench.tasks import trained

    state = checkpoint.load(path, "give one that this version of attnbench wrote")
    if missing := {"architecture", "model", "task"} - state.keys():
        raise UserError(f"{path} holds no {' and '.join(sorted(missing))}: give a checkpoint that training wrote")
    own = state["architecture"]
    try:
        model = built(Architecture(**{**own, "grid": tuple(own["grid"]) if own["grid"] else None}))
        model.load_state_dict(state["model"])
    except (TypeError, KeyError) as error:
        raise UserError(f"{path} is of another version of attnbench ({_line(error)}): use the version that wrote it") from None
    except RuntimeError as error:
        raise UserError(f"{path} holds weights of another architecture than it says ({_line(error)}): train it again") from None
    return model.eval(), trained.get(f"{state['task']}:{data}" if data else state["task"])


def _checkpoint(path: Path, data: Path | None, batch: int, n: int | None, device: str) -> Opened:
    model, task = open_checkpoint(path, data)
    if n not in (None, model.architecture.tokens):
        raise UserError(f"{path} was trained at N = {model.architecture.tokens}: leave out --n")
    model.to(device)
    inputs = task.batch("test", 0, batch, model.architecture.tokens, 0).inputs.to(device)
    return Opened(model, lambda: model.features(inputs), f"{path.name} on the test split of {task.name}")


def _transformers(name: str, data: Path | None, batch: int, n: int | None, device: str) -> Opened:
    library = _import("transformers")
    try:
        model: Any = library.AutoModel.from_pretrained(name, attn_implementation="sdpa").to(device).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"transformers cannot open {name}: {_line(error)}") from None
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    if model.main_input_name == "pixel_values":
        side = model.config.image_size
        pixels = _images(data, batch, side if isinstance(side, int) else side[0]).to(device)
        return Opened(model, lambda: model(pixel_values=pixels), f"{name} on {data}")
    most = getattr(model.config, "max_position_embeddings", None) or _N
    n = min(most, _N) if n is None else n
    if n > most:
        raise UserError(f"{name} reads at most {most} tokens, not {n}: set --n")
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"transformers finds no tokenizer in {name}: {_line(error)}") from None
    tokens = _text(tokenizer, data, batch, n).to(device)
    return Opened(model, lambda: model(input_ids=tokens), f"{name} on {data}")


def _timm(name: str, data: Path | None, batch: int, n: int | None, device: str) -> Opened:
    if n is not None:
        raise UserError("timm models read images, whose size says the number of tokens: leave out --n")
    library = _import("timm")
    try:
        model = library.create_model(f"local-dir:{name}" if Path(name).is_dir() else name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"timm cannot open {name}: {_line(error)}") from None
    model.to(device).eval()
    pixels = _images(data, batch, model.pretrained_cfg["input_size"][-1]).to(device)
    return Opened(model, lambda: model(pixels), f"{name} on {data}")


def _import(library: str) -> Any:
    from importlib import import_module

    try:
        return import_module(library)
    except ImportError as error:
        raise UserError(f"models of {library} need that package ({_line(error)}): pip install 'attnbench[{library}]'") from None


def _line(error: Exception) -> str:
    """The first line of what it says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _text(tokenizer: Any, data: Path | None, batch: int, n: int) -> Tensor:
    """The first `batch` runs of N tokens of a text, without special tokens or padding."""
    if data is None:
        raise UserError("a language model needs a text to read: give it with --data FILE")
    try:
        text = data.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {data} as text: {error}") from None
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(tokens) < batch * n:
        raise UserError(f"{data} has {len(tokens)} tokens, fewer than {batch} x {n}: give a longer text, or set --batch or --n")
    return torch.tensor(tokens[: batch * n]).view(batch, n)


def _images(data: Path | None, batch: int, side: int) -> Tensor:
    """The first images below a folder that can be decoded, `[B, 3, S, S]`, normalised as ImageNet is."""
    from attnbench.tasks import _augment, images

    if data is None or not data.is_dir():
        raise UserError("a vision model needs a folder of images to read: give it with --data PATH")
    decoded = (images.decoded(path) for path in images.below(data))
    found = [_augment.for_evaluation(image, side) for image, _ in zip((x for x in decoded if x is not None), range(batch), strict=False)]
    if len(found) < batch:
        raise UserError(f"{data} has {len(found)} images that can be decoded, fewer than {batch}: give more, or set --batch")
    return torch.stack([torch.from_numpy(x) for x in found])
