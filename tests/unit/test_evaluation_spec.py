import pytest

from fastflow.errors import ConfigError
from fastflow.evaluation.metrics import FID, RealHalves
from fastflow.evaluation.spec import Evaluation, Expected
from fastflow.evaluation.toy_metrics import EnergyDistance, FlowMapError


def test_defaults_follow_the_convention():
    evaluation = Evaluation(metrics=(FID(),))
    assert (evaluation.samples, evaluation.steps, evaluation.seed) == (50_000, (1, 2, 4, 8), 0)
    assert evaluation.quantisation == "truncate"
    assert Expected(steps=1, value=2.92, source="x").samples == 50_000


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"samples": 1}, "evaluation.samples: 1 given"),
        ({"steps": (0,)}, "evaluation.steps"),
        ({"steps": ()}, "evaluation.steps"),
        ({"steps": (1, 1)}, "different"),
        ({"blocks": 0}, "evaluation.blocks"),
        ({"batch_size": 0}, "evaluation.batch_size"),
        ({"seed": -1}, "evaluation.seed"),
        ({"times": {2: (0.8, 0.3)}}, "evaluation.times.2"),
        ({"times": {3: (0.3, 0.8)}}, "decreasing"),
        ({"quantisation": "ceil"}, "quantisation"),
        ({"metrics": (3,)}, "metrics"),
    ],
)
def test_impossible_evaluations_are_refused(arguments, text):
    with pytest.raises(ConfigError, match=text):
        Evaluation(**{"metrics": (FID(),), **arguments})


@pytest.mark.parametrize(
    "make",
    [
        lambda: Expected(steps=0, value=1.0, source=""),
        lambda: RealHalves(splits=0),
        lambda: FlowMapError(samples=1),
        lambda: EnergyDistance(samples=1),
        lambda: FID(extractor="inception"),
    ],
)
def test_impossible_parts_are_refused(make):
    with pytest.raises(ConfigError):
        make()
