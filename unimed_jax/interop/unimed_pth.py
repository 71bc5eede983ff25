"""Names and layouts of Uni-Med's published tensors, in one table used in both directions.

The original stores torch tensors ([out, in] linears, one module per layer and expert); here layers are
stacked, experts concatenated and linears [in, out].
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from unimed_jax.config import VISUAL_TASKS, ModelConfig, UserError
from unimed_jax.model.connector import visual_features

LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A published tensor, or a run of its columns, and the part of our leaf that holds the same numbers."""

    name: str
    path: str
    ours: tuple = ()  # index into our leaf
    # same | transpose | patch (convolution [out, 3, p, p] <-> [p * p * 3, out]) | row ([1, 1, c]) | batch ([1, n, c])
    layout: str = "same"
    columns: tuple[int, int] | None = None  # of the published tensor (the router's two halves)

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        if self.layout == "transpose":
            return tensor[:, slice(*self.columns or (None,))].T
        if self.layout == "patch":
            return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])  # [p * p * 3, out]
        if self.layout == "batch":
            return tensor[0]
        return tensor.reshape(-1) if self.layout == "row" else tensor  # [c]

    def to_published(self, leaf: np.ndarray) -> np.ndarray:
        part = leaf[self.ours]
        if self.layout == "transpose":
            return part.T
        if self.layout == "patch":
            side = round((part.shape[0] / 3) ** 0.5)
            return part.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)  # [out, 3, p, p]
        if self.layout == "batch":
            return part[None]
        return part.reshape(1, 1, -1) if self.layout == "row" else part  # [1, 1, c]


def connector_table(config: ModelConfig) -> list[Entry]:
    """Task tokens, router and projection experts (or the dense projector)."""
    c, table = config.connector, []
    out = config.decoder.width
    if c.task_tokens:
        table += [Entry(f"task_tokens.{t}", "connector/task_tokens", (i,), "row") for i, t in enumerate(VISUAL_TASKS)]
    if not c.is_moe:
        depth = 1 if c.kind == "linear" else int(c.kind[3 : c.kind.index("x")])
        for i in range(depth):
            name = "llm_proj" if c.kind == "linear" else f"llm_proj.{2 * i}"
            table.append(Entry(f"{name}.weight", f"connector/layers/{i}/kernel", layout="transpose"))
            table.append(Entry(f"{name}.bias", f"connector/layers/{i}/bias"))
        return table
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
    return table


def lora_table(config: ModelConfig, prefix: str = "llm_model.base_model.model.model.layers") -> list[Entry]:
    table = []
    for i in range(config.decoder.depth):
        for ours in config.lora.targets if config.lora.rank else ():
            group = "attention" if ours in "qkvo" else "mlp"
            for letter in "ab":
                name = f"{prefix}.{i}.{LINEARS[ours]}.lora_{letter.upper()}.default.weight"
                path = f"decoder/layers/{group}/{ours}/lora_{letter}"
                table.append(Entry(name, path, (i,), "transpose"))
    return table


def trainable_table(config: ModelConfig) -> list[Entry]:
    """What the original's checkpoint holds under `model`."""
    return connector_table(config) + lora_table(config)


