"""Names the configs that the sweeps of this folder vary, by argument."""

from unimed_jax.errors import UserError

BASES = {"": "../brain_tiny.py", "real": "../real_small.py", "full": "../cmoe.py"}


def base(size, sweep):
    """Returns the config of a size: nothing for the brain set, real data, or Uni-Med as published."""
    if size not in BASES:
        raise UserError(f"{sweep}.py takes no {size!r}; write :real, :full, or nothing (the brain set).")
    return BASES[size]
