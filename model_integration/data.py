"""Text in, blocks of tokens out: corpora, the byte tokenizer, and a split that depends on nothing but names."""

from __future__ import annotations

import hashlib
import json
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

#: Directories of the standard library that are tests, demos or not the library at all.
SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "lib2to3"}

TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")

#: Documents that the tokenizer gets at once.
TOKENIZER_BATCH = 64


class DataError(ValueError):
    """Data that cannot be used as asked; the message is one line for the command line."""


@dataclass(frozen=True)
class Document:
    """A text and the name by which it is split and ordered."""

    name: str
    text: str

    @property
    def key(self) -> int:
        """A number drawn uniformly from [0, 2^32) by the name: the same on every machine and in every run."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "big")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose id is the UTF-8 byte, with 256 for the end of a document; it saves and reloads as any other.

    >>> tokenizer = byte_tokenizer()
    >>> tokenizer("né").input_ids, tokenizer.decode([110, 195, 169]), tokenizer.eos_token_id
    ([110, 195, 169], 'né', 256)
    """
    # ByteLevel spells each byte as one printable character: itself where it is one, else the next from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    spelling = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=spelling, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )


def standard_library() -> list[Document]:
    """The Python files of the standard library that runs this, without tests, idlelib and demos."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (p for p in root.rglob("*.py") if not SKIPPED_DIRECTORIES.intersection(p.relative_to(root).parts))
    documents = [Document(p.relative_to(root).as_posix(), p.read_text("utf-8", errors="ignore")) for p in paths]
    if not documents:
        raise DataError(f"no Python files under {root}; give the text to train on with --data")
    return documents


def find_files(paths: Iterable[Path]) -> list[Path]:
    """The text files that `paths` name, directories searched; DataError for a path that names none."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
            if not inside:
                raise DataError(f"no {', '.join(TEXT_SUFFIXES)} files under {path}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"no such file or directory: {path}")
    return found


def read_files(paths: Iterable[Path], text_field: str) -> Iterator[Document]:
    """One document per text file, and one per line of a .jsonl file (its `text_field`)."""
    for path in find_files(paths):
        if path.suffix != ".jsonl":
            yield Document(str(path), path.read_text("utf-8", errors="ignore"))
            continue
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield Document(f"{path}:{number}", _json_text(line, text_field, f"{path}:{number}"))


def _json_text(line: str, text_field: str, where: str) -> str:
    try:
        text = json.loads(line)[text_field]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{where}: not a JSON object with a field {text_field!r} (--text-field)") from error
    if not isinstance(text, str):
        raise DataError(f"{where}: field {text_field!r} holds {type(text).__name__}, not text")
    return text


def read_dataset(name_or_path: str, split: str, text_field: str) -> Iterator[Document]:
    """The rows of a dataset: a directory that `save_to_disk` wrote, or anything that `datasets.load_dataset` takes."""
    try:
        import datasets
    except ImportError as error:
        raise DataError("--dataset needs the datasets package: pip install datasets") from error
    try:
        saved = Path(name_or_path, "dataset_info.json").exists() or Path(name_or_path, "dataset_dict.json").exists()
        rows = datasets.load_from_disk(name_or_path) if saved else datasets.load_dataset(name_or_path, split=split)
        rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
    except Exception as error:  # whatever the library raises, the user needs to know which argument it was about
        raise DataError(f"--dataset {name_or_path} (split {split}): {str(error).splitlines()[0]}") from error
    if text_field not in rows.column_names:
        raise DataError(f"--dataset {name_or_path} has columns {', '.join(rows.column_names)}, no {text_field!r}")
    for i, text in enumerate(rows[text_field]):
        yield Document(f"{name_or_path}/{split}/{i}", text)


def split_held_out(documents: Iterable[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents, each in an order and by a choice that only the documents' names decide.

    Where there are too few to choose from, the last `fraction` of every document is held out instead.
    """
    ordered = sorted(documents, key=lambda d: (d.key, d.name))
    border = int(fraction * (1 << 32))
    train, held_out = [d for d in ordered if d.key >= border], [d for d in ordered if d.key < border]
    if train and held_out:
        return train, held_out
    cuts = [(d, int(len(d.text) * (1.0 - fraction))) for d in ordered]
    return [Document(d.name, d.text[:cut]) for d, cut in cuts], [Document(d.name, d.text[cut:]) for d, cut in cuts]


class TokenBlocks(Dataset[dict[str, torch.Tensor]]):
    """Documents tokenised, joined by the end-of-document token and cut into blocks of `seq_length` tokens.

    The tokens are in a file, of which memory holds what is being read.

    Args:
        file: where to keep them, so that `read` finds them again; None: in a temporary file.

    Attributes:
        tokens: (blocks, seq_length), uint16 or uint32.
        documents: how many there were.
        bytes_per_token: UTF-8 bytes per token over the documents; the end token counts, at no bytes.
    """

    _end: int | None = None

    def __init__(
        self,
        documents: Sequence[Document],
        tokenizer: PreTrainedTokenizerBase,
        seq_length: int,
        file: Path | None = None,
    ) -> None:
        dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
        count = text_bytes = 0
        if file is not None:
            _description(file).unlink(missing_ok=True)
        with tempfile.TemporaryFile() if file is None else file.open("w+b") as stream:
            few = len(documents) <= TOKENIZER_BATCH
            with tqdm(total=len(documents), desc="tokenizing", unit=" documents", leave=False, disable=few) as bar:
                for batch in _batches(documents, TOKENIZER_BATCH):
                    texts = [d.text for d in batch]
                    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
                    for text, ids in zip(texts, tokenizer(texts, **options).input_ids, strict=True):
                        stream.write(np.array([*ids, tokenizer.eos_token_id], dtype=dtype).tobytes())
                        count += len(ids) + 1
                        text_bytes += len(text.encode("utf-8", errors="ignore"))
                    bar.update(len(batch))
            stream.flush()
            self._map(stream, dtype, count, seq_length)
        self.documents, self.bytes_per_token = len(documents), text_bytes / max(count, 1)
        if file is not None:  # its description comes last: without it the file is not complete
            about = {"dtype": dtype.name, "count": count, "documents": len(documents), "bytes": text_bytes}
            _description(file).write_text(json.dumps(about) + "\n")

    @classmethod
    def read(cls, file: Path, seq_length: int) -> TokenBlocks | None:
        """What was kept in `file`, or None where nothing is, or not everything."""
        if not _description(file).is_file():
            return None
        about = json.loads(_description(file).read_text())
        blocks = cls.__new__(cls)
        with file.open("rb") as stream:
            blocks._map(stream, np.dtype(about["dtype"]), about["count"], seq_length)
        blocks.documents, blocks.bytes_per_token = about["documents"], about["bytes"] / max(about["count"], 1)
        return blocks

    def _map(self, stream: Any, dtype: np.dtype, count: int, seq_length: int) -> None:
        shape = (count // seq_length, seq_length)
        # An empty file cannot be mapped.
        self.tokens = np.memmap(stream, dtype, "r", shape=shape) if shape[0] else np.empty(shape, dtype)

    def thinned(self, blocks: int) -> TokenBlocks:
        """At most `blocks` of the blocks, evenly spread: a sample of every document rather than the first few."""
        thin = copy(self)
        thin.tokens = self.tokens[np.linspace(0, len(self) - 1, min(blocks, len(self))).astype(int)]
        return thin

    def apart(self, end: int) -> TokenBlocks:
        """The same blocks with `position_ids` that begin anew behind each token `end`: documents do not see others."""
        separate = copy(self)
        separate._end = end
        return separate

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.tokens[index].astype(np.int64))
        block = {"input_ids": ids, "labels": ids}
        if self._end is not None:
            place = torch.arange(len(ids))
            begins = torch.nn.functional.pad(ids[:-1] == self._end, (1, 0))
            block["position_ids"] = place - torch.where(begins, place, 0).cummax(0).values
        return block


def _description(file: Path) -> Path:
    return file.with_name(file.name + ".json")


def _batches(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
