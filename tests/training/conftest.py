"""What tests of training share: caches of their own, and stock parts as a run would load them."""

import warnings
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def caches(tmp_path_factory):
    """Keep copies of shims and datasets out of the user's caches."""
    datasets = pytest.importorskip("datasets")
    import transformers.dynamic_module_utils as dynamic

    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic, "HF_MODULES_CACHE", str(folder / "modules"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        yield


@pytest.fixture(scope="session")
def factory(caches):
    """LLaMA-Factory, imported and told of us."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba and rouge, when they are compiled
        module = pytest.importorskip("llamafactory.train.tuner")
        import vpt

        vpt.register()  # in a process of its own the shim does so
    return module


@pytest.fixture(scope="session")
def stock(factory):
    """Loads what ``llamafactory-cli train`` loads, in the order of its ``run_sft``."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.data.collator import SFTDataCollatorWith4DAttentionMask
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_model, load_tokenizer

    def load(settings):
        model_args, data_args, training_args, finetuning_args, _ = get_train_args(dict(settings))
        module = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)

        def dataset():
            return get_dataset(
                template, model_args, data_args, training_args, stage="sft", **module
            )

        def model():
            return load_model(
                module["tokenizer"], model_args, finetuning_args, training_args.do_train
            )

        def collator(model):
            return SFTDataCollatorWith4DAttentionMask(
                template=template,
                model=model,
                pad_to_multiple_of=8,
                label_pad_token_id=-100,
                **module,
            )

        return SimpleNamespace(
            template=template,
            data_args=data_args,
            dataset=dataset,
            model=model,
            collator=collator,
            **module,
        )

    return load
