"""What README and docs/ tell people to type exists: verbs, options and benchmarks."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from pipelines import cli

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])


def commands() -> Iterator[tuple[str, str]]:
    """List (page, line) of every command in a block for a shell."""
    for page in PAGES:
        for block in re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                yield page.name, line.strip()


def of_verbs() -> list[tuple[str, str, list[str]]]:
    """List (page, verb, arguments) of those that are ours, environment variables before them left out."""
    found = []
    for page, line in commands():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            del words[0]
        if words[:1] == ["ris"]:
            found.append((page, words[1], words[2:]))
        elif words[:2] == ["python", "-m"] and words[2].startswith("pipelines."):
            found.append((page, words[2].removeprefix("pipelines.").replace("_", "-"), words[3:]))
    return found


def test_there_are_commands_to_check() -> None:
    assert len(of_verbs()) > 20
    assert {"README.md", "own-data.md", "real-data.md", "downstream.md", "cluster.md"} <= {
        page for page, *_ in of_verbs()
    }


@pytest.mark.parametrize(("page", "verb", "arguments"), of_verbs())
def test_verbs_and_options_exist(page: str, verb: str, arguments: list[str]) -> None:
    if verb == "repro":  # `make repro` and the cluster start it; no verb of `ris`
        from pipelines import repro

        app = typer.Typer()
        app.command()(repro.main)
        command = typer.main.get_command(app)
    else:
        assert verb in cli.VERBS, f"{page}: there is no `ris {verb}`"
        command = cli._real(verb)
    command.make_parser(click.Context(command, info_name=f"ris {verb}")).parse_args(list(arguments))


def test_modules_that_are_named_exist() -> None:
    named = {
        name
        for page in PAGES
        for name in re.findall(r"`(?:python -m )?(benchmarks\.\w+|(?<=-m )ris_core\.\w+)", page.read_text())
    }
    assert len(named) > 5
    assert {name for name in named if importlib.util.find_spec(name) is None} == set()


def test_an_option_that_is_not_there_is_found() -> None:
    with pytest.raises(Exception, match="No such option: --data"):  # of the click that typer brings
        test_verbs_and_options_exist("a page", "prepare", ["--data", "x"])
