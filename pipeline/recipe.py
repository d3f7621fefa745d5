"""The recipe: every setting of a run with its default and its meaning.

The docstring under a field is its help in `gatt init`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from pipeline.custom_instructions import parse_pool_entry
from pipeline.records import MAX_THOUGHT_TOKENS, Constraint, CustomInstruction

VocabularyKind = Literal[
    "opening", "closing", "persona", "signature", "hashtag", "address", "heading", "json"
]
"""A kind of constraint whose values the built-in vocabulary has."""


def _parse_pool_entry(entry: object, info: ValidationInfo) -> object:
    return parse_pool_entry(entry, (info.context or {}).get("folder", Path()))


def _join_servers(value: object) -> object:
    if not isinstance(value, list):
        return value
    for name in value:
        if not str(name).lower().startswith(("http://", "https://")):
            raise ValueError(f"a list names servers of one model, and {name!r} is no address.")
    return ",".join(value)


def _without_repetitions(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


PoolEntry = Annotated[Constraint | CustomInstruction, BeforeValidator(_parse_pool_entry)]
ModelName = Annotated[str, BeforeValidator(_join_servers)]
"""A model or a server; several servers are a list, or stand with commas between them."""


class Section(BaseModel):
    """Base of the recipe's tables: frozen and strict; the docstring under a field is its help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Dialogues(Section):
    """Where the user turns come from."""

    source: str = "seed"
    """"seed" (built in), a file (JSONL, JSON, CSV, Parquet) or folder with `messages`, ShareGPT's
    `conversations` or `turns`, or a dataset id for `datasets`.
    """
    turns: int = Field(default=3, ge=1)
    """User turns of a training dialogue; longer dialogues are cut."""
    train: int = Field(default=900, ge=1)
    """Number of training dialogues. Sources are cut into pieces of `turns` and reused with other
    instructions if needed.
    """
    validation: int = Field(default=6, ge=0)
    """Dialogues of the validation split, on which adherence is measured at each checkpoint; 0
    disables it.
    """
    system: str = "You are a friendly assistant. Answer in one or two short sentences."
    """System message in training and in evaluation; "" leaves it to the chat template."""


class Instructions(Section):
    """What is taught (Llama 2 paper, section 3.3)."""

    vocabulary_kinds: tuple[VocabularyKind, ...] = get_args(VocabularyKind)
    """Kinds that get a new value from the built-in vocabulary in every dialogue, so that the model
    learns to follow any value. [] trains the pool alone.
    """
    vocabulary_ratio: float = Field(default=0.7, ge=0, le=1)
    """Fraction of the instructed dialogues that have one of these; the others are drawn from the
    pool.
    """
    pool: tuple[PoolEntry, ...] = (
        Constraint("emoji"),
        Constraint("numbered_list"),
        Constraint("bullet_list"),
        Constraint("block_quote"),
        Constraint("quotes"),
        Constraint("brackets", "parentheses"),
        Constraint("brackets", "square brackets"),
        Constraint("code_block"),
    )
    """Instructions to draw from: kinds (`gatt instructions --kinds`), and your own words, such as
    {text = "You are Ziggy. Never mention prices.", checks = [{not_regex = "[$€]"}], place =
    "system"}. Only the text is needed; `place` is "first" (message) or "system". Checks are a kind,
    `regex`, `not_regex`, `function` = "module:function" of reply and dialogue, `ifeval` = a public
    name with `arguments`, or `rubric`, which the judge reads.
    """
    file: str = ""
    """More instructions in your own words: TOML with [[instructions]] or JSONL of such tables, a
    text with one on each line ("# " begins a comment), or a folder of system prompts (*.txt,
    *.md)."""
    bake: str = ""
    """A system prompt that the model shall follow without being given it, in place of all other
    instructions: a text file, or a character card (PNG, JSON or CHARX). Sentences worded as a kind
    become checks."""
    generate: tuple[Literal["persona", "hobby", "language"], ...] = ()
    """Kinds whose values the teacher lists itself, as in the paper; only values that it knows join
    the pool. They are saved in `lists.toml` of the run, where you can edit them."""
    generate_count: int = Field(default=8, ge=1)
    """Values of each such kind."""
    recall_ratio: float = Field(default=0.25, ge=0, le=1)
    """Fraction of the training dialogues that set attributes in turn 1 ("Your name is Ada and you
    live in Rome.") and ask for them later.
    """
    combine_ratio: float = Field(default=0.3, ge=0, le=1)
    """Fraction of the dialogues whose instruction combines two or three compatible constraints."""
    short_ratio: float = Field(default=0.3, ge=0, le=1)
    """Fraction of the training dialogues that show the shortened instruction (in the paper, half of
    the combined ones).
    """
    plain_ratio: float = Field(default=0.1, ge=0, le=1)
    """Fraction of the training dialogues without an instruction, so that the model learns not to
    invent one.
    """
    system_ratio: float = Field(default=0.2, ge=0, le=1)
    """Fraction of the instructed dialogues with the instruction in the system message instead of
    the first turn.
    """
    contradict_ratio: float = Field(default=0.5, ge=0, le=1)
    """Fraction of the dialogues with the instruction in the system message in which the user later
    contradicts it, and it holds.
    """
    change_ratio: float = Field(default=0.2, ge=0, le=1)
    """Fraction of the other instructed dialogues in which another instruction replaces the first
    ("From now on: ...").
    """
    stop_ratio: float = Field(default=0.2, ge=0, le=1)
    """Fraction of the other instructed dialogues in which the user ends the instruction ("You no
    longer need to do that.").
    """

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Return the constraints of the pool."""
        return tuple(entry for entry in self.pool if isinstance(entry, Constraint))

    @property
    def custom(self) -> tuple[CustomInstruction, ...]:
        """Return the instructions of the pool that are in the user's own words."""
        return tuple(entry for entry in self.pool if isinstance(entry, CustomInstruction))


