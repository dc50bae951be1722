"""`doctor`: check versions, slide readers and GPU, and run each part on tiny inputs; or check what is given to it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from annotations.errors import UserError, one_line
from odis_path.config import find_config
from odis_path.versions import OPTIONAL, PACKAGES, versions
from tiling.jobs.outcome import Outcome, notes_of
from tiling.jobs.summary import Outcomes, Result

if TYPE_CHECKING:
    from rich.console import Console


class InstallChecks(Outcomes):
    """Outcomes of the checks of an install; `message` is the version, the device, or what to do."""

    def show(self, console: Console) -> None:
        """Write a table with a row a check."""
        from rich.markup import escape
        from rich.table import Table

        table = Table("what", "well", "found", title=self.title)
        for check in self:
            table.add_row(check.item, "yes" if check.ok else "NO", escape(check.message))
        console.print(table)


def doctor(
    subject: Path | str | None = None,
    overrides: Mapping[str, Any] | Sequence[str] | None = None,
    workers: int | None = None,
) -> Result:
    """Check the install: versions, slide readers, GPU, a tiny run of each part. A failing check says what to do.

    subject: look instead through all slide files, feature files and checkpoints below that folder, each compared with its
    checksums, by `workers` processes (None: one per CPU). Or a YAML file or the name of a recipe, with overrides as for
    `pretrain`: say what its views, targets and schedules give away, without training; with overrides a name is always that of
    a recipe. Raises UserError where it is missing or holds nothing of ours.
    """
    if subject is not None and (overrides or is_recipe(subject)):
        from odis_path.training.run import look_before

        return look_before(subject, overrides)
    if subject is not None:
        from odis_path.verification import verify

        return verify(Path(subject), workers)
    installed = versions()
    checks = [Outcome("Python", sys.version_info >= (3, 11), notes=notes_of(f"{installed['python']} (3.11 or newer)"))]
    for package in PACKAGES:
        missing = installed[package] == "missing"
        version = "missing: pip install odis-path again" if missing else installed[package]
        checks.append(Outcome(package, not missing, notes=notes_of(version)))
    for package, extra in OPTIONAL.items():
        absent = f"not installed (optional: pip install 'odis-path[{extra}]')"
        checks.append(Outcome(package, True, notes=notes_of(absent if installed[package] == "missing" else installed[package])))
    for item, check in (
        ("slide readers", _readers),
        ("tile codec", _codec),
        ("device", _device),
        ("masked attention", _attention),
    ):
        try:
            checks.append(Outcome(item, True, notes=notes_of(check())))
        except Exception as error:  # whatever is broken, the doctor names it and goes on
            checks.append(Outcome(item, False, error=f"{type(error).__name__}: {one_line(error)[:160]}"))
    return InstallChecks(checks, "odis-path doctor", "")


def is_recipe(subject: Path | str) -> bool:
    """Tell whether `doctor` takes this for a configuration: a file, or the name of a recipe where no such folder is."""
    if Path(subject).exists():
        return not Path(subject).is_dir()
    try:
        return find_config(str(subject)).is_file()
    except UserError:
        return Path(subject).suffix in (".yaml", ".yml")  # misspelt: the error names the recipes


def _readers() -> str:
    import openslide
    import tiffslide  # noqa: F401  it has to load

    return f"OpenSlide library {openslide.__library_version__}, tiffslide {metadata.version('tiffslide')}"


def _codec() -> str:
    import numpy as np
    import simplejpeg

    tile = np.full((32, 32, 3), 200, np.uint8)
    back = simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(tile, quality=90))
    if int(np.abs(back.astype(int) - tile).max()) > 3:
        raise RuntimeError("a JPEG tile does not come back as it was written")
    return "a JPEG tile comes back as it was written"


def _device() -> str:
    import torch

    from odis_path.training.compile import missing_for_compiling

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        lacking = missing_for_compiling()
        compiled = f"training is not compiled, and slower: this machine lacks {lacking}" if lacking else "training is compiled"
        return f"{len(names)} GPU: {', '.join(names)} (CUDA {torch.version.cuda}); {compiled}"
    return f"CPU, {torch.get_num_threads()} threads (no GPU seen: pretraining works, slowly)"


def _attention() -> str:
    import torch

    from odis_path.model.vit import build_encoder

    small: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    encoder = build_encoder("vit_tiny_patch16_224", small).eval()
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True
    with torch.no_grad():
        attention = encoder.obj_attention(torch.randn(2, 3, 32, 32), mask.expand(2, -1))
    if float(attention[:, ~mask[0]].sum()):
        raise RuntimeError("[OBJ] attends outside its box: this timm version ignores attn_mask")
    return "[OBJ] attends only inside its box"
