"""Every option of every group as the dataclass that it is, every file under conf/ as Hydra composes it, and how the two meet."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import hydra
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from esper.app import main
from esper.cli import conf
from esper.cli.compose import compose, option, prepare_hydra
from esper.cli.preset_files import keys_set_by
from esper.compare.sweep.launch import _prefer_sweep_options
from esper.config import GROUPS, PRESETS, RootConfig, conf_folder, config_hash, default_options, option_values, options, plain, structure
from esper.errors import UserError
from esper.hosts import base as host_base
from esper.hosts import config as host_config

OPTIONS = [(group, name) for group in GROUPS for name in options(group)]
FILES = [(group, name) for group in GROUPS for name in conf.options(group) if conf.has_file(group, name)]
PRESET_FILES = [(preset, name) for preset in PRESETS for name in conf.options(preset)]


def settings_of(kind: type) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass of settings, those within its own dataclasses included."""
    hints, found = get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        found += settings_of(hints[field.name]) if dataclasses.is_dataclass(hints[field.name]) else [field]
    return found


@pytest.mark.parametrize(("group", "name"), OPTIONS, ids=[f"{group}-{name}" for group, name in OPTIONS])
def test_an_option_is_a_dataclass_whose_defaults_pass_its_own_checks(group: str, name: str) -> None:
    kind = options(group)[name]
    values = option_values(kind, name)
    assert next(iter(values)) == "name"
    assert structure(kind, values, group) == dataclasses.replace(kind(), name=name)
    assert all(field.metadata.get("help") for field in settings_of(kind) if field.name not in ("name", "looks"))


def test_what_hydra_composes_without_a_word_is_what_the_dataclasses_say() -> None:
    composed = plain(compose([]))
    for group, name in default_options().items():
        assert composed[group] == option_values(options(group)[name], name)
    assert composed["name"] == "mlp-digits"
    assert {key: composed[key] for key in ("seed", "tags", "output", "resume")} == {
        "seed": 0,
        "tags": [],
        "output": "outputs",
        "resume": "",
    }


def test_a_file_holds_nothing_that_its_dataclass_says_already() -> None:
    """A file makes an option where some values differ; what they do not differ in stays with the dataclass."""
    assert FILES == [
        ("lifecycle", "direct"),
        ("lifecycle", "reference"),
        ("grafting", "grad_norm_narrow"),
        ("grafting", "stability_narrow"),
        ("optimizer", "sgd"),
    ]
    for group, name in FILES:
        written = yaml.safe_load((conf_folder() / group / f"{name}.yaml").read_text(encoding="utf-8"))
        values = option(group, name)
        base = option_values(options(group)[values["name"]], written["defaults"][0])
        changed = {key: value for key, value in written.items() if key != "defaults"}
        assert values == base | changed and list(values) == list(base)
        assert all(base[key] != value for key, value in changed.items())


@pytest.mark.slow
def test_every_option_that_is_no_file_is_one_that_hydra_knows() -> None:
    for group, name in OPTIONS:
        if group in ("model", "grafting", "kernel"):  # one composition each; the others are registered by the same loop
            assert option(group, name) == option_values(options(group)[name], name)


def test_a_sweeps_own_options_differ_from_a_single_runs_in_what_is_kept_alone() -> None:
    written = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in (conf_folder() / "sweep").glob("*/*.yaml")}
    changed = {name: {key: value for key, value in tree.items() if key != "defaults"} for name, tree in written.items()}
    fewer = {"figures": False}
    assert changed == {"csv": fewer, "tensorboard": fewer, "wandb": fewer, "mlflow": {"figures": False, "model": False, "system_s": 0.0}}


@pytest.mark.filterwarnings("error")
def test_a_sweep_composes_its_own_options_and_a_single_run_after_it_the_usual_ones() -> None:
    prepare_hydra()
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
        _prefer_sweep_options(GlobalHydra.instance().config_loader())
        tree = hydra.compose("config")
    assert (tree.tracking.figures, tree.tracking.model, tree.tracking.system_s, tree.tracking.points) == (False, False, 0.0, 500)
    assert compose([]).tracking.figures


def test_every_group_has_a_default_and_every_key_of_the_root_a_place() -> None:
    assert set(default_options()) == set(GROUPS)
    names = {field.name for field in dataclasses.fields(RootConfig)}
    assert set(conf.root_keys()) | set(GROUPS) | set(PRESETS) == names


def test_the_words_of_a_setting_are_those_that_the_code_has_functions_for() -> None:
    from esper.blueprints import base as blueprint_base
    from esper.blueprints import config as blueprint_config
    from esper.blueprints.catalogue import BLUEPRINTS
    from esper.grafting import CONFIGS as GRAFTING
    from esper.grafting import STRATEGIES

    assert tuple(host_base.ACTIVATIONS) == host_config.ACTIVATIONS
    assert tuple(blueprint_base.ACTIVATIONS) == blueprint_config.ACTIVATION_NAMES
    assert list(BLUEPRINTS) == list(blueprint_config.CONFIGS)
    assert all(issubclass(BLUEPRINTS[name], settings) for name, settings in blueprint_config.CONFIGS.items())
    assert list(GRAFTING) == list(STRATEGIES) and all(GRAFTING[name] is STRATEGIES[name].config for name in GRAFTING)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "28682ba2"),
        (["lifecycle=reference"], "ec1f51d4"),
        (["optimizer=sgd"], "4da0e6c2"),
        (["grafting=stability_narrow"], "dddfdf53"),
        (["experiment=ab_objective"], "00f99dc9"),
        (["arm=scratch"], "0710aecd"),
        (["debug=tiny"], "6613a949"),
    ],
)
def test_a_configuration_keeps_its_hash_by_which_older_runs_are_found(words: list[str], expected: str) -> None:
    assert config_hash(compose(words)).startswith(expected)


