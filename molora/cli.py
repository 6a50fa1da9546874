"""The ``molora`` command: arguments and messages; the work is in molora.commands.

Heavy modules are imported inside the commands, so that ``--help`` answers at once.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from molora import cli_upcycle
from molora.cli_arguments import Adapter, ConfigFile, Overrides, read_run
from molora.errors import ConfigError, MoloraError

if TYPE_CHECKING:
    from molora.run_config import RunConfig

app = typer.Typer(
    name="molora",
    help="Mixtures of LoRA experts: train, route per token, collapse, deploy.",
    epilog="Example: molora train configs/quickstart.yaml training.max_steps=50",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Single = Annotated[
    Path | None,
    typer.Option(
        help="Folder of a one-expert adapter.",
        show_default="<output_dir>/collapsed if there, else <output_dir>/adapter",
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", help="A prompt; may be repeated.", show_default=False),
]
Task = Annotated[
    str | None,
    typer.Option(
        help="Task of the prompts; needed where routers read it. base: no adapter, for "
        "router adapter."
    ),
]
Names = Annotated[
    list[str] | None,
    typer.Option("--kernel", help="A kernel; may be repeated.", show_default="all"),
]
Json = Annotated[
    Path | None, typer.Option("--json", help="File to write all numbers to.")
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the entry point.

    A user's mistake ends with exit code 2 and one message. Anything else is our bug and
    keeps its traceback.

    Args:
        arguments: What follows ``molora``; those of the process by default.
    """
    try:
        app(arguments, prog_name="molora")
    except MoloraError as error:
        typer.secho("Error: ", fg="red", bold=True, nl=False, err=True)
        typer.echo(str(error), err=True)
        sys.exit(2)


@app.command(epilog="Example: molora train run.yaml training.max_steps=50 --resume")
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest valid checkpoint.")
    ] = False,
) -> None:
    """Train the mixture and save it in <output_dir>/adapter."""
    run = read_run(config, overrides)
    from molora.commands import training

    training.train(run, resume)


@app.command(epilog="Example: molora evaluate run.yaml --json scores.json")
def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    adapter: Adapter = None,
    json: Json = None,
) -> None:
    """Score a trained adapter on every task."""
    run = read_run(config, overrides)
    from molora.commands import training

    training.evaluate(run, adapter or run.output_dir / "adapter", json)


@app.command(
    epilog="Example: molora generate run.yaml --prompt 'jump twice' --num-beams 4"
)
def generate(
    config: ConfigFile,
    overrides: Overrides = None,
    adapter: Adapter = None,
    prompt: Prompts = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer, in tokens.")
    ] = 64,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams; 1 is greedy.")] = 1,
    task: Task = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 8,
) -> None:
    """Answer prompts, or standard input as one."""
    run = read_run(config, overrides)
    from molora.commands import inference

    inference.generate(
        run,
        adapter or run.output_dir / "adapter",
        prompt or [_standard_input()],
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        task=task,
        batch_size=batch_size,
    )


@app.command(epilog="Example: molora routes run.yaml --prompt 'jump twice' --layer 3")
def routes(
    config: ConfigFile,
    overrides: Overrides = None,
    adapter: Adapter = None,
    prompt: Prompts = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Evaluation rows of each task to route.",
            show_default="32; 0 with --prompt and without --html",
        ),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(help="Layer number or module path for the coloured prompt."),
    ] = None,
    task: Task = None,
    png: Annotated[
        Path | None, typer.Option(help="File for a heat map of experts by layer.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="File for a page to click through.")
    ] = None,
    json: Json = None,
) -> None:
    """Show which experts tokens, tasks and layers use."""
    run = read_run(config, overrides)
    from molora.commands import inference

    inference.routes(
        run,
        adapter or run.output_dir / "adapter",
        prompt or [],
        limit=limit,
        layer=layer,
        task=task,
        png=png,
        html=html,
        json=json,
    )


@app.command(epilog="Example: molora collapse run.yaml collapse.rank=32")
def collapse(
    config: ConfigFile,
    overrides: Overrides = None,
    adapter: Adapter = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write.", show_default="<output_dir>/collapsed"),
    ] = None,
) -> None:
    """Turn the mixture into one adapter."""
    run = read_run(config, overrides)
    from molora.commands import deploy

    folder = run.output_dir
    deploy.collapse(run, adapter or folder / "adapter", output or folder / "collapsed")