class Synthesize(Section):
    """How the teacher answers."""

    edited_ratio: float = Field(default=1.0, ge=0, le=1)
    """Of the dialogues whose instruction an exact edit can satisfy: the fraction that is edited,
    not sampled.
    """
    teacher: ModelName = ""
    """Who answers: "" is the base model; another model, as in `model`; or an OpenAI-compatible
    server, "http://host:port/v1" or "http://host:port/v1#model-name". A list names several servers
    of one model: the least busy one is asked, and one that fails is left out for a while."""
    format: str = "Q4_0"
    """llama.cpp format of a local teacher; Q4_0 is the fastest on a CPU. "" keeps a GGUF's own."""
    candidates: int = Field(default=4, ge=1)
    """Answers sampled for one turn before the dialogue is cut there."""
    max_tokens: int = Field(default=80, ge=8)
    """Maximum tokens of an answer."""
    max_thought_tokens: int = Field(default=MAX_THOUGHT_TOKENS, ge=0)
    """Tokens that a reasoning teacher may think before each answer, in addition. Thoughts are
    logged, never trained on; an answer that is cut within its thoughts is rejected."""
    max_sentences: int = Field(default=1, ge=1)
    """An edited answer is cut after this many sentences."""
    judge: ModelName = ""
    """A model, as in `model`, or servers, that judges sampled answers to instructions that no
    program can check: without checks, or with a rubric. "" accepts these as they are."""
    temperature: float = Field(default=0.8, ge=0)
    """Sampling temperature; with top-k 40, min-p 0.05 and DRY against repeating earlier answers."""
    max_parallel: int = Field(default=0, ge=0)
    """Dialogues generated in parallel; 0 uses what the machine allows (with servers: 24 each). On a
    CPU the answers do not depend on it."""


