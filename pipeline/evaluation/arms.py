"""The arms of an evaluation: which models are measured, and under which names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import GattError
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gguf.reader import open_gguf, read_gguf
from pipeline.hub.convert import cached_gguf
from pipeline.hub.models import find_model
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.generator import (
    EngineOptions,
    GenerationEngine,
    context_for,
    open_engine,
    open_generator,
    thought_room,
)
from pipeline.inference.llama.model import Adapter, LoadedModel
from pipeline.inference.remote.address import is_server_url, served_name
from pipeline.recipe import Evaluate, Recipe
from pipeline.run_dir import RunDir


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A model under a name: a GGUF at `path`, perhaps with an adapter on it, or a `server`.

    `in_all_suites`: measured in the further suites too; else in those of `further_suites`.
    `repeats_instruction`: every user message has the instruction.
    """

    name: str
    path: Path | None = None
    adapter: Adapter | None = None
    server: str = ""
    in_all_suites: bool = True
    further_suites: tuple[str, ...] = ()
    repeats_instruction: bool = False

    def runs(self, suite: str) -> bool:
        """Return whether the model is measured in `suite`."""
        return self.in_all_suites or suite in ("evaluation", *self.further_suites)

    def open(
        self,
        recipe: Recipe,
        dialogues: Sequence[AssignedDialogue],
        weights: LoadedModel | None = None,
    ) -> GenerationEngine:
        """Open the model for `dialogues`; `weights` are those of `path`, if they are loaded.

        Its context has room for all their turns, as far as the model was made for that many tokens.

        Raises:
            GattError: as `open_generator`.
        """
        settings = recipe.evaluate
        context = dialogue_context(recipe, dialogues, reminded=self.repeats_instruction)
        source = weights or self.path
        if source is None:
            return open_generator(
                self.server,
                dialogues=len(dialogues),
                context=context,
                max_parallel=settings.max_parallel,
                max_thought_tokens=settings.max_thought_tokens,
            )
        info = source.info if isinstance(source, LoadedModel) else open_gguf(source)
        context += thought_room(info.path, settings.max_thought_tokens)
        context = min(context, info.context_length)
        if isinstance(source, LoadedModel):
            parallel = settings.max_parallel
            return BatchEngine(source, len(dialogues), context, parallel, adapter=self.adapter)
        options = EngineOptions(
            dialogues=len(dialogues),
            context=context,
            max_parallel=settings.max_parallel,
            adapter=self.adapter,
        )
        return open_engine(source, options)


def dialogue_context(
    recipe: Recipe, dialogues: Sequence[AssignedDialogue], *, reminded: bool
) -> int:
    """Return the tokens of a context in which all turns of each dialogue fit, without thoughts.

    If `reminded`, the instruction stands in every turn.
    """
    turns, system = recipe.evaluate.turns, recipe.dialogues.system
    further = (
        dialogue.further_tokens(turns, reminders=turns if reminded else 1, system=system)
        for dialogue in dialogues
    )
    return context_for(turns, recipe.evaluate.max_tokens) + max(further, default=0)


def files_of_user(settings: Evaluate) -> list[Path]:
    """Return the adapter and the further models that are measured, without servers.

    Raises:
        GattError: a file is missing, no GGUF, or as `evaluate.adapter` no adapter.
    """
    files = [("adapter", settings.adapter)] if settings.adapter else []
    files += [("extra_models", name) for name in settings.extra_models if not is_server_url(name)]
    paths = []
    for key, name in files:
        path = Path(name).expanduser()
        expected = "a GGUF adapter"
        if key == "extra_models":
            expected = "a GGUF model, a GGUF adapter, or a server's address"
        if not path.is_file():
            raise GattError(f"evaluate.{key}: no file at {path}. Expected {expected}.")
        if key == "adapter" and read_gguf(path).field("general.type") != "adapter":
            raise GattError(f"evaluate.{key}: {path} is not an adapter. Expected {expected}.")
        paths.append(path)
    return paths


def arms(recipe: Recipe, run_dir: RunDir) -> list[Arm]:
    """Return base, tuned in each format (or the recipe's adapter), the extra models, and ceiling.

    Ceiling is the base that gets the instruction in every turn.

    Raises:
        GattError: an extra model is no GGUF, or two have the same name.
    """
    settings = recipe.evaluate
    first_format, *formats = recipe.export.formats
    base = cached_gguf(find_model(recipe.model), first_format)
    if settings.adapter:
        adapter = Adapter(Path(settings.adapter).expanduser(), settings.adapter_scale)
        tuned = [Arm(name="tuned", path=base, adapter=adapter)]
    else:
        tuned = [Arm(name="tuned", path=run_dir.tuned(first_format))]
        tuned += [
            Arm(name=f"tuned, {name}", path=run_dir.tuned(name), in_all_suites=False)
            for name in formats
        ]
    extra = [_extra_model(name, base) for name in settings.extra_models]
    ceiling = Arm(
        name="ceiling",
        path=base,
        in_all_suites=False,
        further_suites=settings.reminded_suites,
        repeats_instruction=True,
    )
    all_arms = [Arm(name="base", path=base), *tuned, *extra, ceiling]
    (name, count), *_ = Counter(arm.name for arm in all_arms).most_common(1)
    if count > 1:
        raise GattError(f"evaluate.extra_models has two of the name {name!r}. Rename the file.")
    return all_arms


def _extra_model(name: str, base: Path) -> Arm:
    if is_server_url(name):
        return Arm(name=served_name(name), server=name)
    path = Path(name).expanduser()
    if read_gguf(path).field("general.type") == "adapter":
        return Arm(name=path.stem, path=base, adapter=Adapter(path))
    return Arm(name=path.stem, path=path)
