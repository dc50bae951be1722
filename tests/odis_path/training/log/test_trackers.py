"""TensorBoard and W&B, the SLURM script, and the keys that the docs name."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from annotations.errors import UserError
from odis_path.checkpoint import load_checkpoint
from odis_path.config import PretrainConfig
from odis_path.training import loop
from odis_path.training.log.run_log import RunLog
from odis_path.training.log.trackers import TensorBoardTracker, WandbTracker, open_trackers, run_id
from odis_path.training.optim import ema_ends
from odis_path.training.resume import config_difference
from odis_path.training.signals import StopRequest
from tests.odis_path.conftest import tiny_config, tiny_values

ROOT = Path(__file__).resolve().parents[4]
SCRIPT = ROOT / "docs" / "slurm" / "pretrain.sbatch"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


class Recorder:
    """A stand-in for the wandb module and its run: keeps the calls."""

    def __init__(self, fail: Exception | None = None) -> None:
        self.inits: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str]] = []
        self.finished = 0
        self.fail = fail

    def init(self, **more: Any) -> Recorder:
        if self.fail:
            raise self.fail
        self.inits.append(more)
        return self

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.finished += 1


def fake_wandb(patch: pytest.MonkeyPatch, fail: Exception | None = None) -> Recorder:
    recorder = Recorder(fail)
    module = types.ModuleType("wandb")
    module.init = recorder.init  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "wandb", module)
    return recorder


def test_wandb_gets_the_config_and_every_row_of_the_log(
    tiny_tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = fake_wandb(monkeypatch)
    config = tiny_config(tiny_tiles, tmp_path / "run", optim={"epochs": 1}, run={"wandb": True, "wandb_project": "slides"})
    loop.pretrain(config)
    (init,) = recorder.inits
    assert init["project"] == "slides"
    assert init["resume"] == "allow"
    rows = [json.loads(line) for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    settled = config.model_dump(mode="json")
    settled["model"]["pool"] = "obj"  # what "auto" means here
    settled["optim"]["ema"] = list(ema_ends(config.optim, total_steps=rows[-1]["step"]))  # and here
    assert init["config"] == settled
    assert init["config"]["optim"]["lr"] == 5e-4
    assert recorder.rows == rows
    assert any("knn_balanced_accuracy" in row for row in rows)
    assert recorder.metrics == [("*", "step")]
    assert recorder.finished == 1


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tiny_tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = fake_wandb(monkeypatch)
    config = tiny_config(tiny_tiles, tmp_path / "run", run={"wandb": True}, eval={"every_epochs": 0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "watch_signals", lambda: StopRequest(requested=True))
        with pytest.raises(loop.RunStoppedError):
            loop.pretrain(config)
    loop.pretrain(config)
    a, b = recorder.inits
    assert a["id"] == b["id"] == (tmp_path / "run" / "wandb-id.txt").read_text().strip()
    assert run_id(tmp_path / "other") != a["id"]
    assert [row["step"] for row in recorder.rows] == list(range(13))
    assert recorder.finished == 2


@pytest.mark.parametrize(("key", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_names_the_extra(key: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"run\.{key}=true needs the extra: pip install 'odis-path\[tracking\]'"):
        open_trackers(tiny_config("x", tmp_path / "run", run={key: True}), 0)


def test_wandb_that_does_not_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_wandb(monkeypatch, RuntimeError("no API key configured.\nUse `wandb login`"))
    with pytest.raises(UserError, match="WANDB_MODE=offline") as caught:
        WandbTracker(tmp_path / "run", "odis-path", {})
    assert "\n" not in str(caught.value)


def test_nothing_is_tracked_that_was_not_asked_for(tmp_path: Path) -> None:
    assert open_trackers(tiny_config("x", tmp_path / "run"), 0) == []


def test_a_tracker_that_fails_is_left_out_and_training_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        closed = False

        def log(self, figures: Any, step: int) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            self.closed = True

    log = RunLog(tmp_path, 10, active=True, first_step=0, title="x", trackers=[Broken()])
    for step in (1, 2):
        log.write({"step": step, "epoch": 0.1, "loss": 1.0})
    log.close()
    assert capsys.readouterr().err.count("Broken failed") == 1
    assert (tmp_path / "train.jsonl").read_text().count("\n") == 2


def test_tensorboard_writes_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tracking` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoardTracker(tmp_path, 0)
    for step in (1, 2, 3, 4):
        tracker.log({"loss": 10.0 - step, "loss_obj": 4.0}, step)
    tracker.close()
    time.sleep(1.1)  # event files are named by the second
    again = TensorBoardTracker(tmp_path, 2)  # a run that died after step 4, its last checkpoint at step 2
    for step in (3, 4):
        again.log({"loss": 20.0 - step}, step)
    again.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "loss_obj"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 9.0), (2, 8.0), (3, 17.0), (4, 16.0)]


def test_wandb_offline_keeps_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra `tracking` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = WandbTracker(tmp_path / "run", "odis-path", {"optim": {"lr": 1e-3}})
    tracker.log({"loss": 2.0}, 1)
    tracker.close()
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert run_id(tmp_path / "run") in written.name
    assert written.stat().st_size > 100


def test_trackers_can_be_switched_on_for_a_run_that_goes_on(tmp_path: Path) -> None:
    plain = tiny_config("x", tmp_path)
    tracked = tiny_config("x", tmp_path, run={"wandb": True, "tensorboard": True, "wandb_project": "slides"})
    assert config_difference(tracked, plain) == ""


def test_every_key_named_in_the_docs_exists() -> None:
    """`section.key` or `section.key=value` in backticks or code blocks is a key of the configuration."""
    sections = {name: set(type(part).model_fields) for name, part in PretrainConfig() if name != "name"}
    name = re.compile(rf"(?<![\w./-])({'|'.join(sections)})\.([a-z_]+)(?=[=\s,;:)`\]]|$)")
    count = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for code in re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL):
            for section, key in name.findall(code.strip("`")):
                if key in ("pt", "safetensors"):  # a file
                    continue
                assert key in sections[section], f"{page.name}: `{section}.{key}` is no key of the configuration"
                count += 1
    assert count > 20


def test_the_training_page_names_every_figure_of_the_table() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    from odis_path.training.log.live_table import Progress

    progress = Progress(100, 0, "x", 4.0)
    keys = ("loss", "knn_balanced_accuracy", "teacher_entropy", "token_spread", "lr", "images_per_s", "data_wait_share")
    progress.take({"step": 1, "epoch": 0.1, **dict.fromkeys(keys, 1.0)})
    for figure, *_ in progress.rows():
        assert f"| {figure.strip()} |" in text


def test_the_slurm_script_is_bash() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
    asked = re.findall(r"^#SBATCH (\S+)", SCRIPT.read_text(), flags=re.MULTILINE)
    assert {"--signal=B:USR1@300", "--requeue"} <= set(asked)


FAKES = {
    # starts two tasks as SLURM would and waits for them
    "srun": """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for i in 0 1; do
    SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@" &
    echo $! >> "$FAKE/tasks"
