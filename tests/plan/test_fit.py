"""The fit of a loss law: known laws found again, intervals that cover, refusals that say what is missing."""

import csv
import json
import re

import numpy as np
import pytest

from ropewalk.errors import UserError
from ropewalk.plan.budget import CHINCHILLA, REPLICATION, LossLaw
from ropewalk.plan.fit import Point, _Problem, fit, huber
from ropewalk.plan.runs import collect
from ropewalk.track import RunDirectory

SIZES, RATIOS = np.geomspace(5e6, 5e8, 5), (5, 15, 50, 150)


def runs(law: LossLaw, noise: float = 0.0, seed: int = 0) -> list[Point]:
    """Five sizes over a factor of 100, each on four numbers of tokens; `noise` is relative and normal."""
    rng = np.random.default_rng(seed)
    return [
        Point(n, n * k, law.loss(n, n * k) * float(np.exp(noise * rng.standard_normal())))
        for n in SIZES
        for k in RATIOS
    ]


@pytest.mark.parametrize("law", [REPLICATION, CHINCHILLA], ids=lambda law: law.name)
def test_a_law_is_found_again_from_its_own_losses(law):
    found = fit(runs(law), trials=20)
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(found.law, name) == pytest.approx(getattr(law, name), rel=1e-3)
    assert found.error < 1e-6
    assert found.warnings == ()


def test_noise_moves_the_law_within_its_intervals():
    """0.4% of noise: exponents to 10%, the optimum at 100 times the largest budget to 30%."""
    found = fit(runs(REPLICATION, 0.004, seed=3), trials=100)
    assert found.law.alpha == pytest.approx(REPLICATION.alpha, rel=0.1)
    assert found.law.beta == pytest.approx(REPLICATION.beta, rel=0.1)
    assert found.law.optimum(1e22)[0] == pytest.approx(REPLICATION.optimum(1e22)[0], rel=0.3)
    low, high = found.interval(lambda law: law.optimum(1e22)[0])
    assert low < REPLICATION.optimum(1e22)[0] < high
    assert 0.002 < found.error < 0.006
    inner = found.interval(lambda law: law.E, 0.5)
    outer = found.interval(lambda law: law.E, 0.95)
    assert outer[0] < inner[0] < inner[1] < outer[1]
    assert any("90% interval" in line for line in found.lines(1e22))


def test_90_percent_intervals_cover_about_90_percent():
    """25 sets of runs, four quantities: 75 to 97% of 100 (measured over 150 sets: 84 to 90)."""
    quantities = [
        lambda law: law.alpha,
        lambda law: law.beta,
        lambda law: law.optimum(1e22)[0],
        lambda law: law.loss(1e10, 2e11),
    ]
    hits = []
    for seed in range(25):
        found = fit(runs(REPLICATION, 0.004, seed), trials=40)
        for quantity in quantities:
            low, high = found.interval(quantity)
            hits.append(low < quantity(REPLICATION) < high)
    assert 0.75 <= np.mean(hits) <= 0.97


def test_the_fit_is_a_minimum_of_the_hubers_loss():
    """No step of 1e-3 to 1e-5 in any of 300 directions is lower; the loss is a square, then a line."""
    points = runs(REPLICATION, 0.004, seed=1)
    law = fit(points, trials=20).law
    sizes, tokens, losses = np.log(np.array(points)).T
    problem = _Problem(sizes, tokens)
    at = np.array(
        [
            np.log(law.A) - law.alpha * problem.means[0],
            np.log(law.B) - law.beta * problem.means[1],
            np.log(law.E),
            law.alpha,
            law.beta,
        ]
    )
    value = huber(problem.predict(at[None]) - losses).sum()
    steps = np.random.default_rng(0).standard_normal((300, 5))
    steps *= np.repeat([1e-3, 1e-4, 1e-5], 100)[:, None] / np.linalg.norm(steps, axis=1, keepdims=True)
    around = huber(problem.predict(at + steps) - losses).sum(-1)
    assert around.min() > value * (1 - 1e-4)
    assert huber(np.array([0.0, 5e-4, 1e-3, 2e-3])) == pytest.approx([0, 1.25e-7, 5e-7, 1.5e-6])


def test_one_run_that_went_wrong_hardly_matters():
    """A loss 20% too high in one of 20: least squares would move alpha by far more than the 3% here."""
    points = runs(REPLICATION, 0.001)
    points[7] = points[7]._replace(loss=points[7].loss * 1.2)
    assert fit(points, trials=20).law.alpha == pytest.approx(REPLICATION.alpha, rel=0.03)


def test_the_papers_table_follows_from_runs_of_its_law(shared):
    """Runs up to 500M by constants that round to the printed ones: Table A3 up to 1e13 parameters, to 7%."""
    law = LossLaw("", CHINCHILLA.E, CHINCHILLA.A, CHINCHILLA.B, 0.33815, 0.284975)
    found = fit(runs(law), trials=20).law
    with open(shared / "reference/chinchilla.csv", encoding="utf-8") as file:
        rows = [[float(x) for x in row] for row in csv.reader(file) if row[0][0].isdigit()]
    for size, *_, flops, _ in rows:
        assert found.tokens_for(size) == pytest.approx(flops / (6 * size), rel=0.07)


def test_the_same_seed_is_the_same_answer():
    points = runs(REPLICATION, 0.004)
    assert fit(points, trials=20, seed=4) == fit(points, trials=20, seed=4)
    assert fit(points, trials=20, seed=4).samples != fit(points, trials=20, seed=5).samples


