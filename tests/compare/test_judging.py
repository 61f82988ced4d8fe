"""Verdicts on a DataFrame and on files, as a user asks for them; also where only the light core is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from esper.compare import judge
from esper.compare.plan_command import main as plan
from esper.compare.runs_command import main as runs
from esper.compare.statistics.random_draws import generator
from esper.errors import UserError

ARMS = {"plain": 0.0, "better": 0.05, "same": 0.0}


def table(pairs: int = 10, tasks: tuple[str, ...] = ("digits",), spread: float = 0.004) -> pd.DataFrame:
    """Three arms on some tasks, runs of one seed alike."""
    rng, rows = generator("judging"), []
    for task in tasks:
        for seed in range(pairs):
            level = 0.8 + rng.normal(0, 0.03)
            rows += [
                {"arm": arm, "task": task, "seed": seed, "acc": level + effect + rng.normal(0, spread)} for arm, effect in ARMS.items()
            ]
    return pd.DataFrame(rows)


def verdicts(frame: pd.DataFrame, **settings: object) -> dict[tuple[str, str], str]:
    judged = judge(frame, **{"arm": "arm", "metric": "acc", "reference": "plain", **settings})  # type: ignore[arg-type]
    return {(row.arm, row.block): row.verdict for row in judged.comparison.verdicts}


def test_pairs_find_what_runs_that_are_not_paired_cannot() -> None:
    frame = table()
    assert verdicts(frame, pair="seed") == {("better", ""): "B better", ("same", ""): "equivalent"}
    alone = judge(frame, arm="arm", metric="acc", reference="plain")
    rows = {row.arm: row for row in alone.comparison.verdicts}
    assert rows["same"].verdict == "inconclusive" and "not paired" in rows["same"].sentence and rows["same"].counts == (10, 10)
    assert rows["better"].difference == pytest.approx(frame.groupby("arm")["acc"].mean().diff()["plain"] * -1, abs=1e-9)
    assert any(note.startswith("The runs are not paired: the test exchanges the runs") for note in alone.comparison.notes)
    assert "more runs of each arm find 0.01" in rows["same"].sentence


def test_unpaired_arms_are_judged_however_many_runs_each_has() -> None:
    frame = table(16)
    frame = frame[(frame["arm"] != "better") | (frame["seed"] < 9)]
    row = next(row for row in judge(frame, arm="arm", metric="acc", reference="plain").comparison.verdicts if row.arm == "better")
    assert (row.verdict, row.counts, row.pairs) == ("B better", (9, 16), 0)
    assert row.interval[0] > 0 and row.p <= 0.05


def test_an_unpaired_run_that_failed_is_worse_than_all_others_and_equal_to_none() -> None:
    frame = table(12, spread=0.001).assign(status="finished")
    lost = frame.copy()
    lost.loc[(lost["arm"] == "same") & (lost["seed"] == 0), ["status", "acc"]] = ["failed", np.nan]
    before, after = (
        next(row for row in judge(one, arm="arm", metric="acc", minimum_effect=0.5).comparison.verdicts if row.arm == "same")
        for one in (frame[frame["arm"] != "better"], lost[lost["arm"] != "better"])
    )
    assert before.verdict == "equivalent" and after.verdict != "equivalent"
    assert after.failed == (1, 0) and after.difference < before.difference and "failed runs: 1 of same" in after.sentence


def test_tasks_are_judged_apart_pooled_or_both() -> None:
    frame = table(tasks=("digits", "mnist1d"))
    both = verdicts(frame, pair="seed", block="task")
    assert [block for arm, block in both if arm == "better"] == ["digits", "mnist1d", "pooled"]
    assert {block for _, block in verdicts(frame, pair="seed", block="task", pooling="apart")} == {"digits", "mnist1d"}
    assert verdicts(frame, pair="seed", block="task", pooling="pooled") == {
        ("better", "pooled"): "B better",
        ("same", "pooled"): "equivalent",
    }
    unpaired = judge(frame, arm="arm", metric="acc", block="task", pooling="pooled", reference="plain").comparison
    row = next(row for row in unpaired.verdicts if row.arm == "better")
    assert row.counts == (20, 20) and row.verdict == "B better"


def test_several_tasks_have_interquartile_means_and_profiles() -> None:
    frame = table(tasks=("digits", "mnist1d"))
    overall = {one.arm: one for one in judge(frame, arm="arm", metric="acc", pair="seed", block="task").comparison.overall}
    one = overall["better"]
    values = np.sort(frame.loc[frame["arm"] == "better", "acc"])
    assert one.iqm == pytest.approx(values[5:15].mean()) and one.interval[0] < one.iqm < one.interval[1] and one.runs == 20
    shares = [share for _, share, _, _ in one.profile]
    assert shares == sorted(shares, reverse=True) and all(low <= share <= high for _, share, low, high in one.profile)
    smaller = judge(frame.assign(loss=-frame["acc"]), arm="arm", metric="loss", pair="seed", block="task").comparison
    assert {a.arm: a.iqm for a in smaller.overall} == pytest.approx({arm: -a.iqm for arm, a in overall.items()})


def test_what_is_asked_wrongly_is_a_sentence() -> None:
    frame = table(6)
    for settings, words in (
        ({"arm": "arms"}, "arms is nothing that the runs of the table have; .*; did you mean arm[?]"),
        ({"metric": "ac"}, "ac is nothing that .*; did you mean acc[?]"),
        ({"reference": "plane"}, "There is no arm 'plane'; .* did you mean plain[?]"),
        ({"take": "first"}, "take=first is not accepted: it takes last, best or the number of a step"),
        ({"missing": "drop"}, "missing=drop is not accepted"),
        ({"pooling": "none"}, "pooling=none is not accepted"),
        ({"alpha": 0.9}, "alpha=0.9 is not accepted"),
        ({"arm": "task", "reference": ""}, "at least two arms"),
    ):
        with pytest.raises(UserError, match=words):
            verdicts(frame, **settings)
    with pytest.raises(UserError, match="Nothing says whether a larger level is better; set direction"):
        judge(frame.rename(columns={"acc": "level"}), arm="arm", metric="level")
    with pytest.raises(UserError, match="The table has no rows"):
        judge(frame.iloc[:0], arm="arm", metric="acc")
    with pytest.raises(UserError, match=r"Arm 'plain' has two runs with seed 0 \(row 1, row 19\)"):
        judge(pd.concat([frame, frame]), arm="arm", metric="acc", pair="seed")


@pytest.mark.slow
def test_the_result_is_shown_in_every_form(tmp_path: Path) -> None:
    judged = judge(table(tasks=("digits", "a|b & <c>")), arm="arm", metric="acc", pair="seed", block="task", reference="plain")
    assert judged.sentences[0].startswith("better is better than plain in ") and judged.sentences[0] in " ".join(str(judged).split())
    assert r"a\|b & <c>" in judged.markdown() and "| ---: |" in judged.markdown()
    tex = judged.latex()
    assert r"a\textbar{}b \& \textless{}c\textgreater{}" in tex and tex.count(r"\\") == 1 + len(judged.comparison.verdicts)
    page = judged.html()
    assert "a|b &amp; &lt;c&gt;" in page and "Performance profiles" in page and "http" not in page.replace("https://bokeh.org", "")[:2_000]
    assert "<iframe srcdoc=" in judged._repr_html_()
    names = {path.name for path in judged.write(tmp_path / "out")}
    assert names == {f"comparison.{kind}" for kind in ("json", "txt", "md", "tex", "html")} | {"pairs.png"}
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["overall"][0]["arm"] == "better"


PLANNED = ["arm=arm", "arms=plain,better", "metric=acc", "reference=plain", "minimum_effect=0.02"]


def test_a_plan_in_a_file_is_judged_by_and_checked_by_its_digest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, store = f"plan={tmp_path}/p.json", f"store={tmp_path}/t.csv"
    assert plan([file, *PLANNED, "pair=seed", "pairs=range(0,8)"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    digest = said.partition("digest ")[2].split()[0]
    table(10).assign(start_time="2099-01-01T00:00:00").to_csv(tmp_path / "t.csv", index=False)
    assert runs([store, file, f"digest={digest[:16]}", f"output={tmp_path}", "figures=false"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "exploratory" not in said
        and "8 pairs" in said
        and "Runs that the plan does not have (other arms, blocks or pairs) are left out: 14." in said
    )
    assert (tmp_path / "compare" / "p" / "comparison.json").exists()
    table(6).to_csv(tmp_path / "t.csv", index=False)
    assert runs([store, file, "digest=00", f"output={tmp_path}", "figures=false"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the plan is not the text that was registered" in said and "6 of 8 planned pairs are there" in said
    assert "nothing shows that the plan came first" in said
    with pytest.raises(UserError, match="is there already, and a plan is never replaced"):
        plan([file, *PLANNED, "pair=seed", "pairs=range(0,8)"])
    (tmp_path / "p.json").write_text("{}")
    with pytest.raises(UserError, match="is no plan that esper compare plan registered"):
        runs([store, file, f"output={tmp_path}"])


def test_a_plan_for_runs_that_nothing_pairs_counts_the_runs_of_each_arm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, store = f"plan={tmp_path}/p.json", f"store={tmp_path}/t.csv"
    assert plan([file, *PLANNED, "runs=9", "spread=0.03"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "9 runs of each arm find a difference of" in said and "the expected standard deviation of the runs of an arm" in said
    table(8).to_csv(tmp_path / "t.csv", index=False)
    assert runs([store, file, f"output={tmp_path}", "figures=false"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "8 of 9 planned runs of each arm are there" in said and "8 and 8 runs, not paired" in said


@pytest.mark.slow
def test_a_plan_that_looks_early_decides_after_the_pairs_of_a_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, store = f"plan={tmp_path}/p.json", f"store={tmp_path}/t.csv"
    assert plan([file, *PLANNED, "pair=seed", "pairs=0..19", "sequential=true", "looks=2"]) == 0
    assert "looked at after 10 or 20," in " ".join(capsys.readouterr().out.split())
    for pairs, word in ((9, "Cannot tell better from plain"), (10, "better is better than plain")):
        table(20)[lambda frame, pairs=pairs: frame["seed"] < pairs].to_csv(tmp_path / "t.csv", index=False)
        assert runs([store, file, f"output={tmp_path}", "figures=false"]) == 0
        assert word in " ".join(capsys.readouterr().out.split())


def test_words_of_a_plan_that_cannot_stand_are_sentences(tmp_path: Path) -> None:
    file = f"plan={tmp_path}/p.json"
    for words, told in (
        ([], "Say what makes the arms"),
        (["arm=a", "metric=acc"], "Say which arms there will be"),
        (["arm=a", "arms=x,x", "metric=acc", "runs=5"], "names one twice"),
        (["arm=a,b", "arms=x,y", "metric=acc", "runs=5"], "write each as 'a=… b=…'"),
        (["arm=a", "arms=x,y", "metric=acc"], r"Give pair=<column> with pairs=range\(0,15\)"),
        (["arm=a", "arms=x,y", "metric=acc", "runs=one"], "runs=one is not accepted"),
        (["arm=a", "arms=x,y", "metric=acc", "pair=s", "pairs=5..1"], "is empty or longer"),
        (["arm=a", "arms=x,y", "metric=acc", "runs=5", "block=t"], "say which there will be: blocks=a,b"),
        (["arm=a", "arms=x,y", "metric=acc", "runs=5", "sequential=true"], "Looking early needs pairs"),
        (["arm=a", "arms=x,y", "metric=m", "runs=5"], "Nothing says whether a larger m is better"),
        (["arms=x", "arms=y"], "arms is given twice"),
        (["store=x.db"], "is a file, which no store keeps"),
    ):
        with pytest.raises(UserError, match=told):
            plan([file, *words])
    assert not (tmp_path / "p.json").exists()
    with pytest.raises(UserError, match="would be a plan in an MLflow store"):
        plan(["plan=p", *PLANNED, "runs=5"])


LIGHT = """
import sys
ABSENT = {"torch", "triton", "hydra", "omegaconf", "mlflow", "redis", "safetensors", "sklearn", "statsmodels", "zstandard", "tensorboard"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import esper.compare
assert not {"numpy", "pandas", "scipy", "matplotlib", "bokeh"} & set(sys.modules), "importing the package imports libraries"
from esper.app import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.usefixtures("processes")
def test_the_light_core_judges_a_table_and_says_what_training_needs(tmp_path: Path) -> None:
    table(8).to_csv(tmp_path / "t.csv", index=False)

    def esper(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", LIGHT, *words], cwd=tmp_path, capture_output=True, text=True)

    done = esper("compare", "runs", "store=t.csv", "arm=arm", "pair=seed", "metric=acc")
    assert done.returncode == 0 and "same is worse than better" in done.stdout, done.stderr
    assert (tmp_path / "outputs" / "compare" / "acc-by-arm" / "comparison.html").exists()
    for words, package, extra in (
        (("seed=1",), "hydra", "train"),
        (("compare", "plan", "plan=p", "store=x.db", *PLANNED, "runs=5"), "mlflow", "mlflow"),
    ):
        refused = esper(*words)
        assert refused.returncode == 2 and "Traceback" not in refused.stderr
        assert f"This needs the Python package {package}, which is not installed; pip install 'esper-grow[{extra}]'." in refused.stderr
    (tmp_path / "events.out.tfevents.1").write_bytes(b"")
    refused = esper("compare", "runs", "store=.", "arm=arm", "metric=acc")
    assert refused.returncode == 2 and "pip install tensorboard" in refused.stderr
