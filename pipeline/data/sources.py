"""Read the rows of a file, a folder or a dataset, and tell which files of it a stage depends on."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pipeline.data.text_files import Row, csv_rows, json_rows
from pipeline.errors import GattError
from pipeline.run_dir import HubRevision, Input

if TYPE_CHECKING:
    import datasets

_REFUSED = {
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"SQL": "",
}
_FORMS = "JSONL, JSON, CSV, TSV or Parquet"

_PACKED = (".gz", ".bz2", ".xz")
_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", *_PACKED, ".txt", ".zst")


def read_rows(source: str) -> Iterator[Row]:
    """Yield the rows of `source`: "seed", a file, a folder, or a dataset id.

    Raises:
        GattError: no such source, or it is in none of the forms that are read.
    """
    path = _local_path(source)
    if path is None:
        return _dataset_rows(source, partial(_load_dataset, source))
    if path.is_dir():
        return _folder_rows(path)
    if path.is_file():
        return _file_rows(path)
    raise GattError(
        f'No dialogues at {path}. Expected a file ({_FORMS}), a folder, a dataset id, or "seed".'
    )


def source_inputs(source: str) -> list[Input]:
    """Return what a stage that reads `source` depends on; the built-in dialogues never change."""
    if source == "seed":
        return []
    path = _local_path(source)
    if path is None:
        return [HubRevision(source, _dataset_commit(source))]
    return [path] if path.exists() else []  # reading it is an error that says more


def _local_path(source: str) -> Path | None:
    """Return the path that `source` names, whether it exists or not, or None for a dataset id."""
    if source == "seed":
        return Path(str(resources.files("pipeline.data") / "seed_dialogues.jsonl"))
    path = Path(source).expanduser()
    is_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source
    return path if path.exists() or is_path or path.suffix.lower() in _SUFFIXES else None


@cache
def _dataset_commit(name: str) -> str:
    """Return the newest commit of a dataset on the Hub, or "" if the Hub cannot be reached."""
    import huggingface_hub

    try:
        return str(huggingface_hub.HfApi().dataset_info(name, timeout=10).sha)
    except Exception:  # offline, private, or gone: reading it is an error that says more
        return ""


def _file_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        head = file.read(8)
    if head.startswith(b"PAR1"):
        return _parquet_rows(path)
    for magic, form in _REFUSED.items():
        if head.startswith(magic):
            raise GattError(f"{path} is {form or 'a database'}. Expected {_FORMS}; unpack it.")
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in _PACKED]
    if suffixes[-1:] in ([".csv"], [".tsv"]):
        return csv_rows(path)
    return json_rows(path)


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1000):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(value, f"{path}, row {number}", number)
    except (pyarrow.ArrowException, OSError) as error:
        raise GattError(f"{path} cannot be read as Parquet ({_first_line(error)}).") from error


def _folder_rows(folder: Path) -> Iterator[Row]:
    """Yield the rows of the data files in a folder, or of a dataset saved with `save_to_disk`."""
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        yield from _dataset_rows(str(folder), partial(_load_saved, folder))
        return
    with TemporaryDirectory() as scratch:
        name = str(folder)
        if glob.has_magic(name):  # `datasets` would take the brackets for a pattern
            name = scratch
            for file in folder.rglob("*"):
                if file.is_file():
                    link = Path(scratch, file.relative_to(folder))
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(file.resolve())
        # Streamed, because a copy in the cache could be that of an earlier state.
        yield from _dataset_rows(str(folder), partial(_load_dataset, name, streaming=True))


def _load_dataset(name: str, *, streaming: bool = False) -> dict[str, datasets.Dataset]:
    import datasets

    return dict(datasets.load_dataset(name, streaming=streaming))


def _load_saved(folder: Path) -> dict[str, datasets.Dataset]:
    import datasets

    saved = datasets.load_from_disk(str(folder))
    return {"train": saved} if isinstance(saved, datasets.Dataset) else dict(saved)


def _dataset_rows(source: str, load: Callable[[], dict[str, datasets.Dataset]]) -> Iterator[Row]:
    """Yield the rows of the training split of what `load` loads.

    Raises:
        GattError: it cannot be loaded, or a part of it cannot be read.
    """
    try:
        yield from _split_rows(load(), source)
    except GattError:
        raise
    except Exception as error:  # datasets raises a dozen classes, of several libraries
        raise GattError(
            f"Cannot load the dataset {source!r} ({type(error).__name__}: {_first_line(error)}). "
            f'Use a local file ({_FORMS}), or "seed".'
        ) from error


def _split_rows(splits: dict[str, datasets.Dataset], source: str) -> Iterator[Row]:
    """Yield the rows of the training split."""
    for number, value in enumerate(splits[_training_split(list(splits), source)], 1):
        yield Row(value, f"{source}, row {number}", number)


def _training_split(names: Sequence[str], source: str) -> str:
    """Return the split to take: "train", "train_sft", the only one to train on, or the only one.

    Raises:
        GattError: several might be meant.
    """
    for name in ("train", "train_sft"):
        if name in names:
            return name
    candidates = [name for name in names if name.startswith("train")] or names
    if len(candidates) > 1:
        raise GattError(
            f"{source} has the splits {', '.join(names)} and none named train. Save the one that "
            "you mean as a file: datasets.load_dataset(...)[split].to_json('dialogues.jsonl')."
        )
    return candidates[0]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0][:200]
