"""The rank of the decoder's adapters (a published block, without its LoRA experts in the decoder).

    python -m unimed_jax.main sweep --config=configs/sweeps/lora_rank.py

On the brain set, encoder and decoder frozen (configs/brain_frozen.py), from one run of
configs/brain_tiny.py a seed; :full for configs/cmoe.py on the twelve sets. 3 + 15 runs: at most 1 h
25 min and 1.3 GB on two CPU cores, of 4 min 44 s and 71 MB for brain_tiny's; a frozen run takes less.
"""

from unimed_jax.errors import UserError


def get_config(size=""):
    if size not in ("", "full"):
        raise UserError(f"lora_rank.py takes no {size!r}; write :full, or nothing (the brain set).")
    return dict(
        base="../cmoe.py" if size else "../brain_frozen.py",
        stages={} if size else {"start": "../brain_tiny.py"},
        variants={str(rank): {"model.lora.rank": rank} for rank in (2, 4, 8, 16, 32)},
        baseline="8",
    )
