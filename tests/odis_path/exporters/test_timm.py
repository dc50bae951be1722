"""An export loads into plain timm with strict keys and gives the features of the encoder it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from annotations.errors import UserError
from odis_path.checkpoint import TrainedState, save_checkpoint
from odis_path.cli.app import app
from odis_path.exporters.run import export
from odis_path.exporters.timm import export_timm
from odis_path.model.architectures import BASE_KWARGS
from odis_path.model.network import build_network
from odis_path.model.pretrained import load_weights
from tests.odis_path.conftest import tiny_config

SMALL = {"depth": 2, "num_heads": 2, "embed_dim": 32}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {"name": "S/16", "kwargs": {**SMALL, "img_size": 32, "patch_size": 8}},
    "registers, SwiGLU": {
        "name": "S/14",
        "kwargs": {**SMALL, "img_size": 28, "mlp_ratio": 5.33334, "mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"},
    },
    "eva": {"name": "eva02_tiny_patch14_224", "kwargs": {**SMALL, "img_size": 28}},
    "dinov3": {"name": "vit_small_patch16_dinov3", "kwargs": {**SMALL, "img_size": 32}},
    "mean of patches": {"name": "S/16", "kwargs": {**SMALL, "img_size": 32, "patch_size": 8}, "pool": "linear"},
    "mean of patches, eva": {"name": "eva02_tiny_patch14_224", "kwargs": {**SMALL, "img_size": 28}, "pool": "linear"},
}


def write_checkpoint(folder: Path, tiles: Path | str = "gone", **model: Any) -> tuple[Path, torch.nn.Module]:
    """A checkpoint of an untrained teacher (every tensor moved from its start) and its encoder."""
    size = model["kwargs"]["img_size"]
    config = tiny_config(
        tiles,
        folder,
        model={**model, "weights": "start-weights-that-are-gone.pth"},
        views={"global_size": size, "local_size": 16},
        data={"mean": (0.7, 0.57, 0.7), "std": (0.2, 0.23, 0.18)},
    )
    torch.manual_seed(0)
    start = config.model_copy(update={"model": config.model.model_copy(update={"weights": None})})
    network = build_network(start, student=False)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    state = network.state_dict()
    student = {key: value + 1 for key, value in state.items()}
    return save_checkpoint(folder, 7, 1.0, config, TrainedState(teacher=state, student=student), 2), network.encoder.eval()


def run_line(line: str) -> torch.nn.Module:
    """What a reader gets who pastes the printed line."""
    names: dict[str, Any] = {}
    exec(line, names)
    return names["model"]


@pytest.mark.parametrize("kind", MODELS)
def test_the_printed_line_gives_the_same_features(kind: str, tmp_path: Path) -> None:
    checkpoint, encoder = write_checkpoint(tmp_path / "run", **MODELS[kind])
    out = tmp_path / "out" / "encoder.safetensors"
    result = export_timm(checkpoint, out)
    vit = run_line(result.python)
    side = MODELS[kind]["kwargs"]["img_size"]
    images = torch.randn(3, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(vit(images), encoder(images).obj, rtol=0, atol=1e-6)
    again = vit.state_dict()
    assert all(torch.equal(again[key], value) for key, value in encoder.vit.state_dict().items())
    assert sorted(path.name for path in out.parent.iterdir()) == ["encoder.json", "encoder.safetensors"]


def test_another_size_of_image_gives_the_same_features(tmp_path: Path) -> None:
    checkpoint, encoder = write_checkpoint(tmp_path / "run", **MODELS["plain"])
    vit = run_line(export_timm(checkpoint, tmp_path / "e.safetensors").python)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(vit(images), encoder(images).obj, rtol=0, atol=1e-6)


def test_facts_are_beside_and_inside_the_file(tiny_tiles: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", tiny_tiles, **MODELS["registers, SwiGLU"])
    out = tmp_path / "e.safetensors"
    result = export_timm(tmp_path / "run", out)  # the folder: its newest checkpoint
    facts = json.loads(out.with_suffix(".json").read_text())
    assert facts["model"] == "vit_small_patch14_reg4_dinov2"
    assert facts["kwargs"]["mlp_layer"] == "SwiGLUPacked"
    assert facts["kwargs"]["num_classes"] == 0
    assert (facts["mean"], facts["std"]) == ([0.7, 0.57, 0.7], [0.2, 0.23, 0.18])
    assert (facts["mpp"], facts["tile_px"], facts["input_px"], facts["registers"]) == (0.5, 64, 28, 4)
    assert (facts["source"], facts["step"]) == ("checkpoint-00000007.pt", 7)
    with safe_open(out, "pt") as file:
        inside = {key: json.loads(value) for key, value in file.metadata().items() if key != "format"}
    assert inside == facts
    assert "mlp_layer=timm.layers.SwiGLUPacked" in result.python


def test_an_export_is_a_start_for_the_next_run(tmp_path: Path) -> None:
    checkpoint, encoder = write_checkpoint(tmp_path / "run", **MODELS["plain"])
    result = export_timm(checkpoint, tmp_path / "e.safetensors")
    vit = timm.create_model(result.model, **result.kwargs)
    assert load_weights(vit, tmp_path / "e.safetensors").layout == "timm"
    assert all(torch.equal(value, encoder.vit.state_dict()[key]) for key, value in vit.state_dict().items())


def test_a_model_from_a_folder_is_written_out_in_full(tmp_path: Path) -> None:
    """local-dir: is timm's offline twin of hf-hub: its config is asked for once, not again by who uses the export."""
    source = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, **SMALL)
    folder = tmp_path / "published"
    folder.mkdir()
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": 32, "patch_size": 8, **SMALL}}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": {"num_classes": 0}}))
    torch.save(source.state_dict(), folder / "pytorch_model.bin")
    checkpoint, encoder = write_checkpoint(tmp_path / "run", name=f"local-dir:{folder}", kwargs={"img_size": 32})
    result = export_timm(checkpoint, tmp_path / "e.safetensors")
    assert (result.model, result.kwargs["depth"], result.kwargs["patch_size"]) == ("vit_tiny_patch16_224", 2, 8)
    (folder / "config.json").unlink()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(run_line(result.python)(images), encoder(images).obj, rtol=0, atol=1e-6)


