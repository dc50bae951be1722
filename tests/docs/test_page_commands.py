"""Commands that stand on pages: every option exists and takes its value, every key of a recipe is one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from odis_path.cli.app import app
from odis_path.config import load_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("docs/guide.md", "docs/scaling.md", "docs/recipes.md", "docs/natural_images.md", "experiments/paper_in1k.md")


def commands(text: str) -> list[list[str]]:
    """Words of every odis-path command in the fenced blocks of a page, without what starts it (torchrun)."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    blocks = [block for language, block in fenced if not language]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if not line.startswith("(")]
    started = [line[line.index("odis_path") + 1 :] for line in words if line[:1] == ["torchrun"]]
    return started + [line[1:] for line in words if line[:1] == ["odis-path"]]


COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]


def parsed(command: list[str]) -> dict[str, Any]:
    """Parse a command as the command line does, without running it; raises where an option or value is wrong."""
    parameters: dict[str, Any] = COMMANDS[command[0]].make_context(command[0], command[1:]).params
    return parameters


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_understood(page: str) -> None:
    for command in commands((ROOT / page).read_text(encoding="utf-8")):
        parameters = parsed(command)
        if command[0] == "pretrain":
            load_config(parameters["config"], list(parameters["overrides"]))


def test_the_paper_page_trains_every_published_recipe_on_eight_gpus() -> None:
    page = (ROOT / "experiments" / "paper_in1k.md").read_text(encoding="utf-8")
    runs = [command for command in commands(page) if command[0] == "pretrain"]
    assert {command[1] for command in runs} == {"dino_in1k", "ibot_in1k", "odis_in1k"}
    folders = [word for command in runs for word in command if word.startswith("run.out=")]
    assert len(folders) == len(set(folders)) == len(runs)
    for command in runs:
        assert load_config(command[1], command[2:]).optim.batch_size % 8 == 0
    assert page.count("--nproc-per-node 8") == len(runs)


@pytest.mark.parametrize("command", ["tile a.svs --out t --sise 224", "embed t --checkpoint c --out f --batch many", "embed t"])
def test_a_command_that_is_wrong_is_noticed(command: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such|valid integer|missing|--checkpoint"):
        parsed(command.split())
