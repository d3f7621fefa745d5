"""The `gatt` command. A stage and its libraries are imported when the stage is called."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
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
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key: --set train.max_steps=20.")
]
DEFAULT_RUN = Path("runs/demo")


@app.command()
def init(
    path: Annotated[Path, typer.Argument()] = Path("recipe.toml"),
    vram: Annotated[
        float,
        typer.Option(help="Choose the largest base model that trains on a GPU of so many GB."),
    ] = 0,
) -> None:
    """Write a recipe with every key, its default and its meaning. Example: gatt init my.toml --vram
    12
    """
    from pipeline.files import write_text
    from pipeline.recipe import Recipe
    from pipeline.recipe_file import recipe_toml

    if path.exists():
        raise GattError(f"{path} exists already and was not changed. Name another file.")
    recipe = Recipe()
    if vram:
        from pipeline.training.memory import TOKENS_PER_STEP, largest_preset, usable_bytes

        model = largest_preset(usable_bytes(vram), TOKENS_PER_STEP, recipe.train, gpu=True)
        if not model:
            raise GattError(
                f"--vram {vram:g}: no preset trains in so little memory. Try 8, 12, 16 or 24 GB."
            )
        recipe = recipe.model_copy(update={"model": model})
    write_text(path, recipe_toml(recipe))
    typer.echo(f"Wrote {path}. Next: gatt run {path}")


@app.command()
def run(
    recipe: RecipeFile = None,
    run: Run = DEFAULT_RUN,
    quick: Quick = False,
    set: Set = None,
) -> None:
    """Run every stage; stages that are up to date are skipped. Example: gatt run my.toml --run
    runs/mine
    """
    from pipeline.run import open_run, run_stages

    changes = _overrides(quick, set)
    settings, run_dir = open_run(recipe, run, changes, reuse_recipe=False)
    run_stages(settings, run_dir)
    tuned = run_dir.tuned(settings.export.formats[0])
    typer.echo(f"Report: {run_dir.report / 'report.html'}")
    typer.echo(f"Model:  {tuned}")
    typer.echo(f"Chat:   {_chat_command(settings, tuned)}")


def _chat_command(settings: Recipe, tuned: Path) -> str:
    """Return a shell line that chats with the model under the first trained instruction."""
    import shlex
    import shutil
    import subprocess

    from pipeline.gatt.instructions import render_instruction

    on_path = shutil.which("gatt")
    program = "gatt" if on_path else os.path.relpath(Path(sys.executable).with_name("gatt"))
    instruction = render_instruction(settings.instructions.pool[:1]).text
    options = ["--system", settings.dialogues.system, "--instruction", instruction]
    words = [program, "chat", str(tuned), *options]
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def _define(name: str, summary: str) -> Callable[..., None]:
    def command(
        recipe: RecipeFile = None,
        run: Run = DEFAULT_RUN,
        quick: Quick = False,
        set: Set = None,
    ) -> None:
        _stage(name, *_open(recipe, run, _overrides(quick, set)))

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
    """Assign an instruction to each dialogue. Example: gatt instructions my.toml --run runs/mine"""
    if kinds:
        from pipeline.gatt.instructions import table_of_kinds

        typer.echo(table_of_kinds())
        return
    _stage("instructions", *_open(recipe, run, _overrides(quick, set)))


@app.command()
def synthesize(
    recipe: RecipeFile = None,
    run: Run = DEFAULT_RUN,
    quick: Quick = False,
    set: Set = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Only show how many candidates were accepted.")
    ] = False,
    push: Annotated[
        str, typer.Option(help="Upload the dialogues to this dataset on the Hub: owner/name.")
    ] = "",
) -> None:
    """Generate the training dialogues. Example: gatt synthesize my.toml --run runs/mine --stats"""
    settings, run_dir = _open(recipe, run, _overrides(quick, set))
    if not stats:
        _stage("synthesize", settings, run_dir)
    if stats or push:
        from pipeline.stages import synthesize as stage

        stage.show_statistics(run_dir)
        if push:
            stage.push(run_dir, push)


@app.command()
def train(
    recipe: RecipeFile = None,
    run: Run = DEFAULT_RUN,
    quick: Quick = False,
    set: Set = None,
    show_labels: Annotated[
        bool, typer.Option("--show-labels", help="Only show which tokens carry a loss.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Continue from the last checkpoint.")
    ] = True,
    early_stop: Annotated[
        float,
        typer.Option(help="Stop when this share of the validation answers is adherent.", max=1),
    ] = 0.0,
) -> None:
    """Train the adapter. Example: gatt train my.toml --run runs/mine --early-stop 0.95"""
    changes = [f"train.early_stop_adherence={early_stop}"] if early_stop else []
    settings, run_dir = _open(recipe, run, [*_overrides(quick, set), *changes])
    if show_labels:
        from pipeline.stages import train as stage

        stage.show_labels(settings, run_dir)
        return
    if not resume:
        import shutil

        shutil.rmtree(run_dir.checkpoints, ignore_errors=True)
    _stage("train", settings, run_dir)


@app.command()
def export(
    recipe: RecipeFile = None,
    run: Run = DEFAULT_RUN,
    quick: Quick = False,
    set: Set = None,
    model: Annotated[
        str,
        typer.Option(help="Export this base model, not a run: a preset, GGUF, folder or Hub id."),
    ] = "",
    adapter: Annotated[
        Path | None, typer.Option(help="With --model: a PEFT LoRA folder to merge into it.")
    ] = None,
    out: Annotated[Path, typer.Option(help="With --model: output folder.")] = Path("export"),
    format: Annotated[
        list[str] | None, typer.Option(help="Q8_0, F16, Q4_K_M, ...; can be repeated.")
    ] = None,
    merge_base: Annotated[
        str,
        typer.Option(help="Weights to merge into: fp16, nf4, or auto (the one with lower loss)."),
    ] = "",
    merged_dir: Annotated[
        Path | None, typer.Option(help="Also write a float32 checkpoint for transformers here.")
    ] = None,
    allow_tokenizer_mismatch: Annotated[
        bool,
        typer.Option(
            "--allow-tokenizer-mismatch",
            help="Export even if llama.cpp tokenizes differently from the training tokenizer.",
        ),
    ] = False,
    converter: Annotated[
        Path | None,
        typer.Option(help="Your copy of convert_hf_to_gguf.py, for an unsupported architecture."),
    ] = None,
) -> None:
    """Merge the adapter, write GGUF. Example: gatt export --model qwen3-0.6b --adapter my-lora"""
    from pipeline.gguf.checkpoint_writer import require_new
    from pipeline.recipe_file import load_recipe
    from pipeline.stages import export as stage

    if merged_dir:
        require_new(merged_dir)
    options = {
        "formats": json.dumps(format) if format else "",
        "merge_base": merge_base,
        "verify_tokenizer": "false" if allow_tokenizer_mismatch else "",
    }
    changes = [f"export.{key}={value}" for key, value in options.items() if value]
    if not model:
        if converter:
            raise GattError(
                "--converter needs --model: a run starts from a model of a supported architecture."
            )
        settings, run_dir = _open(recipe, run, [*_overrides(quick, set), *changes])
        _stage("export", settings, run_dir)
        model, adapter = settings.model, run_dir.adapter
    else:
        standalone = load_recipe(None, ("export.merge_base=fp16", *changes)).export
        stage.export_standalone(model, adapter, out, standalone, converter)
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
        typer.Option(help="Measure the base model with this GGUF adapter, not the exported file."),
    ] = "",
    adapter_scale: Annotated[
        float, typer.Option(help="Scale of the adapter; 1 is as trained.")
    ] = 1.0,
    compare_with: Annotated[
        list[str] | None,
        typer.Option(help="Also measure this: a GGUF, an adapter, or URL/v1#model."),
    ] = None,
    judge: Annotated[
        str, typer.Option(help="A model or server that judges what no program can check.")
    ] = "",
) -> None:
    """Measure base, tuned and ceiling by turn. Example: gatt evaluate --compare-with rival.gguf"""
    changes = []
    if adapter:
        changes = [f"evaluate.adapter={adapter}", f"evaluate.adapter_scale={adapter_scale}"]
    if compare_with:
        changes.append(f"evaluate.extra_models={json.dumps(compare_with)}")
    if judge:
        changes.append(f"evaluate.judge={judge}")
    _stage("evaluate", *_open(recipe, run, [*_overrides(quick, set), *changes]))


_define("report", "Render the report.")


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders of evaluated runs; the first is the reference."),
    ],
    out: Annotated[
        Path, typer.Option(help="Output folder for the page, the chart and the table.")
    ] = Path("comparison"),
) -> None:
    """Compare runs in one table and one chart. Example: gatt compare runs/all_turns runs/distill"""
    from pipeline.stages.compare import compare as compare_runs

    compare_runs(runs, out)


@app.command()
def push(
    repository: Annotated[
        str, typer.Argument(help="owner/name on the Hub; created as private if it is new.")
    ],
    run: Run = DEFAULT_RUN,
) -> None:
    """Upload a finished run with a model card. Example: gatt push me/my-model --run runs/demo"""
    from pipeline.recipe_file import load_recipe
    from pipeline.run_dir import RunDir
    from pipeline.stages import push as stage

    if not (run / "recipe.toml").is_file():
        raise GattError(f"No run in {run} (no recipe.toml). `gatt run --run {run}` makes one.")
    stage.run(load_recipe(run / "recipe.toml"), RunDir(run), repository)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A GGUF file, or a base model as in the recipe.")],
    compare: Annotated[
        str, typer.Option(help="A second model, or the same one without its adapter.")
    ] = "",
    adapter: Annotated[
        Path | None, typer.Option(help="A GGUF LoRA adapter, applied at run time.")
    ] = None,
    adapter_scale: Annotated[
        float, typer.Option(help="Scale of the adapter; 1 is as trained.")
    ] = 1.0,
    instruction: Annotated[
        str, typer.Option(help="Instruction appended to your first message.")
    ] = "",
    check: Annotated[
        list[str] | None,
        typer.Option(help="How to check it, if its wording does not tell: opening=Hello!"),
    ] = None,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    context: Annotated[int, typer.Option(help="Context length in tokens.")] = 4096,
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy decoding.")] = 0.7,
    seed: int = 1,
    load: Annotated[
        Path | None, typer.Option(help="Continue a chat that was saved with /save.")
    ] = None,
) -> None:
    """Chat with a GGUF. Example: gatt chat tuned-Q8_0.gguf --compare smollm2-135m"""
    from pipeline.chat.session import ChatParams
    from pipeline.inference.model import Adapter
    from pipeline.stages import chat as stage

    models = [(model, Adapter(adapter, adapter_scale) if adapter else None)]
    if compare:
        models.append((compare, None))
    params = ChatParams(temperature, max_tokens, context, seed)
    stage.run(models, instruction, check or (), system, params, load)


@app.command()
def serve(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="GGUF files, or base models as in the recipe."),
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; one that others can reach needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 chooses a free port.", min=0, max=65535)] = 8080,
    api_key: Annotated[
        str, typer.Option(envvar="GATT_API_KEY", help="Key that clients must send.")
    ] = "",
    cors: Annotated[
        list[str] | None,
        typer.Option(help="Allowed origin of a web page: http://localhost:3000."),
    ] = None,
    context: Annotated[
        int, typer.Option(help="Context length of a conversation in tokens.", min=256)
    ] = 4096,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="A GGUF LoRA adapter; also served, as MODEL+ADAPTER."),
    ] = None,
    runs: Annotated[
        Path | None, typer.Option(help="Folder whose finished runs the page lists. Default: runs.")
    ] = None,
) -> None:
    """Serve an OpenAI-compatible API and a chat page. Example: gatt serve smollm2-135m"""
    from pipeline.stages import serve as stage

    stage.run(models, adapter or (), host, port, api_key, cors or (), context, runs)


@app.command()
def doctor(
    model: Annotated[str, typer.Option(help="Only show what training this base model takes.")] = "",
) -> None:
    """Show what this machine is and what it can train. Example: gatt doctor --model qwen3-1.7b"""
    from pipeline.stages import doctor as stage

    stage.run(model)


def _overrides(quick: bool, changes: list[str] | None) -> list[str]:
    from pipeline.recipe_file import QUICK

    return [*(QUICK if quick else ()), *(changes or ())]


def _open(recipe: Path | None, run: Path, overrides: list[str]) -> tuple[Recipe, RunDir]:
    from pipeline.run import open_run

    return open_run(recipe, run, overrides)


def _stage(name: str, settings: Recipe, run_dir: RunDir) -> None:
    from pipeline.run import run_stage

    run_stage(name, settings, run_dir)


def main() -> None:
    """Run the command line.

    A user's mistake is one line on stderr and exit status 1; anything else is a bug and keeps its
    traceback.
    """
    try:
        app()
    except GattError as error:
        sys.exit(f"gatt: {' '.join(str(error).split())}")
    except MemoryError:
        sys.exit("gatt: Out of memory. Close other programs, or choose a smaller model.")
    except OSError as error:
        if error.errno == 28:  # ENOSPC
            where = error.filename or "while writing"
            sys.exit(
                f"gatt: the disk is full ({where}). Free space and run the same command again."
            )
        raise
