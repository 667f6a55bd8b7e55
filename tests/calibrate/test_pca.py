import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA as SklearnPCA

from kvcal.calibrate.moments import MomentsFitter
from kvcal.calibrate.pca import fit_pca, principal_angles


def keys(seed=0, heads=2, tokens=500, dim=16):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(1, -3, dim, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator, dtype=torch.float64)).Q
    return (torch.randn(heads, tokens, dim, generator=generator, dtype=torch.float64) * scale) @ turn + 2.0


def moments_of(data):
    fitter = MomentsFitter(data.shape[0], data.shape[-1])
    for part in data.split(60, 1):
        fitter.update(part)
    return fitter.finalize()


def test_equals_scikit_learn():
    data = keys()
    pca = fit_pca(moments_of(data))
    for head in range(2):
        oracle = SklearnPCA().fit(data[head].numpy())
        np.testing.assert_allclose(pca.eigenvalues[head], oracle.explained_variance_, rtol=1e-6)
        np.testing.assert_allclose(pca.mean[head], oracle.mean_, rtol=1e-10)
        for rank in (1, 4, 9):
            angles = subspace_angles(pca.components[head, :rank].numpy().T, oracle.components_[:rank].T)
            assert angles.max() < 1e-7


def test_uncentred_equals_the_singular_values_of_the_data():
    data = keys()
    pca = fit_pca(moments_of(data), centred=False)
    for head in range(2):
        expected = torch.linalg.svdvals(data[head]) ** 2 / data.shape[1]
        torch.testing.assert_close(pca.eigenvalues[head], expected, rtol=1e-6, atol=0)


def test_components_are_orthonormal_rows_with_positive_largest_entries():
    components = fit_pca(moments_of(keys())).components
    identity = torch.eye(16, dtype=torch.float64).expand(2, 16, 16)
    torch.testing.assert_close(components @ components.mT, identity, rtol=0, atol=1e-12)
    largest = components.gather(-1, components.abs().argmax(-1, keepdim=True))
    assert (largest > 0).all()


def test_signs_do_not_depend_on_the_sign_of_the_data():
    data = keys()
    rows = fit_pca(moments_of(data)).components
    mirrored = fit_pca(moments_of(-data)).components
    torch.testing.assert_close(rows, mirrored, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 8, 12])
def test_principal_angles_equal_scipy(rank):
    generator = torch.Generator().manual_seed(rank)
    a, b = torch.linalg.qr(torch.randn(2, 12, 12, generator=generator, dtype=torch.float64)).Q.mT[..., :rank, :]
    b = torch.linalg.qr((a + 0.1 * b).T).Q.T
    expected = np.sort(subspace_angles(a.numpy().T, b.numpy().T))
    np.testing.assert_allclose(principal_angles(a, b), expected, atol=1e-9)


def test_equal_subspaces_have_angles_near_zero_not_near_root_epsilon():
    rows = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q[:6]
    assert principal_angles(rows, rows.flip(0)).max() < 1e-14