@app.command(epilog="Example: molora merge run.yaml --output model")
def merge(
    config: ConfigFile,
    overrides: Overrides = None,
    adapter: Single = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write.", show_default="<output_dir>/merged"),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Weights to add to, dequantised or original, where the base is "
            "quantised or was in training.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a plain model with the adapter folded in."""
    run = read_run(config, overrides)
    from molora.commands import deploy

    folder = output or run.output_dir / "merged"
    deploy.merge(run, _single(run, adapter), folder, base)


@app.command(epilog="Example: molora export run.yaml --output peft_adapter")
def export(
    config: ConfigFile,
    overrides: Overrides = None,
    adapter: Single = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write.", show_default="<output_dir>/peft"),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Write a LoRA of this rank, and tell what it costs.",
            show_default="the method itself",
            min=1,
        ),
    ] = None,
) -> None:
    """Write a one-expert adapter in PEFT's format of its method, or as a LoRA."""
    run = read_run(config, overrides)
    from molora.commands import deploy

    deploy.export(run, _single(run, adapter), output or run.output_dir / "peft", rank)


@app.command(epilog="Example: molora inspect runs/quickstart/adapter")
def inspect(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER", help="Folder of an adapter.", show_default=False
        ),
    ],
) -> None:
    """Check an adapter's files and print what it is."""
    from molora.commands import show

    show.inspect(folder)


@app.command(epilog="Example: molora validate run.yaml --deep")
def validate(
    config: ConfigFile,
    overrides: Overrides = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also load the base model and wrap it.")
    ] = False,
) -> None:
    """Check every setting, file and row of a run."""
    run = read_run(config, overrides)
    from molora.commands import show

    show.validate(run, deep)


@app.command(epilog="Example: molora clusters run.yaml --rule silhouette")
def clusters(
    config: ConfigFile,
    overrides: Overrides = None,
    rule: Annotated[
        Literal["elbow", "silhouette"], typer.Option(help="How the number is chosen.")
    ] = "elbow",
    largest: Annotated[int, typer.Option(min=2, help="Largest number tried.")] = 16,
    rows: Annotated[int, typer.Option(min=3, help="Training rows to embed.")] = 512,
    json: Json = None,
) -> None:
    """Choose the number of experts by k-means over the training rows."""
    run = read_run(config, overrides)
    from molora.commands import clusters as command

    command.clusters(run, rule, largest, rows, json)


@app.command(epilog="Example: molora methods")
def methods() -> None:
    """List every registered name with its paper."""
    from molora.commands import show

    show.methods()


@app.command(epilog="Example: molora demo --output runs/demo --steps 100")
def demo(
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(help="Folder for everything written.")] = Path(
        "runs/demo"
    ),
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Training steps.", show_default="those of the config"),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Seed.", show_default="that of the config"),
    ] = None,
) -> None:
    """Run the whole job on a real model."""
    from molora.demo import run_demo

    settings = list(overrides or [])
    settings += [] if steps is None else [f"training.max_steps={steps}"]
    settings += [] if seed is None else [f"seed={seed}"]
    run_demo(output, settings)


app.add_typer(cli_upcycle.app)

kernels = typer.Typer(help="The Triton kernels.", no_args_is_help=True)
app.add_typer(kernels, name="kernels")


@kernels.command(epilog="Example: molora kernels tune --rank 128")
def tune(
    output: Annotated[
        Path | None,
        typer.Option(help="File of the table.", show_default="in the cache folder"),
    ] = None,
    kernel: Names = None,
    rank: Annotated[
        list[int] | None,
        typer.Option(help="Padded total rank; may be repeated.", show_default="all"),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Compiling processes.")] = 4,
) -> None:
    """Measure the kernels on this GPU; needs one. Goes on where a run was stopped."""
    from molora.commands.kernels import tune as run

    run(output, kernel or [], rank or [], jobs)


def _standard_input() -> str:
    if sys.stdin.isatty():
        typer.echo("Type the prompt, then end of file (Ctrl-D):", err=True)
    return sys.stdin.read().rstrip("\n")


def _single(run: "RunConfig", adapter: Path | None) -> Path:
    """The adapter to deploy: the named one, else the collapsed, else the trained."""
    if adapter is not None:
        return adapter
    trained, collapsed = run.output_dir / "adapter", run.output_dir / "collapsed"
    if not collapsed.is_dir():
        return trained
    times = [folder / "manifest.json" for folder in (trained, collapsed)]
    newer, older = (path.stat().st_mtime if path.is_file() else 0 for path in times)
    if newer > older:
        raise ConfigError(
            f"{collapsed} is older than {trained}: run molora collapse again, or name "
            "the adapter to deploy with --adapter"
        )
    return collapsed
