"""What the mathematics needs of a device, against sums written out by hand."""

import dataclasses
import math

import pytest
from support import tiny

from unimed_jax.config import RuleConfig
from unimed_jax.plan.ideal import ideal
from unimed_jax.train.flops import leaf_shapes, useful_flops

ROWS = 8
ONE = {"data": 1, "fsdp": 1, "tensor": 1, "expert": 1}
B = 4  # bytes of a float32


@pytest.fixture(scope="module")
def config():
    return tiny.training(tiny.config(), rows=ROWS)


@pytest.fixture(scope="module")
def sizes(config):
    return {path: math.prod(shape) for path, shape in leaf_shapes(config.model).items()}


def layer_kernels(sizes):
    return {p: n for p, n in sizes.items() if p.startswith("decoder/layers/") and p.endswith("kernel")}


def test_useful_attention_is_that_of_pairs_and_blocks_that_are_needed(config):
    whole = useful_flops(config)
    rows, depth = config.data.row_tokens, config.model.decoder.depth
    decoder = dataclasses.replace(config.model.decoder, windows=(4, 0))
    model = dataclasses.replace(config.model, decoder=decoder)
    seen = useful_flops(dataclasses.replace(config, model=model))["attention"] / whole["attention"]
    near = (4 * rows - 4**2 / 2) / (rows**2 / 2)
    assert seen == pytest.approx(((depth + 1) // 2 * near + depth // 2) / depth)
    # an encoder whose last block is not used is one that lacks it
    encoders = [
        dataclasses.replace(config.model.vision, depth=depth, feature_layer=layer)
        for depth, layer in ((2, -2), (1, -1))
    ]
    models = [dataclasses.replace(config.model, vision=vision) for vision in encoders]
    one, other = (useful_flops(dataclasses.replace(config, model=model)) for model in models)
    assert one["vision"] == other["vision"] > 0


def test_one_device(config, sizes):
    found = ideal(config, ONE, "train")
    assert found.flops == sum(useful_flops(config).values())
    assert found.bytes == sum(found.byte_terms.values())
    assert found.collective_bytes == 0 and found.collective_terms == {}
    trained = {p: n for p, n in sizes.items() if p.startswith("connector/") or "/lora_" in p}
    assert found.byte_terms["optimizer"] == 8 * B * sum(trained.values())
    # the frozen encoder is read once, all else forward and backward
    vision = sum(n for p, n in sizes.items() if p.startswith("vision/") and p.endswith("kernel"))
    decoder = sum(layer_kernels(sizes).values()) + sizes["decoder/head"]
    matrices = ("kernel", "experts/up", "experts/down", "lora_a", "lora_b")
    once_more = sum(n for p, n in trained.items() if p.endswith(matrices))
    assert found.byte_terms["weights"] == B * (vision + 2 * decoder + 2 * once_more)


def test_activations_and_the_residual_stream(config, sizes):
    """Backward the inputs of activations are read again, and those of norms; a gate has a gradient."""
    found = ideal(config, ONE, "train").byte_terms
    c, vision, data = config.model.decoder, config.model.vision, config.data
    tokens, images = ROWS * data.row_tokens, ROWS * data.row_images
    visual = images * config.model.tokens_per_image
    hidden = sizes["connector/experts/up_bias"] + sizes["connector/router/bias"]
    assert c.gated_mlp
    assert found["activations"] == B * (3 * tokens * c.mlp_width * c.depth + visual * hidden)
    # forward two additions; backward their gradients and the norms' inputs; the encoder is frozen
    patches = images * (vision.patches + 1)
    stream = 6 * tokens * c.width * c.depth + 2 * patches * vision.width * vision.depth
    assert found["residual"] == B * stream


def test_the_inputs_of_adapters_are_read_again_for_their_gradients(config):
    found = ideal(config, ONE, "train").byte_terms["products"]
    model = dataclasses.replace(config.model, lora=dataclasses.replace(config.model.lora, rank=0))
    rules = tuple(rule for rule in config.train.rules if "lora" not in rule.match)
    train = dataclasses.replace(config.train, rules=rules)
    plain = dataclasses.replace(config, model=model, train=train)
    without = ideal(plain, ONE, "train").byte_terms["products"]
    c, rank = config.model.decoder, config.model.lora.rank
    tokens = ROWS * config.data.row_tokens * c.depth
    adapted = len(config.model.lora.targets)
    assert adapted == 7  # all linears, so every input: q k v, o, gate up, down
    inputs = 2 * c.width + c.heads * c.head_dim + c.mlp_width
    low = 2 * adapted * 3 * rank  # of A and B: forward, the gradients of their input and their own
    assert found - without == B * tokens * (inputs + low)


def test_a_split_and_frozen_base_is_gathered_forward_and_backward(config, sizes):
    found = ideal(config, {**ONE, "fsdp": 8}, "train")
    c = config.model.decoder
    # width 16 is split over 8 in every layer and in the head; that of the encoder, 12, over none
    gathered = sum(layer_kernels(sizes).values()) + sizes["decoder/head"]
    looked_up = ROWS // 8 * config.data.row_tokens * c.width
    assert found.collective_terms["gather"] == pytest.approx(7 / 8 * B * (2 * gathered + looked_up))
    # adapters are not split: their gradients are added up; the connector's stay with what they are of,
    # except what 8 does not divide
    adapters = sum(n for p, n in sizes.items() if "/lora_" in p)
    whole = sum(
        sizes[f"connector/{name}"]
        for name in (
            *("task_tokens", "experts/bias", "router/out_bias"),
            *("experts/up", "experts/up_bias", "experts/down"),  # 30 hidden units
            *("router/task_kernel", "router/token_kernel", "router/bias", "router/out_kernel"),  # 14
        )
    )
    assert found.collective_terms["gradients"] == pytest.approx(2 * 7 / 8 * B * (adapters + whole))


def test_codes_are_gathered_as_codes_and_split_by_whole_blocks(config, sizes):
    model = tiny.config(
        vision={"width": 64, "mlp_width": 64, "depth": 1},
        decoder={"width": 64, "head_dim": 16, "mlp_width": 128, "depth": 1},
    )
    coded = dataclasses.replace(config, model=dataclasses.replace(model, frozen_kernels="nf4"))
    found = ideal(coded, {**ONE, "fsdp": 2}, "train").collective_terms["gather"]
    number = {path: math.prod(shape) for path, shape in leaf_shapes(model).items()}
    # 64 inputs are one block, which is not split; of these the outputs are, or two blocks
    decoder = sum(number[f"decoder/layers/{name}/kernel"] for name in ("attention/o", "mlp/down"))
    vision = sum(
        number[p]
        for p in number
        if p.startswith("vision/") and p.endswith(("out/kernel", "down/kernel"))
    )
    looked_up = ROWS // 2 * config.data.row_tokens * 64
    code = 4.25 / 8  # bytes of a number
    expected = code * (2 * decoder + vision) + B * (2 * number["decoder/head"] + looked_up)
    assert found == pytest.approx(expected / 2)


def test_the_connectors_inputs_are_gathered_and_not_its_weights(config, sizes):
    found = ideal(config, {**ONE, "data": 2}, "train")
    tokens = ROWS * config.data.row_images * config.model.tokens_per_image
    features, width = 4 * config.model.vision.width, config.model.decoder.width
    # gathered; its sums scattered, and their gradients gathered
    assert found.collective_terms["inputs"] == B * tokens / 2 * (features + 2 * width)
    assert "gather" not in found.collective_terms
    adapters = sum(n for p, n in sizes.items() if "/lora_" in p)
    rest = sum(sizes[f"connector/{n}"] for n in ("task_tokens", "experts/bias", "router/out_bias"))
    assert found.collective_terms["gradients"] == 2 / 2 * B * (adapters + rest)


def test_split_heads_and_hidden_units_add_up_each_layers_outputs(config):
    found = ideal(config, {**ONE, "tensor": 2}, "train")
    decoder, vision, data = config.model.decoder, config.model.vision, config.data
    by_row = 4 * ROWS * data.row_tokens * decoder.width * decoder.depth  # two forward, two backward
    patches = ROWS * data.row_images * (vision.patches + 1)
    by_image = 2 * patches * vision.width * vision.depth  # forward only
    head = ROWS * data.row_answers * decoder.width
    assert found.collective_terms["sums"] == 2 / 2 * B * (by_row + by_image + head)
    assert found.flops == sum(useful_flops(config).values()) / 2


def test_what_is_computed_again(config):
    def again(policy):
        model = dataclasses.replace(config.model, remat=policy)
        return ideal(dataclasses.replace(config, model=model), ONE, "train")

    none, dots, full = again("none"), again("dots"), again("full")
    assert none.flops == dots.flops == full.flops and none.bytes == dots.bytes == full.bytes
    assert none.again.flops == none.again.bytes == 0
    assert dots.again.flops == useful_flops(config)["attention"] / 3
    c, data = config.model.decoder, config.data
    tokens = ROWS * data.row_tokens * c.depth
    kernels = {p: n for p, n in layer_sizes(config).items() if "/down/kernel" not in p}
    heads, shared = c.heads * c.head_dim, c.kv_heads * c.head_dim
    # inputs of q k v, o, gate up; the stream; outputs of all products but the last; attention
    moved = 2 * c.width + heads + c.width + heads + 2 * shared + c.width + 2 * c.mlp_width
    attention = 2 * heads + 2 * shared
    weights = sum(n for p, n in kernels.items() if "/down/lora_b" not in p)
    assert full.again.bytes == B * (weights + tokens * (moved + attention))
    forward = useful_flops(dataclasses.replace(config, train=frozen_all(config)))
    assert dots.again.flops < full.again.flops < forward["decoder"] + forward["attention"]


def layer_sizes(config):
    ends = ("kernel", "lora_a", "lora_b")
    shapes = leaf_shapes(config.model).items()
    return {p: math.prod(s) for p, s in shapes if p.startswith("decoder/layers/") and p.endswith(ends)}


def frozen_all(config):
    return dataclasses.replace(config.train, rules=(RuleConfig("*", False),))


def test_a_decoded_token_reads_all_weights_and_the_cache_once(config, sizes):
    answering = dataclasses.replace(
        config,
        evaluate=dataclasses.replace(config.evaluate, batch=4, max_new_tokens=24),
        text=dataclasses.replace(config.text, max_prompt=40),
    )
    c = config.model.decoder
    found = ideal(answering, ONE, "decode")
    adapters = sum(n for p, n in sizes.items() if "/lora_" in p)
    decoder = sum(layer_kernels(sizes).values()) + sizes["decoder/head"] + adapters
    assert found.byte_terms["weights"] == B * decoder
    assert found.byte_terms["cache"] == B * 4 * (40 + 24) * 2 * c.kv_heads * c.head_dim * c.depth
    assert "optimizer" not in found.byte_terms and found.again.flops == 0
    # what is frozen may be stored in two bytes; what has trained is not, while it answers either
    half = dataclasses.replace(answering.model, frozen_dtype="bfloat16")
    halved = ideal(dataclasses.replace(answering, model=half), ONE, "decode").byte_terms["weights"]
    assert halved == B * adapters + B // 2 * (decoder - adapters)
    prefill = ideal(answering, ONE, "prefill")
    assert prefill.byte_terms["cache"] == B * 4 * 40 * 2 * c.kv_heads * c.head_dim * c.depth
    assert prefill.byte_terms["weights"] > found.byte_terms["weights"]  # the encoder's, too
    assert prefill.flops > 40 * 4 * 2 * sum(layer_kernels(sizes).values())
    # on a mesh rows are shared, and so is the cache
    assert (
        ideal(answering, {**ONE, "data": 4}, "decode").byte_terms["cache"] * 4
        == found.byte_terms["cache"]
    )
