"""Implements Uni-Med in plain torch, as the peer that the benchmarks compare with.

The connector runs as in the original: every expert in a loop, the router on task token and visual
token side by side for every token. The encoder is a plain ViT, and the decoder is Hugging Face's
LLaMA wrapped by PEFT.

Modules are named so that a state dict holds the names of
`unimed_jax/interop/families/unimed_names.py`: our weights cross by that table, and
`load_state_dict` is strict.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from unimed_jax.config import VISUAL_TASKS, DecoderConfig, ModelConfig
from unimed_jax.interop.families.hf import linear_names


class Attention(nn.Module):
    """Attends as EVA does: one product for q, k, v, a bias on q and v only."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        images, patches, width = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)
        # [N, heads, P, d] each
        q, k, v = qkv.view(images, patches, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(images, patches, width))  # [N, P, width]


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, eps: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.attn, self.mlp = Attention(width, heads), Mlp(width, hidden)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, pixels):
        return self.proj(pixels).flatten(2).transpose(1, 2)  # [N, P, width]


class VisionTransformer(nn.Module):
    """Encodes normalised pixels [N, 3, H, W] into patch features [N, patches, width]."""

    def __init__(self, config):
        super().__init__()
        width = config.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.patches, width))
        self.patch_embed = PatchEmbed(width, config.patch_size)
        blocks = [
            Block(width, config.heads, config.mlp_width, config.norm_eps) for _ in range(config.depth)
        ]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, pixels):
        x = self.patch_embed(pixels)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x[:, 1:]


class Router(nn.Module):
    def __init__(self, inputs: int, hidden: int, experts: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, hidden), nn.Linear(hidden, experts)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Connector(nn.Module):
    """Routes softly by task and visual token (CMoE): `moe_mlp` experts, strips of `rate` patches."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c, out = config.connector, config.decoder.width
        self.rate, width = c.rate, c.rate * config.vision.width
        self.task_tokens = nn.ParameterDict({task: torch.zeros(1, 1, width) for task in VISUAL_TASKS})
        self.router = Router(2 * width, 8 * width, c.experts)
        hidden = c.hidden or out
        experts = [
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))
            for _ in range(c.experts)
        ]
        self.moe_layers = nn.ModuleList(experts)

    def connect(self, patches, task_token):
        """Connects patch features [N, patches, width] -> [N, patches / rate, decoder width]."""
        images, count, width = patches.shape
        x = patches.reshape(images, count // self.rate, self.rate * width)  # [N, T, features]
        repeated = task_token.expand(images, x.shape[1], -1)
        weights = torch.sigmoid(self.router(torch.cat([repeated, x], dim=-1)))
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return sum(weights[..., e : e + 1] * expert(x) for e, expert in enumerate(self.moe_layers))


def llama_settings(decoder: DecoderConfig, **more: Any) -> Any:
    """Describes the decoder to transformers, as a LlamaConfig."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=decoder.vocab,
        hidden_size=decoder.width,
        intermediate_size=decoder.mlp_width,
        num_hidden_layers=decoder.depth,
        num_attention_heads=decoder.heads,
        num_key_value_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        rms_norm_eps=decoder.norm_eps,
        **more,
    )


class UniMed(Connector):
    """Holds the whole model: encoder and decoder frozen, adapters and connector trainable."""

    def __init__(self, config: ModelConfig):
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaForCausalLM

        super().__init__(config)
        d, lora = config.decoder, config.lora
        self.visual_encoder = VisionTransformer(config.vision).requires_grad_(False)
        self.ln_vision = nn.LayerNorm(
            config.vision.width, eps=config.vision.output_norm_eps
        ).requires_grad_(False)
        settings = llama_settings(
            d,
            rope_parameters={"rope_type": "default", "rope_theta": d.rope_theta},
            max_position_embeddings=2048,
            use_cache=False,
        )
        adapters = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=[linear_names(d)[name].split(".")[1] for name in lora.targets],
            task_type="CAUSAL_LM",
        )
        self.llm_model = get_peft_model(LlamaForCausalLM(settings), adapters)

    def forward(self, pixels, task_token, tokens, mask, labels, start: int):
        """Returns the mean cross entropy over the labels that are not -100.

        pixels [B, 3, H, W] of a batch of one task, or None (text only); tokens, mask, labels int64
        [B, S]; the visual tokens of each row stand at `start`.
        """
        x = self.llm_model.get_input_embeddings()(tokens)
        if pixels is not None:
            visual = self.connect(self.ln_vision(self.visual_encoder(pixels)), task_token)
            x = torch.cat([x[:, :start], visual, x[:, start + visual.shape[1] :]], dim=1)
        return self.llm_model(inputs_embeds=x, attention_mask=mask, labels=labels).loss


def optimizer(
    model: nn.Module, weight_decay: float, betas, eps: float, fused: bool | None = None
) -> torch.optim.Optimizer:
    """Makes the original's AdamW: no decay for vectors and for names with bias, ln or bn."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[
                parameter.ndim >= 2 and not any(part in name for part in ("bias", "ln", "bn"))
            ].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        betas=betas,
        eps=eps,
        fused=fused,
    )
