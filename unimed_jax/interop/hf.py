"""Hugging Face's decoders and vision towers: their settings and tensor names, in both directions."""

from unimed_jax.config import DecoderConfig
from unimed_jax.interop.table import Entry, Table

LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def leaf_of(linear: str) -> str:
    """Path of one of the decoder's linears."""
    return f"decoder/layers/{'attention' if linear in 'qkvo' else 'mlp'}/{linear}"


def decoder_table(d: DecoderConfig, prefix: str = "", wrapped: tuple[str, ...] = ()) -> Table:
    """The decoder's tensors under `prefix`; `wrapped` linears carry PEFT's ".base_layer"."""
    table = [Entry(f"{prefix}model.embed_tokens.weight", "decoder/embedding")]
    for i in range(d.depth):
        layer = f"{prefix}model.layers.{i}"
        for ours, theirs in LINEARS.items():
            name = f"{layer}.{theirs}{'.base_layer' if ours in wrapped else ''}"
            table.append(Entry(f"{name}.weight", f"{leaf_of(ours)}/kernel", (i,), "transpose"))
            if ours in d.attention_bias or (ours not in "qkvo" and d.mlp_bias):
                table.append(Entry(f"{name}.bias", f"{leaf_of(ours)}/bias", (i,)))
        table.append(Entry(f"{layer}.input_layernorm.weight", "decoder/layers/norm1/scale", (i,)))
        table.append(Entry(f"{layer}.post_attention_layernorm.weight", "decoder/layers/norm2/scale", (i,)))
    table.append(Entry(f"{prefix}model.norm.weight", "decoder/norm/scale"))
    ignored = ["*.rotary_emb.inv_freq"]
    if d.tied_head:
        ignored.append(f"{prefix}lm_head.weight")  # the embedding again
    else:
        table.append(Entry(f"{prefix}lm_head.weight", "decoder/head", layout="transpose"))
    return Table(tuple(table), tuple(ignored))
