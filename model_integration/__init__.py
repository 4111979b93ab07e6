"""LongGen hybrids in transformers: importing this package registers `longgen_llama` with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from model_integration.cache import LongGenCache
from model_integration.configuration import LongGenLlamaConfig
from model_integration.modeling import LongGenLlamaForCausalLM, LongGenLlamaModel

AutoConfig.register(LongGenLlamaConfig.model_type, LongGenLlamaConfig)
AutoModel.register(LongGenLlamaConfig, LongGenLlamaModel)
AutoModelForCausalLM.register(LongGenLlamaConfig, LongGenLlamaForCausalLM)

__all__ = ["LongGenCache", "LongGenLlamaConfig", "LongGenLlamaForCausalLM", "LongGenLlamaModel"]
