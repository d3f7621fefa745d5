"""The `gatt` command: thin. A stage and its libraries are imported when it is called."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import GattError

if TYPE_CHECKING:
    from pipeline.recipe import Recipe
    from pipeline.run_dir import RunDir

app = typer.Typer(
    help="Teach a chat model to keep an instruction for a whole conversation (Ghost Attention).\n\n"
    "Example: gatt run --quick",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[
    Path | None,
    typer.Argument(help="Recipe (TOML); left out: that of the run, or the built-in demo."),
]
Run = Annotated[Path, typer.Option("--run", help="Folder of the run.")]
Quick = Annotated[
    bool, typer.Option("--quick", help="The same in miniature, to see that everything works.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key: --set train.steps=20.")
]
DEFAULT_RUN = Path("runs/demo")


@app.command()
def init(
    path: Annotated[Path, typer.Argument()] = Path("recipe.toml"),
    card: Annotated[
        float,
        typer.Option(help="Take the largest base that trains on a graphics card of so many GB."),
    ] = 0,
) -> None:
    """Write a recipe with every key, its default and its meaning. Example: gatt init my.toml --card 12"""
    from pipeline.files import write_text
    from pipeline.recipe import Recipe, recipe_toml

    if path.exists():
        raise GattError(f"{path} exists already; it is left as it is. Name another file.")
    recipe = Recipe()
    if card:
        from pipeline.training.memory import STEP, largest_preset, room

        model = largest_preset(room(card), True, STEP, recipe.train)
        if not model:
            raise GattError(
                f"--card {card:g}: no base of `gatt doctor` trains in so little. Expected 8, 12, 16 or 24 GB."
            )
        recipe = recipe.model_copy(update={"model": model})
    write_text(path, recipe_toml(recipe))
    typer.echo(f"Wrote {path}. Next: gatt run {path}")


@app.command()
def run(
    recipe: RecipeFile = None, run: Run = DEFAULT_RUN, quick: Quick = False, set: Set = None
) -> None:
    """All stages; those that are done are passed over. Example: gatt run my.toml --run runs/mine"""
    settings, folder = _open(recipe, run, quick, set, anew=True)
    for name in STAGES:
        _stage(name, settings, folder)
    tuned = folder.tuned(settings.export.formats[0])
    typer.echo(
        f"Report: {folder.report / 'report.html'}\nModel:  {tuned}\nChat:   {_chat_command(settings, tuned)}"
    )


def _chat_command(settings: Recipe, tuned: Path) -> str:
    """A line that can be pasted: this very program, with the first instruction that was taught."""
    import shlex
    import shutil
    import subprocess

    from pipeline.gatt.instructions import word

    program = (
        "gatt" if shutil.which("gatt") else os.path.relpath(Path(sys.executable).with_name("gatt"))
    )
    taught = word(settings.instructions.pool[:1]).text
    words = [
        program,
        "chat",
        str(tuned),
        "--system",
        settings.dialogues.system,
        "--instruction",
        taught,
    ]
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def _define(name: str, summary: str) -> Callable[..., None]:
    def command(
        recipe: RecipeFile = None, run: Run = DEFAULT_RUN, quick: Quick = False, set: Set = None
    ) -> None:
        _stage(name, *_open(recipe, run, quick, set))

    command.__doc__ = f"{summary} Example: gatt {name} my.toml --run runs/mine"
    return app.command(name)(command)


@app.command()
def instructions(
    recipe: RecipeFile = None,
    run: Run = DEFAULT_RUN,
    quick: Quick = False,
    set: Set = None,
    kinds: Annotated[
        bool, typer.Option("--kinds", help="Only list the kinds of instruction.")
    ] = False,
) -> None:
    """Pair dialogues with instructions. Example: gatt instructions my.toml --run runs/mine"""
    if kinds:
        from pipeline.gatt.instructions import table_of_kinds

        typer.echo(table_of_kinds())
        return
    _stage("instructions", *_open(recipe, run, quick, set))


@app.command()
def synthesize(
    recipe: RecipeFile = None,
    run: Run = DEFAULT_RUN,
    quick: Quick = False,
    set: Set = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Only show what was drawn and accepted.")
    ] = False,
    push: Annotated[
        str, typer.Option(help="Upload the dialogues to this dataset of the Hub: owner/name.")
    ] = "",
) -> None:
    """Let the teacher answer, and ghost the instruction. Example: gatt synthesize my.toml --run runs/mine --stats"""
    settings, folder = _open(recipe, run, quick, set)
    if not stats:
        _stage("synthesize", settings, folder)
    if stats or push:
        from pipeline.stages import synthesize as stage

        stage.show_statistics(folder)
        if push:
            stage.push(folder, push)


@app.command()
def train(
    recipe: RecipeFile = None,
    run: Run = DEFAULT_RUN,
    quick: Quick = False,
    set: Set = None,
    show_labels: Annotated[
        bool, typer.Option("--show-labels", help="Only show which tokens are learned.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Go on from the last checkpoint.")
    ] = True,
    stop_when: Annotated[
        str,
        typer.Option(
            help="Stop when held-out answers keep the instruction so often: adherence=0.95."
        ),
    ] = "",
) -> None:
    """Train the adapter. Example: gatt train my.toml --run runs/mine --stop-when adherence=0.95"""
    figure, _, share = stop_when.partition("=")
    if stop_when and figure != "adherence":
        raise GattError(
            f"--stop-when {stop_when}: expected adherence and a share, for example --stop-when adherence=0.95."
        )
    changes = [f"train.stop_when={share}"] if stop_when else []
    settings, folder = _open(recipe, run, quick, [*(set or []), *changes])
    if show_labels:
        from pipeline.stages import train as stage

        stage.show_labels(settings, folder)
        return
    if not resume:
        import shutil

        shutil.rmtree(folder.checkpoints, ignore_errors=True)
    _stage("train", settings, folder)


@app.command()
def export(
    recipe: RecipeFile = None,
    run: Run = DEFAULT_RUN,
    quick: Quick = False,
    set: Set = None,
    model: Annotated[
        str,
        typer.Option(
            help="Export this base by itself, not a run: a preset, GGUF, folder or Hub id."
        ),
    ] = "",
    adapter: Annotated[
        Path | None, typer.Option(help="With --model: a PEFT LoRA folder to merge into it.")
    ] = None,
    out: Annotated[Path, typer.Option(help="With --model: folder of the new files.")] = Path(
        "export"
    ),
    format: Annotated[
        list[str] | None, typer.Option(help="Q8_0, F16, Q4_K_M, ...; may be given several times.")
    ] = None,
    merge_onto: Annotated[
        str, typer.Option(help="16bit, 4bit, or measure: whichever is nearer to the trained model.")
    ] = "",
    merged_dir: Annotated[
        Path | None,
        typer.Option(help="Write the merged model for transformers (float32) here, too."),
    ] = None,
    other_tokens: Annotated[
        bool, typer.Option("--other-tokens", help="Export although llama.cpp reads other tokens.")
    ] = False,
    converter: Annotated[
        Path | None,
        typer.Option(help="Your own convert_hf_to_gguf.py, for a family not known here."),
    ] = None,
) -> None:
    """Merge the adapter and write GGUF. Example: gatt export --model qwen3-0.6b --adapter my-lora --format Q4_K_M"""
    from pipeline.gguf.checkpoint_writer import require_new
    from pipeline.recipe import load_recipe
    from pipeline.stages import export as stage

    if merged_dir:
        require_new(merged_dir)
    asked = {
        "formats": list(format or ()),
        "merge_onto": merge_onto,
        "same_tokens": "false" if other_tokens else "",
    }
    changes = [f"export.{key}={value}" for key, value in asked.items() if value]
    if not model:
        settings, folder = _open(recipe, run, quick, [*(set or []), *changes])
        _stage("export", settings, folder)
        model, adapter = settings.model, folder.adapter
        if converter:
            raise GattError(
                "--converter is for --model: a run begins with a model whose family is known."
            )
    else:
        alone = load_recipe(None, ("export.merge_onto=16bit", *changes)).export
        stage.alone(model, adapter, out, alone, converter)
    if merged_dir:
        stage.write_merged(model, adapter, merged_dir)


@app.command()
def evaluate(
    recipe: RecipeFile = None,
    run: Run = DEFAULT_RUN,
    quick: Quick = False,
    set: Set = None,
    adapter: Annotated[
        str,
        typer.Option(
            help="Measure the base with this GGUF adapter over it, not the exported file."
        ),
    ] = "",
    adapter_scale: Annotated[
        float, typer.Option(help="How strongly the adapter counts; 1 is as it was trained.")
    ] = 1.0,
    other: Annotated[
        list[str] | None,
        typer.Option(help="Measure this, too: a GGUF, an adapter, or URL/v1#model."),
    ] = None,
    judge: Annotated[
        str, typer.Option(help="A model or a server that judges what no program can check.")
    ] = "",
) -> None:
    """Measure base, tuned and ceiling, turn by turn. Example: gatt evaluate --other rival.gguf"""
    changes = (
        [f"evaluate.adapter={adapter}", f"evaluate.adapter_scale={adapter_scale}"]
        if adapter
        else []
    )
    changes += [f"evaluate.others={json.dumps(other)}"] if other else []
    changes += [f"evaluate.judge={judge}"] if judge else []
    _stage("evaluate", *_open(recipe, run, quick, [*(set or []), *changes]))


_define("report", "Render the report.")


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of evaluated runs; the first is what others are compared with."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the page, the chart and the table.")] = Path(
        "comparison"
    ),
) -> None:
    """Several runs in one table and one chart. Example: gatt compare runs/all_turns runs/distill"""
    from pipeline.stages.compare import compare as work

    work(runs, out)


@app.command()
def push(
    repository: Annotated[
        str, typer.Argument(help="owner/name on the Hub; made private where it is new.")
    ],
    run: Run = DEFAULT_RUN,
) -> None:
    """Upload a finished run: GGUF, adapter, model card. Example: gatt push me/keeps-its-word --run runs/demo"""
    from pipeline.recipe import load_recipe
    from pipeline.run_dir import RunDir
    from pipeline.stages import push as stage

    if not (run / "recipe.toml").is_file():
        raise GattError(
            f"No run in {run} (it has no recipe.toml). `gatt run --run {run}` makes one."
        )
    stage.run(load_recipe(run / "recipe.toml"), RunDir(run), repository)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A GGUF file, or a base model as in the recipe.")],
    compare: Annotated[
        str,
        typer.Option(
            help="Another model, or the same without the adapter, which answers beside it."
        ),
    ] = "",
    adapter: Annotated[
        Path | None, typer.Option(help="A GGUF adapter to lay over the model.")
    ] = None,
    adapter_scale: Annotated[
        float, typer.Option(help="How strongly it counts; 1 is as it was trained.")
    ] = 1.0,
    instruction: Annotated[str, typer.Option(help="Put behind your first message.")] = "",
    check: Annotated[
        list[str] | None,
        typer.Option(help="How it is checked, if its wording does not tell: opening=Hark!"),
    ] = None,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    context: Annotated[int, typer.Option(help="Tokens of the whole chat.")] = 4096,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token always.")] = 0.7,
    seed: int = 1,
    load: Annotated[Path | None, typer.Option(help="Go on with a chat that /save wrote.")] = None,
) -> None:
    """Talk with a GGUF. Example: gatt chat runs/demo/export/tuned-Q8_0.gguf --instruction 'Begin every answer with "Ahoy!"'"""
    from pipeline.chat.session import Parameters
    from pipeline.inference.model import Adapter
    from pipeline.stages import chat as stage

    models = [(model, Adapter(adapter, adapter_scale) if adapter else None)]
    if compare:
        models.append((compare, None))
    stage.run(
        models,
        instruction,
        check or (),
        system,
        Parameters(temperature, max_tokens, context, seed),
        load,
    )


@app.command()
def serve(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="GGUF files, or base models as in the recipe."),
    ],
    host: Annotated[
        str, typer.Option(help="Where to listen; one that other machines reach needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8080,
    api_key: Annotated[
        str, typer.Option(envvar="GATT_API_KEY", help="What clients must send.")
    ] = "",
    cors: Annotated[
        list[str] | None,
        typer.Option(help="A web page's origin that may ask: http://localhost:3000."),
    ] = None,
    context: Annotated[
        int, typer.Option(help="Tokens of a conversation, its answers included.", min=256)
    ] = 4096,
    adapter: Annotated[
        list[Path] | None, typer.Option(help="A GGUF adapter; served beside it as MODEL+ADAPTER.")
    ] = None,
    runs: Annotated[
        Path | None, typer.Option(help="Folder whose finished runs the page lists; left out: runs.")
    ] = None,
) -> None:
    """An OpenAI-compatible server on this machine, with a page to talk on. Example: gatt serve runs/demo/export/tuned-Q8_0.gguf"""
    from pipeline.stages import serve as stage

    stage.run(models, adapter or (), host, port, api_key, cors or (), context, runs)


@app.command()
def doctor(
    model: Annotated[
        str,
        typer.Option(help="Only what training this base takes: a preset, GGUF, folder or Hub id."),
    ] = "",
) -> None:
    """What this machine is and which base models can be trained. Example: gatt doctor --model qwen3-1.7b"""
    from pipeline.stages import doctor as stage

    stage.run(model)


def _open(
    recipe: Path | None, run: Path, quick: bool, overrides: list[str] | None, anew: bool = False
) -> tuple[Recipe, RunDir]:
    """The resolved recipe and the run's folder; says what was overridden.

    Without a recipe, a stage goes on with that of the run, and a run begun `anew` takes the demo's.
    """
    from pipeline.recipe import QUICK, load_recipe
    from pipeline.run_dir import RunDir
    from pipeline.system import leads

    changes = (*(QUICK if quick else ()), *(overrides or ()))
    kept = run / "recipe.toml"
    settings = load_recipe(
        kept if recipe is None and not anew and kept.is_file() else recipe, changes
    )
    folder = RunDir(run)
    if not leads():
        return settings, folder
    folder.save_recipe(settings)
    if changes:
        typer.echo(f"Overridden: {', '.join(changes)}", err=True)
    return settings, folder


STAGES = ("instructions", "synthesize", "train", "export", "evaluate", "report")
_SECTIONS = {
    "instructions": ("dialogues", "instructions", "synthesize", "evaluate"),
    "synthesize": ("synthesize", "dialogues"),
    "train": ("train",),
    "export": ("export", "dialogues"),
    "evaluate": ("evaluate", "dialogues", "export"),
    "report": ("evaluate",),
}


def _inputs(name: str, settings: Recipe, folder: RunDir) -> list[Path]:
    """The files whose content decides what the stage gives."""
    from pipeline.hub.models import find_model

    if name == "report":  # which needs no model
        return [folder.scores, folder.exported]
    base = find_model(settings.model).path
    return {
        "instructions": [base, *([folder.lists] if folder.lists.exists() else [])],
        "synthesize": [base, folder.pairs],
        "train": [base, folder.examples, *_brought(settings)],
        "export": [base, folder.adapter, folder.examples],
        "evaluate": [base, folder.pairs, folder.suites, *_tuned(settings, folder)],
    }[name]


def _brought(settings: Recipe) -> list[Path]:
    """The files of the user's own that training takes."""
    adapter = Path(settings.train.adapter).expanduser() / "adapter_model.safetensors"
    files = [Path(settings.train.mix).expanduser()] if settings.train.mix else []
    return [
        file for file in [*files, *([adapter] if settings.train.adapter else [])] if file.is_file()
    ]


