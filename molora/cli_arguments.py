"""Arguments that several commands read, and the run that they name."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from molora.run_config import RunConfig

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG.yaml", help="The run.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings to replace, for example data.tasks.0.weight=2.",
        show_default=False,
    ),
]
Adapter = Annotated[
    Path | None,
    typer.Option(help="Folder of the adapter.", show_default="<output_dir>/adapter"),
]


def read_run(config: Path, overrides: list[str] | None) -> "RunConfig":
    """Read the YAML of a run, overrides applied.

    Raises:
        ConfigError: See ``load_run_config``.
    """
    from molora.run_config import load_run_config

    return load_run_config(config, overrides or [])