class Train(Section):
    """LoRA with Unsloth, over a base model in 4 bits (QLoRA) or in 16."""

    loss: Literal["all_turns", "last_turn", "distill"] = "distill"
    """`all_turns`: cross-entropy on every answer. `last_turn`: on the last answer only, as in the
    paper. `distill`: cross-entropy on edited tokens; on the others, KL to the base model (adapter
    disabled) given the teacher's prompt."""
    unedited_weight: float = Field(default=1.0, ge=0, le=1)
    """Loss weight of the tokens that the edit left unchanged (edited tokens: 1). With "distill",
    these show where nothing is to be added; with "all_turns", lower values limit the drift.
    """
    slip_ratio: float = Field(default=0.3, ge=0, le=1)
    """Fraction of the edited answers before the last that stand in the history without their edit,
    and are not learned: the model learns to follow the instruction itself, not its last answer, and
    to return to it after a slip.
    """
    cross_entropy: float = Field(default=0.0, ge=0, le=1)
    """With "distill": fraction of cross-entropy in the loss of unedited tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """With "distill": temperature of both distributions."""
    top_k: int = Field(default=0, ge=0)
    """With "distill": compare only the base model's k most likely tokens, the others summed into
    one; 0 compares all.
    """
    rank: int = Field(default=32, ge=1)
    """LoRA rank."""
    alpha: float = Field(default=0.0, ge=0)
    """LoRA alpha: the adapter is scaled by alpha / rank; 0 means alpha = rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), so that large ranks learn, too (rsLoRA, Kalajdzievski 2023)."""
    dora: bool = False
    """Learn magnitudes and directions apart (DoRA, Liu et al. 2024). Slower, and llama.cpp can only
    load the merged file.
    """
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """LoRA dropout."""
    target_modules: tuple[
        Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], ...
    ] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
    )
    """Projections that get an adapter."""
    load_in_4bit: Literal["auto", True, False] = "auto"
    """true: the base model is in 4 bits (NF4) while the adapter is trained; false: in 16 bits.
    "auto" takes 16 bits for less than a billion parameters: rounding costs such a model much, and
    saves less than 1.5 GB."""
    learning_rate: float = Field(default=0.0, ge=0)
    """Peak learning rate, reached after the warm-up; 0 chooses it by the width of the model: 8e-4
    for SmolLM2-135M, 2.2e-4 at 3072 (a 3B model), 1.7e-4 at 4096 (an 8B model)."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` keeps AdamW's moments in 8 bits: 6 bytes less per weight of the adapter."""
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """Shape of the decay after the warm-up."""
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of the steps with a rising learning rate."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Weight decay of AdamW."""
    max_steps: int = Field(default=600, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=4, ge=1)
    """Dialogues in a step."""
    max_tokens_per_micro_batch: int = Field(default=0, ge=0)
    """Tokens computed at a time: a step is split into micro-batches with the same gradient. 0 takes
    the whole step, or what fits in memory; at most 1,024 on a CPU, where more are no faster."""
    max_length: int = Field(default=1024, ge=64)
    """Maximum tokens of a dialogue; a longer one is cut at a turn boundary, after turn 1."""
    save_steps: int = Field(default=100, ge=1)
    """Steps between checkpoints."""
    replay_data: str = ""
    """Chats of your own, mixed in and learned unchanged: a file or folder with `messages` or
    ShareGPT `conversations`, or a dataset id. Answers with `weight: 0` are not learned."""
    replay_ratio: float = Field(default=0.2, gt=0, lt=1)
    """Fraction of these in the training data, if there are enough."""
    init_adapter: str = ""
    """Folder of a PEFT LoRA with the same rank and target modules to start from; "" starts from
    zero.
    """
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where to log the curves as well; each package has to be installed."""
    early_stop_adherence: float = Field(default=0.0, ge=0, le=1)
    """Stop when this fraction of the answers in the validation split is adherent; 0 disables it."""


class Export(Section):
    """The fine-tuned GGUF."""

    formats: Annotated[tuple[str, ...], AfterValidator(_without_repetitions)] = Field(
        default=("Q8_0",), min_length=1
    )
    """llama.cpp's names: F16, Q8_0, Q4_K_M, IQ4_XS, ... All are evaluated; base and ceiling use the
    first.
    """
    merge_base: Literal["auto", "fp16", "nf4"] = "auto"
    """Weights to merge the adapter into: the original ones ("fp16"), or these rounded to 4 bits as
    in training ("nf4"). "auto" takes the one with the lower loss on the run's dialogues, and writes
    two temporary F16 files; after a training in 16 bits it is "fp16"."""
    verify_tokenizer: bool = True
    """Refuse to export a model whose chats llama.cpp tokenizes differently from training."""
    imatrix_tokens: int = Field(default=8192, ge=1)
    """Tokens of the run's dialogues for the importance matrix; only formats below Q8_0 need one."""


