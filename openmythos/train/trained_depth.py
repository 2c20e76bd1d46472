"""The depths that a checkpoint was trained at, which fine-tuning goes on with.

Ours say it: a run's own configuration, or ``depth.json`` beside the weights. Other families are
known by the fields of their config.json and by the code that trained them.

Source: Huginn (arXiv 2502.05171), section 3.3 and its sampling code; Parcae (arXiv 2604.12946),
    algorithm 4; Ouro (arXiv 2510.25741), section 4; xllm/models/looped_depth.py of ifm-ai/xllm-loop
    at 3af99f4; training/train.py of harims95/LoopLM at 0796bae.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from openmythos.checkpoint.load import read_config
from openmythos.config import ModelConfig, counts
from openmythos.config.schema import from_dict
from openmythos.folder import DEPTH_FILE, PathLike, run_of
from openmythos.interop import export
from openmythos.interop.adapter import base_of, is_adapter
from openmythos.interop.families import huginn, ifm_looped_lm, looplm_135m, parcae
from openmythos.interop.hub import local_folder
from openmythos.interop.loading import family_of
from openmythos.train.depth_schedule import (
    DepthSchedule,
    FixedDepth,
    LogNormalPoissonDepth,
    PoissonDepth,
)
from openmythos.train.recipe import RunConfig
from openmythos.train.run_folder import STATE_RECORD

Fields = Mapping[str, Any]
ROOM = 8  # times the mean: deeper draws are so rare that no run meets one
WAY_OUT = "choose a depth: --fixed-depth N, or --set train.depth.sampling.kind=poisson and the like"
DRAWS = 200  # steps over which costs are averaged


@dataclass(frozen=True)
class TrainedDepth:
    """A schedule of depths, without a ramp, and how it is known."""

    schedule: DepthSchedule
    origin: str


def trained_depth(path: PathLike, model: ModelConfig) -> TrainedDepth:
    """The depths that a checkpoint was trained at.

    Where nothing says it, they are guessed: a Poisson distribution around its own number of loops,
    with gradients through half of them, which is Parcae's rule.

    Args:
        path: What ``load_pretrained`` reads.
        model: Its config.

    Raises:
        ValueError: It was trained in a way that is not known here; the message says what to do.
    """
    folder = local_folder(path)
    if (stored := _stored(folder)) is not None:
        schedule = from_dict(DepthSchedule, stored)
        return TrainedDepth(replace(schedule, ramp=0.0), f"{path} was trained")
    if is_adapter(folder):
        return trained_depth(base_of(folder), model)
    family, loops = family_of(folder), model.num_loops
    if family is None or family is export.FAMILY:  # ours, or exported from ours
        if loops == 1:
            return TrainedDepth(_fixed(1), "models without a loop are trained")
        guess = _around(PoissonDepth(mean_recurrence=loops), -(-loops // 2))
        return TrainedDepth(guess, f"is usual: {path} does not say how it was trained")
    reader = READERS.get(family.name)
    said = _fixed(loops) if reader is None else reader(read_config(folder), model)
    return TrainedDepth(said, f"{family.name} is trained")


def depth_in_words(config: RunConfig) -> str:
    """One line about the depths of a run, beside those of the checkpoint that it starts from."""
    depth, start = config.train.depth, config.train.init_from
    said = f"depth: {depth.in_words}"
    try:
        known = None if start is None else trained_depth(start, config.model)
    except ValueError:  # a run that goes on does not need it any more
        return said
    if known is None:
        return said
    if depth == known.schedule:
        return f"{said}, as {known.origin}"
    was = known.schedule.in_words
    if type(depth.sampling) is not FixedDepth:
        return f"{said}, where {known.origin} at {was}"
    cost = _step_flops(config.model, depth) / _step_flops(config.model, known.schedule)
    return (
        f"{said}, where {known.origin} at {was}. A step costs {cost:.2f} of one there; what it can "
        "cost is the dial, where every example needs all loops; the scores by loops after training "
        "say what is left"
    )


def loops_to_score(schedule: DepthSchedule) -> tuple[int, ...]:
    """Powers of two up to twice the mean depth, at least 1 and 2."""
    most = max(2.0, 2 * schedule.sampling.mean_recurrence)
    return tuple(2**power for power in range(int(most).bit_length()) if 2**power <= most)


def _stored(folder: Path) -> Fields | None:
    """The schedule beside a checkpoint, or in the configuration of its run."""
    run = run_of(folder)
    for place, keys in (
        (folder / STATE_RECORD, ("run", "train", "depth")),
        (folder / DEPTH_FILE, ()),
        (run and run / "config.json", ("train", "depth")),
    ):
        if place is None or not place.is_file():
            continue
        try:
            found: Any = json.loads(place.read_text(encoding="utf-8"))
            for key in keys:
                found = found[key]
            from_dict(DepthSchedule, found)
        except (ValueError, KeyError, TypeError) as error:
            if keys:  # of an older version
                continue
            raise ValueError(f"{place} holds no schedule of depths: {error}; {WAY_OUT}") from None
        return dict(found)
    return None


def _step_flops(model: ModelConfig, depth: DepthSchedule) -> float:
    drawn = (
        depth.sample(seed=0, step=step, progress=1.0, batch_size=1)[0] for step in range(DRAWS)
    )
    return fmean(
        counts.training_flops(model, num_loops=int(loops), grad_loops=depth.mean_backprop_depth)
        for loops in drawn
    )


# --- families -------------------------------------------------------------------------------------


def _fixed(loops: int) -> DepthSchedule:
    return DepthSchedule(sampling=FixedDepth(mean_recurrence=loops), max_loops=max(64, loops))


def _around(
    sampling: PoissonDepth | LogNormalPoissonDepth,
    backprop: int,
    *,
    per_sequence: bool = False,
    most: int | None = None,
) -> DepthSchedule:
    return DepthSchedule(
        sampling=sampling,
        per_sequence=per_sequence,
        mean_backprop_depth=backprop,
        max_loops=ROOM * sampling.mean_recurrence if most is None else most,
    )


def _huginn(data: Fields, model: ModelConfig) -> DepthSchedule:
    """1 + a Poisson number whose rate is log-normal; one depth per step."""
    _require(data, "sampling_scheme", "poisson-lognormal-filling")
    sampling = LogNormalPoissonDepth(mean_recurrence=model.num_loops, sigma=0.5)
    return _around(sampling, data.get("mean_backprop_depth", 8))


def _parcae(data: Fields, model: ModelConfig) -> DepthSchedule:
    """Poisson, drawn for every sequence."""
    _require(data, "sampling_scheme", "poisson-truncated-full")
    _require(data, "recurrent_iteration_method", "per-sequence")
    sampling = PoissonDepth(mean_recurrence=model.num_loops)
    return _around(sampling, data["mean_backprop_depth"], per_sequence=True)


def _looplm(data: Fields, model: ModelConfig) -> DepthSchedule:
    """Poisson up to four times the mean, drawn for every sequence."""
    loops = model.num_loops
    sampling = PoissonDepth(mean_recurrence=loops)
    return _around(sampling, -(-loops // 2), per_sequence=True, most=4 * loops)


def _ifm(data: Fields, model: ModelConfig) -> DepthSchedule:
    """As Huginn where its depth is controlled, with its own mean and cap; else fixed."""
    f = data["model"]
    if f.get("huginn_depth_prior") not in (None, "", "none", False):
        raise ValueError(
            f"config.json: huginn_depth_prior is {f['huginn_depth_prior']!r}: depths were drawn "
            f"from a prior that was learnt, which the checkpoint does not hold; {WAY_OUT}"
        )
    if f.get("arch") != "huginn" or not f.get("huginn_depth_control"):
        return _fixed(model.num_loops)
    _require(f, "huginn_sampling_scheme", "poisson-lognormal-capped")
    # Their target is the mean of 1 + Poisson; ours that of the rate.
    mean = round(f.get("huginn_poisson_lognormal_target_mean", model.num_loops)) - 1
    sigma = float(f.get("huginn_poisson_lognormal_sigma", 0.5))
    sampling = LogNormalPoissonDepth(mean_recurrence=max(1, mean), sigma=sigma)
    most = f.get("huginn_poisson_lognormal_max", 64)
    return _around(sampling, f.get("huginn_backprop_depth") or most, most=most)


def _require(data: Fields, name: str, known: str) -> None:
    if data.get(name, known) != known:
        raise ValueError(
            f"config.json: {name} is {data[name]!r}, and only {known!r} is drawn here; {WAY_OUT}"
        )


# The others are trained at a fixed number of loops, all with gradients.
READERS: Mapping[str, Callable[[Fields, ModelConfig], DepthSchedule]] = {
    huginn.FAMILY.name: _huginn,
    huginn.RETROFITTED.name: _huginn,
    parcae.FAMILY.name: _parcae,
    looplm_135m.FAMILY.name: _looplm,
    ifm_looped_lm.FAMILY.name: _ifm,
}
