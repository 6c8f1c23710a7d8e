"""How fast the package is, side by side with others: `python -m simclr_jax.benchmark NAME`.

Nothing is imported here: the processes that work on PIL images import `peers` and must stay without JAX.
"""
