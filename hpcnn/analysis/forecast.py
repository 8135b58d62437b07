"""What a configuration is predicted to cost on some ranks: plan, exchange and step, before a rank is started."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from hpcnn import bounded
from hpcnn.config import Config
from hpcnn.data import open_data
from hpcnn.errors import PlanError
from hpcnn.nn import models
from hpcnn.plan import planner
from hpcnn.plan.buckets import Bucket
from hpcnn.plan.exchanges import buckets_of
from hpcnn.plan.prediction import Prediction, predict
from hpcnn.plan.search import Search, plan_for, search_for
from hpcnn.plan.site import Site
from hpcnn.spec import ModelSpec


class Forecast(NamedTuple):
    """A plan with the buckets of its gradients, and the step that it is predicted to make."""

    plan: planner.Plan
    buckets: tuple[Bucket, ...]
    prediction: Prediction
    search: Search | None
    """What "auto" compared; None where the plan was not looked for."""


def model_of(config: Config) -> ModelSpec:
    """Return the model that a configuration trains, for the images of its data set."""
    with open_data(config.data, "train") as data:
        return models.configured(config.model, data.image_shape, data.num_classes)


def forecast(config: Config, model: ModelSpec, site: Site, plan_text: str | None = None) -> Forecast:
    """Return what `config` is predicted to do at `site`.

    Parameters
    ----------
    config : Config
        Batch, plan and exchange.
    model : ModelSpec
        Its model, see `model_of`.
    site : Site
        The machine and the nodes of the ranks.
    plan_text : str, optional
        A saved plan to obey instead of the configuration's preset.

    Raises
    ------
    PlanError
        If the plan cannot be run, or is for another number of ranks.
    """
    search = None
    if plan_text is not None:
        plan = planner.from_toml(plan_text, model, config.train.global_batch, site.ranks)
    elif config.plan.preset == "auto":
        search = search_for(config, model, site)
        plan = planner.in_turns(search.plan, model, config.plan.turns)
    else:
        plan = plan_for(config, model, site)
    buckets = buckets_of(config, model, plan, site)
    return Forecast(plan, buckets, predict(model, plan, buckets, site), search)


def read_plan(path: Path) -> str:
    """Return the text of a saved plan; raises PlanError where it cannot be read."""
    try:
        return bounded.text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"plan: cannot read '{path}': {error}.") from None
