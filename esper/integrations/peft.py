"""LoRA adapters whose ranks grow: peft's own ``LoraConfig`` says where, the judge says how many, and peft loads what comes of it.

In a loop of your own::

    settings = lora_settings(model, config)     # LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn", "c_fc"])
    grow = attach(model, **settings, judge=…, total_steps=…, controller=…)
    save_adapter(grow, "adapter", config)       # PeftModel.from_pretrained(host, "adapter")
"""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn

from esper.atomic_files import replacing
from esper.blueprints import LoRA
from esper.engine.extra_passes import host_parameters
from esper.engine.grow import Grow
from esper.errors import UserError
from esper.lifecycle import LifecycleConfig
from esper.seeds.compiled_modules import host_modules
from esper.seeds.feature_axis import is_linear
from esper.seeds.layer_ranks import factors, ranks_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

#: Fields of a LoraConfig that mean something here; any other must have its default value.
UNDERSTOOD = (
    *("r", "lora_alpha", "use_rslora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *(
        "modules_to_save",
        "task_type",
        "peft_type",
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
        "peft_version",
        "inference_mode",
        "runtime_config",
    ),
)


def lora_settings(model: nn.Module, config: LoraConfig, **settings: Any) -> dict[str, Any]:
    """What ``attach`` or a ``GrowCallback`` needs for ranks to grow on the layers that ``config`` targets.

    Every seed that is kept adds ``config.r`` ranks to its layer, at the scaling of ``config`` (``lora_alpha / r``) however many there
    are. ``settings`` are further ones of ``attach``, and come over these. As with ``get_peft_model``, the model is frozen but for
    ``modules_to_save``, to which a task type adds its head (``SEQ_CLS``: the classifier); they learn by the loop's own optimizer.

    Raises:
        UserError: a variant of LoRA that does not grow here, a layer that is not linear, or targets that the model does not have.
    """
    _refuse_variants(config)
    scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    sites, config.modules_to_save = _asked_of_peft(model, config)
    _refuse_tied(model, config)
    model.requires_grad_(False)
    for module in _learning(model, config).values():
        module.requires_grad_(True)
    own = {"sites": sites, "per_site": 1, "blueprint": LoRA(rank=config.r, scaling=scaling), "lifecycle": lora_lifecycle()}
    return own | settings


def lora_lifecycle(**changes: Any) -> LifecycleConfig:
    """A seed's life for ranks: one after the other at a layer, each with a share of the run to learn in; ``changes`` come over it."""
    ages = {"fine_tuning_min": "10%", "fine_tuning_max": "25%", "embargo": "1%"}
    return LifecycleConfig(**({"reseed": True} | ages | changes))


def ranks(grow: Grow) -> dict[str, int]:
    """The ranks that each layer has now: those of kept branches, and of others that are blended."""
    registry = grow.registry
    found = {site.name: sum(ranks_of(branch, registry) for branch in registry.blended(n)) for n, site in enumerate(registry.sites)}
    return {name: number for name, number in found.items() if number}


def save_adapter(grow: Grow, folder: str | Path, config: LoraConfig) -> Path:
    """Write what grew into ``folder`` as an adapter in peft's format, and return the folder.

    ``PeftModel.from_pretrained(host, folder)`` then computes what ``grow.export()`` computes. Ranks and scalings of the layers are in
    ``rank_pattern`` and ``alpha_pattern``. The ranks' weights are float32.

    Raises:
        UserError: no rank was kept, something else grew, or the host learnt too, so that an adapter alone would not be the model.
    """
    registry, folder = grow.registry, Path(folder)
    saved = {
        f"{name}.{key}": value for name, module in _learning(registry.model, config).items() for key, value in module.state_dict().items()
    }
    learnt = next((name for name, value in host_parameters(registry.model).items() if value.requires_grad and name not in saved), None)
    if learnt is not None:
        raise UserError(
            f"'{learnt}' of the host learns too, so the adapter alone would not be the model: freeze it, or use grow.save(folder)."
        )
    grown = {site.name: branches for n, site in enumerate(registry.sites) if (branches := registry.blended(n))}
    if not grown:
        raise UserError("No rank was kept, so there is no adapter to save: the model is the host as it was.")
    other = next((branch for branches in grown.values() for branch in branches if not ranks_of(branch, registry)), None)
    if other is not None:
        raise UserError(
            f"A branch of blueprint {other.blueprint} grew too, and peft's format holds ranks alone: save with grow.save(folder)."
        )
    blueprint = registry.blueprints[registry.default_blueprint]
    assert isinstance(blueprint, LoRA)
    tensors = {f"base_model.model.{name}": value.detach().cpu().contiguous().clone() for name, value in saved.items()}
    with grow.exported_values():
        for name, branches in grown.items():
            down, up = factors(registry, branches)
            for factor, value in (("A", down), ("B", up)):
                tensors[f"base_model.model.{name}.lora_{factor}.weight"] = value.t().float().cpu().contiguous()
    _write(folder, tensors, _described(registry.model, config, ranks(grow), blueprint.scaling))
    return folder