def _tuned(settings: Recipe, folder: RunDir) -> list[Path]:
    """What evaluation measures beside the base."""
    if settings.evaluate.adapter:
        return [Path(settings.evaluate.adapter)]
    return [folder.tuned(name) for name in settings.export.formats]


def _stage(name: str, settings: Recipe, folder: RunDir) -> None:
    """Run one stage unless it is done for this recipe and these inputs; its manifest is written last."""
    import importlib

    from pipeline.system import leads

    inputs = _inputs(name, settings, folder)
    missing = [path for path in inputs if not path.exists()]
    if missing:
        raise GattError(
            f"`gatt {name}` needs {missing[0]}, which is not there. Run the stages before it, or `gatt run`."
        )
    key = " ".join(
        [
            str(settings.seed),
            settings.model,
            *(getattr(settings, s).model_dump_json() for s in _SECTIONS[name]),
        ]
    )
    if name != "report" and folder.is_done(name, key, inputs):
        typer.echo(f"{name}: done already", err=True)
        return
    start = time.monotonic()
    if leads():  # of several processes that share the steps of training only one writes
        folder.claim(name, key, inputs)
    importlib.import_module(f"pipeline.stages.{name}").run(settings, folder)
    if leads():
        # Asked for again: the stage may have written an input that users can edit.
        folder.finish(name, key, _inputs(name, settings, folder), time.monotonic() - start)


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit status 1; anything else is a bug, with traceback."""
    try:
        app()
    except GattError as error:
        sys.exit(f"gatt: {' '.join(str(error).split())}")
    except MemoryError:
        sys.exit(
            "gatt: Too little memory: an allocation was refused. Close other programs, or take a smaller model."
        )
    except OSError as error:
        if error.errno == 28:  # ENOSPC
            sys.exit(
                f"gatt: the disk is full ({error.filename or 'while writing'}). Make room and run the same command again."
            )
        raise
