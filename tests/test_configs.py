"""Every training config is one that stock llamafactory takes, and holds the released values."""

import json
import re
import shlex
from pathlib import Path

import pytest

from vpt.cli.parser import build_parser
from vpt.cli.run import COMMANDS

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
SECTIONS = ["model", "method", "dataset", "output", "train", "eval"]
HEADER = ("Command", "Hardware", "Start", "Result")
COLUMNS = {"messages", "images", "clip_images", "detection_images", "seg_images"}

# configs/*.yaml of github.com/yu-rp/VisualPerceptionToken (commits a73c3ae, d6fb5ea, ed128c7 and
# 6ff43f0), with warmup, batch and the like as they stand there, and llamafactory's default alpha.
RELEASED_EVERYWHERE = {
    "template": "vpt_qwen2_vl",
    "cutoff_len": 2048,
    "preprocessing_num_workers": 64,
    "logging_steps": 25,
    "save_steps": 500,
    "num_train_epochs": 1.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.03,
    "bf16": True,
    "ddp_timeout": 180000000,
    "eval_strategy": "steps",
    "eval_steps": 500,
}
RELEASED_ALIGNMENT = {
    **RELEASED_EVERYWHERE,
    "max_samples": 600000,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 4,
    "learning_rate": 2.0e-3,
    "val_size": 0.002,
    "per_device_eval_batch_size": 16,
}
RELEASED_TUNING = {
    **RELEASED_EVERYWHERE,
    "streaming": True,
    "buffer_size": 16384,
    "preprocessing_batch_size": 1024,
    "mix_strategy": "interleave_under",
    "accelerator_config": {"dispatch_batches": False},
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
    "learning_rate": 2.0e-5,
    "max_steps": 6000,
    "val_size": 1000,
    "per_device_eval_batch_size": 8,
}
ALIGN = "--alignment on --mask none"  # num_inner_forward_run 1, para_mask_id 0
TUNE = "--alignment off --mask question --mask-ratio 0.5"  # 2, para_mask_id 1, ratio 0.5
ALIGNMENT_SETS = [f"llava_alignment_{kind}_qwen_response_train" for kind in ("detection", "seg")]
TUNING_SETS = [f"MixVRT_{kind}_Full" for kind in ("CLIP", "Detection", "Seg")]
RELEASED = {
    "Qwen2-VL-2b-VPT-Det-Alignment": (ALIGN, RELEASED_ALIGNMENT | {"dataset": ALIGNMENT_SETS[0]}),
    "Qwen2-VL-2b-VPT-Seg-Alignment": (ALIGN, RELEASED_ALIGNMENT | {"dataset": ALIGNMENT_SETS[1]}),
    "Qwen2-VL-2b-VPT-CLIP": (TUNE, RELEASED_TUNING | {"dataset": TUNING_SETS[0]}),
    "Qwen2-VL-2b-VPT-Det": (
        TUNE,
        RELEASED_TUNING
        | {
            "dataset": TUNING_SETS[1],
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 4,
        },
    ),
    "Qwen2-VL-2b-VPT-Seg": (TUNE, RELEASED_TUNING | {"dataset": TUNING_SETS[2]}),
    "Qwen2-VL-7b-VPT-CLIP": (
        TUNE,
        RELEASED_TUNING
        | {
            "dataset": TUNING_SETS[0],
            "finetuning_type": "lora",
            "lora_rank": 512,
            "lora_alpha": 1024,
        },
    ),
    # Not released: what its parts have in common.
    "Qwen2-VL-2b-VPT-All": (TUNE, RELEASED_TUNING | {"dataset": ",".join(TUNING_SETS)}),
}
# On another backbone: the config whose values it has, but for what names the model and its data.
DERIVED = {
    "Qwen2-VL-2b-VPT-Grounding": "Qwen2-VL-2b-VPT-CLIP",
    "Qwen3-VL-2b-VPT-All-Alignment": "Qwen2-VL-2b-VPT-Det-Alignment",
    "Qwen3-VL-2b-VPT-All": "Qwen2-VL-2b-VPT-All",
    "Qwen3-VL-8b-VPT-All-LoRA": "Qwen2-VL-7b-VPT-CLIP",
}
NAMING = {"additional_target", "dataset", "model_name_or_path", "output_dir", "template"}
FROZEN_KEYS = ("freeze_vision_tower", "freeze_language_model", "freeze_multi_modal_projector")
FROZEN_IN_FULL = {"on": (True, True, False), "off": (True, False, False)}


class StrictLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error; plain YAML keeps the last one."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.YAMLError(f"given twice: {sorted(twice)}")
        return super().construct_mapping(node, deep=deep)


def read_strictly(source):
    """Content of a file, or of YAML text."""
    text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
    return yaml.load(text, Loader=StrictLoader)


def name_of(path):
    return path.relative_to(CONFIGS).with_suffix("").as_posix()


