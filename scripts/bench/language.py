"""Which library names the language of a short text best: `.venv/bin/python scripts/bench/language.py`.

The sentences of language.jsonl (20 for each of ten languages, written for this) are given to every library that is
installed: whole, cut to their first five words, and three words at a time, taken at every place ("threes"). A library may
choose among all the languages it knows ("all") or among the ten ("ten"), as gatt/language.py lets its own. The first call,
which loads the model, is left out of the times.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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
Namer = Callable[[str], str]


class Measured(NamedTuple):
    """Share named right for each language, and the time of one text."""

    shares: dict[str, float]
    milliseconds: float

    @property
    def accuracy(self) -> float:
        """The mean over the languages."""
        return statistics.mean(self.shares.values())


def lingua(ten: bool) -> Namer:
    """lingua-language-detector: n-gram models in Rust, made for short texts."""
    from lingua import IsoCode639_1, LanguageDetectorBuilder

    codes = [IsoCode639_1.from_str(code) for code in CODES.values()]
    builder = (
        LanguageDetectorBuilder.from_iso_codes_639_1(*codes)
        if ten
        else LanguageDetectorBuilder.from_all_languages()
    )
    detector = builder.with_preloaded_language_models().build()

    def name(text: str) -> str:
        found = detector.detect_language_of(text)
        return found.iso_code_639_1.name.lower() if found else ""

    return name


def py3langid(ten: bool) -> Namer:
    """py3langid: langid.py's naive Bayes over byte n-grams."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages(list(CODES.values()) if ten else None)
    return lambda text: identifier.classify(text)[0]


def langdetect(ten: bool) -> Namer:
    """langdetect: a port of a Java library. Draws at random, so that it is seeded here; "ten" by its priors."""
    from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory

    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    factory.set_seed(0)

    def name(text: str) -> str:
        detector = factory.create()
        if ten:
            detector.set_prior_map(dict.fromkeys(CODES.values(), 0.1))
        detector.append(text)
        return str(detector.detect())

    return name


LIBRARIES: dict[str, Callable[[bool], Namer]] = {
    "lingua": lingua,
    "py3langid": py3langid,
    "langdetect": langdetect,
}


def cuts(text: str) -> dict[str, list[str]]:
    """The texts to name, made from one sentence."""
    words = text.split()
    threes = [" ".join(words[n : n + 3]) for n in range(len(words) - 2)]
    return {"whole": [text], "first 5": [" ".join(words[:5])], "threes": threes}


def measure(name: Namer, rows: list[dict[str, str]], cut: str) -> Measured:
    """Name the language of every text that the rows give."""
    name("Load the model first.")
    right: dict[str, list[bool]] = {language: [] for language in CODES}
    start = time.perf_counter()
    for row in rows:
        right[row["language"]] += [
            name(text) == CODES[row["language"]] for text in cuts(row["text"])[cut]
        ]
    seconds = time.perf_counter() - start
    shares = {language: statistics.mean(hits) for language, hits in right.items()}
    return Measured(shares, 1000 * seconds / sum(map(len, right.values())))


def main() -> None:
    """A table, and the figures in one line of JSON."""
    lines = Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    accuracy: dict[str, dict[str, float]] = {"whole": {}, "first 5": {}, "threes": {}}
    print(
        f"{'library':10} {'choice':6} {'text':7} {'all':>6} {'ms':>6}  "
        + " ".join(f"{c:>4}" for c in CODES.values())
    )
    for library, make in LIBRARIES.items():
        if importlib.util.find_spec(library) is None:
            continue
        for choice in ("all", "ten"):
            name = make(choice == "ten")
            for cut, found_by in accuracy.items():
                found = measure(name, rows, cut)
                if choice == "ten":
                    found_by[library] = found.accuracy
                shares = " ".join(f"{share:4.2f}" for share in found.shares.values())
                print(
                    f"{library:10} {choice:6} {cut:7} {found.accuracy:6.3f} {found.milliseconds:6.3f}  {shares}",
                    flush=True,
                )
    figures = {}
    for cut, found_by in accuracy.items():
        bar = max([0.95, *(share for library, share in found_by.items() if library != CHOSEN)])
        value = found_by[CHOSEN]
        figures[cut.replace(" ", "_")] = {
            "value": round(value, 4),
            "bar": round(bar, 4),
            "holds": value >= bar,
        }
    print(json.dumps({"bench": "language", "figures": figures}))


if __name__ == "__main__":
    main()
