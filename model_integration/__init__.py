"""LongGen hybrids in transformers: importing this package makes them known to the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from model_integration.cache import LongGenCache
from model_integration.configuration import (
    LongGenLlamaConfig,
    LongGenMistralConfig,
    LongGenQwen2Config,
    LongGenQwen3Config,
)
from model_integration.decoding import GraphDecoder
from model_integration.modeling import (
    HYBRID_MODELS,
    LongGenLlamaForCausalLM,
    LongGenLlamaModel,
    LongGenMistralForCausalLM,
    LongGenMistralModel,
    LongGenQwen2ForCausalLM,
    LongGenQwen2Model,
    LongGenQwen3ForCausalLM,
    LongGenQwen3Model,
)

for _config, _model in HYBRID_MODELS.items():
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model.decoder_class)
    AutoModelForCausalLM.register(_config, _model)

__all__ = [
    "GraphDecoder",
    "LongGenCache",
    "LongGenLlamaConfig",
    "LongGenLlamaForCausalLM",
    "LongGenLlamaModel",
    "LongGenMistralConfig",
    "LongGenMistralForCausalLM",
    "LongGenMistralModel",
    "LongGenQwen2Config",
    "LongGenQwen2ForCausalLM",
    "LongGenQwen2Model",
    "LongGenQwen3Config",
    "LongGenQwen3ForCausalLM",
    "LongGenQwen3Model",
]
