"""Holds the settings of Med-MoE's two published models, as their config.json has them."""

STABLELM = {
    **{
        "model_type": "moe_llava_stablelm",
        "vocab_size": 100352,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
    },
    **{
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 5632,
        "hidden_act": "silu",
    },
    **{"rope_theta": 10000, "rope_pct": 0.25, "norm_eps": 1e-5, "use_qkv_bias": True},
    "image_projector_type": "mlp2x_gelu",
}
PHI = {
    **{"model_type": "moe_llava_phi", "vocab_size": 51200, "hidden_size": 2560, "num_hidden_layers": 32},
    **{
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 10240,
        "hidden_act": "gelu_new",
    },
    **{"rope_theta": 10000, "partial_rotary_factor": 0.4, "layer_norm_eps": 1e-5},
    "image_projector_type": "mlp2x_gelu",
}
