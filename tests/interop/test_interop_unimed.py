"""Uni-Med's own checkpoint: leaves and optimizer in, the same bits out.

Everything comes from the golden manifest (`--goldens=DIR` takes another folder), torch is the peer.
"""

import collections
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import golden_uni_med as golden_files
from support import tiny
from support.unimed_pth_reference import reference_of

from unimed_jax.config import VISUAL_TASKS, Config, MeshConfig, OptimizerConfig, TrainConfig
from unimed_jax.errors import UserError
from unimed_jax.interop.families import unimed_names, unimed_pth
from unimed_jax.interop.tensors.load import Destination
from unimed_jax.interop.tensors.table import to_leaves, to_published
from unimed_jax.model.parameters import abstract, parameters
from unimed_jax.model.sharding import make_mesh, parameter_shardings
from unimed_jax.rules import leaf_rules
from unimed_jax.train.optimizer import AdamState, Optimizer, adam, per_leaf

pytestmark = pytest.mark.usefixtures("quick_compiles")
torch = pytest.importorskip("torch", reason="a peer of the extra `parity`: pip install -e '.[parity]'")


def pytest_generate_tests(metafunc):
    """One case for each way of building the trainable part."""
    if "variant" in metafunc.fixturenames:
        folder = Path(
            metafunc.config.getoption("--goldens") or Path(__file__).parents[1] / "goldens/uni_med"
        )
        kinds = {
            (case["connector_file"], case["config"]["router_type"]): case["name"]
            for case in golden_files.manifest(folder)["cases"]
        }
        metafunc.parametrize("variant", kinds.values())


@pytest.fixture(scope="module")
def reference(goldens):
    return reference_of(goldens)