class Evaluate(Section):
    """Does it hold? On held-out dialogues, with the instruction in turn 1 only."""

    dialogues: int = Field(default=24, ge=1)
    """Evaluation dialogues, spread evenly over the constraints of the pool."""
    turns: int = Field(default=20, ge=1)
    """Turns of each dialogue. Where the source has too few dialogues of this length, several are
    joined, without repeating a message; turns that do not fit in the model's context are left out
    and counted."""
    max_tokens: int = Field(default=64, ge=8)
    """Maximum tokens of a reply."""
    max_thought_tokens: int = Field(default=MAX_THOUGHT_TOKENS, ge=0)
    """Tokens that a reasoning model or judge may think before each answer, in addition."""
    temperature: float = Field(default=0.7, ge=0)
    """Sampling temperature, the same for all arms."""
    max_parallel: int = Field(default=0, ge=0)
    """Dialogues evaluated in parallel; 0 uses what the machine allows."""
    attention: bool = True
    """Map the attention of one dialogue's answers, as in Figure 10 of the paper; loads the model in
    float32.
    """
    adapter: str = ""
    """A GGUF adapter to measure in place of the exported files, applied to one copy of the base
    model.
    """
    adapter_scale: float = 1.0
    """Scale of the adapter; 1 is as trained."""
    extra_models: tuple[str, ...] = ()
    """Also measured: GGUF files, GGUF adapters (on the base model), or servers
    ("http://host:port/v1#model").
    """
    primary: Literal["last_five", "after_first", "recall", "unseen"] = "last_five"
    """The figure that opens the report, fixed before anything is measured: adherence in the last
    five turns, in all but the first, recall at the last probe, or adherence to instructions that
    were not trained."""
    suite_dialogues: int = Field(default=6, ge=0)
    """Dialogues of each further suite, in all arms but the ceiling and the other formats: `unseen`
    instructions, a change of instruction halfway, no instruction (leakage, degradation), and
    recall of attributes (Table 30). Kinds that are not trained, or have new values, get at least
    one dialogue each, as far as `dialogues` goes. 0 skips all of these."""
    recall_dialogues: int = Field(default=0, ge=0)
    """Dialogues of the recall suite; 0: as many as of the other suites. Each asks for a name and a
    hobby, so 30 give 60 answers for each turn."""
    reminded_suites: tuple[Literal["recall", "unseen", "unseen_values", "combined"], ...] = (
        "recall",
    )
    """Further suites that the ceiling (the base, reminded in every turn) answers, too."""
    suite_turns: int = Field(default=10, ge=2)
    """Turns of these dialogues; recall uses `turns`."""
    unseen: tuple[Constraint, ...] = (
        Constraint("question"),
        Constraint("postscript"),
        Constraint("initial", "T"),
        Constraint("keyword", "river"),
        Constraint("hobby", "chess"),
        Constraint("number"),
    )
    """Instructions that are not trained, of kinds that are new altogether: new values of
    `vocabulary_kinds` have a suite of their own.
    """
    judge: ModelName = ""
    """A model, as in `model`, or servers, that judges replies to instructions that no program can
    check ("style").
    """

    @property
    def shortened(self) -> bool:
        """Return whether this measures less than the defaults; such figures are marked."""
        fields = type(self).model_fields
        return bool(
            self.dialogues < fields["dialogues"].default or self.turns < fields["turns"].default
        )


class Recipe(Section):
    """Every setting of a run."""

    seed: int = Field(default=1, ge=0, lt=2**32)
    """Seed of every random choice: assignment, sampling, adapter, order of training."""
    model: str = "smollm2-135m"
    """A preset of `models/`, a GGUF file, a Hugging Face folder, or a Hub id."""
    dialogues: Dialogues = Dialogues()
    instructions: Instructions = Instructions()
    synthesize: Synthesize = Synthesize()
    train: Train = Train()
    export: Export = Export()
    evaluate: Evaluate = Evaluate()

    @property
    def chat_system(self) -> str:
        """Return the system message that the tuned model is used with: none with a baked prompt."""
        return "" if self.instructions.bake else self.dialogues.system
