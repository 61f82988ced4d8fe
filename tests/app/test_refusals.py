"""What the command line does not accept gets one sentence and exit code 2; also what Hydra itself would refuse."""

from __future__ import annotations

import pytest

from esper.app import main


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["seed=x"], ["seed=x is not accepted", "a whole number from 0 to 4294967295"]),
        (["seed=-1"], ["seed=-1 is not accepted"]),
        (["seeds=3"], ["There is no key seeds", "did you mean seed?"]),
        (["model.widht=8"], ["There is no key model.widht", "model=mlp has", "did you mean model.width?"]),
        (["alpha_max=1"], ["There is no key alpha_max", "did you mean grafting.alpha_max?"]),
        (["model.width.x=8"], ["model.width is a single value"]),
        (["scheduler=cosine", "scheduler.decay=0.2"], ["There is no key scheduler.decay", "scheduler=cosine has"]),
        (["grafting.alpha_max=2"], ["from 0.0 to 1.0"]),
        (["optimizer.momentum=1.0"], ["optimizer.momentum takes a finite number from 0.0 to 0.9999"]),
        (["optimizer.branch_lr=1e30"], ["optimizer.branch_lr takes a finite number from 0.0 to 1000.0"]),
        (["optimizer.branch_lr=inf"], ["optimizer.branch_lr=inf is not accepted"]),
        (["lifecycle.gain=inf"], ["lifecycle.gain takes a finite number of at least 0.0"]),
        (["telemetry.near_zero=inf"], ["telemetry.near_zero=inf is not accepted"]),
        (["trainer.threads=100000"], ["trainer.threads takes a whole number from 0 to 1024"]),
        (["trainer.num_workers=100000"], ["trainer.num_workers takes a whole number from 0 to 256"]),
        (["trainer.steps=99999999999999999999"], ["trainer.steps takes a whole number from 0 to 1000000000000"]),
        (["trainer.epochs=99999999999999999999"], ["trainer.epochs takes"]),
        (["trainer.batch_size=99999999999999999999"], ["trainer.batch_size takes"]),
        (["trainer.accumulate=99999999999999999999"], ["trainer.accumulate takes a whole number from 1 to 1000000"]),
        (["blueprint=mlp", "blueprint.hidden=100000000000"], ["blueprint.hidden takes a whole number from 1 to 1048576"]),
        (["blueprint=glu", "blueprint.hidden=100000000000"], ["blueprint.hidden takes"]),
        (["blueprint=low_rank", "blueprint.rank=100000000000"], ["blueprint.rank takes"]),
        (["blueprint=conv", "blueprint.expand=100000000000"], ["blueprint.expand takes"]),
        (["blueprint=conv", "blueprint.kernel=100000000001"], ["blueprint.kernel takes"]),
        (["grafting=stability", "grafting.patience=99999999999999999999"], ["grafting.patience takes"]),
        (["grafting=adaptive", "grafting.patience=99999999999999999999"], ["grafting.patience takes"]),
        (["controller=random", "controller.count=99999999999999999999"], ["controller.count takes"]),
        (["lifecycle.objective=shadw"], ["shadow, functional_gradient or reconstruction", "did you mean shadow?"]),
        (["model=mpl"], ["no option of the group model", "did you mean mlp?"]),
        (["modell=mlp"], ["There is no key modell", "did you mean model?"]),
        (["model=null"], ["model=null is no option of the group model"]),
        (["model.name=cnn", "model.width=3"], ["There is no key model"]),
        (["+key=1"], ["There is no key key"]),
        (["+seed=1"], ["without the +"]),
        (["+model.extra=1"], ["There is no key model.extra"]),
        (["+model=mlp"], ["model=", "without + or ~"]),
        (["~model"], ["without + or ~"]),
        (["~seed"], ["every setting has a value"]),
        (["name=[a"], ["cannot be read as key=value"]),
        (["seed=1,2"], ["several values", "--multirun"]),
        (["model=mlp,cnn"], ["model=mlp,cnn gives model several values: add --multirun to sweep over them."]),
        (["tracking=mlflow,csv"], ["several values: write tracking=[mlflow,csv] for all of them at once, or add --multirun"]),
        (["sites.match=fc1,fc2"], ["several values: write sites.match=[fc1,fc2] for all of them at once, or add --multirun"]),
        (["optimizer.lr=1,2"], ["several values: add --multirun"]),
        # Slow, because a process that workers are forked from has begun to load by then.
        pytest.param(["--multirun", "seed=1,x"], ["seed=x is not accepted"], marks=pytest.mark.slow),
        pytest.param(
            ["--multirun", "grafting=linear,liner"], ["grafting=liner is no option", "did you mean linear?"], marks=pytest.mark.slow
        ),
        (["hydra.nothing=1"], ["hydra.nothing is not accepted", "hydra.run.dir, hydra.sweep.dir"]),
        (["hydra/launcher=nothing"], ["cannot be composed", "hydra/launcher"]),
        (["optimizer.lr=${nope}"], ["cannot be composed", "'nope' not found (in optimizer.lr)"]),
        (["lifecycle.training_min=5"], ["lifecycle.training_min takes a duration, as in 50step, 2epoch or 5% (of the run)."]),
        (["grafting.ramp=-5%"], ["grafting.ramp=-5% is not accepted"]),
        (["trainer.validate_every=often"], ["trainer.validate_every=often is not accepted"]),
        (["trainer.checkpoint_every=never"], ["a duration, as in 50step, 2epoch or 5% (of the run) or empty."]),
        (["optimizer.branch_warmup="], ["optimizer.branch_warmup= is not accepted"]),
        (["controller.until=late"], ["controller.until=late is not accepted"]),
        (["name=a/b"], ["name=a/b is not accepted", "a word without /"]),
        (["name="], ["name= is not accepted"]),
        (["output="], ["output is empty; give a folder"]),
        (["help"], ["no program 'help'", "esper --help lists all there is"]),
        (["compare.tune.x=1"], ["There is no key compare.tune.x"]),
        (["compare.tunes={x:[1]}"], ["There is no key compare.tunes", "did you mean compare.tune?"]),
        (["compare.tune=3"], ["compare.tune=3 is not accepted"]),
        (["compare.fresh_seeds={again:x}"], ["compare.fresh_seeds.again=x is not accepted"]),
        (["optimizer.lr={a:1}"], ["optimizer.lr={'a': 1} is not accepted"]),
        (["-m", "seed=0,1", "hydra.launcher.workers=-1"], ["hydra.launcher.workers=-1 is not accepted", "a whole number of at least 0"]),
        (["-m", "seed=0,1", "hydra.launcher.workers=two"], ["hydra.launcher.workers=two is not accepted"]),
        (["-m", "seed=0,1", "hydra.launcher.threads=0"], ["hydra.launcher.threads=0 is not accepted"]),
        (["-m", "seed=0,1", "hydra.launcher.retry=perhaps"], ["hydra.launcher.retry=perhaps is not accepted"]),
        (["--hydra-help", "seed=1"], ["--hydra-help stands alone"]),
        (["-sc"], ["-sc stands alone"]),
        (["--steps", "5"], ["unrecognized arguments: --steps", "key=value"]),
        (["--cfg", "nothing"], ["--cfg"]),
        (["-m", "seed=0,1", "--cfg", "job"], ["--cfg prints the configuration of one run", "leave out -m"]),
        (["--multirun", "--cfg", "hydra"], ["--cfg prints the configuration of one run"]),
        (["--resolve"], ["write --cfg job --resolve"]),
        (["chekc"], ["no program 'chekc'", "did you mean check?"]),
        (["seed=1", "check"], ["'check' is no setting"]),
        (["check", "seed=x"], ["seed=x is not accepted"]),
        (["check", "seed=1,2"], ["several values"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "=" in "".join(value) else None,
)
def test_a_mistake_gets_one_sentence(words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    sentence = printed.err.strip()
    assert sentence.startswith("esper: ") and "\n" not in sentence and "Traceback" not in sentence
    for part in parts:
        assert part in sentence


def test_a_mistake_is_refused_before_any_folder_is_made(esper, tmp_path) -> None:  # type: ignore[no-untyped-def]
    result = esper("model.width=wide")
    assert result.returncode == 2
    assert result.stderr.startswith("esper: model.width=wide is not accepted")
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
