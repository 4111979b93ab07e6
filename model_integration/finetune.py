"""Train a LongGen hybrid: `python -m model_integration.finetune --help`.

Without arguments it trains a small byte-level hybrid on the source code of Python's standard library, on whatever this
machine has. With `--model` it turns a checkpoint into a hybrid and fine-tunes it on your text.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging

from model_integration.command_line import one_line_errors
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
from model_integration.modeling import HYBRID_MODELS
from model_integration.training.activations import recompute_activations
from model_integration.training.arguments import FREE_ON_RESUME, parse_arguments
from model_integration.training.reporting import BITS_PER_BYTE, ProgressBar, plot_losses

SETTINGS_FILE = "finetune.json"


class BitsPerByteTrainer(Trainer):
    """Trainer that adds bits per byte, which compares across tokenizers, to every evaluation."""

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        bits_per_token = output.metrics[f"{metric_key_prefix}_loss"] / math.log(2)
        output.metrics[f"{metric_key_prefix}_bits_per_byte"] = bits_per_token / self.eval_dataset.bytes_per_token
        return output


def load_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerBase:
    """The tokenizer asked for, the checkpoint's own, or bytes; DataError when it does not fit the model."""
    path = args.tokenizer or args.model
    if path is None:
        tokenizer = byte_tokenizer()
        args.config.vocab_size = len(tokenizer)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
        except Exception as error:  # a broken directory raises whatever its parser raises
            raise DataError(f"no tokenizer in {path}: {str(error).splitlines()[0]}; see --tokenizer") from error
        if args.model is None:
            args.config.vocab_size = len(tokenizer)
    if tokenizer.eos_token_id is None:
        raise DataError(f"the tokenizer in {path} has no end-of-text token to put between documents")
    if len(tokenizer) > args.config.vocab_size:
        raise DataError(
            f"the tokenizer in {path} has {len(tokenizer)} tokens, the model only embeds {args.config.vocab_size}"
        )
    if args.model is None:
        args.config.bos_token_id, args.config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    return tokenizer


def load_documents(args: argparse.Namespace) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents of `--data`, `--dataset` or the standard library."""
    if args.data:
        documents = list(read_files(args.data, args.text_field))
    elif args.dataset:
        documents = list(read_dataset(args.dataset, args.dataset_split, args.text_field))
    else:
        documents = standard_library()
    return split_held_out(documents, args.held_out)


def load_blocks(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[TokenBlocks, TokenBlocks]:
    """(training, held-out) blocks: from the output directory where a resumed run left them, else from the documents.

    Raises DataError for a text shorter than one block.
    """
    parts = ("training", "held-out")
    files = [args.output_dir / f"{part}.tokens" for part in parts]
    blocks = [TokenBlocks.read(file, args.seq_length) for file in files]
    if None in blocks:
        documents = load_documents(args)
        blocks = [TokenBlocks(d, tokenizer, args.seq_length, file) for d, file in zip(documents, files, strict=True)]
    train, held_out = blocks
    assert train is not None and held_out is not None
    for part, found in zip(parts, (train, held_out), strict=True):
        if not len(found):
            raise DataError(f"the {part} text is shorter than one sequence of {args.seq_length} tokens")
    if args.separate_documents:
        return train.apart(tokenizer.eos_token_id), held_out.apart(tokenizer.eos_token_id)
    return train, held_out


def build_model(args: argparse.Namespace) -> Any:
    """The hybrid, with new weights from the seed or those of `--model`; with `--lora-rank` PEFT's model of it."""
    dtype = torch.bfloat16 if args.precision == "bf16-weights" else torch.float32
    args.config._attn_implementation = args.attn_implementation
    set_seed(args.seed)
    if args.model:
        model = HYBRID_MODELS[type(args.config)].from_pretrained(args.model, config=args.config, dtype=dtype)
    else:
        model = HYBRID_MODELS[type(args.config)]._from_config(args.config, dtype=dtype)
    layers = model.model.layers
    if args.lora_rank is not None:
        from peft import LoraConfig, get_peft_model

        alpha = args.lora_alpha
        adapters = LoraConfig(r=args.lora_rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, adapters)
    if args.gradient_checkpointing:
        recompute_activations(model, keep_attention=args.keep_attention)
    if args.compile:
        for layer in layers:
            layer.compile()  # a layer at a time: one compilation serves all layers of a kind
    return model


def training_arguments(args: argparse.Namespace) -> TrainingArguments:
    """The options as Trainer knows them."""
    return TrainingArguments(
        output_dir=str(args.output_dir),
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay,
        adam_beta2=0.95,
        optim=args.optimizer,
        bf16=args.precision == "bf16",
        seed=args.seed,
        use_cpu=args.device == "cpu",
        logging_steps=args.log_steps,
        eval_strategy="steps",
        eval_steps=args.eval_steps,
        save_steps=args.save_steps,
        save_total_limit=2,
        prediction_loss_only=True,
        dataloader_pin_memory=args.device != "cpu" and torch.cuda.is_available(),
        report_to="none",
    )


