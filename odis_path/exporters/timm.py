"""Export a trained encoder: the teacher's ViT as plain timm weights."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from annotations.errors import UserError
from odis_path import __version__
from odis_path.checkpoint import Checkpoint, load_checkpoint
from odis_path.config import PretrainConfig
from odis_path.embedding.encoder import teacher_encoder
from odis_path.model.architectures import BASE_KWARGS, find_layer, resolve_model
from odis_path.model.create import tokens_and_norm
from odis_path.model.pretrained import is_gated
from odis_path.model.published import published
from odis_path.model.vit import ObjViT
from odis_path.tensor_file import state_crc32
from tiling.jobs.summary import Result, show_lines
from tiling.storage.atomic import atomic_path
from tiling.storage.locks import sweep

if TYPE_CHECKING:
    from rich.console import Console

TOLERANCE = 1e-5  # of the largest feature: two builds of one model differ by rounding alone


@dataclass(frozen=True)
class TimmExport(Result):
    """Two files and how to use them. The sidecar (`<name>.json`) holds the same facts, and so does the file's metadata.

    kwargs: arguments of timm.create_model, layer classes as words; mean, std: of the pixels in [0, 1]; mpp: micrometres per
    pixel and tile_px: side of a tile, both of the slide files trained on, None where those are gone; input_px: side of a
    global view; crc32: of the tensors (see `odis_path.tensor_file`), compared when odis-path reads them; python: one line that
    loads the model.
    """

    weights: str
    model: str
    kwargs: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mpp: float | None
    tile_px: int | None
    input_px: int
    patch_px: int
    embed_dim: int
    registers: int
    source: str
    step: int
    crc32: str
    software_version: str
    python: str

    @property
    def sidecar(self) -> Path:
        return Path(self.weights).with_suffix(".json")

    def show(self, console: Console) -> None:
        """Print the two files and what they hold, a line each."""
        show_lines(
            console,
            [
                f"{self.weights}: {self.model}, {self.embed_dim} features, from {self.source}",
                f"{self.sidecar}: mean {list(self.mean)}, std {list(self.std)}, mpp {self.mpp or 'unknown'}",
                self.python,
            ],
        )


def export_timm(checkpoint: str | Path, out: Path) -> TimmExport:
    """Write the teacher's ViT to `out` (.safetensors) and a sidecar .json beside it.

    timm.create_model(model, checkpoint_path=out, **kwargs) loads it with strict keys; that it gives the features of
    `odis-path embed --mode full` is checked before either file appears.
    Raises UserError where the checkpoint or `out` is wrong, or where a plain forward pass cannot give those features.
    """
    from safetensors.torch import save

    out = Path(out)
    if out.suffix != ".safetensors" or out.is_dir():
        raise UserError(f"{out}: give a file name that ends in .safetensors")
    loaded = _checkpoint(Path(checkpoint))
    encoder = _teacher(loaded)
    name, kwargs = _architecture(encoder, loaded.config)
    sweep(out.parent)
    result = _describe(loaded, encoder, name, kwargs, out)
    state = {key: value.contiguous().clone() for key, value in encoder.vit.state_dict().items()}
    facts = {key: json.dumps(value) for key, value in asdict(result).items()}
    try:
        with atomic_path(out) as temporary:
            temporary.write_bytes(save(state, metadata={"format": "pt", **facts}))
            _verify(temporary, encoder, result)
        with atomic_path(result.sidecar) as temporary:
            temporary.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None
    return result


def _checkpoint(path: Path) -> Checkpoint:
    if path.suffix == ".h5" or (path.is_dir() and any(path.glob("*.h5")) and not any(path.glob("checkpoint-*.pt"))):
        raise UserError(f"{path}: slide or feature files, not a checkpoint; --to timm takes a checkpoint or a run folder")
    return load_checkpoint(path)


def _teacher(loaded: Checkpoint) -> ObjViT:
    """Return the teacher's encoder. Raises UserError where no plain timm model does what it does."""
    encoder = teacher_encoder(loaded)
    several = "it has several [OBJ] tokens (or one of the whole image beside it)"
    obstacles = {"its patches do not see [OBJ]": encoder.read_only, several: encoder.more_obj is not None}
    for obstacle in (text for text, holds in obstacles.items() if holds):
        raise UserError(f"{loaded.path}: {obstacle}, which no plain timm model does; use it through `odis-path embed`")
    return encoder


