"""Makes the training step, jitted once: losses and gradients of the trainable leaves, then AdamW."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from unimed_jax.config import TASKS, Config
from unimed_jax.finite import all_finite
from unimed_jax.model import sharding
from unimed_jax.model.attention import hardware
from unimed_jax.model.parameters import parameters, with_parameters
from unimed_jax.model.unimed import Batch, UniMed
from unimed_jax.train.gradients import STRATEGIES, SUM, Strategy, along, combine
from unimed_jax.train.loss import task_losses
from unimed_jax.train.optimizer import Leaves, Optimizer, participation

# Options of the compiler by hardware. A TPU's would gather a split kernel in pieces between the pieces
# of its product, and write and read the product's partial sums for each: of the full-size step on
# v5e 4x4, 10 % of what it moves through memory and 7 % of what it sends. Gathered whole, a kernel is
# under way while others are used. A GPU's would join k and v into one product, and copy their kernels
# into one array to do so: on one H100 5 % of what the step moves (jax 0.12).
OPTIONS: dict[str, dict[str, Any]] = {
    "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000},
    "nvidia": {"xla_gpu_dot_merger_threshold_mb": 0},
}


class TrainState(NamedTuple):
    """Holds what a checkpoint must hold so that the next step is the same."""

    step: Array  # int32 []
    leaves: Leaves  # trainable, float32
    moments: Any
    memory: Any = ()  # of the strategy that combines gradients (train/gradients.py); () if it has none

    @property
    def besides(self) -> tuple:
        """Lists what a checkpoint holds besides the leaves, in the order of the fields."""
        remembered = (self.memory,) if jax.tree.leaves(self.memory) else ()
        return (self.step, self.moments, *remembered)


def make_step(
    model: UniMed,
    config: Config,
    optimizer: Optimizer,
    coordinate_start: int | None,
    mesh: Mesh | None = None,
):
    """Makes the jitted step(state, frozen leaves, batch, learning rate) -> (state, metrics).

    `model` is abstract (its leaves are replaced). On a mesh the state stays where `first_state` put
    it, and every process gets the metrics. metrics, float32: loss [], task_loss [tasks] (NaN where
    a task has no answer in the batch), grad_norm [], finite [] bool, updated [leaves] bool (whether
    each leaf, in the order of the state's, is finite after the update), routing [visual tasks, E]
    (mean expert weights over the batch's slots of a task), slots [visual tasks]; of the decoder's
    layers with experts balance [layers] and shares [layers, E] (of tokens, by first choice).
    """
    connector = config.model.connector
    reads_task_token = (
        connector.is_moe and connector.router in ("soft", "sparse") and connector.router_input != "token"
    )
    # A key also says that this is training, which experts of limited capacity must know.
    random = (
        config.model.lora.rank > 0 and config.model.lora.dropout > 0 or config.model.moe.trains_otherwise
    )

    strategy = STRATEGIES[config.train.gradients]()
    directions = strategy.directions(len(TASKS) + 1)

    def gradients(leaves: Leaves, frozen: Leaves, batch: Batch, key):
        """Computes gradients, losses and sums to log for some rows.

        The gradients along the directions are [k, *shape].
        """

        def run(leaves: Leaves):
            full = with_parameters(model, {**frozen, **leaves})
            return task_losses(full, batch, config.loss, coordinate_start, key)

        return along(directions, run, leaves)

    def accumulated(leaves: Leaves, frozen: Leaves, batch: Batch, key):
        """Computes the same for the whole batch, in `accumulation` micro-batches one after another."""
        micro = config.train.accumulation
        if micro == 1:
            return gradients(leaves, frozen, batch, key)
        split = jax.tree.map(lambda x: _dealt(x, micro), batch)
        first = jax.eval_shape(gradients, leaves, frozen, jax.tree.map(lambda x: x[0], split), key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)

        def body(total, inputs):
            batch, index = inputs
            part = gradients(
                leaves, frozen, batch, None if key is None else jax.random.fold_in(key, index)
            )
            return jax.tree.map(jnp.add, total, part), None

        return jax.lax.scan(body, zeros, (split, jnp.arange(micro)))[0]

    def step(state: TrainState, frozen: Leaves, batch: Batch, lr: Array):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step) if random else None
        grads, losses, aux = accumulated(state.leaves, frozen, batch, key)
        weight = losses.weight
        grads = jax.tree.map(lambda g: g / weight, grads)
        # Other numbers than those of dropout, which are drawn from the same seed and step.
        order = jax.random.fold_in(jax.random.key(config.seed ^ 0x5EED), state.step)
        grads, memory = combine(strategy, grads, state.memory, order, len(TASKS))
        used = participation(state.leaves, batch["image_tasks"], reads_task_token)
        leaves, moments, norm = optimizer.update(grads, state.moments, state.leaves, lr, used)
        loss = losses.total / weight
        metrics = {
            "loss": loss,
            "task_loss": losses.tasks / losses.weights,
            "grad_norm": norm,
            "finite": jnp.isfinite(loss) & jnp.isfinite(norm),
            "updated": jnp.stack([all_finite(leaf) for leaf in leaves.values()]),
            "slots": aux["slots"],
        }
        if "routing" in aux:
            metrics["routing"] = aux["routing"] / jnp.maximum(aux["slots"], 1)[:, None]
        if "balance" in aux:
            metrics["balance"] = aux["balance"] / weight
            metrics["shares"] = aux["tokens"] / aux["tokens"].sum(axis=1, keepdims=True)
        return TrainState(state.step + 1, leaves, moments, memory), metrics

    with sharding.inside(mesh):
        options = OPTIONS.get(hardware())
    if mesh is None:
        return jax.jit(step, donate_argnums=0, compiler_options=options)

    trainable = {path: leaf for path, leaf in parameters(model).items() if optimizer.rules[path].train}
    state = jax.eval_shape(lambda leaves: first_state(leaves, optimizer, strategy=strategy), trainable)
    places = (sharding.state_shardings(state, mesh), sharding.everywhere(mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=places, compiler_options=options)


def first_state(
    trainable: Leaves,
    optimizer: Optimizer,
    mesh: Mesh | None = None,
    strategy: Strategy = SUM,
) -> TrainState:
    """Makes the state before step 0; moments lie where their parameters do."""

    def first(leaves: Leaves) -> TrainState:
        memory = strategy.start(len(TASKS) + 1)
        return TrainState(jnp.int32(0), leaves, optimizer.init(leaves), memory)

    if mesh is None:
        return first(trainable)
    places = sharding.state_shardings(jax.eval_shape(first, trainable), mesh)
    return jax.jit(first, out_shardings=places)(trainable)


def _dealt(x: Array, count: int) -> Array:
    """Deals rows [B, ...] in turn to micro-batches [count, B / count, ...].

    So each device works on its own rows, which are neighbours, in every micro-batch.
    """
    dealt = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)  # [count, B / count, ...]
    return sharding.constrain(dealt, None, "batch", *(None,) * (x.ndim - 1))
