"""Uni-Med's own checkpoint, damaged: every mistake is one sentence, and nothing comes of it."""

import dataclasses
import os

import numpy as np
import pytest
from support import tiny
from support.unimed_pth_reference import reference_of
from support.weight_files import Touch

from unimed_jax.errors import UserError
from unimed_jax.interop.families import unimed_pth
from unimed_jax.interop.tensors.load import Destination
from unimed_jax.interop.tensors.torch_file import TorchFile, write_torch
from unimed_jax.model.parameters import abstract, parameters

pytestmark = pytest.mark.usefixtures("quick_compiles")
torch = pytest.importorskip("torch", reason="a peer of the extra `parity`: pip install -e '.[parity]'")


@pytest.fixture(scope="module")
def reference(goldens):
    return reference_of(goldens)


@pytest.fixture
def damage(reference, tmp_path):
    """A function: writes a changed copy of the original's file and reads it, which must be refused."""

    def refused(
        match, change=None, read=unimed_pth.load_unimed, config=reference.config.model, bytes_=None
    ):
        path, out = tmp_path / "checkpoint_9.pth", tmp_path / "out.pth"
        tree = torch.load(reference.path, weights_only=True)
        if change:
            tree = change(tree) or tree
        torch.save(tree, path)
        if bytes_:
            path.write_bytes(bytes_(path.read_bytes()))
        with pytest.raises(UserError, match=match) as error:
            read(path, config, Destination(parameters(abstract(config))))
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        # Nor does anything come of it as what is written again.
        loaded = unimed_pth.load_unimed(
            reference.path, reference.config.model, Destination(reference.leaves)
        )
        if config == reference.config.model:
            try:
                unimed_pth.export_unimed(out, reference.config, loaded, like=path)
            except UserError:
                assert [p.name for p in tmp_path.iterdir()] == [path.name]
            else:
                out.unlink()
        return str(error.value)

    return refused


def first(tree, ending, group="model"):
    return next(name for name in tree[group] if name.endswith(ending))


def test_renamed_transposed_and_missing_tensors_are_named_at_once(damage, reference):
    renamed = list(reference.table.by_name())[-1]

    def change(tree):
        model = tree["model"]
        model["x"] = model.pop(renamed)
        name = first(tree, "gate_proj.lora_A.default.weight")
        model[name] = model[name].T.contiguous()
        del model[first(tree, "q_proj.lora_B.default.weight")]
        model[first(tree, "k_proj.lora_B.default.weight")] = torch.zeros(2, 2, dtype=torch.long)
        tree["config"]["model"]["lora_alpha"] = 1000

    text = damage("lora_alpha is 1000, not", change)
    for part in (renamed, "x is not known", "gate_proj.lora_A", "q_proj.lora_B", "k_proj.lora_B"):
        assert part in text


def test_settings_that_shapes_do_not_show(damage, reference):
    theirs = reference.config.model.connector
    router = "sparse" if theirs.router == "soft" else "soft"
    connector = dataclasses.replace(theirs, aggregation="block", router=router, top_k=theirs.top_k + 1)
    text = damage(
        f"resample_method is '{theirs.aggregation}', not 'block'",
        config=dataclasses.replace(reference.config.model, connector=connector),
    )
    assert (f"router_type is '{theirs.router}', not '{router}'" in text) == theirs.is_moe
    assert ("sparse_topk is" in text) == (theirs.is_moe and router == "sparse")
    silu = dataclasses.replace(theirs, activation="silu")
    damage(
        "its activation is 'gelu', not 'silu'",
        config=dataclasses.replace(reference.config.model, connector=silu),
    )


def test_damaged_files(damage, reference, tmp_path):
    for end in (0.1, 0.5, 0.99):
        damage("damaged", bytes_=lambda data, end=end: data[: int(len(data) * end)])
    name = list(reference.table.by_name())[-1]

    def nan(tree):
        tree["model"][name].view(-1)[-1] = float("nan")

    damage(f"{name} holds NaN", nan)

    def infinite(tree):
        next(iter(tree["optimizer"]["state"].values()))["exp_avg_sq"].view(-1)[0] = float("inf")

    damage("exp_avg_sq of the optimizer in .*holds NaN or infinite", infinite, unimed_pth.load_moments)

    def torn(tree):
        tree["model"]["llm_proj.0.0.weight"] = tree["model"]["llm_proj.0.0.weight"] + 1

    if reference.config.model.connector.is_moe:
        damage("llm_proj.0.0.weight and moe_layers.0.0.weight are one tensor", torn)
    made = tmp_path / "made"

    def bomb(tree):
        tree["config"]["hook"] = Touch(os.mkdir, str(made))

    damage("holds code or objects besides tensors", bomb)
    damage("holds code or objects besides tensors", bomb, unimed_pth.load_moments)
    assert not made.exists()
    with pytest.raises(UserError, match="does not exist"):
        unimed_pth.load_unimed(tmp_path / "none.pth", tiny.CONFIG, Destination({}))


