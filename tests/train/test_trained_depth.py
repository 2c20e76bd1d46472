"""The schedule that results for every family, from its golden checkpoint's own config."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.zoo import recipes
from openmythos.config.schema import to_dict
from openmythos.folder import DEPTH_FILE, write_json
from openmythos.interop.hub import zoo_names
from openmythos.interop.loading import load_config
from openmythos.train.depth_schedule import (
    DepthSchedule,
    FixedDepth,
    LogNormalPoissonDepth,
    PoissonDepth,
    UniformDepth,
)
from openmythos.train.run import resolve
from openmythos.train.trained_depth import depth_in_words, loops_to_score, trained_depth
from tests.train.examples import run, text_config, write_text

GOLDEN = Path(__file__).parent.parent / "golden"


def schedule(sampling: Any, backprop: int | None, most: int, rows: bool = False) -> DepthSchedule:
    return DepthSchedule(
        sampling=sampling, mean_backprop_depth=backprop, max_loops=most, per_sequence=rows
    )


def poisson(mean: int) -> PoissonDepth:
    return PoissonDepth(mean_recurrence=mean)


def log_normal(mean: int) -> LogNormalPoissonDepth:
    return LogNormalPoissonDepth(mean_recurrence=mean, sigma=0.5)


def fixed(loops: int) -> DepthSchedule:
    return schedule(FixedDepth(mean_recurrence=loops), None, 64)


FAMILIES = {
    "huginn": schedule(log_normal(8), 4, 64),
    "parcae": schedule(poisson(8), 4, 64, rows=True),
    "ouro": fixed(4),
    "ifm-parcae": schedule(log_normal(4), 10, 64),
    "ifm-linear": schedule(log_normal(4), 10, 64),
    "ifm-orthoinj": schedule(log_normal(4), 10, 64),
    "ifm-middle": fixed(8),
    "ifm-moe": fixed(4),
    "looplm-naive": schedule(poisson(6), 3, 24, rows=True),
    "looplm-parcae": schedule(poisson(6), 3, 24, rows=True),
    "openmythos-gqa": fixed(4),
    "openmythos-mla": fixed(4),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_schedule_of_every_family(name: str) -> None:
    folder = GOLDEN / name
    found = trained_depth(folder, load_config(folder))
    assert found.schedule == FAMILIES[name]
    assert found.origin.endswith(" is trained")


def edited(name: str, folder: Path, **changes: Any) -> Path:
    shutil.copytree(GOLDEN / name, folder)
    path = folder / "config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data.get("model", data).update(changes)
    path.write_text(json.dumps(data), encoding="utf-8")
    return folder


def test_huginn_as_published(tmp_path: Path) -> None:
    """Mean 32 of the rate, so 33 loops, gradients through 8; 94 loops are one in a hundred."""
    folder = edited("huginn", tmp_path / "a", mean_recurrence=32, mean_backprop_depth=8)
    found = trained_depth(folder, load_config(folder)).schedule
    assert found == schedule(log_normal(32), 8, 256)
    assert found.in_words == (
        "1 to 256 loops around 33 (log-normal Poisson), drawn for every step; gradients through "
        "the last 8"
    )
    assert loops_to_score(found) == (1, 2, 4, 8, 16, 32, 64)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("huginn", {"sampling_scheme": "geometric"}, "sampling_scheme is 'geometric'"),
        ("parcae", {"sampling_scheme": "fixed"}, "sampling_scheme is 'fixed'"),
        ("parcae", {"recurrent_iteration_method": "per-batch"}, "method is 'per-batch'"),
        ("ifm-parcae", {"huginn_sampling_scheme": "sobol"}, "sampling_scheme is 'sobol'"),
        ("ifm-parcae", {"huginn_depth_prior": "learned"}, "from a prior that was learnt"),
    ],
)
def test_schedules_that_are_not_known_are_refused_in_one_line(
    tmp_path: Path, name: str, changes: dict[str, Any], said: str
) -> None:
    folder = edited(name, tmp_path / "a", **changes)
    with pytest.raises(ValueError, match=said) as caught:
        resolve(None, None, None, [], folder)
    assert "--fixed-depth N" in str(caught.value) and "\n" not in str(caught.value)
    given = ['train.depth.sampling={"kind": "fixed", "mean_recurrence": 3}']
    assert resolve(None, None, None, given, folder).train.depth.sampling.mean_recurrence == 3


def test_models_that_ship_say_the_depths_of_their_recipes() -> None:
    known = recipes()
    for zoo in zoo_names():
        recipe = known[zoo.removeprefix("zoo:")].train.depth
        found = trained_depth(zoo, load_config(zoo))
        assert found.schedule == replace(recipe, ramp=0.0)
        assert found.origin == f"{zoo} was trained"


def test_a_run_says_it_itself_and_tells_its_copies(tmp_path: Path) -> None:
    """Also a run of an older version, whose checkpoints do not hold its configuration."""
    source = write_text(tmp_path, 40)
    sampling = UniformDepth(low=2, high=3)
    depth = DepthSchedule(sampling=sampling, mean_backprop_depth=2, ramp=0.5)
    config = text_config(source, max_steps=1, depth=depth, eval_loops=())
    out = tmp_path / "run"
    run(config, out)
    known = replace(depth, ramp=0.0)
    newest = out / "checkpoints" / "step-00000001"
    assert trained_depth(out, config.model).schedule == known
    (newest / "training_state.json").unlink()
    assert trained_depth(newest, config.model).schedule == known
    (out / "config.json").unlink()
    loops = config.model.num_loops
    guess = trained_depth(newest, config.model)
    assert guess.schedule == schedule(poisson(loops), -(-loops // 2), 8 * loops)
    assert "does not say how it was trained" in guess.origin
    write_json(newest / DEPTH_FILE, to_dict(known))
    assert trained_depth(newest, config.model).schedule == known
    (newest / DEPTH_FILE).write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"depth\.json holds no schedule of depths.*--fixed-depth"):
        trained_depth(newest, config.model)
    once = replace(config.model, num_loops=1)
    (newest / DEPTH_FILE).unlink()
    assert trained_depth(newest, once).schedule == fixed(1)


def test_what_is_said_of_depths_before_a_run() -> None:
    def said(*overrides: str) -> str:
        return depth_in_words(resolve(None, "hops", None, list(overrides), Path("zoo:walks")))

    assert said() == (
        "depth: 2 to 8 loops around 4 (Poisson), drawn for every row; gradients through all, as "
        "zoo:walks was trained"
    )
    other = said("train.depth.sampling.high=6")
    assert "2 to 6 loops" in other and "zoo:walks was trained at 2 to 8 loops" in other
    one = said('train.depth.sampling={"kind": "fixed", "mean_recurrence": 2}')
    assert one.startswith("depth: always 2 loops; gradients through all, where zoo:walks was")
    assert "the dial" in one and "\n" not in one
    share = float(one.partition("A step costs ")[2].partition(" of one there")[0])
    assert share == pytest.approx(2 / 4.08, abs=0.05)  # there is little but the loops
    for overrides, loops in (
        ([], 8),
        (["train.depth.sampling.kind=fixed", "train.depth.sampling.mean_recurrence=3"], 3),
        (["data.check_loops=5"], 5),
    ):
        found = resolve(None, "hops", None, overrides, Path("zoo:walks"))
        assert found.data.check_loops == loops
    gone = resolve(None, "hops", None, [], Path("zoo:walks"))
    gone = replace(gone, train=replace(gone.train, init_from="gone"))
    assert depth_in_words(gone) == said().partition(", as")[0]


def test_the_deepest_step_is_the_one_that_a_run_draws() -> None:
    depth = FAMILIES["parcae"]
    drawn = [depth.sample(seed=5, step=n, progress=1.0, batch_size=3)[0] for n in range(20)]
    assert depth.deepest(seed=5, steps=20, batch_size=3) == max(int(d.max()) for d in drawn) > 8
