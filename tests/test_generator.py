"""Opening models and servers by name: what the engine gets, and how the teacher differs."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from pipeline.console import Progress
from pipeline.gatt.seeds import derive_seed
from pipeline.hub.convert import cached_gguf, runnable_gguf
from pipeline.hub.models import Model, find_model
from pipeline.inference import generator, teacher
from pipeline.inference.generator import GenerationEngine, context_for, open_generator
from pipeline.inference.openai_client import OpenAIClient
from pipeline.inference.remote.address import is_server_url
from pipeline.inference.teacher import open_teacher
from pipeline.recipe import Recipe, Synthesize
from pipeline.records import Dialogue, Task

URL = "http://127.0.0.1:8000/v1"


class _FakeEngine:
    """What `open_generator` makes of a model, without loading it."""

    def __init__(
        self, path: Path, dialogues: int, context: int, max_sequences: int, adapter: None = None
    ) -> None:
        self.path, self.dialogues, self.context = path, dialogues, context
        self.max_sequences, self.name = max_sequences, path.name

    def __enter__(self) -> _FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing."""

    def run(self, tasks: Iterable[Task]) -> None:
        """Do nothing."""


@pytest.fixture(autouse=True)
def _no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "BatchEngine", _FakeEngine)


def _facts(engine: GenerationEngine) -> tuple[Path, int, int, int, str]:
    assert isinstance(engine, _FakeEngine)
    return engine.path, engine.dialogues, engine.context, engine.max_sequences, engine.name


def test_a_gguf_file_runs_unchanged(base: Path) -> None:
    engine = open_generator(str(base), dialogues=3, context=512)
    assert _facts(engine) == (base, 3, 512, 0, base.stem)


def test_a_preset_runs_in_another_format() -> None:
    engine = open_generator(
        "smollm2-135m", dialogues=3, context=512, format_name="Q4_0", max_parallel=2
    )
    converted = cached_gguf(find_model("smollm2-135m"), "Q4_0")
    assert _facts(engine) == (converted, 3, 512, 2, "smollm2-135m Q4_0")


def test_a_folder_runs_in_q8_0(tiny_llama: Path) -> None:
    model = Model("tiny", tiny_llama)
    assert runnable_gguf(model) == cached_gguf(model, "Q8_0")
    assert runnable_gguf(model, "F16") == cached_gguf(model, "F16")


def test_a_server_and_the_model_on_it() -> None:
    client = open_generator(f"{URL}#large", dialogues=3, context=512)
    assert isinstance(client, OpenAIClient)
    assert client.name == "large"


@pytest.mark.parametrize(
    ("name", "is_server"),
    [(URL, True), ("https://host/v1#model", True), ("owner/name", False), ("http.gguf", False)],
)
def test_a_server_is_known_by_its_scheme(name: str, is_server: bool) -> None:
    assert is_server_url(name) == is_server


def test_the_teacher_runs_as_it_is_without_a_format(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe(synthesize=Synthesize(format="", max_parallel=5))
    engine = open_teacher(recipe, 7)
    context = recipe.dialogues.turns * (80 + 100) + 200
    assert _facts(engine) == (base, 7, context, 5, "smollm2-135m")
    assert not capsys.readouterr().err


def test_the_teachers_conversion_is_measured_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted, measured = tmp_path / "teacher-Q4_0.gguf", list[Path]()

    def measure(path: Path, dialogues: Sequence[Dialogue], bar: Progress) -> teacher._Quality:
        bar.advance(len(dialogues))
        measured.append(path)
        return teacher._Quality(9.5, 0.25 * len(measured))

    monkeypatch.setattr(teacher, "_measure", measure)
    monkeypatch.setattr(teacher, "cached_gguf", lambda model, format_name: converted)
    for count in range(2):
        opened = open_teacher(Recipe(), 7)
        assert opened.name == "smollm2-135m Q4_0"
        shown = capsys.readouterr().err
        # The bar of both measurements, the first time only.
        assert ("first answers of smollm2-135m, as it is and in Q4_0: " in shown) == (count == 0)
        assert shown.endswith(
            "synthesize: smollm2-135m in Q4_0: perplexity and good first answers 9.50 and 50%, "
            "before the conversion 9.50 and 25%\n"
        )
    assert measured == [find_model("smollm2-135m").path, converted]


def test_the_context_has_room_for_every_turn() -> None:
    assert context_for(turns=20, max_tokens=64) == 20 * (64 + 60) + 200


def test_seeds_are_derived_as_in_finished_runs() -> None:
    assert derive_seed(1, "coding-001", 3, 0) == zlib.crc32(b"1 coding-001 3 0") == 1924761587
    assert derive_seed(1, "coding-001", 3) != derive_seed(1, "coding-001", 4)