done
worst=0
for task in $(cat "$FAKE/tasks"); do wait "$task" || worst=$?; done
exit $worst
""",
    "scancel": '#!/bin/bash\n[[ $1 == --signal=USR1 ]] && kill -USR1 $(cat "$FAKE/tasks")\n',
    "scontrol": '#!/bin/bash\nif [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >> "$FAKE/asked"; fi\n',
}


def start_job(tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    """The batch script under stand-ins for SLURM's commands."""
    fakes = tmp_path / "fakes"
    fakes.mkdir(exist_ok=True)
    for name, text in FAKES.items():
        (fakes / name).write_text(text)
        (fakes / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "PATH": f"{fakes}:{os.environ['PATH']}",
        "FAKE": str(fakes),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "MASTER_PORT": str(port),
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(["bash", str(SCRIPT), *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.ranks
def test_the_slurm_script_saves_at_the_warning_and_asks_for_another_turn(tiny_tiles: Path, tmp_path: Path) -> None:
    values = tiny_values(tiny_tiles, tmp_path / "run", optim={"epochs": 4000}, eval={"every_epochs": 0}, data={"workers": 1})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    job = start_job(tmp_path, str(tmp_path / "config.yaml"), "run.log_every_steps=1")
    log = tmp_path / "run" / "train.jsonl"
    for _ in range(1800):
        if (log.exists() and log.read_text().count("\n") > 3) or job.poll() is not None:
            break
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)  # what --signal=B:USR1 does
    messages, _ = job.communicate(timeout=180)
    assert job.returncode != 0
    assert messages.count("saved; the same command goes on from there") == 2, messages
    assert (tmp_path / "fakes" / "asked").read_text() == "requeue 77\n"
    saved = load_checkpoint(tmp_path / "run").step
    last = json.loads(log.read_text().splitlines()[-1])["step"]
    assert saved == last  # at the warning, not at the last regular save
    assert json.loads((tmp_path / "run" / "versions.json").read_text())["ranks"] == 2


def test_the_slurm_script_does_not_repeat_a_run_that_fails_by_itself(tmp_path: Path) -> None:
    job = start_job(tmp_path, "odis_wsi", "optim.lrr=1")
    messages, _ = job.communicate(timeout=180)
    assert "did you mean optim.lr" in messages
    assert job.returncode == 2
    assert not (tmp_path / "fakes" / "asked").exists()