def test_optimizers_that_are_not_this_models(damage):
    def state(change):
        return lambda tree: change(tree["optimizer"]["state"], next(iter(tree["optimizer"]["state"])))

    def refused(match, change):
        damage(match, change, unimed_pth.load_moments)

    refused("holds no optimizer's state", lambda tree: tree.pop("optimizer") and None)
    refused("holds no optimizer's state", lambda tree: tree.update(optimizer={"state": {}}))
    refused("holds no optimizer's state", lambda tree: tree["optimizer"].update(state=[]))
    refused("holds no optimizer's state", lambda tree: [1, tree])
    refused(
        "parameters, but this model's has", lambda tree: tree["optimizer"]["param_groups"].pop() and None
    )
    refused(
        "parameters, but this model's has",
        lambda tree: tree["optimizer"]["param_groups"][0]["params"].pop() and None,
    )
    refused("parameters, but this model's has", state(lambda s, i: s.update({999: s[i]})))
    refused("is not AdamW's", state(lambda s, i: s[i].update(max_exp_avg_sq=torch.zeros(1))))
    refused("is not AdamW's", state(lambda s, i: s[i].pop("step") and None))
    refused(
        r"exp_avg of the optimizer in .* of shape \[1\] in place of",
        state(lambda s, i: s[i].update(exp_avg=torch.zeros(1))),
    )
    refused(r"exp_avg of the optimizer in .* is missing", state(lambda s, i: s[i].update(exp_avg=3)))
    for step in (-1.0, 0.5, float("nan"), "two"):
        refused("is not a number of steps", state(lambda s, i, step=step: s[i].update(step=step)))
    refused("differ .*but are one count", state(lambda s, i: s[i].update(step=torch.tensor(5.0))))


def test_older_torch_kept_steps_as_numbers(reference, tmp_path):
    tree = torch.load(reference.path, weights_only=True)
    for state in tree["optimizer"]["state"].values():
        state["step"] = int(state["step"])
    torch.save(tree, tmp_path / "old.pth")
    old, new = (
        unimed_pth.load_moments(path, reference.config.model, Destination(reference.leaves))
        for path in (tmp_path / "old.pth", reference.path)
    )
    assert all((old.count[path] == new.count[path]).all() for path in new.count)


def test_export_is_there_whole_or_not_at_all(reference, tmp_path):
    config, leaves = reference.config, reference.leaves
    loaded = unimed_pth.load_unimed(reference.path, config.model, Destination(leaves))
    out = tmp_path / "out.pth"
    path = list(loaded)[-1]

    class Broken:
        shape, dtype = loaded[path].shape, np.dtype(np.float32)

        def __array__(self, *_, **__):
            raise OSError(28, "No space left on device")

        __getitem__ = __array__

    with pytest.raises(UserError, match="nothing of it was kept"):
        unimed_pth.export_unimed(out, config, loaded | {path: Broken()})
    assert not list(tmp_path.iterdir())
    out.write_text("kept")
    with pytest.raises(UserError, match="exists already"):
        unimed_pth.export_unimed(out, config, loaded)
    assert out.read_text() == "kept"


def test_state_dict_alone(reference, tmp_path):
    """The tensors without the rest, as people pass them on."""
    file = TorchFile(reference.path)
    write_torch(tmp_path / "weights.pth", file.to_write(file.tree["model"]))
    loaded = unimed_pth.load_unimed(
        tmp_path / "weights.pth", reference.config.model, Destination(reference.leaves)
    )
    expected = unimed_pth.load_unimed(
        reference.path, reference.config.model, Destination(reference.leaves)
    )
    assert all((np.asarray(loaded[path]) == np.asarray(leaf)).all() for path, leaf in expected.items())