EVERY = sorted(CONFIGS.rglob("*.yaml"))
POLICIES = [path for path in EVERY if "rewards" in read_strictly(path)]
# Others are accelerate's, and those of the small model's pretraining, which is our own program.
FOR_LLAMAFACTORY = [
    path for path in EVERY if "model_name_or_path" in read_strictly(path) and path not in POLICIES
]
EXPORTS = [path for path in FOR_LLAMAFACTORY if "export_dir" in read_strictly(path)]
TRAINING = [path for path in FOR_LLAMAFACTORY if path not in EXPORTS]

each_file = pytest.mark.parametrize("path", EVERY, ids=name_of)
each_training = pytest.mark.parametrize("path", TRAINING, ids=name_of)


def header_of(path):
    """Words behind ``# Command:`` and the like, before the first section."""
    lines = path.read_text(encoding="utf-8").partition("\n###")[0].splitlines()
    entries, key = {}, None
    for line in lines:
        if match := re.match(r"# ([A-Z][a-z]+): +(\S.*)", line):
            key, entries[match[1]] = match[1], match[2]
        elif key and line.startswith("#   "):
            entries[key] += "\n" + line[1:].strip()
        else:
            key = None
    return entries


def strings_in(value):
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in inner for text in strings_in(part)]


# --- what YAML and files can tell -----------------------------------------------------------


def test_the_configs_are_found():
    assert set(RELEASED) <= {name_of(path) for path in TRAINING}
    assert EXPORTS
    assert all(isinstance(read_strictly(path), dict) for path in EVERY)


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 1", "a:\n  b: 1\n  b: 2", "a: [{b: 1, b: 2}]"])
def test_a_key_given_twice_is_an_error(text):
    assert yaml.safe_load(text)
    with pytest.raises(yaml.YAMLError, match="given twice"):
        read_strictly(text)


@each_file
def test_paths_are_relative(path):
    assert [
        text for text in strings_in(read_strictly(path)) if re.match(r"[/~\\]|[A-Za-z]:[/\\]", text)
    ] == []


@each_training
def test_sections_stand_in_order(path):
    text = path.read_text(encoding="utf-8")
    sections = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert sections in (SECTIONS, SECTIONS[:-1])
    assert read_strictly(text.partition("\n###")[0]) is None


@pytest.mark.parametrize("path", [*TRAINING, *EXPORTS], ids=name_of)
def test_the_header_says_how_to_run_it(path):
    header = header_of(path)
    assert set(HEADER) <= set(header)
    command = "llamafactory-cli " + ("export" if path in EXPORTS else "train")
    if path.parent.name == "embedded" and read_strictly(path).get("use_muon"):
        command = "python -m recipes.embedded.muon"
    name = path.relative_to(ROOT).as_posix()
    assert re.search(rf"{command} {re.escape(name)}\b", header["Command"])


@pytest.mark.parametrize("path", POLICIES, ids=name_of)
def test_policy_training_reads_its_configs(path):
    from vpt.policy.settings import load_settings

    load_settings(path)
    header = header_of(path)
    assert set(HEADER) <= set(header)
    assert header["Command"] == f"vpt train-policy {path.relative_to(ROOT).as_posix()}"


@each_training
def test_our_code_and_template_are_used(path):
    config = read_strictly(path)
    assert config["trust_remote_code"] is True
    assert config["template"] == (
        "vpt_qwen3_vl" if path.stem.startswith("Qwen3") else "vpt_qwen2_vl"
    )
    assert config["stage"] == "sft"


@each_training
def test_its_datasets_are_known(path):
    config = read_strictly(path)
    info = ROOT / config["dataset_dir"] / "dataset_info.json"
    if not info.is_relative_to(CONFIGS) and not info.exists():
        pytest.skip(
            f"{config['dataset_dir']} is not in the repository; the header says how to make it"
        )
    known = json.loads(info.read_text("utf-8"))
    wanted = f"{config['dataset']},{config.get('eval_dataset', '')}".strip(",").split(",")
    for name in wanted:
        entry = known[name]
        assert entry["formatting"] == "vpt"
        assert {"messages"} <= set(entry["columns"]) <= COLUMNS
        assert not Path(entry["file_name"]).is_absolute()


@pytest.mark.parametrize("name", RELEASED)
def test_released_values_are_kept(name):
    path = CONFIGS / f"{name}.yaml"
    config = read_strictly(path)
    mode, values = RELEASED[name]
    assert {key: config.get(key) for key in values} == values
    header = header_of(path)
    lines = [line for line in header["Start"].splitlines() if line.startswith("vpt ")]
    assert mode in lines[-1]
    written = lines[-1].split(" --out ")[-1] if " --out " in lines[-1] else lines[-1].split()[2]
    assert written == config["model_name_or_path"]
    alignment = mode.split()[1]
    frozen = tuple(config.get(key) for key in FROZEN_KEYS)
    assert config["finetuning_type"] == "lora" or frozen == FROZEN_IN_FULL[alignment]


