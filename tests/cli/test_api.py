"""`import odis_path as op`: the commands as functions, with the same options and defaults, and nothing loaded early."""

from __future__ import annotations

import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

import odis_path
import odis_path as op
from annotations.errors import UserError
from odis_path.cli.app import app
from odis_path.cli.evaluate import parse_ks
from tiling.jobs.outcome import Outcome
from tiling.jobs.summary import Outcomes

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
VERBS = {name: "import_images" if name == "import" else name for name in COMMANDS}
LEAST = {  # the words without which a command does not start
    "scan": ["a.svs"],
    "tile": ["a.svs", "--out", "o"],
    "import": ["in", "--out", "o"],
    "annotate": ["tiles", "--annotations", "a"],
    "propose": ["tiles"],
    "pretrain": ["odis_wsi"],
    "embed": ["tiles", "--checkpoint", "run", "--out", "o"],
    "evaluate": ["features", "--labels", "l.csv", "--probe", "knn", "--out", "o"],
    "report": ["."],
    "export": ["run", "--to", "timm", "--out", "o"],
    "doctor": [],
    "demo": ["--out", "o"],
}
# What is spelt otherwise on a command line, and what only one of the two has, with the reason.
ALONE_IN_COMMAND = {("tile", "no_pixels"): "--pixels none", ("annotate", "further_files"): "files behind a shell's glob"}
ALONE_IN_PYTHON = {
    ("tile", "settings"): "all options in one",
    ("evaluate", "tell"): "what a bar shows",
    ("demo", "stream"): "where it tells",
}
SPELT = {
    ("evaluate", "k"): ("2,3", (2, 3)),
    ("evaluate", "baseline"): ("noise=a/b", {"noise": Path("a/b")}),
    ("export", "what"): ("tiles,boxes", ["tiles", "boxes"]),
}
AS_IN_PYTHON = {("evaluate", "k"): parse_ks}


def signature(command: str) -> dict[str, inspect.Parameter]:
    """Parameters of a command's verb."""
    return dict(inspect.signature(verb(command)).parameters)


def verb(command: str) -> Any:
    """The function that `op.<verb>` is, whatever other tests have imported."""
    return odis_path.__getattr__(VERBS[command])


def test_every_command_is_a_verb_and_all_are_looked_at() -> None:
    assert set(LEAST) == set(COMMANDS)
    assert set(VERBS.values()) <= set(op.__all__)


@pytest.mark.parametrize("command", LEAST)
def test_a_verb_has_the_options_of_its_command_by_the_same_names(command: str) -> None:
    options = {option.name for option in COMMANDS[command].params}
    only_command = {name for owner, name in ALONE_IN_COMMAND if owner == command}
    only_python = {name for owner, name in ALONE_IN_PYTHON if owner == command}
    assert options - only_command == set(signature(command)) - only_python


@pytest.mark.parametrize("command", LEAST)
def test_a_verb_has_the_defaults_of_its_command(command: str) -> None:
    context = COMMANDS[command].make_context(command, list(LEAST[command]))
    parameters = signature(command)
    for option in COMMANDS[command].params:
        if (command, option.name) in ALONE_IN_COMMAND:
            continue
        parameter, value = parameters[option.name], context.params[option.name]
        assert option.required == (parameter.default is inspect.Parameter.empty), option.name
        if not option.required:
            value = AS_IN_PYTHON.get((command, option.name), lambda given: given)(value)
            assert plain(value) == plain(parameter.default), option.name


def plain(value: Any) -> Any:
    """A default as it is compared: a path as its text, nothing as None."""
    if isinstance(value, Path):
        return str(value)
    return None if value in ([], ()) else value


@pytest.mark.parametrize("command", LEAST)
def test_arguments_of_a_command_are_the_first_of_its_verb_in_order(command: str) -> None:
    arguments = [p.name for p in COMMANDS[command].params if p.param_type_name == "argument"]
    arguments = [name for name in arguments if (command, name) not in ALONE_IN_COMMAND]
    assert list(signature(command))[: len(arguments)] == arguments


