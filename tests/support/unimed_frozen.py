"""Names the original Uni-Med's frozen weights, which only the golden files hold."""

from unimed_jax.config import ModelConfig
from unimed_jax.interop.families.hf import hf_decoder_table
from unimed_jax.interop.families.towers import eva_table
from unimed_jax.interop.tensors.table import Entry, Table


def frozen_table(config: ModelConfig) -> Table:
    """Lists the frozen weights: decoder, vision encoder and the norm after it.

    The original never loads or trains that norm.
    """
    norm = (
        Entry("ln_vision.weight", "vision/output_norm/scale"),
        Entry("ln_vision.bias", "vision/output_norm/bias"),
    )
    decoder = hf_decoder_table(config.decoder, "llm_model.base_model.model.", config.lora.targets)
    return decoder + eva_table(config.vision, "visual_encoder.") + Table(norm)
