import pytest
import torch
from torch import nn

from benchmarks.measure import Timing
from benchmarks.models import CASES, case, gflop, matmul_rate
from ris_core.models.contract import MapSystem
from ris_core.models.cris import CRIS
from ris_core.models.risclip import RISCLIPLocator


@pytest.mark.parametrize("training", [True, False])
def test_all_of_an_attention_is_counted(training: bool) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).train(training)
    x = torch.randn(3, 5, 8)
    projections, products = 4 * 8 * 8, 2 * 5 * 8  # multiply-adds a token
    with torch.inference_mode():
        counted = gflop(lambda: attention(x, x, x, need_weights=False))
    assert counted == pytest.approx(2 * 3 * 5 * (projections + products) / 1e9)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(("name", "kind"), [("small", CRIS), ("small_risclip", RISCLIPLocator)])
def test_small_cases_can_be_built_and_are_always_the_same(name: str, kind: type[MapSystem]) -> None:
    chosen = case(name)
    one, other = chosen.build("cpu"), chosen.build("cpu")
    assert type(one) is kind
    assert one.config == chosen.config
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


def test_published_cases_are_of_the_published_sizes() -> None:
    published = {name: case(name) for name in CASES if not name.startswith("small")}
    sizes = {name: (chosen.image_size, chosen.first_stage) for name, chosen in published.items()}
    assert sizes == {
        "r50": (416, False), "risclip_b": (640, True), "risclip_b_shared": (640, True), "risclip_b_stage2": (640, False),
    }  # fmt: skip


def test_a_matrix_product_has_a_rate_by_either_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.models.MATMUL_SIDE", {"cpu": 100})
    timing = Timing(cpu=2e-3, wall=1e-3)
    monkeypatch.setattr("benchmarks.models.best_of", lambda functions, rounds, finish: dict.fromkeys(functions, timing))
    assert matmul_rate("cpu", torch.float32, "cpu") == pytest.approx(1.0)
    assert matmul_rate("cpu", torch.float32, "wall") == pytest.approx(2.0)
