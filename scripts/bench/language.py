"""Language identification of short texts: `.venv/bin/python scripts/bench/language.py`.

Each installed library gets the sentences of language.jsonl (20 for each of ten languages, written
for this): in full, cut to their first five words, and every three words in a row ("threes"). A
library may choose among all the languages that it knows ("all"), or among the ten ("ten"), as
`pipeline/gatt/constraints/language.py` lets its own. The first call, which loads the model, is not
timed.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict

CODES = {
    "English": "en",
    "French": "fr",
    "German": "de",
    "Spanish": "es",
    "Italian": "it",
    "Portuguese": "pt",
    "Dutch": "nl",
    "Swedish": "sv",
    "Polish": "pl",
    "Turkish": "tr",
}
CHOSEN = "py3langid"
MIN_ACCURACY = 0.95
Identify = Callable[[str], str]
"""Returns the ISO 639-1 code of a text, or another text."""
Choice = Literal["all", "ten"]
CUTS = ("full", "first 5", "threes")


class Row(TypedDict):
    """A sentence, and the name of its language."""

    language: str
    text: str


class Measurement(NamedTuple):
    """The share of correct codes for each language, and the time of one text."""

    shares: dict[str, float]
    milliseconds: float

    @property
    def accuracy(self) -> float:
        """Return the mean over the languages."""
        return statistics.mean(self.shares.values())


def lingua(choice: Choice) -> Identify:
    """Use lingua-language-detector: n-gram models in Rust, made for short texts."""
    from lingua import IsoCode639_1, LanguageDetectorBuilder

    codes = [IsoCode639_1.from_str(code) for code in CODES.values()]
    builder = (
        LanguageDetectorBuilder.from_iso_codes_639_1(*codes)
        if choice == "ten"
        else LanguageDetectorBuilder.from_all_languages()
    )
    detector = builder.with_preloaded_language_models().build()

    def identify(text: str) -> str:
        language = detector.detect_language_of(text)
        return language.iso_code_639_1.name.lower() if language else ""

    return identify


def py3langid(choice: Choice) -> Identify:
    """Use py3langid: langid.py's naive Bayes over byte n-grams."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages(list(CODES.values()) if choice == "ten" else None)
    return lambda text: str(identifier.classify(text)[0])


def langdetect(choice: Choice) -> Identify:
    """Use langdetect, a port of a Java library, with a fixed seed; "ten" by its priors."""
    from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory

    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    factory.set_seed(0)

    def identify(text: str) -> str:
        detector = factory.create()
        if choice == "ten":
            detector.set_prior_map(dict.fromkeys(CODES.values(), 0.1))
        detector.append(text)
        return str(detector.detect())

    return identify


LIBRARIES: dict[str, Callable[[Choice], Identify]] = {
    "lingua": lingua,
    "py3langid": py3langid,
    "langdetect": langdetect,
}


def cut_text(text: str, cut: str) -> list[str]:
    """Return the texts of one sentence, by one of `CUTS`."""
    words = text.split()
    match cut:
        case "first 5":
            return [" ".join(words[:5])]
        case "threes":
            return [" ".join(words[n : n + 3]) for n in range(len(words) - 2)]
        case _:
            return [text]


def measure(identify: Identify, rows: Sequence[Row], cut: str) -> Measurement:
    """Identify the language of every text of the rows."""
    identify("Load the model first.")
    correct: dict[str, list[bool]] = {language: [] for language in CODES}
    start = time.perf_counter()
    for row in rows:
        code = CODES[row["language"]]
        correct[row["language"]] += [identify(text) == code for text in cut_text(row["text"], cut)]
    seconds = time.perf_counter() - start
    shares = {language: statistics.mean(hits) for language, hits in correct.items()}
    return Measurement(shares, 1000 * seconds / sum(map(len, correct.values())))


def measure_all(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Print a table of all libraries; return their accuracy among ten languages, by cut."""
    accuracy: dict[str, dict[str, float]] = {cut: {} for cut in CUTS}
    codes = " ".join(f"{code:>4}" for code in CODES.values())
    print(f"{'library':10} {'choice':6} {'text':7} {'all':>6} {'ms':>6}  {codes}")
    choices: tuple[Choice, ...] = ("all", "ten")
    for library, load in LIBRARIES.items():
        if importlib.util.find_spec(library) is None:
            continue
        for choice in choices:
            identify = load(choice)
            for cut in CUTS:
                result = measure(identify, rows, cut)
                if choice == "ten":
                    accuracy[cut][library] = result.accuracy
                shares = " ".join(f"{share:4.2f}" for share in result.shares.values())
                print(
                    f"{library:10} {choice:6} {cut:7} {result.accuracy:6.3f} "
                    f"{result.milliseconds:6.3f}  {shares}",
                    flush=True,
                )
    return accuracy


def main() -> None:
    """Print the table, and the figures as the last line."""
    lines = Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    figures = {}
    for cut, accuracy in measure_all([json.loads(line) for line in lines]).items():
        peers = [share for library, share in accuracy.items() if library != CHOSEN]
        value, bar = accuracy[CHOSEN], max([MIN_ACCURACY, *peers])
        figures[cut.replace(" ", "_")] = {
            "value": round(value, 4),
            "bar": round(bar, 4),
            "holds": value >= bar,
        }
    print(json.dumps({"bench": "language", "figures": figures}))


if __name__ == "__main__":
    main()
