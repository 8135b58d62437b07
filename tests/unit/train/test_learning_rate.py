import math

import pytest

from hpcnn.config import TrainConfig
from hpcnn.errors import ConfigError
from hpcnn.train import learning_rate


def rates(count, *, per_epoch=10, total=100, **settings):
    schedule = learning_rate.build(TrainConfig(**settings), steps_per_epoch=per_epoch, total_steps=total)
    return [schedule.rate(step) for step in range(count)]


def test_constant_rate_stays():
    assert rates(100, schedule="constant", lr=0.3) == [0.3] * 100


def test_warm_up_climbs_in_equal_steps_to_the_peak():
    assert rates(6, schedule="constant", lr=0.4, warmup_epochs=0.4) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_cosine_falls_from_the_peak_behind_the_warm_up_to_zero():
    values = rates(102, schedule="cosine", lr=0.8, warmup_epochs=2)
    assert values[19] == pytest.approx(0.8)
    assert values[20] == pytest.approx(0.8)
    assert values[60] == pytest.approx(0.4)
    assert values[99] == pytest.approx(0.4 * (1 + math.cos(math.pi * 79 / 80)))
    assert values[100:] == pytest.approx([0.0, 0.0])


def test_step_schedule_multiplies_by_gamma_at_each_milestone():
    values = rates(100, schedule="step", lr=1.0, milestones=(3, 6.5), gamma=0.1)
    assert values[29] == 1.0
    assert values[30] == pytest.approx(0.1)
    assert values[64] == pytest.approx(0.1)
    assert values[65] == pytest.approx(0.01)


def test_polynomial_of_power_two_is_a_quarter_at_half_way():
    values = rates(101, schedule="polynomial", lr=2.0, power=2.0)
    assert values[0] == 2.0
    assert values[50] == pytest.approx(0.5)
    assert values[100] == 0.0


def test_the_peak_scales_with_the_global_batch():
    assert rates(1, schedule="constant", lr=0.1, base_batch=256, global_batch=1024) == pytest.approx([0.4])
    assert rates(1, schedule="constant", lr=0.1, base_batch=0, global_batch=1024) == [0.1]


def test_a_warm_up_longer_than_the_run_only_climbs():
    assert rates(3, total=3, schedule="cosine", lr=1.0, warmup_epochs=1) == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("milestones", [(), (5, 3), (3, 3)])
def test_step_schedule_needs_ascending_milestones(milestones):
    with pytest.raises(ConfigError, match=r"'train.milestones' .* must be ascending"):
        rates(1, schedule="step", milestones=milestones)


@pytest.mark.parametrize(
    ("ours", "name", "theirs"),
    [
        ({"schedule": "cosine"}, "CosineAnnealingLR", {"T_max": 40}),
        ({"schedule": "polynomial", "power": 2.0}, "PolynomialLR", {"total_iters": 40, "power": 2.0}),
        (
            {"schedule": "step", "milestones": (1, 3), "gamma": 0.5},
            "MultiStepLR",
            {"milestones": [10, 30], "gamma": 0.5},
        ),
    ],
)
def test_rates_equal_those_of_torch(ours, name, theirs):
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.7)
    scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **theirs)
    expected = []
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(40, total=40, lr=0.7, **ours) == pytest.approx(expected, rel=1e-9, abs=1e-12)
