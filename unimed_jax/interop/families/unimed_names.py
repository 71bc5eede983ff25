"""Lists what the original Uni-Med calls the parameters that it trains, and its settings."""

from typing import Any

from unimed_jax.config import VISUAL_TASKS, ModelConfig
from unimed_jax.interop.families import peft
from unimed_jax.interop.tensors.table import ALL, Entry, Table
from unimed_jax.model.connector import visual_features


def connector_table(config: ModelConfig) -> Table:
    """Lists the connector's tensors.

    They are task tokens, router and projection experts, or the layers of the dense projector.
    """
    c = config.connector
    entries: list[Entry] = []
    if c.task_tokens:
        for i, task in enumerate(VISUAL_TASKS):
            entries.append(Entry(f"task_tokens.{task}", "connector/task_tokens", (i,), "row"))
    if not c.is_moe:
        return Table((*entries, *_projector_entries(config)))
    for e in range(c.experts):
        entries += _expert_entries(config, e)
    experts_again = "llm_proj.*"
    if c.router in ("soft", "sparse"):
        return Table((*entries, *_router_entries(config)), (experts_again,))
    unread_router = "router.*"  # the file holds a router even if the routing reads none
    return Table(tuple(entries), (experts_again, unread_router))


def _projector_entries(config: ModelConfig) -> list[Entry]:
    entries = []
    for i in range(config.connector.layers):
        # The modules between two linears are activations.
        name = "llm_proj" if config.connector.kind == "linear" else f"llm_proj.{2 * i}"
        entries.append(Entry(f"{name}.weight", f"connector/layers/{i}/kernel", layout="transpose"))
        entries.append(Entry(f"{name}.bias", f"connector/layers/{i}/bias"))
    return entries


def _expert_entries(config: ModelConfig, e: int) -> list[Entry]:
    """Maps one projection expert to its columns (and rows) of our concatenated kernels."""
    name, ours, out = f"moe_layers.{e}", "connector/experts", config.decoder.width
    if config.connector.kind == "moe_linear":
        columns = (ALL, slice(e * out, (e + 1) * out))
        return [
            Entry(f"{name}.0.weight", f"{ours}/up", columns, "transpose"),
            Entry(f"{name}.0.bias", f"{ours}/bias", (e,)),
        ]
    hidden = config.connector.hidden or out
    part = slice(e * hidden, (e + 1) * hidden)
    return [
        Entry(f"{name}.0.weight", f"{ours}/up", (ALL, part), "transpose"),
        Entry(f"{name}.0.bias", f"{ours}/up_bias", (part,)),
        Entry(f"{name}.2.weight", f"{ours}/down", (part,), "transpose"),
        Entry(f"{name}.2.bias", f"{ours}/bias", (e,)),
    ]


def _router_entries(config: ModelConfig) -> list[Entry]:
    """Maps the router, whose first kernel we hold as a task half and a token half."""
    entries, start = [], 0
    for half, width in router_halves(config).items():
        entries.append(
            Entry(
                "router.fc1.weight",
                f"connector/router/{half}_kernel",
                layout="transpose",
                columns=(start, start + width),
            )
        )
        start += width
    return [
        *entries,
        Entry("router.fc1.bias", "connector/router/bias"),
        Entry("router.fc2.weight", "connector/router/out_kernel", layout="transpose"),
        Entry("router.fc2.bias", "connector/router/out_bias"),
    ]


def router_halves(config: ModelConfig) -> dict[str, int]:
    """Gives the widths of the parts of the router's input, in the published order: task first."""
    token = visual_features(config)
    widths = {"task": config.connector.task_token_width or token, "token": token}
    return {half: widths[half] for half in config.connector.router_input.split("_")}


def trainable_table(config: ModelConfig) -> Table:
    """Lists what the original's checkpoint holds under `model`, in its order.

    The adapters come first, then the connector.
    """
    adapters = peft.peft_table(config, "llm_model.base_model.model.model.layers", ".default")
    not_needed = Table((), ("*.rotary_emb.inv_freq",))
    return adapters + not_needed + connector_table(config)


def duplicate_name(name: str) -> str | None:
    """Gives the second name under which the file holds an expert's tensor.

    Other tensors have none, for which it returns None.
    """
    return "llm_proj." + name.removeprefix("moe_layers.") if name.startswith("moe_layers.") else None


def optimizer_order(config: ModelConfig) -> tuple[list[str], list[str]]:
    """Lists the published parameters in the order of the original's AdamW.

    Returns those with weight decay and those without.

    Within each the order is that of its modules: adapters layer by layer (q, k, v, o, gate, down, up;
    A, B), task tokens, experts, router. A parameter that never got a gradient has a number there but no
    state. The router has numbers even if the routing reads none.
    """
    names = list(trainable_table(config).by_name())
    if config.connector.is_moe and config.connector.router in ("hard", "constant"):
        names += [f"router.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")]
    biases = [name for name in names if name.endswith(".bias")]
    return [name for name in names if name not in biases], biases


def original_config(config: ModelConfig) -> dict[str, Any]:
    """Translates our settings into the section `model` of the original's config."""
    c, lora = config.connector, config.lora
    linears = peft.adaptable_linears(config)
    return {
        "image_size": config.vision.image_size,
        "resample_rate": c.rate,
        "resample_method": c.aggregation,
        "has_moe": c.is_moe,
        "projector_type": c.kind,
        "num_experts": c.experts,
        "router_method": f"router_{c.router_input}",
        "num_task_tokens": c.task_tokens,
        "task_token_c": c.task_token_width or visual_features(config),
        "router_type": c.router,
        "sparse_topk": c.top_k,
        "sft_type": "lora" if lora.rank else "none",
        "lora_target_modules": [linears[name].split(".")[-1] for name in lora.targets],
        "lora_r": lora.rank,
        "lora_alpha": peft.whole_number(lora.alpha),
        "lora_dropout": lora.dropout,
    }