@pytest.mark.parametrize(
    ("law", "noise", "words"),
    [
        (
            LossLaw("", 2.0, 1e-9, 2000.0, 0.35, 0.36),
            0.002,
            "A / N.alpha changes the loss by no more|alpha is open",
        ),
        (
            LossLaw("", 2.0, 480.0, 1e-9, 0.35, 0.36),
            0.002,
            "B / D.beta changes the loss by no more|beta is open",
        ),
        (LossLaw("", 1e-6, 30.0, 30.0, 0.12, 0.12), 0.0, "no lowest loss E"),
        (REPLICATION, 0.05, "open|limit|no more than"),
    ],
)
def test_a_degenerate_fit_says_so(law, noise, words):
    found = fit(runs(law, noise, seed=2), trials=40)
    assert any(re.search(words, warning) for warning in found.warnings)
    assert any(line.startswith("not to be trusted") for line in found.lines())


LAW = REPLICATION


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([], "0 runs .* at least 8 runs, 3 model sizes over a factor of 4, 3 numbers of tokens"),
        (runs(LAW)[:6], "6 runs with 2 model sizes"),
        ([Point(1e8, 1e8 * k, LAW.loss(1e8, 1e8 * k)) for k in range(1, 20)], "1 model sizes"),
        (
            [Point(n, 20 * n, LAW.loss(n, 20 * n)) for n in np.geomspace(1e6, 1e9, 20)],
            "correlated by 1.000; train at least models of one size on different numbers",
        ),
        ([Point(n, d, 3.0) for n in (1e8, 1.5e8, 2e8) for d in (1e9, 4e9, 9e9)], "sizes over a factor of 2,"),
        ([*runs(LAW), Point(1e9, 1e9, float("nan"))], "loss is nan"),
        ([*runs(LAW), Point(0, 1e9, 3.0)], "parameters is 0"),
    ],
)
def test_too_little_to_fit_is_refused_with_what_is_missing(points, words):
    with pytest.raises(UserError, match=words) as error:
        fit(points)
    assert "\n" not in str(error.value)


def make_run(root, name: str, loss: float = 3.0, tokens: int = 1000, **changes):
    """A run directory with what training leaves there."""
    facts = {"finished": True, "recipe": "model: {config: {}}", "validation": "v", "validated": 5} | changes
    run = RunDirectory.create(root, name, facts["recipe"], {"data": {"validation": facts["validation"]}}, "1")
    run.log({"kind": "start", "step": 0, "steps": 5, "trainable": 123, "time": 0.0})
    run.log({"kind": "validation", "step": 0, "loss": 9.0})
    for step in range(1, 6):
        run.log({"kind": "train", "step": step, "loss": 4.0, "tokens_seen": tokens * step // 5})
    run.log({"kind": "validation", "step": facts["validated"], "loss": loss})
    run.close()
    if facts["finished"]:
        run.write_text("report.md", "done")
    return run.path


def test_runs_are_collected_with_their_last_validation(tmp_path):
    """What counts is from scratch, whole, finished and validated at its end; the others are named."""
    first = make_run(tmp_path, "a", loss=3.5, tokens=1000)
    make_run(tmp_path, "b", loss=3.0, tokens=2000)
    make_run(tmp_path, "c", finished=False)
    make_run(tmp_path, "d", validated=4)
    make_run(tmp_path, "e", recipe="adapt: {method: lora}")
    make_run(tmp_path, "f", recipe="model: {source: gpt2}")
    (tmp_path / "g-1").mkdir()
    (tmp_path / "g-1" / "recipe.yaml").write_text("model: {}")
    (tmp_path / "g-1" / "report.md").write_text("")
    (tmp_path / "g-1" / "lineage.json").write_text("{")
    found = collect([tmp_path])
    assert found.points == (Point(123, 1000, 3.5), Point(123, 2000, 3.0))
    reasons = [line.partition(" (")[2].removesuffix(")") for line in found.left_out]
    assert [reason.split()[-1] for reason in reasons[:4]] == ["finished", "step", "only", "model"]
    assert reasons[4].startswith("unreadable")
    assert len(reasons) == 5
    assert found.left_out[0].startswith(str(tmp_path / "c"))
    assert collect([first, first, tmp_path]) == found
    assert collect([first]).points == found.points[:1]


def test_runs_that_were_validated_on_different_data_are_refused(tmp_path):
    make_run(tmp_path, "a")
    make_run(tmp_path, "b", validation="other")
    with pytest.raises(UserError, match="were validated on different data"):
        collect([tmp_path])
    with pytest.raises(UserError, match="no run directory, and none in it"):
        collect([tmp_path / "nowhere"])


@pytest.mark.slow
def test_what_training_leaves_is_what_is_collected(make_recipe, tiny_llama_dir):
    """A real run from scratch: its weights, its tokens, and the loss after its last step."""
    from ropewalk.model import load_model
    from ropewalk.train import train

    config = json.loads((tiny_llama_dir / "config.json").read_text())
    model = {"config": config, "tokenizer": str(tiny_llama_dir)}
    result = train(make_recipe(model=model, adapt={"method": "full"}, steps=2), progress=False)
    found = collect([result.run])
    assert found.left_out == ()
    (point,) = found.points
    trained = load_model(result.checkpoint / "model")
    assert point.parameters == sum(p.numel() for p in trained.parameters())
    assert point.loss == result.validation_after
    assert 0 < point.tokens <= 2 * 4 * 64
