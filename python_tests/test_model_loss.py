"""The loss that never holds all logits: the same loss and gradients as from all of them, in any setting of training."""

import pytest
import torch
import torch.distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments, default_data_collator
from transformers.loss.loss_utils import ForCausalLMLoss

from longgen_kernels import AttentionPattern
from model_integration import LongGenLlamaConfig, LongGenLlamaForCausalLM, loss
from model_integration.loss import next_token_loss
from model_integration.training.activations import recompute_activations

VOCABULARY, BATCH, LENGTH = 101, 2, 37
TOKENS = BATCH * LENGTH


@pytest.fixture(autouse=True)
def _seven_tokens_at_once(monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 7 * VOCABULARY + 3)


def hybrid(**fields):
    torch.manual_seed(2)
    config = LongGenLlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        sparse_pattern=AttentionPattern.sink_window(2, 7),
        **fields,
    )
    return LongGenLlamaForCausalLM(config)


@pytest.fixture
def batch():
    """Token ids and labels of which some do not count, among them a whole stretch."""
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    labels = ids.clone()
    labels[0, 5:23] = -100
    labels[1, -1] = -100
    return {"input_ids": ids, "labels": labels}


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    result = model(**inputs, use_cache=False)
    result.loss.backward()
    return result.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation, of the backward pass too, gives back."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_items_in_batch": 11},
        {"num_items_in_batch": torch.tensor(11)},
        {"ignore_index": 3},
        {"shift_labels": torch.arange(TOKENS).view(BATCH, LENGTH)},
        {"attention_mask": (torch.arange(LENGTH) > 4).long().repeat(BATCH, 1)},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
@pytest.mark.parametrize("tied", [False, True])
def test_the_same_loss_and_gradients_as_from_all_logits(options, tied, batch):
    if "ignore_index" in options:
        batch["labels"] = batch["input_ids"]
    model = hybrid(tie_word_embeddings=tied)
    expected = loss_and_gradients(model, **batch, **options, logits_to_keep=0)
    torch.testing.assert_close(loss_and_gradients(model, **batch, **options), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_logits_never_exist(checkpointing, batch):
    model = hybrid()
    if checkpointing:
        recompute_activations(model)
    model.train()
    weights = max(p.numel() for p in model.parameters())
    with LargestTensor() as stretches:
        loss_and_gradients(model, **batch)
    assert stretches.elements <= max(7 * VOCABULARY, weights) < TOKENS * VOCABULARY
    with LargestTensor() as whole:
        loss_and_gradients(model, **batch, logits_to_keep=0)
    assert whole.elements == TOKENS * VOCABULARY
    with LargestTensor() as evaluation, torch.no_grad():
        model.eval()(**batch)
    assert evaluation.elements <= max(7 * VOCABULARY, weights)


def test_16_bit_gradients_are_summed_in_fp32():
    """64 stretches: an error as from one product, not one that grows with their number."""
    hidden, head = torch.randn(1, 448, 16), torch.nn.Linear(16, VOCABULARY, bias=False)
    labels = torch.randint(0, VOCABULARY, (1, 448))

    def gradient(dtype, compute):
        layer = torch.nn.Linear(16, VOCABULARY, bias=False, dtype=dtype)
        layer.weight.data.copy_(head.weight)
        compute(hidden.to(dtype), layer).backward()
        return layer.weight.grad.double()

    exact = gradient(torch.float32, lambda h, layer: next_token_loss(h, layer, labels, VOCABULARY))
    stretches = gradient(torch.bfloat16, lambda h, layer: next_token_loss(h, layer, labels, VOCABULARY))
    whole = gradient(torch.bfloat16, lambda h, layer: ForCausalLMLoss(layer(h), labels, VOCABULARY))
    assert (stretches - exact).norm() < 1.5 * (whole - exact).norm()


@pytest.mark.parametrize("setting", ["autocast", "bf16"])
def test_16_bits(setting, batch):
    model = hybrid().to(torch.bfloat16 if setting == "bf16" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"):
        (value, gradients), (expected, expected_gradients) = (
            loss_and_gradients(model, **batch, **how) for how in ({}, {"logits_to_keep": 0})
        )
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).norm() < 0.02 * expected_gradients[name].norm(), name


def test_a_batch_in_which_nothing_counts(batch):
    """0 / 0 as in transformers; divided by a whole batch's count it is 0, with gradients of 0."""
    nothing = {"input_ids": batch["input_ids"], "labels": torch.full_like(batch["labels"], -100)}
    model = hybrid()
    assert model(**nothing).loss.isnan()
    value, gradients = loss_and_gradients(model, **nothing, num_items_in_batch=5)
    assert value == 0
    assert all(not gradient.any() for gradient in gradients.values())


def test_packed_documents(batch):
    lengths = [1, 22, 14]
    parts = batch["input_ids"][0].split(lengths)
    collator = DataCollatorWithFlattening(return_position_ids=True)
    packed = collator([{"input_ids": part} for part in parts])
    model = hybrid()
    value, gradients = loss_and_gradients(model, **packed)
    model.zero_grad()
    counted = sum(n - 1 for n in lengths)
    alone = [
        model(input_ids=part[None], labels=part[None], num_items_in_batch=counted, use_cache=False).loss
        for part in parts
    ]
    sum(alone).backward()
    torch.testing.assert_close(value, sum(alone).detach())
    expected = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


def test_trainer_divides_by_what_counts_in_all_accumulated_batches(batch, tmp_path):
    """One step of two rows at once, or of one row at a time: the same weights, although one row counts for less."""
    weights = []
    rows = [{name: value[i] for name, value in batch.items()} for i in range(BATCH)]
    for size in (1, BATCH):
        model = hybrid()
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=BATCH // size,
            optim="sgd",
            max_grad_norm=0.0,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator).train()
        weights.append(model.state_dict())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)
    assert not torch.equal(weights[0]["lm_head.weight"], hybrid().lm_head.weight)


