"""The commands outside a run: compare, push, chat, serve, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.app import DEFAULT_RUN, Run, app
from pipeline.errors import GattError


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
    lines: Annotated[
        bool,
        typer.Option(
            "--lines",
            help="In a pipe: each line is a message or a command. Default: all of it is a message.",
        ),
    ] = False,
) -> None:
    """Chat with a GGUF. Example: gatt chat tuned-Q8_0.gguf --compare smollm2-135m"""
    from pipeline.chat.session import SamplingParams
    from pipeline.inference.llama.model import Adapter
    from pipeline.stages import chat as stage

    models = [(model, Adapter(adapter, adapter_scale) if adapter else None)]
    if compare:
        models.append((compare, None))
    start = stage.start_conversation(instruction, check or (), system)
    sampling = SamplingParams(temperature, max_tokens, seed)
    stage.run(models, start, sampling, context, load, lines=lines)


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

    access = stage.Access(host, port, api_key, cors or ())
    stage.run(models, adapter or (), access, context, runs)


@app.command()
def doctor(
    model: Annotated[str, typer.Option(help="Only show what training this base model takes.")] = "",
) -> None:
    """Show what this machine is and what it can train. Example: gatt doctor --model qwen3-1.7b"""
    from pipeline.stages import doctor as stage

    stage.run(model)
