"""The commands of a run: write a recipe, run all stages or one of them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.cli.app import (
    DEFAULT_RUN,
    Quick,
    Ray,
    RecipeFile,
    Run,
    Set,
    Storage,
    app,
    execute_stage,
    override_list,
    ray_cluster,
    refuse_options,
    resolve_run,
)
from pipeline.errors import GattError

if TYPE_CHECKING:
    from pipeline.recipe import Recipe


@app.command()
def init(
    path: Annotated[Path, typer.Argument()] = Path("recipe.toml"),
    vram: Annotated[
        float,
        typer.Option(help="Choose the largest base model that trains on a GPU with this many GB."),
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
        from pipeline.training.memory import (
            TOKENS_PER_STEP,
            describe_choice,
            largest_preset,
            usable_bytes,
        )

        model = largest_preset(usable_bytes(vram), TOKENS_PER_STEP, recipe.train, gpu=True)
        if not model:
            raise GattError(
                f"--vram {vram:g}: no preset trains in so little memory. Try 6, 8, 12, 16 or 24 GB."
            )
        typer.echo(describe_choice(model, vram, recipe.train))
        recipe = recipe.model_copy(update={"model": model})
    write_text(path, recipe_toml(recipe))
    typer.echo(f"Wrote {path}. Next: gatt run {path}")


@app.command()
def run(
    recipe: RecipeFile = None,
    run: Run = DEFAULT_RUN,
    quick: Quick = False,
    set: Set = None,
    bake: Annotated[
        str,
        typer.Option(
            help="Train the model to follow this system prompt without being given it: a text "
            "file, or a character card (PNG, JSON or CHARX). Example: --bake prompt.txt --run "
            "runs/pirate"
        ),
    ] = "",
    ray: Ray = "",
    storage: Storage = "",
) -> None:
    """Run every stage; stages that are up to date are skipped. Example: gatt run my.toml --run
    runs/mine
    """
    from pipeline.console import log
    from pipeline.run import is_quick_demo, open_run, run_stages
    from pipeline.system import is_main_process

    changes = override_list(set, quick=quick)
    if bake:
        changes.append(f"instructions.bake={_toml_value(bake)}")
    reuse_recipe = recipe is None and not is_quick_demo(run, changes)
    settings, run_dir = open_run(recipe, run, changes, reuse_recipe=reuse_recipe)
    if reuse_recipe and run_dir.recipe.is_file() and is_main_process():
        log(f"Recipe: {run_dir.recipe}, saved in this folder. `gatt run FILE` takes another one.")
    with ray_cluster(ray, storage):
        run_stages(settings, run_dir)
    tuned = run_dir.tuned(settings.export.formats[0])
    typer.echo(f"Report: {run_dir.report / 'report.html'}")
    typer.echo(f"Model:  {tuned}")
    typer.echo(f"Chat:   {_chat_command(settings, tuned)}")


def _toml_value(value: str | list[str]) -> str:
    """Return the value of an override; TOML has no halves of emoji, which JSON escapes to."""
    return json.dumps(value, ensure_ascii=False)


def _chat_command(settings: Recipe, tuned: Path) -> str:
    """Return a shell line that chats with the model under the first instruction."""
    import shlex
    import shutil
    import subprocess

    from pipeline.report.facts import chat_options

    on_path = shutil.which("gatt")
    program = "gatt" if on_path else _relative(Path(sys.executable).with_name("gatt"))
    words = [program, "chat", str(tuned), *chat_options(settings)]
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def _relative(path: Path) -> str:
    """Return the path from the current folder; on another drive of Windows, the whole path."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return str(path)


def _define(name: str, summary: str) -> Callable[..., None]:
    def command(
        recipe: RecipeFile = None,
        run: Run = DEFAULT_RUN,
        quick: Quick = False,
        set: Set = None,
    ) -> None:
        execute_stage(name, *resolve_run(recipe, run, override_list(set, quick=quick)))

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
        from pipeline.console import print_table
        from pipeline.gatt.instructions import kinds_table

        print_table(("kind", "family", "method", "example"), kinds_table())
        return
    execute_stage("instructions", *resolve_run(recipe, run, override_list(set, quick=quick)))


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
    ray: Ray = "",
) -> None:
    """Generate the training dialogues. Example: gatt synthesize my.toml --run runs/mine --stats"""
    settings, run_dir = resolve_run(recipe, run, override_list(set, quick=quick))
    if not stats:
        with ray_cluster(ray):
            execute_stage("synthesize", settings, run_dir)
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
        float | None,
        typer.Option(
            help="Stop when this share of the validation answers is adherent; 0: never.", max=1
        ),
    ] = None,
    ray: Ray = "",
    storage: Storage = "",
) -> None:
    """Train the adapter. Example: gatt train my.toml --run runs/mine --early-stop 0.95"""
    changes = [] if early_stop is None else [f"train.early_stop_adherence={early_stop}"]
    settings, run_dir = resolve_run(recipe, run, [*override_list(set, quick=quick), *changes])
    if show_labels:
        from pipeline.stages import train as stage

        stage.show_labels(settings, run_dir)
        return
    from pipeline.system import is_main_process

    if not resume and is_main_process():
        with run_dir.lock():
            run_dir.restart_training()
    with ray_cluster(ray, storage):
        execute_stage("train", settings, run_dir)


