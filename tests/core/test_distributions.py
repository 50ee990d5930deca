"""Laws of the distances between sets of images."""

import numpy as np
import pytest
import torch

from diffsr_core.distributions import Moments, frechet_distance, inception_score, kernel_distance, moments


def draw(n: int, d: int, *, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1, (n, d)) @ np.random.default_rng(9).normal(0, 0.4, (d, d))


def rotation(d: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(4).normal(size=(d, d)))[0]


def test_the_frechet_distance_of_gaussians_has_its_closed_form() -> None:
    # Covariances with common axes: the distance is that of the means plus that of the deviations.
    q = rotation(6)
    s1, s2 = np.array([1.0, 2, 3, 4, 5, 0]), np.array([2.0, 2, 1, 6, 0, 0])
    m1, m2 = np.arange(6.0), np.ones(6)
    a, b = Moments(m1, q @ np.diag(s1**2) @ q.T), Moments(m2, q @ np.diag(s2**2) @ q.T)
    assert frechet_distance(a, b) == pytest.approx(np.sum((m1 - m2) ** 2) + np.sum((s1 - s2) ** 2), abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), abs=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_the_frechet_distance_in_two_dimensions_needs_no_common_axes() -> None:
    # For 2x2, Tr of the root of M is sqrt(Tr M + 2 sqrt(det M)).
    a, b = np.array([[2.0, 0.5], [0.5, 1]]), np.array([[1.0, -0.3], [-0.3, 3]])
    product = a @ b
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.trace(a) + np.trace(b) - 2 * root
    assert frechet_distance(Moments(np.zeros(2), a), Moments(np.zeros(2), b)) == pytest.approx(expected, abs=1e-12)


def test_the_frechet_distance_is_that_of_torchmetrics() -> None:
    theirs = pytest.importorskip("torchmetrics.image.fid")._compute_fid
    a, b = moments(draw(300, 12, seed=1)), moments(draw(250, 12, seed=2, shift=0.3))
    expected = theirs(*(torch.from_numpy(x) for x in (*a, *b)))
    assert frechet_distance(a, b) == pytest.approx(float(expected), abs=1e-8)


def test_fewer_images_than_features_is_no_trouble() -> None:
    few = moments(draw(8, 40, seed=3))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(few, Moments(few.mean + 2, few.covariance)) == pytest.approx(40 * 4, rel=1e-6)


def test_the_moments_are_mean_and_unbiased_covariance() -> None:
    found = moments(np.array([[0, 0], [2, 4]], dtype=np.float32))
    assert found.mean.tolist() == [1, 2]
    assert found.covariance.tolist() == [[2, 4], [4, 8]]
    assert moments(np.array([[1.0], [3.0]])).covariance.tolist() == [[2.0]]


def test_the_kernel_distance_of_two_pairs_has_its_closed_form() -> None:
    # D = 1: k(x, y) = (x y + 1)^3, of {0, 1} and {2, 3}.
    within_a, within_b = (0 * 1 + 1) ** 3, (2 * 3 + 1) ** 3
    across = np.mean([(x * y + 1) ** 3 for x in (0, 1) for y in (2, 3)])
    found = kernel_distance(np.array([[0.0], [1.0]]), np.array([[2.0], [3.0]]))
    assert found == pytest.approx(within_a + within_b - 2 * across, abs=1e-12)


def test_the_kernel_distance_is_that_of_torchmetrics_also_over_blocks() -> None:
    poly_mmd = pytest.importorskip("torchmetrics.image.kid").poly_mmd
    for n in (50, 1500):
        a, b = draw(n, 10, seed=1), draw(n, 10, seed=2, shift=0.5)
        theirs = float(poly_mmd(torch.from_numpy(a), torch.from_numpy(b)))
        assert kernel_distance(a, b) == pytest.approx(theirs, rel=1e-9)


def test_the_kernel_distance_is_unbiased_and_takes_sets_of_two_sizes() -> None:
    same = [kernel_distance(draw(40, 4, seed=k), draw(60, 4, seed=100 + k)) for k in range(200)]
    assert min(same) < 0 < max(same)
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(len(same))


def test_the_inception_score_has_its_closed_form_values() -> None:
    certain = np.eye(5)[np.arange(100) % 5]
    assert inception_score(certain, splits=4) == pytest.approx((5.0, 0.0), abs=1e-12)
    assert inception_score(np.full((30, 8), 1 / 8)) == pytest.approx((1.0, 0.0), abs=1e-12)
    # Two splits, of one class and of two: 1 and 2.
    mixed = np.eye(3)[[0, 0, 0, 0, 1, 2, 1, 2]]
    assert inception_score(mixed, splits=2) == pytest.approx((1.5, 0.5), abs=1e-12)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_inception_score_is_that_of_torchmetrics() -> None:
    module = pytest.importorskip("torchmetrics.image.inception")
    logits = torch.from_numpy(np.random.default_rng(7).normal(0, 2, (200, 9)))
    # Its constructor wants a network; what is compared is its formula on the features that it has kept.
    theirs = module.InceptionScore(feature=torch.nn.Identity(), splits=1)
    theirs.features = [logits]
    expected, _ = theirs.compute()
    assert inception_score(logits.softmax(1).numpy(), splits=1).mean == pytest.approx(float(expected), rel=1e-9)


def test_mistakes_are_refused_by_name() -> None:
    good = draw(20, 4, seed=1)
    with pytest.raises(ValueError, match=r"features has shape \(20,\)"):
        moments(good[:, 0])
    with pytest.raises(ValueError, match="N at least 2"):
        kernel_distance(good[:1], good)
    with pytest.raises(ValueError, match="not finite"):
        moments(np.where(good > 1, np.nan, good))
    with pytest.raises(ValueError, match="4 and 3 columns"):
        kernel_distance(good, good[:, :3])
    with pytest.raises(ValueError, match="one network's features"):
        frechet_distance(moments(good), moments(good[:, :3]))
    with pytest.raises(ValueError, match="sum to 1"):
        inception_score(good)
    with pytest.raises(ValueError, match="splits is 10"):
        inception_score(np.full((5, 2), 0.5))
