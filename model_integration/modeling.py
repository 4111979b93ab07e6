"""Models whose layers each have their own attention pattern; parameters and their names are the dense models'.

The first three classes hold all that is new. The others join them with a model of transformers each.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralForCausalLM,
    MistralModel,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.generation import GenerationMode
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from longgen_kernels import AttentionPattern
from model_integration import attention
from model_integration.cache import LongGenCache
from model_integration.cache_name import CACHE_NAME, takes_either_name
from model_integration.configuration import (
    LongGenConfig,
    LongGenLlamaConfig,
    LongGenMistralConfig,
    LongGenQwen2Config,
    LongGenQwen3Config,
)
from model_integration.context_parallel import SequenceShard
from model_integration.decoding import GraphedCall, graph_unsupported
from model_integration.layout import SequenceLayout
from model_integration.loss import next_token_loss


class LongGenPreTrainedModel(PreTrainedModel):
    """What a hybrid changes about a dense model's loading and saving."""

    config: LongGenConfig  # transformers reads this annotation as a class, so annotations stay unpostponed here
    _supports_flash_attn = False  # its kernels take no mask: a hybrid would run dense

    def get_correct_attn_implementation(self, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        """None means "longgen": the implementation is never saved, and transformers' own default would be sdpa."""
        requested = attention.NAME if requested_attention is None else requested_attention
        if requested not in attention.IMPLEMENTATIONS:
            raise ValueError(
                f"attn_implementation={requested!r} cannot run sparse layers; "
                f"use {', '.join(attention.IMPLEMENTATIONS)}"
            )
        return super().get_correct_attn_implementation(requested, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """transformers' `from_pretrained`, then `verify_rope_base`."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).verify_rope_base()
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """transformers' `save_pretrained`, after `verify_rope_base`."""
        self.verify_rope_base()
        super().save_pretrained(*args, **kwargs)

    def verify_rope_base(self) -> None:
        """Raise RuntimeError unless the model rotates with the RoPE base that its config names.

        The frequencies are no parameters: they are in no checkpoint, and a config edited after the model was built
        does not reach them.
        """
        rotary = self.base_model.rotary_emb
        expected, actual = type(rotary)(self.config).inv_freq, rotary.original_inv_freq.float()
        if not torch.allclose(actual.cpu(), expected.cpu(), rtol=1e-2, atol=0.0):
            raise RuntimeError(
                f"the model does not rotate with the config's rope_theta={self.config.rope_theta:g}: "
                "set it before the model is built, for example from_pretrained(path, rope_theta=...)"
            )


class LongGenModel(LongGenPreTrainedModel):
    """A decoder with `config.layer_patterns[i]` as `layers[i].self_attn.pattern`."""

    def __init__(self, config: LongGenConfig) -> None:
        super().__init__(config)
        for layer, pattern in zip(self.layers, config.layer_patterns, strict=True):
            layer.self_attn.pattern = pattern

    @takes_either_name
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        sequence_shard: SequenceShard | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As the dense model's, with a mask for each pattern.

        Args:
            input_ids: (batch, tokens), or inputs_embeds (batch, tokens, hidden_size).
            attention_mask: (batch, cached + new tokens), 0 for padding on either side; 4-D masks raise ValueError.
            position_ids: (batch or 1, tokens); where they restart, a packed sequence begins.
            cache: a LongGenCache keeps what the patterns can still show; any other keeps every token. Also as
                `past_key_values`.
            sequence_shard: the batch is this rank's part of longer sequences, packed as the shard says; position_ids
                then only rotate. No mask and no cache with it.
            cu_seq_lens_q, max_length_q: boundaries of packed sequences, as DataCollatorWithFlattening gives them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch_size, q_length = hidden_states.shape[:2]
        if sequence_shard is not None:
            if self.config._attn_implementation != attention.NAME:
                raise ValueError(
                    f"sequence_shard needs attn_implementation={attention.NAME!r}, "
                    f"got {self.config._attn_implementation!r}"
                )
            excluded = {"attention_mask": attention_mask, CACHE_NAME: cache}
            excluded["cu_seq_lens_q"] = kwargs.get("cu_seq_lens_q")
            sequence_shard.check(self.config, batch_size, q_length, **excluded)
            use_cache = False
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        seen = 0 if cache is None else int(cache.get_seq_length())
        layer_cache = cache
        masks: dict[AttentionPattern, Any]
        if sequence_shard is not None:
            masks = {layer.self_attn.pattern: sequence_shard for layer in self.layers}
            position_ids = sequence_shard.position_ids(hidden_states.device) if position_ids is None else position_ids
        elif isinstance(cache, LongGenCache) and self.config._attn_implementation == attention.NAME:
            # The attention function appends and attends in one: it finds the cache in its mask, the layers none.
            packing = kwargs.get("cu_seq_lens_q")
            step = cache.step(batch_size, q_length, hidden_states.device, attention_mask, position_ids, packing)
            masks, layer_cache = {layer.self_attn.pattern: step for layer in self.layers}, None
        else:
            masks = self._masks(cache, hidden_states, attention_mask, position_ids, kwargs)
        if position_ids is None:
            position_ids = torch.arange(seen, seen + q_length, device=hidden_states.device)[None]
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[layer.self_attn.pattern],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE_NAME: layer_cache},
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: cache})

    def _masks(
        self,
        cache: Cache | None,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        kwargs: dict[str, Any],
    ) -> dict[AttentionPattern, Any]:
        """Each pattern's `attention_mask`, for a cache that keeps every token or for none."""
        batch_size, q_length = hidden_states.shape[:2]
        seen, kv_length = 0, q_length
        if cache is not None:
            seen = int(cache.get_seq_length())
            kv_length = int(cache.get_mask_sizes(q_length, 0)[0])
        layout = SequenceLayout.of(
            batch_size,
            q_length,
            kv_length=kv_length,
            seen=seen,
            device=hidden_states.device,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seq_lens=kwargs.get("cu_seq_lens_q"),
            max_length=kwargs.get("max_length_q"),
        )
        config = self.config
        return {
            pattern: attention.attention_mask_for(
                config._attn_implementation,
                layout,
                pattern,
                config.num_attention_heads,
                config.num_key_value_heads,
                hidden_states,
            )
            for pattern in {layer.self_attn.pattern for layer in self.layers}
        }


