"""How well a causal language model does on a prompt: what it says, and how likely it finds the right answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from model_integration.data import DataError
from model_integration.evaluation.tasks import Prompt

#: Positions whose logits exist at once: 128K positions of Llama-3's vocabulary would take 62 GiB in fp32.
LOGITS_CHUNK = 1024

#: The first boundary between stretches of a text whose losses are averaged; each stretch is as long as all before it.
FIRST_STRETCH = 64


@dataclass(frozen=True)
class Score:
    """The greedy continuation of a prompt, whether it is the answer token for token, and the answer's log-likelihood
    in nats, summed over its tokens."""

    got: str
    correct: bool
    logprob: float


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text behind the tokenizer's beginning-of-text token, if it has one; no other is special in it."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    return [*first_ids(tokenizer), *ids]


def first_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a text begins with: the beginning-of-text token where the tokenizer has one."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids), cut where the tokens of the prompt alone and of both together begin to differ."""
    alone, both = encode(tokenizer, prompt.text), encode(tokenizer, prompt.text + prompt.answer)
    cut = 0
    while cut < min(len(alone), len(both)) and alone[cut] == both[cut]:
        cut += 1
    return both[:cut], both[cut:]


@torch.no_grad()
def score_answer(model: Any, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], answer_ids: list[int]) -> Score:
    """Read the prompt twice: with `generate` and the model's own cache, then with the right answer and no cache."""
    device = model.device
    input_ids = torch.tensor([prompt_ids], device=device)
    generated = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=len(answer_ids),
        do_sample=False,
        num_beams=1,
        use_cache=True,  # a checkpoint from the middle of a training run says False
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    got = generated[0, len(prompt_ids) :].tolist()
    answer = torch.tensor(answer_ids, device=device)
    forced = torch.cat([input_ids, answer[None, :-1]], dim=1)
    logits = model(input_ids=forced, logits_to_keep=len(answer_ids), use_cache=False).logits[0]
    logprob = -F.cross_entropy(logits.float(), answer, reduction="sum")
    return Score(tokenizer.decode(got), got == answer_ids, float(logprob))


@torch.no_grad()
def token_losses(model: Any, ids: Tensor) -> Tensor:
    """The loss in nats of every token of `ids` (tokens,) but the first, from all before it: (tokens - 1,) fp32."""
    hidden = model.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
    head = model.get_output_embeddings()
    chunks = zip(hidden.split(LOGITS_CHUNK), ids[1:].split(LOGITS_CHUNK), strict=True)
    return torch.cat([F.cross_entropy(head(h).float(), target, reduction="none") for h, target in chunks]).cpu()


@torch.no_grad()
def check_plain_head(model: Any) -> None:
    """Raise DataError for a model whose logits are more than its head's output, scaled or capped for example.

    `token_losses` applies the head itself, stretch by stretch.
    """
    ids = torch.arange(min(8, model.config.vocab_size), device=model.device)[None]
    expected = model(input_ids=ids, use_cache=False).logits
    logits = model.get_output_embeddings()(model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(logits.float(), expected.float(), rtol=2e-2, atol=2e-2 * float(expected.abs().max())):
        raise DataError(
            f"--task ppl does not support {model.config.model_type} models: they change their head's output"
        )


def stretch_ends(tokens: int) -> list[int]:
    """Where the stretches of a text of so many tokens end: at powers of two, and at the text's own end.

    >>> stretch_ends(300), stretch_ends(40)
    ([64, 128, 256, 300], [40])
    """
    ends = []
    end = FIRST_STRETCH
    while end < tokens:
        ends.append(end)
        end *= 2
    return [*ends, tokens]


def mean_by_position(losses: Tensor) -> tuple[list[int], list[float]]:
    """(ends, means): the mean loss of each stretch. losses[i] belongs to the token at position i + 1."""
    ends = stretch_ends(len(losses) + 1)
    starts = [1, *ends[:-1]]
    means = [float(losses[start - 1 : end - 1].mean()) for start, end in zip(starts, ends, strict=True)]
    return ends, means
