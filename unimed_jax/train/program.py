"""Builds the training program of a config from its shapes alone.

No weights, tokenizer or data are needed.

The loop fills what `build` describes; `plan` and the benchmarks compile it. This module imports only
jax, flax, optax, numpy and this package's config, model and train.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from unimed_jax.config import Config
from unimed_jax.model import sharding
from unimed_jax.model.parameters import abstract, parameters, stored, stored_leaves, tree_bytes
from unimed_jax.model.unimed import UniMed
from unimed_jax.rules import LeafRule, leaf_rules
from unimed_jax.train.gradients import STRATEGIES
from unimed_jax.train.optimizer import Optimizer
from unimed_jax.train.step import TrainState, first_state, make_step


@dataclasses.dataclass(frozen=True)
class Program:
    """Holds a jitted training step and everything that it takes, as shapes.

    Compile ahead of time with `program.lower().compile()`; run it as `state, metrics =
    program.step(state, frozen, batch, np.float32(lr))` inside `sharding.inside(program.mesh)`.
    """

    model: UniMed  # shapes in place of arrays
    # jitted: (state, frozen, batch, lr) -> (state, metrics), see train/step.py; the state is
    # donated
    step: Any
    # jax.ShapeDtypeStruct in place of arrays, with shardings if there is a mesh:
    state: TrainState
    frozen: dict[str, Any]  # path -> leaf that does not train, or Quantised of two
    batch: dict[str, Any]  # the global batch, all rows of all processes
    optimizer: Optimizer
    rules: dict[str, LeafRule]
    mesh: Mesh | None

    @property
    def leaves(self) -> dict[str, Any]:
        """Lists every leaf of the model by path, in the model's order.

        Each leaf is described as in `state` or `frozen`.
        """
        return {path: self.state.leaves.get(path, self.frozen.get(path)) for path in self.rules}

    def lower(self) -> jax.stages.Lowered:
        """Lowers the step for exactly these shapes, so that it is ready to compile."""
        with sharding.inside(self.mesh):
            return self.step.lower(
                self.state, self.frozen, self.batch, jax.ShapeDtypeStruct((), jnp.float32)
            )


def build(config: Config, mesh: Mesh | None, coordinate_start: int | None = None) -> Program:
    """Builds the program that trains `config.model` on batches of `config.data`, laid over `mesh`.

    `coordinate_start` is the id of the first of the 101 coordinate tokens, if the tokenizer has
    them; only the losses of `config.loss.coordinate_*` read it.
    """
    model = abstract(config.model)
    shapes = parameters(model)
    rules = leaf_rules(shapes, config.train, config.optimizer)
    leaves = stored(shapes, rules, config.model)
    trainable = {path: leaf for path, leaf in leaves.items() if rules[path].train}
    frozen = {path: leaf for path, leaf in leaves.items() if not rules[path].train}
    optimizer = Optimizer(config.optimizer, rules)
    strategy = STRATEGIES[config.train.gradients]()
    state = jax.eval_shape(lambda leaves: first_state(leaves, optimizer, strategy=strategy), trainable)
    batch = batch_shapes(config)
    if mesh is not None:
        # Shardings are added by hand, because eval_shape loses them.
        state = sharding.placed(state, sharding.state_shardings(state, mesh))
        frozen = sharding.placed(frozen, sharding.parameter_shardings(frozen, mesh))
        batch = sharding.placed(
            batch, {name: sharding.row_sharding(x.shape, mesh) for name, x in batch.items()}
        )
    step = make_step(model, config, optimizer, coordinate_start, mesh)
    return Program(model, step, state, frozen, batch, optimizer, rules, mesh)


def make_mesh(config: Config, *described: Any) -> Mesh | None:
    """Makes the mesh that `config.mesh` asks for, over all devices of all processes.

    A single device gets None. `described`: other devices and their memory, see `sharding.make_mesh`.
    """
    leaves = stored_leaves(config)
    rules = leaf_rules(leaves, config.train, config.optimizer)
    frozen = tree_bytes([leaf for path, leaf in leaves.items() if not rules[path].train])
    return sharding.make_mesh(config.mesh, config.data.rows, frozen, *described)


def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Gives the shapes of a batch as `data.layout.training_batch` makes it.

    They depend on B rows, S tokens, M image slots and A answer tokens.
    """
    data, vision = config.data, config.model.vision
    rows, tokens, images, answers = data.rows, data.row_tokens, data.row_images, data.row_answers
    of = jax.ShapeDtypeStruct
    by_token = ("tokens", "visual", "segments", "prefixes", "positions")
    by_answer = ("target_index", "targets", "target_tasks")
    if config.train.cache_features:
        pictures = {"features": of((rows, images, vision.patches, vision.width), jnp.bfloat16)}
    else:
        pictures = {"images": of((rows, images, vision.image_size, vision.image_size, 3), jnp.uint8)}
    return {
        **pictures,
        "image_tasks": of((rows, images), jnp.int32),
        **{name: of((rows, tokens), jnp.int32) for name in by_token},
        **{name: of((rows, answers), jnp.int32) for name in by_answer},
        "weights": of((rows, answers), jnp.float32),
    }
