import pytest
import torch
from torch import nn

from benchmarks.models import gflop


@pytest.mark.parametrize("training", [True, False])
def test_all_of_an_attention_is_counted(training: bool) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).train(training)
    x = torch.randn(3, 5, 8)
    projections, products = 4 * 8 * 8, 2 * 5 * 8  # multiply-adds a token
    with torch.inference_mode():
        counted = gflop(lambda: attention(x, x, x, need_weights=False))
    assert counted == pytest.approx(2 * 3 * 5 * (projections + products) / 1e9)
    assert torch.backends.mha.get_fastpath_enabled()
