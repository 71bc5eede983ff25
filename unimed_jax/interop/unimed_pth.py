"""Names and layouts of Uni-Med's published tensors, in one table used in both directions.

The original stores torch tensors ([out, in] linears, one module per layer and expert); here layers are
stacked, experts concatenated and linears [in, out].
"""

from unimed_jax.config import VISUAL_TASKS, ModelConfig
from unimed_jax.interop import hf
from unimed_jax.interop.table import Entry, Table, to_leaves, to_published
from unimed_jax.interop.towers import eva_table
from unimed_jax.model.connector import visual_features

__all__ = ["to_leaves", "to_published"]


def connector_table(config: ModelConfig) -> Table:
    """Task tokens, router and projection experts (or the dense projector)."""
    c = config.connector
    table: list[Entry] = []
    out = config.decoder.width
    if c.task_tokens:
        table += [Entry(f"task_tokens.{t}", "connector/task_tokens", (i,), "row") for i, t in enumerate(VISUAL_TASKS)]
    if not c.is_moe:
        depth = 1 if c.kind == "linear" else int(c.kind[3 : c.kind.index("x")])
        for i in range(depth):
            name = "llm_proj" if c.kind == "linear" else f"llm_proj.{2 * i}"
            table.append(Entry(f"{name}.weight", f"connector/layers/{i}/kernel", layout="transpose"))
            table.append(Entry(f"{name}.bias", f"connector/layers/{i}/bias"))
        return Table(tuple(table))
    for e in range(c.experts):
        if c.kind == "moe_linear":
            block = (slice(None), slice(e * out, (e + 1) * out))
            table.append(Entry(f"moe_layers.{e}.0.weight", "connector/experts/up", block, "transpose"))
            table.append(Entry(f"moe_layers.{e}.0.bias", "connector/experts/bias", (e,)))
            continue
        part = slice(e * (c.hidden or out), (e + 1) * (c.hidden or out))
        table.append(Entry(f"moe_layers.{e}.0.weight", "connector/experts/up", (slice(None), part), "transpose"))
        table.append(Entry(f"moe_layers.{e}.0.bias", "connector/experts/up_bias", (part,)))
        table.append(Entry(f"moe_layers.{e}.2.weight", "connector/experts/down", (part,), "transpose"))
        table.append(Entry(f"moe_layers.{e}.2.bias", "connector/experts/bias", (e,)))
    if c.router in ("soft", "sparse"):
        start, widths = 0, {"task": c.task_token_width or visual_features(config), "token": visual_features(config)}
        for half in c.router_input.split("_"):  # the task half comes first, as published
            columns = (start, start + widths[half])
            start += widths[half]
            table.append(
                Entry("router.fc1.weight", f"connector/router/{half}_kernel", layout="transpose", columns=columns)
            )
        table.append(Entry("router.fc1.bias", "connector/router/bias"))
        table.append(Entry("router.fc2.weight", "connector/router/out_kernel", layout="transpose"))
        table.append(Entry("router.fc2.bias", "connector/router/out_bias"))
        return Table(tuple(table), ("llm_proj.*",))  # the experts again
    return Table(tuple(table), ("llm_proj.*", "router.*"))  # the router is there even where the routing reads none


def lora_table(config: ModelConfig, prefix: str = "llm_model.base_model.model.model.layers") -> Table:
    """Adapters as PEFT names them in a model that it wraps."""
    table = []
    names = hf.linear_names(config.decoder)
    for i in range(config.decoder.depth):
        for ours in config.lora.targets if config.lora.rank else ():
            for letter in "ab":
                name = f"{prefix}.{i}.{names[ours]}.lora_{letter.upper()}.default.weight"
                table.append(Entry(name, f"{hf.leaf_of(ours)}/lora_{letter}", (i,), "transpose"))
    return Table(tuple(table), ("*.rotary_emb.inv_freq",))


def trainable_table(config: ModelConfig) -> Table:
    """What the original's checkpoint holds under `model`."""
    return connector_table(config) + lora_table(config)


def decoder_table(config: ModelConfig) -> Table:
    """The frozen decoder in the original's full state: Hugging Face's LLaMA, wrapped by PEFT."""
    return hf.decoder_table(config.decoder, "llm_model.base_model.model.", config.lora.targets)


def vision_table(config: ModelConfig) -> Table:
    """The frozen vision encoder in the original's full state."""
    return eva_table(config.vision, "visual_encoder.")


def ln_vision_table() -> Table:
    """The norm behind the encoder, which the original builds fresh and never loads or trains."""
    return Table(
        (
            Entry("ln_vision.weight", "vision/output_norm/scale"),
            Entry("ln_vision.bias", "vision/output_norm/bias"),
        )
    )