@pytest.mark.parametrize("command", LEAST)
def test_the_command_hands_every_option_to_its_verb(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options are given values of their own, and all of them arrive under their names."""
    function, words, given = verb(command), list(LEAST[command]), {}
    for number, option in enumerate(COMMANDS[command].params, start=600):
        if option.param_type_name != "option" or option.required or (command, option.name) in ALONE_IN_COMMAND:
            continue
        if option.is_flag:
            words.append(option.opts[0])
            given[option.name] = True
        else:
            text, value = SPELT.get((command, option.name), (str(number), number))
            words += [option.opts[0], text]
            given[option.name] = value
    calls: list[dict[str, Any]] = []

    def noted(*args: Any, **kwargs: Any) -> Outcomes:
        calls.append(dict(inspect.signature(function).bind(*args, **kwargs).arguments))
        return Outcomes([Outcome("a", ok=True)], command, "o")

    monkeypatch.setattr(sys.modules[function.__module__], function.__name__, noted)
    monkeypatch.setattr("odis_path.embedding.request.check_options", lambda *_, **__: None)
    monkeypatch.setattr("tiling.slide_file.read.list_slide_files", lambda *_: [])
    with pytest.raises(SystemExit) as end:
        app([command, *words])
    assert end.value.code == 0
    (call,) = calls
    for name, value in given.items():
        assert plain(call[name]) in (value, str(value)), name


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_import_is_lazy_and_loads_neither_torch_nor_numpy() -> None:
    heavy = ("torch", "numpy", "h5py", "rich", "timm")
    code = f"import sys, odis_path as op; dir(op); print([m for m in {heavy} if m in sys.modules])"
    assert in_a_fresh_process(code) == "[]"


@pytest.mark.parametrize(
    "name", ["tile", "scan", "annotate", "propose", "import_images", "SlideFile", "TileSettings", "evaluate"]
)
def test_what_needs_no_torch_loads_none(name: str) -> None:
    assert in_a_fresh_process(f"import sys, odis_path as op; op.{name}; print('torch' in sys.modules)") == "False"


def test_every_public_name_is_there_and_stays_what_it_is() -> None:
    """A second look at a name, after everything is imported, finds the same: no module shadows a verb."""
    code = (
        "import odis_path as op; print([n for n in op.__all__ if not callable(getattr(op, n)) or not callable(getattr(op, n))])"
    )
    assert in_a_fresh_process(code) == "[]"


def test_no_module_has_the_name_of_a_verb() -> None:
    assert not {module.name for module in pkgutil.iter_modules(odis_path.__path__)} & set(op.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'segment'"):
        odis_path.__getattr__("segment")


@pytest.mark.parametrize("package", ["annotations", "tiling", "odis_path"])
def test_the_packages_are_typed(package: str) -> None:
    module = __import__(package)
    assert (Path(module.__file__).parent / "py.typed").is_file()


def test_the_result_of_a_verb_is_a_sequence_with_what_failed_and_a_summary(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "torn.svs").write_bytes(b"no slide")
    outcomes = verb("tile")([cohort / "slides", tmp_path / "torn.svs"], out=tmp_path / "out", mpp=1.0, size=64, workers=1)
    assert [outcome.item for outcome in outcomes.failed] == ["torn"]
    assert len(outcomes) == 5
    assert outcomes[-1].ok is False
    assert capsys.readouterr().out == ""
    summary = outcomes.summary()
    assert "torn.svs" in summary
    assert f"output: {tmp_path / 'out'}" in summary
    assert "<pre>" in outcomes._repr_html_()
    outcomes.print()
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [s.rstrip() for s in summary.splitlines()]
    again = verb("tile")([cohort / "slides"], out=tmp_path / "out", settings=op.TileSettings(mpp=1.0, size=64), workers=1)
    assert all(outcome.skipped for outcome in again)
    assert repr(again) == "Outcomes(tile: 0 done, 4 skipped, 0 failed)"


def test_markup_in_a_message_is_shown_as_it_is() -> None:
    outcomes = Outcomes([Outcome("[red]a", ok=False, error="<b>[bold]x</b>")], "tile", "out")
    assert "[red]a" in outcomes.summary()
    assert "&lt;b&gt;[bold]x&lt;/b&gt;" in outcomes._repr_html_()


@pytest.mark.parametrize("more", [{"mpp": 0.5}, {"mag": 20}, {"size": 96}, {"pixels": "none"}])
def test_settings_and_single_options_are_refused_together(more: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="put all of them into settings"):
        verb("tile")("a.svs", out=tmp_path, settings=op.TileSettings(mpp=1.0), **more)
