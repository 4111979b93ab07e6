"""Measure what a checkpoint makes of long texts: `python -m model_integration.evaluate --help`.

Tasks are made here, from a seed and text that is at hand, so that a dense base model, its hybrid and a sparse-only
model get the same prompts. `model_integration.evaluation.tasks` says what they are, and what they are not.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from model_integration.command_line import one_line_errors
from model_integration.data import (
    DataError,
    Document,
    TokenBlocks,
    read_files,
    split_held_out,
    standard_library,
)
from model_integration.evaluation.arguments import FIXED_ON_RESUME, RESULTS_FILE, SETTINGS_FILE, parse_arguments
from model_integration.evaluation.reporting import plot_depths, plot_perplexity, results_table
from model_integration.evaluation.scoring import (
    check_plain_head,
    encode,
    encode_prompt,
    first_ids,
    mean_by_position,
    score_answer,
    token_losses,
)
from model_integration.evaluation.tasks import RETRIEVAL_TASKS, TASKS, Case, Haystack, Prompt, make_cases, make_prompt

PICTURE_TITLES = {
    "niah": "needle retrieval",
    "multikey": "needle retrieval among several keys",
}


class Texts:
    """The text of a run, read and tokenised when a task first needs it."""

    def __init__(self, args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> None:
        self.args = args
        self.tokenizer = tokenizer

    @cached_property
    def documents(self) -> list[Document]:
        data = self.args.data
        return list(read_files(data, self.args.text_field)) if data else standard_library()

    @cached_property
    def haystack(self) -> Haystack:
        return Haystack(self.documents)

    def prompt(self, case: Case) -> Prompt:
        """The prompt of a case of any task but ppl; see `make_prompt` for what raises."""
        return make_prompt(case, self.args.seed, self.haystack, lambda text: len(encode(self.tokenizer, text)))

    @cached_property
    def held_out(self) -> Tensor:
        """(tokens,) of the held-out documents, the end-of-text token behind each."""
        _, documents = split_held_out(self.documents, self.args.held_out)
        return torch.from_numpy(TokenBlocks(documents, self.tokenizer, seq_length=1).tokens.flatten()).long()

    def held_out_sequence(self, case: Case) -> Tensor:
        """(case.length,) of held-out text from a place that the case draws; two cases may overlap."""
        first = first_ids(self.tokenizer)
        rest = case.length - len(first)
        if rest > len(self.held_out):
            raise DataError(
                f"--lengths {case.length}: the held-out text has {len(self.held_out)} tokens; "
                "give more text (--data) or hold more of it out (--held-out)"
            )
        start = case.random(self.args.seed).randrange(len(self.held_out) - rest + 1)
        return torch.cat([torch.tensor(first, dtype=torch.int64), self.held_out[start : start + rest]])


def load_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerBase:
    """The tokenizer asked for or the checkpoint's own; DataError when it does not fit the model."""
    path = args.tokenizer or args.checkpoint
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a broken directory raises whatever its parser raises
        raise DataError(f"no tokenizer in {path}: {str(error).splitlines()[0]}; see --tokenizer") from error
    if tokenizer.eos_token_id is None:
        raise DataError(f"the tokenizer in {path} has no end-of-text token to put between documents")
    if len(tokenizer) > args.config.vocab_size:
        raise DataError(
            f"the tokenizer in {path} has {len(tokenizer)} tokens, the model only embeds {args.config.vocab_size}"
        )
    return tokenizer


def load_model(args: argparse.Namespace) -> Any:
    try:
        model = AutoModelForCausalLM.from_pretrained(
            args.checkpoint, attn_implementation=args.attn_implementation, dtype=args.dtype
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"CHECKPOINT {args.checkpoint}: {str(error).splitlines()[0]}") from error
    return model.to(args.device).eval()