#: Preset's file -> every dotted key and every group that it sets, those of the files that it takes in included.
SETS = {(preset, name): list(keys_set_by(name, [conf_folder() / preset])) for preset, name in PRESET_FILES}

#: What is refused in words: these studies are about one host.
REFUSED = {
    (f"ab_{what}", "model.width", host) for what in ("controller", "grafting", "objective", "receptive_field") for host in ("cnn", "custom")
}


@pytest.mark.parametrize(
    ("preset", "name"),
    [pytest.param(*one, marks=pytest.mark.slow if one[0] == "arm" else ()) for one in PRESET_FILES],
    ids=[f"{preset}-{name}" for preset, name in PRESET_FILES],
)
def test_a_preset_composes_and_fits_every_option_that_may_stand_beside_it(preset: str, name: str) -> None:
    """One composition a file; its keys are then looked up in the dataclass of every option that it does not choose itself."""
    config = compose([f"{preset}={name}"])
    assert getattr(config, preset) == name and len(config_hash(config)) == 64
    chosen, tree = {key for key in SETS[preset, name] if key in GROUPS}, plain(config)
    for key in SETS[preset, name]:
        group, _, leaf = key.partition(".")
        if not leaf or group not in GROUPS:
            continue
        value = tree[group][leaf.partition(".")[0]]
        for other in {tree[group]["name"]} if group in chosen else options(group):
            if (name, key, other) not in REFUSED:
                structure(options(group)[other], {"name": other, leaf.partition(".")[0]: value}, group)


@pytest.mark.slow
@pytest.mark.slow
def test_presets_compose_together() -> None:
    """Each file of a kind once beside one of the other kinds; what each sets fits every option (the test above)."""
    kinds = {preset: conf.options(preset) for preset in PRESETS}
    for number in range(max(map(len, kinds.values()))):
        row = {preset: names[number % len(names)] for preset, names in kinds.items()}
        try:
            config = compose([f"{preset}={name}" for preset, name in row.items()])
        except UserError as error:  # files that choose different hosts do not go together, and that is said
            assert re.search(r"sets model\.\w+, and model=\w+ has no such key", str(error)), error
            continue
        assert {preset: getattr(config, preset) for preset in PRESETS} == row


def test_an_option_without_a_key_that_a_preset_sets_is_refused_in_words() -> None:
    with pytest.raises(UserError, match=r"^experiment=ab_objective sets model\.width, and model=cnn has no such key: leave model out"):
        compose(["experiment=ab_objective", "model=cnn"])


def test_an_option_may_be_built_on_another_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "wide.yaml").write_text("# A wide one\ndefaults: [mlp, _self_]\nwidth: 32\n")
    words = ["--config-dir", str(tmp_path)]
    assert main([*words, "--help", "model=wide"]) == 0
    assert capsys.readouterr().out.startswith("model=wide: A wide one\n  model.width=32\n      features of every hidden layer")
    (tmp_path / "model" / "mlp.yaml").write_text("width: 32\n")
    assert main([*words, "seed=1"]) == 2
    assert "model/mlp.yaml has the name of an option that esper has" in capsys.readouterr().err
    conf.forget()


@pytest.mark.parametrize("group", GROUPS)
def test_help_explains_every_key_of_a_group(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help", group]) == 0
    told = capsys.readouterr().out
    for name in conf.options(group):
        assert f"  {name}" in told
    chosen = default_options()[group]
    for key in option_values(options(group)[chosen], chosen):
        assert key in ("name", "trackers") or f"  {group}.{key}=" in told or f"  {group}.{key}." in told


def test_help_of_an_option_that_is_not_there_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help", "grafting=liner"]) == 2
    assert "choose adaptive, custom, drift" in capsys.readouterr().err


@pytest.mark.usefixtures("processes")
def test_help_imports_neither_torch_nor_hydra() -> None:
    program = "from esper.app import main; main(['--help']); main(['--help', 'model'])"
    program += "; import sys; print({'torch', 'hydra'} & {*sys.modules})"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "set()"


def test_hydra_may_be_prepared_again_and_again() -> None:
    prepare_hydra()
    prepare_hydra()
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
        tree: Any = hydra.compose("config")
    assert tree.model.name == "mlp" and tree.trainer.steps == 2000


#: Arm -> the groups that its file chooses; choosing them on the command line too is refused (docs/comparing.md).
CHOSEN_BY_ARM = {name: [key for key in SETS["arm", name] if key in GROUPS] for name in conf.options("arm")}


#: The quick tests take each group once.
BY_ARM = {group: arm for arm, groups in CHOSEN_BY_ARM.items() for group in groups}
REFUSALS = [
    pytest.param(arm, group, marks=() if BY_ARM[group] == arm else pytest.mark.slow)
    for arm, groups in CHOSEN_BY_ARM.items()
    for group in groups
]


@pytest.mark.parametrize(("arm", "group"), REFUSALS)
def test_an_option_of_a_group_that_the_arm_chooses_is_refused_in_words(arm: str, group: str) -> None:
    for name in (conf.options(group)[0], conf.options(group)[-1]):
        with pytest.raises(UserError, match=f"^{group} is set on the command line and by arm '{arm}'.*leave {group} out"):
            compose([f"arm={arm}", f"{group}={name}"])
