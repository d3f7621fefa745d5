"""The recipe: every setting of a run, its default and its meaning, each in one place.

Precedence: default < recipe file < `--quick` < `--set KEY=VALUE`. An unknown key is an error that names the nearest.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

import tomlkit
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tomlkit.exceptions import ParseError

from pipeline.errors import GattError
from pipeline.records import Constraint


class Section(BaseModel):
    """Frozen and strict; the docstring under a field is its help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Dialogues(Section):
    """Where the users' turns come from."""

    source: str = "seed"
    """"seed" (built in), a JSONL, JSON or Parquet file (`messages`, ShareGPT or `turns`), or a dataset id for `datasets`."""
    turns: int = Field(default=6, ge=1)
    """User turns of a training dialogue; longer ones are cut."""
    train: int = Field(default=200, ge=1)
    """Training dialogues; the sources are cut into pieces of `turns`, and reused with other instructions if need be."""
    watched: int = Field(default=6, ge=0)
    """Dialogues that are held out to see, at each checkpoint of training, whether the instruction holds yet; 0 is none."""
    system: str = "You are a friendly assistant. Answer in one or two short sentences."
    """The system message of every arm, in training and in evaluation; "" leaves it to the chat template."""


class Instructions(Section):
    """What is taught, as in section 3.3 of the paper."""

    pool: tuple[Constraint, ...] = (
        Constraint("opening", "Ahoy!"),
        Constraint("opening", "Hark!"),
        Constraint("opening", "Good news:"),
        Constraint("closing", "Over and out."),
        Constraint("closing", "Stay curious!"),
        Constraint("persona", "Captain Nemo"),
    )
    """The constraints to draw from; `gatt instructions --kinds` lists the kinds."""
    generate: tuple[Literal["persona", "hobby", "language"], ...] = ()
    """Kinds of which the teacher lists values itself, as in the paper; only those that it proves to know join the pool.
    They stand in `lists.toml` of the run, to be edited."""
    generate_count: int = Field(default=8, ge=1)
    """Values of each such kind."""
    combine_share: float = Field(default=0.15, ge=0, le=1)
    """Share of the dialogues whose instruction combines two compatible constraints."""
    short_share: float = Field(default=0.3, ge=0, le=1)
    """Share of the training dialogues that show the shortened instruction (half of the combined ones in the paper)."""
    plain_share: float = Field(default=0.1, ge=0, le=1)
    """Share of the training dialogues without an instruction, so that the model learns not to invent one."""
    system_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the instructed dialogues that have the instruction in the system message instead of the first turn."""
    change_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the instructed dialogues in which another instruction takes over half-way ("From now on: ...")."""


class Synthesize(Section):
    """How the teacher answers."""

    edited_share: float = Field(default=0.9, ge=0, le=1)
    """Of the dialogues whose instruction can be obeyed by an exact edit: the share that is edited, not sampled."""
    teacher: str = ""
    """Who answers: "" is the base itself; another model, as in `model`; or an OpenAI-compatible server, "http://host:port/v1"
    or "http://host:port/v1#name-of-the-model"."""
    format: str = "Q4_0"
    """llama.cpp's format that a local teacher runs in; Q4_0 is the quickest on a CPU. "" takes a GGUF as it is."""
    candidates: int = Field(default=4, ge=1)
    """Answers drawn for one turn before the dialogue is cut short there."""
    max_tokens: int = Field(default=80, ge=8)
    """Longest answer, in tokens."""
    sentences: int = Field(default=1, ge=1)
    """An edited answer is cut after so many sentences."""
    temperature: float = Field(default=0.8, ge=0)
    """Of the sampling, with top-k 40, min-p 0.05 and DRY against repeating earlier answers."""
    sequences: int = Field(default=0, ge=0)
    """Dialogues that are generated side by side; 0 is what the machine allows (with a server: 24). On a CPU the answers do
    not depend on it."""


