"""Arguments of ``molora import`` and ``molora grow``; see cli.py."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from molora.cli_arguments import Adapter, ConfigFile, Overrides, read_run

app = typer.Typer(rich_markup_mode=None)


@app.command(
    "import",
    epilog="Example: molora import smollm2 loras/sql loras/chat --router soft "
    "--train router --output runs/imported",
)
def import_(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE",
            help="The model that they were trained on: smollm2, a folder, a hub id.",
            show_default=False,
        ),
    ],
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...",
            help="A PEFT LoRA for each expert, or one PEFT X-LoRA.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    router: Annotated[
        str | None,
        typer.Option(
            help="A kind, settings such as '{kind: topk, top_k: 2}', or a folder with "
            "routers; none for one LoRA or an X-LoRA.",
        ),
    ] = None,
    train: Annotated[
        Literal["all", "router"],
        typer.Option(help="What molora train trains: router keeps the experts."),
    ] = "all",
    general: Annotated[
        list[Path] | None,
        typer.Option(
            help="A LoRA of general knowledge; the mean of all is taken from every "
            "expert. May be repeated.",
            show_default=False,
        ),
    ] = None,
    general_form: Annotated[
        Literal["delta", "factors"],
        typer.Option(help="Take it from the updates, or from A and B apart."),
    ] = "delta",
    lora_dropout: Annotated[
        float, typer.Option(min=0, max=1, help="Dropout in training.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the routers.")] = 0,
    allow_base_mismatch: Annotated[
        bool,
        typer.Option(
            "--allow-base-mismatch", help="Accept adapters that name another base."
        ),
    ] = False,
) -> None:
    """Make a mixture of PEFT LoRAs, to route at once or to train on."""
    from molora.commands import upcycle

    upcycle.import_peft(
        base,
        folders,
        output,
        router=router,
        train=train,
        general=general or [],
        general_form=general_form,
        lora_dropout=lora_dropout,
        seed=seed,
        allow_base_mismatch=allow_base_mismatch,
    )


@app.command(epilog="Example: molora grow run.yaml --output runs/grown")
def grow(
    config: ConfigFile,
    overrides: Overrides = None,
    adapter: Adapter = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write.", show_default="<output_dir>/grown"),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Task of the new expert, with the balance objective domain."),
    ] = None,
) -> None:
    """Add an expert to a trained mixture, the others being frozen."""
    run = read_run(config, overrides)
    from molora.commands import upcycle

    folder = run.output_dir
    upcycle.grow(run, adapter or folder / "adapter", output or folder / "grown", task)