def read_results(path: Path) -> list[dict[str, Any]]:
    """The results in a file; a last line that a killed run left unfinished is none."""
    records = []
    for number, line in enumerate(path.read_text().split("\n")[:-1], 1):
        try:
            record = json.loads(line)
            Case(record["task"], record["length"], record["depth"], record["sample"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}: not a result of this command") from error
        records.append(record)
    return records


def prepare_output(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Make the output directory ready; the results that it holds already.

    Raises DataError when a run is to be continued with other settings than it began with.
    """
    out: Path = args.out
    settings = json.loads(json.dumps({name: getattr(args, name) for name in FIXED_ON_RESUME}, default=str))
    records = []
    if args.resume:
        if not (out / SETTINGS_FILE).exists():
            raise DataError(f"--resume: no {SETTINGS_FILE} in {out}, so nobody knows the settings of its results")
        before = json.loads((out / SETTINGS_FILE).read_text())
        changed = [name for name in settings if settings[name] != before.get(name)]
        if changed:
            was = ", ".join(f"{name} was {before.get(name)}, is {settings[name]}" for name in changed)
            raise DataError(f"--resume continues a run with the settings it began with: {was}")
        records = read_results(out / RESULTS_FILE)
    for task in TASKS:
        (out / f"{task}.png").unlink(missing_ok=True)  # drawn again where there are results for it
    out.mkdir(parents=True, exist_ok=True)
    (out / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")
    (out / RESULTS_FILE).write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def check_lengths(cases: list[Case], texts: Texts) -> None:
    """DataError where a task's shortest length is too short for it, or the held-out text shorter than its longest."""
    for task in dict.fromkeys(case.task for case in cases):
        lengths = [case for case in cases if case.task == task]  # ascending
        if task == "ppl":
            texts.held_out_sequence(lengths[-1])
        else:
            texts.prompt(lengths[0])


def run_case(model: Any, tokenizer: PreTrainedTokenizerBase, texts: Texts, case: Case, seed: int) -> dict[str, Any]:
    """The result of one case, as a line of the results file says it."""
    result: dict[str, Any] = {**vars(case), "seed": seed}
    if case.task == "ppl":
        ids = texts.held_out_sequence(case).to(model.device)
        started = time.perf_counter()
        losses = token_losses(model, ids)
        seconds = time.perf_counter() - started
        ends, means = mean_by_position(losses)
        result |= {"tokens": len(ids), "expected": None, "got": None, "correct": None, "logprob": -float(losses.sum())}
        return result | {"answer_tokens": len(losses), "seconds": seconds, "positions": ends, "losses": means}
    prompt = texts.prompt(case)
    prompt_ids, answer_ids = encode_prompt(tokenizer, prompt)
    started = time.perf_counter()
    score = score_answer(model, tokenizer, prompt_ids, answer_ids)
    seconds = time.perf_counter() - started
    result |= {"tokens": len(prompt_ids), "expected": prompt.answer, "got": score.got, "correct": score.correct}
    return result | {"logprob": score.logprob, "answer_tokens": len(answer_ids), "seconds": seconds}


def evaluate(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run what checked arguments describe; returns all results in the output directory."""
    if args.backend:
        os.environ["LONGGEN_BACKEND"] = args.backend
    compared = {str(run): read_results(run / RESULTS_FILE) for run in args.compare}
    tokenizer = load_tokenizer(args)
    texts = Texts(args, tokenizer)
    records = prepare_output(args)
    done = {Case(record["task"], record["length"], record["depth"], record["sample"]) for record in records}
    cases = [case for case in make_cases(args.task, args.lengths, args.depths, args.samples) if case not in done]
    console = Console()
    if cases:
        check_lengths(cases, texts)
        model = load_model(args)
        if "ppl" in args.task:
            check_plain_head(model)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with (
            (args.out / RESULTS_FILE).open("a") as results,
            Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress,
        ):
            bar = progress.add_task("", total=len(cases))
            for case in cases:
                where = "" if case.depth is None else f" at {case.depth:.0%}"
                progress.update(bar, description=f"{case.task}, {case.length} tokens{where}")
                try:
                    record = run_case(model, tokenizer, texts, case, args.seed)
                except torch.OutOfMemoryError as error:
                    raise DataError(
                        f"--lengths {case.length}: {args.device} has too little memory for {case.task}; {args.out} "
                        "keeps the results before it"
                    ) from error
                results.write(json.dumps(record) + "\n")
                results.flush()
                records.append(record)
                progress.advance(bar)
    draw(args.out, records)
    console.print(results_table({str(args.out): records, **compared}))
    console.print(f"{len(records)} results and pictures in {args.out}", soft_wrap=True, highlight=False)
    return records


def draw(out: Path, records: list[dict[str, Any]]) -> None:
    """The pictures of all tasks that have one."""
    for task in RETRIEVAL_TASKS:
        if chosen := [record for record in records if record["task"] == task]:
            plot_depths(chosen, PICTURE_TITLES[task], out / f"{task}.png")
    if chosen := [record for record in records if record["task"] == "ppl"]:
        plot_perplexity(chosen, out / "ppl.png")


def main(argv: list[str] | None = None) -> None:
    logging.disable_progress_bar()  # of loading: the run's own bar is enough
    args = parse_arguments(argv)
    with one_line_errors("python -m model_integration.evaluate", DataError):
        evaluate(args)


if __name__ == "__main__":
    main()
