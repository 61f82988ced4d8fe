"""Parts of the user's own: ``package.module:Name`` from packages that were allowed by name, and from nowhere else.

A configuration file is data; the user decides, once and outside of it, which packages it may import: ``ESPER_ALLOW=my_pkg`` in
the environment, or ``allow: [my_pkg]`` in ``esper.yaml`` in the folder that esper is started in. It is read when esper
starts, before any configuration is: no configuration adds to it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.bus.config import MemoryConfig
from esper.errors import UserError
from esper.processes import ControllerPlace, TrackerPlace, chosen
from esper.setting_fields import setting

VARIABLE = "ESPER_ALLOW"
FILE = "esper.yaml"


@dataclass(frozen=True)
class Allowed:
    """Everything that may be reached outside esper: packages, variables of the environment, and ``programs``, the user's own by name.

    ``folder`` is where esper was started.
    """

    packages: tuple[str, ...]
    variables: tuple[str, ...]
    programs: Mapping[str, str]
    folder: Path

    def imports(self, module: str) -> bool:
        """Whether ``module`` or one of its packages was named."""
        return any(module == name or module.startswith(f"{name}.") for name in self.packages)


_decided: Allowed | None = None


@contextmanager
def decided() -> Iterator[None]:
    """Within: the environment and the folder count as they are now, even if a configuration changes either later.

    Raises:
        UserError: an ``esper.yaml`` that is not as it must be.
    """
    global _decided
    before, _decided = _decided, _read()
    try:
        yield
    finally:
        _decided = before


def allowed() -> Allowed:
    """The user's permissions when esper was started (``decided``); outside of that, the present ones.

    Raises:
        UserError: an ``esper.yaml`` that is not as it must be.
    """
    return _decided or _read()


def _read() -> Allowed:
    """``ESPER_ALLOW`` (commas between) and ``./esper.yaml``."""
    packages = [name.strip() for name in os.environ.get(VARIABLE, "").split(",")]
    variables: list[str] = []
    programs: dict[str, str] = {}
    path = Path(FILE)
    if path.is_file():
        import yaml

        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise UserError(f"{FILE} cannot be read as YAML: {' '.join(str(error).split())}.") from error
        packages += _names(tree, "allow", "the packages that may be imported, as in: allow: [my_pkg]")
        variables += _names(tree, "env", "the variables that a configuration may read, as in: env: [SCRATCH]")
        programs = _programs(tree)
    return Allowed(tuple(filter(None, packages)), tuple(filter(None, variables)), programs, Path.cwd())


def _names(tree: Any, key: str, what: str) -> list[str]:
    given = tree.get(key, []) if isinstance(tree, Mapping) else None
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise UserError(f"{FILE} must hold {what}.")
    return given


def _programs(tree: Mapping[str, Any]) -> dict[str, str]:
    given = tree.get("programs", {})
    named = isinstance(given, Mapping) and all(isinstance(name, str) and name.isidentifier() for name in given)
    if not named or not all(isinstance(target, str) for target in given.values()):
        raise UserError(f"{FILE} must hold programs by name, as in: programs: {{census: my_pkg.programs:census}}.")
    return dict(given)


def variable(name: str, *default: Any) -> Any:
    """``${oc.env:NAME}`` or ``${oc.env:NAME,default}`` of a configuration: only of variables that ``esper.yaml`` names.

    A value read in this way is written into the saved configuration and the tracker, and the environment holds secrets.

    Raises:
        UserError: a variable that is not allowed, or not set.
    """
    if name not in allowed().variables:
        raise UserError(f"${{oc.env:{name}}} reads a variable that nobody allowed; write env: [{name}] into ./{FILE}")
    if name not in os.environ and not default:
        raise UserError(f"${{oc.env:{name}}} reads a variable that is not set")
    return os.environ.get(name, *default)


def locate(target: str, key: str) -> Any:
    """The object that ``target`` (``package.module:Name``) names; ``key`` is its setting, for sentences.

    Raises:
        UserError: no target, a package that is not allowed, no such module or no such name in it, or a name under which the
            module holds an object of another package, which is not allowed (``my_pkg.nets:os.system``).
    """
    module, _, name = target.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise UserError(f"{key}={target or '(empty)'} is not accepted: {key} takes package.module:Name, as in {key}=my_pkg.nets:MyNet.")
    package, permitted = module.split(".")[0], allowed()
    if not permitted.imports(module):
        raise UserError(
            f"{key}={target} would import '{package}', which nobody allowed: set {VARIABLE}={package} "
            f"or write allow: [{package}] into ./{FILE}."
        )
    folder = str(permitted.folder)
    if "" not in sys.path and folder not in sys.path:
        sys.path.insert(0, folder)  # the user's package lies where esper is started; the console script does not look there
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # the user's module is there and itself imports something that is not: its traceback says where
        raise UserError(f"{key}={target}: there is no module '{error.name}' in {folder} or among the installed packages.") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise UserError(f"{key}={target}: the module '{module}' has no '{name}'.")
        found = getattr(found, part)
    home = getattr(found, "__module__", None) or "no module"
    if not permitted.imports(str(home)):
        raise UserError(
            f"{key}={target} is defined in '{home}', which nobody allowed: allow that package too, or write a class or function "
            f"of your own in '{module}' that uses it."
        )
    return found


def source_digest(target: str) -> str:
    """SHA-256 over the Python files of the package (or the one module) that a ``target`` already imported comes from."""
    package = sys.modules[target.partition(":")[0].split(".")[0]]
    folders = [Path(folder) for folder in getattr(package, "__path__", ())]
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    digest = hashlib.sha256()
    for file in files or [Path(str(package.__file__))]:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def make(target: str, args: Mapping[str, Any], group: str) -> Any:
    """``target(**args)`` for the setting ``<group>.target``.

    Raises:
        UserError: as ``locate``, and for arguments that the target does not take, or misses.
    """
    found = locate(target, f"{group}.target")
    if not callable(found):
        raise UserError(f"{group}.target={target} is a {type(found).__name__}; it must be a class or a function.")
    check_arguments(found, args, group, target)
    return found(**args)


def check_arguments(found: Any, args: Mapping[str, Any], group: str, target: str) -> None:
    """Raise UserError unless ``found`` can be called with these keyword arguments (where its signature can be read)."""
    try:
        signature = inspect.signature(found)
    except ValueError:
        return
    try:
        signature.bind(**args)
    except TypeError as error:
        takes = ", ".join(signature.parameters) or "nothing"
        raise UserError(f"{group}.args does not fit {target}: {error}; it takes {takes}.") from error


def _asks_for(found: Any, name: str) -> bool:
    try:
        return name in inspect.signature(found).parameters
    except (TypeError, ValueError):
        return False


@dataclass
class CustomModel:
    """A host of the user's own: ``target(**args)``, or ``target(task=…, **args)`` where it takes a parameter ``task``."""

    name: str = "custom"
    target: str = setting("", help="package.module:Name of an nn.Module, or of a function that gives one")
    args: dict[str, Any] = setting({}, help="its keyword arguments")
    weights: str = setting("", help="start from these weights: a run's folder or a .safetensors file")

    def build(self, task: Any, generator: Any) -> Any:
        """The host; its draws from a global generator while it is made come from the run's seed."""
        import torch

        from esper.randomness import global_draws_kept, seed_global_draws

        found = locate(self.target, "model.target")
        args = {**self.args, "task": task} if _asks_for(found, "task") else self.args
        with global_draws_kept():
            seed_global_draws(generator.initial_seed())
            host = make(self.target, args, "model")
        if not isinstance(host, torch.nn.Module):
            raise UserError(f"model.target={self.target} gave a {type(host).__name__}; a host is a torch.nn.Module.")
        return host


