"""Text in, blocks of tokens out: corpora, the byte tokenizer, and a split that depends on nothing but names."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import Dataset
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

    Attributes:
        tokens: (blocks, seq_length) int32.
        bytes_per_token: UTF-8 bytes per token over the documents; the end token counts, at no bytes.
    """

    def __init__(self, documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, seq_length: int) -> None:
        parts: list[np.ndarray] = []
        text_bytes = 0
        for batch in _batches(documents, TOKENIZER_BATCH):
            texts = [d.text for d in batch]
            encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
            for text, ids in zip(texts, encoded, strict=True):
                parts.append(np.array([*ids, tokenizer.eos_token_id], dtype=np.int32))
                text_bytes += len(text.encode("utf-8", errors="ignore"))
        tokens = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
        self.bytes_per_token = text_bytes / max(tokens.size, 1)
        self.tokens = tokens[: tokens.size // seq_length * seq_length].reshape(-1, seq_length)

    def thinned(self, blocks: int) -> TokenBlocks:
        """At most `blocks` of the blocks, evenly spread: a sample of every document rather than the first few."""
        thin = copy(self)
        thin.tokens = self.tokens[np.linspace(0, len(self) - 1, min(blocks, len(self))).astype(int)]
        return thin

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.tokens[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def _batches(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