def decoder_table(
    config: ModelConfig, prefix: str = "llm_model.base_model.model.", base: str = ".base_layer"
) -> list[Entry]:
    """The frozen decoder, as PEFT wraps Hugging Face's LLaMA; prefix "" and base "" give plain names."""
    d, table = config.decoder, [Entry(f"{prefix}model.embed_tokens.weight", "decoder/embedding")]
    for i in range(d.depth):
        layer = f"{prefix}model.layers.{i}"
        for ours, theirs in LINEARS.items():
            group = "attention" if ours in "qkvo" else "mlp"
            wrapped = base if ours in config.lora.targets else ""
            path = f"decoder/layers/{group}/{ours}"
            table.append(Entry(f"{layer}.{theirs}{wrapped}.weight", f"{path}/kernel", (i,), "transpose"))
            if ours in d.attention_bias or (group == "mlp" and d.mlp_bias):
                table.append(Entry(f"{layer}.{theirs}{wrapped}.bias", f"{path}/bias", (i,)))
        table.append(Entry(f"{layer}.input_layernorm.weight", "decoder/layers/norm1/scale", (i,)))
        table.append(Entry(f"{layer}.post_attention_layernorm.weight", "decoder/layers/norm2/scale", (i,)))
    table.append(Entry(f"{prefix}model.norm.weight", "decoder/norm/scale"))
    if not d.tied_head:
        table.append(Entry(f"{prefix}lm_head.weight", "decoder/head", layout="transpose"))
    return table


def vision_table(config: ModelConfig, prefix: str = "visual_encoder.") -> list[Entry]:
    """EVA-CLIP as LAVIS names it; prefix "" is the published EVA file."""
    table = [
        Entry(f"{prefix}cls_token", "vision/cls", layout="row"),
        Entry(f"{prefix}pos_embed", "vision/positions", layout="batch"),
        Entry(f"{prefix}patch_embed.proj.weight", "vision/patch/kernel", layout="patch"),
        Entry(f"{prefix}patch_embed.proj.bias", "vision/patch/bias"),
    ]
    names = {
        "norm1.weight": "norm1/scale",
        "norm1.bias": "norm1/bias",
        "norm2.weight": "norm2/scale",
        "norm2.bias": "norm2/bias",
        "attn.q_bias": "attention/q_bias",
        "attn.v_bias": "attention/v_bias",
        "attn.qkv.weight": "attention/qkv/kernel",
        "attn.proj.weight": "attention/out/kernel",
        "attn.proj.bias": "attention/out/bias",
        "mlp.fc1.weight": "up/kernel",
        "mlp.fc1.bias": "up/bias",
        "mlp.fc2.weight": "down/kernel",
        "mlp.fc2.bias": "down/bias",
    }
    for i in range(config.vision.depth):
        for theirs, ours in names.items():
            layout = "transpose" if ours.endswith("kernel") else "same"
            table.append(Entry(f"{prefix}blocks.{i}.{theirs}", f"vision/blocks/{ours}", (i,), layout))
    return table


def ln_vision_table() -> list[Entry]:
    """The norm behind the encoder, which the original builds fresh and never loads or trains."""
    return [
        Entry("ln_vision.weight", "vision/output_norm/scale"),
        Entry("ln_vision.bias", "vision/output_norm/bias"),
    ]


def to_leaves(
    table: list[Entry], tensors: Mapping[str, np.ndarray], leaves: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Published tensors -> new values of the leaves that the table names (`leaves` gives their shapes).

    Raises one UserError that lists every missing and mis-shaped tensor.
    """
    out = {path: np.array(leaves[path], np.float32) for path in {entry.path for entry in table}}
    problems = []
    for entry in table:
        if entry.name not in tensors:
            problems.append(f"{entry.name} is missing")
            continue
        value, place = entry.to_ours(np.asarray(tensors[entry.name])), out[entry.path][entry.ours]
        if value.shape != place.shape:
            problems.append(f"{entry.name} has shape {list(tensors[entry.name].shape)}")
        else:
            out[entry.path][entry.ours] = value
    if problems:
        raise UserError(f"these tensors do not fit the model: {'; '.join(problems)}; check config.model.")
    return out


def to_published(table: list[Entry], leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Leaves -> published tensors; the inverse of `to_leaves`."""
    parts: dict[str, list[np.ndarray]] = {}
    for entry in table:
        parts.setdefault(entry.name, []).append(entry.to_published(np.asarray(leaves[entry.path])))
    return {name: part[0] if len(part) == 1 else np.concatenate(part, axis=1) for name, part in parts.items()}