@dataclass
class CustomTask:
    """A task of the user's own: ``target(**args)`` gives an ``esper.tasks.Task`` (``esper.tasks.task_of`` makes one)."""

    name: str = "custom"
    target: str = setting("", help="package.module:name of a function that gives a Task")
    args: dict[str, Any] = setting({}, help="its keyword arguments")

    def build(self) -> Any:
        """The task."""
        from esper.tasks.base import Task

        task = make(self.target, self.args, "task")
        if not isinstance(task, Task):
            raise UserError(f"task.target={self.target} gave a {type(task).__name__}; make a Task with esper.tasks.task_of(…).")
        return task


@dataclass
class CustomBlueprint:
    """A blueprint of the user's own: ``target(**args)`` is an ``esper.blueprints.Blueprint``."""

    name: str = "custom"
    target: str = setting("", help="package.module:Name of a dataclass derived from esper.blueprints.Blueprint")
    args: dict[str, Any] = setting({}, help="its settings")

    def build(self) -> Any:
        """The blueprint, under a name of its own."""
        from esper.blueprints import BLUEPRINTS, Block, Blueprint

        made = make(self.target, self.args, "blueprint")
        if not isinstance(made, (Blueprint, Block)):
            raise UserError(f"blueprint.target={self.target} gave a {type(made).__name__}; derive it from esper.blueprints.Blueprint.")
        if not made.name or (made.name in BLUEPRINTS and type(made) is not BLUEPRINTS[made.name]):
            raise UserError(f"blueprint.target={self.target} is named '{made.name}'; give it a name that no other blueprint has.")
        return made


