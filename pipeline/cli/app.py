"""The Typer application, and what the commands of a run share."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import GattError

if TYPE_CHECKING:
    from pipeline.recipe import Recipe
    from pipeline.run_dir import RunDir

app = typer.Typer(
    help="Fine-tune a chat model to follow an instruction for the whole conversation "
    "(Ghost Attention).\n\nExample: gatt run --quick",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[
    Path | None,
    typer.Argument(help="Recipe (TOML). Default: the run's saved recipe, or the built-in demo."),
]
Run = Annotated[Path, typer.Option("--run", help="Folder of the run.")]
Quick = Annotated[
    bool, typer.Option("--quick", help="Run in miniature, to see that everything works.")
]
Ray = Annotated[
    str,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Work on a Ray cluster: auto on a node of it, or ray://host:10001.",
    ),
]
Storage = Annotated[
    str,
    typer.Option(
        metavar="PLACE",
        help="With --ray: where training keeps its checkpoints, a folder or URL that all nodes see "
        "(s3://bucket/folder). Default: the run's folder.",
    ),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key: --set train.max_steps=20.")
]
DEFAULT_RUN = Path("runs/demo")


def override_list(changes: list[str] | None, *, quick: bool) -> list[str]:
    """Return the overrides of `--quick` and `--set`, in this order."""
    from pipeline.recipe_file import QUICK

    return [*(QUICK if quick else ()), *(changes or ())]


def resolve_run(recipe: Path | None, run: Path, overrides: list[str]) -> tuple[Recipe, RunDir]:
    """Open a run for one of its stages; without a recipe file, its saved recipe is used."""
    from pipeline.run import open_run

    return open_run(recipe, run, overrides)


def refuse_options(context: typer.Context, names: Collection[str], reason: str) -> None:
    """Refuse the parameters in `names` if the user gave them: they would be ignored.

    Raises:
        GattError: one was given; `reason` follows the name of the option, or the argument.
    """
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source and source.name == "COMMANDLINE":
            flag = parameter.opts[0]
            given = flag if flag.startswith("-") else context.params[parameter.name]
            raise GattError(f"{given} {reason}")


def execute_stage(name: str, settings: Recipe, run_dir: RunDir) -> None:
    """Run a stage unless it is up to date."""
    from pipeline.run import run_stage

    run_stage(name, settings, run_dir)


@contextmanager
def ray_cluster(address: str, storage: str = "") -> Iterator[None]:
    """Work on the Ray cluster at the address of `--ray` until the block ends; "" is this machine.

    Training keeps its checkpoints in `storage`.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        GattError: there is no cluster at that address, or none for `storage`.
    """
    if not address:
        if storage:
            raise GattError(
                f"--storage {storage} needs --ray: without it, the run's folder is used."
            )
        yield
        return
    from pipeline.cluster.session import connect

    with connect(address, storage):
        yield