def test_data_parallel(batch, tmp_path):
    """DistributedDataParallel's hooks see each gradient once, though the head is called once for each stretch."""
    expected = loss_and_gradients(hybrid(), **batch)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        # The wrapper ends here, before the group does: the last owner of a group joins its threads, and a wrapper does
        # so with Python's lock held, which a thread that frees a finished all-reduce waits for.
        value, gradients = loss_and_gradients(DistributedDataParallel(hybrid()), **batch)
    finally:
        torch.distributed.destroy_process_group()
    gradients = {name.removeprefix("module."): gradient for name, gradient in gradients.items()}
    torch.testing.assert_close((value, gradients), expected)


def test_a_head_is_called_as_a_module(batch):
    """What adapters and hooks add to the head counts."""
    model = hybrid()
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: 2 * logits)
    expected = loss_and_gradients(model, **batch, logits_to_keep=0)
    torch.testing.assert_close(loss_and_gradients(model, **batch), expected, rtol=1e-4, atol=1e-6)


def test_which_logits_the_output_has(batch):
    model = hybrid().eval()
    ids = batch["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits
        assert logits.shape == (BATCH, LENGTH, VOCABULARY)
        assert model(**batch).logits is None
        assert torch.equal(model(**batch, logits_to_keep=0).logits, logits)
        torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:])
        value, *others = model(**batch, return_dict=False, use_cache=False)
        assert not others
        torch.testing.assert_close(value, ForCausalLMLoss(logits, batch["labels"], VOCABULARY))


def test_a_loss_function_of_the_users_own(batch):
    model = hybrid()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: F.cross_entropy(logits[0, :-1], labels[0, 1:])
    result = model(**batch)
    assert result.loss == F.cross_entropy(result.logits[0, :-1], batch["labels"][0, 1:])