def test_read_only_objects_are_no_plain_timm_model(tmp_path: Path) -> None:
    checkpoint, _ = write_checkpoint(tmp_path / "run", **MODELS["plain"], read_only=True)
    with pytest.raises(UserError, match="do not see \\[OBJ\\]"):
        export_timm(checkpoint, tmp_path / "e.safetensors")


@pytest.mark.parametrize("sections", [{"target": {"objects": 2}}, {"loss": {"image_weight": 0.5}}])
def test_several_tokens_are_no_plain_timm_model(sections: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config("x", tmp_path, **sections)
    state = build_network(config, student=False).state_dict()
    checkpoint = save_checkpoint(tmp_path / "run", 1, 0.1, config, TrainedState(teacher=state), keep=1)
    with pytest.raises(UserError, match="it has several \\[OBJ\\] tokens"):
        export_timm(checkpoint, tmp_path / "e.safetensors")


def test_an_export_that_differs_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, _ = write_checkpoint(tmp_path / "run", **MODELS["plain"])
    other = ("vit_small_patch16_224", {**BASE_KWARGS, **MODELS["plain"]["kwargs"], "global_pool": "avg", "fc_norm": False})
    monkeypatch.setattr("odis_path.exporters.timm._architecture", lambda *_: other)
    with pytest.raises(UserError, match="not written"):
        export_timm(checkpoint, tmp_path / "out" / "e.safetensors")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("source", "to", "out", "says"),
    [
        ("run", "onnx", "e.safetensors", "--to onnx: no such export; there is: timm, "),
        ("missing.pt", "timm", "e.safetensors", "no such checkpoint"),
        ("empty", "timm", "e.safetensors", "no checkpoint"),
        ("features", "timm", "e.safetensors", "slide or feature files"),
        ("features/S0.h5", "timm", "e.safetensors", "slide or feature files"),
        ("other.pt", "timm", "e.safetensors", "not an odis-path checkpoint"),
        ("run", "timm", "e.pth", "ends in .safetensors"),
        ("run", "timm", "other.pt/e.safetensors", "cannot be written"),
    ],
)
def test_wrong_input_is_one_line(source: str, to: str, out: str, says: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", **MODELS["plain"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "S0.h5").write_bytes(b"x")
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(UserError) as caught:
        export(tmp_path / source, to, tmp_path / out)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_prints_the_line(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", **MODELS["eva"])
    out = tmp_path / "e.safetensors"
    result = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--to", "timm", "--out", str(out)])
    assert result.exit_code == 0, result.output
    line = next(line for line in result.output.splitlines() if line.startswith("import timm"))
    assert run_line(line).num_features == 32
