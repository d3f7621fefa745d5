"""The commands outside a run: compare, exam, push, chat, serve, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.cli.app import DEFAULT_RUN, Ray, Run, app, ray_cluster
from pipeline.errors import GattError


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of evaluated runs, or result files of gatt exam; the first is the "
            "reference."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Output folder for the page, the chart and the table.")
    ] = Path("comparison"),
) -> None:
    """Compare runs in one table and one chart. Example: gatt compare runs/all_turns runs/distill"""
    from pipeline.recipe_file import load_recipe
    from pipeline.run import outdated_stages
    from pipeline.run_dir import RunDir
    from pipeline.stages.compare import compare as compare_runs

    folders = [path for path in runs if (path / "recipe.toml").is_file()]
    outdated = {
        path: outdated_stages(load_recipe(path / "recipe.toml"), RunDir(path)) for path in folders
    }
    compare_runs(runs, out, outdated)


@app.command()
def exam(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="A GGUF file, a preset, a Hugging Face folder, an adapter (GGUF or folder) after "
            "the model that it is on, or a server: http://host:port/v1#model.",
        ),
    ],
    turns: Annotated[
        str | None,
        typer.Option(
            help="20 (default), 50, another number, or context: until the context is full. Of a "
            "benchmark, all are the default."
        ),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help="once, every, every-K (in turns K+1, 2K+1, ...), depth-D, system, failed, or "
            "steer and steer-S: a control vector of strength S, for a model on this machine "
            "(slow); can be repeated. Default: once, every, every-5, depth-4, system, failed."
        ),
    ] = None,
    regime: Annotated[
        list[str] | None,
        typer.Option(
            help="first, system, three, replaced, added, stopped, contradicted, long or "
            "attributes; can be repeated. Default: all."
        ),
    ] = None,
    dialogues: Annotated[
        int, typer.Option(help="Dialogues of each regime; 0 takes all.", min=0)
    ] = 0,
    sampler: Annotated[
        Literal["plain", "greedy", "gatt"],
        typer.Option(
            help="plain: temperature 0.8, top-k 40, top-p 0.95, min-p 0.05, as most programs; "
            "gatt: that of gatt evaluate, with DRY."
        ),
    ] = "plain",
    window: Annotated[
        Literal["drop", "pin", "refuse"],
        typer.Option(
            help="When the context is full: drop the older half of the exchanges, pin the first "
            "one and drop half of the others, or refuse and end the dialogue."
        ),
    ] = "drop",
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Maximum tokens of an answer; long ones: four times. Default: 256.", min=8
        ),
    ] = None,
    context: Annotated[
        int,
        typer.Option(
            help="Context in tokens; 0: 4096, for more than 20 turns 8192. A server has its own.",
            min=0,
        ),
    ] = 0,
    training_minutes: Annotated[
        float | None,
        typer.Option(help="What training the models after the first took, to see when it pays."),
    ] = None,
    max_parallel: Annotated[
        int, typer.Option(help="Dialogues in parallel; 0 uses what the machine allows.", min=0)
    ] = 0,
    seed: int = 1,
    out: Annotated[
        Path, typer.Option(help="Output folder; what an interrupted exam has done is kept there.")
    ] = Path("exams"),
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="One dialogue of each regime, 8 turns, short answers, two arms."
        ),
    ] = False,
    ifeval: Annotated[
        bool,
        typer.Option(
            "--ifeval", help="Also compare our checks with IFEval's and IFBench's verifiers."
        ),
    ] = False,
    benchmark: Annotated[
        str,
        typer.Option(
            help="Ask a public benchmark instead: mt-eval, multi-if, persona-drift, "
            "real-guardrails, sequor, struct-flow or sysbench."
        ),
    ] = "",
    benchmark_file: Annotated[
        Path | None, typer.Option(help="The file (SEQUOR: folder) that its authors publish.")
    ] = None,
    ray: Ray = "",
) -> None:
    """Measure how long instructions hold. Example: gatt exam smollm2-135m tuned-Q8_0.gguf"""
    from pipeline.stages import exam as stage

    options = stage.ExamOptions(
        turns=turns,
        arms=arm or (),
        regimes=regime or (),
        dialogues=dialogues,
        sampler=sampler,
        window=window,
        max_tokens=max_tokens,
        context=context,
        training_minutes=training_minutes,
        max_parallel=max_parallel,
        seed=seed,
        quick=quick,
        ifeval=ifeval,
        benchmark=benchmark,
        benchmark_file=benchmark_file,
    )
    with ray_cluster(ray):
        stage.run(models, options, out)


@app.command()
def push(
    repository: Annotated[
        str, typer.Argument(help="owner/name on the Hub; created as private if it is new.")
    ],
    run: Run = DEFAULT_RUN,
) -> None:
    """Upload a finished run with a model card. Example: gatt push me/my-model --run runs/demo"""
    from pipeline.run import open_run, outdated_stages
    from pipeline.stages import push as stage

    if not (run / "recipe.toml").is_file():
        raise GattError(f"No run in {run} (no recipe.toml). `gatt run --run {run}` makes one.")
    recipe, run_dir = open_run(None, run)
    run_dir.outdated = outdated_stages(recipe, run_dir)
    stage.run(recipe, run_dir, repository)


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
        float | None, typer.Option(help="Scale of the adapter; 1 is as trained.")
    ] = None,
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

    if adapter_scale is not None and not adapter:
        raise GattError("--adapter-scale needs --adapter. Without one there is nothing to scale.")
    scale = 1.0 if adapter_scale is None else adapter_scale
    models = [(model, Adapter(adapter, scale) if adapter else None)]
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
    batch_invariant: Annotated[
        bool,
        typer.Option(
            "--batch-invariant",
            help="Answers do not depend on other requests, not even by rounding; slower.",
        ),
    ] = False,
) -> None:
    """Serve an OpenAI-compatible API and a chat page. Example: gatt serve smollm2-135m"""
    from pipeline.stages import serve as stage

    access = stage.Access(host, port, api_key, cors or ())
    stage.run(models, adapter or (), access, context, runs, batch_invariant=batch_invariant)


@app.command()
def doctor(
    model: Annotated[str, typer.Option(help="Only show what training this base model takes.")] = "",
) -> None:
    """Show what this machine is and what it can train. Example: gatt doctor --model qwen3-1.7b"""
    from pipeline.stages import doctor as stage

    stage.run(model)
