"""ARIMA, the paper's classical predictor: one model per expert and layer.

Needs statsforecast (the extra `forecast`).

On a real share it is fragile: a constant series, roots on the unit circle or an optimiser that runs
out leave no usable model. Such a series falls back to simple exponential smoothing, and the notes
say how many did and why.
"""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, Sequence

import numpy as np
from numpy.typing import NDArray
from statsforecast.models import ARIMA
from tqdm import tqdm

from pangu_locmoe.errors import DataError
from pangu_locmoe.expert_load.forecast.lines import ses
from pangu_locmoe.expert_load.forecast.past import Past, Prediction

FAR = 0.25  # a share this far outside [0, 1] is no forecast but a model that blows up
IN_PROCESS = 16  # series below which starting processes costs more than it saves


def predict_arima(
    past: Past, step_Y: NDArray[Any], order: Sequence[int], jobs: int | None, progress: bool
) -> Prediction:
    """ARIMA(order) on each series; `jobs` processes (None: one per core), a bar on standard
    error if `progress`.
    """
    order = tuple(order)
    if len(order) != 3 or not all(isinstance(part, int) and part >= 0 for part in order):
        raise DataError(
            f"arima order {order}: must be three whole numbers p, d, q, not negative, for "
            "example 5,1,5"
        )
    rows, layers, experts = past.share_WLE.shape
    rows_Y = past.rows_ahead(step_Y)
    series = list(np.ascontiguousarray(past.share_WLE.reshape(rows, -1).T))
    fit = partial(_fit, order=order, ahead=int(rows_Y[-1]))
    jobs = min(len(series), jobs or os.cpu_count() or 1)
    with tqdm(total=len(series), desc="arima", unit="series", disable=not progress) as bar:
        results = []
        if jobs == 1 or len(series) < IN_PROCESS:
            for values in series:
                results.append(fit(values))
                bar.update()
        else:
            # spawn: MindSpore and NumPy keep threads, which do not survive a fork.
            with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
                for result in pool.map(
                    fit, series, chunksize=max(1, min(16, len(series) // (4 * jobs)))
                ):
                    results.append(result)
                    bar.update()
    share_YLE = np.array(ses(past.step_W).extend(past.step_W, past.share_WLE, step_Y))
    for index, (future, _) in enumerate(results):
        if future is not None:
            share_YLE[:, index // experts, index % experts] = future[rows_Y - 1]
    reasons = Counter(reason for _, reason in results if reason)
    notes = {
        "series": layers * experts,
        "fallback_to_ses": sum(reasons.values()),
        "fallback_reasons": dict(reasons),
    }
    return Prediction(share_YLE, notes=notes)


def _fit(
    values: NDArray[np.float64], order: tuple[int, int, int], ahead: int
) -> tuple[NDArray[np.float64] | None, str]:
    """The next `ahead` values, or None and why not."""
    if np.ptp(values) == 0:
        return np.full(ahead, values[-1]), ""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            model = ARIMA(order=order).fit(values)
            future = np.asarray(model.predict(h=ahead)["mean"])
    except (
        Exception
    ) as error:  # whatever the library raises on a hard series costs that series, not the forecast
        return None, type(error).__name__
    if (
        model.model_["code"] == 1
    ):  # scipy's BFGS: 1 ran out of iterations; 2, precision lost at the optimum, is the usual end
        return None, "not converged"
    if not np.isfinite(future).all():
        return None, "not finite"
    if future.min() < -FAR or future.max() > 1 + FAR:
        return None, "far outside [0, 1]"
    return future, ""