@dataclass
class CustomGrafting:
    """A grafting strategy of the user's own: ``target(**args)`` has ``plan(state, context)`` and the ``signals`` it reads."""

    name: str = "custom"
    ramp: str = setting("5%", unit="duration", help="ticks from alpha_min to alpha_max, undisturbed")
    alpha_min: float = setting(0.0, low=0.0, high=1.0, help="alpha at the start of the ramp")
    alpha_max: float = setting(1.0, low=0.0, high=1.0, help="alpha at the end of the ramp")
    max_hold: float = setting(1.0, low=0.0, high=10.0, unit="ramps", help="ramp that holding may cost in all")
    target: str = setting("", help="package.module:Name of a rule")
    args: dict[str, Any] = setting({}, help="its keyword arguments")

    def build(self) -> Any:
        """The strategy's settings, with the rule in them."""
        from esper.grafting.custom import strategy_of

        made = strategy_of(make(self.target, self.args, "grafting"))
        return dataclasses.replace(made, ramp=self.ramp, alpha_min=self.alpha_min, alpha_max=self.alpha_max, max_hold=self.max_hold)


@dataclass
class CustomController(ControllerPlace):
    """A controller of the user's own: ``target(**args)``, or ``target(seed=…, **args)`` where it takes a parameter ``seed``."""

    name: str = "custom"
    target: str = setting("", help="package.module:Name of a controller")
    args: dict[str, Any] = setting({}, help="its keyword arguments")

    def build(self, seed: int) -> Any:
        """The controller."""
        found = locate(self.target, "controller.target")
        made = make(self.target, {**self.args, "seed": seed} if _asks_for(found, "seed") else self.args, "controller")
        missing = [name for name in ("observe", "decide", "state", "load_state") if not callable(getattr(made, name, None))]
        if missing:
            raise UserError(
                f"controller.target={self.target} has no method {missing[0]}; a controller has observe, decide, state and load_state."
            )
        return made


@dataclass
class CustomBus(MemoryConfig):
    """A message bus of the user's own: ``target(config, folder, **args)`` keeps the contract of ``esper.bus.protocol``."""

    name: str = "custom"
    target: str = setting("", help="package.module:Name of a bus")
    args: dict[str, Any] = setting({}, help="its keyword arguments, beside config (these settings) and folder")

    def build(self, folder: Path) -> Any:
        """The bus, which may write into ``folder``."""
        made = make(self.target, {**self.args, "config": self, "folder": folder}, "bus")
        for name in (
            "config",
            "incidents",
            "counters",
            "local",
            "producer",
            "consumer",
            "dead_letters",
            "replay",
            "purge",
            "counts",
            "close",
        ):
            if not hasattr(made, name):
                raise UserError(f"bus.target={self.target} has no '{name}'; a bus has all that esper.bus.protocol.Bus names.")
        return made


@dataclass
class CustomTracker(TrackerPlace):
    """A tracker of the user's own: ``target(**args)`` is an ``esper.tracking.Tracker``."""

    name: str = "custom"
    trackers: dict[str, Any] = chosen("custom")
    target: str = setting("", help="package.module:Name of a tracker")
    args: dict[str, Any] = setting({}, help="its keyword arguments")

    def build(self) -> Any:
        """The tracker."""
        made = make(self.target, self.args, "tracking")
        missing = [name for name in ("open", "record", "flush", "close") if not callable(getattr(made, name, None))]
        if missing:
            raise UserError(f"tracking.target={self.target} has no method {missing[0]}; a tracker has open, record, flush and close.")
        if not isinstance(getattr(made, "wants_model", None), bool):
            raise UserError(f"tracking.target={self.target} has no wants_model; set it to True for the final model, or to False.")
        return made


#: Group -> the dataclass of its option ``custom``.
OPTIONS: dict[str, type] = {
    "model": CustomModel,
    "task": CustomTask,
    "blueprint": CustomBlueprint,
    "grafting": CustomGrafting,
    "controller": CustomController,
    "bus": CustomBus,
    "tracking": CustomTracker,
}