def same(ours, theirs, where="") -> None:
    """Equal to the bit: types, keys and their order, values.

    Of tensors shape, strides, dtype and bytes.
    """
    assert type(ours) is type(theirs), where
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            same(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            same(a, b, f"{where}/{i}")
    elif isinstance(theirs, torch.Tensor):
        assert (ours.dtype, ours.shape, ours.stride()) == (
            theirs.dtype,
            theirs.shape,
            theirs.stride(),
        ), where
        assert ours.numpy().tobytes() == theirs.numpy().tobytes(), where
    else:
        assert ours == theirs or (ours != ours and theirs != theirs), where  # NaN is not itself


def same_files(ours, theirs) -> None:
    for weights_only in (True, False):
        a, b = (torch.load(path, weights_only=weights_only) for path in (ours, theirs))
        same(a, b)
        assert list(a) == list(b) and list(a["model"]) == list(b["model"])
        assert shared(a["model"]) == shared(b["model"])


def shared(tensors) -> list[set[str]]:
    """Names of one storage each."""
    groups: dict[int, set[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(tensor.data_ptr(), set()).add(name)
    return list(groups.values())


# ---------------------------------------------------------------------------------------------
# The original's file
# ---------------------------------------------------------------------------------------------


def test_leaves_are_the_original_models(reference):
    loaded = unimed_pth.load_unimed(
        reference.path, reference.config.model, Destination(reference.leaves)
    )
    names = set(reference.table.by_name())
    expected = to_leaves(
        reference.table, {k: v for k, v in reference.weights.items() if k in names}, reference.leaves
    )
    assert loaded.keys() == expected.keys()
    for path, leaf in expected.items():
        assert loaded[path].dtype == jnp.float32
        np.testing.assert_array_equal(loaded[path], leaf, err_msg=path)


def test_optimizer_is_the_original_one(reference):
    """By name as the manifest numbers the parameters.

    The published names of our moments are the file's.
    """
    moments = unimed_pth.load_moments(
        reference.path, reference.config.model, Destination(reference.leaves)
    )
    mean, square = (to_published(reference.table, part) for part in (moments.mean, moments.square))
    full = {p: np.broadcast_to(n, reference.leaves[p].shape) for p, n in moments.count.items()}
    counts = to_published(reference.table, full)
    state = torch.load(reference.path, weights_only=True)["optimizer"]["state"]
    assert state.keys() == set(reference.entry["optimizer_state_indices"])
    nothing = {key: torch.zeros(1) for key in ("step", "exp_avg", "exp_avg_sq")}
    for index, name in enumerate(reference.names):
        if name not in mean:  # a router that our model does not hold
            assert index not in state
            continue
        there = state.get(index, nothing)
        for ours, theirs in ((mean, "exp_avg"), (square, "exp_avg_sq"), (counts, "step")):
            np.testing.assert_array_equal(
                ours[name], np.broadcast_to(there[theirs].numpy(), ours[name].shape), name
            )
        assert (counts[name] == reference.entry["optimizer_steps"].get(name, 0)).all(), name
    for path, count in moments.count.items():
        assert count.dtype == np.int32 and count.shape == (
            (5, 1) if path.endswith("task_tokens") else ()
        )


def test_load_on_a_mesh(reference):
    mesh = make_mesh(MeshConfig(auto=False, fsdp=2, tensor=4), 8)
    shardings = parameter_shardings(reference.leaves, mesh)
    arguments = reference.path, reference.config.model
    places = [Destination(reference.leaves, where) for where in (None, shardings)]
    alone, spread = (unimed_pth.load_unimed(*arguments, to) for to in places)
    moments, on_mesh = (unimed_pth.load_moments(*arguments, to) for to in places)
    parts = ((alone, spread), (moments.mean, on_mesh.mean), (moments.square, on_mesh.square))
    for here, there in parts:
        for path in here:
            assert there[path].sharding == shardings[path]
            np.testing.assert_array_equal(here[path], there[path], path)
    assert any(not leaf.is_fully_replicated for leaf in spread.values())


def test_order_of_the_optimizer(goldens, reference):
    decayed, others = unimed_names.optimizer_order(reference.config.model)
    assert decayed + others == reference.names
    assert [len(decayed), len(others)] == reference.entry["optimizer_group_sizes"]
    for case in golden_files.manifest(goldens)["cases"]:
        config = golden_files.load(goldens, case["name"]).config
        decayed, others = unimed_names.optimizer_order(config)
        if "optimizer" in case:
            assert (
                others == case["optimizer"]["no_decay"] and len(decayed) == case["optimizer"]["n_decay"]
            )
        if "adam_step_counts" in case:  # in the order of the modules
            counts = list(case["adam_step_counts"])
            assert decayed + others == [n for n in counts if n in decayed] + [
                n for n in counts if n in others
            ]


def test_order_of_the_optimizer_by_values():
    """The original's weights were float16 numbers before its steps: undoing the one step that the
    connector took leads back to such numbers with each parameter's own moments, and with no others.
    """
    reference = reference_of(Path(__file__).parents[1] / "goldens/uni_med")
    moments = unimed_pth.load_moments(
        reference.path, reference.config.model, Destination(reference.leaves)
    )
    leaves = unimed_pth.load_unimed(
        reference.path, reference.config.model, Destination(reference.leaves)
    )
    weights, mean, square = (
        to_published(reference.table, x) for x in (leaves, moments.mean, moments.square)
    )
    group = reference.entry["optimizer_group_fields"]
    lr, (b1, b2), eps = group["lr"], group["betas"], group["eps"]
    once = [name for name, steps in reference.entry["optimizer_steps"].items() if steps == 1]
    assert len(once) > 20

    def update(name):
        return (mean[name] / (1 - b1)) / (np.sqrt(square[name] / (1 - b2)) + eps)

    def distance(name, other):
        """From the weights before the step, if it was made with the other's moments, to float16
        numbers.
        """
        decay = 0 if name.endswith("bias") else group["weight_decay"]
        before = (weights[name] + lr * update(other)) / (1 - lr * decay)
        return np.abs(before - before.astype(np.float16).astype(np.float32)).max()

    distinct = 0
    for name in once:
        assert distance(name, name) < 1e-6, name
        # the experts' last biases had gradients of the same signs, hence the same first step
        for other in once:
            if (
                weights[other].shape == weights[name].shape
                and np.abs(update(other) - update(name)).max() > 0.1
            ):
                assert distance(name, other) > 1e-5, (name, other)
                distinct += 1
    assert distinct > 50


def test_export_is_equal_to_the_bit(reference, tmp_path):
    config, leaves = reference.config.model, reference.leaves
    loaded = unimed_pth.load_unimed(reference.path, config, Destination(leaves))
    moments = unimed_pth.load_moments(reference.path, config, Destination(leaves))
    out = tmp_path / f"checkpoint_{reference.entry['epoch']}.pth"
    unimed_pth.export_unimed(out, reference.config, loaded, AdamState(*moments), like=reference.path)
    same_files(out, reference.path)
    # And once more, from our own file.
    unimed_pth.export_unimed(tmp_path / "again.pth", reference.config, loaded, moments, like=out)
    assert (tmp_path / "again.pth").read_bytes() == out.read_bytes()


def test_exported_numbers_are_ours(reference, tmp_path):
    """Every leaf and moment of ours reaches the file: what `like` gives is what we do not hold."""
    leaves, rng = reference.leaves, np.random.default_rng(0)
    table, names = reference.table, reference.names

    def random_leaves():
        return {
            path: rng.standard_normal(leaves[path].shape).astype(np.float32) for path in table.paths()
        }

    ours, mean, square = random_leaves(), random_leaves(), random_leaves()
    tasks = np.array([[3], [0], [2], [1], [7]], np.int32)
    count = {path: tasks if path.endswith("task_tokens") else np.int32(9) for path in ours}
    out = tmp_path / "checkpoint_4.pth"
    moments = unimed_pth.Moments(count, mean, square)
    unimed_pth.export_unimed(out, reference.config, ours, moments, like=reference.path, epoch=4)
    there, theirs = (torch.load(path, weights_only=True) for path in (out, reference.path))
    published = {
        k: to_published(table, v) for k, v in (("p", ours), ("exp_avg", mean), ("exp_avg_sq", square))
    }
    assert there["epoch"] == 4 and there["model"].keys() == theirs["model"].keys()
    for name, tensor in there["model"].items():
        own = published["p"].get(re.sub("^llm_proj", "moe_layers", name), published["p"].get(name))
        np.testing.assert_array_equal(
            tensor.numpy(), theirs["model"][name].numpy() if own is None else own, name
        )
    for index, name in enumerate(names):
        task = name.removeprefix("task_tokens.")
        steps = int(tasks[VISUAL_TASKS.index(task), 0]) if task in VISUAL_TASKS else 9
        if name not in published["p"] or not steps:
            assert index not in there["optimizer"]["state"]
            continue
        state = there["optimizer"]["state"][index]
        assert state["step"].item() == steps and state["step"].dtype == torch.float32
        for kind in ("exp_avg", "exp_avg_sq"):
            np.testing.assert_array_equal(state[kind].numpy(), published[kind][name], name)

    unimed_pth.export_unimed(tmp_path / "new.pth", reference.config, ours, like=reference.path)
    assert torch.load(tmp_path / "new.pth", weights_only=True)["optimizer"]["state"] == {}


def test_training_goes_on_as_in_torch(reference):
    """Two more steps from the imported state, task tokens with counts of their own, against torch's
    AdamW.
    """
    config, leaves, table = reference.config.model, reference.leaves, reference.table
    tree = torch.load(reference.path, weights_only=True)
    weights = {name: torch.nn.Parameter(tree["model"][name].clone()) for name in reference.names}
    sizes, group = reference.entry["optimizer_group_sizes"], reference.entry["optimizer_group_fields"]
    peer = torch.optim.AdamW(
        [{"params": list(weights.values())[: sizes[0]]}, {"params": list(weights.values())[sizes[0] :]}]
    )
    peer.load_state_dict(tree["optimizer"])

    settings = OptimizerConfig(
        betas=tuple(group["betas"]),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        skip_unused=True,
    )
    state = unimed_pth.load_unimed(reference.path, config, Destination(leaves))
    step = jax.jit(Optimizer(settings, leaf_rules(state, TrainConfig(), settings)).update)
    moments = AdamState(*unimed_pth.load_moments(reference.path, config, Destination(leaves)))
    rng = np.random.default_rng(0)
    for task in (1, 0):
        gradients = {
            path: rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in state.items()
        }
        peer.zero_grad()
        for name, gradient in to_published(table, gradients).items():
            if not name.startswith("task_tokens.") or name == f"task_tokens.{VISUAL_TASKS[task]}":
                weights[name].grad = torch.tensor(gradient)
        peer.step()
        present = (np.arange(5) == task).astype(np.int32)[:, None]
        used = {path: jnp.asarray(present if path.endswith("task_tokens") else 1) for path in state}
        state, moments, _ = step(gradients, moments, state, jnp.float32(group["lr"]), used)
    before = unimed_pth.load_unimed(reference.path, config, Destination(leaves))
    for name, value in to_published(table, state).items():
        np.testing.assert_allclose(
            value, weights[name].detach().numpy(), rtol=0, atol=5e-7, err_msg=name
        )
    assert all(np.abs(np.asarray(state[path] - before[path])).max() > 1e-4 for path in state)


# ---------------------------------------------------------------------------------------------
# Every variant of the connector
# ---------------------------------------------------------------------------------------------


def modules_in_order(goldens, names) -> list[str]:
    """Published names in the order of the original's modules, as the manifest lists them for one
    model.
    """
    listed = golden_files.manifest(goldens)["full_model_state_keys_K"]
    parts = list(dict.fromkeys(name.split(".")[0] for name in listed))
    within = [re.sub(r"layers\.\d+", "layers", name) for name in listed]
    kinds = ["weight", "bias"]

    def place(name):
        part = name.split(".")[0]
        numbers = [int(n) for n in re.findall(r"\.(\d+)(?=\.)", name)]
        if part in ("llm_model", "task_tokens"):
            return parts.index(part), numbers, within.index(re.sub(r"layers\.\d+", "layers", name))
        return parts.index(part), numbers, name.split(".")[-2], kinds.index(name.split(".")[-1])

    return sorted(names, key=place)


def saved_by_torch(goldens, golden, path) -> dict[str, list[str]]:
    """What the original's program would save of a case's weights after two steps, one of them of
    text alone.
    """
    rng = np.random.default_rng(0)
    c = golden.config.connector
    names = modules_in_order(goldens, golden.trainable())
    weights = {name: torch.nn.Parameter(torch.tensor(golden.weights[name])) for name in names}
    groups = [[n for n in names if (weights[n].ndim >= 2) == decayed] for decayed in (True, False)]
    optimizer = torch.optim.AdamW(
        [
            {"params": [weights[n] for n in group], "weight_decay": decay}
            for group, decay in zip(groups, (0.05, 0), strict=True)
        ],
        lr=1e-3,
    )
    # A router that the routing does not read gets no gradient; the one of "constant" was read before.
    unread = ["router."] if c.router == "hard" else []
    unread += [f"task_tokens.{task}" for task in VISUAL_TASKS[1:]]
    for text_alone in (False, True):
        optimizer.zero_grad()
        for name, weight in weights.items():
            if not name.startswith(tuple(unread)) and (not text_alone or ".lora_" in name):
                weight.grad = torch.tensor(rng.standard_normal(weight.shape), dtype=torch.float32)
        optimizer.step()
    model = collections.OrderedDict((name, weight.detach()) for name, weight in weights.items())
    for name in names:
        if name.startswith("moe_layers"):
            model[name.replace("moe_layers", "llm_proj")] = model[name]
    model["llm_model.base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(6)
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    tree = {
        "model": model,
        "optimizer": optimizer.state_dict(),
        "config": {"model": golden.case["config"]},
    }
    torch.save({**tree, "scaler": {**scaler, "_growth_tracker": 17}, "epoch": 3}, path)
    return {"weights": names, "groups": groups}


def test_variant(goldens, variant, tmp_path):
    golden = golden_files.load(goldens, variant)
    path, leaves = tmp_path / "checkpoint_3.pth", parameters(abstract(golden.config))
    saved = saved_by_torch(goldens, golden, path)
    assert list(unimed_names.optimizer_order(golden.config)) == saved["groups"]
    table = unimed_names.trainable_table(golden.config)
    held = table.by_name()
    rest = {name for name in saved["weights"] if name not in held}
    assert all(name.startswith("router.") for name in rest)
    assert bool(rest) == (
        golden.config.connector.is_moe and golden.config.connector.router in ("hard", "constant")
    )

    loaded = unimed_pth.load_unimed(path, golden.config, Destination(leaves))
    tree = torch.load(path, weights_only=True)
    for name, value in to_published(table, loaded).items():
        np.testing.assert_array_equal(value, tree["model"][name].numpy(), name)
    assert {p for p in leaves if p.startswith("connector/") or "/lora_" in p} == loaded.keys()
    moments = unimed_pth.load_moments(path, golden.config, Destination(leaves))
    config = Config(model=golden.config)
    unimed_pth.export_unimed(tmp_path / "out.pth", config, loaded, moments, like=path)
    same_files(tmp_path / "out.pth", path)

    # Without the file: what our model does not hold is absent, and the original's optimizer takes
    # the rest.
    unimed_pth.export_unimed(tmp_path / "own.pth", config, loaded, moments)
    own = torch.load(tmp_path / "own.pth", weights_only=True)
    absent = rest | {name for name in tree["model"] if name.endswith("inv_freq")}
    assert list(own["model"]) == [name for name in tree["model"] if name not in absent]
    same(dict(own["model"]), {name: t for name, t in tree["model"].items() if name not in absent})
    names = sum(saved["groups"], [])
    same(
        own["optimizer"]["state"],
        {i: s for i, s in tree["optimizer"]["state"].items() if names[i] not in rest},
    )
    assert shared(own["model"]) == [g for group in shared(tree["model"]) if (g := group - absent)]
    assert (
        own["config"]["model"].items()
        >= {k: v for k, v in golden.case["config"].items() if k in own["config"]["model"]}.items()
    )
    fresh = [
        {"params": [torch.nn.Parameter(tree["model"][n]) for n in group]} for group in saved["groups"]
    ]
    torch.optim.AdamW(fresh).load_state_dict(own["optimizer"])
    again = unimed_pth.load_unimed(tmp_path / "own.pth", golden.config, Destination(leaves))
    assert all((np.asarray(again[p]) == np.asarray(leaf)).all() for p, leaf in loaded.items())


def test_a_run_of_ours(tmp_path):
    """Adam's state with one count for all, as it is kept by default.

    Settings of the run in the original's words.
    """
    model = tiny.config(connector={"hidden": None, "router_hidden": None})
    config = Config(
        model=model, optimizer=OptimizerConfig(lr=3e-4, weight_decay=0.1), train=TrainConfig(steps=700)
    )
    table = unimed_names.trainable_table(model)
    rng, shapes = np.random.default_rng(0), parameters(abstract(model))
    leaves = {path: rng.standard_normal(shapes[path].shape).astype(np.float32) for path in table.paths()}
    optimizer = adam((0.9, 0.999), 1e-8, skip_unused=False)
    _, state = jax.jit(lambda x: optimizer.update(x, optimizer.init(x)))(leaves)
    unimed_pth.export_unimed(tmp_path / "own.pth", config, leaves, per_leaf(state))
    moments = unimed_pth.load_moments(tmp_path / "own.pth", model, Destination(leaves))
    assert all((count == 1).all() for count in moments.count.values())
    for path in leaves:
        np.testing.assert_array_equal(moments.mean[path], state.mu[path])
        np.testing.assert_array_equal(moments.square[path], state.nu[path])
    tree = torch.load(tmp_path / "own.pth", weights_only=True)
    assert [g["weight_decay"] for g in tree["optimizer"]["param_groups"]] == [0.1, 0]
    assert tree["config"]["run"]["init_lr"] == 3e-4 and tree["config"]["run"]["iters_per_epoch"] == 700
    assert tree["config"]["model"]["lora_alpha"] == 16 and tree["scaler"] is None


def test_a_dense_connector_of_another_width_does_not_fit_either(tmp_path):
    model = tiny.config(connector={"kind": "mlp2x_gelu", "task_tokens": 0})
    with pytest.raises(UserError, match="cannot hold config.model.connector.hidden=10"):
        unimed_pth.export_unimed(tmp_path / "x.pth", Config(model=model), parameters(abstract(model)))


def test_what_the_format_cannot_hold(tmp_path):
    model = tiny.config(connector={"aggregation": "block", "activation": "silu"})
    with pytest.raises(UserError) as error:
        unimed_pth.export_unimed(tmp_path / "x.pth", Config(model=model), parameters(abstract(model)))
    text = str(error.value)
    for part in (
        "aggregation='block'",
        "activation='silu'",
        "hidden=10",
        "router_hidden=14",
        "decoder/embedding",
    ):
        assert part in text
    assert "\n" not in text and not list(tmp_path.iterdir())
