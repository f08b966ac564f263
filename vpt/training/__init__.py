"""Training with stock LLaMA-Factory: what it needs to know of our models and data.

Nothing here is imported by the runtime. LLaMA-Factory loads a model folder, the shim in the folder
leads to :func:`vpt.register`, and that to :mod:`vpt.training.registration`.
"""