class LongGenForCausalLM(LongGenPreTrainedModel):
    """A hybrid with a language-modelling head.

    Loads its own checkpoints and the dense model's, whose parameters have the same names:

        config = LongGenLlamaConfig.from_dense(AutoConfig.from_pretrained(llama), rope_theta=5e6)
        model = LongGenLlamaForCausalLM.from_pretrained(llama, config=config)
    """

    decoder_class: type[LongGenModel]

    def __init__(self, config: LongGenConfig) -> None:
        PreTrainedModel.__init__(self, config)  # the dense class's own would build a dense decoder
        self.model = self.decoder_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_either_name
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As the dense model's; with labels the output has a loss and no logits, which never exist all at once.

        Args:
            labels: (batch, tokens) int64, unshifted; -100 does not count.
            logits_to_keep: how many of the last tokens get logits, or which; 0: all. None: all without labels, none
                with them. With labels, anything but None computes the loss from those logits, as the dense model does.
            num_items_in_batch: what the summed loss is divided by; by default the number of labels that count.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            CACHE_NAME: cache,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        if labels is None or logits_to_keep is not None or self.loss_function is not ForCausalLMLoss:
            keep = 0 if logits_to_keep is None else logits_to_keep
            return super().forward(**inputs, labels=labels, logits_to_keep=keep, **kwargs)
        outputs = self.model(**inputs, **kwargs)
        return CausalLMOutputWithPast(
            loss=next_token_loss(outputs.last_hidden_state, self.lm_head, labels, self.config.vocab_size, **kwargs),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Keep the 2-D mask: `generate` would make one dense 4-D mask for all layers when the cache is static."""
        return attention_mask

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """A LongGenCache where transformers would make a DynamicCache without having been asked for one."""
        if (
            self.config._attn_implementation == attention.NAME
            and model_kwargs.get(CACHE_NAME) is None
            and generation_config.use_cache is not False
            and generation_config.cache_implementation is None
        ):
            model_kwargs[CACHE_NAME] = LongGenCache(self.config, max_length=max_cache_length)
            return
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: GenerationConfig) -> bool:
        """Whether greedy decoding and sampling take `get_compiled_call`'s steps instead of the model's own."""
        if generation_config.compile_config is None and isinstance(model_kwargs.get(CACHE_NAME), LongGenCache):
            on_gpu = self.device.type == "cuda" and graph_unsupported(self) is None
            return on_gpu and not generation_config.disable_compile
        return super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable[..., Any]:
        """A call that replays a CUDA graph behind a LongGenCache, and what transformers compiles with other caches."""
        graphed = GraphedCall(self)
        others = super().get_compiled_call

        def call(**inputs: Any) -> Any:
            sparse = isinstance(inputs.get(CACHE_NAME), LongGenCache)
            return graphed(**inputs) if sparse else others(compile_config)(**inputs)

        return call


class LongGenLlamaModel(LongGenModel, LlamaModel):
    """LlamaModel as a hybrid."""

    config: LongGenLlamaConfig


class LongGenLlamaForCausalLM(LongGenForCausalLM, LlamaForCausalLM):
    """LlamaForCausalLM as a hybrid."""

    config: LongGenLlamaConfig
    decoder_class = LongGenLlamaModel


class LongGenMistralModel(LongGenModel, MistralModel):
    """MistralModel as a hybrid."""

    config: LongGenMistralConfig


class LongGenMistralForCausalLM(LongGenForCausalLM, MistralForCausalLM):
    """MistralForCausalLM as a hybrid."""

    config: LongGenMistralConfig
    decoder_class = LongGenMistralModel


class LongGenQwen2Model(LongGenModel, Qwen2Model):
    """Qwen2Model as a hybrid."""

    config: LongGenQwen2Config


class LongGenQwen2ForCausalLM(LongGenForCausalLM, Qwen2ForCausalLM):
    """Qwen2ForCausalLM as a hybrid."""

    config: LongGenQwen2Config
    decoder_class = LongGenQwen2Model


class LongGenQwen3Model(LongGenModel, Qwen3Model):
    """Qwen3Model as a hybrid."""

    config: LongGenQwen3Config


class LongGenQwen3ForCausalLM(LongGenForCausalLM, Qwen3ForCausalLM):
    """Qwen3ForCausalLM as a hybrid."""

    config: LongGenQwen3Config
    decoder_class = LongGenQwen3Model


#: A hybrid's model with a language-modelling head, by its config.
HYBRID_MODELS: dict[type[LongGenConfig], type[LongGenForCausalLM]] = {
    model.config_class: model
    for model in (
        LongGenLlamaForCausalLM,
        LongGenMistralForCausalLM,
        LongGenQwen2ForCausalLM,
        LongGenQwen3ForCausalLM,
    )
}
