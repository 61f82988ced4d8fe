"""The command line: compose → validate → build → run → report. ``esper`` and ``python -m esper`` both start here."""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import esper
from esper import secrets, user_code
from esper.cli import conf, help, programs
from esper.cli import system_errors as files
from esper.config import conf_folder
from esper.errors import Preempted, RankLost, Terminated, TrackerError, UserError
from esper.running import world

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from esper.cli.compose import Composed
    from esper.running.resume import Start

#: Exit codes, as the shell counts them.
FAILED, REFUSED, PREEMPTED, INTERRUPTED, TERMINATED = 1, 2, 75, 130, 143

_COMPLETION = ("--shell-completion", "-sc")
_SHELL = re.compile("(install|uninstall|query)=(bash|zsh|fish)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code.

    0 done, 1 failed, 2 refused, 75 SIGTERM with everything saved (resume it), 130 Ctrl-C, 143 SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        files.say_anything()
        secrets.refuse_words(words)
        files.refuse_unusable(words)
        with user_code.decided():
            words = _own_options(words)
            program = programs.named(words)
            return program.load()(words[1:]) if program else train(words)
    except UserError as error:
        return _say(str(error), REFUSED)
    except ModuleNotFoundError as error:
        if not (missing := files.missing_package(error)):
            raise
        return _say(missing, REFUSED)
    except TrackerError as error:
        return _say(f"the run is done, but {error}.", FAILED)
    except RankLost as error:
        return _say(str(error), FAILED) if error.speaks else FAILED
    except KeyboardInterrupt as stop:
        return _stopped(stop)
    except BrokenPipeError:  # `esper --help | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        if not files.known(error):
            raise
        return _say(files.sentence(error), FAILED)


def train(words: Sequence[str]) -> int:
    """One training run, or the runs of a sweep.

    Raises:
        UserError: anything in ``words`` that is not accepted, before the first run starts.
    """
    if {"--help", "-h"} & set(words):
        print(help.text(words), flush=True)
        return 0
    if "--version" in words:
        print(f"esper {esper.__version__}", flush=True)
        return 0
    if words and words[0] in ("--hydra-help", *_COMPLETION):
        return _hydras_own(words)
    if world.follows():
        return _follow()
    if any(word.startswith(("resume=", "fork=")) and word != "resume=auto" for word in words):
        from esper.cli import resume

        return resume.main(words)
    from esper.cli.compose import check_jobs
    from esper.compare.sweep.forks import early_server

    flags = _parse(words)
    if flags.cfg:
        check_jobs(flags.overrides, flags.multirun)
        return _hydra(words)
    with early_server() as load:
        if started := _in_its_place(check_jobs(flags.overrides, flags.multirun, load)):
            from esper.cli import resume

            return resume.go_on(started)
        return _hydra(words)


def _follow() -> int:
    """Train what rank 0 says. Rank 0 also says what goes wrong, so this process ends without a word of its own."""
    from esper.running.processes import follow

    try:
        return follow()
    except UserError:
        return REFUSED
    except KeyboardInterrupt:
        return TERMINATED


def _hydras_own(words: Sequence[str]) -> int:
    """Requests that Hydra itself answers: its own help, and the completion of a shell (``eval "$(esper -sc install=bash)"``).

    Raises:
        UserError: more words than that; a setting among them would be composed unchecked.
    """
    if words != ["--hydra-help"] and not (len(words) == 2 and _SHELL.fullmatch(words[1])):
        raise UserError(f"{words[0]} stands alone: esper --hydra-help, or esper --shell-completion install=bash (or zsh, fish).")
    typed = os.environ.get("COMP_LINE", "esper ").split(" ")  # a program's own name is no setting that Hydra could complete behind
    os.environ["COMP_LINE"] = " ".join(typed[:1] + typed[2:] if len(typed) > 2 and typed[1] in programs.programs() else typed)
    from hydra.errors import HydraException

    from esper.cli.compose import prepare_hydra

    prepare_hydra()
    try:
        return _hydra(words)
    except SystemExit as done:
        return int(done.code or 0)
    except HydraException:  # half a word completes to nothing
        return FAILED


def _in_its_place(asked: Composed) -> Start | None:
    """The run that ``resume=auto`` continues, None for a new run or a sweep; found before Hydra makes or changes any folder.

    Raises:
        UserError: another run or sweep has the folder, or runs with this very configuration.
    """
    if asked.multirun:
        if world.world()[1] > 1:
            raise UserError("The processes that torchrun starts train one run together, and this is a sweep: start it without torchrun.")
        from esper.compare.sweep.resume import refuse_taken_folder

        refuse_taken_folder(asked.folder)
        return None
    from esper.running.run_folder import refuse_occupied

    if asked.config.resume == "auto":
        from esper.cli.resume import auto

        if found := auto(asked.config, asked.folder):
            return found
    refuse_occupied(asked.folder)
    return None


def _own_options(words: Sequence[str]) -> list[str]:
    """The words without ``--config-dir <folder>``, whose options are taken in for everything that follows."""
    parser = _Parser(prog="esper", add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    flags, rest = parser.parse_known_args(list(words))
    conf.forget()
    if flags.config_dir is not None:
        conf.add(flags.config_dir)
    return rest


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """Options and overrides apart; the options are Hydra's own and read by it again.

    Raises:
        UserError: an option that there is not, or two that Hydra takes only one of.
    """
    parser = _Parser(prog="esper", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--cfg", choices=("job", "hydra", "all"))
    parser.add_argument("--resolve", action="store_true")
    flags = parser.parse_intermixed_args(list(words))
    if flags.cfg and flags.multirun:
        raise UserError("--cfg prints the configuration of one run, and --multirun starts many: leave out -m and give each key one value.")
    if flags.resolve and not flags.cfg:
        raise UserError("--resolve fills in what --cfg prints: write --cfg job --resolve.")
    return flags


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        options = "the options are --help, --version, --multirun, --cfg job, --config-dir, --hydra-help and --shell-completion"
        raise UserError(f"{message}; {options}, and settings are written key=value, as in seed=1.")


def _hydra(words: Sequence[str]) -> int:
    """Hands over to Hydra for the run's folder, the log and the sweep; every job comes back to ``_job``."""
    import hydra

    from esper.cli.overrides import quoted

    refused: list[UserError] = []
    broken: list[TrackerError | RankLost | OSError] = []
    begun: list[DictConfig] = []

    def job(tree: DictConfig) -> float:
        """One run; returns the primary validation metric, which is what a sweeper optimizes."""
        begun.append(tree)
        try:
            return _job(tree)
        except UserError as error:
            logging.getLogger("esper").info("refused: %s", error)
            _say(str(error), REFUSED)
            refused.append(error)
        except (TrackerError, RankLost) as error:  # not through Hydra, which would add a line about the job's overrides
            broken.append(error)
        except OSError as error:
            if not files.known(error):
                raise
            broken.append(error)
        return float("nan")

    os.environ["HYDRA_FULL_ERROR"] = "1"  # a traceback that shows the fault, should there be one
    own = [word for folder in conf.own() for word in ("--config-dir", str(folder))]
    sys.argv = ["esper", *own, *quoted(words)]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(job)()
    except OSError as error:
        if begun or files.known(error):
            raise
        raise UserError(
            f"The output folder {error.filename} cannot be made ({str(error.strerror).lower()}); give another: output=…."
        ) from None
    if broken:
        raise broken[0]
    return REFUSED if refused else 0


def _job(tree: DictConfig) -> float:
    from hydra.core.hydra_config import HydraConfig

    from esper.cli.compose import from_hydra
    from esper.running.run import run

    runtime: Any = HydraConfig.get().runtime
    return run(from_hydra(tree, dict(runtime.choices)), Path(runtime.output_dir)).primary


def _stopped(stop: KeyboardInterrupt) -> int:
    """The sentence and the exit code of a run or sweep that was ended from outside; ``run`` put its folder into ``stop``."""
    kept = f"; what there is so far lies in {stop.args[0]}" if stop.args else ""
    if isinstance(stop, Preempted):
        return _say(f"ended by SIGTERM, everything is saved: {stop} goes on", PREEMPTED)
    if isinstance(stop, Terminated):
        return _say(f"ended by SIGTERM{kept}", TERMINATED)
    return _say(f"ended by Ctrl-C{kept}", INTERRUPTED)


def _terminate(signum: int, frame: object) -> NoReturn:
    raise Terminated


def _say(sentence: str, code: int) -> int:
    print(f"esper: {secrets.redacted(sentence)}", file=sys.stderr)
    return code
