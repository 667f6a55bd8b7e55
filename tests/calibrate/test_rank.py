import pytest
import torch

from kvcal.artifacts import KvcalError
from kvcal.calibrate.rank import participation_ratio, rank_at


@pytest.mark.parametrize(
    ("spectrum", "variance", "rank"),
    [
        ([9, 1], 0.9, 1),  # reached exactly: one, not zero and not two
        ([8.9, 1.1], 0.9, 2),
        ([5, 4, 1], 0.9, 2),
        ([1] * 10, 0.9, 9),
        ([0.1] * 10, 0.3, 3),  # 0.1 + 0.1 + 0.1 rounds above 0.3, seven of them below 0.7
        ([0.1] * 10, 0.7, 7),
        ([1, 0, 0, 0], 0.9, 1),
        ([4, 3, 2, 1], 1.0, 4),
        ([4, 3, 0, 0], 1.0, 2),
        ([100, 50, 25, 12, 6, 3], 0.5, 1),
        ([100, 50, 25, 12, 6, 3], 0.95, 4),  # 175 of 196 is 0.893, 187 is 0.954
    ],
)
def test_rank_at_hand_computed_spectra(spectrum, variance, rank):
    assert rank_at(torch.tensor(spectrum, dtype=torch.float64), variance).item() == rank


def test_rank_at_works_on_any_leading_shape():
    spectra = torch.tensor([[[9.0, 1.0], [5.0, 5.0]], [[1.0, 0.0], [6.0, 4.0]]])
    assert rank_at(spectra, 0.9).tolist() == [[1, 2], [1, 2]]


@pytest.mark.parametrize("variance", [0.0, -0.1, 1.01, float("nan")])
def test_variance_outside_its_range_is_refused(variance):
    with pytest.raises(KvcalError, match="above 0 and at most 1"):
        rank_at(torch.ones(3), variance)


def test_participation_ratio_counts_equal_directions():
    spectra = torch.tensor([[3.0, 3, 3, 3], [7, 0, 0, 0], [2, 2, 0, 0]])
    torch.testing.assert_close(participation_ratio(spectra), torch.tensor([4.0, 1, 2], dtype=torch.float64))