def _architecture(encoder: ObjViT, config: PretrainConfig) -> tuple[str, dict[str, Any]]:
    """Return a name and arguments that build this ViT from nothing; layers stay words, so that JSON can hold them."""
    vit: Any = encoder.vit
    name, _ = resolve_model(config.model.name, {})
    kwargs: dict[str, Any] = {**BASE_KWARGS, **config.model.kwargs}
    if ":" in name:  # from a hub or a folder: its config is written out, so that nothing is downloaded again
        known = published(name)
        layers = known.layers if known is not None and is_gated(vit.state_dict()) else {}
        kwargs = {**(known.kwargs if known is not None else {}), **layers, **vit.pretrained_model_args, **kwargs}
        name = vit.pretrained_cfg["architecture"]
    norm_after_pool = not isinstance(vit.fc_norm, nn.Identity)
    if encoder.pool == "linear" or norm_after_pool or ":" in config.model.name:
        kwargs |= tokens_and_norm(vit, encoder.has_obj, norm_after_pool)
    if encoder.pool == "linear":
        kwargs["global_pool"] = "avg"
    return name, {key: value for key, value in kwargs.items() if value is not None}


def _describe(loaded: Checkpoint, encoder: ObjViT, name: str, kwargs: dict[str, Any], out: Path) -> TimmExport:
    config = loaded.config
    mpp, tile_px = _tiles_trained_on(config.data.tiles)
    return TimmExport(
        weights=str(out),
        model=name,
        kwargs=kwargs,
        mean=config.data.mean,
        std=config.data.std,
        mpp=mpp,
        tile_px=tile_px,
        input_px=config.views.global_size,
        patch_px=encoder.patch_px,
        embed_dim=encoder.embed_dim,
        registers=encoder.registers,
        source=loaded.path.name,
        step=loaded.step,
        crc32=state_crc32(encoder.vit.state_dict()),
        software_version=__version__,
        python=_python(name, kwargs, out),
    )


def _python(name: str, kwargs: dict[str, Any], out: Path) -> str:
    """Write one line of Python, with its imports, that builds the model and loads the file."""
    words, modules = [], {"timm"}
    for key, value in kwargs.items():
        text = repr(value)
        if key.endswith("_layer") and isinstance(value, str):
            text = find_layer(key, value)[0]
            modules.add(text.rpartition(".")[0])
        words.append(f"{key}={text}")
    arguments = ", ".join([repr(name), f"checkpoint_path={str(out)!r}", *words])
    return f"import {', '.join(sorted(modules))}; model = timm.create_model({arguments}).eval()"


def _tiles_trained_on(folder: str) -> tuple[float | None, int | None]:
    """Return mpp and side of the tiles of a folder of slide files; None where it is gone."""
    from tiling.slide_file.read import SlideFile, list_slide_files

    with suppress(UserError):
        for path in list_slide_files(folder):
            with suppress(UserError, OSError, KeyError), SlideFile(path) as file:
                return file.mpp, file.patch_size
    return None, None


def _verify(written: Path, encoder: ObjViT, result: TimmExport) -> None:
    """Build anew, load with strict keys, compare features: an export that is not the encoder must not appear."""
    import timm
    from safetensors.torch import load_file

    vit = timm.create_model(result.model, **resolve_model(result.model, result.kwargs)[1]).eval()
    vit.load_state_dict(load_file(written), strict=True)
    side = max(1, round(result.input_px / result.patch_px)) * result.patch_px
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, features = encoder(images).obj, vit(images)
    difference = float((expected - features).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not difference <= TOLERANCE:
        raise UserError(
            f"{result.weights}: not written, for plain timm features of {result.source} differ by {difference:.1e} of the "
            "largest; is it a model of `odis-path pretrain` with a plain [OBJ]?"
        )