@pytest.mark.parametrize("name", DERIVED)
def test_another_backbone_is_trained_with_the_same_values(name):
    ours, theirs = (read_strictly(CONFIGS / f"{one}.yaml") for one in (name, DERIVED[name]))
    assert {key for key in ours | theirs if ours.get(key) != theirs.get(key)} <= NAMING
    assert {one for one in ours["dataset"].split(",") if one.startswith("MixVRT")} <= {*TUNING_SETS}


@each_training
def test_streaming_reads_some_rows(path):
    """llamafactory 0.9.5 streams one shard per worker: none, the default, is an empty dataset."""
    config = read_strictly(path)
    if config.get("streaming"):
        assert config["dataloader_num_workers"] > 0
        assert isinstance(config["val_size"], int)
        assert config["accelerator_config"] == {"dispatch_batches": False}


def test_files_that_are_named_exist():
    texts = [path.read_text("utf-8") for path in [*EVERY, CONFIGS / "README.md"]]
    named = set(re.findall(r"configs/[\w./-]+\.(?:yaml|json)", "\n".join(texts)))
    assert "configs/accelerator/deepspeed_z2.json" in named
    assert sorted(name for name in named if not (ROOT / name).is_file()) == []


def vpt_commands():
    headers = [text for path in FOR_LLAMAFACTORY for text in header_of(path).values()]
    lines = "\n".join([*headers, (CONFIGS / "README.md").read_text("utf-8")]).splitlines()
    return sorted({line for line in lines if line.startswith("vpt ")})


@pytest.mark.parametrize("line", vpt_commands())
def test_vpt_understands_the_commands(line):
    args = build_parser(COMMANDS).parse_args(shlex.split(line)[1:])
    assert callable(args.run)


def test_the_readme_names_every_config():
    readme = (CONFIGS / "README.md").read_text(encoding="utf-8")
    assert [name for name in (*RELEASED, *DERIVED) if name not in readme] == []


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_deepspeed_leaves_what_the_config_says_to_it(stage):
    settings = json.loads((CONFIGS / f"accelerator/deepspeed_z{stage}.json").read_text("utf-8"))
    assert settings["zero_optimization"]["stage"] == stage
    own = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert {settings[key] for key in (*own, "gradient_clipping")} == {"auto"}
    assert settings["bf16"] == {"enabled": "auto"}


# --- what the libraries say -----------------------------------------------------------------


@pytest.fixture
def parsing(monkeypatch, tmp_path):
    """llamafactory's own parser, away from our folders and with its logging undone."""
    hparams = pytest.importorskip("llamafactory.hparams")
    from transformers.utils import logging

    monkeypatch.delenv("ALLOW_EXTRA_ARGS", raising=False)
    monkeypatch.chdir(tmp_path)
    verbosity = logging.get_verbosity()
    yield hparams
    logging.set_verbosity(verbosity)


@each_training
def test_llamafactory_takes_it(path, parsing):
    config = read_strictly(path)
    # bf16 on a machine without GPU is refused unless the CPU is asked for; no result is made here.
    model, data, training, finetuning, _ = parsing.get_train_args({**config, "use_cpu": True})
    assert model.trust_remote_code
    assert data.dataset == config["dataset"].split(",")
    assert training.learning_rate == config["learning_rate"]
    assert finetuning.finetuning_type == config["finetuning_type"]


def factory_commands():
    """Commands in headers and README that change keys of a file."""
    texts = [
        *(path.read_text("utf-8") for path in EVERY),
        (CONFIGS / "README.md").read_text("utf-8"),
    ]
    lines = re.findall(r"llamafactory-cli \w+ configs/\S+\.yaml(?: [\w.]+=\S+)+", "\n".join(texts))
    return sorted(set(lines))


@pytest.mark.parametrize("line", factory_commands())
def test_llamafactory_takes_the_command(line, parsing, monkeypatch):
    _, action, file, *changes = line.split()
    if action == "train":
        changes.append("use_cpu=true")
    monkeypatch.setattr("sys.argv", ["llamafactory-cli", str(ROOT / file), *changes])
    model, *_ = parsing.get_train_args() if action == "train" else parsing.get_infer_args()
    assert f"model_name_or_path={model.model_name_or_path}" in changes


@pytest.mark.parametrize("path", EXPORTS, ids=name_of)
def test_llamafactory_takes_the_export(path, parsing):
    config = read_strictly(path)
    model, data, finetuning, _ = parsing.get_infer_args(config)
    assert model.export_dir == config["export_dir"]
    assert data.template == "vpt_qwen2_vl"
    assert finetuning.finetuning_type == "lora"


def test_llamafactory_refuses_a_misspelt_key(parsing):
    config = read_strictly(TRAINING[0])
    with pytest.raises(ValueError, match="ara_mask_id"):
        parsing.get_train_args({**config, "use_cpu": True, "ara_mask_id": 1})


def test_accelerate_takes_the_fsdp_file():
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    config = config_args.load_config_from_file(str(CONFIGS / "accelerator/fsdp.yaml"))
    assert config.distributed_type == "FSDP"
