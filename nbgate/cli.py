"""The commands that people type: serve, check, version.

Purpose: parse arguments, print for people or as JSON. Lives here: click commands. Must not: be imported by
the supervisor or a worker, hold logic that they need. Heat: cold.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path

import click
from rich.console import Console

from nbgate import __version__

EX_PROBLEMS = 2

_file_option = click.option(
    "-c",
    "--config",
    "file",
    required=True,
    envvar="NBGATE_CONFIG",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The configuration, a TOML file (or NBGATE_CONFIG).",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Run nbgate: one base URL and one key for every model."""


@main.command()
@_file_option
def serve(file: Path) -> None:
    """Start the gateway and serve until stopped.

    Ctrl-C drains and ends. SIGHUP reloads the file, SIGUSR2 replaces the workers without a gap.
    """
    # The supervisor takes this process over: it stays free of click, and systemd's sockets keep their owner.
    os.execv(sys.executable, [sys.executable, "-m", "nbgate.supervisor", "-c", str(file)])


@main.command()
@_file_option
@_json_option
def check(file: Path, as_json: bool) -> None:
    """Say everything that is wrong with a file, without starting.

    Exit code 0 if it can be used, 2 if not.
    """
    from nbgate.config import check as find_problems

    problems = find_problems(file)
    if as_json:
        rows = [problem._asdict() for problem in problems]
        click.echo(json.dumps({"ok": not problems, "problems": rows}, indent=2))
    elif problems:
        console = Console(soft_wrap=True, highlight=False)
        for problem in problems:
            console.print(str(problem), markup=False)
        noun = "problem" if len(problems) == 1 else "problems"
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"{len(problems)} {noun}", style="bold red")
    else:
        Console(soft_wrap=True, highlight=False).print(f"{file}: fine", markup=False)
    sys.exit(EX_PROBLEMS if problems else 0)


@main.command()
@_json_option
def version(as_json: bool) -> None:
    """Print the version of nbgate and of Python."""
    if as_json:
        click.echo(json.dumps({"nbgate": __version__, "python": platform.python_version()}))
    else:
        click.echo(f"nbgate {__version__} (Python {platform.python_version()})")
