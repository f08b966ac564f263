"""The damaged start of the policy training: only the choice of mode has changed."""

import torch
from safetensors.torch import load_file

import vpt
from recipes.embedded.damage import main


def test_only_the_tokens_that_begin_calls_are_damaged(tmp_path):
    main([str(tmp_path)])
    own, damaged = (
        load_file(f / "model.safetensors") for f in (vpt.loading.EMBEDDED_MODEL, tmp_path)
    )
    changed = [n for n in own if not torch.equal(own[n].float(), damaged[n])]
    (name,) = changed
    rows = (own[name].float() != damaged[name]).any(-1).nonzero().flatten().tolist()
    vocabulary = vpt.load(tmp_path).vocabulary
    assert rows == sorted(vocabulary.opener(branch) for branch in vocabulary.branches)
    assert len(rows) == 4
