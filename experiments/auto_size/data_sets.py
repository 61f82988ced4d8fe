"""The data sets: those that ship with esper, and tables that ship with scikit-learn, statsmodels and vega_datasets."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

PLAIN = ("mnist1d", "digits")
TARGETS = {
    "temperatures": "temp",
    "affairs": "affair",
    "weather": "weather",
    "vote": "vote",
    "breast_cancer": "target",
    "diabetes": "target",
    "cars": "Miles_per_Gallon",
    "wine": "target",
}
REGRESSIONS = ("temperatures", "diabetes", "cars")
NAMES = (*PLAIN, *TARGETS)  # the longest first
FROM = {
    "mnist1d": "mnist1d: 10 classes of series",
    "digits": "scikit-learn: 10 classes of 8×8 images",
    "temperatures": "vega_datasets: the temperature in San Francisco from day of the year and hour",
    "affairs": "statsmodels (fair): whether a woman reports an affair",
    "weather": "vega_datasets: the weather of a day in Seattle, 5 classes",
    "vote": "statsmodels (anes96): Clinton or Dole",
    "breast_cancer": "scikit-learn: 2 classes of tumours",
    "diabetes": "scikit-learn: progression of the disease",
    "cars": "vega_datasets: miles per gallon",
    "wine": "scikit-learn: 3 classes of wine",
}


def write_tables(folder: Path) -> list[str]:
    """Every table as ``<name>.csv``; the names of the data sets that there are, without those whose package is not installed."""
    found = [name for name in PLAIN if find_spec({"mnist1d": "mnist1d", "digits": "sklearn"}[name])]
    for name in TARGETS:
        try:
            _table(name).to_csv(folder / f"{name}.csv", index=False)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
        else:
            found.append(name)
    return found


def task_words(name: str, folder: Path, split: int) -> list[str]:
    """The words of a data set, divided as ``split`` says."""
    if name in PLAIN:
        return [f"task={name}", f"task.split_seed={split}"]
    kind = "regression" if name in REGRESSIONS else "classification"
    words = [f"task.path={folder / f'{name}.csv'}", f"task.target={TARGETS[name]}", f"task.kind={kind}"]
    return ["task=table", *words, f"task.split_seed={split}"]


def _table(name: str) -> pd.DataFrame:
    import pandas as pd

    if name in ("breast_cancer", "diabetes", "wine"):
        from sklearn import datasets

        frame: pd.DataFrame = getattr(datasets, f"load_{name}")(as_frame=True).frame
        return frame
    if name == "affairs":
        from statsmodels.datasets import fair

        frame = fair.load_pandas().data
        return frame.assign(affair=(frame["affairs"] > 0).astype(int)).drop(columns="affairs")
    if name == "vote":
        from statsmodels.datasets import anes96

        return anes96.load_pandas().data.drop(columns="logpopul")
    from vega_datasets import local_data

    if name == "weather":
        return local_data.seattle_weather()
    if name == "cars":
        frame = local_data.cars().drop(columns="Name").dropna(subset=["Miles_per_Gallon"])
        return frame.assign(Year=frame["Year"].dt.year)
    frame = local_data.sf_temps()
    return pd.DataFrame({"day": frame["date"].dt.dayofyear, "hour": frame["date"].dt.hour, "temp": frame["temp"]})