class Train(Section):
    """4-bit QLoRA through Unsloth."""

    loss: Literal["all_turns", "last_turn", "distill"] = "distill"
    """Learn every answer of a dialogue; only the last, as in the paper; or every answer, and of the teacher's own words not
    these but what the base (the adapter switched off) finds likely in the chat as the teacher had it."""
    own_weight: float = Field(default=0.3, ge=0, le=1)
    """Weight in the loss of the words that the teacher said itself before an edit made them obey. All of the lesson is in the
    edited tokens (weight 1); the others are the model's own, and learning them wears it out."""
    cross_entropy: float = Field(default=0.0, ge=0, le=1)
    """With "distill": share of the cross-entropy in what is learned of the teacher's own words."""
    temperature: float = Field(default=1.0, gt=0)
    """With "distill": flattens both distributions before they are compared."""
    top_k: int = Field(default=0, ge=0)
    """With "distill": how many of the base's likeliest tokens are told apart, the others counting as one; 0 is all."""
    rank: int = Field(default=32, ge=1)
    """Rank of the adapter."""
    alpha: float = Field(default=0.0, ge=0)
    """Strength of the adapter, which counts alpha / rank times; 0 is as large as the rank."""
    rslora: bool = False
    """Let it count alpha / sqrt(rank) times, which keeps large ranks learning (Kalajdzievski 2023)."""
    dora: bool = False
    """Learn the lengths of the weights' rows apart from their directions (DoRA, Liu et al. 2024). It takes longer, and
    llama.cpp has no form for it but the merged file."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs that are dropped in training."""
    targets: tuple[
        Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], ...
    ] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
    )
    """The projections that get an adapter."""
    learning_rate: float = Field(default=8e-4, gt=0)
    """Peak, after the warm-up."""
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """How it falls afterwards."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps in which it rises."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Of AdamW."""
    steps: int = Field(default=70, ge=1)
    """Optimizer steps."""
    batch: int = Field(default=4, ge=1)
    """Dialogues a step."""
    tokens: int = Field(default=0, ge=0)
    """Tokens that are computed at a time: a step is done in parts that sum up to the same. 0 is the whole step, or as many as
    fit."""
    max_length: int = Field(default=1024, ge=64)
    """Tokens; a longer dialogue is cut at a turn boundary and never loses turn 1."""
    save_steps: int = Field(default=10, ge=1)
    """Steps between checkpoints."""
    mix: str = ""
    """Chats of your own whose answers are learned as they are, beside the synthesised ones: a JSONL file with `messages` or
    ShareGPT `conversations`, or a dataset id."""
    mix_share: float = Field(default=0.2, gt=0, lt=1)
    """Share of these in what is trained on, if there are as many."""
    adapter: str = ""
    """Folder of a PEFT LoRA of the same rank and targets to go on from; "" begins anew."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where the curves are sent, too; each has to be installed."""
    stop_when: float = Field(default=0.0, ge=0, le=1)
    """Stop as soon as so much of the answers in the dialogues of `dialogues.watched` keep their instruction; 0 is never."""


class Export(Section):
    """The tuned GGUF."""

    formats: tuple[str, ...] = Field(default=("Q8_0",), min_length=1)
    """llama.cpp's names: F16, Q8_0, Q4_K_M, IQ4_XS, ... All of them are evaluated; base and ceiling are in the first."""
    merge_onto: Literal["measure", "16bit", "4bit"] = "measure"
    """What the adapter is added to: the base's own weights ("16bit"), or these rounded to 4 bits as they were in training.
    "measure" takes that under which the run's dialogues are likelier, at the price of two passing files in F16."""
    same_tokens: bool = True
    """Refuse to export a model whose chats llama.cpp would read in other tokens than training had."""
    importance_tokens: int = Field(default=8192, ge=1)
    """Tokens of the run's dialogues from which the importance matrix is taken; only formats below Q8_0 need one."""


class Evaluate(Section):
    """Does it hold? On dialogues that training has not seen, with the instruction in turn 1 only."""

    dialogues: int = Field(default=24, ge=1)
    """Evaluation dialogues, shared out over the constraints of the pool."""
    turns: int = Field(default=20, ge=1)
    """Turns of each."""
    max_tokens: int = Field(default=64, ge=8)
    """Longest reply, in tokens."""
    temperature: float = Field(default=0.7, ge=0)
    """Of the sampling, the same for all arms."""
    sequences: int = Field(default=0, ge=0)
    """Dialogues that are evaluated side by side; 0 is what the machine allows."""
    attention: bool = True
    """Map what the answers of one dialogue attend to, as in Figure 10 of the paper; it loads the model in float32."""
    adapter: str = ""
    """A GGUF adapter that is laid over the base and measured in place of the exported files, over one copy of the weights."""
    adapter_scale: float = 1.0
    """How strongly it counts; 1 is as it was trained."""
    others: tuple[str, ...] = ()
    """What is measured beside them: GGUF files, GGUF adapters (over the base), or servers ("http://host:port/v1#model")."""
    primary: Literal["late", "later", "recall", "unseen"] = "late"
    """The figure that the report opens with, fixed before anything is measured: adherence in the last five turns, in all but
    the first, recall at the last probe, or adherence to instructions that were not trained."""
    more: int = Field(default=6, ge=0)
    """Dialogues of each further suite, in all arms but the ceiling and the other formats: `unseen` instructions, a change of
    instruction half-way, none at all (leakage, damage), and attributes that are asked for (Table 30). 0 leaves them out."""
    more_turns: int = Field(default=10, ge=2)
    """Turns of these; dialogues in which attributes are asked for have `turns`."""
    unseen: tuple[Constraint, ...] = (
        Constraint("opening", "Well, well!"),
        Constraint("closing", "So it goes."),
        Constraint("persona", "Ada Lovelace"),
        Constraint("hashtag", "goodtoknow"),
        Constraint("signature", "Ada"),
        Constraint("uppercase"),
    )
    """Instructions that training has not: reported apart, new values of trained kinds and kinds that are new altogether."""
    judge: str = ""
    """A model, as in `model`, or a server, which says of replies whether they keep what no program can check ("style")."""

    @property
    def shortened(self) -> bool:
        """Whether it measures less than the default: such figures are marked."""
        fields = type(self).model_fields
        return bool(
            self.dialogues < fields["dialogues"].default or self.turns < fields["turns"].default
        )