def _refuse_variants(config: LoraConfig) -> None:
    usual = LoraConfig()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in UNDERSTOOD and value != getattr(usual, field.name, None):
            raise UserError(f"LoraConfig({field.name}={value!r}) does not go with ranks that grow; leave {field.name} out.")
    if config.r < 1:
        raise UserError(f"LoraConfig(r={config.r}) adds no rank; r is the ranks of one seed, so give at least 1.")


def _learning(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The host's modules that learn beside the ranks, by the rule by which peft finds them."""
    ends = tuple(config.modules_to_save or ())
    return {name: module for name, module in host_modules(model).items() if name.endswith(ends)} if ends else {}


def _refuse_tied(model: nn.Module, config: LoraConfig) -> None:
    """Raise UserError where a module that learns shares a weight with one that does not: peft would train a copy of its own."""
    learning = tuple(f"{name}." for name in _learning(model, config))
    named = [(name, parameter) for name, parameter in model.named_parameters(remove_duplicate=False)] if learning else []
    inside = {id(parameter): name for name, parameter in named if name.startswith(learning)}
    for name, parameter in named:
        if id(parameter) in inside and not name.startswith(learning):
            raise UserError(
                f"modules_to_save would let '{inside[id(parameter)]}' learn, which is tied to '{name}': an adapter of peft's holds the two "
                "apart. Leave it out, name both modules, or untie them first (tie_word_embeddings=False)."
            )


def _asked_of_peft(model: nn.Module, config: LoraConfig) -> tuple[list[str], list[str] | None]:
    """The layers that peft would adapt, and the names of modules that it would let learn; it is asked on a copy without memory."""
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UserError("This model has adapters of peft already; merge them (merge_and_unload), and let ranks grow on the merged model.")
    tensors = (*model.parameters(), *model.buffers())
    hollow = {id(tensor): _without_memory(tensor) for tensor in tensors}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers stored transposed, which are no news here
            adapted: Any = get_peft_model(copy.deepcopy(model, hollow), copy.deepcopy(config), low_cpu_mem_usage=True)
    except ValueError as error:
        raise UserError(f"peft does not adapt this model so: {' '.join(str(error).split())}") from error
    names = list(adapted.base_model.targeted_module_names)
    for name in names:
        if not is_linear(layer := model.get_submodule(name)):
            raise UserError(
                f"'{name}' ({type(layer).__name__}) is no linear layer, and ranks grow on these alone; leave it out of target_modules."
            )
    return names, sorted(adapted.peft_config["default"].modules_to_save or ()) or None


def _without_memory(tensor: Tensor) -> Tensor:
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _described(model: nn.Module, config: LoraConfig, ranked: dict[str, int], scaling: float) -> LoraConfig:
    """peft's description of the adapter: every layer with its rank, the scaling the same at all."""
    told = copy.deepcopy(config)
    names = sorted(ranked)
    told.rank_pattern = {_pattern(name, names): ranked[name] for name in names}
    told.alpha_pattern = {_pattern(name, names): _short(scaling * ranked[name]) for name in names}
    told.use_rslora, told.inference_mode = False, True
    told.exclude_modules = told.layers_to_transform = told.layers_pattern = None
    told.fan_in_fan_out = any(type(model.get_submodule(name)).__name__ == "Conv1D" for name in names)
    told.base_model_name_or_path = config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
    told.target_modules = names
    if {name for name in host_modules(model) if check_target_module_exists(told, name)} != set(names):
        told.target_modules = "|".join(map(re.escape, names))
    return told


def _pattern(name: str, names: list[str]) -> str:
    """The layer's name, or a pattern of it alone where peft would take it for others that end with it too."""
    meant = [other for other in names if re.match(rf"(.*\.)?({name})$", other)]
    return name if meant == [name] else f"^{re.escape(name)}"


def _short(value: float) -> float:
    return int(value) if value == int(value) else value


def _write(folder: Path, tensors: dict[str, Tensor], config: LoraConfig) -> None:
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)  # of an earlier adapter, whose ranks were others
    with replacing(folder / WEIGHTS) as aside:
        aside.write_bytes(save(tensors, metadata={"format": "pt"}))
    with replacing(folder / CONFIG) as aside:
        config.save_pretrained(str(aside.parent))