@app.command()
def export(
    context: typer.Context,
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
    from pipeline.folders import create_folder, lock_folder
    from pipeline.gguf.checkpoint_writer import require_new
    from pipeline.recipe_file import load_recipe
    from pipeline.stages import export as stage

    if model:
        reason = "cannot be used with --model, which exports a model without a run. Leave it out."
        refuse_options(context, ("recipe", "run", "quick", "set"), reason)
    else:
        reason = "needs --model. Without it, a run is exported: what it has trained, in its folder."
        refuse_options(context, ("adapter", "out", "converter"), reason)
    if merged_dir:
        require_new(merged_dir)
        create_folder(merged_dir.parent, "--merged-dir")
    options = {
        "formats": _toml_value(format) if format else "",
        "merge_base": merge_base,
        "verify_tokenizer": "false" if allow_tokenizer_mismatch else "",
    }
    changes = [f"export.{key}={value}" for key, value in options.items() if value]
    if not model:
        settings, run_dir = resolve_run(recipe, run, [*override_list(set, quick=quick), *changes])
        execute_stage("export", settings, run_dir)
        if merged_dir:
            stage.write_merged(settings, run_dir, merged_dir)
    else:
        standalone = load_recipe(None, ("export.merge_base=fp16", *changes)).export
        with lock_folder(out, "--out"):
            stage.export_standalone(model, adapter, out, standalone, converter, merged_dir)


@app.command()
def evaluate(
    recipe: RecipeFile = None,
    run: Run = DEFAULT_RUN,
    quick: Quick = False,
    set: Set = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="Measure the base model with this GGUF adapter, not the exported file."),
    ] = None,
    adapter_scale: Annotated[
        float | None, typer.Option(help="Scale of the adapter; 1 is as trained.")
    ] = None,
    compare_with: Annotated[
        list[str] | None,
        typer.Option(help="Also measure this: a GGUF, an adapter, or URL/v1#model."),
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="A model or server that judges what no program can check.")
    ] = None,
    sampler: Annotated[
        Literal["gatt", "plain", "greedy"],
        typer.Option(
            help="Measure base and tuned once more with this sampler, beside the evaluation. "
            "plain: temperature 0.8, top-k 40, top-p 0.95, min-p 0.05, no DRY, as most programs; "
            "gatt: that of the evaluation."
        ),
    ] = "gatt",
    turns: Annotated[
        int,
        typer.Option(
            help="Measure them once more in dialogues of this many turns; 0: as the evaluation.",
            min=0,
        ),
    ] = 0,
    ray: Ray = "",
) -> None:
    """Measure base, tuned and ceiling by turn. Example: gatt evaluate --compare-with rival.gguf"""
    options = {
        "adapter": adapter,
        "adapter_scale": adapter_scale,
        "extra_models": _toml_value(compare_with) if compare_with else None,
        "judge": judge,
    }
    changes = [f"evaluate.{key}={value}" for key, value in options.items() if value is not None]
    settings, run_dir = resolve_run(recipe, run, [*override_list(set, quick=quick), *changes])
    if adapter_scale is not None and not settings.evaluate.adapter:
        raise GattError(
            "--adapter-scale needs --adapter, or evaluate.adapter in the recipe. The exported file "
            "has its adapter merged."
        )
    from pipeline.stages import evaluate as stage

    stage.require_assigned(settings, run_dir)
    with ray_cluster(ray):
        execute_stage("evaluate", settings, run_dir)
        if sampler != "gatt" or turns:
            from pipeline.evaluation.conditions import Condition

            condition = Condition(sampler, turns or settings.evaluate.turns)
            stage.run_condition(settings, run_dir, condition)


_define("report", "Render the report.")