class Recipe(Section):
    """Everything that decides what a run does."""

    seed: int = 1
    """Of every draw: pairing, sampling, adapter, order of training."""
    model: str = "smollm2-135m"
    """A preset of `models/`, a GGUF file, a Hugging Face folder, or a Hub id."""
    dialogues: Dialogues = Dialogues()
    instructions: Instructions = Instructions()
    synthesize: Synthesize = Synthesize()
    train: Train = Train()
    export: Export = Export()
    evaluate: Evaluate = Evaluate()


QUICK = (
    "dialogues.train=40",
    "dialogues.turns=4",
    "dialogues.watched=2",
    "train.steps=12",
    "synthesize.max_tokens=48",
    "evaluate.dialogues=6",
    "evaluate.turns=8",
    "evaluate.max_tokens=48",
    "evaluate.more=2",
)
"""What `--quick` sets: the same run in miniature. Its report is marked as shortened."""


def load_recipe(path: Path | None, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file (or the defaults) and apply `KEY=VALUE` overrides such as `train.steps=20`.

    Raises:
        GattError: no such file, not TOML, an unknown key, or a value of the wrong type; the message names the key.
    """
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = tomlkit.parse(path.read_text(encoding="utf-8")).unwrap()
        except FileNotFoundError as error:
            raise GattError(
                f"No recipe at {path}. `gatt init {path}` writes one to start from."
            ) from error
        except (ParseError, UnicodeDecodeError) as error:
            raise GattError(
                f"{path} is not TOML: {error}. Correct it, or start anew with `gatt init`."
            ) from error
    for override in overrides:
        _override(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise GattError(f"{path or 'recipe'}: {_explain(error)}") from error


def _override(data: dict[str, Any], override: str) -> None:
    """Set one `section.key=value`; the value is read as TOML, and as a string where it is none."""
    name, equals, text = override.partition("=")
    if not equals:
        raise GattError(f"--set {override}: expected KEY=VALUE, for example --set train.steps=20.")
    try:
        value: Any = tomlkit.value(text).unwrap()
    except (ParseError, ValueError):
        value = text
    *sections, key = name.strip().split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise GattError(
                f"--set {override}: {section} is no section. `gatt init` shows every key."
            )
    data[key] = value


def _explain(error: ValidationError) -> str:
    """The first problem in one line, with the nearest valid key where a key is unknown."""
    problem = error.errors()[0]
    place = ".".join(map(str, problem["loc"]))
    if problem["type"] != "extra_forbidden":
        return f"{place} = {problem['input']!r}: {problem['msg']}. `gatt init` lists every key with its meaning."
    section: type[BaseModel] = Recipe
    for name in problem["loc"][:-1]:
        section = type(getattr(section(), str(name)))
    near = difflib.get_close_matches(str(problem["loc"][-1]), section.model_fields, n=1)
    hint = (
        f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(section.model_fields)}."
    )
    return f"unknown key {place!r}. {hint}"


def recipe_toml(recipe: Recipe, comments: bool = True) -> str:
    """The recipe as TOML; with each key's docstring above it where `comments`."""
    document = tomlkit.document()
    _fill(document, recipe, comments)
    return tomlkit.dumps(document)


def _fill(table: Any, section: BaseModel, comments: bool) -> None:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            child = tomlkit.table()
            if comments:
                child.comment((type(value).__doc__ or "").split("\n")[0])
            _fill(child, value, comments)
            table.add(tomlkit.nl())
            table.add(name, child)
            continue
        if comments and field.description:
            table.add(tomlkit.comment(" ".join(field.description.split())))
        table.add(name, _toml_value(value))


def _toml_value(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    array = tomlkit.array()
    for item in value:
        if isinstance(item, Constraint):
            row = tomlkit.inline_table()
            row.update({"kind": item.kind, **({"value": item.value} if item.value else {})})
            array.append(row)
        else:
            array.append(item)
    return array.multiline(True) if value and isinstance(value[0], Constraint) else array
