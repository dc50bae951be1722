"""What cannot be embedded with is told in one line, before torch is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from annotations.errors import UserError
from odis_path.embedding.run import embed
from odis_path.model.source import check_start

BAD_FOLDERS = {
    "no folder": (lambda f: None, "no such folder"),
    "no config": (lambda f: f.mkdir(), r"config\.json: not there"),
    "no JSON": (lambda f: write(f, "{"), r"config\.json: cannot be read as JSON"),
    "a list": (lambda f: write(f, "[]"), "names no architecture"),
    "transformers": (lambda f: write(f, '{"model_type": "dinov2"}'), "it describes dinov2 of transformers"),
    "arguments": (lambda f: write(f, '{"architecture": "vit_tiny_patch16_224", "model_args": 3}'), "model_args is int"),
    "mean": (
        lambda f: write(f, '{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"mean": 0.5}}'),
        "mean is 0.5, not three numbers",
    ),
    "no weights": (lambda f: write(f, '{"architecture": "vit_tiny_patch16_224"}'), "no file of weights"),
    "two": (lambda f: write(f, '{"architecture": "vit_tiny_patch16_224"}', "a.pth", "b.pth"), "2 files of weights"),
}


def write(folder: Path, config: str, *files: str) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(config)
    for name in files:
        (folder / name).touch()


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_a_folder_that_cannot_be_used_is_told_before_torch_is_loaded(kind: str, tiny_tiles: Path, tmp_path: Path) -> None:
    make, words = BAD_FOLDERS[kind]
    make(tmp_path / "model")
    with pytest.raises(UserError, match=words):
        embed(tiny_tiles, f"local-dir:{tmp_path / 'model'}", tmp_path / "out")
    if kind not in ("transformers", "no weights"):
        return
    program = "import sys; from odis_path.cli import main\ntry: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    command = ["embed", str(tiny_tiles), "--checkpoint", f"local-dir:{tmp_path / 'model'}", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "False"
    assert "Traceback" not in done.stderr


def test_options_and_weights_files_that_cannot_be_are_told_before_torch_is_loaded(tiny_tiles: Path, tmp_path: Path) -> None:
    (tmp_path / "uni.bin").touch()
    program = (
        "import sys; from pathlib import Path; from annotations.errors import UserError\n"
        "from odis_path.embedding.request import check_options\n"
        "for options in ({'pool': 'max'}, {'resize': 0}, {'mode': 'halo'}, {'level': 'patch'}, {'dtype': 'int8'},\n"
        "                {'kinds': 'x'}, {'checkpoint': sys.argv[1]}, {'checkpoint': 'none.pt'},\n"
        "                {'checkpoint': 'hf-hub:MahmoodLab/CONCH'}):\n"
        "    plain = {'checkpoint': 'vit', 'level': 'tile', 'mode': 'full', 'kinds': 'all', 'dtype': 'float16'}\n"
        "    try: check_options(**{**plain, **options}); print('nothing', options)\n"
        "    except UserError as error: print(error)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "uni.bin")], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[-1] == "False"
    assert not any(line.startswith("nothing") for line in lines)
    assert "weights alone do not say what model they are of" in lines[6]
    assert "CONCH pools by attention layers of its own" in lines[8]


def test_start_weights_that_cannot_be_are_told_before_torch_is_loaded(tmp_path: Path) -> None:
    write(tmp_path / "model", '{"architecture": "vit_tiny_patch16_224"}', "model.safetensors")
    check_start(f"local-dir:{tmp_path / 'model'}", "timm")
    for weights, words in ((tmp_path / "none.pth", "no such file"), (tmp_path / "model", "set model.name=local-dir:")):
        with pytest.raises(UserError, match=words):
            check_start("vit_tiny_patch16_224", str(weights))
    program = "import sys; from odis_path.cli import main\ntry: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    command = [
        sys.executable,
        "-c",
        program,
        "pretrain",
        "odis_wsi",
        f"model.weights={tmp_path}/none.pth",
        f"run.out={tmp_path}/r",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "False"
    assert "none.pth: no such file" in done.stderr
