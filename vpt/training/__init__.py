"""Training with stock LLaMA-Factory: our models, data format, template and trainer for it.

Nothing here is imported by the runtime. LLaMA-Factory loads a model folder, the shim in the folder
leads to :func:`vpt.register`, and that to :mod:`vpt.training.registration`. The processes of a run
(:mod:`vpt.training.processes`) are those of policy training and of the recipes.
"""
