"""Commands with a terminal closed, of another alphabet, or with Ctrl-C pressed: work done, no traceback."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.cli.test_bad_input import refused

COMMAND = [sys.executable, "-m", "odis_path"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
STOPPED = "stopped: what was finished is kept; the same command goes on from there\n"


def shell(line: str, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A command as a shell runs it; `line` says where its streams go."""
    words = ["sh", "-c", f'"$@" {line}', "sh", *COMMAND, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=240, env={**ENV, **env}, errors="replace")


@pytest.mark.parametrize(("line", "workers"), [("2>&-", "1"), (">&-", "2"), ("<&- >&- 2>&-", "2")])
def test_closed_streams_stop_nothing(cohort: Path, tmp_path: Path, line: str, workers: str) -> None:
    slides, out = Path(shutil.copytree(cohort / "slides", tmp_path / "slides")), tmp_path / "out"
    bad = slides / "bad.svs"
    bad.write_bytes(b"no slide")
    tile = ["tile", slides, "--out", out, "--mpp", "1", "--size", "64", "--workers", workers]
    done = shell(line, *tile)
    assert "Traceback" not in done.stderr + done.stdout
    assert done.returncode == 1
    assert len(list(out.glob("*.h5"))) == 4
    if ">&-" not in line.split():
        assert "bad" in done.stdout
    assert shell(line, "tile", tmp_path / "none", "--out", out, "--mpp", "1").returncode == 2


@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"},
        {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
)
def test_names_of_another_alphabet_are_printed_as_far_as_they_can_be(cohort: Path, tmp_path: Path, env: dict[str, str]) -> None:
    slide = sorted((cohort / "slides").iterdir())[0]
    folder = tmp_path / "日本"
    folder.mkdir()
    (folder / "µ日.svs").write_bytes(b"no slide")
    shutil.copy(slide, folder / f"ok{slide.suffix}")
    done = shell("", "scan", folder, "--out", tmp_path / "m.csv", **env)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 1
    assert "failures" in done.stdout
    assert "output: " in done.stdout


def interrupted(*arguments: str | Path, when: Path | None, after: float = 0.0) -> tuple[int, str]:
    """Exit code and stderr of a command that is sent SIGINT, with its group, once the file is there and some seconds later."""
    child = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
        start_new_session=True,
    )
    end = time.monotonic() + 60
    while when is not None and not when.exists() and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(after)
    os.killpg(child.pid, signal.SIGINT)
    return child.wait(timeout=60), child.communicate()[1]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_says_that_the_command_goes_on(cohort: Path, tmp_path: Path, workers: str) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    slide = sorted((cohort / "slides").iterdir())[0]
    for i in range(200):
        (slides / f"{i:03}{slide.suffix}").symlink_to(slide)
    out = tmp_path / "out"
    tile = ["tile", slides, "--out", out, "--mpp", "0.5", "--size", "64", "--workers", workers]
    code, stderr = interrupted(*tile, when=out / "003.h5")
    assert code == 130
    assert stderr == STOPPED


def test_ctrl_c_while_the_commands_are_imported_is_no_traceback() -> None:
    code = (
        "import sys, builtins, odis_path.cli as cli\n"
        "class Stop:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=ENV, timeout=60)
    assert (done.returncode, done.stderr) == (130, STOPPED)


@pytest.mark.parametrize(
    "arguments",
    [
        ["tile", "x.svs", "--out", "out", "--mpp", "1"],
        ["annotate", "out", "--annotations", "a.geojson"],
        ["propose", "out"],
        ["embed", "out", "--checkpoint", "run", "--out", "features"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_an_empty_scheduler_is_refused(run: Run, arguments: list[str]) -> None:
    done = run(*arguments, "--scheduler", "")
    assert done.returncode == 2
    assert len(refused(done, "--scheduler: is empty").splitlines()) == 1
