"""Corpora, the byte tokenizer, the split and the blocks."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from model_integration.data import (
    DataError,
    Document,
    TokenBlocks,
    byte_tokenizer,
    read_dataset,
    read_files,
    split_held_out,
    standard_library,
)

TEXT = "def é(x):\n\treturn 'naïve 😀' <|endoftext|> \x00\x7f\u00ad\r\n"


def test_byte_tokenizer_is_bytes_and_reloads(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 257
    ids = tokenizer(TEXT, add_special_tokens=False, split_special_tokens=True).input_ids
    assert ids == list(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer(bytes(range(128)).decode()).input_ids == list(range(128))
    assert tokenizer.eos_token_id == 256


def test_blocks_hold_the_documents_in_order():
    documents = [Document("a", "aéa"), Document("b", ""), Document("c", "cc<|endoftext|>")]
    blocks = TokenBlocks(documents, byte_tokenizer(), seq_length=4)
    stream = [*"aéa".encode(), 256, 256, *b"cc<|endoftext|>", 256]
    assert blocks.tokens.flatten().tolist() == stream[: len(stream) // 4 * 4]
    assert blocks[1]["input_ids"].tolist() == stream[4:8] == blocks[1]["labels"].tolist()
    assert blocks.bytes_per_token == (len(stream) - 3) / len(stream)


def test_thinned_blocks_are_spread_and_not_repeated():
    numbers = "".join(f"{i:04}" for i in range(100))
    blocks = TokenBlocks([Document("a", numbers)], byte_tokenizer(), seq_length=4)
    thin = blocks.thinned(10)
    assert [int(bytes(block.tolist())) for block in thin.tokens] == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    assert len(blocks) == 100
    assert len(blocks.thinned(1000)) == 100


def test_positions_begin_anew_behind_each_document():
    tokenizer = byte_tokenizer()
    joined = TokenBlocks([Document("a", "abcd"), Document("b", "xy"), Document("c", "z" * 9)], tokenizer, seq_length=6)
    apart = joined.apart(tokenizer.eos_token_id)
    assert [block["position_ids"].tolist() for block in apart] == [
        [0, 1, 2, 3, 4, 0],  # abcd, its end, x
        [0, 1, 0, 1, 2, 3],  # y, its end, zzzz: where a block begins, a document is cut
        [0, 1, 2, 3, 4, 5],
    ]
    assert all(torch.equal(one["input_ids"], other["input_ids"]) for one, other in zip(joined, apart, strict=True))
    assert "position_ids" not in joined[0]


@pytest.mark.parametrize(("extra_tokens", "dtype"), [(0, np.uint16), (1 << 16, np.uint32)])
def test_blocks_are_kept_in_a_file(extra_tokens, dtype, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(extra_tokens)])
    text = f"aé<{extra_tokens - 1}>" * 7
    file = tmp_path / "tokens"
    assert TokenBlocks.read(file, seq_length=5) is None
    blocks = TokenBlocks([Document("a", text), Document("b", "bb")], tokenizer, seq_length=5, file=file)
    again = TokenBlocks.read(file, seq_length=5)
    for kept in (blocks, again):
        assert kept.tokens.dtype == dtype
        assert kept.tokens.flatten().tolist() == [*tokenizer(text).input_ids, 256, 98, 98, 256][: kept.tokens.size]
        assert kept[0]["labels"].dtype == torch.int64
        assert kept.documents == 2
        assert kept.bytes_per_token == blocks.bytes_per_token
    assert TokenBlocks.read(file, seq_length=3).tokens.flatten().tolist()[:9] == blocks.tokens.flatten().tolist()[:9]

    class Unreadable:
        @property
        def text(self):
            raise OSError

    with pytest.raises(OSError):
        TokenBlocks([Document("a", text)] * 64 + [Unreadable()], tokenizer, seq_length=5, file=tmp_path / "cut")
    assert (tmp_path / "cut").exists()
    assert TokenBlocks.read(tmp_path / "cut", seq_length=5) is None


def test_no_text_gives_no_blocks(tmp_path):
    for documents in ([], [Document("a", "xy")]):
        assert len(TokenBlocks(documents, byte_tokenizer(), seq_length=4, file=tmp_path / "tokens")) == 0
        assert len(TokenBlocks.read(tmp_path / "tokens", seq_length=4)) == 0


def test_split_depends_on_names_alone():
    documents = [Document(f"file{i}.py", str(i)) for i in range(1000)]
    train, held_out = split_held_out(documents, 0.1)
    again = split_held_out(reversed(documents[:500]), 0.1)
    assert 60 < len(held_out) < 140
    assert not set(train) & set(held_out)
    assert set(again[1]) == {d for d in held_out if d in documents[:500]}
    assert [d.name for d in again[0]] == [d.name for d in train if d in documents[:500]]


def test_one_document_is_split_inside():
    train, held_out = split_held_out([Document("book.txt", "x" * 80 + "y" * 20)], 0.2)
    assert ([d.text for d in train], [d.text for d in held_out]) == (["x" * 80], ["y" * 20])


def test_standard_library_has_no_tests():
    documents = standard_library()
    names = {d.name for d in documents}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not [n for n in names if {"test", "tests", "site-packages"} & set(n.split("/"))]
    assert sum(len(d.text) for d in documents) > 3_000_000


def test_files_and_directories(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "inner" / "b.jsonl").write_text('{"text": "two"}\n\n{"text": "three"}\n')
    (tmp_path / "ignored.bin").write_text("no")
    assert [d.text for d in read_files([tmp_path], "text")] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("line", "message"),
    [("not json", "b.jsonl:1: not a JSON object"), ('{"body": "x"}', "field 'text'"), ('{"text": 3}', "holds int")],
)
def test_bad_lines_are_named(tmp_path, line, message):
    (tmp_path / "b.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        list(read_files([tmp_path], "text"))


def test_datasets_directory(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": f"row {i}"} for i in range(3)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    assert [d.text for d in read_dataset(str(tmp_path / "saved"), "train", "text")] == [r["text"] for r in rows]
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "x.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    assert len(list(read_dataset(str(tmp_path / "lines"), "train", "text"))) == 3
    with pytest.raises(DataError, match="has columns text, no 'body'"):
        list(read_dataset(str(tmp_path / "saved"), "train", "body"))
    with pytest.raises(DataError, match=r"--dataset .*nowhere"):
        list(read_dataset(str(tmp_path / "nowhere"), "train", "text"))