def check_optimizer(training: TrainingArguments) -> None:
    """DataError for an optimizer whose package is not installed."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(training)
    except ImportError as error:
        raise DataError(f"--optimizer {training.optim.value}: {error}") from error
    except ValueError:
        pass  # some need the model too, which is not there yet


def prepare_output(args: argparse.Namespace) -> str | None:
    """Make the output directory ready; the checkpoint to resume from, or None.

    Raises DataError when a run is to be continued with other settings than it began with.
    """
    out: Path = args.output_dir
    settings = {name: value for name, value in vars(args).items() if name not in (*FREE_ON_RESUME, "config")}
    settings = json.loads(json.dumps(settings, default=str))
    if args.resume:
        before = json.loads((out / SETTINGS_FILE).read_text())
        changed = sorted(name for name in settings if settings[name] != before.get(name))
        if changed:
            was = ", ".join(f"{name} was {before.get(name)}, is {settings[name]}" for name in changed)
            raise DataError(f"--resume continues a run with the settings it began with: {was}")
        complete = [path for path in out.glob("checkpoint-*") if _is_complete(path)]
        if not complete:
            raise DataError(f"--resume: no complete checkpoint in {out}")
        return str(max(complete, key=lambda path: int(path.name.split("-")[1])))
    for old in (*out.glob("checkpoint-*"), out / "final"):
        shutil.rmtree(old, ignore_errors=True)
    for tokens in out.glob("*.tokens*"):
        tokens.unlink()
    out.mkdir(parents=True, exist_ok=True)
    (out / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")
    return None


def _is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has all of the last file that it gets: a run may have been killed in the middle of it."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return True


def _description(
    args: argparse.Namespace, model: Any, train: TokenBlocks, held_out: TokenBlocks, training: TrainingArguments
) -> str:
    """What is about to run."""
    config, full = args.config, ", ".join(map(str, args.config.full_layer_indices)) or "none"
    parameters, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    step_tokens = args.seq_length * args.batch_size * args.accumulate * training.world_size
    return (
        f"{parameters:,} parameters, {trained:,} of them trained; layers {full} of {config.num_hidden_layers} full, "
        f"the others {config.sparse_pattern}\n"
        f"{train.documents:,} training documents, {train.tokens.size:,} tokens; {held_out.documents:,} documents held "
        f"out; on {training.device}\n"
        f"{args.max_steps:,} steps of {step_tokens:,} tokens"
    )


def finetune(args: argparse.Namespace) -> dict[str, float]:
    """Run the training that checked arguments describe; returns the metrics of the final evaluation."""
    if args.backend:
        os.environ["LONGGEN_BACKEND"] = args.backend
    tokenizer = load_tokenizer(args)
    training = training_arguments(args)
    check_optimizer(training)
    with training.main_process_first(local=False):  # the others find what the first has tokenised
        checkpoint = prepare_output(args) if args.resume or training.process_index == 0 else None
        train, held_out = load_blocks(args, tokenizer)
    model = build_model(args)
    trainer = BitsPerByteTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=held_out.thinned(args.eval_blocks),
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressBar())
    if trainer.is_world_process_zero():
        print(_description(args, model, train, held_out, training), flush=True)
    trainer.train(resume_from_checkpoint=checkpoint)
    if not any(BITS_PER_BYTE in entry for entry in trainer.state.log_history if entry["step"] == args.max_steps):
        trainer.evaluate()
    metrics = next(entry for entry in reversed(trainer.state.log_history) if BITS_PER_BYTE in entry)

    out: Path = args.output_dir
    model.config.use_cache = True  # Trainer turns it off while it trains, and would save that
    if args.lora_rank is not None:
        trainer.model = model.merge_and_unload()  # what loads without PEFT, and is as fast
    trainer.save_model(str(out / "final"))
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(out / "final" / "trainer_state.json"))
        plot_losses(trainer.state.log_history, held_out.bytes_per_token, out / "loss.png")
        print(f"{metrics[BITS_PER_BYTE]:.3f} bits per byte on held-out text; {out}/loss.png, checkpoint in {out}/final")
        if training.device.type == "cuda":
            print(f"{torch.cuda.max_memory_allocated(training.device) / (1 << 30):.1f} GiB of GPU memory at most")
    return metrics


def main(argv: list[str] | None = None) -> None:
    logging.disable_progress_bar()  # of loading and saving: the run's own bar is enough
    args = parse_arguments(argv)
    with one_line_errors("python -m model_integration.finetune", DataError):
        finetune(args)


if __name__ == "__main__":
    main()
