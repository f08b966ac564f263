"""The LLaMA-Factory all this was tested with, named by errors about any other."""

TESTED = "llamafactory 0.9.5"
